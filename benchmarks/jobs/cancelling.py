"""From a cancel to the end of the stream that a reader has, over and over.

    python -m benchmarks.jobs.cancelling '{"runs": "http://127.0.0.1:8000/v1/runs", "body": {"producer": "a"}, ...}'

Options: `runs`, where a run is started by posting `body`; `stream` and `cancel`, the addresses of its stream and of its
cancel, with `ID` for its id; `count`, how many runs. The clock runs from before the cancel is sent, as soon as the
reader has the run's first event, until the reader has the end of the body. All connections are there before.
"""

from __future__ import annotations

import json
import socket
import time
from contextlib import closing
from typing import Final
from urllib.parse import urlsplit

import httpx2

from benchmarks.load import EVENT, LAST
from benchmarks.model import percentile
from benchmarks.processes import options

WITHIN: Final = 30.0
"""Seconds in which something has to come."""
BODY: Final = b"{}"


class Connection:
    """A plain connection to a server."""

    def __init__(self, url: str) -> None:
        self.netloc = urlsplit(url).netloc
        host, _, port = self.netloc.partition(":")
        self._socket = socket.create_connection((host, int(port)), timeout=WITHIN)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._rest = b""

    def send(self, method: str, url: str, *headers: str, body: bytes = b"") -> None:
        """Send a request, in one piece."""
        lines = [f"{method} {urlsplit(url).path} HTTP/1.1", f"Host: {self.netloc}", *headers, "\r\n"]
        self._socket.sendall("\r\n".join(lines).encode() + body)

    def until(self, what: bytes) -> bytes:
        """Read until this has come; what came before it.

        Raises:
            EOFError: the connection was closed before.
        """
        while what not in self._rest:
            data = self._socket.recv(65536)
            if not data:
                raise EOFError(f"there is no {what!r} in {self._rest!r}")
            self._rest += data
        before, _, self._rest = self._rest.partition(what)
        return before

    def close(self) -> None:
        """Give the connection up."""
        self._socket.close()


def cancelled(client: httpx2.Client, given: dict[str, str]) -> float:
    """Start a run, read it, and cancel it; the seconds from the cancel to the end.

    Raises:
        AssertionError: the cancel was refused.
    """
    run_id = client.post(given["runs"], json=given["body"]).raise_for_status().json()["id"]
    stream, cancel = given["stream"].replace("ID", run_id), given["cancel"].replace("ID", run_id)
    with closing(Connection(stream)) as reader, closing(Connection(cancel)) as canceller:
        reader.send("GET", stream, "Accept: text/event-stream")
        reader.until(EVENT)
        began = time.monotonic()
        canceller.send("POST", cancel, "Content-Type: application/json", f"Content-Length: {len(BODY)}", body=BODY)
        reader.until(LAST)
        seconds = time.monotonic() - began
        head = canceller.until(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 20"):
        raise AssertionError(f"a cancel was answered with {head!r}")
    return seconds


def main() -> dict[str, float]:
    """Cancel the runs."""
    given = options()
    with httpx2.Client(timeout=WITHIN) as client:
        took = sorted(cancelled(client, given) * 1000 for _ in range(given["count"]))
    return {"p50 ms": percentile(took, 50), "p99 ms": percentile(took, 99), "max ms": took[-1], "cancels": len(took)}


if __name__ == "__main__":
    print(json.dumps(main()))
