"""What a supervisor does by the clock: renew leases, reap runs whose lease has expired, notice outages, find cancels.

No failure here harms a run: while a shard cannot be reached, each task warns, backs off and tries again. A reaper that
was itself out of contact reaps nothing until it has been in contact for one lease. Only when a shard has been out of
reach for `outage_limit` are its runs given up.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Final

import trio

from penstock.backoff import retry_while_unavailable
from penstock.errors import LogUnavailable, ReaderReleased
from penstock.log import AppendStatus, LostEnding
from penstock.log.shards import Shards, ShardWorker
from penstock.observer import new_error_id, notify
from penstock.runs import Cause
from penstock.sse.dialects import dialect_named
from penstock.supervisor.outcome import RunFacts, decide

if TYPE_CHECKING:
    from penstock.log import EventLog
    from penstock.observer import Observer
    from penstock.supervisor.committer import Committer
    from penstock.supervisor.execution import Execution
    from penstock.supervisor.fetcher import Fetcher
    from penstock.supervisor.live_runs import LiveRuns
    from penstock.supervisor.settings import Settings

REAP_INTERVAL: Final = 1.0  # seconds between two looks for leases that have expired
RENEWALS_PER_CALL: Final = 100  # the most leases in one renewal


class ShardLeases(ShardWorker):
    """One shard: renews three times in a lease and after every outage, reaps once a second, notices outages."""

    def __init__(self, shard: str, keeper: LeaseKeeper, *, late: bool) -> None:
        super().__init__(shard)
        self._keeper = keeper
        self._settings = keeper.settings
        self._renew_now = trio.Event()
        if late:  # runs may have moved to this shard with leases that are nearly over
            self._renew_now.set()
        self._reached = trio.current_time()  # when the shard was last reached, and took a write
        self._in_contact_since = trio.current_time()
        self._away = False

    def renew_now(self) -> None:
        self._renew_now.set()

    @property
    def may_reap(self) -> bool:
        """True after one lease of unbroken contact."""
        return trio.current_time() - self._in_contact_since >= self._settings.lease

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._renewals)
                nursery.start_soon(self._reaper)
                nursery.start_soon(self._outages)
        finally:
            self._end_outage()

    def _unsettled(self) -> list[Execution]:
        shard_of, runs = self._keeper.log.shard, self._keeper.runs.by_id.values()
        return [each for each in runs if not each.settled.is_set() and shard_of(each.run.id) == self.shard]

    @trio.lowlevel.enable_ki_protection
    async def _renewals(self) -> None:
        while True:
            with trio.move_on_after(self._settings.lease / 3):
                await self._renew_now.wait()
            self._renew_now = trio.Event()
            await retry_while_unavailable(self._renew, what="renew leases", on_warning=self._keeper.warn)

    async def _renew(self) -> None:
        keeper = self._keeper
        epochs = [(each.run.id, each.buffer.epoch) for each in self._unsettled()]
        for start in range(0, len(epochs), RENEWALS_PER_CALL):
            piece = dict(epochs[start : start + RENEWALS_PER_CALL])
            replies = await keeper.log.renew(keeper.owner, piece, self._settings.lease)
            if len(replies) < len(piece):
                raise LogUnavailable(f"{len(piece) - len(replies)} runs were out of reach, and others were not")
            for run_id, status in replies.items():
                execution = keeper.runs.by_id.get(run_id)
                if execution is None or execution.settled.is_set() or execution.buffer.epoch != piece[run_id]:
                    continue
                if status is AppendStatus.FENCED:
                    keeper.committer.abandon(execution.buffer)
                elif status is AppendStatus.GONE:
                    keeper.committer.restore(execution.buffer)

    @trio.lowlevel.enable_ki_protection
    async def _reaper(self) -> None:
        keeper, lease = self._keeper, self._settings.lease
        while True:
            due = trio.current_time() + REAP_INTERVAL
            await trio.sleep_until(due)
            began = trio.current_time()
            if began - due > lease / 3:
                self._in_contact_since = began  # this process stood still, and its own renewals with it
            reap = self.may_reap
            self._in_contact_since = min(self._in_contact_since, began)
            try:
                # A log that takes longer stood still, and the renewals of live runs may wait behind this call.
                with trio.fail_after(max(lease / 3, REAP_INTERVAL / 2)):
                    if not reap:
                        await self._check()
                    elif lost := await keeper.log.reap(keeper.lost_ending, shard=self.shard, ready=keeper.may_reap):
                        notify(keeper.observer.runs_lost, lost)
            except (LogUnavailable, trio.TooSlowError) as error:
                if self._in_contact_since < began:
                    keeper.warn(f"cannot reap: {str(error) or 'the log is slow'}; trying again")
                self._in_contact_since = inf
                if not self._away:
                    self._away = True
                    keeper.note_away(self.shard, began)
            else:
                self._reached = trio.current_time()
                self._end_outage()

    def _end_outage(self) -> None:
        if self._away:
            self._away = False
            self._keeper.note_back(self.shard)

    async def _check(self) -> None:
        await self._keeper.log.check(self.shard)

    @trio.lowlevel.enable_ki_protection
    async def _outages(self) -> None:
        """Give up the shard's runs, and release its readers, when it has been out of reach for `outage_limit`."""
        keeper, limit = self._keeper, self._settings.outage_limit
        while True:
            # An outage that begins now is noticed by the reaper's next look.
            due = self._reached + REAP_INTERVAL + limit
            await trio.sleep_until(due)
            if due < self._reached + REAP_INTERVAL + limit:
                continue
            try:
                await self._check()  # it may have been this process that stood still
            except LogUnavailable:
                away = ReaderReleased(f"the event log has been out of reach for {limit:g} s; come back with the cursor")
                keeper.warn(f"{away}: its runs are given up, and readers are released")
                keeper.fetcher.evict_readers(away, everyone=True, shard=self.shard)
                keeper.runs.give_up(self._unsettled())
                try:
                    await retry_while_unavailable(self._check, what="reach the log", on_warning=keeper.warn)
                finally:
                    keeper.fetcher.readmit(away, self.shard)
            self._reached = trio.current_time()


