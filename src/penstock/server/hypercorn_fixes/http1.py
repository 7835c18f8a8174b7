"""HTTP/1.1 in Hypercorn, patched: a connection stays HTTP/1.1, and is read on while a response is under way."""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import h11
import trio
from hypercorn.events import Closed, RawData
from hypercorn.protocol.events import Body
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.protocol.ws_stream import WSStream

if TYPE_CHECKING:
    from hypercorn.events import Event
    from hypercorn.protocol.events import Event as StreamEvent

NOTIFY_TIMEOUT: Final = 1.0
"""Seconds in which a response takes the notification that its client is gone, or that its stream has ended.

A response that has ended without reading all of a body takes none, and Hypercorn's queue for it may be full."""


@runtime_checkable
class Readable(Protocol):
    """What `ReadWhilePipelined` needs of a connection."""

    stream: trio.abc.ReceiveStream

    def lose(self) -> None: ...


class ReadWhilePipelined:
    """In place of the event on which Hypercorn waits when a second request comes before the first is answered."""

    # Hypercorn reads nothing meanwhile, and so does not see the end of the connection. This `wait` reads on, up to the
    # limit on a request's headers; a client that sends more than that loses its connection.

    def __init__(self, protocol: PatchedH11, connection: Readable, limit: int) -> None:
        self._protocol = protocol
        self._connection = connection
        self._limit = limit
        self._answered = trio.Event()

    async def set(self) -> None:
        self._answered.set()

    def is_set(self) -> bool:
        return self._answered.is_set()

    async def clear(self) -> None:
        self._answered = trio.Event()

    async def wait(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_on)
            await self._answered.wait()
            nursery.cancel_scope.cancel(reason="the first request has been answered")

    async def _read_on(self) -> None:
        left = self._limit
        while left > 0:
            try:
                data = await self._connection.stream.receive_some(left)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                break
            if not data:
                break
            left -= len(data)
            self._protocol.connection.receive_data(bytes(data))
        self._connection.lose()


class PatchedH11(H11Protocol):
    """An HTTP/1.1 connection that becomes no HTTP/2 connection, and keeps the limit on headers."""

    _chunked = False

    async def initiate(self) -> None:
        await super().initiate()
        if isinstance(connection := getattr(self.send, "__self__", None), Readable):
            self.can_read = ReadWhilePipelined(self, connection, self.config.h11_max_incomplete_size)

    async def handle(self, event: Event) -> None:
        await super().handle(event)
        # Hypercorn leaves the connection open after it has refused a WebSocket's handshake.
        if isinstance(self.stream, WSStream) and self.stream.closed:
            await self.send(Closed())

    async def _create_stream(self, request: h11.Request) -> None:
        # h11 limits only what is not complete yet: headers of any size pass if they come at once.
        line = len(request.method) + len(request.target) + len("  HTTP/1.1\r\n")
        headers = sum(len(name) + len(value) + len(": \r\n") for name, value in request.headers)
        if line + headers + len("\r\n") > self.config.h11_max_incomplete_size:
            await self._send_error_response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            await self.send(Closed())
            return
        await super()._create_stream(request)

    async def _close_stream(self) -> None:
        with trio.move_on_after(NOTIFY_TIMEOUT):
            await super()._close_stream()
        self.stream = None

    async def _check_protocol(self, event: h11.Request) -> None:
        # HTTP/2 begins with its own preface, or is agreed on in TLS. The upgrade from HTTP/1.1 is deprecated (RFC 9113,
        # 3.1), and a server may ignore it (RFC 9110, 7.8). Hypercorn decodes its header where no error is expected.
        if event.method == b"PRI":
            await super()._check_protocol(event)

    async def stream_send(self, event: StreamEvent) -> None:
        # When h11 has framed a piece of a body as a chunk (RFC 9112, 7.1), the next pieces of that body are framed in
        # the same way without it, and its state stays as it is: h11 takes as long as the system takes to send them.
        if not (isinstance(event, Body) and event.data and self.connection.our_state is h11.SEND_BODY):
            self._chunked = False
            await super().stream_send(event)
            return
        framed = b"%x\r\n%b\r\n" % (len(event.data), event.data)
        if not self._chunked:
            chunk, framed = framed, self.connection.send(h11.Data(data=event.data))
            self._chunked = chunk == framed
        await self.send(RawData(framed))
