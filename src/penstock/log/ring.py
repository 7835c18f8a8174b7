"""Consecutive entries of one run, bounded in number and in bytes: the oldest go first."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

    from penstock.log import Entry


class Ring:
    """Entries `first` to `last`, without a gap.

    An empty ring stands at `last` all the same: `first` is then `last + 1`. All methods are synchronous.
    """

    __slots__ = ("_entries", "last", "size")

    def __init__(self, last: int = 0) -> None:
        self._entries: list[Entry] = []
        self.last = last
        """The highest seq that was ever added."""
        self.size = 0
        """The bytes of all entries."""

    @property
    def first(self) -> int:
        """The oldest seq there is."""
        return self.last - len(self._entries) + 1

    def __len__(self) -> int:
        return len(self._entries)

    def extend(self, entries: Iterable[Entry]) -> None:
        """Add what follows `last`; entries up to `last` are there already, and a gap empties the ring first."""
        for entry in entries:
            if entry.seq <= self.last:
                continue
            if entry.seq != self.last + 1:
                self.clear()
            self._entries.append(entry)
            self.last = entry.seq
            self.size += len(entry.wire)

    def trim(self, max_entries: int, max_bytes: int) -> int:
        """Drop the oldest entries until both limits hold; the number of bytes that went."""
        surplus = max(len(self._entries) - max_entries, 0)
        freed = sum(len(entry.wire) for entry in self._entries[:surplus])
        while surplus < len(self._entries) and self.size - freed > max_bytes:
            freed += len(self._entries[surplus].wire)
            surplus += 1
        del self._entries[:surplus]
        self.size -= freed
        return freed

    def clear(self) -> None:
        """Drop all entries; `last` stays."""
        self._entries.clear()
        self.size = 0

    def after(self, cursor: int, *, max_entries: int, max_bytes: int) -> list[Entry]:
        """What follows the cursor: at most `max_entries`, and no further one that would go beyond `max_bytes`.

        The first entry is always among them, however large. The caller has seen to it that `cursor + 1 >= first`.
        """
        start = cursor - self.first + 1
        if len(self._entries) - start == 1:  # one event at a time is the common case of a live reader
            return self._entries[-1:]
        taken = self._entries[start : start + max_entries]
        size = 0
        for index, entry in enumerate(taken):
            size += len(entry.wire)
            if size > max_bytes and index:
                return taken[:index]
        return taken
