"""The MemoryLog's own limits, each at its edge, and that it keeps nothing of what it dropped."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigurationError, RunNotFound
from penstock.log import AppendStatus, Batch, Idempotency, Page
from penstock.log.memory import RUN_OVERHEAD, MemoryLog
from penstock.log.open import open_log
from penstock.runs import RunStatus
from tests.support.logs import COMPLETED, LEASE, LOST_ENDING, batch, entries, in_virtual_time, record, seqs

if TYPE_CHECKING:
    from trio.testing import MockClock


async def write(log: MemoryLog, run_id: str, first: int, last: int, size: int = 100, *, ended: bool = False) -> None:
    (reply,) = await log.append([batch(first, last, COMPLETED if ended else None, run_id=run_id, size=size)])
    assert reply.status is AppendStatus.OK


async def run_of(log: MemoryLog, run_id: str, last: int, size: int = 100, *, ended: bool = False) -> None:
    await log.start(record(run_id), LEASE)
    await write(log, run_id, 1, last, size, ended=ended)


async def there(log: MemoryLog) -> list[str]:
    return sorted(run.id for run in await log.list(limit=10_000))


async def page_of(log: MemoryLog, run_id: str) -> Page:
    return await log.read(run_id, 0, max_entries=100_000, max_bytes=10**9)


def empty(log: MemoryLog) -> bool:
    return not (log._runs or log._ended or log._keys or log._inboxes or log._size)


# --- knobs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0, -1, -0.5, math.nan, None, "1", True])
@pytest.mark.parametrize("name", ["max_entries", "max_run_bytes", "max_bytes", "ttl"])
def test_a_limit_that_is_not_above_zero_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"{name} is a number above 0"):
        MemoryLog(**{name: value})


@pytest.mark.parametrize("url", ["memory:", "memory:///", "memory://x", "memory://?x=1", "memori://", "", "redis"])
async def test_a_url_that_names_no_log_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="there is no event log"):
        async with open_log(url):
            raise AssertionError("opened")


async def test_the_url_of_memory_opens_a_memory_log_with_its_limits(autojump_clock: MockClock) -> None:
    async with open_log("memory://", ttl=5, max_entries=3) as log:
        assert isinstance(log, MemoryLog)
        await run_of(log, "r", 9, ended=True)
        assert seqs((await page_of(log, "r")).entries) == [7, 8, 9]
        await trio.sleep(5)
        assert await there(log) == []


# --- the limits of a run --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("last, oldest", [(4, 1), (5, 1), (6, 2), (100, 96)])
async def test_a_run_keeps_so_many_entries(autojump_clock: MockClock, last: int, oldest: int) -> None:
    log = MemoryLog(max_entries=5)
    await run_of(log, "r", last)
    page = await page_of(log, "r")
    assert (seqs(page.entries), page.oldest_seq) == (list(range(oldest, last + 1)), oldest)
    assert page.run.seq == last


@pytest.mark.parametrize("last, oldest", [(4, 1), (5, 1), (6, 2), (100, 96)])
async def test_a_run_keeps_so_many_bytes(autojump_clock: MockClock, last: int, oldest: int) -> None:
    log = MemoryLog(max_run_bytes=500)
    await log.start(record("r"), LEASE)
    for seq in range(1, last + 1):
        await write(log, "r", seq, seq)
    assert seqs((await page_of(log, "r")).entries) == list(range(oldest, last + 1))
    assert log._size == RUN_OVERHEAD + 100 * (last - oldest + 1)


async def test_the_newest_entry_is_kept_however_large_and_small_the_limits(autojump_clock: MockClock) -> None:
    log = MemoryLog(max_run_bytes=50, max_bytes=10)
    await run_of(log, "r", 2)
    assert seqs((await page_of(log, "r")).entries) == [2]
    await write(log, "r", 3, 3, ended=True)
    page = await page_of(log, "r")
    assert [(each.seq, each.terminal) for each in page.entries] == [(3, True)]
    assert log._size == RUN_OVERHEAD + 100


# --- the limit of all runs ------------------------------------------------------------------------------------------


async def test_all_runs_share_so_many_bytes_and_the_run_that_ended_first_goes_first(autojump_clock: MockClock) -> None:
    log = MemoryLog(max_bytes=4 * (RUN_OVERHEAD + 500))
    for run_id in ("a", "b", "c", "d"):
        await run_of(log, run_id, 4)
    for run_id in ("c", "a", "d"):
        await write(log, run_id, 5, 5, ended=True)
    await write(log, "b", 5, 5)
    assert log._size == 4 * (RUN_OVERHEAD + 500)
    assert await there(log) == ["a", "b", "c", "d"]
    await write(log, "b", 6, 6)
    assert await there(log) == ["a", "b", "d"]
    with pytest.raises(RunNotFound):
        await log.get("c")
    await write(log, "b", 7, 50)
    assert await there(log) == ["b", "d"]
    await write(log, "b", 51, 70)
    assert await there(log) == ["b"]


async def test_starting_a_run_makes_room_as_well(autojump_clock: MockClock) -> None:
    log = MemoryLog(max_bytes=10 * RUN_OVERHEAD)
    for number in range(100):
        await log.start(record(f"r{number}"), LEASE)
        assert log._size <= 10 * RUN_OVERHEAD
        await write(log, f"r{number}", 1, 1, ended=True)
    assert await there(log) == [f"r{number}" for number in range(91, 100)]


async def test_a_live_run_is_never_dropped_but_gives_up_its_oldest_entries(autojump_clock: MockClock) -> None:
    log = MemoryLog(max_bytes=2 * RUN_OVERHEAD + 1_000)
    await run_of(log, "a", 5)
    await run_of(log, "b", 5)
    assert log._size == 2 * RUN_OVERHEAD + 1_000
    await write(log, "a", 6, 6)
    assert seqs((await page_of(log, "a")).entries) == [2, 3, 4, 5, 6]
    assert seqs((await page_of(log, "b")).entries) == [1, 2, 3, 4, 5]
    await write(log, "b", 6, 40)
    assert seqs((await page_of(log, "b")).entries) == [36, 37, 38, 39, 40]
    assert log._size == 2 * RUN_OVERHEAD + 1_000
    assert await there(log) == ["a", "b"]


async def test_the_run_that_is_being_ended_is_not_dropped_for_its_own_last_words(autojump_clock: MockClock) -> None:
    log = MemoryLog(max_bytes=RUN_OVERHEAD + 300)
    await run_of(log, "r", 2)
    await write(log, "r", 3, 8, ended=True)
    page = await page_of(log, "r")
    assert (seqs(page.entries), page.run.status) == ([6, 7, 8], RunStatus.COMPLETED)
    await log.start(record("s"), LEASE)
    assert await there(log) == ["s"]


async def test_an_ended_run_is_kept_for_exactly_its_time(autojump_clock: MockClock) -> None:
    log = MemoryLog(ttl=100)
    await run_of(log, "r", 2)
    await trio.sleep(500)
    await write(log, "r", 3, 3, ended=True)
    await trio.sleep(99.9)
    assert await there(log) == ["r"]
    await trio.sleep(0.1)
    assert await there(log) == []
    assert empty(log)


async def test_runs_expire_in_the_order_in_which_they_ended(autojump_clock: MockClock) -> None:
    log = MemoryLog(ttl=100)
    for run_id in ("a", "b", "c"):
        await run_of(log, run_id, 1)
    for run_id in ("b", "a", "c"):
        await trio.sleep(10)
        await write(log, run_id, 2, 2, ended=True)
    left = []
    for _ in range(3):
        left.append(await there(log))
        await trio.sleep(10 if len(left) > 1 else 80)
    assert left == [["a", "b", "c"], ["a", "c"], ["c"]]


# --- what is left ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["ttl", "max_bytes"])
async def test_d10_nothing_is_kept_of_a_run_that_was_dropped(autojump_clock: MockClock, how: str) -> None:
    log = MemoryLog(ttl=10 if how == "ttl" else 1e9, max_bytes=10**9 if how == "ttl" else RUN_OVERHEAD)
    async with log.wakeups("owner"):
        for number in range(50):
            run_id = f"r{number}"
            await log.start(record(run_id), LEASE, Idempotency(f"key {number}", "request"))
            await log.request_cancel(run_id, "stop")
            await write(log, run_id, 1, 3)
            await log.append([batch(4, 4, LOST_ENDING.ending, run_id=run_id)])
            await log.cancel_requests("owner")
        if how == "ttl":
            await trio.sleep(10)
            assert await there(log) == []
            assert empty(log)
        else:
            await log.start(record("last"), LEASE)
            assert await there(log) == ["last"]
            assert (len(log._runs), len(log._ended), len(log._keys), log._size) == (1, 0, 0, RUN_OVERHEAD)


async def test_nothing_is_kept_for_an_owner_that_has_left(autojump_clock: MockClock) -> None:
    log = MemoryLog()
    async with log.wakeups("owner") as wakeups:
        await wakeups.subscribe("r")
        await log.start(record(), LEASE)
        await log.request_cancel("r", "stop")
    assert not log._wakeups
    assert not log._inboxes
    await log.start(record("s"), LEASE)
    await log.request_cancel("s", "stop")
    assert not log._inboxes


async def test_a_cancelled_call_has_happened_or_not(autojump_clock: MockClock) -> None:
    log = MemoryLog()
    with trio.CancelScope() as scope:
        scope.cancel()
        await log.start(record(), LEASE, Idempotency("key", "request"))
    assert scope.cancelled_caught
    assert empty(log)
    await log.start(record(), LEASE)
    for call in (
        lambda: log.append([batch(1, 2, COMPLETED)]),
        lambda: log.request_cancel("r", "stop"),
        lambda: log.reap(lambda: LOST_ENDING),
    ):
        with trio.CancelScope() as scope:
            scope.cancel()
            await call()
        assert scope.cancelled_caught
    run = await log.get("r")
    assert (run.status, run.seq, run.cancel_reason) == (RunStatus.RUNNING, 0, None)


@given(
    st.lists(
        st.tuples(st.sampled_from(["write", "write", "end", "sleep"]), st.integers(0, 4), st.integers(1, 6)),
        max_size=50,
    ),
    st.integers(1, 8),
    st.integers(50, 500),
    st.integers(50, 6 * RUN_OVERHEAD),
)
def test_whatever_is_written_the_sizes_add_up_and_the_limits_hold(
    steps: list[tuple[str, int, int]], max_entries: int, max_run_bytes: int, max_bytes: int
) -> None:
    async def main() -> None:
        log = MemoryLog(max_entries=max_entries, max_run_bytes=max_run_bytes, max_bytes=max_bytes, ttl=20)
        for step, which, amount in steps:
            run_id = f"r{which}"
            if step == "sleep":
                await trio.sleep(amount)
                continue
            if run_id not in await there(log):
                await log.start(record(run_id), LEASE)
            last = (await log.get(run_id)).seq
            ending = COMPLETED if step == "end" else None
            made = entries(last + 1, last + amount, 40 * amount, terminal=step == "end")
            await log.append([Batch(run_id, "epoch", made, ending)])
            total = 0
            running = 0
            for run in await log.list(limit=100):
                kept = (await page_of(log, run.id)).entries
                assert seqs(kept) == list(range(run.seq - len(kept) + 1, run.seq + 1))
                size = sum(len(each.wire) for each in kept)
                assert len(kept) <= max_entries
                assert size <= max_run_bytes or len(kept) == 1
                total += RUN_OVERHEAD + size
                running += run.status is RunStatus.RUNNING
            assert log._size == total
            # What cannot be dropped is what is running, and the last run that was written.
            assert total <= max_bytes or len(await there(log)) <= running + 1
        listed = await log.list(limit=100)  # which drops what has expired meanwhile
        assert set(log._ended) == {run.id for run in listed if run.status.terminal}

    in_virtual_time(main)
