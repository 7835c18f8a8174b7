"""Sends one streaming response: headers, chunks, the end, and decides when a ping is sent.

    the task that called the response         its siblings, in one task group
    ──────────────────────────────────        ──────────────────────────────────────────────────
    pump: the body opens, iterates and        timer: headers after `headers_after`, then pings
    closes its source                         listener: `receive` until `http.disconnect`
      └─ each chunk ──▶ `write` ──▶ `send`

The reader of a run brings a clock along (`supervisor/timers.py`). With it the timer is a callback, and a task only
while it sends: thousands of silent readers would be thousands of sleeping tasks.

There is no queue: the body asks its source for a chunk when the one before it has been sent. No cancel scope is opened
around a step of the source, because it would corrupt the scopes that the source holds across its yields; time limits
belong to the timer. A chunk waits for a ping that is under way. A ping never waits for a chunk, since a response that
is sending is not silent.

Decisions follow from facts that are recorded as they happen (`started`, `gone`, `finished`), never from whether a task
was cancelled:

- `gone`: nothing is sent any more, not even the end (on HTTP/2 that could hang). The task group is cancelled, unless
  the source is detached.
- A cancellation that reaches the pump while the client is there came from outside. The end of the stream is sent under
  a shield of `FINAL_SEND_TIMEOUT` seconds, and the cancellation is raised again. It never becomes anything else.
- Only an error that `send` itself raises can mean that the client is gone. The same error from the source is the
  source's error.

A `Body` says what is sent and what its end means. The sender runs on anyio alone, so any ASGI server will do.
"""

from __future__ import annotations

import math
from contextvars import copy_context
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

import anyio
import anyio.lowlevel

from penstock.errors import StreamInterrupted, StreamRejected, single_error
from penstock.exception_groups import raise_cancellation, raise_single, split_cancelled
from penstock.observer import StreamEnd, new_error_id, notify

if TYPE_CHECKING:
    from collections.abc import Iterable

    from starlette.types import Message, Receive, Send

    from penstock.asgi.errors import ErrorResponse
    from penstock.observer import Observer
    from penstock.sse.dialects import Dialect
    from penstock.supervisor.timers import Timer, Timers

    Headers = Iterable[tuple[bytes, bytes]]

ENDED: Final = "ended"
"""The cause of a stream's end if everything was sent."""
MAX_SEND: Final = 64 * 1024
"""The most bytes in one `send`. A larger chunk is sent in pieces, and nothing is sent between them."""
FINAL_SEND_TIMEOUT: Final = 0.5
"""Seconds that the last send may take after a cancellation from outside, or after the client has disconnected."""
BURST: Final = 256
"""Sends at full speed after which the clock is not read for as many more, since reading it costs more than they do."""
BURST_SECONDS: Final = 0.25
"""`BURST` sends in less time than this are sends at full speed."""

_CLIENT_GONE: Final = (OSError, anyio.ClosedResourceError, anyio.BrokenResourceError)
"""Raised by `send` when the client is gone: OSError by a server (ASGI 2.4), the others by a memory stream between."""


@dataclass(frozen=True, slots=True)
class StreamOptions:
    """How a response is streamed. Times are in seconds."""

    dialect: Dialect
    run_id: str | None = None  # named by pings
    ping_interval: float = math.inf
    headers_after: float = math.inf  # they are sent then, even if there is no chunk yet
    detach: bool = False  # the source runs to its end when the client disconnects, instead of being cancelled
    clock: Timers | None = None  # calls the timer; without one the timer is a task


