"""What each script says of itself in its opening comment, on every version of Redis there is."""

from __future__ import annotations

import re
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest

from penstock.errors import LogFull, RunNotFound
from penstock.log import Appended, AppendStatus, Batch, CancelStatus, Idempotency, Lease
from penstock.log.open import open_log
from penstock.log.redis import scripts
from penstock.log.redis.log import RedisLog
from penstock.log.redis.schema import Keys
from penstock.log.redis.slots import call
from penstock.runs import RunStatus
from tests.support.clustered import CLUSTER, clustered, everywhere, in_order
from tests.support.logs import CANCELLED, COMPLETED, DONE, FAILED, LEASE, LOST_ENDING, batch, entries, record, seqs
from tests.support.proxy import proxy
from tests.support.redis_servers import Endpoint, RedisServer, let_pass, redis_server, redis_servers, shared_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from penstock.runs import Ending

VERSIONS = list(redis_servers())
KEYS = Keys()
STREAM, RECORD = KEYS.stream("r"), KEYS.record("r")
TTL = 100.0
"""Less than four leases."""


@pytest.fixture(params=VERSIONS)
def server(request: pytest.FixtureRequest) -> Endpoint:
    server = clustered() if request.param == CLUSTER else shared_server(request.param)
    server.flushall()
    return server


@asynccontextmanager
async def redis_log(url: str, **limits: Any) -> AsyncIterator[RedisLog]:
    async with open_log(url, **({"ttl": TTL} | limits)) as log:
        assert isinstance(log, RedisLog)
        yield in_order(log)


@pytest.fixture
async def log(server: Endpoint) -> AsyncIterator[RedisLog]:
    async with redis_log(server.url) as log:
        yield log


async def append(log: RedisLog, first: int, last: int, ending: Ending | None = None, **how: Any) -> Appended:
    (reply,) = await log.append([batch(first, last, ending, **how)])
    return reply


async def stored(log: RedisLog, after: int = 0) -> list[int]:
    return seqs((await log.read("r", after)).entries)


async def contents(server: Endpoint, run_id: str = "r") -> tuple[dict[str, str], list[tuple[str, dict[str, str]]]]:
    stream = KEYS.stream(run_id)
    return await server.command("HGETALL", KEYS.record(run_id)), await server.command("XRANGE", stream, "-", "+")


async def lives(server: Endpoint, run_id: str = "r") -> tuple[float, float]:
    keys = KEYS.stream(run_id), KEYS.record(run_id)
    stream, entry = [await server.command("PTTL", key) for key in keys]
    return stream / 1000, entry / 1000


def about(seconds: float) -> Any:
    """So many seconds, or as many less as a test may take."""
    return pytest.approx(seconds - 5, abs=5)


async def running(log: RedisLog, last: int = 0) -> None:
    await log.start(record(), LEASE)
    if last:
        assert (await append(log, 1, last)).status is AppendStatus.OK


async def nothing(log: RedisLog) -> None:
    """No run at all."""


async def no_record(log: RedisLog) -> None:
    await running(log, 3)
    await log._backend.ask("DEL", RECORD)


async def three(log: RedisLog) -> None:
    await running(log, 3)


async def three_and_a_cancel(log: RedisLog) -> None:
    await running(log, 3)
    await log.request_cancel("r", "stop")


async def ended(log: RedisLog) -> None:
    await running(log, 2)
    await append(log, 3, 3, COMPLETED)


async def cancelled(log: RedisLog) -> None:
    await three_and_a_cancel(log)
    await append(log, 4, 4, CANCELLED)


OK, GONE, FENCED, ENDED = AppendStatus.OK, AppendStatus.GONE, AppendStatus.FENCED, AppendStatus.ENDED
HOLE, REFUSED_AS_CANCELLED = AppendStatus.HOLE, AppendStatus.CANCELLED
YOURS = {"epoch": "yours"}


