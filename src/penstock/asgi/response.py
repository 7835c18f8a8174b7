"""`EventStreamResponse`: a stream of Server-Sent Events as an ASGI response, on Trio and on asyncio.

The table says how a stream ends. `exchange.py` has the machinery: a task group with the pump, the timer and the
listener.

| what happens | nothing was sent yet | later |
|---|---|---|
| the source yields | headers with its status, and the chunk | the chunk |
| the source ends | a whole, empty stream | the end |
| it raises, or yields no chunk | an error body with an HTTP status | error event, `[DONE]`, the end |
| it raises `RunCancelled` | headers, and then as later | cancelled event, `[DONE]`, the end |
| cancelled from outside (shutdown) | an error body with 503; raised | error event, `[DONE]`; raised |
| the client goes away | the source is cancelled, or runs on; nothing is ever sent again | the same |

Behind a *follower* there is a run that goes on without its reader. A failure there says nothing of how the run ends, so
later on it is no error event and no `[DONE]`, but `retry:`, and the client comes back with its cursor. A browser's
`EventSource` comes back after that, and never after a status but 200 (WHATWG HTML, section 9.2.3): so whoever accepts
nothing but event streams is told `retry:` in a stream of its own, where others get a 429 or 503 with `Retry-After`.

There is no Trio in here, so any ASGI server will do. What is lost on asyncio: a cancellation from outside is delivered
once, and a source that swallows it runs on.
"""

from __future__ import annotations

import inspect
import math
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, runtime_checkable

from starlette.responses import Response

from penstock.asgi.errors import ErrorResponse, error_response_for, is_expected
from penstock.asgi.sender import ENDED, MAX_SEND, ResponseSender
from penstock.errors import (
    ConfigurationError,
    CursorExpired,
    InvalidChunk,
    PenstockError,
    PublicError,
    RunCancelled,
    StreamInterrupted,
    StreamRejected,
    encodable,
    single_error,
)
from penstock.observer.logging import LoggingObserver
from penstock.runs import CAUSES, Cause, RunError
from penstock.sse import Event
from penstock.sse.chunks import bytes_of, opened, status_of
from penstock.sse.dialects import DONE, dialect_named

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from starlette.background import BackgroundTask
    from starlette.types import Receive, Scope, Send

    from penstock.observer import Observer

RETRY: Final = Event(retry=1000).encode()
"""What a run's reader is told when this stream of it ends and the run does not: come back, after a second."""

FOR_NOW: Final = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
"""What is answered to whoever may come again."""
_WITHOUT_BODY: Final = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.RESET_CONTENT, HTTPStatus.NOT_MODIFIED})


@runtime_checkable
class BodySource(Protocol):
    """A reader of a run, such as `Supervisor.follow` makes: it is handed to the response un-entered."""

    @property
    def at_end(self) -> bool:
        """Once entered: the run has ended, and nothing follows the cursor. The answer is an empty 204."""

    async def __aenter__(self) -> Any:
        """Look the run up; a `PenstockError` becomes the answer, with its status."""

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        """Let go of the run."""

    async def next_body(self, limit: int) -> bytes:
        """Wait for whole blocks, and return what is ready, if possible at most `limit` bytes; `b""` at the end."""


