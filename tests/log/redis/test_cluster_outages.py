"""A node of a real cluster that stands still, is dead or takes no writes holds up its own runs, and no others."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from redis.crc import key_slot
from trio.testing import wait_all_tasks_blocked

from penstock.errors import LogUnavailable
from penstock.log import AppendStatus, Lease
from penstock.log.open import open_log
from penstock.log.redis.schema import Keys
from penstock.supervisor import open_supervisor
from tests.support.clustered import ClusteredServer
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
    from collections.abc import AsyncIterator, Callable, Sequence

    from penstock.log import EventLog
    from penstock.supervisor import Supervisor
    from tests.support.redis_clusters import Cluster
    from tests.support.redis_servers import RedisServer

KEYS = Keys()
MANY = 50
"""So many entries come to readers of other runs while a node is away."""
PATIENT = 600.0
"""Seconds without an answer after which nodes take another for failed: no test waits for that."""


class Three:
    """A cluster of three masters, and names for what is to be on each of them."""

    def __init__(self, cluster: Cluster[RedisServer]) -> None:
        self.cluster = cluster
        self.server = ClusteredServer(cluster)
        self.url = cluster.url
        self._numbers = iter(range(100_000))
        self._nodes = [(cluster.slot(record_of(f"run-{n}")) * 3 // 16384, f"run-{n}") for n in range(3_000)]

    def run_on(self, node: RedisServer) -> str:
        """A run id that no other call returns."""
        number = self.cluster.nodes.index(node)
        at = next(at for at, (each, _) in enumerate(self._nodes) if each == number)
        return self._nodes.pop(at)[1]

    def node_of(self, key: str) -> RedisServer:
        return self.cluster.nodes[self.cluster.slot(key) * 3 // 16384]

    def last_without_inbox(self, *supervisors: Supervisor) -> list[RedisServer]:
        """The nodes, the last of them one that has the inbox of none of these two."""
        inboxes = {self.node_of(KEYS.inbox(each._owner)) for each in supervisors}
        last = next(node for node in self.cluster.nodes if node not in inboxes)
        return [*(node for node in self.cluster.nodes if node is not last), last]

    def key_on(self, node: RedisServer) -> str:
        """An idempotency key."""
        return next(key for key in (f"key-{n}" for n in self._numbers) if self.node_of(KEYS.idempotency(key)) is node)


@asynccontextmanager
async def three(**options: Any) -> AsyncIterator[Three]:
    async with redis_cluster(node_timeout=PATIENT, **options) as cluster:
        yield Three(cluster)


async def goes_on(all_of: Sequence[Any], others: Sequence[Any] = ()) -> None:
    """Many more entries come to all of these readers, and none to the others."""
    before = [last_seq(reader) for reader in others]
    seen = max(map(last_seq, all_of))
    await until(lambda: min(map(last_seq, all_of)) > seen + MANY)
    assert [last_seq(reader) for reader in others] == before


def wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a node that stands still waits for as long as it does, and not for a timeout."""
    monkeypatch.setattr("penstock.log.redis.backend.ANSWER_TIMEOUT", PATIENT)


