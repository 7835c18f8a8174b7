"""Owners that are gone, stalled, or cut off for a while, and the runs that they lose or keep."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock.errors import SupervisorFailed
from penstock.sse import Event
from penstock.supervisor import open_supervisor
from tests.support.supervising import (
    FIRST,
    Notes,
    View,
    Witness,
    assert_nothing_is_left,
    broken,
    ended,
    entries_of,
    gists,
    near,
    read,
    readers,
    shielded,
    slow,
    two_supervisors,
    unavailable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

CANCELLED = ["first", "cancelled", "[DONE]"]
LOST = ["first", "error RUN_LOST", "[DONE]"]
LEASE = 6.0


async def test_the_runs_of_an_owner_whose_services_died_are_lost_by_lease(autojump_clock: MockClock) -> None:
    view, witness = View(), Witness()
    run_id = ""
    async with open_supervisor(view.log, lease=LEASE) as other:
        await trio.sleep(20)
        async with trio.open_nursery() as nursery:
            with pytest.raises(SupervisorFailed):  # noqa: PT012
                async with open_supervisor(view, lease=LEASE) as owner:
                    run_id = (await owner.start(witness.waits)).id
                    here, there = await nursery.start(_read_in_the_background, (owner, run_id), (other, run_id))  # noqa: ASYNC111
                    await trio.sleep(10)
                    view.before["cancel_requests"] = broken
                    await trio.sleep_forever()
            died = trio.current_time()
            assert witness.saw == "shutdown: a service of the supervisor died"
            assert (await other.get(run_id)).status == "running"  # nothing is pretended
        assert isinstance(here.error, SupervisorFailed)
        assert gists(here.entries) == ["first"]
        assert gists(there.entries) == LOST
        assert there.ended_at is not None
        assert there.ended_at - died <= LEASE + 2
        record = await ended(view, run_id)
        assert record.error is not None
        assert (record.status, record.stop_reason, record.error.code) == ("lost", "lost", "RUN_LOST")


async def _read_in_the_background(*which: Any, task_status: trio.TaskStatus[Any]) -> None:
    async with readers(*which) as following:
        task_status.started(following)


async def test_an_owner_whose_renewals_stall_is_fenced_and_its_readers_get_the_end(autojump_clock: MockClock) -> None:
    view, notes, witness = View(), Notes(), Witness()
    async with (
        open_supervisor(view.log, lease=LEASE) as other,
        open_supervisor(view, lease=LEASE, observer=notes) as owner,
    ):

        async def producer() -> AsyncIterator[Event]:
            yield FIRST
            await trio.sleep(20)
            yield Event(data="too late")
            with witness.watching():
                await trio.sleep_forever()

        run = await owner.start(producer)
        async with readers((owner, run.id), (other, run.id)) as (here, there):
            await trio.sleep(1)
            for operation in ("renew", "reap"):
                view.before[operation] = slow(100)
        for reader in (here, there):
            assert reader.error is None
            assert gists(reader.entries) == LOST
        assert there.ended_at is not None
        assert there.ended_at <= 2 * LEASE + 2
        assert here.ended_at == near(20)  # when it heard of it
        assert here.entries == there.entries == await entries_of(view, run.id)
        assert (witness.saw, witness.saw_at) == ("fenced", near(20))
        assert notes.fenced == [run.id]
        assert notes.ended == []  # that is not for this owner to say
        assert (await ended(view, run.id)).status == "lost"
        assert_nothing_is_left(owner)


async def test_an_owner_that_is_fenced_hears_of_it_from_a_renewal(autojump_clock: MockClock) -> None:
    view, notes, witness = View(), Notes(), Witness()
    async with (
        open_supervisor(view.log, lease=LEASE) as other,
        open_supervisor(view, lease=LEASE, observer=notes) as owner,
    ):
        run = await owner.start(witness.waits)
        await trio.sleep(1)
        view.before["renew"] = slow(15)
        assert (await other.wait(run.id)).status == "lost"
        assert not witness.left
        assert (await owner.wait(run.id)).status == "lost"
        assert gists(await read(owner, run.id)) == LOST
        assert (witness.saw, notes.fenced) == ("fenced", [run.id])
        assert_nothing_is_left(owner)


async def test_a_reply_that_comes_after_the_run_was_given_up_changes_nothing(autojump_clock: MockClock) -> None:
    view, notes, witness = View(), Notes(), Witness()
    async with (
        open_supervisor(view.log, lease=LEASE) as other,
        open_supervisor(view, lease=LEASE, observer=notes) as owner,
    ):
        view.after["append"] = slow(30)
        run = await owner.start(witness.waits)
        await trio.sleep(1)
        view.before["renew"] = slow(10)
        assert (await other.wait(run.id)).status == "lost"
        await trio.sleep(60)
        assert (notes.fenced, notes.ended, owner._committer.pending_bytes) == ([run.id], [], 0)
        assert gists(await read(owner, run.id)) == LOST
        assert_nothing_is_left(owner)


@pytest.mark.parametrize("operation", ["subscribe", "fetch"])
async def test_readers_of_a_fenced_run_wait_while_the_log_is_away(autojump_clock: MockClock, operation: str) -> None:
    view, notes = View(), Notes()
    async with (
        open_supervisor(view.log, lease=LEASE) as other,
        open_supervisor(view, lease=LEASE, observer=notes) as owner,
    ):
        run = await owner.start(Witness().waits)
        async with readers((owner, run.id)) as (here,):
            await trio.sleep(1)
            view.before |= {"renew": slow(15), operation: unavailable}
            await other.wait(run.id)
            await trio.sleep(30)
            assert notes.fenced == [run.id]
            assert gists(here.entries) == ["first"]
            view.before.clear()
        assert gists(here.entries) == LOST
        assert_nothing_is_left(owner)


async def test_what_a_fenced_run_held_is_let_go_when_its_producer_goes_late(autojump_clock: MockClock) -> None:
    view, let_go = View(), trio.Event()

    async def holds_on() -> AsyncIterator[Event]:
        yield FIRST
        await shielded(let_go)

    async with open_supervisor(view.log, lease=LEASE) as other, open_supervisor(view, lease=LEASE) as owner:
        run = await owner.start(holds_on)
        await trio.sleep(1)
        view.before["renew"] = slow(15)
        await other.wait(run.id)
        await trio.sleep(30)
        let_go.set()
        await trio.sleep(1)
        assert_nothing_is_left(owner)
        assert gists(await entries_of(view, run.id)) == LOST


async def test_an_outage_of_the_log_makes_nobody_reap(autojump_clock: MockClock) -> None:
    view = View()
    other_view = View(view.log)
    async with two_supervisors(view, other_view, lease=LEASE, outage_limit=100) as (owner, _):
        run = await owner.start(Witness().waits)
        await trio.sleep(20)
        for away in (7.5, 13.5, 60.5):
            for operation in ("append", "renew", "reap", "check", "cancel_requests"):
                view.before[operation] = other_view.before[operation] = unavailable
            await trio.sleep(away)
            other_view.before.clear()
            await trio.sleep(3)  # the owner hears of it later
            view.before.clear()
            await trio.sleep(10 * LEASE)
            assert (await owner.get(run.id)).status == "running"
        await owner.cancel(run.id)
        assert gists(await read(owner, run.id)) == CANCELLED