class EventStreamResponse(Response):
    """Streams a source to the client; to be returned from an endpoint of Starlette or FastAPI.

    The source is opened, iterated and closed in the task that serves the request. When the call returns, the response
    is over and the source's `finally` blocks have run; then `background` runs, also if the client has gone away. A
    cancellation from outside, such as the server's shutdown, reaches the source, leaves half a second for last words,
    and is raised.

    Args:
        source: an async iterable of chunks, an async context manager that hands one out, or an awaitable of either; or
            a follower (`BodySource`). A chunk is an `Event`, or `str` or `bytes` holding whole SSE blocks, or a tuple
            of one of these and an HTTP status. The first chunk's status is the response's; a later one ends the stream
            as an error unless it is 2xx.
        status_code: the status if the first chunk says none.
        headers: further headers. `Cache-Control: no-store` and `X-Accel-Buffering: no` are set unless these set them.
        media_type: without the charset, which is UTF-8.
        background: as in any Starlette response.
        ping_interval: a ping is sent after so many seconds in which nothing was; None: never. (After more than 256
            sends at full speed, one ping may come early.)
        on_disconnect: what becomes of the source when the client goes away: `"cancel"` it, for the reason "client
            disconnected", or `"detach"` it, that is, let it run to its end. A follower is always cancelled; its run is
            not.
        first_chunk_timeout: after so many seconds without a chunk the headers are sent all the same, with
            `status_code`.
        dialect: how pings, errors and cancels are spelled: `"plain"` or `"letta"`.
        expose_errors: show clients the words of every exception, not only those of a `PublicError`.
        observer: is told of errors, with the id that clients are shown; the default writes to the logger `penstock`.
        run_id: for pings in the dialect letta.

    Raises:
        ConfigurationError: an argument has a value that it cannot have.
        RuntimeError: from the call: the request is not an HTTP request.
    """

    def __init__(
        self,
        source: Any,
        status_code: int = 200,
        headers: Mapping[str, str] | None = None,
        media_type: str = "text/event-stream",
        background: BackgroundTask | None = None,
        *,
        ping_interval: float | None = 15.0,
        on_disconnect: Literal["cancel", "detach"] = "cancel",
        first_chunk_timeout: float = 2.0,
        dialect: str = "plain",
        expose_errors: bool = False,
        observer: Observer | None = None,
        run_id: str | None = None,
    ) -> None:
        if ping_interval is not None and not ping_interval > 0:
            raise ConfigurationError(f"ping_interval is a number of seconds above 0, or None, not {ping_interval!r}")
        if not first_chunk_timeout >= 0:
            raise ConfigurationError(f"first_chunk_timeout is a number of seconds from 0, not {first_chunk_timeout!r}")
        if on_disconnect not in {"cancel", "detach"}:
            raise ConfigurationError(f"on_disconnect is 'cancel' or 'detach', not {on_disconnect!r}")
        self.source = source
        self.status_code = status_code
        self.media_type = media_type
        self.background = background
        self.ping_interval = math.inf if ping_interval is None else ping_interval
        self.on_disconnect: Literal["cancel", "detach"] = on_disconnect
        self.first_chunk_timeout = first_chunk_timeout
        self.dialect = dialect_named(dialect)
        self.expose_errors = expose_errors
        self.observer: Observer = LoggingObserver() if observer is None else observer
        self.run_id = run_id
        self.init_headers(headers)
        self.headers.setdefault("cache-control", "no-store")
        self.headers.setdefault("x-accel-buffering", "no")  # nginx would keep events back until it has a page of them
        del self.headers["content-length"]  # whatever the endpoint thinks, a stream has none

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer the request."""
        if scope["type"] != "http":
            raise RuntimeError(f"an EventStreamResponse answers HTTP requests, not one of type {scope['type']!r}")
        follows = isinstance(self.source, AbstractAsyncContextManager) and hasattr(self.source, "next_body")
        exchange = (_FollowerExchange if follows else _DirectExchange)(self, scope, receive, send)
        await exchange.run()
        if self.background is not None:
            await self.background()


def is_event_source(scope: Scope) -> bool:
    """Whether a request accepts event streams and nothing else, as a browser's `EventSource` says."""
    return [value.strip() for name, value in scope.get("headers", ()) if name == b"accept"] == [b"text/event-stream"]


