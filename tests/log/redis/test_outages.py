"""Redis killed, emptied, stopped, full, out of reach, or of no use; and owners that stand still."""

from __future__ import annotations

import signal
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import trio

from penstock.errors import CursorExpired, LogFull, LogUnavailable, ReaderReleased
from penstock.runs import RunStatus
from penstock.sse import Event
from tests.support.command_line import penstock
from tests.support.redis_runs import (
    Ticks,
    all_may_reap,
    counted,
    exactly_once,
    last_seq,
    nothing_is_left,
    owner_process,
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
from tests.support.redis_servers import RedisServer, redis_server
from tests.support.serving import PRODUCERS, problem, serving
from tests.support.supervising import Notes, Reader, Witness, gists, read, readers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock.runs import Run
    from tests.support.proxy import Proxy
    from tests.support.redis_servers import Endpoint

EXAMPLE = Path(__file__).parents[3] / "examples" / "agent.py"
RESTARTS = 3
BIG = 16 * 1024 * 1024


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for Redis looks often, which spares a test with many outages its time."""
    monkeypatch.setattr("penstock.backoff.LONGEST_PAUSE", 0.2)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.log.redis.backend.ANSWER_TIMEOUT", 0.5)


# Killed


@pytest.mark.usefixtures("brisk")
@pytest.mark.parametrize("empty", [True, False], ids=["empty", "with its data"])
async def test_a_server_that_is_killed_again_and_again_costs_no_run_an_entry(empty: bool) -> None:
    async with (
        redis_server(persistent=not empty) as server,
        supervisors(server.url, server.url, tail_entries=100_000) as (one, other),
    ):
        busy, silent = [Ticks(), Ticks(0.05)], Witness()
        runs = [await supervisor.start(ticks) for supervisor, ticks in zip([one, other], busy, strict=True)]
        runs.append(await one.start(silent.waits))
        async with readers(*((each, run.id) for run in runs for each in (one, other))) as following:
            lively = following[: 2 * len(busy)]
            await until(lambda: min(map(last_seq, following)) >= 1)
            for _ in range(RESTARTS):
                await server.kill()
                said = [ticks.said for ticks in busy for _ in (one, other)]
                await server.restart(empty=empty)
                await until(lambda: all(last_seq(each) > was + 1 for each, was in zip(lively, said, strict=True)))  # noqa: B023
                for run in runs:
                    await until_it_is(partial(server.command, "EXISTS", record_of(run.id), stream_of(run.id)), 2)
            for ticks in busy:
                ticks.enough.set()
            await one.cancel(runs[-1].id)
        for number, (run, ticks) in enumerate(zip(runs, busy, strict=False)):
            counted(await same_everywhere(server, run.id, following[2 * number : 2 * number + 2]), ticks)
        assert (await same_everywhere(server, runs[-1].id, following[-2:]))["status"] == "cancelled"
        await nothing_is_left(one)
        await nothing_is_left(other)


@pytest.mark.usefixtures("brisk")
async def test_a_run_of_which_an_emptied_server_cannot_be_given_all_again_ends_and_says_so() -> None:
    notes = Notes()
    async with (
        redis_server() as server,
        supervisors(server.url, observer=notes) as (other,),
        supervisor_at(server.url, tail_entries=50, observer=notes) as owner,
    ):
        long, short, writes_on = Ticks(0.001), Ticks(0.02), Ticks(0.001)
        started = ((owner, long), (other, short), (owner, writes_on))
        runs = [await supervisor.start(ticks) for supervisor, ticks in started]
        async with readers(*((each, run.id) for run in runs for each in (owner, other))) as following:
            await until(lambda: min(map(last_seq, following[:2] + following[4:])) >= 200)
            await server.restart(empty=True)
            await until(lambda: all(reader.ended_at for reader in following[:2] + following[4:]))
            for run in (runs[0], runs[2]):
                record = await other.get(run.id)
                assert (record.status, record.error and record.error.code) == ("failed", "LOG_DIVERGED")
            seen = last_seq(following[3])
            await until(lambda: last_seq(following[3]) > seen)  # the others go on
            short.enough.set()
        for at in (0, 4):
            for reader in following[at : at + 2]:
                assert exactly_once(reader) > 200
                assert gists(reader.entries)[-2:] == ["error LOG_DIVERGED", "[DONE]"]
        assert long.saw in {"log diverged", None}  # None: its own sleep was over in the same instant
        counted(await same_everywhere(server, runs[1].id, following[2:4]), short)
        with pytest.raises(CursorExpired) as too_late:
            await read(other, runs[0].id)
        kept = await stored(server, runs[0].id)
        assert kept[0][0] == f"{too_late.value.oldest_seq}-0"
        assert [fields.get("complete") for _, fields in kept][-2:] == [None, "true"]
        assert (notes.fenced, notes.errors) == ([], [])
        await nothing_is_left(owner)


@pytest.mark.usefixtures("brisk")
async def test_a_run_that_ends_while_the_server_is_away_ends_when_it_is_back_empty() -> None:
    async with redis_server() as server, supervisors(server.url, server.url) as (owner, other):
        ticks, witness = Ticks(), Witness()
        run, silent = await owner.start(ticks), await owner.start(witness.waits)
        async with readers((owner, run.id), (other, run.id), (owner, silent.id), (other, silent.id)) as following:
            await until(lambda: min(map(last_seq, following[:2])) >= 10 and min(map(last_seq, following[2:])) == 1)
            await server.kill()
            ticks.enough.set()
            await until(lambda: ticks.left)
            await server.restart(empty=True)
            await until(lambda: all(reader.ended_at for reader in following[:2]))
            await until_it_is(partial(server.command, "EXISTS", record_of(silent.id)), 1)
            await other.cancel(silent.id)
        counted(await same_everywhere(server, run.id, following[:2]), ticks)
        assert (await same_everywhere(server, silent.id, following[2:]))["status"] == "cancelled"


async def test_a_server_that_stands_still_for_two_leases_loses_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.log.redis.backend.ANSWER_TIMEOUT", 0.5)
    lease, notes = 1.0, Notes()
    async with (
        redis_server() as server,
        supervisors(server.url, lease=lease) as (other,),
        supervisor_at(server.url, lease=lease, observer=notes) as owner,
    ):
        ticks, witness = Ticks(), Witness()
        run, silent = await owner.start(ticks), await owner.start(witness.waits)
        async with readers(*((each, which.id) for which in (run, silent) for each in (owner, other))) as following:
            await until(lambda: min(map(last_seq, following)) >= 1)
            await all_may_reap(server)
            server.pause()
            await trio.sleep(2 * lease)  # for so long it stands still
            server.resume()
            said = ticks.said
            await until(lambda: min(map(last_seq, following[:2])) > said)
            await all_may_reap(server)  # if anybody wants to, now is the time
            ticks.enough.set()
            await owner.cancel(silent.id)
        counted(await same_everywhere(server, run.id, following[:2]), ticks)
        assert (await same_everywhere(server, silent.id, following[2:]))["status"] == "cancelled"
        assert (notes.fenced, notes.errors) == ([], [])


async def test_an_owner_that_stands_still_for_two_leases_loses_its_run_once_and_is_told(server: Endpoint) -> None:
    lease = 1.0
    async with supervisors(server.url, lease=lease) as (other,), owner_process(server.url, lease) as owner:
        run_id = (await owner.until(r"owns (\S+)"))[1]
        async with readers((other, run_id)) as (reader,):
            await until(lambda: last_seq(reader) >= 10)
            await all_may_reap(server, 1)
            owner.process.send_signal(signal.SIGSTOP)
            await trio.sleep(2 * lease)  # for so long it stands still
            assert (await other.wait(run_id)).status == "lost"
            at_the_end = await stored(server, run_id)
            owner.process.send_signal(signal.SIGCONT)
            with trio.fail_after(60):
                await owner.until("cancelled: fenced")
                await owner.until("ended lost")
                assert await owner.end() == 0
        assert await stored(server, run_id) == at_the_end
        assert (await same_everywhere(server, run_id, [reader]))["status"] == "lost"
        assert gists(reader.entries).count("error RUN_LOST") == 1
        assert gists(reader.entries)[-2:] == ["error RUN_LOST", "[DONE]"]


@asynccontextmanager
async def full(server: RedisServer) -> AsyncIterator[None]:
    await server.command("SETRANGE", "filler", BIG, "x")
    yield
    await server.command("DEL", "filler")


async def test_on_a_full_server_what_runs_can_end_and_be_read_and_goes_on_when_there_is_room() -> None:
    async with (
        redis_server(maxmemory=str(BIG), maxmemory_policy="noeviction") as server,
        supervisors(server.url, lease=1.5) as (other,),
        serving({**PRODUCERS}, server.url, lease=1.5) as http,
    ):
        notes = Notes()
        async with supervisor_at(server.url, observer=notes, lease=1.5) as owner:
            goes_on, ends, cancelled, silent = Ticks(), Ticks(), Witness(), Witness()
            runs = [await owner.start(each) for each in (goes_on, ends, cancelled.waits, silent.waits)]
            async with readers(*((each, run.id) for run in runs for each in (owner, other))) as following:
                await until(lambda: min(map(last_seq, following)) >= 1)
                async with full(server):
                    await until(lambda: any("maxmemory" in words for words in notes.warnings))
                    with pytest.raises(LogFull):
                        await owner.start(Ticks())
                    answer = await http.client.post("/v1/runs", json={"producer": "count", "input": 3})
                    problem(answer, 503, "LOG_FULL")
                    assert int(answer.headers["retry-after"]) >= 1
                    ends.enough.set()
                    await other.cancel(runs[2].id, "all the same")
                    for run, status in ((runs[1], "completed"), (runs[2], "cancelled")):
                        assert (await other.wait(run.id)).status == status
                    assert cancelled.saw == "run cancelled: all the same"
                    for at, run in ((2, runs[1]), (4, runs[2])):
                        await until(lambda: following[at].ended_at and following[at + 1].ended_at)  # noqa: B023
                        await same_everywhere(server, run.id, following[at : at + 2])
                        late = await read(other, run.id)
                        assert late == following[at + 1].entries
                    async with other.follow(runs[0].id) as entries:
                        assert gists([await anext(entries)]) == ["1"]
                    await all_may_reap(server)  # and the silent one is renewed
                    assert (await other.get(runs[3].id)).status == "running"
                    said, stuck_at = goes_on.said, last_seq(following[1])
                    assert said > stuck_at
                await until(lambda: min(map(last_seq, following[:2])) > said)
                assert await http.start("count", 3)
                goes_on.enough.set()
                await other.cancel(runs[3].id)
            counted(await same_everywhere(server, runs[0].id, following[:2]), goes_on)
            record = await same_everywhere(server, runs[1].id, following[2:4])
            assert (record["status"], record["seq"]) == ("completed", str(ends.said + 1))
            await nothing_is_left(owner)


# Out of reach


@pytest.mark.usefixtures("brisk")
async def test_a_stall_below_the_limit_holds_a_producer_back_with_what_may_be_pending_and_costs_nothing(
    server: Endpoint, between: Proxy
) -> None:
    said, stalled, notes, room = 0, trio.Event(), Notes(), 20_000

    async def producer() -> AsyncIterator[Event]:
        nonlocal said
        await stalled.wait()
        for said in range(1, 61):
            yield Event(data=str(said) + "." * 1_000)

    async with supervisors(between.url, max_pending_bytes=room, observer=notes) as (owner,):
        async with supervisor_at(server.url) as other, trio.open_nursery() as nursery:
            run = await owner.start(producer)
            following = [Reader(each, run.id) for each in (owner, other)]
            for reader in following:
                await nursery.start(reader.run)
            between.stall()
            stalled.set()
            await until(lambda: owner._committer.pending_bytes >= room)
            assert owner._committer.pending_bytes < room + 2_000
            assert 10 < said < 30  # it felt nothing until there was no more room
            between.go_on()
            await until(lambda: all(reader.ended_at for reader in following))
        assert (await same_everywhere(server, run.id, following))["seq"] == "61"
        assert (notes.fenced, notes.errors) == ([], [])


@pytest.mark.usefixtures("impatient", "brisk")
async def test_an_outage_beyond_the_limit_ends_the_runs_and_nothing_else(server: Endpoint, between: Proxy) -> None:
    notes, silent, ticks, kept = Notes(), Witness(), Ticks(), Ticks()
    async with (
        supervisors(server.url, lease=1.5) as (other,),
        supervisor_at(between.url, lease=1.5, outage_limit=1.2, observer=notes) as owner,
    ):
        runs = [await owner.start(silent.waits), await owner.start(ticks)]
        elsewhere = await other.start(kept)
        following: list[Reader] = []
        async with readers(*((other, run.id) for run in runs)) as there:
            async with readers(*((owner, run.id) for run in [*runs, elsewhere])) as following:
                await until(lambda: min(map(last_seq, [*there, *following])) >= 1)
                await all_may_reap(server)
                between.stall()
                await until(lambda: silent.left and ticks.left)
            assert silent.saw == "log unavailable"
            assert [type(reader.error) for reader in following] == [ReaderReleased] * 3
            for reader in following:
                seqs = [entry.seq for entry in reader.entries]
                assert seqs == list(range(1, len(seqs) + 1))
            with pytest.raises(LogUnavailable):
                await owner.start(Ticks())
            for run in runs:
                assert (await other.wait(run.id)).status == "lost"
        at_the_end = [await stored(server, run.id) for run in runs]
        between.go_on()
        fresh = Ticks()

        async def again() -> bool:
            try:
                async with owner.follow(elsewhere.id, last_seq(following[2])) as entries:
                    return (await anext(entries)).seq == last_seq(following[2]) + 1
            except (LogUnavailable, ReaderReleased):
                return False

        await until_it_is(again, True)
        run = await owner.start(fresh)
        async with readers((owner, run.id), (other, run.id)) as both:
            await until(lambda: min(map(last_seq, both)) >= 5)
            fresh.enough.set()
        counted(await same_everywhere(server, run.id, both), fresh)
        for lost, was, reader in zip(runs, at_the_end, there, strict=True):
            assert await stored(server, lost.id) == was
            assert (await same_everywhere(server, lost.id, [reader]))["status"] == "lost"
            assert (await owner.get(lost.id)).status == "lost"
            assert gists(await read(owner, lost.id))[-2:] == ["error RUN_LOST", "[DONE]"]
        kept.enough.set()
        await other.wait(elsewhere.id)
        counted(await whole(server, elsewhere.id), kept)
        assert notes.errors == []
        await nothing_is_left(owner)


@pytest.mark.usefixtures("impatient", "brisk")
async def test_the_only_process_reaps_its_own_runs_after_a_long_outage(server: Endpoint, between: Proxy) -> None:
    async with supervisors(between.url, lease=0.6, outage_limit=0.7) as (owner,):
        witness = Witness()
        run = await owner.start(witness.waits)
        async with readers((owner, run.id)) as (reader,):
            await until(lambda: last_seq(reader) == 1)
            between.stall()
        assert isinstance(reader.error, ReaderReleased)
        assert witness.saw == "log unavailable"
        between.go_on()

        async def status() -> RunStatus | None:
            try:
                record: Run = await owner.wait(run.id)
            except (LogUnavailable, ReaderReleased):
                return None
            return record.status

        await until_it_is(status, RunStatus.LOST, 8)
        assert (await whole(server, run.id))["status"] == "lost"
        assert gists(await read(owner, run.id)) == ["first", "error RUN_LOST", "[DONE]"]
        await nothing_is_left(owner)


# Of no use


async def serve_refuses(url: str) -> str:
    serve = ("serve", "--producers", f"{EXAMPLE}:producers", "--bind", "127.0.0.1:0", "--log", url)
    async with penstock(*serve) as program:
        with trio.fail_after(60):
            code = await program.end()
    assert "Traceback" not in program.words
    assert code == 1, program.words
    return program.words


async def test_serve_does_not_start_on_a_read_only_replica(server: Endpoint) -> None:
    async with redis_server(replicaof=("127.0.0.1", server.port)) as replica:
        words = await serve_refuses(replica.url)
        assert "it is a read-only replica; name its primary in the URL; not started" in words


async def test_a_wrong_password_is_refused_and_shown_nowhere() -> None:
    async with redis_server(requirepass="sesame") as server:
        wrong = f"redis://:hunter2@127.0.0.1:{server.port}"
        words = await serve_refuses(wrong)
        assert f"Redis at 127.0.0.1:{server.port} cannot serve: it refuses the user or the password" in words
        assert "hunter2" not in words


async def test_serve_and_its_runs_over_a_password_show_it_nowhere() -> None:
    async with redis_server(requirepass="sesame") as server:
        serve = ("serve", "--producers", f"{EXAMPLE}:producers", "--bind", "127.0.0.1:0", "--log-level", "debug")
        async with penstock(*serve, PENSTOCK_LOG=server.url) as program:
            await program.until(r"http://127\.0\.0\.1:\d+")
            await server.kill()
            await program.until("cannot|broke")
            await server.restart(empty=True)
            program.process.send_signal(signal.SIGTERM)
            assert await program.end() == 0, program.words
        assert "sesame" not in program.words
        assert "Traceback" not in program.words