@pytest.mark.parametrize(
    "given, what, status",
    [
        pytest.param(nothing, batch(1, 1), GONE, id="no run"),
        pytest.param(nothing, batch(9, 9, COMPLETED, epoch="yours"), GONE, id="no run, whatever else is wrong"),
        pytest.param(no_record, batch(4, 4), GONE, id="no record, but the stream"),
        pytest.param(three, batch(4, 4, epoch="yours"), FENCED, id="another epoch"),
        pytest.param(three, batch(1, 3, epoch="yours"), FENCED, id="another epoch, all there"),
        pytest.param(three, batch(9, 9, epoch="yours"), FENCED, id="another epoch, a hole"),
        pytest.param(ended, batch(3, 3, COMPLETED, epoch="yours"), FENCED, id="another epoch, ended, all there"),
        pytest.param(three_and_a_cancel, batch(4, 4, COMPLETED, epoch="yours"), FENCED, id="another epoch, a cancel"),
        pytest.param(ended, batch(3, 3, COMPLETED), OK, id="ended, all there"),
        pytest.param(ended, batch(1, 2), OK, id="ended, all there long since"),
        pytest.param(ended, batch(3, 4), ENDED, id="ended, not all there"),
        pytest.param(ended, batch(9, 9), ENDED, id="ended, a hole"),
        pytest.param(cancelled, batch(4, 4, COMPLETED), OK, id="ended, all there, a cancel"),
        pytest.param(cancelled, batch(4, 5, COMPLETED), ENDED, id="ended, not all there, a cancel"),
        pytest.param(three, batch(5, 5), HOLE, id="a hole"),
        pytest.param(three_and_a_cancel, batch(5, 5, COMPLETED), HOLE, id="a hole, a cancel"),
        pytest.param(three_and_a_cancel, batch(4, 4, COMPLETED), REFUSED_AS_CANCELLED, id="a cancel"),
        pytest.param(three_and_a_cancel, batch(2, 4, COMPLETED), REFUSED_AS_CANCELLED, id="a cancel, an overlap"),
    ],
)
async def test_of_all_that_is_wrong_the_first_is_said_and_nothing_changes(
    server: Endpoint, log: RedisLog, given: Callable[[RedisLog], Any], what: Batch, status: AppendStatus
) -> None:
    await given(log)
    for key in (STREAM, RECORD):
        await server.command("PEXPIRE", key, 50_000)
    before = await contents(server)
    for _ in range(2):
        assert [reply.status for reply in await log.append([what])] == [status]
    assert await contents(server) == before
    assert all(life <= 50 for life in await lives(server))


# --- what the predecessor's readers understand ----------------------------------------------------------------------


async def test_entries_are_written_as_the_predecessors_readers_understand_them(server: Endpoint, log: RedisLog) -> None:
    await running(log, 2)
    await append(log, 3, 3, COMPLETED)
    found = await server.command("XRANGE", "sse:run:r", "-", "+")
    assert [(entry_id, list(fields.items())) for entry_id, fields in found] == [
        ("1-0", [("seq_id", "1"), ("data", "data: entry 1\n\n"), ("timestamp", "1001")]),
        ("2-0", [("seq_id", "2"), ("data", "data: entry 2\n\n"), ("timestamp", "1002")]),
        ("3-0", [("seq_id", "3"), ("data", "data: entry 3\n\n"), ("timestamp", "1003"), ("complete", "true")]),
    ]


async def test_an_obituary_is_written_in_the_same_way(server: Endpoint, log: RedisLog) -> None:
    await running(log, 1)
    await let_pass(server, 31)
    assert await log.reap(lambda: LOST_ENDING) == ["r"]
    _, last, terminal = await server.command("XRANGE", "sse:run:r", "-", "+")
    assert (last[0], list(last[1])) == ("2-0", ["seq_id", "data", "timestamp"])
    assert (terminal[0], list(terminal[1])) == ("3-0", ["seq_id", "data", "timestamp", "complete"])
    assert (terminal[1]["seq_id"], terminal[1]["data"], terminal[1]["complete"]) == ("3", DONE.decode(), "true")
    assert int(terminal[1]["timestamp"]) == pytest.approx(time.time() * 1000, abs=60_000)


