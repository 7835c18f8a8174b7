"""The committer: group commit on the way in, as one task for all runs of a process.

Each run of this process has an `Outbox`, in which entries get their seq and wait. The committer takes what is pending
in all of them, hands it to the log in one append, and, once the log has acknowledged it, adds it to the runs' tails,
where readers see it. It commits at once when it is idle; under load the commits start at least `commit_spacing` apart,
so that load turns into larger batches instead of more round trips.

    write ──▶ Outbox: pending ──▶ one append for all runs ──▶ acknowledged ──▶ Tail ──▶ readers
                 ▲                                                 │
                 └───────────── room for more ◀────────────────────┘

What an outbox guarantees: order; that nothing follows its ending; that an ending's entries are stored in one step with
the last of what came before them; and that a batch which has no reply yet is sent again as it was. Memory is bounded by
`max_pending_bytes` for a run and `max_process_pending_bytes` for all: beyond them `room()` waits.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final, Protocol

import trio

from penstock.errors import LogUnavailable, RunEnded
from penstock.log import AppendStatus, Batch, Entry

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from penstock.log import Appended, EventLog
    from penstock.log.tail import Tail
    from penstock.runs import Ending

BATCH_ENTRIES: Final = 200
"""The most entries of one run in one append."""
BATCH_BYTES: Final = 256 * 1024
"""The size in bytes at which a run's batch is full (its last entry may go beyond it)."""
RETRY: Final = 0.5
"""Seconds between two tries while the log cannot be reached."""


class Owner(Protocol):
    """Whoever is told what becomes of an outbox's entries. All methods are synchronous."""

    def cancel_on_record(self, reason: str | None) -> None:
        """The log has a cancel request for the run."""

    def completion_refused(self, reason: str | None) -> None:
        """The log refused a `completed` ending, since a cancel is on record; the outbox wants another ending."""

    def run_lost(self) -> None:
        """The run is another's now, and the log takes nothing more from this owner; what was pending is gone."""

    def run_settled(self) -> None:
        """The ending is stored."""


class Outbox:
    """What one run has written and the log has not yet acknowledged."""

    __slots__ = (
        "_ending_entries",
        "abandoned",
        "closing",
        "ending",
        "entries",
        "epoch",
        "owner",
        "run_id",
        "seq",
        "size",
        "stored",
        "stored_at",
        "tail",
        "vacancy",
    )

    def __init__(self, run_id: str, epoch: str, tail: Tail, owner: Owner) -> None:
        self.run_id = run_id
        self.epoch = epoch
        self.tail = tail
        self.owner = owner
        self.seq = 0
        """The seq that was given out last."""
        self.entries: list[Entry] = []
        self.size = 0
        """The bytes of `entries`."""
        self.ending: Ending | None = None
        self.closing = False
        """True once nothing can be added."""
        self.abandoned = False
        """True once nothing is stored from here any more."""
        self.stored = 0
        """The highest seq that the log has acknowledged."""
        self.stored_at = 0.0
        """When the log last acknowledged entries, in seconds since the Unix epoch."""
        self._ending_entries = 0
        self.vacancy = trio.lowlevel.ParkingLot()
        """Where whoever writes to this run waits for room."""

    def put(self, blocks: Sequence[bytes]) -> int:
        """Give each encoded block its seq; the size in bytes of what was added."""
        assert not self.closing, "nothing follows a run's ending"  # noqa: S101  (its owner drops what comes late)
        stamp = round(time.time() * 1000)
        added = 0
        for block in blocks:
            self.seq += 1
            entry = Entry.of(self.seq, block, stamp)
            self.entries.append(entry)
            added += len(entry.wire)
        self.size += added
        return added

    def close(self, blocks: Sequence[bytes], ending: Ending) -> int:
        """Put the last blocks, with the run's ending; the size in bytes of what was added."""
        added = self.put(blocks)
        last = self.entries[-1]
        self.entries[-1] = Entry(last.seq, last.wire, last.timestamp, terminal=True)
        self.ending, self.closing, self._ending_entries = ending, True, len(blocks)
        return added

    def reopen(self) -> int:
        """Take the ending back, so that another can be put; the size in bytes of what went."""
        taken = self.entries[-self._ending_entries :]
        del self.entries[-self._ending_entries :]
        removed = sum(len(entry.wire) for entry in taken)
        self.size -= removed
        self.seq -= len(taken)
        self.ending, self.closing = None, False
        return removed

    def abandon(self) -> int:
        """Drop what is pending, for good; the size in bytes of what went."""
        removed, self.size = self.size, 0
        self.entries.clear()
        self.closing = self.abandoned = True
        self.vacancy.unpark_all()
        return removed

    def batch(self) -> Batch:
        """What the next append stores of this run."""
        size = cut = 0
        for entry in self.entries[:BATCH_ENTRIES]:
            cut += 1
            size += len(entry.wire)
            if size >= BATCH_BYTES:
                break
        if self.ending is not None and cut > len(self.entries) - self._ending_entries:
            cut = len(self.entries)
        whole = cut == len(self.entries)
        return Batch(self.run_id, self.epoch, self.entries[:cut], self.ending if whole else None)

    def acknowledge(self, entries: Sequence[Entry]) -> int:
        """The log has these first entries; the size in bytes of what is no longer pending."""
        del self.entries[: len(entries)]
        removed = sum(len(entry.wire) for entry in entries)
        self.size -= removed
        self.stored = entries[-1].seq
        self.stored_at = time.time()
        self.tail.extend(entries)
        self.vacancy.unpark_all()
        return removed


