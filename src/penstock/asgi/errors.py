"""Error responses: what a request is answered with when it does not get what it asked for.

An error becomes a status, a code for programs, a message for people, and further JSON members. Clients see the message
of an exception only if it was written for them: that of a `StreamRejected`, a `PublicError`, or a `PenstockError` that
says what is wrong with the request. Of any other exception they see a code; `expose_errors` shows its message as well.

A browser's `EventSource` reconnects after the end of a stream, and never after a status other than 200 (WHATWG HTML,
section 9.2.3). Where other clients get a 429 or a 503 with `Retry-After`, it gets a stream that holds nothing but
`retry:`; see `retry_instead_of`.

Everything here is pure.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from penstock.errors import PenstockError, StreamInterrupted, StreamRejected, encodable, words_for_clients
from penstock.runs import CAUSES, Cause
from penstock.sse import Event

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from starlette.types import Scope

    from penstock.sse.dialects import Dialect

RETRY: Final = Event(retry=1000).encode()
"""Ends a stream of a run that goes on: the client reconnects after a second."""

_RETRY_LATER: Final = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
_RETRY_AFTER: Final = (b"retry-after", b"1")
_HEADERS: Final[Mapping[int, Sequence[tuple[bytes, bytes]]]] = {
    HTTPStatus.UNAUTHORIZED: [(b"www-authenticate", b"Bearer")],  # RFC 6750, section 3
    HTTPStatus.TOO_MANY_REQUESTS: [_RETRY_AFTER],
    HTTPStatus.SERVICE_UNAVAILABLE: [_RETRY_AFTER],
}
"""The headers that a status brings with it."""


class ErrorResponse(NamedTuple):
    """A response that is an error, not a stream."""

    status: int
    code: str
    message: str
    members: dict[str, Any]

    def render(self, dialect: Dialect) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """The headers and the body, as the dialect spells them."""
        media_type, body = dialect.error_body(self.status, self.code, self.message, self.members)
        headers = [(b"content-type", media_type.encode()), (b"content-length", b"%d" % len(body))]
        headers += _HEADERS.get(self.status, ())
        return headers, body


def error_response_for(error: BaseException, *, expose_errors: bool = False) -> ErrorResponse:
    """The response to a request that failed with this error."""
    if isinstance(error, StreamRejected):
        return ErrorResponse(error.status, error.code, encodable(error.message), dict(error.extra_members))
    if isinstance(error, StreamInterrupted):
        row = CAUSES[Cause.SHUTDOWN]
        return ErrorResponse(HTTPStatus.SERVICE_UNAVAILABLE, str(row.code), row.message, {})
    code, message = words_for_clients(error, expose_errors=expose_errors)
    if not isinstance(error, PenstockError):
        return ErrorResponse(HTTPStatus.INTERNAL_SERVER_ERROR, code, message, {})
    if error.status < HTTPStatus.INTERNAL_SERVER_ERROR:
        message = encodable(str(error))  # it says what is wrong with the request
    elif not expose_errors:
        message = error.public
    return ErrorResponse(error.status, code, message, dict(error.extra()))


def is_expected(error: BaseException) -> bool:
    """Whether the error was raised to be the response, so that there is nothing to report."""
    return isinstance(error, StreamRejected) or (
        isinstance(error, PenstockError) and error.status != HTTPStatus.INTERNAL_SERVER_ERROR
    )


def retry_instead_of(error_response: ErrorResponse, scope: Scope) -> bytes | None:
    """The body of the stream that replaces a temporary error for an `EventSource`; None for every other client.

    An `EventSource` is recognised by its `Accept` header, which names event streams and nothing else.
    """
    accepted = [value.strip() for name, value in scope.get("headers", ()) if name == b"accept"]
    if error_response.status in _RETRY_LATER and accepted == [b"text/event-stream"] and scope["method"] != "HEAD":
        return RETRY
    return None
