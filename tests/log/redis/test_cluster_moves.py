"""Slots of a real cluster on their way: while one is half moved nothing waits that is not on it, and nobody dies of it.

A slot is half moved when its node has handed over some keys, or has never had some: whoever asks there for two keys of
a run at once is told to try again, for as long as that lasts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock.errors import LogUnavailable
from penstock.log import Lease
from penstock.log.open import open_log
from penstock.log.redis import scripts
from penstock.log.redis.client import open_client
from penstock.log.redis.cluster import open_cluster
from penstock.log.redis.schema import Keys, fields_of_ending
from penstock.log.redis.slots import call
from penstock.sse import Event
from penstock.supervisor import open_supervisor
from tests.support.clustered import NODES, Works, in_order
from tests.support.logs import LOST_ENDING, record
from tests.support.redis_runs import (
    SOON,
    Ticks,
    counted,
    last_seq,
    nothing_is_left,
    record_of,
    same_everywhere,
    stream_of,
    supervisor_at,
    supervisors,
    until,
    until_it_is,
)
from tests.support.redis_servers import _talk, _talk_in_thread
from tests.support.supervising import Notes, Witness, count, read, readers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from penstock.log.redis.log import RedisLog
    from penstock.log.redis.slots import Command
    from tests.support.redis_servers import Endpoint, RedisServer
    from tests.support.supervising import Reader

pytestmark = pytest.mark.xdist_group("works")
KEYS = Keys()
LONG = 3_600.0
"""Seconds that no test waits for."""


def at(node: Endpoint) -> str:
    return f"127.0.0.1:{node.port}"


async def begin(works: Works, run_id: str, to: RedisServer, *, keys: int = 0) -> None:
    slot = works.cluster.slot(record_of(run_id))
    await works.cluster.begin_move(slot, to)
    assert await works.cluster.move_keys(slot, to, at_most=keys) == keys


async def finish(works: Works, run_id: str, to: RedisServer) -> None:
    await works.cluster.finish_move(works.cluster.slot(record_of(run_id)), to)


async def lease_end(node: RedisServer, run_id: str) -> int:
    words = ("HGET", record_of(run_id), "lease_end")
    return int((await _talk_in_thread(node.url, ("ASKING",), words))[1])


async def keys_on(works: Works, node: RedisServer, run_id: str) -> set[str]:
    return {*await node.command("CLUSTER", "GETKEYSINSLOT", works.cluster.slot(record_of(run_id)), 10)}


async def further(following: Sequence[Reader], count: int) -> None:
    seen = max(map(last_seq, following))
    await until(lambda: min(map(last_seq, following)) > seen + count)


class Gate:
    """A producer that says nothing until it may, and then goes on until it is told to stop."""

    def __init__(self) -> None:
        self.may = trio.Event()
        self.ticks = Ticks()
        self.saw: str | None = None

    async def __call__(self) -> AsyncIterator[Event]:
        try:
            await self.may.wait()
        except trio.Cancelled as cancelled:
            self.saw = cancelled.reason
            raise
        async for event in self.ticks():
            yield event


@pytest.fixture
def without_look_ups(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is not published where a reader listens never comes to it."""
    monkeypatch.setattr("penstock.log.redis.notifications.PING_INTERVAL", LONG)


