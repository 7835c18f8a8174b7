"""A log without room: it takes what ends a run, and for the rest its owner waits, and nobody else."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock.log import PAGE_ENTRIES, Appended, AppendStatus
from penstock.runs import RunStatus
from penstock.sse import Event
from penstock.supervisor import open_supervisor
from penstock.supervisor.committer import FULL_PAUSE
from penstock.supervisor.write_buffer import BATCH_BYTES, BATCH_ENTRIES, BATCHES, BufferState
from tests.support.committing import Works, committing, forget, shown
from tests.support.logs import COMPLETED, DONE, FAILED, Unreliable, seqs
from tests.support.supervising import (
    FIRST,
    Notes,
    View,
    Witness,
    assert_nothing_is_left,
    count,
    ended,
    entries_of,
    gists,
    near,
    read,
    readers,
    two_supervisors,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from trio.testing import MockClock

    from penstock.log import Batch

A_LOOK = 0.003
"""So many seconds later is the next page of a run looked up elsewhere, if it has more than one."""
WARNING = "cannot commit: no room; trying again"


class Full(Unreliable):
    """A log that can have no room for some runs, or for any; and that can refuse to hold a run at all."""

    def __init__(self) -> None:
        super().__init__()
        self.full: set[str] = set()
        """The runs for whose ordinary batches there is no room."""
        self.has_room = True
        """False: there is none for any run's."""
        self.takes_ends = True
        """False: not even for what is final."""
        self.refused: set[str] = set()
        """The runs that the log cannot hold, now or later."""
        self.asked: list[tuple[str, float]] = []
        """The run of every append that found no room for it, and when: once, however many batches it had of the run."""
        self._told: set[str] = set()
        """The runs for which this append has found none."""

    async def append(self, batches: Sequence[Batch]) -> Sequence[Appended]:
        self._told = set()
        return await super().append(batches)

    def _append(self, batch: Batch) -> Appended:
        last = self._runs[batch.run_id].ring.last if batch.run_id in self._runs else 0
        if batch.run_id in self.refused:
            return Appended(AppendStatus.REFUSED, last, words="the key holds something else")
        without_room = not self.has_room or batch.run_id in self.full
        if without_room and not (batch.final and self.takes_ends):
            if batch.run_id not in self._told:
                self._told.add(batch.run_id)
                self.asked.append((batch.run_id, trio.current_time()))
            return Appended(AppendStatus.FULL, last, words="no room")
        return super()._append(batch)

    def pauses(self, run_id: str) -> list[float]:
        """The seconds between two askings for a run."""
        asked = [when for asked, when in self.asked if asked == run_id]
        return [round(after - before, 9) for before, after in pairwise(asked)]  # what is left is no time at all


def log_of(works: Works) -> Full:
    assert isinstance(works.log, Full)
    return works.log


async def test_a_run_without_room_is_stored_whole_once_there_is_some(autojump_clock: MockClock) -> None:
    async with committing(Full()) as works:
        buffer = await works.run()
        works.put(buffer, 5)
        await works.committer.flush(buffer)
        log_of(works).has_room = False
        for _ in range(100):
            works.put(buffer, 3, 100)
            await trio.sleep(0.1)
        assert await works.stored() == seqs(shown(buffer.tail)) == [1, 2, 3, 4, 5]
        assert works.committer.pending_bytes == buffer.size == 300 * 100
        log_of(works).has_room = True
        await trio.sleep(FULL_PAUSE + 0.1)
        assert await works.stored() == seqs(shown(buffer.tail)) == list(range(1, 306))
        assert works.committer.pending_bytes == buffer.size == 0
        works.put(buffer)
        await works.committer.flush(buffer)
        works.committer.close(buffer, [DONE], COMPLETED)
        await works.settled()
        assert works.owners["r"].told == ["settled"]


