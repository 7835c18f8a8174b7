"""A log that is out of reach: what runs and readers lose by it, and what they do not (section 7's last two rows)."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock.backoff import LONGEST_PAUSE
from penstock.errors import LogUnavailable, PenstockError, ReaderReleased, RunEnded, RunNotFound
from penstock.log.memory import MemoryLog
from penstock.sse import Event
from penstock.supervisor import Supervisor, open_supervisor
from penstock.supervisor.leases import REAP_INTERVAL
from tests.support.committing import forget
from tests.support.supervising import (
    FIRST,
    Notes,
    Reader,
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
    shielded,
    slow,
    unavailable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

LEASE = 6.0
LIMIT = 4.0
LOST = ["first", "error RUN_LOST", "[DONE]"]
TOO_LATE = LIMIT + 2.0
"""When an outage has surely been noticed, in seconds after it began."""


class House:
    """A supervisor whose log can be out of its reach, and another one at the same log that nothing happens to."""

    def __init__(self) -> None:
        self.log = MemoryLog()
        self.view = View(self.log)
        self.notes = Notes()
        self.owner: Supervisor
        self.other: Supervisor

    async def away(self, seconds: float) -> None:
        """The log is out of the owner's reach for so long."""
        go_away(self.view)
        await trio.sleep(seconds)
        come_back(self.view)

    async def serves_again(self) -> None:
        """New runs start, and new readers are served, on the supervisor that had lost its log."""
        run = await self.owner.start(count, 5, 0.1)
        theirs = await self.other.start(count, 5, 0.1)
        async with readers((self.owner, run.id), (self.owner, theirs.id), (self.other, run.id)) as following:
            assert (await self.owner.wait(run.id)).status == "completed"
        for reader in following:
            assert reader.error is None
            assert gists(reader.entries) == ["1", "2", "3", "4", "5", "[DONE]"]
        assert (await ended(self.log, run.id)).status == "completed"


@asynccontextmanager
async def house(**knobs: Any) -> AsyncIterator[House]:
    """A house in which everybody has been in contact for longer than a lease; at its end nothing is left behind."""
    works = House()
    knobs = {"lease": LEASE, "outage_limit": LIMIT, "cancel_grace": 2.0, **knobs}
    async with (
        open_supervisor(works.log, **knobs) as works.other,
        open_supervisor(works.view, observer=works.notes, **knobs) as works.owner,
    ):
        await trio.sleep(2 * LEASE)
        yield works
        await trio.sleep(LONGEST_PAUSE + 0.1)  # so late may it be noticed that the log is back
        assert_nothing_is_left(works.owner)
        assert_nothing_is_left(works.other)


async def refused(call: Any) -> PenstockError:
    with pytest.raises(PenstockError) as caught:
        await (call.__aenter__() if hasattr(call, "__aenter__") else call)
    return caught.value


# --- shorter than the limit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("away", [0.1, 1.0, LIMIT - 0.6])
async def test_an_outage_below_the_limit_costs_nothing_but_time(autojump_clock: MockClock, away: float) -> None:
    async with house() as works:
        mine = await works.owner.start(count, 100, 0.1)
        theirs = await works.other.start(count, 100, 0.1)
        async with readers(
            (works.owner, mine.id), (works.other, mine.id), (works.owner, theirs.id), (works.other, theirs.id)
        ) as following:
            for _ in range(3):
                await trio.sleep(2)
                await works.away(away)
        for reader in following:
            assert reader.error is None
            assert gists(reader.entries) == [*map(str, range(1, 101)), "[DONE]"]
        for run in (mine, theirs):
            assert (await ended(works.log, run.id)).status == "completed"
        assert works.notes.warnings
        assert (works.notes.errors, works.notes.fenced) == ([], [])


async def test_d41_a_reader_in_the_middle_of_the_history_waits_and_loses_nothing(autojump_clock: MockClock) -> None:
    async with house(tail_entries=10) as works:
        run = await works.other.start(count, 3000)
        mine = await works.owner.start(count, 3000)
        await works.other.wait(run.id)
        await works.owner.wait(mine.id)
        for run_id in (run.id, mine.id):
            async with works.owner.follow(run_id) as entries, trio.open_nursery() as nursery:
                seen = [(await anext(entries)).seq for _ in range(500)]
                nursery.start_soon(works.away, LIMIT - 0.6)
                began = trio.current_time()
                await trio.lowlevel.checkpoint()
                seen += [(await anext(entries)).seq]
                assert trio.current_time() - began >= LIMIT - 0.6
                seen += [each.seq async for each in entries]
            assert seen == list(range(1, 3002))
            await trio.sleep(LONGEST_PAUSE)


