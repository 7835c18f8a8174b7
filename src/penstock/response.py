"""`EventStreamResponse`: a stream of Server-Sent Events as an ASGI response, on Trio and on asyncio.

    the task that called the response        its siblings, in one task group
    ─────────────────────────────────        ───────────────────────────────────────────────────
    pump: open, iterate, close the source    timer: headers after `first_chunk_timeout`, then pings
      └─ each chunk ──▶ send                 listener: `receive` until `http.disconnect`

There is no queue: the source is asked for a chunk when the one before it is sent. And no scope is ever opened around a
step of the source, which would corrupt the scopes that it opens itself; whatever has a time limit is the timer's. Two
tasks send, so a send waits for the one that is under way: a chunk for a ping. A ping does not wait for a chunk, since
while one is being sent there is no silence.

What becomes of the response is decided from facts that are recorded when they happen (`started`, `gone`, `finished`),
never deduced from a cancellation:

| what happens | nothing was sent yet | later |
|---|---|---|
| the source yields | headers with the status, and the chunk | the chunk |
| the source ends | a whole, empty stream | the end |
| it raises, or yields what is no chunk | an error body with an HTTP status | error event, `[DONE]`, the end |
| it raises `RunCancelled` | 200, and then as later | cancelled event, `[DONE]`, the end |
| the client goes away | the source is cancelled (or runs on, see `on_disconnect`), and nothing is ever sent again | the same |
| a cancellation from outside | 503, within `FAREWELL` seconds, and `Cancelled` | error event, `[DONE]`, the same |

Behind a *follower* (`BodySource`) there is a run that goes on without its reader. There a failure says nothing of how
the run ends, so it is no error event and no `[DONE]`: it is `retry:`, and the client comes back with its cursor.

It imports no Trio, so it serves under any ASGI server. On asyncio a cancellation from outside is delivered once, as
`CancelledError`; a source that swallows it there runs on.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractAsyncContextManager
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol, cast, runtime_checkable

import anyio
import anyio.lowlevel
from starlette.responses import Response

from penstock.chunks import bytes_of, opened, status_of
from penstock.dialects import DONE, dialect_named
from penstock.errors import (
    ConfigurationError,
    CursorExpired,
    InvalidChunk,
    PenstockError,
    PublicError,
    RunCancelled,
    StreamInterrupted,
    StreamRejected,
    single_error,
    words_for_clients,
)
from penstock.groups import is_cancellation, raise_bare, raise_unchanged
from penstock.observer import LoggingObserver, Observer, new_error_id, tell
from penstock.runs import CAUSES, Cause, RunError
from penstock.sse import Event

if TYPE_CHECKING:
    from collections.abc import Mapping, MutableMapping
    from types import TracebackType

    from starlette.background import BackgroundTask
    from starlette.types import Receive, Scope, Send

MAX_SEND: Final = 64 * 1024
"""The most bytes in one `send`; a larger chunk goes out in pieces, and nothing gets in between them."""
FAREWELL: Final = 0.5
"""How many seconds the last words may take, shielded, after a cancellation from outside."""
RETRY: Final = Event(retry=1000).encode()
"""What a run's reader is told when this stream of it ends but the run does not: come back after a second."""
BURST: Final = 256
"""After so many sends within `BURST_SECONDS`, the time of as many more is not noted, since looking at the clock costs more than they do."""
BURST_SECONDS: Final = 0.25

_NO_BODY: Final = frozenset({HTTPStatus.NO_CONTENT, HTTPStatus.RESET_CONTENT, HTTPStatus.NOT_MODIFIED})
_DISCONNECTS: Final = (OSError, anyio.ClosedResourceError, anyio.BrokenResourceError)
"""What a server raises from `send` when the client is gone (ASGI 2.4: OSError), and what a stream in a middleware raises."""


@runtime_checkable
class BodySource(Protocol):
    """A reader of a run, as `Supervisor.follow` makes them: handed to the response un-entered."""

    at_end: bool
    """Once entered: the run has ended, and there is nothing after the cursor. The answer is 204."""

    async def __aenter__(self) -> Any:
        """Look the run up. A `PenstockError` becomes the response, with its status."""

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> Any:
        """Let go of it."""

    async def next_body(self, limit: int) -> bytes:
        """Wait for whole SSE blocks, and return all that is ready, if possible not more than `limit` bytes; `b""` at the end."""