@pytest.mark.parametrize("flush_interval", [0.0, 0.2])
async def test_a_full_log_is_asked_after_every_pause_and_not_with_every_write(
    autojump_clock: MockClock, flush_interval: float
) -> None:
    async with committing(Full(), flush_interval=flush_interval, flush_size=2) as works:
        buffer = await works.run()
        log_of(works).has_room = False
        for _ in range(950):
            works.put(buffer)
            await trio.sleep(0.01)
        pauses = log_of(works).pauses("r")
        assert 10 / (FULL_PAUSE + flush_interval) - 2 <= len(pauses) <= 10 / FULL_PAUSE
        assert min(pauses) >= FULL_PAUSE
        assert works.warnings == [WARNING]


async def test_what_is_written_while_a_full_log_is_asked_does_not_make_it_asked_again_at_once(
    autojump_clock: MockClock,
) -> None:
    async with committing(Full()) as works:
        buffer = await works.run()
        log_of(works).has_room = False
        works.log.latency = 0.1
        for _ in range(100):
            works.put(buffer)
            await trio.sleep(0.05)
        assert min(log_of(works).pauses("r")) >= FULL_PAUSE


async def test_an_ending_that_comes_while_a_full_log_is_asked_is_stored_at_once(autojump_clock: MockClock) -> None:
    async with committing(Full()) as works:
        buffer = await works.run()
        log_of(works).has_room = False
        works.log.latency = 0.1
        works.put(buffer)
        await trio.sleep(0.05)
        works.committer.close(buffer, [DONE], COMPLETED)
        await works.settled()
        assert trio.current_time() - works.start == near(0.2)
        assert await works.stored() == [1, 2]


async def test_neither_a_flush_nor_a_wait_for_room_asks_a_full_log_any_sooner(autojump_clock: MockClock) -> None:
    async with committing(Full(), max_pending_bytes=1_000) as works:
        buffer = await works.run()
        log_of(works).has_room = False
        went: list[str] = []

        async def flush() -> None:
            await works.committer.flush(buffer)
            went.append("flush")

        async def write() -> None:
            await works.write(buffer, 30, 100)
            went.append("write")

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            await trio.sleep(0.05)
            log_of(works).asked.clear()
            for _ in range(20):
                nursery.start_soon(flush)
                await trio.sleep(0.2)
            assert went == []
            assert 1_000 <= buffer.size < 1_100
            assert min(log_of(works).pauses("r")) >= FULL_PAUSE
            log_of(works).has_room = True
            await trio.sleep(FULL_PAUSE + 0.2)
            assert "write" in went
        assert sorted(went) == ["flush"] * 20 + ["write"]


async def test_others_commit_while_one_waits_for_room(autojump_clock: MockClock) -> None:
    async with committing(Full(), max_pending_bytes=10_000) as works:
        full, good = await works.run("full"), await works.run("good")
        log_of(works).full.add("full")
        for _ in range(100):
            works.put(full, 1, 100)
            works.put(good, 2, 100)
            began = trio.current_time()
            await works.committer.flush(good)
            assert trio.current_time() <= began + 0.01
            await trio.sleep(0.05)
        assert await works.stored("good") == seqs(shown(good.tail)) == list(range(1, 201))
        assert works.log._runs["full"].ring.last == 0
        assert works.committer.is_full(full)
        assert not works.committer.is_full(good)
        assert min(log_of(works).pauses("full")) >= FULL_PAUSE
        log_of(works).full.clear()
        await works.committer.flush(full)
        assert await works.stored("full") == list(range(1, 101))
        assert works.committer.pending_bytes == 0


async def test_a_run_that_finds_no_room_while_another_waits_is_asked_with_it(autojump_clock: MockClock) -> None:
    async with committing(Full()) as works:
        boxes = [await works.run(f"r{number}") for number in range(5)]
        log_of(works).has_room = False
        for buffer in boxes:
            works.put(buffer)
            await trio.sleep(0.07)
        await trio.sleep(10)
        assert len({when for _, when in log_of(works).asked if when > 1}) <= 10 / FULL_PAUSE
        assert len(works.warnings) <= 1 + 10.4 / FULL_PAUSE
        log_of(works).has_room = True
        for buffer in boxes:
            await works.committer.flush(buffer)
            assert await works.stored(buffer.run_id) == [1]
        assert works.committer.pending_bytes == 0


