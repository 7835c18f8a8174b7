"""Redis that takes no writes, holds what is no record, loses what a start was answered, and whose clock is set."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock.errors import IdempotencyConflict, LogUnavailable, PenstockError, ReaderReleased
from penstock.log import AppendStatus, EventLog, Idempotency, Lease, Started
from penstock.log.open import open_log
from penstock.log.redis import scripts
from penstock.log.redis.log import RedisLog
from penstock.log.redis.schema import Keys
from penstock.runs import RunStatus
from penstock.sse import Event
from tests.support.logs import LEASE, record
from tests.support.redis_runs import (
    Ticks,
    all_may_reap,
    counted,
    last_seq,
    record_of,
    same_everywhere,
    stream_of,
    supervisor_at,
    supervisors,
    until,
    until_it_is,
    whole,
)
from tests.support.redis_servers import Endpoint, redis_server
from tests.support.supervising import Notes, Witness, readers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock.supervisor import Supervisor
    from tests.support.proxy import Proxy, Reply

KEYS = Keys()
START = scripts.START.digest.encode()
NO_TEXT = b"\xff\xfe"


@pytest.fixture
def brisk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever waits for Redis looks often, and whoever waits for another start does not wait for long."""
    monkeypatch.setattr("penstock.backoff.LONGEST_PAUSE", 0.2)
    monkeypatch.setattr("penstock.log.redis.start.PENDING_LIMIT", 0.5)
    monkeypatch.setattr("penstock.log.redis.start.FORGET_TIMEOUT", 0.2)


@asynccontextmanager
async def redis_log(url: str, **limits: Any) -> AsyncIterator[RedisLog]:
    async with open_log(url, **limits) as log:
        assert isinstance(log, RedisLog)
        yield log


async def says_hello() -> AsyncIterator[Event]:
    yield Event(data="hello")


@pytest.mark.usefixtures("brisk")
@pytest.mark.parametrize("lease", [0.6, 30.0], ids=["by a look for the dead", "by a look at the log"])
async def test_a_server_that_refuses_nothing_but_writes_is_an_outage_after_the_limit(lease: float) -> None:
    silent, ticks, fresh = Witness(), Ticks(), Ticks()
    async with redis_server() as server, supervisors(server.url, lease=lease, outage_limit=0.8) as (owner,):
        runs = [await owner.start(silent.waits), await owner.start(ticks)]
        async with readers(*((owner, run.id) for run in runs)) as following:
            await until(lambda: min(map(last_seq, following)) >= 1)
            if lease < 1:
                await all_may_reap(server, 1)
            await server.command("CONFIG", "SET", "min-replicas-to-write", "1")
            await until(lambda: silent.left and ticks.left)
        assert silent.saw == "log unavailable"
        assert [type(reader.error) for reader in following] == [ReaderReleased] * 2
        with pytest.raises(LogUnavailable):
            await owner.start(Ticks())
        await server.command("CONFIG", "SET", "min-replicas-to-write", "0")
        run = await owner.start(fresh)

        async def again() -> bool:
            try:
                async with owner.follow(run.id) as entries:
                    return bool((await anext(entries)).seq == 1)
            except ReaderReleased:
                return False

        await until_it_is(again, wanted=True)
        fresh.enough.set()
        assert (await owner.wait(run.id)).status is RunStatus.COMPLETED
        counted(await whole(server, run.id), fresh)


@pytest.mark.usefixtures("brisk")
async def test_readers_of_runs_elsewhere_are_released_too_where_writes_alone_are_refused() -> None:
    async with (
        redis_server() as server,
        supervisors(server.url) as (owner,),
        supervisor_at(server.url, lease=0.4, outage_limit=0.6) as other,
    ):
        run = await owner.start(Witness().waits)  # whose lease goes on: there is nothing for the other to reap
        async with readers((other, run.id)) as (reader,):
            await until(lambda: last_seq(reader) == 1)
            await all_may_reap(server, 1)
            await server.command("CONFIG", "SET", "min-replicas-to-write", "1")
            await until(lambda: reader.ended_at)
        assert isinstance(reader.error, ReaderReleased)
        await server.command("CONFIG", "SET", "min-replicas-to-write", "0")


# What is no record


async def replace_stream(server: Endpoint, run_id: str) -> None:
    """In one step, lest a reader find the run without its history in between, and leave with that."""
    await server.command("SET", stream_of(run_id), "no stream")


async def replace_record(server: Endpoint, run_id: str) -> None:
    await server.command("SET", record_of(run_id), "no record")


async def unknown_status(server: Endpoint, run_id: str) -> None:
    await server.command("HSET", record_of(run_id), "status", "paused")


