"""Slots that a cluster gives to another node under runs and readers: no other run of the node waits."""

from __future__ import annotations

from functools import partial

import pytest
import trio

from penstock.log.open import open_log
from tests.support.redis_clusters import redis_cluster
from tests.support.redis_runs import Ticks, exactly_once, last_seq, record_of, supervisors, until, until_it_is
from tests.support.redis_servers import _talk
from tests.support.supervising import Reader

pytestmark = pytest.mark.xdist_group("cluster")


async def go_on(following: list[Reader], entries: int) -> None:
    """Wait until each of them has got so many more."""
    goals = [(reader, last_seq(reader) + entries) for reader in following]
    await until(lambda: all(last_seq(reader) >= goal for reader, goal in goals))


async def test_a_slot_that_moves_breaks_no_subscription_of_the_node_that_had_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        redis_cluster() as cluster,
        supervisors(cluster.url, cluster.url) as (owner, other),
        trio.open_nursery() as nursery,
    ):
        ticks = Ticks(0.02)
        runs = [(await owner.start(ticks)).id for _ in range(6)]
        following = [Reader(other, run) for run in runs]
        for reader in following:
            await nursery.start(reader.run)
        node = await cluster.node_of(record_of(runs[0]))
        away = next(each for each in cluster.nodes if each is not node)
        for to in (away, node):
            await cluster.move_slot(cluster.slot(record_of(runs[0])), to)
            await go_on(following, 10)
        ticks.enough.set()
        await until(lambda: all(reader.ended_at for reader in following))
        for reader in following:
            exactly_once(reader)
    assert "subscription" not in caplog.text


async def test_a_slot_that_was_given_away_and_back_at_once_is_listened_to_again() -> None:
    async with redis_cluster() as cluster, open_log(cluster.url) as log, log.wakeups("owner") as wakeups:
        await wakeups.subscribe("run-1")
        channel = "{sse:run:run-1}:wake"
        node = await cluster.node_of(channel)
        away = next(each for each in cluster.nodes if each is not node)
        names = [await each.command("CLUSTER MYID") for each in (away, node)]
        moves = [("CLUSTER", "SETSLOT", cluster.slot(channel), "NODE", name) for name in names]
        await trio.to_thread.run_sync(partial(_talk, node.url, *moves))

        async def listeners() -> int:
            (_, number) = await node.command("PUBSUB", "SHARDNUMSUB", channel)
            return int(number)

        await until_it_is(listeners, 1)


async def test_a_run_whose_keys_are_apart_keeps_no_other_run_of_its_node_waiting() -> None:
    async with redis_cluster() as cluster, supervisors(cluster.url) as (owner,), trio.open_nursery() as nursery:
        ticks = Ticks(0.02)
        runs = [(await owner.start(ticks)).id for _ in range(12)]
        node = await cluster.node_of(record_of(runs[0]))
        away = next(each for each in cluster.nodes if each is not node)
        others = [run for run in runs[1:] if await cluster.node_of(record_of(run)) is node]
        following = [Reader(owner, run) for run in others]
        for reader in following:
            await nursery.start(reader.run)
        slot = cluster.slot(record_of(runs[0]))
        await cluster.begin_move(slot, away)
        await cluster.move_keys(slot, away, at_most=1)
        for _ in range(3):
            await go_on(following, 20)
        await cluster.finish_move(slot, away)
        ticks.enough.set()
        assert (await owner.wait(runs[0])).status == "completed"
        await until(lambda: all(reader.ended_at for reader in following))