async def test_a_run_whose_slot_moves_goes_on_without_a_gap_or_a_repetition_over_the_connections_that_there_are(
    works: Works, caplog: pytest.LogCaptureFixture
) -> None:
    async with supervisors(works.url, works.url, lease=6.0) as (owner, other):
        ticks, silent = Ticks(), Witness()
        run = await owner.start(ticks, run_id=works.run_on(works.first))
        quiet = await owner.start(silent.waits, run_id=works.run_on(works.first))
        slot = works.cluster.slot(record_of(run.id))
        async with readers(*((each, run.id) for each in (owner, other, other))) as following:
            await until(lambda: min(map(last_seq, following)) >= 5)
            for number in range(1, NODES + 1):
                to = works.nodes[number % NODES]
                await works.cluster.begin_move(slot, to)
                await further(following, 5)
                await works.cluster.finish_move(slot, to)
                await further(following, 10)
                owner._leases.renew_now()
            await works.cluster.move_slot(works.cluster.slot(record_of(quiet.id)), works.second)
            await other.cancel(quiet.id, "enough")
            assert (await other.wait(quiet.id)).status == "cancelled"
            ticks.enough.set()
        counted(await same_everywhere(works.server, run.id, following), ticks)
        assert silent.saw == "run cancelled: enough"
        for each in (owner, other):
            await nothing_is_left(each)
    assert "subscription" not in caplog.text


async def test_slots_that_move_are_followed(works: Works, monkeypatch: pytest.MonkeyPatch) -> None:
    own, first, second = works.cluster, works.first, works.second
    one, two = works.name_on(first, str), works.name_on(second, str)
    tag = "{" + one + "}"
    async with open_cluster(own.url) as cluster:
        told: list[str] = []
        cluster.topology.watch(lambda: told.append(cluster.topology.shard(one)))
        here, there, missing = f"{tag}here", f"{tag}there", f"{tag}missing"
        await cluster.execute([("SET", key, "value") for key in (here, there, two)])
        assert told == [at(first)]

        # A key that is not there any more, or not yet, is asked for where its slot will be.
        slot = own.slot(one)
        await own.begin_move(slot, second)
        assert await cluster.execute([("SET", missing, "new"), ("GET", here), ("GET", two), ("GET", missing)]) == [
            *[b"OK", b"value", b"value", b"new"]
        ]
        enlist = call(scripts.ENLIST, [f"{tag}list"], 60_000, "1", "r")
        assert [await cluster.ask(*enlist), await cluster.ask("ZCARD", f"{tag}list")] == [None, 1]
        many: list[Command] = [("RPUSH", f"{tag}queue", n) for n in range(250)]
        assert await cluster.execute(many) == [*range(1, 251)]
        assert cluster.topology.shard(one) == at(first)
        assert told == [at(first)]

        # Two keys, one here and one there, are tried again if somebody waits for them; nobody is refused with them.
        both = ("MGET", here, missing)
        refusal, got = await cluster.execute([both, ("GET", two)])
        assert isinstance(refusal, LogUnavailable)
        assert "is moving the keys of a command" in str(refusal)
        assert got == b"value"
        assert await rejected(first, "mget") == 1
        monkeypatch.setattr("penstock.log.redis.cluster.MIGRATION_LIMIT", 0.5)
        with pytest.raises(LogUnavailable, match="is moving the keys of a command"):
            await cluster.ask(*both)
        assert await rejected(first, "mget") > 2

        # Whoever is patient has an answer when the slot has moved, and from then on all is sent to where it is.
        monkeypatch.setattr("penstock.log.redis.cluster.MIGRATION_LIMIT", SOON)
        async with trio.open_nursery() as nursery:
            replies: list[Any] = []

            async def ask() -> None:
                replies.extend(await cluster.in_stages([both, ("GET", two)]))

            tried = await rejected(first, "mget")
            nursery.start_soon(ask)
            await until_it_is(lambda: more_rejected(first, "mget", tried), True)
            await own.finish_move(slot, second)
        assert replies == [[b"value", b"new"], b"value"]
        assert await cluster.ask("GET", here) == b"value"
        assert told == [at(first), at(second)]
        assert cluster.topology.shard(one) == at(second)
        before = (await first.stats())["get"], (await second.stats())["get"]
        assert await cluster.execute([("GET", here)] * 5) == [b"value"] * 5
        assert ((await first.stats())["get"], (await second.stats())["get"]) == (before[0], before[1] + 5)
        assert await cluster.ask("LRANGE", f"{tag}queue", 0, -1) == [b"%d" % n for n in range(250)]


