"""`EventStreamResponse`: a stream of Server-Sent Events as an ASGI response, on Trio and on asyncio.

| what happens | before the headers are sent | after that |
|---|---|---|
| the source yields | headers with its status, and the chunk | the chunk |
| the source ends | a complete, empty stream | the end |
| it raises, or yields no valid chunk | an error body with an HTTP status | error event, `[DONE]`, the end |
| it raises `RunCancelled` | headers, and then as later | cancelled event, `[DONE]`, the end |
| cancelled from outside (shutdown) | an error body with 503; raised | error event, `[DONE]`; raised |
| the client disconnects | the source is cancelled, or runs on; nothing is sent any more | the same |

Behind a `RunBody` a run goes on without its reader. If the reader fails after the headers, the client gets `retry:`
instead of an error event and `[DONE]`, and reconnects with its cursor. Before the headers it gets an error body or, if
it is an `EventSource`, a stream with `retry:` (`errors.py`). `sender.py` sends, and decides when a ping is due.

Nothing here imports Trio, so any ASGI server will do. On asyncio a source that swallows a cancellation runs on.
"""

from __future__ import annotations

import inspect
import math
from abc import ABC, abstractmethod
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal

from starlette.responses import Response

from penstock.asgi.errors import RETRY, ErrorResponse, error_response_for, is_expected, retry_instead_of
from penstock.asgi.sender import ENDED, MAX_SEND, ResponseSender, StreamOptions, StreamStats
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

    from penstock.asgi.sender import Body
    from penstock.observer import Observer
    from penstock.sse.dialects import Dialect
    from penstock.supervisor.timers import Timers

_WITHOUT_BODY: Final = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.RESET_CONTENT, HTTPStatus.NOT_MODIFIED})


class BodySource(ABC):
    """A reader of a run, such as `Supervisor.follow` makes. The response enters it.

    A class that has these methods need not derive from this one.
    """

    clock: Timers | None
    """Calls the timer of the response; None if there is none."""
    cursor: int
    """The seq of the entry that was handed over last."""
    at_end: bool
    """After entering: the run has ended and nothing follows the cursor. The response is an empty 204."""

    # As in `collections.abc`: its outcome is cached by class. The check of a runtime protocol costs 30 us a response.
    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        names = ("__aenter__", "__aexit__", "next_body")
        return all(any(name in base.__dict__ for base in other.__mro__) for name in names)

    @abstractmethod
    async def __aenter__(self) -> Any:
        """Look the run up. A `PenstockError` becomes the response, with its status."""

    @abstractmethod
    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        """Release the run."""

    @abstractmethod
    async def next_body(self, limit: int) -> bytes:
        """Wait for whole blocks, and return those that are ready, up to `limit` bytes if possible; `b""` at the end."""