async def test_while_a_node_stands_still_all_goes_on_that_is_on_others(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_ever(monkeypatch)
    async with three() as works, supervisors(works.url, works.url, lease=6.0) as (owner, other):
        nodes = works.last_without_inbox(owner, other)
        several = [Ticks() for _ in nodes]
        ids = [works.run_on(node) for node in nodes]
        for ticks, run_id in zip(several, ids, strict=True):
            await owner.start(ticks, run_id=run_id)
        silent = Witness()
        await owner.start(silent.waits, run_id=(quiet := works.run_on(nodes[0])))
        async with readers(*((each, run_id) for run_id in ids for each in (owner, other))) as following:
            await until(lambda: min(map(last_seq, following)) >= 20)
            nodes[2].pause()
            await until(lambda: several[2].said > last_seq(following[4]))
            await goes_on(following[:4])
            with trio.fail_after(15):
                started = [
                    await each.start(count, 50, run_id=works.run_on(node))
                    for node in nodes[:2]
                    for each in (owner, other)
                ]
                for run in started:
                    for each in (owner, other):
                        assert gists(await read(each, run.id)) == [*map(str, range(1, 51)), "[DONE]"]
                await other.cancel(quiet, "enough")
                assert (await other.wait(quiet)).cancel_reason == "enough"
            lease_end = int(await works.server.command("HGET", record_of(ids[0]), "lease_end"))
            owner._leases.renew_now()
            await until_it_is(partial(is_renewed, works, ids[0], lease_end), True)
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


async def is_renewed(works: Three, run_id: str, before: int) -> bool:
    return int(await works.server.command("HGET", record_of(run_id), "lease_end")) > before


async def test_supervisors_that_open_while_a_node_is_dead_have_the_use_of_the_others() -> None:
    async with three() as works:
        nodes = works.cluster.nodes
        await nodes[1].kill()
        async with supervisors(*[works.url] * 4, lease=6.0) as (owner, other, *rest):
            ids = [works.run_on(node) for node in (nodes[0], nodes[2])]
            several = [Ticks() for _ in ids]
            for ticks, run_id in zip(several, ids, strict=True):
                await owner.start(ticks, run_id=run_id, idempotency_key=works.key_on(nodes[0]))
            with pytest.raises(LogUnavailable):
                await owner.start(count, 3, run_id=works.run_on(nodes[1]))
            with pytest.raises(LogUnavailable):
                await owner.start(count, 3, run_id=works.run_on(nodes[0]), idempotency_key=works.key_on(nodes[1]))
            async with readers(*((each, run_id) for run_id in ids for each in (owner, other, *rest))) as following:
                await goes_on(following)
                await other.cancel(ids[0], "enough")
                assert (await other.wait(ids[0])).status == "cancelled"
                several[1].enough.set()
            record = await same_everywhere(works.server, ids[0], following[:4])
            assert record["cancel_reason"] == "enough"
            counted(await same_everywhere(works.server, ids[1], following[4:]), several[1])
            assert not owner._runs.by_id
            for each in (owner, other, *rest):
                await nothing_is_left(each)


@pytest.mark.parametrize("writes", [True, False], ids=["writing", "silent"])
async def test_a_cancel_reaches_an_owner_whose_inbox_is_dead(writes: bool) -> None:
    lease = 3_600.0 if writes else 3.0
    async with three() as works, supervisors(works.url, works.url, lease=lease) as (owner, other):
        dead = works.node_of(KEYS.inbox(owner._owner))
        there = next(node for node in works.cluster.nodes if node is not dead)
        ticks, witness, with_key = Ticks(), Witness(), Ticks()
        run = await owner.start(ticks if writes else witness.waits, run_id=works.run_on(there))
        keyed = await owner.start(with_key, run_id=works.run_on(there), idempotency_key=works.key_on(dead))
        async with readers((owner, run.id), (other, run.id), (other, keyed.id)) as following:
            await until(lambda: min(map(last_seq, following)) >= 1)
            await dead.kill()
            await other.cancel(run.id, "why")
            await until(lambda: (ticks if writes else witness).left)
            await goes_on(following[2:])
            with_key.enough.set()
        assert (ticks if writes else witness).saw in {"run cancelled: why", None if writes else ""}
        assert (await same_everywhere(works.server, run.id, following[:2]))["status"] == "cancelled"
        counted(await same_everywhere(works.server, keyed.id, following[2:]), with_key)
        for each in (owner, other):
            await nothing_is_left(each)


def name_on(cluster: Cluster[RedisServer], node: RedisServer, prefix: str, key_of: Callable[[str], str]) -> str:
    """A name whose key has its slot on this node, in a cluster of three masters whose slots have not moved."""
    number = cluster.nodes.index(node)
    names = (f"{prefix}-{n}" for n in range(1_000))
    return next(name for name in names if key_slot(key_of(name).encode()) * 3 // 16384 == number)


def run_on(cluster: Cluster[RedisServer], node: RedisServer, prefix: str = "run") -> str:
    """A run id whose slot is this node's."""
    return name_on(cluster, node, prefix, record_of)


@asynccontextmanager
async def without(node: RedisServer) -> AsyncIterator[None]:
    """The node stands still."""
    node.pause()
    try:
        yield
    finally:
        node.resume()


async def test_whichever_node_stands_still_listings_hold_up_nobody_else_and_the_log_is_ready_and_can_be_opened(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wait_for_ever(monkeypatch)
    async with redis_cluster(node_timeout=PATIENT) as cluster, open_log(cluster.url) as log:
        for node in cluster.nodes:
            await log.start(record(run_on(cluster, node)), Lease("owner", "epoch", PATIENT))
        for node in cluster.nodes:
            others = [each for each in cluster.nodes if each is not node]
            wait_for_ever(monkeypatch)
            async with without(node), trio.open_nursery() as nursery:
                for _ in range(40):
                    nursery.start_soon(log.list)
                await wait_all_tasks_blocked()
                with trio.fail_after(SOON):
                    for each in others:
                        run_id = run_on(cluster, each)
                        assert (await log.get(run_id)).id == run_id
                        started = run_on(cluster, each, f"started-{node.port}")
                        await log.start(record(started), Lease("owner", "epoch", PATIENT))
                    await log.check()
                nursery.cancel_scope.cancel()
            assert len(await log.list()) >= len(cluster.nodes)

            monkeypatch.setattr("penstock.log.redis.backend.ANSWER_TIMEOUT", 2.0)
            async with without(node):
                with trio.fail_after(SOON):
                    async with log.wakeups(name_on(cluster, node, "owner", Keys().process)):
                        pass  # though the node is away that would tell it of cancel requests
                    async with supervisor_at(cluster.url) as supervisor:
                        await supervisor.check()
                        run = await supervisor.start(count, 3, run_id=run_on(cluster, others[0], f"new-{node.port}"))
                        assert gists(await read(supervisor, run.id)) == ["1", "2", "3", "[DONE]"]


async def test_a_node_whose_replica_does_not_keep_what_it_must_is_away_and_new_runs_go_elsewhere() -> None:
    async with (
        redis_cluster(replicas=1, node_timeout=PATIENT) as cluster,
        open_log(cluster.url, wait_replicas=1) as log,
        open_supervisor(log, drain_timeout=0) as supervisor,
    ):
        await log.check()
        node = cluster.nodes[1]
        shard = log.shard(run_on(cluster, node))
        for each in log.shards():
            await log.check(each)
        (replica,) = await cluster.replicas(node)
        async with without(replica):
            for ask in (
                partial(supervisor.start, count, 1, run_id=run_on(cluster, node)),
                partial(log.check, shard),
                partial(log.reap, lambda: LOST_ENDING, shard=shard),
            ):
                with pytest.raises(LogUnavailable, match="0 of the 1 replicas"):
                    await ask()
            await until(lambda: supervisor._leases.is_away(shard))
            runs = [await supervisor.start(count, 1) for _ in range(24)]
            assert shard not in {log.shard(run.id) for run in runs}
            assert {log.shard(run.id) for run in runs} == {*log.shards()} - {shard}
            await supervisor.check()


async def test_a_node_that_lets_only_readers_in_while_the_cluster_is_down_is_away_and_refuses_no_run() -> None:
    whole: dict[str, Any] = {"cluster_require_full_coverage": "yes", "cluster_allow_reads_when_down": "yes"}
    async with redis_cluster(node_timeout=1.0, **whole) as cluster, open_log(cluster.url) as log:
        dead, there, _ = cluster.nodes
        run_id = run_on(cluster, there)
        await log.start(record(run_id), Lease("owner", "epoch", PATIENT))
        assert await answer_to_append(log, run_id, 1) is AppendStatus.OK
        await dead.kill()
        await until_it_is(partial(state_of, there), "fail")
        assert await answer_to_append(log, run_id, 2) in {"away", AppendStatus.AWAY}
        assert (await log.get(run_id)).seq == 1


async def state_of(node: RedisServer) -> str:
    """What the cluster's state is by this node."""
    state: str = (await node.command("CLUSTER INFO"))["cluster_state"]
    return state


async def answer_to_append(log: EventLog, run_id: str, seq: int) -> Any:
    try:
        (reply,) = await log.append([batch(seq, seq, run_id=run_id)])
    except LogUnavailable:
        return "away"
    return reply.status
