"""The write buffer: the entries of one run that the log has not acknowledged yet.

A buffer guarantees order; that nothing follows the run's ending; that the entries of an ending are stored in one step
with the last entries before them; and that a batch which has no reply yet is sent again unchanged. It keeps the count
of pending bytes of the `ShardCommitter` that commits its entries.

    OPEN ──finish──▶ FINISHED ──acknowledge──▶ STORED
      ▲                 │
      └────unfinish─────┘           any ──abandon──▶ ABANDONED
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum, auto
from typing import TYPE_CHECKING, Final, Protocol

import trio

from penstock.log import Batch, Entry

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.log import Lease
    from penstock.runs import Ending, Run
    from penstock.supervisor.committer import ShardCommitter
    from penstock.supervisor.tail import Tail

BATCH_ENTRIES: Final = 200  # the most entries in one batch
BATCH_BYTES: Final = 256 * 1024  # the size in bytes at which a batch is full (its last entry may go beyond it)
BATCHES: Final = 5  # the most batches of one run in one append


class CommitListener(Protocol):
    """Is notified, synchronously, of what becomes of a buffer's entries."""

    def on_cancel_recorded(self, reason: str | None) -> None:
        """The log has a cancel request for the run."""

    def on_completion_rejected(self, reason: str | None) -> None:
        """The log refused a `completed` ending, since a cancel is on record; the buffer needs another ending."""

    def on_fenced(self) -> None:
        """The run has another owner, or none; the buffer drops its pending entries."""

    def on_stored(self) -> None:
        """The ending is stored."""

    def on_diverged(self) -> None:
        """The log has lost entries that the tail no longer holds; the buffer needs an ending that says so."""

    def on_rejected(self) -> None:
        """The log cannot hold the run, now or later; the buffer drops its pending entries."""


class BufferState(Enum):
    """What a buffer still takes, and what is stored of it."""

    OPEN = auto()  # entries can be added
    FINISHED = auto()  # the run's ending is pending
    STORED = auto()  # the ending is stored
    ABANDONED = auto()  # nothing from here is stored any more


@dataclass(slots=True, eq=False, repr=False)
class WriteBuffer:
    """The entries of one run that the log has not acknowledged yet."""

    run: Run  # the record as it was when the run started
    lease: Lease
    tail: Tail
    listener: CommitListener
    committer: ShardCommitter | None = None  # the worker that commits these entries, from the first use on
    seq: int = 0  # the seq of the last entry that was added
    entries: list[Entry] = field(default_factory=list)
    size: int = 0
    ending: Ending | None = None
    state: BufferState = BufferState.OPEN
    stored: int = 0  # the highest seq that the log has acknowledged
    stored_at: float = 0.0  # when the log last acknowledged entries, in seconds since the Unix epoch
    vacancy: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)
    """Where the run's producer waits for room."""
    run_id: str = field(init=False)
    epoch: str = field(init=False)
    _ending_entries: int = 0

    def __post_init__(self) -> None:
        self.run_id, self.epoch = self.run.id, self.lease.epoch

    @property
    def over(self) -> bool:
        """True once nothing more is stored from here."""
        return self.state is BufferState.STORED or self.state is BufferState.ABANDONED

    def attach(self, committer: ShardCommitter) -> None:
        """Let this worker commit the entries, and count their bytes, in place of the worker before it."""
        if self.committer is not None:
            self.committer.size -= self.size
        committer.size += self.size
        self.committer = committer

    def _resize(self, delta: int) -> None:
        assert self.committer is not None, "the committer attaches a worker before its first call"  # noqa: S101
        self.size += delta
        self.committer.size += delta

    def append(self, blocks: Sequence[bytes]) -> None:
        # The run drops what its producer yields too late.
        assert self.state is BufferState.OPEN, "nothing follows a run's ending"  # noqa: S101
        stamp = round(time.time() * 1000)
        added = 0
        for block in blocks:
            self.seq += 1
            entry = Entry.of(self.seq, block, stamp)
            self.entries.append(entry)
            added += len(entry.wire)
        self.size += added
        assert self.committer is not None  # noqa: S101
        self.committer.size += added

    def finish(self, blocks: Sequence[bytes], ending: Ending) -> None:
        self.append(blocks)
        last = self.entries[-1]
        self.entries[-1] = Entry(last.seq, last.wire, last.timestamp, terminal=True)
        self.ending, self.state, self._ending_entries = ending, BufferState.FINISHED, len(blocks)

    def unfinish(self) -> None:
        """Take back the ending and its entries, so that another ending can be added."""
        taken = self.entries[-self._ending_entries :]
        del self.entries[-self._ending_entries :]
        self._resize(-sum(len(entry.wire) for entry in taken))
        self.seq -= len(taken)
        self.ending, self.state = None, BufferState.OPEN

    def abandon(self) -> None:
        self._resize(-self.size)
        self.entries.clear()
        self.state = BufferState.ABANDONED
        self.vacancy.unpark_all()

    def batches(self) -> list[Batch]:
        """What the next append stores of this run, in order."""
        final = self.ending is not None
        batches: list[Batch] = []
        start = 0
        while start < len(self.entries) and len(batches) < BATCHES:
            cut = self._cut(start)
            ending = self.ending if cut == len(self.entries) else None
            batches.append(Batch(self.run_id, self.epoch, self.entries[start:cut], ending, final=final))
            start = cut
        return batches

    def _cut(self, start: int) -> int:
        """The end of the batch that begins at `start`. The entries of an ending stay together."""
        size, cut = 0, start
        for entry in self.entries[start : start + BATCH_ENTRIES]:
            cut += 1
            size += len(entry.wire)
            if size >= BATCH_BYTES:
                break
        if self.ending is not None and cut > len(self.entries) - self._ending_entries:
            return len(self.entries)
        return cut

    def rewind(self, seq: int, acknowledged: Sequence[Entry]) -> None:
        """Make the entries after `seq` pending again: the log has lost them."""
        if seq >= self.stored:
            return
        again = [entry for entry in acknowledged if seq < entry.seq <= self.stored]
        self.entries[:0] = again
        self.stored = seq
        self._resize(sum(len(entry.wire) for entry in again))

    def acknowledge(self, entries: Sequence[Entry]) -> int:
        """Show these first entries to readers, now that the log has them; their size in bytes."""
        del self.entries[: len(entries)]
        removed = sum(len(entry.wire) for entry in entries)
        self.size -= removed
        assert self.committer is not None  # noqa: S101  (it is a worker that calls)
        self.committer.size -= removed
        self.stored = entries[-1].seq
        if entries[-1].terminal:
            self.state = BufferState.STORED
        self.stored_at = time.time()
        self.tail.extend(entries)
        self.vacancy.unpark_all()
        return removed
