"""The Redis Clusters that the suite runs against: real ones, whose nodes die and whose slots move; gone afterwards."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio
from redis.exceptions import AskError, MovedError, TryAgainError
from tests.support.redis_clusters import Cluster, cluster_server, redis_cluster, shared_cluster
from tests.support.redis_servers import RedisServer, _free_port, redis_server

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


async def test_a_key_goes_to_the_node_that_has_its_slot(shared: Cluster[Endpoint]) -> None:
    for key in KEYS:
        await shared.command("SET", key, "value", key=key)
        node = await shared.node_of(key)
        assert await node.command("CLUSTER KEYSLOT", key) == shared.slot(key) == shared.slot(key.encode())
        assert await node.command("GET", key) == "value"
        for other in shared.nodes:
            if other is not node:
                with pytest.raises(MovedError, match=f"^{shared.slot(key)} 127.0.0.1:{node.port}$"):
                    await other.command("GET", key)
    assert sum((await shared.each("DBSIZE")).values()) == len(KEYS)
    assert len({await shared.node_of(key) for key in KEYS}) == 3


async def test_the_shared_cluster_is_the_same_for_all_and_can_be_emptied(shared: Cluster[Endpoint]) -> None:
    assert shared_cluster() is shared
    for key in KEYS:
        await shared.command("SET", key, "value", key=key)
    await shared.each("SCRIPT LOAD", "return 1")
    shared.flushall()
    for node in shared.nodes:
        assert await node.command("DBSIZE") == 0
        assert (await node.command("INFO", "memory"))["number_of_cached_scripts"] == 0
        assert "set" not in await node.stats()


async def test_time_passes_on_every_node(shared: Cluster[Endpoint]) -> None:
    for key in KEYS:
        await shared.command("SET", key, "value", "PX", 59_000, key=key)
    await shared.let_pass(60.0)
    assert set((await shared.each("DBSIZE")).values()) == {0}


async def test_what_does_not_come_about_is_an_error_with_what_the_nodes_say(
    shared: Cluster[Endpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.support.redis_clusters.GUARD", 0)
    with pytest.raises(RuntimeError, match=r"did not come about.*_Line\(id="):
        await shared._until(lambda _: False)


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


async def test_a_cluster_that_is_cancelled_while_it_forms_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes: list[RedisServer] = []

    def never_formed(cluster: Cluster[RedisServer], _views: object) -> bool:
        if not nodes:
            nodes.extend(cluster.nodes)
            trio.from_thread.run_sync(scope.cancel)
        return False

    monkeypatch.setattr(Cluster, "_has_met", never_formed)
    with trio.CancelScope() as scope:
        async with redis_cluster(masters=2):
            pytest.fail("it never forms")
    assert [is_running(node.pid) for node in nodes] == [False, False]


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


async def test_a_replica_takes_over_without_being_elected_when_there_is_nobody_to_elect_it() -> None:
    async with redis_cluster(masters=1, replicas=1) as cluster:
        master, replica = cluster.nodes
        master.pause()
        await cluster.promote(replica, "TAKEOVER")
        assert await cluster.node_of("key") is replica
        master.resume()
        await cluster.settled()
        assert await cluster.replicas(replica) == [master]


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


async def test_a_node_whose_ports_are_taken_takes_others_both(monkeypatch: pytest.MonkeyPatch) -> None:
    async with redis_server() as first:
        fresh = [_free_port() for _ in range(4)]
        ports = iter([first.port, fresh[0], fresh[1], first.port, fresh[2], fresh[3]])
        monkeypatch.setattr("tests.support.redis_servers._free_port", lambda: next(ports))
        async with redis_server(executable=cluster_server(), cluster_enabled="yes") as node:
            assert [node.port, node.bus_port] == fresh[2:]


async def test_a_node_that_is_restarted_waits_for_its_own_ports(monkeypatch: pytest.MonkeyPatch) -> None:
    async with redis_server(executable=cluster_server(), cluster_enabled="yes") as node:
        ports = [node.port, node.bus_port]
        await node.kill()
        other = socket.create_server(("127.0.0.1", node.bus_port))
        was_taken = RedisServer._port_was_taken

        def leaves(server: RedisServer) -> bool:
            other.close()
            return was_taken(server)

        monkeypatch.setattr(RedisServer, "_port_was_taken", leaves)
        await node.restart(empty=True)
        assert other.fileno() == -1  # it was in the way
        assert [node.port, node.bus_port] == ports


def test_a_cluster_is_made_of_the_first_redis_server_from_7_on(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {"6.2.14": Path("/six"), "7.0.15": Path("/seven"), "10.0.0": Path("/ten")}
    monkeypatch.setattr("tests.support.redis_clusters.redis_servers", lambda: found)
    assert cluster_server() == Path("/seven")
    del found["7.0.15"]
    assert cluster_server() == Path("/ten")
    del found["10.0.0"]
    with pytest.raises(RuntimeError, match=r"there is only 6\.2\.14: install Debian's package redis-server"):
        cluster_server()