async def odd_number(server: Endpoint, run_id: str) -> None:
    await server.command("HSET", record_of(run_id), "created_at", "yesterday")


async def no_text(server: Endpoint, run_id: str) -> None:
    await server.command("HSET", record_of(run_id), "created_at", NO_TEXT)


@pytest.mark.parametrize("spoil", [replace_stream, replace_record, no_text])
async def test_a_run_that_cannot_be_read_harms_no_reader_of_another(server: Endpoint, spoil: Any) -> None:
    bad, good, notes = Ticks(), Ticks(), Notes()
    async with supervisors(server.url) as (owner,), supervisor_at(server.url, observer=notes) as other:
        spoiled, run = await owner.start(bad), await owner.start(good)
        async with readers((other, spoiled.id), (other, run.id), (owner, run.id)) as (harmed, *following):
            await until(lambda: min(map(last_seq, [harmed, *following])) >= 1)
            await spoil(server, spoiled.id)
            await server.command("PUBLISH", KEYS.wake(spoiled.id), "999999999")
            await until(lambda: not all(worker.idle for worker in other._fetcher.shards))
            seen = min(map(last_seq, following))
            await until(lambda: min(map(last_seq, following)) >= seen + 10)
            harmed.leave()
            good.enough.set()
        counted(await same_everywhere(server, run.id, following), good)
        assert notes.errors == []
        bad.enough.set()


@pytest.mark.parametrize("words", ["[1", "1", NO_TEXT], ids=["half", "number", "no text"])
async def test_a_cancel_request_that_is_none_costs_no_other_its_effect(server: Endpoint, words: str | bytes) -> None:
    witness, ticks = Witness(), Ticks()
    async with supervisors(server.url, server.url, cancel_check_interval=0.1) as (owner, other):
        silent, run = await owner.start(witness.waits), await owner.start(ticks)
        inbox = KEYS.inbox(owner._owner)
        await server.command("HSET", inbox, "nobody", words)
        await until_it_is(lambda: server.command("EXISTS", inbox), 0)
        await other.cancel(silent.id, "enough")
        assert (await other.wait(silent.id)).status is RunStatus.CANCELLED
        async with readers((owner, run.id), (other, run.id)) as following:
            ticks.enough.set()
        counted(await same_everywhere(server, run.id, following), ticks)


async def test_runs_are_renewed_and_the_dead_reaped_beside_what_no_supervisor_writes(server: Endpoint) -> None:
    spoiled: list[Any] = [Witness().waits, Witness().waits, Ticks(), Ticks()]
    silent, ticks = Witness(), Ticks()
    async with supervisors(server.url, server.url, lease=0.9) as (owner, other), redis_log(server.url) as log:
        bad = [(await owner.start(each)).id for each in spoiled]
        quiet, run = await owner.start(silent.waits), await owner.start(ticks)
        async with readers((owner, run.id), (other, run.id)) as following:
            await until(lambda: min(map(last_seq, following)) >= 1)
            await all_may_reap(server)
            await replace_record(server, bad[0])
            for run_id, fields in zip(bad[1:], (("cancel_reason", NO_TEXT),) * 2 + (("seq", "many"),), strict=True):
                await server.command("HSET", record_of(run_id), "cancelled", "token", *fields)
            await server.command("ZADD", KEYS.live(), "1", NO_TEXT)
            await log.start(record("dead"), Lease("nobody", "epoch", 0.01))
            end = float(await server.command("HGET", record_of(quiet.id), "lease_end"))

            async def renewed_for_three_leases() -> bool:
                return float(await server.command("HGET", record_of(quiet.id), "lease_end")) >= end + 2_700

            await until_it_is(renewed_for_three_leases, wanted=True)
            await until_it_is(lambda: server.command("HGET", record_of("dead"), "status"), "lost")
            live = await server.command("ZRANGE", KEYS.live(), 0, -1)
            assert not {"dead", NO_TEXT.decode(errors="surrogateescape")} & {*live}
            assert not silent.left
            await other.cancel(run.id)
        assert (await same_everywhere(server, run.id, following))["status"] == "cancelled"


@pytest.mark.parametrize("spoil", [replace_record, unknown_status, odd_number])
async def test_the_list_passes_over_what_cannot_be_read(server: Endpoint, spoil: Any) -> None:
    async with redis_log(server.url) as log:
        for number in range(5):
            await log.start(record(f"r{number}", created_at=time.time() + number), LEASE)
        await spoil(server, "r2")
        await server.command("ZADD", KEYS.runs(), time.time() + 2.5, NO_TEXT)
        assert [run.id for run in await log.list()] == ["r4", "r3", "r1", "r0"]
        assert [run.id for run in await log.list(limit=3, status=RunStatus.RUNNING)] == ["r4", "r3", "r1"]


# Starts under a key