async def rejected(node: Endpoint, command: str) -> int:
    return int((await node.command("INFO", "commandstats")).get(f"cmdstat_{command}", {}).get("rejected_calls", 0))


async def more_rejected(node: Endpoint, command: str, times: int) -> bool:
    return await rejected(node, command) > times


# Half moved


@pytest.mark.usefixtures("without_look_ups")
async def test_a_run_alone_in_its_commit_whose_slot_is_half_moved_holds_up_no_other_of_its_node(works: Works) -> None:
    notes, others_notes = Notes(), Notes()
    async with (
        supervisor_at(works.url, lease=LONG, observer=notes) as owner,
        supervisor_at(works.url, lease=LONG, observer=others_notes) as other,
    ):
        stuck, free = works.run_on(works.first), works.run_on(works.first)
        gate, ticks = Gate(), Ticks()
        await owner.start(gate, run_id=stuck)
        await owner.start(ticks, run_id=free)
        ticks_of_free = ticks
        async with readers((other, stuck), (owner, free), (other, free)) as following:
            await until(lambda: min(map(last_seq, following[1:])) > 5)
            await begin(works, stuck, works.second)
            # Alone in a commit, as the only run that says anything, and alone in a fetch.
            ticks.enough.set()
            await until(lambda: all(reader.ended_at for reader in following[1:]))
            gate.may.set()
            await until(lambda: any("cannot commit" in words for words in notes.warnings))
            await works.first.command("SPUBLISH", KEYS.wake(stuck), 1)
            later, ticks = works.run_on(works.first), Ticks()
            await owner.start(ticks, run_id=later)
            async with readers((owner, later), (other, later)) as later_readers:
                await until(lambda: min(map(last_seq, later_readers)) > 10)
                assert last_seq(following[0]) == 0
                ticks.enough.set()
            await finish(works, stuck, works.second)
            await until(lambda: last_seq(following[0]) > 10)
            gate.ticks.enough.set()
        counted(await same_everywhere(works.server, stuck, following[:1]), gate.ticks)
        counted(await same_everywhere(works.server, free, following[1:]), ticks_of_free)
        counted(await same_everywhere(works.server, later, later_readers), ticks)


async def test_a_dead_run_whose_slot_is_half_moved_keeps_no_other_of_its_node_from_being_reaped(works: Works) -> None:
    async with open_log(works.url) as log:
        await log.check()
        first_list = redis(log)._indexes.live(log.shard(works.run_on(works.first)))[0]
        ids = [works.run_on(works.first) for _ in range(12)]
        stuck = next(run_id for run_id in ids if redis(log)._indexes.live_of(run_id) == first_list)
        others = sorted({*ids} - {stuck})
        assert {redis(log)._indexes.live_of(run_id) for run_id in others} - {first_list}
        for run_id in ids:
            await in_order(log).start(record(run_id), Lease("dead", "epoch", 0.001))
        await begin(works, stuck, works.second)
        assert sorted(await log.reap(lambda: LOST_ENDING)) == others
        assert await log.reap(lambda: LOST_ENDING) == []
        await finish(works, stuck, works.second)
        await until_it_is(lambda: log.reap(lambda: LOST_ENDING), [stuck])


def redis(log: Any) -> RedisLog:
    found: RedisLog = log
    return found


