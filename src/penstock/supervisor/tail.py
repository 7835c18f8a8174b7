"""The tail: the recent entries of a run that this process keeps, and the place where its readers wait.

A reader is a cursor into a tail: it waits until the tail's last seq has passed its cursor, with no checkpoint between
looking and parking, and then takes all that is there. So there is no queue for a reader to fill, and no reader can slow
down another. Only what the log has acknowledged is ever added to a tail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from penstock.errors import RunNotFound
from penstock.log.ring import Ring

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.errors import PenstockError
    from penstock.log import Entry


class Tail:
    """The tail of one run. All methods but `wait` are synchronous."""

    __slots__ = ("_lot", "_ring", "_tails", "ended", "fed", "released", "run_id", "users")

    def __init__(self, run_id: str, tails: Tails) -> None:
        self.run_id = run_id
        self.ended = False
        """True once nothing follows `last`."""
        self.released: PenstockError | None = None
        """The error that readers get, once they have been evicted."""
        self.fed = False
        """True while the run's own committer adds its entries; else the fetcher does."""
        self.users = 0
        self._ring = Ring()
        self._tails = tails
        self._lot = trio.lowlevel.ParkingLot()

    @property
    def last(self) -> int:
        return self._ring.last

    def extend(self, entries: Sequence[Entry]) -> None:
        ring = self._ring
        before = ring.size
        ring.extend(entries)
        self.ended = self.ended or entries[-1].terminal
        ring.trim(self._tails.max_entries, self._tails.share())
        self._tails.size += ring.size - before
        self._tails.keep_to_limit()
        self._lot.unpark_all()

    def trim(self, max_bytes: int) -> None:
        self._tails.size -= self._ring.trim(self._tails.max_entries, max_bytes)

    def advance(self, last: int, *, ended: bool) -> None:
        """Take note of how far the log is, without its entries. Ignored by a tail that is fed."""
        if self.fed or (last <= self._ring.last and (self.ended or not ended)):
            return
        if last > self._ring.last:
            self._tails.size -= self._ring.size
            self._ring.clear()
            self._ring.last = last
        self.ended = self.ended or ended
        self._lot.unpark_all()

    def evict_readers(self, error: PenstockError) -> None:
        """Release the readers, and those to come, with `error`. The first error stays."""
        self.released = self.released or error
        self._lot.unpark_all()

    def take(self, cursor: int, *, max_entries: int, max_bytes: int) -> list[Entry] | None:
        """What follows the cursor, within the limits; None if the tail does not reach back that far."""
        if cursor >= self._ring.last:
            return []
        if cursor + 1 < self._ring.first:
            return None
        return self._ring.after(cursor, max_entries=max_entries, max_bytes=max_bytes)

    def recent(self) -> list[Entry]:
        return self._ring.after(self._ring.first - 1, max_entries=len(self._ring), max_bytes=self._ring.size)

    async def wait(self) -> None:
        """Park until anything about the tail changes. A checkpoint; cancelling it loses nothing."""
        await self._lot.park()

    def drop(self) -> None:
        """Drop the entries. Called when the tail has no users any more."""
        self._tails.size -= self._ring.size
        self._ring.clear()


class Tails:
    """The tails of one process, which share `max_process_bytes` equally."""

    def __init__(self, *, max_entries: int, max_bytes: int, max_process_bytes: int) -> None:
        self.max_entries = max_entries
        self.max_bytes = max_bytes
        self.max_process_bytes = max_process_bytes
        self.size = 0
        self._tails: dict[str, Tail] = {}

    def share(self) -> int:
        return min(self.max_bytes, self.max_process_bytes // max(len(self._tails), 1))

    def keep_to_limit(self) -> None:
        """Trim tails that grew when there were fewer of them to their share."""
        # Afterwards all keep to it, so this costs one round for every tail that was added, and only at the limit.
        if self.size > self.max_process_bytes:
            share = self.share()
            for tail in self._tails.values():
                tail.trim(share)

    def get(self, run_id: str) -> Tail | None:
        return self._tails.get(run_id)

    def all(self) -> list[Tail]:
        return list(self._tails.values())

    def acquire(self, run_id: str, *, new: bool = False) -> Tail:
        """The tail of a run, which is `new` if it has just been started, for one more user; see `release`."""
        tail = self._tails.get(run_id)
        if tail is not None and new and (tail.last or tail.ended or tail.released is not None):
            tail.evict_readers(RunNotFound(run_id))  # it is that of an expired run, whose id is used again
            tail = None
        if tail is None:
            tail = self._tails[run_id] = Tail(run_id, self)
        tail.users += 1
        return tail

    def evict(self, error: PenstockError) -> None:
        """Forget the tails whose readers were released by `error`. Their users keep them; others get new ones."""
        for tail in self.all():
            if tail.released is error:
                del self._tails[tail.run_id]

    def release(self, tail: Tail) -> bool:
        """Count one user less; True if that was the last one, and the tail is gone."""
        tail.users -= 1
        if tail.users:
            return False
        if self._tails.get(tail.run_id) is tail:
            del self._tails[tail.run_id]
        tail.drop()
        return True
