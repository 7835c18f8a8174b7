"""One run in the process that owns it: its task, its scope, the facts recorded of it, its buffer.

    running ──stop(cause)──▶ scope cancelled ──▶ producer gone ──▶ concluded ──▶ settled
       └──────── the loop ends ──────────────────────┘    ▲
                                 cancel_grace is over ────┘   (the producer is stuck: the run ends without it)

`stop` records the first cause, and only then cancels the scope; the step in which the producer's loop ends refuses
later causes. A stuck producer keeps its task, but not its run: so how far the `Producer` is and the `Settlement` of the
run are independent states.
"""

from __future__ import annotations

import traceback
from contextlib import asynccontextmanager
from enum import Enum, auto
from math import inf
from typing import TYPE_CHECKING, Any, Final

import trio

from penstock.errors import RunCancelled, RunEnded, single_error, words_of_error_event
from penstock.exception_groups import holds_cancellation, is_cancellation, split_own
from penstock.observer import new_error_id, notify
from penstock.runs import CAUSES, Cause, RunStatus
from penstock.sse.chunks import blocks_of, held_across_a_yield, opened, status_of
from penstock.sse.dialects import dialect_named
from penstock.supervisor.outcome import RunFacts, decide
from penstock.supervisor.write_buffer import BufferState, WriteBuffer

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from penstock.log import Lease
    from penstock.observer import Observer
    from penstock.runs import Ending, Run
    from penstock.supervisor.committer import Committer
    from penstock.supervisor.settings import Settings
    from penstock.supervisor.tail import Tail
    from penstock.supervisor.timers import Timer, Timers

WRITES_PER_CHECKPOINT: Final = 32
"""`write` makes a checkpoint after so many chunks, for a producer that has none; one each time would cost too much."""
STUCK_REPORT_INTERVAL: Final = 10.0  # seconds between two reports of where a stuck producer stands


class Producer(Enum):
    """How far the producer of a run is."""

    ITERATING = auto()
    FINISHED = auto()  # its loop is over: no cause is recorded any more
    GONE = auto()  # its cleanup is over, too


class Settlement(Enum):
    """How a run was settled."""

    STORED = auto()  # its ending is stored
    GIVEN_UP = auto()  # it goes on, or ends, without this process
    SERVICES_DIED = auto()  # nothing is stored any more; its lease ends it, as lost


