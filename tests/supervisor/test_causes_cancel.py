"""Explicit cancels: from here, from elsewhere, again, too late, ignored, and in the last moment."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.backoff import LONGEST_PAUSE, WARNING_INTERVAL
from penstock.log import CancelStatus
from penstock.log.memory import MemoryLog
from penstock.sse import Event
from penstock.supervisor import open_supervisor
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
    shielded,
    slow,
    two_supervisors,
    unavailable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

CANCELLED = ["first", "cancelled", "[DONE]"]


async def test_a_cancel_of_which_only_an_append_tells_arrives_all_the_same(autojump_clock: MockClock) -> None:
    view, witness = View(), Witness()
    view.wakeups_of_cancels = False
    async with two_supervisors(view, view.log, cancel_check_interval=1e6) as (owner, other):

        async def producer() -> AsyncIterator[Event]:
            with witness.watching():
                async for event in count(1000, every=1):
                    yield event  # noqa: ASYNC119

        run = await owner.start(producer)
        await trio.sleep(5.5)
        await other.cancel(run.id)
        record = await other.wait(run.id)
        assert (record.status, witness.saw) == ("cancelled", "run cancelled")
        assert gists(await entries_of(view, run.id)) == ["1", "2", "3", "4", "5", "6", "cancelled", "[DONE]"]


async def test_a_cancel_that_overtakes_the_reply_to_start_is_not_lost(autojump_clock: MockClock) -> None:
    view, witness = View(), Witness()
    view.after["start"] = slow(2)
    async with two_supervisors(view, view.log) as (owner, other), trio.open_nursery() as nursery:

        async def silent() -> AsyncIterator[Event]:
            with witness.watching():
                await trio.sleep_forever()
            yield FIRST

        async def start() -> None:
            await owner.start(silent, run_id="run")

        nursery.start_soon(start)
        await trio.sleep(1)
        assert (await other.cancel("run", "enough")).status is CancelStatus.REQUESTED
        record = await other.wait("run")
        assert (record.status, record.cancel_reason) == ("cancelled", "enough")
        assert (witness.saw, witness.saw_at) == ("run cancelled: enough", 2)


async def test_a_repeated_cancel_changes_nothing(autojump_clock: MockClock) -> None:
    log, witness, let_go = MemoryLog(), Witness(), trio.Event()
    async with two_supervisors(log) as (owner, other):

        async def producer() -> AsyncIterator[Event]:
            yield FIRST
            try:
                with witness.watching():
                    await trio.sleep_forever()
            finally:
                await shielded(let_go)  # noqa: ASYNC102

        run = await owner.start(producer)
        await wait_all_tasks_blocked()
        assert (await owner.cancel(run.id, "mine")).status is CancelStatus.REQUESTED
        for supervisor in (owner, other):
            reply = await supervisor.cancel(run.id, "theirs")
            assert (reply.status, reply.run.cancel_reason) == (CancelStatus.REPEATED, "mine")
        let_go.set()
        record = await owner.wait(run.id)
        assert (record.status, record.cancel_reason, witness.saw) == ("cancelled", "mine", "run cancelled: mine")
        assert gists(await entries_of(log, run.id)) == CANCELLED


async def test_a_producer_that_ignores_its_cancel_loses_its_run_after_the_grace(autojump_clock: MockClock) -> None:
    log, notes, let_go, witness = MemoryLog(), Notes(), trio.Event(), Witness()

    async def holds_on() -> AsyncIterator[Event]:
        yield FIRST
        await shielded(let_go)
        with witness.watching():
            yield Event(data="stale")  # noqa: ASYNC119
            await trio.sleep_forever()

    async with two_supervisors(log, cancel_grace=4, observer=notes) as (owner, other):
        run = await owner.start(holds_on)
        async with readers((owner, run.id), (other, run.id)) as (here, there):
            await owner.cancel(run.id, "enough")
        assert trio.current_time() == near(4)
        assert gists(here.entries) == gists(there.entries) == CANCELLED
        record = await ended(log, run.id)
        assert (record.status, record.cancel_reason) == ("cancelled", "enough")
        assert [(stuck.run_id, "holds_on" in stuck.stack) for stuck in owner.stuck] == [(run.id, True)]
        await trio.sleep(21)
        assert [(who, seconds) for who, seconds, _ in notes.stuck] == [(run.id, 4), (run.id, 14), (run.id, 24)]
        assert all("await shielded(let_go)" in stack for _, _, stack in notes.stuck)
        let_go.set()
        await wait_all_tasks_blocked()
        assert (owner.stuck, witness.left, len(notes.stuck)) == ([], True, 3)
        assert gists(await entries_of(log, run.id)) == CANCELLED  # "stale" was dropped
        assert_nothing_is_left(owner)


async def test_a_poll_that_fails_cancels_nothing_and_recovers(autojump_clock: MockClock) -> None:
    view, notes, witness = View(), Notes(), Witness()
    view.wakeups_of_cancels = False
    async with two_supervisors(view, view.log, observer=notes) as (owner, other):
        run = await owner.start(witness.waits)
        await wait_all_tasks_blocked()
        view.before["cancel_requests"] = unavailable
        view.calls.clear()
        await trio.sleep(120)
        assert (await owner.get(run.id)).status == "running"
        assert (witness.saw, notes.errors) == (None, [])
        assert 120 / LONGEST_PAUSE < view.calls["cancel_requests"] < 5 * 120 / LONGEST_PAUSE
        assert 120 / WARNING_INTERVAL * 0.8 < len(notes.warnings) <= 120 / WARNING_INTERVAL + 1
        assert all("cannot look for cancel requests" in warning for warning in notes.warnings)
        view.before.clear()
        await trio.sleep(10)
        asked = trio.current_time()
        await other.cancel(run.id, "enough")
        assert (await owner.wait(run.id)).status == "cancelled"
        assert witness.saw_at <= asked + 0.5


@pytest.mark.parametrize("delay", [0.1, 0.4, 0.6])
async def test_a_cancel_before_the_end_is_stored_never_ends_completed(autojump_clock: MockClock, delay: float) -> None:
    view = View()
    async with two_supervisors(view, view.log) as (owner, other):
        run = await owner.start(count, 1)
        view.before["append"] = slow(0.5)
        await trio.sleep(delay)
        reply = await other.cancel(run.id, "in the last moment")
        record = await other.wait(run.id)
        if delay < 0.5:
            assert reply.status is CancelStatus.REQUESTED
            assert (record.status, record.cancel_reason) == ("cancelled", "in the last moment")
            assert gists(await read(owner, run.id)) == ["1", "cancelled", "[DONE]"]
        else:
            assert reply.status is CancelStatus.ENDED
            assert (record.status, record.cancel_reason) == ("completed", None)
        await ended(view, run.id)


async def test_an_error_in_the_last_moment_stays_one_beside_a_cancel(autojump_clock: MockClock) -> None:
    view = View()

    async def fails() -> AsyncIterator[Event]:
        yield FIRST
        raise ZeroDivisionError

    async with two_supervisors(view, view.log) as (owner, other):
        run = await owner.start(fails)
        view.before["append"] = slow(0.5)
        await trio.sleep(0.3)
        assert (await other.cancel(run.id, "stop")).status is CancelStatus.REQUESTED
        record = await other.wait(run.id)
        assert (record.status, record.stop_reason, record.cancel_reason) == ("failed", "error", "stop")


async def test_a_cancel_while_the_log_is_away_is_not_pretended(autojump_clock: MockClock) -> None:
    view, witness = View(), Witness()
    async with open_supervisor(view) as supervisor:
        run = await supervisor.start(witness.waits)
        view.before["request_cancel"] = unavailable
        with suppress(Exception):
            await supervisor.cancel(run.id)
        await trio.sleep(5)
        assert ((await supervisor.get(run.id)).status, witness.saw) == ("running", None)
        view.before.clear()
        await supervisor.cancel(run.id)
        assert (await supervisor.wait(run.id)).status == "cancelled"
