"""cancel_when(): a block that is cut short when something says so. All time here is virtual."""

# ruff: noqa: PT012  (what is tested is a block)

from __future__ import annotations

import contextlib
import gc
import logging
import weakref
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.errors import ConfigurationError, RunCancelled
from penstock.observer.logging import LoggingObserver
from penstock.sources.cancel_when import MAX_BACKOFF, cancel_when

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock


class Switch:
    def __init__(self, answer: Any = False) -> None:
        self.answer = answer
        self.asked: list[float] = []

    async def __call__(self) -> Any:
        await trio.lowlevel.checkpoint()
        self.asked.append(trio.current_time())
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class Warnings(LoggingObserver):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def warning(self, message: str) -> None:
        self.messages.append(message)


def after(seconds: float, answer: Any) -> Callable[[], Awaitable[Any]]:
    start = trio.current_time()

    async def ask() -> Any:
        await trio.lowlevel.checkpoint()
        return answer if trio.current_time() >= start + seconds else None

    return ask


async def test_a_silent_block_is_cut_short_within_one_interval(autojump_clock: MockClock) -> None:
    start = trio.current_time()
    with pytest.raises(RunCancelled) as caught:
        async with cancel_when(after(3.2, "user pressed stop"), 0.5, run_id="run-1"):
            await trio.sleep_forever()
    assert trio.current_time() - start == 3.5
    assert (caught.value.run_id, caught.value.reason) == ("run-1", "user pressed stop")


async def test_the_block_gets_the_reason_which_is_recorded_before(autojump_clock: MockClock) -> None:
    seen = []
    with pytest.raises(RunCancelled):
        async with cancel_when(after(1, "enough")) as watch:
            assert (watch.requested, watch.reason) == (False, None)
            try:
                await trio.sleep_forever()
            except trio.Cancelled as cancelled:
                seen.append((watch.requested, watch.reason, cancelled.reason))
                raise
    assert seen == [(True, "enough", "run cancelled: enough")]


@pytest.mark.parametrize("answer, reason", [(True, None), (1, None), ("why", "why")])
async def test_an_answer_is_true_or_a_reason(autojump_clock: MockClock, answer: Any, reason: str | None) -> None:
    with pytest.raises(RunCancelled) as caught:
        async with cancel_when(Switch(answer)) as watch:
            await trio.sleep_forever()
    assert caught.value.reason == watch.reason == reason


@pytest.mark.parametrize("answer", [False, None, 0, ""])
async def test_what_is_false_is_a_no(autojump_clock: MockClock, answer: Any) -> None:
    async with cancel_when(Switch(answer)) as watch:
        await trio.sleep(5)
    assert not watch.requested


async def test_what_is_asked_may_be_an_ordinary_function(autojump_clock: MockClock) -> None:
    with pytest.raises(RunCancelled, match="sync"):
        async with cancel_when(lambda: "sync"):
            await trio.sleep_forever()


async def test_it_is_asked_at_once_and_then_at_every_interval(autojump_clock: MockClock) -> None:
    switch = Switch()
    start = trio.current_time()
    async with cancel_when(switch, 2):
        await trio.sleep(7)
    assert [when - start for when in switch.asked] == [0, 2, 4, 6]


async def test_a_cancel_from_the_start_stops_the_block_before_its_first_wait_is_over(autojump_clock: MockClock) -> None:
    start = trio.current_time()
    with pytest.raises(RunCancelled):
        async with cancel_when(Switch(True)):
            await trio.sleep(0.1)
            raise AssertionError("went on")
    assert trio.current_time() == start


async def test_wake_asks_at_once(autojump_clock: MockClock) -> None:
    switch = Switch()
    start = trio.current_time()

    async def press_stop(wake: Callable[[], None]) -> None:
        await trio.sleep(1.25)
        switch.answer = "pressed"
        wake()

    with pytest.raises(RunCancelled, match="pressed"):
        async with cancel_when(switch, 60) as watch, trio.open_nursery() as nursery:
            nursery.start_soon(press_stop, watch.wake)
            await trio.sleep_forever()
    assert trio.current_time() - start == 1.25


