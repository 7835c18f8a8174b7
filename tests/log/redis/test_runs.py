"""Runs over a real Redis, whatever the network between does: once, in order, by one owner, and cheaply."""

from __future__ import annotations

import gc
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.log import Batch, Entry
from penstock.log.open import open_log
from penstock.log.redis import scripts
from penstock.runs import Ending, RunStatus
from penstock.sse import Event
from penstock.supervisor.tail import Tail
from tests.support.clustered import on_a_cluster
from tests.support.redis_runs import (
    Ticks,
    all_may_reap,
    counted,
    last_seq,
    nothing_is_left,
    record_of,
    same_everywhere,
    stored,
    supervisor_at,
    supervisors,
    until,
    until_it_is,
)
from tests.support.serving import family
from tests.support.supervising import Notes, Reader, Witness, gists, readers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from penstock.supervisor import Supervisor
    from tests.support.proxy import Proxy, Reply
    from tests.support.redis_servers import Endpoint

LOST = ["first", "error RUN_LOST", "[DONE]"]


def first_of_each_append() -> Callable[[Reply], bool]:
    """Lose the reply to every append that has not been sent before."""
    seen = set()

    def lost(reply: Reply) -> bool:
        digest, *rest = reply.arguments or (b"",)
        if digest.decode() != scripts.APPEND.digest or tuple(rest) in seen:
            return False
        seen.add(tuple(rest))
        return True

    return lost


@pytest.mark.parametrize("n", [1, 3])
async def test_lost_replies_make_neither_a_gap_nor_a_repetition(server: Endpoint, between: Proxy, n: int) -> None:
    async with supervisors(between.url, server.url) as (owner, other):
        ticks = Ticks(0.002)
        run = await owner.start(ticks)
        async with readers((owner, run.id), (other, run.id)) as following:
            if n == 1:
                between.drop_reply_when(first_of_each_append())
            else:
                between.lose_every(n, "EVALSHA")
            await until(lambda: between.lost >= 15 and min(map(last_seq, following)) >= 50)
            ticks.enough.set()
        counted(await same_everywhere(server, run.id, following), ticks)
        between.lose_nothing()
        await nothing_is_left(owner)
        await nothing_is_left(other)


async def test_d28_what_many_tasks_write_and_flush_at_once_keeps_its_order(server: Endpoint, between: Proxy) -> None:
    written: dict[int, str] = {}
    async with supervisors(between.url, server.url) as (owner, other), owner.open_run("run") as writer:

        async def write(task: int) -> None:
            for number in range(10):
                text = f"{task}.{number}"
                written[await writer.write(Event(data=text))] = text
                await writer.flush()

        between.delay(0.002)
        between.lose_every(7, "EVALSHA")
        async with trio.open_nursery() as nursery:
            for task in range(8):
                nursery.start_soon(write, task)
        async with other.follow("run") as entries:
            assert [gists([await anext(entries)])[0] for _ in range(80)] == [written[seq] for seq in range(1, 81)]
        assert between.lost
    for task in range(8):
        mine = [text for _, text in sorted(written.items()) if text.startswith(f"{task}.")]
        assert mine == [f"{task}.{number}" for number in range(10)]


async def test_connections_that_keep_breaking_cost_a_long_run_nothing(server: Endpoint, between: Proxy) -> None:
    async def cut_now_and_then() -> None:
        while True:
            await trio.sleep(0.1)
            between.cut()

    notes = Notes()
    async with (
        supervisors(between.url, server.url) as (other, near),
        supervisor_at(between.url, observer=notes) as owner,
        trio.open_nursery() as nursery,
    ):
        ticks = Ticks(0.001)
        run = await owner.start(ticks)
        async with readers((owner, run.id), (other, run.id), (other, run.id), (near, run.id)) as following:
            nursery.start_soon(cut_now_and_then)
            await until(lambda: min(map(last_seq, following)) >= 600)
            ticks.enough.set()
        nursery.cancel_scope.cancel()
        counted(await same_everywhere(server, run.id, following), ticks)
        assert (notes.fenced, notes.errors) == ([], [])


