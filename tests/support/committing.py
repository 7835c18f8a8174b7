"""A committer at work in a test: a real one, on a log that can fail, with owners that take notes."""

from __future__ import annotations

from contextlib import asynccontextmanager
from dataclasses import replace
from math import inf
from typing import TYPE_CHECKING, Any

import trio

from penstock.log.ring import Ring
from penstock.observer import NullObserver
from penstock.runs import Ending, RunError, RunStatus
from penstock.supervisor.committer import Committer
from penstock.supervisor.settings import Settings
from penstock.supervisor.tail import Tails
from penstock.supervisor.write_buffer import BufferState, WriteBuffer
from tests.support.logs import CANCELLED, DONE, LEASE, Unreliable, record, seqs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from penstock.log import Entry
    from penstock.log.memory import MemoryLog
    from penstock.observer import Commit
    from penstock.supervisor.tail import Tail

MIB = 1024 * 1024
GUARD = 20_000
"""Seconds after which a test that waits for what will never be stored has failed."""
DIVERGED = Ending(RunStatus.FAILED, "error", RunError("LOG_DIVERGED", "the log lost a part of this run", "err-3"))


class Owner:
    def __init__(self, works: Works) -> None:
        self.works = works
        self.told: list[str] = []
        self.news = trio.lowlevel.ParkingLot()
        self.buffer: WriteBuffer

    def note(self, line: str) -> None:
        self.told.append(line)
        self.news.unpark_all()

    def on_cancel_recorded(self, reason: str | None) -> None:
        self.note(f"cancel: {reason}")

    def on_completion_rejected(self, reason: str | None) -> None:
        self.note(f"refused: {reason}")
        self.works.committer.close(self.buffer, [b"event: cancelled\ndata: {}\n\n", DONE], CANCELLED)

    def on_fenced(self) -> None:
        self.note("lost")

    def on_stored(self) -> None:
        self.note("settled")

    def on_diverged(self) -> None:
        self.note("diverged")
        if self.buffer.state is BufferState.OPEN:
            self.works.committer.close(self.buffer, [b"event: error\ndata: LOG_DIVERGED\n\n", DONE], DIVERGED)

    def on_rejected(self) -> None:
        self.note("cannot be stored")


class Works(NullObserver):
    def __init__(self, log: Unreliable, *, tail_entries: int = 100_000, **settings: Any) -> None:
        self.log = log
        self.tails = Tails(max_entries=tail_entries, max_bytes=100 * MIB, max_process_bytes=1000 * MIB)
        self.warnings: list[str] = []
        self.commits: list[Commit] = []
        self.owners: dict[str, Owner] = {}
        self.committer = Committer(log, Settings.of(settings), self)
        self.start = trio.current_time()

    def warning(self, message: str) -> None:
        self.warnings.append(message)

    def committed(self, commit: Commit) -> None:
        self.commits.append(commit)

    async def run(self, run_id: str = "r", epoch: str = LEASE.epoch) -> WriteBuffer:
        await self.log.start(record(run_id), LEASE)
        return self.buffer(run_id, epoch)

    def buffer(self, run_id: str, epoch: str = LEASE.epoch) -> WriteBuffer:
        owner = self.owners[run_id] = Owner(self)
        tail = self.tails.acquire(run_id)
        tail.fed = True
        owner.buffer = WriteBuffer(record(run_id), replace(LEASE, epoch=epoch), tail, owner)
        return owner.buffer

    def put(self, buffer: WriteBuffer, count: int = 1, size: int = 0) -> None:
        """Write so many entries, each `size` bytes long on the wire."""
        for seq in range(buffer.seq + 1, buffer.seq + 1 + count):
            block = b"data: " + b"x" * (size - len(b"id: %d\ndata: \n\n" % seq)) + b"\n\n"
            self.committer.put(buffer, [block])

    async def write(self, buffer: WriteBuffer, count: int = 1, size: int = 0) -> None:
        for _ in range(count):
            await self.committer.room(buffer)
            self.put(buffer, 1, size)

    async def settled(self, run_id: str = "r", told: str = "settled") -> None:
        owner = self.owners[run_id]
        with trio.fail_after(60):
            while told not in owner.told:
                await owner.news.park()

    async def stored(self, run_id: str = "r") -> list[int]:
        """What the log has of a run, which must be whole."""
        page = await self.log.read(run_id, 0, max_entries=100_000, max_bytes=1000 * MIB)
        assert seqs(page.entries) == list(range(1, page.run.seq + 1))
        assert [each.seq for each in page.entries if each.terminal] == ([page.run.seq] if page.run.ended_at else [])
        return seqs(page.entries)

    def sent(self, run_id: str = "r") -> list[list[tuple[int, int]]]:
        """Of every append that had something of a run: the first and the last seq of each of its batches, in order."""
        sent = ([(first, last) for run, first, last in batches if run == run_id] for _, batches in self.log.appended)
        return [batches for batches in sent if batches]

    @property
    def appends(self) -> list[float]:
        return [when - self.start for when, _ in self.log.appended]


def shown(tail: Tail) -> Sequence[Entry]:
    taken = tail.take(0, max_entries=100_000, max_bytes=1000 * MIB)
    assert taken is not None
    return taken


def forget(log: MemoryLog, *run_ids: str) -> None:
    """The log loses all that it has of these runs; of every run, if none is named."""
    for run_id in run_ids or list(log._runs):
        log._size -= log._runs[run_id].ring.size
        del log._runs[run_id]
        log._ended.pop(run_id, None)


def lose_last(log: MemoryLog, run_id: str, count: int) -> None:
    """The log loses the last so many entries of a run, and what it knew of its end."""
    stored = log._runs[run_id]
    first, last = stored.ring.first, max(stored.ring.last - count, stored.ring.first - 1)
    kept = Ring(first - 1)
    if last >= first:
        kept.extend(stored.ring.after(first - 1, max_entries=last - first + 1, max_bytes=MIB * MIB))
    log._size -= stored.ring.size - kept.size
    stored.ring, stored.ended_at = kept, inf
    stored.run = replace(
        stored.run, seq=kept.last, status=RunStatus.RUNNING, stop_reason=None, error=None, ended_at=None
    )
    log._ended.pop(run_id, None)


@asynccontextmanager
async def committing(log: Unreliable | None = None, **settings: Any) -> AsyncIterator[Works]:
    works = Works(Unreliable() if log is None else log, **settings)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(works.committer.shards.run)
        with trio.fail_after(GUARD):  # noqa: ASYNC100  (the test's own checkpoints)
            yield works
        nursery.cancel_scope.cancel()
