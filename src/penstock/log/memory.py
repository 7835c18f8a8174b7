"""MemoryLog: the event log of one process, which ends with it.

Every operation does its whole work in one step after one checkpoint: it is atomic, and a cancelled call has not
happened. Several supervisors of the same process may share one MemoryLog.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Final

import trio

from penstock.errors import ConfigurationError, IdempotencyConflict, RunExists, RunNotFound
from penstock.log import (
    PAGE_BYTES,
    PAGE_ENTRIES,
    Appended,
    AppendStatus,
    Batch,
    CancelReply,
    CancelStatus,
    Entry,
    Idempotency,
    Lease,
    LostEnding,
    Notification,
    Page,
    Started,
)
from penstock.log.ring import Ring

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from penstock.runs import Ending, Run, RunStatus

RUN_OVERHEAD: Final = 2048
"""The bytes that `max_bytes` counts for a run besides its entries, so that it bounds many small runs, too."""


@dataclass(slots=True)
class _Stored:
    run: Run
    lease: Lease
    lease_end: float
    idempotency: Idempotency | None
    cancel_requested: bool = False
    ended_at: float = math.inf
    ring: Ring = field(default_factory=Ring)


class MemoryLog:
    """An `EventLog` in this process's memory.

    Args:
        max_entries: the most entries that are kept of one run; the oldest go first.
        max_run_bytes: the most bytes that are kept of one run; its newest entry is kept whatever its size.
        max_bytes: the most bytes that are kept of all runs. The oldest *ended* runs go first, and then the oldest
            entries of the run that is being written.
        ttl: seconds for which an ended run is kept; a running one does not expire.

    Raises `ConfigurationError` if a limit is not above 0.
    """

    def __init__(
        self,
        *,
        max_entries: int = 10_000,
        max_run_bytes: int = 64 * 1024 * 1024,
        max_bytes: int = 1024 * 1024 * 1024,
        ttl: float = 10_800.0,
    ) -> None:
        limits = {"max_entries": max_entries, "max_run_bytes": max_run_bytes, "max_bytes": max_bytes, "ttl": ttl}
        for name, value in limits.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
                raise ConfigurationError(f"{name} is a number above 0, not {value!r}")
            if name != "ttl" and not isinstance(value, int):
                raise ConfigurationError(f"{name} is a whole number, not {value!r}")
        self._max_entries = max_entries
        self._max_run_bytes = max_run_bytes
        self._max_bytes = max_bytes
        self._ttl = ttl
        self._size = 0
        self._runs: dict[str, _Stored] = {}
        self._ended: OrderedDict[str, _Stored] = OrderedDict()
        self._keys: dict[str, str] = {}
        self._inboxes: dict[str, dict[str, str | None]] = {}
        self._wakeups: dict[str, _MemoryNotifications] = {}

    async def start(self, run: Run, lease: Lease, idempotency: Idempotency | None = None) -> Started:
        await trio.lowlevel.checkpoint()
        self._expire()
        if idempotency is not None and (known := self._keys.get(idempotency.key)) is not None:
            stored = self._runs[known]
            if stored.idempotency is None or stored.idempotency.fingerprint != idempotency.fingerprint:
                raise IdempotencyConflict(idempotency.key, known)
            return Started(stored.run, created=False)
        if (there := self._runs.get(run.id)) is not None:
            raise RunExists(there.run)
        run = replace(run, started_at=time.time())
        self._runs[run.id] = _Stored(run, lease, trio.current_time() + lease.seconds, idempotency)
        if idempotency is not None:
            self._keys[idempotency.key] = run.id
        self._size += RUN_OVERHEAD
        self._make_room()
        return Started(run, created=True)

    async def append(self, batches: Sequence[Batch]) -> Sequence[Appended]:
        await trio.lowlevel.checkpoint()
        self._expire()
        return [self._append(batch) for batch in batches]

    def _append(self, batch: Batch) -> Appended:
        stored = self._runs.get(batch.run_id)
        if stored is None:
            return Appended(AppendStatus.GONE)
        run, last = stored.run, stored.ring.last
        cancel = run.cancel_reason if stored.cancel_requested else None
        status = AppendStatus.OK
        if stored.lease.epoch != batch.epoch:
            status = AppendStatus.FENCED
        elif run.status.terminal:
            status = AppendStatus.OK if batch.entries[-1].seq <= last else AppendStatus.ENDED
        elif batch.entries[0].seq > last + 1:
            status = AppendStatus.HOLE
        elif batch.ending is not None and batch.ending.status == "completed" and stored.cancel_requested:
            status = AppendStatus.CANCELLED
        else:
            self._store(stored, batch.entries, batch.ending)
            stored.lease_end = trio.current_time() + stored.lease.seconds
        return Appended(status, stored.ring.last, cancel=cancel, cancelled=stored.cancel_requested)

    def _store(self, stored: _Stored, entries: Sequence[Entry], ending: Ending | None) -> None:
        ring, before = stored.ring, stored.ring.size
        ring.extend(entries)
        ring.trim(self._max_entries, max(self._max_run_bytes, len(entries[-1].wire)))
        self._size += ring.size - before
        if ending is None:
            stored.run = replace(stored.run, seq=ring.last)
        else:
            stored.run = stored.run.ended(ending, seq=ring.last, at=time.time())
            stored.ended_at = trio.current_time()
            self._ended[stored.run.id] = stored
        self._make_room(stored)
        for wakeups in self._wakeups.values():
            wakeups.moved(stored.run.id, ring.last)

    async def read(
        self, run_id: str, after: int, *, max_entries: int = PAGE_ENTRIES, max_bytes: int = PAGE_BYTES
    ) -> Page:
        await trio.lowlevel.checkpoint()
        return self._page(self._find(run_id), after, max_entries, max_bytes)

    async def fetch(self, positions: Mapping[str, int]) -> Mapping[str, Page | None]:
        await trio.lowlevel.checkpoint()
        self._expire()
        return {
            run_id: self._page(stored, after, PAGE_ENTRIES, PAGE_BYTES)
            if (stored := self._runs.get(run_id)) is not None
            else None
            for run_id, after in positions.items()
        }

    @staticmethod
    def _page(stored: _Stored, after: int, max_entries: int, max_bytes: int) -> Page:
        ring = stored.ring
        start = max(after, ring.first - 1)
        entries = ring.after(start, max_entries=max_entries, max_bytes=max_bytes) if start < ring.last else []
        return Page(stored.run, entries, max(ring.first, min(after, ring.last) + 1))

    async def get(self, run_id: str) -> Run:
        await trio.lowlevel.checkpoint()
        return self._find(run_id).run

    async def list(self, *, limit: int = 50, status: RunStatus | None = None) -> Sequence[Run]:
        await trio.lowlevel.checkpoint()
        self._expire()
        runs = (stored.run for stored in reversed(self._runs.values()))
        return [*islice((run for run in runs if status is None or run.status == status), limit)]

    async def request_cancel(self, run_id: str, reason: str | None) -> CancelReply:
        await trio.lowlevel.checkpoint()
        stored = self._find(run_id)
        if stored.run.status.terminal:
            return CancelReply(CancelStatus.ENDED, stored.run)
        if stored.cancel_requested:
            return CancelReply(CancelStatus.REPEATED, stored.run)
        stored.cancel_requested = True
        stored.run = replace(stored.run, cancel_reason=reason)
        owner = stored.lease.owner
        if owner in self._wakeups:
            self._inboxes.setdefault(owner, {})[run_id] = reason
            self._wakeups[owner].cancel_came()
        return CancelReply(CancelStatus.REQUESTED, stored.run)

    async def cancel_requests(self, owner: str) -> Mapping[str, str | None]:
        await trio.lowlevel.checkpoint()
        return self._inboxes.pop(owner, {})

    async def renew(self, owner: str, epochs: Mapping[str, str], seconds: float) -> Mapping[str, AppendStatus]:  # noqa: ARG002
        await trio.lowlevel.checkpoint()
        self._expire()
        return {run_id: self._renew(self._runs.get(run_id), epoch, seconds) for run_id, epoch in epochs.items()}

    @staticmethod
    def _renew(stored: _Stored | None, epoch: str, seconds: float) -> AppendStatus:
        if stored is None:
            return AppendStatus.GONE
        if stored.lease.epoch != epoch:
            return AppendStatus.FENCED
        if stored.run.status.terminal:
            return AppendStatus.ENDED
        stored.lease_end = trio.current_time() + seconds
        return AppendStatus.OK

    async def restore(self, run: Run, lease: Lease, oldest: int) -> Appended:
        await trio.lowlevel.checkpoint()
        self._expire()
        stored = self._runs.get(run.id)
        if stored is None:
            stored = self._runs[run.id] = _Stored(run, lease, 0.0, None)
            self._size += RUN_OVERHEAD
        if stored.lease.epoch != lease.epoch:
            return Appended(AppendStatus.FENCED)
        if stored.run.status.terminal:
            return Appended(AppendStatus.ENDED, stored.ring.last)
        stored.lease_end = trio.current_time() + lease.seconds
        lost = stored.ring.last < oldest - 1
        if lost:
            self._size -= stored.ring.size
            stored.ring = Ring(oldest - 1)
        stored.run = replace(stored.run, seq=stored.ring.last)
        return Appended(AppendStatus.HOLE if lost else AppendStatus.OK, stored.ring.last)

    async def reap(
        self,
        lost_ending: Callable[[], LostEnding],
        *,
        shard: str | None = None,  # noqa: ARG002
        ready: Callable[[str], bool] | None = None,  # noqa: ARG002
    ) -> Sequence[str]:
        now = trio.current_time()  # before the checkpoint: a lease that expires during it is not due for this caller
        await trio.lowlevel.checkpoint()
        self._expire()
        lost = [s for s in self._runs.values() if not s.run.status.terminal and s.lease_end < now]
        for stored in lost:
            ending = lost_ending()
            stored.lease = replace(stored.lease, epoch="")
            last, stamp = stored.ring.last, round(time.time() * 1000)
            entries = [Entry.of(last + n, data, stamp) for n, data in enumerate(ending.blocks, 1)]
            self._store(stored, [*entries[:-1], entries[-1]._replace(terminal=True)], ending.ending)
        return [stored.run.id for stored in lost]

    @asynccontextmanager
    async def wakeups(self, owner: str) -> AsyncIterator[_MemoryNotifications]:
        self._wakeups[owner] = wakeups = _MemoryNotifications()
        try:
            yield wakeups
        finally:
            del self._wakeups[owner]
            self._inboxes.pop(owner, None)

    def shard(self, run_id: str) -> str:  # noqa: ARG002
        return ""

    def shards(self) -> Sequence[str]:
        return ("",)

    async def check(self, shard: str | None = None) -> None:  # noqa: ARG002
        await trio.lowlevel.checkpoint()

    def _find(self, run_id: str) -> _Stored:
        self._expire()
        try:
            return self._runs[run_id]
        except KeyError:
            raise RunNotFound(run_id) from None

    def _expire(self) -> None:
        """Drop the ended runs that have expired; `_ended` holds them in the order in which they ended."""
        expired = trio.current_time() - self._ttl
        while self._ended and next(iter(self._ended.values())).ended_at <= expired:
            self._drop_oldest()

    def _make_room(self, writing: _Stored | None = None) -> None:
        """Drop ended runs, and then entries of the run that is being written, until `max_bytes` holds."""
        while self._size > self._max_bytes and self._ended and next(iter(self._ended.values())) is not writing:
            self._drop_oldest()
        if self._size > self._max_bytes and writing is not None:
            surplus = self._size - self._max_bytes
            newest = len(writing.ring.after(writing.ring.last - 1, max_entries=1, max_bytes=1)[0].wire)
            self._size -= writing.ring.trim(self._max_entries, max(writing.ring.size - surplus, newest))

    def _drop_oldest(self) -> None:
        run_id, stored = self._ended.popitem(last=False)
        del self._runs[run_id]
        self._size -= stored.ring.size + RUN_OVERHEAD
        if stored.idempotency is not None:
            del self._keys[stored.idempotency.key]


class _MemoryNotifications:
    def __init__(self) -> None:
        self._subscribed: set[str] = set()
        self._moved: dict[str, int] = {}
        self._cancel = False
        self._lot = trio.lowlevel.ParkingLot()

    async def subscribe(self, run_id: str) -> None:
        await trio.lowlevel.checkpoint()
        self._subscribed.add(run_id)

    def unsubscribe(self, run_id: str) -> None:
        self._subscribed.discard(run_id)
        self._moved.pop(run_id, None)

    def moved(self, run_id: str, seq: int) -> None:
        if run_id in self._subscribed:
            self._moved[run_id] = seq
            self._lot.unpark_all()

    def cancel_came(self) -> None:
        self._cancel = True
        self._lot.unpark_all()

    async def wait(self) -> Notification:
        await trio.lowlevel.checkpoint()
        while not self._moved and not self._cancel:
            await self._lot.park()
        notification = Notification(self._moved, self._cancel)
        self._moved, self._cancel = {}, False
        return notification
