"""The services of a supervisor: the outer of its two nurseries, and what lives there.

    committer   what is pending → the log → tails: a lane for each part of the log
    fetcher     wake-ups → the log → tails of runs that live elsewhere: a feed for each part
    timers      timeouts, silence, grace
    watch       cancel requests; renewals, reaper, outages for each part
    pulse       figures → the observer, once a second

They run in a scope that is shielded without a deadline, the only one of its kind: a cancellation from outside must
reach the runs while the services are still there to store their ends. The supervisor ends that scope itself, when the
last run has left and is settled, or `finalize_timeout` later. If a service dies, `failure` says of what, every run is
cancelled with nothing pretended about its end, and every reader is released.
"""

from __future__ import annotations

import os
import secrets
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final

import trio

from penstock.errors import ReaderReleased, SupervisorFailed, single_error
from penstock.log import Lease
from penstock.observer import FIGURES_INTERVAL, Figures, new_error_id, notify
from penstock.runs import Cause, new_run_id
from penstock.sse.dialects import dialect_named
from penstock.supervisor.committer import Committer
from penstock.supervisor.execution import Execution, Office
from penstock.supervisor.fetcher import Fetcher
from penstock.supervisor.follower import Readers
from penstock.supervisor.leases import LeaseKeeper
from penstock.supervisor.tail import Tails
from penstock.supervisor.timers import Timers

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from penstock.log import EventLog, Notifications
    from penstock.observer import Observer
    from penstock.runs import Run
    from penstock.supervisor.settings import Settings


ID_TRIES: Final = 20
"""So many ids are made for a run, one of which is likely to be on a part of the log that is in reach."""


@dataclass(frozen=True, slots=True)
class StuckRun:
    """A run that has ended although its producer has not let go, where that stands, and whether its end is stored."""

    run_id: str
    stack: str
    stored: bool = True


