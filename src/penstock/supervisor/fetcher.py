"""A feed of the fetcher: group fetch for the tails of runs that live elsewhere, on one part of the log.

The fetcher: group fetch on the way out.

Tails of this process's own runs are fed by the committer. The tails of runs that live elsewhere, if they have readers
here, are fed by one task for each part of the log (`feed.py`): a wake-up says which runs have moved, and one `fetch`
brings what all of their tails lack. Replay, live and the repair of a lost wake-up are thus one path: whatever was
missed is in the next page.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Final, TypeGuard

import trio

from penstock.backoff import retry_while_unavailable
from penstock.errors import LogUnavailable, RunNotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from penstock.errors import PenstockError
    from penstock.log import EventLog, Notifications, Page
    from penstock.runs import Run
    from penstock.supervisor.tail import Tail, Tails

LOADED: Final = 8
"""The runs of a fetch from which on the next one waits for all of the spacing; after fewer for a part of it."""
MISSING_GRACE: Final = 10.0
"""For how many seconds a run that has readers may be missing: a log that has lost it is given it again by its owner."""
MISSING_PAUSE: Final = 0.5
"""Seconds between two looks for runs that are missing."""
AWAY_PAUSE: Final = 0.1
"""Seconds between two looks for runs that were out of reach while others were not."""


@dataclass(frozen=True, slots=True)
class Feeding:
    """What all feeds of a fetcher have in common; see `Fetcher`."""

    log: EventLog
    tails: Tails
    spacing: float
    on_warning: Callable[[str], None]
    elsewhere: Callable[[str, int], None]
    """Called with a run that is on another part now, and how far it is."""


class ShardFetcher:
    """Keeps the tails of one part's runs up to date."""

    def __init__(self, shard: str, feeding: Feeding) -> None:
        self.scope = trio.CancelScope()
        """Cancelled when there is no such part any more."""
        self._shard = shard
        self._feeding = feeding
        self._moved: dict[str, int] = {}
        self._behind: dict[str, int] = {}
        """The runs that cannot be caught up with yet, and how far their tails are."""
        self._missing: dict[str, float] = {}
        """The runs with readers here that the log does not have at the moment, and since when."""
        self._away: set[str] = set()
        """The runs that were out of reach at the last fetch, while others were not."""
        self._news = trio.Event()
        self._busy = False

    @property
    def waiting(self) -> list[str]:
        """The runs of which something is still to be fetched."""
        return [*self._moved, *self._behind, *self._missing]

    @property
    def idle(self) -> bool:
        """There is nothing to do."""
        return not (self._busy or self.waiting)

    def tell(self, run_id: str, seq: int) -> None:
        """A run has got as far as `seq`; it may have been told already that it is further."""
        self._moved[run_id] = max(seq, self._moved.get(run_id, 0))
        self._news.set()

    def is_stuck(self, behind: dict[str, int]) -> bool:
        """Whether none of these can be caught up with for now."""
        return behind.keys() <= self._missing.keys() | self._away

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Bring what the tails lack, whenever a run has moved, until cancelled."""
        with self.scope:
            while True:
                if self.is_stuck(self._behind) and not self._moved:
                    self._news = trio.Event()
                    pause = AWAY_PAUSE if self._away else MISSING_PAUSE
                    with trio.move_on_after(pause if self._behind else inf):
                        await self._news.wait()
                started, self._busy = trio.current_time(), True
                # A run that cannot be caught up with must not keep the news of the others waiting.
                moved, self._moved = self._moved, {}
                for run_id, seq in moved.items():
                    tail = self._feeding.tails.get(run_id)
                    if tail is not None and tail.last != seq:  # less: the log has lost something, and perhaps ended it
                        self._behind[run_id] = tail.last
                self._hand_over(moved)
                load = min(1.0, len(self._behind) / LOADED)
                if self._behind:
                    self._behind = await self.fetch(self._behind)
                self._busy = False
                await trio.sleep_until(started + self._feeding.spacing * load)

    def _hand_over(self, moved: dict[str, int]) -> None:
        """Leave the runs that are on another part now to the feed of that."""
        for run_id in [run_id for run_id in self._behind if self._feeding.log.shard(run_id) != self._shard]:
            self._missing.pop(run_id, None)
            self._feeding.elsewhere(run_id, max(moved.get(run_id, 0), self._behind.pop(run_id) + 1))

    async def fetch(self, behind: dict[str, int]) -> dict[str, int]:
        """Feed the tails that are behind; those that still are."""
        fetch = partial(self._feeding.log.fetch, behind)
        pages = await retry_while_unavailable(fetch, what="fetch entries", on_warning=self._feeding.on_warning)
        self._away = behind.keys() - pages.keys()
        tails = self._feeding.tails
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
                    tails.evict(gone)  # who stays all the same keeps nobody from a run that comes back
                else:
                    self._missing[run_id] = missing_since
                    still[run_id] = tail.last
                continue
            if page.entries:
                tail.extend(page.entries)
            else:  # trimmed away already: its readers will find that out, and nobody else waits for it
                tail.advance(page.run.seq, ended=page.run.status.terminal)
            if tail.last < page.run.seq:
                still[run_id] = tail.last
        return still


class Prefetch:
    """A page that is read before its reader asks for it. Who does not want it any more lets go of it."""

    def __init__(self, after: int) -> None:
        self.after = after
        """The cursor that it follows."""
        self._page: Page | None = None
        self._over = trio.Event()

    async def read(self, log: EventLog, run_id: str) -> None:
        """Read it."""
        try:
            with suppress(Exception):  # whoever asks then looks again, and hears what is wrong
                self._page = await log.read(run_id, self.after)
        finally:
            self._over.set()

    async def page(self) -> Page | None:
        """The page, or None if it could not be read. A checkpoint."""
        await self._over.wait()
        return self._page


class Fetcher:
    """Keeps the tails that have readers up to date.

    Args:
        log: where entries come from.
        tails: the tails of this process.
        spacing: how long a fetch is held back after the start of one for many runs, in seconds; else less.
        on_cancel: called when a cancel request has come in.
        on_reconnect: called when the log can be reached again, and may have lost something.
        on_warning: told when the log cannot be reached.
    """

    def __init__(
        self,
        log: EventLog,
        tails: Tails,
        *,
        spacing: float,
        on_cancel: Callable[[], None],
        on_reconnect: Callable[[], None],
        on_warning: Callable[[str], None],
    ) -> None:
        self.log = log
        self._tails = tails
        self._wakeups: Notifications
        self._on_cancel = on_cancel
        self._on_reconnect = on_reconnect
        self._on_warning = on_warning
        self._feeding = Feeding(log, tails, spacing, on_warning, self._tell)
        self._feeds: dict[str, ShardFetcher] = {}
        self._released: PenstockError | None = None
        self._away: dict[str, PenstockError] = {}
        """What readers are told whose part of the log has been away for too long."""
        self._nursery: trio.Nursery | None = None

    @property
    def waiting(self) -> list[str]:
        """The runs of which something is still to be fetched."""
        return [run_id for feed in self._feeds.values() for run_id in feed.waiting]

    def connect(self, wakeups: Notifications) -> None:
        """Take the wake-ups, before anything is read or run."""
        self._wakeups = wakeups

    @asynccontextmanager
    async def reading(self, run_id: str) -> AsyncIterator[Tail]:
        """Use a run's tail; it is fed for as long.

        Leaving never blocks, and the last one to leave leaves nothing behind.
        """
        tail = await self.acquire(run_id)
        try:
            yield tail
        finally:
            self.release(tail)

    async def acquire(self, run_id: str) -> Tail:
        """Use a run's tail, which is fed until it is given back. Cancelled, it is not taken up."""
        tail = self._tails.acquire(run_id)
        try:
            if tail.fed:
                pass
            elif (gone := self._released or self._away.get(self.log.shard(run_id))) is not None:
                tail.evict_readers(gone)
            else:
                await self._wakeups.subscribe(run_id)
        except BaseException:
            self.release(tail)
            raise
        return tail

    def release(self, tail: Tail) -> None:
        """One user less of a tail; the last one leaves nothing behind."""
        if self._tails.release(tail) and self._tails.get(tail.run_id) is None:
            self._wakeups.unsubscribe(tail.run_id)

    def evict_readers(self, error: PenstockError, *, everyone: bool = False, shard: str | None = None) -> None:
        """Send away the readers of runs that live elsewhere, or of all, and those to come; ended runs are read on.

        Args:
            error: what they are told.
            everyone: the readers of this process's own runs as well.
            shard: only those of runs on this shard of the log, and only until `readmit`.
        """
        if shard is None:
            self._released = error
        else:
            self._away[shard] = error
        for tail in self._tails.all():
            if (everyone or not tail.fed) and (shard is None or self.log.shard(tail.run_id) == shard):
                tail.evict_readers(error)

    def note_last_seq(self, tail: Tail, run: Run) -> None:
        """A reader has come, and has seen how far its run is; those that are there are not to read on by themselves."""
        if not tail.last or tail.last >= run.seq:
            tail.advance(run.seq, ended=run.status.terminal)
        elif not tail.fed:
            self._tell(tail.run_id, run.seq)

    def readmit(self, error: PenstockError, shard: str) -> None:
        """Readers may come again, if it was `error` that released them."""
        if self._away.get(shard) is error:
            del self._away[shard]
        self._tails.evict(error)

    async def read(self, tail: Tail, after: int) -> Page:
        """A page of a run that has a reader, who waits while the log cannot be reached, or has lost the run.

        Raises:
            PenstockError: the log cannot be reached, and the tail has released its readers.
            RunNotFound: there is no such run any more.
        """
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

        return await retry_while_unavailable(look, what=f"read {tail.run_id}", on_warning=self._on_warning)

    def read_ahead(self, tail: Tail, after: int) -> Prefetch | None:
        """Begin to read a page that will be asked for; None if that has to wait until then. Synchronous."""
        if not _is_open(self._nursery):
            return None
        ahead = Prefetch(after)
        self._nursery.start_soon(ahead.read, self.log, tail.run_id)
        return ahead

    async def follow_elsewhere(self, run_id: str) -> None:
        """Feed a tail whose run this process has given up."""

        async def catch_up() -> None:
            async with self.reading(run_id) as tail:
                behind = {run_id: tail.last}
                feed = self._feed(self.log.shard(run_id))
                while behind := await feed.fetch(behind):
                    if feed.is_stuck(behind):
                        await trio.sleep(MISSING_PAUSE)

        await retry_while_unavailable(catch_up, what=f"follow {run_id}", on_warning=self._on_warning)

    async def run(self) -> None:
        """Do it, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                for feed in self._feeds.values():
                    self._nursery.start_soon(feed.run)
                for shard in self.log.shards():
                    self._feed(shard)
                await self._listen()
        finally:
            self._nursery = None

    async def _listen(self) -> None:
        """Take what the wake-ups tell, at once."""
        while True:
            news = await self._wakeups.wait()
            if news.cancel:
                self._on_cancel()
            if news.reconnected:
                self._on_reconnect()
            for run_id, seq in news.moved.items():
                self._tell(run_id, seq)

    def _tell(self, run_id: str, seq: int) -> None:
        """A run has got as far as `seq`."""
        self._feed(self.log.shard(run_id)).tell(run_id, seq)

    def _feed(self, shard: str) -> ShardFetcher:
        if shard not in self._feeds:
            self._close_feeds()
            feed = self._feeds[shard] = ShardFetcher(shard, self._feeding)
            if _is_open(self._nursery):
                self._nursery.start_soon(feed.run)
        return self._feeds[shard]

    def _close_feeds(self) -> None:
        """Close the feeds of parts that there are no more, once nothing is left to fetch there."""
        shards = self.log.shards()
        for shard, feed in [*self._feeds.items()]:
            if shard not in shards and feed.idle:
                del self._feeds[shard]
                feed.scope.cancel(reason="there is no such part of the log any more")


def _is_open(nursery: trio.Nursery | None) -> TypeGuard[trio.Nursery]:
    """Whether tasks can be started there: one that is being left takes none in its last moment."""
    return nursery is not None and not nursery.cancel_scope.cancel_called
