"""The follower: cursors, wherever they point, and the limits of what is taken at once."""

from __future__ import annotations

from typing import Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from penstock.errors import CursorExpired, RunNotFound
from penstock.supervisor.follower import BODY_BYTES
from tests.support.following import read_to_the_end, reading, seqs_of
from tests.support.logs import COMPLETED, Unreliable

# --- trimmed --------------------------------------------------------------------------------------------------------


async def test_d37_a_cursor_before_what_was_trimmed_is_refused_on_entering_with_the_oldest_seq(
    autojump_clock: MockClock,
) -> None:
    async with reading(Unreliable(max_entries=10)) as works:
        await works.run(100)
        for after in (0, 50, 89):
            with pytest.raises(CursorExpired) as caught:
                async with works.follow(after):
                    raise AssertionError("entered")
            assert (caught.value.after, caught.value.oldest_seq) == (after, 91)
        async with works.follow(90) as follower:
            assert (await anext(follower)).seq == 91


async def test_d37_a_reader_that_is_overtaken_by_trimming_is_told_the_oldest_seq(autojump_clock: MockClock) -> None:
    async with reading(Unreliable(max_entries=10), tail_entries=5) as works:
        await works.run(3)
        async with works.follow() as slow:
            assert (await anext(slow)).seq == 1
            for seq in range(4, 31):
                await works.append(seq, seq)
                await trio.sleep(0.1)
            assert [(await anext(slow)).seq for _ in range(2)] == [2, 3]
            for _ in range(2):
                with pytest.raises(CursorExpired) as caught:
                    await anext(slow)
                assert (caught.value.after, caught.value.oldest_seq) == (3, 21)


async def test_a_reader_within_the_tail_does_not_feel_what_the_log_has_trimmed(autojump_clock: MockClock) -> None:
    async with reading(Unreliable(max_entries=2), tail_entries=50) as works:
        await works.run(1)
        async with works.follow() as slow:
            assert (await anext(slow)).seq == 1
            for seq in range(2, 31):
                await works.append(seq, seq, COMPLETED if seq == 30 else None)
                await trio.sleep(0.1)
            assert await read_to_the_end(slow) == list(range(2, 31))


# --- cursors at the end and beyond ----------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [5, 6, 1_000])
@pytest.mark.parametrize("limit", [None, 100])
async def test_d33_a_cursor_at_or_past_the_end_of_an_ended_run_is_at_its_end_at_once(
    autojump_clock: MockClock, after: int, limit: int | None
) -> None:
    async with reading() as works:
        await works.run(5, COMPLETED)
        start = trio.current_time()
        async with works.follow(after) as follower:
            assert follower.at_end
            assert await read_to_the_end(follower, limit) == []
            assert await read_to_the_end(follower, limit) == []
        assert trio.current_time() == start