async def test_a_log_with_room_for_some_leaves_none_behind(autojump_clock: MockClock) -> None:
    async with committing(Full()) as works:
        boxes = [await works.run(f"r{number}") for number in range(6)]
        log_of(works).has_room = False
        for buffer in boxes:
            works.put(buffer, 3)
        await trio.sleep(2)
        log_of(works).has_room = True
        log_of(works).full |= {"r1", "r4"}
        await trio.sleep(2)
        stored = [works.log._runs[buffer.run_id].ring.last for buffer in boxes]
        assert stored == [3, 0, 3, 3, 0, 3]
        log_of(works).full.clear()
        await trio.sleep(FULL_PAUSE + 0.1)
        assert [works.log._runs[buffer.run_id].ring.last for buffer in boxes] == [3] * 6
        appends = len(works.log.appended)
        await trio.sleep(10)
        assert len(works.log.appended) == appends


@pytest.mark.parametrize("asked_before", [True, False])
@pytest.mark.parametrize(
    "pending, size",
    [
        (0, 0),
        (1, 0),
        (BATCH_ENTRIES, 0),
        (3 * BATCH_ENTRIES + 5, 0),
        (2 * BATCHES * BATCH_ENTRIES + 5, 0),
        (7, BATCH_BYTES // 2),
        (2 * BATCHES + 1, BATCH_BYTES),
    ],
)
async def test_an_ending_is_stored_at_once_with_all_that_comes_before_it(
    autojump_clock: MockClock, pending: int, size: int, *, asked_before: bool
) -> None:
    async with committing(Full()) as works:
        buffer = await works.run()
        works.put(buffer, 2)
        await works.committer.flush(buffer)
        log_of(works).has_room = False
        works.put(buffer, pending, size)
        if asked_before:
            await trio.sleep(FULL_PAUSE / 2)
        began = trio.current_time()
        works.committer.close(buffer, [b"event: error\ndata: no\n\n", DONE], FAILED)
        await works.settled()
        assert trio.current_time() - began <= 0.1
        assert await works.stored() == seqs(shown(buffer.tail)) == list(range(1, pending + 5))
        assert works.owners["r"].told == ["settled"]
        assert works.committer.pending_bytes == 0
        appends = len(works.log.appended)
        await trio.sleep(10)
        assert len(works.log.appended) == appends


@pytest.mark.parametrize("pending", [2 * BATCH_ENTRIES, 2 * BATCHES * BATCH_ENTRIES])
async def test_an_ending_for_which_there_is_no_room_either_is_asked_for_again(
    autojump_clock: MockClock, pending: int
) -> None:
    async with committing(Full()) as works:
        buffer = await works.run()
        log_of(works).has_room = log_of(works).takes_ends = False
        works.put(buffer, pending)
        works.committer.close(buffer, [DONE], COMPLETED)
        await trio.sleep(10)
        assert min(log_of(works).pauses("r")) >= FULL_PAUSE
        assert works.owners["r"].told == []
        log_of(works).takes_ends = True
        await trio.sleep(FULL_PAUSE + 0.1)
        assert works.owners["r"].told == ["settled"]
        assert await works.stored() == list(range(1, pending + 2))


async def test_an_outage_in_the_middle_of_a_pause_changes_nothing(autojump_clock: MockClock) -> None:
    async with committing(Full()) as works:
        full, good = await works.run("full"), await works.run("good")
        log_of(works).full.add("full")
        works.put(full, 3)
        await trio.sleep(0.1)
        works.log.away = True
        works.put(good, 3)
        await trio.sleep(10)
        works.log.away = False
        log_of(works).full.clear()
        for buffer in (full, good):
            await works.committer.flush(buffer)
            assert await works.stored(buffer.run_id) == [1, 2, 3]


async def test_a_run_that_is_given_up_while_it_waits_is_asked_for_no_more(autojump_clock: MockClock) -> None:
    async with committing(Full()) as works:
        buffer = await works.run()
        log_of(works).has_room = False
        works.put(buffer, 3)
        await trio.sleep(0.1)
        works.committer.abandon(buffer)
        log_of(works).asked.clear()
        await trio.sleep(10)
        assert log_of(works).asked == []
        assert works.committer.pending_bytes == 0


async def test_a_run_that_is_lost_while_it_waits_is_given_again_once_there_is_room(autojump_clock: MockClock) -> None:
    async with committing(Full()) as works:
        buffer = await works.run()
        works.put(buffer, 5)
        await works.committer.flush(buffer)
        log_of(works).has_room = False
        works.put(buffer, 3)
        await trio.sleep(0.1)
        forget(works.log, "r")
        works.committer.restore(buffer)
        await trio.sleep(2)
        assert min(log_of(works).pauses("r")) >= FULL_PAUSE - 0.1
        log_of(works).has_room = True
        await works.committer.flush(buffer)
        assert await works.stored() == list(range(1, 9))
        assert works.committer.pending_bytes == 0


async def test_a_run_that_the_log_cannot_hold_is_given_up_alone(autojump_clock: MockClock) -> None:
    async with committing(Full(), max_pending_bytes=1_000, max_process_pending_bytes=1_500) as works:
        boxes = [await works.run(f"r{number}") for number in range(3)]
        for buffer in boxes:
            works.put(buffer, 2)
            await works.committer.flush(buffer)
        log_of(works).refused.add("r1")
        async with trio.open_nursery() as nursery:
            for buffer in (boxes[0], boxes[2]):
                nursery.start_soon(partial(works.write, buffer, 50, 100))
            works.put(boxes[1], 10, 100)
        await works.settled("r1", "cannot be stored")
        for buffer in (boxes[0], boxes[2]):
            await works.committer.flush(buffer)
            assert await works.stored(buffer.run_id) == list(range(1, 53))
        assert works.owners["r1"].told == ["cannot be stored"]
        assert (boxes[1].state, boxes[1].size, boxes[1].entries) == (BufferState.ABANDONED, 0, [])
        assert works.warnings == ["cannot store run r1: the key holds something else"]
        assert works.committer.pending_bytes == 0


# --- with producers and readers -------------------------------------------------------------------------------------


async def test_a_producer_is_held_by_backpressure_only_and_goes_on_with_room(autojump_clock: MockClock) -> None:
    log, notes, written = Full(), Notes(), [0]
    view = View(log)

    async def producer() -> AsyncIterator[Event]:
        for number in range(1, 101):
            written[0] = number
            yield Event(data=f"{number:09}" + "." * 90)

    async with two_supervisors(view, max_pending_bytes=2_000, observer=notes) as (owner, other):
        other_run = await owner.start(count, 50, 0.1)
        log.full.add("big")
        run = await owner.start(producer, run_id="big")
        async with readers((owner, run.id), (other, run.id), (other, other_run.id)) as (here, there, undisturbed):
            await trio.sleep(20)
            assert 15 <= written[0] <= 22
            assert (here.entries, there.entries) == ([], [])
            assert undisturbed.ended_at == near(5)
            assert (await owner.get(run.id)).status == "running"
            log.full.clear()
        assert [each.seq for each in here.entries] == list(range(1, 102))
        assert here.entries == there.entries == await entries_of(view, run.id)
        assert (await ended(view, run.id)).status == "completed"
        assert set(notes.warnings) == {WARNING}
        assert_nothing_is_left(owner)
        assert_nothing_is_left(other)


@pytest.mark.parametrize("end", ["cancel", "timeout", "silence", "drain", "raise"])
@pytest.mark.parametrize("pages", [1, 2])
async def test_whatever_ends_a_run_ends_it_at_once_although_the_log_is_full(
    autojump_clock: MockClock, end: str, pages: int
) -> None:
    log, said = Full(), pages * PAGE_ENTRIES - 2
    view, witness = View(log), Witness()

    async def producer() -> AsyncIterator[Event]:
        for number in range(1, said + 1):
            yield Event(data=str(number))
        if end == "raise":
            await trio.sleep(5)
            raise ValueError("no")
        with witness.watching():
            await trio.sleep_forever()

    limits: dict[str, Any] = {"timeout": {"timeout": 5}, "silence": {"max_silence": 5}}.get(end, {})
    async with two_supervisors(view) as (owner, other):
        log.has_room = False
        run = await owner.start(producer, run_id="r", **limits)
        async with readers((owner, run.id), (other, run.id)) as (here, there):
            await trio.sleep(5)
            if end == "cancel":
                await other.cancel(run.id)
            elif end == "drain":
                await owner.drain(0)
        assert here.ended_at == near(5)
        assert here.ended_at is not None
        assert there.ended_at is not None
        assert 0 <= there.ended_at - here.ended_at <= (pages - 1) * A_LOOK
        assert here.entries == there.entries == await entries_of(view, run.id)
        record = await ended(view, run.id)
        code = {
            "cancel": "cancelled",
            "timeout": "error TIMEOUT",
            "silence": "error SILENT",
            "drain": "error INTERRUPTED",
            "raise": "error ERROR",
        }[end]
        assert gists(here.entries) == [*map(str, range(1, said + 1)), code, "[DONE]"]
        assert record.status == ("cancelled" if end == "cancel" else "failed")
        if end != "raise":
            assert witness.saw_at == near(5)
        assert_nothing_is_left(owner)


async def test_a_run_that_returns_while_the_log_is_full_is_stored_at_once_and_completed(
    autojump_clock: MockClock,
) -> None:
    log = Full()
    log.has_room = False
    async with open_supervisor(View(log)) as owner:
        run = await owner.start(count, 700, run_id="r")
        assert (await owner.wait(run.id)).status is RunStatus.COMPLETED
        assert trio.current_time() == near(0)
        assert gists(await read(owner, run.id)) == [*map(str, range(1, 701)), "[DONE]"]
        assert_nothing_is_left(owner)


async def test_a_run_that_the_log_refuses_is_given_up_and_ended_as_lost_by_a_reaper(
    autojump_clock: MockClock,
) -> None:
    log, witness, notes = Full(), Witness(), Notes()
    view = View(log)

    async def producer() -> AsyncIterator[Event]:
        yield FIRST
        await trio.sleep(20)
        yield Event(data="refused")
        with witness.watching():
            await trio.sleep_forever()

    async with two_supervisors(view, lease=6.0, observer=notes) as (owner, other):
        run = await owner.start(producer, run_id="bad")
        good = await owner.start(count, 40, 1.0)
        async with readers((owner, run.id), (other, run.id), (owner, good.id)) as (here, there, fine):
            await trio.sleep(1)
            log.refused.add("bad")
            await trio.sleep(20)
            assert (witness.saw, witness.saw_at) == ("log unavailable", near(20))
        for reader in (here, there):
            assert reader.error is None
            assert gists(reader.entries) == ["first", "error RUN_LOST", "[DONE]"]
            assert reader.ended_at is not None
            assert 20 + 2 <= reader.ended_at <= 20 + 6 + 2
        assert gists(fine.entries) == [*map(str, range(1, 41)), "[DONE]"]
        assert fine.ended_at == near(40)
        assert (await ended(view, "bad")).status == "lost"
        assert (await ended(view, good.id)).status == "completed"
        assert [each.id for each in notes.ended] == [good.id]
        assert notes.fenced == []
        assert_nothing_is_left(owner)
        assert_nothing_is_left(other)
