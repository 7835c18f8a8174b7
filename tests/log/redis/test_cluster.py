"""The client of a cluster: which node is sent what, and what becomes of it if nodes stall, die or lose their slots."""

from __future__ import annotations

import random
from functools import partial
from itertools import count
from typing import TYPE_CHECKING, Any

import pytest
import trio
from redis.crc import REDIS_CLUSTER_HASH_SLOTS
from redis.exceptions import ResponseError

from penstock.errors import LogUnavailable
from penstock.log.redis import scripts
from penstock.log.redis.cluster import Cluster, open_cluster
from penstock.log.redis.slots import call
from tests.support.clustered import node_of, shares_a_cluster
from tests.support.redis_clusters import Cluster as Nodes
from tests.support.redis_clusters import redis_cluster, shared_cluster
from tests.support.redis_runs import until_it_is
from tests.support.redis_servers import Endpoint, _free_port

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock.log.redis.slots import Command

pytestmark = shares_a_cluster
GUARD = 30
until = partial(until_it_is, wanted=True, seconds=GUARD)


ONE, TWO, THREE = (next(key for key in map("key-{}".format, count()) if node_of(key) == master) for master in range(3))
"""A key on each of three masters whose slots have not moved."""
TAG = "{" + ONE + "}"


@pytest.fixture
def shared() -> Nodes[Endpoint]:
    cluster = shared_cluster()
    cluster.flushall()
    return cluster


@pytest.fixture
async def cluster(shared: Nodes[Endpoint]) -> AsyncIterator[Cluster]:
    async with open_cluster(shared.url) as cluster:
        yield cluster


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.log.redis.backend.ANSWER_TIMEOUT", 2.0)


def at(node: Endpoint) -> str:
    return f"127.0.0.1:{node.port}"


def one_of(*nodes: Endpoint) -> str:
    return "redis+cluster://" + ",".join(at(node) for node in nodes)


async def nobody_is_connected(*nodes: Endpoint) -> None:
    """Wait until no client is connected to these (nodes of a cluster are none of each other)."""

    async def nobody() -> bool:
        return not [client for node in nodes for client in await ours(node)]

    await until(nobody)


async def ours(node: Endpoint) -> list[dict[str, str]]:
    return [client for client in await node.clients() if not {*client["flags"]} & {"S", "M"}]


async def refused(cluster: Cluster, *commands: Command) -> str:
    with pytest.raises(LogUnavailable) as raised:
        await cluster.execute(commands)
    return str(raised.value)


# Sending


async def test_commands_go_to_their_nodes_and_replies_keep_order(cluster: Cluster, shared: Nodes[Endpoint]) -> None:
    keys = [f"key-{number}" for number in range(100)]
    assert await cluster.execute([("SET", key, n) for n, key in enumerate(keys)]) == [b"OK"] * 100
    assert await cluster.execute([("GET", key) for key in keys]) == [b"%d" % n for n in range(100)]
    assert all([await shared.command("GET", key, key=key) == str(n) for n, key in enumerate(keys)])
    calls = [(await node.stats())["set"] for node in shared.nodes]
    assert sum(calls) == 100
    assert all(calls)


async def test_each_node_has_its_commands_in_their_order(cluster: Cluster) -> None:
    commands = [("RPUSH", key, n) for n in range(300) for key in (ONE, TWO, THREE)]
    assert await cluster.execute(commands) == [n + 1 for n in range(300) for _ in range(3)]
    for key in (ONE, TWO, THREE):
        assert await cluster.ask("LRANGE", key, 0, -1) == [b"%d" % n for n in range(300)]


async def test_the_slots_are_asked_for_once_for_many_commands(cluster: Cluster, shared: Nodes[Endpoint]) -> None:
    assert cluster.topology.shards() == ("",)
    assert cluster.topology.shard(ONE) == ""
    async with trio.open_nursery() as nursery:
        for key in (ONE, TWO, THREE) * 5:
            nursery.start_soon(cluster.ask, "GET", key)
    assert [cluster.topology.shard(key) for key in (ONE, TWO, THREE)] == [at(node) for node in shared.nodes]
    assert sorted(cluster.topology.shards()) == sorted(at(node) for node in shared.nodes)
    await cluster.execute([("GET", key) for key in (ONE, TWO, THREE)])
    assert sum([(await node.stats()).get("cluster|slots", 0) for node in shared.nodes]) == 1


