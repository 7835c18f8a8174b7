"""Where the runs of the tests lie in the cluster: on all of its nodes, however few ids they have."""

from __future__ import annotations

import pytest
from tests.support.clustered import PREFIXES, clustered, nodes_of

from penstock.log.redis.schema import Keys

KEYS = [Keys(prefix) for prefix in PREFIXES]


@pytest.mark.parametrize("prefix", PREFIXES)
async def test_of_three_runs_of_a_test_one_is_on_each_node(prefix: str) -> None:
    cluster = clustered().cluster
    found = [await cluster.node_of(Keys(prefix).record(run_id)) for run_id in ("a", "b", "c")]
    assert sorted(map(cluster.nodes.index, found)) == [0, 1, 2]
    assert [cluster.nodes[number] for number in nodes_of(prefix, ["a", "b", "c"])] == found


async def test_a_cluster_in_the_place_of_a_server_answers_like_one() -> None:
    server = clustered()
    server.flushall()
    for number in range(30):
        await server.command("SET", f"key-{number}", number)
        assert await server.command("EVAL", "return redis.call('GET', KEYS[1])", 1, f"key-{number}") == str(number)
    assert await server.command("DBSIZE") == 30
    assert sorted(await server.command("KEYS", "*")) == sorted(f"key-{number}" for number in range(30))
    assert all((await server.cluster.each("DBSIZE")).values())
    assert (await server.stats())["set"] == 30
    server.flushall()
    assert await server.command("DBSIZE") == 0
