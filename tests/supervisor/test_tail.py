"""Tails: the recent entries of a run, the place where its readers wait, and the memory that they share."""

from __future__ import annotations

from functools import partial

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from penstock.errors import ReaderReleased, RunNotFound
from penstock.supervisor.tail import Tail, Tails
from tests.support.logs import entries, in_virtual_time, seqs

ALL = 1_000_000


def tails_of(max_entries: int = ALL, max_bytes: int = ALL, max_process_bytes: int = ALL) -> Tails:
    return Tails(max_entries=max_entries, max_bytes=max_bytes, max_process_bytes=max_process_bytes)


def take(tail: Tail, cursor: int, max_entries: int = ALL, max_bytes: int = ALL) -> list[int] | None:
    taken = tail.take(cursor, max_entries=max_entries, max_bytes=max_bytes)
    return None if taken is None else seqs(taken)


async def test_a_cursor_at_the_end_takes_nothing_and_one_that_fell_off_takes_none() -> None:
    tail = tails_of(max_entries=3).acquire("r")
    assert take(tail, 0) == []
    tail.extend(entries(1, 5))
    assert [take(tail, cursor) for cursor in range(7)] == [None, None, [3, 4, 5], [4, 5], [5], [], []]


async def test_the_terminal_entry_ends_a_tail_and_it_stays_ended() -> None:
    tail = tails_of().acquire("r")
    tail.extend(entries(1, 2))
    assert not tail.ended
    tail.extend(entries(3, 4, terminal=True))
    assert tail.ended
    tail.extend(entries(1, 2))
    assert tail.ended


# --- how far the log is ---------------------------------------------------------------------------------------------


async def test_a_tail_that_learns_that_the_log_is_further_gives_up_what_it_has() -> None:
    tails = tails_of()
    tail = tails.acquire("r")
    tail.extend(entries(1, 3, 50))
    tail.advance(5, ended=False)
    assert (tail.last, tails.size) == (5, 0)
    assert [take(tail, cursor) for cursor in (2, 3, 4, 5)] == [None, None, None, []]
    tail.extend(entries(6, 6))
    assert take(tail, 5) == [6]


@pytest.mark.parametrize("last", [0, 2, 3])
async def test_a_tail_that_is_as_far_keeps_what_it_has(last: int) -> None:
    tail = tails_of().acquire("r")
    tail.extend(entries(1, 3))
    tail.advance(last, ended=False)
    assert take(tail, 0) == [1, 2, 3]
    assert not tail.ended
    tail.advance(last, ended=True)
    assert tail.ended
    tail.advance(last, ended=False)
    assert tail.ended


async def test_a_tail_that_is_fed_knows_better_than_a_record_that_was_read() -> None:
    tail = tails_of().acquire("r")
    tail.fed = True
    tail.extend(entries(1, 3))
    tail.advance(5, ended=True)
    assert take(tail, 0) == [1, 2, 3]
    assert not tail.ended


# --- waiting --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        lambda tail: tail.extend(entries(1, 1)),
        lambda tail: tail.advance(3, ended=False),
        lambda tail: tail.advance(0, ended=True),
        lambda tail: tail.evict_readers(ReaderReleased("go")),
    ],
    ids=["extend", "advance", "ended", "release"],
)
async def test_every_change_wakes_every_reader(autojump_clock: MockClock, change: object) -> None:
    assert callable(change)
    tail = tails_of().acquire("r")
    with trio.fail_after(1):
        async with trio.open_nursery() as nursery:
            for _ in range(5):
                nursery.start_soon(tail.wait)
            await wait_all_tasks_blocked()
            change(tail)
    assert len(tail._lot) == 0


async def test_the_first_reason_to_go_stays() -> None:
    tail = tails_of().acquire("r")
    first = ReaderReleased("first")
    tail.evict_readers(first)
    tail.evict_readers(RunNotFound("r"))
    assert tail.released is first


