"""Clients that take in less than they are sent, and the server that they are set on.

    python -m tests.stalling '{"without": ["TCPServer"], "drain_timeout": 0.2}'     says its URL on stderr

The server is penstock's. `without` names those of Hypercorn's classes that are to stay what they are;
`graceful_timeout` and `tcp_user_timeout` are what they are elsewhere, and all else are the supervisor's knobs.
"""

from __future__ import annotations

import gc
import json
import socket
import ssl
import sys
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import h2.connection
import h2.settings
import pytest
import trio
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.trio.tcp_server import TCPServer
from starlette.routing import Route

from penstock import Event, EventStreamResponse, create_app, serve
from penstock.http import corrections
from tests.serving import PRODUCERS, quiet_config
from tests.test_http2 import Streams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from hypercorn.protocol.h2 import StreamBuffer
    from starlette.requests import Request

    from tests.serving import Client, Server

SMALL: Final = 4096
"""The receive buffer of a client that stalls, in bytes: what does not fit in there stays with the server."""
OPEN: Final = 2**30
"""What a window is opened by: more than any test sends."""
KIB: Final = Event(data="x" * 1016).encode()
"""An event of 1,024 bytes as it is sent by a response without a run."""


# What they are sent


async def events(n: int, size: int = 1000) -> AsyncIterator[Event]:
    """`n` events that are numbered and have this size."""
    for number in range(1, n + 1):
        yield Event(data=f"{number} ".ljust(size, "x"))


async def flood(value: Any) -> AsyncIterator[Event]:
    """A producer: `[n, size]` events, or such of 1,000 bytes for ever."""
    n, size = value or (sys.maxsize, 1000)
    async for event in events(n, size):
        yield event


class Endless:
    """Streams events of 1 KiB for ever, to whoever asks, and counts what it has yielded to each of them."""

    def __init__(self) -> None:
        self.yielded: dict[str, int] = {}
        """By the name that a reader has given itself."""
        self.left: set[str] = set()
        """The readers whose sources are closed."""

    async def answer(self, request: Request) -> EventStreamResponse:
        """The endpoint; `wide` is the size of a header."""
        name = request.query_params.get("name", "")
        headers = {"x-name": name, "x-wide": "w" * int(request.query_params.get("wide", "0"))}
        return EventStreamResponse(self._source(name), headers=headers)

    async def _source(self, name: str) -> AsyncIterator[bytes]:
        self.yielded[name] = 0
        try:
            while True:
                self.yielded[name] += 1
                yield KIB
        finally:
            self.left.add(name)


def with_endless(server: Server) -> Endless:
    """Let the server stream without end at /endless?name=..."""
    endless = Endless()
    server.app.router.routes.append(Route("/endless", endless.answer))
    return endless


# Clients


async def small_socket(port: int) -> trio.SocketStream:
    """A connection whose receive buffer is soon full."""
    sock = trio.socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    await sock.connect(("127.0.0.1", port))
    return trio.SocketStream(sock)


@asynccontextmanager
async def stalled(server: Client, path: str, tls: ssl.SSLContext | None = None) -> AsyncIterator[trio.abc.Stream]:
    """A client that has read the first bytes of an answer, and then reads no more."""
    stream: trio.abc.Stream = await small_socket(server.port)
    if tls is not None:
        stream = trio.SSLStream(stream, tls, server_hostname="localhost", https_compatible=True)
    async with stream:
        await stream.send_all(f"GET {path} HTTP/1.1\r\nhost: x\r\n\r\n".encode())
        assert await stream.receive_some(12) == b"HTTP/1.1 200"
        yield stream


async def trickle(stream: trio.abc.Stream) -> None:
    """Read, but so slowly that what is on its way would take minutes."""
    with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
        while await stream.receive_some(100):  # noqa: ASYNC110  (it waits for nothing: so slow it is)
            await trio.sleep(0.02)


class Windows(Streams):
    """An HTTP/2 client whose streams have no window until it opens theirs; that of the connection is open."""

    def __init__(self, stream: trio.SocketStream, **settings: Any) -> None:
        super().__init__(stream)
        if settings:
            self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, **settings))
            self.h2.initiate_connection()
        self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        self.h2.increment_flow_control_window(OPEN)

    async def open(self, number: int, size: int = OPEN) -> None:
        """Let the server send so many bytes on a stream."""
        self.h2.increment_flow_control_window(size, number)
        await self.socket.send_all(self.h2.data_to_send())

    async def until_headers(self, *numbers: int) -> None:
        while not all(number in self.headers for number in numbers):
            await self.receive()

    async def until_size(self, number: int, size: int) -> None:
        """Read on until so much of a stream has come."""
        while len(self.bodies[number]) < size:
            await self.receive()

    async def whole_body(self, number: int) -> bytes:
        """The body of an answer, to its end."""
        while number not in self.over:
            await self.receive()
        return self.bodies[number]

    def forget(self, number: int) -> int:
        """Drop what has come in on a stream; its size."""
        size = len(self.bodies[number])
        self.bodies[number] = b""
        return size


