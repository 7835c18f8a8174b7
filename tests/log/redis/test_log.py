"""What RedisLog does beyond what every event log promises."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock.errors import ConfigurationError, IdempotencyConflict, LogUnavailable, RunExists, RunNotFound
from penstock.log import Appended, AppendStatus, CancelStatus, Idempotency, Lease, Notification, Started
from penstock.log.open import open_log
from penstock.log.redis import scripts
from penstock.log.redis.log import RedisLog
from penstock.log.redis.schema import Keys
from penstock.log.redis.slots import call
from penstock.runs import Ending, RunError, RunStatus
from tests.support.clustered import CLUSTER, in_order, on_a_cluster, shares_a_cluster
from tests.support.following import cancelling_at
from tests.support.logs import CANCELLED, COMPLETED, FAILED, LEASE, LOST_ENDING, batch, record, seqs
from tests.support.proxy import Reply, proxy
from tests.support.redis_servers import Endpoint, let_pass, redis_server

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable
    from pathlib import Path

    from penstock.log import EventLog

KEYS = Keys()
STREAM, RECORD = KEYS.stream("r"), KEYS.record("r")
KEY = Idempotency("key", "request")
SECRET = "open-sesame"  # noqa: S105  (it opens nothing)


@pytest.fixture
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.log.redis.start.PENDING_LIMIT", 0.1)


async def is_gone(log: EventLog, run_id: str = "r") -> bool:
    try:
        await log.get(run_id)
    except RunNotFound:
        return True
    return False


# --- starting under a key -------------------------------------------------------------------------------------------


async def test_a_key_is_taken_before_its_run_is_started(server: Endpoint) -> None:
    seen: list[str] = []

    def note(reply: Reply) -> bool:
        starts = reply.arguments[:1] == (scripts.START.digest.encode(),) and not reply.is_error
        seen.append("START" if starts else reply.command)
        return False

    async with proxy(server.port) as between, open_log(between.url) as log:
        between.drop_reply_when(note)
        assert (await log.start(record(), LEASE, KEY)).created
    assert seen.index("SET") < seen.index("START")


@pytest.mark.usefixtures("_soon")
@on_a_cluster
async def test_a_key_whose_start_broke_off_keeps_its_first_id_and_is_free_for_another_request(log: RedisLog) -> None:
    for key in ("key", "other"):
        await log._backend.ask("SET", KEYS.idempotency(key), json.dumps(["request", "first"]))
    started = await log.start(record("second"), LEASE, KEY)
    assert (started.created, started.run.id) == (True, "first")
    assert await is_gone(log, "second")
    assert await log.start(record("third"), LEASE, KEY) == Started(started.run, created=False)
    started = await log.start(record("fourth"), LEASE, Idempotency("other", "other request"))
    assert (started.created, started.run.id) == (True, "fourth")
    with pytest.raises(IdempotencyConflict) as caught:
        await log.start(record("fifth"), LEASE, Idempotency("other", "request"))
    assert caught.value.run_id == "fourth"


@on_a_cluster
async def test_starts_under_one_key_at_the_same_time_are_one_run(server: Endpoint) -> None:
    started: list[Started] = []
    async with open_log(server.url) as one, open_log(server.url) as other, trio.open_nursery() as nursery:

        async def start(number: int) -> None:
            lease = Lease("owner", f"epoch {number}", 30.0)
            started.append(await (one, other)[number % 2].start(record(f"r{number}"), lease, KEY))

        for number in range(20):
            nursery.start_soon(start, number)
    assert sorted(each.created for each in started) == [False] * 19 + [True]
    assert len({each.run.id for each in started}) == 1


@on_a_cluster
async def test_a_key_is_kept_by_each_renewal_and_by_the_end(server: Endpoint) -> None:
    async with open_log(server.url, ttl=200) as log:
        assert isinstance(log, RedisLog)
        await in_order(log).start(record(), LEASE, KEY)
        for change in ("renew", "renew", "end"):
            await let_pass(server, 110)
            if change == "renew":
                await log.renew("owner", {"r": "epoch"}, 30.0)
            else:
                await log.append([batch(1, 1, COMPLETED)])
            assert 190_000 < await server.command("PTTL", KEYS.idempotency("key")) <= 200_000
        assert not (await log.start(record("second"), LEASE, KEY)).created
        assert log._idempotency_keys._kept == {}


@on_a_cluster
async def test_a_key_is_put_back_with_its_run(server: Endpoint, log: RedisLog) -> None:
    started = await log.start(record(), LEASE, KEY)
    server.flushall()
    await log.restore(started.run, LEASE, 1)
    again = await log.start(record("second"), LEASE, KEY)
    assert again == Started(started.run, created=False)


@pytest.mark.parametrize("by", ["append", "restore", "renew"])
@on_a_cluster
async def test_d10_no_key_is_remembered_of_a_run_that_another_ended(server: Endpoint, log: RedisLog, by: str) -> None:
    await log.start(record(), LEASE, KEY)
    await let_pass(server, 31)
    async with open_log(server.url) as other:
        await other.reap(lambda: LOST_ENDING)
    if by == "append":
        status = (await log.append([batch(1, 1, COMPLETED)]))[0].status
    elif by == "restore":
        status = (await log.restore(record(), LEASE, 1)).status
    else:
        status = (await log.renew("owner", {"r": "epoch"}, 30.0))["r"]
    assert status is AppendStatus.FENCED
    assert log._idempotency_keys._kept == {}


@on_a_cluster
async def test_a_key_that_was_used_for_a_run_id_in_use_is_free_for_a_request_for_another(log: RedisLog) -> None:
    await log.start(record("taken"), LEASE)
    for _ in range(2):
        with pytest.raises(RunExists, match="'taken' is in use"):
            await log.start(record("taken"), Lease("owner", "yours", 30.0), KEY)
    started = await log.start(record("free"), Lease("owner", "yours", 30.0), Idempotency("key", "other request"))
    assert (started.created, started.run.id) == (True, "free")


@on_a_cluster
async def test_a_key_is_refused_to_another_request_without_its_mapping(server: Endpoint, log: RedisLog) -> None:
    await log.start(record(), LEASE, KEY)
    await server.command("DEL", KEYS.idempotency("key"))
    with pytest.raises((IdempotencyConflict, RunExists)):
        await log.start(record(), Lease("owner", "yours", 30.0), Idempotency("key", "other request"))


# --- a start that is cancelled --------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_soon")
@pytest.mark.parametrize(
    "server, key, warm",
    [
        pytest.param(None, None, True, id="redis without a key"),
        pytest.param(None, KEY, False, id="redis with a key and a first connection"),
        pytest.param(CLUSTER, KEY, True, id="redis cluster with a key", marks=shares_a_cluster),
    ],
    indirect=["server"],
)
async def test_a_start_that_is_cancelled_at_any_moment_leaves_no_run_that_nobody_knows(
    server: Endpoint, key: Idempotency | None, *, warm: bool
) -> None:
    cancelled = 0
    for step in range(1_000):
        server.flushall()
        async with open_log(server.url) as log:
            assert isinstance(log, RedisLog)
            if warm:
                await log.start(record("earlier"), LEASE, None if key is None else Idempotency("other", "request"))
            started: list[Started] = []
            with trio.CancelScope() as scope:
                started.append(await cancelling_at(step, scope, log.start(record(), LEASE, key)))
            if started:
                assert await log.get("r") == started[0].run
            else:
                cancelled += 1
                assert await is_gone(log, "r")
                assert log._idempotency_keys._kept.keys() <= {"earlier"}
                again = await log.start(record(), Lease("owner", "another epoch", 30.0), key)
                assert (again.created, again.run.id) == (True, "r")
            if not scope.cancel_called:
                break
    assert cancelled > 0


async def test_a_start_that_stays_ends_with_its_lease(server: Endpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.log.redis.start.FORGET_TIMEOUT", 0.01)
    async with proxy(server.port) as between, open_log(between.url) as log:
        await log.start(record("earlier"), LEASE)
        with trio.CancelScope() as scope:

            def cut_off(reply: Reply) -> bool:
                if reply.arguments[:1] == (scripts.START.digest.encode(),):
                    between.stall()
                    scope.cancel()
                return False

            between.drop_reply_when(cut_off)
            await log.start(record(), LEASE)
        assert scope.cancelled_caught
        between.go_on()
        assert (await log.get("r")).status is RunStatus.RUNNING
        await let_pass(server, 31)
        assert sorted(await log.reap(lambda: LOST_ENDING)) == ["earlier", "r"]


async def test_a_start_whose_replies_are_all_lost_is_taken_back(server: Endpoint) -> None:
    start = scripts.START.digest.encode()
    async with proxy(server.port) as between, open_log(between.url) as log:
        await log.start(record("earlier"), LEASE)
        between.drop_reply_when(lambda reply: reply.arguments[:1] == (start,))
        with pytest.raises(LogUnavailable):
            await log.start(record(), LEASE)
        assert between.lost == 2
        with pytest.raises(RunNotFound):
            await log.get("r")
        assert [run.id for run in await log.list()] == ["earlier"]
        assert await server.command("ZRANGE", KEYS.live(), 0, -1) == ["earlier"]


# --- cancel requests ------------------------------------------------------------------------------------------------


async def cancel_without_post(log: RedisLog, words: str | None) -> None:
    """A cancel request that broke off before it reached the owner's inbox."""
    reason = ("", "") if words is None else ("1", words)
    said, _ = await log._backend.ask(*call(scripts.CANCEL, [STREAM, RECORD], "token", 10_000_000, *reason))
    assert said == b"REQUESTED"