class StreamStats:
    """The statistics of one response, for its observer. A response without a body is not counted as a stream."""

    def __init__(self, observer: Observer, run_id: str | None, where: str) -> None:
        self.where: Final = where  # names the response in errors and warnings
        self.bytes = 0  # that were sent, without pings and the end that the server adds
        self._observer = observer
        self._run_id = run_id
        self._cause: str | None = None
        self._started_at: float | None = None
        self._source: Any = None
        self._first_cursor = 0
        self._refused = False

    def start(self) -> None:
        """Record that the headers of a stream have been sent."""
        if self._started_at is None and not self._refused:
            self._started_at = anyio.current_time()
            notify(self._observer.stream_started, self._run_id)

    def track(self, source: Any) -> None:
        """Count the entries that `source` hands over from here on, by its `cursor`."""
        self._source, self._first_cursor = source, source.cursor

    def set_cause(self, cause: str) -> None:
        """Record why the stream ends. The first cause counts."""
        self._cause = self._cause or cause

    def pinged(self) -> None:
        notify(self._observer.pinged)

    def refused(self, error_response: ErrorResponse) -> None:
        """Record that an error is sent instead of a stream, or a stream that holds nothing but `retry:`."""
        self._refused = True
        notify(self._observer.refused, error_response.status, error_response.code)

    def report(self, error: Exception) -> str:
        """Report an error; returns the id that clients are shown instead of its message."""
        error_id = new_error_id()
        notify(self._observer.on_error, error, error_id=error_id, where=self.where)
        return error_id

    def warn(self, message: str) -> None:
        notify(self._observer.warning, f"{self.where}: {message}")

    def finish(self) -> None:
        """Report the end of the stream, if there was one."""
        if self._started_at is None:
            return
        cursor = None if self._source is None else self._source.cursor
        entries = None if cursor is None else cursor - self._first_cursor
        seconds = anyio.current_time() - self._started_at
        end = StreamEnd(self._cause or "failed", self._run_id, cursor, entries, self.bytes, seconds)
        notify(self._observer.stream_ended, end)


class Body(Protocol):
    """What a response sends, and what its end means."""

    async def read(self, sender: ResponseSender) -> Exception | None:
        """Open, iterate and close the source, write to `sender` what it yields, and return what went wrong with it.

        An error of `send` (`ResponseSender.is_send_error`) is raised.
        """

    def ending(self, error: Exception | None, *, started: bool) -> tuple[ErrorResponse | None, bytes]:
        """How the response ends after `error`, or after the end of the source; sets the cause in the statistics.

        Returns the response if the headers have not been sent (None: a stream all the same), and the stream's last
        bytes.
        """