async def test_large_seqs_are_written_as_whole_numbers(server: Endpoint, log: RedisLog) -> None:
    start = 10**15
    await log.start(record(), LEASE)
    await log.restore(record(), LEASE, start)
    assert await append(log, start, start + 1) == Appended(OK, start + 1)
    found = await server.command("XRANGE", STREAM, "-", "+")
    assert [(entry_id, fields["seq_id"]) for entry_id, fields in found] == [
        (f"{seq}-0", str(seq)) for seq in (start, start + 1)
    ]
    assert await stored(log, start) == [start + 1]


async def test_a_stream_is_trimmed_by_whole_nodes_and_never_below_its_limit(server: Endpoint) -> None:
    async with redis_log(server.url, max_entries=150) as log:
        await log.start(record(), LEASE)
        length = 0
        for first in range(1, 1000, 50):
            await append(log, first, first + 49)
            length = await server.command("XLEN", STREAM)
            assert min(150, first + 49) <= length < 150 + 100
        page = await log.read("r", 0)
        assert page.oldest_seq == 1000 - length + 1
        assert seqs(page.entries) == list(range(page.oldest_seq, 1001))


# --- a stream, or a record, that is lost ----------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [None, FAILED], ids=["going on", "ending"])
@everywhere
async def test_a_vanished_stream_is_a_hole_and_is_restored(
    server: Endpoint, log: RedisLog, ending: Ending | None
) -> None:
    await running(log, 5)
    await server.command("DEL", STREAM)
    assert await append(log, 6, 7, ending) == Appended(HOLE, 0)
    assert await server.command("EXISTS", STREAM) == 0
    assert (await log.get("r")).status is RunStatus.RUNNING
    assert await log.restore(record(), LEASE, 1) == Appended(OK, 0)
    assert await append(log, 1, 7, ending) == Appended(OK, 7)
    assert await stored(log) == [1, 2, 3, 4, 5, 6, 7]


async def test_after_a_restore_that_begins_later_the_owner_goes_on_from_there(server: Endpoint, log: RedisLog) -> None:
    await running(log, 5)
    await server.command("DEL", STREAM)
    assert (await append(log, 6, 7)).status is HOLE
    assert await log.restore(record(), LEASE, 4) == Appended(HOLE, 3)
    assert await append(log, 4, 7) == Appended(OK, 7)
    assert await append(log, 8, 9) == Appended(OK, 9)
    page = await log.read("r", 0)
    assert (page.oldest_seq, seqs(page.entries)) == (4, [4, 5, 6, 7, 8, 9])
    await server.command("DEL", STREAM)
    assert await append(log, 10, 10) == Appended(HOLE, 0)


async def test_a_stream_that_vanishes_before_its_first_append_is_no_loss(server: Endpoint, log: RedisLog) -> None:
    await running(log, 5)
    await server.command("DEL", STREAM)
    for _ in range(3):
        assert await log.restore(record(), LEASE, 6) == Appended(HOLE, 5)
    assert await append(log, 6, 6, COMPLETED) == Appended(OK, 6)
    assert await stored(log) == [6]


@everywhere
async def test_a_lost_record_is_restored_and_goes_on_where_its_stream_is(server: Endpoint, log: RedisLog) -> None:
    await running(log, 5)
    before = await contents(server)
    await server.command("DEL", RECORD)
    await let_pass(server, 60)
    assert (await append(log, 6, 6)).status is GONE
    assert await log.restore(record(), LEASE, 1) == Appended(OK, 5)
    after = await contents(server)
    assert after[1] == before[1]
    changed = {"lease_end", "started_at"}
    assert {k: v for k, v in after[0].items() if k not in changed} == {
        k: v for k, v in before[0].items() if k not in changed
    }
    assert await lives(server) == (about(120), about(120))
    assert await append(log, 6, 7) == Appended(OK, 7)


