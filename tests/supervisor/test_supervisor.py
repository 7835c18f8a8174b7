"""What one calls on a supervisor, what it refuses, whom it tells, and what it keeps."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.errors import CursorExpired, Draining, LogUnavailable, RunNotFound
from penstock.log.memory import MemoryLog
from penstock.supervisor import open_supervisor
from tests.support.supervising import (
    View,
    Witness,
    assert_nothing_is_left,
    count,
    ended,
    entries_of,
    gists,
    read,
    readers,
    slow,
    two_supervisors,
    unavailable,
)

if TYPE_CHECKING:
    from trio.testing import MockClock


# Looking


async def test_records_are_listed_newest_first_by_status_and_up_to_a_limit(autojump_clock: MockClock) -> None:
    async with open_supervisor(MemoryLog()) as supervisor:
        for name in ("a", "b", "c"):
            await supervisor.start(count, 1, run_id=name)
        await supervisor.start(Witness().waits, run_id="d")
        await supervisor.wait("c")
        assert [run.id for run in await supervisor.list()] == ["d", "c", "b", "a"]
        assert [run.id for run in await supervisor.list(limit=2)] == ["d", "c"]
        assert [run.id for run in await supervisor.list(status="running")] == ["d"]  # type: ignore[arg-type]
        await supervisor.cancel("d")


async def test_a_run_that_is_not_there_is_not_found_by_anything(autojump_clock: MockClock) -> None:
    async with open_supervisor(MemoryLog()) as supervisor:
        for missing in (
            supervisor.get("none"),
            supervisor.wait("none"),
            supervisor.cancel("none"),
            supervisor.follow("none").__aenter__(),
        ):
            with pytest.raises(RunNotFound):
                await missing
        assert_nothing_is_left(supervisor)


async def test_following_begins_after_the_cursor_or_with_the_last_entries(autojump_clock: MockClock) -> None:
    log = MemoryLog(max_entries=6)
    async with open_supervisor(log) as supervisor:
        run = await supervisor.start(count, 9)
        await supervisor.wait(run.id)
        assert [entry.seq for entry in await read(supervisor, run.id, 7)] == [8, 9, 10]
        for after, last, expected in ((0, 3, [8, 9, 10]), (9, 3, [10]), (0, 99, [5, 6, 7, 8, 9, 10]), (0, 0, [])):
            async with supervisor.follow(run.id, after, last=last) as follower:
                assert follower.at_end is (expected == [])
                assert [entry.seq async for entry in follower] == expected
        for cursor in (10, 11, 10**9):
            async with supervisor.follow(run.id, cursor) as follower:
                assert follower.at_end
                assert [entry async for entry in follower] == []
        with pytest.raises(CursorExpired) as caught:
            await supervisor.follow(run.id, 3).__aenter__()
        assert caught.value.oldest_seq == 5
        for wrong in (-1, 1.0, "1", True, None):
            with pytest.raises(ValueError, match="cursor"):
                supervisor.follow(run.id, wrong)  # type: ignore[arg-type]


async def test_a_wait_that_is_cancelled_does_nothing_to_the_run(autojump_clock: MockClock) -> None:
    async with two_supervisors(MemoryLog()) as (owner, other):
        run = await owner.start(count, 3, 1)
        for supervisor in (owner, other):
            with trio.move_on_after(0.5) as scope:
                await supervisor.wait(run.id)
            assert scope.cancelled_caught
        assert (await owner.wait(run.id)).status == "completed"


async def test_an_id_that_is_used_again_after_its_run_expired_is_a_new_run(autojump_clock: MockClock) -> None:
    log = MemoryLog(ttl=5)
    async with two_supervisors(log) as (owner, other):
        await owner.start(count, 3, run_id="again")
        async with owner.follow("again") as old:
            assert (await anext(old)).seq == 1
            await owner.wait("again")
            await trio.sleep(10)
            await owner.start(count, 2, 1, run_id="again")
            async with readers((owner, "again"), (other, "again")) as (here, there):
                pass
            assert gists(here.entries) == gists(there.entries) == ["1", "2", "[DONE]"]
            assert (await owner.wait("again")).status == "completed"
        assert_nothing_is_left(owner)


# Refusing


async def test_nothing_is_started_while_draining_or_afterwards(autojump_clock: MockClock) -> None:
    async with open_supervisor(MemoryLog()) as supervisor:
        await supervisor.check()
        await supervisor.drain()
        assert supervisor.draining
        for refused in (supervisor.start(count, 1), supervisor.open_run().__aenter__(), supervisor.check()):
            with pytest.raises(Draining):
                await refused
    with pytest.raises(Draining):
        await supervisor.start(count, 1)


async def test_check_says_whether_the_log_can_be_reached(autojump_clock: MockClock) -> None:
    view = View()
    async with open_supervisor(view) as supervisor:
        view.before["check"] = unavailable
        with pytest.raises(LogUnavailable):
            await supervisor.check()
        view.before.clear()
        await supervisor.check()


async def test_a_start_while_the_log_is_away_leaves_nothing_behind(autojump_clock: MockClock) -> None:
    view = View()
    async with open_supervisor(view) as supervisor:
        view.before["start"] = unavailable
        with pytest.raises(LogUnavailable):
            await supervisor.start(count, 1)
        with pytest.raises(LogUnavailable):
            await supervisor.open_run().__aenter__()
        assert supervisor.live_runs == 0
        assert_nothing_is_left(supervisor)


@pytest.mark.parametrize("how", ["drained", "left by an exception"])
async def test_a_start_that_the_end_overtakes_is_ended_and_refused(autojump_clock: MockClock, how: str) -> None:
    view, witness = View(), Witness()

    async def start() -> None:
        with pytest.raises(Draining):
            await supervisor.start(witness.waits, run_id="late")

    async with trio.open_nursery() as nursery:
        try:
            async with open_supervisor(view, drain_timeout=0) as supervisor:
                view.after["start"] = slow(3)
                nursery.start_soon(start)
                await wait_all_tasks_blocked()
                if how != "drained":
                    _ = 1 / 0
        except ZeroDivisionError:
            pass
    record = await ended(view, "late")
    assert (record.status, record.stop_reason) == ("failed", "interrupted")
    assert gists(await entries_of(view, "late")) == ["error INTERRUPTED", "[DONE]"]


async def test_a_start_under_way_when_draining_begins_counts_as_begun_before(autojump_clock: MockClock) -> None:
    view = View()
    async with open_supervisor(view, drain_timeout=20) as supervisor, trio.open_nursery() as nursery:
        view.after["start"] = slow(3)

        async def start() -> None:
            await supervisor.start(count, 3, 1, run_id="late")

        nursery.start_soon(start)
        await wait_all_tasks_blocked()
        await supervisor.drain()
    assert (await ended(view, "late")).status == "completed"


async def test_nothing_is_kept_of_runs_that_ended_without_readers(autojump_clock: MockClock) -> None:
    before = len(trio.lowlevel.current_root_task().child_nurseries[0].child_tasks)  # type: ignore[union-attr]
    async with two_supervisors(MemoryLog(), drain_timeout=5) as (owner, other):
        await wait_all_tasks_blocked()
        idle = _tasks()
        for index in range(300):
            timeout = 3600 if index % 3 else None
            run = await owner.start(count, 2, 0.01 * (index % 5), timeout=timeout, max_silence=timeout)
            if index % 10 == 0:
                async with other.follow(run.id) as follower:
                    await anext(follower)
            if index % 7 == 0:
                await owner.cancel(run.id)
        for run in await owner.list(limit=1000):
            await other.wait(run.id)
        await wait_all_tasks_blocked()
        for supervisor in (owner, other):
            assert_nothing_is_left(supervisor)
            assert len(supervisor._timers._heap) <= 200
        assert _tasks() == idle
    assert len(trio.lowlevel.current_root_task().child_nurseries[0].child_tasks) == before  # type: ignore[union-attr]


def _tasks() -> int:
    """The tasks there are below this one's nurseries, and their nurseries."""
    waiting = list(trio.lowlevel.current_task().child_nurseries)
    found = 0
    while waiting:
        nursery = waiting.pop()
        found += 1 + len(nursery.child_tasks)
        for task in nursery.child_tasks:
            waiting += task.child_nurseries
    return found
