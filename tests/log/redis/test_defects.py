"""What the predecessor got wrong with Redis: a test for each row on a real one, so that it does not come back."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock.errors import CursorExpired, RunEnded, RunExists, RunNotFound
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
    texts,
    until,
    until_it_is,
    whole,
)
from tests.support.redis_servers import let_pass
from tests.support.serving import serving
from tests.support.supervising import FIRST, Notes, Witness, count, gists, read, readers
from tests.support.wire import Block

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.proxy import Proxy
    from tests.support.redis_servers import Endpoint

LOST = ["first", "error RUN_LOST", "[DONE]"]


async def test_d15_after_its_readers_have_left_a_run_elsewhere_costs_no_command(
    server: Endpoint, between: Proxy
) -> None:
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


async def test_d27_a_terminal_append_whose_reply_is_lost_ends_the_run_once(server: Endpoint, between: Proxy) -> None:
    notes = Notes()
    async with supervisors(between.url, observer=notes) as (owner,):
        tap = trio.Event()

        async def producer() -> AsyncIterator[Event]:
            yield FIRST
            await tap.wait()

        run = await owner.start(producer)
        async with readers((owner, run.id)) as (reader,):
            await until(lambda: last_seq(reader) == 1)
            between.drop_reply_when(lambda reply: b"completed" in reply.arguments, times=3)
            tap.set()
        assert between.lost == 3
        assert [each.status.value for each in notes.ended] == ["completed"]
        assert notes.fenced == []
        assert (await same_everywhere(server, run.id, [reader]))["seq"] == "2"


@pytest.mark.parametrize("how", ["return", "cancel"])
async def test_d29_leaving_while_an_append_is_under_way_loses_nothing(
    server: Endpoint, between: Proxy, how: str
) -> None:
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


async def test_d31_a_run_is_not_begun_again_by_whoever_comes_after(server: Endpoint) -> None:
    async with supervisors(server.url) as (other,):
        async with supervisor_at(server.url) as owner:
            async with owner.open_run("run") as writer:
                assert await writer.write(FIRST) == 1
                await writer.flush()
                with pytest.raises(RunExists):
                    await other.start(count, 3, run_id="run")
                assert await writer.write(FIRST) == 2  # an owner goes on after the last
            await owner.start(Witness().waits, run_id="interrupted")
            async with owner.follow("interrupted") as entries:
                await anext(entries)
        async with supervisor_at(server.url) as restarted:
            for run_id in ("run", "interrupted"):
                before = await stored(server, run_id)
                with pytest.raises(RunExists):
                    await restarted.start(count, 3, run_id=run_id)
                assert await stored(server, run_id) == before
                await whole(server, run_id)


async def test_d32_the_history_of_a_silent_run_outlives_the_ttl_again_and_again(server: Endpoint) -> None:
    ttl, lease = 100.0, 20.0
    async with supervisors(server.url, server.url, limits={"ttl": ttl}, lease=lease) as (owner, other):
        run = await owner.start(Witness().waits)
        async with readers((other, run.id)) as (reader,):
            await until(lambda: last_seq(reader) == 1)
            for _ in range(8):
                await let_pass(server, 15)
                owner._leases.renew_now()  # as it does by the clock
                await until_it_is(partial(fresh, server, run.id, ttl), True)
            assert gists([await first_of(other, run.id)]) == ["first"]
            await owner.cancel(run.id)
        await let_pass(server, ttl - 10)
        assert gists(await read(other, run.id)) == ["first", "cancelled", "[DONE]"]
        await let_pass(server, 20)
        with pytest.raises(RunNotFound):
            await other.get(run.id)
        assert await server.command("EXISTS", stream_of(run.id), record_of(run.id)) == 0


async def fresh(server: Endpoint, run_id: str, ttl: float) -> bool:
    """Both keys have nearly all of their time before them."""
    left = [int(await server.command("PTTL", key)) for key in (stream_of(run_id), record_of(run_id))]
    return all(each > (ttl - 5) * 1_000 for each in left)


async def first_of(supervisor: Any, run_id: str) -> Any:
    async with supervisor.follow(run_id) as entries:
        return await anext(entries)


async def test_d33_d34_resuming_past_the_end_ends_at_once_and_a_run_that_has_expired_is_not_found(
    server: Endpoint,
) -> None:
    async with supervisors(server.url, server.url, limits={"ttl": 100.0}) as both, serving({}, server.url) as http:
        run = await both[0].start(count, 3)
        await both[1].wait(run.id)
        for supervisor in both:
            for after in (4, 5, 2**53, 2**70):
                async with supervisor.follow(run.id, after) as entries:
                    assert entries.at_end
                    assert [entry async for entry in entries] == []
        answer = await http.client.get(f"/v1/runs/{run.id}/stream", headers={"Last-Event-ID": "4"})
        assert (answer.status_code, answer.content) == (204, b"")
        await let_pass(server, 101)
        for run_id in (run.id, "never"):
            for call in (partial(read, both[0]), both[0].get, both[0].wait, both[0].cancel):
                with pytest.raises(RunNotFound):
                    await call(run_id)
            assert (await http.client.get(f"/v1/runs/{run_id}/stream")).status_code == 404


async def test_d34_the_reader_of_a_run_that_nobody_gives_back_is_told_so(
    server: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.supervisor.fetcher.MISSING_GRACE", 0.5)
    monkeypatch.setattr("penstock.log.redis.notifications.PING_INTERVAL", 0.2)
    async with supervisors(server.url, server.url, lease=3_600.0) as (owner, other):
        run = await owner.start(Witness().waits)
        async with readers((other, run.id)) as (reader,):
            await until(lambda: last_seq(reader) == 1)
            await server.command("DEL", stream_of(run.id), record_of(run.id))
        assert isinstance(reader.error, RunNotFound)
        await nothing_is_left(other)


async def test_d37_a_cursor_before_what_was_trimmed_is_refused_with_the_oldest_seq(server: Endpoint) -> None:
    async with supervisors(server.url, server.url, limits={"max_entries": 200}, tail_entries=10) as (owner, other):
        ticks = Ticks(0.0)
        run = await owner.start(ticks)
        await until(lambda: ticks.said >= 1_500)
        ticks.enough.set()
        await other.wait(run.id)
        kept = await stored(server, run.id)
        oldest = int(kept[0][1]["seq_id"])
        assert 500 < oldest <= ticks.said + 1 - 200 + 1
        for supervisor in (owner, other):
            with pytest.raises(CursorExpired) as refused:
                await read(supervisor, run.id, 250)
            assert refused.value.oldest_seq == oldest
            assert texts(await read(supervisor, run.id, oldest - 1)) == [fields["data"] for _, fields in kept]
        async with serving({}, server.url) as http:
            answer = await http.client.get(f"/v1/runs/{run.id}/stream", params={"starting_after": 250})
            assert (answer.status_code, answer.json()["oldest_seq"]) == (410, oldest)


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


async def test_d40_a_run_that_goes_on_for_longer_than_ended_ones_are_kept_does_not_expire(server: Endpoint) -> None:
    ttl, lease = 60.0, 30.0
    async with supervisors(server.url, server.url, limits={"ttl": ttl}, lease=lease) as (owner, other):
        ticks = Ticks()
        run = await owner.start(ticks, idempotency_key="key")
        async with readers((owner, run.id), (other, run.id)) as following:
            for _ in range(6):  # six times 20 s, and it writes all the time
                seen = max(map(last_seq, following))
                await let_pass(server, 20)
                await until(lambda: min(map(last_seq, following)) > seen + 5)  # noqa: B023  (it is done with in this round)
                assert (await other.get(run.id)).status == "running"
                assert [each.id for each in await other.list()] == [run.id]
                assert (await first_of(other, run.id)).seq == 1
                owner._leases.renew_now()
            ticks.enough.set()
        counted(await same_everywhere(server, run.id, following), ticks)


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
