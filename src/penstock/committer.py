"""The committer: group commit on the way in, as one task for all runs of a process.

Each run of this process has an `Outbox`, in which entries get their seq and wait. The committer takes what is pending
in all of them, hands it to the log in one append, and, once the log has acknowledged it, adds it to the runs' tails,
where readers see it. It commits at once when it is idle; after a commit of many entries it waits until `commit_spacing`
is over, and after one of few for a part of that, so that load turns into larger batches instead of more round trips.

    write ──▶ Outbox: pending ──▶ one append for all runs ──▶ acknowledged ──▶ Tail ──▶ readers
                 ▲                                                 │
                 ├───────────── room for more ◀────────────────────┤
                 └──── restore, and again from the tail ◀── lost by the log

Memory is bounded by `max_pending_bytes` for a run and `max_process_pending_bytes` for all: beyond them `room()` waits.
While the log cannot be reached an append is tried again and again. A run for which a full log has no room waits alone,
while the others go on. What a log has lost (a failover, a restart without its data) it is given again from the tail.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Final

import trio

from penstock.errors import RunEnded
from penstock.log import AppendStatus
from penstock.log.retries import WARNING_INTERVAL, patiently
from penstock.observer import Commit

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from penstock.log import Appended, Batch, EventLog
    from penstock.outbox import Outbox
    from penstock.runs import Ending

LOADED: Final = 8
"""The entries of a commit from which on the next one waits for all of the spacing; after fewer for a part of it."""
FULL_PAUSE: Final = 0.5
"""Seconds until a full log is asked again whether it has room."""


class Committer:
    """Commits what is pending in all outboxes of a process.

    Args:
        log: where it goes.
        flush_interval: how long a commit waits for more entries to join it, in seconds.
        flush_size: the number of pending entries of one run that ends that wait.
        spacing: how long a commit is held back after the start of a large one, in seconds; after a small one, less.
        max_pending_bytes: what one run may have pending before `room()` waits.
        max_process_pending_bytes: the same for all runs together.
        on_warning: told when the log cannot be reached.
        on_commit: told of what the log has acknowledged.
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
        on_commit: Callable[[Commit], None],
    ) -> None:
        self._log = log
        self._flush_interval = flush_interval
        self._flush_size = flush_size
        self._spacing = spacing
        self._max_pending = max_pending_bytes
        self._max_process_pending = max_process_pending_bytes
        self._on_warning = on_warning
        self._on_commit = on_commit
        self._dirty: dict[Outbox, None] = {}
        self._urgent = False
        self._wake = trio.Event()
        self._size = 0
        self._load = 1.0
        """The part of the spacing that the last commit makes the next one wait."""
        self._room = trio.lowlevel.ParkingLot()
        self._lost: dict[Outbox, None] = {}
        """Runs of which the log has lost something."""
        self._without_room: dict[Outbox, None] = {}
        """Runs for which the log has no room, until it is asked again."""
        self._ask_again_at = inf
        self._warned_at = -inf

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
        if not outbox.abandoned and not outbox.settled:
            outbox.owner.run_lost()
            self.drop(outbox)

    def drop(self, outbox: Outbox) -> None:
        """Forget what is pending, and take nothing more; its owner knows. Who waits for room goes on."""
        self._size -= outbox.abandon()
        self._room.unpark_all()

    def restore(self, outbox: Outbox) -> None:
        """See to it that the log is given again what it has lost of a run. Synchronous."""
        self._lost[outbox] = None
        self._urgent = True
        self._wake.set()

    def _mark(self, outbox: Outbox, *, urgent: bool) -> None:
        if outbox in self._without_room and not outbox.closing:
            return
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
            if not self._dirty and not self._lost:
                with trio.move_on_at(self._ask_again_at):
                    await self._wake.wait()
            if not self._urgent:
                await self._linger()
            await trio.sleep_until(started + self._spacing * self._load)
            started = trio.current_time()
            self._urgent = False
            if started >= self._ask_again_at:
                for outbox in self._without_room:
                    (self._dirty if outbox.entries else self._lost)[outbox] = None
                self._without_room, self._ask_again_at = {}, inf
            outboxes, self._dirty = self._dirty, {}
            if pending := [outbox for outbox in outboxes if outbox.entries]:
                await self._commit(pending)
            lost, self._lost = self._lost, {}
            for outbox in lost:
                await self._restore(outbox)

    async def _linger(self) -> None:
        """Wait for more to come, but not once something urgent has."""
        with trio.move_on_after(self._flush_interval):
            while not self._urgent:
                self._wake = trio.Event()
                await self._wake.wait()

    async def _commit(self, outboxes: list[Outbox]) -> None:
        parts = [(outbox, outbox.batches()) for outbox in outboxes]
        self._load = min(1.0, sum(len(batch.entries) for _, batches in parts for batch in batches) / LOADED)
        began = trio.current_time()
        runs = entries = size = 0
        replies = iter(await self._append([batch for _, batches in parts for batch in batches]))
        for outbox, batches in parts:
            own = list(islice(replies, len(batches)))
            before = outbox.stored
            for batch, reply in zip(batches, own, strict=True):
                size += self._settle(outbox, batch, reply)
                if reply.status is not AppendStatus.OK:
                    break  # what follows a batch that is not stored is not stored either
            else:
                if outbox.entries:
                    self._mark(outbox, urgent=True)
            runs += outbox.stored > before
            entries += outbox.stored - before
        self._room.unpark_all()
        if entries:
            self._on_commit(Commit(runs, entries, size, trio.current_time() - began))

    async def _append(self, batches: list[Batch]) -> Sequence[Appended]:
        """Append, again and again while the log cannot be reached: a batch sent twice is stored once."""
        return await patiently(partial(self._log.append, batches), what="commit", on_warning=self._on_warning)

    def _settle(self, outbox: Outbox, batch: Batch, reply: Appended) -> int:
        """Act on the reply to one batch; the bytes of it that are stored."""
        if outbox.abandoned:  # while the append was under way
            return 0
        match reply.status:
            case AppendStatus.OK:
                return self._acknowledge(outbox, batch, reply)
            case AppendStatus.CANCELLED:
                self._size -= outbox.reopen()
                outbox.owner.completion_refused(reply.cancel)
            case AppendStatus.FULL:
                self._wait_for_room(outbox, reply)
            case AppendStatus.GONE | AppendStatus.HOLE:
                self.restore(outbox)
            case AppendStatus.REFUSED:
                self._refuse(outbox, reply)
            case AppendStatus.FENCED | AppendStatus.ENDED:
                self.abandon(outbox)
        return 0

    def _acknowledge(self, outbox: Outbox, batch: Batch, reply: Appended) -> int:
        stored = outbox.acknowledge(batch.entries)
        self._size -= stored
        if batch.ending is not None:
            outbox.owner.run_settled()
        elif reply.cancelled:
            outbox.owner.cancel_on_record(reply.cancel)
        return stored

    def _refuse(self, outbox: Outbox, reply: Appended) -> None:
        """Give up a run that the log cannot hold."""
        self._on_warning(f"cannot store run {outbox.run_id}: {reply.words}")
        outbox.owner.run_refused()
        self.drop(outbox)

    def _wait_for_room(self, outbox: Outbox, reply: Appended) -> None:
        """Ask the log again later; until then this run's entries wait, and only its ending does not."""
        now = trio.current_time()
        if not self._without_room:
            self._ask_again_at = now + FULL_PAUSE
        if now - self._warned_at >= WARNING_INTERVAL:
            self._warned_at = now
            self._on_warning(f"cannot commit: {reply.words}; trying again")
        self._without_room[outbox] = None
        if not outbox.closing:
            self._dirty.pop(outbox, None)

    async def _restore(self, outbox: Outbox) -> None:
        """Put back what the log has lost of a run, and append again what follows."""
        if outbox.abandoned or outbox.settled:
            return
        at_hand = outbox.at_hand()
        oldest = min([outbox.stored + 1, *(entry.seq for entry in at_hand[:1])])
        restore = partial(self._log.restore, outbox.run, outbox.lease, oldest)
        reply = await patiently(restore, what=f"restore run {outbox.run_id}", on_warning=self._on_warning)
        if outbox.abandoned:
            return
        match reply.status:
            case AppendStatus.OK | AppendStatus.HOLE:
                self._on_warning(f"the log had lost a part of run {outbox.run_id}; going on from entry {reply.seq + 1}")
                self._size += outbox.go_back(reply.seq, at_hand)
                if reply.status is AppendStatus.HOLE:
                    if outbox.ending is not None:
                        self._size -= outbox.reopen()
                    outbox.owner.log_diverged()
                self._mark(outbox, urgent=True)
            case AppendStatus.FULL:
                self._wait_for_room(outbox, reply)
            case AppendStatus.REFUSED:
                self._refuse(outbox, reply)
            case _:
                self.abandon(outbox)