async def test_a_wake_asks_once(autojump_clock: MockClock) -> None:
    switch = Switch()
    async with cancel_when(switch, 60) as watch:
        for asked in range(1, 5):
            await trio.sleep(1)
            assert len(switch.asked) == asked
            watch.wake()


async def test_a_wake_during_a_poll_asks_again_after_it(autojump_clock: MockClock) -> None:
    answers = iter([None, "stop"])
    start = trio.current_time()

    async def slow() -> str | None:
        answer = next(answers)
        await trio.sleep(1)
        return answer

    with pytest.raises(RunCancelled, match="stop"):
        async with cancel_when(slow, 60) as watch:
            await trio.sleep(0.5)
            watch.wake()
            await trio.sleep_forever()
    assert trio.current_time() - start == 2


async def test_a_poll_that_fails_never_cancels_and_is_put_again_with_growing_pauses(autojump_clock: MockClock) -> None:
    switch = Switch(ConnectionError("redis is away"))
    warnings = Warnings()
    start = trio.current_time()
    async with cancel_when(switch, 1, run_id="run-1", observer=warnings) as watch:
        await trio.sleep(40)
        assert [when - start for when in switch.asked] == [0, 2, 6, 14, 24, 34]
        assert max(b - a for a, b in zip(switch.asked, switch.asked[1:], strict=False)) == MAX_BACKOFF
        switch.answer = False
        await trio.sleep(10)  # it works again, so the interval is the usual one
        assert [when - start for when in switch.asked[6:]] == [44, 45, 46, 47, 48, 49]
        switch.answer = ConnectionError("again")
        await trio.sleep(5)  # from 50 on the pauses grow anew
        assert [when - start for when in switch.asked[12:]] == [50, 52]
    assert not watch.requested
    assert len(warnings.messages) == 8
    assert "run-1" in warnings.messages[0]
    assert "redis is away" in warnings.messages[0]


async def test_failing_polls_never_come_more_often_than_the_interval(autojump_clock: MockClock) -> None:
    switch = Switch(ConnectionError())
    async with cancel_when(switch, 3 * MAX_BACKOFF, observer=Warnings()):
        await trio.sleep(10 * MAX_BACKOFF)
    assert len(switch.asked) == 4


async def test_a_cancel_after_failures_is_still_a_cancel(autojump_clock: MockClock) -> None:
    switch = Switch(ExceptionGroup("several", [ConnectionError(), TimeoutError()]))
    with pytest.raises(RunCancelled, match="at last"):
        async with cancel_when(switch, 1, observer=Warnings()):
            await trio.sleep(10)
            switch.answer = "at last"
            await trio.sleep_forever()


async def test_a_failure_is_logged_by_default(autojump_clock: MockClock, caplog: pytest.LogCaptureFixture) -> None:
    async with cancel_when(Switch(ConnectionError("gone"))):
        await trio.sleep(0.1)
    assert [(record.name, record.levelno) for record in caplog.records] == [("penstock", logging.WARNING)]
    assert "gone" in caplog.text


async def test_an_observer_that_raises_stops_nothing(autojump_clock: MockClock) -> None:
    class Broken(LoggingObserver):
        def warning(self, message: str) -> None:
            raise LookupError(message)

    switch = Switch(ConnectionError("gone"))
    async with cancel_when(switch, 1, observer=Broken()):
        await trio.sleep(7)
    assert len(switch.asked) == 3


async def test_a_slow_poll_delays_nothing_in_the_block(autojump_clock: MockClock) -> None:
    async def slow() -> bool:
        await trio.sleep(100)
        return False

    start = trio.current_time()
    async with cancel_when(slow):
        for _ in range(5):
            await trio.sleep(1)
    assert trio.current_time() - start == 5  # nor does leaving wait for its answer


async def test_a_block_that_ends_by_itself_is_not_called_cancelled(autojump_clock: MockClock) -> None:
    async with cancel_when(Switch("too late")) as watch:
        pass  # no checkpoint: the watch has had no chance to ask
    assert not watch.requested


