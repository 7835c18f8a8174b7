"""The fetcher: group fetch for the tails of runs that live elsewhere, by one task for each shard of the log.

A notification says which runs have moved, and one `fetch` brings what all of their tails lack. Replay, live reading and
the repair of a lost notification are thus one path: whatever was missed is in the next page.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Final

import trio

from penstock.backoff import retry_while_unavailable
from penstock.errors import LogUnavailable, RunNotFound
from penstock.log.shards import Shards, ShardWorker
from penstock.observer import notify

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from penstock.errors import PenstockError
    from penstock.log import EventLog, Notifications, Page
    from penstock.observer import Observer
    from penstock.runs import Run
    from penstock.supervisor.settings import Settings
    from penstock.supervisor.tail import Tail, Tails

LOADED: Final = 8
"""A fetch for this many runs makes the next one wait for all of the spacing; one for fewer, for a fraction of it."""
MISSING_GRACE: Final = 10.0
"""For how many seconds a run that has readers may be missing: the owner of a lost run puts it back."""
MISSING_PAUSE: Final = 0.5
"""Seconds between two fetches of runs that are missing."""
AWAY_PAUSE: Final = 0.1
"""Seconds between two fetches of runs that could not be reached while others could."""


class ShardFetcher(ShardWorker):
    """Keeps the tails of the runs on one shard up to date."""

    def __init__(self, shard: str, owner: Fetcher) -> None:
        super().__init__(shard)
        self._owner = owner
        self._moved: dict[str, int] = {}
        self._behind: dict[str, int] = {}
        """The runs whose tails are behind and cannot catch up yet, and how far their tails are."""
        self._missing: dict[str, float] = {}
        """The runs with readers here that the log does not have at the moment, and since when."""
        self._away: set[str] = set()
        """The runs that the last fetch could not reach, while it reached others."""
        self._wake = trio.Event()
        self._busy = False

    @property
    def idle(self) -> bool:
        return not (self._busy or self._moved or self._behind or self._missing)

    def note_moved(self, run_id: str, seq: int) -> None:
        self._moved[run_id] = max(seq, self._moved.get(run_id, 0))
        self._wake.set()

    def is_stuck(self, behind: Mapping[str, int]) -> bool:
        """True if none of these runs can catch up for now."""
        return behind.keys() <= self._missing.keys() | self._away

    async def run(self) -> None:
        spacing = self._owner.settings.commit_spacing
        while True:
            if self.is_stuck(self._behind) and not self._moved:
                self._wake = trio.Event()
                pause = AWAY_PAUSE if self._away else MISSING_PAUSE
                with trio.move_on_after(pause if self._behind else inf):
                    await self._wake.wait()
            started, self._busy = trio.current_time(), True
            # A run that cannot catch up must not delay the notifications of the others.
            moved, self._moved = self._moved, {}
            for run_id, seq in moved.items():
                tail = self._owner.tails.get(run_id)
                if tail is not None and tail.last != seq:  # less: the log has lost something, and perhaps ended it
                    self._behind[run_id] = tail.last
            self._hand_over(moved)
            load = min(1.0, len(self._behind) / LOADED)
            if self._behind:
                self._behind = await self.fetch(self._behind)
            self._busy = False
            await trio.sleep_until(started + spacing * load)

    def _hand_over(self, moved: Mapping[str, int]) -> None:
        """Leave the runs that have moved to another shard to the worker of that."""
        for run_id in [run_id for run_id in self._behind if self._owner.log.shard(run_id) != self.shard]:
            self._missing.pop(run_id, None)
            self._owner.moved({run_id: max(moved.get(run_id, 0), self._behind.pop(run_id) + 1)})

    async def fetch(self, behind: Mapping[str, int]) -> dict[str, int]:
        """Feed the tails of these runs once; returns those that are still behind."""
        fetch = partial(self._owner.log.fetch, behind)
        pages = await retry_while_unavailable(fetch, what="fetch entries", on_warning=self._owner.warn)
        self._away = behind.keys() - pages.keys()
        tails = self._owner.tails
        still = {run_id: behind[run_id] for run_id in self._away if tails.get(run_id) is not None}
        for run_id, page in pages.items():
            tail = tails.get(run_id)
            missing_since = self._missing.pop(run_id, trio.current_time())
            if tail is None:
                continue
            if page is None:
                if trio.current_time() - missing_since >= MISSING_GRACE:
                    gone = RunNotFound(run_id)
                    tail.evict_readers(gone)
                    tails.evict(gone)  # a reader that does not leave must not keep a later run of this id from others
                else:
                    self._missing[run_id] = missing_since
                    still[run_id] = tail.last
                continue
            if page.entries:
                tail.extend(page.entries)
            else:  # the entries have been trimmed: a reader that needs them finds that out when it reads
                tail.advance(page.run.seq, ended=page.run.status.terminal)
            if tail.last < page.run.seq:
                still[run_id] = tail.last
        return still


class Prefetch:
    """A page that is read before its reader asks for it."""

    def __init__(self, after: int) -> None:
        self.after = after
        """The cursor that the page follows."""
        self._page: Page | None = None
        self._over = trio.Event()

    async def read(self, log: EventLog, run_id: str) -> None:
        try:
            with suppress(Exception):  # the reader then reads the page itself, and gets the error
                self._page = await log.read(run_id, self.after)
        finally:
            self._over.set()

    async def page(self) -> Page | None:
        """The page, or None if it could not be read. A checkpoint."""
        await self._over.wait()
        return self._page


class Fetcher:
    """Keeps the tails that have readers up to date; `shards` holds the workers, and runs them."""

    def __init__(self, log: EventLog, tails: Tails, settings: Settings, observer: Observer) -> None:
        self.log = log
        self.tails = tails
        self.settings = settings
        self.shards = Shards(log, lambda shard: ShardFetcher(shard, self))
        self._observer = observer
        self._notifications: Notifications
        self._released: PenstockError | None = None
        self._away: dict[str, PenstockError] = {}
        """What the readers of a shard get that has been out of reach for too long."""

    def warn(self, message: str) -> None:
        notify(self._observer.warning, message)

    def connect(self, notifications: Notifications) -> None:
        """Subscribe here to the runs that get readers. Called before anything is read."""
        self._notifications = notifications

    def moved(self, moved: Mapping[str, int]) -> None:
        for run_id, seq in moved.items():
            self.shards.of(run_id).note_moved(run_id, seq)

    @asynccontextmanager
    async def reading(self, run_id: str) -> AsyncIterator[Tail]:
        """Use a run's tail, which is fed until the block is left. Leaving it never blocks."""
        tail = await self.acquire(run_id)
        try:
            yield tail
        finally:
            self.release(tail)

    async def acquire(self, run_id: str) -> Tail:
        """Use a run's tail, which is fed until it is released. A checkpoint; cancelled, it acquires nothing."""
        tail = self.tails.acquire(run_id)
        try:
            if tail.fed:
                pass
            elif (gone := self._released or self._away.get(self.log.shard(run_id))) is not None:
                tail.evict_readers(gone)
            else:
                await self._notifications.subscribe(run_id)
        except BaseException:
            self.release(tail)
            raise
        return tail

    def release(self, tail: Tail) -> None:
        if self.tails.release(tail) and self.tails.get(tail.run_id) is None:
            self._notifications.unsubscribe(tail.run_id)

    def evict_readers(self, error: PenstockError, *, everyone: bool = False, shard: str | None = None) -> None:
        """End the readers of runs that live elsewhere, or `everyone`, and those to come, with `error`.

        If a shard is given, only the readers of its runs, until `readmit`. Runs that have ended are read on.
        """
        if shard is None:
            self._released = error
        else:
            self._away[shard] = error
        for tail in self.tails.all():
            if (everyone or not tail.fed) and (shard is None or self.log.shard(tail.run_id) == shard):
                tail.evict_readers(error)

    def readmit(self, error: PenstockError, shard: str) -> None:
        """Let readers come again to a shard that `error` has evicted them from."""
        if self._away.get(shard) is error:
            del self._away[shard]
        self.tails.evict(error)

    def note_last_seq(self, tail: Tail, run: Run) -> None:
        """Record the run's last seq, as a new reader has read it."""
        # A tail that others read is not advanced past its entries: its readers would each read them from the log.
        if not tail.last or tail.last >= run.seq:
            tail.advance(run.seq, ended=run.status.terminal)
        elif not tail.fed:
            self.moved({tail.run_id: run.seq})

    async def read(self, tail: Tail, after: int) -> Page:
        """A page of a run that has a reader; waits while the log cannot be reached, or has lost the run."""
        since = trio.current_time()

        async def look() -> Page:
            try:
                return await self.log.read(tail.run_id, after)
            except LogUnavailable:
                if tail.released is not None:
                    raise tail.released from None
                raise
            except RunNotFound as error:
                if tail.released is not None or trio.current_time() - since >= MISSING_GRACE:
                    raise
                raise LogUnavailable(f"the log has lost run {tail.run_id}") from error

        return await retry_while_unavailable(look, what=f"read {tail.run_id}", on_warning=self.warn)

    def read_ahead(self, tail: Tail, after: int) -> Prefetch | None:
        """Begin to read a page that will be asked for; None while the workers do not run. Synchronous."""
        ahead = Prefetch(after)
        return ahead if self.shards.start_soon(ahead.read, self.log, tail.run_id) else None

    async def follow_elsewhere(self, run_id: str) -> None:
        """Feed the tail of a run that this process has given up, until it has caught up with the log."""

        async def catch_up() -> None:
            async with self.reading(run_id) as tail:
                behind = {run_id: tail.last}
                worker = self.shards.of(run_id)
                while behind := await worker.fetch(behind):
                    if worker.is_stuck(behind):
                        await trio.sleep(MISSING_PAUSE)

        await retry_while_unavailable(catch_up, what=f"follow {run_id}", on_warning=self.warn)