async def test_a_run_whose_slot_is_half_moved_for_longer_than_its_lease_is_renewed_and_not_reaped(works: Works) -> None:
    lease = 1.0
    async with supervisor_at(works.url, lease=lease) as owner, supervisor_at(works.url, lease=lease) as other:
        silent, wrote = works.run_on(works.first), works.run_on(works.first)
        gates = [Gate(), Gate()]
        await owner.start(gates[0], run_id=silent)
        await owner.start(count_then(gates[1]), run_id=wrote)
        async with readers((other, silent), (other, wrote)) as following:
            await until(lambda: last_seq(following[1]) == 1)
            await begin(works, silent, works.second)
            await begin(works, wrote, works.second, keys=1)
            here = await keys_on(works, works.first, wrote)
            assert here in ({record_of(wrote)}, {stream_of(wrote)})
            at = {silent: works.first, wrote: works.first if here == {record_of(wrote)} else works.second}
            before = {run_id: await lease_end(node, run_id) for run_id, node in at.items()}
            for run_id, node in at.items():
                await renewed_until(works, node, run_id, before[run_id] + round(2_000 * lease))
            for run_id in at:
                await finish(works, run_id, works.second)
            await reaps_again(works, other)
            for gate in gates:
                assert gate.saw is None
                gate.may.set()
            await until(lambda: min(map(last_seq, following)) > 10)
            for gate in gates:
                gate.ticks.enough.set()
        for run_id, gate, first in zip(at, gates, (0, 1), strict=True):
            ended = await same_everywhere(works.server, run_id, [following[first]])
            assert (ended["status"], int(ended["seq"])) == ("completed", gate.ticks.said + 1 + first)


def count_then(gate: Gate) -> Any:
    async def producer() -> AsyncIterator[Event]:
        yield Event(data="first")
        async for event in gate():
            yield event

    return producer


async def renewed_until(works: Works, node: RedisServer, run_id: str, end: int) -> None:
    with trio.fail_after(SOON):
        while await lease_end(node, run_id) < end:  # noqa: ASYNC110  (each look is a request)
            await trio.sleep(0.02)


async def reaps_again(works: Works, supervisor: Any) -> None:
    """Some dead run, of another owner, has been ended by this supervisor or another from now on."""
    dead = works.run_on(works.second)
    await supervisor.log.start(record(dead), Lease("dead", "epoch", 0.001))
    assert (await supervisor.wait(dead)).status == "lost"


async def test_a_run_is_not_reaped_within_a_lease_after_its_slot_came_whatever_the_clock_says(works: Works) -> None:
    async with open_log(works.url) as log:
        run_id = works.run_on(works.first)
        await in_order(log).start(record(run_id), Lease("owner", "epoch", LONG))
        live = redis(log)._indexes.live_of(run_id)
        slot = works.cluster.slot(record_of(run_id))
        await works.cluster.move_slot(slot, works.second)
        await until_it_is(lambda: moved_to(log, run_id), works.second.url.split("/")[2])
        await works.server.command("HSET", record_of(run_id), "lease_end", 1)  # by a clock that is far ahead
        await works.server.command("ZADD", live, 1, run_id)
        assert await log.reap(lambda: LOST_ENDING) == []
        assert (await log.get(run_id)).status == "running"
        async with open_log(works.url) as another:  # it has not seen it come
            await works.server.command("ZADD", live, 1, run_id)
            assert await another.reap(lambda: LOST_ENDING) == [run_id]


async def moved_to(log: Any, run_id: str) -> str:
    await log.get(run_id)
    shard: str = log.shard(run_id)
    return shard


@pytest.mark.parametrize("here, left", [(0, 30_000), (29_999, 1), (30_000, None), (10**12, None)])
async def test_the_script_that_reaps_leaves_a_run_alone_that_has_been_here_for_less_than_its_lease(
    server: Endpoint, here: int, left: int | None
) -> None:
    async with open_log(server.url) as log, open_client(server.url) as client:
        await log.start(record("r"), Lease("owner", "epoch", 30.0))
        await server.command("HSET", record_of("r"), "lease_end", 1)
        keys = [KEYS.stream("r"), KEYS.record("r")]
        ending = fields_of_ending(LOST_ENDING.ending)
        words = (2, here, 1_000, KEYS.wake("r"), "PUBLISH", len(ending), *ending, *LOST_ENDING.blocks)
        reply = await client.ask(*call(scripts.REAP, keys, *words))
        assert reply == ([b"FENCED", 0] if left is None else [b"OK", left])
        assert (await log.get("r")).status == ("lost" if left is None else "running")


# Wake-ups


