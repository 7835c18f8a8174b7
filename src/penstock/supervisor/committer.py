"""The committer: group commit for all runs of a process, by one task for each shard of the log.

    write ──▶ WriteBuffer: pending ──▶ one append for all runs ──▶ acknowledged ──▶ Tail ──▶ readers
                 ▲                                                 │
                 ├───────────── room for more ◀────────────────────┤
                 └──── restore, and again from the tail ◀── lost by the log

A `ShardCommitter` commits at once when it is idle; after a commit of many entries it waits until `commit_spacing` is
over, and after one of few for a fraction of that, so that load turns into larger batches instead of more round trips.
"""

from __future__ import annotations

from functools import partial
from itertools import islice
from math import inf
from typing import TYPE_CHECKING, Final, TypeVar

import trio

from penstock.backoff import WARNING_INTERVAL, retry_while_unavailable
from penstock.errors import LogUnavailable, RunEnded
from penstock.log import AppendStatus
from penstock.log.shards import Shards, ShardWorker
from penstock.observer import Commit, notify
from penstock.supervisor.write_buffer import BufferState

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from penstock.log import Appended, Batch, EventLog
    from penstock.observer import Observer
    from penstock.runs import Ending
    from penstock.supervisor.settings import Settings
    from penstock.supervisor.write_buffer import WriteBuffer

T = TypeVar("T")

LOADED: Final = 8
"""A commit of this many entries makes the next one wait for all of the spacing; one of fewer for a fraction of it."""
FULL_PAUSE: Final = 0.5  # seconds until a full log is asked again whether it has room
AWAY_PAUSE: Final = 0.1  # seconds until a shard is asked again that took some runs' entries and could not take others'


