"""HTTP/2 clients that do what a browser would not: they keep windows shut, and send what no request should be."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import h2.config
import h2.connection
import h2.events
import h2.settings
import trio
from h2.errors import ErrorCodes

from tests.server.hypercorn_fixes.test_http2 import Streams

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.serving import Client

WHOLE: Final = "whole"
"""A stream has ended as its response has: with END_STREAM."""
OPEN: Final = 2**30
"""What a window is opened by: more than any test sends."""
UNCHECKED: Final = {"validate_outbound_headers": False, "normalize_outbound_headers": False, "header_encoding": "utf-8"}
"""Settings of a client that sends whatever it is told to."""


class Http2(Streams):
    """One that may begin a request and not end it, or send what no request should be."""

    def begin(self, method: str, path: str, *headers: tuple[str, str], ends: bool = False) -> int:
        """Begin a request, which `ends` with this or has a body; all of it is still to be sent. The stream's number."""
        number = self.h2.get_next_available_stream_id()
        pseudo = {":method": method, ":path": path, ":scheme": "http", ":authority": "localhost"}
        self.h2.send_headers(number, [*pseudo.items(), *headers], end_stream=ends)
        self.bodies[number] = b""
        return number

    async def send(self) -> None:
        """Send what is still to be sent."""
        await self.socket.send_all(self.h2.data_to_send())

    async def until_headers(self, *numbers: int) -> None:
        while not all(number in self.headers for number in numbers):
            await self.receive()

    async def whole_body(self, number: int) -> bytes:
        """The body of an answer, to its end."""
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
        """Let the server send so many bytes on a stream."""
        self.h2.increment_flow_control_window(size, number)
        await self.send()

    async def until_size(self, number: int, size: int) -> None:
        """Read on until so much of a stream has come."""
        while len(self.bodies[number]) < size:
            await self.receive()

    def forget(self, number: int) -> int:
        """Drop what has come in on a stream; its size."""
        size = len(self.bodies[number])
        self.bodies[number] = b""
        return size


class Ends(Http2):
    """One that knows how its streams end."""

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
        """Take in whatever comes until the server closes the connection."""
        with suppress(trio.EndOfChannel, trio.BrokenResourceError):
            while True:
                await self.receive()


class ShutEnds(Ends, Windows):
    """And whose windows are shut."""


@asynccontextmanager
async def without_window(server: Client, **settings: Any) -> AsyncIterator[Windows]:
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        yield Windows(stream, **settings)
