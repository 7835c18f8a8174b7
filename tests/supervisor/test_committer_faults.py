"""The committer while things go wrong: a log that is away, replies that are lost, runs that are refused."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from itertools import pairwise

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from penstock.backoff import LONGEST_PAUSE, WARNING_INTERVAL
from penstock.errors import RunEnded
from penstock.log import AppendStatus
from penstock.runs import RunStatus
from penstock.supervisor.write_buffer import BATCH_BYTES, BATCH_ENTRIES, BATCHES, BufferState
from tests.support.committing import Works, committing, shown
from tests.support.logs import COMPLETED, DONE, FAILED, OBITUARY, Unreliable, batch, in_virtual_time, seqs

# --- outages --------------------------------------------------------------------------------------------------------


async def test_an_outage_costs_time_and_nothing_else(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.put(buffer, 5)
        await trio.sleep(1)
        works.log.away = True
        works.put(buffer, 5)
        await trio.sleep(10)
        works.put(buffer, 5)
        assert seqs(shown(buffer.tail)) == [1, 2, 3, 4, 5]
        works.log.away = False
        works.committer.close(buffer, [DONE], COMPLETED)
        await works.settled()
        assert await works.stored() == list(range(1, 17))
        assert seqs(shown(buffer.tail)) == list(range(1, 17))


async def test_every_failure_is_told_and_tried_again_after_a_pause(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.log.away = True
        works.put(buffer)
        await trio.sleep(10 * LONGEST_PAUSE)
        assert works.warnings[0] == "cannot commit: away; trying again"
        assert works.warnings[1:] == ["still cannot commit: away; trying again"] * len(works.warnings[1:])
        assert len(works.warnings) <= 1 + 10 * LONGEST_PAUSE / WARNING_INTERVAL
        pauses = [b - a for a, b in pairwise(works.appends)]
        assert len(pauses) >= 10
        assert 0 < max(pauses) <= LONGEST_PAUSE


async def test_d27_a_lost_reply_duplicates_nothing(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.log.lost_replies = 3
        works.put(buffer, 5)
        await trio.sleep(0.1)
        works.put(buffer, 5)
        await works.committer.flush(buffer)
        assert await works.stored() == list(range(1, 11))
        assert seqs(shown(buffer.tail)) == list(range(1, 11))
        assert [sent for _, sent in works.log.appended] == [[("r", 1, 5)]] * 4 + [[("r", 6, 10)]]


async def test_d27_a_terminal_append_whose_reply_is_lost_settles_the_run_once(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.put(buffer, 5)
        works.committer.close(buffer, [DONE], COMPLETED)
        works.log.lost_replies = 2
        await works.settled()
        assert works.owners["r"].told == ["settled"]
        assert await works.stored() == list(range(1, 7))


async def test_d28_whatever_comes_during_an_outage_keeps_its_order(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer = await works.run()
        for number in range(60):
            works.log.away = number % 7 < 4
            works.log.lost_replies = number % 3
            works.put(buffer, 1 + number % 5)
            await trio.sleep(0.2)
        works.log.away = False
        await works.committer.flush(buffer)
        assert await works.stored() == list(range(1, buffer.seq + 1))
        assert seqs(shown(buffer.tail)) == list(range(1, buffer.seq + 1))


async def test_d29_an_ending_that_comes_while_a_commit_is_under_way_loses_nothing_of_it(
    autojump_clock: MockClock,
) -> None:
    async with committing() as works:
        works.log.latency = 1.0
        works.log.lost_replies = 1
        buffer = await works.run()
        works.put(buffer, 5)
        await trio.sleep(0.5)
        works.put(buffer, 5)
        works.committer.close(buffer, [DONE], COMPLETED)
        await works.settled()
        assert await works.stored() == list(range(1, 12))


async def test_pending_bytes_stay_bounded_during_an_outage(autojump_clock: MockClock) -> None:
    async with committing(max_pending_bytes=1_000, max_process_pending_bytes=1_500) as works:
        works.log.away = True
        boxes = [await works.run(f"r{number}") for number in range(3)]
        async with trio.open_nursery() as nursery:
            for buffer in boxes:
                nursery.start_soon(partial(works.write, buffer, 50, 100))
            await trio.sleep(100)
            assert 1_500 <= works.committer.pending_bytes <= 1_500 + 2 * 100
            assert all(buffer.size <= 1_000 for buffer in boxes)
            works.log.away = False
        for buffer in boxes:
            await works.committer.flush(buffer)
            assert await works.stored(buffer.run_id) == list(range(1, 51))
        assert works.committer.pending_bytes == 0


async def test_a_writer_cancelled_while_it_waits_for_room_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    async with committing(max_pending_bytes=100) as works:
        works.log.away = True
        buffer = await works.run()
        works.put(buffer, 1, 100)
        with trio.move_on_after(5) as scope:
            await works.committer.room(buffer)
        assert scope.cancelled_caught
        assert len(buffer.vacancy) == 0
        works.log.away = False
        await works.committer.flush(buffer)
        assert await works.stored() == [1]


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", [AppendStatus.FENCED, AppendStatus.ENDED])
async def test_d30_one_runs_refusal_harms_no_other(autojump_clock: MockClock, refusal: AppendStatus) -> None:
    async with committing() as works:
        good = [await works.run(f"good {number}") for number in range(5)]
        bad = await works.run("bad", epoch="another's" if refusal is AppendStatus.FENCED else "epoch")
        if refusal is AppendStatus.ENDED:
            await works.log.append([batch(1, 1, FAILED, run_id="bad")])
            works.put(bad)
        for buffer in [*good[:2], bad, *good[2:]]:
            works.put(buffer, 3)
        for buffer in good:
            await works.committer.flush(buffer)
            assert await works.stored(buffer.run_id) == [1, 2, 3]
            works.committer.close(buffer, [DONE], COMPLETED)
        for buffer in good:
            await works.settled(buffer.run_id)
        assert works.owners["bad"].told == ["lost"]
        assert (bad.state, bad.size, bad.entries) == (BufferState.ABANDONED, 0, [])
        assert works.committer.pending_bytes == 0
        assert list(shown(bad.tail)) == []


async def test_who_waits_on_a_run_that_is_given_up_is_let_go(autojump_clock: MockClock) -> None:
    async with committing(max_pending_bytes=100) as works:
        works.log.latency = 1.0
        buffer = await works.run(epoch="another's")
        works.put(buffer, 1, 100)
        went = []

        async def wait_for_room() -> None:
            await works.committer.room(buffer)
            went.append("room")

        async def flush() -> None:
            with pytest.raises(RunEnded):
                await works.committer.flush(buffer)
            went.append("flush")

        with trio.fail_after(5):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait_for_room)
                nursery.start_soon(flush)
        assert sorted(went) == ["flush", "room"]


async def test_a_run_that_is_given_up_makes_room_for_others_at_once(autojump_clock: MockClock) -> None:
    async with committing(max_pending_bytes=1_000, max_process_pending_bytes=1_000) as works:
        works.log.away = True
        large, small = await works.run("large"), await works.run("small")
        works.put(large, 1, 900)
        works.put(small, 1, 100)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(works.committer.room, small)
            await wait_all_tasks_blocked()
            works.committer.abandon(large)
        assert trio.current_time() == works.start
        assert works.committer.pending_bytes == 100


@pytest.mark.parametrize("reply", ["ok", "fenced"])
async def test_a_run_given_up_while_its_commit_is_under_way_is_given_up_once(
    autojump_clock: MockClock, reply: str
) -> None:
    async with committing() as works:
        works.log.latency = 1.0
        buffer = await works.run(epoch="epoch" if reply == "ok" else "another's")
        works.put(buffer, 3, 100)
        await trio.sleep(0.5)
        works.put(buffer, 2, 100)
        works.committer.abandon(buffer)
        works.committer.abandon(buffer)
        assert works.committer.pending_bytes == 0
        await trio.sleep(5)
        assert works.owners["r"].told == ["lost"]
        assert (works.committer.pending_bytes, buffer.size) == (0, 0)


async def test_d31_a_run_that_was_reaped_meanwhile_is_given_up(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.put(buffer, 3)
        await trio.sleep(40)
        assert list(await works.log.reap(lambda: OBITUARY)) == ["r"]
        works.put(buffer, 3)
        works.committer.close(buffer, [DONE], COMPLETED)
        await works.settled(told="lost")
        assert await works.stored() == [1, 2, 3, 4, 5]
        assert (await works.log.get("r")).status is RunStatus.LOST


# --- cancels --------------------------------------------------------------------------------------------------------


async def test_a_cancel_on_record_is_told_with_the_next_reply(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer = await works.run()
        await works.log.request_cancel("r", "stop")
        works.put(buffer, 2)
        await works.committer.flush(buffer)
        assert works.owners["r"].told == ["cancel: stop"]
        assert seqs(shown(buffer.tail)) == [1, 2]


@pytest.mark.parametrize("before", [0, 3, 199, 200, 250, *(BATCHES * BATCH_ENTRIES + n for n in (-1, 0, 1))])
async def test_d19_a_refused_completion_is_taken_back_and_the_other_ending_stored(
    autojump_clock: MockClock, before: int
) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.put(buffer, before)
        works.committer.close(buffer, [DONE], COMPLETED)
        await works.log.request_cancel("r", "stop")
        await works.settled()
        assert "refused: stop" in works.owners["r"].told
        assert await works.stored() == list(range(1, before + 3))
        run = await works.log.get("r")
        assert (run.status, run.seq, run.cancel_reason) == (RunStatus.CANCELLED, before + 2, "stop")
        assert works.committer.pending_bytes == buffer.size == 0


async def test_an_ending_that_is_not_completed_is_stored_in_spite_of_a_cancel(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer = await works.run()
        await works.log.request_cancel("r", "stop")
        works.committer.close(buffer, [DONE], replace(FAILED, cancel_reason="stop"))
        await works.settled()
        assert works.owners["r"].told == ["settled"]


# --- everything at once ---------------------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "large", "sleep", "away", "back", "lose", "cancel", "end", "flush"]),
        st.integers(0, 2),
        st.integers(1, 210),
    ),
    max_size=40,
)


@settings(max_examples=80, deadline=None)
@given(steps, st.sampled_from([0.0, 0.01, 0.7]), st.sampled_from([0.0, 0.3]))
def test_d28_whatever_happens_each_run_is_stored_once_whole_and_in_order(
    steps: list[tuple[str, int, int]], latency: float, flush_interval: float
) -> None:
    async def main() -> None:
        async with committing(flush_interval=flush_interval, flush_size=50) as works:
            works.log.latency = latency
            boxes = [await works.run(f"r{number}") for number in range(3)]
            async with trio.open_nursery() as nursery:
                for step, which, amount in steps:
                    await take(works, nursery, step, which, amount)
                works.log.away = False
                works.log.lost_replies = 0
                for buffer in boxes:
                    if buffer.state is BufferState.OPEN:
                        works.committer.close(buffer, [DONE], COMPLETED)
                for buffer in boxes:
                    await works.settled(buffer.run_id)
            for buffer in boxes:
                stored = await works.stored(buffer.run_id)
                assert stored == seqs(shown(buffer.tail)) == list(range(1, buffer.seq + 1))
                run = await works.log.get(buffer.run_id)
                told = works.owners[buffer.run_id].told
                assert told.count("settled") == 1
                assert "lost" not in told
                refused = any(line.startswith("refused") for line in told)
                assert run.status is (RunStatus.CANCELLED if refused else RunStatus.COMPLETED)
            assert works.committer.pending_bytes == 0

    in_virtual_time(main)


async def take(works: Works, nursery: trio.Nursery, step: str, which: int, amount: int) -> None:
    """Take one step of the example above."""
    log: Unreliable = works.log
    buffer = works.owners[f"r{which}"].buffer
    if step == "sleep":
        await trio.sleep(amount / 100)
    elif step in {"away", "back"}:
        log.away = step == "away"
    elif step == "lose":
        log.lost_replies = amount % 3
    elif step == "cancel":
        await log.request_cancel(buffer.run_id, "stop")
    elif step == "flush":
        nursery.start_soon(works.committer.flush, buffer)
    elif buffer.state is not BufferState.OPEN:
        pass
    elif step == "end":
        works.committer.close(buffer, [DONE], COMPLETED)
    else:
        works.put(buffer, amount if step == "put" else 3, BATCH_BYTES // 2 if step == "large" else 0)
