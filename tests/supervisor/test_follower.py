"""The follower: replay, then live, without a seam; cursors, bodies and cancellation."""

from __future__ import annotations

from itertools import product
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from penstock.errors import CursorExpired, RunNotFound
from penstock.log import Batch, Entry
from penstock.supervisor.follower import BODY_BYTES
from tests.support.following import Reading, cancelling_at, read_to_the_end, reading, seqs_of
from tests.support.logs import CANCELLED, COMPLETED, DONE, LEASE, Unreliable, entry, in_virtual_time, record

if TYPE_CHECKING:
    from penstock.supervisor.follower import Follower

# --- no seam --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 1, 60, 10_000])
async def test_at_every_cursor_a_replay_goes_over_into_live_without_a_seam(
    autojump_clock: MockClock, limit: int | None
) -> None:
    for there in range(6):
        for after in range(there + 1):
            async with reading() as works:
                await works.run(there)
                seen: list[int] = []
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(read_into, seen, works, after, limit)
                    await wait_all_tasks_blocked()
                    assert seen == list(range(after + 1, there + 1))
                    for seq in range(there + 1, 9):
                        await works.append(seq, seq, COMPLETED if seq == 8 else None)
                        if seq % 2:
                            await wait_all_tasks_blocked()
                assert seen == list(range(after + 1, 9))


async def read_into(seen: list[int], works: Reading, after: int, limit: int | None) -> None:
    async with works.follow(after) as follower:
        assert not follower.at_end
        await read_to_the_end(follower, limit, seen)


PLACES = ["before read", "after read", "between", "while waiting", "before fetch", "after fetch"]


@pytest.mark.parametrize("after", [0, 1, 2])
async def test_wherever_an_append_falls_between_replay_and_live_it_is_seen_once(
    autojump_clock: MockClock, after: int
) -> None:
    for places in product([False, True], repeat=len(PLACES)):
        wanted = {place for place, wants in zip(PLACES, places, strict=True) if wants}
        async with reading() as works:
            await works.run(2)
            await at_each_place(works, wanted, after)


async def at_each_place(works: Reading, wanted: set[str], after: int) -> None:
    """Append two entries at each of the wanted places, once, and read all."""
    last = 2
    turn = trio.Lock()

    async def reach(place: str) -> None:
        nonlocal last
        if place in wanted:
            wanted.discard(place)
            async with turn:
                last += 2
                await works.append(last - 1, last)

    async def before(call: str) -> None:
        await reach(f"before {call}")

    async def after_it(call: str) -> None:
        await reach(f"after {call}")

    works.log.before, works.log.after = before, after_it
    seen: list[int] = []

    async def read() -> None:
        async with works.follow(after) as follower:
            await reach("between")
            seen.extend(await read_to_the_end(follower))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        await reach("while waiting")
        await trio.sleep(1)
        wanted.clear()
        await works.append(last + 1, last + 1, COMPLETED)
        await trio.sleep(1)
    assert seen == list(range(after + 1, last + 2))


# --- the tail and the log -------------------------------------------------------------------------------------------


async def test_a_reader_that_fell_off_the_tail_reads_on_from_the_log(autojump_clock: MockClock) -> None:
    async with reading(tail_entries=3) as works:
        await works.run(1)
        async with works.follow() as slow:
            assert (await anext(slow)).seq == 1
            for seq in range(2, 21):
                await works.append(seq, seq, COMPLETED if seq == 20 else None)
                await trio.sleep(0.1)
            assert works.tails.all()[0].last == 20
            assert await read_to_the_end(slow) == list(range(2, 21))