@pytest.mark.usefixtures("brisk")
@pytest.mark.parametrize(
    "command, same", [("EVALSHA", False), ("HDEL", True)], ids=["of its record, by another", "of what makes it known"]
)
async def test_a_start_whose_reply_is_lost_and_that_cannot_be_taken_back_is_done_by_whoever_repeats_it(
    server: Endpoint, between: Proxy, command: str, *, same: bool
) -> None:
    async with supervisors(between.url, server.url, lease=1.5) as (one, other):
        await one.wait((await one.start(says_hello)).id)  # there are connections, and the server knows the scripts

        def cut_off(reply: Reply) -> bool:
            if reply.command != command or (command == "EVALSHA" and reply.arguments[0] != START):
                return False
            between.refuse()
            return True

        between.drop_reply_when(cut_off, times=1)
        with suppress(LogUnavailable):
            await one.start_once(says_hello, idempotency_key="key")
        assert between.lost == 1
        await between.accept()
        started = await _start_at_last(one if same else other)
        assert started.created or command == "HDEL"  # then it may have been known, but must be somebody's
        assert (await other.wait(started.run.id)).status is RunStatus.COMPLETED
        assert not (await other.start_once(says_hello, idempotency_key="key")).created


async def _start_at_last(supervisor: Supervisor) -> Started:
    with trio.fail_after(10):
        while True:
            try:
                return await supervisor.start_once(says_hello, idempotency_key="key")
            except LogUnavailable:
                await trio.lowlevel.checkpoint()


@pytest.mark.usefixtures("brisk")
async def test_a_start_that_is_held_up_takes_no_run_from_its_repetition(server: Endpoint, between: Proxy) -> None:
    late: list[Started | PenstockError] = []
    async with supervisors(between.url, server.url, lease=3) as (one, other), trio.open_nursery() as nursery:
        await one.wait((await one.start(says_hello)).id)
        witness, held_up = Witness(), trio.Event()

        def hold_up(reply: Reply) -> bool:
            if reply.arguments[:1] != (START,):
                return False
            between.stall()
            held_up.set()
            return True

        async def start() -> None:
            try:
                late.append(await one.start_once(witness.waits, idempotency_key="key"))
            except PenstockError as error:
                late.append(error)

        between.drop_reply_when(hold_up, times=1)
        nursery.start_soon(start)
        await held_up.wait()
        started = await other.start_once(witness.waits, idempotency_key="key")
        assert started.created
        async with readers((other, started.run.id)) as (reader,):
            await until(lambda: last_seq(reader) == 1)
            between.go_on()
            await until(lambda: late)
            (answer,) = late
            if isinstance(answer, Started):
                assert (answer.created, answer.run.id) == (False, started.run.id)
            else:
                assert isinstance(answer, LogUnavailable)
            assert (await other.get(started.run.id)).status is RunStatus.RUNNING
            await other.cancel(started.run.id)
        assert reader.error is None
        assert (await whole(server, started.run.id))["status"] == "cancelled"


@pytest.mark.usefixtures("brisk")
@pytest.mark.parametrize("known", [False, True], ids=["before it is known", "when it is known"])
async def test_a_cancelled_start_takes_no_run_from_another(server: Endpoint, between: Proxy, *, known: bool) -> None:
    answers: list[Started] = []
    async with supervisors(between.url, server.url) as (one, other), trio.open_nursery() as nursery:
        await one.wait((await one.start(says_hello)).id)
        between.delay(0.4)
        scope = trio.CancelScope()

        async def give_up() -> None:
            with scope:
                await one.start_once(says_hello, run_id="run", idempotency_key="key")

        async def start() -> None:
            answers.append(await other.start_once(says_hello, run_id="run", idempotency_key="key"))

        async def pending() -> bool | None:
            fields = await server.command("HMGET", record_of("run"), "epoch", "pending")
            return None if fields[0] is None else fields[1] is not None

        nursery.start_soon(give_up)
        await until_it_is(pending, not known)  # its reply is on the way
        nursery.start_soon(start)
        if known:
            await until(lambda: answers)
        scope.cancel()
        await until(lambda: answers)
        between.delay(0)
        assert (await other.wait(answers[0].run.id)).status is RunStatus.COMPLETED


async def test_of_two_requests_under_one_key_at_once_one_is_a_run_and_one_a_conflict(server: Endpoint) -> None:
    async def says_another_thing() -> AsyncIterator[Event]:
        yield Event(data="another thing")

    async with supervisors(server.url, server.url) as (one, other):
        for number in range(8):
            created: list[str] = []
            refused: list[str | None] = []

            async def start(
                supervisor: Supervisor,
                producer: Any,
                key: str = f"key {number}",
                created: list[str] = created,
                refused: list[str | None] = refused,
            ) -> None:
                try:
                    started = await supervisor.start_once(producer, idempotency_key=key)
                except IdempotencyConflict as conflict:
                    refused.append(conflict.run_id)
                else:
                    assert started.created
                    created.append(started.run.id)

            async with trio.open_nursery() as nursery:
                nursery.start_soon(start, one, says_hello)
                nursery.start_soon(start, other, says_another_thing)
            assert (len(created), refused) == (1, created)


