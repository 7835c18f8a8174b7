"""The fetcher: group fetch on the way out.

Tails of this process's own runs are fed by the committer. The tails of runs that live elsewhere, if they have readers
here, are fed by this one task: a wake-up says which runs have moved, and one `fetch` brings what all of their tails
lack. Replay, live and the repair of a lost wake-up are thus one path: whatever was missed is in the next page.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import trio

from penstock.errors import LogUnavailable, RunNotFound

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from penstock.errors import PenstockError
    from penstock.log import EventLog, Wakeups
    from penstock.log.tail import Tail, Tails

RETRY: float = 0.5
"""Seconds between two tries while the log cannot be reached."""


class Fetcher:
    """Keeps the tails that have readers up to date.

    Args:
        log: where entries come from.
        tails: the tails of this process.
        spacing: the least time between the starts of two fetches, in seconds.
        on_cancel: called when a cancel request has come in.
        on_warning: told when the log cannot be reached.
    """

    def __init__(
        self,
        log: EventLog,
        tails: Tails,
        *,
        spacing: float,
        on_cancel: Callable[[], None],
        on_warning: Callable[[str], None],
    ) -> None:
        self.log = log
        self._tails = tails
        self._wakeups: Wakeups
        self._spacing = spacing
        self._on_cancel = on_cancel
        self._on_warning = on_warning
        self._released: PenstockError | None = None
        self._moved: dict[str, int] = {}
        self._news = trio.Event()

    def connect(self, wakeups: Wakeups) -> None:
        """Take the wake-ups, before anything is read or run."""
        self._wakeups = wakeups

    @asynccontextmanager
    async def reading(self, run_id: str) -> AsyncIterator[Tail]:
        """Use a run's tail; it is fed for as long.

        Leaving never blocks, and the last one to leave leaves nothing behind.
        """
        tail = self._tails.acquire(run_id)
        try:
            if tail.fed:
                pass
            elif self._released is not None:
                tail.release(self._released)
            else:
                await self._wakeups.subscribe(run_id)
            yield tail
        finally:
            self.give_back(tail)

    def give_back(self, tail: Tail) -> None:
        """One user less of a tail; the last one leaves nothing behind."""
        if self._tails.give_back(tail) and self._tails.get(tail.run_id) is None:
            self._wakeups.unsubscribe(tail.run_id)

    def release(self, error: PenstockError, *, everyone: bool = False) -> None:
        """Send away the readers of runs that live elsewhere, or of all, and those to come; ended runs are read on."""
        self._released = error
        for tail in self._tails.all():
            if everyone or not tail.fed:
                tail.release(error)

    async def adopt(self, run_id: str) -> None:
        """Feed a tail whose run this process has lost to another owner."""
        while True:
            try:
                async with self.reading(run_id) as tail:
                    behind = {run_id: tail.last}
                    while behind:
                        behind = await self._fetch(behind)
            except LogUnavailable as error:
                self._on_warning(f"cannot follow {run_id}: {error}; trying again in {RETRY} s")
            else:
                return
            await trio.sleep(RETRY)

    async def run(self) -> None:
        """Do it, until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            behind: dict[str, int] = {}
            while True:
                if not behind and not self._moved:
                    self._news = trio.Event()
                    await self._news.wait()
                started = trio.current_time()
                # A run that cannot be caught up with must not keep the news of the others waiting.
                moved, self._moved = self._moved, {}
                for run_id, seq in moved.items():
                    tail = self._tails.get(run_id)
                    if tail is not None and tail.last < seq:
                        behind[run_id] = tail.last
                if behind:
                    behind = await self._fetch(behind)
                await trio.sleep_until(started + self._spacing)

    async def _listen(self) -> None:
        """Take what the wake-ups tell, at once."""
        while True:
            moved, cancel = await self._wakeups.wait()
            if cancel:
                self._on_cancel()
            self._moved.update(moved)
            self._news.set()

    async def _fetch(self, behind: dict[str, int]) -> dict[str, int]:
        """Feed the tails that are behind; those that still are."""
        try:
            pages = await self.log.fetch(behind)
        except LogUnavailable as error:
            self._on_warning(f"cannot fetch entries: {error}; trying again in {RETRY} s")
            await trio.sleep(RETRY)
            return behind
        still: dict[str, int] = {}
        for run_id, page in pages.items():
            tail = self._tails.get(run_id)
            if tail is None:
                continue
            if page is None:
                tail.release(RunNotFound(run_id))
                continue
            if page.entries:
                tail.extend(page.entries)
            else:  # trimmed away already: its readers will find that out, and nobody else waits for it
                tail.advance(page.run.seq, ended=page.run.status.terminal)
            if tail.last < page.run.seq:
                still[run_id] = tail.last
        return still
