"""HTTP/2 clients whose requests, windows and ends are the test's."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import h2.config
import h2.connection
import h2.events
import h2.settings
import trio
from h2.errors import ErrorCodes

from tests.support.wire import Block, block_of, blocks_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.serving import Client

WHOLE: Final = "whole"
"""A stream has ended as its response has: with END_STREAM."""
OPEN: Final = 2**30
"""What a window is opened by: more than any test sends."""
UNCHECKED: Final = {"validate_outbound_headers": False, "normalize_outbound_headers": False, "header_encoding": "utf-8"}
"""Settings of a client that does not check what it sends."""


class Streams:
    def __init__(self, socket: trio.SocketStream) -> None:
        self.socket = socket
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.headers: dict[int, dict[str, str]] = {}
        self.bodies: dict[int, bytes] = {}
        self.over: set[int] = set()

    async def get(self, path: str, **headers: str) -> int:
        number = self.h2.get_next_available_stream_id()
        pseudo = {":method": "GET", ":path": path, ":scheme": "http", ":authority": "localhost"}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.h2.send_headers(number, [*(pseudo | named).items()], end_stream=True)
        self.bodies[number] = b""
        await self.socket.send_all(self.h2.data_to_send())
        return number

    async def reset(self, number: int) -> None:
        self.h2.reset_stream(number)
        await self.socket.send_all(self.h2.data_to_send())

    async def receive(self) -> None:
        for event in self.h2.receive_data(await self.socket.receive_some()):
            if isinstance(event, h2.events.ResponseReceived):
                self.headers[event.stream_id] = {str(name): str(value) for name, value in event.headers}
            elif isinstance(event, h2.events.DataReceived):
                self.bodies[event.stream_id] += event.data
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                self.over.add(event.stream_id)
        await self.socket.send_all(self.h2.data_to_send())

    async def blocks(self, number: int, count: int) -> list[Block]:
        while self.bodies[number].count(b"\n\n") < count:
            assert number not in self.over, self.bodies[number]
            await self.receive()
        return [block_of(text) for text in self.bodies[number].decode().split("\n\n")[:count]]

    async def whole(self, number: int) -> list[Block]:
        while number not in self.over:
            await self.receive()
        return blocks_of(self.bodies[number])


@asynccontextmanager
async def connected(server: Client) -> AsyncIterator[Streams]:
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as socket:
        yield Streams(socket)


class Http2(Streams):
    """A client that may begin a request and not end it."""

    def begin(self, method: str, path: str, *headers: tuple[str, str], ends: bool = False) -> int:
        """Begin a request, which `ends` with this or has a body; all of it is still to be sent. The stream's number."""
        number = self.h2.get_next_available_stream_id()
        pseudo = {":method": method, ":path": path, ":scheme": "http", ":authority": "localhost"}
        self.h2.send_headers(number, [*pseudo.items(), *headers], end_stream=ends)
        self.bodies[number] = b""
        return number

    async def send(self) -> None:
        await self.socket.send_all(self.h2.data_to_send())

    async def until_headers(self, *numbers: int) -> None:
        while not all(number in self.headers for number in numbers):
            await self.receive()

    async def whole_body(self, number: int) -> bytes:
        while number not in self.over:
            await self.receive()
        return self.bodies[number]


class Windows(Http2):
    """An HTTP/2 client whose streams have no window until it opens theirs; that of the connection is open."""

    def __init__(self, stream: trio.SocketStream, **settings: Any) -> None:
        super().__init__(stream)
        if settings:
            self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, **settings))
            self.h2.initiate_connection()
        self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: 0})
        self.h2.increment_flow_control_window(OPEN)

    async def open(self, number: int, size: int = OPEN) -> None:
        self.h2.increment_flow_control_window(size, number)
        await self.send()

    async def until_size(self, number: int, size: int) -> None:
        while len(self.bodies[number]) < size:
            await self.receive()

    def forget(self, number: int) -> int:
        """Drop what has come in on a stream; its size."""
        size = len(self.bodies[number])
        self.bodies[number] = b""
        return size


class Ends(Http2):
    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream)
        self.ends: dict[int, str | ErrorCodes] = {}
        """`WHOLE`, or with which error the server has reset it."""
        self._take_in = self.h2.receive_data
        self.h2.receive_data = self._note  # type: ignore[method-assign, assignment]

    def _note(self, data: bytes) -> list[h2.events.Event]:
        if not data:
            raise trio.EndOfChannel("the server has closed the connection")
        events = self._take_in(data)
        for event in events:
            if isinstance(event, h2.events.StreamEnded):
                self.ends[event.stream_id] = WHOLE
            elif isinstance(event, h2.events.StreamReset):
                self.ends[event.stream_id] = ErrorCodes(event.error_code)
        return events

    async def until_closed(self) -> None:
        with suppress(trio.EndOfChannel, trio.BrokenResourceError):
            while True:
                await self.receive()


class ShutEnds(Ends, Windows):
    """A client with shut windows that records how its streams end."""


@asynccontextmanager
async def without_window(server: Client) -> AsyncIterator[Windows]:
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        yield Windows(stream)
