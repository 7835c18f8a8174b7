"""The ring: consecutive entries, bounded in number and in bytes."""

from __future__ import annotations

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from penstock.log import Entry
from penstock.log.ring import Ring
from tests.support.logs import entries, seqs

ALL = 1_000_000


def ring_of(first: int, last: int, size: int = 0) -> Ring:
    ring = Ring(first - 1)
    ring.extend(entries(first, last, size))
    return ring


def after(ring: Ring, cursor: int, max_entries: int = ALL, max_bytes: int = ALL) -> list[int]:
    return seqs(ring.after(cursor, max_entries=max_entries, max_bytes=max_bytes))


@pytest.mark.parametrize(
    "limit, taken", [(1, [3]), (49, [3]), (50, [3]), (99, [3]), (100, [3, 4]), (149, [3, 4]), (150, [3, 4, 5])]
)
def test_none_goes_beyond_the_bytes_but_the_first_is_always_there(limit: int, taken: list[int]) -> None:
    assert after(ring_of(3, 5, 50), 2, max_bytes=limit) == taken


def test_what_was_taken_does_not_change_with_the_ring() -> None:
    ring = ring_of(1, 3)
    taken = ring.after(0, max_entries=ALL, max_bytes=ALL)
    ring.trim(1, ALL)
    ring.extend(entries(4, 4))
    assert seqs(taken) == [1, 2, 3]


@pytest.mark.parametrize("trimmed", [0, 2, 4])
@pytest.mark.parametrize("page", [1, 2, 5, ALL])
def test_only_the_terminal_entry_is_handed_over_as_such_however_the_ring_is_read(trimmed: int, page: int) -> None:
    ring = Ring()
    ring.extend(entries(1, 5, terminal=True))
    ring.trim(5 - trimmed, ALL)
    cursor, taken = trimmed, []
    while more := ring.after(cursor, max_entries=page, max_bytes=ALL):
        taken += more
        cursor = more[-1].seq
    assert taken == entries(trimmed + 1, 5, terminal=True)


@pytest.mark.parametrize("size", [1, 3])
def test_a_terminal_entry_is_known_as_such_after_a_gap(size: int) -> None:
    ring = ring_of(1, 5)
    ring.extend(entries(10, 9 + size, terminal=True))
    assert ring.after(9, max_entries=ALL, max_bytes=ALL) == entries(10, 9 + size, terminal=True)


@pytest.mark.parametrize("lost", ["trimmed", "cleared", "a gap"])
def test_what_follows_a_terminal_entry_that_is_gone_is_not_terminal(lost: str) -> None:
    ring = Ring()
    ring.extend(entries(1, 3, terminal=True))
    if lost == "trimmed":
        ring.trim(0, ALL)
    elif lost == "cleared":
        ring.clear()
    first = 5 if lost == "a gap" else 4
    ring.extend(entries(first, 6))
    assert ring.after(first - 1, max_entries=ALL, max_bytes=ALL) == entries(first, 6)
    assert ring.after(5, max_entries=ALL, max_bytes=ALL) == entries(6, 6)


def test_a_terminal_entry_that_is_added_again_stays_what_it_was() -> None:
    ring = ring_of(1, 2)
    ring.extend(entries(1, 3, terminal=True))
    ring.extend(entries(2, 3))
    ring.extend(entries(1, 2, terminal=True))  # not that one
    assert ring.after(0, max_entries=ALL, max_bytes=ALL) == entries(1, 3, terminal=True)


def test_each_entry_keeps_its_timestamp_through_trims_and_gaps() -> None:
    stamped = [Entry.of(seq, b"data: x\n\n", 10**12 + 7 * seq) for seq in range(1, 31)]
    ring = Ring()
    ring.extend(stamped[:20])
    ring.trim(12, ALL)
    assert ring.after(8, max_entries=ALL, max_bytes=ALL) == stamped[8:20]
    ring.trim(ALL, sum(len(each.wire) for each in stamped[17:20]))
    assert ring.after(17, max_entries=ALL, max_bytes=ALL) == stamped[17:20]
    ring.extend(stamped[22:])
    ring.extend(stamped[20:])
    assert ring.after(22, max_entries=ALL, max_bytes=ALL) == stamped[22:]
    assert ring.after(29, max_entries=ALL, max_bytes=ALL) == stamped[29:]


class RingMachine(RuleBasedStateMachine):
    """A ring beside the plainest list there is."""

    def __init__(self) -> None:
        super().__init__()
        self.ring = Ring()
        self.model: list[Entry] = []
        self.last = 0

    @rule(back=st.integers(0, 6), gap=st.integers(0, 2), count=st.integers(0, 6), size=st.integers(0, 60))
    def extend(self, back: int, gap: int, count: int, size: int) -> None:
        first = max(self.last + 1 - back, 1) if back else self.last + 1 + gap
        added = entries(first, first + count - 1, size)
        self.ring.extend(added)
        for each in added:
            if each.seq > self.last:
                if each.seq > self.last + 1:
                    self.model = []
                self.model.append(each)
                self.last = each.seq

    @rule(max_entries=st.integers(0, 12), max_bytes=st.integers(0, 500))
    def trim(self, max_entries: int, max_bytes: int) -> None:
        freed = 0
        while len(self.model) > max_entries or sum(len(each.wire) for each in self.model) > max_bytes:
            freed += len(self.model.pop(0).wire)
        assert self.ring.trim(max_entries, max_bytes) == freed

    @rule()
    def clear(self) -> None:
        self.ring.clear()
        self.model = []

    @rule(back=st.integers(0, 12), max_entries=st.integers(1, 8), max_bytes=st.integers(1, 300))
    def after(self, back: int, max_entries: int, max_bytes: int) -> None:
        cursor = max(self.last - back, self.last - len(self.model))
        expected: list[Entry] = []
        for each in self.model:
            if each.seq <= cursor:
                continue
            if expected and sum(len(one.wire) for one in [*expected, each]) > max_bytes:
                break
            if len(expected) == max_entries:
                break
            expected.append(each)
        assert self.ring.after(cursor, max_entries=max_entries, max_bytes=max_bytes) == expected

    @invariant()
    def agrees(self) -> None:
        assert self.ring.last == self.last
        assert len(self.ring) == len(self.model)
        assert self.ring.size == sum(len(each.wire) for each in self.model)
        assert self.ring.first == self.last - len(self.model) + 1


TestRingMachine = RingMachine.TestCase