@pytest.mark.parametrize("operation", ["cancel_requests", "check", "reap"])
async def test_a_log_that_answers_any_one_of_the_rounds_is_not_away(autojump_clock: MockClock, operation: str) -> None:
    async with house() as works:
        witness = Witness()
        run = await works.owner.start(witness.waits)
        works.view.before[operation] = unavailable
        await trio.sleep(20 * LIMIT)
        assert not witness.left
        come_back(works.view)
        await works.owner.cancel(run.id)
        assert (await works.owner.wait(run.id)).status == "cancelled"


# --- longer than the limit ------------------------------------------------------------------------------------------


async def test_an_outage_beyond_the_limit_gives_up_the_runs_and_a_reaper_ends_them(autojump_clock: MockClock) -> None:
    async with house() as works:
        witness = Witness()
        mine, theirs = await works.owner.start(witness.waits), await works.other.start(Witness().waits)
        async with readers(
            (works.owner, mine.id), (works.owner, theirs.id), (works.other, mine.id), (works.other, theirs.id)
        ) as (here, foreign, there, own):
            await trio.sleep(1)
            began = trio.current_time()
            await works.away(2 * LEASE + 3)
            assert (witness.saw, witness.left) == ("log unavailable", True)
            assert LIMIT - 0.6 <= witness.saw_at - began <= TOO_LATE
            for reader in (here, foreign):
                assert isinstance(reader.error, ReaderReleased)
                assert gists(reader.entries) == ["first"]
                assert reader.ended_at == near(witness.saw_at)
            assert there.error is None
            assert gists(there.entries) == LOST
            assert there.ended_at is not None
            assert LEASE - LEASE / 3 - 0.1 <= there.ended_at - began <= LEASE + 1.1
            assert own.ended_at is None
            await works.other.cancel(theirs.id)
        record = await ended(works.log, mine.id)
        assert record.error is not None
        assert (record.status, record.stop_reason, record.error.code) == ("lost", "lost", "RUN_LOST")
        await trio.sleep(LONGEST_PAUSE)
        assert gists(await read(works.owner, mine.id)) == LOST
        assert [run.id for run in works.notes.ended] == []
        assert (works.notes.fenced, works.notes.errors) == ([], [])
        assert works.owner.live_runs == 0
        await works.serves_again()


async def test_a_log_that_is_back_before_the_lease_ends_has_the_run_lost_then(autojump_clock: MockClock) -> None:
    async with house(lease=30.0) as works:
        await trio.sleep(60)
        run = await works.owner.start(Witness().waits)
        await trio.sleep(0.1)
        began = trio.current_time()
        await works.away(TOO_LATE)
        await trio.sleep(LONGEST_PAUSE)
        async with readers((works.owner, run.id), (works.other, run.id)) as (here, there):
            assert (await works.owner.get(run.id)).status == "running"
        for reader in (here, there):
            assert reader.error is None
            assert gists(reader.entries) == LOST
            assert reader.ended_at is not None
            assert began + 30 - 10 - 0.1 <= reader.ended_at <= began + 30 + 1.2
        await works.serves_again()


async def test_during_an_outage_beyond_the_limit_nothing_new_is_begun(autojump_clock: MockClock) -> None:
    async with house() as works:
        over = await works.owner.start(count, 3)
        running = await works.other.start(Witness().waits)
        await works.owner.wait(over.id)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(works.away, 3 * TOO_LATE)
            await trio.sleep(TOO_LATE)
            for call in (
                works.owner.start(count, 3),
                works.owner.open_run(),
                works.owner.get(over.id),
                works.owner.list(),
                works.owner.cancel(running.id),
                works.owner.check(),
                works.owner.wait(running.id),
            ):
                assert isinstance(await refused(call), LogUnavailable), call
            for run in (over, running):
                assert isinstance(await refused(works.owner.follow(run.id)), LogUnavailable | ReaderReleased)
            assert works.owner.live_runs == 0
        await trio.sleep(LONGEST_PAUSE)
        await works.owner.check()
        assert gists(await read(works.owner, over.id)) == ["1", "2", "3", "[DONE]"]
        await works.owner.cancel(running.id)
        assert gists(await read(works.owner, running.id)) == ["first", "cancelled", "[DONE]"]
        await works.serves_again()


