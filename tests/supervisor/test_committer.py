"""The committer, with one shard: order, pace, batches, room, outages and refusals.

What the log has lost is in `test_committer_restore.py`, several batches in one append and a full log are in
`test_committer_batches.py`.
"""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from penstock.errors import RunEnded
from penstock.runs import RunStatus
from penstock.supervisor.committer import LOADED
from penstock.supervisor.write_buffer import BATCH_BYTES, BATCH_ENTRIES, BATCHES
from tests.support.committing import committing, shown
from tests.support.logs import COMPLETED, DONE, FAILED, seqs

APPEND_ENTRIES = BATCHES * BATCH_ENTRIES
"""The most entries of one run in one append."""

# --- order ----------------------------------------------------------------------------------------------------------


async def test_what_is_put_is_stored_in_order_and_then_shown(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.put(buffer, 500)
        assert list(shown(buffer.tail)) == []
        works.committer.close(buffer, [DONE], COMPLETED)
        await works.settled()
        assert await works.stored() == list(range(1, 502))
        assert seqs(shown(buffer.tail)) == list(range(1, 502))
        assert buffer.tail.ended
        run = await works.log.get("r")
        assert (run.status, run.seq) == (RunStatus.COMPLETED, 501)
        assert works.committer.pending_bytes == buffer.size == 0
        assert works.owners["r"].told == ["settled"]


async def test_what_is_put_while_a_commit_is_under_way_goes_with_the_next(autojump_clock: MockClock) -> None:
    async with committing() as works:
        works.log.latency = 1.0
        buffer = await works.run()
        works.put(buffer, 2)
        await trio.sleep(0.5)
        works.put(buffer, 3)
        works.committer.close(buffer, [DONE], COMPLETED)
        await works.settled()
        assert [batches for _, batches in works.log.appended] == [[("r", 1, 2)], [("r", 3, 6)]]


async def test_one_append_is_under_way_at_a_time(autojump_clock: MockClock) -> None:
    async with committing() as works:
        works.log.latency = 0.1
        boxes = [await works.run(f"r{number}") for number in range(5)]
        for number in range(100):
            works.put(boxes[number % 5])
            await trio.sleep(0.007)
        for buffer in boxes:
            await works.committer.flush(buffer)
        assert works.log.calls["append"] >= 5
        assert works.log.most_under_way == 1


# --- pace -----------------------------------------------------------------------------------------------------------


async def test_an_idle_committer_commits_at_once(autojump_clock: MockClock) -> None:
    async with committing(commit_spacing=5.0) as works:
        buffer = await works.run()
        await trio.sleep(100)
        works.put(buffer)
        await wait_all_tasks_blocked()
        assert seqs(shown(buffer.tail)) == [1]
        assert works.appends == [100]


@pytest.mark.parametrize("spacing", [0.002, 1.0])
async def test_under_load_commits_start_at_least_the_spacing_apart(autojump_clock: MockClock, spacing: float) -> None:
    async with committing(commit_spacing=spacing) as works:
        buffer = await works.run()
        for _ in range(50):
            works.put(buffer, LOADED)
            await trio.sleep(spacing / 10)
        await trio.sleep(2 * spacing)
        gaps = [other - one for one, other in pairwise(works.appends)]
        assert all(gap >= spacing * 0.999 for gap in gaps)
        assert 5 <= len(works.appends) <= 7
        assert await works.stored() == list(range(1, 50 * LOADED + 1))


@pytest.mark.parametrize("entries", [1, LOADED - 1, LOADED, 10 * LOADED])
async def test_a_commit_is_followed_by_its_share_of_the_spacing(autojump_clock: MockClock, entries: int) -> None:
    async with committing(commit_spacing=1.0) as works:
        first, second = await works.run("first"), await works.run("second")
        works.put(first, entries // 2)  # those of all runs count
        works.put(second, entries - entries // 2)
        await trio.sleep(0.01)
        works.put(first)
        await trio.sleep(2)
        assert works.appends == [0, pytest.approx(max(min(1.0, entries / LOADED), 0.01))]


async def test_a_slow_log_is_not_made_to_wait_for_the_spacing_as_well(autojump_clock: MockClock) -> None:
    async with committing(commit_spacing=1.0) as works:
        works.log.latency = 3.0
        buffer = await works.run()
        works.put(buffer)
        await trio.sleep(1)
        works.put(buffer)
        await trio.sleep(10)
        assert works.appends == [0, 3]


async def test_an_idle_committer_asks_nothing_of_the_log(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.put(buffer)
        await trio.sleep(10)
        before = works.log.calls.copy()
        await trio.sleep(300)
        assert works.log.calls == before


# --- linger ---------------------------------------------------------------------------------------------------------


async def test_a_commit_waits_its_interval_for_more_to_join_it(autojump_clock: MockClock) -> None:
    async with committing(flush_interval=0.5) as works:
        buffer = await works.run()
        await trio.sleep(10)
        for _ in range(4):
            works.put(buffer)
            await trio.sleep(0.1)
        assert works.appends == []
        await trio.sleep(1)
        assert works.appends == [10.5]
        assert seqs(shown(buffer.tail)) == [1, 2, 3, 4]


@pytest.mark.parametrize("count, when", [(2, 10.5), (3, 10.2), (4, 10.2)])
async def test_so_many_pending_entries_end_the_wait(autojump_clock: MockClock, count: int, when: float) -> None:
    async with committing(flush_interval=0.5, flush_size=3) as works:
        buffer, other = await works.run(), await works.run("other")
        await trio.sleep(10)
        works.put(other, 2)
        await trio.sleep(0.2)
        works.put(buffer, count)
        await trio.sleep(1)
        assert works.appends == [pytest.approx(when)]
        assert len(shown(buffer.tail)) == count
        assert len(shown(other.tail)) == 2


async def test_an_ending_ends_the_wait(autojump_clock: MockClock) -> None:
    async with committing(flush_interval=60) as works:
        buffer = await works.run()
        works.put(buffer)
        await trio.sleep(1)
        works.committer.close(buffer, [DONE], COMPLETED)
        await works.settled()
        assert works.appends == [1]


async def test_what_comes_after_something_urgent_waits_its_interval_again(autojump_clock: MockClock) -> None:
    async with committing(flush_interval=5) as works:
        buffer, other = await works.run(), await works.run("other")
        works.put(buffer)
        await works.committer.flush(buffer)
        await trio.sleep(1)
        works.put(other)
        await trio.sleep(10)
        assert works.appends == [0, 6]


async def test_flush_ends_the_wait_and_returns_when_all_is_stored(autojump_clock: MockClock) -> None:
    async with committing(flush_interval=60) as works:
        works.log.latency = 2.0
        buffer = await works.run()
        works.put(buffer, 3)
        await trio.sleep(1)
        await works.committer.flush(buffer)
        assert trio.current_time() - works.start == 3
        assert seqs(shown(buffer.tail)) == [1, 2, 3]


async def test_flush_waits_for_what_was_put_before_it_and_no_longer(autojump_clock: MockClock) -> None:
    async with committing() as works:
        works.log.latency = 1.0
        buffer = await works.run()
        works.put(buffer, APPEND_ENTRIES * 2)

        async def go_on() -> None:
            for _ in range(10):
                await trio.sleep(0.4)
                works.put(buffer)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(go_on)
            await works.committer.flush(buffer)
            assert trio.current_time() - works.start == 2
            assert buffer.stored == APPEND_ENTRIES * 2


async def test_flush_of_nothing_is_a_checkpoint_and_no_more(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer = await works.run()
        with trio.CancelScope() as scope:
            scope.cancel()
            await works.committer.flush(buffer)
        assert scope.cancelled_caught
        await works.committer.flush(buffer)
        assert works.log.calls["append"] == 0
        assert trio.current_time() == works.start


# --- batches --------------------------------------------------------------------------------------------------------

FOUR = [(1, 200), (201, 400), (401, 600), (601, 800)]
"""The first batches of a run that has much pending."""


@pytest.mark.parametrize(
    "count, appends",
    [
        (BATCH_ENTRIES, [[(1, 200)]]),
        (BATCH_ENTRIES + 1, [[(1, 200), (201, 201)]]),
        (APPEND_ENTRIES, [[*FOUR, (801, 1000)]]),
        (APPEND_ENTRIES + BATCH_ENTRIES + 1, [[*FOUR, (801, 1000)], [(1001, 1200), (1201, 1201)]]),
    ],
)
async def test_a_batch_holds_at_most_so_many_entries_and_an_append_so_many_batches_of_a_run(
    autojump_clock: MockClock, count: int, appends: list[list[tuple[int, int]]]
) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.put(buffer, count)
        await works.committer.flush(buffer)
        assert works.sent() == appends
        assert await works.stored() == seqs(shown(buffer.tail)) == list(range(1, count + 1))


@pytest.mark.parametrize(
    "size, appends",
    [
        (BATCH_BYTES // 4 - 1, [[(1, 5), (6, 10), (11, 11)]]),
        (BATCH_BYTES // 4, [[(1, 4), (5, 8), (9, 11)]]),
        (BATCH_BYTES - 1, [[(1, 2), (3, 4), (5, 6), (7, 8), (9, 10)], [(11, 11)]]),
        (BATCH_BYTES, [[(n, n) for n in range(1, 6)], [(n, n) for n in range(6, 11)], [(11, 11)]]),
    ],
)
async def test_a_batch_is_cut_by_its_size(
    autojump_clock: MockClock, size: int, appends: list[list[tuple[int, int]]]
) -> None:
    async with committing(max_pending_bytes=100 * BATCH_BYTES) as works:
        buffer = await works.run()
        works.put(buffer, 11, size)
        await works.committer.flush(buffer)
        assert works.sent() == appends


@pytest.mark.parametrize(
    "before, appends",
    [
        (BATCH_ENTRIES - 2, [[(1, 200)]]),
        (BATCH_ENTRIES - 1, [[(1, 201)]]),
        (BATCH_ENTRIES, [[(1, 200), (201, 202)]]),
        (APPEND_ENTRIES - 1, [[*FOUR, (801, 1001)]]),
        (APPEND_ENTRIES, [[*FOUR, (801, 1000)], [(1001, 1002)]]),
    ],
)
async def test_an_ending_is_never_parted_and_comes_with_its_last_entry(
    autojump_clock: MockClock, before: int, appends: list[list[tuple[int, int]]]
) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.put(buffer, before)
        works.committer.close(buffer, [b"event: error\ndata: {}\n\n", DONE], FAILED)
        await works.settled()
        assert works.sent() == appends
        assert await works.stored() == list(range(1, before + 3))
        assert (await works.log.get("r")).status is RunStatus.FAILED


@pytest.mark.parametrize(
    "before, appends",
    [
        (BATCHES - 1, [[(1, 1), (2, 2), (3, 3), (4, 4), (5, 7)]]),
        (BATCHES, [[(1, 1), (2, 2), (3, 3), (4, 4), (5, 5)], [(6, 8)]]),
    ],
)
async def test_an_ending_of_many_bytes_after_entries_of_many_bytes_is_not_parted(
    autojump_clock: MockClock, before: int, appends: list[list[tuple[int, int]]]
) -> None:
    async with committing(max_pending_bytes=100 * BATCH_BYTES) as works:
        buffer = await works.run()
        works.put(buffer, before, BATCH_BYTES)
        large = b"data: " + b"x" * BATCH_BYTES + b"\n\n"
        works.committer.close(buffer, [large, large, DONE], FAILED)
        await works.settled()
        assert works.sent() == appends
        assert await works.stored() == list(range(1, before + 4))


async def test_the_rest_of_a_large_run_waits_no_interval(autojump_clock: MockClock) -> None:
    async with committing(flush_interval=60, flush_size=3 * APPEND_ENTRIES + 1, commit_spacing=0.002) as works:
        buffer = await works.run()
        works.put(buffer, 3 * APPEND_ENTRIES)
        await trio.sleep(61)
        assert len(shown(buffer.tail)) == 3 * APPEND_ENTRIES
        assert works.appends == [pytest.approx(when) for when in (60, 60.002, 60.004)]


# --- room -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size, full", [(499, False), (500, True), (501, True)])
async def test_a_run_waits_when_so_much_of_it_is_pending(autojump_clock: MockClock, size: int, full: bool) -> None:
    async with committing(max_pending_bytes=1_000) as works:
        works.log.latency = 1.0
        buffer = await works.run()
        works.put(buffer, 2, size)
        assert works.committer.is_full(buffer) is full
        await works.committer.room(buffer)
        assert trio.current_time() - works.start == (1.0 if full else 0.0)


@pytest.mark.parametrize("size, full", [(249, False), (250, True)])
async def test_runs_wait_when_too_much_is_pending_in_all(autojump_clock: MockClock, size: int, full: bool) -> None:
    async with committing(max_pending_bytes=600, max_process_pending_bytes=1_000) as works:
        works.log.latency = 1.0
        one, other, idle = await works.run("one"), await works.run("other"), await works.run("idle")
        works.put(one, 2, size)
        works.put(other, 2, size)
        assert works.committer.pending_bytes == 4 * size
        assert [works.committer.is_full(buffer) for buffer in (one, other)] == [full, full]
        assert works.committer.is_full(idle) is full  # or a thousand idle runs would have a thousand events pending
        await works.committer.room(idle)
        assert trio.current_time() - works.start == (1.0 if full else 0.0)
        await works.committer.room(other)
        assert trio.current_time() - works.start == (1.0 if full else 0.0)
        await works.committer.flush(one)
        assert works.committer.pending_bytes == 0


async def test_an_ending_waits_for_no_room(autojump_clock: MockClock) -> None:
    async with committing(max_pending_bytes=100, max_process_pending_bytes=100) as works:
        buffer = await works.run()
        works.put(buffer, 1, 5_000)
        works.committer.close(buffer, [DONE], COMPLETED)
        await works.settled()
        assert await works.stored() == [1, 2]


async def test_room_is_a_checkpoint_also_when_there_is_some(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer = await works.run()
        with trio.CancelScope() as scope:
            scope.cancel()
            await works.committer.room(buffer)
        assert scope.cancelled_caught


# --- outages --------------------------------------------------------------------------------------------------------


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


# --- refusals -------------------------------------------------------------------------------------------------------


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
async def test_a_run_given_up_during_its_commit_is_given_up_once(autojump_clock: MockClock, reply: str) -> None:
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