class ResponseSender:
    """Sends one response; `status` and `headers` are those of a stream, and the body may change the status first."""

    def __init__(
        self,
        receive: Receive,
        send: Send,
        *,
        status: int,
        headers: Headers,
        head: bool,
        stats: StreamStats,
        options: StreamOptions,
    ) -> None:
        self.status = status
        self.head = head
        self.started = False  # the headers are sent, or are being sent
        self._receive = receive
        self._send = send
        self._headers = headers
        self._stats = stats
        self._options = options
        self._clock = options.clock
        self._detach = options.detach
        self._finished = False  # the last message is sent, or is being sent
        self._gone = False  # the client is: nothing is sent any more
        self._torn = False  # some pieces of a chunk are sent, but not all
        self._last: bytes | None = None  # the body of the last message, once it is settled
        self._send_error: Exception | None = None  # raised by `send`, when it was not that the client is gone
        self._refusal: StreamRejected | None = None  # raised by `receive`: the request has not ended in time
        self._sending = False  # the pump or the timer is inside `send`
        self._timer_sends: anyio.Event | None = None  # while the timer sends; it sets this event afterwards
        self._alarm: Timer | None = None
        self._context = copy_context()  # the timer sends with the request's variables, not with those of the clock
        self._send_scope: anyio.CancelScope | None = None  # of the send under way, if the source is detached
        self._group = anyio.create_task_group()
        self._last_sent = self._burst_began = anyio.current_time()
        self._headers_at = self._last_sent + options.headers_after
        self._noted = self._unnoted = 0

    async def run(self, body: Body) -> None:
        """Send the response. An exception leaves bare, without a group around it."""
        try:
            async with self._group as group:
                group.start_soon(self._listen)
                if self._clock is None:
                    group.start_soon(self._run_timer)
                try:
                    self._set_alarm()
                    await self._pump(body)
                finally:
                    self._stop_alarm()
                group.cancel_scope.cancel(reason="the response is over")
        except BaseExceptionGroup as errors:
            raise_single(errors, anyio.get_cancelled_exc_class())
        finally:
            self._stats.finish()

    # The pump

    async def _pump(self, body: Body) -> None:
        ending = None
        try:
            error = await body.read(self)
            ending = body.ending(error, started=self.started)
            await self._end(*ending)
        except BaseException as error:
            if not self._is_interruption(error):
                raise
            self._stats.set_cause("interrupted" if self._refusal is None else self._refusal.code)
            with anyio.move_on_after(FINAL_SEND_TIMEOUT, shield=True):
                await self._end_interrupted(body, ending)
            if isinstance(error, BaseExceptionGroup):
                raise_cancellation(error, anyio.get_cancelled_exc_class())
            raise

    def _is_interruption(self, error: BaseException) -> bool:
        """Whether the pump was cancelled. What its source raised beside that is reported, and goes no further."""
        cancellation, others = split_cancelled(error, anyio.get_cancelled_exc_class())
        if cancellation is None or not (others is None or isinstance(others, Exception)):
            return False
        if others is not None:
            self._stats.report(others)
        return True

    async def _end_interrupted(self, body: Body, ending: tuple[ErrorResponse | None, bytes] | None) -> None:
        """Send what is still to be sent after a cancellation, if the client can receive it."""
        if self._send_error is not None or (self._gone and not self._detach):
            return
        if ending is None:
            interruption = StreamInterrupted(f"{self._stats.where}: cancelled from outside, as by a shutdown")
            ending = body.ending(self._refusal or interruption, started=self.started)
        try:
            await self._end(*ending)
        except Exception as error:  # noqa: BLE001  (whatever the server raises now, the cancellation goes on)
            self._stats.warn(f"the end of the stream could not be sent: {error!r}")

    async def _end(self, error_response: ErrorResponse | None, last: bytes) -> None:
        while self._timer_sends is not None:
            await self._timer_sends.wait()
        if self._finished:
            return
        if self._last is not None:
            await self._send_last(self._last)
        elif self.started or error_response is None:
            if not self.started:
                await self.begin()
            # A client discards an unfinished block at the end of a stream. Any bytes after it would finish it.
            await self._send_last(b"" if self._torn else last)
        else:
            if not self._gone:
                self._stats.refused(error_response)
            headers, body = error_response.render(self._options.dialect)
            await self.respond(error_response.status, headers, body)

    # The timer

    async def _run_timer(self) -> None:
        while not self._silenced:
            if (due := self._due()) > anyio.current_time():
                await anyio.sleep_until(due)
            await self._speak_if_due()

    def _set_alarm(self) -> None:
        """Run the timer by the clock instead: nothing sleeps between two alarms."""
        if self._clock is not None and not self._silenced:
            self._alarm = self._clock.at(self._due(), self._on_alarm)

    def _on_alarm(self) -> None:
        if self._is_due():
            self._context.run(self._group.start_soon, self._speak_and_set_alarm)
        else:
            self._set_alarm()

    async def _speak_and_set_alarm(self) -> None:
        await self._speak_if_due()
        self._set_alarm()

    def _stop_alarm(self) -> None:
        """From here on nothing starts a task in the group, so that it may be closed."""
        self._clock = None
        if self._alarm is not None:
            self._alarm.cancel()

    @property
    def _silenced(self) -> bool:
        """Neither headers nor pings can become due any more."""
        return self._gone or self._finished or self.head

    def _due(self) -> float:
        """The earliest time at which headers or a ping are due."""
        now = anyio.current_time()
        if not self.started:
            return min(self._headers_at, now + self._options.ping_interval)
        return (now if self._sending else self._last_sent) + self._options.ping_interval

    def _is_due(self) -> bool:
        return not self._silenced and anyio.current_time() >= self._due()

    async def _speak_if_due(self) -> None:
        if not self._is_due():
            return
        self._timer_sends = anyio.Event()
        try:
            if self.started:
                await self._send_body(self._options.dialect.ping(self._options.run_id))
                self._stats.pinged()
            else:
                await self.begin(flush=True)
            self._last_sent = anyio.current_time()
            self._noted = self._unnoted = 0
        finally:
            self._timer_sends.set()
            self._timer_sends = None

    # The listener

    async def _listen(self) -> None:
        """Wait until the client disconnects. A request body that nothing has read is discarded."""
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        except StreamRejected as refusal:  # the rest of the request has not come in time
            self._refusal = refusal
            self._group.cancel_scope.cancel(reason="the request has not ended in time")
            return
        # From here on `receive` is not called again: on Hypercorn it would not return.
        if self._finished:
            # The last send may hang now (HTTP/2). It may also be the source of this disconnect: Hypercorn puts one into
            # its queue in the middle of the last send. If that were cut off there, no timeout would ever close the
            # connection.
            self._gone = True
            self._group.cancel_scope.deadline = anyio.current_time() + FINAL_SEND_TIMEOUT
        else:
            self._lose_client()

    def _lose_client(self) -> None:
        if not self._gone:
            self._gone = True
            self._stats.set_cause("disconnected")
            if self._send_scope is not None:
                self._send_scope.cancel(reason="client disconnected")
            if not self._detach:
                self._group.cancel_scope.cancel(reason="client disconnected")

    # Sending

    async def write(self, body: bytes) -> None:
        """Send a chunk, after the headers if they have not been sent yet."""
        if self.started and self._timer_sends is None and not self._detach and len(body) <= MAX_SEND:
            # Nearly every chunk takes this path, which does no more than it must (`benchmarks chunk_cost`).
            # It is `_deliver` without a scope, written out.
            self._sending = True
            try:
                if not self._gone:
                    await self._send({"type": "http.response.body", "body": body, "more_body": True})
                    self._stats.bytes += len(body)
            except Exception as error:  # noqa: BLE001  (`_send_failed` decides what it means)
                self._send_failed(error)
            finally:
                self._sending = False
            if self._gone:
                await anyio.lowlevel.checkpoint_if_cancelled()
        else:
            await self._write_slowly(body)
        if self._unnoted:
            self._unnoted -= 1
        elif self._note():
            await anyio.lowlevel.checkpoint()  # perhaps neither the source nor the server's `send` ever waits

    async def _write_slowly(self, body: bytes) -> None:
        while self._timer_sends is not None:
            await self._timer_sends.wait()
        if not self.started:
            await self.begin(flush=not body)
        self._torn = len(body) > MAX_SEND
        for start in range(0, len(body), MAX_SEND):
            await self._send_body(body[start : start + MAX_SEND])
        self._torn = False
        if not self._gone:
            self._stats.bytes += len(body)

    def _note(self) -> bool:
        """Note the time of a send, but not of the next `BURST` at full speed. True after `BURST` sends."""
        now = self._last_sent = anyio.current_time()
        self._noted += 1
        if self._noted < BURST:
            return False
        fast = now - self._burst_began < BURST_SECONDS
        self._burst_began = now
        self._noted, self._unnoted = (BURST - 1, BURST) if fast else (0, 0)
        return True

    async def begin(self, *, flush: bool = False) -> None:
        """Send the headers of a stream; `flush`: with an empty chunk, as a server may hold them back without one."""
        await self._send_start(self.status, self._headers)
        if not self.head and not self._gone:
            self._stats.start()
        if flush:
            await self._send_body(b"")

    async def respond(self, status: int, headers: Headers = (), body: bytes = b"") -> None:
        """Send a whole response that is not a stream."""
        kept = [header for header in self._headers if header[0] != b"content-type"]
        await self._send_start(status, [*kept, *headers])
        await self._send_last(body)

    async def _send_start(self, status: int, headers: Headers) -> None:
        self.started = True
        try:
            await self._deliver({"type": "http.response.start", "status": status, "headers": list(headers)})
        except BaseException:
            self.started = False  # if its send was cancelled, it has to be taken as not sent
            raise

    async def _send_last(self, body: bytes) -> None:
        self._finished = True
        self._last = b"" if self.head else body
        try:
            await self._send_body(self._last, more=False)
        except BaseException:
            self._finished = False  # if it was sent all the same, the server refuses it the second time
            raise

    async def _send_body(self, body: bytes, *, more: bool = True) -> None:
        await self._deliver({"type": "http.response.body", "body": body, "more_body": more})

    async def _deliver(self, message: Message) -> None:
        """Send a message, unless the client is gone. `Cancelled` is raised if the source is to end with the client."""
        self._sending = True
        try:
            if not self._gone:
                if self._detach:
                    with anyio.CancelScope() as self._send_scope:  # a send may hang
                        await self._send(message)
                else:
                    await self._send(message)
        except Exception as error:  # noqa: BLE001  (`_send_failed` decides what it means)
            self._send_failed(error)
        finally:
            self._sending = False
        if self._gone:
            await anyio.lowlevel.checkpoint_if_cancelled()

    def _send_failed(self, error: Exception) -> None:
        if not isinstance(error, _CLIENT_GONE):
            self._send_error = error
            raise error
        self._lose_client()

    def is_send_error(self, error: Exception) -> bool:
        """Whether `error` came from `send`, and the source has only let it through."""
        return single_error(error) is self._send_error
