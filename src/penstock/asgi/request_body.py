"""Requests end, and responses after them: what an application leaves unread of a body is read here, and dropped.

Many an answer does not need the whole body: a 404, or the 413 for a body that is too large. Hypercorn 0.18 forgets an
HTTP/2 stream as soon as its response has ended, and the next piece of the request's body is then a `KeyError` that
takes the whole server down, with all of its runs. (On HTTP/1.1 it closes the connection, and a client that is still
sending may see that instead of the answer.) So the client is sent its answer at once, but for the end of it, which
waits until the request has ended, or the client is gone.

A client that does not end its request has `body_timeout` from its headers on. After that whoever reads the body gets a
408 to answer with; a stream that is being sent meanwhile is cut off; and the end of an answer waits no longer. Nor does
it wait for more than `max_body_bytes` that nobody wants. The last three are not so on HTTP/2 under a Hypercorn with
that fault in it, for its other clients' sake.

Nothing more is sent to a client that is known to be gone: on HTTP/2 that could hang.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

import trio

from penstock.errors import StreamRejected

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from penstock.asgi.lifespan import RequestLimits

_END: Final[Message] = {"type": "http.response.body", "body": b"", "more_body": False}
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})


class DrainRequestBody:
    """ASGI middleware that lets no response end before its request has, or its request's time is over."""

    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http" or _has_no_body(scope):
            await self._app(scope, receive, send)
            return
        patient = not self._limits.http2_corrected and not scope["http_version"].startswith("1")
        request = _Request(receive, self._limits.body_timeout, self._limits.max_body_bytes, patient=patient)
        passed_on = False
        """All that the response has to say, but for its end."""

        async def send_as_request_allows(message: Message) -> None:
            request.answer()
            if request.over or message["type"] != "http.response.body" or message.get("more_body", False):
                if not request.gone:
                    await send(message)
                return
            nonlocal passed_on
            if not passed_on:  # the wait for the request may be cancelled, and this be sent again
                await send({**message, "more_body": True})
                passed_on = True
            await request.drop()
            if not request.gone:
                await (send(_END) if request.over else request.while_swallowing(send, _END))

        await self._app(scope, request.receive, send_as_request_allows)


def _has_no_body(scope: Scope) -> bool:
    """Whether a request of HTTP/1 is over with its headers (RFC 9112, 6.3); one of HTTP/2 does not say so."""
    return scope["http_version"].startswith("1") and not any(name in _FRAMING for name, _ in scope["headers"])


class _Request:
    """What is known of a request from the messages that have been received, whoever received them."""

    def __init__(self, receive: Receive, timeout: float, limit: int, *, patient: bool) -> None:
        self.over = False
        """There is no more of the body."""
        self.gone = False
        """The client is, or is to be."""
        self._receive = receive
        self._timeout = timeout
        self._limit = limit
        self._deadline = trio.current_time() + timeout
        self._patient = patient
        self._answered = False
        self._dropping: trio.CancelScope | None = None

    def answer(self) -> None:
        """The response has begun."""
        self._answered = True
        if self._patient:
            self._deadline = inf

    async def receive(self) -> Message:
        """Receive for the application."""
        while not self.over and trio.current_time() < self._deadline:
            with trio.move_on_at(self._deadline):
                return await self._next()
        if self.over:
            return await self._next()
        if self._answered:  # its stream is being sent: what is left is to end it
            self.gone = self.over = True
            return {"type": "http.disconnect"}
        raise StreamRejected(408, "BODY_TIMEOUT", f"a request's body has {self._timeout:g} s to arrive")

    async def _next(self) -> Message:
        message = await self._receive()
        self.gone = self.gone or message["type"] == "http.disconnect"
        if self.gone or not message.get("more_body", False):
            self.over = True
            if self._dropping is not None:
                self._dropping.cancel(reason="the request has ended")
        return message

    async def drop(self) -> None:
        """Receive what is left, unless another task does, while there is time, and no more than a body may be."""
        dropped = 0
        with trio.CancelScope(deadline=self._deadline) as self._dropping:
            while not self.over and (dropped <= self._limit or self._deadline == inf):
                dropped += len((await self._next()).get("body", b""))

    async def while_swallowing(self, send: Send, message: Message) -> None:
        """Send the end. What still comes meanwhile goes by: Hypercorn has no room for it, and would wait there."""

        async def swallow() -> None:
            while True:
                await self._receive()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(swallow)
            await send(message)
            nursery.cancel_scope.cancel(reason="the response has ended")
