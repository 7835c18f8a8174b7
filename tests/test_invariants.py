"""What is always true of runs and readers, I1 to I6. Each test names the breakage under which it was seen to fail.

I7 is in `test_schedules.py`, and I8 to I10 are in `test_invariants_bounds.py`.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock.errors import CursorExpired, RunNotFound
from penstock.log import CancelStatus
from penstock.log.memory import MemoryLog
from penstock.sse import Event
from penstock.supervisor import Supervisor, open_supervisor
from tests.support.supervising import (
    FIRST,
    View,
    Witness,
    assert_nothing_is_left,
    count,
    ended,
    gists,
    read,
    readers,
    slow,
    two_supervisors,
    unavailable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

    from penstock.log import Entry
    from penstock.runs import Run


@pytest.mark.parametrize("trouble", [slow(0.7), unavailable], ids=["slow", "away"])
async def test_i1_no_reader_sees_what_the_log_does_not_have(autojump_clock: MockClock, trouble: Any) -> None:
    # Fails if `WriteBuffer.put` adds to the tail, or if `Committer._append` takes LogUnavailable for success.
    view = View()
    seen = 0
    async with two_supervisors(view, view.log) as (owner, other), trio.open_nursery() as nursery:

        async def look(supervisor: Supervisor) -> None:
            nonlocal seen
            async with supervisor.follow("run") as entries:
                async for entry in entries:
                    assert view.log._runs["run"].ring.last >= entry.seq
                    seen += 1

        await owner.start(count, 20, 0.5, run_id="run")
        nursery.start_soon(look, owner)
        nursery.start_soon(look, other)
        view.before["append"] = trouble
        await trio.sleep(5)
        assert trouble is not unavailable or seen == 0
        view.before.clear()
    assert seen == 2 * 21


async def test_i1_what_is_stored_is_shown_once_its_acknowledgement_is_there(autojump_clock: MockClock) -> None:
    # Fails if `WriteBuffer.put` adds to the tail.
    view = View()
    async with open_supervisor(view) as supervisor:
        view.after["append"] = slow(3)
        run = await supervisor.start(Witness().waits)
        async with supervisor.follow(run.id) as entries:
            await trio.sleep(1)
            assert view.log._runs[run.id].ring.last == 1
            assert entries._tail is not None
            assert entries._tail.last == 0
            view.after.clear()
        await supervisor.cancel(run.id)


async def bursts(rng: random.Random, events: int) -> AsyncIterator[Event]:
    for number in range(1, events + 1):
        if rng.random() < 0.3:
            await trio.sleep(rng.random() / 10)
        yield Event(data=str(number))


async def read_with_cuts(rng: random.Random, supervisors: list[Supervisor], run_id: str) -> list[Entry]:
    """Read to the end, through connections that break at any moment, each to any supervisor."""
    got: list[Entry] = []
    cursor = 0
    while not got or not got[-1].terminal:
        follower = rng.choice(supervisors).follow(run_id, cursor)
        with trio.move_on_after(rng.expovariate(5)):
            async with follower as entries:
                async for entry in entries:
                    got.append(entry)
                    if rng.random() < 0.1:
                        await trio.sleep(rng.random() / 5)
        cursor = follower.cursor
    return got


async def test_i2_many_runs_over_broken_connections_are_complete_once_in_order(autojump_clock: MockClock) -> None:
    # Fails if `Tail.take` begins one too early or too late, if `Follower.__anext__` moves the cursor to the end of the
    # page, and if `_fill` lets a checkpoint come between looking and parking (then readers sleep for ever).
    rng = random.Random(7)
    log = MemoryLog()
    whole = 0
    async with two_supervisors(log, tail_entries=8) as (owner, other), trio.open_nursery() as nursery:

        async def follow(run_id: str, events: int, seed: int) -> None:
            nonlocal whole
            got = await read_with_cuts(random.Random(seed), [owner, other], run_id)
            assert [entry.seq for entry in got] == list(range(1, events + 2))
            assert gists(got) == [*map(str, range(1, events + 1)), "[DONE]"]
            whole += 1

        for _ in range(200):
            events, seed = rng.randrange(40), rng.randrange(2**32)
            run = await owner.start(bursts, random.Random(seed), events)
            nursery.start_soon(follow, run.id, events, seed)
    assert whole == 200
    assert_nothing_is_left(owner)
    assert_nothing_is_left(other)


BY_REASON = {
    "run cancelled": "cancelled",
    "run timed out": "timeout",
    "run was silent": "silent",
    "shutdown": "interrupted",
}
"""What the producer saw → the record's stop reason."""


