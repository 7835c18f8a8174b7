"""Several batches of one run in one append, and a log without room for some of them.

What follows a batch that is not stored is not stored, and is sent again. A full log takes what ends a run all the same.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import LogUnavailable
from penstock.log import Appended, AppendStatus
from penstock.runs import RunStatus
from penstock.sse import Event
from penstock.supervisor.committer import FULL_PAUSE
from penstock.supervisor.write_buffer import BATCH_BYTES, BATCH_ENTRIES, BATCHES, BufferState
from tests.support.committing import Works, committing, forget, lose_last, shown
from tests.support.logs import CANCELLED, COMPLETED, DONE, FAILED, Unreliable, in_virtual_time, seqs
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
    readers,
    two_supervisors,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from trio.testing import MockClock

    from penstock.log import Batch

APPEND_ENTRIES = BATCHES * BATCH_ENTRIES
"""The most entries of one run in one append."""
KTH = [1, 3]
"""Which batch of several is not stored."""


class Between(Unreliable):
    """A log to which something happens between two batches of one append."""

    def __init__(self) -> None:
        super().__init__()
        self.hooks: dict[str, tuple[int, Callable[[Batch], Appended | None]]] = {}
        """By run: called once, before that batch of the next append (1: the first); what it returns is the reply."""
        self.replies: list[list[AppendStatus]] = []
        """What was said to each append that had a reply."""
        self._nth: dict[str, int] = {}

    async def append(self, batches: list[Batch]) -> list[Appended]:  # type: ignore[override]
        self._nth = {}
        replies = list(await super().append(batches))
        self.replies.append([reply.status for reply in replies])
        return replies

    def _append(self, batch: Batch) -> Appended:
        nth = self._nth[batch.run_id] = self._nth.get(batch.run_id, 0) + 1
        which, hook = self.hooks.get(batch.run_id, (0, None))
        if hook is not None and nth == which:
            del self.hooks[batch.run_id]
            reply = hook(batch)
            if reply is not None:
                return reply
        return super()._append(batch)

    def at(self, nth: int, hook: Callable[[Batch], Appended | None], run_id: str = "r") -> None:
        """Let this happen before the nth batch of the run in the next append that has so many."""
        self.hooks[run_id] = nth, hook


def log_of(works: Works) -> Between:
    assert isinstance(works.log, Between)
    return works.log


def says(status: AppendStatus) -> Callable[[Batch], Appended]:
    return lambda _: Appended(status, words=f"it is {status.name}")


def away(_: Batch) -> Appended:
    """The log can be reached no more; what came before is stored."""
    raise LogUnavailable("away")


async def nothing_is_left(works: Works) -> None:
    committer = works.committer
    await trio.sleep(1)
    assert all(worker.idle for worker in committer.shards)
    assert committer.pending_bytes == 0
    for owner in works.owners.values():
        assert (owner.buffer.size, owner.buffer.entries) == (0, [])
    before = works.log.calls.copy()
    await trio.sleep(10 * FULL_PAUSE)
    assert works.log.calls == before


async def is_whole(works: Works, run_id: str = "r") -> None:
    buffer = works.owners[run_id].buffer
    assert await works.stored(run_id) == seqs(shown(buffer.tail)) == list(range(1, buffer.seq + 1))
    page = await works.log.read(run_id, 0, max_entries=100_000, max_bytes=2**40)
    assert list(page.entries) == list(shown(buffer.tail))


async def end(works: Works, run_id: str = "r") -> None:
    works.committer.close(works.owners[run_id].buffer, [DONE], COMPLETED)
    await works.settled(run_id)
    await is_whole(works, run_id)


# --- one that is not stored -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kth", [*KTH, BATCHES])
async def test_after_a_batch_without_room_the_rest_waits_and_follows(autojump_clock: MockClock, kth: int) -> None:
    async with committing(Between()) as works:
        buffer = await works.run()
        log_of(works).at(kth, says(AppendStatus.FULL))
        works.put(buffer, APPEND_ENTRIES + 7)
        before = (kth - 1) * BATCH_ENTRIES
        await trio.sleep(FULL_PAUSE / 2)
        works.put(buffer, 3)
        await trio.sleep(FULL_PAUSE / 4)
        assert works.log.calls["append"] == 1
        assert await works.stored() == seqs(shown(buffer.tail)) == list(range(1, before + 1))
        assert buffer.stored == before
        assert seqs(buffer.entries) == list(range(before + 1, APPEND_ENTRIES + 11))
        assert works.committer.pending_bytes == buffer.size == sum(len(each.wire) for each in buffer.entries)
        await works.committer.flush(buffer)
        assert works.sent()[1][0][0] == before + 1
        assert trio.current_time() - works.start == pytest.approx(FULL_PAUSE, abs=0.1)
        assert works.warnings == ["cannot commit: it is FULL; trying again"]
        await end(works)
        assert works.owners["r"].told == ["settled"]
        await nothing_is_left(works)


@pytest.mark.parametrize("kth", KTH)
@pytest.mark.parametrize("loss", ["some", "all"])
async def test_what_is_lost_between_batches_is_restored_first(autojump_clock: MockClock, kth: int, loss: str) -> None:
    async with committing(Between()) as works:
        buffer = await works.run()
        works.put(buffer, 50)
        await works.committer.flush(buffer)
        before = 50 + (kth - 1) * BATCH_ENTRIES

        def lose(_: Batch) -> None:
            if loss == "all":
                forget(works.log, "r")
            else:
                lose_last(works.log, "r", 30)

        log_of(works).at(kth, lose)
        works.put(buffer, APPEND_ENTRIES + 7)
        await works.committer.flush(buffer)
        status = AppendStatus.GONE if loss == "all" else AppendStatus.HOLE
        assert log_of(works).replies[1] == [AppendStatus.OK] * (kth - 1) + [status] * (BATCHES - kth + 1)
        again = 1 if loss == "all" else before - 30 + 1
        assert works.sent()[2][0][0] == again
        assert works.warnings == [f"the log had lost entries of run r; going on from entry {again}"]
        await end(works)
        assert works.owners["r"].told == ["settled"]
        await nothing_is_left(works)


@pytest.mark.parametrize("kth", KTH)
@pytest.mark.parametrize("refusal", [AppendStatus.FENCED, AppendStatus.ENDED, AppendStatus.REFUSED])
async def test_a_run_whose_nth_batch_is_refused_is_given_up_after_what_is_stored_and_harms_no_other(
    autojump_clock: MockClock, refusal: AppendStatus, kth: int
) -> None:
    async with committing(Between()) as works:
        boxes = [await works.run(run_id) for run_id in ("before", "r", "after")]

        def refuse(_: Batch) -> Appended | None:
            stored = works.log._runs["r"]
            if refusal is AppendStatus.FENCED:
                stored.lease = replace(stored.lease, epoch="another's")
            elif refusal is AppendStatus.ENDED:
                stored.run = stored.run.ended(FAILED, seq=stored.ring.last, at=1.0)
            else:
                stored.lease = replace(stored.lease, epoch="another's")
                return Appended(AppendStatus.REFUSED, words="the key holds something else")
            return None

        log_of(works).at(kth, refuse)
        for buffer in boxes:
            works.put(buffer, APPEND_ENTRIES + 7)
        told = "cannot be stored" if refusal is AppendStatus.REFUSED else "lost"
        await works.settled("r", told)
        assert log_of(works).replies[0][BATCHES : 2 * BATCHES][kth - 1] is refusal
        for run_id in ("before", "after"):
            await end(works, run_id)
            assert works.owners[run_id].told == ["settled"]
        assert works.owners["r"].told == [told]
        buffer = boxes[1]
        assert buffer.state is BufferState.ABANDONED
        stored = list(range(1, (kth - 1) * BATCH_ENTRIES + 1))
        assert seqs(works.log._runs["r"].ring.after(0, max_entries=100_000, max_bytes=2**40)) == stored
        assert (seqs(shown(buffer.tail)) if stored else list(shown(buffer.tail))) == stored
        assert len(works.sent()) == 1
        await nothing_is_left(works)


@pytest.mark.parametrize("kth", [*KTH, BATCHES])
async def test_a_completion_that_is_refused_as_the_last_of_several_gives_way_to_the_other_ending(
    autojump_clock: MockClock, kth: int
) -> None:
    async with committing(Between()) as works:
        buffer = await works.run()

        def cancel(_: Batch) -> None:
            stored = works.log._runs["r"]
            stored.cancel_requested, stored.run = True, replace(stored.run, cancel_reason="stop")

        log_of(works).at(kth, cancel)
        works.put(buffer, (kth - 1) * BATCH_ENTRIES + 5)
        works.committer.close(buffer, [DONE], COMPLETED)
        await works.settled()
        assert log_of(works).replies[0] == [AppendStatus.OK] * (kth - 1) + [AppendStatus.CANCELLED]
        assert works.sent()[1] == [((kth - 1) * BATCH_ENTRIES + 1, (kth - 1) * BATCH_ENTRIES + 7)]
        assert works.owners["r"].told == ["refused: stop", "settled"]
        assert (await works.log.get("r")).status is RunStatus.CANCELLED
        await is_whole(works)
        await nothing_is_left(works)


@pytest.mark.parametrize("kth", [*KTH, BATCHES])
async def test_an_append_that_fails_half_way_is_sent_again_as_it_was(autojump_clock: MockClock, kth: int) -> None:
    async with committing(Between()) as works:
        buffer, other = await works.run(), await works.run("other")
        log_of(works).at(kth, away)
        works.put(buffer, APPEND_ENTRIES + 7)
        works.put(other, 2 * BATCH_ENTRIES)
        await trio.sleep(0.01)
        before = (kth - 1) * BATCH_ENTRIES
        assert await works.stored() == list(range(1, before + 1))
        assert list(shown(buffer.tail)) == list(shown(other.tail)) == []
        works.put(buffer, 300)
        works.put(other, 1)
        await works.committer.flush(buffer)
        assert works.log.appended[0][1] == works.log.appended[1][1]
        assert works.sent()[2] == [(1001, 1200), (1201, 1307)]
        for run_id in ("r", "other"):
            await end(works, run_id)
            assert works.owners[run_id].told == ["settled"]
        await nothing_is_left(works)


async def test_a_cancel_on_record_is_told_with_the_first_of_several_batches(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer, owner = await works.run(), works.owners["r"]
        stood: list[int] = []
        note = owner.note

        def noting(line: str) -> None:
            stood.append(buffer.stored)
            note(line)

        owner.note = noting  # type: ignore[method-assign]
        await works.log.request_cancel("r", "stop")
        works.put(buffer, 2 * BATCH_ENTRIES + 1)
        await works.committer.flush(buffer)
        assert set(owner.told) == {"cancel: stop"}
        assert stood[0] == BATCH_ENTRIES
        assert works.log.calls["append"] == 1
        await is_whole(works)
        await nothing_is_left(works)


async def test_an_ending_for_a_cancel_between_two_replies_follows_all_that_was_sent(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer, owner = await works.run(), works.owners["r"]

        def end_it(reason: str | None) -> None:
            if buffer.state is BufferState.OPEN:
                owner.note(f"cancel: {reason}")
                works.committer.close(buffer, [DONE], CANCELLED)

        owner.on_cancel_recorded = end_it  # type: ignore[method-assign]
        await works.log.request_cancel("r", "stop")
        works.put(buffer, 2 * BATCH_ENTRIES + 1)
        await works.settled()
        assert works.sent() == [[(1, 200), (201, 400), (401, 401)], [(402, 402)]]
        assert owner.told == ["cancel: stop", "settled"]
        await is_whole(works)
        await nothing_is_left(works)


def in_order(sent: list[tuple[str, int, int]], most: int = BATCHES) -> None:
    """The batches of each run in an append stand together, follow each other, and are at most so many."""
    runs = [run_id for run_id, _, _ in sent]
    assert runs == [run_id for run_id in dict.fromkeys(runs) for _ in range(runs.count(run_id))]
    for (one, _, last), (other, first, _) in pairwise(sent):
        assert one != other or first == last + 1
    assert all(runs.count(run_id) <= most for run_id in runs)


async def test_each_of_many_runs_gets_the_replies_to_its_own_batches(autojump_clock: MockClock) -> None:
    async with committing(Between()) as works:
        boxes = {
            run_id: await works.run(run_id) for run_id in ("a", "full", "b", "fenced", "c", "lossy", "d", "refused")
        }
        log_of(works).at(2, says(AppendStatus.FULL), "full")
        log_of(works).at(3, says(AppendStatus.FENCED), "fenced")
        log_of(works).at(2, lambda _: lose_last(works.log, "lossy", 5), "lossy")
        log_of(works).at(1, says(AppendStatus.REFUSED), "refused")
        for number, buffer in enumerate(boxes.values()):
            works.put(buffer, 3 * BATCH_ENTRIES + number)
        await trio.sleep(FULL_PAUSE / 2)
        assert {run_id: buffer.stored for run_id, buffer in boxes.items()} == {
            "a": 600,
            "full": 200,
            "b": 602,
            "fenced": 400,
            "c": 604,
            "lossy": 605,
            "d": 606,
            "refused": 0,
        }
        for run_id in ("a", "b", "c", "d", "full", "lossy"):
            await end(works, run_id)
            assert works.owners[run_id].told == ["settled"]
        assert works.owners["fenced"].told == ["lost"]
        assert works.owners["refused"].told == ["cannot be stored"]
        await nothing_is_left(works)


# --- everything at once ---------------------------------------------------------------------------------------------

happenings = st.lists(
    st.sampled_from(["", "", "", "full", "hole", "gone", "lose", "forget", "away", "reply", "cancel"]), max_size=60
)
steps = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 30), st.sampled_from([0.0, 0.01, 0.6])), max_size=12)


class Eventful(Unreliable):
    """A log to which, at each batch, the next of these things happens."""

    def __init__(self, happenings: list[str]) -> None:
        super().__init__()
        self.happenings = happenings
        self.saw: dict[tuple[str, int], bytes] = {}

    def _append(self, batch: Batch) -> Appended:
        for each in batch.entries:  # an entry is the same whenever it is sent, but for those of an ending
            if batch.ending is None:
                assert self.saw.setdefault((batch.run_id, each.seq), each.wire) == each.wire
        happening = self.happenings.pop(0) if self.happenings else ""
        stored = self._runs.get(batch.run_id)
        if happening == "away":
            raise LogUnavailable("away")
        if happening == "reply":
            self.lost_replies = 1
        elif stored is not None and not stored.run.status.terminal:
            is_new = batch.entries[0].seq > stored.ring.last
            if happening in {"full", "hole", "gone"} and is_new:  # no log says so of what it has
                return Appended(AppendStatus[happening.upper()], words="so it is")
            if happening == "lose":
                lose_last(self, batch.run_id, 4)
            elif happening == "forget":
                forget(self, batch.run_id)
            elif happening == "cancel":
                stored.cancel_requested, stored.run = True, replace(stored.run, cancel_reason="stop")
        return super()._append(batch)


@settings(max_examples=25, deadline=None)
@given(happenings, steps, st.sampled_from([0.0, 0.01]))
def test_whatever_happens_between_batches_each_run_is_stored_once_whole_and_in_order(
    happenings: list[str], steps: list[tuple[int, int, float]], latency: float
) -> None:
    async def main() -> None:
        async with committing(Eventful(list(happenings))) as works:
            works.log.latency = latency
            boxes = [await works.run(f"r{number}") for number in range(2)]
            for which, count, pause in steps:
                works.put(boxes[which], count)
                await trio.sleep(pause)
            for buffer in boxes:
                works.committer.close(buffer, [DONE], COMPLETED)
            for buffer in boxes:
                await works.settled(buffer.run_id)
            for buffer in boxes:
                await is_whole(works, buffer.run_id)
                told = works.owners[buffer.run_id].told
                assert told.count("settled") == 1
                assert {line.split(":")[0] for line in told} <= {"settled", "cancel", "refused"}
                refused = any(line.startswith("refused") for line in told)
                status = (await works.log.get(buffer.run_id)).status
                assert status is (RunStatus.CANCELLED if refused else RunStatus.COMPLETED)
            for _, sent in works.log.appended:
                in_order(sent, most=3)
            await nothing_is_left(works)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penstock.supervisor.write_buffer.BATCH_ENTRIES", 4)
        patch.setattr("penstock.supervisor.write_buffer.BATCHES", 3)
        in_virtual_time(main)


WARNING = "cannot commit: no room; trying again"


class FullLog(Unreliable):
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
        asked = [when for asked, when in self.asked if asked == run_id]
        return [round(after - before, 9) for before, after in pairwise(asked)]  # what is left is no time at all


def full_log(works: Works) -> FullLog:
    assert isinstance(works.log, FullLog)
    return works.log


async def test_a_run_without_room_is_stored_whole_once_there_is_some(autojump_clock: MockClock) -> None:
    async with committing(FullLog()) as works:
        buffer = await works.run()
        works.put(buffer, 5)
        await works.committer.flush(buffer)
        full_log(works).has_room = False
        for _ in range(100):
            works.put(buffer, 3, 100)
            await trio.sleep(0.1)
        assert await works.stored() == seqs(shown(buffer.tail)) == [1, 2, 3, 4, 5]
        assert works.committer.pending_bytes == buffer.size == 300 * 100
        full_log(works).has_room = True
        await trio.sleep(FULL_PAUSE + 0.1)
        assert await works.stored() == seqs(shown(buffer.tail)) == list(range(1, 306))
        assert works.committer.pending_bytes == buffer.size == 0
        works.put(buffer)
        await works.committer.flush(buffer)
        works.committer.close(buffer, [DONE], COMPLETED)
        await works.settled()
        assert works.owners["r"].told == ["settled"]


@pytest.mark.parametrize("flush_interval", [0.0, 0.2])
async def test_a_full_log_is_asked_after_pauses_alone(autojump_clock: MockClock, flush_interval: float) -> None:
    async with committing(FullLog(), flush_interval=flush_interval, flush_size=2) as works:
        buffer = await works.run()
        full_log(works).has_room = False
        for _ in range(950):
            works.put(buffer)
            await trio.sleep(0.01)
        pauses = full_log(works).pauses("r")
        assert 10 / (FULL_PAUSE + flush_interval) - 2 <= len(pauses) <= 10 / FULL_PAUSE
        assert min(pauses) >= FULL_PAUSE
        assert works.warnings == [WARNING]


async def test_a_write_while_a_full_log_is_asked_does_not_repeat_the_question(autojump_clock: MockClock) -> None:
    async with committing(FullLog()) as works:
        buffer = await works.run()
        full_log(works).has_room = False
        works.log.latency = 0.1
        for _ in range(100):
            works.put(buffer)
            await trio.sleep(0.05)
        assert min(full_log(works).pauses("r")) >= FULL_PAUSE


async def test_an_ending_that_comes_while_a_full_log_is_asked_is_stored_at_once(autojump_clock: MockClock) -> None:
    async with committing(FullLog()) as works:
        buffer = await works.run()
        full_log(works).has_room = False
        works.log.latency = 0.1
        works.put(buffer)
        await trio.sleep(0.05)
        works.committer.close(buffer, [DONE], COMPLETED)
        await works.settled()
        assert trio.current_time() - works.start == near(0.2)
        assert await works.stored() == [1, 2]


async def test_a_log_with_room_for_some_leaves_none_behind(autojump_clock: MockClock) -> None:
    async with committing(FullLog()) as works:
        boxes = [await works.run(f"r{number}") for number in range(6)]
        full_log(works).has_room = False
        for buffer in boxes:
            works.put(buffer, 3)
        await trio.sleep(2)
        full_log(works).has_room = True
        full_log(works).full |= {"r1", "r4"}
        await trio.sleep(2)
        stored = [works.log._runs[buffer.run_id].ring.last for buffer in boxes]
        assert stored == [3, 0, 3, 3, 0, 3]
        full_log(works).full.clear()
        await trio.sleep(FULL_PAUSE + 0.1)
        assert [works.log._runs[buffer.run_id].ring.last for buffer in boxes] == [3] * 6
        appends = len(works.log.appended)
        await trio.sleep(10)
        assert len(works.log.appended) == appends


@pytest.mark.parametrize(
    "pending, size, asked_before",
    [(0, 0, False), (1, 0, True), (2 * APPEND_ENTRIES + 5, 0, True), (2 * BATCHES + 1, BATCH_BYTES, False)],
)
async def test_an_ending_is_stored_at_once_with_all_that_comes_before_it(
    autojump_clock: MockClock, pending: int, size: int, *, asked_before: bool
) -> None:
    async with committing(FullLog()) as works:
        buffer = await works.run()
        works.put(buffer, 2)
        await works.committer.flush(buffer)
        full_log(works).has_room = False
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
async def test_an_ending_without_room_is_asked_for_again(autojump_clock: MockClock, pending: int) -> None:
    async with committing(FullLog()) as works:
        buffer = await works.run()
        full_log(works).has_room = full_log(works).takes_ends = False
        works.put(buffer, pending)
        works.committer.close(buffer, [DONE], COMPLETED)
        await trio.sleep(10)
        assert min(full_log(works).pauses("r")) >= FULL_PAUSE
        assert works.owners["r"].told == []
        full_log(works).takes_ends = True
        await trio.sleep(FULL_PAUSE + 0.1)
        assert works.owners["r"].told == ["settled"]
        assert await works.stored() == list(range(1, pending + 2))


async def test_a_run_that_is_given_up_while_it_waits_is_asked_for_no_more(autojump_clock: MockClock) -> None:
    async with committing(FullLog()) as works:
        buffer = await works.run()
        full_log(works).has_room = False
        works.put(buffer, 3)
        await trio.sleep(0.1)
        works.committer.abandon(buffer)
        full_log(works).asked.clear()
        await trio.sleep(10)
        assert full_log(works).asked == []
        assert works.committer.pending_bytes == 0


async def test_a_producer_is_held_by_backpressure_only_and_goes_on_with_room(autojump_clock: MockClock) -> None:
    log, notes, written = FullLog(), Notes(), [0]
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


async def test_a_run_that_the_log_refuses_is_given_up_and_ended_as_lost_by_a_reaper(autojump_clock: MockClock) -> None:
    log, witness, notes = FullLog(), Witness(), Notes()
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
        assert notes.warnings == ["cannot store run bad: the key holds something else"]
        assert_nothing_is_left(owner)
        assert_nothing_is_left(other)
