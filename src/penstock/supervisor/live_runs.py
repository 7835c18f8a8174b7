"""The live runs of a process: which there are, which are about to start, and how far a drain is.

A run is live from the step in which its record is known to be there until it is settled and its producer is gone. A
start that is under way counts as well: `drain` waits for it, and a cancel request that overtakes the reply to it is
kept until the run is there.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import TYPE_CHECKING

import trio

from penstock.errors import ReaderReleased
from penstock.runs import Cause
from penstock.supervisor.execution import Execution, Producer, Settlement

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from penstock.log import Lease
    from penstock.observer import Observer
    from penstock.runs import Run
    from penstock.supervisor.committer import Committer
    from penstock.supervisor.fetcher import Fetcher
    from penstock.supervisor.settings import Settings
    from penstock.supervisor.tail import Tails
    from penstock.supervisor.timers import Timers


class DrainPhase(IntEnum):
    """How far the end of a supervisor is. It only goes forward, and may skip phases."""

    SERVING = 0
    DRAINING = 1  # no run is started any more; those that are live go on
    INTERRUPTED = 2  # every run has been cancelled, and a run whose start is under way will be
    DRAINED = 3  # the runs have had the time that they get to be settled


@dataclass(frozen=True, slots=True)
class StuckRun:
    """A run that has ended although its producer has not let go."""

    run_id: str
    stack: str  # where its producer stands, as a traceback
    stored: bool = True  # its ending is stored


class LiveRuns:
    """The executions of a supervisor."""

    def __init__(
        self,
        tails: Tails,
        committer: Committer,
        fetcher: Fetcher,
        timers: Timers,
        settings: Settings,
        observer: Observer,
    ) -> None:
        self.phase = DrainPhase.SERVING
        self.failure: BaseException | None = None  # the exception that a service died of, if one did
        self.unstored = 0  # the runs whose ending could not be stored since draining began
        self.by_id: dict[str, Execution] = {}
        self._starts: dict[object, dict[str, str | None]] = {}
        """The starts under way, each with the cancel requests since its beginning that were for no live run."""
        self._tails = tails
        self._fetcher = fetcher
        self._settings = settings
        self._new = partial(
            Execution,
            committer=committer,
            timers=timers,
            settings=settings,
            observer=observer,
            on_change=self._on_change,
        )
        self._changed = trio.lowlevel.ParkingLot()

    @property
    def unsettled(self) -> int:
        return len(self._starts) + sum(not each.settled.is_set() for each in self.by_id.values())

    @property
    def present(self) -> int:
        return len(self._starts) + len(self.by_id)

    @property
    def stuck(self) -> list[StuckRun]:
        return [
            StuckRun(each.run.id, each.stack(), each.settlement is Settlement.STORED)
            for each in self.by_id.values()
            if each.stuck
        ]

    @contextmanager
    def starting(self) -> Iterator[Callable[[Run, Lease], Execution]]:
        """A start is under way while the block lasts; what it yields admits the run once its record is there."""
        start = object()
        early = self._starts[start] = {}
        try:
            yield partial(self._admit, early)
        finally:
            del self._starts[start]
            self._changed.unpark_all()

    def _admit(self, early: dict[str, str | None], run: Run, lease: Lease) -> Execution:
        tail = self._tails.acquire(run.id, new=True)
        tail.fed = True
        execution = self.by_id[run.id] = self._new(run, lease, tail)
        if self.failure is not None:
            execution.on_services_died()
        elif self.phase >= DrainPhase.INTERRUPTED:
            execution.stop(Cause.SHUTDOWN)
        elif run.id in early:
            execution.stop(Cause.CANCEL, early[run.id])
        return execution

    def cancel(self, run_id: str, reason: str | None) -> None:
        """Cancel a run of this process, which may be over, or whose start may be under way."""
        if run_id in self.by_id:
            self.by_id[run_id].stop(Cause.CANCEL, reason)
        else:
            for early in self._starts.values():
                early[run_id] = reason

    def give_up(self, executions: Iterable[Execution]) -> None:
        for execution in executions:
            self.unstored += self.phase >= DrainPhase.DRAINING and not execution.settled.is_set()
            execution.give_up()

    def on_services_died(self, error: BaseException) -> None:
        self.failure = error
        for execution in [*self.by_id.values()]:
            execution.on_services_died()

    def interrupt(self) -> None:
        self._reach(DrainPhase.INTERRUPTED)
        for execution in [*self.by_id.values()]:
            execution.stop(Cause.SHUTDOWN)

    async def drain(self, timeout: float) -> None:
        """Let the runs end within `timeout` seconds, or until `interrupt` is called; then interrupt them."""
        self._reach(DrainPhase.DRAINING)
        if self.phase is DrainPhase.DRAINED:
            return
        self._fetcher.evict_readers(ReaderReleased("the server is shutting down; come back with the cursor"))
        with trio.move_on_after(timeout):
            await self._until(lambda: self.phase >= DrainPhase.INTERRUPTED or not self.unsettled)
        self.interrupt()
        with trio.move_on_after(self._settings.cancel_grace):
            await self._until(lambda: all(each.concluded or each.settled.is_set() for each in self.by_id.values()))
        with trio.move_on_after(self._settings.finalize_timeout):
            await self._until(lambda: not self.unsettled)
        self._reach(DrainPhase.DRAINED)
        if self.unsettled:
            away = "the server is shutting down, and the event log is out of reach; come back with the cursor"
            self._fetcher.evict_readers(ReaderReleased(away), everyone=True)

    async def end(self) -> None:
        """Give the runs their time to be settled, unless `drain` has; then drop what is not stored."""
        timeout = 0.0
        if self.phase < DrainPhase.DRAINED:
            timeout = self._settings.finalize_timeout
            # The body of a run that is written by hand belongs to another task, and has its grace.
            if not all(execution.concluded for execution in self.by_id.values()):
                timeout += self._settings.cancel_grace
        with trio.move_on_after(timeout, shield=True):
            await self._until(lambda: not self.unsettled)
        for execution in self.by_id.values():
            self.unstored += not execution.settled.is_set()
            execution.drop()

    async def let_go(self) -> None:
        await self._until(lambda: not any(each.stuck for each in self.by_id.values()))

    async def _until(self, condition: Callable[[], bool]) -> None:
        while not condition():
            await self._changed.park()

    def _reach(self, phase: DrainPhase) -> None:
        self.phase = max(self.phase, phase)
        self._changed.unpark_all()

    def _on_change(self, execution: Execution) -> None:
        tail = execution.buffer.tail
        if execution.settlement is Settlement.GIVEN_UP and tail.fed and tail.released is None:
            tail.fed = False
            self._fetcher.shards.start_soon(self._fetcher.follow_elsewhere, execution.run.id)
        over = execution.producer is Producer.GONE and execution.settled.is_set()
        if over and self.by_id.get(execution.run.id) is execution:
            del self.by_id[execution.run.id]
            self._fetcher.release(tail)
        self._changed.unpark_all()
