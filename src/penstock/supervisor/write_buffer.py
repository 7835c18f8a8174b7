"""The write buffer: the entries of one run that the log has not acknowledged yet.

A buffer guarantees order; that nothing follows the run's ending; that the entries of an ending are stored in one step
with the last entries before them; and that a batch which has no reply yet is sent again unchanged. All of it is
synchronous. When entries are sent is the committer's decision.

A buffer is attached to the `ShardCommitter` of its run's shard, and keeps that one's count of pending bytes.

    OPEN ──finish──▶ FINISHED ──acknowledge──▶ STORED
      ▲                 │
      └────unfinish─────┘           any ──abandon──▶ ABANDONED
"""

from __future__ import annotations

import time
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

BATCH_ENTRIES: Final = 200
"""The most entries in one batch."""
BATCH_BYTES: Final = 256 * 1024
"""The size in bytes at which a batch is full (its last entry may go beyond it)."""
BATCHES: Final = 5
"""The most batches of one run in one append."""


class CommitListener(Protocol):
    """Learns what becomes of a buffer's entries. All methods are synchronous."""

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
    """What a buffer still takes, and what the log still takes from it."""

    OPEN = auto()
    """Entries can be added."""
    FINISHED = auto()
    """The run's ending is pending; nothing can be added."""
    STORED = auto()
    """The ending is stored."""
    ABANDONED = auto()
    """Nothing from here is stored any more."""


class WriteBuffer:
    """The entries of one run that the log has not acknowledged yet."""

    __slots__ = (
        "_ending_entries",
        "committer",
        "ending",
        "entries",
        "epoch",
        "lease",
        "listener",
        "run",
        "run_id",
        "seq",
        "size",
        "state",
        "stored",
        "stored_at",
        "tail",
        "vacancy",
    )

    def __init__(self, run: Run, lease: Lease, tail: Tail, listener: CommitListener) -> None:
        self.run = run
        """The record as it was when the run started."""
        self.lease = lease
        self.run_id = run.id
        self.epoch = lease.epoch
        self.tail = tail
        self.listener = listener
        self.committer: ShardCommitter | None = None
        """The worker that commits these entries, from the first use on; see `attach`."""
        self.seq = 0
        """The seq of the last entry that was added."""
        self.entries: list[Entry] = []
        self.size = 0
        """The bytes of `entries`."""
        self.ending: Ending | None = None
        self.state = BufferState.OPEN
        self.stored = 0
        """The highest seq that the log has acknowledged."""
        self.stored_at = 0.0
        """When the log last acknowledged entries, in seconds since the Unix epoch."""
        self._ending_entries = 0
        self.vacancy = trio.lowlevel.ParkingLot()
        """Where the run's producer waits for room."""

    @property
    def over(self) -> bool:
        """True once nothing more is stored from here."""
        return self.state is BufferState.STORED or self.state is BufferState.ABANDONED

    def attach(self, committer: ShardCommitter) -> None:
        """Let this worker commit the entries, and count their bytes; the worker before it counts them no longer."""
        if self.committer is not None:
            self.committer.size -= self.size
        committer.size += self.size
        self.committer = committer

    def _resize(self, delta: int) -> None:
        self.size += delta
        if self.committer is not None:
            self.committer.size += delta

    def append(self, blocks: Sequence[bytes]) -> None:
        """Give each encoded block its seq, and add it."""
        # The run drops what its producer yields too late.
        assert self.state is BufferState.OPEN, "nothing follows a run's ending"  # noqa: S101
        stamp = round(time.time() * 1000)
        added = 0
        for block in blocks:
            self.seq += 1
            entry = Entry.of(self.seq, block, stamp)
            self.entries.append(entry)
            added += len(entry.wire)
        self._resize(added)

    def finish(self, blocks: Sequence[bytes], ending: Ending) -> None:
        """Add the last blocks, with the run's ending."""
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
        """Drop the pending entries for good."""
        self._resize(-self.size)
        self.entries.clear()
        self.state = BufferState.ABANDONED
        self.vacancy.unpark_all()

    def batches(self) -> list[Batch]:
        """What the next append stores of this run, in order."""
        final = self.state is BufferState.FINISHED
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

    def acknowledged(self) -> list[Entry]:
        """The entries that the log has acknowledged and the run's tail still holds."""
        return self.tail.recent()

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
        self._resize(-removed)
        self.stored = entries[-1].seq
        if entries[-1].terminal:
            self.state = BufferState.STORED
        self.stored_at = time.time()
        self.tail.extend(entries)
        self.vacancy.unpark_all()
        return removed