class _DirectExchange(ResponseSender):
    """The source is all there is: how it ends is how the stream ends."""

    async def read(self) -> Exception | None:
        """Pass on what the source yields. What is no chunk closes it, as a `break` would: it is not raised in there."""
        dialect = self.dialect
        verdict: Exception | None = None
        try:
            if self.head:
                await self._discard()
                return None
            async with opened(self.source) as chunks:
                async for chunk in chunks:
                    if type(chunk) is bytes and chunk[-2:] == b"\n\n":
                        body = chunk
                    else:
                        try:
                            body = self._body_of_pair(chunk) if isinstance(chunk, tuple) else bytes_of(chunk, dialect)
                        except (InvalidChunk, PublicError, StreamRejected) as error:
                            verdict = error
                            break
                    await self.write(body)
        except (GeneratorExit, SystemExit) as error:
            failure = RuntimeError(f"the source raised {type(error).__name__}")
            failure.__cause__ = error  # nothing that a source raises may end the server
            return failure
        except Exception as error:
            if self.is_of_the_server(error):
                raise
            if verdict is None:
                return error
            self.stats.report(error)  # of its cleanup; the client is told of the first
        return verdict

    async def _discard(self) -> None:
        """Close a source that is not to be opened."""
        if inspect.iscoroutine(self.source):
            self.source.close()
        elif hasattr(self.source, "aclose"):
            await self.source.aclose()

    def _body_of_pair(self, pair: tuple[Any, ...]) -> bytes:
        content, refusal = status_of(pair)
        if self.started:
            if refusal is None:
                return bytes_of(content, self.dialect)
            code, words = refusal
            raise PublicError(words, code)
        status = pair[1]
        if status in _WITHOUT_BODY:
            raise InvalidChunk(f"a response with status {status} has no body, so it cannot be a stream's")
        try:
            body = bytes_of(content, self.dialect)
        except InvalidChunk:
            if refusal is None or status < HTTPStatus.BAD_REQUEST:
                raise
            raise StreamRejected(status, *refusal) from None  # words for people instead of a block: an error body
        self.status = status
        return body

    def ending(self, error: Exception | None) -> tuple[ErrorResponse | None, bytes]:
        """See the table at the top of the module."""
        if error is None:
            self.stats.set_cause(ENDED)
            return None, b""
        cause = single_error(error)
        if isinstance(cause, RunCancelled):
            self.stats.set_cause(cause.code)
            reason = None if cause.reason is None else encodable(cause.reason)
            return None, self.dialect.cancelled_directly(CAUSES[Cause.CANCEL].message, reason) + DONE
        answer = error_response_for(cause, expose_errors=self.response.expose_errors)
        self.stats.set_cause(answer.code)
        if not self.started and is_expected(cause):
            return answer, b""
        answer.members["error_id"] = error_id = self.stats.report(error)
        return answer, self.dialect.error(RunError(answer.code, answer.words, error_id)) + DONE


class _FollowerExchange(ResponseSender):
    """The source reads a run: the run's entries say how that ends, and a failure of the reader is not the run's."""

    def __init__(self, response: EventStreamResponse, scope: Scope, receive: Receive, send: Send) -> None:
        super().__init__(response, scope, receive, send)
        self.headers_at = math.inf  # they are sent as soon as the run has been found
        self.detach = False  # a reader without a client has nothing to do
        self.clock = getattr(response.source, "clock", None)
        self._comes_back = is_event_source(scope)

    async def read(self) -> Exception | None:
        """Pass on what the run says, as much in one send as there is."""
        follower: BodySource = self.response.source
        try:
            async with follower:
                self.stats.track(follower)
                if follower.at_end:
                    await self.respond(HTTPStatus.NO_CONTENT)
                    return None
                await self.begin(flush=not self.head)
                while not self.head and (body := await follower.next_body(MAX_SEND)):
                    await self.write(body)
        except Exception as error:
            if self.is_of_the_server(error):
                raise
            return error
        return None

    def ending(self, error: Exception | None) -> tuple[ErrorResponse | None, bytes]:
        """See the table at the top of the module."""
        if error is None:
            self.stats.set_cause(ENDED)
            return None, b""
        cause = single_error(error)
        answer = error_response_for(cause, expose_errors=self.response.expose_errors)
        self.stats.set_cause(answer.code)
        if not isinstance(cause, PenstockError | StreamRejected | StreamInterrupted):
            answer.members["error_id"] = self.stats.report(error)
        if isinstance(cause, CursorExpired):
            return answer, Event(comment=f"{cause.code}: {cause}").encode()
        if self._comes_back and answer.status in FOR_NOW and not self.started and not self.head:
            self.stats.refused(answer)
            return None, RETRY
        return answer, RETRY
