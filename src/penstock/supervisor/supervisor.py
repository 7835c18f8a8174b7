"""The supervisor: owns the nursery in which runs live, longer than any request.

The outer one of its two nurseries holds the services, the inner one a task for each run. Whatever the way out (return,
exception, cancelled from outside), the runs end first, while the services are still there to store their last entries;
the services end once every run is settled, or `finalize_timeout` after the last run has left. If a service dies the
runs are cancelled, readers are released, and `open_supervisor` raises `SupervisorFailed`. No run's error ever escapes.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import AsyncIterable, Awaitable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import trio

from penstock.errors import (
    Draining,
    DurationTooLong,
    MetadataTooLarge,
    ReaderReleased,
    RunExists,
    RunNotFound,
    SupervisorFailed,
    TooManyRuns,
    single_error,
)
from penstock.exception_groups import open_nursery
from penstock.log import CancelStatus, Idempotency, Lease
from penstock.observer import FIGURES_INTERVAL, Figures, checked, new_error_id, notify
from penstock.observer.logging import LoggingObserver
from penstock.runs import Run, check_run_id, new_run_id
from penstock.supervisor.committer import Committer
from penstock.supervisor.execution import RunWriter, writing
from penstock.supervisor.fetcher import Fetcher
from penstock.supervisor.follower import Follower, Readers
from penstock.supervisor.leases import LeaseKeeper
from penstock.supervisor.live_runs import DrainPhase, LiveRuns, StuckRun
from penstock.supervisor.settings import Settings, check_duration
from penstock.supervisor.tail import Tails
from penstock.supervisor.timers import Timers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from penstock.log import CancelReply, EventLog, Notifications, Started
    from penstock.observer import Observer
    from penstock.runs import RunStatus
    from penstock.supervisor.execution import Execution

ID_TRIES: Final = 20  # the most ids that are made for a run, until one is on a shard of the log that is in reach


class Supervisor:
    """Starts, follows, cancels and ends runs. Made by `open_supervisor`."""

    def __init__(self, log: EventLog, settings: Settings, observer: Observer) -> None:
        self.log = log
        self.settings = settings
        self.observer = observer
        self._owner = f"{os.getpid()}-{secrets.token_hex(8)}"
        self._tails = Tails(
            max_entries=settings.tail_entries,
            max_bytes=settings.tail_bytes,
            max_process_bytes=settings.max_process_tail_bytes,
        )
        self._timers = Timers()
        self._committer = Committer(log, settings, observer)
        self._fetcher = Fetcher(log, self._tails, settings, observer)
        self._readers = Readers(most=settings.max_readers, most_of_a_run=settings.max_readers_per_run)
        self._runs = LiveRuns(self._tails, self._committer, self._fetcher, self._timers, settings, observer)
        self._leases = LeaseKeeper(log, self._owner, self._runs, self._committer, self._fetcher, settings, observer)
        self._notifications: Notifications
        self._services = trio.CancelScope()
        self._run_nursery: trio.Nursery | None = None
        self._reported = (0, 0)  # the readers' entries and bytes in the last figures

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
            producer: an async generator function, called with `args` in the run's own task; or a source.
            args: what the producer is called with.
            run_id: the id, if the caller has one: 1 to 128 characters of `[A-Za-z0-9._:-]`.
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
            TooManyRuns: this process has `max_runs` runs.
            ValueError: an argument is invalid, or over a limit (`MetadataTooLarge`, `DurationTooLong`).
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
        """Start a run, and say whether it is new or was found under its idempotency key. A checkpoint.

        `producer`, `run_id`, `name`, `timeout`, `max_silence`, `idempotency_key`, `metadata` and the errors are those
        of `start`.
        """
        # What `asynccontextmanager` makes can be called too, as a decorator; but it is a source.
        call = callable(producer) and not isinstance(producer, AbstractAsyncContextManager | AsyncIterable | Awaitable)
        if args and not call:
            raise ValueError("arguments are for a producer that can be called, and this one cannot")
        name = name or str(getattr(producer, "__qualname__", type(producer).__name__))
        request = (name, args, metadata, run_id, timeout, max_silence)
        idempotency = None if idempotency_key is None else Idempotency.of(idempotency_key, request)
        started, execution = await self._begin(run_id, name, timeout, max_silence, metadata, idempotency)
        if execution is not None:
            make_source = partial(producer, *args) if call else lambda: producer
            assert self._run_nursery is not None  # noqa: S101  (or _begin would have refused)
            self._run_nursery.start_soon(execution.execute, make_source, name=f"run {started.run.id}")
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
        """A run that is written by hand, with the `RunWriter` that is yielded: the body of the block is its producer.

        Leaving the block ends the run, and waits until that is stored; an exception fails it, and goes on. The body is
        cancelled when the run is: the block is a cancel scope, so it is entered and left in one task.

        `run_id`, `name`, `timeout`, `max_silence`, `metadata` and the errors on entering are those of `start`.

        Raises:
            RunCancelled: the run was cancelled, and that cut the body short.
            RunEnded: something else ended it, such as its timeout, and that cut the body short.
        """
        _, execution = await self._begin(run_id, name, timeout, max_silence, metadata)
        assert execution is not None  # noqa: S101  (there was no idempotency key)
        async with writing(execution, self._committer) as writer:
            yield writer

    def follow(self, run_id: str, after: int = 0, *, last: int | None = None) -> Follower:
        """A reader of the run `run_id`, in whatever process that lives. Synchronous.

        `after` is the cursor, the seq of the last entry that the reader has seen; 0 = from the beginning. With `last`
        it begins with the last so many entries, if that is later. Raises `ValueError` unless both are whole and from 0.
        """
        return Follower(self._fetcher, run_id, readers=self._readers, after=after, last=last, clock=self._timers)

    async def cancel(self, run_id: str, reason: str | None = None) -> CancelReply:
        """Ask the run `run_id` to stop, in whatever process it lives. Does not wait for its end. A checkpoint.

        `reason` is a text for the record, the producer and the readers.

        Returns:
            What the request met (`CancelStatus`), and the record. A run whose cancel was `REQUESTED` never ends
            completed.

        Raises:
            RunNotFound: there is no such run.
            LogUnavailable: the log cannot be reached.
            ValueError: the reason is no text that UTF-8 can hold.
        """
        if reason is not None:
            if not isinstance(reason, str):
                raise ValueError(f"a reason is a str, not {type(reason).__name__}")
            reason.encode()
        reply = await self.log.request_cancel(run_id, reason)
        if reply.status is CancelStatus.REQUESTED:
            self._runs.cancel(run_id, reason)
        return reply

    async def wait(self, run_id: str) -> Run:
        """Wait until a run has ended, and return its terminal record. A checkpoint; cancelled, the run goes on.

        Raises `RunNotFound`, and as a `Follower` `ReaderReleased`, `SupervisorFailed` and `LogUnavailable`.
        """
        async with self._fetcher.reading(run_id) as tail:
            run = await self.log.get(run_id)
            self._fetcher.note_last_seq(tail, run)
            while not run.status.terminal:
                if tail.ended:
                    run = (await self._fetcher.read(tail, tail.last)).run
                    if not run.status.terminal:  # the log has dropped the run that ended, and the id is another's
                        raise RunNotFound(run_id)
                elif tail.released is not None:
                    raise tail.released
                else:
                    await tail.wait()
            return run

    async def get(self, run_id: str) -> Run:
        """A run's record. A checkpoint. Raises `RunNotFound`, or `LogUnavailable` if the log cannot be reached."""
        return await self.log.get(run_id)

    async def list(self, *, limit: int = 50, status: RunStatus | None = None) -> Sequence[Run]:
        """The newest `limit` records, newest first; only those with this `status`, if one is given. A checkpoint.

        Raises `LogUnavailable` if the log cannot be reached.
        """
        return await self.log.list(limit=limit, status=status)

    async def drain(self, timeout: float | None = None) -> None:  # noqa: ASYNC109  (it interrupts runs, not this call)
        """Start no more runs; let those of this process end for `timeout` seconds, then interrupt them. A checkpoint.

        Returns when every run is settled, and at the latest `cancel_grace` + `finalize_timeout` after the interruption;
        a second time it returns at once. Readers of runs that live elsewhere are released at once, the others when
        their run has ended. Cancelled, it leaves the supervisor draining. The default `timeout` is `drain_timeout`.
        """
        check_duration("timeout", timeout, zero=True)
        await self._runs.drain(self.settings.drain_timeout if timeout is None else timeout)

    def interrupt(self) -> None:
        """Cancel every run of this process now, as a shutdown does. Synchronous."""
        self._runs.interrupt()

    @property
    def draining(self) -> bool:
        """True once no runs are started any more."""
        return self._runs.phase >= DrainPhase.DRAINING

    @property
    def live_runs(self) -> int:
        """The number of runs of this process that are not settled, with those whose start is under way."""
        return self._runs.unsettled

    @property
    def stuck(self) -> Sequence[StuckRun]:
        """The runs that have ended although their producers still hold on to their tasks."""
        return self._runs.stuck

    async def let_go(self) -> None:
        """Wait until no producer whose run has ended holds on to its task. A checkpoint, if it has to wait."""
        await self._runs.let_go()

    @property
    def unstored(self) -> int:
        """The number of runs whose last entries could not be stored since draining began; a reaper ends them."""
        return self._runs.unstored

    async def check(self) -> None:
        """Raise `Draining`, `SupervisorFailed` or `LogUnavailable` if runs cannot be started. A checkpoint."""
        self._refuse()
        await self.log.check()

    def tell_figures(self) -> None:
        """Notify the observer of the figures, now. Synchronous."""
        before, self._reported = self._reported, (self._readers.entries, self._readers.bytes)
        figures = Figures(
            runs=self._runs.unsettled,
            readers=self._readers.live,
            pending_bytes=self._committer.pending_bytes,
            tail_bytes=self._tails.size,
            entries_out=self._reported[0] - before[0],
            bytes_out=self._reported[1] - before[1],
        )
        notify(self.observer.figures, figures)

    def _refuse(self) -> None:
        if self._runs.failure is not None:
            raise SupervisorFailed("a service of the supervisor died; see the server's log")
        if self.draining or self._run_nursery is None:
            raise Draining("this server is shutting down and starts no more runs")

    async def _begin(
        self,
        run_id: str | None,
        name: str,
        timeout: float | None,
        max_silence: float | None,
        metadata: Mapping[str, Any] | None,
        idempotency: Idempotency | None = None,
    ) -> tuple[Started, Execution | None]:
        """Create the record and the execution; no checkpoint comes between them."""
        check_duration("timeout", timeout)
        check_duration("max_silence", max_silence)
        self._refuse()
        settings, runs = self.settings, self._runs
        if settings.max_duration and (timeout or 0) > settings.max_duration:
            raise DurationTooLong(f"a run takes at most {settings.max_duration:g} s (max_duration), not {timeout:g} s")
        run_id = self._new_id() if run_id is None else run_id
        run = new_run(run_id, name, metadata, max_metadata_bytes=settings.max_metadata_bytes)
        if runs.present >= settings.max_runs:
            raise TooManyRuns(f"this process has {settings.max_runs} runs, as many as max_runs allows")
        # The log may have dropped the run whose producer is still here. Under an idempotency key that run is returned.
        if idempotency is None and run.id in runs.by_id:
            raise RunExists(runs.by_id[run.id].run)
        lease = Lease(self._owner, secrets.token_hex(16), settings.lease)
        with runs.starting() as admit:
            started = await self.log.start(run, lease, idempotency)
            if not started.created:
                return started, None
            execution = admit(started.run, lease)
        execution.limit(timeout=timeout or settings.max_duration or None, max_silence=max_silence)
        notify(self.observer.run_started, started.run)
        if runs.phase >= DrainPhase.INTERRUPTED or runs.failure is not None:  # the run ends before it has begun
            await execution.leave(None)
            self._refuse()
        return started, execution

    def _new_id(self) -> str:
        ids = (new_run_id() for _ in range(ID_TRIES))
        return next((each for each in ids if not self._leases.is_away(self.log.shard(each))), new_run_id())

    @asynccontextmanager
    async def serving(self) -> AsyncIterator[None]:
        """Run the services, and take runs, while the block lasts. Used once, by `open_supervisor`."""
        async with open_nursery() as outer:
            await outer.start(self._run_services, outer.cancel_scope)
            try:
                async with open_nursery() as self._run_nursery:
                    try:
                        yield
                        await self.drain()
                    except BaseException:
                        self.interrupt()
                        raise
            finally:
                await self._end()  # noqa: ASYNC102  (it has its own shield, with a deadline)
        if (failure := self._runs.failure) is not None:
            raise SupervisorFailed("a service of the supervisor died") from failure

    async def _run_services(self, runs: trio.CancelScope, task_status: trio.TaskStatus[None]) -> None:
        """Run the services until `_end`; if one dies, record it and cancel the scope of the runs."""
        # Their scope is shielded without a deadline, the only one of its kind: a cancellation from outside must reach
        # the runs while the services are there to store their ends. It ends when `_end` cancels it, which every way out
        # of `serving` calls, and which waits under a deadline; or when a service dies.
        services = (
            self._committer.shards.run,
            self._timers.run,
            self._leases.deliver_cancels,
            self._leases.shards.run,
            self._fetcher.shards.run,
            self._dispatch,
            self._report_figures,
        )
        try:
            with self._services:
                async with self.log.wakeups(self._owner) as self._notifications:
                    self._fetcher.connect(self._notifications)
                    # `started` leaves a cancelled task where it is, and under the shield it would stay there for ever.
                    await trio.lowlevel.checkpoint()
                    self._services.shield = True
                    async with trio.open_nursery() as nursery:
                        for service in services:
                            nursery.start_soon(_run_service, service, name=service.__qualname__)
                        task_status.started()
        except Exception as error:
            if not self._services.shield:
                raise
            self._fail(error)
            runs.cancel(reason="a service of the supervisor died")

    async def _dispatch(self) -> None:
        while True:
            notification = await self._notifications.wait()
            if notification.cancel:
                self._leases.check_cancels()
            if notification.reconnected:
                self._leases.renew_now()
            self._fetcher.moved(notification.moved)

    async def _report_figures(self) -> None:
        while True:
            await trio.sleep(FIGURES_INTERVAL)
            self.tell_figures()

    def _fail(self, error: Exception) -> None:
        failure = single_error(error)
        notify(self.observer.on_error, failure, error_id=new_error_id(), where="the supervisor's services")
        released = SupervisorFailed("a service of the supervisor died; come back with the cursor")
        self._fetcher.evict_readers(released, everyone=True)
        self._runs.on_services_died(failure)

    async def _end(self) -> None:
        """Wait until the runs are settled, within a deadline; end the services."""
        await self._runs.end()
        released = ReaderReleased("the supervisor has ended; come back with the cursor")
        self._fetcher.evict_readers(released, everyone=True)
        self.tell_figures()
        self._services.cancel(reason="the supervisor has ended")