async def test_readers_of_an_ended_run_read_on_from_the_tail_and_others_are_released(autojump_clock: MockClock) -> None:
    async with house(tail_entries=100) as works:
        short, long = await works.other.start(count, 50), await works.other.start(count, 3000)
        for run in (short, long):
            await works.other.wait(run.id)
        async with works.owner.follow(short.id) as brief, works.owner.follow(long.id) as lengthy:
            assert ((await anext(brief)).seq, (await anext(lengthy)).seq) == (1, 1)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(works.away, 3 * TOO_LATE)
                await trio.sleep(TOO_LATE)
                assert [each.seq async for each in brief] == list(range(2, 52))
                assert [(await anext(lengthy)).seq for _ in range(499)] == list(range(2, 501))
                with pytest.raises(ReaderReleased):
                    await anext(lengthy)
        await trio.sleep(LONGEST_PAUSE)
        assert [each.seq for each in await read(works.owner, long.id, lengthy.cursor)] == list(range(501, 3002))


async def test_a_reader_in_the_middle_of_the_history_is_released_while_it_waits(autojump_clock: MockClock) -> None:
    async with house(tail_entries=10) as works:
        run = await works.other.start(count, 3000)
        await works.other.wait(run.id)
        async with works.owner.follow(run.id) as entries, trio.open_nursery() as nursery:
            for _ in range(500):
                await anext(entries)
            nursery.start_soon(works.away, 3 * TOO_LATE)
            began = trio.current_time()
            await trio.lowlevel.checkpoint()
            with pytest.raises(ReaderReleased):
                await anext(entries)
            assert LIMIT - 0.6 <= trio.current_time() - began <= TOO_LATE + LONGEST_PAUSE


async def test_whoever_waits_for_a_run_is_released_and_can_wait_again(autojump_clock: MockClock) -> None:
    async with house() as works:
        mine, theirs = await works.owner.start(Witness().waits), await works.other.start(count, 30, 1)
        errors: list[PenstockError] = []

        async def wait(run_id: str) -> None:
            errors.append(await refused(works.owner.wait(run_id)))

        async with trio.open_nursery() as nursery:
            for run in (mine, theirs):
                nursery.start_soon(wait, run.id)
            await trio.sleep(1)
            await works.away(2 * TOO_LATE)
        assert [type(error) for error in errors] == [ReaderReleased] * 2
        await trio.sleep(LONGEST_PAUSE)
        assert (await works.owner.wait(mine.id)).status == "lost"
        assert (await works.owner.wait(theirs.id)).status == "completed"


async def test_a_run_with_a_pending_ending_is_lost_and_one_with_a_stored_one_is_not(autojump_clock: MockClock) -> None:
    async with house(finalize_timeout=60) as works:
        pending = await works.owner.start(count, 10, 0.1)
        stored = await works.owner.start(count, 1)
        await trio.sleep(0.95)
        async with readers((works.other, pending.id), (works.owner, pending.id)) as (there, here):
            await works.away(2 * LEASE + 3)
        assert isinstance(here.error, ReaderReleased)
        assert gists(there.entries) == [*map(str, range(1, 10)), "error RUN_LOST", "[DONE]"]
        assert (await ended(works.log, pending.id)).status == "lost"
        assert (await ended(works.log, stored.id)).status == "completed"
        assert [run.id for run in works.notes.ended] == [stored.id]


async def test_an_outage_that_begins_again_before_a_loss_is_as_long_as_its_parts(autojump_clock: MockClock) -> None:
    async with house(lease=30.0) as works:
        witness = Witness()
        run = await works.owner.start(witness.waits)
        for _ in range(10):
            await works.away(LIMIT - 0.6)
            await trio.sleep(LONGEST_PAUSE + 0.1)
        assert not witness.left
        await works.owner.cancel(run.id)
        assert (await works.owner.wait(run.id)).status == "cancelled"


