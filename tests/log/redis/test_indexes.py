"""Where the lists of runs are: two of one server, and in a cluster some on every node."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from redis.crc import key_slot

from penstock.log.redis.backend import SingleServer
from penstock.log.redis.cluster import open_cluster
from penstock.log.redis.indexes import NUMBERS, RunIndexes
from penstock.log.redis.schema import Keys
from penstock.log.redis.slots import Slots
from tests.support.clustered import shares_a_cluster
from tests.support.redis_clusters import shared_cluster

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Sequence

    from penstock.log.redis.backend import Topology

KEYS = Keys()
RUNS = [f"run-{number}" for number in range(300)]
SLOTS = 16_384


class Nodes:
    """As much of a cluster as lists ask for: its masters share the slots evenly, and slots can be moved."""

    is_cluster = True

    def __init__(self, masters: int) -> None:
        self.slots = Slots()
        self.told: list[Callable[[], None]] = []
        self.share([f"node-{number}" for number in range(masters)])

    def share(self, hosts: Sequence[str]) -> None:
        bounds = [SLOTS * number // len(hosts) for number in range(len(hosts) + 1)]
        ranges = [[bounds[n], bounds[n + 1] - 1, [host.encode(), 1]] for n, host in enumerate(hosts)]
        self.slots.replace(ranges, "asked")
        self.tell()

    def tell(self) -> None:
        for told in self.told:
            told()

    def shard(self, key: str) -> str:
        return self.slots.owner(key)

    def shards(self) -> Collection[str]:
        return [*self.slots.primaries] or ("",)

    def watch(self, moved: Callable[[], None]) -> Callable[[], None]:
        self.told.append(moved)
        return lambda: self.told.remove(moved)


def lists_of(nodes: Nodes) -> RunIndexes:
    topology: Topology = nodes  # type: ignore[assignment]  # the rest is of no concern here
    return RunIndexes(KEYS, topology)


def by_lease(lists: RunIndexes) -> list[str]:
    return sorted(key.replace("runs", "live") for key in lists.runs())


def run_is_at_home(nodes: Nodes, lists: RunIndexes, run_id: str) -> bool:
    """Whether a run stands in lists of its own node, of those that there are."""
    home = nodes.shard(KEYS.record(run_id))
    assert lists.runs_of(run_id) in lists.runs()
    assert lists.live_of(run_id) == lists.runs_of(run_id).replace("runs", "live")
    return nodes.shard(lists.live_of(run_id)) == nodes.shard(lists.runs_of(run_id)) == home


def test_one_server_has_two_indexes_whatever_the_run() -> None:
    lists = RunIndexes(KEYS, SingleServer())
    assert {lists.runs_of(run_id) for run_id in RUNS} == {"sse:runs"}
    assert {lists.live_of(run_id) for run_id in RUNS} == {"sse:live"}
    assert lists.runs() == ["sse:runs"]
    assert lists.live("") == ["sse:live"]
    assert lists.by_live(RUNS) == {"sse:live": RUNS}
    assert lists.probe("") == "sse:live"


# A cluster


@pytest.mark.parametrize("masters", [1, 3, 7, len(NUMBERS)])
def test_with_even_slots_each_of_up_to_sixteen_masters_has_lists_and_each_run_stands_at_home(masters: int) -> None:
    nodes = Nodes(masters)
    lists = lists_of(nodes)
    each = [lists.live(shard) for shard in nodes.shards()]
    assert all(each)
    assert sorted(key for keys in each for key in keys) == by_lease(lists)
    assert all(run_is_at_home(nodes, lists, run_id) for run_id in RUNS)


@pytest.mark.parametrize("masters", [1, 3])
def test_the_runs_of_a_node_are_spread_over_its_lists(masters: int) -> None:
    lists = lists_of(Nodes(masters))
    assert sorted({lists.live_of(run_id) for run_id in RUNS}) == by_lease(lists)


@pytest.mark.parametrize("masters", [3, 40])
def test_a_run_stands_in_the_same_lists_for_every_process(masters: int) -> None:
    one, other = lists_of(Nodes(masters)), lists_of(Nodes(masters))
    assert [one.live_of(run_id) for run_id in RUNS] == [other.live_of(run_id) for run_id in reversed(RUNS)][::-1]


@pytest.mark.parametrize("masters", [17, 40])
def test_with_more_masters_than_lists_a_run_whose_node_has_none_stands_in_some(masters: int) -> None:
    nodes = Nodes(masters)
    lists = lists_of(nodes)
    with_lists = {nodes.shard(key) for key in lists.runs()}
    assert len(with_lists) < masters
    strangers = [run_id for run_id in RUNS if nodes.shard(KEYS.record(run_id)) not in with_lists]
    assert strangers
    for run_id in RUNS:
        assert run_is_at_home(nodes, lists, run_id) is (run_id not in strangers)
    assert len({lists.live_of(run_id) for run_id in strangers}) > len(NUMBERS) // 2
    for shard in nodes.shards():
        assert bool(lists.live(shard)) is (shard in with_lists)


def test_after_slots_have_moved_runs_stand_in_lists_of_their_new_node() -> None:
    nodes = Nodes(3)
    lists = lists_of(nodes)
    before = {run_id: lists.live_of(run_id) for run_id in RUNS}
    nodes.share(["node-2", "node-0", "node-3", "node-4"])
    assert all(run_is_at_home(nodes, lists, run_id) for run_id in RUNS)
    assert before != {run_id: lists.live_of(run_id) for run_id in RUNS}
    assert lists.live("node-1:1") == []
    assert sorted(key for shard in nodes.shards() for key in lists.live(shard)) == by_lease(lists)


def test_a_node_that_has_got_one_list_with_one_slot_has_that_for_its_runs() -> None:
    nodes = Nodes(2)
    lists = lists_of(nodes)
    lists.live("node-9:1")
    run_id = RUNS[0]
    live, runs = by_lease(lists)[7], by_lease(lists)[7].replace("live", "runs")
    for key in (KEYS.record(run_id), live):
        nodes.slots.moved(key_slot(key.encode()), "node-9", 1)
    nodes.tell()
    assert lists.live("node-9:1") == [live]
    assert (lists.live_of(run_id), lists.runs_of(run_id)) == (live, runs)
    assert lists.probe("node-9:1") == live


def test_before_the_slots_are_known_a_run_stands_in_some_list() -> None:
    nodes = Nodes(1)
    nodes.slots = Slots()
    lists = lists_of(nodes)
    assert nodes.shards() == ("",)
    assert sorted({lists.live_of(run_id) for run_id in RUNS}) == by_lease(lists)
    assert sorted(lists.live("")) == by_lease(lists)
    assert lists.probe("") in by_lease(lists)
    nodes.share(["node-0"])
    assert lists.live("") == []
    assert len(lists.live("node-0:1")) == len(NUMBERS)


@pytest.mark.parametrize("masters", [1, 16, 17, 40])
def test_the_probe_of_a_node_is_a_key_of_its_own_and_a_list_if_it_has_any(masters: int) -> None:
    nodes = Nodes(masters)
    lists = lists_of(nodes)
    for shard in nodes.shards():
        probe = lists.probe(shard)
        assert nodes.shard(probe) == shard
        assert probe == lists.probe(shard)
        assert not lists.live(shard) or probe == lists.live(shard)[0]


def test_a_node_that_is_none_has_no_lists_and_its_probe_is_a_list_all_the_same() -> None:
    lists = lists_of(Nodes(3))
    assert lists.live("nobody:1") == []
    assert lists.probe("nobody:1") in by_lease(lists)


@shares_a_cluster
async def test_the_lists_of_a_real_cluster_are_on_the_nodes_that_it_says() -> None:
    shared = shared_cluster()
    shared.flushall()
    async with open_cluster(shared.url) as cluster:
        lists = RunIndexes(KEYS, cluster.topology)
        assert sorted(lists.live("")) == by_lease(lists)
        await cluster.ask("PERSIST", lists.probe(""))  # it is looked at now
        shards = [f"127.0.0.1:{node.port}" for node in shared.nodes]
        assert sorted(cluster.topology.shards()) == sorted(shards)
        for node, shard in zip(shared.nodes, shards, strict=True):
            keys = [*lists.live(shard), lists.probe(shard)]
            assert len(keys) > 1
            for key in keys:
                assert await shared.node_of(key) is node
        for run_id in RUNS[:30]:
            home = await shared.node_of(KEYS.record(run_id))
            assert await shared.node_of(lists.live_of(run_id)) is home
