"""What tests of logs, tails and readers are made of: short ways to say them, and a log that fails on demand."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import trio
from trio.testing import MockClock

from penstock.errors import LogUnavailable
from penstock.log import PAGE_BYTES, PAGE_ENTRIES, Appended, Batch, Entry, Lease, LostEnding, Page
from penstock.log.memory import MemoryLog
from penstock.runs import Ending, Run, RunError, RunStatus

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

DONE = b"data: [DONE]\n\n"
COMPLETED = Ending(RunStatus.COMPLETED, "end_turn")
FAILED = Ending(RunStatus.FAILED, "error", RunError("ERROR", "the run failed", "err-1"))
CANCELLED = Ending(RunStatus.CANCELLED, "cancelled", cancel_reason="stop")
LOST = Ending(RunStatus.LOST, "lost", RunError("RUN_LOST", "the process that ran it is gone", "err-2"))
LOST_ENDING = LostEnding([b"event: error\ndata: RUN_LOST\n\n", DONE], LOST)
LEASE = Lease("owner", "epoch", 30.0)


def entry(seq: int, size: int = 0, *, terminal: bool = False) -> Entry:
    """An entry that says which it is, `size` bytes long on the wire if that is more than it takes to say so."""
    text = b"data: entry %d" % seq
    surplus = size - len(b"id: %d\n%b\n\n" % (seq, text))
    return Entry.of(seq, text + b"." * max(surplus, 0) + b"\n\n", 1_000 + seq, terminal=terminal)


def entries(first: int, last: int, size: int = 0, *, terminal: bool = False) -> list[Entry]:
    return [entry(seq, size, terminal=terminal and seq == last) for seq in range(first, last + 1)]


def batch(
    first: int, last: int, ending: Ending | None = None, *, run_id: str = "r", epoch: str = "epoch", size: int = 0
) -> Batch:
    return Batch(run_id, epoch, entries(first, last, size, terminal=ending is not None), ending)


def seqs(taken: Sequence[Entry] | None) -> list[int]:
    """The seqs of entries, each of which is whole: it is what `entry` made, or an lost_ending's."""
    assert taken is not None
    for each in taken:
        assert each.wire.startswith(b"id: %d\n" % each.seq)
        if b"data: entry" in each.wire:
            assert each.data.startswith(b"data: entry %d" % each.seq)
            assert each.timestamp == 1_000 + each.seq
    return [each.seq for each in taken]


def record(run_id: str = "r", **members: float) -> Run:
    return Run(run_id, "producer", created_at=members.get("created_at", 5.0), metadata={"user": "u"})


class Unreliable(MemoryLog):
    """A MemoryLog that can be away, lose its replies, and be slow; and that counts the calls it gets."""

    def __init__(self, *, max_entries: int = 10_000) -> None:
        super().__init__(max_entries=max_entries)
        self.calls: Counter[str] = Counter()
        self.appended: list[tuple[float, list[tuple[str, int, int]]]] = []
        """For every append: when it came, and the run, the first and the last seq of each batch."""
        self.away = False
        """Every call fails, without effect."""
        self.lost_replies = 0
        """So many appends have their effect, and then fail."""
        self.latency = 0.0
        """Seconds between the effect of a call and its reply."""
        self.before: Callable[[str], Awaitable[None]] | None = None
        """Awaited before a call has its effect."""
        self.after: Callable[[str], Awaitable[None]] | None = None
        """Awaited between the effect of a call and its reply."""
        self.under_way = 0
        """The appends that have come and have no reply yet."""
        self.most_under_way = 0

    async def _arrive(self, call: str) -> None:
        self.calls[call] += 1
        if self.before is not None:
            await self.before(call)
        if self.away:
            await trio.lowlevel.checkpoint()
            raise LogUnavailable("away")

    async def _leave(self, call: str) -> None:
        if self.after is not None:
            await self.after(call)
        await trio.sleep(self.latency)

    async def append(self, batches: Sequence[Batch]) -> Sequence[Appended]:
        self.under_way += 1
        self.most_under_way = max(self.most_under_way, self.under_way)
        try:
            return await self._append_unreliably(batches)
        finally:
            self.under_way -= 1

    async def _append_unreliably(self, batches: Sequence[Batch]) -> Sequence[Appended]:
        self.appended.append(
            (trio.current_time(), [(each.run_id, each.entries[0].seq, each.entries[-1].seq) for each in batches])
        )
        await self._arrive("append")
        replies = await super().append(batches)
        await self._leave("append")
        if self.lost_replies:
            self.lost_replies -= 1
            raise LogUnavailable("the connection broke before the reply came")
        return replies

    async def read(
        self, run_id: str, after: int, *, max_entries: int = PAGE_ENTRIES, max_bytes: int = PAGE_BYTES
    ) -> Page:
        await self._arrive("read")
        page = await super().read(run_id, after, max_entries=max_entries, max_bytes=max_bytes)
        await self._leave("read")
        return page

    async def fetch(self, positions: Mapping[str, int]) -> Mapping[str, Page | None]:
        await self._arrive("fetch")
        pages = await super().fetch(positions)
        await self._leave("fetch")
        return pages


def in_virtual_time(main: Callable[[], Awaitable[None]]) -> None:
    trio.run(main, clock=MockClock(autojump_threshold=0))
