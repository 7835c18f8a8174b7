"""A node of a real cluster that stands still, is dead or takes no writes holds up its own runs, and no others."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.errors import LogUnavailable, ReaderReleased
from penstock.log import AppendStatus, Lease
from penstock.log.open import open_log
from penstock.log.redis.schema import Keys
from penstock.supervisor import open_supervisor
from tests.support.clustered import Works
from tests.support.logs import LOST_ENDING, batch, record
from tests.support.redis_clusters import redis_cluster
from tests.support.redis_runs import (
    SOON,
    Ticks,
    counted,
    last_seq,
    nothing_is_left,
    record_of,
    same_everywhere,
    supervisor_at,
    supervisors,
    until,
    until_it_is,
)
from tests.support.supervising import Witness, count, gists, read, readers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from tests.support.redis_servers import RedisServer

KEYS = Keys()
shares_works = pytest.mark.xdist_group("works")
MANY = 10
"""So many entries come to readers of other runs while a node is away."""
PATIENT = 600.0
"""Seconds without an answer after which nodes take another for failed: no test waits for that."""


async def goes_on(all_of: Sequence[Any], others: Sequence[Any] = ()) -> None:
    before = [last_seq(reader) for reader in others]
    seen = max(map(last_seq, all_of))
    await until(lambda: min(map(last_seq, all_of)) > seen + MANY)
    assert [last_seq(reader) for reader in others] == before


def wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a node that stands still waits for as long as it does, and not for a timeout."""
    monkeypatch.setattr("penstock.log.redis.backend.ANSWER_TIMEOUT", PATIENT)


@asynccontextmanager
async def without(node: RedisServer) -> AsyncIterator[None]:
    node.pause()
    try:
        yield
    finally:
        node.resume()