async def test_d38_a_resume_near_the_end_of_a_long_run_takes_at_most_three_calls(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(10_000, COMPLETED)
        async with works.follow(9_990) as follower:
            assert await read_to_the_end(follower, BODY_BYTES) == list(range(9_991, 10_001))
        assert works.log.calls.total() <= 3


async def test_d11_a_replay_of_an_ended_run_is_complete(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(700)
        await works.log.request_cancel("r", "stop")
        await works.append(701, 702)
        await works.append(703, 703, CANCELLED)
        async with works.follow() as follower:
            assert await read_to_the_end(follower, 1_000) == list(range(1, 704))


async def test_d36_an_entry_with_empty_data_is_delivered(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.log.start(record(), LEASE)
        blocks = [b"data: \n\n", b"data\n\n", b": \n\n", DONE]
        made = [Entry.of(seq, block, 1, terminal=seq == 4) for seq, block in enumerate(blocks, 1)]
        await works.log.append([Batch("r", "epoch", made, COMPLETED)])
        async with works.follow() as follower:
            assert [entry.data async for entry in follower] == blocks
        async with works.follow() as follower:
            assert await follower.next_body() == b"".join(entry.wire for entry in made)


# --- everything at once ---------------------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "sleep", "reader", "deaf", "hearing"]),
        st.integers(0, 12),
        st.sampled_from([None, 1, 50, 120, 10_000]),
    ),
    max_size=30,
)


@settings(max_examples=30, deadline=None)
@given(steps, st.integers(1, 8), st.sampled_from([0.0, 0.03]), st.sampled_from([0.0, 0.002, 0.05]))
def test_whatever_happens_every_reader_sees_every_entry_once_and_in_order(
    steps: list[tuple[str, int, int | None]], tail_entries: int, latency: float, spacing: float
) -> None:
    async def main() -> None:
        async with reading(tail_entries=tail_entries, spacing=spacing) as works, trio.open_nursery() as nursery:
            log = works.log
            log.latency = latency
            last, seen = 0, []
            await works.run()

            async def read(after: int, limit: int | None) -> None:
                async with works.follow(after) as follower:
                    seen.append((after, await read_to_the_end(follower, limit)))

            for step, amount, limit in steps:
                if step == "append" and amount:
                    await works.append(last + 1, last + amount)
                    last += amount
                elif step == "sleep":
                    await trio.sleep(amount / 50)
                elif step == "reader":
                    nursery.start_soon(read, min(amount, last), limit)
                    await trio.sleep(latency)
                elif step in {"deaf", "hearing"}:
                    works.wakeups.deaf = step == "deaf"
            works.wakeups.deaf = False
            await trio.sleep(1)
            await works.append(last + 1, last + 1, COMPLETED)
            nursery.start_soon(read, 0, None)
            await trio.sleep(10)
            for after, entries in seen:
                assert entries == list(range(after + 1, last + 2))
            assert len(seen) == 1 + sum(step == "reader" for step, _, _ in steps)

    in_virtual_time(main)


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


async def test_entries_and_bodies_can_be_taken_in_turn(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(7, COMPLETED, size=100)
        async with works.follow() as follower:
            assert (await anext(follower)).seq == 1
            assert seqs_of(await follower.next_body(200)) == [2, 3]
            assert (await anext(follower)).seq == 4
            assert seqs_of(await follower.next_body(10_000)) == [5, 6, 7]
            assert await follower.next_body() == b""


# --- cancellation ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 60])
@pytest.mark.parametrize("tail_entries", [1, 1000])
async def test_cancelling_a_reader_at_any_checkpoint_loses_nothing_and_repeats_nothing(
    autojump_clock: MockClock, limit: int | None, tail_entries: int
) -> None:
    step, caught = 0, True
    while caught:
        async with reading(tail_entries=tail_entries) as works, trio.open_nursery() as nursery:
            works.log.latency = 0.01
            await works.run(3)
            nursery.start_soon(write_the_rest, works)
            async with works.follow() as follower:
                seen: list[int] = []

                async def read(follower: Follower = follower, seen: list[int] = seen) -> None:
                    while taken := await take(follower, limit):
                        seen.extend(taken)

                with trio.CancelScope() as scope:
                    await cancelling_at(step, scope, read())
                caught = scope.cancelled_caught
                await read()
            assert seen == list(range(1, 10)), step
        step += 1
    assert step >= 6


async def write_the_rest(works: Reading) -> None:
    for seq in range(4, 10):
        await works.append(seq, seq, COMPLETED if seq == 9 else None)
        await trio.sleep(0.007)


async def take(follower: Follower, limit: int | None) -> list[int]:
    if limit is not None:
        return seqs_of(await follower.next_body(limit))
    try:
        return [(await anext(follower)).seq]
    except StopAsyncIteration:
        return []


@pytest.mark.parametrize("run_id", ["r", "missing"])
async def test_d15_entering_that_is_cancelled_at_any_checkpoint_leaves_nothing_behind(
    autojump_clock: MockClock, run_id: str
) -> None:
    step, caught = 0, True
    while caught:
        async with reading() as works:
            works.log.latency = 0.01
            await works.run(3, COMPLETED)
            follower = works.follow(run_id=run_id)
            with trio.CancelScope() as scope:
                try:
                    await cancelling_at(step, scope, follower.__aenter__())
                except RunNotFound:
                    assert run_id == "missing"
                else:
                    await follower.__aexit__(None, None, None)
            caught = scope.cancelled_caught
            assert works.left_behind() == []
            if run_id == "r":
                async with follower:
                    assert await read_to_the_end(follower) == [1, 2, 3]
        step += 1
    assert step >= 2


async def test_cancelled_in_the_step_in_which_it_was_woken_a_reader_has_lost_nothing(
    autojump_clock: MockClock,
) -> None:
    async with reading() as works:
        await works.run(1)
        async with works.follow(1) as follower:
            scope = trio.CancelScope()

            async def read() -> None:
                with scope:
                    await anext(follower)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await wait_all_tasks_blocked()
                tail = works.tails.all()[0]
                tail.extend([entry(2)])
                scope.cancel()
            await works.append(2, 3, COMPLETED)
            handed_over = list(range(2, follower.cursor + 1))
            assert handed_over + await read_to_the_end(follower) == [2, 3]


async def test_every_page_has_a_checkpoint_so_that_a_reader_of_a_long_run_can_be_cancelled(
    autojump_clock: MockClock,
) -> None:
    async with reading() as works:
        await works.run(5_000, COMPLETED)
        async with works.follow() as follower:
            seen = []
            with trio.CancelScope() as scope:
                async for each in follower:
                    seen.append(each.seq)
                    scope.cancel()
            assert scope.cancelled_caught
            assert len(seen) <= 500
            for _ in range(10):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await follower.next_body()
                assert scope.cancelled_caught
            assert seen + await read_to_the_end(follower) == list(range(1, 5_001))


# --- its block ------------------------------------------------------------------------------------------------------


async def test_a_follower_cannot_be_iterated_outside_its_block(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(3, COMPLETED)
        follower = works.follow()
        for _ in range(2):
            with pytest.raises(RuntimeError, match="inside its own `async with` block"):
                await anext(follower)
            with pytest.raises(RuntimeError, match="inside its own `async with` block"):
                await follower.next_body()
            async with follower:
                await anext(follower)


async def test_a_follower_cannot_be_entered_twice_at_once(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(3, COMPLETED)
        async with works.follow() as follower:
            with pytest.raises(RuntimeError, match="has been entered already"):
                await follower.__aenter__()
            assert await read_to_the_end(follower) == [1, 2, 3]


@pytest.mark.parametrize("taken", range(6))
async def test_a_follower_that_is_entered_again_goes_on_where_it_was(autojump_clock: MockClock, taken: int) -> None:
    async with reading() as works:
        await works.run(5)
        follower = works.follow()
        async with follower:
            seen = [(await anext(follower)).seq for _ in range(taken)]
        await works.append(6, 12, COMPLETED)
        async with follower:
            assert seen + await read_to_the_end(follower) == list(range(1, 13))


async def test_a_follower_may_be_entered_in_one_task_and_left_in_another(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(3, COMPLETED)
        follower = works.follow()

        async def rest() -> None:
            assert await read_to_the_end(follower) == [1, 2, 3]
            await follower.__aexit__(None, None, None)

        async with trio.open_nursery() as nursery:
            await follower.__aenter__()
            nursery.start_soon(rest)


async def test_leaving_is_no_checkpoint_and_works_while_cancelled(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(3)
        with trio.CancelScope() as scope:
            async with works.follow():
                scope.cancel()
        assert not scope.cancelled_caught
