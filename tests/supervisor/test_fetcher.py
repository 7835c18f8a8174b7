"""The fetcher and its readers: notifications, outages, release, and runs that vanish or move to another shard."""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from penstock.errors import CursorExpired, LogUnavailable, ReaderReleased, RunNotFound
from penstock.observer import NullObserver
from penstock.supervisor.fetcher import LOADED, MISSING_GRACE, MISSING_PAUSE, Fetcher
from penstock.supervisor.settings import Settings
from tests.supervisor.test_committer_shards import BACK, away
from tests.support.committing import lose_last
from tests.support.following import Reading, read_to_the_end, reading
from tests.support.logs import CANCELLED, COMPLETED, LOST_ENDING
from tests.support.parted import Parted

if TYPE_CHECKING:
    from trio.testing import MockClock

    from penstock.log.memory import _Stored

# --- wake-ups -------------------------------------------------------------------------------------------------------


async def test_a_lost_wake_up_is_healed_by_the_next(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(1)
        async with works.follow(1) as follower, trio.open_nursery() as nursery:
            seen: list[int] = []

            async def read() -> None:
                seen.extend(await read_to_the_end(follower))

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            works.wakeups.deaf = True
            await works.append(2, 5)
            await trio.sleep(100)
            assert works.tails.all()[0].last == 1
            works.wakeups.deaf = False
            await works.append(6, 6)
            await trio.sleep(1)
            assert works.tails.all()[0].last == 6
            await works.append(7, 7, COMPLETED)
        assert seen == [2, 3, 4, 5, 6, 7]


async def test_a_lost_wake_up_is_healed_by_another_reader_as_well(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(1)
        async with works.follow(1) as first:
            works.wakeups.deaf = True
            await works.append(2, 5, COMPLETED)
            await trio.sleep(1)
            async with works.follow() as second:
                assert await read_to_the_end(second) == [1, 2, 3, 4, 5]
                assert await read_to_the_end(first) == [2, 3, 4, 5]


async def test_one_fetch_serves_all_runs_that_have_moved_and_all_their_readers(autojump_clock: MockClock) -> None:
    async with reading(spacing=1.0) as works, trio.open_nursery() as nursery:
        seen: list[list[int]] = []

        async def read(run_id: str) -> None:
            async with works.follow(run_id=run_id) as follower:
                seen.append(await read_to_the_end(follower))

        for number in range(20):
            await works.run(run_id=f"r{number}")
            for _ in range(10):
                nursery.start_soon(read, f"r{number}")
        await wait_all_tasks_blocked()
        works.log.calls.clear()
        for number in range(20):
            await works.append(1, 2, run_id=f"r{number}")
        await trio.sleep(1.5)
        assert works.log.calls["fetch"] <= 2
        for number in range(20):
            await works.append(3, 3, COMPLETED, run_id=f"r{number}")
        await trio.sleep(2.5)
        assert works.log.calls["fetch"] <= 4
        assert works.log.calls["read"] == 0
        assert seen == [[1, 2, 3]] * 200


def moved(works: Reading, run_id: str, seq: int) -> None:
    """Tell the process of it; those that are told of in one step come as one."""
    wakeups: Any = works.wakeups.wakeups
    wakeups.moved(run_id, seq)


@pytest.mark.parametrize("runs", [1, LOADED // 2, 3 * LOADED])
async def test_a_fetch_is_followed_by_the_part_of_the_spacing_that_its_runs_make(
    autojump_clock: MockClock, runs: int
) -> None:
    async with reading(spacing=1.0) as works, AsyncExitStack() as readers:
        for number in range(runs):
            await works.run(run_id=f"r{number}")
            await readers.enter_async_context(works.follow(run_id=f"r{number}"))
        await wait_all_tasks_blocked()
        began, fetches = trio.current_time(), []

        async def note(call: str) -> None:
            if call == "fetch":
                fetches.append(trio.current_time() - began)

        works.log.before = note
        works.wakeups.deaf = True
        for number in range(runs):
            await works.append(1, 5, run_id=f"r{number}")  # however many entries each of them has
        await wait_all_tasks_blocked()
        works.wakeups.deaf = False
        for number in range(runs):
            moved(works, f"r{number}", 5)
        await trio.sleep(0.01)
        await works.append(6, 6, run_id="r0")
        await trio.sleep(2)
        assert fetches == [0, pytest.approx(min(1.0, runs / LOADED))]


async def test_a_wake_up_that_needs_no_fetch_holds_back_none(autojump_clock: MockClock) -> None:
    async with reading(spacing=1.0) as works, AsyncExitStack() as readers:
        for number in range(LOADED):
            await works.run(3, run_id=f"r{number}")
            await readers.enter_async_context(works.follow(3, run_id=f"r{number}"))
        for number in range(LOADED):
            moved(works, f"r{number}", 3)
        await wait_all_tasks_blocked()
        assert works.log.calls["fetch"] == 0
        await works.append(4, 4, run_id="r0")
        await wait_all_tasks_blocked()
        assert works.log.calls["fetch"] == 1


async def test_d15_an_idle_reader_and_one_that_has_left_cost_no_calls(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(3)
        async with works.follow(3), trio.open_nursery() as nursery:
            await trio.sleep(1)
            works.log.calls.clear()
            await trio.sleep(300)
            assert works.log.calls.total() == 0
            nursery.cancel_scope.cancel()
        await works.append(4, 9)
        await trio.sleep(10)
        assert works.log.calls.total() == 0
        assert works.left_behind() == []


async def test_d42_readers_share_one_tail_and_one_subscription_however_many_they_are(
    autojump_clock: MockClock,
) -> None:
    async with reading() as works, trio.open_nursery() as nursery:
        await works.run(5)
        done: list[list[int]] = []

        async def read(after: int) -> None:
            async with works.follow(after) as follower:
                done.append(await read_to_the_end(follower))

        for number in range(100):
            nursery.start_soon(read, number % 6)
        await wait_all_tasks_blocked()
        assert [len(tail._lot) for tail in works.tails.all()] == [100]
        assert works.wakeups.subscribed == {"r"}
        await works.append(6, 9, COMPLETED)
        await trio.sleep(1)
        assert sorted(done) == sorted([list(range(number % 6 + 1, 10)) for number in range(100)])
        assert works.log.calls["fetch"] == 1


async def test_d10_nothing_is_kept_of_runs_whose_readers_have_left(autojump_clock: MockClock) -> None:
    async with reading() as works:
        for number in range(20):
            await works.run(3, COMPLETED if number % 2 else None, run_id=f"r{number}")
            async with works.follow(run_id=f"r{number}") as follower:
                await anext(follower)
            assert works.left_behind() == []
            assert works.tails.size == 0


# --- outages --------------------------------------------------------------------------------------------------------


async def test_a_log_that_is_away_refuses_a_reader_on_entering(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(3, COMPLETED)
        works.log.away = True
        follower = works.follow()
        with pytest.raises(LogUnavailable):
            await follower.__aenter__()
        assert works.left_behind() == []
        works.log.away = False
        async with follower:
            assert await read_to_the_end(follower) == [1, 2, 3]


# --- release --------------------------------------------------------------------------------------------------------


async def test_released_readers_get_what_there_is_and_then_the_reason(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(3)
        async with works.follow() as follower, works.follow(3) as waiting:
            gone = ReaderReleased("the server is shutting down")

            async def wait() -> None:
                with pytest.raises(ReaderReleased) as caught:
                    await anext(waiting)
                assert caught.value is gone

            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await wait_all_tasks_blocked()
                works.fetcher.evict_readers(gone)
            assert [(await anext(follower)).seq for _ in range(3)] == [1, 2, 3]
            with pytest.raises(ReaderReleased):
                await anext(follower)
        with pytest.raises(ReaderReleased):
            await works.follow().__aenter__()


# --- runs that vanish -----------------------------------------------------------------------------------------------


async def test_d34_a_reader_of_a_run_that_vanishes_is_told_so(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(2)
        async with works.follow(2) as follower:
            await works.append(3, 3, CANCELLED)
            del works.log._runs["r"]
            works.log._ended.clear()
            with pytest.raises(RunNotFound):
                await anext(follower)


async def test_one_run_that_vanishes_or_was_trimmed_away_keeps_no_other_from_its_readers(
    autojump_clock: MockClock,
) -> None:
    async with reading() as works:
        await works.run(1, run_id="trimmed")
        await works.run(1, run_id="good")
        async with works.follow(1, run_id="trimmed") as trimmed, works.follow(1, run_id="good") as good:
            await works.append(2, 9, run_id="trimmed")
            works.log._runs["trimmed"].ring.clear()
            await works.append(2, 3, COMPLETED, run_id="good")
            with trio.fail_after(5):
                assert await read_to_the_end(good) == [2, 3]
                with pytest.raises(CursorExpired) as caught:
                    await anext(trimmed)
            assert caught.value.oldest_seq == 10
            await trio.sleep(1)
            works.log.calls.clear()
            await trio.sleep(100)
            assert works.log.calls.total() == 0


# --- runs that are missing for a while -------------------------------------------------------------------------------


async def lost_to(works: Reading, last: int = 5) -> _Stored:
    """What the log had of a run with so many entries, of which a reader has just heard that it has moved."""
    await works.run(last)
    return works.log._runs["r"]


def vanish(works: Reading) -> None:
    """The log loses the run, and tells that it is gone, as it does after it was out of reach."""
    del works.log._runs["r"]
    tell(works, 2**53)


def tell(works: Reading, seq: int) -> None:
    """A wake-up that says how far the run is."""
    inner: Any = works.wakeups.wakeups
    inner.moved("r", seq)


@pytest.mark.parametrize("missing", [0.1, MISSING_GRACE - MISSING_PAUSE])
async def test_the_readers_of_a_run_that_comes_back_in_time_go_on(autojump_clock: MockClock, missing: float) -> None:
    async with reading() as works:
        stored = await lost_to(works)
        async with works.follow() as first, works.follow(5) as second, trio.open_nursery() as nursery:
            seen: list[list[int]] = [[], []]
            for number, follower in enumerate((first, second)):
                nursery.start_soon(partial(read_to_the_end, follower, seen=seen[number]))
            await wait_all_tasks_blocked()
            vanish(works)
            await trio.sleep(missing)
            works.log._runs["r"] = stored
            await trio.sleep(2 * MISSING_GRACE)
            works.log.calls.clear()
            await trio.sleep(100)
            assert works.log.calls.total() == 0  # it is looked for no more
            await works.append(6, 7, COMPLETED)
        assert seen == [[1, 2, 3, 4, 5, 6, 7], [6, 7]]
        assert all(worker.idle for worker in works.fetcher.shards)


async def test_the_readers_of_a_run_that_is_missing_for_too_long_are_told_so_and_those_to_come_as_well(
    autojump_clock: MockClock,
) -> None:
    async with reading() as works:
        await lost_to(works)
        async with works.follow(5) as follower:
            began = trio.current_time()
            vanish(works)
            with pytest.raises(RunNotFound):
                await anext(follower)
            assert MISSING_GRACE <= trio.current_time() - began <= MISSING_GRACE + 2 * MISSING_PAUSE
            works.log.calls.clear()
            await trio.sleep(100)
            assert works.log.calls.total() == 0
            with pytest.raises(RunNotFound):
                await works.follow(5).__aenter__()
        assert all(worker.idle for worker in works.fetcher.shards)


async def test_a_run_that_is_missing_is_looked_for_with_a_pause_however_often_it_is_told_of(
    autojump_clock: MockClock,
) -> None:
    async with reading() as works:
        await lost_to(works)
        async with works.follow(5) as follower, trio.open_nursery() as nursery:

            async def read() -> None:
                with pytest.raises(RunNotFound):
                    await anext(follower)

            nursery.start_soon(read)
            await wait_all_tasks_blocked()
            works.log.calls.clear()
            vanish(works)
            await trio.sleep(MISSING_GRACE + 2 * MISSING_PAUSE)
            assert MISSING_GRACE / MISSING_PAUSE <= works.log.calls["fetch"] <= MISSING_GRACE / MISSING_PAUSE + 2


async def test_a_run_that_is_missing_again_later_has_all_of_the_grace_again(autojump_clock: MockClock) -> None:
    async with reading() as works:
        stored = await lost_to(works)
        async with works.follow(5) as follower, trio.open_nursery() as nursery:
            seen: list[int] = []
            nursery.start_soon(partial(read_to_the_end, follower, seen=seen))
            await wait_all_tasks_blocked()
            for number in range(5):
                vanish(works)
                await trio.sleep(0.7 * MISSING_GRACE)
                works.log._runs["r"] = stored
                await trio.sleep(1.5 * MISSING_PAUSE)
                await works.append(6 + number, 6 + number)
                await trio.sleep(0.1)
            await works.append(11, 11, COMPLETED)
        assert seen == [6, 7, 8, 9, 10, 11]


async def test_a_run_whose_readers_leave_while_it_is_missing_is_looked_for_no_more(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await lost_to(works)
        async with works.follow(5):
            vanish(works)
            await trio.sleep(2)
            assert works.log.calls["fetch"]
        await trio.sleep(1)
        works.log.calls.clear()
        await trio.sleep(100)
        assert works.log.calls.total() == 0
        assert all(worker.idle for worker in works.fetcher.shards)


async def test_i4_a_reader_who_has_seen_more_than_the_log_has_kept_ends_with_the_run(
    autojump_clock: MockClock,
) -> None:
    async with reading() as works:
        await works.run(10)
        async with works.follow() as follower:
            assert [(await anext(follower)).seq for _ in range(10)] == list(range(1, 11))
            lose_last(works.log, "r", 3)  # and its owner is gone, and gives nothing back
            await trio.sleep(31)
            assert list(await works.log.reap(lambda: LOST_ENDING)) == ["r"]
            assert works.log._runs["r"].run.seq == 9
            with trio.fail_after(100):
                assert [each.seq async for each in follower] == []
        async with works.follow(10) as late:
            assert late.at_end


async def test_i2_a_reader_of_the_history_who_is_ahead_of_a_log_that_is_given_it_again_goes_on_when_it_is_there(
    autojump_clock: MockClock,
) -> None:
    async with reading() as works:
        await works.run(600)
        async with works.follow() as follower, trio.open_nursery() as nursery:
            seen: list[int] = []
            nursery.start_soon(partial(read_to_the_end, follower, seen=seen))
            lose_last(works.log, "r", 300)
            await trio.sleep(1)
            assert seen == list(range(1, 501))
            await works.append(301, 600)
            await trio.sleep(1)
            assert seen == list(range(1, 601))
            await works.append(601, 601, COMPLETED)


# --- readmission ----------------------------------------------------------------------------------------------------


async def test_readers_that_were_released_for_good_are_not_readmitted_with_those_that_were_not(
    autojump_clock: MockClock,
) -> None:
    async with reading() as works:
        await works.run(3)
        for_good, away = ReaderReleased("the server is shutting down"), ReaderReleased("the log is away")
        async with works.follow(3) as follower:
            works.fetcher.evict_readers(for_good)
            works.fetcher.evict_readers(away, everyone=True, shard="")
            works.fetcher.readmit(away, "")
            for reader in (follower, works.follow(3)):
                with pytest.raises(ReaderReleased) as caught:
                    await (anext(reader) if reader is follower else reader.__aenter__())
                assert caught.value is for_good


async def test_a_release_spares_the_readers_of_runs_that_are_fed_here_unless_everyone_is_meant(
    autojump_clock: MockClock,
) -> None:
    async with reading() as works:
        await works.run(3)
        tail = works.tails.acquire("r")
        tail.fed = True
        works.fetcher.evict_readers(ReaderReleased("for those of others"))
        assert tail.released is None
        away = ReaderReleased("for everyone")
        works.fetcher.evict_readers(away, everyone=True, shard="")
        assert tail.released is away
        works.fetcher.readmit(ReaderReleased("of another outage"), "")
        assert works.tails.get("r") is tail
        works.fetcher.readmit(away, "")
        assert works.tails.get("r") is None  # it stays released, and those to come get another
        works.fetcher.release(tail)


async def test_i4_a_reader_that_comes_while_readers_are_sent_away_is_not_forgotten_when_they_may_come_again(
    autojump_clock: MockClock,
) -> None:
    async with reading() as works:
        await works.run(3)
        away = ReaderReleased("the log is away")
        works.fetcher.evict_readers(away, everyone=True, shard="")
        works.log.latency = 1.0
        seen: list[int] = []
        with trio.fail_after(100):
            async with trio.open_nursery() as nursery:

                async def read() -> None:
                    with suppress(ReaderReleased):
                        await works.follow().__aenter__()
                    async with works.follow() as follower:
                        await read_to_the_end(follower, seen=seen)

                nursery.start_soon(read)
                await trio.sleep(0.5)
                works.fetcher.readmit(away, "")
                await trio.sleep(5)
                await works.append(4, 5, COMPLETED)
        assert seen == [1, 2, 3, 4, 5]


class Seen:
    """What readers got of each run."""

    def __init__(self, works: Reading) -> None:
        self.works = works
        self.of: dict[str, list[int]] = {}

    async def read(self, run_id: str, *, task_status: trio.TaskStatus[None]) -> None:
        seen = self.of[run_id] = []
        async with self.works.follow(run_id=run_id) as follower:
            task_status.started()
            await read_to_the_end(follower, seen=seen)


async def end(works: Reading, run_id: str, first: int) -> None:
    await works.append(first, first, COMPLETED, run_id=run_id)


@pytest.mark.parametrize("how", ["gone", "silent"])
async def test_a_shard_that_is_away_holds_up_its_own_readers_alone(autojump_clock: MockClock, how: str) -> None:
    log = Parted("a", "b")
    log.where = {"1": "a", "2": "b", "3": "a"}
    async with reading(log) as works, trio.open_nursery() as nursery:
        seen = Seen(works)
        for run_id in log.where:
            await works.run(1, run_id=run_id)
            await nursery.start(seen.read, run_id)
        back = away(log, "b", how)
        for seq in range(2, 50):
            for run_id in log.where:
                await works.append(seq, seq, run_id=run_id)
            await trio.sleep(0.01)
        assert {run_id: got[-1:] for run_id, got in seen.of.items()} == {"1": [49], "2": [1], "3": [49]}
        await trio.sleep(100)
        back()
        await trio.sleep(BACK)
        assert seen.of["2"][-1] == 49
        for run_id in log.where:
            await end(works, run_id, 50)
        await trio.sleep(1)
        assert [*seen.of.values()] == [[*range(1, 51)]] * 3
        assert all(worker.idle for worker in works.fetcher.shards)


@pytest.mark.parametrize("how", ["gone", "at a time when others are not", "lost"])
async def test_the_readers_of_a_run_that_moves_miss_nothing(autojump_clock: MockClock, how: str) -> None:
    log = Parted("a", "b")
    log.where = {"r": "a", "other": "a"}
    async with reading(log) as works, trio.open_nursery() as nursery:
        seen = Seen(works)
        for run_id in log.where:
            await works.run(1, run_id=run_id)
            await nursery.start(seen.read, run_id)
        await trio.sleep(1)
        kept = log._runs["r"]
        if how == "gone":
            log.gone.add("a")
        elif how == "lost":
            del log._runs["r"]
            works.fetcher.moved({"r": 1_000})
        else:

            async def move(call: str) -> None:
                if call == "fetch":
                    log.where["r"] = "b"
                    log.gone.add("b")

            log.before = move
        if how != "lost":
            works.wakeups.deaf = True
            for run_id in ("r", "other"):
                await works.append(2, 5, run_id=run_id)
            await wait_all_tasks_blocked()
            works.wakeups.deaf = False
            for run_id in ("r", "other"):
                works.fetcher.moved({run_id: 5})  # in one step, so that they are fetched at once
        await trio.sleep(MISSING_PAUSE * 1.5)
        assert seen.of["r"] == [1]
        log.before = None
        log._runs["r"] = kept
        log.where["r"] = "b"
        log.gone.discard("b")
        if how != "at a time when others are not":  # or nothing more is told of it
            await works.append(2 if how == "lost" else 6, 9, run_id="r")
        await trio.sleep(BACK)
        last = kept.ring.last
        assert seen.of["r"] == [*range(1, last + 1)]
        log.gone.clear()
        await end(works, "r", last + 1)
        await end(works, "other", 6 if how != "lost" else 2)
        await trio.sleep(BACK)
        assert all(worker.idle for worker in works.fetcher.shards)


async def test_a_fetcher_that_is_being_left_takes_up_nothing_more(autojump_clock: MockClock) -> None:
    for _ in range(10):  # who of those that wake at the same time is first is a matter of chance
        log = Parted("a")
        async with reading(log) as works:
            await works.run(3)
            log.names.append("b")
            log.where["r"] = "b"
            confirmed, over = trio.Event(), trio.CancelScope()
            fetcher = Fetcher(log, works.tails, Settings(commit_spacing=0.0), NullObserver())

            async def subscribe(run_id: str, confirmed: trio.Event = confirmed) -> None:
                await confirmed.wait()

            works.wakeups.subscribe = subscribe  # type: ignore[method-assign]
            fetcher.connect(works.wakeups)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(run_in, over, fetcher)
                nursery.start_soon(fetcher.follow_elsewhere, "r")
                await wait_all_tasks_blocked()
                confirmed.set()
                over.cancel()  # as the supervisor does at its end: not the fetcher's own scope


async def run_in(scope: trio.CancelScope, fetcher: Fetcher) -> None:
    with scope:
        await fetcher.shards.run()
