"""Trying again while the log is away: how long the pauses are, what is tried again, and what is not."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import trio

from penstock.backoff import FIRST_PAUSE, LONGEST_PAUSE, SHORTEST_PAUSE, WARNING_INTERVAL, retry_while_unavailable
from penstock.errors import LogFull, LogUnavailable, RunNotFound

if TYPE_CHECKING:
    from trio.testing import MockClock


class Away:
    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.times: list[float] = []
        self.warnings: list[tuple[float, str]] = []

    async def __call__(self) -> str:
        self.times.append(trio.current_time())
        await trio.lowlevel.checkpoint()
        if len(self.times) <= self.failures:
            raise LogUnavailable(f"away for the {len(self.times)}. time")
        return "there"

    async def wait(self) -> str:
        return await retry_while_unavailable(self, what="look", on_warning=self._warned)

    def _warned(self, words: str) -> None:
        self.warnings.append((trio.current_time(), words))

    @property
    def pauses(self) -> list[float]:
        return [later - earlier for earlier, later in pairwise(self.times)]


async def pauses(failures: int) -> list[float]:
    log = Away(failures)
    await log.wait()
    return log.pauses


async def test_a_call_that_succeeds_is_made_once_and_warned_of_never(autojump_clock: MockClock) -> None:
    log = Away(0)
    assert await log.wait() == "there"
    assert len(log.times) == 1
    assert log.warnings == []


async def test_the_first_failure_is_warned_of_at_once_and_says_what_failed_and_why(autojump_clock: MockClock) -> None:
    log = Away(4)
    assert await log.wait() == "there"
    assert len(log.times) == 5
    assert log.warnings == [(log.times[0], "cannot look: away for the 1. time; trying again")]


async def test_a_trouble_that_lasts_is_warned_of_at_intervals_with_the_latest_words(autojump_clock: MockClock) -> None:
    log = Away(300)
    await log.wait()
    times = [when for when, _ in log.warnings]
    for earlier, later in pairwise(times):
        assert WARNING_INTERVAL <= later - earlier <= WARNING_INTERVAL + LONGEST_PAUSE
    assert log.times[299] - times[-1] < WARNING_INTERVAL
    for when, words in log.warnings[1:]:
        assert words == f"still cannot look: away for the {log.times.index(when) + 1}. time; trying again"


async def test_the_pauses_grow_from_the_shortest_first_ones_to_the_longest(autojump_clock: MockClock) -> None:
    every = [await pauses(10) for _ in range(150)]
    columns = list(zip(*every, strict=True))
    assert max(columns[0]) <= FIRST_PAUSE + 1e-9
    for n, nth in enumerate(columns):
        assert min(nth) >= SHORTEST_PAUSE - 1e-9
        assert max(nth) <= min(FIRST_PAUSE * 2**n, LONGEST_PAUSE) + 1e-9
    limits = [max(nth) for nth in columns]
    assert limits[-1] > 0.9 * LONGEST_PAUSE  # drawn from all of it: 150 draws miss the upper tenth once in 10^6
    assert min(columns[-1]) < 0.15 * LONGEST_PAUSE
    means = [sum(nth) / len(nth) for nth in columns]
    assert means[1] < means[3] < means[5]
    assert sum(means[:3]) < 5 * FIRST_PAUSE  # an outage of a moment is over soon


async def test_no_pause_is_ever_longer_than_the_longest_however_often_it_fails(autojump_clock: MockClock) -> None:
    late = (await pauses(1_500))[10:]  # beyond what a float can double
    assert max(late) <= LONGEST_PAUSE + 1e-9
    assert min(late) >= SHORTEST_PAUSE - 1e-9
    assert 0.4 * LONGEST_PAUSE < sum(late) / len(late) < 0.6 * LONGEST_PAUSE


async def test_a_log_that_is_full_is_tried_again_as_well(autojump_clock: MockClock) -> None:
    calls = 0

    async def call() -> None:
        nonlocal calls
        calls += 1
        await trio.lowlevel.checkpoint()
        if calls < 3:
            raise LogFull("no room")

    await retry_while_unavailable(call, what="start", on_warning=lambda _: None)
    assert calls == 3


@pytest.mark.parametrize(
    "error",
    [
        ValueError("its own"),
        RunNotFound("r"),
        KeyboardInterrupt(),
        ExceptionGroup("two", [LogUnavailable("away"), ValueError("its own")]),
    ],
    ids=lambda error: type(error).__name__,
)
async def test_any_other_exception_passes_at_once_as_it_is(error: BaseException, autojump_clock: MockClock) -> None:
    warnings: list[str] = []
    began = trio.current_time()

    async def call() -> None:
        await trio.lowlevel.checkpoint()
        raise error

    with pytest.raises(type(error)) as raised:
        await retry_while_unavailable(call, what="look", on_warning=warnings.append)
    assert raised.value is error
    assert error.__cause__ is None
    assert warnings == []
    assert trio.current_time() == began


async def test_another_exception_passes_after_failures_too(autojump_clock: MockClock) -> None:
    error = ValueError("its own")
    calls = 0

    async def call() -> None:
        nonlocal calls
        calls += 1
        await trio.lowlevel.checkpoint()
        raise LogUnavailable("away") if calls < 3 else error

    with pytest.raises(ValueError, match="its own") as raised:
        await retry_while_unavailable(call, what="look", on_warning=lambda _: None)
    assert raised.value is error
    assert calls == 3


async def test_a_cancellation_ends_the_call_and_nothing_is_tried_again(autojump_clock: MockClock) -> None:
    calls = 0

    async def call() -> None:
        nonlocal calls
        calls += 1
        await trio.sleep_forever()

    with trio.move_on_after(1) as scope:
        await retry_while_unavailable(call, what="look", on_warning=pytest.fail)
    assert scope.cancelled_caught
    assert calls == 1


async def test_a_cancellation_ends_a_pause_at_once(autojump_clock: MockClock) -> None:
    log = Away(10_000)
    with trio.move_on_after(60) as scope:
        await log.wait()
    assert scope.cancelled_caught
    assert trio.current_time() - log.times[0] == pytest.approx(60)
    assert len(log.times) > 60 / LONGEST_PAUSE
