"""One run in the process that owns it: its scope, its recorded facts, its buffer.

An execution decides nothing while things happen; it records. `stop` stores the first cause, and only then cancels the
scope. The step in which the producer's loop ends sets `ended`, which refuses later causes. When the producer has left,
the facts become the run's ending (`endings.py`), which goes into the buffer; when the log has acknowledged that, the
run is *settled*.

    running ──stop(cause)──▶ scope cancelled ──▶ producer leaves ──▶ concluded ──▶ settled
       └──────── the loop ends ────────────────────────┘    ▲
                                   cancel_grace is over ────┘   (the producer is stuck: the run ends without it)

When a producer's loop is over, what is left is its cleanup, for which it has `cancel_grace` as well. One that will not
let go keeps its task, but not its run: the ending is stored all the same, readers are released, and what the producer
still yields is dropped.

A run that is written by hand: the body of a block is its producer.
"""

from __future__ import annotations

import traceback
from contextlib import asynccontextmanager
from dataclasses import dataclass
from math import inf
from typing import TYPE_CHECKING, Any, Final

import trio

from penstock.errors import RunCancelled, RunEnded, single_error, words_of_error_event
from penstock.exception_groups import is_cancellation
from penstock.observer import new_error_id, notify
from penstock.runs import CAUSES, Cause, RunStatus
from penstock.sse.chunks import blocks_of, held_across_a_yield, opened, status_of
from penstock.supervisor.outcome import RunFacts, decide
from penstock.supervisor.write_buffer import BufferState, WriteBuffer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from penstock.log import Lease
    from penstock.observer import Observer
    from penstock.runs import Ending, Run
    from penstock.sse.dialects import Dialect
    from penstock.supervisor.committer import Committer
    from penstock.supervisor.settings import Settings
    from penstock.supervisor.tail import Tail
    from penstock.supervisor.timers import Timer, Timers

WRITES_PER_CHECKPOINT: Final = 32
"""A producer that never waits itself is made to after so many chunks: one each time would cost more than the chunk."""
STUCK_REPORT_INTERVAL: Final = 10.0
"""Seconds between two reports of where a stuck producer stands."""


@dataclass(frozen=True, slots=True)
class Office:
    """What all executions of a supervisor share."""

    committer: Committer
    timers: Timers
    settings: Settings
    dialect: Dialect
    observer: Observer
    changed: Callable[[Execution], None]
    """Called when it is decided how an execution ends, and when it has settled, been given up, or left."""


