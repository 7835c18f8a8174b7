"""A node of a real cluster that stands still or is dead: its own runs wait for it, and no others do."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock.errors import LogUnavailable, ReaderReleased
from penstock.log.redis.schema import Keys
from tests.support.clustered import ClusteredServer
from tests.support.redis_clusters import redis_cluster
from tests.support.redis_runs import (
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
from tests.support.supervising import Notes, Witness, count, gists, read, readers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from penstock.supervisor import Supervisor
    from tests.support.redis_clusters import Cluster
    from tests.support.redis_servers import RedisServer

KEYS = Keys()
MANY = 200
"""So many entries come to readers of other runs while a node is away."""
PATIENT = 600.0
"""Seconds without an answer after which nodes take another for failed: no test waits for that."""


class Outages(Notes):
    """Counts the outages that it is told of."""

    def __init__(self) -> None:
        super().__init__()
        self.began = self.over = 0

    def outage_began(self) -> None:
        self.began += 1

    def outage_ended(self, seconds: float) -> None:  # noqa: ARG002
        self.over += 1


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
        inboxes = {self.node_of(KEYS.inbox(each._services.owner)) for each in supervisors}
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
    for module in ("client", "backend", "notifications"):
        monkeypatch.setattr(f"penstock.log.redis.{module}.ANSWER_TIMEOUT", PATIENT)


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
            owner._services._watch.renew_now()
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


async def test_what_is_left_for_the_background_waits_for_no_other_node(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_ever(monkeypatch)
    async with three() as works, supervisors(works.url, works.url, lease=3_600.0) as (owner, other):
        free, _, paused = works.last_without_inbox(owner, other)
        witness, ticks = Witness(), Ticks(0.02)
        quiet = await owner.start(witness.waits, run_id=works.run_on(free))
        await other.start(ticks, run_id=works.run_on(free), idempotency_key=works.key_on(paused))
        async with readers((owner, quiet.id)) as (reader,):
            await until(lambda: last_seq(reader) == 1)
            paused.pause()
            other._services._watch.renew_now()  # keeps the key, too
            said = ticks.said
            await until(lambda: ticks.said > said + 10)
            await other.cancel(quiet.id, "enough")
            with suppress(trio.TooSlowError):
                await until(lambda: witness.left)
            saw, witness.saw = witness.saw, None
            paused.resume()
        assert saw == "run cancelled: enough"


async def is_renewed(works: Three, run_id: str, before: int) -> bool:
    return int(await works.server.command("HGET", record_of(run_id), "lease_end")) > before


async def test_after_the_outage_limit_a_node_loses_its_runs_and_readers_and_is_of_use_again_later(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("penstock.log.redis.client.ANSWER_TIMEOUT", 2.0)
    outages = Outages()
    async with (
        three() as works,
        supervisors(works.url, lease=6.0, outage_limit=1.0, observer=outages) as (owner,),
        supervisor_at(works.url, lease=6.0, outage_limit=1.0) as other,
    ):
        nodes = works.cluster.nodes
        several = [Ticks() for _ in nodes]
        ids = [works.run_on(node) for node in nodes]
        for ticks, run_id in zip(several, ids, strict=True):
            await owner.start(ticks, run_id=run_id)
        async with readers(*((each, run_id) for run_id in ids for each in (owner, other))) as following:
            await until(lambda: min(map(last_seq, following)) >= 20)
            nodes[2].pause()
            await until(lambda: several[2].left and all(reader.ended_at for reader in following[4:]), 30)
            assert several[2].saw in {"log unavailable", None}  # None: it was not in its own sleep just then
            assert [type(reader.error) for reader in following[4:]] == [ReaderReleased] * 2
            await goes_on(following[:4])
            assert (outages.began, outages.over) == (1, 0)
            nodes[2].resume()
            await until(lambda: outages.over)
            with trio.fail_after(15):
                again = await start_again(owner, works.run_on(nodes[2]))
                for each in (owner, other):
                    assert gists(await read(each, again)) == ["1", "2", "3", "[DONE]"]
                assert (await other.wait(ids[2])).status == "lost"
            await goes_on(following[:4])
            for ticks in several[:2]:
                ticks.enough.set()
        for number, (run_id, ticks) in enumerate(zip(ids[:2], several[:2], strict=True)):
            counted(await same_everywhere(works.server, run_id, following[2 * number : 2 * number + 2]), ticks)
        lost = gists(await read(other, ids[2]))
        assert lost[-2:] == ["error RUN_LOST", "[DONE]"]
        assert lost[:-2] == [*map(str, range(1, len(lost) - 1))]
        assert (outages.began, outages.over) == (1, 1)
        for each in (owner, other):
            await nothing_is_left(each)


async def start_again(supervisor: Supervisor, run_id: str) -> str:
    """Start a run as soon as its node takes it."""
    while True:
        try:
            await supervisor.start(count, 3, run_id=run_id)
        except LogUnavailable:
            await trio.sleep(0.05)
        else:
            return run_id


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
            assert not owner._services.live
            for each in (owner, other, *rest):
                await nothing_is_left(each)


@pytest.mark.parametrize("writes", [True, False], ids=["writing", "silent"])
async def test_a_cancel_reaches_an_owner_whose_inbox_is_dead(writes: bool) -> None:
    lease = 3_600.0 if writes else 3.0
    async with three() as works, supervisors(works.url, works.url, lease=lease) as (owner, other):
        dead = works.node_of(KEYS.inbox(owner._services.owner))
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
