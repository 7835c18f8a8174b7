"""ASGI middleware that discards what the application leaves unread of a request's body, before the response ends.

Many a response does not need the whole body: a 404, or the 413 for a body that is too large. Without its corrections
Hypercorn 0.18 forgets an HTTP/2 stream as soon as its response has ended, and a later piece of the request's body ends
the server with all of its runs. On HTTP/1.1 it closes the connection, and a client that is still sending may see that
instead of the response. So everything but the end of a response is sent at once, and the end is held back until the
request has ended or the client is gone.

A client has `body_timeout` from its headers on to end its request. After that

- reading the body fails with a 408 for the response;
- a stream that is being sent meanwhile is cut off;
- the end of a response waits no longer. It never waits for more than `max_body_bytes` that the application left unread.

On HTTP/2 only the first applies, for the sake of the server's other clients, unless the server says that the others are
safe as well (`EARLY_END`).

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

EARLY_END: Final = "penstock.early_end"
"""An extension in the ASGI scope: the server allows a response on HTTP/2 to end before its request."""

_END: Final[Message] = {"type": "http.response.body", "body": b"", "more_body": False}
_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})


class DrainRequestBody:
    """ASGI middleware: a response ends after its request, or when the request's time is over."""

    def __init__(self, app: ASGIApp, limits: RequestLimits) -> None:
        self._app = app
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or _has_no_body(scope):
            await self._app(scope, receive, send)
            return
        must_wait = not scope["http_version"].startswith("1") and EARLY_END not in scope.get("extensions", {})
        request = _Request(receive, self._limits.body_timeout, self._limits.max_body_bytes, must_wait=must_wait)
        passed_on = False  # the whole response except its end

        async def send_as_request_allows(message: Message) -> None:
            request.note_response()
            if request.over or message["type"] != "http.response.body" or message.get("more_body", False):
                if not request.gone:
                    await send(message)
                return
            nonlocal passed_on
            if not passed_on:  # a wait for the request may have been cancelled, and this may be sent a second time
                await send({**message, "more_body": True})
                passed_on = True
            await request.discard_rest()
            if not request.gone:
                await (send(_END) if request.over else request.send_while_discarding(send, _END))

        await self._app(scope, request.receive, send_as_request_allows)


def _has_no_body(scope: Scope) -> bool:
    """Whether a request of HTTP/1 ends with its headers (RFC 9112, section 6.3). HTTP/2 does not say so in headers."""
    return scope["http_version"].startswith("1") and not any(name in _FRAMING for name, _ in scope["headers"])


class _Request:
    """The state of a request, by the messages that the application and this middleware have received."""

    def __init__(self, receive: Receive, timeout: float, limit: int, *, must_wait: bool) -> None:
        self.over = False  # there is no more of the body
        self.gone = False  # the client is gone, or is to be cut off
        self._receive = receive
        self._timeout = timeout
        self._limit = limit
        self._deadline = trio.current_time() + timeout
        self._must_wait = must_wait  # for the end of the request, however long that takes
        self._responding = False
        self._discarding: trio.CancelScope | None = None

    def note_response(self) -> None:
        """Record that the response has begun."""
        self._responding = True
        if self._must_wait:
            self._deadline = inf

    async def receive(self) -> Message:
        """Receive a message for the application."""
        while not self.over and trio.current_time() < self._deadline:
            with trio.move_on_at(self._deadline):
                return await self._next()
        if self.over:
            return await self._next()
        if self._responding:  # a stream is being sent, and all that is left is to end it
            self.gone = self.over = True
            return {"type": "http.disconnect"}
        raise StreamRejected(408, "BODY_TIMEOUT", f"the body of a request must arrive within {self._timeout:g} s")

    async def _next(self) -> Message:
        message = await self._receive()
        self.gone = self.gone or message["type"] == "http.disconnect"
        if self.gone or not message.get("more_body", False):
            self.over = True
            if self._discarding is not None:
                self._discarding.cancel(reason="the request has ended")
        return message

    async def discard_rest(self) -> None:
        """Receive the rest of the body, up to the limit and until the deadline, unless another task receives it."""
        discarded = 0
        with trio.CancelScope(deadline=self._deadline) as self._discarding:
            while not self.over and (discarded <= self._limit or self._deadline == inf):
                discarded += len((await self._next()).get("body", b""))

    async def send_while_discarding(self, send: Send, message: Message) -> None:
        """Send `message`, and discard what arrives meanwhile: Hypercorn has no room for it, and would wait there."""

        async def discard() -> None:
            while True:
                await self._receive()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(discard)
            await send(message)
            nursery.cancel_scope.cancel(reason="the response has ended")