async def test_a_restore_looks_at_the_stream_itself_not_at_the_record(server: Endpoint, log: RedisLog) -> None:
    await running(log, 5)
    await server.command("HSET", RECORD, "seq", 3)
    assert await log.restore(record(), LEASE, 1) == Appended(OK, 5)
    assert (await log.get("r")).seq == 5


async def test_an_ended_stream_is_not_restored_by_an_owner_that_missed_it(server: Endpoint, log: RedisLog) -> None:
    await running(log, 2)
    await let_pass(server, 31)
    await log.reap(lambda: LOST_ENDING)
    await server.command("DEL", RECORD)
    before = await contents(server)
    for oldest in (1, 9):
        assert await log.restore(record(), LEASE, oldest) == Appended(FENCED, 4)
    assert await contents(server) == before


@everywhere
async def test_a_restored_run_is_reaped_and_listed_like_any_other(server: Endpoint, log: RedisLog) -> None:
    await running(log, 2)
    server.flushall()
    assert await log.restore(record(), LEASE, 2) == Appended(HOLE, 1)
    assert [run.id for run in await log.list()] == ["r"]
    await append(log, 2, 3)
    await let_pass(server, 31)
    assert await log.reap(lambda: LOST_ENDING) == ["r"]
    assert await stored(log) == [2, 3, 4, 5]


# --- for how long things are kept -----------------------------------------------------------------------------------


@everywhere
async def test_d32_d40_a_run_is_kept_for_four_leases_from_each_sign_of_life(server: Endpoint, log: RedisLog) -> None:
    await running(log)
    assert await lives(server) == (about(0), about(120))
    await append(log, 1, 2)
    assert await lives(server) == (about(120), about(120))
    for sign in ("append", "append again", "renew", "restore"):
        await let_pass(server, 60)
        assert await lives(server) == (about(60), about(60))
        if sign == "renew":
            assert await log.renew("owner", {"r": "epoch"}, 30.0) == {"r": OK}
        elif sign == "restore":
            assert (await log.restore(record(), LEASE, 1)).status is OK
        else:
            await append(log, 3, 3)
        assert await lives(server) == (about(120), about(120))
    await log.renew("owner", {"r": "epoch"}, 50.0)
    assert await lives(server) == (about(200), about(200))
    await append(log, 4, 4)
    assert await lives(server) == (about(200), about(200))


async def test_a_running_run_is_kept_for_the_ttl_if_that_is_longer(server: Endpoint) -> None:
    async with redis_log(server.url, ttl=500) as log:
        await running(log, 1)
        assert await lives(server) == (about(500), about(500))
        await let_pass(server, 60)
        await log.renew("owner", {"r": "epoch"}, 30.0)
        assert await lives(server) == (about(500), about(500))
        await let_pass(server, 60)
        await append(log, 2, 2)
        assert await lives(server) == (about(500), about(500))


@pytest.mark.parametrize("by", ["owner", "reaper"])
@everywhere
async def test_an_ended_run_is_kept_for_the_ttl_whoever_ended_it(server: Endpoint, log: RedisLog, by: str) -> None:
    await running(log, 1)
    await let_pass(server, 31)
    if by == "owner":
        await append(log, 2, 2, COMPLETED)
    else:
        await log.reap(lambda: LOST_ENDING)
    assert await lives(server) == (about(TTL), about(TTL))


@pytest.mark.parametrize("passed", [1, 60])
async def test_d32_a_cancel_request_keeps_record_and_stream_alike(server: Endpoint, log: RedisLog, passed: int) -> None:
    await running(log, 2)
    await let_pass(server, passed)
    await log.request_cancel("r", "stop")
    assert await lives(server) == (about(120), about(120))