@pytest.mark.parametrize("words", ["", None])
@on_a_cluster
async def test_a_cancel_that_is_not_in_the_inbox_comes_with_the_next_renewal(log: RedisLog, words: str | None) -> None:
    await log.start(record(), LEASE)
    await cancel_without_post(log, words)
    assert await log.cancel_requests("owner") == {}
    await log.renew("owner", {"r": "epoch"}, 30.0)
    assert await log.cancel_requests("other") == {}
    assert await log.cancel_requests("owner") == {"r": words}
    assert await log.cancel_requests("owner") == {}


@on_a_cluster
async def test_no_cancel_is_heard_of_a_run_that_is_over_or_another_owners(server: Endpoint, log: RedisLog) -> None:
    await log.start(record(), LEASE)
    await cancel_without_post(log, "why")
    await log.renew("owner", {"r": "yours"}, 30.0)
    assert await log.cancel_requests("owner") == {}
    await log.append([batch(1, 1, CANCELLED)])
    await log.renew("owner", {"r": "epoch"}, 30.0)
    assert await log.cancel_requests("owner") == {}


@pytest.mark.parametrize("words", ["", None])
@on_a_cluster
async def test_a_repeated_cancel_posts_its_record_again_and_wakes_the_owner(log: RedisLog, words: str | None) -> None:
    await log.start(record(), LEASE)
    await cancel_without_post(log, words)
    async with log.wakeups("owner") as wakeups:
        reply = await log.request_cancel("r", "once more")
        assert (reply.status, reply.run.cancel_reason) == (CancelStatus.REPEATED, words)
        with trio.fail_after(5):
            assert await wakeups.wait() == Notification({}, cancel=True)
        assert await log.cancel_requests("owner") == {"r": words}