async def test_an_owner_that_was_cut_off_and_reaped_is_fenced_for_good(server: Endpoint, between: Proxy) -> None:
    notes, witness, ticks = Notes(), Witness(), Ticks()
    async with (
        supervisors(server.url, lease=0.6) as (other,),
        supervisor_at(between.url, lease=0.6, observer=notes) as owner,
    ):
        silent, busy = await owner.start(witness.waits), await owner.start(ticks)
        async with readers(*((each, run.id) for run in (silent, busy) for each in (owner, other))) as following:
            await until(lambda: min(map(last_seq, following)) >= 1)
            await all_may_reap(server)
            between.refuse()
            for run in (silent, busy):
                record = await other.wait(run.id)
                assert (record.status, record.error and record.error.code) == ("lost", "RUN_LOST")
            at_the_end = [await stored(server, run.id) for run in (silent, busy)]
            await until(lambda: ticks.said > int(at_the_end[1][-1][1]["seq_id"]))  # it has something to store
            await between.accept()
            await until(lambda: len(notes.fenced) == 2)
        assert witness.saw == "fenced"
        assert ticks.left
        assert [await stored(server, run.id) for run in (silent, busy)] == at_the_end
        assert {*notes.fenced} == {silent.id, busy.id}
        assert notes.ended == []
        assert gists(following[0].entries) == gists(following[1].entries) == LOST
        for at, run in enumerate((silent, busy)):
            record = await same_everywhere(server, run.id, following[2 * at : 2 * at + 2])
            assert record["status"] == "lost"
        await nothing_is_left(owner)


@pytest.mark.parametrize("hears_of_it_by", ["append", "renewal"])
@on_a_cluster
async def test_of_two_owners_the_one_whose_epoch_is_on_record_goes_on(server: Endpoint, hears_of_it_by: str) -> None:
    notes, witness, ticks = Notes(), Witness(), Ticks()
    lease = 60.0 if hears_of_it_by == "append" else 1.0
    async with (
        supervisors(server.url, lease=60.0) as (other,),
        supervisor_at(server.url, lease=lease, observer=notes) as owner,
        open_log(server.url) as log,
    ):
        run = await owner.start(ticks if hears_of_it_by == "append" else witness.waits)
        async with readers((owner, run.id), (other, run.id)) as following:
            await until(lambda: min(map(last_seq, following)) >= 1)
            await server.command("HSET", record_of(run.id), "epoch", "another")
            await until(lambda: notes.fenced == [run.id])
            last = int(await server.command("HGET", record_of(run.id), "seq"))
            for seq in (last + 1, last + 2, last + 3):
                entry = Entry.of(seq, b"data: of the other\n\n", 1)
                (reply,) = await log.append([Batch(run.id, "another", [entry])])
                assert reply.seq == seq
            done = Entry.of(last + 4, b"data: [DONE]\n\n", 1, terminal=True)
            await log.append([Batch(run.id, "another", [done], Ending(RunStatus.COMPLETED, "end_turn"))])
        record = await same_everywhere(server, run.id, following)
        assert (record["status"], record["seq"]) == ("completed", str(last + 4))
        assert (ticks if hears_of_it_by == "append" else witness).left
        assert notes.ended == []
        assert (await owner.get(run.id)).status == "completed"
        await nothing_is_left(owner)


# What readers cost


READERS = 100
AT_ONCE = 50
"""Readers come, and runs are started, so many at a time, lest the last wait for too long on a busy machine."""


async def follow_all(nursery: trio.Nursery, supervisor: Supervisor, runs: list[str]) -> list[Reader]:
    following = [Reader(supervisor, run_id) for run_id in runs]
    for start in range(0, len(runs), AT_ONCE):
        async with trio.open_nursery() as starting:
            for reader in following[start : start + AT_ONCE]:
                starting.start_soon(nursery.start, reader.run)
    return following


def all_tasks() -> list[trio.lowlevel.Task]:
    root = trio.lowlevel.current_root_task()
    assert root is not None
    return family(root)


def commands(stats: dict[str, int]) -> int:
    return sum(stats.values())