@trio.lowlevel.enable_ki_protection
async def _run_service(service: Callable[[], Awaitable[None]]) -> None:
    # Ctrl-C goes to the program's own code, which then ends the services in good order.
    await service()


@asynccontextmanager
async def open_supervisor(
    log: EventLog, *, observer: Observer | None = None, **options: Any
) -> AsyncIterator[Supervisor]:
    """Run a supervisor while the block lasts.

    Leaving the block by its end drains: runs may go on for `drain_timeout`, then they are interrupted. Leaving it by an
    exception or a cancellation interrupts them at once. Either way each run gets its terminal entry before this
    returns. A producer that never lets go keeps it from returning; every 10 s the observer is notified where it stands.

    Args:
        log: the event log, from `open_log`.
        observer: notified of what happens; by default a `LoggingObserver`.
        options: see `Settings`, which lists them with their units and defaults.

    Raises:
        ConfigurationError: a setting is unknown, or has a value that it cannot have.
        SupervisorFailed: a service died; the exception it died of is the cause.
        LogUnavailable: the log cannot be reached to begin with.
    """
    observer = checked(LoggingObserver() if observer is None else observer)
    supervisor = Supervisor(log, Settings.of(options), observer)
    async with supervisor.serving():
        yield supervisor


def new_run(run_id: str, producer: str, metadata: Mapping[str, Any] | None, *, max_metadata_bytes: int) -> Run:
    """The record of a run that is about to start; a `ValueError` if its name, id or metadata cannot be."""
    try:
        written = json.dumps(dict(metadata or {}), ensure_ascii=False, allow_nan=False).encode()
        (producer + "").encode()
    except (TypeError, RecursionError) as error:
        raise ValueError(f"the name of a run is a str, and its metadata a JSON object: {error}") from error
    if len(written) > max_metadata_bytes:
        raise MetadataTooLarge(
            f"a run's metadata has at most {max_metadata_bytes} bytes as JSON (max_metadata_bytes), not {len(written)}"
        )
    return Run(
        check_run_id(run_id),
        producer,
        created_at=time.time(),
        metadata=json.loads(written),  # the caller may go on changing the other
    )