@pytest.mark.parametrize("early", [-0.01, 0.0, 0.01])
async def test_an_outage_that_ends_in_the_instant_in_which_it_would_be_noticed_leaves_nothing_half_done(
    autojump_clock: MockClock, early: float
) -> None:
    async with house() as works:
        witness = Witness()
        run = await works.owner.start(witness.waits)
        async with readers((works.owner, run.id), (works.other, run.id)) as (here, there):
            (contact,) = works.owner._leases.shards
            reached = contact._reached
            go_away(works.view)
            await trio.sleep(0.7)
            assert contact._reached <= reached + 0.5
            due = contact._reached + REAP_INTERVAL + LIMIT
            await trio.sleep(due - trio.current_time() - early)
            come_back(works.view)
            await trio.sleep(3 * LEASE)
            if not witness.left:
                await works.owner.cancel(run.id)
        if witness.saw == "log unavailable":
            assert isinstance(here.error, ReaderReleased) or gists(here.entries) == LOST
            assert gists(there.entries) == LOST
        else:
            assert gists(here.entries) == gists(there.entries) == ["first", "cancelled", "[DONE]"]
        await works.serves_again()


async def test_i4_a_log_that_is_back_in_the_instant_after_the_runs_were_given_up_leaves_no_reader_behind(
    autojump_clock: MockClock,
) -> None:
    async with house(lease=20.0) as works:

        async def away_once() -> None:
            if works.owner._fetcher._away:
                come_back(works.view)
            else:
                await unavailable()

        for _ in range(10):  # who is first, the readers or the log, is a matter of chance
            witness = Witness()
            run = await works.owner.start(witness.waits)
            with trio.fail_after(100):
                async with readers((works.owner, run.id), (works.other, run.id)) as (here, there):
                    await trio.sleep(1)
                    go_away(works.view)
                    works.view.before["check"] = works.view.before["reap"] = away_once
                    await trio.sleep(TOO_LATE)
                    assert not works.view.before
            assert witness.saw == "log unavailable"
            assert isinstance(here.error, ReaderReleased) or gists(here.entries) == LOST
            assert gists(there.entries) == LOST
        await works.serves_again()


@pytest.mark.parametrize("what", ["flush", "write"])
async def test_a_body_that_waits_for_the_log_ends_with_its_run(autojump_clock: MockClock, what: str) -> None:
    async with house(max_pending_bytes=1_000) as works:
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            with pytest.raises(RunEnded):  # noqa: PT012
                async with works.owner.open_run("by-hand") as writer:
                    nursery.start_soon(works.away, 2 * TOO_LATE)  # noqa: ASYNC111
                    await trio.sleep(0.1)
                    if what == "flush":
                        await writer.write(FIRST)
                        await writer.flush()
                    else:
                        for _ in range(100):
                            await writer.write(Event(data="." * 100))
            assert trio.current_time() - began <= TOO_LATE + 0.2
        assert works.owner._committer.pending_bytes == 0
        assert (await works.other.wait("by-hand")).status == "lost"


async def test_a_stuck_producer_holds_up_neither_the_outage_nor_what_comes_after_it(autojump_clock: MockClock) -> None:
    let_go = trio.Event()

    async def holds_on() -> AsyncIterator[Event]:
        yield FIRST
        await shielded(let_go)
        yield Event(data="too late")

    async with house() as works:
        run = await works.owner.start(holds_on)
        async with readers((works.owner, run.id)) as (here,):
            await trio.sleep(1)
            await works.away(TOO_LATE)
        assert isinstance(here.error, ReaderReleased)
        await trio.sleep(LONGEST_PAUSE)
        async with readers((works.owner, run.id), (works.other, run.id)) as following:
            pass
        for reader in following:
            assert gists(reader.entries) == LOST
        await works.serves_again()
        assert [stuck.run_id for stuck in works.owner.stuck] == [run.id]
        assert {run_id for run_id, _, _ in works.notes.stuck} == {run.id}
        await works.away(TOO_LATE)
        await trio.sleep(LONGEST_PAUSE)
        let_go.set()
        await trio.sleep(1)
        assert gists(await entries_of(works.log, run.id)) == LOST


async def test_a_start_whose_reply_comes_after_the_outage_is_a_run_like_any_other(autojump_clock: MockClock) -> None:
    async with house() as works:
        works.view.after["start"] = slow(2 * TOO_LATE)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(partial(works.owner.start, count, 3, run_id="late"))
            await trio.sleep(0.1)
            await works.away(TOO_LATE)
        await trio.sleep(3 * LEASE)
        record = await ended(works.log, "late")
        assert record.status in {"completed", "lost"}