@dataclass(eq=False)
class LeaseKeeper:
    """Keeps the leases of one supervisor, which is `owner` in the log."""

    log: EventLog
    owner: str
    runs: LiveRuns
    committer: Committer
    fetcher: Fetcher
    settings: Settings
    observer: Observer

    def __post_init__(self) -> None:
        self.shards: Shards[ShardLeases] = Shards(self.log, self._new_worker)
        self._dialect = dialect_named(self.settings.dialect)
        self._away: dict[str, float] = {}  # the shards that are out of reach, and since when
        self._away_since = 0.0
        self._check_cancels = trio.Event()

    def _new_worker(self, shard: str) -> ShardLeases:
        return ShardLeases(shard, self, late=self.shards.started)

    def check_cancels(self) -> None:
        self._check_cancels.set()

    def renew_now(self) -> None:
        """Renew now: the log can be reached again, and may have lost runs of this process."""
        for worker in self.shards:
            worker.renew_now()

    async def deliver_cancels(self) -> None:
        """Look for cancel requests when notified, and every `cancel_check_interval`; deliver them."""
        look = partial(self.log.cancel_requests, self.owner)
        while True:
            with trio.move_on_after(self.settings.cancel_check_interval):
                await self._check_cancels.wait()
            self._check_cancels = trio.Event()
            requests = await retry_while_unavailable(look, what="look for cancel requests", on_warning=self.warn)
            for run_id, reason in requests.items():
                self.runs.cancel(run_id, reason)

    def is_away(self, shard: str) -> bool:
        return shard in self._away

    def may_reap(self, shard: str) -> bool:
        """Whether this process has been in contact with a shard for long enough to end runs there."""
        worker = self.shards.get(shard)
        return worker is not None and worker.may_reap

    def note_away(self, shard: str, since: float) -> None:
        """A shard is out of reach; an outage lasts from the first such shard until all are back."""
        if not self._away:
            self._away_since = since
            notify(self.observer.outage_began)
        self._away[shard] = since

    def note_back(self, shard: str) -> None:
        del self._away[shard]
        if not self._away:
            notify(self.observer.outage_ended, trio.current_time() - self._away_since)

    def lost_ending(self) -> LostEnding:
        blocks, ending = decide(RunFacts(cause=Cause.ABANDONED), self._dialect, error_id=new_error_id())
        return LostEnding(blocks, ending)

    def warn(self, message: str) -> None:
        notify(self.observer.warning, message)
