"""A log that has lost something of a run is given it again by its owner, or told that nobody has it any more."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.errors import CursorExpired, LogUnavailable
from penstock.log import Appended, AppendStatus
from penstock.runs import RunStatus
from penstock.sse import Event
from penstock.supervisor import open_supervisor
from penstock.supervisor.execution import Producer
from penstock.supervisor.write_buffer import BATCH_ENTRIES, BATCHES, BufferState
from tests.support.committing import DIVERGED, Works, committing, forget, lose_last, shown
from tests.support.logs import COMPLETED, DONE, FAILED, LEASE, Unreliable, batch, in_virtual_time, record, seqs
from tests.support.supervising import (
    Notes,
    View,
    Witness,
    assert_nothing_is_left,
    come_back,
    count,
    ended,
    entries_of,
    gists,
    go_away,
    near,
    read,
    readers,
    two_supervisors,
    unavailable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

    from penstock.log import Lease
    from penstock.log.memory import MemoryLog
    from penstock.runs import Run

ALL = 1_000_000
APPEND_ENTRIES = BATCHES * BATCH_ENTRIES
"""The most entries of one run in one append."""


async def finish(works: Works, *run_ids: str) -> None:
    for run_id in run_ids or tuple(works.owners):
        works.committer.close(works.owners[run_id].buffer, [DONE], COMPLETED)
    for run_id in run_ids or tuple(works.owners):
        await works.settled(run_id)
        buffer = works.owners[run_id].buffer
        assert await works.stored(run_id) == list(range(1, buffer.seq + 1))
        assert works.owners[run_id].told == ["settled"]
        assert (buffer.size, buffer.stored, buffer.entries) == (0, buffer.seq, [])
    assert works.committer.pending_bytes == 0


# --- given again ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "before, after", [(1, 1), (BATCH_ENTRIES, 2), (2 * APPEND_ENTRIES + 50, 3 * BATCH_ENTRIES), (3, 3 * APPEND_ENTRIES)]
)
async def test_a_log_that_lost_a_run_gets_all_of_it_again(autojump_clock: MockClock, before: int, after: int) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.put(buffer, before)
        await works.committer.flush(buffer)
        forget(works.log, "r")
        works.put(buffer, after)
        await works.committer.flush(buffer)
        assert await works.stored() == seqs(shown(buffer.tail)) == list(range(1, before + after + 1))
        assert works.warnings == ["the log had lost entries of run r; going on from entry 1"]
        await finish(works)


@pytest.mark.parametrize("lost", [1, BATCH_ENTRIES + 10, APPEND_ENTRIES + 10])
async def test_a_log_that_lost_the_last_entries_of_a_run_gets_them_again(autojump_clock: MockClock, lost: int) -> None:
    before = 2 * APPEND_ENTRIES
    async with committing() as works:
        buffer = await works.run()
        works.put(buffer, before)
        await works.committer.flush(buffer)
        kept = works.log._runs["r"].ring.after(0, max_entries=ALL, max_bytes=ALL)
        lose_last(works.log, "r", lost)
        works.put(buffer, 5)
        await works.committer.flush(buffer)
        assert await works.stored() == list(range(1, before + 6))
        assert works.log._runs["r"].ring.after(0, max_entries=before, max_bytes=ALL) == kept
        assert works.warnings == [f"the log had lost entries of run r; going on from entry {before - lost + 1}"]
        await finish(works)


@pytest.mark.parametrize(
    "before, pending",
    [(0, 0), (1, 0), (0, 1), (BATCH_ENTRIES, BATCH_ENTRIES + 1), (APPEND_ENTRIES + 1, APPEND_ENTRIES)],
)
async def test_an_ending_that_was_pending_comes_last_in_the_log_that_had_lost_the_run(
    autojump_clock: MockClock, before: int, pending: int
) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.put(buffer, before)
        await works.committer.flush(buffer)
        forget(works.log, "r")
        works.put(buffer, pending)
        await finish(works)
        assert (await works.log.get("r")).status is RunStatus.COMPLETED
        assert buffer.tail.ended


@pytest.mark.parametrize("lost", [1, 4, 6])
async def test_an_ending_lost_after_its_lost_reply_is_stored_once(autojump_clock: MockClock, lost: int) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.put(buffer, 2)
        await works.committer.flush(buffer)
        works.put(buffer, 3)
        works.log.lost_replies = 1
        works.committer.close(buffer, [DONE], COMPLETED)
        await trio.sleep(0.01)
        assert (await works.log.get("r")).status is RunStatus.COMPLETED
        lose_last(works.log, "r", lost)
        await works.settled()
        assert await works.stored() == list(range(1, 7))
        assert works.owners["r"].told == ["settled"]
        assert works.committer.pending_bytes == 0


@pytest.mark.parametrize("flush_interval", [0.0, 100.0])
async def test_a_run_that_has_nothing_to_say_is_given_again_at_once_when_somebody_finds_it_gone(
    autojump_clock: MockClock, flush_interval: float
) -> None:
    async with committing(flush_interval=flush_interval) as works:
        buffer = await works.run()
        works.put(buffer, 5)
        await works.committer.flush(buffer)
        forget(works.log, "r")
        began = trio.current_time()
        works.committer.restore(buffer)
        await trio.sleep(0.1)
        assert await works.stored() == [1, 2, 3, 4, 5]
        assert works.committer.pending_bytes == 0
        assert trio.current_time() == near(began)
        await finish(works)


async def test_a_run_that_had_said_nothing_yet_is_there_again(autojump_clock: MockClock) -> None:
    async with committing(tail_entries=1) as works:
        buffer = await works.run()
        forget(works.log, "r")
        works.committer.restore(buffer)
        await trio.sleep(0.1)
        assert (await works.log.get("r")).seq == 0
        forget(works.log, "r")
        works.put(buffer)
        await finish(works)


async def test_a_run_that_is_found_gone_although_it_is_there_stays_as_it_is(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.put(buffer, 5)
        await works.committer.flush(buffer)
        appends = len(works.log.appended)
        works.committer.restore(buffer)
        await trio.sleep(1)
        assert len(works.log.appended) == appends
        assert buffer.size == works.committer.pending_bytes == 0
        await finish(works)


async def test_the_record_that_is_put_back_is_that_of_the_start_and_has_the_lease(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.put(buffer, 2)
        await works.committer.flush(buffer)
        was = await works.log.get("r")
        forget(works.log, "r")
        works.put(buffer)
        await works.committer.flush(buffer)
        run = await works.log.get("r")
        assert (run.id, run.producer, run.metadata, run.status) == (was.id, was.producer, was.metadata, was.status)
        assert works.log._runs["r"].lease == LEASE
        assert await works.log.renew("owner", {"r": "epoch"}, 30) == {"r": AppendStatus.OK}


# --- not at hand any more -------------------------------------------------------------------------------------------


async def test_a_loss_that_the_tail_covers_to_the_entry_is_made_good(autojump_clock: MockClock) -> None:
    async with committing(tail_entries=5) as works:
        buffer = await works.run()
        works.put(buffer, 20)
        await works.committer.flush(buffer)
        lose_last(works.log, "r", 5)
        works.put(buffer)
        await finish(works)


@pytest.mark.parametrize("lost, pending", [(6, 0), (19, 3), (20, 0), (20, APPEND_ENTRIES + 7)])
async def test_a_loss_beyond_the_tail_ends_the_run(autojump_clock: MockClock, lost: int, pending: int) -> None:
    async with committing(tail_entries=5) as works:
        buffer = await works.run()
        works.put(buffer, 20)
        await works.committer.flush(buffer)
        if lost == 20:
            forget(works.log, "r")
        else:
            lose_last(works.log, "r", lost)
        works.put(buffer, pending)
        works.committer.restore(buffer)
        await works.settled()
        assert works.owners["r"].told == ["diverged", "settled"]
        await is_what_is_left(works, first=16, last=22 + pending)


async def is_what_is_left(works: Works, *, first: int, last: int) -> None:
    page = await works.log.read("r", first - 1)
    assert page.oldest_seq == first
    assert [each.seq for each in (await works.log.read("r", first - 1, max_entries=ALL)).entries] == [
        *range(first, last + 1)
    ]
    assert (page.run.status, page.run.error, page.run.seq) == (RunStatus.FAILED, DIVERGED.error, last)
    buffer = works.owners["r"].buffer
    assert (works.committer.pending_bytes, buffer.size, buffer.entries) == (0, 0, [])
    (newest,) = (await works.log.read("r", last - 1)).entries
    assert (newest.data, newest.terminal) == (DONE, True)


@pytest.mark.parametrize("loss, first", [(0, 1), (1, APPEND_ENTRIES + 1), (APPEND_ENTRIES, APPEND_ENTRIES + 1)])
async def test_entries_that_are_pending_again_are_kept_although_the_tail_has_given_them_up(
    autojump_clock: MockClock, loss: int, first: int
) -> None:
    async with committing() as works:
        buffer = await works.run()
        works.put(buffer, 3 * APPEND_ENTRIES)
        await works.committer.flush(buffer)
        forget(works.log, "r")

        async def shrink(call: str) -> None:
            await trio.lowlevel.checkpoint()
            if "r" in works.log._runs and works.log._runs["r"].ring.last == APPEND_ENTRIES:
                works.log.after = None
                buffer.tail.trim(1_000)
                lose_last(works.log, "r", loss)
                works.committer.restore(buffer)

        works.log.after = shrink
        works.put(buffer, 2)
        await works.committer.flush(buffer)
        assert works.log.after is None
        if loss:
            await works.settled()
            assert works.owners["r"].told == ["diverged", "settled"]
            await is_what_is_left(works, first=first, last=3 * APPEND_ENTRIES + 4)
        else:
            await finish(works)


# --- not to be given back -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("refusal", [AppendStatus.FENCED, AppendStatus.ENDED])
async def test_a_run_that_is_anothers_or_over_is_fenced(autojump_clock: MockClock, refusal: AppendStatus) -> None:
    async with committing() as works:
        buffer, other = await works.run(), await works.run("other")
        works.put(buffer, 5, 100)
        works.put(other, 5)
        await works.committer.flush(buffer)
        forget(works.log, "r")
        fenced = refusal is AppendStatus.FENCED
        await works.log.start(record("r"), replace(LEASE, epoch="another's") if fenced else LEASE)
        if not fenced:
            await works.log.append([batch(1, 2, FAILED)])
        there = works.log._runs["r"].ring.last
        works.committer.restore(buffer)
        works.put(buffer, 3, 100)
        works.put(other, 3)
        await works.settled(told="lost")
        assert (buffer.state, buffer.size, buffer.entries) == (BufferState.ABANDONED, 0, [])
        assert works.owners["r"].told == ["lost"]
        assert works.log._runs["r"].ring.last == there
        await finish(works, "other")


class Forgetful(Unreliable):
    """An unreliable log whose `restore` is counted, and can be away, too."""

    def __init__(self) -> None:
        super().__init__()
        self.restores: list[float] = []
        self.cannot_restore = 0
        self.full = False

    async def restore(self, run: Run, lease: Lease, oldest: int) -> Appended:
        self.restores.append(trio.current_time())
        await self._arrive("restore")
        if self.cannot_restore:
            self.cannot_restore -= 1
            raise LogUnavailable("away")
        if self.full:
            return Appended(AppendStatus.FULL, words="no room")
        reply = await super().restore(run, lease, oldest)
        await self._leave("restore")
        return reply


async def test_a_log_that_is_away_is_given_what_it_had_lost_when_it_is_back(autojump_clock: MockClock) -> None:
    log = Forgetful()
    async with committing(log) as works:
        buffer = await works.run()
        works.put(buffer, 5)
        await works.committer.flush(buffer)
        forget(log, "r")
        log.cannot_restore = 4
        works.put(buffer, 5)
        await works.committer.flush(buffer)
        assert len(log.restores) == 5
        assert works.warnings[0] == "cannot restore run r: away; trying again"
        log.away = True
        works.put(await works.run("other"))
        await trio.sleep(1)
        works.committer.restore(buffer)  # it waits with the shard's next append
        await trio.sleep(5)
        assert len(log.restores) == 5
        log.away = False
        await finish(works)
        assert len(log.restores) == 6


async def test_a_full_log_is_asked_later_whether_it_takes_back_what_it_had_lost(autojump_clock: MockClock) -> None:
    log = Forgetful()
    async with committing(log) as works:
        buffer = await works.run()
        works.put(buffer, 5)
        await works.committer.flush(buffer)
        forget(log, "r")
        log.full = True
        works.put(buffer, 5)
        await trio.sleep(10)
        assert 15 <= len(log.restores) <= 21
        assert buffer.size == works.committer.pending_bytes > 0
        log.full = False
        await works.committer.flush(buffer)
        await finish(works)


@pytest.mark.parametrize("when", ["during", "before"])
async def test_a_run_that_is_given_up_meanwhile_is_not_given_again(autojump_clock: MockClock, when: str) -> None:
    log = Forgetful()
    async with committing(log) as works:
        buffer = await works.run()
        works.put(buffer, 5, 100)
        await works.committer.flush(buffer)
        forget(log, "r")
        log.latency = 1.0
        if when == "before":
            works.committer.restore(buffer)
            works.committer.drop(buffer)
        else:
            works.committer.restore(buffer)
            await trio.sleep(0.5)
            works.committer.drop(buffer)
        await trio.sleep(5)
        assert (works.committer.pending_bytes, buffer.size, buffer.entries) == (0, 0, [])
        assert len(log.restores) == (when == "during")
        assert works.warnings == []


steps = st.lists(
    st.tuples(
        st.sampled_from(["put", "put", "put", "sleep", "away", "back", "reply", "forget", "lose", "find", "end"]),
        st.integers(0, 2),
        st.integers(1, 260),
    ),
    max_size=40,
)


@settings(max_examples=20, deadline=None)
@given(steps, st.sampled_from([0.0, 0.01, 0.7]), st.sampled_from([0.0, 0.3]))
def test_whatever_is_lost_each_run_is_in_the_log_once_whole_and_in_order(
    steps: list[tuple[str, int, int]], latency: float, flush_interval: float
) -> None:
    async def main() -> None:
        log = Forgetful()
        async with committing(log, flush_interval=flush_interval, flush_size=50) as works:
            log.latency = latency
            boxes = [await works.run(f"r{number}") for number in range(3)]
            for step, which, amount in steps:
                await take(works, step, f"r{which}", amount)
            log.away = False
            log.lost_replies = 0
            for buffer in boxes:
                if buffer.state is BufferState.OPEN:
                    works.committer.close(buffer, [DONE], COMPLETED)
            for buffer in boxes:
                await works.settled(buffer.run_id)
                assert seqs(shown(buffer.tail)) == list(range(1, buffer.seq + 1))
                assert works.owners[buffer.run_id].told == ["settled"]
                assert await works.stored(buffer.run_id) == list(range(1, buffer.seq + 1))
                assert list(shown(buffer.tail)) == await everything(log, buffer.run_id)
            assert works.committer.pending_bytes == 0

    in_virtual_time(main)


async def everything(log: MemoryLog, run_id: str) -> list[object]:
    return list((await log.read(run_id, 0, max_entries=ALL, max_bytes=ALL)).entries)


async def take(works: Works, step: str, run_id: str, amount: int) -> None:
    log = works.log
    buffer = works.owners[run_id].buffer
    if step == "sleep":
        await trio.sleep(amount / 100)
    elif step in {"away", "back"}:
        log.away = step == "away"
    elif step == "reply":
        log.lost_replies = amount % 3
    elif step in {"forget", "lose", "find"}:
        if "settled" not in works.owners[run_id].told:
            lose(works, step, run_id, amount)
    elif buffer.state is BufferState.OPEN:
        if step == "end":
            works.committer.close(buffer, [DONE], COMPLETED)
        else:
            works.put(buffer, amount)


def lose(works: Works, step: str, run_id: str, amount: int) -> None:
    """Let the log lose something of a run, or somebody find that it is gone."""
    if step == "find":
        works.committer.restore(works.owners[run_id].buffer)
        return
    stored = works.log._runs.get(run_id)
    if stored is not None and not stored.run.status.terminal:  # of what is lost after the end nobody hears
        if step == "forget":
            forget(works.log, run_id)
        else:
            lose_last(works.log, run_id, amount)


# --- with producers and readers -------------------------------------------------------------------------------------

LEASE_SECONDS = 6.0


def numbers(upto: int) -> list[str]:
    return [*map(str, range(1, upto + 1)), "[DONE]"]


@pytest.mark.parametrize("lost, times", [(1, 1), (7, 4), (ALL, 4)])
async def test_readers_here_and_elsewhere_see_every_entry_of_a_run_that_was_lost_once(
    autojump_clock: MockClock, lost: int, times: int
) -> None:
    view, notes = View(), Notes()
    async with two_supervisors(view, observer=notes) as (owner, other):
        run = await owner.start(count, 100, 0.1)
        async with readers((owner, run.id), (other, run.id)) as (here, there):
            for _ in range(times):
                await trio.sleep(2.05)
                if lost == ALL:
                    forget(view.log, run.id)
                else:
                    lose_last(view.log, run.id, lost)
            await trio.sleep(0.5)
            late = [await read(supervisor, run.id, 10) for supervisor in (owner, other)]
        assert gists(here.entries) == gists(there.entries) == numbers(100)
        assert [gists(each) for each in late] == [numbers(100)[10:]] * 2
        assert here.entries == there.entries == await entries_of(view, run.id)
        assert (await ended(view, run.id)).status == "completed"
        assert (notes.errors, notes.fenced) == ([], [])
        assert len(notes.warnings) == times
        assert_nothing_is_left(owner)
        assert_nothing_is_left(other)


async def test_all_runs_of_a_log_that_was_started_anew_go_on_where_they_were(autojump_clock: MockClock) -> None:
    view = View()
    async with two_supervisors(view) as (owner, other):
        runs = [await (owner, other)[number % 2].start(count, 40 + number, 0.1) for number in range(10)]
        async with readers(*((supervisor, run.id) for run in runs for supervisor in (owner, other))) as following:
            await trio.sleep(2)
            go_away(view)
            await trio.sleep(3)
            forget(view.log)
            come_back(view)
        for number, run in enumerate(runs):
            for reader in following[2 * number : 2 * number + 2]:
                assert reader.error is None
                assert gists(reader.entries) == numbers(40 + number)
            assert (await ended(view, run.id)).status == "completed"


async def test_a_silent_run_is_given_again_when_its_renewal_finds_it_gone(autojump_clock: MockClock) -> None:
    view, witness = View(), Witness()
    async with two_supervisors(view, lease=LEASE_SECONDS) as (owner, other):
        run = await owner.start(witness.waits)
        async with readers((owner, run.id), (other, run.id)) as (here, there):
            await trio.sleep(20.5)
            forget(view.log, run.id)
            await trio.sleep(LEASE_SECONDS / 3)
            assert gists(await entries_of(view, run.id)) == ["first"]
            assert (await owner.get(run.id)).status == "running"
            await trio.sleep(5 * LEASE_SECONDS)
            assert not witness.left
            await other.cancel(run.id, "enough")
        assert witness.saw == "run cancelled: enough"
        assert gists(here.entries) == gists(there.entries) == ["first", "cancelled", "[DONE]"]
        assert (await ended(view, run.id)).cancel_reason == "enough"
        assert_nothing_is_left(owner)


async def diverges(view: View, run_id: str, *, first: int, last: int) -> None:
    """The run is in the log from `first` on, and failed since the log had lost what was before."""
    record = await view.get(run_id)
    page = await view.read(run_id, first - 1)
    assert page.oldest_seq == first
    assert [each.seq for each in page.entries] == list(range(first, last + 1))
    assert gists(page.entries)[-2:] == ["error LOG_DIVERGED", "[DONE]"]
    assert [each.seq for each in page.entries if each.terminal] == [last]
    assert record.error is not None
    assert (record.status, record.stop_reason, record.error.code) == ("failed", "error", "LOG_DIVERGED")
    assert record.seq == last


async def test_a_run_of_which_nobody_has_the_beginning_any_more_ends_and_says_so(autojump_clock: MockClock) -> None:
    view, witness, notes = View(), Witness(), Notes()

    async def producer() -> AsyncIterator[Event]:
        for number in range(1, 1000):
            yield Event(data=str(number))
            with witness.watching():
                await trio.sleep(0.1)

    async with two_supervisors(view, tail_entries=5, observer=notes) as (owner, other):
        run = await owner.start(producer)
        async with readers((owner, run.id), (other, run.id)) as (here, there):
            await trio.sleep(2.05)  # it has said 21
            forget(view.log, run.id)
        assert (witness.saw, witness.saw_at) == ("log diverged", near(2.1))
        for reader in (here, there):
            assert reader.error is None
            assert gists(reader.entries) == [*map(str, range(1, 23)), "error LOG_DIVERGED", "[DONE]"]
        await diverges(view, run.id, first=17, last=24)
        for supervisor in (owner, other):
            assert [each.seq for each in await read(supervisor, run.id, 16)] == list(range(17, 25))
            for cursor in (0, 15):
                with pytest.raises(CursorExpired) as caught:
                    await read(supervisor, run.id, cursor)
                assert caught.value.oldest_seq == 17
            assert_nothing_is_left(supervisor)
        assert [each.status for each in notes.ended] == ["failed"]


async def test_an_ending_on_its_way_is_replaced_by_one_that_says_what_was_lost(autojump_clock: MockClock) -> None:
    view, notes = View(), Notes()
    async with open_supervisor(view, tail_entries=5, observer=notes, finalize_timeout=60) as owner:
        run = await owner.start(count, 20, 0.1)
        async with readers((owner, run.id)) as (here,):
            await trio.sleep(1.95)  # it has said 19
            view.before["append"] = unavailable
            await trio.sleep(5)
            assert owner._runs.by_id[run.id].producer is Producer.GONE
            forget(view.log, run.id)
            view.before.clear()
        assert gists(here.entries) == [*map(str, range(1, 21)), "error LOG_DIVERGED", "[DONE]"]
        await diverges(view, run.id, first=15, last=22)
        assert [(each.status, each.seq) for each in notes.ended] == [("failed", 22)]
        assert_nothing_is_left(owner)


@pytest.mark.parametrize("cleanup", [1.0, 8.0])
async def test_a_run_whose_producer_cleans_up_ends_as_diverged(autojump_clock: MockClock, cleanup: float) -> None:
    view = View()

    class Lingers:
        def __init__(self) -> None:
            self.numbers = count(20)

        def __aiter__(self) -> AsyncIterator[Event]:
            return self.numbers

        async def aclose(self) -> None:
            await self.numbers.aclose()  # type: ignore[attr-defined]

    async def producer() -> AsyncIterator[Event]:
        try:
            async for each in Lingers():
                yield each
            yield Event(data="[DONE]")
        finally:
            with trio.move_on_after(cleanup, shield=True):
                await trio.sleep_forever()

    async with open_supervisor(view, tail_entries=5, lease=3.0, cancel_grace=5) as owner:
        run = await owner.start(producer)
        async with readers((owner, run.id)) as (here,):
            await trio.sleep(0.5)
            assert owner._runs.by_id[run.id].producer is not Producer.ITERATING
            forget(view.log, run.id)
        assert gists(here.entries) == [*map(str, range(1, 21)), "error LOG_DIVERGED", "[DONE]"]
        await diverges(view, run.id, first=16, last=22)
        await trio.sleep(cleanup)
        assert_nothing_is_left(owner)


async def test_a_run_that_another_process_has_by_then_is_not_taken_back(autojump_clock: MockClock) -> None:
    view, witness, notes = View(), Witness(), Notes()
    async with two_supervisors(view, lease=LEASE_SECONDS, observer=notes) as (owner, other):
        run = await owner.start(witness.waits, run_id="r")
        await trio.sleep(1)
        forget(view.log, run.id)
        await other.start(count, 5, 1.0, run_id="r")
        await trio.sleep(LEASE_SECONDS)
        assert (witness.saw, notes.fenced) == ("fenced", ["r"])
        assert gists(await entries_of(view, "r")) == numbers(5)
        assert (await ended(view, "r")).status == "completed"
        assert_nothing_is_left(owner)