@pytest.mark.parametrize("renewed", [False, True])
async def test_the_keys_of_runs_that_were_given_up_are_forgotten_in_time(
    server: Endpoint, monkeypatch: pytest.MonkeyPatch, *, renewed: bool
) -> None:
    monkeypatch.setattr("penstock.log.redis.start.PURGE_INTERVAL", 0.05)
    async with redis_log(server.url, ttl=0.1) as log:
        known = log._idempotency_keys._kept
        await log.start(record("kept"), LEASE, Idempotency("kept", "request"))
        await log.start(record("short"), Lease("owner", "epoch", 0.1), Idempotency("short", "request"))  # for 0.4 s
        began, number = trio.current_time(), 0
        while trio.current_time() < began + (1.0 if renewed else 10.0) and "short" in known:
            if renewed:
                assert await log.renew("owner", {"short": "epoch"}, 0.1) == {"short": AppendStatus.OK}
            await log.start(record(f"r{number}"), Lease("owner", "epoch", 0.1), Idempotency(f"key {number}", "request"))
            number += 1
        assert ("short" in known) is renewed
        assert "kept" in known


def set_forward(log: EventLog, seconds: float) -> None:
    assert isinstance(log, RedisLog)
    redis, here = log._reaper._clocks[""]
    log._reaper._clocks[""] = (b"%d" % (int(redis) - round(1000 * seconds)), here)


async def test_after_a_clock_was_set_forward_nobody_is_reaped_for_a_lease(server: Endpoint) -> None:
    lease, notes = 0.6, Notes()
    async with redis_log(server.url) as log, supervisors(server.url, lease=lease, observer=notes) as (supervisor,):
        await all_may_reap(server, 1)
        set_forward(supervisor.log, 30)
        await log.start(record(), Lease("nobody", "epoch", 0.001))
        await until(lambda: any("clock" in warning for warning in notes.warnings))
        found = trio.current_time()
        await until_it_is(lambda: server.command("HGET", record_of("r"), "status"), "lost")
        assert trio.current_time() - found >= lease
        assert notes.errors == []


async def test_the_list_repeats_no_run_while_others_start(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.log.redis.log.LIST_PAGE", 5)
    async with redis_log(server.url) as one, redis_log(server.url) as other, trio.open_nursery() as nursery:
        started = 0

        async def start() -> None:
            nonlocal started
            while True:
                await one.start(record(f"r{started}", created_at=time.time()), LEASE)
                started += 1

        nursery.start_soon(start)
        await until(lambda: started >= 60)
        for _ in range(10):
            before = started
            ids = [run.id for run in await other.list(limit=40)]
            assert len(ids) == len(set(ids)) == 40
            assert {f"r{number}" for number in range(before - 20, before - 5)} <= {*ids}
        nursery.cancel_scope.cancel()


async def test_a_run_whose_record_is_missing_stays_on_the_list_while_it_is_young(server: Endpoint) -> None:
    async with redis_log(server.url) as log:
        young = await log.start(record("young", created_at=time.time()), LEASE)
        for run_id, created_at in (("old", time.time() - 120), ("there", time.time() - 240)):
            await log.start(record(run_id, created_at=created_at), LEASE)
        for run_id in ("young", "old"):
            await server.command("DEL", record_of(run_id))
        assert [run.id for run in await log.list()] == ["there"]
        assert await server.command("ZRANGE", KEYS.runs(), 0, -1) == ["there", "young"]
        await log.start(young.run, LEASE)
        assert [run.id for run in await log.list()] == ["young", "there"]


async def test_a_cancel_without_wake_up_is_delivered_however_short_the_ttl(server: Endpoint, between: Proxy) -> None:
    witness = Witness()
    async with supervisors(between.url, server.url, limits={"ttl": 0.1}, cancel_check_interval=1.0) as (owner, other):
        run = await owner.start(witness.waits)
        async with readers((owner, run.id)) as (reader,):
            await until(lambda: last_seq(reader) == 1)
            between.drop_messages = True
            await other.cancel(run.id, "enough")
            await until(lambda: witness.left, 5)  # long before the next renewal would tell
            await until(lambda: reader.ended_at)
        assert between.swallowed >= 1
        assert reader.error is None
        assert witness.saw is not None
        assert "enough" in witness.saw