class EventStreamResponse(Response):
    """Streams a source to the client. To be returned from an endpoint of Starlette or FastAPI; any ASGI server will do.

    A source that is not a follower is opened, iterated and closed in the task that serves the request. The response is
    whole when its call
    returns: by then the source's `finally` blocks have run. `background` runs after that, also when the client has gone away.

    A cancellation from outside, such as the server's shutdown, reaches the source; the client gets its last words (see
    the table at the top of the module), the observer a `StreamInterrupted`, and `Cancelled` is raised from the call.

    Args:
        source: an async iterable of chunks, an async context manager that hands one out, or an awaitable of either; or
        a follower, which
            is what `Supervisor.follow` returns. A chunk is an `Event`, or `str` or `bytes` holding whole SSE blocks, or
            a tuple of one of these and an HTTP status: the first chunk's status becomes the response's; a later one is
            an error unless it is 2xx.
        status_code: the status unless the first chunk says another.
        headers: more headers. `Cache-Control: no-store` and `X-Accel-Buffering: no` are set unless they are among them.
        media_type: the media type; the charset is added.
        background: runs when the response is over, as in any Starlette response.
        ping_interval: after how many seconds in which nothing was sent a ping is; None for never. (After a burst of
        more than 256 chunks
            a ping may come early, once.)
        on_disconnect: when the client goes away, `"cancel"` the source, with the reason "client disconnected", or
        `"detach"` it: it runs to
            its end, and what it yields is dropped. A follower is always cancelled, since its run does not depend on it.
        first_chunk_timeout: after how many seconds without a chunk the headers are sent all the same, with
        `status_code`.
        dialect: how pings, errors and cancels are spelled: `"plain"` or `"letta"`.
        expose_errors: show clients the words of every exception, not only those of a `PublicError`.
        observer: is told of errors, with the id that the client was shown; the default writes to the logger `penstock`.
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
        self.ping_interval = ping_interval
        self.on_disconnect = on_disconnect
        self.first_chunk_timeout = first_chunk_timeout
        self.dialect = dialect_named(dialect)
        self.expose_errors = expose_errors
        self.observer: Observer = LoggingObserver() if observer is None else observer
        self.run_id = run_id
        self.init_headers(headers)
        self.headers.setdefault("cache-control", "no-store")
        self.headers.setdefault("x-accel-buffering", "no")  # or nginx keeps the events until it has 4 KiB of them
        del self.headers["content-length"]  # a stream has none, whatever the endpoint thinks

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"an EventStreamResponse answers an HTTP request, not one of type {scope['type']!r}")
        if isinstance(self.source, AbstractAsyncContextManager) and hasattr(self.source, "next_body"):
            exchange: _Exchange = _FollowerExchange(self, scope, receive, send)
        else:
            exchange = _DirectExchange(self, scope, receive, send)
        await exchange.run()
        if self.background is not None:
            await self.background()


class _Exchange:
    """One call of the response: who may send, and what has been sent. The subclasses say what is read, and how that ends."""

    def __init__(self, response: EventStreamResponse, scope: Scope, receive: Receive, send: Send) -> None:
        self.response = response
        self.source = response.source
        self.head = scope["method"] == "HEAD"
        self.where = f"response to {scope['method']} {scope['path']}"
        self.detach = response.on_disconnect == "detach"
        self.started = False
        """The headers have been sent, or are just being sent."""
        self.finished = False
        """The last message has been sent, or is just being sent."""
        self.gone = False
        """The client is: nothing may be sent any more."""
        self.torn = False
        """A chunk is out in part."""
        self.farewell = b""
        """The last words that there was no time for."""
        self.send_error: Exception | None = None
        """What `send` raised, other than that the client is gone: the server's business, not the source's."""
        self._receive = receive
        self._send = send
        self._sending = False
        self._aside: anyio.Event | None = None
        """Set when the timer has sent what it is just sending; None if it is not."""
        self._send_scope: anyio.CancelScope | None = None
        """Around a send whose client may go away without the source."""
        self._group = anyio.create_task_group()
        self._last_sent = anyio.current_time()
        self._noted = 0
        self._unnoted = 0
        self._burst_began = self._last_sent

    # The three tasks

    async def run(self) -> None:
        """Serve the response, in the task that called it and two more. An exception leaves bare."""
        cancelled = anyio.get_cancelled_exc_class()
        try:
            async with self._group as group:
                group.start_soon(self._listen)
                if not self.head:
                    group.start_soon(self._tick)
                try:
                    await self._serve()
                except BaseException as error:
                    # Before the group's end, where a shield still has the listener's scope around it.
                    await self._interrupted(error, cancelled)
                    raise
                finally:
                    group.cancel_scope.cancel(reason="the response has ended")
        except BaseExceptionGroup as errors:
            raise_bare(errors, cancelled)