async def test_a_refusal_belongs_to_its_own_command(cluster: Cluster) -> None:
    commands: list[Command] = [("SET", ONE, 1), ("SET", TWO, 2), ("LPUSH", ONE, 2), ("LPUSH", THREE, 3), ("GET", TWO)]
    ok, _, refusal, pushed, got = await cluster.execute(commands)
    assert isinstance(refusal, ResponseError)
    assert "WRONGTYPE" in str(refusal)
    assert (ok, pushed, got) == (b"OK", 1, b"2")
    with pytest.raises(LogUnavailable, match=rf"Redis at {cluster.address} refuses a command: WRONGTYPE"):
        await cluster.ask("LPUSH", ONE, 2)


async def test_a_script_that_one_node_does_not_know_is_loaded_there(cluster: Cluster, shared: Nodes[Endpoint]) -> None:
    dues = [call(scripts.DUE, [key], 0, 10) for key in (ONE, TWO, THREE)]
    assert [runs for _, runs in await cluster.execute(dues)] == [[], [], []]
    for node in shared.nodes:
        await node.command("CONFIG RESETSTAT")
    await shared.nodes[1].command("SCRIPT FLUSH")
    assert [runs for _, runs in await cluster.execute(dues)] == [[], [], []]
    assert [(await node.stats()).get("script|load", 0) for node in shared.nodes] == [0, 1, 0]
    assert [(await node.stats())["evalsha"] for node in shared.nodes] == [1, 2, 1]


async def test_stages_are_done_one_after_the_other(cluster: Cluster) -> None:
    stages: list[list[Command]] = [[("SET", ONE, 1), ("SET", TWO, 2)], [("GET", TWO), ("GET", ONE)], [("GET", THREE)]]
    assert await cluster.in_stages(*stages) == [b"OK", b"OK", b"2", b"1", None]