class Committer:
    """Commits what is pending in all outboxes of a process.

    Args:
        log: where it goes.
        flush_interval: how long a commit waits for more entries to join it, in seconds.
        flush_size: the number of pending entries of one run that ends that wait.
        spacing: the least time between the starts of two commits, in seconds.
        max_pending_bytes: what one run may have pending before `room()` waits.
        max_process_pending_bytes: the same for all runs together.
        on_warning: told when the log cannot be reached.
    """

    def __init__(
        self,
        log: EventLog,
        *,
        flush_interval: float,
        flush_size: int,
        spacing: float,
        max_pending_bytes: int,
        max_process_pending_bytes: int,
        on_warning: Callable[[str], None],
    ) -> None:
        self._log = log
        self._flush_interval = flush_interval
        self._flush_size = flush_size
        self._spacing = spacing
        self._max_pending = max_pending_bytes
        self._max_process_pending = max_process_pending_bytes
        self._on_warning = on_warning
        self._dirty: dict[Outbox, None] = {}
        self._urgent = False
        self._wake = trio.Event()
        self._size = 0
        self._room = trio.lowlevel.ParkingLot()

    @property
    def pending_bytes(self) -> int:
        """The bytes that wait for their acknowledgement, of all runs."""
        return self._size

    def put(self, outbox: Outbox, blocks: Sequence[bytes]) -> None:
        """Add entries to an outbox, and see to it that they are committed. Synchronous; call `room` before."""
        self._size += outbox.put(blocks)
        self._mark(outbox, urgent=len(outbox.entries) >= self._flush_size)

    def close(self, outbox: Outbox, blocks: Sequence[bytes], ending: Ending) -> None:
        """Add a run's last entries, which never wait for room, with its ending."""
        self._size += outbox.close(blocks, ending)
        self._mark(outbox, urgent=True)

    async def flush(self, outbox: Outbox) -> None:
        """Commit what is pending without any linger, and wait until the log has acknowledged it. A checkpoint.

        Raises:
            RunEnded: it never will.
        """
        await trio.lowlevel.checkpoint()
        goal = outbox.seq
        if outbox.entries:
            self._mark(outbox, urgent=True)
        while outbox.stored < goal:
            if outbox.abandoned:
                raise RunEnded(outbox.run_id)
            await outbox.vacancy.park()

    def abandon(self, outbox: Outbox) -> None:
        """Give the run up: another owner has it."""
        if not outbox.abandoned:
            outbox.owner.run_lost()
            self.drop(outbox)

    def drop(self, outbox: Outbox) -> None:
        """Forget what is pending, and take nothing more; its owner knows. Who waits for room goes on."""
        self._size -= outbox.abandon()
        self._room.unpark_all()

    def _mark(self, outbox: Outbox, *, urgent: bool) -> None:
        self._dirty[outbox] = None
        if urgent or not self._flush_interval:
            self._urgent = True
        self._wake.set()

    def is_full(self, outbox: Outbox) -> bool:
        """True if a write to the outbox has to wait."""
        return outbox.size >= self._max_pending or self._size >= self._max_process_pending

    async def room(self, outbox: Outbox) -> None:
        """Wait until the outbox takes more. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while self.is_full(outbox):
            self._urgent = True  # whoever waits for room does not wait for a linger as well
            self._wake.set()
            await (outbox.vacancy if outbox.size >= self._max_pending else self._room).park()

    async def run(self) -> None:
        """Do it, until cancelled."""
        started = trio.current_time() - self._spacing
        while True:
            self._wake = trio.Event()
            if not self._dirty:
                await self._wake.wait()
            if not self._urgent:
                await self._linger()
            await trio.sleep_until(started + self._spacing)
            started = trio.current_time()
            self._urgent = False
            outboxes, self._dirty = self._dirty, {}
            if pending := [outbox for outbox in outboxes if outbox.entries]:
                await self._commit(pending)

    async def _linger(self) -> None:
        """Wait for more to come, but not once something urgent has."""
        with trio.move_on_after(self._flush_interval):
            while not self._urgent:
                self._wake = trio.Event()
                await self._wake.wait()

    async def _commit(self, outboxes: list[Outbox]) -> None:
        batches = [outbox.batch() for outbox in outboxes]
        for outbox, batch, reply in zip(outboxes, batches, await self._append(batches), strict=True):
            self._settle(outbox, batch, reply)
        self._room.unpark_all()

    async def _append(self, batches: list[Batch]) -> Sequence[Appended]:
        """Append, again and again while the log cannot be reached: a batch sent twice is stored once."""
        while True:
            try:
                return await self._log.append(batches)
            except LogUnavailable as error:
                self._on_warning(f"cannot commit: {error}; trying again in {RETRY} s")
            await trio.sleep(RETRY)

    def _settle(self, outbox: Outbox, batch: Batch, reply: Appended) -> None:
        """Act on the reply to one batch."""
        if outbox.abandoned:  # while the append was under way
            return
        if reply.status is AppendStatus.OK:
            self._size -= outbox.acknowledge(batch.entries)
            if batch.ending is not None:
                outbox.owner.run_settled()
                return
            if reply.cancelled:
                outbox.owner.cancel_on_record(reply.cancel)
            if outbox.entries:
                self._mark(outbox, urgent=True)
        elif reply.status is AppendStatus.CANCELLED:
            self._size -= outbox.reopen()
            outbox.owner.completion_refused(reply.cancel)
        else:
            self.abandon(outbox)
