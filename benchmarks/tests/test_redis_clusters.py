"""The Redis Clusters that the suite runs against: real ones, whose nodes die and whose slots move; gone afterwards."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from redis.exceptions import AskError, MovedError, TryAgainError
from tests.support.redis_clusters import Cluster, redis_cluster, shared_cluster

from benchmarks.tests.test_redis_servers import is_running

if TYPE_CHECKING:
    from tests.support.redis_servers import Endpoint

KEYS = [f"key-{number}" for number in range(30)]


@pytest.fixture
def shared() -> Cluster[Endpoint]:
    cluster = shared_cluster()
    cluster.flushall()
    return cluster


async def test_each_node_of_three_finds_the_cluster_whole_and_has_a_third_of_its_slots(
    shared: Cluster[Endpoint],
) -> None:
    ports = [node.port for node in shared.nodes]
    assert shared.url == "redis+cluster://" + ",".join(f"127.0.0.1:{port}" for port in ports)
    assert await shared.masters() == shared.nodes
    for node in shared.nodes:
        info = await node.command("CLUSTER INFO")
        assert (info["cluster_state"], info["cluster_slots_ok"], info["cluster_known_nodes"]) == ("ok", "16384", "3")
        slots = await node.command("CLUSTER", "SLOTS")
        setting = "cluster-require-full-coverage"
        assert await node.command("CONFIG GET", setting) == {setting: "no"}
        sizes = {owner[1]: last - first + 1 for first, last, owner in slots}
        assert [sizes[port] for port in ports] == [5461, 5461, 5462]


def test_the_shared_cluster_ends_with_its_process() -> None:
    ask = (
        "from tests.support.redis_clusters import Cluster, _talk, shared_cluster\n"
        "Cluster._form = lambda _: None\n"  # which takes two seconds
        "for node in shared_cluster().nodes: print(_talk(node.url, ('INFO',))[0]['process_id'], node.folder)"
    )
    said = subprocess.run(
        [sys.executable, "-c", ask], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    ).stdout
    nodes = re.findall(r"(\d+) (/.+)\n", said)
    assert len(nodes) == 3
    for pid, folder in nodes:
        assert not is_running(int(pid))
        assert not Path(folder).exists()


async def test_two_clusters_know_nothing_of_each_other_and_the_one_whose_block_is_left_is_gone(
    shared: Cluster[Endpoint],
) -> None:
    async with redis_cluster() as own:
        for key in KEYS[:6]:
            await own.command("SET", key, "own", key=key)
            await shared.command("SET", key, "shared", key=key)
            assert await own.command("GET", key, key=key) == "own"
            assert await shared.command("GET", key, key=key) == "shared"
        killed, paused, living = own.nodes
        await killed.kill()
        paused.pause()
        assert await own.masters() == [living]
        with pytest.raises(LookupError, match="none of the living nodes has slot 0"):
            await own.node_of_slot(0)
        await shared.settled()
        for node in shared.nodes:
            assert (await node.command("CLUSTER INFO"))["cluster_known_nodes"] == "3"
    for node in own.nodes:
        assert not is_running(node.pid)
        assert not node.folder.exists()


async def test_a_replica_takes_over_when_its_master_dies_and_the_dead_one_comes_back_as_its_replica() -> None:
    async with redis_cluster(replicas=1, node_timeout=1.0) as cluster:
        assert await cluster.masters() == cluster.nodes[:3]
        await cluster.command("SET", "key-0", "value", key="key-0")
        old = await cluster.node_of("key-0")
        (replica,) = await cluster.replicas(old)
        await cluster.command("WAIT", 1, 0, key="key-0")

        await old.kill()
        assert await cluster.failed_over(old) is replica
        assert await cluster.node_of("key-0") is replica
        assert await cluster.command("GET", "key-0", key="key-0") == "value"
        assert set(await cluster.masters()) == {*cluster.nodes[:3], replica} - {old}

        await old.restart(empty=True)
        await cluster.settled()
        assert await cluster.replicas(replica) == [old]
        assert await cluster.node_of("key-0") is replica

        await cluster.promote(old)
        assert await cluster.node_of("key-0") is old
        assert await cluster.command("GET", "key-0", key="key-0") == "value"

        old.pause()
        await cluster.promote(replica, "FORCE")
        assert await cluster.node_of("key-0") is replica
        old.resume()
        await cluster.settled()
        assert await cluster.replicas(replica) == [old]
        assert await cluster.command("GET", "key-0", key="key-0") == "value"

        cluster.flushall()
        assert set((await cluster.each("DBSIZE")).values()) == {0}


async def test_a_slot_moves_with_its_keys_and_in_between_each_node_says_what_it_has_not() -> None:
    async with redis_cluster(requirepass="sesame") as cluster:
        assert cluster.url.startswith("redis+cluster://:sesame@127.0.0.1:")
        slot = cluster.slot("{a}")
        source = await cluster.node_of("{a}")
        first, second = (node for node in cluster.nodes if node is not source)
        keys = ["{a}" + key for key in KEYS]
        for key in keys:
            await source.command("SET", key, key)

        await cluster.move_slot(slot, first, keys_at_once=7)
        assert await cluster.node_of("{a}") is first
        assert await first.command("MGET", *keys) == keys
        assert await source.command("DBSIZE") == 0
        for other in (source, second):
            with pytest.raises(MovedError, match=f"^{slot} 127.0.0.1:{first.port}$"):
                await other.command("GET", keys[0])

        await cluster.begin_move(slot, second)
        assert await cluster.move_keys(slot, second, at_most=12) == 12
        assert await cluster.node_of("{a}") is first
        there = await second.command("CLUSTER GETKEYSINSLOT", slot, 100)
        assert len(there) == 12
        with pytest.raises(AskError, match=f"^{slot} 127.0.0.1:{second.port}$"):
            await first.command("GET", there[0])
        with pytest.raises(TryAgainError):
            await first.command("MGET", *keys)
        with pytest.raises(MovedError, match=f"^{slot} 127.0.0.1:{first.port}$"):
            await second.command("GET", there[0])

        await cluster.finish_move(slot, second)
        assert await cluster.node_of("{a}") is second
        assert await second.command("MGET", *keys) == keys
        await cluster.settled()
