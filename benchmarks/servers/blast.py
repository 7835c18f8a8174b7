"""Prepared bytes over plain sockets, in one thread: about the least that a server can do.

| path | what comes |
|---|---|
| `/burst?count=…&size=…&times=…` | `count` events of `size` bytes, made beforehand, `times` times |
| `/ticks?rate=…&size=…` | `rate` events a second, each with its time, made once and written to each reader in turn |
"""

from __future__ import annotations

import select
import socket
import time
from functools import cache
from typing import Final
from urllib.parse import parse_qsl, urlsplit

HEAD: Final = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
JOINED: Final = 64
"""Events in a chunk of a burst."""


def chunk(data: bytes) -> bytes:
    """A chunk of a body (RFC 9112, 7.1)."""
    return b"%x\r\n%b\r\n" % (len(data), data)


@cache
def body(count: int, size: int) -> bytes:
    """Events with ids, some in each chunk."""
    data = b"x" * size
    events = [b"id: %d\ndata: %b\n\n" % (seq, data) for seq in range(1, count + 1)]
    return b"".join(chunk(b"".join(events[first : first + JOINED])) for first in range(0, count, JOINED))


class Ticks:
    """The readers of one event, and then of the next."""

    def __init__(self, rate: int, size: int) -> None:
        self._pause, self._size = 1 / rate, size
        self._readers: list[socket.socket] = []
        self._number = 0
        self.due = time.monotonic()

    def add(self, reader: socket.socket) -> None:
        """From the next event on."""
        self._readers.append(reader)

    def write(self) -> None:
        """One event to all; those that are gone are left out from now on."""
        self._number += 1
        mark = b"t=%d;" % time.monotonic_ns()
        event = chunk(b"id: %d\ndata: %b\n\n" % (self._number, mark.ljust(self._size, b"x")))
        gone = [reader for reader in self._readers if not written(reader, event)]
        for reader in gone:
            self._readers.remove(reader)
            reader.close()
        self.due += self._pause


def written(reader: socket.socket, data: bytes) -> bool:
    """Write all of it; False if the reader is gone."""
    try:
        reader.sendall(data)
    except OSError:
        return False
    return True


def main() -> None:
    """Serve until SIGTERM."""
    listener = socket.create_server(("127.0.0.1", 0), backlog=1024)
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    all_ticks: dict[tuple[int, int], Ticks] = {}
    while True:
        due = min((ticks.due for ticks in all_ticks.values()), default=time.monotonic() + 1)
        if select.select([listener], [], [], max(0.0, due - time.monotonic()))[0]:
            reader, _ = listener.accept()
            reader.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            path = urlsplit(reader.recv(10_000).split()[1].decode())
            asked = {name: int(value) for name, value in parse_qsl(path.query)}
            if path.path == "/burst":
                whole = body(asked["count"], asked["size"])
                written(reader, HEAD) and all(written(reader, whole) for _ in range(asked["times"]))
                written(reader, chunk(b""))
                reader.close()
            elif written(reader, HEAD):
                all_ticks.setdefault((asked["rate"], asked["size"]), Ticks(asked["rate"], asked["size"])).add(reader)
        for ticks in all_ticks.values():
            if ticks.due <= time.monotonic():
                ticks.write()


main()