async def test_flushed_scripts_are_sent_again_and_store_nothing_twice(server: Endpoint, log: RedisLog) -> None:
    await running(log)
    await log.start(record("other"), LEASE)
    for seq in range(1, 6):
        await server.command("SCRIPT FLUSH")
        replies = await log.append([batch(seq, seq), batch(seq, seq, run_id="other")])
        assert replies == [Appended(OK, seq)] * 2
        await server.command("SCRIPT FLUSH")
        assert await stored(log) == list(range(1, seq + 1))
    await server.command("SCRIPT FLUSH")
    assert (await log.request_cancel("r", "stop")).status is CancelStatus.REQUESTED
    await server.command("SCRIPT FLUSH")
    assert await log.renew("owner", {"r": "epoch"}, 30.0) == {"r": OK}
    await let_pass(server, 31)
    await server.command("SCRIPT FLUSH")
    assert sorted(await log.reap(lambda: LOST_ENDING)) == ["other", "r"]
    assert await server.command("XLEN", STREAM) == 7


# --- a server that loses replies: each script may be sent twice -----------------------------------------------------


@asynccontextmanager
async def losing(server: Endpoint, script: scripts.Script) -> AsyncIterator[RedisLog]:
    """A log of which the next reply to this script is lost, after it has taken effect."""
    async with proxy(server.port) as between, redis_log(between.url) as log:
        await log._backend.ask("SCRIPT LOAD", script.source)
        digest = script.digest.encode()
        between.drop_reply_when(lambda reply: reply.arguments[:1] == (digest,) and not reply.is_error, times=1)
        yield log
        assert between.lost == 1


async def test_a_start_whose_reply_is_lost_has_created_one_run(server: Endpoint) -> None:
    async with losing(server, scripts.START) as log:
        started = await log.start(record(), LEASE)
    assert started.created
    assert started.run.started_at == pytest.approx(time.time(), abs=60)


@pytest.mark.parametrize("ending", [None, COMPLETED], ids=["going on", "ending"])
async def test_d27_an_append_whose_reply_is_lost_is_stored_once(server: Endpoint, ending: Ending | None) -> None:
    async with losing(server, scripts.APPEND) as log:
        await log.start(record(), LEASE)
        assert await append(log, 1, 3, ending) == Appended(OK, 3)
        assert await stored(log) == [1, 2, 3]


async def test_a_cancel_request_whose_reply_is_lost_is_a_first_request(server: Endpoint) -> None:
    async with losing(server, scripts.CANCEL) as log:
        await running(log, 1)
        assert (await log.request_cancel("r", "stop")).status is CancelStatus.REQUESTED
        assert (await log.request_cancel("r", "again")).status is CancelStatus.REPEATED
        assert (await log.get("r")).cancel_reason == "stop"


async def test_a_reaping_whose_reply_is_lost_has_reaped_once(server: Endpoint) -> None:
    async with losing(server, scripts.REAP) as log:
        await running(log, 1)
        await let_pass(server, 31)
        await log.reap(lambda: LOST_ENDING)
        assert await stored(log) == [1, 2, 3]
        assert await server.command("ZCARD", KEYS.live()) == 0


@pytest.mark.parametrize("oldest", [1, 9])
async def test_a_restore_whose_reply_is_lost_is_answered_as_the_first(server: Endpoint, oldest: int) -> None:
    async with losing(server, scripts.RESTORE) as log:
        await running(log, 3)
        expected = Appended(OK, 3) if oldest == 1 else Appended(HOLE, 8)
        assert await log.restore(record(), LEASE, oldest) == expected


# --- start.lua, forget.lua, cancel.lua, due.lua, enlist.lua, reap.lua -----------------------------------------------


@everywhere
async def test_a_start_drops_the_stream_of_an_older_run_without_record(server: Endpoint, log: RedisLog) -> None:
    await running(log, 5)
    await server.command("DEL", RECORD)
    await log.start(record(), Lease("owner", "new", 30.0))
    assert await stored(log) == []
    assert await append(log, 1, 2, epoch="new") == Appended(OK, 2)
    assert await stored(log) == [1, 2]


