"""The drain: once, within its time, and over a log that is away, comes back, or has lost what readers wait for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.backoff import LONGEST_PAUSE
from penstock.errors import ReaderReleased, RunNotFound
from penstock.log import Batch, Lease
from penstock.log.memory import MemoryLog
from penstock.supervisor import Supervisor, open_supervisor
from penstock.supervisor.fetcher import MISSING_GRACE, MISSING_PAUSE
from tests.support.committing import forget
from tests.support.logs import entries, record
from tests.support.supervising import (
    FIRST,
    Reader,
    View,
    Witness,
    assert_nothing_is_left,
    come_back,
    count,
    ended,
    gists,
    go_away,
    near,
    read,
    readers,
    shielded,
    slow,
    two_supervisors,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from trio.testing import MockClock

    from penstock.sse import Event

DRAIN, GRACE, FINALIZE = 3.0, 2.0, 1.0
LIMIT = 4.0
TOO_LATE = LIMIT + 2.0
"""When an outage has surely been noticed, in seconds after it began."""
INTERRUPTED = ["first", "error INTERRUPTED", "[DONE]"]
PATIENT: Mapping[str, Any] = {"outage_limit": 300.0, "lease": 600.0}
BRISK: Mapping[str, Any] = {**PATIENT, "drain_timeout": DRAIN, "cancel_grace": GRACE, "finalize_timeout": FINALIZE}


class Clings:
    """A producer that lets go only when it is told to, whoever cancels it."""

    def __init__(self) -> None:
        self.let_go = trio.Event()

    async def __call__(self) -> AsyncIterator[Event]:
        yield FIRST
        await shielded(self.let_go)


async def set_after(seconds: float, event: trio.Event) -> None:
    await trio.sleep(seconds)
    event.set()


def elapsed(since: float) -> float:
    return trio.current_time() - since


# --- once, and within its time --------------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [0, 1, 10])
async def test_what_leaves_at_once_uses_up_no_grace_and_what_was_drained_is_not_drained_again(
    autojump_clock: MockClock, runs: int
) -> None:
    view = View()
    async with open_supervisor(view, **BRISK) as owner:
        for _ in range(runs):
            await owner.start(Witness().waits)
        await trio.sleep(1)
        go_away(view)
        began = trio.current_time()
        await owner.drain()
        assert elapsed(began) == near(DRAIN + FINALIZE if runs else 0)
        again = trio.current_time()
        await owner.drain()
        assert elapsed(again) == 0
    assert elapsed(again) == near(0)
    assert owner.unstored == runs
    assert owner._committer.pending_bytes == 0


@pytest.mark.parametrize("drained", [True, False], ids=["by hand before", "by leaving"])
@pytest.mark.parametrize("late", [0.0, 0.5, GRACE - 0.1])
async def test_with_the_log_away_all_of_a_shutdown_takes_each_of_its_three_times_once(
    autojump_clock: MockClock, late: float, drained: bool
) -> None:
    view, clings = View(), Clings()
    async with trio.open_nursery() as nursery, open_supervisor(view, **BRISK) as owner:
        await owner.start(clings)
        await owner.start(Witness().waits)
        await trio.sleep(1)
        go_away(view)
        began = trio.current_time()
        nursery.start_soon(set_after, DRAIN + late, clings.let_go)
        if drained:
            await owner.drain()
    assert elapsed(began) == near(DRAIN + late + FINALIZE)
    assert elapsed(began) <= DRAIN + GRACE + FINALIZE
    assert owner.unstored == 2


async def test_a_producer_that_does_not_let_go_has_its_grace_and_holds_up_the_drain_no_longer(
    autojump_clock: MockClock,
) -> None:
    view, clings = View(), Clings()
    async with open_supervisor(view, **BRISK) as owner:
        run = await owner.start(clings)
        await trio.sleep(1)
        go_away(view)
        began = trio.current_time()
        await owner.drain()
        assert elapsed(began) == near(DRAIN + GRACE + FINALIZE)
        assert [(stuck.run_id, stuck.stored) for stuck in owner.stuck] == [(run.id, False)]
        assert "shielded" in owner.stuck[0].stack
        clings.let_go.set()
    assert elapsed(began) <= DRAIN + GRACE + 2 * FINALIZE + 0.1  # its last entry was tried once more when it left
    assert owner.unstored == 1


async def test_a_stuck_producer_whose_run_has_its_last_entry_is_told_from_one_whose_run_has_none(
    autojump_clock: MockClock,
) -> None:
    view, clings = View(), Clings()
    async with open_supervisor(view, **BRISK) as owner:
        run = await owner.start(clings)
        await trio.sleep(1)
        began = trio.current_time()
        await owner.drain()
        assert elapsed(began) == near(DRAIN + GRACE)
        assert [(stuck.run_id, stuck.stored) for stuck in owner.stuck] == [(run.id, True)]
        clings.let_go.set()
    assert owner.unstored == 0
    assert gists(await read_of(view, run.id)) == INTERRUPTED


async def read_of(log: MemoryLog | View, run_id: str) -> Any:
    """The entries of a run that must have ended."""
    await ended(log, run_id)
    return (await log.read(run_id, 0)).entries


@pytest.mark.parametrize("away", [True, False])
async def test_an_interruption_during_the_drain_ends_its_first_wait_at_once(
    autojump_clock: MockClock, away: bool
) -> None:
    view, witness = View(), Witness()
    async with open_supervisor(view, **{**BRISK, "drain_timeout": 3600.0}) as owner, trio.open_nursery() as nursery:
        await owner.start(witness.waits)
        await trio.sleep(1)
        if away:
            go_away(view)
        began = trio.current_time()
        nursery.start_soon(owner.drain)
        await trio.sleep(5)
        assert not witness.left
        owner.interrupt()
        await wait_all_tasks_blocked()
        assert (witness.saw, elapsed(began)) == ("shutdown", 5)
    assert elapsed(began) == near(5 + (FINALIZE if away else 0))
    assert owner.unstored == away


async def test_an_interruption_during_the_drain_waits_for_no_start_whose_reply_does_not_come(
    autojump_clock: MockClock,
) -> None:
    view = View()
    async with open_supervisor(view, **{**BRISK, "drain_timeout": 3600.0}) as owner, trio.open_nursery() as nursery:
        view.before["start"] = slow(1000)
        nursery.start_soon(owner.start, Witness().waits)
        await wait_all_tasks_blocked()
        with trio.fail_after(100):
            async with trio.open_nursery() as draining:
                draining.start_soon(owner.drain)
                await trio.sleep(5)
                owner.interrupt()
        assert trio.current_time() == near(5 + FINALIZE)
        nursery.cancel_scope.cancel()
    assert trio.current_time() == near(5 + FINALIZE)


async def test_an_interruption_before_the_drain_leaves_it_nothing_to_wait_for_but_the_log(
    autojump_clock: MockClock,
) -> None:
    view, witness = View(), Witness()
    async with open_supervisor(view, **{**BRISK, "drain_timeout": 3600.0}) as owner:
        await owner.start(witness.waits)
        await trio.sleep(1)
        go_away(view)
        owner.interrupt()
        await owner.drain()
    assert trio.current_time() == near(1 + FINALIZE)


# --- a log that is away ---------------------------------------------------------------------------------------------


async def test_a_drain_that_gives_up_on_its_log_releases_the_readers_of_its_own_runs(
    autojump_clock: MockClock,
) -> None:
    view, leaves, clings = View(), Witness(), Clings()
    async with open_supervisor(view, **BRISK) as owner:
        runs = [await owner.start(leaves.waits), await owner.start(clings)]
        async with readers(*((owner, run.id) for run in runs)) as following:
            await trio.sleep(1)
            go_away(view)
            began = trio.current_time()
            await owner.drain()
            given_up = trio.current_time()
            await wait_all_tasks_blocked()
            for reader in following:
                assert isinstance(reader.error, ReaderReleased)
                assert reader.ended_at == given_up == near(began + DRAIN + GRACE + FINALIZE)
                assert gists(reader.entries) == ["first"]
        clings.let_go.set()


@pytest.mark.parametrize("away", [1.0, DRAIN + 0.5])
async def test_a_log_that_comes_back_during_the_drain_is_given_the_last_entries(
    autojump_clock: MockClock, away: float
) -> None:
    log, view = MemoryLog(), View()
    view.log = log
    async with open_supervisor(view, **{**BRISK, "finalize_timeout": LONGEST_PAUSE + 1}) as owner:
        run = await owner.start(Witness().waits)
        async with readers((owner, run.id)) as (reader,), trio.open_nursery() as nursery:
            await trio.sleep(1)
            go_away(view)
            nursery.start_soon(owner.drain)
            await trio.sleep(away)
            come_back(view)
        assert reader.error is None
        assert gists(reader.entries) == INTERRUPTED
    assert owner.unstored == 0
    assert (await ended(log, run.id)).stop_reason == "interrupted"


async def test_a_log_that_is_given_up_during_the_drain_leaves_it_nothing_to_wait_for(
    autojump_clock: MockClock,
) -> None:
    view, witness = View(), Witness()
    knobs = {**BRISK, "outage_limit": LIMIT, "drain_timeout": 3600.0}
    async with open_supervisor(view, **knobs) as owner:
        for _ in range(3):
            await owner.start(witness.waits)
        await trio.sleep(1)
        go_away(view)
        began = trio.current_time()
        await owner.drain()
    assert LIMIT <= elapsed(began) <= TOO_LATE
    assert witness.saw == "log unavailable"
    assert owner.unstored == 3


@pytest.mark.parametrize("first", ["the outage", "the drain"])
async def test_the_end_of_an_outage_brings_nobody_back_to_a_supervisor_that_drains(
    autojump_clock: MockClock, first: str
) -> None:
    log, view = MemoryLog(), View()
    view.log = log
    async with two_supervisors(log, view, outage_limit=LIMIT, drain_timeout=0.0) as (elsewhere, draining):
        run = await elsewhere.start(Witness().waits)
        async with readers((elsewhere, run.id), (draining, run.id)) as (stays, goes):
            await trio.sleep(1)
            if first == "the drain":
                await draining.drain()
            go_away(view)
            await trio.sleep(TOO_LATE)
            if first == "the outage":
                await draining.drain()
            come_back(view)
            await trio.sleep(LONGEST_PAUSE + 0.1)
            await draining.log.check()
            late = Reader(draining, run.id)
            with trio.fail_after(1):
                await late.run()
            with pytest.raises(ReaderReleased, match="shutting down"):
                await draining.wait(run.id)
            await elsewhere.cancel(run.id)
        for sent_away in (goes, late):
            assert isinstance(sent_away.error, ReaderReleased)
        assert "shutting down" in str(late.error)
        assert gists(stays.entries) == ["first", "cancelled", "[DONE]"]
        assert gists(await read(draining, run.id)) == gists(stays.entries)  # a run that has ended is read all the same


# --- a run that is lost ---------------------------------------------------------------------------------------------


async def abandoned(log: MemoryLog, run_id: str) -> None:
    """A run with three entries, whose owner is gone and has said nothing."""
    await log.start(record(run_id), Lease("the dead", "epoch", 600.0))
    await log.append([Batch(run_id, "epoch", entries(1, 3))])


@pytest.mark.parametrize("length", [1, 2, 5])
async def test_a_reader_of_a_lost_run_ends_when_its_id_is_started_again_beside_it(
    autojump_clock: MockClock, length: int
) -> None:
    log = MemoryLog()
    async with open_supervisor(log) as supervisor:
        await abandoned(log, "chat")
        async with readers((supervisor, "chat")) as (old,):
            await trio.sleep(1)
            forget(log, "chat")
            await supervisor.start(count, length, 1.0, run_id="chat")
            async with readers((supervisor, "chat")) as (new,):
                assert (await supervisor.wait("chat")).status == "completed"
            await trio.sleep(MISSING_GRACE)
            hangs = old.ended_at is None
            old.leave()
        assert not hangs
        assert isinstance(old.error, RunNotFound)
        assert [each.seq for each in old.entries] == [1, 2, 3]
        assert gists(new.entries) == [*map(str, range(1, length + 1)), "[DONE]"]
        assert_nothing_is_left(supervisor)


async def test_whoever_waits_for_the_end_of_a_lost_run_is_told_when_its_id_is_started_again_beside_it(
    autojump_clock: MockClock,
) -> None:
    log = MemoryLog()
    async with open_supervisor(log) as supervisor:
        await abandoned(log, "chat")

        async def wait() -> None:
            with pytest.raises(RunNotFound):
                await supervisor.wait("chat")

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.sleep(1)
                forget(log, "chat")
                await supervisor.start(count, 5, 1.0, run_id="chat")
        assert gists(await read(supervisor, "chat")) == ["1", "2", "3", "4", "5", "[DONE]"]
        assert_nothing_is_left(supervisor)


def tell(supervisor: Supervisor, run_id: str, seq: int) -> None:
    """A wake-up that says how far the run is."""
    wakeups: Any = supervisor._fetcher._notifications
    wakeups.moved(run_id, seq)


async def test_one_who_does_not_read_keeps_nobody_from_a_run_that_comes_back_after_it_was_given_up(
    autojump_clock: MockClock,
) -> None:
    log, view = MemoryLog(), View()
    view.log = log
    async with two_supervisors(view, log, **PATIENT, drain_timeout=0.0) as (owner, other):
        run = await owner.start(count, 60, 1.0)
        async with other.follow(run.id) as idle:
            assert gists([await anext(idle)]) == ["1"]
            async with readers((other, run.id)) as (waits,):
                await trio.sleep(2)
                go_away(view)
                forget(log, run.id)
                tell(other, run.id, 999)
                await trio.sleep(MISSING_GRACE + 2 * MISSING_PAUSE + 0.1)
            assert isinstance(waits.error, RunNotFound)
            come_back(view)
            await trio.sleep(LONGEST_PAUSE + 1)
            assert (await other.get(run.id)).status == "running"
            late = Reader(other, run.id)
            async with trio.open_nursery() as nursery:
                await nursery.start(late.run)
                await trio.sleep(5)
                assert len(late.entries) > 10
                with pytest.raises(RunNotFound):
                    async for _ in idle:
                        pass
                await idle.__aexit__(None, None, None)  # its going is nothing to the others
        assert gists(late.entries) == gists(await read(owner, run.id)) == [*map(str, range(1, 61)), "[DONE]"]
        assert late.error is None
        await trio.sleep(1)
        assert_nothing_is_left(other)
