"""What the predecessor got wrong about runs, so that it does not come back.

D3, D5, D7, D18, D20, D22 and D26 are rows of the table in `supervisor/test_causes.py`, D6 is I6, D23 is in
`supervisor/test_services.py`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock.errors import RunExists
from penstock.log import CancelStatus
from penstock.log.memory import MemoryLog
from penstock.sse import Event
from penstock.supervisor import open_supervisor
from tests.support.supervising import (
    FIRST,
    View,
    Witness,
    count,
    entries_of,
    gists,
    near,
    read,
    slow,
    two_supervisors,
    unavailable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

both_dialects = pytest.mark.parametrize("dialect", ["plain", "letta"])


class Ticks:
    def __init__(self) -> None:
        self.closed = False

    def __aiter__(self) -> Ticks:
        return self

    async def __anext__(self) -> Event:
        await trio.sleep(1)
        return Event(data="tick")

    async def aclose(self) -> None:
        self.closed = True


async def test_d08_an_iterator_that_is_no_generator_can_be_cancelled_and_is_closed(autojump_clock: MockClock) -> None:
    async with open_supervisor(MemoryLog()) as supervisor:
        ticks = Ticks()
        run = await supervisor.start(ticks)
        await trio.sleep(2.5)
        await supervisor.cancel(run.id)
        assert gists(await read(supervisor, run.id)) == ["tick", "tick", "cancelled", "[DONE]"]
        assert ticks.closed


async def test_d09_a_slow_look_for_cancels_delays_no_chunk(autojump_clock: MockClock) -> None:
    view = View()
    view.before["cancel_requests"] = view.before["renew"] = slow(7)
    async with open_supervisor(view) as supervisor:
        run = await supervisor.start(count, 20, 0.5)
        async with supervisor.follow(run.id) as entries:
            async for entry in entries:
                assert trio.current_time() == near(min(entry.seq, 20) / 2)


async def test_d11_the_replay_of_a_cancelled_run_is_complete(autojump_clock: MockClock) -> None:
    async with two_supervisors(MemoryLog(), tail_entries=10) as (owner, other):
        run = await owner.start(count, 10_000, 0.01)
        await trio.sleep(5)
        await owner.cancel(run.id)
        record = await owner.wait(run.id)
        assert record.seq > 300
        for supervisor in (owner, other):
            assert [entry.seq for entry in await read(supervisor, run.id)] == list(range(1, record.seq + 1))


@both_dialects
async def test_d13_clients_get_one_schema_without_messages(autojump_clock: MockClock, dialect: str) -> None:
    async def fails(how: str) -> AsyncIterator[Any]:
        yield FIRST
        if how == "raises":
            raise ValueError("the password is hunter2")
        if how == "yields no chunk":
            yield {"password": "hunter2"}
        if how == "is silent":
            await trio.sleep_forever()
        yield ("the password is not here", 500)

    schemas = set()
    async with open_supervisor(MemoryLog(), dialect=dialect) as supervisor:
        for how in ("raises", "yields no chunk", "is silent", "says so"):
            run = await supervisor.start(fails, how, max_silence=5)
            *_, error, done = await read(supervisor, run.id)
            assert done.data == b"data: [DONE]\n\n"
            assert b"hunter2" not in error.wire
            said = json.loads(error.data.split(b"data: ")[1])
            schemas.add(tuple(said))
            record = await supervisor.get(run.id)
            assert record.error is not None
            assert (said["code"], said["error_id"]) == (record.error.code, record.error.error_id)
    assert schemas == {("code", "message", "error_id") if dialect == "plain" else ("error", "code", "error_id")}


@pytest.mark.parametrize("delay", [0.01, 0.2, 0.49])
async def test_d19_a_cancel_in_the_last_half_second_ends_cancelled(autojump_clock: MockClock, delay: float) -> None:
    view = View()
    view.wakeups_of_cancels = False
    async with two_supervisors(view, view.log) as (owner, other):
        run = await owner.start(count, 3, 1)
        await trio.sleep(3 - delay)
        assert (await other.cancel(run.id)).status is CancelStatus.REQUESTED
        assert (await owner.wait(run.id)).status == "cancelled"


async def test_d21_there_is_one_terminal_entry_with_the_highest_seq(autojump_clock: MockClock) -> None:
    async def says_it_twice() -> AsyncIterator[Any]:
        yield Event(data="1")
        yield "data: [DONE]\n\ndata: [DONE]\n\n"
        raise ValueError

    log = MemoryLog()
    async with open_supervisor(log) as supervisor:
        run = await supervisor.start(says_it_twice)
        await supervisor.wait(run.id)
        await supervisor.cancel(run.id)
        await trio.sleep(100)
        assert [(entry.seq, entry.terminal) for entry in await entries_of(log, run.id)] == [(1, False), (2, True)]


@pytest.mark.parametrize("last", [Event(data="[DONE]"), Event(data="no", event="error"), 5, None], ids=repr)
async def test_d24_the_finally_of_a_source_has_run_when_its_end_is_told(autojump_clock: MockClock, last: Any) -> None:
    left_at = []

    async def producer() -> AsyncIterator[Any]:
        try:
            yield FIRST
            if last is not None:
                yield last
        finally:
            await trio.sleep(2)  # noqa: ASYNC102
            left_at.append(trio.current_time())

    async with open_supervisor(MemoryLog()) as supervisor:
        run = await supervisor.start(producer)
        await supervisor.wait(run.id)
        assert left_at == [near(2)]


async def test_d25_a_run_whose_owner_is_cut_off_from_the_log_is_lost_by_lease(autojump_clock: MockClock) -> None:
    view, witness = View(), Witness()
    async with open_supervisor(view.log, lease=10) as other, open_supervisor(view, lease=10) as owner:
        run = await owner.start(witness.waits)
        await trio.sleep(12)
        for operation in ("append", "renew", "cancel_requests", "check", "reap", "fetch"):
            view.before[operation] = unavailable
        cut_off_at = trio.current_time()
        record = await other.wait(run.id)
        assert trio.current_time() - cut_off_at <= 10 + 2
        assert (record.status, record.error and record.error.code) == ("lost", "RUN_LOST")
        view.before.clear()
        await trio.sleep(20)
        assert witness.saw == "fenced"
        assert await owner.get(run.id) == record


async def test_d31_an_owner_that_comes_back_neither_begins_again_nor_goes_on(autojump_clock: MockClock) -> None:
    view = View()
    async with open_supervisor(view.log, lease=6) as other, open_supervisor(view, lease=6) as owner:
        async with owner.open_run("run") as writer:
            assert await writer.write(FIRST) == 1
            await writer.flush()
            assert await writer.write(FIRST) == 2  # an owner goes on after the last
        with pytest.raises(RunExists):
            await owner.start(count, 3, run_id="run")
        await owner.start(count, 100, 7, run_id="stalled")
        await trio.sleep(7.5)
        view.before["renew"] = slow(40)
        assert (await other.wait("stalled")).status == "lost"
        with pytest.raises(RunExists):
            await other.start(count, 3, run_id="stalled")
        await trio.sleep(60)
        assert gists(await entries_of(view, "stalled")) == ["1", "error RUN_LOST", "[DONE]"]


async def test_d40_a_run_longer_than_ended_ones_are_kept_does_not_expire(autojump_clock: MockClock) -> None:
    async with two_supervisors(MemoryLog(ttl=18)) as (owner, other):
        run = await owner.start(count, 5, 12)
        await trio.sleep(42)
        assert (await owner.get(run.id)).status == "running"
        for supervisor in (owner, other):
            async with supervisor.follow(run.id) as entries:
                assert gists([await anext(entries) for _ in range(3)]) == ["1", "2", "3"]
        assert (await other.wait(run.id)).status == "completed"
        await trio.sleep(17)  # what has ended is kept for that long
        assert gists(await read(other, run.id)) == ["1", "2", "3", "4", "5", "[DONE]"]
