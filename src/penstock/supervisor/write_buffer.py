"""The buffer: what one run has written and the log has not yet acknowledged.

It guarantees order; that nothing follows the run's ending; that an ending's entries are stored in one step with the
last of what came before them; and that a batch which has no reply yet is sent again as it was. All of it is synchronous
and decides nothing about when: that is the committer's.
"""

from __future__ import annotations

import time
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
    """Whoever is told what becomes of an buffer's entries. All methods are synchronous."""

    def on_cancel_recorded(self, reason: str | None) -> None:
        """The log has a cancel request for the run."""

    def on_completion_rejected(self, reason: str | None) -> None:
        """The log refused a `completed` ending, since a cancel is on record; the buffer wants another ending."""

    def on_fenced(self) -> None:
        """The run is another's now, and the log takes nothing more from this owner; what was pending is gone."""

    def on_stored(self) -> None:
        """The ending is stored."""

    def on_diverged(self) -> None:
        """The log has lost entries that are not at hand any more; the buffer wants an ending that says so."""

    def on_rejected(self) -> None:
        """The log cannot hold the run, now or later; what was pending is gone."""


class WriteBuffer:
    """What one run has written and the log has not yet acknowledged."""

    __slots__ = (
        "_ending_entries",
        "abandoned",
        "ending",
        "entries",
        "epoch",
        "finishing",
        "lane",
        "lease",
        "listener",
        "run",
        "run_id",
        "seq",
        "settled",
        "size",
        "stored",
        "stored_at",
        "tail",
        "vacancy",
    )

    def __init__(self, run: Run, lease: Lease, tail: Tail, owner: CommitListener) -> None:
        self.run = run
        """The record as it was when the run started."""
        self.lease = lease
        self.run_id = run.id
        self.epoch = lease.epoch
        self.tail = tail
        self.listener = owner
        self.lane: ShardCommitter | None = None
        """Who commits what is here, once there is anything."""
        self.seq = 0
        """The seq that was given out last."""
        self.entries: list[Entry] = []
        self.size = 0
        """The bytes of `entries`."""
        self.ending: Ending | None = None
        self.finishing = False
        """True once nothing can be added."""
        self.abandoned = False
        """True once nothing is stored from here any more."""
        self.settled = False
        """True once the ending is stored."""
        self.stored = 0
        """The highest seq that the log has acknowledged."""
        self.stored_at = 0.0
        """When the log last acknowledged entries, in seconds since the Unix epoch."""
        self._ending_entries = 0
        self.vacancy = trio.lowlevel.ParkingLot()
        """Where whoever writes to this run waits for room."""

    def append(self, blocks: Sequence[bytes]) -> int:
        """Give each encoded block its seq; the size in bytes of what was added."""
        assert not self.finishing, "nothing follows a run's ending"  # noqa: S101  (its owner drops what comes late)
        stamp = round(time.time() * 1000)
        added = 0
        for block in blocks:
            self.seq += 1
            entry = Entry.of(self.seq, block, stamp)
            self.entries.append(entry)
            added += len(entry.wire)
        self.size += added
        return added

    def finish(self, blocks: Sequence[bytes], ending: Ending) -> int:
        """Put the last blocks, with the run's ending; the size in bytes of what was added."""
        added = self.append(blocks)
        last = self.entries[-1]
        self.entries[-1] = Entry(last.seq, last.wire, last.timestamp, terminal=True)
        self.ending, self.finishing, self._ending_entries = ending, True, len(blocks)
        return added

    def unfinish(self) -> int:
        """Take the ending back, so that another can be put; the size in bytes of what went."""
        taken = self.entries[-self._ending_entries :]
        del self.entries[-self._ending_entries :]
        removed = sum(len(entry.wire) for entry in taken)
        self.size -= removed
        self.seq -= len(taken)
        self.ending, self.finishing = None, False
        return removed

    def abandon(self) -> int:
        """Drop what is pending, for good; the size in bytes of what went."""
        removed, self.size = self.size, 0
        self.entries.clear()
        self.finishing = self.abandoned = True
        self.vacancy.unpark_all()
        return removed

    def batches(self) -> list[Batch]:
        """What the next append stores of this run, in order."""
        batches: list[Batch] = []
        start = 0
        while start < len(self.entries) and len(batches) < BATCHES:
            cut = self._cut(start)
            ending = self.ending if cut == len(self.entries) else None
            batches.append(Batch(self.run_id, self.epoch, self.entries[start:cut], ending, final=self.finishing))
            start = cut
        return batches

    def _cut(self, start: int) -> int:
        """Where the batch ends that begins there. An ending is not cut apart."""
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
        """What the log has acknowledged and this process still has: the run's tail."""
        return self.tail.recent()

    def rewind(self, seq: int, at_hand: Sequence[Entry]) -> int:
        """The log stands at `seq` again: what follows of `at_hand` is pending once more; its size in bytes."""
        if seq >= self.stored:
            return 0
        again = [entry for entry in at_hand if seq < entry.seq <= self.stored]
        self.entries[:0] = again
        self.stored = seq
        added = sum(len(entry.wire) for entry in again)
        self.size += added
        return added

    def acknowledge(self, entries: Sequence[Entry]) -> int:
        """The log has these first entries; the size in bytes of what is no longer pending."""
        del self.entries[: len(entries)]
        removed = sum(len(entry.wire) for entry in entries)
        self.size -= removed
        self.stored = entries[-1].seq
        self.settled = entries[-1].terminal
        self.stored_at = time.time()
        self.tail.extend(entries)
        self.vacancy.unpark_all()
        return removed
