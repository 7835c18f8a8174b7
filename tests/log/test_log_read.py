"""What every event log promises of `read`, `fetch`, `get` and `list`, and of starting once under a key."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest

from penstock.errors import IdempotencyConflict, RunNotFound
from penstock.log import PAGE_BYTES, PAGE_ENTRIES, AppendStatus, EventLog, Idempotency
from penstock.runs import RunStatus
from tests.support.logs import COMPLETED, FAILED, LEASE, batch, record, seqs

if TYPE_CHECKING:
    from trio.abc import Clock

    from tests.conftest import Elapse, Kind


async def run_of(log: EventLog, last: int, run_id: str = "r", size: int = 0, *, ended: bool = False) -> None:
    await log.start(record(run_id), LEASE)
    for first in range(1, last + 1, 200):
        upto = min(first + 199, last)
        ending = COMPLETED if ended and upto == last else None
        (reply,) = await log.append([batch(first, upto, ending, run_id=run_id, size=size)])
        assert reply.status is AppendStatus.OK


async def test_it_has_what_the_protocol_asks_for(log: EventLog, clock: Clock) -> None:
    assert isinstance(log, EventLog)
    await log.check()


# --- read -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("after", [0, 4, 5, 2**53])
async def test_a_page_holds_what_follows_the_cursor_and_its_record(log: EventLog, clock: Clock, after: int) -> None:
    await run_of(log, 5)
    page = await log.read("r", after)
    assert seqs(page.entries) == list(range(after + 1, 6))
    assert page.run == await log.get("r")
    assert (page.run.seq, page.oldest_seq) == (5, min(after, 5) + 1)


async def test_d33_nothing_yet_and_nothing_more_differ_by_the_record(log: EventLog, clock: Clock) -> None:
    await run_of(log, 3, "going on")
    await run_of(log, 3, "ended", ended=True)
    for after in (3, 4):
        yet, more = await log.read("going on", after), await log.read("ended", after)
        assert list(yet.entries) == list(more.entries) == []
        assert (yet.run.status.terminal, more.run.status.terminal) == (False, True)


@pytest.mark.parametrize("limit", [1, 2, 7, 8])
async def test_d35_a_page_has_a_limit_and_pages_come_to_the_whole(log: EventLog, clock: Clock, limit: int) -> None:
    await run_of(log, 7)
    cursor, sizes = 0, []
    while cursor < 7:
        page = await log.read("r", cursor, max_entries=limit)
        assert seqs(page.entries) == list(range(cursor + 1, cursor + 1 + len(page.entries)))
        sizes.append(len(page.entries))
        cursor = page.entries[-1].seq
    assert sizes == [limit] * (7 // limit) + ([7 % limit] if 7 % limit else [])


@pytest.mark.parametrize("limit", [1, 99, 100, 101, 250, 10_000])
async def test_a_page_is_full_at_its_bytes_and_never_empty(log: EventLog, clock: Clock, limit: int) -> None:
    await run_of(log, 7, size=100)
    cursor = 0
    while cursor < 7:
        page = await log.read("r", cursor, max_bytes=limit)
        assert seqs(page.entries) == list(range(cursor + 1, cursor + 1 + len(page.entries)))
        assert len(page.entries) >= 1
        assert (len(page.entries) - 1) * 100 < limit
        cursor = page.entries[-1].seq
        assert cursor == 7 or (len(page.entries) + 1) * 100 > limit


async def test_the_default_page_keeps_to_both_limits(log: EventLog, clock: Clock) -> None:
    await run_of(log, PAGE_ENTRIES + 1, "many")
    await run_of(log, 10, "large", size=PAGE_BYTES // 4)
    assert len((await log.read("many", 0)).entries) == PAGE_ENTRIES
    assert 4 <= len((await log.read("large", 0)).entries) <= 5


async def test_d34_a_run_that_is_not_there_is_not_found(log: EventLog, clock: Clock) -> None:
    with pytest.raises(RunNotFound):
        await log.read("r", 0)
    with pytest.raises(RunNotFound):
        await log.get("r")
    with pytest.raises(RunNotFound):
        await log.request_cancel("r", None)


async def test_d37_a_page_says_what_is_the_oldest_entry_that_there_is(kind: Kind, clock: Clock) -> None:
    async with kind.open(max_entries=100) as log:
        await run_of(log, 2_000)
        page = await log.read("r", 500)
        assert page.oldest_seq > 501
        assert page.entries[0].seq == page.oldest_seq
        assert (await log.read("r", 0)).oldest_seq == page.oldest_seq
        assert (await log.read("r", page.oldest_seq)).oldest_seq == page.oldest_seq + 1
        assert (await log.read("r", 5_000)).oldest_seq == 2_001
        assert page.oldest_seq <= 2_000 - 100 + 1


async def test_fetch_is_read_for_many_runs(log: EventLog, clock: Clock) -> None:
    await run_of(log, 3, "a")
    await run_of(log, 600, "b")
    await run_of(log, 2, "c", ended=True)
    pages = await log.fetch({"c": 2, "missing": 0, "b": 10, "a": 1})
    assert set(pages) == {"a", "b", "c", "missing"}
    assert pages["missing"] is None
    for run_id, after in (("a", 1), ("b", 10), ("c", 2)):
        assert pages[run_id] == await log.read(run_id, after)


# --- list -----------------------------------------------------------------------------------------------------------


async def test_the_newest_records_come_first(log: EventLog, clock: Clock) -> None:
    for number in range(5):
        await log.start(record(f"r{number}", created_at=100.0 + number), LEASE)
    assert [run.id for run in await log.list()] == ["r4", "r3", "r2", "r1", "r0"]
    assert [run.id for run in await log.list(limit=2)] == ["r4", "r3"]
    assert (await log.list())[0] == await log.get("r4")


async def test_at_most_fifty_are_listed_unless_more_are_asked_for(log: EventLog, clock: Clock) -> None:
    for number in range(60):
        await log.start(record(f"r{number}", created_at=100.0 + number), LEASE)
    assert len(await log.list()) == 50
    assert len(await log.list(limit=100)) == 60


async def test_the_records_of_one_status_can_be_listed(log: EventLog, clock: Clock) -> None:
    for number in range(6):
        await log.start(record(f"r{number}", created_at=100.0 + number), LEASE)
    for number, ending in ((1, COMPLETED), (2, FAILED), (4, COMPLETED)):
        await log.append([batch(1, 1, ending, run_id=f"r{number}")])
    assert [run.id for run in await log.list(status=RunStatus.COMPLETED)] == ["r4", "r1"]
    assert [run.id for run in await log.list(status=RunStatus.RUNNING, limit=2)] == ["r5", "r3"]
    assert [run.id for run in await log.list(status=RunStatus.COMPLETED, limit=1)] == ["r4"]
    assert list(await log.list(status=RunStatus.LOST)) == []


async def test_the_same_request_under_the_same_key_is_the_run_that_it_started(log: EventLog, clock: Clock) -> None:
    key = Idempotency("key", "request 1")
    await log.start(record("first"), LEASE, key)
    await log.append([batch(1, 2, COMPLETED, run_id="first")])
    again = await log.start(record("second"), LEASE, key)
    assert not again.created
    assert again.run == await log.get("first")
    with pytest.raises(RunNotFound):
        await log.get("second")


async def test_another_request_under_the_same_key_is_refused(log: EventLog, clock: Clock) -> None:
    await log.start(record("first"), LEASE, Idempotency("key", "request 1"))
    with pytest.raises(IdempotencyConflict) as caught:
        await log.start(record("second"), LEASE, Idempotency("key", "request 2"))
    assert (caught.value.key, caught.value.run_id) == ("key", "first")
    with pytest.raises(RunNotFound):
        await log.get("second")


# --- time -----------------------------------------------------------------------------------------------------------


async def gone(log: EventLog, operation: str) -> bool:
    if operation == "fetch":
        return (await log.fetch({"r": 0}))["r"] is None
    if operation == "append":
        return (await log.append([batch(1, 2, COMPLETED)]))[0].status is AppendStatus.GONE
    if operation == "renew":
        return dict(await log.renew("owner", {"r": "epoch"}, 30.0)) == {"r": AppendStatus.GONE}
    if operation == "list":
        return list(await log.list()) == []
    operations: dict[str, Any] = {
        "get": log.get,
        "read": partial(log.read, after=0),
        "cancel": partial(log.request_cancel, reason=""),
    }
    try:
        await operations[operation]("r")
    except RunNotFound:
        return True
    return False


async def test_an_ended_run_is_gone_for_every_operation_in_time(kind: Kind, clock: Clock, elapse: Elapse) -> None:
    operations = ["get", "read", "fetch", "append", "renew", "list", "cancel"]
    async with kind.open(ttl=4) as log:
        await run_of(log, 2, ended=True)
        await elapse(2)
        assert not any([await gone(log, operation) for operation in operations])
        await elapse(2.5)
        assert all([await gone(log, operation) for operation in operations])


async def test_the_id_and_the_key_of_a_run_that_is_gone_are_free(
    kind: Kind, clock: Clock, elapse: Elapse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.log.redis.start.PENDING_LIMIT", 0.1)
    async with kind.open(ttl=2) as log:
        await log.start(record(), LEASE, Idempotency("key", "request 1"))
        await log.append([batch(1, 2, COMPLETED)])
        await elapse(2.5)
        assert (await log.start(record(), LEASE, Idempotency("key", "request 2"))).created
        assert (await log.get("r")).seq == 0


async def test_d32_d40_a_silent_run_is_kept_while_its_owner_renews(kind: Kind, clock: Clock, elapse: Elapse) -> None:
    async with kind.open(ttl=3) as log:
        await log.start(record(), LEASE, Idempotency("key", "request"))
        await log.append([batch(1, 3)])
        for _ in range(5):
            await elapse(1)
            assert await log.renew("owner", {"r": "epoch"}, 30.0) == {"r": AppendStatus.OK}
        assert seqs((await log.read("r", 0)).entries) == [1, 2, 3]
        assert [run.id for run in await log.list()] == ["r"]
        (reply,) = await log.append([batch(4, 4, COMPLETED)])
        assert reply.status is AppendStatus.OK