class Execution:
    """One run. `on_change` is called when its ending is decided, when it is settled, and when its producer is gone."""

    def __init__(
        self,
        run: Run,
        lease: Lease,
        tail: Tail,
        *,
        committer: Committer,
        timers: Timers,
        settings: Settings,
        observer: Observer,
        on_change: Callable[[Execution], None],
    ) -> None:
        self.run = run
        self.buffer = WriteBuffer(run, lease, tail, self)
        self.scope = trio.CancelScope()
        self.facts = RunFacts()
        self.producer = Producer.ITERATING
        self.settlement: Settlement | None = None
        self.settled = trio.Event()
        self.task: trio.lowlevel.Task | None = None  # the task in which the producer runs
        self._committer = committer
        self._timers = timers
        self._settings = settings
        self._dialect = dialect_named(settings.dialect)
        self._observer = observer
        self._on_change = on_change
        self._ending: Ending | None = None
        self._stopped_at = inf
        self._cancel_heard_at = inf
        self._writes = 0
        self._waiting_since: float | None = None
        self._pending_timers: dict[str, Timer] = {}

    def stop(self, cause: Cause, reason: str | None = None) -> bool:
        """Record the cause, then cancel the producer; False if there is a cause already, or the loop is over."""
        if self.facts.cause is not None or self.producer is Producer.GONE:
            return False
        recorded = self.producer is Producer.ITERATING
        if recorded:
            self.facts.cause, self.facts.reason = cause, reason
        if cause is Cause.CANCEL:
            self._cancel_heard_at = trio.current_time()
        scope_reason = CAUSES[cause].scope_reason or cause.value
        self.scope.cancel(reason=scope_reason if reason is None else f"{scope_reason}: {reason}")
        self._expect_to_leave()
        return recorded

    # What becomes of the run in the log (CommitListener)

    def on_cancel_recorded(self, reason: str | None) -> None:
        self.stop(Cause.CANCEL, reason)

    def on_completion_rejected(self, reason: str | None) -> None:
        # The cancel came between the producer's end and the log's acknowledgement of it: the cancel was first.
        self._cancel_heard_at = min(self._cancel_heard_at, trio.current_time())
        self._conclude(RunFacts(cause=Cause.CANCEL, reason=reason))

    def on_fenced(self) -> None:
        self.stop(Cause.FENCED)
        notify(self._observer.run_fenced, self.run.id)
        self._settle(Settlement.GIVEN_UP)

    def on_rejected(self) -> None:
        self.stop(Cause.UNAVAILABLE)
        self._settle(Settlement.GIVEN_UP)

    def on_diverged(self) -> None:
        if self.concluded:
            self._conclude(RunFacts(cause=Cause.DIVERGED))
        else:
            self.stop(Cause.DIVERGED)
            self.facts.cause = self.facts.cause or Cause.DIVERGED  # even if the loop is over

    def on_stored(self) -> None:
        if self._ending is not None:
            self.run = self.run.ended(self._ending, seq=self.buffer.seq, at=self.buffer.stored_at)
            notify(self._observer.run_ended, self.run)
            if self.run.status is RunStatus.CANCELLED and self._cancel_heard_at < inf:
                seconds = trio.current_time() - self._cancel_heard_at
                notify(self._observer.run_cancelled, self.run.id, seconds)
        self._settle(Settlement.STORED)

    # What ends the run from outside the log

    def give_up(self) -> None:
        """The log has been out of reach for too long: store nothing more; a reaper ends the run."""
        if self.settlement is None:
            self.on_rejected()
            self.drop()

    def drop(self) -> None:
        """Forget what is pending: a `flush` that waits for it ends."""
        self._committer.drop(self.buffer)

    def on_services_died(self) -> None:
        """The services are gone: store nothing more, and pretend nothing about the run's end."""
        self.stop(Cause.SHUTDOWN, "a service of the supervisor died")
        self.drop()
        self._settle(Settlement.SERVICES_DIED)

    def _settle(self, settlement: Settlement) -> None:
        self.settlement = self.settlement or settlement
        self.settled.set()
        self._on_change(self)

    # The producer

    async def execute(self, make_source: Callable[[], Any]) -> None:
        """Run the producer to its end, and wait until that is stored; raises only what came from outside the run."""
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
            # Their tracebacks hold this frame: a cycle, which would keep all that the producer had.
            del error, outer
            self.facts.error = self.task = None

    def limit(self, *, timeout: float | None, max_silence: float | None) -> None:
        now = self._waiting_since = trio.current_time()
        if timeout is not None:
            self._at(now + timeout, "timeout", self._check_timeout)
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
        if self.producer is not Producer.ITERATING:
            return
        self.producer = Producer.FINISHED
        own, outer = split_own(error)
        if not self.concluded:  # else the ending does not report this error: `leave` does
            self.facts.error = own
        self.facts.interrupted = outer is not None
        self._expect_to_leave()

    async def write(self, chunk: Any) -> bool:
        """Put a chunk into the buffer, after waiting for room; False if it ends the run. Dropped after a cause.

        Raises:
            InvalidChunk: nothing of the chunk is stored.
            RunEnded: another task has written what ends the run, while this one waited for room.
        """
        committer, buffer, facts = self._committer, self.buffer, self.facts
        self._waiting_since = None
        self._writes += 1
        if committer.is_full(buffer) or facts.cause is not None or self._writes % WRITES_PER_CHECKPOINT == 0:
            await committer.room(buffer)
        self._waiting_since = trio.current_time()
        if self.producer is not Producer.ITERATING:
            raise RunEnded(self.run.id)
        if facts.cause is not None or buffer.state is not BufferState.OPEN:
            return buffer.state is BufferState.OPEN
        chunk, refusal = status_of(chunk)
        if refusal is not None:
            facts.yielded_error, facts.not_stored = refusal, True
            return False
        stored: list[bytes] = []
        goes_on = True
        dialect, settings = self._dialect, self._settings
        largest = max(settings.max_event_bytes, settings.max_pending_bytes)
        for block in blocks_of(chunk, dialect, max_event_bytes=settings.max_event_bytes, max_chunk_bytes=largest):
            data, message, done, error, stop_reason = block
            facts.stop_reason = stop_reason or facts.stop_reason
            if not done:
                seq = buffer.seq + len(stored) + 1
                stored.append(dialect.stamp(data, self.run.id, seq) if message else data)
            if error is not None:
                facts.yielded_error = words_of_error_event(error)
            if done or error is not None:
                goes_on = False
                break
        if stored:
            committer.put(buffer, stored)
        return goes_on

    async def leave(self, error: BaseException | None) -> BaseException | None:
        """The producer is gone: conclude, wait until that is stored; return what of `error` is not the run's own."""
        self.finish(error)
        self.producer = Producer.GONE
        for timer in self._pending_timers.values():
            timer.cancel()
        facts = self.facts
        own, outer = split_own(error)
        if outer is not None and is_cancellation(outer, trio.Cancelled) and trio.current_effective_deadline() > -inf:
            # Nothing around this task was cancelled: the producer's own scope has cancelled its consumer.
            own, outer, facts.interrupted = own or held_across_a_yield(), None, False
        if self._ending is None:
            facts.error = own or facts.error
            self._conclude(facts)
        elif own is not None and own is not facts.error:
            where = f"run {self.run.id}, after its end"
            notify(self._observer.on_error, own, error_id=new_error_id(), where=where)
        facts.error = None  # its traceback holds the producer
        with trio.move_on_after(self._settings.finalize_timeout, shield=True):
            await self.settled.wait()
        self._on_change(self)
        return outer

    # The end of the run

    @property
    def concluded(self) -> bool:
        return self._ending is not None

    @property
    def stuck(self) -> bool:
        """True while the producer holds on to its task although the run has ended."""
        return (self.settled.is_set() or self.concluded) and self.producer is not Producer.GONE

    def _conclude(self, facts: RunFacts) -> None:
        error_id = new_error_id()
        blocks, self._ending = decide(
            facts, self._dialect, error_id=error_id, expose_errors=self._settings.expose_errors
        )
        if facts.error is not None and not isinstance(single_error(facts.error), RunCancelled):
            notify(self._observer.on_error, facts.error, error_id=error_id, where=f"run {self.run.id}")
        if not self.settled.is_set():
            self._committer.close(self.buffer, blocks, self._ending)
            self._on_change(self)

    def _expect_to_leave(self) -> None:
        """Give the producer `cancel_grace` to be gone; what comes later does not prolong that."""
        if self._stopped_at == inf:
            self._stopped_at = trio.current_time()
            self._at(self._stopped_at + self._settings.cancel_grace, "grace", self._overdue)

    def _overdue(self) -> None:
        """End the run without its producer, which is stuck, and report where that stands."""
        if self._ending is None:
            self._conclude(self.facts)
        self.scope.cancel(reason="the run has ended")
        now = trio.current_time()
        notify(self._observer.run_stuck, self.run.id, now - self._stopped_at, self.stack())
        self._at(now + STUCK_REPORT_INTERVAL, "grace", self._overdue)

    def stack(self) -> str:
        if self.task is None:
            return ""
        frames = traceback.StackSummary.extract(self.task.iter_await_frames())
        return "".join(frames.format())

    def _check_timeout(self) -> None:
        if self.producer is Producer.ITERATING:
            self.stop(Cause.TIMEOUT)

    def _check_silence(self, max_silence: float) -> None:
        if self.producer is not Producer.ITERATING or self.facts.cause is not None:
            return
        now = trio.current_time()
        due = (now if self._waiting_since is None else self._waiting_since) + max_silence
        if due <= now:
            self.stop(Cause.SILENT)
        else:
            self._at(due, "silence", lambda: self._check_silence(max_silence))

    def _at(self, when: float, what: str, callback: Callable[[], None]) -> None:
        self._pending_timers[what] = self._timers.at(when, callback)


class RunWriter:
    """Writes a run by hand. Made by `Supervisor.open_run`."""

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
        """Write a chunk: an `Event`, or `str` or `bytes` holding whole SSE blocks. A checkpoint.

        It waits only while too much is uncommitted.

        Returns:
            The seq of the chunk's last entry; of the entry before it if the chunk was dropped, because the run has been
            cancelled and the body is still writing.

        Raises:
            InvalidChunk: it is not a chunk; nothing of it is stored.
            RunEnded: an earlier chunk has ended the run (`[DONE]`, an error event), or the block has been left.
        """
        await trio.lowlevel.checkpoint()
        if self._execution.producer is not Producer.ITERATING:
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
                cut_short = holds_cancellation(error)
                execution.finish(error)
                raise
            execution.finish()
    except BaseException as error:
        raised = error
        raise
    finally:
        await execution.leave(raised)  # noqa: ASYNC102  (it has its own shield, with a deadline)
        raised = None  # its traceback holds this frame
    if cut_short and execution.facts.cause is Cause.CANCEL:
        raise RunCancelled(execution.run.id, execution.facts.reason)
    if cut_short:
        raise RunEnded(execution.run.id, execution.run)
