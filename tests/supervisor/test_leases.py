"""The watch: what a supervisor does by the clock, and what it does when the clock or the log stood still."""

from __future__ import annotations

from contextlib import asynccontextmanager
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.log import AppendStatus, Notification
from penstock.log.memory import MemoryLog
from penstock.supervisor import open_supervisor
from penstock.supervisor.leases import REAP_INTERVAL, RENEWALS_PER_CALL
from tests.support.committing import forget
from tests.support.logs import LEASE as ANOTHERS
from tests.support.logs import batch, record
from tests.support.supervising import (
    Notes,
    View,
    Witness,
    assert_nothing_is_left,
    come_back,
    count,
    ended,
    gists,
    go_away,
    near,
    readers,
    slow,
    two_supervisors,
    unavailable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from trio.testing import MockClock

    from penstock.log import Notifications
    from tests.support.supervising import Hook

LEASE = 6.0


class Told:
    def __init__(self, wakeups: Notifications) -> None:
        self.wakeups = wakeups
        self.came_back = trio.Event()
        self._news: list[Notification] = []

    @property
    def _subscribed(self) -> set[str]:
        subscribed: set[str] = getattr(self.wakeups, "_subscribed")  # noqa: B009  (the protocol does not have it)
        return subscribed

    def tell(self, news: Notification) -> None:
        self._news.append(news)
        self.came_back.set()

    async def subscribe(self, run_id: str) -> None:
        await self.wakeups.subscribe(run_id)

    def unsubscribe(self, run_id: str) -> None:
        self.wakeups.unsubscribe(run_id)

    async def wait(self) -> Notification:
        told: list[Notification] = []

        async def listen(scope: trio.CancelScope) -> None:
            told.append(await self.wakeups.wait())
            scope.cancel()

        async def look(scope: trio.CancelScope) -> None:
            await self.came_back.wait()
            scope.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen, nursery.cancel_scope)
            nursery.start_soon(look, nursery.cancel_scope)
        self.came_back = trio.Event()
        told += self._news
        self._news = []
        moved = {run_id: seq for news in told for run_id, seq in news.moved.items()}
        return Notification(moved, any(news.cancel for news in told), any(news.reconnected for news in told))


class Reconnecting(MemoryLog):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[Told] = []
        self.renewals: list[tuple[float, int]] = []
        """When a renewal came, and of how many leases."""
        self.reaps: list[float] = []

    @asynccontextmanager
    async def wakeups(self, owner: str) -> AsyncIterator[Told]:  # type: ignore[override]
        async with super().wakeups(owner) as wakeups:
            self.told.append(Told(wakeups))
            yield self.told[-1]

    async def renew(self, owner: str, epochs: Mapping[str, str], seconds: float) -> Mapping[str, AppendStatus]:
        self.renewals.append((trio.current_time(), len(epochs)))
        return await super().renew(owner, epochs, seconds)


async def asked(view: View, operation: str, hook: Hook) -> float:
    """Wait until an operation is asked for the next time, which meets the hook; when that was."""
    came = trio.Event()

    async def meet() -> None:
        came.set()
        await hook()

    view.before[operation] = meet
    await came.wait()
    return trio.current_time()


# --- renewals -------------------------------------------------------------------------------------------------------


async def test_leases_are_renewed_three_times_in_their_length(autojump_clock: MockClock) -> None:
    log = Reconnecting()
    async with open_supervisor(log, lease=LEASE) as owner:
        run = await owner.start(Witness().waits)
        await trio.sleep(60.1)
        assert [when for when, _ in log.renewals] == [near(2.0 * number) for number in range(1, 31)]
        await owner.cancel(run.id)
        await owner.wait(run.id)
        log.renewals.clear()
        await trio.sleep(60)
        assert log.renewals == []  # there is nothing to renew


async def test_leases_are_renewed_at_once_when_the_log_is_back(autojump_clock: MockClock) -> None:
    log = Reconnecting()
    async with open_supervisor(log, lease=30.0) as owner:
        run = await owner.start(Witness().waits)
        await trio.sleep(13)
        assert log.renewals == [(near(10), 1)]
        log.told[0].tell(Notification({}, reconnected=True))
        await trio.sleep(1)
        assert log.renewals[1:] == [(near(13), 1)]
        await trio.sleep(8.9)  # and the next is a third of a lease after this one
        assert log.renewals[2:] == []
        await trio.sleep(0.2)
        assert log.renewals[2:] == [(near(23), 1)]
        await owner.cancel(run.id)


