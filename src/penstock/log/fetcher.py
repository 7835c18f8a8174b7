"""The fetcher: group fetch on the way out.

Tails of this process's own runs are fed by the committer. The tails of runs that live elsewhere, if they have readers
here, are fed by this one task: a wake-up says which runs have moved, and one `fetch` brings what all of their tails
lack. Replay, live and the repair of a lost wake-up are thus one path: whatever was missed is in the next page.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Final

import trio

from penstock.errors import LogUnavailable, RunNotFound
from penstock.log.retries import patiently

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from penstock.errors import PenstockError
    from penstock.log import EventLog, Page, Wakeups
    from penstock.log.tail import Tail, Tails
    from penstock.runs import Run

LOADED: Final = 8
"""The runs of a fetch from which on the next one waits for all of the spacing; after fewer for a part of it."""
MISSING_GRACE: Final = 10.0
"""For how many seconds a run that has readers may be missing: a log that has lost it is given it again by its owner."""
MISSING_PAUSE: Final = 0.5
"""Seconds between two looks for runs that are missing."""


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
        self._spacing = spacing
        self._on_cancel = on_cancel
        self._on_reconnect = on_reconnect
        self._on_warning = on_warning
        self._released: PenstockError | None = None
        self._moved: dict[str, int] = {}
        self._missing: dict[str, float] = {}
        """The runs with readers here that the log does not have at the moment, and since when."""
        self._news = trio.Event()
        self._nursery: trio.Nursery | None = None

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
            elif self._released is not None:
                tail.release(self._released)
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

    def release(self, error: PenstockError, *, everyone: bool = False, for_now: bool = False) -> None:
        """Send away the readers of runs that live elsewhere, or of all, and those to come; ended runs are read on.

        Args:
            error: what they are told.
            everyone: the readers of this process's own runs as well.
            for_now: until `readmit`, unless readers are sent away for good already.
        """
        if not for_now or self._released is None:
            self._released = error
        for tail in self._tails.all():
            if everyone or not tail.fed:
                tail.release(error)

    def learn(self, tail: Tail, run: Run) -> None:
        """A reader has come, and has seen how far its run is; those that are there are not to read on by themselves."""
        if not tail.last or tail.last >= run.seq:
            tail.advance(run.seq, ended=run.status.terminal)
        elif not tail.fed:
            self._moved[tail.run_id] = max(run.seq, self._moved.get(tail.run_id, 0))
            self._news.set()

    def readmit(self, error: PenstockError) -> None:
        """Readers may come again, if it was `error` that released them."""
        if self._released is error:
            self._released = None
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
        if self._nursery is None:
            return None
        ahead = Ahead(after)
        self._nursery.start_soon(ahead.read, self.log, tail.run_id)
        return ahead

    async def adopt(self, run_id: str) -> None:
        """Feed a tail whose run this process has given up."""

        async def catch_up() -> None:
            async with self.reading(run_id) as tail:
                behind = {run_id: tail.last}
                while behind := await self._fetch(behind):
                    if behind.keys() <= self._missing.keys():
                        await trio.sleep(MISSING_PAUSE)

        await patiently(catch_up, what=f"follow {run_id}", on_warning=self._on_warning)

    async def run(self) -> None:
        """Do it, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._listen)
                await self._fetch_on()
        finally:
            self._nursery = None

    async def _fetch_on(self) -> None:
        """Bring what the tails lack, whenever a run has moved."""
        behind: dict[str, int] = {}
        while True:
            if behind.keys() <= self._missing.keys() and not self._moved:
                self._news = trio.Event()
                with trio.move_on_after(MISSING_PAUSE if behind else inf):
                    await self._news.wait()
            started = trio.current_time()
            # A run that cannot be caught up with must not keep the news of the others waiting.
            moved, self._moved = self._moved, {}
            for run_id, seq in moved.items():
                tail = self._tails.get(run_id)
                if tail is not None and tail.last != seq:  # less: the log has lost something, and perhaps ended it
                    behind[run_id] = tail.last
            load = min(1.0, len(behind) / LOADED)
            if behind:
                behind = await self._fetch(behind)
            await trio.sleep_until(started + self._spacing * load)

    async def _listen(self) -> None:
        """Take what the wake-ups tell, at once."""
        while True:
            news = await self._wakeups.wait()
            if news.cancel:
                self._on_cancel()
            if news.reconnected:
                self._on_reconnect()
            for run_id, seq in news.moved.items():  # a look-up may have been overtaken by a message
                self._moved[run_id] = max(seq, self._moved.get(run_id, 0))
            self._news.set()

    async def _fetch(self, behind: dict[str, int]) -> dict[str, int]:
        """Feed the tails that are behind; those that still are."""
        pages = await patiently(partial(self.log.fetch, behind), what="fetch entries", on_warning=self._on_warning)
        still: dict[str, int] = {}
        for run_id, page in pages.items():
            tail = self._tails.get(run_id)
            missing_since = self._missing.pop(run_id, trio.current_time())
            if tail is None:
                continue
            if page is None:
                if trio.current_time() - missing_since >= MISSING_GRACE:
                    gone = RunNotFound(run_id)
                    tail.release(gone)
                    self._tails.retire(gone)  # who stays all the same keeps nobody from a run that comes back
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