class ShardCommitter(ShardWorker):
    """Commits what is pending in the buffers whose runs are on one shard."""

    def __init__(self, shard: str, owner: Committer) -> None:
        super().__init__(shard)
        self.size = 0  # the pending bytes of all its buffers, which keep this count themselves
        self.limit = owner.settings.max_process_pending_bytes
        """The most that `size` may be. A shard that cannot be reached must not take the room of the others."""
        self.room = trio.lowlevel.ParkingLot()
        self._owner = owner
        self._log = owner.log
        self._settings = owner.settings
        self._dirty: dict[WriteBuffer, None] = {}
        self._urgent = False
        self._wake = trio.Event()
        self._load = 1.0  # the fraction of the spacing for which the next commit waits
        self._lost: dict[WriteBuffer, None] = {}  # buffers of runs of which the log has lost something
        self._later: dict[WriteBuffer, None] = {}
        """Buffers that the log could not take at the last try, being full or out of reach."""
        self._ask_again_at = inf
        self._warned_at = -inf
        self._busy = False
        self._under_way: list[WriteBuffer] = []  # the buffers in the current append

    @property
    def idle(self) -> bool:
        waiting = (*self._dirty, *self._lost, *self._later)
        return not (self._busy or self.size or any(not buffer.over for buffer in waiting))

    def mark(self, buffer: WriteBuffer, *, urgent: bool) -> None:
        if buffer in self._later and buffer.state is BufferState.OPEN:
            return
        self._dirty[buffer] = None
        if urgent or not self._settings.flush_interval:
            self._urgent = True
        self._wake.set()

    def commit_now(self) -> None:
        self._urgent = True
        self._wake.set()

    def drop(self, buffer: WriteBuffer) -> None:
        buffer.abandon()
        self.room.unpark_all()

    def restore(self, buffer: WriteBuffer) -> None:
        self._lost[buffer] = None
        self.commit_now()

    def is_full(self, buffer: WriteBuffer) -> bool:
        return buffer.size >= self._settings.max_pending_bytes or self.size >= self.limit

    async def run(self) -> None:
        spacing = self._settings.commit_spacing
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
            self.limit = max(1, self._settings.max_process_pending_bytes // len(self._log.shards()))
            if started >= self._ask_again_at:
                for buffer in self._later:
                    (self._dirty if buffer.entries else self._lost)[buffer] = None
                self._later, self._ask_again_at = {}, inf
            buffers, self._dirty = self._dirty, {}
            if pending := [buffer for buffer in buffers if buffer.entries and self._keeps(buffer)]:
                await self._commit(pending)
            lost, self._lost = self._lost, {}
            for buffer in lost:
                if self._keeps(buffer, lost=True):
                    await self._restore(buffer)
            self._busy = False

    async def _linger(self) -> None:
        with trio.move_on_after(self._settings.flush_interval):
            while not self._urgent:
                self._wake = trio.Event()
                await self._wake.wait()

    def _keeps(self, buffer: WriteBuffer, *, lost: bool = False) -> bool:
        """True if the buffer is committed here; a buffer whose run has moved to another shard is handed over."""
        if (
            buffer.committer is self
            and buffer.state is not BufferState.ABANDONED
            and self._log.shard(buffer.run_id) != self.shard
        ):
            self._later.pop(buffer, None)
            buffer.attach(self._owner.shards.of(buffer.run_id))
            self.room.unpark_all()
        other = buffer.committer
        if other is None or other is self:
            return True
        if lost:
            other.restore(buffer)
        else:
            other.mark(buffer, urgent=True)
        return False

    async def _commit(self, buffers: list[WriteBuffer]) -> None:
        self._under_way = buffers
        batches_of = [(buffer, buffer.batches()) for buffer in buffers]
        self._load = min(1.0, sum(len(batch.entries) for _, batches in batches_of for batch in batches) / LOADED)
        began = trio.current_time()
        runs = entries = size = 0
        append = partial(self._log.append, [batch for _, batches in batches_of for batch in batches])
        replies = iter(await self._retry(append, "commit"))  # a batch that is sent twice is stored once
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
            notify(self._owner.observer.committed, Commit(runs, entries, size, trio.current_time() - began))

    async def _retry(self, call: Callable[[], Awaitable[T]], what: str) -> T:
        """Call until the shard can be reached; runs that move to another shard meanwhile do not wait for that."""

        async def attempt() -> T:
            try:
                return await call()
            except LogUnavailable:
                self._hand_over_moved()
                raise

        return await retry_while_unavailable(attempt, what=what, on_warning=self._owner.warn)

    def _hand_over_moved(self) -> None:
        for buffer in self._dirty.keys() - set(self._under_way):
            if not self._keeps(buffer):
                del self._dirty[buffer]
        for buffer in self._lost.keys() - set(self._under_way):
            if not self._keeps(buffer, lost=True):
                del self._lost[buffer]

    def _settle(self, buffer: WriteBuffer, batch: Batch, reply: Appended) -> int:
        """Act on the reply to one batch; returns how many bytes of it are stored."""
        if buffer.state is BufferState.ABANDONED:  # during the append
            return 0
        match reply.status:
            case AppendStatus.OK:
                stored = buffer.acknowledge(batch.entries)
                if batch.ending is not None:
                    buffer.listener.on_stored()
                elif reply.cancelled:
                    buffer.listener.on_cancel_recorded(reply.cancel)
                return stored
            case AppendStatus.CANCELLED:
                buffer.unfinish()
                buffer.listener.on_completion_rejected(reply.cancel)
            case AppendStatus.GONE | AppendStatus.HOLE:
                self.restore(buffer)
            case _:
                self._not_taken(buffer, reply)
        return 0

    def _not_taken(self, buffer: WriteBuffer, reply: Appended) -> None:
        """Wait with a run that the log cannot take now, or drop one that it never takes from here."""
        match reply.status:
            case AppendStatus.FULL | AppendStatus.AWAY:
                self._ask_again(buffer, reply)
            case AppendStatus.REFUSED:
                self._owner.warn(f"cannot store run {buffer.run_id}: {reply.words}")
                buffer.listener.on_rejected()
                self.drop(buffer)
            case _:  # it is fenced, or has ended
                buffer.listener.on_fenced()
                self.drop(buffer)

    def _ask_again(self, buffer: WriteBuffer, reply: Appended) -> None:
        """Ask the log again later. Until then the run's entries wait; only its ending is tried before."""
        now = trio.current_time()
        pause = AWAY_PAUSE if reply.status is AppendStatus.AWAY else FULL_PAUSE
        self._ask_again_at = min(self._ask_again_at, now + pause)
        if now - self._warned_at >= WARNING_INTERVAL:
            self._warned_at = now
            self._owner.warn(f"cannot commit: {reply.words}; trying again")
        self._later[buffer] = None
        if buffer.state is BufferState.OPEN:
            self._dirty.pop(buffer, None)

    async def _restore(self, buffer: WriteBuffer) -> None:
        """Put back from the tail what the log has lost of a run, and make the entries that follow pending again."""
        if buffer.over:
            return
        acknowledged = buffer.tail.recent()
        oldest = min([buffer.stored + 1, *(entry.seq for entry in acknowledged[:1])])
        restore = partial(self._log.restore, buffer.run, buffer.lease, oldest)
        reply = await self._retry(restore, f"restore run {buffer.run_id}")
        if buffer.state is BufferState.ABANDONED:
            return
        if reply.status not in {AppendStatus.OK, AppendStatus.HOLE}:
            self._not_taken(buffer, reply)
            return
        self._owner.warn(f"the log had lost entries of run {buffer.run_id}; going on from entry {reply.seq + 1}")
        buffer.rewind(reply.seq, acknowledged)
        if reply.status is AppendStatus.HOLE:
            if buffer.state is BufferState.FINISHED:
                buffer.unfinish()
            buffer.listener.on_diverged()
        self.mark(buffer, urgent=True)


class Committer:
    """Commits what is pending in all buffers of a process; `shards` holds the workers, and runs them."""

    def __init__(self, log: EventLog, settings: Settings, observer: Observer) -> None:
        self.log = log
        self.settings = settings
        self.observer = observer
        self.shards = Shards(log, lambda shard: ShardCommitter(shard, self))

    def warn(self, message: str) -> None:
        notify(self.observer.warning, message)

    @property
    def pending_bytes(self) -> int:
        return sum(worker.size for worker in self.shards)

    def put(self, buffer: WriteBuffer, blocks: Sequence[bytes]) -> None:
        """Add entries to a buffer, and have them committed. Synchronous; call `room` before."""
        worker = self._worker(buffer)
        buffer.append(blocks)
        worker.mark(buffer, urgent=len(buffer.entries) >= self.settings.flush_size)

    def close(self, buffer: WriteBuffer, blocks: Sequence[bytes], ending: Ending) -> None:
        worker = self._worker(buffer)
        buffer.finish(blocks, ending)
        worker.mark(buffer, urgent=True)

    async def flush(self, buffer: WriteBuffer) -> None:
        """Commit what is pending at once, and wait until the log has acknowledged it; `RunEnded` if it never will."""
        await trio.lowlevel.checkpoint()
        goal = buffer.seq
        if buffer.entries:
            self._worker(buffer).mark(buffer, urgent=True)
        while buffer.stored < goal:
            if buffer.state is BufferState.ABANDONED:
                raise RunEnded(buffer.run_id)
            await buffer.vacancy.park()

    def abandon(self, buffer: WriteBuffer) -> None:
        if not buffer.over:
            buffer.listener.on_fenced()
            self.drop(buffer)

    def drop(self, buffer: WriteBuffer) -> None:
        """Drop what is pending for good. Producers that wait for room go on."""
        self._worker(buffer).drop(buffer)

    def restore(self, buffer: WriteBuffer) -> None:
        self._worker(buffer).restore(buffer)

    def is_full(self, buffer: WriteBuffer) -> bool:
        return self._worker(buffer).is_full(buffer)

    async def room(self, buffer: WriteBuffer) -> None:
        """Wait until the buffer takes more. A checkpoint in any case."""
        await trio.lowlevel.checkpoint()
        while (worker := self._worker(buffer)).is_full(buffer):
            worker.commit_now()
            await (buffer.vacancy if buffer.size >= self.settings.max_pending_bytes else worker.room).park()

    def _worker(self, buffer: WriteBuffer) -> ShardCommitter:
        worker = buffer.committer
        if worker is None or worker.closed:
            worker = self.shards.of(buffer.run_id)
            buffer.attach(worker)
        return worker