async def test_an_inbox_survives_a_reply_that_is_lost(server: Endpoint) -> None:
    async with proxy(server.port) as between, open_log(between.url) as log:
        await log.start(record(), LEASE)
        await log.request_cancel("r", "why")
        between.drop_reply_when(lambda reply: reply.command == "HGETALL", times=4)
        for _ in range(2):
            with pytest.raises(LogUnavailable):
                await log.cancel_requests("owner")
        assert await log.cancel_requests("owner") == {"r": "why"}
        assert await log.cancel_requests("owner") == {}
        assert await server.command("EXISTS", KEYS.inbox("owner")) == 0


@on_a_cluster
async def test_an_inbox_survives_a_poll_that_is_cancelled_at_any_moment(server: Endpoint, log: RedisLog) -> None:
    await log.start(record(), LEASE)
    await log.request_cancel("r", "why")
    for step in range(1_000):
        taken: list[dict[str, str | None]] = []
        with trio.CancelScope() as scope:
            taken.append(dict(await cancelling_at(step, scope, log.cancel_requests("owner"))))
        if taken:
            assert taken == [{"r": "why"}]
            break
        assert await server.command("HLEN", KEYS.inbox("owner")) == 1
    assert step > 0


async def test_a_request_that_was_taken_is_not_taken_again_because_a_poll_has_failed(server: Endpoint) -> None:
    async with proxy(server.port) as between, open_log(between.url) as log:
        await log.start(record(), LEASE)
        await log.request_cancel("r", "why")
        assert await log.cancel_requests("owner") == {"r": "why"}
        between.refuse()
        with pytest.raises(LogUnavailable):
            await log.cancel_requests("owner")
        await between.accept()
        assert await log.cancel_requests("owner") == {}