async def test_a_block_that_ends_in_spite_of_its_cancel_has_ended_by_itself(autojump_clock: MockClock) -> None:
    async with cancel_when(Switch("stop")) as watch:
        with trio.move_on_after(3, shield=True):
            await trio.sleep_forever()
    assert watch.requested
    async with cancel_when(Switch("stop")) as watch:
        with contextlib.suppress(trio.Cancelled):  # rude, but its own decision
            await trio.sleep_forever()
    assert watch.reason == "stop"


async def test_an_answer_that_comes_after_the_end_is_not_taken(autojump_clock: MockClock) -> None:
    async def stubborn() -> str:
        with trio.CancelScope(shield=True):
            await trio.sleep(5)
        return "too late"

    async with cancel_when(stubborn) as watch:
        await trio.sleep(1)
    assert not watch.requested
    assert watch.reason is None


async def test_a_poll_that_fails_because_the_block_has_ended_harms_nobody(autojump_clock: MockClock) -> None:
    warnings = Warnings()

    async def fails_when_cancelled() -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise LookupError("no connection to give back")

    async def fails_in_a_nursery() -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails_when_cancelled)
            await trio.sleep_forever()

    for ask in (fails_when_cancelled, fails_in_a_nursery):
        async with cancel_when(ask, observer=warnings):
            await trio.sleep(1)
    assert warnings.messages == []


@pytest.mark.parametrize("asked", [False, True], ids=["no cancel", "while being cancelled"])
async def test_an_exception_of_the_block_leaves_bare(autojump_clock: MockClock, asked: bool) -> None:
    with pytest.raises(LookupError, match="mine"):
        async with cancel_when(Switch(asked)):
            try:
                await trio.sleep(1)
            finally:
                raise LookupError("mine")


async def test_a_cancellation_from_outside_stays_one(autojump_clock: MockClock) -> None:
    with trio.move_on_after(2) as scope:
        async with cancel_when(Switch()):
            await trio.sleep_forever()
    assert scope.cancelled_caught


async def test_a_cancellation_from_outside_wins_over_a_cancel_that_was_asked_for(autojump_clock: MockClock) -> None:
    with trio.CancelScope() as scope:
        async with cancel_when(Switch("stop")) as watch:
            try:
                await trio.sleep_forever()
            finally:
                scope.cancel()
                with trio.move_on_after(1, shield=True):
                    await wait_all_tasks_blocked()
    assert scope.cancelled_caught
    assert watch.requested


async def test_a_group_of_cancellations_is_cut_short_too(autojump_clock: MockClock) -> None:
    with pytest.raises(RunCancelled):
        async with cancel_when(after(1, True)), trio.open_nursery() as nursery:
            nursery.start_soon(trio.sleep_forever)
            nursery.start_soon(trio.sleep_forever)


async def test_blocks_nest_and_the_one_that_was_asked_raises(autojump_clock: MockClock) -> None:
    with pytest.raises(RunCancelled, match="outer"):
        async with cancel_when(after(2, "outer")), cancel_when(after(10, "inner")):
            await trio.sleep_forever()
    with pytest.raises(RunCancelled, match="inner"):
        async with cancel_when(after(10, "outer")), cancel_when(after(2, "inner")):
            await trio.sleep_forever()


async def test_keyboard_interrupt_in_a_poll_ends_the_block_bare(autojump_clock: MockClock) -> None:
    with pytest.raises(KeyboardInterrupt):
        async with cancel_when(Switch(KeyboardInterrupt())):
            await trio.sleep_forever()


@pytest.mark.parametrize("interval", [0, -0.5, float("nan")])
async def test_an_interval_that_is_not_above_zero_is_refused(autojump_clock: MockClock, interval: float) -> None:
    with pytest.raises(ConfigurationError, match="interval"):
        async with cancel_when(Switch(), interval):
            raise AssertionError("entered")


async def test_no_garbage_is_left_for_the_cycle_collector(autojump_clock: MockClock) -> None:
    async def cut_short() -> weakref.ref[RunCancelled]:
        try:
            async with cancel_when(Switch(True)):
                await trio.sleep_forever()
        except RunCancelled as error:
            return weakref.ref(error)
        raise AssertionError

    gc.collect()
    gc.disable()
    try:
        assert (await cut_short())() is None
    finally:
        gc.enable()