@pytest.mark.parametrize(
    "given, epoch, forgotten",
    [
        ("started", "epoch", 1),
        ("started", "yours", 0),
        ("appended", "epoch", 0),
        ("ended", "epoch", 0),
        ("nothing", "epoch", 0),
    ],
)
@everywhere
async def test_a_start_is_taken_back_only_by_its_own_epoch_and_before_anything_is_written(
    server: Endpoint, log: RedisLog, given: str, epoch: str, forgotten: int
) -> None:
    if given != "nothing":
        await log.start(record(), LEASE)
    if given == "appended":
        await append(log, 1, 1)
    elif given == "ended":
        await append(log, 1, 1, COMPLETED)
    before = await server.command("EXISTS", RECORD)
    assert await log._backend.ask(*call(scripts.FORGET, [RECORD], epoch)) == forgotten
    assert await server.command("EXISTS", RECORD) == before - forgotten


async def test_a_cancel_is_the_same_request_by_its_token(log: RedisLog) -> None:
    def cancel(token: str, words: str) -> Any:
        return log._backend.ask(*call(scripts.CANCEL, [STREAM, RECORD], token, 1000, "1", words))

    assert await cancel("one", "why") == [b"GONE", []]
    await running(log, 1)
    for token, words, status in (
        ("one", "why", b"REQUESTED"),
        ("one", "why", b"REQUESTED"),
        ("two", "because", b"REPEATED"),
        ("one", "why", b"REQUESTED"),
    ):
        said, _ = await cancel(token, words)
        assert said == status
        assert (await log.get("r")).cancel_reason == "why"
    await append(log, 2, 2, CANCELLED)
    said, _ = await cancel("one", "why")
    assert said == b"ENDED"


async def test_the_list_of_live_runs_is_only_a_hint_and_the_records_decide(server: Endpoint, log: RedisLog) -> None:
    for run_id in ("alive", "dead", "ended", "gone"):
        await log.start(record(run_id), Lease("owner", "epoch", 300.0 if run_id == "alive" else 30.0))
    await append(log, 1, 1, COMPLETED, run_id="ended")
    await server.command("DEL", KEYS.record("gone"))
    await let_pass(server, 31)
    await server.command("ZADD", KEYS.live(), 1, "alive", 2, "ended", 3, "never", 4, "gone", 5, "dead")
    assert await log.reap(lambda: LOST_ENDING) == ["dead"]
    assert await server.command("ZRANGE", KEYS.live(), 0, -1) == ["alive"]
    due = await server.command("ZSCORE", KEYS.live(), "alive")
    lease_end = float(await server.command("HGET", KEYS.record("alive"), "lease_end"))
    assert due == pytest.approx(lease_end, abs=2_000)


async def test_due_runs_come_most_overdue_first_and_no_more_than_asked_for(server: Endpoint, log: RedisLog) -> None:
    now, none = await log._backend.ask(*call(scripts.DUE, [KEYS.live()], 0, 10))
    assert none == []
    assert int(now) == pytest.approx(time.time() * 1000, abs=60_000)
    await server.command("ZADD", KEYS.live(), 3, "c", 1, "a", 2, "b", int(now) + 1_000_000, "later")
    assert (await log._backend.ask(*call(scripts.DUE, [KEYS.live()], 0, 10)))[1] == [b"a", b"b", b"c"]
    assert (await log._backend.ask(*call(scripts.DUE, [KEYS.live()], 0, 2)))[1] == [b"a", b"b"]


@pytest.mark.parametrize("only_new", ["1", ""])
async def test_a_start_notes_new_runs_and_a_renewal_live_ones(server: Endpoint, log: RedisLog, only_new: str) -> None:
    await server.command("ZADD", KEYS.live(), 1, "old")
    await log._backend.ask(*call(scripts.ENLIST, [KEYS.live()], 5_000, only_new, "old", "new"))
    due = pytest.approx(time.time() * 1000 + 5_000, abs=60_000)
    assert await server.command("ZSCORE", KEYS.live(), "new") == due
    assert await server.command("ZSCORE", KEYS.live(), "old") == (1 if only_new else due)