@asynccontextmanager
async def without_window(server: Client, **settings: Any) -> AsyncIterator[Windows]:
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        yield Windows(stream, **settings)


# Clients that stall, each in its own way


@asynccontextmanager
async def over_http1(server: Server, _folder: Path) -> AsyncIterator[trio.abc.Stream]:
    async with stalled(server, "/endless") as client:
        yield client


@asynccontextmanager
async def following_a_run(server: Server, _folder: Path) -> AsyncIterator[trio.abc.Stream]:
    run_id = await server.start("flood", [1500, 10_000])
    await server.ended_run(run_id)
    async with stalled(server, f"/v1/runs/{run_id}/stream") as client:
        yield client


@asynccontextmanager
async def trickling(server: Server, _folder: Path) -> AsyncIterator[trio.abc.Stream]:
    async with stalled(server, "/endless") as client, trio.open_nursery() as nursery:
        nursery.start_soon(trickle, client)
        yield client
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def over_tls(server: Server, folder: Path) -> AsyncIterator[trio.abc.Stream]:
    trusting = ssl.create_default_context(cafile=str(folder / "ca.pem"))
    async with stalled(server, "/endless", trusting) as client:
        yield client


@asynccontextmanager
async def over_http2(server: Server, _folder: Path) -> AsyncIterator[trio.abc.Stream]:
    async with await small_socket(server.port) as stream:
        client = Streams(stream)
        client.h2.increment_flow_control_window(OPEN)
        number = await client.get("/endless")
        await client.receive()
        client.h2.increment_flow_control_window(OPEN, number)
        await stream.send_all(client.h2.data_to_send())
        yield stream


CLIENTS: Final = [over_http1, following_a_run, trickling, over_tls, over_http2]
"""Each leads to its connection, once it has stalled."""


# The server's side


def served(client: trio.SocketStream) -> Any:
    """The connection, an object of Hypercorn's, at the other end of this one."""
    address = client.socket.getsockname()
    (found,) = [
        each
        for each in gc.get_objects()
        if isinstance(each, TCPServer)
        and isinstance(each.stream, trio.SocketStream)
        and each.stream.socket.fileno() != -1
        and each.stream.socket.getpeername() == address
    ]
    return found


def buffer_of(client: Streams, number: int) -> StreamBuffer:
    """What the server keeps of a stream."""
    protocol = served(client.socket).protocol.protocol
    assert isinstance(protocol, H2Protocol)
    return protocol.stream_buffers[number]


def sockets_at(port: int) -> list[socket.socket]:
    """This process's sockets that are bound to this port, from its file descriptors; duplicates, to be closed."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        if not entry.is_socket():  # `fromfd` would leave a duplicate of anything else behind
            continue
        sock = socket.fromfd(int(entry.name), socket.AF_INET, socket.SOCK_STREAM)
        if sock.getsockname()[1:2] == (port,):
            found.append(sock)
        else:
            sock.close()
    return found


# Without


@contextmanager
def as_it_is(*names: str) -> Iterator[None]:
    """These classes of Hypercorn's are what they are without penstock, for servers that start in this block."""
    left_out = [each for each in corrections.REPLACEMENTS if each.name in names]
    assert len(left_out) == len(names)
    with pytest.MonkeyPatch.context() as patch:
        kept = tuple(each for each in corrections.REPLACEMENTS if each not in left_out)
        patch.setattr(corrections, "REPLACEMENTS", kept)
        for each in left_out:
            patch.setattr(each.module, each.name, each.original)
        yield


# A process


async def main(
    *, without: list[str], graceful_timeout: float = 0.2, tcp_user_timeout: float = 1.0, **knobs: Any
) -> None:
    config = quiet_config()
    config.graceful_timeout = graceful_timeout
    app = create_app({**PRODUCERS, "flood": flood}, **knobs)
    app.router.routes.append(Route("/endless", Endless().answer))
    with as_it_is(*without):
        async with trio.open_nursery() as nursery:
            (url,) = await nursery.start(partial(serve, app, config, tcp_user_timeout=tcp_user_timeout))
            sys.stderr.write(f"{url}\n")
            sys.stderr.flush()


if __name__ == "__main__":
    trio.run(partial(main, **json.loads(sys.argv[1])))
