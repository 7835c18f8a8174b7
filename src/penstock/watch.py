"""What a supervisor does by the clock: look for cancels, renew leases, reap the runs of the dead, notice outages.

None of these can harm a run by failing: while the log cannot be reached they warn, back off and try again. In
particular a poll that fails cancels nothing, and a reaper that was itself out of contact reaps nothing until it has
been in contact for one lease. Only when the log has been away for `outage_limit` are the runs given up.
"""

from __future__ import annotations

from functools import partial
from math import inf
from typing import TYPE_CHECKING, Final, Protocol

import trio

from penstock.endings import Facts, ending_of
from penstock.errors import LogUnavailable, ReaderReleased
from penstock.log import AppendStatus, Obituary
from penstock.log.retries import patiently
from penstock.observer import new_error_id, tell
from penstock.runs import Cause

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from penstock.execution import Execution, Office
    from penstock.log import EventLog

REAP_INTERVAL: Final = 1.0
"""Seconds between two looks for leases that have run out."""
RENEWALS_PER_CALL: Final = 100
"""The most leases in one renewal."""


class OnOutage(Protocol):
    """Whoever is told of an outage."""

    def __call__(self, away: ReaderReleased, *, over: bool) -> None:
        """The log has been away for too long, or is back after that; `away` is the same both times."""


class Watch:
    """The four rounds of one supervisor, each a task of its own.

    Args:
        log: the event log.
        owner: the supervisor's name there.
        live: the executions that are not over yet, by run id.
        office: what they share.
        deliver: called with each cancel request: a run id and a reason.
        on_outage: called when the log has been away for too long, with what readers are told, and when it is back.
    """

    def __init__(
        self,
        log: EventLog,
        owner: str,
        live: Mapping[str, Execution],
        office: Office,
        deliver: Callable[[str, str | None], None],
        on_outage: OnOutage,
    ) -> None:
        self._log = log
        self._owner = owner
        self._live = live
        self._office = office
        self._deliver = deliver
        self._on_outage = on_outage
        self._cancel_came = trio.Event()
        self._renew_now = trio.Event()
        self._reached = trio.current_time()
        """When the log was last reached, and took a write."""
        self._away_since: float | None = None
        """When the log was first found out of reach, while it is."""

    def wake(self) -> None:
        """A cancel request has come in: look now."""
        self._cancel_came.set()

    def renew_now(self) -> None:
        """The log can be reached again: see whether it still has the runs of this process."""
        self._renew_now.set()

    async def cancels(self) -> None:
        """Deliver cancel requests: at once when woken, else within `cancel_check_interval`."""
        interval = self._office.settings.cancel_check_interval
        look = partial(self._log.cancel_requests, self._owner)
        while True:
            with trio.move_on_after(interval):
                await self._cancel_came.wait()
            self._cancel_came = trio.Event()
            requests = await patiently(look, what="look for cancel requests", on_warning=self._warn)
            for run_id, reason in requests.items():
                self._deliver(run_id, reason)

    async def renewals(self) -> None:
        """Renew the leases of all live runs, three times in the length of a lease, and after every outage."""
        while True:
            with trio.move_on_after(self._office.settings.lease / 3):
                await self._renew_now.wait()
            self._renew_now = trio.Event()
            await patiently(self._renew, what="renew leases", on_warning=self._warn)

    async def _renew(self) -> None:
        lease = self._office.settings.lease
        epochs = [(e.run.id, e.outbox.epoch) for e in self._live.values() if not e.settled.is_set()]
        for start in range(0, len(epochs), RENEWALS_PER_CALL):
            piece = dict(epochs[start : start + RENEWALS_PER_CALL])
            for run_id, status in (await self._log.renew(self._owner, piece, lease)).items():
                execution = self._live.get(run_id)
                if execution is None or execution.settled.is_set() or execution.outbox.epoch != piece[run_id]:
                    continue
                if status is AppendStatus.FENCED:
                    self._office.committer.abandon(execution.outbox)
                elif status is AppendStatus.GONE:
                    self._office.committer.restore(execution.outbox)

    async def reaper(self) -> None:
        """End the runs whose owner is gone, after a lease of unbroken contact with the log."""
        try:
            await self._reap_on()
        finally:
            self._end_outage()

    async def _reap_on(self) -> None:
        lease = self._office.settings.lease
        in_contact_since = trio.current_time()
        while True:
            due = trio.current_time() + REAP_INTERVAL
            await trio.sleep_until(due)
            began = trio.current_time()
            if began - due > lease / 3:
                in_contact_since = began  # this process stood still, and its own renewals with it
            reap = began - in_contact_since >= lease
            in_contact_since = min(in_contact_since, began)
            try:
                # A log that takes so long to answer stood still, and the renewals of the living wait before its door.
                with trio.fail_after(max(lease / 3, REAP_INTERVAL / 2)):
                    await self._reap_or_check(reap=reap)
            except (LogUnavailable, trio.TooSlowError) as error:
                if in_contact_since < began:
                    self._warn(f"cannot reap: {str(error) or 'the log is slow'}; trying again")
                in_contact_since = inf
                if self._away_since is None:
                    self._away_since = began
                    tell(self._office.observer.outage_began)
            else:
                self._reached = trio.current_time()
                self._end_outage()

    def _end_outage(self) -> None:
        if self._away_since is not None:
            tell(self._office.observer.outage_ended, trio.current_time() - self._away_since)
            self._away_since = None

    async def _reap_or_check(self, *, reap: bool) -> None:
        """One look at the log, and at the dead."""
        if not reap:
            await self._log.check()
        elif lost := await self._log.reap(self._obituary):
            tell(self._office.observer.runs_lost, lost)

    async def outages(self) -> None:
        """Tell when the log has been out of reach for `outage_limit`, and when it is back after that."""
        limit = self._office.settings.outage_limit
        while True:
            # An outage that begins now is noticed at the next look.
            await trio.sleep_until(self._reached + REAP_INTERVAL + limit)
            if trio.current_time() < self._reached + REAP_INTERVAL + limit:
                continue
            try:
                await self._log.check()  # it may have been this process that stood still
            except LogUnavailable:
                away = ReaderReleased(f"the event log has been out of reach for {limit:g} s; come back with the cursor")
                self._on_outage(away, over=False)
                await patiently(self._log.check, what="reach the log", on_warning=self._warn)
                self._on_outage(away, over=True)
            self._reached = trio.current_time()

    def _obituary(self) -> Obituary:
        blocks, ending = ending_of(Facts(cause=Cause.ABANDONED), self._office.dialect, error_id=new_error_id())
        return Obituary(blocks, ending)

    def _warn(self, message: str) -> None:
        tell(self._office.observer.warning, message)
