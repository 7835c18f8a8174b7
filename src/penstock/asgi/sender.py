"""What an observer is told of one exchange: what went wrong, and how its stream has ended.

One HTTP exchange that streams: who may send, what was sent, and what becomes of a source whose client goes away.

    the task that called the response        its siblings, in one task group
    ─────────────────────────────────        ───────────────────────────────────────────────────
    pump: open, iterate, close the source    timer: headers after `first_chunk_timeout`, then pings
      └─ each chunk ──▶ send                 listener: `receive` until `http.disconnect`

The reader of a run brings a clock along, and then the timer is a task only while it sends.

There is no queue: the source is asked for a chunk when the one before it has been sent. And no scope is ever opened
around a step of the source, which would corrupt the scopes that it opens itself: time limits are the timer's. Two tasks
send. A chunk waits for a ping that is under way; a ping does not wait for a chunk, since while one is being sent there
is no silence.

What happens next follows from facts that are recorded as they happen (`started`, `gone`, `finished`), never from
whether something was cancelled:

- `gone`: nothing is sent any more, not even the last frame (on HTTP/2 that could hang). Then the group is cancelled,
  unless the source is detached.
- A cancellation that reaches the pump without that came from outside: last words, under a shield of `FAREWELL` seconds,
  and it is raised again. It never becomes anything else.
- Only an error of `send` itself can mean that the client is gone; the same error from the source is the source's.

What is read, and how that may end, is said by the two subclasses in `response.py`. There is no Trio in here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Final

import anyio
import anyio.lowlevel

from penstock.errors import StreamInterrupted, StreamRejected, single_error
from penstock.exception_groups import raise_cancellation, raise_single, split_cancelled
from penstock.observer import StreamEnd, new_error_id, notify

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope, Send

    from penstock.asgi.errors import ErrorResponse
    from penstock.asgi.response import EventStreamResponse
    from penstock.observer import Observer
    from penstock.supervisor.timers import Timer, Timers

ENDED: Final = "ended"
"""The cause if all was sent that there was to send."""


class StreamStats:
    """Of one exchange. Whose headers are never sent, or who has no body, has no stream: nothing is told of it."""

    def __init__(self, observer: Observer, run_id: str | None, where: str) -> None:
        self.bytes = 0
        """What was sent, without pings and last words."""
        self._observer = observer
        self._run_id = run_id
        self._where = where
        self._cause: str | None = None
        self._since: float | None = None
        self._source: Any = None
        self._first = 0
        self._refused = False

    def start(self) -> None:
        """The headers are sent."""
        if self._since is None and not self._refused:
            self._since = anyio.current_time()
            notify(self._observer.stream_started, self._run_id)

    def track(self, source: Any) -> None:
        """What is sent are entries, if the source says where it stands (`Follower.cursor`)."""
        if isinstance(cursor := getattr(source, "cursor", None), int):
            self._source, self._first = source, cursor

    def set_cause(self, cause: str) -> None:
        """How it ends; the first cause counts."""
        self._cause = self._cause or cause

    def pinged(self) -> None:
        """A ping is sent."""
        notify(self._observer.pinged)

    def refused(self, answer: ErrorResponse) -> None:
        """An answer is sent instead of a stream, or a stream that only says: come back."""
        self._refused = True
        notify(self._observer.refused, answer.status, answer.code)

    def report(self, error: Exception) -> str:
        """Tell of an error; the id that clients are shown."""
        error_id = new_error_id()
        notify(self._observer.on_error, error, error_id=error_id, where=self._where)
        return error_id

    def warn(self, words: str) -> None:
        """Tell of something that is not to be helped."""
        notify(self._observer.warning, f"{self._where}: {words}")

    def finish(self) -> None:
        """All is over."""
        if self._since is None:
            return
        cursor = None if self._source is None else self._source.cursor
        entries = None if cursor is None else cursor - self._first
        seconds = anyio.current_time() - self._since
        end = StreamEnd(self._cause or "failed", self._run_id, cursor, entries, self.bytes, seconds)
        notify(self._observer.stream_ended, end)


MAX_SEND: Final = 64 * 1024
"""The most bytes in one `send`; a larger chunk goes out in pieces, and nothing gets in between them."""
FAREWELL: Final = 0.5
"""How many seconds the last words may take, under a shield, after a cancellation from outside."""
BURST: Final = 256
BURST_SECONDS: Final = 0.25
"""After `BURST` sends in less than this, the times of as many more are not noted: the clock costs more than they do."""

_CLIENT_GONE: Final = (OSError, anyio.ClosedResourceError, anyio.BrokenResourceError)
"""What `send` raises then: a server OSError (ASGI 2.4), a middleware with a memory stream in it the others."""

Headers = Iterable[tuple[bytes, bytes]]


class ResponseSender(ABC):
    """One call of a response: who may send, and what was sent. Subclasses say what is read, and how that may end."""

    def __init__(self, response: EventStreamResponse, scope: Scope, receive: Receive, send: Send) -> None:
        self.response = response
        self.source = response.source
        self.dialect = response.dialect
        self.status = response.status_code
        self.head = scope["method"] == "HEAD"
        self.where = f"response to {scope['method']} {scope['path']}"
        self.detach = response.on_disconnect == "detach"
        self.clock: Timers | None = None
        """What calls the timer. Without one it is a task that sleeps: with thousands of silent readers, much memory."""
        self.headers_at = anyio.current_time() + response.first_chunk_timeout
        self.started = False
        """The headers are sent, or being sent."""
        self.finished = False
        """The last message is sent, or being sent."""
        self.gone = False
        """The client is: nothing is sent any more."""
        self.torn = False
        """A part of a chunk is sent."""
        self.send_error: Exception | None = None
        """What `send` raised, when it was not that the client is gone: the server's affair, not the source's."""
        self.stats = StreamStats(response.observer, response.run_id, self.where)
        self._receive = receive
        self._send = send
        self._sending = False
        """The pump is."""
        self._aside: anyio.Event | None = None
        """The timer is sending, and sets this when it has."""
        self._last: bytes | None = None
        """What the last message says, once that is settled."""
        self._refusal: StreamRejected | None = None
        self._alarm: Timer | None = None
        self._context = copy_context()
        """What the timer sends in: the request's variables, not those of whoever calls it."""
        self._send_scope: anyio.CancelScope | None = None
        """Of the send under way, if the source is to go on without the client."""
        self._group = anyio.create_task_group()
        self._last_sent = self._burst_began = anyio.current_time()
        self._noted = self._unnoted = 0

    @abstractmethod
    async def read(self) -> Exception | None:
        """Open, iterate and close the source, writing what it yields; return what went wrong with it."""

    @abstractmethod
    def ending(self, error: Exception | None) -> tuple[ErrorResponse | None, bytes]:
        """What the client is told of that: the answer if nothing was sent yet, otherwise the stream's last words.

        Without an answer it is a stream, that of the last words if nothing was sent yet. The cause is settled.
        """

    # The three tasks

    async def run(self) -> None:
        """Serve: the pump in this task, the timer and the listener in two more. An exception leaves bare."""
        try:
            async with self._group as group:
                group.start_soon(self._listen)
                if self.clock is None:
                    group.start_soon(self._tick)
                try:
                    self._set_alarm()
                    await self._pump()
                finally:
                    self._stop_alarm()
                group.cancel_scope.cancel(reason="the response is over")
        except BaseExceptionGroup as errors:
            raise_single(errors, anyio.get_cancelled_exc_class())
        finally:
            self.stats.finish()

    async def _pump(self) -> None:
        ending = None
        try:
            ending = self.ending(await self.read())
            await self._end(*ending)
        except BaseException as error:
            if not self._is_interruption(error):
                raise
            self.stats.set_cause("interrupted" if self._refusal is None else self._refusal.code)
            with anyio.move_on_after(FAREWELL, shield=True):
                await self._interrupted(ending)
            if isinstance(error, BaseExceptionGroup):
                raise_cancellation(error, anyio.get_cancelled_exc_class())
            raise

    def _is_interruption(self, error: BaseException) -> bool:
        """Whether the pump was cancelled. What its source raised beside that is reported, and goes no further."""
        cancellation, others = split_cancelled(error, anyio.get_cancelled_exc_class())
        if cancellation is None or not (others is None or isinstance(others, Exception)):
            return False
        if others is not None:
            self.stats.report(others)
        return True

    async def _interrupted(self, ending: tuple[ErrorResponse | None, bytes] | None) -> None:
        """Say what there is still to say, if somebody is there to hear it."""
        if self.send_error is not None or (self.gone and not self.detach):
            return
        if ending is None:
            words = f"{self.where}: cancelled from outside, as by a shutdown"
            ending = self.ending(self._refusal or StreamInterrupted(words))
        try:
            await self._end(*ending)
        except Exception as error:  # noqa: BLE001  (whatever the server says now, the cancellation goes on)
            self.stats.warn(f"its last words could not be sent: {error!r}")

    async def _tick(self) -> None:
        """Send the headers if they are late, and pings; asleep until one may be due, whatever is sent meanwhile."""
        while not self._silent:
            due = self._due()
            if anyio.current_time() < due:
                await anyio.sleep_until(due)
            else:
                await self._speak()

    def _set_alarm(self) -> None:
        """The same, without a task that sleeps."""
        if self.clock is not None and not self._silent:
            self._alarm = self.clock.at(self._due(), self._ring)

    def _ring(self) -> None:
        if self._silent or anyio.current_time() < self._due():
            self._set_alarm()
        else:
            self._context.run(self._group.start_soon, self._answer_alarm)

    async def _answer_alarm(self) -> None:
        if not self._silent and anyio.current_time() >= self._due():  # still
            await self._speak()
        self._set_alarm()

    def _stop_alarm(self) -> None:
        """From now on the task group may be closed."""
        self.clock = None
        if self._alarm is not None:
            self._alarm.cancel()

    @property
    def _silent(self) -> bool:
        """Neither headers nor pings are due any more."""
        return self.gone or self.finished or self.head

    def _due(self) -> float:
        """When either may be due."""
        now = anyio.current_time()
        if not self.started:
            return min(self.headers_at, now + self.response.ping_interval)
        return (now if self._sending else self._last_sent) + self.response.ping_interval

    async def _speak(self) -> None:
        self._aside = anyio.Event()
        try:
            if self.started:
                await self._body(self.dialect.ping(self.response.run_id))
                self.stats.pinged()
            else:
                await self.begin(flush=True)
            self._last_sent = anyio.current_time()
            self._noted = self._unnoted = 0
        finally:
            self._aside.set()
            self._aside = None

    async def _listen(self) -> None:
        """Wait for the client to go away; a request body that nobody has read goes by."""
        try:
            while (await self._receive())["type"] != "http.disconnect":
                pass
        except StreamRejected as refusal:  # the rest of the request has not come in time
            self._refusal = refusal
            self._group.cancel_scope.cancel(reason="the request has not ended in time")
            return
        # From here on `receive` is not called again: on Hypercorn it would not return.
        if self.finished:
            # The last send may hang now (HTTP/2). But it may also be what brought the news: Hypercorn tells itself in
            # the middle of that send, which, cut off there, would leave a connection that no timeout ever closes.
            self.gone = True
            self._group.cancel_scope.deadline = anyio.current_time() + FAREWELL
        else:
            self._lose_client()

    def _lose_client(self) -> None:
        if not self.gone:
            self.gone = True
            self.stats.set_cause("disconnected")
            if self._send_scope is not None:
                self._send_scope.cancel(reason="client disconnected")
            if not self.detach:
                self._group.cancel_scope.cancel(reason="client disconnected")

    # Sending

    async def write(self, body: bytes) -> None:
        """Send a chunk, after the headers if they are still to be sent."""
        if self.started and self._aside is None and not self.detach and len(body) <= MAX_SEND:
            # The way of nearly every chunk: no more steps than it needs.
            self._sending = True
            try:
                if not self.gone:
                    await self._send({"type": "http.response.body", "body": body, "more_body": True})
                    self.stats.bytes += len(body)
            except Exception as error:  # noqa: BLE001  (told apart there)
                self._send_failed(error)
            finally:
                self._sending = False
            if self.gone:
                await anyio.lowlevel.checkpoint_if_cancelled()
        else:
            await self._write_carefully(body)
        if self._unnoted:
            self._unnoted -= 1
        elif self._note():
            await anyio.lowlevel.checkpoint()  # perhaps neither the source nor the server's `send` ever waits

    async def _write_carefully(self, body: bytes) -> None:
        while self._aside is not None:
            await self._aside.wait()
        self._sending = True
        try:
            if not self.started:
                await self.begin(flush=not body)
            self.torn = len(body) > MAX_SEND
            for start in range(0, len(body), MAX_SEND):
                await self._body(body[start : start + MAX_SEND])
            self.torn = False
            if not self.gone:
                self.stats.bytes += len(body)
        finally:
            self._sending = False

    def _note(self) -> bool:
        """Note the time of a send; if they come at full speed, not those of the next `BURST`. True after so many."""
        now = self._last_sent = anyio.current_time()
        self._noted += 1
        if self._noted < BURST:
            return False
        fast = now - self._burst_began < BURST_SECONDS
        self._burst_began = now
        self._noted, self._unnoted = (BURST - 1, BURST) if fast else (0, 0)
        return True

    async def begin(self, *, flush: bool = False) -> None:
        """Send the headers; `flush` if no body follows at once, since a server may keep them back until one does."""
        was, self._sending = self._sending, True  # no ping may overtake the headers
        try:
            await self._start(self.status, self.response.raw_headers)
            if not self.head and not self.gone:
                self.stats.start()
            if flush:
                await self._body(b"")
        finally:
            self._sending = was

    async def respond(self, status: int, headers: Headers = (), body: bytes = b"") -> None:
        """Send a whole response that is no stream."""
        kept = [header for header in self.response.raw_headers if header[0] != b"content-type"]
        was, self._sending = self._sending, True
        try:
            await self._start(status, [*kept, *headers])
            await self._finish(body)
        finally:
            self._sending = was

    async def _end(self, answer: ErrorResponse | None, words: bytes) -> None:
        while self._aside is not None:
            await self._aside.wait()
        if self.finished:
            return
        if self._last is not None:
            await self._finish(self._last)
        elif self.started or answer is None:
            if not self.started:
                await self.begin()
            # A client drops half a block at the end of a stream; any words after it would complete it.
            await self._finish(b"" if self.torn else words)
        else:
            if not self.gone:
                self.stats.refused(answer)
            headers, body = answer.render(self.dialect)
            await self.respond(answer.status, headers, body)

    async def _start(self, status: int, headers: Headers) -> None:
        self.started = True
        try:
            await self._deliver({"type": "http.response.start", "status": status, "headers": list(headers)})
        except BaseException:
            self.started = False  # a message whose send was cancelled has, as far as one can know, not been sent
            raise

    async def _finish(self, body: bytes) -> None:
        self.finished = True
        self._last = b"" if self.head else body
        try:
            await self._body(self._last, more=False)
        except BaseException:
            self.finished = False  # if it was sent after all, the server refuses it the second time
            raise

    async def _body(self, body: bytes, *, more: bool = True) -> None:
        await self._deliver({"type": "http.response.body", "body": body, "more_body": more})

    async def _deliver(self, message: Message) -> None:
        """Send a message, unless the client is gone. `Cancelled` is raised if the source is to go with it."""
        if not self.gone:
            try:
                if self.detach:
                    with anyio.CancelScope() as self._send_scope:  # a send may hang
                        await self._send(message)
                else:
                    await self._send(message)
            except Exception as error:  # noqa: BLE001  (told apart there)
                self._send_failed(error)
        if self.gone:
            await anyio.lowlevel.checkpoint_if_cancelled()

    def _send_failed(self, error: Exception) -> None:
        if not isinstance(error, _CLIENT_GONE):
            self.send_error = error
            raise error
        self._lose_client()

    # Errors

    def is_of_the_server(self, error: Exception) -> bool:
        """Whether it came from `send`, and the source has only let it through."""
        return single_error(error) is self.send_error