@pytest.mark.parametrize("away", [1.0, 3 * LIMIT])
@pytest.mark.parametrize("producers", [0, 1, 10])
async def test_leaving_during_an_outage_ends_in_time(autojump_clock: MockClock, away: float, producers: int) -> None:
    view, log = View(), MemoryLog()
    view.log = log
    async with open_supervisor(view, drain_timeout=3, outage_limit=LIMIT, lease=LEASE) as owner:
        following: list[Reader] = []
        async with trio.open_nursery() as nursery:
            for _ in range(producers):
                run = await owner.start(Witness().waits)
                reader = Reader(owner, run.id)
                await nursery.start(reader.run)
                following.append(reader)
            await trio.sleep(1)
            go_away(view)
            await trio.sleep(away)
            for reader in following:
                reader.leave()
        began = trio.current_time()
    settings = owner.settings
    assert trio.current_time() - began <= 3 + settings.cancel_grace + 3 * settings.finalize_timeout
    assert owner.live_runs == 0
    assert not owner._tails.all()
    assert owner._committer.pending_bytes == 0
    assert {run.status for run in await log.list()} <= {"running"}


# --- what an outage can do to a log, and to those who look elsewhere ------------------------------------------------


async def bounded(view: View, operation: str, most: int) -> list[float]:
    """Count the calls of an operation, and slow them down once there are far too many, lest a test never end."""
    calls: list[float] = []

    async def hook() -> None:
        calls.append(trio.current_time())
        await trio.sleep(1 if len(calls) > most else 0)

    view.before[operation] = hook
    return calls


async def test_a_run_that_is_gone_after_an_outage_is_not_sought_without_pause(autojump_clock: MockClock) -> None:
    async with house() as works:
        run = await works.owner.start(Witness().waits)
        await trio.sleep(1)
        go_away(works.view)
        await trio.sleep(TOO_LATE)
        forget(works.log, run.id)
        come_back(works.view)
        fetches = await bounded(works.view, "fetch", 100)
        await trio.sleep(60)
        with pytest.raises(RunNotFound):
            await works.owner.get(run.id)
        assert len(fetches) <= 50
        await works.serves_again()


async def reads_slowly(supervisor: Supervisor, run_id: str, seen: list[str], pause: float) -> None:
    async with supervisor.follow(run_id) as entries:
        async for each in entries:
            seen.extend(gists([each]))
            await trio.sleep(pause)


@pytest.mark.parametrize("whose", ["mine", "theirs"])
async def test_i4_a_reader_that_slept_through_an_outage_ends(autojump_clock: MockClock, whose: str) -> None:
    async with house(lease=30.0) as works:
        home = works.owner if whose == "mine" else works.other
        run = await home.start(Witness().waits)
        await trio.sleep(1)
        seen: list[str] = []
        errors: list[Exception] = []

        async def sleepy() -> None:
            try:
                await reads_slowly(works.owner, run.id, seen, 2 * TOO_LATE)
            except ReaderReleased as error:
                errors.append(error)

        with trio.fail_after(20 * LEASE):
            async with trio.open_nursery() as nursery:
                nursery.start_soon(sleepy)
                await trio.sleep(0.1)
                await works.away(TOO_LATE)
                await trio.sleep(60)
                if whose == "theirs":
                    await works.other.cancel(run.id)
        ending = LOST if whose == "mine" else ["first", "cancelled", "[DONE]"]
        assert (seen, errors) == (ending, []) or (seen == ["first"] and errors)


async def test_i4_a_reader_that_comes_when_the_log_is_back_ends_all_the_same(autojump_clock: MockClock) -> None:
    async with house() as works:
        run = await works.other.start(count, 40, 1)
        await trio.sleep(1)
        go_away(works.view)
        await trio.sleep(TOO_LATE)
        come_back(works.view)
        works.view.after["read"] = slow(LONGEST_PAUSE + 1)  # the outage is over before the reply is here
        assert works.owner._fetcher._away
        reader = Reader(works.owner, run.id)
        with trio.fail_after(200):
            await reader.run()
        assert isinstance(reader.error, ReaderReleased) or gists(reader.entries)[-1] == "[DONE]"
        await works.other.wait(run.id)
