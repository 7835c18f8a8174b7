"""What a supervisor does by the clock: look for cancel requests, renew leases, reap the runs of the dead.

None of these can harm a run by failing: while the log cannot be reached they warn, back off and try again. In
particular a poll that fails cancels nothing, and a reaper that was itself out of contact reaps nothing until it has
been in contact for one lease.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final

import trio

from penstock.endings import Facts, ending_of
from penstock.errors import LogUnavailable
from penstock.log import AppendStatus, Obituary
from penstock.observer import new_error_id, tell
from penstock.runs import Cause

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from penstock.execution import Execution, Office
    from penstock.log import EventLog

REAP_INTERVAL: Final = 1.0
"""Seconds between two looks for leases that have run out."""
MAX_BACKOFF: Final = 10.0
"""The longest pause, in seconds, between two tries while the log cannot be reached."""
RENEWALS_PER_CALL: Final = 100
"""The most leases in one renewal."""


class Watch:
    """The three rounds of one supervisor, each a task of its own.

    Args:
        log: the event log.
        owner: the supervisor's name there.
        live: the executions that are not over yet, by run id.
        office: what they share.
        deliver: called with each cancel request: a run id and a reason.
    """

    def __init__(
        self,
        log: EventLog,
        owner: str,
        live: Mapping[str, Execution],
        office: Office,
        deliver: Callable[[str, str | None], None],
    ) -> None:
        self._log = log
        self._owner = owner
        self._live = live
        self._office = office
        self._deliver = deliver
        self._cancel_came = trio.Event()

    def wake(self) -> None:
        """A cancel request has come in: look now."""
        self._cancel_came.set()

    async def cancels(self) -> None:
        """Deliver cancel requests: at once when woken, else within `cancel_check_interval`."""
        interval = pause = self._office.settings.cancel_check_interval
        while True:
            with trio.move_on_after(pause):
                await self._cancel_came.wait()
            self._cancel_came = trio.Event()
            try:
                requests = await self._log.cancel_requests(self._owner)
            except LogUnavailable as error:
                pause = self._back_off("look for cancel requests", error, pause)
                continue
            pause = interval
            for run_id, reason in requests.items():
                self._deliver(run_id, reason)

    async def renewals(self) -> None:
        """Renew the leases of all live runs, three times in the length of a lease."""
        lease = self._office.settings.lease
        while True:
            await trio.sleep(lease / 3)
            epochs = [(e.run.id, e.outbox.epoch) for e in self._live.values() if not e.settled.is_set()]
            for start in range(0, len(epochs), RENEWALS_PER_CALL):
                piece = dict(epochs[start : start + RENEWALS_PER_CALL])
                try:
                    replies = await self._log.renew(self._owner, piece, lease)
                except LogUnavailable as error:
                    self._back_off("renew leases", error, 0.0)
                    break
                for run_id, status in replies.items():
                    if status in {AppendStatus.FENCED, AppendStatus.GONE} and run_id in self._live:
                        self._give_up(self._live[run_id])

    async def reaper(self) -> None:
        """End the runs whose owner is gone."""
        in_contact_since = trio.current_time()
        pause = REAP_INTERVAL
        while True:
            due = trio.current_time() + pause
            await trio.sleep_until(due)
            if trio.current_time() - due > self._office.settings.lease / 3:
                in_contact_since = trio.current_time()  # this process stood still, and its own renewals with it
            try:
                if trio.current_time() - in_contact_since < self._office.settings.lease:
                    await self._log.check()
                else:
                    await self._log.reap(self._obituary)
            except LogUnavailable as error:
                pause = self._back_off("reap", error, pause)
                in_contact_since = inf
            else:
                pause = REAP_INTERVAL
                in_contact_since = min(in_contact_since, trio.current_time())

    def _give_up(self, execution: Execution) -> None:
        if not execution.settled.is_set():
            self._office.committer.abandon(execution.outbox)

    def _obituary(self) -> Obituary:
        blocks, ending = ending_of(Facts(cause=Cause.ABANDONED), self._office.dialect, error_id=new_error_id())
        return Obituary(blocks, ending)

    def _back_off(self, what: str, error: LogUnavailable, pause: float) -> float:
        tell(self._office.observer.warning, f"cannot {what}: {error}; trying again")
        return min(pause * 2, MAX_BACKOFF)