@pytest.mark.parametrize("renewed", [True, False])
async def test_a_run_renewed_since_it_was_due_is_not_reaped(server: Endpoint, log: RedisLog, *, renewed: bool) -> None:
    await running(log, 1)
    await let_pass(server, 31)
    now, due = await log._backend.ask(*call(scripts.DUE, [KEYS.live()], 0, 10))
    assert due == [b"r"]
    if renewed:
        await log.renew("owner", {"r": "epoch"}, 30.0)
    status, left = await log._backend.ask(*log._reaper._reap("r", now, LOST_ENDING))
    assert status == (b"OK" if renewed else b"FENCED")
    assert left / 1000 == (about(31) if renewed else 0)
    assert (await log.get("r")).status is (RunStatus.RUNNING if renewed else RunStatus.LOST)


async def test_a_late_reaping_decides_by_the_time_at_which_it_was_sent(server: Endpoint, log: RedisLog) -> None:
    await running(log, 1)
    now, _ = await log._backend.ask(*call(scripts.DUE, [KEYS.live()], 0, 10))
    await let_pass(server, 31)
    long_ago = b"%d" % (int(now) - 10_000)
    status, left = await log._backend.ask(*log._reaper._reap("r", long_ago, LOST_ENDING))
    assert (status, left / 1000) == (b"OK", about(10))
    assert (await log.get("r")).status is RunStatus.RUNNING


@pytest.mark.parametrize("want", [1, 32, 160, 161])
async def test_a_page_that_is_read_in_steps_has_no_seam(log: RedisLog, want: int) -> None:
    await log.start(record(), LEASE)
    await append(log, 1, 200)
    page = await log.read("r", 3, max_entries=want)
    assert seqs(page.entries) == list(range(4, min(200, 3 + want) + 1))


# --- a full server --------------------------------------------------------------------------------------------------


@asynccontextmanager
async def full_server(version: str, *before: Batch) -> AsyncIterator[tuple[RedisServer, RedisLog]]:
    """A server that takes no more, with a run for each of the batches and an empty run `new`."""
    executable = redis_servers()[version]
    async with (
        redis_server(executable=executable, maxmemory_policy="noeviction") as server,
        redis_log(server.url) as log,
    ):
        await log.start(record("new"), LEASE)
        for each in before:
            await log.start(record(each.run_id), LEASE)
        assert {reply.status for reply in await log.append(before)} <= {OK}
        await server.command("CONFIG SET", "maxmemory", 1)
        yield server, log


async def grow_older(server: RedisServer, seconds: float) -> None:
    """Let time pass in a full server: with room for that alone."""
    await server.command("CONFIG SET", "maxmemory", 0)
    await let_pass(server, seconds)
    await server.command("CONFIG SET", "maxmemory", 1)


def small(run_id: str) -> Batch:
    return batch(1, 3, run_id=run_id)


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_full_server_takes_of_an_append_or_a_restore_only_what_is_there_already(version: str) -> None:
    async with full_server(version, small("old")) as (server, log):
        for run_id in ("old", "new"):
            before = await contents(server, run_id)
            first = len(before[1]) + 1
            for count in (1, 5):
                reply = await append(log, first, first + count - 1, run_id=run_id)
                assert (reply.status, "maxmemory" in reply.words) == (AppendStatus.FULL, True)
            assert await contents(server, run_id) == before
        assert await append(log, 1, 3, run_id="old") == Appended(OK, 3)
        await server.command("DEL", KEYS.record("old"))
        assert (await log.restore(record("old"), LEASE, 1)).status is AppendStatus.FULL
        assert (await server.command("EXISTS", KEYS.record("old")), len((await contents(server, "old"))[1])) == (0, 3)
        await server.command("CONFIG SET", "maxmemory", 0)
        assert await log.restore(record("old"), LEASE, 1) == Appended(OK, 3)
        assert await append(log, 4, 5, run_id="old") == Appended(OK, 5)
        assert await append(log, 1, 5, run_id="new") == Appended(OK, 5)