@pytest.mark.parametrize("dead", [3, 10])
@on_a_cluster
async def test_all_that_are_dead_are_reaped_however_many_there_are(
    server: Endpoint, log: RedisLog, monkeypatch: pytest.MonkeyPatch, dead: int
) -> None:
    monkeypatch.setattr("penstock.log.redis.reap.REAPED_AT_ONCE", 3)
    for number in range(dead):
        await log.start(record(f"r{number}"), LEASE)
    await let_pass(server, 31)
    await log.start(record("alive"), LEASE)
    assert sorted(await log.reap(lambda: LOST_ENDING)) == sorted(f"r{number}" for number in range(dead))
    assert await log.reap(lambda: LOST_ENDING) == []
    assert await listed(server, all_live(log)) == ["alive"]


@on_a_cluster
async def test_a_run_that_cannot_be_reaped_keeps_no_other_from_being_reaped(server: Endpoint, log: RedisLog) -> None:
    for run_id in ("a", "bad", "z"):
        await log.start(record(run_id), LEASE)
    await server.command("SET", KEYS.stream("bad"), "not a stream")
    await let_pass(server, 31)
    assert sorted(await log.reap(lambda: LOST_ENDING)) == ["a", "z"]
    assert await listed(server, all_live(log)) in (["bad"], [])


def all_live(log: RedisLog) -> list[str]:
    return [KEYS.live(number) for number in log._indexes._numbers]


async def listed(server: Endpoint, lists: list[str]) -> list[str]:
    return [each for key in lists for each in await server.command("ZRANGE", key, 0, -1)]


# --- list -----------------------------------------------------------------------------------------------------------