async def test_a_node_that_is_left_just_before_it_is_sent_something_is_not_connected_to_again(
    shared: Nodes[Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    send, news = Cluster._send, [[0, REDIS_CLUSTER_HASH_SLOTS - 1, [b"127.0.0.1", shared.nodes[1].port]]]

    async def send_late(self: Cluster, node: Any, *args: Any, **how: Any) -> Any:
        if news and node.client.address == at(shared.nodes[0]):
            self.topology._slots.replace([news.pop()], "")
            await self.topology._leave_old_nodes()  # as if another task had asked for the slots meanwhile
        return await send(self, node, *args, **how)

    async with open_cluster(shared.url) as cluster:
        await cluster.execute([("GET", key) for key in (ONE, TWO, THREE)])
        monkeypatch.setattr(Cluster, "_send", send_late)
        assert await cluster.execute([("SET", key, 1) for key in (ONE, TWO, THREE)]) == [b"OK"] * 3
    await nobody_is_connected(*shared.nodes)


@pytest.mark.parametrize("seed", range(2))
async def test_cancellations_leave_a_usable_cluster_and_no_connections(shared: Nodes[Endpoint], seed: int) -> None:
    chance = random.Random(seed)
    keys = [f"{name}-{n}" for n in range(40) for name in (ONE, TWO, THREE)]
    async with open_cluster(shared.url) as cluster:

        async def send() -> None:
            with trio.move_on_after(chance.uniform(0, 0.03)):
                values = {key: b"%d" % chance.getrandbits(30) for key in chance.sample(keys, 30)}
                what = chance.choice(["in_turn", "beside", "script", "subscribe"])
                sets: list[Command] = [("SET", key, value) for key, value in values.items()]
                if what == "beside":
                    await cluster.best_effort(sets)
                elif what == "script":
                    await cluster.execute([call(scripts.DUE, [f"due-{key}"], 0, 10) for key in keys[:3]])
                elif what == "subscribe":
                    async with cluster.subscription(cluster.topology.shard(ONE)) as subscription:
                        await subscription.subscribe([ONE])
                else:
                    replies = await cluster.in_stages(sets, [("STRLEN", key) for key in values])
                    assert replies[:30] == [b"OK"] * 30
                    assert all(0 < length < 11 for length in replies[30:])

        await cluster.ask("GET", ONE)
        for _ in range(8):
            async with trio.open_nursery() as nursery:
                for _ in range(8):
                    nursery.start_soon(send)
        for n, key in enumerate(keys):
            assert await cluster.execute([("SET", key, n), ("GET", key)]) == [b"OK", b"%d" % n]
        for node in shared.nodes:
            assert len(await ours(node)) <= 12
    await nobody_is_connected(*shared.nodes)


async def test_a_cluster_whose_nodes_nobody_reaches_is_away_at_once() -> None:
    urls = ",".join(f"127.0.0.1:{_free_port()}" for _ in range(3))
    async with open_cluster(f"redis+cluster://{urls}") as cluster:
        with trio.fail_after(5):
            assert await refused(cluster, ("GET", ONE))
            await cluster.best_effort([("GET", ONE)])
            with pytest.raises(LogUnavailable):
                await cluster.in_stages([("GET", ONE)], [("GET", TWO)])
            with pytest.raises(LogUnavailable):
                async with cluster.subscription("127.0.0.1:1"):
                    pytest.fail("there is no such node")
        assert cluster.topology.shards() == ("",)


@pytest.mark.parametrize("kind", ["unknown-endpoint", "hostname"])
async def test_nodes_that_do_not_say_their_host_have_the_one_at_which_they_were_reached(kind: str) -> None:
    async with redis_cluster(cluster_preferred_endpoint_type=kind) as own, open_cluster(own.url) as cluster:
        assert await cluster.execute([("SET", key, 1) for key in (ONE, TWO, THREE)]) == [b"OK"] * 3
        assert sorted(cluster.topology.shards()) == sorted(at(node) for node in own.nodes)
        await own.begin_move(own.slot(ONE), own.nodes[1])
        assert await cluster.execute([("SET", f"{TAG}new", 1), ("GET", f"{TAG}new")]) == [b"OK", b"1"]
        await own.finish_move(own.slot(ONE), own.nodes[1])
        assert await cluster.execute([("GET", f"{TAG}new"), ("GET", TWO)]) == [b"1", b"1"]
        assert sorted(cluster.topology.shards()) == sorted(at(node) for node in own.nodes)


# Nodes that are away


@pytest.mark.usefixtures("impatient")
async def test_a_node_that_is_away_holds_up_its_own_commands_alone() -> None:
    async with redis_cluster() as own, open_cluster(own.url) as cluster:
        first, second, third = own.nodes
        await cluster.execute([("SET", key, "value") for key in (ONE, TWO, THREE)])

        # Stalled: whoever wants nothing of it goes on, and whoever does waits once, for all that it wants.
        third.pause()
        done: list[str] = []

        async def stalled() -> None:
            commands: list[Command] = [("GET", THREE), ("SET", THREE, "x"), ("INCR", TAG), ("GET", TWO)]
            refusal, again, _, got = await cluster.execute(commands)
            assert got == b"value"
            assert isinstance(refusal, LogUnavailable)
            assert refusal is again
            assert f"Redis at {at(third)} has not answered for 2 s" in str(refusal)
            done.append("stalled")

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(stalled)
            for _ in range(20):
                assert await cluster.execute([("GET", ONE), ("GET", TWO)]) == [b"value"] * 2
                assert await cluster.in_stages([("GET", ONE)], [("GET", TWO)]) == [b"value"] * 2
                await cluster.best_effort([("SET", THREE, "beside")])
                await cluster.best_effort([("INCR", f"{{{TWO}}}beside")])
            assert not done
            for key in (TAG, f"{{{TWO}}}beside"):  # what is for others has been sent
                await until(partial(has, cluster, key))
            assert not done
        assert done == ["stalled"] * 3

        # A later stage is not begun if something of an earlier one is not done.
        with pytest.raises(LogUnavailable, match="has not answered"):
            await cluster.in_stages([("SET", ONE, "stage"), ("GET", THREE)], [("SET", TWO, "stage")])
        assert await cluster.execute([("GET", ONE), ("GET", TWO)]) == [b"stage", b"value"]
        third.resume()
        await until(lambda: has(cluster, THREE))
        stages = await cluster.in_stages([("SET", ONE, "value"), ("GET", TWO)], [("LPUSH", THREE, 1), ("GET", TWO)])
        assert isinstance(stages[2], ResponseError)  # done, and refused

        # Dead: the same, and at once.
        await third.kill()
        got, refusal = await cluster.execute([("GET", ONE), ("GET", THREE)])
        assert got == b"value"
        assert isinstance(refusal, LogUnavailable)
        assert at(third) in str(refusal)
        assert at(third) in await refused(cluster, ("GET", THREE), ("SET", THREE, 1))
        with pytest.raises(LogUnavailable):
            async with cluster.subscription(at(third)) as subscription:
                await subscription.subscribe([THREE])
        assert await cluster.in_stages([("GET", ONE)], [("GET", TWO)]) == [b"value"] * 2

        # All of them: nothing is left to answer, and nobody waits for `beside`.
        await first.kill()
        second.pause()
        done.clear()

        async def all_of_them() -> None:
            assert await refused(cluster, *[("GET", key) for key in (ONE, TWO, THREE)])
            done.append("refused")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(all_of_them)
            for key in (ONE, TWO, THREE):
                await cluster.best_effort([("SET", key, "x")])
            assert not done


async def has(cluster: Cluster, key: str) -> bool:
    (there,) = await asked(cluster, ("EXISTS", key))
    return bool(there == 1)


async def asked(cluster: Cluster, *commands: Command) -> list[Any]:
    try:
        return await cluster.execute(commands)
    except LogUnavailable as error:
        return [error] * len(commands)


async def test_a_replica_that_takes_over_is_found_from_a_url_that_names_the_dead_and_its_attempts_are_rerouted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("penstock.log.redis.backend.ANSWER_TIMEOUT", 3.0 * GUARD)  # nothing here waits for that
    monkeypatch.setattr("penstock.log.redis.cluster.REDIRECTION_LIMIT", GUARD)
    async with redis_cluster(replicas=1, node_timeout=1.0) as own, open_cluster(one_of(own.nodes[0])) as cluster:
        first, second, _, heir, other_heir, _ = own.nodes
        told: list[set[str]] = []
        await cluster.execute([("SET", key, "value") for key in (ONE, TWO, THREE)])
        cluster.topology.watch(lambda: told.append({*cluster.topology.shards()}))

        # Its master hands over, and says so.
        await own.promote(other_heir)
        assert await cluster.execute([("GET", key) for key in (ONE, TWO, THREE)]) == [b"value"] * 3
        assert cluster.topology.shard(TWO) == at(other_heir)
        await nobody_is_connected(second)
        assert at(second) not in cluster.topology.shards()

        # Its master stalls, with commands under way.
        first.pause()
        with trio.fail_after(GUARD):
            replies = await cluster.execute([("SET", ONE, "new"), ("GET", TWO)])
        assert replies == [b"OK", b"value"]
        assert cluster.topology.shard(ONE) == at(heir)
        assert await heir.command("GET", ONE) == "new"
        assert at(first) not in cluster.topology.shards()
        assert at(first) not in told[-1]
        assert at(heir) in told[-1]
        first.resume()
        await nobody_is_connected(first)

        # The only node that the URL names is dead.
        await first.kill()
        assert await cluster.execute([("GET", key) for key in (ONE, TWO, THREE)]) == [b"new", b"value", b"value"]
        await own.nodes[2].kill()
        await until(lambda: has(cluster, THREE))
        assert cluster.topology.shard(THREE) == at(own.nodes[5])


async def test_a_replica_is_asked_for_the_slots_if_no_primary_is_left_that_could_be() -> None:
    async with redis_cluster(masters=1, replicas=1) as own, open_cluster(own.url) as cluster:
        primary, replica = own.nodes
        await cluster.ask("SET", ONE, "value")
        cluster.topology._slots.replicas.append(
            ("127.0.0.1", replica.port)
        )  # its primary tells of it only after some seconds
        await primary.kill()
        await own.promote(replica, "TAKEOVER")
        await until(partial(has, cluster, ONE))
        assert cluster.topology.shards() == [at(replica)]
