"""A lane of the committer: group commit for the runs of one part of the log.

Each run of this process has a `WriteBuffer`, in which entries get their seq and wait. A lane takes what is pending in
all of its buffers, hands it to the log in one append, and, once the log has acknowledged it, adds it to the
runs' tails, where readers see it. It commits at once when it is idle; after a commit of many entries it waits until
`commit_spacing` is over, and after one of few for a part of that, so that load turns into larger batches instead of
more round trips.

    write ──▶ WriteBuffer: pending ──▶ one append for all runs ──▶ acknowledged ──▶ Tail ──▶ readers
                 ▲                                                 │
                 ├───────────── room for more ◀────────────────────┤
                 └──── restore, and again from the tail ◀── lost by the log

While its part cannot be reached an append is tried again and again. A run for which a full log has no room waits alone,
while the others go on. What a log has lost (a failover, a restart without its data) it is given again from the tail.

The committer: group commit on the way in, for all runs of a process.

A log may have parts that can be out of reach each on its own, the nodes of a cluster. Each has a lane here, which is a
task: whoever waits for a part that is away waits in its lane alone. A log of one part has one lane (`lane.py`).

Memory is bounded by `max_pending_bytes` for a run and `max_process_pending_bytes` for all, of which each lane has its
share: beyond them `room()` waits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from penstock.backoff import WARNING_INTERVAL, retry_while_unavailable
from penstock.errors import LogUnavailable, RunEnded
from penstock.log import AppendStatus
from penstock.observer import Commit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from penstock.log import Appended, Batch, EventLog
    from penstock.runs import Ending
    from penstock.supervisor.write_buffer import WriteBuffer

T = TypeVar("T")

LOADED: Final = 8
"""The entries of a commit from which on the next one waits for all of the spacing; after fewer for a part of it."""
FULL_PAUSE: Final = 0.5
"""Seconds until a full log is asked again whether it has room."""
AWAY_PAUSE: Final = 0.1
"""Seconds until a part is asked again that could not take one run's entries, and took others'."""


@dataclass(frozen=True, slots=True)
class Commits:
    """What all lanes of a committer have in common; see `Committer`."""

    log: EventLog
    flush_interval: float
    spacing: float
    max_pending: int
    max_process_pending: int
    on_warning: Callable[[str], None]
    on_commit: Callable[[Commit], None]
    elsewhere: Callable[[ShardCommitter, WriteBuffer], ShardCommitter]
    """Called with an buffer whose run is on another part now; the lane that it belongs to."""


class ShardCommitter:
    """The buffers whose runs are on one part of the log."""

    def __init__(self, shard: str, commits: Commits) -> None:
        self.shard = shard
        self.size = 0
        """The bytes that wait for their acknowledgement, of all its runs."""
        self.limit = commits.max_process_pending
        """What that may be: one part that is away must not take the room of the others."""
        self.room = trio.lowlevel.ParkingLot()
        """Where writers wait for less than that."""
        self.closed = False
        """There is no such part any more."""
        self._scope = trio.CancelScope()
        self._commits = commits
        self._dirty: dict[WriteBuffer, None] = {}
        self._urgent = False
        self._wake = trio.Event()
        self._load = 1.0
        """The part of the spacing that the last commit makes the next one wait."""
        self._lost: dict[WriteBuffer, None] = {}
        """Runs of which the log has lost something."""
        self._later: dict[WriteBuffer, None] = {}
        """Runs that the log could not take just now, having no room or being away, until it is asked again."""
        self._ask_again_at = inf
        self._warned_at = -inf
        self._busy = False
        self._under_way: list[WriteBuffer] = []
        """The buffers of the append that is under way."""

    @property
    def waiting(self) -> list[WriteBuffer]:
        """The buffers of which something is still to be done, apart from those that are being seen to."""
        return [
            buffer for buffer in (*self._dirty, *self._lost, *self._later) if not (buffer.settled or buffer.abandoned)
        ]

    @property
    def idle(self) -> bool:
        """There is nothing to do."""
        return not (self._busy or self.size or self.waiting)

    def mark(self, buffer: WriteBuffer, *, urgent: bool) -> None:
        """There is something to commit."""
        if buffer in self._later and not buffer.finishing:
            return
        self._dirty[buffer] = None
        if urgent or not self._commits.flush_interval:
            self._urgent = True
        self._wake.set()

    def hurry(self) -> None:
        """Whoever waits for room does not wait for a linger as well."""
        self._urgent = True
        self._wake.set()

    def drop(self, buffer: WriteBuffer) -> None:
        """Forget what is pending, and take nothing more; its owner knows. Who waits for room goes on."""
        self.size -= buffer.abandon()
        self.room.unpark_all()

    def restore(self, buffer: WriteBuffer) -> None:
        """See to it that the log is given again what it has lost of a run. Synchronous."""
        self._lost[buffer] = None
        self.hurry()

    def is_full(self, buffer: WriteBuffer) -> bool:
        """True if a write to the buffer has to wait."""
        return buffer.size >= self._commits.max_pending or self.size >= self.limit

    def close(self) -> None:
        """End it, if there is no such part any more."""
        self.closed = True
        self._scope.cancel(reason="there is no such part of the log any more")

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Commit, until cancelled or closed."""
        with self._scope:
            await self._run()

    async def _run(self) -> None:
        spacing = self._commits.spacing
        started = trio.current_time() - spacing
        while True:
            self._wake = trio.Event()
            if not self._dirty and not self._lost:
                with trio.move_on_at(self._ask_again_at):
                    await self._wake.wait()
            if not self._urgent:
                await self._linger()
            await trio.sleep_until(started + spacing * self._load)
            started, self._busy = trio.current_time(), True
            self._urgent = False
            self.limit = max(1, self._commits.max_process_pending // len(self._commits.log.shards()))
            if started >= self._ask_again_at:
                for buffer in self._later:
                    (self._dirty if buffer.entries else self._lost)[buffer] = None
                self._later, self._ask_again_at = {}, inf
            buffers, self._dirty = self._dirty, {}
            if pending := [buffer for buffer in buffers if buffer.entries and self._is_here(buffer)]:
                await self._commit(pending)
            lost, self._lost = self._lost, {}
            for buffer in lost:
                if self._is_here(buffer, lost=True):
                    await self._restore(buffer)
            self._busy = False

    async def _linger(self) -> None:
        """Wait for more to come, but not once something urgent has."""
        with trio.move_on_after(self._commits.flush_interval):
            while not self._urgent:
                self._wake = trio.Event()
                await self._wake.wait()

    def _is_here(self, buffer: WriteBuffer, *, lost: bool = False) -> bool:
        """Whether it belongs to this lane; if its run is on another part, it is handed over."""
        lane = buffer.lane
        if lane is self and not buffer.abandoned and self._commits.log.shard(buffer.run_id) != self.shard:
            self._later.pop(buffer, None)
            lane = self._commits.elsewhere(self, buffer)
        if lane is None or lane is self:
            return True
        if lost:
            lane.restore(buffer)
        else:
            lane.mark(buffer, urgent=True)
        return False

    async def _commit(self, buffers: list[WriteBuffer]) -> None:
        self._under_way = buffers
        batches_of = [(buffer, buffer.batches()) for buffer in buffers]
        self._load = min(1.0, sum(len(batch.entries) for _, batches in batches_of for batch in batches) / LOADED)
        began = trio.current_time()
        runs = entries = size = 0
        replies = iter(await self._append([batch for _, batches in batches_of for batch in batches]))
        for buffer, batches in batches_of:
            own = list(islice(replies, len(batches)))
            before = buffer.stored
            for batch, reply in zip(batches, own, strict=True):
                size += self._settle(buffer, batch, reply)
                if reply.status is not AppendStatus.OK:
                    break  # what follows a batch that is not stored is not stored either
            else:
                if buffer.entries:
                    self.mark(buffer, urgent=True)
            runs += buffer.stored > before
            entries += buffer.stored - before
        self._under_way = []
        self.room.unpark_all()
        if entries:
            self._commits.on_commit(Commit(runs, entries, size, trio.current_time() - began))

    async def _append(self, batches: list[Batch]) -> Sequence[Appended]:
        """Append, again and again while the log cannot be reached: a batch sent twice is stored once."""
        append = partial(self._commits.log.append, batches)
        return await self._patiently(append, "commit")

    async def _patiently(self, call: Callable[[], Awaitable[T]], what: str) -> T:
        """Do it, again and again while the log cannot be reached; nobody waits here for that who need not."""

        async def attempt() -> T:
            try:
                return await call()
            except LogUnavailable:
                self._let_go()
                raise

        return await retry_while_unavailable(attempt, what=what, on_warning=self._commits.on_warning)

    def _let_go(self) -> None:
        """The part is away: what waits here until it is back, and is on another part now, does not wait."""
        for buffer in self._dirty.keys() - set(self._under_way):
            if not self._is_here(buffer):
                del self._dirty[buffer]
        for buffer in self._lost.keys() - set(self._under_way):
            if not self._is_here(buffer, lost=True):
                del self._lost[buffer]

    def _settle(self, buffer: WriteBuffer, batch: Batch, reply: Appended) -> int:
        """Act on the reply to one batch; the bytes of it that are stored."""
        if buffer.abandoned:  # while the append was under way
            return 0
        match reply.status:
            case AppendStatus.OK:
                return self._acknowledge(buffer, batch, reply)
            case AppendStatus.CANCELLED:
                self.size -= buffer.unfinish()
                buffer.listener.on_completion_rejected(reply.cancel)
            case AppendStatus.FULL | AppendStatus.AWAY:
                self._ask_again(buffer, reply)
            case AppendStatus.GONE | AppendStatus.HOLE:
                self.restore(buffer)
            case AppendStatus.REFUSED:
                self._refuse(buffer, reply)
            case AppendStatus.FENCED | AppendStatus.ENDED:
                buffer.listener.on_fenced()
                self.drop(buffer)
        return 0

    def _acknowledge(self, buffer: WriteBuffer, batch: Batch, reply: Appended) -> int:
        stored = buffer.acknowledge(batch.entries)
        self.size -= stored
        if batch.ending is not None:
            buffer.listener.on_stored()
        elif reply.cancelled:
            buffer.listener.on_cancel_recorded(reply.cancel)
        return stored

    def _refuse(self, buffer: WriteBuffer, reply: Appended) -> None:
        """Give up a run that the log cannot hold."""
        self._commits.on_warning(f"cannot store run {buffer.run_id}: {reply.words}")
        buffer.listener.on_rejected()
        self.drop(buffer)

    def _ask_again(self, buffer: WriteBuffer, reply: Appended) -> None:
        """Ask the log again later; until then this run's entries wait, and only its ending does not."""
        now = trio.current_time()
        pause = AWAY_PAUSE if reply.status is AppendStatus.AWAY else FULL_PAUSE
        self._ask_again_at = min(self._ask_again_at, now + pause)
        if now - self._warned_at >= WARNING_INTERVAL:
            self._warned_at = now
            self._commits.on_warning(f"cannot commit: {reply.words}; trying again")
        self._later[buffer] = None
        if not buffer.finishing:
            self._dirty.pop(buffer, None)

    async def _restore(self, buffer: WriteBuffer) -> None:
        """Put back what the log has lost of a run, and append again what follows."""
        if buffer.abandoned or buffer.settled:
            return
        at_hand = buffer.acknowledged()
        oldest = min([buffer.stored + 1, *(entry.seq for entry in at_hand[:1])])
        restore = partial(self._commits.log.restore, buffer.run, buffer.lease, oldest)
        on_warning = self._commits.on_warning
        reply = await self._patiently(restore, f"restore run {buffer.run_id}")
        if buffer.abandoned:
            return
        match reply.status:
            case AppendStatus.OK | AppendStatus.HOLE:
                on_warning(f"the log had lost a part of run {buffer.run_id}; going on from entry {reply.seq + 1}")
                self.size += buffer.rewind(reply.seq, at_hand)
                if reply.status is AppendStatus.HOLE:
                    if buffer.ending is not None:
                        self.size -= buffer.unfinish()
                    buffer.listener.on_diverged()
                self.mark(buffer, urgent=True)
            case AppendStatus.FULL | AppendStatus.AWAY:
                self._ask_again(buffer, reply)
            case AppendStatus.REFUSED:
                self._refuse(buffer, reply)
            case _:
                buffer.listener.on_fenced()
                self.drop(buffer)


class Committer:
    """Commits what is pending in all buffers of a process.

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
        self._flush_size = flush_size
        self._max_pending = max_pending_bytes
        self._commits = Commits(
            log,
            flush_interval,
            spacing,
            max_pending_bytes,
            max_process_pending_bytes,
            on_warning,
            on_commit,
            self._hand_over,
        )
        self._lanes: dict[str, ShardCommitter] = {}
        self._nursery: trio.Nursery | None = None

    @property
    def pending_bytes(self) -> int:
        """The bytes that wait for their acknowledgement, of all runs."""
        return sum(lane.size for lane in self._lanes.values())

    @property
    def waiting(self) -> list[WriteBuffer]:
        """The buffers of which something is still to be done."""
        return [buffer for lane in self._lanes.values() for buffer in lane.waiting]

    def put(self, buffer: WriteBuffer, blocks: Sequence[bytes]) -> None:
        """Add entries to an buffer, and see to it that they are committed. Synchronous; call `room` before."""
        lane = self._lane(buffer)
        lane.size += buffer.append(blocks)
        lane.mark(buffer, urgent=len(buffer.entries) >= self._flush_size)

    def close(self, buffer: WriteBuffer, blocks: Sequence[bytes], ending: Ending) -> None:
        """Add a run's last entries, which never wait for room, with its ending."""
        lane = self._lane(buffer)
        lane.size += buffer.finish(blocks, ending)
        lane.mark(buffer, urgent=True)

    async def flush(self, buffer: WriteBuffer) -> None:
        """Commit what is pending without any linger, and wait until the log has acknowledged it. A checkpoint.

        Raises:
            RunEnded: it never will.
        """
        await trio.lowlevel.checkpoint()
        goal = buffer.seq
        if buffer.entries:
            self._lane(buffer).mark(buffer, urgent=True)
        while buffer.stored < goal:
            if buffer.abandoned:
                raise RunEnded(buffer.run_id)
            await buffer.vacancy.park()

    def abandon(self, buffer: WriteBuffer) -> None:
        """Give the run up: another owner has it."""
        if not buffer.abandoned and not buffer.settled:
            buffer.listener.on_fenced()
            self.drop(buffer)

    def drop(self, buffer: WriteBuffer) -> None:
        """Forget what is pending, and take nothing more; its owner knows. Who waits for room goes on."""
        self._lane(buffer).drop(buffer)

    def restore(self, buffer: WriteBuffer) -> None:
        """See to it that the log is given again what it has lost of a run. Synchronous."""
        self._lane(buffer).restore(buffer)

    def is_full(self, buffer: WriteBuffer) -> bool:
        """True if a write to the buffer has to wait."""
        return self._lane(buffer).is_full(buffer)

    async def room(self, buffer: WriteBuffer) -> None:
        """Wait until the buffer takes more. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while (lane := self._lane(buffer)).is_full(buffer):
            lane.hurry()
            await (buffer.vacancy if buffer.size >= self._max_pending else lane.room).park()

    def _lane(self, buffer: WriteBuffer) -> ShardCommitter:
        lane = buffer.lane
        if lane is None or lane.closed:
            lane = buffer.lane = self._lane_of(self._log.shard(buffer.run_id))
        return lane

    def _lane_of(self, shard: str) -> ShardCommitter:
        if shard not in self._lanes:
            self._close_lanes()
            lane = self._lanes[shard] = ShardCommitter(shard, self._commits)
            if self._nursery is not None and not self._nursery.cancel_scope.cancel_called:
                self._nursery.start_soon(lane.run)
        return self._lanes[shard]

    def _close_lanes(self) -> None:
        """Close the lanes of parts that there are no more, once nothing is left in them."""
        shards = self._log.shards()
        for shard, lane in [*self._lanes.items()]:
            if shard not in shards and lane.idle:
                del self._lanes[shard]
                lane.close()

    def _hand_over(self, lane: ShardCommitter, buffer: WriteBuffer) -> ShardCommitter:
        """The run is on another part now."""
        buffer.lane = other = self._lane_of(self._log.shard(buffer.run_id))
        lane.size -= buffer.size
        other.size += buffer.size
        lane.room.unpark_all()
        return other

    async def run(self) -> None:
        """Do it, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                for lane in self._lanes.values():
                    self._nursery.start_soon(lane.run)
                for shard in self._log.shards():
                    self._lane_of(shard)
                await trio.sleep_forever()
        finally:
            self._nursery = None
