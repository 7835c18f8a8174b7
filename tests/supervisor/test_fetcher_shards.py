"""A log of several parts: one that is away holds up the readers of its runs alone, and those of a run that moves miss
nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.observer import NullObserver
from penstock.supervisor.fetcher import MISSING_PAUSE, Fetcher
from penstock.supervisor.settings import Settings
from tests.supervisor.test_committer_shards import BACK, away
from tests.support.following import Reading, read_to_the_end, reading
from tests.support.logs import COMPLETED
from tests.support.parted import Parted

if TYPE_CHECKING:
    from trio.testing import MockClock


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
async def test_a_part_that_is_away_holds_up_its_own_readers_alone(autojump_clock: MockClock, how: str) -> None:
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


async def test_the_feeds_of_parts_that_are_gone_are_closed(autojump_clock: MockClock) -> None:
    log = Parted("0", "stays")
    log.where = {"r": "0", "other": "stays"}
    async with reading(log) as works, trio.open_nursery() as nursery:
        seen = Seen(works)
        for run_id in log.where:
            await works.run(run_id=run_id)
            await nursery.start(seen.read, run_id)
        for number in range(1, 20):
            await works.append(number, number, run_id="r")
            await works.append(number, number, run_id="other")
            await trio.sleep(0.1)
            log.names[0] = log.where["r"] = str(number)
            assert len([*works.fetcher.shards]) <= 2 + 1.1 / 0.1
        for run_id in ("r", "other"):
            await end(works, run_id, 20)
        await trio.sleep(1)
        assert [*seen.of.values()] == [[*range(1, 21)]] * 2


async def test_a_fetcher_that_is_being_left_takes_up_nothing_more(autojump_clock: MockClock) -> None:
    for _ in range(30):  # who of those that wake at the same time is first is a matter of chance
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
