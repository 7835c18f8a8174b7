"""The benchmarks' clusters of Redis, and what processes store in one, and follow, all at the same word."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from tests.support.redis_clusters import cluster_server

from benchmarks import redis_server
from benchmarks.questions import cluster as question
from benchmarks.redis_cluster import SLOTS, redis_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.redis_cluster import RedisCluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redis_server, "redis_executable", lambda: str(cluster_server()))
        with redis_cluster(3) as cluster:
            yield cluster


# Clusters


def test_the_nodes_of_a_cluster_share_all_slots_evenly(cluster: RedisCluster) -> None:
    for node in cluster.nodes:
        ranges = node.client.execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]
        owned = {port: last - first + 1 for first, last, (_, port, *_), *_ in ranges}
        assert owned.keys() == {node.port for node in cluster.nodes}
        assert sum(owned.values()) == SLOTS
        assert max(owned.values()) - min(owned.values()) <= 1
    assert cluster.url == "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in cluster.nodes)


# What is stored in them


@pytest.mark.parametrize("processes, followed", [(2, False), (1, True)], ids=["two", "one that is followed"])
def test_all_nodes_and_all_processes_are_in_the_figures(cluster: RedisCluster, processes: int, followed: bool) -> None:
    figures = question._stored(
        cluster.url, cluster.nodes, runs=12, processes=processes, followed=followed, count=12 * 5
    )
    assert (question.READING in figures, "reader cores" in figures) == (followed, followed)
    assert all(value > 0 for name, value in figures.items() if name != "client asleep")
    assert figures["client asleep"] < 1
    assert [name for name in figures if name.startswith("node")] == [f"node {number}, cores" for number in (1, 2, 3)]
    assert all(node.client.dbsize() for node in cluster.nodes)
