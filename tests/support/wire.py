"""Clients that see every byte, and take a stream apart by the letter of the specification, without penstock."""

from __future__ import annotations

import json
import socket
import struct
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import h11
import trio

if TYPE_CHECKING:
    from collections.abc import Mapping


class Block(NamedTuple):
    """One block of a stream, as a reader who knows nothing of penstock takes it apart."""

    id: int | None = None
    event: str | None = None
    data: str | None = None
    comment: str | None = None
    retry: str | None = None

    @property
    def json(self) -> Any:
        assert self.data is not None
        return json.loads(self.data)


DONE: Final = "[DONE]"


def block_of(text: str) -> Block:
    fields: dict[str, str] = {}
    for line in text.split("\n"):
        name, _, value = line.partition(":")
        name = name or "comment"
        fields[name] = "\n".join(filter(None, [fields.get(name), value.removeprefix(" ")]))
    return Block(**{**fields, "id": int(fields["id"]) if "id" in fields else None})  # type: ignore[arg-type]


def blocks_of(body: str | bytes) -> list[Block]:
    text = body if isinstance(body, str) else body.decode()
    *blocks, rest = text.split("\n\n")
    assert not rest, f"half a block: {rest!r}"
    return [block_of(each) for each in blocks]


def ids(blocks: list[Block]) -> list[int]:
    return [block.id for block in blocks if block.id is not None]


class Wire:
    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self.received = b""

    async def send(self, method: str, path: str, *, body: bytes = b"", **headers: str) -> None:
        lines = [f"{method} {path} HTTP/1.1", "host: localhost"]
        if body:
            lines.append(f"content-length: {len(body)}")
        lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
        await self.stream.send_all("\r\n".join([*lines, "", ""]).encode("latin-1") + body)

    async def until(self, *marks: bytes) -> bytes:
        while not all(mark in self.received for mark in marks):
            piece = await self.stream.receive_some()
            assert piece, f"the server closed the connection; before that: {self.received!r}"
            self.received += piece
        return self.received

    async def rest(self) -> bytes:
        try:
            while piece := await self.stream.receive_some():
                self.received += piece
        except trio.BrokenResourceError:
            pass
        return self.received

    async def reset(self) -> None:
        self.stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        await self.stream.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_exc: object) -> None:
        await self.stream.aclose()


class Reader:
    """The blocks of a response that is still coming in, over a connection of its own."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.status = 0
        self.headers: dict[str, str] = {}
        self._http = h11.Connection(h11.CLIENT)
        self._buffer = b""

    async def ask(self, method: str, path: str, headers: Mapping[str, str], body: bytes) -> None:
        length = {"content-length": str(len(body))} if body else {}
        request = h11.Request(method=method, target=path, headers=[*{"host": "localhost", **length, **headers}.items()])
        sent = [self._http.send(request), self._http.send(h11.Data(data=body)), self._http.send(h11.EndOfMessage())]
        await self.wire.stream.send_all(b"".join(each or b"" for each in sent))
        response = await self._event()
        assert isinstance(response, h11.Response), response
        self.status = response.status_code
        self.headers = {name.decode(): value.decode() for name, value in response.headers}

    async def _event(self) -> Any:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self.wire.stream.receive_some())
        return event

    async def next(self) -> Block | None:
        while b"\n\n" not in self._buffer:
            event = await self._event()
            if isinstance(event, h11.EndOfMessage):
                assert not self._buffer, f"half a block: {self._buffer!r}"
                return None
            self._buffer += event.data
        text, _, self._buffer = self._buffer.partition(b"\n\n")
        return block_of(text.decode())

    async def take(self, n: int) -> list[Block]:
        blocks = [await self.next() for _ in range(n)]
        assert None not in blocks, f"the stream ended: {blocks}"
        return [block for block in blocks if block is not None]

    async def rest(self) -> list[Block]:
        blocks = []
        while (block := await self.next()) is not None:
            blocks.append(block)
        return blocks


def unchunked(body: bytes) -> bytes:
    """The content of a body in chunked encoding."""
    pieces = []
    while body:
        size, _, body = body.partition(b"\r\n")
        pieces.append(body[: int(size, 16)])
        body = body[int(size, 16) + 2 :]
    return b"".join(pieces)