class Execution:
    """One run, while this process owns it."""

    def __init__(self, run: Run, lease: Lease, tail: Tail, office: Office) -> None:
        self.run = run
        self.buffer = WriteBuffer(run, lease, tail, self)
        self.scope = trio.CancelScope()
        self.cause: Cause | None = None
        """The first cause that was recorded."""
        self.words: str | None = None
        """The words that came with it."""
        self.ended = False
        """The producer's loop is over: no cause is recorded any more."""
        self.left = False
        """The producer is gone, with all of its cleanup."""
        self.settled = trio.Event()
        """The ending is stored, or never will be from here."""
        self.given_up = False
        """The run goes on, or ends, without this process."""
        self.task: trio.lowlevel.Task | None = None
        """The task in which the producer runs."""
        self._office = office
        self._raised: BaseException | None = None
        self._told: BaseException | None = None
        """What the producer raised, as far as its run's ending says so."""
        self._interrupted = False
        """Something from outside ended the producer's loop, without a cause on record."""
        self._said: str | None = None
        self._reported: tuple[str, str] | None = None
        self._untold = False
        self._ending: Ending | None = None
        self._stopped_at = inf
        self._cancel_heard_at = inf
        self._writes = 0
        self._waiting_since: float | None = None
        self._timers: dict[str, Timer] = {}

    # What others tell it

    def stop(self, cause: Cause, words: str | None = None) -> bool:
        """Record the cause, then cancel the producer; False if there is a cause already, or the producer has ended."""
        if self.cause is not None or self.left:
            return False
        recorded = not self.ended
        if recorded:
            self.cause, self.words = cause, words
        if cause is Cause.CANCEL:
            self._cancel_heard_at = trio.current_time()
        reason = CAUSES[cause].scope_reason or cause.value
        self.scope.cancel(reason=reason if words is None else f"{reason}: {words}")
        self._expect_to_leave()
        return recorded

    def on_cancel_recorded(self, reason: str | None) -> None:
        """The log has a cancel request."""
        self.stop(Cause.CANCEL, reason)

    def on_completion_rejected(self, reason: str | None) -> None:
        """A cancel came between the producer's end and the log's acknowledgement of it: the cancel was first."""
        self._cancel_heard_at = min(self._cancel_heard_at, trio.current_time())
        self._conclude(RunFacts(cause=Cause.CANCEL, reason=reason))

    def on_fenced(self) -> None:
        """Another owner has the run."""
        self.given_up = True
        self.stop(Cause.FENCED)
        notify(self._office.observer.run_fenced, self.run.id)
        self._settle()

    def on_rejected(self) -> None:
        """The log cannot hold the run: a reaper ends it."""
        self.given_up = True
        self.stop(Cause.UNAVAILABLE)
        self._settle()

    def give_up(self) -> None:
        """The log has been away for too long: nothing is stored from here any more, and a reaper ends the run."""
        if not self.settled.is_set():
            self.on_rejected()
            self._office.committer.drop(self.buffer)

    def on_diverged(self) -> None:
        """The log has lost entries that nobody has any more: the run ends, and says so, even if it is over."""
        if self.concluded:
            self._conclude(RunFacts(cause=Cause.DIVERGED))
        else:
            self.stop(Cause.DIVERGED)
            self.cause = self.cause or Cause.DIVERGED

    def on_stored(self) -> None:
        """The ending is stored."""
        if self._ending is not None:
            self.run = self.run.ended(self._ending, seq=self.buffer.seq, at=self.buffer.stored_at)
            notify(self._office.observer.run_ended, self.run)
            if self.run.status is RunStatus.CANCELLED and self._cancel_heard_at < inf:
                seconds = trio.current_time() - self._cancel_heard_at
                notify(self._office.observer.run_cancelled, self.run.id, seconds)
        self._settle()

    def on_services_died(self) -> None:
        """The services are gone: nothing is stored any more, and nothing is pretended."""
        self.stop(Cause.SHUTDOWN, "a service of the supervisor died")
        self._office.committer.drop(self.buffer)
        self._settle()

    def _settle(self) -> None:
        self.settled.set()
        self._office.changed(self)

    # The producer

    async def execute(self, make_source: Callable[[], Any]) -> None:
        """Run the producer to its end, in this task, and see its ending stored.

        Only what came from outside is raised: a cancellation that nobody recorded, or an exception such as
        KeyboardInterrupt.
        """
        self.task = trio.lowlevel.current_task()
        error: BaseException | None = None
        try:
            with self.scope:
                await self._iterate(make_source)
        except BaseException as raised:  # noqa: BLE001, ASYNC103  (becomes a record; what is not the run's own is raised)
            error = raised
        outer: BaseException | None = None
        try:
            outer = await self.leave(error)
            if outer is not None:
                raise outer
        finally:
            del error, outer  # with their tracebacks, which hold this frame: a circle, and all that the producer had
            self._raised = self.task = None

    def limit(self, *, timeout: float | None, max_silence: float | None) -> None:
        """Set the run's deadline and its limit of silence, in seconds from now."""
        now = self._waiting_since = trio.current_time()
        if timeout is not None:
            self._at(now + timeout, "timeout", lambda: self._stop_unless_ended(Cause.TIMEOUT))
        if max_silence is not None:
            self._at(now + max_silence, "silence", lambda: self._check_silence(max_silence))

    async def _iterate(self, make_source: Callable[[], Any]) -> None:
        async with opened(make_source()) as chunks:
            try:
                async for chunk in chunks:
                    if not await self.write(chunk):
                        break
            except BaseException as error:
                self.finish(error)
                raise
            self.finish()

    def finish(self, error: BaseException | None = None) -> None:
        """The producer's loop is over, with `error` if it raised: from now on no cause is recorded."""
        if self.ended:
            return
        self.ended = True
        self._raised, outer = _apart(error)
        self._interrupted = outer is not None
        self._expect_to_leave()

    async def write(self, chunk: Any) -> bool:
        """Put a chunk into the buffer, after waiting for room; False if it ends the run. Dropped after a cause.

        Raises:
            InvalidChunk: nothing of the chunk is stored.
            RunEnded: another task has written what ends the run, while this one waited for room.
        """
        office, buffer = self._office, self.buffer
        self._waiting_since = None
        self._writes += 1
        if office.committer.is_full(buffer) or self.cause is not None or self._writes % WRITES_PER_CHECKPOINT == 0:
            await office.committer.room(buffer)
        self._waiting_since = trio.current_time()
        if self.ended:
            raise RunEnded(self.run.id)
        if self.cause is not None or buffer.state is not BufferState.OPEN:
            return buffer.state is BufferState.OPEN
        chunk, refusal = status_of(chunk)
        if refusal is not None:
            self._reported, self._untold = refusal, True
            return False
        stored: list[bytes] = []
        goes_on = True
        dialect, settings = office.dialect, office.settings
        largest = max(settings.max_event_bytes, settings.max_pending_bytes)
        for block in blocks_of(chunk, dialect, max_event_bytes=settings.max_event_bytes, max_chunk_bytes=largest):
            data, message, done, error, stop_reason = block
            self._said = stop_reason or self._said
            if not done:
                seq = buffer.seq + len(stored) + 1
                stored.append(dialect.stamp(data, self.run.id, seq) if message else data)
            if error is not None:
                self._reported = words_of_error_event(error)
            if done or error is not None:
                goes_on = False
                break
        if stored:
            office.committer.put(buffer, stored)
        return goes_on

    async def leave(self, error: BaseException | None) -> BaseException | None:
        """The producer is gone, with `error` if it raised: conclude, and wait until that is stored.

        Returns:
            The part of `error` that is not the run's own, and that the caller raises again.
        """
        self.finish(error)
        self.left = True
        for timer in self._timers.values():
            timer.cancel()
        own, outer = _apart(error)
        if outer is not None and is_cancellation(outer, trio.Cancelled) and trio.current_effective_deadline() > -inf:
            # Nobody around this task was cancelled: the producer's own scope has cancelled its consumer.
            own, outer, self._interrupted = own or held_across_a_yield(), None, False
        if self._ending is None:
            self._conclude(self._facts(own or self._raised))
        elif own is not None and own is not self._told:
            notify(
                self._office.observer.on_error, own, error_id=new_error_id(), where=f"run {self.run.id}, after its end"
            )
        self._told = None
        with trio.move_on_after(self._office.settings.finalize_timeout, shield=True):
            await self.settled.wait()
        self._office.changed(self)
        return outer

    # Its end

    @property
    def concluded(self) -> bool:
        """How the run ends is decided."""
        return self._ending is not None

    def _facts(self, error: BaseException | None = None) -> RunFacts:
        cause = Cause.SHUTDOWN if self.cause is None and self._interrupted else self.cause
        return RunFacts(error, cause, self.words, self._said, self._reported, self._untold)

    def _conclude(self, facts: RunFacts) -> None:
        error_id = new_error_id()
        settings = self._office.settings
        self._told = facts.error
        blocks, self._ending = decide(
            facts, self._office.dialect, error_id=error_id, expose_errors=settings.expose_errors
        )
        if facts.error is not None and not isinstance(single_error(facts.error), RunCancelled):
            notify(self._office.observer.on_error, facts.error, error_id=error_id, where=f"run {self.run.id}")
        if not self.settled.is_set():
            self._office.committer.close(self.buffer, blocks, self._ending)
            self._office.changed(self)

    def _expect_to_leave(self) -> None:
        """From now on the producer has `cancel_grace` to be gone; what comes later does not prolong that."""
        if self._stopped_at == inf:
            self._stopped_at = trio.current_time()
            self._at(self._stopped_at + self._office.settings.cancel_grace, "grace", self._overdue)

    def _overdue(self) -> None:
        """The producer did not let go: end the run without it, and say where it stands."""
        if self._ending is None:
            self._conclude(self._facts(self._raised))
        self.scope.cancel(reason="the run has ended")
        now = trio.current_time()
        notify(self._office.observer.run_stuck, self.run.id, now - self._stopped_at, self.stack())
        self._at(now + STUCK_REPORT_INTERVAL, "grace", self._overdue)

    def stack(self) -> str:
        """Where the producer's task stands, as a traceback."""
        if self.task is None:
            return ""
        frames = traceback.StackSummary.extract(self.task.iter_await_frames())
        return "".join(frames.format())

    def _stop_unless_ended(self, cause: Cause) -> None:
        if not self.ended:
            self.stop(cause)

    def _check_silence(self, max_silence: float) -> None:
        if self.ended or self.cause is not None:
            return
        now = trio.current_time()
        due = (now if self._waiting_since is None else self._waiting_since) + max_silence
        if due <= now:
            self.stop(Cause.SILENT)
        else:
            self._at(due, "silence", lambda: self._check_silence(max_silence))

    def _at(self, when: float, what: str, callback: Callable[[], None]) -> None:
        self._timers[what] = self._office.timers.at(when, callback)


