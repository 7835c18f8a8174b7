"""A server with prepared responses, byte by byte: for responses that no server of penstock would send."""

from __future__ import annotations

import json
import socket
import struct
import threading
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

GUARD = 60.0
"""Seconds after which a client that requests nothing has hung. No test comes near it."""


@dataclass(frozen=True)
class Held:
    begins: bytes


@dataclass(frozen=True)
class Reset:
    begins: bytes


Said = bytes | Held | Reset


def answer(status: int, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"HTTP/1.1 {status} words", f"content-length: {len(body)}", "connection: close"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


def problem(status: int, code: str, detail: str = "so it is", *, retry_after: str = "", **members: Any) -> bytes:
    body = {"status": status, "code": code, "detail": detail, **members}
    headers = {"retry_after": retry_after} if retry_after else {}
    return answer(status, json.dumps(body).encode(), content_type="application/problem+json", **headers)


def record(status: str = "completed", **members: Any) -> bytes:
    return answer(200, json.dumps(record_of(status, **members)).encode(), content_type="application/json")


def record_of(status: str = "completed", **members: Any) -> dict[str, Any]:
    times = {"created_at": 1e9, "started_at": 1e9, "ended_at": 1e9 + 1.5}
    reason = None if status == "running" else "end_turn"
    return {"id": "r1", "producer": "p", "status": status, "stop_reason": reason, "seq": 3, **times, **members}


def stream(*blocks: str, cut: bool = False) -> bytes:
    """A stream of these blocks; a cut one lacks the end of the chunked encoding."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\ntransfer-encoding: chunked\r\n\r\n"
    chunks = [f"{block}\n\n".encode() for block in blocks]
    body = b"".join(b"%x\r\n%b\r\n" % (len(chunk), chunk) for chunk in chunks)
    return head + body + (b"" if cut else b"0\r\n\r\n")


def event(seq: int, data: str = "words", event: str | None = None) -> str:
    named = "" if event is None else f"event: {event}\n"
    lines = "\n".join(f"data: {line}" for line in data.split("\n"))
    return f"id: {seq}\n{named}{lines}"


@dataclass
class Scripted:
    """The port of the server, and the requests that it has received."""

    port: int
    requests: list[str] = field(default_factory=list)
    """Each with its headers, in lower case."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def paths(self) -> list[str]:
        return [request.split(" ")[1] for request in self.requests]

    def header(self, name: str) -> list[str | None]:
        streams = [request for request in self.requests if "/stream " in request]
        return [dict(line.split(": ", 1) for line in each.split("\r\n")[1:] if line).get(name) for each in streams]


@contextmanager
def answering(*said: Said) -> Iterator[Scripted]:
    """A server that sends one response on each connection, and the last one again and again."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = Scripted(listener.getsockname()[1])
        thread = threading.Thread(target=_serve, args=(listener, server, list(said), held))
        thread.start()
        try:
            yield server
        finally:
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)  # which wakes the thread
            for connection in held:
                with suppress(OSError):
                    connection.shutdown(socket.SHUT_RDWR)
            thread.join()
            for connection in held:
                connection.close()


def _serve(listener: socket.socket, server: Scripted, said: list[Said], held: list[socket.socket]) -> None:
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            held.append(connection)
            connection.settimeout(GUARD)
            with suppress(OSError):
                server.requests.append(_request(connection))
                words = said.pop(0) if len(said) > 1 else said[0]
                connection.sendall(words if isinstance(words, bytes) else words.begins)
                if isinstance(words, Reset):
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                if not isinstance(words, Held):
                    connection.close()


def _request(connection: socket.socket) -> str:
    received = b""
    while b"\r\n\r\n" not in received and (piece := connection.recv(65536)):
        received += piece
    head, _, body = received.partition(b"\r\n\r\n")
    words = head.decode()
    names = dict(line.lower().split(": ", 1) for line in words.split("\r\n")[1:])
    while len(body) < int(names.get("content-length", 0)) and (piece := connection.recv(65536)):
        body += piece
    first, *lines = words.split("\r\n")
    return "\r\n".join([first, *(f"{name}: {value}" for name, value in _headers(lines)), "", body.decode()])


def _headers(lines: list[str]) -> Iterator[tuple[str, str]]:
    for line in lines:
        name, _, value = line.partition(": ")
        yield name.lower(), value
