"""What an error becomes when it is the whole answer: a status, a code, words and further members. Pure.

Words are shown only if they were meant for the client: those of a refusal (`StreamRejected`, `PublicError`, a
`PenstockError` that says what is wrong with the request). Any other exception shows a code; `expose_errors` shows its
words, too.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from penstock.errors import PenstockError, StreamInterrupted, StreamRejected, encodable, words_for_clients
from penstock.runs import CAUSES, Cause

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from penstock.sse.dialects import Dialect


_COME_AGAIN: Final = (b"retry-after", b"1")
_HEADERS: Final[Mapping[int, Sequence[tuple[bytes, bytes]]]] = {
    HTTPStatus.UNAUTHORIZED: [(b"www-authenticate", b"Bearer")],  # RFC 6750, 3
    HTTPStatus.TOO_MANY_REQUESTS: [_COME_AGAIN],
    HTTPStatus.SERVICE_UNAVAILABLE: [_COME_AGAIN],
}
"""What goes with a status."""


class ErrorResponse(NamedTuple):
    """An answer that is an error, not a stream."""

    status: int
    code: str
    words: str
    members: dict[str, Any]

    def render(self, dialect: Dialect) -> tuple[list[tuple[bytes, bytes]], bytes]:
        """The headers and the body, in a dialect's spelling."""
        media_type, body = dialect.error_body(self.status, self.code, self.words, self.members)
        headers = [(b"content-type", media_type.encode()), (b"content-length", b"%d" % len(body))]
        headers += _HEADERS.get(self.status, ())
        return headers, body


def error_response_for(error: BaseException, *, expose_errors: bool = False) -> ErrorResponse:
    """The answer to a request that this error came of."""
    if isinstance(error, StreamRejected):
        return ErrorResponse(error.status, error.code, encodable(error.message), dict(error.extra_members))
    if isinstance(error, StreamInterrupted):
        row = CAUSES[Cause.SHUTDOWN]
        return ErrorResponse(HTTPStatus.SERVICE_UNAVAILABLE, str(row.code), row.message, {})
    code, words = words_for_clients(error, expose_errors=expose_errors)
    if not isinstance(error, PenstockError):
        return ErrorResponse(HTTPStatus.INTERNAL_SERVER_ERROR, code, words, {})
    if error.status < HTTPStatus.INTERNAL_SERVER_ERROR:
        words = encodable(str(error))  # what is wrong with the request
    elif not expose_errors:
        words = error.public
    return ErrorResponse(error.status, code, words, dict(error.extra()))


def is_expected(error: BaseException) -> bool:
    """Whether the error is meant as the answer, and so is nothing to report."""
    return isinstance(error, StreamRejected) or (
        isinstance(error, PenstockError) and error.status != HTTPStatus.INTERNAL_SERVER_ERROR
    )
