"""HTTP/1.1 in Hypercorn, corrected: a connection stays one, and is read on. `corrections.py` puts this in place."""

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


TELLING: Final = 1.0
"""Seconds in which a response hears that its client is gone, or has ended."""


@runtime_checkable
class Readable(Protocol):
    """A connection, as far as it is needed here."""

    stream: trio.abc.ReceiveStream

    def lose(self) -> None:
        """The client is gone."""


class ReadWhilePipelined:
    """Where the reading of an HTTP/1.1 connection waits when a second request comes before the first is answered.

    Hypercorn 0.18.0 reads no further then, so it does not see the end of a connection either: a byte too many, and a
    client that goes away is a reader for as long as its run is silent. Here it is read on, for what it keeps at most of
    a request's headers; a client that sends more than that has itself to blame.
    """

    def __init__(self, requests: PatchedH11, connection: Readable, limit: int) -> None:
        self._requests = requests
        self._connection = connection
        self._limit = limit
        self._over = trio.Event()

    async def set(self) -> None:
        """The first request has been answered."""
        self._over.set()

    def is_set(self) -> bool:
        """Whether it has been."""
        return self._over.is_set()

    async def clear(self) -> None:
        """It is being answered."""
        self._over = trio.Event()

    async def wait(self) -> None:
        """Wait until it has been, or the client is gone."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._read_on)
            await self._over.wait()
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
            self._requests.connection.receive_data(bytes(data))
        self._connection.lose()


class PatchedH11(H11Protocol):
    """An HTTP/1.1 connection that stays one: HTTP/2 begins with its own preface, or is agreed on in TLS.

    The upgrade from HTTP/1.1 is deprecated (RFC 9113, 3.1). In Hypercorn 0.18.0 its header is decoded outside of
    anything that expects an error, and an upgraded CONNECT never ends. A server may take no notice (RFC 9110, 7.8).
    """

    _chunked = False

    async def initiate(self) -> None:
        """Begin."""
        await super().initiate()
        if isinstance(connection := getattr(self.send, "__self__", None), Readable):
            self.can_read = ReadWhilePipelined(self, connection, self.config.h11_max_incomplete_size)

    async def handle(self, event: Event) -> None:
        """Take in what happened on the connection."""
        await super().handle(event)
        # A handshake of a WebSocket that was refused leaves its connection open.
        if isinstance(self.stream, WSStream) and self.stream.closed:
            await self.send(Closed())

    async def _create_stream(self, request: h11.Request) -> None:
        """Answer a request, unless its headers are too large.

        In h11 the limit is for what is not complete yet: headers of any size pass if they come at once.
        """
        line = len(request.method) + len(request.target) + len("  HTTP/1.1\r\n")
        headers = sum(len(name) + len(value) + len(": \r\n") for name, value in request.headers)
        if line + headers + len("\r\n") > self.config.h11_max_incomplete_size:
            await self._send_error_response(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE)
            await self.send(Closed())
            return
        await super()._create_stream(request)

    async def _close_stream(self) -> None:
        """Tell the response that its client is gone, if it has ears.

        One that has ended without taking all of a body has none, and Hypercorn's queue for it may be full.
        """
        with trio.move_on_after(TELLING):
            await super()._close_stream()
        self.stream = None

    async def _check_protocol(self, event: h11.Request) -> None:
        if event.method == b"PRI":
            await super()._check_protocol(event)

    async def stream_send(self, event: StreamEvent) -> None:
        """Send for a response.

        When h11 has framed a piece of a body as a chunk (RFC 9112, 7.1), the next pieces of the body are framed in the
        same way without it: it would take as long as the system takes to send them, and its state stays as it is.
        """
        if not (isinstance(event, Body) and event.data and self.connection.our_state is h11.SEND_BODY):
            self._chunked = False
            await super().stream_send(event)
            return
        framed = b"%x\r\n%b\r\n" % (len(event.data), event.data)
        if not self._chunked:
            chunk, framed = framed, self.connection.send(h11.Data(data=event.data))
            self._chunked = chunk == framed
        await self.send(RawData(framed))