@shares_works
async def test_while_a_node_stands_still_the_others_go_on(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_ever(monkeypatch)
    async with supervisors(works.url, works.url, lease=6.0) as (owner, other):
        nodes = works.last_without_inbox(owner, other)
        several = [Ticks() for _ in nodes]
        ids = [works.run_on(node) for node in nodes]
        for ticks, run_id in zip(several, ids, strict=True):
            await owner.start(ticks, run_id=run_id)
        silent = Witness()
        await owner.start(silent.waits, run_id=(quiet := works.run_on(nodes[0])))
        async with readers(*((each, run_id) for run_id in ids for each in (owner, other))) as following:
            await until(lambda: min(map(last_seq, following)) >= 5)
            nodes[2].pause()
            await until(lambda: several[2].said > last_seq(following[4]))
            await goes_on(following[:4])
            with trio.fail_after(15):
                started = [
                    await each.start(count, 5, run_id=works.run_on(node))
                    for node in nodes[:2]
                    for each in (owner, other)
                ]
                for run in started:
                    for each in (owner, other):
                        assert gists(await read(each, run.id)) == [*map(str, range(1, 6)), "[DONE]"]
                await other.cancel(quiet, "enough")
                assert (await other.wait(quiet)).cancel_reason == "enough"
            lease_end = await lease_end_of(works, ids[0])
            owner._leases.renew_now()

            async def renewed() -> bool:
                return await lease_end_of(works, ids[0]) > lease_end

            await until_it_is(renewed, True)
            await goes_on(following[:4])
            assert not nodes[2].is_living
            nodes[2].resume()
            said = several[2].said
            await until(lambda: min(map(last_seq, following[4:])) > said)
            for ticks in several:
                ticks.enough.set()
        for number, (run_id, ticks) in enumerate(zip(ids, several, strict=True)):
            counted(await same_everywhere(works.server, run_id, following[2 * number : 2 * number + 2]), ticks)
        assert silent.saw == "run cancelled: enough"
        for each in (owner, other):
            await nothing_is_left(each)


async def lease_end_of(works: Works, run_id: str) -> int:
    return int(await works.server.command("HGET", record_of(run_id), "lease_end"))


@shares_works
async def test_after_the_outage_limit_a_node_loses_its_runs_and_readers_and_is_of_use_again_later(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.log.redis.backend.ANSWER_TIMEOUT", 1.5)  # a busy node answers sooner
    kept, gone = Ticks(), Ticks()
    ids = [works.run_on(node) for node in (works.first, works.second)]
    async with supervisors(works.url, works.url, lease=6.0, outage_limit=2.5) as (owner, other):
        for ticks, run_id in ((kept, ids[0]), (gone, ids[1])):
            await owner.start(ticks, run_id=run_id)
        async with readers(*((each, run_id) for run_id in ids for each in (owner, other))) as following:
            await until(lambda: min(map(last_seq, following)) >= 5)
            async with without(works.second):
                await until(lambda: gone.left and all(reader.ended_at for reader in following[2:]))
                assert [type(reader.error) for reader in following[2:]] == [ReaderReleased] * 2
                await goes_on(following[:2])

            async def is_of_use() -> bool:
                try:
                    run = await owner.start(count, 3, run_id=works.run_on(works.second))
                    return all([gists(await read(each, run.id))[-1] == "[DONE]" for each in (owner, other)])
                except (LogUnavailable, ReaderReleased):
                    return False

            await until_it_is(is_of_use, True)
            assert (await other.wait(ids[1])).status == "lost"
            await goes_on(following[:2])
            kept.enough.set()
        counted(await same_everywhere(works.server, ids[0], following[:2]), kept)
        assert gists(await read(other, ids[1]))[-2:] == ["error RUN_LOST", "[DONE]"]


async def test_a_dead_node_delays_no_cancel_and_no_supervisor_on_other_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    async with redis_cluster(node_timeout=PATIENT) as cluster, AsyncExitStack() as stack:
        works = Works(cluster)
        both = await stack.enter_async_context(supervisors(works.url, works.url, lease=3.0))
        owner, other = both
        dead = works.node_of(KEYS.inbox(owner._owner))
        there, elsewhere = (node for node in works.nodes if node is not dead)
        ticks, silent, with_key = Ticks(), Witness(), Ticks()
        ids = [works.run_on(there) for _ in range(3)]
        await owner.start(ticks, run_id=ids[0])
        await owner.start(silent.waits, run_id=ids[1])
        await owner.start(with_key, run_id=ids[2], idempotency_key=works.key_on(dead))
        async with readers(*((each, run_id) for run_id in ids for each in both)) as following:
            await until(lambda: min(map(last_seq, following)) >= 1)
            await dead.kill()
            for run_id in ids[:2]:
                await other.cancel(run_id, "why")
            await until(lambda: ticks.left and silent.left)
            await goes_on(following[4:])
            with_key.enough.set()
        assert silent.saw == "run cancelled: why"
        for number, run_id in enumerate(ids[:2]):
            record = await same_everywhere(works.server, run_id, following[2 * number : 2 * number + 2])
            assert (record["status"], record["cancel_reason"]) == ("cancelled", "why")
        counted(await same_everywhere(works.server, ids[2], following[4:]), with_key)

        late = [*both, *await stack.enter_async_context(supervisors(works.url, works.url, lease=6.0))]
        fresh, cancelled = Ticks(), Ticks()
        opened = late[2]
        ids = [works.run_on(there), works.run_on(elsewhere)]
        for each, run_id in ((fresh, ids[0]), (cancelled, ids[1])):
            await opened.start(each, run_id=run_id, idempotency_key=works.key_on(there))
        for run_id, key in ((works.run_on(dead), None), (works.run_on(there), works.key_on(dead))):
            with pytest.raises(LogUnavailable):
                await opened.start(count, 3, run_id=run_id, idempotency_key=key)
        async with readers(*((each, run_id) for run_id in ids for each in late)) as following:
            await goes_on(following)
            await other.cancel(ids[1], "enough")
            assert (await other.wait(ids[1])).status == "cancelled"
            fresh.enough.set()
        counted(await same_everywhere(works.server, ids[0], following[:4]), fresh)
        await same_everywhere(works.server, ids[1], following[4:])
        for each in late:
            await nothing_is_left(each)


@shares_works
async def test_while_a_node_stands_still_listings_hold_up_nobody_else_and_the_log_is_ready_and_can_be_opened(
    works: Works, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait_for_ever(monkeypatch)
    node, *others = works.nodes
    lease = Lease("owner", "epoch", PATIENT)
    async with open_log(works.url) as log:
        ids = [works.run_on(each) for each in works.nodes]
        for run_id in ids:
            await log.start(record(run_id), lease)
        async with without(node), trio.open_nursery() as nursery:
            for _ in range(40):
                nursery.start_soon(log.list)
            await wait_all_tasks_blocked()
            with trio.fail_after(SOON):
                for each, run_id in zip(others, ids[1:], strict=True):
                    assert (await log.get(run_id)).id == run_id
                    await log.start(record(works.run_on(each)), lease)
                await log.check()
            nursery.cancel_scope.cancel()
        assert {*ids} <= {run.id for run in await log.list()}

        monkeypatch.setattr("penstock.log.redis.backend.ANSWER_TIMEOUT", 0.5)
        async with without(node):
            with trio.fail_after(SOON):
                async with log.wakeups(works.name_on(node, KEYS.process)):
                    pass  # though the node is away that would tell it of cancel requests
                async with supervisor_at(works.url) as supervisor:
                    await supervisor.check()
                    run = await supervisor.start(count, 3, run_id=works.run_on(others[0]))
                    assert gists(await read(supervisor, run.id)) == ["1", "2", "3", "[DONE]"]


async def test_a_node_whose_replica_lags_is_away_and_new_runs_go_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    async with (
        redis_cluster(masters=2, replicas=1, node_timeout=PATIENT) as cluster,
        open_log(cluster.url, wait_replicas=1) as log,
        open_supervisor(log, drain_timeout=0) as supervisor,
    ):
        await log.check()
        node, (shard, there) = cluster.nodes[1], [f"127.0.0.1:{each.port}" for each in cluster.nodes[1::-1]]
        (run_id, *_) = [name for name in map("run-{}".format, range(99)) if log.shard(name) == shard]
        for each in (shard, there):
            await log.check(each)
        (replica,) = await cluster.replicas(node)
        monkeypatch.setattr("penstock.log.redis.client.REPLICAS_TIMEOUT", 0.3)
        async with without(replica):
            for ask in (
                partial(supervisor.start, count, 1, run_id=run_id),
                partial(log.check, shard),
                partial(log.reap, lambda: LOST_ENDING, shard=shard),
            ):
                with pytest.raises(LogUnavailable, match="0 of the 1 replicas"):
                    await ask()
            await until(lambda: supervisor._leases.is_away(shard))
            monkeypatch.setattr("penstock.log.redis.client.REPLICAS_TIMEOUT", SOON)
            runs = [await supervisor.start(count, 1) for _ in range(12)]
            assert {log.shard(run.id) for run in runs} == {there}
            await supervisor.check()


async def test_while_a_cluster_that_wants_all_slots_served_is_down_it_serves_readers_and_refuses_no_run() -> None:
    whole: dict[str, Any] = {"cluster_require_full_coverage": "yes", "cluster_allow_reads_when_down": "yes"}
    async with redis_cluster(node_timeout=1.0, **whole) as cluster, open_log(cluster.url) as log:
        dead, there, _ = cluster.nodes
        await log.check()
        run_id = Works(cluster).run_on(there)
        await log.start(record(run_id), Lease("owner", "epoch", PATIENT))
        (reply,) = await log.append([batch(1, 1, run_id=run_id)])
        assert reply.status is AppendStatus.OK
        await dead.kill()
        await until_it_is(partial(state_of, there), "fail")
        try:
            (reply,) = await log.append([batch(2, 2, run_id=run_id)])
            said = reply.words * (reply.status is AppendStatus.AWAY)
        except LogUnavailable as error:
            said = str(error)
        assert "its cluster is down" in said
        assert (await log.get(run_id)).seq == 1
        await dead.restart(empty=True)
        await cluster.settled()
        (reply,) = await log.append([batch(2, 2, run_id=run_id)])
        assert reply.status is AppendStatus.OK


async def state_of(node: RedisServer) -> str:
    state: str = (await node.command("CLUSTER INFO"))["cluster_state"]
    return state
