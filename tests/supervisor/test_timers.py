"""Deadlines as callbacks: one task for all the clocks of all runs."""

from __future__ import annotations

import gc
import weakref
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from penstock.supervisor.timers import SWEEP_AT_LEAST, Timer, Timers
from tests.support.logs import in_virtual_time

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


@asynccontextmanager
async def running() -> AsyncIterator[Timers]:
    timers = Timers()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(timers.run)
        yield timers
        nursery.cancel_scope.cancel()


def nothing() -> None:
    """A callback."""


class Calls:
    def __init__(self) -> None:
        self.start = trio.current_time()
        self.seen: list[tuple[str, float]] = []

    def note(self, name: str) -> None:
        self.seen.append((name, trio.current_time() - self.start))


async def test_a_timer_set_for_sooner_is_not_slept_through(autojump_clock: MockClock) -> None:
    async with running() as timers:
        calls = Calls()
        timers.at(calls.start + 10, partial(calls.note, "later"))
        await trio.sleep(1)
        timers.at(calls.start + 2, partial(calls.note, "sooner"))
        await trio.sleep(30)
        assert calls.seen == [("sooner", 2), ("later", 10)]


async def test_timers_set_before_the_task_runs_are_kept(autojump_clock: MockClock) -> None:
    timers, calls = Timers(), Calls()
    timers.at(calls.start + 1, partial(calls.note, "a"))
    await trio.sleep(3)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(timers.run)
        await trio.sleep(1)
        nursery.cancel_scope.cancel()
    assert calls.seen == [("a", 3)]


async def test_a_time_that_is_past_is_now(autojump_clock: MockClock) -> None:
    async with running() as timers:
        await trio.sleep(5)
        calls = Calls()
        timers.at(calls.start - 3, partial(calls.note, "past"))
        timers.at(calls.start, partial(calls.note, "now"))
        await wait_all_tasks_blocked()
        assert calls.seen == [("past", 0), ("now", 0)]


async def test_cancelling_a_timer_that_has_called_back_does_nothing(autojump_clock: MockClock) -> None:
    async with running() as timers:
        calls = Calls()
        timer = timers.at(calls.start + 1, partial(calls.note, "a"))
        await trio.sleep(2)
        for _ in range(3 * SWEEP_AT_LEAST):
            timer.cancel()
        later = [timers.at(calls.start + 3 + number, partial(calls.note, str(number))) for number in range(3)]
        later[1].cancel()
        await trio.sleep(10)
        assert calls.seen == [("a", 1), ("0", 3), ("2", 5)]


async def test_a_callback_may_set_and_cancel_timers(autojump_clock: MockClock) -> None:
    async with running() as timers:
        calls = Calls()
        doomed: list[Timer] = []

        def again(rest: int) -> None:
            calls.note(f"again {rest}")
            if rest:
                timers.at(trio.current_time() + 1, partial(again, rest - 1))
            for timer in doomed:
                timer.cancel()

        timers.at(calls.start + 1, partial(again, 2))
        doomed += [timers.at(calls.start + when, partial(calls.note, "doomed")) for when in (1.5, 2.5, 9)]
        await trio.sleep(20)
        assert calls.seen == [("again 2", 1), ("again 1", 2), ("again 0", 3)]
        assert len(timers._heap) == 0


async def test_a_callback_may_cancel_so_many_that_the_heap_is_swept_under_it(autojump_clock: MockClock) -> None:
    async with running() as timers:
        calls = Calls()
        doomed = [timers.at(calls.start + 1, partial(calls.note, "doomed")) for _ in range(500)]
        kept = [timers.at(calls.start + 1, partial(calls.note, "kept")) for _ in range(5)]

        def massacre() -> None:
            for timer in doomed:
                timer.cancel()

        timers.at(calls.start + 0.5, massacre)
        await trio.sleep(3)
        assert [name for name, _ in calls.seen] == ["kept"] * len(kept)


async def test_a_sweep_comes_when_more_than_half_are_cancelled_and_not_before(autojump_clock: MockClock) -> None:
    timers = Timers()
    some = [timers.at(1_000.0 + number, nothing) for number in range(1_000)]
    for timer in some[:500]:
        timer.cancel()
    assert len(timers._heap) == 1_000
    some[500].cancel()
    assert len(timers._heap) == 499


async def test_cancelled_timers_whose_time_has_come_count_for_no_sweep(autojump_clock: MockClock) -> None:
    async with running() as timers:
        for _ in range(SWEEP_AT_LEAST):
            timers.at(trio.current_time() + 1, nothing).cancel()
        await trio.sleep(2)
        assert len(timers._heap) == 0
        some = [timers.at(1_000_000.0 + number, nothing) for number in range(1_000)]
        for timer in some[:500]:
            timer.cancel()
        assert len(timers._heap) == 1_000


async def test_a_few_cancelled_timers_are_not_worth_a_sweep(autojump_clock: MockClock) -> None:
    timers = Timers()
    some = [timers.at(1_000.0 + number, nothing) for number in range(SWEEP_AT_LEAST + 1)]
    for timer in some[:SWEEP_AT_LEAST]:
        timer.cancel()
    assert len(timers._heap) == SWEEP_AT_LEAST + 1
    some[-1].cancel()
    assert len(timers._heap) == 0


@pytest.mark.parametrize("fate", ["cancelled", "called"])
async def test_a_timer_lets_go_of_its_callback_at_once(autojump_clock: MockClock, fate: str) -> None:
    class Run:
        def overdue(self) -> None:
            pass

    async with running() as timers:
        run = Run()
        ref = weakref.ref(run)
        timer = timers.at(trio.current_time() + 1, run.overdue)
        del run
        assert ref() is not None
        if fate == "cancelled":
            timer.cancel()
        else:
            await trio.sleep(2)
        gc.collect()
        assert ref() is None


async def test_without_timers_the_task_sleeps(autojump_clock: MockClock) -> None:
    async with running() as timers:
        await trio.sleep(1_000)
        calls = Calls()
        timers.at(calls.start + 1, partial(calls.note, "a"))
        await trio.sleep(2)
        assert calls.seen == [("a", 1)]


@given(st.lists(st.tuples(st.sampled_from(["set", "cancel", "sleep"]), st.integers(0, 20)), max_size=60))
def test_each_timer_calls_back_once_at_its_time_unless_it_was_cancelled_before(steps: list[tuple[str, int]]) -> None:
    async def main() -> None:
        async with running() as timers:
            start = trio.current_time()
            called: dict[int, float] = {}
            made: list[tuple[Timer, float]] = []
            cancelled: set[int] = set()

            def note(number: int) -> None:
                assert number not in called
                called[number] = trio.current_time()

            for step, amount in steps:
                if step == "set":
                    when = trio.current_time() + amount
                    made.append((timers.at(when, partial(note, len(made))), when))
                elif step == "sleep":
                    await trio.sleep(amount)
                elif made:
                    number = amount % len(made)
                    if number not in called:
                        cancelled.add(number)
                    made[number][0].cancel()
            await trio.sleep(start + 100_000 - trio.current_time())
            assert called == {number: when for number, (_, when) in enumerate(made) if number not in cancelled}
            assert len(timers._heap) == 0

    in_virtual_time(main)