class Services:
    """What keeps a supervisor's runs going, and the executions that it keeps going."""

    def __init__(self, log: EventLog, settings: Settings, observer: Observer) -> None:
        self.owner = f"{os.getpid()}-{secrets.token_hex(8)}"
        """The supervisor's name in the log."""
        self.failure: BaseException | None = None
        """What a service died of, if one did."""
        self.draining = False
        """Runs are given their last time."""
        self.drained = False
        """... and have had it."""
        self.unstored = 0
        """The runs whose ending could not be stored since `draining`."""
        self.interrupted = False
        """Every run has been cancelled, as a shutdown does, and those to come will be."""
        self.live: dict[str, Execution] = {}
        """The runs of this process that have not both settled and left."""
        self._starts: dict[object, dict[str, str | None]] = {}
        """The starts under way, each with the cancel requests since its beginning that were for no live run."""
        self.tails = Tails(
            max_entries=settings.tail_entries,
            max_bytes=settings.tail_bytes,
            max_process_bytes=settings.max_process_tail_bytes,
        )
        self.committer = Committer(log, settings, observer)
        self.readers = Readers(most=settings.max_readers, most_of_a_run=settings.max_readers_per_run)
        self._told = (0, 0)
        """The readers' entries and bytes that the observer has been told of."""
        self.timers = Timers()
        dialect = dialect_named(settings.dialect)
        office = Office(self.committer, self.timers, settings, dialect, observer, self._execution_changed)
        self._office = office
        self._watch = LeaseKeeper(log, self.owner, self.live, office, self._deliver, self._outage)
        self.fetcher = Fetcher(log, self.tails, settings, observer)
        self._log = log
        self._settings = settings
        self._observer = observer
        self._scope = trio.CancelScope()
        self._notifications: Notifications
        self._nursery: trio.Nursery | None = None
        self._changed = trio.lowlevel.ParkingLot()

    def lease(self) -> Lease:
        """A lease for one more run, with an epoch of its own."""
        return Lease(self.owner, secrets.token_hex(16), self._settings.lease)

    def new_id(self) -> str:
        """An id for a new run, on a part of the log that is in reach, if there is one."""
        ids = (new_run_id() for _ in range(ID_TRIES))
        return next((each for each in ids if not self._watch.is_away(self._log.shard(each))), new_run_id())

    @contextmanager
    def starting(self) -> Iterator[Callable[[Run, Lease], Execution]]:
        """A start is under way: the services wait for it, and a cancel request that overtakes its reply is kept.

        Yields:
            What makes the run's execution, in the step in which its record is known to be there.
        """
        start = object()
        early = self._starts[start] = {}
        try:
            yield partial(self._admit, early)
        finally:
            del self._starts[start]
            self._changed.unpark_all()

    def _admit(self, early: dict[str, str | None], run: Run, lease: Lease) -> Execution:
        tail = self.tails.acquire(run.id, new=True)
        tail.fed = True
        execution = self.live[run.id] = Execution(run, lease, tail, self._office)
        if self.failure is not None:
            execution.on_services_died()
        elif self.interrupted:
            execution.stop(Cause.SHUTDOWN)
        elif run.id in early:
            execution.stop(Cause.CANCEL, early[run.id])
        return execution

    def _deliver(self, run_id: str, reason: str | None) -> None:
        """A cancel request for a run of this supervisor, which may be over, or whose start may be under way."""
        if run_id in self.live:
            self.live[run_id].stop(Cause.CANCEL, reason)
        else:
            for early in self._starts.values():
                early[run_id] = reason

    def _outage(self, away: ReaderReleased, shard: str, *, over: bool) -> None:
        """A part of the log has been away for too long, or is back after that."""
        if over:
            self.fetcher.readmit(away, shard)
            return
        self._warn(f"{away}: its runs are given up, and readers sent away")
        self.fetcher.evict_readers(away, everyone=True, shard=shard)
        for execution in list(self.live.values()):
            if self._log.shard(execution.run.id) == shard:
                self.unstored += self.draining and not execution.settled.is_set()
                execution.give_up()

    async def drain(self, timeout: float) -> None:
        """Let the runs end within `timeout` seconds, or until somebody interrupts them; then do that."""
        self.draining = True
        if self.drained:
            return
        self.fetcher.evict_readers(ReaderReleased("the server is shutting down; come back with the cursor"))
        with trio.move_on_after(timeout):
            await self._until(lambda: self.interrupted or not self.unsettled)
        self.interrupt()
        with trio.move_on_after(self._settings.cancel_grace):
            await self._until(lambda: all(each.concluded or each.settled.is_set() for each in self.live.values()))
        with trio.move_on_after(self._settings.finalize_timeout):
            await self.all_settled()
        self.drained = True
        if self.unsettled:
            away = "the server is shutting down, and the event log is out of reach; come back with the cursor"
            self.fetcher.evict_readers(ReaderReleased(away), everyone=True)

    def interrupt(self) -> None:
        """Cancel every run of this process, as a shutdown does, and those whose start is under way."""
        self.interrupted = True
        self._changed.unpark_all()
        for execution in list(self.live.values()):
            execution.stop(Cause.SHUTDOWN)

    async def all_settled(self) -> None:
        """Wait until the ending of every run is stored. A checkpoint, unless there is nothing to wait for."""
        await self._until(lambda: not self.unsettled)

    def holding(self) -> list[Execution]:
        """The executions of runs that have ended, as far as this process is concerned, and have not left."""
        return [each for each in self.live.values() if (each.settled.is_set() or each.concluded) and not each.left]

    def stuck(self) -> list[StuckRun]:
        """The same, as others are told of them."""
        return [
            StuckRun(each.run.id, each.stack(), each.settled.is_set() and not each.given_up) for each in self.holding()
        ]

    async def let_go(self) -> None:
        """Wait until there are none."""
        await self._until(lambda: not self.holding())

    async def _until(self, is_so: Callable[[], bool]) -> None:
        while not is_so():
            await self._changed.park()

    @property
    def present(self) -> int:
        """The runs that take up room here: those that have not both settled and left, and those that start."""
        return len(self._starts) + len(self.live)

    @property
    def unsettled(self) -> int:
        """The runs whose ending is not stored yet, with those whose start is under way."""
        return len(self._starts) + sum(not execution.settled.is_set() for execution in self.live.values())

    async def run(self, stop: trio.CancelScope, task_status: trio.TaskStatus[None]) -> None:
        """Run the services until `end`; if one dies, record it and cancel `stop`.

        Until they have started this can be cancelled from outside, and raises what keeps them from starting.
        """
        services = (
            self.committer.shards.run,
            self.timers.run,
            self._watch.cancels,
            self._watch.run,
            self.fetcher.shards.run,
            self._dispatch,
            self._pulse,
        )
        try:
            with self._scope:
                async with self._log.wakeups(self.owner) as self._notifications:
                    self.fetcher.connect(self._notifications)
                    # `started` leaves a cancelled task where it is, and under the shield it would stay there for ever.
                    await trio.lowlevel.checkpoint()
                    self._scope.shield = True
                    async with trio.open_nursery() as self._nursery:
                        for service in services:
                            self._nursery.start_soon(_serve, service, name=service.__qualname__)
                        task_status.started()
        except Exception as error:
            if not self._scope.shield:
                raise
            self._fail(error)  # a service died: recorded here, raised by open_supervisor
            stop.cancel(reason="a service of the supervisor died")
        finally:
            self._nursery = None

    async def end(self) -> None:
        """The last run has left: give what is pending its time, then end the services.

        A run that is written by hand may still be there, since its body is somebody else's task: it has its grace.
        """
        timeout = 0.0
        if not self.drained:  # or they have had it
            timeout = self._settings.finalize_timeout
            if not all(execution.concluded for execution in self.live.values()):
                timeout += self._settings.cancel_grace
        with trio.move_on_after(timeout, shield=True):
            await self.all_settled()
        self.unstored += sum(not execution.settled.is_set() for execution in self.live.values())
        for execution in self.live.values():
            self.committer.drop(execution.buffer)  # who waits for a flush waits no more
        self.fetcher.evict_readers(ReaderReleased("the supervisor has ended; come back with the cursor"), everyone=True)
        self.tell_figures()
        self._scope.cancel(reason="the supervisor has ended")

    def tell_figures(self) -> None:
        """Tell the observer how much there is of everything."""
        before, self._told = self._told, (self.readers.entries, self.readers.bytes)
        figures = Figures(
            runs=self.unsettled,
            readers=self.readers.live,
            pending_bytes=self.committer.pending_bytes,
            tail_bytes=self.tails.size,
            entries_out=self._told[0] - before[0],
            bytes_out=self._told[1] - before[1],
        )
        notify(self._observer.figures, figures)

    async def _dispatch(self) -> None:
        while True:
            notification = await self._notifications.wait()
            if notification.cancel:
                self._watch.wake()
            if notification.reconnected:
                self._watch.renew_now()
            self.fetcher.moved(notification.moved)

    async def _pulse(self) -> None:
        while True:
            await trio.sleep(FIGURES_INTERVAL)
            self.tell_figures()

    def _fail(self, error: Exception) -> None:
        self.failure = single_error(error)
        notify(self._observer.on_error, self.failure, error_id=new_error_id(), where="the supervisor's services")
        released = SupervisorFailed("a service of the supervisor died; come back with the cursor")
        self.fetcher.evict_readers(released, everyone=True)
        for execution in list(self.live.values()):
            execution.on_services_died()

    def _execution_changed(self, execution: Execution) -> None:
        tail = execution.buffer.tail
        if execution.given_up and tail.fed and tail.released is None:
            tail.fed = False
            if self._nursery is not None:
                self._nursery.start_soon(self.fetcher.follow_elsewhere, execution.run.id)
        if execution.left and execution.settled.is_set() and self.live.get(execution.run.id) is execution:
            del self.live[execution.run.id]
            self.fetcher.release(tail)
        self._changed.unpark_all()

    def _warn(self, message: str) -> None:
        notify(self._observer.warning, message)


@trio.lowlevel.enable_ki_protection
async def _serve(service: Callable[[], Awaitable[None]]) -> None:
    """Run a service. Ctrl-C goes to the program's own code, which then ends the services in good order."""
    await service()