@pytest.mark.usefixtures("without_look_ups")
@pytest.mark.parametrize("moves", ["half", "there and back"])
async def test_what_is_written_while_a_slot_moves_reaches_readers_elsewhere(works: Works, moves: str) -> None:
    async with supervisor_at(works.url, lease=LONG) as owner, supervisor_at(works.url, lease=LONG) as other:
        ticks = Ticks()
        run = await owner.start(ticks, run_id=works.run_on(works.first))
        async with readers((other, run.id)) as (reader,):
            await until(lambda: last_seq(reader) > 5)
            if moves == "half":  # its keys are beyond an ASK
                await begin(works, run.id, works.second, keys=2)
                assert await keys_on(works, works.second, run.id) == {record_of(run.id), stream_of(run.id)}
                said = ticks.said
                await until(lambda: last_seq(reader) > said + 10)
                assert await works.cluster.node_of(record_of(run.id)) is works.first
                await finish(works, run.id, works.second)
            else:
                there_and_back(works, works.cluster.slot(record_of(run.id)), works.first, works.second)
            now = ticks.said
            await until(lambda: last_seq(reader) > now + 10)
            ticks.enough.set()
        counted(await same_everywhere(works.server, run.id, [reader]), ticks)


def there_and_back(works: Works, slot: int, home: RedisServer, other: RedisServer) -> None:
    """Move a slot twice while nothing else happens in this process."""
    ids = works.cluster._ids
    for source, to in ((home, other), (other, home)):
        _talk(to.url, ("CLUSTER", "SETSLOT", slot, "IMPORTING", ids[source.port]))
        begin = ("CLUSTER", "SETSLOT", slot, "MIGRATING", ids[to.port])
        _, keys = _talk(source.url, begin, ("CLUSTER", "GETKEYSINSLOT", slot, 10))
        _talk(source.url, ("MIGRATE", "127.0.0.1", to.port, "", 0, 5_000, "KEYS", *keys))
        for node in (to, source):
            _talk(node.url, ("CLUSTER", "SETSLOT", slot, "NODE", ids[to.port]))


async def test_when_a_slot_moves_a_supervisor_that_has_left_its_log_to_another_breaks_nothing(works: Works) -> None:
    async with open_log(works.url) as log:
        async with open_supervisor(log, drain_timeout=0) as first:
            channel = KEYS.process(first._owner)
            slot = works.cluster.slot(channel)
        async with open_supervisor(log, drain_timeout=0) as second:
            home = await works.cluster.node_of_slot(slot)
            to = next(node for node in works.cluster.nodes if node is not home)
            before = redis(log)._topology.shard(channel)
            await works.cluster.move_slot(slot, to)
            redis(log)._topology.doubt()
            await until(lambda: redis(log)._topology.shard(channel) != before)
            for _ in range(5):
                run = await second.start(count, 3)
                assert len(await read(second, run.id)) == 4


async def test_a_slot_that_nobody_serves_silences_the_readers_of_no_other_run_on_its_node(works: Works) -> None:
    async with supervisor_at(works.url) as owner, supervisor_at(works.url) as other:
        lost, well = Ticks(), Ticks()
        ids = [works.run_on(works.first) for _ in range(2)]
        await owner.start(lost, run_id=ids[0])
        await owner.start(well, run_id=ids[1])
        async with readers((other, ids[0]), (other, ids[1])) as (_, reader):
            await until(lambda: last_seq(reader) >= 3)
            await works.first.command("CLUSTER", "DELSLOTS", works.cluster.slot(record_of(ids[0])))
            for _ in range(3):
                seen = last_seq(reader)
                await until(lambda seen=seen: last_seq(reader) >= seen + 10)  # type: ignore[misc]
            await works.first.command("CLUSTER", "ADDSLOTS", works.cluster.slot(record_of(ids[0])))
            lost.enough.set()
            well.enough.set()
        assert {(await owner.wait(run_id)).status for run_id in ids} == {"completed"}