class EventStreamResponse(Response):
    """Streams a source to the client. An endpoint of Starlette or FastAPI returns it.

    The source is opened, iterated and closed in the task that serves the request. When the call returns, the response
    is over and the source's `finally` blocks have run. Then `background` runs, even if the client has disconnected. A
    cancellation from outside, such as the server's shutdown, reaches the source; the end of the stream is sent within
    half a second; and the cancellation is raised.

    Args:
        source: an async iterable of chunks, an async context manager that hands one out, an awaitable of either, or a
            reader of a run (`Supervisor.follow`). A chunk is an `Event`, or `str` or `bytes` holding whole SSE blocks,
            or a tuple of one of these and an HTTP status. The first chunk's status is that of the response; a later
            status ends the stream as an error unless it is 2xx.
        status_code: the status if the first chunk has none.
        headers: further headers. `Cache-Control: no-store` and `X-Accel-Buffering: no` are set unless these set them.
        media_type: without the charset, which is UTF-8.
        background: as in any Starlette response.
        ping_interval: seconds without a send after which a ping is sent; None: no pings. (After more than 256 sends at
            full speed, one ping may come early.)
        on_disconnect: `"cancel"`: when the client disconnects the source is cancelled, with the reason "client
            disconnected". `"detach"`: it runs to its end. The reader of a run is always cancelled; its run is not.
        first_chunk_timeout: seconds after which the headers are sent with `status_code`, even if there is no chunk yet.
        dialect: spells pings, errors and cancellations: `"plain"` or `"letta"`.
        expose_errors: clients see the message of every exception, not only that of a `PublicError`.
        observer: is notified of errors, with the id that clients are shown. The default writes to the logger
            `penstock`.
        run_id: named by pings in the dialect letta.

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
        self.headers.setdefault("x-accel-buffering", "no")  # nginx would hold events back until they fill a page
        del self.headers["content-length"]  # a stream has none, even if the endpoint sets it

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"an EventStreamResponse answers HTTP requests, not one of type {scope['type']!r}")
        stats = StreamStats(self.observer, self.run_id, f"response to {scope['method']} {scope['path']}")
        body: Body
        if isinstance(self.source, BodySource):
            # Its headers are sent as soon as the run is found, and a reader without a client has nothing to do.
            body = RunBody(self.source, stats, scope, expose_errors=self.expose_errors)
            options = StreamOptions(self.dialect, self.run_id, self.ping_interval, clock=self.source.clock)
        else:
            body = SourceBody(self.source, stats, self.dialect, expose_errors=self.expose_errors)
            options = StreamOptions(
                self.dialect,
                self.run_id,
                self.ping_interval,
                headers_after=self.first_chunk_timeout,
                detach=self.on_disconnect == "detach",
            )
        sender = ResponseSender(
            receive,
            send,
            status=self.status_code,
            headers=self.raw_headers,
            head=scope["method"] == "HEAD",
            stats=stats,
            options=options,
        )
        await sender.run(body)
        if self.background is not None:
            await self.background()


class SourceBody:
    """A body whose source is all there is: the end of the source is the end of the stream."""

    def __init__(self, source: Any, stats: StreamStats, dialect: Dialect, *, expose_errors: bool) -> None:
        self._source = source
        self._stats = stats
        self._dialect = dialect
        self._expose_errors = expose_errors

    async def read(self, sender: ResponseSender) -> Exception | None:
        """Write what the source yields. What is not a chunk closes the source as a `break` would."""
        dialect = self._dialect
        rejected: Exception | None = None
        try:
            if sender.head:
                await self._discard()
                return None
            async with opened(self._source) as chunks:
                async for chunk in chunks:
                    if type(chunk) is bytes and chunk[-2:] == b"\n\n":
                        body = chunk
                    else:
                        try:
                            if isinstance(chunk, tuple):
                                body = self._body_of_pair(chunk, sender)
                            else:
                                body = bytes_of(chunk, dialect)
                        except (InvalidChunk, PublicError, StreamRejected) as error:
                            rejected = error
                            break
                    await sender.write(body)
        except (GeneratorExit, SystemExit) as error:
            failure = RuntimeError(f"the source raised {type(error).__name__}")
            failure.__cause__ = error  # nothing that a source raises may end the server
            return failure
        except Exception as error:
            if sender.is_send_error(error):
                raise
            if rejected is None:
                return error
            self._stats.report(error)  # from closing the source; the client sees the first one
        return rejected

    async def _discard(self) -> None:
        """Close the source without having opened it."""
        if inspect.iscoroutine(self._source):
            self._source.close()
        elif hasattr(self._source, "aclose"):
            await self._source.aclose()

    def _body_of_pair(self, pair: tuple[Any, ...], sender: ResponseSender) -> bytes:
        content, refusal = status_of(pair)
        if sender.started:
            if refusal is None:
                return bytes_of(content, self._dialect)
            code, message = refusal
            raise PublicError(message, code)
        status = pair[1]
        if status in _WITHOUT_BODY:
            raise InvalidChunk(f"a response with status {status} has no body, so it cannot be a stream's")
        try:
            body = bytes_of(content, self._dialect)
        except InvalidChunk:
            if refusal is None or status < HTTPStatus.BAD_REQUEST:
                raise
            # The content is a message for people instead of a block: an error body.
            raise StreamRejected(status, *refusal) from None
        sender.status = status
        return body

    def ending(self, error: Exception | None, *, started: bool) -> tuple[ErrorResponse | None, bytes]:
        if error is None:
            self._stats.set_cause(ENDED)
            return None, b""
        cause = single_error(error)
        if isinstance(cause, RunCancelled):
            self._stats.set_cause(cause.code)
            reason = None if cause.reason is None else encodable(cause.reason)
            return None, self._dialect.cancelled_directly(CAUSES[Cause.CANCEL].message, reason) + DONE
        error_response = error_response_for(cause, expose_errors=self._expose_errors)
        self._stats.set_cause(error_response.code)
        if not started and is_expected(cause):
            return error_response, b""
        error_response.members["error_id"] = error_id = self._stats.report(error)
        event = RunError(error_response.code, error_response.message, error_id)
        return error_response, self._dialect.error(event) + DONE


class RunBody:
    """A body whose source reads a run. The run's entries say how it ends; a failure of the reader is not the run's."""

    def __init__(self, reader: BodySource, stats: StreamStats, scope: Scope, *, expose_errors: bool) -> None:
        self._reader = reader
        self._stats = stats
        self._scope = scope
        self._expose_errors = expose_errors

    async def read(self, sender: ResponseSender) -> Exception | None:
        """Write the run's entries, as many in one send as are ready."""
        reader = self._reader
        try:
            async with reader:
                self._stats.track(reader)
                if reader.at_end:
                    await sender.respond(HTTPStatus.NO_CONTENT)
                    return None
                await sender.begin(flush=not sender.head)
                while not sender.head and (body := await reader.next_body(MAX_SEND)):
                    await sender.write(body)
        except Exception as error:
            if sender.is_send_error(error):
                raise
            return error
        return None

    def ending(self, error: Exception | None, *, started: bool) -> tuple[ErrorResponse | None, bytes]:
        if error is None:
            self._stats.set_cause(ENDED)
            return None, b""
        cause = single_error(error)
        error_response = error_response_for(cause, expose_errors=self._expose_errors)
        self._stats.set_cause(error_response.code)
        if not isinstance(cause, PenstockError | StreamRejected | StreamInterrupted):
            error_response.members["error_id"] = self._stats.report(error)
        if isinstance(cause, CursorExpired):
            return error_response, Event(comment=f"{cause.code}: {cause}").encode()
        if not started and (retry := retry_instead_of(error_response, self._scope)) is not None:
            self._stats.refused(error_response)
            return None, retry
        return error_response, RETRY
