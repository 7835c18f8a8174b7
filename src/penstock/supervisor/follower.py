"""The follower: one reader of one run, replay and live without a seam.

A follower is a cursor. It takes what follows the cursor from the run's tail; if the tail does not reach back that far
it reads a page from the log; if there is nothing yet it waits at the tail. It ends with the terminal entry, or with an
exception. Cancelling it loses nothing: the cursor moves only in the step that returns the entries. It holds no cancel
scope and no nursery, so it may be entered in one task and left in another.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Final, Self

import trio

from penstock.errors import CursorExpired, TooManyReaders, TooManyReadersOfRun
from penstock.log import PAGE_BYTES, PAGE_ENTRIES, Entry

if TYPE_CHECKING:
    from types import TracebackType

    from penstock.supervisor.fetcher import Fetcher, Prefetch
    from penstock.supervisor.tail import Tail
    from penstock.supervisor.timers import Timers


class Readers:
    """Counts the readers of one process and what they have got, and limits their number."""

    def __init__(self, *, most: int, most_of_a_run: int) -> None:
        self.entries = 0
        self.bytes = 0
        """The bytes of these entries, as they go on the wire."""
        self._most = most
        self._most_of_a_run = most_of_a_run
        self._of_runs: Counter[str] = Counter()
        self.live = 0

    def come(self, run_id: str) -> None:
        """Count a new reader, or raise `TooManyReaders` or `TooManyReadersOfRun`."""
        if self.live >= self._most:
            raise TooManyReaders(f"this process has {self.live} readers, as many as max_readers allows")
        if self._of_runs[run_id] >= self._most_of_a_run:
            raise TooManyReadersOfRun(
                f"run {run_id!r} has {self._of_runs[run_id]} readers here, as many as there may be; come back later"
            )
        self.live += 1
        self._of_runs[run_id] += 1

    def go(self, run_id: str) -> None:
        self.live -= 1
        self._of_runs[run_id] -= 1
        if not self._of_runs[run_id]:
            del self._of_runs[run_id]


RESTORING_PAUSE: Final = 0.5
"""Seconds after which a reader looks again at a log that has lost entries."""
BODY_BYTES: Final = 64 * 1024
"""The default limit of `next_body`."""


class Follower:
    """A reader of a run: an async context manager, and inside its block an async iterator of `Entry`.

    Made by `Supervisor.follow`. Entering it looks up the run, and is a checkpoint. Iterating it is a checkpoint at
    least once in every page; cancelling it loses no entry. Leaving it never blocks, and may happen in another task.

    Attributes:
        run_id: the run.
        cursor: the seq of the last entry that was returned.
        at_end: known after entering: the run has ended, and the cursor is at or past its end, so nothing follows.

    Raises:
        RunNotFound: on entering: there is no such run; later: its history has expired.
        TooManyReaders: on entering: this process has `max_readers` readers, or `max_readers_per_run` of this run.
        CursorExpired: the entries after the cursor have been trimmed, on entering or later.
        ReaderReleased: this process no longer serves readers of this run.
        SupervisorFailed: a service of the supervisor died.
        LogUnavailable: on entering: the log cannot be reached. Later on a reader waits for it.
        RuntimeError: it is iterated before it was entered, or after it was left.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        run_id: str,
        *,
        readers: Readers,
        after: int = 0,
        last: int | None = None,
        clock: Timers | None = None,
    ) -> None:
        if isinstance(after, bool) or not isinstance(after, int) or after < 0:
            raise ValueError(f"a cursor is a whole number from 0, not {after!r}")
        if last is not None and (isinstance(last, bool) or not isinstance(last, int) or last < 0):
            raise ValueError(f"the last N entries: N is a whole number from 0, not {last!r}")
        self.run_id = run_id
        self.cursor = after
        self.at_end = False
        self.clock = clock
        """The supervisor's timers: a response that sends the entries needs no task of its own to send pings."""
        self._last = last
        self._fetcher = fetcher
        self._readers = readers
        self._tail: Tail | None = None
        self._page: list[Entry] = []
        self._next = 0
        self._ahead: Prefetch | None = None

    async def __aenter__(self) -> Self:
        if self._tail is not None:
            raise RuntimeError("this follower has been entered already")
        self._readers.come(self.run_id)
        try:
            tail = await self._fetcher.acquire(self.run_id)
            try:
                await self._look_up(tail)
            except BaseException:
                self._fetcher.release(tail)
                raise
        except BaseException:
            self._readers.go(self.run_id)
            raise
        self._tail = tail
        return self

    async def _look_up(self, tail: Tail) -> None:
        page = await self._fetcher.log.read(self.run_id, self.cursor)
        if tail.released is not None and not page.run.status.terminal:
            raise tail.released
        self._fetcher.note_last_seq(tail, page.run)
        if self._last is not None:
            self.cursor = max(self.cursor, page.run.seq - self._last, page.oldest_seq - 1)
        elif self.cursor < page.oldest_seq - 1:
            raise CursorExpired(self.run_id, self.cursor, page.oldest_seq)
        else:
            self._page = list(page.entries)
        self.at_end = page.run.status.terminal and self.cursor >= page.run.seq

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        tail, self._tail = self._tail, None
        self._page, self._next, self._ahead = [], 0, None
        if tail is not None:
            self._fetcher.release(tail)
            self._readers.go(self.run_id)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Entry:
        if self._next >= len(self._page):
            await self._fill()
        if self._next >= len(self._page):
            raise StopAsyncIteration
        entry = self._page[self._next]
        self._next += 1
        self.cursor = entry.seq
        self._readers.entries += 1
        self._readers.bytes += len(entry.wire)
        return entry

    async def next_body(self, limit: int = BODY_BYTES) -> bytes:
        """The entries that are ready, joined as they go on the wire. A checkpoint at least once in every page.

        Args:
            limit: the most bytes; a single entry that is larger comes alone, and whole.

        Returns:
            At least one entry; `b""` at the end of the run. What iterating raises, this raises, too.
        """
        if self._next >= len(self._page):
            await self._fill(limit)
        if len(self._page) == self._next + 1:  # one event at a time is the common case of a live reader
            entry = self._page[self._next]
            self._next += 1
            self.cursor = entry.seq
            self._readers.entries += 1
            self._readers.bytes += len(entry.wire)
            return entry.wire
        taken: list[bytes] = []
        size = 0
        index = self._next
        while index < len(self._page):
            wire = self._page[index].wire
            size += len(wire)
            if taken and size > limit:
                break
            taken.append(wire)
            index += 1
        body = b"".join(taken)
        if taken:
            self.cursor = self._page[index - 1].seq
            self._next = index
            self._readers.entries += len(taken)
            self._readers.bytes += len(body)
        return body

    async def _fill(self, max_bytes: int = PAGE_BYTES) -> None:
        """Get the next page from the tail, or from the log, or wait for it. At the end of the run it stays empty."""
        tail = self._tail
        if tail is None:
            raise RuntimeError("a follower is iterated inside its own `async with` block")
        self._page, self._next = [], 0
        if self.cursor < tail.last or tail.ended or tail.released is not None:
            await trio.lowlevel.checkpoint()  # else waiting is one
        while True:
            taken = tail.take(self.cursor, max_entries=PAGE_ENTRIES, max_bytes=max_bytes)
            if taken is None:
                taken = await self._read(tail)
            if taken:
                self._page = taken
                return
            if tail.ended:
                return
            if tail.released is not None:
                raise tail.released
            if self.cursor >= tail.last:
                await tail.wait()
                continue
            # The tail is further than the log: the log has lost entries, which the run's owner puts back. The
            # notifications of that may say nothing new.
            with trio.move_on_after(RESTORING_PAUSE):
                await tail.wait()

    async def _read(self, tail: Tail) -> list[Entry]:
        """A page from the log. If another one follows, it is read while this one is used."""
        ahead, self._ahead = self._ahead, None
        page = await ahead.page() if ahead is not None and ahead.after == self.cursor else None
        if page is None or not page.entries:  # the log may have lost them for a moment
            page = await self._fetcher.read(tail, self.cursor)
        if self.cursor < page.oldest_seq - 1:
            raise CursorExpired(self.run_id, self.cursor, page.oldest_seq)
        entries = list(page.entries)
        if entries and tail.take(entries[-1].seq, max_entries=1, max_bytes=1) is None:
            self._ahead = self._fetcher.read_ahead(tail, entries[-1].seq)
        return entries
