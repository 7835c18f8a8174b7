"""What every event log promises of `start` and `append`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from penstock.errors import RunExists
from penstock.log import Appended, AppendStatus, Batch, Entry, Lease
from penstock.runs import RunStatus
from tests.support.logs import CANCELLED, COMPLETED, DONE, FAILED, LEASE, LOST_ENDING, batch, entries, record, seqs

if TYPE_CHECKING:
    from trio.abc import Clock

    from penstock.log import EventLog
    from penstock.runs import Ending
    from tests.conftest import Elapse


async def append(log: EventLog, what: Batch) -> Appended:
    (reply,) = await log.append([what])
    return reply


async def stored(log: EventLog, run_id: str = "r") -> list[int]:
    """The seqs of all entries, after making sure that each of them is what was appended under its seq."""
    return seqs((await log.read(run_id, 0)).entries)


async def test_a_started_run_is_there_for_any_reader_and_has_nothing_yet(log: EventLog, clock: Clock) -> None:
    run = record()
    started = await log.start(run, LEASE)
    assert started.created
    assert started.run == replace(run, started_at=started.run.started_at)
    assert started.run.started_at > 0
    assert await log.get("r") == started.run
    page = await log.read("r", 0)
    assert (page.run, list(page.entries), page.oldest_seq) == (started.run, [], 1)


async def test_a_run_id_in_use_is_refused_and_the_run_that_has_it_stays(log: EventLog, clock: Clock) -> None:
    await log.start(record(), LEASE)
    await append(log, batch(1, 2))
    with pytest.raises(RunExists) as caught:
        await log.start(record(created_at=99.0), Lease("other", "other epoch", 30.0))
    assert (caught.value.run.seq, caught.value.run.created_at) == (2, 5.0)
    assert (await append(log, batch(3, 3))).status is AppendStatus.OK
    assert await stored(log) == [1, 2, 3]


# --- append ---------------------------------------------------------------------------------------------------------


async def test_what_is_appended_can_be_read_and_the_record_says_how_far_it_goes(log: EventLog, clock: Clock) -> None:
    await log.start(record(), LEASE)
    assert await append(log, batch(1, 3)) == Appended(AppendStatus.OK, 3)
    assert await append(log, batch(4, 5)) == Appended(AppendStatus.OK, 5)
    assert await stored(log) == [1, 2, 3, 4, 5]
    assert (await log.get("r")).seq == 5
    assert (await log.get("r")).status is RunStatus.RUNNING


async def test_d36_entries_are_kept_to_the_byte_empty_data_among_them(log: EventLog, clock: Clock) -> None:
    blocks = [b"data: \n\n", b"data\n\n", b": c\n\n", "event: e\ndata: \u2028\x85ä\x00\n\n".encode(), b"retry: 1\n\n"]
    made = [Entry.of(seq, block, 1_700_000_000_000 + seq) for seq, block in enumerate(blocks, 1)]
    await log.start(record(), LEASE)
    await append(log, Batch("r", "epoch", made))
    kept = (await log.read("r", 0)).entries
    assert list(kept) == made
    assert [each.data for each in kept] == blocks


async def test_d27_a_batch_that_is_sent_twice_is_stored_once(log: EventLog, clock: Clock) -> None:
    await log.start(record(), LEASE)
    for _ in range(3):
        assert await append(log, batch(1, 3)) == Appended(AppendStatus.OK, 3)
    assert await stored(log) == [1, 2, 3]


async def test_d31_an_owner_with_another_epoch_is_fenced_and_stores_nothing(log: EventLog, clock: Clock) -> None:
    await log.start(record(), LEASE)
    await append(log, batch(1, 2))
    for epoch in ("", "epoch2", "Epoch", "epoc"):
        assert (await append(log, batch(3, 3, COMPLETED, epoch=epoch))).status is AppendStatus.FENCED
        assert (await append(log, batch(1, 2, epoch=epoch))).status is AppendStatus.FENCED
        assert (await append(log, batch(9, 9, epoch=epoch))).status is AppendStatus.FENCED
    assert await stored(log) == [1, 2]
    assert (await log.get("r")).status is RunStatus.RUNNING


async def test_each_batch_stands_alone_and_has_its_reply_in_its_place(log: EventLog, clock: Clock) -> None:
    for run_id in ("ok", "hole", "fenced", "ended", "cancelled"):
        await log.start(record(run_id), LEASE)
    await append(log, batch(1, 1, COMPLETED, run_id="ended"))
    await log.request_cancel("cancelled", "stop")
    replies = await log.append(
        [
            batch(2, 2, run_id="hole"),
            batch(1, 1, run_id="gone"),
            batch(1, 2, run_id="ok"),
            batch(1, 1, run_id="fenced", epoch="other"),
            batch(2, 2, run_id="ended"),
            batch(1, 1, COMPLETED, run_id="cancelled"),
        ]
    )
    assert [reply.status for reply in replies] == [
        AppendStatus.HOLE,
        AppendStatus.GONE,
        AppendStatus.OK,
        AppendStatus.FENCED,
        AppendStatus.ENDED,
        AppendStatus.CANCELLED,
    ]
    assert [(await log.get(run_id)).seq for run_id in ("ok", "hole", "fenced", "ended", "cancelled")] == [2, 0, 0, 1, 0]


async def test_no_batches_have_no_replies(log: EventLog, clock: Clock) -> None:
    assert list(await log.append([])) == []


# --- ending ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", [COMPLETED, FAILED, CANCELLED], ids=lambda ending: ending.status)
async def test_the_terminal_entry_and_status_are_one_step(log: EventLog, clock: Clock, ending: Ending) -> None:
    started = await log.start(record(), LEASE)
    assert await append(log, batch(1, 3, ending)) == Appended(AppendStatus.OK, 3)
    run = await log.get("r")
    assert run.ended_at is not None
    assert run == started.run.ended(ending, seq=3, at=run.ended_at)
    assert [each.terminal for each in (await log.read("r", 0)).entries] == [False, False, True]


async def test_d19_the_first_terminal_write_wins(log: EventLog, clock: Clock) -> None:
    await log.start(record(), LEASE)
    await append(log, batch(1, 2, FAILED))
    before = await log.get("r")
    for late in (batch(3, 3, COMPLETED), batch(3, 3), batch(2, 4, CANCELLED)):
        assert await append(log, late) == Appended(AppendStatus.ENDED, 2)
    assert await log.get("r") == before
    assert await stored(log) == [1, 2]


async def test_d21_a_second_terminal_entry_with_seq_1_changes_nothing(log: EventLog, clock: Clock) -> None:
    await log.start(record(), LEASE)
    await append(log, batch(1, 3, FAILED))
    before = await log.get("r")
    await append(log, batch(1, 1, COMPLETED))
    assert await log.get("r") == before
    assert [(each.seq, each.terminal) for each in (await log.read("r", 0)).entries] == [
        (1, False),
        (2, False),
        (3, True),
    ]


async def test_d27_a_terminal_append_sent_again_is_stored_once_and_accepted(log: EventLog, clock: Clock) -> None:
    await log.start(record(), LEASE)
    await append(log, batch(1, 2))
    for _ in range(3):
        assert await append(log, batch(2, 4, COMPLETED)) == Appended(AppendStatus.OK, 4)
    assert await stored(log) == [1, 2, 3, 4]
    assert (await log.get("r")).status is RunStatus.COMPLETED


async def test_d19_a_completed_ending_is_refused_while_a_cancel_is_on_record(log: EventLog, clock: Clock) -> None:
    await log.start(record(), LEASE)
    await append(log, batch(1, 1))
    await log.request_cancel("r", "stop")
    assert await append(log, batch(2, 3, COMPLETED)) == Appended(
        AppendStatus.CANCELLED, 1, cancelled=True, cancel="stop"
    )
    assert await stored(log) == [1]
    assert (await append(log, batch(2, 3, CANCELLED))).status is AppendStatus.OK
    run = await log.get("r")
    assert (run.status, run.cancel_reason, run.seq) == (RunStatus.CANCELLED, "stop", 3)


async def test_the_owner_of_a_reaped_run_is_fenced(log: EventLog, clock: Clock, elapse: Elapse) -> None:
    await log.start(record(), Lease("owner", "epoch", 1.0))
    await append(log, batch(1, 2))
    await elapse(1.5)
    assert list(await log.reap(lambda: LOST_ENDING)) == ["r"]
    before = await log.get("r")
    for late in (batch(1, 2), batch(3, 3), batch(3, 4, COMPLETED), batch(9, 9)):
        assert (await append(log, late)).status is AppendStatus.FENCED
    assert await log.get("r") == before
    blocks = [each.data for each in (await log.read("r", 2)).entries]
    assert blocks == list(LOST_ENDING.blocks)
    assert blocks[-1] == DONE


async def test_entries_are_not_touched_by_what_the_caller_does_afterwards(log: EventLog, clock: Clock) -> None:
    await log.start(record(), LEASE)
    mine = entries(1, 3)
    await append(log, Batch("r", "epoch", mine))
    mine.clear()
    page = await log.read("r", 0)
    assert seqs(page.entries) == [1, 2, 3]
    await append(log, batch(4, 4))
    assert seqs(page.entries) == [1, 2, 3]
