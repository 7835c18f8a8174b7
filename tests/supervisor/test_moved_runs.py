"""Runs that move from one shard to another while a shard is unreachable."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from penstock.backoff import LONGEST_PAUSE
from penstock.sse import Event
from penstock.supervisor import open_supervisor
from tests.support.parted import Parted
from tests.support.supervising import assert_nothing_is_left, count, gists, read

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

    from penstock.supervisor import Supervisor

BACK = LONGEST_PAUSE + 1.0
"""So many seconds later whatever was to be tried again has been."""


def numbers(upto: int, every: float) -> Any:
    async def producer() -> AsyncIterator[Event]:
        for number in range(1, upto + 1):
            yield Event(data=str(number))
            await trio.sleep(every)
        await trio.sleep_forever()

    return producer


@asynccontextmanager
async def parted(*names: str, **knobs: Any) -> AsyncIterator[tuple[Parted, Supervisor]]:
    log = Parted(*names)
    async with open_supervisor(log, drain_timeout=0, **knobs) as supervisor:
        yield log, supervisor
        supervisor.interrupt()
        await supervisor._runs._until(lambda: not supervisor._runs.unsettled)
        assert_nothing_is_left(supervisor)


async def test_a_quiet_run_that_moved_from_a_dead_shard_is_committed_where_it_is_now(autojump_clock: MockClock) -> None:
    async with parted("a", "b", outage_limit=1e6) as (log, supervisor):
        await supervisor.start(numbers(2, 10.0), run_id="quiet")
        await supervisor.start(numbers(10_000, 0.1), run_id="busy")
        await trio.sleep(2)
        log.where["quiet"] = "b"
        await trio.sleep(3)
        log.gone.add("a")
        await trio.sleep(10 + BACK)
        assert (await log.get("quiet")).seq == 2
        assert supervisor._runs.by_id["busy"].buffer.stored < 60
        await supervisor.cancel("quiet", "enough")
        await trio.sleep(BACK)
        assert (await log.get("quiet")).status == "cancelled"
        assert gists(await read(supervisor, "quiet"))[:2] == ["1", "2"]
        log.gone.clear()
        await trio.sleep(BACK)


async def test_what_is_lost_of_a_run_that_moved_from_a_dead_shard_is_restored(autojump_clock: MockClock) -> None:
    async with parted("a", "b", outage_limit=1e6) as (log, supervisor):
        await supervisor.start(numbers(2, 10.0), run_id="quiet")
        await supervisor.start(numbers(10_000, 0.1), run_id="busy")
        await trio.sleep(5)
        log.gone.add("a")
        await trio.sleep(1)
        del log._runs["quiet"]  # it comes to another part by a failover, and that has not got it
        supervisor._committer.restore(supervisor._runs.by_id["quiet"].buffer)
        await trio.sleep(1)
        log.where["quiet"] = "b"
        await trio.sleep(BACK)
        assert (await log.get("quiet")).seq >= 1
        log.gone.clear()
        await trio.sleep(BACK)


async def test_a_process_may_have_less_pending_than_there_are_parts(autojump_clock: MockClock) -> None:
    shards = ("a", "b", "c")
    async with parted(*shards, max_process_pending_bytes=2) as (log, supervisor):
        log.where = {f"on-{shard}": shard for shard in shards}
        with trio.fail_after(100):
            for run_id in log.where:
                await supervisor.start(count, 3, run_id=run_id)
            for run_id in log.where:
                assert (await supervisor.wait(run_id)).status == "completed"
                assert gists(await read(supervisor, run_id)) == ["1", "2", "3", "[DONE]"]