@pytest.mark.parametrize("away", [0.5, 1.0, 1.5])
async def test_a_failed_renewal_is_tried_again_before_the_lease_ends(autojump_clock: MockClock, away: float) -> None:
    log, notes = Reconnecting(), Notes()
    view = View(log)
    async with open_supervisor(log, lease=LEASE) as other, open_supervisor(view, lease=LEASE, observer=notes) as owner:
        run = await owner.start(Witness().waits)
        for number in range(20):
            await trio.sleep(LEASE + number / 10)
            view.before["renew"] = unavailable
            await trio.sleep(away)
            come_back(view)
        renewed = [when for when, _ in log.renewals]
        assert max(after - before for before, after in pairwise(renewed)) < LEASE
        assert (await other.get(run.id)).status == "running"
        assert "cannot renew leases: the log is away; trying again" in notes.warnings
        assert notes.fenced == []
        await owner.cancel(run.id)


async def test_many_leases_are_renewed_in_pieces_and_none_is_left_out(autojump_clock: MockClock) -> None:
    log = Reconnecting()
    number = 2 * RENEWALS_PER_CALL + 50
    async with two_supervisors(log, lease=LEASE) as (owner, other):
        for _ in range(number):
            await owner.start(Witness().waits)
        await trio.sleep(LEASE / 3 + 0.1)
        assert [leases for _, leases in log.renewals] == [RENEWALS_PER_CALL, RENEWALS_PER_CALL, 50]
        await trio.sleep(5 * LEASE)
        assert len(await other.list(limit=number, status=None)) == number
        assert {run.status for run in await other.list(limit=number)} == {"running"}
        owner.interrupt()
        await trio.sleep(1)


async def test_a_run_that_settles_during_its_renewal_is_neither_fenced_nor_restored(autojump_clock: MockClock) -> None:
    view, notes = View(), Notes()
    async with open_supervisor(view, lease=LEASE, observer=notes) as owner:
        run = await owner.start(count, 3, 1)
        view.after["renew"] = slow(2)
        await trio.sleep(3.5)
        assert (await ended(view, run.id)).status == "completed"
        forget(view.log, run.id)
        view.after.clear()
        await trio.sleep(60)
        assert (notes.fenced, notes.warnings) == ([], [])
        assert [each.status for each in notes.ended] == ["completed"]
        assert_nothing_is_left(owner)


async def test_a_run_that_is_found_gone_and_then_settles_is_not_fenced(autojump_clock: MockClock) -> None:
    view, notes = View(), Notes()
    async with open_supervisor(view, lease=3.0, observer=notes) as owner:
        run = await owner.start(count, 2, 1)
        async with readers((owner, run.id)) as (here,):
            await trio.sleep(1.5)
            execution = owner._runs.by_id[run.id]
            forget(view.log, run.id)
            restores = 0

            async def found_gone_once_more() -> None:
                nonlocal restores
                await trio.sleep(0.6)  # in the meantime the run ends, and the reply to a renewal says that it is gone
                restores += 1
                if restores == 1:
                    owner._committer.restore(execution.buffer)

            view.before["restore"] = found_gone_once_more
            owner._committer.restore(execution.buffer)
        await trio.sleep(5)
        assert gists(here.entries) == ["1", "2", "[DONE]"]
        assert (await ended(view, run.id)).status == "completed"
        assert [each.status for each in notes.ended] == ["completed"]
        assert notes.fenced == []
        assert_nothing_is_left(owner)


# --- the reaper -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def reaping(log: MemoryLog | None = None) -> AsyncIterator[tuple[View, Notes]]:
    view, notes = View(log), Notes()
    async with open_supervisor(view, lease=LEASE, observer=notes, outage_limit=1000):
        await trio.sleep(2 * LEASE + 0.5)
        yield view, notes


async def abandoned(view: View, run_id: str = "r") -> None:
    """A run whose owner has just gone; its lease is over at once."""
    await view.log.start(record(run_id), type(ANOTHERS)("gone", "epoch", 0.0))
    await view.log.append([batch(1, 1, run_id=run_id)])


async def lost_after(view: View, seconds: float, run_id: str = "r") -> float:
    """How many seconds it takes, at the most so many, until the run is lost."""
    began = trio.current_time()
    async with view.log.wakeups("the test") as wakeups:
        await wakeups.subscribe(run_id)
        with trio.move_on_after(seconds):
            if not (await view.log.get(run_id)).status.terminal:
                await wakeups.wait()
            return trio.current_time() - began
    return inf


async def test_a_run_whose_lease_is_over_is_lost_within_a_second(autojump_clock: MockClock) -> None:
    async with reaping() as (view, _):
        for number in range(5):
            await abandoned(view, f"r{number}")
            assert await lost_after(view, 100, f"r{number}") <= REAP_INTERVAL + 0.1
            await trio.sleep(0.3)


