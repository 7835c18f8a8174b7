"""What is always true of runs and readers, I1 to I10. Each test names the breakage under which it was seen to fail."""

from __future__ import annotations

import random
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.errors import CursorExpired, RunNotFound
from penstock.log.memory import MemoryLog
from penstock.sse import Event
from penstock.supervisor import Supervisor, open_supervisor
from tests import producers
from tests.supervising import (
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

    from penstock.log import Entry


# I1: nothing is shown before the log has acknowledged it.


@pytest.mark.parametrize("trouble", [slow(0.7), unavailable], ids=["slow", "away"])
async def test_i1_no_reader_sees_what_the_log_does_not_have(autojump_clock: MockClock, trouble: Any) -> None:
    # Fails if `Outbox.put` adds to the tail, or if `Committer._append` takes LogUnavailable for success.
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
    # Fails if `Outbox.put` adds to the tail.
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


# I2: exactly once, in order.


async def bursts(rng: random.Random, events: int) -> AsyncIterator[Event]:
    for number in range(1, events + 1):
        if rng.random() < 0.3:
            await trio.sleep(rng.random() / 10)
        yield Event(data=str(number))


async def read_with_cuts(rng: random.Random, supervisors: list[Supervisor], run_id: str) -> list[Entry]:
    """Read to the end, through connections that break at any moment, each to any supervisor."""
    got: list[Entry] = []
    while not got or not got[-1].terminal:
        with trio.move_on_after(rng.expovariate(5)):
            async with rng.choice(supervisors).follow(run_id, got[-1].seq if got else 0) as entries:
                async for entry in entries:
                    got.append(entry)
                    if rng.random() < 0.1:
                        await trio.sleep(rng.random() / 5)
    return got


async def test_i2_a_thousand_runs_read_through_broken_connections_are_complete_once_and_in_order(
    autojump_clock: MockClock,
) -> None:
    # Fails if `Tail.take` begins one too early or too late, if `Follower._fill` moves the cursor, and if it lets a
    # checkpoint come between looking and parking (then readers sleep for ever).
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

        for _ in range(1000):
            events, seed = rng.randrange(40), rng.randrange(2**32)
            run = await owner.start(bursts, random.Random(seed), events)
            nursery.start_soon(follow, run.id, events, seed)
    assert whole == 1000
    assert_nothing_is_left(owner)
    assert_nothing_is_left(other)


# I3: every run ends, exactly once.


async def test_i3_of_many_endings_at_once_one_is_stored_and_stays(autojump_clock: MockClock) -> None:
    # Fails if `MemoryLog._append` takes what comes after the end, and if it does not refuse `completed` after a cancel.
    rng = random.Random(3)
    statuses = set()
    for _ in range(150):
        view = View()
        async with two_supervisors(view, view.log, cancel_grace=1) as (owner, other), trio.open_nursery() as nursery:
            view.before["append"] = slow(0.01 * rng.randrange(3))
            limits: dict[str, Any] = {"timeout": 1.0, "max_silence": 1.0} if rng.random() < 0.5 else {}

            async def producer(after: float) -> AsyncIterator[Event]:
                yield FIRST
                await trio.sleep(after)
                if rng.random() < 0.5:
                    raise ValueError

            run = await owner.start(producer, rng.choice([1.0, 50.0]), **limits)
            for end in (partial(owner.cancel, run.id), partial(other.cancel, run.id), partial(owner.drain, 1.0)):
                if rng.random() < 0.5:
                    nursery.start_soon(_at, 1.0 + rng.choice([-0.01, 0, 0.01]), end)  # noqa: ASYNC111
            await trio.sleep(1.5)
            await owner.cancel(run.id)
            record = await owner.wait(run.id)
            statuses.add(record.status.value)
            await trio.sleep(20)
            assert await ended(view, run.id) == record
            assert gists(await read(other, run.id))[-1] == "[DONE]"
    assert statuses == {"completed", "failed", "cancelled"}


async def _at(when: float, call: Any) -> None:
    await trio.sleep_until(when + trio.current_time())
    await call()


# I4: every reader ends.


async def test_i4_no_reader_waits_for_what_cannot_come(autojump_clock: MockClock) -> None:
    # Fails if `MemoryLog.reap` does nothing, if `Follower._fill` does not look at `tail.ended`, if `Tail.extend` does not
    # set it, and if `Follower.__aenter__` does not compare the cursor with the oldest seq.
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


# I5: a run's life is not a request's life.


async def test_i5_neither_cancel_reaches_the_other(autojump_clock: MockClock) -> None:
    # Fails if `Supervisor.start` runs the producer in the caller's scope, or if the reader shares the run's.
    log, witness = MemoryLog(), Witness()
    async with two_supervisors(log) as (owner, other):
        with trio.CancelScope() as request:  # which starts the run, and then goes away
            run = await owner.start(witness.waits)
            request.cancel()
            await read(owner, run.id)
        assert request.cancelled_caught
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


# I6: cancel is prompt.


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


# I8: one bad run harms no other.


async def test_i8_good_runs_among_bad_ones_are_whole_and_in_time(autojump_clock: MockClock) -> None:
    # Fails if `Execution.leave` returns a run's own error, if `Committer._commit` stops at a reply that is not OK, and
    # if `Execution._overdue` does not end the run.
    view, notes, let_go = View(), Notes(), trio.Event()

    async def floods(_: Witness) -> AsyncIterator[str]:
        for _number in range(300):
            yield "data: " + 1000 * "x" + "\n\n"

    async def grips(_: Witness) -> AsyncIterator[Event]:
        yield FIRST
        await shielded(let_go)

    async def fenced(_: Witness) -> AsyncIterator[Event]:
        yield FIRST
        stored = view.log._runs["fenced"]
        stored.lease = type(stored.lease)("somebody else", "another epoch", 1e6)
        yield Event(data="refused")
        await trio.sleep_forever()

    bad = [
        floods,
        grips,
        fenced,
        producers.cleanup_raises,
        producers.hangs_after_done,
        producers.hangs_after_what_is_no_chunk,
        producers.refuses_to_close,
        producers.swallows_and_goes_on,
        producers.raises(ValueError("bad")),
        producers.yields("data: \ud83d\n\n"),
        producers.yields(Event(data="x" * 3000)),
    ]
    async with open_supervisor(view, observer=notes, max_event_bytes=2000, max_pending_bytes=4000) as supervisor:
        good = [await supervisor.start(count, 50, 0.1) for _ in range(5)]
        for producer in bad:
            await supervisor.start(producer, Witness(), run_id=producer.__name__ if producer is fenced else None)
        async with readers(*((supervisor, run.id) for run in good)) as following:
            await trio.sleep(1)
            for run in await supervisor.list(limit=100, status="running"):  # type: ignore[arg-type]
                if run.producer != "count":
                    await supervisor.cancel(run.id)
        for run, reader in zip(good, following, strict=True):
            assert reader.ended_at == near(5)
            assert gists(reader.entries) == [*map(str, range(1, 51)), "[DONE]"]
            assert (await ended(view, run.id)).status == "completed"
        let_go.set()
        view.log._runs["fenced"].lease_end = 0
        await trio.sleep(60)
        for run in await supervisor.list(limit=100):
            await ended(view, run.id)
        assert notes.fenced == ["fenced"]
        assert_nothing_is_left(supervisor)


# I9: memory is bounded.


async def test_i9_neither_a_fast_producer_nor_a_slow_reader_costs_more_than_its_limit(
    autojump_clock: MockClock,
) -> None:
    # Fails if `Execution.write` does not wait for room, and if `Tail.extend` or `MemoryLog._store` does not trim.
    view = View(MemoryLog(max_entries=500))
    pending: list[int] = []
    knobs: dict[str, Any] = {"max_pending_bytes": 5_000, "max_process_pending_bytes": 12_000, "tail_entries": 100}
    async with open_supervisor(view, **knobs, tail_bytes=3_000, max_process_tail_bytes=8_000) as supervisor:
        services = supervisor._services

        async def look() -> None:
            pending.append(services.committer.pending_bytes)
            assert services.tails.size <= 8_000
            await trio.sleep(0.01)

        view.before["append"] = look
        flood = producers.yields(*["data: " + "x" * 90 + "\n\n"] * 3000)
        runs = [await supervisor.start(flood, Witness()) for _ in range(4)]
        async with supervisor.follow(runs[0].id) as slow_reader:
            await anext(slow_reader)
            for run in runs[1:]:
                await supervisor.wait(run.id)
            await supervisor.wait(runs[0].id)
            assert len(services.tails) == 1  # the slow reader's, and nothing else
            assert services.tails.size <= 3_000
            with pytest.raises(CursorExpired):
                [entry async for entry in slow_reader]
        # a write is let in below the limit, so each run may be over it by one event
        assert 5_000 <= max(pending) <= 12_000 + 4 * 200
        for run in runs:
            assert (await supervisor.get(run.id)).seq == 3002
            assert len(await _kept(view, run.id)) == 500


async def _kept(view: View, run_id: str) -> list[Entry]:
    page = await view.log.read(run_id, 0, max_entries=10_000, max_bytes=10**9)
    return list(page.entries)


# I10: the log's cost does not grow with readers.


async def test_i10_an_idle_reader_asks_the_log_for_nothing(autojump_clock: MockClock) -> None:
    # Fails if `Follower._fill` waits with a timeout and reads again, and if the fetcher polls.
    async def calls(readers_each: int, *, busy: bool) -> dict[str, int]:
        mine, theirs = View(), View()
        theirs.log = mine.log
        async with two_supervisors(mine, theirs) as (owner, other):
            run = await owner.start(count, 50, 12) if busy else await owner.start(Witness().waits)
            async with readers(*[(owner, run.id), (other, run.id)] * readers_each) as following:
                await trio.sleep(0.1)
                mine.calls.clear()
                theirs.calls.clear()
                await trio.sleep(595)
                found = {f"mine {name}": n for name, n in mine.calls.items()} | dict(theirs.calls)
                await owner.cancel(run.id)
            assert {len(reader.entries) for reader in following} == {51 if busy else 3}
        return found

    idle = await calls(1, busy=False)
    for operation in ("read", "fetch", "get", "subscribe", "wait", "start", "append"):
        assert operation not in idle
        assert f"mine {operation}" not in idle
    assert await calls(100, busy=False) == idle
    busy = await calls(1, busy=True)
    assert busy["fetch"] == 49  # one for each event, in the one process that the run does not live in
    assert await calls(100, busy=True) == busy


async def test_i10_after_the_readers_have_left_nothing_is_fetched_for_them(autojump_clock: MockClock) -> None:
    # Fails if `Fetcher.give_back` does not unsubscribe.
    view = View()
    async with two_supervisors(view.log, view) as (owner, other):
        run = await owner.start(count, 100, 1)
        async with readers((other, run.id), (other, run.id)) as following:
            await trio.sleep(10.5)
            for reader in following:
                reader.leave()
        view.calls.clear()
        await trio.sleep(50)
        assert_nothing_is_left(other)
        assert {"fetch", "read", "wait"} & set(view.calls) == set()
        await wait_all_tasks_blocked()
        assert len(await entries_of(view, run.id)) >= 60
        await owner.cancel(run.id)
