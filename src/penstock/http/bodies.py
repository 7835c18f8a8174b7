"""A response ends when its request has: what an application leaves unread of a body is read here, and dropped.

Many an answer does not need the whole body: a 404, or the 413 for a body that is too large. Hypercorn 0.18 forgets an
HTTP/2 stream as soon as its response has ended, and the next piece of the request's body is then a `KeyError` that
takes the whole server down, with all of its runs. (On HTTP/1.1 it closes the connection, and a client that is still
sending may see that instead of the answer.) So the client is sent its answer at once, but for the end of it, which
waits until the request has ended, or the client is gone.

Nothing more is sent to a client that is known to be gone: on HTTP/2 that could hang.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send


_FRAMING: Final = frozenset({b"content-length", b"transfer-encoding"})


class WholeRequests:
    """ASGI middleware that lets no response end before its request has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http" or _has_no_body(scope):
            await self._app(scope, receive, send)
            return
        request = _Request(receive)
        passed_on = False
        """All that the response has to say, but for its end."""

        async def send_as_request_allows(message: Message) -> None:
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
                await send({"type": "http.response.body", "body": b"", "more_body": False})

        await self._app(scope, request.receive, send_as_request_allows)


def _has_no_body(scope: Scope) -> bool:
    """Whether a request of HTTP/1 is over with its headers (RFC 9112, 6.3); one of HTTP/2 does not say so."""
    return scope["http_version"].startswith("1") and not any(name in _FRAMING for name, _ in scope["headers"])


class _Request:
    """What is known of a request from the messages that have been received, whoever received them."""

    def __init__(self, receive: Receive) -> None:
        self.over = False
        """There is no more of the body."""
        self.gone = False
        """The client is."""
        self._receive = receive
        self._dropping = trio.CancelScope()

    async def receive(self) -> Message:
        """Receive for the application."""
        message = await self._receive()
        self.gone = self.gone or message["type"] == "http.disconnect"
        if self.gone or not message.get("more_body", False):
            self.over = True
            self._dropping.cancel(reason="the request has ended")
        return message

    async def drop(self) -> None:
        """Receive what is left, unless another task does."""
        with self._dropping:
            while not self.over:
                await self.receive()
