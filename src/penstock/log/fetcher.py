"""The fetcher: group fetch on the way out.

Tails of this process's own runs are fed by the committer. The tails of runs that live elsewhere, if they have readers
here, are fed by one task for each part of the log (`feed.py`): a wake-up says which runs have moved, and one `fetch`
brings what all of their tails lack. Replay, live and the repair of a lost wake-up are thus one path: whatever was
missed is in the next page.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, TypeGuard

import trio

from penstock.errors import LogUnavailable, RunNotFound
from penstock.log.feed import MISSING_GRACE, MISSING_PAUSE, Feed, Feeding
from penstock.log.retries import patiently

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from penstock.errors import PenstockError
    from penstock.log import EventLog, Page, Wakeups
    from penstock.log.tail import Tail, Tails
    from penstock.runs import Run


class Ahead:
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
        self._wakeups: Wakeups
        self._on_cancel = on_cancel
        self._on_reconnect = on_reconnect
        self._on_warning = on_warning
        self._feeding = Feeding(log, tails, spacing, on_warning, self._tell)
        self._feeds: dict[str, Feed] = {}
        self._released: PenstockError | None = None
        self._away: dict[str, PenstockError] = {}
        """What readers are told whose part of the log has been away for too long."""
        self._nursery: trio.Nursery | None = None

    @property
    def waiting(self) -> list[str]:
        """The runs of which something is still to be fetched."""
        return [run_id for feed in self._feeds.values() for run_id in feed.waiting]

    def connect(self, wakeups: Wakeups) -> None:
        """Take the wake-ups, before anything is read or run."""
        self._wakeups = wakeups

    @asynccontextmanager
    async def reading(self, run_id: str) -> AsyncIterator[Tail]:
        """Use a run's tail; it is fed for as long.

        Leaving never blocks, and the last one to leave leaves nothing behind.
        """
        tail = await self.take_up(run_id)
        try:
            yield tail
        finally:
            self.give_back(tail)

    async def take_up(self, run_id: str) -> Tail:
        """Use a run's tail, which is fed until it is given back. Cancelled, it is not taken up."""
        tail = self._tails.acquire(run_id)
        try:
            if tail.fed:
                pass
            elif (gone := self._released or self._away.get(self.log.part(run_id))) is not None:
                tail.release(gone)
            else:
                await self._wakeups.subscribe(run_id)
        except BaseException:
            self.give_back(tail)
            raise
        return tail

    def give_back(self, tail: Tail) -> None:
        """One user less of a tail; the last one leaves nothing behind."""
        if self._tails.give_back(tail) and self._tails.get(tail.run_id) is None:
            self._wakeups.unsubscribe(tail.run_id)

    def release(self, error: PenstockError, *, everyone: bool = False, part: str | None = None) -> None:
        """Send away the readers of runs that live elsewhere, or of all, and those to come; ended runs are read on.

        Args:
            error: what they are told.
            everyone: the readers of this process's own runs as well.
            part: only those of runs on this part of the log, and only until `readmit`.
        """
        if part is None:
            self._released = error
        else:
            self._away[part] = error
        for tail in self._tails.all():
            if (everyone or not tail.fed) and (part is None or self.log.part(tail.run_id) == part):
                tail.release(error)

    def learn(self, tail: Tail, run: Run) -> None:
        """A reader has come, and has seen how far its run is; those that are there are not to read on by themselves."""
        if not tail.last or tail.last >= run.seq:
            tail.advance(run.seq, ended=run.status.terminal)
        elif not tail.fed:
            self._tell(tail.run_id, run.seq)

    def readmit(self, error: PenstockError, part: str) -> None:
        """Readers may come again, if it was `error` that released them."""
        if self._away.get(part) is error:
            del self._away[part]
        self._tails.retire(error)

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

        return await patiently(look, what=f"read {tail.run_id}", on_warning=self._on_warning)

    def read_ahead(self, tail: Tail, after: int) -> Ahead | None:
        """Begin to read a page that will be asked for; None if that has to wait until then. Synchronous."""
        if not _is_open(self._nursery):
            return None
        ahead = Ahead(after)
        self._nursery.start_soon(ahead.read, self.log, tail.run_id)
        return ahead

    async def adopt(self, run_id: str) -> None:
        """Feed a tail whose run this process has given up."""

        async def catch_up() -> None:
            async with self.reading(run_id) as tail:
                behind = {run_id: tail.last}
                feed = self._feed(self.log.part(run_id))
                while behind := await feed.fetch(behind):
                    if feed.is_stuck(behind):
                        await trio.sleep(MISSING_PAUSE)

        await patiently(catch_up, what=f"follow {run_id}", on_warning=self._on_warning)

    async def run(self) -> None:
        """Do it, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                for feed in self._feeds.values():
                    self._nursery.start_soon(feed.run)
                for part in self.log.parts():
                    self._feed(part)
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
        self._feed(self.log.part(run_id)).tell(run_id, seq)

    def _feed(self, part: str) -> Feed:
        if part not in self._feeds:
            self._close_feeds()
            feed = self._feeds[part] = Feed(part, self._feeding)
            if _is_open(self._nursery):
                self._nursery.start_soon(feed.run)
        return self._feeds[part]

    def _close_feeds(self) -> None:
        """Close the feeds of parts that there are no more, once nothing is left to fetch there."""
        parts = self.log.parts()
        for part, feed in [*self._feeds.items()]:
            if part not in parts and feed.idle:
                del self._feeds[part]
                feed.scope.cancel(reason="there is no such part of the log any more")


def _is_open(nursery: trio.Nursery | None) -> TypeGuard[trio.Nursery]:
    """Whether tasks can be started there: one that is being left takes none in its last moment."""
    return nursery is not None and not nursery.cancel_scope.cancel_called
