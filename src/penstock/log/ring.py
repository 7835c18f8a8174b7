"""Consecutive entries of one run, bounded in number and in bytes: the oldest ones are dropped first."""

from __future__ import annotations

from typing import TYPE_CHECKING

from penstock.log import Entry

if TYPE_CHECKING:
    from collections.abc import Iterable


class Ring:
    """The entries `first` to `last` of a run; `first` is `last + 1` if there are none, as in a new ring."""

    # Two lists of bytes and of ints, not one of entries: Python's garbage collector traverses tuples, and thousands of
    # runs hold millions of entries.

    __slots__ = ("_terminal", "_timestamps", "_wires", "last", "size")

    def __init__(self, last: int = 0) -> None:
        self._wires: list[bytes] = []
        self._timestamps: list[int] = []
        self._terminal = 0  # the seq of the run's terminal entry; 0 until it is added
        self.last = last  # the highest seq that was added
        self.size = 0  # the bytes of all entries

    @property
    def first(self) -> int:
        return self.last - len(self._wires) + 1

    def __len__(self) -> int:
        return len(self._wires)

    def extend(self, entries: Iterable[Entry]) -> None:
        """Add the entries after `last`, and ignore the others; a gap before an entry drops all entries before it."""
        for seq, wire, timestamp, terminal in entries:
            if seq <= self.last:
                continue
            if seq != self.last + 1:
                self.clear()
            self._wires.append(wire)
            self._timestamps.append(timestamp)
            self.last = seq
            self.size += len(wire)
            if terminal:
                self._terminal = seq

    def trim(self, max_entries: int, max_bytes: int) -> int:
        """Drop the oldest entries until both limits hold, and return the number of bytes dropped."""
        surplus = max(len(self._wires) - max_entries, 0)
        freed = sum(map(len, self._wires[:surplus]))
        while surplus < len(self._wires) and self.size - freed > max_bytes:
            freed += len(self._wires[surplus])
            surplus += 1
        if surplus:
            del self._wires[:surplus], self._timestamps[:surplus]
        self.size -= freed
        return freed

    def clear(self) -> None:
        """Drop all entries; `last` stays as it is."""
        self._wires.clear()
        self._timestamps.clear()
        self.size = 0

    def after(self, cursor: int, *, max_entries: int, max_bytes: int) -> list[Entry]:
        """Return the entries after the cursor (at least `first - 1`) up to both limits, the first whatever its size."""
        start = cursor - self.first + 1
        if len(self._wires) - start == 1:  # one event at a time is the common case of a live reader
            return [Entry(self.last, self._wires[-1], self._timestamps[-1], self.last == self._terminal)]
        end, size = start, 0
        for wire in self._wires[start : start + max_entries]:
            size += len(wire)
            if size > max_bytes and end > start:
                break
            end += 1
        numbers = range(cursor + 1, cursor + 1 + end - start)
        entries = list(map(Entry, numbers, self._wires[start:end], self._timestamps[start:end]))
        if entries and entries[-1].seq == self._terminal:
            entries[-1] = entries[-1]._replace(terminal=True)
        return entries
