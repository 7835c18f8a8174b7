"""What is always true of runs and readers, I8 to I10: bad runs, memory, and what is asked of the log.

Each test names the breakage under which it was seen to fail.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.errors import CursorExpired
from penstock.log.memory import MemoryLog
from penstock.sse import Event
from penstock.supervisor import open_supervisor
from tests.support import producers
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
    shielded,
    two_supervisors,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

    from penstock.log import Entry


async def test_i8_good_runs_among_bad_ones_are_whole_and_in_time(autojump_clock: MockClock) -> None:
    # Fails if `Execution.leave` returns a run's own error, and if `Committer._commit` stops at a reply that is not OK.
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


async def test_i9_no_fast_producer_and_no_slow_reader_costs_more_than_its_limit(autojump_clock: MockClock) -> None:
    # Fails if `Execution.write` does not wait for room, and if `Tail.extend` or `MemoryLog._store` does not trim.
    view = View(MemoryLog(max_entries=500))
    pending: list[int] = []
    knobs: dict[str, Any] = {"max_pending_bytes": 5_000, "max_process_pending_bytes": 12_000, "tail_entries": 100}
    async with open_supervisor(view, **knobs, tail_bytes=3_000, max_process_tail_bytes=8_000) as supervisor:

        async def look() -> None:
            pending.append(supervisor._committer.pending_bytes)
            assert supervisor._tails.size <= 8_000
            assert all(tail._ring.size <= 3_000 for tail in supervisor._tails.all())
            await trio.sleep(0.01)

        view.before["append"] = look
        flood = producers.yields(*["data: " + "x" * 90 + "\n\n"] * 3000)
        runs = [await supervisor.start(flood, Witness()) for _ in range(4)]
        async with supervisor.follow(runs[0].id) as slow_reader:
            await anext(slow_reader)
            for run in runs[1:]:
                await supervisor.wait(run.id)
            await supervisor.wait(runs[0].id)
            assert len(supervisor._tails.all()) == 1  # the slow reader's, and nothing else
            assert supervisor._tails.size <= 3_000
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


async def test_i10_an_idle_reader_asks_the_log_for_nothing(autojump_clock: MockClock) -> None:
    # Fails if `Follower._fill` waits with a timeout and reads again, and if the fetcher polls.
    async def calls(readers_each: int, *, busy: bool) -> dict[str, int]:
        mine, theirs = View(), View()
        theirs.log = mine.log
        async with two_supervisors(mine, theirs) as (owner, other):
            run = await owner.start(count, 10, 12) if busy else await owner.start(Witness().waits)
            async with readers(*[(owner, run.id), (other, run.id)] * readers_each) as following:
                await trio.sleep(0.1)
                mine.calls.clear()
                theirs.calls.clear()
                await trio.sleep(115)
                found = {f"mine {name}": n for name, n in mine.calls.items()} | dict(theirs.calls)
                await owner.cancel(run.id)
            assert {len(reader.entries) for reader in following} == {11 if busy else 3}
        return found

    idle = await calls(1, busy=False)
    for operation in ("read", "fetch", "get", "subscribe", "wait", "start", "append"):
        assert operation not in idle
        assert f"mine {operation}" not in idle
    assert await calls(20, busy=False) == idle
    busy = await calls(1, busy=True)
    assert busy["fetch"] == 9  # one for each event, in the one process that the run does not live in
    assert await calls(20, busy=True) == busy


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
