"""Hardships of a log of several parts: parts that stand still, parts that die, and Ctrl-C at a bad moment."""

from __future__ import annotations

import signal
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from redis.crc import key_slot
from trio.testing import MockClock, wait_all_tasks_blocked

from penstock.backoff import LONGEST_PAUSE
from penstock.errors import LogUnavailable
from penstock.log import AppendStatus, Lease
from penstock.log.open import open_log
from penstock.log.redis.schema import Keys
from penstock.sse import Event
from penstock.supervisor import open_supervisor
from tests.support.logs import OBITUARY, batch, record
from tests.support.parted import Parted
from tests.support.redis_clusters import redis_cluster
from tests.support.redis_runs import SOON, record_of, supervisor_at, until, until_it_is
from tests.support.supervising import FIRST, View, assert_nothing_is_left, count, ended, gists, read

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from penstock.log import EventLog
    from penstock.supervisor import Supervisor
    from tests.support.redis_clusters import Cluster
    from tests.support.redis_servers import RedisServer

PATIENT = 600.0
"""Seconds without an answer after which nodes take another for failed: no test waits for that."""
BACK = LONGEST_PAUSE + 1.0
"""So many seconds later whatever was to be tried again has been."""
INTERRUPTED = ["first", "error INTERRUPTED", "[DONE]"]


# Nodes that stand still


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


@pytest.fixture
def wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for a node that stands still waits for as long as it does, and not for a timeout."""
    for module in ("client", "backend"):
        monkeypatch.setattr(f"penstock.log.redis.{module}.ANSWER_TIMEOUT", PATIENT)
    monkeypatch.setattr("penstock.log.redis.notifications.ANSWER_TIMEOUT", 0.5)


@pytest.mark.usefixtures("wait_for_ever")
async def test_whichever_node_stands_still_listings_hold_up_nobody_else_and_the_log_is_ready_and_can_be_opened() -> (
    None
):
    async with redis_cluster(node_timeout=PATIENT) as cluster, open_log(cluster.url) as log:
        for node in cluster.nodes:
            await log.start(record(run_on(cluster, node)), Lease("owner", "epoch", PATIENT))
        for node in cluster.nodes:
            others = [each for each in cluster.nodes if each is not node]
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
                partial(log.reap, lambda: OBITUARY, shard=shard),
            ):
                with pytest.raises(LogUnavailable, match="0 of the 1 replicas"):
                    await ask()
            await until(lambda: supervisor._services._watch.is_away(shard))
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


# Lanes


def numbers(upto: int, every: float) -> Any:
    """A producer of so many events that never ends by itself."""

    async def producer() -> AsyncIterator[Event]:
        for number in range(1, upto + 1):
            yield Event(data=str(number))
            await trio.sleep(every)
        await trio.sleep_forever()

    return producer


@asynccontextmanager
async def parted(*names: str, **knobs: Any) -> AsyncIterator[tuple[Parted, Supervisor]]:
    log = Parted(*names)
    async with open_supervisor(log, drain_timeout=0, **knobs) as supervisor:
        yield log, supervisor
        supervisor.interrupt()
        await supervisor._services.all_settled()
        assert_nothing_is_left(supervisor)


async def test_a_quiet_run_that_was_moved_from_a_part_that_then_dies_is_committed_where_it_is_now(
    autojump_clock: MockClock,
) -> None:
    async with parted("a", "b", outage_limit=1e6) as (log, supervisor):
        await supervisor.start(numbers(2, 10.0), run_id="quiet")
        await supervisor.start(numbers(10_000, 0.1), run_id="busy")
        await trio.sleep(2)
        log.where["quiet"] = "b"
        await trio.sleep(3)
        log.gone.add("a")
        await trio.sleep(10 + BACK)
        assert (await log.get("quiet")).seq == 2
        assert supervisor._services.live["busy"].buffer.stored < 60
        await supervisor.cancel("quiet", "enough")
        await trio.sleep(BACK)
        assert (await log.get("quiet")).status == "cancelled"
        assert gists(await read(supervisor, "quiet"))[:2] == ["1", "2"]
        log.gone.clear()
        await trio.sleep(BACK)


async def test_what_a_part_has_lost_of_a_run_that_was_moved_from_a_dead_part_is_put_back_where_it_is_now(
    autojump_clock: MockClock,
) -> None:
    async with parted("a", "b", outage_limit=1e6) as (log, supervisor):
        await supervisor.start(numbers(2, 10.0), run_id="quiet")
        await supervisor.start(numbers(10_000, 0.1), run_id="busy")
        await trio.sleep(5)
        log.gone.add("a")
        await trio.sleep(1)
        services = supervisor._services
        del log._runs["quiet"]  # it comes to another part by a failover, and that has not got it
        services.committer.restore(services.live["quiet"].buffer)
        await trio.sleep(1)
        log.where["quiet"] = "b"
        await trio.sleep(BACK)
        assert (await log.get("quiet")).seq >= 1
        log.gone.clear()
        await trio.sleep(BACK)


async def test_a_process_may_have_less_pending_than_there_are_parts(autojump_clock: MockClock) -> None:
    shards = ("a", "b", "c")
    async with parted(*shards, max_process_pending_bytes=2) as (log, supervisor):
        log.where = {f"on-{shard}": shard for shard in shards}
        with trio.fail_after(100):
            for run_id in log.where:
                await supervisor.start(count, 3, run_id=run_id)
            for run_id in log.where:
                assert (await supervisor.wait(run_id)).status == "completed"
                assert gists(await read(supervisor, run_id)) == ["1", "2", "3", "[DONE]"]


# Ctrl-C


@pytest.mark.parametrize("operation", ["append", "renew", "check", "reap", "fetch", "cancel_requests"])
def test_ctrl_c_while_the_log_is_at_work_leaves_the_services_to_store_what_is_last(operation: str) -> None:
    view = View()
    pressed = []

    async def press_ctrl_c() -> None:
        await trio.lowlevel.checkpoint()
        view.before.clear()
        pressed.append(operation)
        signal.raise_signal(signal.SIGINT)

    async def say() -> AsyncIterator[Event]:
        yield FIRST
        await trio.sleep(1)
        view.before[operation] = press_ctrl_c
        if operation == "append":
            yield FIRST
        await trio.sleep_forever()

    async def main() -> None:
        async with open_supervisor(View(view.log)) as elsewhere, open_supervisor(view, lease=9) as supervisor:
            await supervisor.start(say, run_id="run")
            await elsewhere.start(count, 100, 0.1, run_id="theirs")
            await read(supervisor, "theirs")
            await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        trio.run(main, clock=MockClock(autojump_threshold=0))
    assert pressed == [operation]

    async def look() -> None:
        run = await ended(view, "run")
        assert (run.status, run.stop_reason) == ("failed", "interrupted")
        async with open_supervisor(view) as supervisor:
            assert [each for each in gists(await read(supervisor, "run")) if each != "first"] == INTERRUPTED[1:]

    trio.run(look, clock=MockClock())
