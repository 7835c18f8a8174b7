"""What a supervisor does by the clock for one part of the log: renew leases, reap the runs of the dead, notice outages.

None of this can harm a run by failing: while the part cannot be reached it warns, backs off and tries again. In
particular a reaper that was itself out of contact reaps nothing until it has been in contact for one lease. Only when
the part has been away for `outage_limit` are its runs given up.

What a supervisor does by the clock: look for cancels, and keep in contact with each part of the log (`contact.py`).

None of it can harm a run by failing: while the log cannot be reached it warns, backs off and tries again. In particular
a poll that fails cancels nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Final, Protocol

import trio

from penstock.backoff import retry_while_unavailable
from penstock.errors import LogUnavailable, ReaderReleased
from penstock.log import AppendStatus, LostEnding
from penstock.observer import new_error_id, notify
from penstock.runs import Cause
from penstock.supervisor.outcome import RunFacts, decide

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from penstock.log import EventLog
    from penstock.supervisor.execution import Execution, Office

REAP_INTERVAL: Final = 1.0
"""Seconds between two looks for leases that have run out."""
RENEWALS_PER_CALL: Final = 100
"""The most leases in one renewal."""


class OnOutage(Protocol):
    """Whoever is told of an outage."""

    def __call__(self, away: ReaderReleased, shard: str, *, over: bool) -> None:
        """A part of the log has been away for too long, or is back after that; `away` is the same both times."""


@dataclass(frozen=True, slots=True)
class Rounds:
    """What the contacts to all parts have in common; see `Watch`."""

    log: EventLog
    owner: str
    live: Mapping[str, Execution]
    office: Office
    on_outage: OnOutage
    on_away: Callable[[str, float | None], None]
    """Called with a part that has been out of reach since some time, or is in reach again (None)."""
    may_reap: Callable[[str], bool]
    """Whether this process has been in contact with a part for long enough to end runs there."""


class ShardLeases:
    """The three rounds for one part of the log, each a task of its own.

    Args:
        part: the part.
        rounds: what all contacts have in common.
        late: it was found while runs were under way, which may have come to it with leases that are nearly over.
    """

    def __init__(self, shard: str, rounds: Rounds, *, late: bool) -> None:
        self.shard = shard
        self.scope = trio.CancelScope()
        """Cancelled when there is no such part any more."""
        self._rounds = rounds
        self._office = rounds.office
        self._renew_now = trio.Event()
        if late:
            self._renew_now.set()
        self._reached = trio.current_time()
        """When the part was last reached, and took a write."""
        self._in_contact_since = trio.current_time()
        self._away = False

    def renew_now(self) -> None:
        """The log can be reached again: see whether it still has the runs of this process."""
        self._renew_now.set()

    @property
    def may_reap(self) -> bool:
        """It has been in unbroken contact for one lease."""
        return trio.current_time() - self._in_contact_since >= self._office.settings.lease

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Do it, until `scope` is cancelled."""
        try:
            with self.scope:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._renewals)
                    nursery.start_soon(self._reaper)
                    nursery.start_soon(self._outages)
        finally:
            self._end_outage()

    @trio.lowlevel.enable_ki_protection
    async def _renewals(self) -> None:
        """Renew the leases of all live runs, three times in the length of a lease, and after every outage."""
        while True:
            with trio.move_on_after(self._office.settings.lease / 3):
                await self._renew_now.wait()
            self._renew_now = trio.Event()
            await retry_while_unavailable(self._renew, what="renew leases", on_warning=self._warn)

    async def _renew(self) -> None:
        rounds, lease = self._rounds, self._office.settings.lease
        epochs = [
            (each.run.id, each.buffer.epoch)
            for each in rounds.live.values()
            if not each.settled.is_set() and rounds.log.shard(each.run.id) == self.shard
        ]
        for start in range(0, len(epochs), RENEWALS_PER_CALL):
            piece = dict(epochs[start : start + RENEWALS_PER_CALL])
            replies = await rounds.log.renew(rounds.owner, piece, lease)
            if len(replies) < len(piece):
                raise LogUnavailable(f"{len(piece) - len(replies)} runs were out of reach, and others were not")
            for run_id, status in replies.items():
                execution = rounds.live.get(run_id)
                if execution is None or execution.settled.is_set() or execution.buffer.epoch != piece[run_id]:
                    continue
                if status is AppendStatus.FENCED:
                    self._office.committer.abandon(execution.buffer)
                elif status is AppendStatus.GONE:
                    self._office.committer.restore(execution.buffer)

    @trio.lowlevel.enable_ki_protection
    async def _reaper(self) -> None:
        """End the runs whose owner is gone, after a lease of unbroken contact with the log."""
        lease = self._office.settings.lease
        while True:
            due = trio.current_time() + REAP_INTERVAL
            await trio.sleep_until(due)
            began = trio.current_time()
            if began - due > lease / 3:
                self._in_contact_since = began  # this process stood still, and its own renewals with it
            reap = self.may_reap
            self._in_contact_since = min(self._in_contact_since, began)
            try:
                # A log that takes so long to answer stood still, and the renewals of the living wait before its door.
                with trio.fail_after(max(lease / 3, REAP_INTERVAL / 2)):
                    await self._reap_or_check(reap=reap)
            except (LogUnavailable, trio.TooSlowError) as error:
                if self._in_contact_since < began:
                    self._warn(f"cannot reap: {str(error) or 'the log is slow'}; trying again")
                self._in_contact_since = inf
                if not self._away:
                    self._away = True
                    self._rounds.on_away(self.shard, began)
            else:
                self._reached = trio.current_time()
                self._end_outage()

    def _end_outage(self) -> None:
        if self._away:
            self._away = False
            self._rounds.on_away(self.shard, None)

    async def _reap_or_check(self, *, reap: bool) -> None:
        """One look at the part, and at the dead."""
        if not reap:
            await self._check()
        elif lost := await self._rounds.log.reap(self._obituary, shard=self.shard, ready=self._rounds.may_reap):
            notify(self._office.observer.runs_lost, lost)

    async def _check(self) -> None:
        await self._rounds.log.check(self.shard)

    @trio.lowlevel.enable_ki_protection
    async def _outages(self) -> None:
        """Tell when the part has been out of reach for `outage_limit`, and when it is back after that, or gone."""
        limit = self._office.settings.outage_limit
        while True:
            # An outage that begins now is noticed at the next look.
            await trio.sleep_until(self._reached + REAP_INTERVAL + limit)
            if trio.current_time() < self._reached + REAP_INTERVAL + limit:
                continue
            try:
                await self._check()  # it may have been this process that stood still
            except LogUnavailable:
                away = ReaderReleased(f"the event log has been out of reach for {limit:g} s; come back with the cursor")
                self._rounds.on_outage(away, self.shard, over=False)
                try:
                    await retry_while_unavailable(self._check, what="reach the log", on_warning=self._warn)
                finally:
                    self._rounds.on_outage(away, self.shard, over=True)
            self._reached = trio.current_time()

    def _obituary(self) -> LostEnding:
        blocks, ending = decide(RunFacts(cause=Cause.ABANDONED), self._office.dialect, error_id=new_error_id())
        return LostEnding(blocks, ending)

    def _warn(self, message: str) -> None:
        notify(self._office.observer.warning, message)


