"""The services of a supervisor: the outer of its two nurseries, and what lives there.

    committer   what is pending → the log → tails
    fetcher     wake-ups → the log → tails of runs that live elsewhere
    timers      timeouts, silence, grace
    watch       cancel requests, renewals, reaper

They run in a scope that is shielded without a deadline, the only one of its kind: a cancellation from outside must
reach the runs while the services are still there to store their ends. The supervisor ends that scope itself, when the
last run has left and is settled, or `finalize_timeout` later. If a service dies, `failure` says of what, every run is
cancelled with nothing pretended about its end, and every reader is released.
"""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

import trio

from penstock.committer import Committer
from penstock.dialects import dialect_named
from penstock.errors import ReaderReleased, SupervisorFailed, single_error
from penstock.execution import Execution, Office
from penstock.log import Lease
from penstock.log.fetcher import Fetcher
from penstock.log.tail import Tails
from penstock.observer import new_error_id, tell
from penstock.timers import Timers
from penstock.watch import Watch

if TYPE_CHECKING:
    from penstock.log import EventLog
    from penstock.observer import Observer
    from penstock.runs import Run
    from penstock.settings import Settings


class Services:
    """What keeps a supervisor's runs going, and the executions that it keeps going."""

    def __init__(self, log: EventLog, settings: Settings, observer: Observer) -> None:
        self.owner = f"{os.getpid()}-{secrets.token_hex(8)}"
        """The supervisor's name in the log."""
        self.failure: BaseException | None = None
        """What a service died of, if one did."""
        self.live: dict[str, Execution] = {}
        """The runs of this process that have not both settled and left."""
        self.tails = Tails(
            max_entries=settings.tail_entries,
            max_bytes=settings.tail_bytes,
            max_process_bytes=settings.max_process_tail_bytes,
        )
        self.committer = Committer(
            log,
            flush_interval=settings.flush_interval,
            flush_size=settings.flush_size,
            spacing=settings.commit_spacing,
            max_pending_bytes=settings.max_pending_bytes,
            max_process_pending_bytes=settings.max_process_pending_bytes,
            on_warning=self._warn,
        )
        self.timers = Timers()
        dialect = dialect_named(settings.dialect)
        office = Office(self.committer, self.timers, settings, dialect, observer, self._execution_changed)
        self._office = office
        self._watch = Watch(log, self.owner, self.live, office)
        self.fetcher = Fetcher(
            log, self.tails, spacing=settings.commit_spacing, on_cancel=self._watch.wake, on_warning=self._warn
        )
        self._log = log
        self._settings = settings
        self._observer = observer
        self._scope = trio.CancelScope(shield=True)
        self._nursery: trio.Nursery | None = None
        self._changed = trio.lowlevel.ParkingLot()

    def lease(self) -> Lease:
        """A lease for one more run, with an epoch of its own."""
        return Lease(self.owner, secrets.token_hex(16), self._settings.lease)

    def admit(self, run: Run, lease: Lease) -> Execution:
        """The execution of a run whose record has just been created."""
        tail = self.tails.acquire(run.id)
        tail.fed = True
        execution = self.live[run.id] = Execution(run, lease.epoch, tail, self._office)
        return execution

    async def all_settled(self) -> None:
        """Wait until the ending of every run is stored. A checkpoint, unless there is nothing to wait for."""
        while self.unsettled:
            await self._changed.park()

    @property
    def unsettled(self) -> int:
        """The runs whose ending is not stored yet."""
        return sum(not execution.settled.is_set() for execution in self.live.values())

    async def run(self, stop: trio.CancelScope, task_status: trio.TaskStatus[None]) -> None:
        """Run the services until `end`; if one dies, record it and cancel `stop`."""
        services = (
            self.committer.run,
            self.timers.run,
            self._watch.cancels,
            self._watch.renewals,
            self._watch.reaper,
            self.fetcher.run,
        )
        try:
            with self._scope:
                async with self._log.wakeups(self.owner) as wakeups:
                    self.fetcher.connect(wakeups)
                    async with trio.open_nursery() as self._nursery:
                        for service in services:
                            self._nursery.start_soon(service)
                        task_status.started()
        except Exception as error:  # noqa: BLE001  (a service died: recorded here, raised by open_supervisor)
            self._fail(error)
            stop.cancel(reason="a service of the supervisor died")
        finally:
            self._nursery = None

    async def end(self) -> None:
        """The last run has left: give what is pending its time, then end the services."""
        with trio.move_on_after(self._settings.finalize_timeout, shield=True):
            await self.all_settled()
        self.fetcher.release(ReaderReleased("the supervisor has ended; come back with the cursor"), everyone=True)
        self._scope.cancel(reason="the supervisor has ended")

    def _fail(self, error: Exception) -> None:
        self.failure = single_error(error)
        tell(self._observer.on_error, error, error_id=new_error_id(), where="the supervisor's services")
        released = SupervisorFailed("a service of the supervisor died; come back with the cursor")
        self.fetcher.release(released, everyone=True)
        for execution in list(self.live.values()):
            execution.forsake()

    def _execution_changed(self, execution: Execution) -> None:
        tail = execution.outbox.tail
        if execution.fenced and tail.fed:
            tail.fed = False
            if self._nursery is not None:
                self._nursery.start_soon(self.fetcher.adopt, execution.run.id)
        if execution.left and execution.settled.is_set() and self.live.pop(execution.run.id, None) is not None:
            self.tails.give_back(tail)
        self._changed.unpark_all()

    def _warn(self, message: str) -> None:
        tell(self._observer.warning, message)