def _apart(error: BaseException | None) -> tuple[BaseException | None, BaseException | None]:
    """What a producer raised of its own, and what came from outside through it."""
    if isinstance(error, BaseExceptionGroup):
        outer, own = error.split((trio.Cancelled, KeyboardInterrupt))
        return own, outer
    if isinstance(error, trio.Cancelled | KeyboardInterrupt):
        return None, error
    return error, None


class RunWriter:
    """What a run is written with by hand. Made by `Supervisor.open_run`."""

    def __init__(self, execution: Execution, committer: Committer) -> None:
        self._execution = execution
        self._committer = committer

    @property
    def run(self) -> Run:
        """The run's record, as it was when it started."""
        return self._execution.run

    @property
    def id(self) -> str:
        """The run's id."""
        return self._execution.run.id

    async def write(self, chunk: Any) -> int:
        """Write a chunk; waits only while too much is uncommitted. A checkpoint.

        Args:
            chunk: an `Event`, or `str` or `bytes` holding whole SSE blocks.

        Returns:
            The seq of the chunk's last entry; of the entry before it if the chunk was dropped, because the run has been
            cancelled and the body is still writing.

        Raises:
            InvalidChunk: it is not a chunk; nothing of it is stored.
            RunEnded: an earlier chunk has ended the run (`[DONE]`, an error event), or the block has been left.
        """
        await trio.lowlevel.checkpoint()
        if self._execution.ended:
            raise RunEnded(self.id)
        if not await self._execution.write(chunk):
            self._execution.finish()
        return self._execution.buffer.seq

    async def flush(self) -> None:
        """Wait until the log has acknowledged all that was written. A checkpoint."""
        await self._committer.flush(self._execution.buffer)


@asynccontextmanager
async def writing(execution: Execution, committer: Committer) -> AsyncIterator[RunWriter]:
    """Let the block be the producer of `execution`; see `Supervisor.open_run`."""
    execution.task = trio.lowlevel.current_task()
    raised: BaseException | None = None
    cut_short = False
    try:
        with execution.scope:
            try:
                yield RunWriter(execution, committer)
            except BaseException as error:
                cut_short = _holds_cancelled(error)
                execution.finish(error)
                raise
            execution.finish()
    except BaseException as error:
        raised = error
        raise
    finally:
        await execution.leave(raised)  # noqa: ASYNC102  (it has its own shield, with a deadline)
        raised = None  # its traceback holds this frame
    if cut_short and execution.cause is Cause.CANCEL:
        raise RunCancelled(execution.run.id, execution.words)
    if cut_short:
        raise RunEnded(execution.run.id, execution.run)


def _holds_cancelled(error: BaseException) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(trio.Cancelled) is not None
    return isinstance(error, trio.Cancelled)