async def test_tails_that_are_retired_stay_with_those_who_have_them_and_others_get_new_ones() -> None:
    tails = tails_of()
    away, other = ReaderReleased("away"), ReaderReleased("away")
    old, spared = tails.acquire("r"), tails.acquire("spared")
    old.extend(entries(1, 3, 50))
    old.evict_readers(away)
    spared.evict_readers(other)
    tails.evict(away)
    assert tails.get("r") is None
    assert tails.get("spared") is spared
    new = tails.acquire("r")
    assert (new is old, new.last, new.released) == (False, 0, None)
    assert (seqs(old.recent()), old.released) == ([1, 2, 3], away)
    assert tails.release(old)
    assert tails.get("r") is new
    for tail in (new, spared):
        assert tails.release(tail)
    assert (len(tails.all()), tails.size) == (0, 0)


async def test_all_that_is_at_hand_is_what_the_limits_have_left() -> None:
    tail = tails_of(max_entries=4, max_bytes=170).acquire("r")
    assert tail.recent() == []
    tail.extend(entries(1, 2, 50))
    assert seqs(tail.recent()) == [1, 2]
    tail.extend(entries(3, 9, 50))
    assert seqs(tail.recent()) == [7, 8, 9]
    tail.trim(60)
    assert seqs(tail.recent()) == [9]
    tail.trim(0)
    assert tail.recent() == []
    assert tail.last == 9


# --- the tails of a process -----------------------------------------------------------------------------------------


async def test_users_of_a_run_share_one_tail_and_the_last_to_leave_takes_it_along() -> None:
    tails = tails_of()
    first, second = tails.acquire("r"), tails.acquire("r")
    assert first is second
    assert tails.get("r") is first
    assert tails.all() == [first]
    first.extend(entries(1, 3, 50))
    assert not tails.release(first)
    assert (len(tails.all()), tails.size) == (1, 150)
    assert tails.release(second)
    assert (len(tails.all()), tails.size, tails.get("r"), tails.all()) == (0, 0, None, [])
    assert tails.acquire("r").last == 0


@pytest.mark.parametrize(
    "count, share", [(0, 100), (1, 100), (9, 100), (10, 100), (11, 90), (20, 50), (1000, 1), (1001, 0)]
)
async def test_a_tail_has_its_own_limit_or_an_equal_share_of_the_process(count: int, share: int) -> None:
    tails = tails_of(max_bytes=100, max_process_bytes=1000)
    for number in range(count):
        tails.acquire(f"r{number}")
    assert tails.share() == share


async def test_tails_that_are_not_written_any_more_make_room_for_those_that_are() -> None:
    tails = tails_of(max_bytes=500, max_process_bytes=1000)
    for number in range(40):
        tails.acquire(f"r{number}").extend(entries(1, 10, 50))
        assert tails.size <= 1000
    for tail in tails.all()[:-1]:
        assert take(tail, 10) == []
        assert tail.last == 10


steps = st.lists(
    st.tuples(
        st.sampled_from(["extend", "extend", "acquire", "give back", "advance"]), st.integers(0, 3), st.integers(0, 5)
    ),
    min_size=4,
    max_size=30,
)


@settings(max_examples=40, deadline=None)
@given(steps, st.integers(1, 8), st.integers(20, 400), st.integers(20, 250))
def test_whatever_happens_the_sizes_add_up_and_the_limits_hold(
    steps: list[tuple[str, int, int]], max_entries: int, max_bytes: int, max_process_bytes: int
) -> None:
    async def main() -> None:
        await trio.lowlevel.checkpoint()
        tails = tails_of(max_entries, max_bytes, max_process_bytes)
        for step, which, amount in steps:
            run_id = f"r{which}"
            tail = tails.get(run_id) or tails.acquire(run_id)
            if step == "acquire":
                tails.acquire(run_id)
            elif step == "give back":
                tails.release(tail)
            elif step == "extend":
                tail.extend(entries(tail.last + 1, tail.last + 1 + amount, 40))
                assert tails.size <= max_process_bytes
            else:
                tail.advance(tail.last + amount, ended=False)
            sizes = []
            for tail in tails.all():
                held = [first for first in range(tail.last) if take(tail, first) is not None]
                kept = take(tail, held[0]) if held else []
                assert kept is not None
                sizes.append(40 * len(kept))
                assert len(kept) <= max_entries
                assert sizes[-1] <= max_bytes
            assert tails.size == sum(sizes)
            assert set(tails.all()) == {tails.get(tail.run_id) for tail in tails.all()}

    in_virtual_time(partial(main))
