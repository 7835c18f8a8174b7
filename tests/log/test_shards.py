"""One worker for each shard of a log: when it is made, when it is closed, and what it holds up."""

from __future__ import annotations

from contextlib import asynccontextmanager
from math import inf
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from penstock.log.shards import SHARDS_INTERVAL, Shards, ShardWorker
from tests.support.parted import Parted

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

LATER = SHARDS_INTERVAL + 0.1
"""Seconds after which the shards have been looked at again."""


class Worker(ShardWorker):
    def __init__(self, shard: str) -> None:
        super().__init__(shard)
        self.runs = False
        self.protected = False
        self.busy = False

    @property
    def idle(self) -> bool:
        return not self.busy

    async def run(self) -> None:
        self.runs = True
        self.protected = trio.lowlevel.currently_ki_protected()
        try:
            await trio.sleep_forever()
        finally:
            self.runs = False


@asynccontextmanager
async def working(log: Parted) -> AsyncIterator[Shards[Worker]]:
    shards = Shards(log, Worker)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shards.run)
        await wait_all_tasks_blocked()
        yield shards
        nursery.cancel_scope.cancel()
    assert not any(worker.runs for worker in shards)


def named(shards: Shards[Worker]) -> list[str]:
    return [worker.shard for worker in shards]


async def test_every_shard_has_a_worker_that_runs_and_that_ctrl_c_does_not_reach(autojump_clock: MockClock) -> None:
    async with working(Parted("a", "b")) as shards:
        assert named(shards) == ["a", "b"]
        assert all(worker.runs and worker.protected for worker in shards)
        assert shards.get("c") is None


async def test_a_run_has_the_worker_of_the_shard_that_it_is_on_now(autojump_clock: MockClock) -> None:
    log = Parted("a", "b")
    async with working(log) as shards:
        before = shards.of("r")
        assert (before, before.shard) == (shards.of("other"), "a")
        log.where["r"] = "b"
        assert shards.of("r") is shards.get("b")


async def test_a_worker_that_is_used_before_the_start_runs_from_the_start(autojump_clock: MockClock) -> None:
    shards = Shards(Parted("a", "b"), Worker)
    worker = shards.of("r")
    assert (named(shards), worker.runs, shards.started) == (["a"], False, False)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shards.run)
        await wait_all_tasks_blocked()
        assert (shards.of("r") is worker, worker.runs, shards.started) == (True, True, True)
        nursery.cancel_scope.cancel()


async def test_a_new_shard_has_a_worker_on_its_first_use_or_within_a_second(autojump_clock: MockClock) -> None:
    log = Parted("a")
    async with working(log) as shards:
        log.names += ["b", "c"]
        log.where["r"] = "c"
        assert shards.of("r").shard == "c"
        await wait_all_tasks_blocked()
        assert named(shards) == ["a", "c"]
        assert shards.of("r").runs
        await trio.sleep(LATER)
        assert named(shards) == ["a", "c", "b"]
        assert all(worker.runs for worker in shards)


async def test_the_first_workers_can_be_told_from_those_of_new_shards(autojump_clock: MockClock) -> None:
    log = Parted("a", "b")
    late: dict[str, bool] = {}

    def make(shard: str) -> Worker:
        late[shard] = shards.started
        return Worker(shard)

    shards = Shards(log, make)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shards.run)
        await wait_all_tasks_blocked()
        log.names.append("c")
        await trio.sleep(LATER)
        nursery.cancel_scope.cancel()
    assert late == {"a": False, "b": False, "c": True}


async def test_a_worker_is_closed_once_its_shard_is_gone_and_it_is_idle(autojump_clock: MockClock) -> None:
    log = Parted("a", "b")
    async with working(log) as shards:
        stays, goes = shards
        goes.busy = True
        log.names.remove("b")
        await trio.sleep(3 * LATER)
        assert (goes.runs, goes.closed) == (True, False)
        goes.busy = False
        await trio.sleep(LATER)
        assert (goes.runs, goes.closed) == (False, True)
        assert (list(shards), stays.closed) == ([stays], False)
        log.names.append("b")  # and it comes back
        await trio.sleep(LATER)
        assert shards.get("b") not in {None, goes}


async def test_a_worker_that_is_made_while_the_others_end_does_not_run(autojump_clock: MockClock) -> None:
    log = Parted("a")
    found: list[Worker] = []

    class Last(Worker):
        async def run(self) -> None:
            try:
                await super().run()
            finally:
                with trio.move_on_after(1, shield=True):
                    await trio.sleep_forever()
                log.where["r"] = "b"
                found.append(shards.of("r"))
                assert not shards.start_soon(trio.sleep, inf)

    shards = Shards(log, Last)
    with trio.move_on_after(1):
        await shards.run()
    assert [worker.shard for worker in found] == ["b"]
    assert not found[0].runs


async def test_a_task_beside_the_workers_ends_with_them(autojump_clock: MockClock) -> None:
    ended: list[str] = []

    async def work(name: str) -> None:
        try:
            await trio.sleep_forever()
        finally:
            ended.append(name)

    shards = Shards(Parted("a"), Worker)
    assert not shards.start_soon(work, "too early")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(shards.run)
        await wait_all_tasks_blocked()
        assert shards.start_soon(work, "in time")
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert ended == ["in time"]
    assert not shards.start_soon(work, "too late")


async def test_a_worker_that_fails_ends_the_others_and_is_raised(autojump_clock: MockClock) -> None:
    class Fails(Worker):
        async def run(self) -> None:
            if self.shard == "b":
                await trio.sleep(1)
                raise OSError("broken")
            await super().run()

    shards = Shards(Parted("a", "b"), Fails)
    with pytest.RaisesGroup(OSError):
        await shards.run()
    assert not any(worker.runs for worker in shards)
