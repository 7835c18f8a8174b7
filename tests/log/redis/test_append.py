"""How entries get into Redis: all of an append as one argument, and what Redis holds afterwards, to the byte."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any, cast

import pytest

from penstock.log import Appended, AppendStatus, Batch, Entry
from penstock.log.open import open_log
from penstock.log.redis import scripts
from penstock.log.redis.log import RedisLog
from penstock.log.redis.schema import Keys
from penstock.runs import RunStatus
from tests.support.clustered import on_a_cluster
from tests.support.logs import COMPLETED, FAILED, LEASE, batch, entries, record
from tests.support.proxy import Reply, proxy

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from tests.support.redis_servers import Endpoint

KEYS = Keys()
MIB = 1024 * 1024
OK, HOLE = AppendStatus.OK, AppendStatus.HOLE
NOW = 1_767_225_600_123
"""A time as it may be, in milliseconds."""


async def in_redis(log: RedisLog, run_id: str = "r") -> list[list[Any]]:
    return cast("list[list[Any]]", await log._backend.ask("XRANGE", KEYS.stream(run_id), "-", "+"))


def as_it_lies(made: Iterable[Entry]) -> list[list[Any]]:
    return [
        [
            b"%d-0" % each.seq,
            [b"seq_id", b"%d" % each.seq, b"data", each.data, b"timestamp", b"%d" % each.timestamp]
            + [b"complete", b"true"] * each.terminal,
        ]
        for each in made
    ]


def of_data(first: int, data: Sequence[bytes], *, terminal: bool = False) -> list[Entry]:
    last = first + len(data) - 1
    return [
        Entry.of(seq, each, NOW + seq % 1009, terminal=terminal and seq == last)
        for seq, each in enumerate(data, start=first)
    ]


async def append(log: RedisLog, *made: Entry) -> Appended:
    (reply,) = await log.append([Batch("r", "epoch", made, COMPLETED if made[-1].terminal else None)])
    return reply


async def is_stored(log: RedisLog, made: Sequence[Entry]) -> None:
    """The run is these entries: where they lie, and for whoever reads them."""
    assert await in_redis(log) == as_it_lies(made)
    read: list[Entry] = []
    while page := (await log.read("r", read[-1].seq if read else 0)).entries:
        read += page
    assert read == list(made)


# --- one batch ------------------------------------------------------------------------------------------------------

SIZES = [0, 1, 2, 9, 10, 11, 63, 64, 127, 128, 255, 256, 257, 1023, 4096, 32_767, 32_768, 65_535, 65_536, 65_537]
ODD = [
    b"",
    b"\x00",
    b"\n",
    b"\r\n\r\n",
    b"id: 7\n",
    b"id: 3\ndata: another's\n\n",
    b"\xff\xfe\x00\x01",
    bytes(range(256)),
    b"\xc3",
    b"%d %s %b %.0f\n\n",
    b"\xff\xfe\r\n\r\n$5\r\n*3\r\n",
    struct.pack("<4I", 0, 1, 2**31, 2**32 - 1),
    struct.pack("<3d", 0.0, -1.5, float("inf")),
    "data: \N{SNOWMAN}\n\n".encode(),
    "data: \U0001f6b0\U0001f6b0\n\n".encode(),
    "data: \u2028e\u0301\n\n".encode(),
    "data: \N{LATIN SMALL LETTER E WITH ACUTE}\n\n".encode(),
    b"data: [DONE]\n\n",
]


def text(size: int, alphabet: bytes) -> bytes:
    """So many bytes, no two neighbours of which look alike."""
    return (alphabet * (size // len(alphabet) + 1))[:size]


ALPHABETS = (bytes(range(256)), "\N{SNOWMAN}\U0001f6b0\u00e9a".encode())


@pytest.mark.parametrize(
    "data",
    [[text(size, each) for each in ALPHABETS for size in [*SIZES, *SIZES[::-1]]], [*ODD[1:], *ODD, ODD[0]]],
    ids=["sizes", "odd"],
)
async def test_data_of_many_kinds_in_one_batch_are_each_kept_to_the_byte(log: RedisLog, data: list[bytes]) -> None:
    await log.start(record(), LEASE)
    made = of_data(1, data, terminal=True)
    assert await append(log, *made) == Appended(OK, len(data))
    await is_stored(log, made)


@pytest.mark.parametrize("around", [9, 9_999, 2**31 - 1, 2**32 - 1, 10**15 - 1])
async def test_a_batch_in_which_seqs_get_a_digit_more_is_kept_to_the_byte(log: RedisLog, around: int) -> None:
    first = around - 3
    assert await log.restore(record(), LEASE, first) == Appended(HOLE, first - 1)
    made = of_data(first, [b"data: %d of it\n\n" % number for number in range(8)], terminal=True)
    assert await append(log, *made) == Appended(OK, first + 7)
    assert await in_redis(log) == as_it_lies(made)
    page = await log.read("r", first - 1)
    assert list(page.entries) == made
    assert page.run.seq == first + 7


@pytest.mark.parametrize("first, stored", [(1, 2), (3, 9), (1, 10), (3, 13)])
async def test_of_a_batch_in_part_the_rest_follows(server: Endpoint, log: RedisLog, stored: int, first: int) -> None:
    await log.start(record(), LEASE)
    there = of_data(1, [text(3 * seq, b"there") for seq in range(1, stored + 1)])
    await append(log, *there)
    again = of_data(first, [text(5 * seq, b"AGAIN!") for seq in range(first, 14)])
    before = await server.stats()
    assert await append(log, *again) == Appended(OK, 13)
    after = await server.stats()
    assert after["xadd"] - before["xadd"] == 13 - stored
    await is_stored(log, [*there, *again[stored - first + 1 :]])


@pytest.mark.parametrize("stored", [0, 12])
async def test_an_ending_sent_after_a_part_of_its_batch_marks_its_last_entry_alone(log: RedisLog, stored: int) -> None:
    await log.start(record(), LEASE)
    made = of_data(1, [b"data: %d\n\n" % seq for seq in range(1, 14)], terminal=True)
    if stored:
        await append(log, *made[:stored])
    for _ in range(2):
        assert await append(log, *made) == Appended(OK, 13)
    await is_stored(log, made)
    assert (await log.get("r")).status is RunStatus.COMPLETED


@pytest.mark.parametrize(
    "times",
    [
        [0, 0, 1, 1, 0, 2**31, 2**31, 2**32, 2**41, 2**53 - 1, 2**53 - 1, 2**53 - 2],
        [10**14 - 1, 10**14, 10**15, 10**15 + 1],
    ],
)
async def test_each_entry_of_a_batch_keeps_its_own_time(log: RedisLog, times: list[int]) -> None:
    await log.start(record(), LEASE)
    made = [Entry.of(seq, b"data\n\n", time) for seq, time in enumerate(times, 1)]
    await append(log, made[0])
    assert await append(log, *made) == Appended(OK, len(times))
    await is_stored(log, made)


@on_a_cluster
async def test_an_append_has_as_many_arguments_however_many_entries_it_has(log: RedisLog) -> None:
    count = 200
    command = log._append(batch(5, 4 + count, FAILED))
    one = log._append(batch(1, 1, FAILED))
    assert len(command) == len(one)
    made = entries(5, 4 + count)
    wire, lengths, times, channel, publish = command[-5:]
    assert wire == b"".join(each.wire for each in made)
    assert struct.unpack(f"<{count}I", lengths) == tuple(len(each.wire) for each in made)
    assert struct.unpack(f"<{count}d", times) == tuple(each.timestamp for each in made)
    assert (channel, publish) == (KEYS.wake("r"), "SPUBLISH" if log._topology.is_cluster else "PUBLISH")
    assert command[3:5] == (KEYS.stream("r"), KEYS.record("r"))


# --- several batches of a run in one append -------------------------------------------------------------------------


async def test_several_batches_of_one_run_are_stored_in_order_in_one_round_trip(server: Endpoint) -> None:
    async with proxy(server.port) as between, open_log(between.url) as log:
        assert isinstance(log, RedisLog)
        await log.start(record(), LEASE)
        await log.append([batch(1, 1)])
        asked = []

        def note(reply: Reply) -> bool:
            asked.append(reply.command)
            return False

        between.drop_reply_when(note)
        batches = [batch(2, 200), batch(201, 400), batch(401, 401), batch(402, 403), batch(404, 405, COMPLETED)]
        assert await log.append(batches) == [Appended(OK, seq) for seq in (200, 400, 401, 403, 405)]
        assert asked.count("EVALSHA") == 5
        await is_stored(log, entries(1, 405, terminal=True))
        assert (await log.get("r")).status is RunStatus.COMPLETED


@on_a_cluster
async def test_batches_of_many_runs_keep_the_order_of_each(log: RedisLog) -> None:
    runs = [f"r{number}" for number in range(40)]
    for run_id in runs:
        await log.start(record(run_id), LEASE)
    batches = [
        batch(10 * n + 1, 10 * n + 10, COMPLETED if n == 4 else None, run_id=run_id)
        for run_id in runs
        for n in range(5)
    ]
    assert await log.append(batches) == [Appended(OK, 10 * n + 10) for _ in runs for n in range(5)]
    for run_id in runs:
        assert await in_redis(log, run_id) == as_it_lies(entries(1, 50, terminal=True))


@on_a_cluster
async def test_batches_of_more_bytes_than_a_round_trip_takes_are_stored_in_order(log: RedisLog) -> None:
    await log.start(record(), LEASE)
    batches = [batch(n, n, size=MIB, ending=COMPLETED if n == 5 else None) for n in range(1, 6)]
    assert await log.append(batches) == [Appended(OK, n) for n in range(1, 6)]
    await is_stored(log, entries(1, 5, MIB, terminal=True))


@pytest.mark.parametrize("missing", [1, 3])
@on_a_cluster
async def test_after_a_missing_batch_those_that_follow_are_not_stored(log: RedisLog, missing: int) -> None:
    await log.start(record(), LEASE)
    batches = [batch(10 * n - 9, 10 * n) for n in range(1, 6) if n != missing]
    last = 10 * (missing - 1)
    expected = [Appended(OK, 10 * n) for n in range(1, missing)] + [Appended(HOLE, last)] * (5 - missing)
    assert await log.append(batches) == expected
    assert await in_redis(log) == as_it_lies(entries(1, last))
    assert await log.append([batch(last + 1, 50, COMPLETED)]) == [Appended(OK, 50)]
    await is_stored(log, entries(1, 50, terminal=True))


@pytest.mark.parametrize("kth", [2, 5])
async def test_several_batches_of_which_the_nth_reply_is_lost_are_stored_once(server: Endpoint, kth: int) -> None:
    async with proxy(server.port) as between, open_log(between.url) as log:
        assert isinstance(log, RedisLog)
        await log.start(record(), LEASE)
        await log.append([batch(1, 1)])
        replies = iter(range(1, 100))
        appends = scripts.APPEND.digest.encode()
        between.drop_reply_when(lambda reply: reply.arguments[:1] == (appends,) and next(replies) == kth)
        batches = [batch(2, 10), *[batch(10 * n - 9, 10 * n, COMPLETED if n == 5 else None) for n in range(2, 6)]]
        replied = await log.append(batches)
        assert between.lost == 1
        assert [each.status for each in replied] == [OK] * 5
        await is_stored(log, entries(1, 50, terminal=True))
