"""The follower, cancelled wherever it waits, and the rules of its block."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from penstock.errors import RunNotFound
from tests.support.following import Reading, cancelling_at, read_to_the_end, reading, seqs_of
from tests.support.logs import COMPLETED, entry

if TYPE_CHECKING:
    from penstock.supervisor.follower import Follower

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
