"""What the predecessor got wrong with Redis: a test for each row on a real one, so that it does not come back."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio

from penstock.errors import RunEnded, RunNotFound
from penstock.sse import Event
from tests.support.clustered import on_a_cluster
from tests.support.redis_runs import (
    Ticks,
    counted,
    last_seq,
    nothing_is_left,
    record_of,
    same_everywhere,
    stored,
    stream_of,
    supervisor_at,
    supervisors,
    until,
    until_it_is,
    whole,
)
from tests.support.serving import serving
from tests.support.supervising import FIRST, Notes, Witness, count, read, readers
from tests.support.wire import Block

if TYPE_CHECKING:
    from tests.support.proxy import Proxy
    from tests.support.redis_servers import Endpoint


async def test_d15_a_run_elsewhere_without_readers_costs_no_command(server: Endpoint, between: Proxy) -> None:
    async with supervisors(
        server.url, between.url, cancel_check_interval=3_600.0, lease=3_600.0, outage_limit=3_600.0
    ) as (owner, there):
        ticks = Ticks(0.001)
        run = await owner.start(ticks)
        async with readers((there, run.id), (there, run.id)) as following:
            await until(lambda: min(map(last_seq, following)) >= 20)
            for reader in following:
                reader.leave()
        await nothing_is_left(there)
        await until_it_is(partial(server.command, "PUBSUB", "CHANNELS", "*:wake"), [])
        between.requests.clear()
        said = ticks.said
        await until(lambda: ticks.said > said + 200)
        assert between.requests.keys() <= {"PERSIST", "PING"}  # a sign of life now and then
        ticks.enough.set()


@pytest.mark.parametrize("how", ["return", "cancel"])
async def test_d29_leaving_during_an_append_loses_nothing(server: Endpoint, between: Proxy, how: str) -> None:
    with trio.fail_after(20), trio.CancelScope() as scope:
        async with supervisor_at(between.url, drain_timeout=5.0) as owner:
            between.delay(0.1)
            async with owner.open_run("run") as writer:
                for number in range(500):
                    await writer.write(Event(data=str(number)))
                await until(lambda: between.requests["EVALSHA"] > 2)
                await writer.write(Event(data="the last"))
                if how == "cancel":
                    scope.cancel()
                    await trio.sleep_forever()
    record = await whole(server, "run")
    data = [fields["data"] for _, fields in await stored(server, "run")]
    assert data[:501] == [f"data: {number}\n\n" for number in [*range(500), "the last"]]
    ends = {"return": ("completed", 502), "cancel": ("failed", 503)}
    assert (record["status"], len(data)) == ends[how]


@on_a_cluster
async def test_d30_a_run_that_redis_refuses_harms_no_other(server: Endpoint) -> None:
    notes = Notes()
    async with supervisors(server.url, server.url, observer=notes, lease=1.5) as (owner, other):
        good, bad, silent = Ticks(), Ticks(), Witness()
        runs = [await owner.start(each) for each in (good, bad, silent.waits)]
        async with readers((other, runs[0].id)) as (reader,):
            await until(lambda: last_seq(reader) >= 3)
            await server.command("SET", stream_of(runs[1].id), "no stream")
            await until(lambda: bad.left)
            seen = last_seq(reader)
            await until(lambda: last_seq(reader) > seen + 10)
            await until(lambda: owner._committer.pending_bytes < 1_000)
            await owner.cancel(runs[2].id)
            assert (await other.wait(runs[2].id)).status == "cancelled"
            good.enough.set()
        counted(await same_everywhere(server, runs[0].id, [reader]), good)
        assert any(runs[1].id in words for words in notes.warnings)


async def test_d30_a_run_that_cannot_be_put_back_is_given_up_in_clear_words(server: Endpoint) -> None:
    notes, ticks = Notes(), Ticks(0.02)
    async with supervisors(server.url, observer=notes) as (owner,):
        run = await owner.start(ticks)
        async with owner.follow(run.id) as entries:
            await anext(entries)
        in_its_way = "redis.call('DEL', KEYS[1]) redis.call('SET', KEYS[2], 'no stream')"  # in one step
        await server.command("EVAL", in_its_way, 2, record_of(run.id), stream_of(run.id))
        await until(lambda: ticks.left)
        assert ticks.saw in {"log unavailable", None}  # nobody else has it; None: its own sleep was over just then
        assert notes.fenced == []
        assert any(run.id in words and "WRONGTYPE" in words for words in notes.warnings)


async def test_d34_the_reader_of_a_lost_run_gets_an_error(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.supervisor.fetcher.MISSING_GRACE", 0.5)
    monkeypatch.setattr("penstock.log.redis.notifications.PING_INTERVAL", 0.2)
    async with supervisors(server.url, server.url, lease=3_600.0) as (owner, other):
        run = await owner.start(Witness().waits)
        async with readers((other, run.id)) as (reader,):
            await until(lambda: last_seq(reader) == 1)
            await server.command("DEL", stream_of(run.id), record_of(run.id))
        assert isinstance(reader.error, RunNotFound)
        await nothing_is_left(other)


async def test_d38_the_length_of_a_run_does_not_count_for_a_resume_at_its_end(server: Endpoint, between: Proxy) -> None:
    async with supervisors(server.url, between.url, cancel_check_interval=3_600.0, lease=3_600.0) as (owner, there):
        runs = [await owner.start(count, length) for length in (10, 2_000)]
        spent = []
        for run, length in zip(runs, (10, 2_000), strict=True):
            await owner.wait(run.id)
            await read(there, run.id)  # whatever is needed once has been sent
            before = between.requests["EVALSHA"]
            assert [entry.seq for entry in await read(there, run.id, length - 5)] == list(range(length - 4, length + 2))
            spent.append(between.requests["EVALSHA"] - before)
        assert spent == [1, 1]


@pytest.mark.parametrize("how", ["cut", "stall"])
async def test_d41_half_a_second_without_redis_kills_no_reader(server: Endpoint, between: Proxy, how: str) -> None:
    async with (
        supervisors(between.url, between.url) as (owner, other),
        serving({}, between.url, ping_interval=0.1) as http,
    ):
        ticks, silent = Ticks(), Witness()
        runs = [await owner.start(ticks), await owner.start(silent.waits)]
        async with (
            readers(*((each, run.id) for run in runs for each in (owner, other, other))) as following,
            http.reading(runs[1].id) as client,
        ):
            await until(lambda: min(map(last_seq, following)) >= 1)
            await client.take(1)
            getattr(between, how)()
            with trio.fail_after(5):
                assert (await client.take(3)) == [Block(comment="ping")] * 3
            await trio.sleep(0.2)  # with the pings it is half a second
            await between.accept()
            between.go_on()
            said = ticks.said
            await until(lambda: min(map(last_seq, following[:3])) > said)
            ticks.enough.set()
            await until_it_is(partial(server.command, "EXISTS", record_of(runs[1].id)), 1)
            await other.cancel(runs[1].id)
            assert [block.data for block in await client.rest()][-1] == "[DONE]"
        counted(await same_everywhere(server, runs[0].id, following[:3]), ticks)
        assert (await same_everywhere(server, runs[1].id, following[3:]))["status"] == "cancelled"


async def test_d31_a_run_written_by_hand_whose_owner_is_fenced_is_cut_short(server: Endpoint) -> None:
    async with supervisors(server.url, lease=0.6) as (owner,):
        with pytest.raises(RunEnded):  # noqa: PT012
            async with owner.open_run("run") as writer:
                await writer.write(FIRST)
                await writer.flush()
                await server.command("HSET", record_of("run"), "epoch", "another")
                await trio.sleep_forever()
