"""Runs over a real cluster whose masters die, and whose owners do: once, in order, or said so."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from penstock.log import Lease
from penstock.log.open import open_log
from tests.support.clustered import NODES, ClusteredServer, clustered, node_of, shares_a_cluster
from tests.support.logs import LOST_ENDING, record
from tests.support.redis_clusters import redis_cluster
from tests.support.redis_runs import (
    Ticks,
    counted,
    last_seq,
    nothing_is_left,
    record_of,
    same_everywhere,
    stored,
    supervisors,
    until,
    whole,
)
from tests.support.supervising import gists, readers

if TYPE_CHECKING:
    from tests.support.redis_servers import Endpoint

LOST = ["error RUN_LOST", "[DONE]"]


@pytest.fixture
def shared() -> ClusteredServer:
    clustered().flushall()
    return clustered()


@shares_a_cluster
async def test_the_runs_of_a_dead_owner_are_ended_on_every_node(shared: ClusteredServer) -> None:
    runs = [f"run-{number}" for number in range(24)]
    assert {node_of(record_of(run_id)) for run_id in runs} == {*range(NODES)}
    async with supervisors(shared.url, lease=0.6) as (other,), open_log(shared.url) as log:
        for run_id in runs:
            await log.start(record(run_id), Lease("dead", "epoch", 0.6))
        async with readers(*((other, run_id) for run_id in runs)) as following:
            pass
        for run_id, reader in zip(runs, following, strict=True):
            assert gists(reader.entries) == LOST
            assert (await same_everywhere(shared, run_id, [reader]))["status"] == "lost"
        await nothing_is_left(other)


@shares_a_cluster
async def test_a_run_that_stands_in_the_list_of_another_node_is_reaped_at_once(shared: ClusteredServer) -> None:
    for number in range(12):
        async with open_log(shared.url) as log:  # it does not know yet where the run is, when it notes its start
            await log.start(record(f"run-{number}"), Lease("dead", "epoch", 0.001))
    async with open_log(shared.url) as log:  # which has looked at nothing yet
        assert sorted(await log.reap(lambda: LOST_ENDING)) == sorted(f"run-{number}" for number in range(12))


async def test_the_runs_of_a_master_that_dies_go_on_at_its_replica_or_say_what_was_lost() -> None:
    async with (
        redis_cluster(replicas=1, node_timeout=1.0) as cluster,
        supervisors(cluster.url, cluster.url, lease=20.0) as (owner, other),
    ):
        server = ClusteredServer(cluster)
        several = [Ticks(0.05) for _ in range(9)]
        runs = [await owner.start(ticks) for ticks in several]
        nodes = [await cluster.node_of(record_of(run.id)) for run in runs]
        async with readers(*((each, run.id) for run in runs for each in (owner, other))) as following:
            await until(lambda: min(map(last_seq, following)) >= 2)
            master = nodes[0]
            await master.kill()
            elsewhere = [reader for at, reader in enumerate(following) if nodes[at // 2] is not master]
            seen = max(map(last_seq, elsewhere), default=0)
            await until(lambda: all(last_seq(reader) > seen + 5 for reader in elsewhere))
            await cluster.failed_over(master)
            said = [ticks.said for ticks in several]
            await until(
                lambda: all(
                    ticks.left or min(map(last_seq, following[2 * at : 2 * at + 2])) > said[at]
                    for at, ticks in enumerate(several)
                )
            )
            for ticks in several:
                ticks.enough.set()
        for at, (run, ticks) in enumerate(zip(runs, several, strict=True)):
            ended = await whole_or_diverged(server, run.id)
            if ended["status"] == "completed":
                counted(await same_everywhere(server, run.id, following[2 * at : 2 * at + 2]), ticks)
            else:
                assert nodes[at] is master
        for each in (owner, other):
            await nothing_is_left(each)


async def whole_or_diverged(server: Endpoint, run_id: str) -> dict[str, str]:
    """The record of a run that is whole, or says that something was lost."""
    record: dict[str, str] = await server.command("HGETALL", record_of(run_id))
    if record["status"] == "completed":
        return await whole(server, run_id)
    assert (record["status"], "LOG_DIVERGED" in record["error"]) == ("failed", True)
    seqs = [int(fields["seq_id"]) for _, fields in await stored(server, run_id)]
    assert seqs == [*range(seqs[0], seqs[-1] + 1)]
    return record