async def test_d42_idle_readers_cost_few_commands(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    runs, most, window = 200, 30, 2.0
    monkeypatch.setattr("penstock.log.redis.notifications.PING_INTERVAL", 1.0)  # what else comes in a lump every 5 s
    named = f"{server.url}?client_name=readers"
    async with supervisors(server.url, named, lease=3_600.0) as (owner, there):
        let_go = trio.Event()

        async def producer() -> AsyncIterator[str]:
            yield "data: first\n\n"
            await let_go.wait()

        for start in range(0, runs, AT_ONCE):
            async with trio.open_nursery() as starting:
                for number in range(start, min(start + AT_ONCE, runs)):
                    starting.start_soon(partial(owner.start, producer, run_id=f"run-{number}"))
        before = len(all_tasks())
        async with trio.open_nursery() as nursery:
            following = await follow_all(nursery, there, [f"run-{number}" for number in range(runs)])
            await until(lambda: min(map(last_seq, following)) == 1)
            assert len(await server.command("PUBSUB", "CHANNELS")) == runs + 2
            stats, began = await server.stats(), trio.current_time()
            await trio.sleep(window)
            spent = commands(await server.stats()) - commands(stats)
            assert spent / (trio.current_time() - began) < most
            assert len([each for each in await server.clients() if each["name"] == "readers"]) <= 12
            assert len(there._tails.all()) == runs
            for reader in following[: runs // 2]:
                reader.leave()
            let_go.set()  # for the others it goes on, however long they were idle
        assert {tuple(gists(reader.entries)) for reader in following} == {("first",), ("first", "[DONE]")}
        await nothing_is_left(there)
        await until_it_is(partial(channels, server), 2)
        assert len(all_tasks()) <= before + 12  # each connection has one


async def channels(server: Endpoint) -> int:
    """How many there are, the two of the supervisors themselves among them."""
    found = await server.command("PUBSUB", "CHANNELS")
    assert sum(channel.startswith("sse:proc:") for channel in found) == 2
    return len(found)


@on_a_cluster
async def test_a_new_reader_wakes_none_of_the_others(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    waited = 0
    wait = Tail.wait

    async def counted_wait(self: Tail) -> None:
        nonlocal waited
        waited += 1
        await wait(self)

    monkeypatch.setattr(Tail, "wait", counted_wait)
    async with supervisors(server.url, server.url) as (owner, there):
        run = await owner.start(Witness().waits)
        async with trio.open_nursery() as nursery:
            before = (await server.stats())["evalsha"]
            following = await follow_all(nursery, there, [run.id] * READERS)
            await until(lambda: min(map(last_seq, following)) == 1)
            await wait_all_tasks_blocked(0.01)
            assert waited <= 3 * READERS  # and not as many as there are pairs of readers
            assert (await server.stats())["evalsha"] - before <= 3 * READERS
            for reader in following:
                reader.leave()


async def test_a_look_up_that_was_overtaken_by_a_message_does_not_hide_it(server: Endpoint) -> None:
    async with supervisors(server.url, server.url) as (owner, there):
        taps = [trio.Event(), trio.Event()]

        async def producer(tap: trio.Event) -> AsyncIterator[str]:
            yield "data: first\n\n"
            await tap.wait()
            yield "data: second\n\n"
            await trio.sleep_forever()

        one, other = [await owner.start(producer, tap) for tap in taps]
        async with readers((there, one.id), (there, other.id)) as following:
            await until(lambda: min(map(last_seq, following)) == 1)
            fetcher, fetch = there._fetcher, there.log.fetch
            busy, gate = trio.Event(), trio.Event()
            wakeups: Any = fetcher._notifications

            async def held(positions: Any) -> Any:
                busy.set()
                await gate.wait()
                return await fetch(positions)

            there.log.fetch = held
            taps[0].set()
            await busy.wait()
            taps[1].set()
            await until(lambda: fetcher.shards.of(other.id)._moved.get(other.id) == 2)
            wakeups._moved[other.id] = 1  # the reply to a look-up that was asked before the append
            wakeups._lot.unpark_all()
            await until(lambda: not wakeups._moved)
            gate.set()
            await until(lambda: last_seq(following[1]) == 2, 3)
            for reader in following:
                reader.leave()


async def test_d15_a_reader_may_leave_together_with_its_supervisor(server: Endpoint) -> None:
    async with supervisors(server.url, server.url) as (owner, _):
        run = await owner.start(Witness().waits)
        for _ in range(10):
            async with supervisor_at(server.url) as there, there.follow(run.id) as entries:
                await anext(entries)
            gc.collect()  # what was never awaited says so
        await until_it_is(partial(channels, server), 2)