async def test_a_reaper_that_has_just_begun_reaps_nobody_for_a_lease(autojump_clock: MockClock) -> None:
    view = View()
    await abandoned(view)
    async with open_supervisor(view, lease=LEASE):
        assert LEASE <= await lost_after(view, 100) <= LEASE + REAP_INTERVAL + 0.1


@pytest.mark.parametrize("seconds, counts", [(LEASE / 3 - 0.1, False), (LEASE / 3 + 0.1, True), (10 * LEASE, True)])
async def test_a_look_that_takes_longer_than_a_third_of_a_lease_counts_as_lost_contact(
    autojump_clock: MockClock, seconds: float, *, counts: bool
) -> None:
    async with reaping() as (view, notes):
        began = await asked(view, "reap", slow(seconds))
        come_back(view)
        await abandoned(view)
        waited = await lost_after(view, 100)
        if counts:
            assert trio.current_time() - began >= LEASE / 3 + LEASE
            assert waited <= LEASE / 3 + LEASE + 2 * REAP_INTERVAL + 0.1
            assert notes.warnings == ["cannot reap: the log is slow; trying again"]
        else:
            assert waited <= LEASE / 3 + 0.1
            assert notes.warnings == []


async def test_slow_looks_reap_no_run_and_do_not_warn_each_time(autojump_clock: MockClock) -> None:
    async with reaping() as (view, notes):
        view.before["reap"] = view.before["check"] = slow(LEASE)
        await trio.sleep(1.1)
        await abandoned(view)
        assert await lost_after(view, 100) > 99
        assert len(notes.warnings) <= 2
        come_back(view)
        assert LEASE <= await lost_after(view, 100) <= LEASE + LEASE / 3 + 2 * REAP_INTERVAL + 0.1


async def test_a_reaper_whose_log_was_away_reaps_nobody_for_a_lease(autojump_clock: MockClock) -> None:
    async with reaping() as (view, notes):
        go_away(view)
        await trio.sleep(1.5)
        come_back(view)
        await abandoned(view)
        assert LEASE - 0.6 <= await lost_after(view, 100) <= LEASE + 2 * REAP_INTERVAL
        assert "cannot reap: the log is away; trying again" in notes.warnings


@pytest.mark.parametrize("seconds", [LEASE / 3 + REAP_INTERVAL + 0.1, LEASE, 20 * LEASE])
async def test_a_process_that_stood_still_reaps_nobody_for_a_lease(autojump_clock: MockClock, seconds: float) -> None:
    async with reaping() as (view, notes):
        await trio.sleep(0.25)
        await abandoned(view)
        autojump_clock.jump(seconds)
        began = trio.current_time()
        assert LEASE - 0.1 <= await lost_after(view, 100) <= LEASE + REAP_INTERVAL + 0.1
        assert trio.current_time() - began >= LEASE - 0.1
        assert notes.warnings == []


async def test_processes_that_stood_still_together_lose_no_run_and_declare_no_outage(autojump_clock: MockClock) -> None:
    view, notes, witness = View(), Notes(), Witness()
    async with two_supervisors(view, lease=LEASE, outage_limit=4.0, observer=notes) as (owner, other):
        run = await owner.start(witness.waits)
        async with readers((owner, run.id), (other, run.id)) as following:
            await trio.sleep(2 * LEASE + 0.3)
            for seconds in (3.0, 5.0, LEASE, 100.0, 0.5, 1_000.0):
                for pause in (0.0, 1.3):
                    await trio.sleep(pause)
                    await wait_all_tasks_blocked()  # not in the middle of a call
                    autojump_clock.jump(seconds)
                await trio.sleep(3 * LEASE)
            assert not witness.left
            assert (await owner.get(run.id)).status == "running"
            await other.cancel(run.id)
        for reader in following:
            assert reader.error is None
            assert gists(reader.entries) == ["first", "cancelled", "[DONE]"]
        assert notes.warnings == []


async def test_a_process_that_stood_still_with_its_log_away_declares_an_outage_once(autojump_clock: MockClock) -> None:
    view, notes, witness = View(), Notes(), Witness()
    async with open_supervisor(view, lease=LEASE, outage_limit=4.0, observer=notes) as owner:
        await owner.start(witness.waits)
        await trio.sleep(2 * LEASE)
        go_away(view)
        autojump_clock.jump(50)
        await trio.sleep(30)
        assert witness.saw == "log unavailable"
        assert len([warning for warning in notes.warnings if "given up" in warning]) == 1
        come_back(view)
        await trio.sleep(2 * LEASE)
        assert owner.live_runs == 0


# --- outages --------------------------------------------------------------------------------------------------------