async def test_a_cursor_before_the_end_is_not_at_the_end(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(5, COMPLETED)
        async with works.follow(4) as follower:
            assert not follower.at_end
            assert await read_to_the_end(follower) == [5]


async def test_a_cursor_ahead_of_a_running_run_waits_for_what_follows_it(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(3)
        async with works.follow(6) as follower, trio.open_nursery() as nursery:
            assert not follower.at_end
            seen: list[int] = []

            async def read() -> None:
                seen.extend(await read_to_the_end(follower))

            nursery.start_soon(read)
            for seq in range(4, 9):
                await trio.sleep(1)
                await works.append(seq, seq, COMPLETED if seq == 8 else None)
        assert seen == [7, 8]


async def test_a_cursor_ahead_of_a_run_that_ends_before_it_ends_with_it(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(3)
        async with works.follow(6) as follower, trio.open_nursery() as nursery:
            nursery.start_soon(works.append, 4, 5, COMPLETED)
            with trio.fail_after(5):
                assert await read_to_the_end(follower) == []


async def test_d34_a_run_that_is_not_there_is_not_found_on_entering(autojump_clock: MockClock) -> None:
    async with reading() as works:
        with pytest.raises(RunNotFound):
            async with works.follow():
                raise AssertionError("entered")


@pytest.mark.parametrize("after", [-1, True, "1", 1.0, None])
async def test_what_is_no_cursor_is_refused(autojump_clock: MockClock, after: Any) -> None:
    async with reading() as works:
        with pytest.raises(ValueError, match="a cursor is a whole number from 0"):
            works.follow(after)


# --- the last N -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "after, last, first", [(0, 0, 11), (0, 1, 10), (0, 9, 2), (0, 10, 1), (0, 99, 1), (8, 5, 9), (3, 5, 6)]
)
@pytest.mark.parametrize("ended", [False, True])
async def test_the_last_so_many_entries_or_what_follows_the_cursor_whichever_is_later(
    autojump_clock: MockClock, after: int, last: int, first: int, ended: bool
) -> None:
    async with reading() as works:
        await works.run(10, COMPLETED if ended else None)
        async with works.follow(after, last=last) as follower:
            assert follower.at_end is (ended and first == 11)
            if not ended:
                await works.append(11, 12, COMPLETED)
            assert await read_to_the_end(follower, 70) == list(range(first, 11 if ended else 13))


async def test_the_last_so_many_of_a_trimmed_run_are_those_that_there_are(autojump_clock: MockClock) -> None:
    async with reading(Unreliable(max_entries=5)) as works:
        await works.run(100, COMPLETED)
        async with works.follow(last=50) as follower:
            assert await read_to_the_end(follower) == [96, 97, 98, 99, 100]


@pytest.mark.parametrize("last", [-1, True, "1", 1.0])
async def test_what_is_no_number_of_last_entries_is_refused(autojump_clock: MockClock, last: Any) -> None:
    async with reading() as works:
        with pytest.raises(ValueError, match="N is a whole number from 0"):
            works.follow(last=last)


# --- bodies ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "limit, bodies",
    [
        (1, [1, 1, 1, 1, 1]),
        (99, [1, 1, 1, 1, 1]),
        (100, [1, 1, 1, 1, 1]),
        (199, [1, 1, 1, 1, 1]),
        (200, [2, 2, 1]),
        (499, [4, 1]),
        (500, [5]),
        (501, [5]),
    ],
)
@pytest.mark.parametrize("live", [False, True])
async def test_d35_a_body_holds_all_that_is_ready_up_to_its_limit(
    autojump_clock: MockClock, limit: int, bodies: list[int], live: bool
) -> None:
    async with reading() as works:
        await works.run(0 if live else 5, None if live else COMPLETED, size=100)
        async with works.follow() as follower:
            if live:
                await works.append(1, 5, COMPLETED, size=100)
                await wait_all_tasks_blocked()
                assert len(works.tails.all()) == 1
            sizes = []
            while body := await follower.next_body(limit):
                sizes.append(len(seqs_of(body)))
            assert sizes == bodies
            assert follower.cursor == 5


async def test_an_entry_over_the_limit_comes_alone_and_whole(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(1, size=50)
        await works.append(2, 2, size=5_000)
        await works.append(3, 3, COMPLETED, size=50)
        async with works.follow() as follower:
            bodies = [await follower.next_body(1_000) for _ in range(4)]
        assert [len(body) for body in bodies] == [50, 5_000, 50, 0]


async def test_a_body_holds_64_kib_unless_told_otherwise(autojump_clock: MockClock) -> None:
    assert BODY_BYTES == 64 * 1024
    async with reading() as works:
        await works.run(200, COMPLETED, size=1024)
        async with works.follow() as follower:
            assert len(await follower.next_body()) == BODY_BYTES


async def test_entries_and_bodies_can_be_taken_in_turn(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(7, COMPLETED, size=100)
        async with works.follow() as follower:
            assert (await anext(follower)).seq == 1
            assert seqs_of(await follower.next_body(200)) == [2, 3]
            assert (await anext(follower)).seq == 4
            assert seqs_of(await follower.next_body(10_000)) == [5, 6, 7]
            assert await follower.next_body() == b""