class LeaseKeeper:
    """The rounds of one supervisor, each a task of its own.

    Args:
        log: the event log.
        owner: the supervisor's name there.
        live: the executions that are not over yet, by run id.
        office: what they share.
        deliver: called with each cancel request: a run id and a reason.
        on_outage: called when a part of the log has been away for too long, with what readers are told, and when it is
            back.
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
        self._office = office
        self._deliver = deliver
        self._rounds = Rounds(log, owner, live, office, on_outage, self._on_away, self._may_reap)
        self._contacts: dict[str, ShardLeases] = {}
        self._away: dict[str, float] = {}
        """The parts that are out of reach, and since when."""
        self._away_since = 0.0
        self._cancel_came = trio.Event()

    def wake(self) -> None:
        """A cancel request has come in: look now."""
        self._cancel_came.set()

    def renew_now(self) -> None:
        """The log can be reached again: see whether it still has the runs of this process."""
        for contact in self._contacts.values():
            contact.renew_now()

    async def cancels(self) -> None:
        """Deliver cancel requests: at once when woken, else within `cancel_check_interval`."""
        interval = self._office.settings.cancel_check_interval
        look = partial(self._log.cancel_requests, self._owner)
        while True:
            with trio.move_on_after(interval):
                await self._cancel_came.wait()
            self._cancel_came = trio.Event()
            requests = await retry_while_unavailable(look, what="look for cancel requests", on_warning=self._warn)
            for run_id, reason in requests.items():
                self._deliver(run_id, reason)

    async def run(self) -> None:
        """Keep in contact with every part that there is."""
        async with trio.open_nursery() as nursery:
            while True:
                shards, late = self._log.shards(), bool(self._contacts)
                for shard in self._contacts.keys() - {*shards}:
                    self._contacts.pop(shard).scope.cancel(reason="there is no such part of the log any more")
                for shard in shards:
                    if shard not in self._contacts:
                        contact = self._contacts[shard] = ShardLeases(shard, self._rounds, late=late)
                        nursery.start_soon(contact.run)
                await trio.sleep(REAP_INTERVAL)

    def is_away(self, shard: str) -> bool:
        """Whether this part could not be reached at the last look."""
        return shard in self._away

    def _may_reap(self, shard: str) -> bool:
        contact = self._contacts.get(shard)
        return contact is not None and contact.may_reap

    def _on_away(self, shard: str, since: float | None) -> None:
        """A part is out of reach, or in reach again; an outage lasts from the first to the last of them."""
        if since is None:
            del self._away[shard]
            if not self._away:
                notify(self._office.observer.outage_ended, trio.current_time() - self._away_since)
        else:
            if not self._away:
                self._away_since = since
                notify(self._office.observer.outage_began)
            self._away[shard] = since

    def _warn(self, message: str) -> None:
        notify(self._office.observer.warning, message)
