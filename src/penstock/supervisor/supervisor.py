"""The supervisor: owns the nursery in which runs live, longer than any request.

Two nurseries, one inside the other: the outer one holds the services (`services.py`), the inner one holds a task for
each run.

Order of leaving, whatever the way out (return, exception, cancelled from outside): the runs end first, and their
terminal entries are committed by services that are still there; the services end when the inner nursery is empty and
every run is settled, or `finalize_timeout` after the last run has left. With one nursery a run's last words would wait
for a committer that is cancelled already.

If a service dies the runs are cancelled, nothing is pretended about their ends, readers are released, and
`open_supervisor` raises `SupervisorFailed`. No run's error ever escapes.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

from penstock.errors import (
    Draining,
    DurationTooLong,
    RunExists,
    RunNotFound,
    SupervisorFailed,
    TooManyRuns,
)
from penstock.exception_groups import raise_single
from penstock.log import CancelStatus, Idempotency
from penstock.observer import checked, notify
from penstock.observer.logging import LoggingObserver
from penstock.runs import Cause, new_run
from penstock.supervisor.execution import RunWriter, writing
from penstock.supervisor.follower import Follower
from penstock.supervisor.services import Services, StuckRun
from penstock.supervisor.settings import Settings, check_duration

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping, Sequence

    from penstock.log import CancelReply, EventLog, Started
    from penstock.observer import Observer
    from penstock.runs import Run, RunStatus
    from penstock.supervisor.execution import Execution


class Supervisor:
    """Starts, follows, cancels and ends runs. Made by `open_supervisor`."""

    def __init__(self, log: EventLog, settings: Settings, observer: Observer) -> None:
        self.log = log
        self.settings = settings
        self.observer = observer
        self.draining = False
        """True once no runs are started any more."""
        self._services = Services(log, settings, observer)
        self._runs: trio.Nursery | None = None

    async def start(
        self,
        producer: Any,
        *args: Any,
        run_id: str | None = None,
        name: str | None = None,
        timeout: float | None = None,
        max_silence: float | None = None,
        idempotency_key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Run:
        """Start a run, which lives in the supervisor and not in the caller. A checkpoint.

        Args:
            producer: an async generator function, called with `args` in the run's own task; or any source that needs no
                call.
            args: what the producer is called with.
            run_id: the id, if the caller has one; see `check_run_id`.
            name: the record's `producer`; by default the producer's own name.
            timeout: the longest the run may take, in seconds; at most `max_duration`, which is the default.
            max_silence: the longest it may yield nothing, in seconds.
            idempotency_key: start at most one run under this key; a repeated start returns the run that is there.
            metadata: a JSON object of the caller's own.

        Returns:
            The record. Any reader finds the run from now on.

        Raises:
            RunExists: the id is in use.
            IdempotencyConflict: the key was used with another producer or other arguments.
            Draining: the supervisor is shutting down.
            SupervisorFailed: a service of the supervisor died.
            LogUnavailable: the log cannot be reached.
            TooManyRuns: this process has as many runs as it may.
            ValueError: an argument is not what it must be, or over a limit (`MetadataTooLarge`, `DurationTooLong`).
        """
        started = await self.start_once(
            producer,
            *args,
            run_id=run_id,
            name=name,
            timeout=timeout,
            max_silence=max_silence,
            idempotency_key=idempotency_key,
            metadata=metadata,
        )
        return started.run

    async def start_once(
        self,
        producer: Any,
        *args: Any,
        run_id: str | None = None,
        name: str | None = None,
        timeout: float | None = None,
        max_silence: float | None = None,
        idempotency_key: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> Started:
        """`start`, and whether the run was created by this call or found under its idempotency key."""
        # What `asynccontextmanager` makes can be called, too, as a decorator: a source is not to be.
        call = callable(producer) and not isinstance(producer, AbstractAsyncContextManager | AsyncIterable | Awaitable)
        if args and not call:
            raise ValueError("arguments are for a producer that can be called, and this one cannot")
        name = name or str(getattr(producer, "__qualname__", type(producer).__name__))
        request = (name, args, metadata, run_id, timeout, max_silence)
        idempotency = None if idempotency_key is None else Idempotency.of(idempotency_key, request)
        started, execution = await self._begin(name, run_id, metadata, idempotency, timeout, max_silence)
        if execution is not None:
            make_source = partial(producer, *args) if call else lambda: producer
            assert self._runs is not None  # noqa: S101  (or _begin would have refused)
            self._runs.start_soon(execution.execute, make_source, name=f"run {started.run.id}")
        return started

    @asynccontextmanager
    async def open_run(
        self,
        run_id: str | None = None,
        *,
        name: str = "open_run",
        timeout: float | None = None,
        max_silence: float | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[RunWriter]:
        """A run that is written by hand: the body of the block is its producer.

        Leaving the block ends the run, and waits until that is stored; an exception fails it, and goes on. The body is
        cancelled when the run is: it is a cancel scope, so it is entered and left in one task.

        Args:
            run_id: the id, if the caller has one.
            name: the record's `producer`.
            timeout: the longest the run may take, in seconds; at most `max_duration`, which is the default.
            max_silence: the longest nothing may be written, in seconds.
            metadata: a JSON object of the caller's own.

        Yields:
            What the run is written with.

        Raises:
            RunCancelled: the run was cancelled, and that cut the body short.
            RunEnded: something else ended it, such as its timeout, and that cut the body short.
            RunExists, Draining, SupervisorFailed, LogUnavailable, TooManyRuns, ValueError: see `start`.
        """
        _, execution = await self._begin(name, run_id, metadata, None, timeout, max_silence)
        assert execution is not None  # noqa: S101  (there was no idempotency key)
        async with writing(execution, self._services.committer) as writer:
            yield writer

    def follow(self, run_id: str, after: int = 0, *, last: int | None = None) -> Follower:
        """A reader of a run, wherever that lives. Not entered yet, and no checkpoint.

        Args:
            run_id: the run.
            after: the cursor: the seq of the last entry that the reader has seen; 0 = from the beginning.
            last: begin with the last so many entries, if that is later than the cursor.

        Returns:
            A `Follower`, which is entered with `async with` and then iterated.

        Raises:
            ValueError: the cursor is not a whole number from 0.
        """
        services = self._services
        return Follower(
            services.fetcher, run_id, readers=services.readers, after=after, last=last, clock=services.timers
        )

    async def cancel(self, run_id: str, reason: str | None = None) -> CancelReply:
        """Ask a run to stop, in whatever process it lives. Does not wait for its end. A checkpoint.

        Args:
            run_id: the run.
            reason: words for the record, the producer and the readers.

        Returns:
            What the request met (`CancelStatus`), and the record. A run whose cancel was `REQUESTED` never ends
            completed.

        Raises:
            RunNotFound: there is no such run.
            LogUnavailable: the log cannot be reached.
            ValueError: the reason holds half of a surrogate pair, and cannot be written.
        """
        if reason is not None:
            if not isinstance(reason, str):
                raise ValueError(f"a reason is a str, not {type(reason).__name__}")
            reason.encode()
        reply = await self.log.request_cancel(run_id, reason)
        if reply.status is CancelStatus.REQUESTED and run_id in self._services.live:
            self._services.live[run_id].stop(Cause.CANCEL, reason)
        return reply

    async def wait(self, run_id: str) -> Run:
        """Wait until a run has ended; its terminal record. A checkpoint; cancelling it does nothing to the run.

        Raises:
            RunNotFound: there is no such run.
            ReaderReleased, SupervisorFailed, LogUnavailable: as for a `Follower`.
        """
        async with self._services.fetcher.reading(run_id) as tail:
            run = await self.log.get(run_id)
            self._services.fetcher.note_last_seq(tail, run)
            while not run.status.terminal:
                if tail.ended:
                    run = (await self._services.fetcher.read(tail, tail.last)).run
                    if not run.status.terminal:  # the log has dropped the run that ended, and the id is another's
                        raise RunNotFound(run_id)
                elif tail.released is not None:
                    raise tail.released
                else:
                    await tail.wait()
            return run

    async def get(self, run_id: str) -> Run:
        """A run's record. A checkpoint.

        Raises:
            RunNotFound: there is no such run.
            LogUnavailable: the log cannot be reached.
        """
        return await self.log.get(run_id)

    async def list(self, *, limit: int = 50, status: RunStatus | None = None) -> Sequence[Run]:
        """The newest records, newest first. A checkpoint.

        Raises:
            LogUnavailable: the log cannot be reached.
        """
        return await self.log.list(limit=limit, status=status)

    async def drain(self, timeout: float | None = None) -> None:  # noqa: ASYNC109  (it interrupts runs, not this call)
        """Start no more runs, and let those of this process end: by themselves at first, then interrupted.

        Returns when every run is settled, and at the latest `cancel_grace` + `finalize_timeout` after the interruption;
        a second time it returns at once. Readers of runs that live elsewhere are released at once; readers of runs of
        this process stay to the end, or until it is clear that the log does not take it. A checkpoint; cancelled, it
        leaves the supervisor draining.

        Args:
            timeout: how long runs may go on, in seconds; by default `drain_timeout`.
        """
        check_duration("timeout", timeout, zero=True)
        self.draining = True
        await self._services.drain(self.settings.drain_timeout if timeout is None else timeout)

    def interrupt(self) -> None:
        """Cancel every run of this process now, as a shutdown does. Synchronous."""
        self.draining = True
        self._services.interrupt()

    @property
    def live_runs(self) -> int:
        """The runs of this process that have not settled yet, with those whose start is under way."""
        return self._services.unsettled

    @property
    def stuck(self) -> Sequence[StuckRun]:
        """The runs that have ended, as far as this process is concerned, although their producers have not let go."""
        return self._services.stuck()

    async def let_go(self) -> None:
        """Wait until no producer whose run has ended holds on to its task. A checkpoint, if it has to wait."""
        await self._services.let_go()

    @property
    def unstored(self) -> int:
        """The runs whose last entries could not be stored since `drain` began: their leases end them, as lost."""
        return self._services.unstored

    async def check(self) -> None:
        """Return if runs can be started. A checkpoint.

        Raises:
            Draining, SupervisorFailed, LogUnavailable: they cannot.
        """
        self._refuse()
        await self.log.check()

    def tell_figures(self) -> None:
        """Tell the observer how much there is of everything, now. Synchronous."""
        self._services.tell_figures()

    def _refuse(self) -> None:
        if self._services.failure is not None:
            raise SupervisorFailed("a service of the supervisor died; see the server's log")
        if self.draining or self._runs is None:
            raise Draining("this server is shutting down and starts no more runs")

    async def _begin(
        self,
        name: str,
        run_id: str | None,
        metadata: Mapping[str, Any] | None,
        idempotency: Idempotency | None,
        timeout: float | None,  # noqa: ASYNC109  (the run's, not this call's)
        max_silence: float | None,
    ) -> tuple[Started, Execution | None]:
        """Create the record and the execution; no checkpoint comes between them.

        If all runs have been interrupted by then, or a service has died, the run ends before it has begun.
        """
        self._refuse()
        settings, services = self.settings, self._services
        check_duration("timeout", timeout)
        check_duration("max_silence", max_silence)
        if settings.max_duration and (timeout or 0) > settings.max_duration:
            raise DurationTooLong(f"a run takes at most {settings.max_duration:g} s (max_duration), not {timeout:g} s")
        run_id = services.new_id() if run_id is None else run_id
        run = new_run(run_id, name, metadata, max_metadata_bytes=settings.max_metadata_bytes)
        if services.present >= settings.max_runs:
            raise TooManyRuns(f"this process has {settings.max_runs} runs, as many as max_runs allows")
        # The log may have dropped the run whose producer is still here. Under an idempotency key the run is an answer.
        if idempotency is None and run.id in services.live:
            raise RunExists(services.live[run.id].run)
        lease = services.lease()
        with services.starting() as admit:
            started = await self.log.start(run, lease, idempotency)
            if not started.created:
                return started, None
            execution = admit(started.run, lease)
        execution.limit(timeout=timeout or settings.max_duration or None, max_silence=max_silence)
        notify(self.observer.run_started, started.run)
        if services.interrupted or services.failure is not None:
            await execution.leave(None)
            self._refuse()
        return started, execution


@asynccontextmanager
async def open_supervisor(
    log: EventLog, *, observer: Observer | None = None, **knobs: Any
) -> AsyncIterator[Supervisor]:
    """A supervisor, for as long as the block lasts.

    Leaving the block by its end drains: runs may go on for `drain_timeout`, then they are interrupted. Leaving it by an
    exception or a cancellation interrupts them at once. Either way each run gets its terminal entry before this
    returns. A producer that never lets go keeps it from returning; every 10 s the observer is told where that stands.

    Args:
        log: the event log, from `open_log`.
        observer: told of what happens; by default it goes to the logger `penstock`.
        knobs: see `Settings`, which lists them with their units and defaults.

    Yields:
        The supervisor.

    Raises:
        ConfigurationError: a knob is unknown, or has a value that it cannot have.
        SupervisorFailed: a service died; the exception it died of is the cause.
        LogUnavailable: the log cannot be reached to begin with.
    """
    observer = checked(LoggingObserver() if observer is None else observer)
    supervisor = Supervisor(log, Settings.of(knobs), observer)
    try:
        async with trio.open_nursery() as outer:
            await outer.start(supervisor._services.run, outer.cancel_scope)  # noqa: SLF001
            try:
                async with trio.open_nursery() as supervisor._runs:  # noqa: SLF001
                    try:
                        yield supervisor
                        await supervisor.drain()
                    except BaseException:
                        supervisor.interrupt()
                        raise
            except BaseExceptionGroup as group:
                raise_single(group, trio.Cancelled)
            finally:
                await supervisor._services.end()  # noqa: SLF001, ASYNC102  (it has its own shield, with a deadline)
    except BaseExceptionGroup as group:
        raise_single(group, trio.Cancelled)
    if (failure := supervisor._services.failure) is not None:  # noqa: SLF001
        raise SupervisorFailed("a service of the supervisor died") from failure