@pytest.mark.parametrize("version", VERSIONS)
async def test_of_several_appends_a_full_server_takes_those_that_end_a_run(version: str) -> None:
    async with full_server(version, small("goes-on"), small("ends"), small("final")) as (_, log):
        replies = await log.append(
            [
                batch(4, 4, run_id="goes-on"),
                batch(4, 5, COMPLETED, run_id="ends"),
                Batch("final", "epoch", entries(4, 5), final=True),
                batch(1, 2, FAILED, run_id="new"),
            ]
        )
        assert [reply.status for reply in replies] == [AppendStatus.FULL, OK, OK, OK]
        assert [(await log.get(run_id)).seq for run_id in ("goes-on", "ends", "final", "new")] == [3, 5, 5, 2]
        assert (await log.get("ends")).status is RunStatus.COMPLETED
        assert seqs((await log.read("ends", 0)).entries) == [1, 2, 3, 4, 5]
        assert (await append(log, 6, 6, COMPLETED, run_id="final")).status is OK


@pytest.mark.parametrize("version", VERSIONS)
async def test_on_a_full_server_runs_are_renewed_cancelled_read_and_reaped(version: str) -> None:
    async with full_server(version, small("old"), small("dead")) as (server, log):
        await grow_older(server, 20)
        assert await log.renew("owner", {"old": "epoch", "new": "epoch"}, 30.0) == {"old": OK, "new": OK}
        assert await lives(server, "old") == (about(120), about(120))
        due = await server.command("ZSCORE", KEYS.live(), "old")
        assert due == pytest.approx(float(await server.command("HGET", KEYS.record("old"), "lease_end")), abs=2_000)
        assert (await log.request_cancel("old", "stop")).status is CancelStatus.REQUESTED
        assert (await log.request_cancel("old", "stop")).status is CancelStatus.REPEATED
        assert await log.cancel_requests("owner") == {"old": "stop"}
        assert await log.cancel_requests("owner") == {}
        assert seqs((await log.read("old", 1)).entries) == [2, 3]
        assert [run.id for run in await log.list()] == ["old", "new", "dead"]
        assert seqs((await log.fetch({"old": 0}))["old"].entries) == [1, 2, 3]  # type: ignore[union-attr]
        await log.check()
        await grow_older(server, 15)
        assert await log.reap(lambda: LOST_ENDING) == ["dead"]
        assert [each.data for each in (await log.read("dead", 3)).entries] == list(LOST_ENDING.blocks)
        assert (await log.get("dead")).status is RunStatus.LOST
        assert await lives(server, "dead") == (about(TTL), about(TTL))


@pytest.mark.parametrize("version", VERSIONS)
async def test_a_full_server_starts_no_run_and_keeps_nothing_of_it(version: str) -> None:
    key = Idempotency("key", "request")
    async with full_server(version) as (server, log):
        for given in (None, key):
            with pytest.raises(LogFull, match="maxmemory"):
                await log.start(record("late"), LEASE, given)
        with pytest.raises(RunNotFound):
            await log.get("late")
        assert await server.command("EXISTS", KEYS.record("late")) == 0
        assert [run.id for run in await log.list()] == ["new"]
        await server.command("CONFIG SET", "maxmemory", 0)
        assert (await log.start(record("late"), LEASE, key)).created


@pytest.mark.parametrize("script", scripts.BY_DIGEST.values(), ids=lambda script: script.source.partition("\n")[0][3:])
def test_a_script_has_no_key_but_those_it_is_given_and_no_shebang(script: scripts.Script) -> None:
    code = re.sub(r"--.*", "", script.source)
    named = set(re.findall(r"redis\.call\('\w+', ([\w\[\]]+)", code)) - {"KEYS[1]", "KEYS[2]"}
    given = re.findall(r"local (\w+), (\w+) = KEYS\[", code)
    assert named <= {name for names in given for name in names}
    assert "PUBLISH'" not in code  # a cluster has another command for that, and a channel is no key
    assert not code.startswith("#!")
    assert "sse:" not in code