async def test_the_list_keeps_the_newest_runs(server: Endpoint, log: RedisLog, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.log.redis.start.LISTED_RUNS", 5)
    for number in (3, 9, 1, 8, 2, 7, 4, 6, 5):
        await log.start(record(f"r{number}", created_at=float(number)), LEASE)
    assert [run.id for run in await log.list()] == ["r9", "r8", "r7", "r6", "r5"]
    assert await server.command("ZCARD", KEYS.runs()) == 5
    assert (await log.get("r1")).id == "r1"


@on_a_cluster
async def test_a_run_whose_id_was_that_of_an_older_one_is_listed_as_new(server: Endpoint, log: RedisLog) -> None:
    for run_id, created_at in (("r", 1.0), ("s", 2.0)):
        await log.start(record(run_id, created_at=created_at), LEASE)
    await server.command("DEL", RECORD)
    await log.start(record("r", created_at=3.0), LEASE)
    assert [run.id for run in await log.list()] == ["r", "s"]


@pytest.mark.parametrize("limit", [2, 3, 50])
@on_a_cluster
async def test_the_list_is_looked_up_in_pages_without_a_seam(
    server: Endpoint, log: RedisLog, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    monkeypatch.setattr("penstock.log.redis.log.LIST_PAGE", 3)
    for number in range(10):
        await log.start(record(f"r{number}", created_at=float(number)), LEASE)
    for number in (1, 4, 5, 8):
        await log.append([batch(1, 1, COMPLETED, run_id=f"r{number}")])
    for number in (6, 8):
        await server.command("DEL", KEYS.record(f"r{number}"))
    assert [run.id for run in await log.list(limit=limit)] == ["r9", "r7", "r5", "r4", "r3", "r2", "r1", "r0"][:limit]
    ended = await log.list(limit=limit, status=RunStatus.COMPLETED)
    assert [run.id for run in ended] == ["r5", "r4", "r1"][:limit]


# --- prefix ---------------------------------------------------------------------------------------------------------


@on_a_cluster
async def test_two_prefixes_on_one_server_know_nothing_of_each_other(server: Endpoint) -> None:
    async with open_log(server.url, prefix="a:run:") as a, open_log(server.url, prefix="b:run:") as b:
        assert (await a.start(record(), LEASE, KEY)).created
        assert await is_gone(b)
        assert (await b.start(record(created_at=6.0), LEASE, Idempotency("key", "other request"))).created
        await a.append([batch(1, 3)])
        assert seqs((await b.read("r", 0)).entries) == []
        async with b.wakeups("owner") as wakeups:
            await wakeups.subscribe("r")
            await a.append([batch(4, 4)])
            await a.request_cancel("r", "why")
            assert await b.cancel_requests("owner") == {}
            await b.append([batch(1, 1)])
            with trio.fail_after(5):
                assert await wakeups.wait() == Notification({"r": 1})
        assert await a.cancel_requests("owner") == {"r": "why"}
        await a.append([batch(5, 5, CANCELLED)])
        assert [run.created_at for run in await a.list()] == [5.0]
        assert [run.created_at for run in await b.list()] == [6.0]
        await let_pass(server, 31)
        assert await a.reap(lambda: LOST_ENDING) == []
        assert await b.reap(lambda: LOST_ENDING) == ["r"]
    keys: list[str] = await server.command("KEYS", "*")
    assert {key.lstrip("{")[:2] for key in keys} == {"a:", "b:"}


async def test_a_prefix_may_be_as_short_as_can_be(server: Endpoint) -> None:
    async with open_log(server.url, prefix="run:") as log:
        await log.start(record(), LEASE, KEY)
        await log.append([batch(1, 1, COMPLETED)])
    assert set(await server.command("KEYS", "*")) == {"run:r", "{run:r}:meta", "runs", "idem:key"}


@pytest.mark.parametrize("prefix", ["", "sse:", "sse:run", "{sse}:run:", "sse}run:", "sse:run:x"])
async def test_a_prefix_that_is_none_is_refused(prefix: str) -> None:
    with pytest.raises(ConfigurationError, match="prefix ends with 'run:'"):
        async with open_log("redis://localhost", prefix=prefix):
            pytest.fail("it is refused")


@pytest.mark.parametrize(
    "name, value",
    [
        *[("ttl", value) for value in (0, -1, float("nan"), float("inf"), True, "10")],
        *[("max_entries", value) for value in (0, 1.5, True)],
        ("prefix", None),
    ],
)
async def test_a_limit_that_is_none_is_refused(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=name):
        async with open_log("redis://localhost", **{name: value}):
            pytest.fail("it is refused")


# --- what is kept ---------------------------------------------------------------------------------------------------


async def test_pages_of_entries_of_a_mebibyte_hold_one_each(log: RedisLog) -> None:
    size = 1024 * 1024
    await log.start(record(), LEASE)
    for seq in range(1, 6):
        assert await log.append([batch(seq, seq, size=size)]) == [Appended(AppendStatus.OK, seq)]
    for after in range(5):
        page = await log.read("r", after)
        assert [(each.seq, len(each.wire)) for each in page.entries] == [(after + 1, size)]
    assert seqs((await log.read("r", 1, max_bytes=3 * size)).entries) == [2, 3, 4]
    pages = await log.fetch({"r": 2})
    assert pages["r"] is not None
    assert seqs(pages["r"].entries) == [3]


@pytest.mark.parametrize(
    "words", ["", 'a\x00b\N{SNOWMAN}\U0001f6b0\r\n" ', "x" * 100_000], ids=["empty", "odd", "long"]
)
async def test_the_words_of_a_cancel_are_kept_wherever_they_go(log: RedisLog, words: str) -> None:
    await log.start(record(), LEASE)
    reply = await log.request_cancel("r", words)
    assert reply.run.cancel_reason == words
    assert await log.cancel_requests("owner") == {"r": words}
    await log.renew("owner", {"r": "epoch"}, 30.0)
    assert await log.cancel_requests("owner") == {"r": words}
    (appended,) = await log.append([batch(1, 1)])
    assert (appended.cancelled, appended.cancel) == (True, words)
    assert (await log.get("r")).cancel_reason == words
    await log.append([batch(2, 2, replace(CANCELLED, cancel_reason=words))])
    assert (await log.get("r")).cancel_reason == words


@pytest.mark.parametrize("metadata", [{}, {"": "", "\x00": ["\N{SNOWMAN}", None, 1.5, {"a": []}], "half": "\ud800"}])
async def test_the_rest_of_a_record_is_kept_as_it_is(log: RedisLog, metadata: dict[str, Any]) -> None:
    run = replace(record(), producer="\N{SNOWMAN}\x00", metadata=metadata, created_at=1234567890.123456)
    started = await log.start(run, LEASE)
    assert started.run == replace(run, started_at=started.run.started_at)
    ending = Ending(RunStatus.FAILED, "\N{SNOWMAN} stop", RunError("\x00", "\N{SNOWMAN}\n", ""))
    await log.append([batch(1, 1, ending)])
    ended = await log.get("r")
    assert ended.ended_at is not None
    assert ended == started.run.ended(ending, seq=1, at=ended.ended_at)
    assert [ended] == await log.list()


async def test_times_are_those_of_redis_and_follow_each_other(server: Endpoint, log: RedisLog) -> None:
    before = await now(server)
    started = (await log.start(record(), LEASE)).run.started_at
    await log.append([batch(1, 1, FAILED)])
    ended = (await log.get("r")).ended_at
    assert ended is not None
    assert before <= started <= ended <= await now(server)


async def now(server: Endpoint) -> float:
    seconds, micros = await server.command("TIME")
    return float(f"{seconds}.{micros:06d}")


def each_operation(log: RedisLog) -> list[Callable[[], Awaitable[Any]]]:
    return [
        lambda: log.start(record(), LEASE),
        lambda: log.start(record(), LEASE, KEY),
        lambda: log.append([batch(1, 1)]),
        lambda: log.append([batch(1, 1), batch(1, 1, run_id="other")]),
        lambda: log.read("r", 0),
        lambda: log.fetch({"r": 0, "other": 0}),
        lambda: log.get("r"),
        log.list,
        lambda: log.request_cancel("r", "why"),
        lambda: log.cancel_requests("owner"),
        lambda: log.renew("owner", {"r": "epoch"}, 30.0),
        lambda: log.restore(record(), LEASE, 1),
        lambda: log.reap(lambda: LOST_ENDING),
        log.check,
        lambda: enter_wakeups(log),
    ]


async def enter_wakeups(log: RedisLog) -> None:
    async with log.wakeups("owner"):
        pytest.fail("it cannot be reached")


@pytest.mark.parametrize(
    "password, words",
    [(f":{SECRET}@", "refuses the user or the password"), ("", "wants a password; name it in the URL")],
    ids=["wrong", "none"],
)
async def test_without_the_right_password_every_operation_says_so_without_it(password: str, words: str) -> None:
    async with redis_server(requirepass="another") as server:
        async with open_log(f"redis://{password}127.0.0.1:{server.port}") as log:
            assert isinstance(log, RedisLog)
            for operation in each_operation(log):
                with pytest.raises(LogUnavailable, match=words) as caught:
                    await operation()
                assert SECRET not in str(caught.value)
                assert "another" not in str(caught.value)
        async with open_log(server.url) as log:
            await log.check()


async def test_where_nobody_listens_every_operation_says_so() -> None:
    async with redis_server() as server:
        url, port = server.url, server.port
    async with open_log(url) as log:
        assert isinstance(log, RedisLog)
        for operation in each_operation(log):
            with pytest.raises(LogUnavailable, match=f"cannot reach Redis at 127.0.0.1:{port}"):
                await operation()


# --- URLs -----------------------------------------------------------------------------------------------------------


async def test_a_database_can_be_named_in_the_url(server: Endpoint) -> None:
    async with open_log(f"{server.url}/3") as third, open_log(f"{server.url}/0") as first, open_log(server.url) as same:
        await third.start(record(), LEASE)
        await third.append([batch(1, 2, COMPLETED)])
        assert await server.command("DBSIZE") == 0
        assert seqs((await third.read("r", 0)).entries) == [1, 2]
        for log in (first, same):
            with pytest.raises(RunNotFound):
                await log.get("r")


async def test_a_unix_socket_can_be_named_in_the_url(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    async with redis_server(unixsocket=str(path), requirepass=SECRET) as server:
        async with open_log(f"{server.unix_url}?db=2") as log, log.wakeups("owner") as wakeups:
            await log.start(record(), LEASE)
            await wakeups.subscribe("r")
            await log.append([batch(1, 2)])
            with trio.fail_after(5):
                assert await wakeups.wait() == Notification({"r": 2})
            assert await server.command("DBSIZE") == 0
            assert seqs((await log.read("r", 0)).entries) == [1, 2]
        async with open_log(f"unix://{path}") as log:
            with pytest.raises(LogUnavailable, match="wants a password") as caught:
                await log.check()
            assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "url",
    [
        f"redis://:{SECRET}@127.0.0.1:port",
        f"redis://:{SECRET}@127.0.0.1:99999999",
        f"redis://:{SECRET}@127.0.0.1?db=x",
        f"rediss://:{SECRET}@127.0.0.1?ssl_cert_reqs=perhaps",
        f"http://:{SECRET}@127.0.0.1",
        f"memory://:{SECRET}@",
        f"{SECRET}@127.0.0.1",
        f":{SECRET}@127.0.0.1",
        "",
        None,
        3,
    ],
)
async def test_what_is_no_url_of_a_log_is_refused_without_its_password(url: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        async with open_log(url):
            pytest.fail("it is refused")
    assert SECRET not in str(caught.value)
    assert "redis://" in str(caught.value)