async def test_i3_of_many_endings_at_once_the_first_is_stored_and_stays(autojump_clock: MockClock) -> None:
    # Fails if `Execution.stop` records a second cause, and if `MemoryLog._append` does not refuse `completed` after a
    # cancel.
    rng = random.Random(3)
    expected: set[str | None] = {"end_turn", "error", *BY_REASON.values()}
    stop_reasons: set[str | None] = set()
    for number in range(1000):
        if number >= 80 and stop_reasons == expected:  # which of them a race ends in is for Trio's scheduler to draw
            break
        view, witness = View(), Witness()
        refusals: list[CancelStatus] = []

        async def producer(after: float, held: float, raises: bool) -> AsyncIterator[Event]:
            yield FIRST
            with trio.move_on_after(held, shield=True):
                await trio.sleep_forever()
            with witness.watching():  # noqa: B023
                await trio.sleep(after)
            if raises:
                raise ValueError

        async def cancel(supervisor: Supervisor, when: float) -> None:
            await trio.sleep(when)
            refusals.append((await supervisor.cancel("run")).status)  # noqa: B023

        async with two_supervisors(view, view.log, cancel_grace=1) as (owner, other), trio.open_nursery() as nursery:
            view.before["append"] = slow(0.01 * rng.randrange(3))
            limits: dict[str, Any] = {name: 1.0 for name in ("timeout", "max_silence") if rng.random() < 0.3}
            lengths = rng.choice([1.0, 50.0]), rng.choice([0, 0, 0, 3]), rng.random() < 0.3
            await owner.start(producer, *lengths, run_id="run", **limits)
            for supervisor in (owner, other):
                if rng.random() < 0.5:
                    nursery.start_soon(cancel, supervisor, 1.0 + rng.choice([-0.01, 0, 0.01]))  # noqa: ASYNC111
            if rng.random() < 0.3:
                nursery.start_soon(owner.drain, 1.0)  # noqa: ASYNC111
            await trio.sleep(1.5)
            await owner.cancel("run")
            record = await owner.wait("run")
            await trio.sleep(20)
            assert await ended(view, "run") == record
            assert record.status != "completed" or CancelStatus.REQUESTED not in refusals
            if witness.saw in BY_REASON and record.stop_reason != "error":
                assert record.stop_reason == BY_REASON[witness.saw]
            stop_reasons.add(record.stop_reason)
    assert stop_reasons == expected


async def test_i4_no_reader_waits_for_what_cannot_come(autojump_clock: MockClock) -> None:
    # Fails if `MemoryLog.reap` does nothing, if `Follower._fill` does not look at `tail.ended`, if `Tail.extend` never
    # sets it, and if `Follower.__aenter__` does not compare the cursor with the oldest seq.
    view = View(MemoryLog(max_entries=5))
    async with two_supervisors(view, view.log, lease=6) as (owner, other):
        over = await owner.start(count, 9)
        await owner.wait(over.id)
        for supervisor in (owner, other):
            with trio.fail_after(0.01):
                with pytest.raises(RunNotFound):
                    await read(supervisor, "none")
                with pytest.raises(CursorExpired) as caught:
                    await read(supervisor, over.id)
                assert caught.value.oldest_seq == 6
                assert [entry.seq for entry in await read(supervisor, over.id, 9)] == [10]
                assert await read(supervisor, over.id, 10) == await read(supervisor, over.id, 999) == []
        dead = await owner.start(Witness().waits)
        async with readers((other, dead.id), (owner, dead.id)) as (there, here):
            await trio.sleep(10)
            silent_from = trio.current_time()
            view.before["renew"] = view.before["reap"] = slow(30)
        assert gists(there.entries) == gists(here.entries) == ["first", "error RUN_LOST", "[DONE]"]
        assert there.ended_at is not None
        assert there.ended_at - silent_from <= 6 + 2


async def test_i5_neither_cancel_reaches_the_other(autojump_clock: MockClock) -> None:
    # Fails if `Supervisor.start` runs the producer in a nursery of the caller's.
    log, witness = MemoryLog(), Witness()
    async with two_supervisors(log) as (owner, other):

        async def request(task_status: trio.TaskStatus[Run]) -> None:
            run = await owner.start(witness.waits)
            task_status.started(run)
            await read(owner, run.id)

        async with trio.open_nursery() as server:
            run = await server.start(request)
            await trio.sleep(1)
            server.cancel_scope.cancel()  # the client goes away
        await trio.sleep(10)
        assert ((await owner.get(run.id)).status, witness.saw) == ("running", None)
        for supervisor in (owner, other):
            with trio.CancelScope() as reader:
                async with supervisor.follow(run.id, 1) as entries:
                    if supervisor is other:
                        await other.cancel(run.id)
                    else:
                        reader.cancel()
                    assert gists([entry async for entry in entries]) == ["cancelled", "[DONE]"]
                    await trio.sleep(1)
            assert reader.cancelled_caught is (supervisor is owner)


@pytest.mark.parametrize("wakeups", [True, False], ids=["by the wake-up", "by the poll alone"])
async def test_i6_a_cancel_reaches_a_silent_producer_in_time(autojump_clock: MockClock, wakeups: bool) -> None:
    # Fails if nothing calls `Watch.wake` (by the wake-up), and if `Watch.cancels` waits without a timeout (the poll).
    view = View()
    view.wakeups_of_cancels = wakeups
    async with two_supervisors(view, view.log, cancel_check_interval=2) as (owner, other):
        for silence in (0.1, 0.7, 1.3, 1.99):
            witness = Witness()
            run = await owner.start(witness.waits)
            await trio.sleep(silence)
            asked = trio.current_time()
            await other.cancel(run.id)
            await other.wait(run.id)
            assert 0 <= witness.saw_at - asked <= (0.01 if wakeups else 2)
