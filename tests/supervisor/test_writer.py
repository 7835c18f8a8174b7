"""open_run: a run written by hand. The body of the block is its producer, in the caller's own task."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.errors import EventTooLarge, InvalidChunk, PublicError, RunCancelled, RunEnded, RunExists
from penstock.log.memory import MemoryLog
from penstock.sse import Event
from penstock.supervisor import Supervisor, open_supervisor
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
    readers,
    slow,
    two_supervisors,
)

if TYPE_CHECKING:
    from trio.testing import MockClock

    from penstock.supervisor.execution import RunWriter


async def test_what_is_written_is_numbered_stored_and_ended_when_the_block_is_left(autojump_clock: MockClock) -> None:
    log = MemoryLog()
    async with two_supervisors(log) as (owner, other):
        async with owner.open_run("run", name="by hand", metadata={"a": 1}) as writer:
            assert (writer.id, writer.run.producer, writer.run.metadata) == ("run", "by hand", {"a": 1})
            async with readers((owner, "run"), (other, "run")) as (here, there):
                assert await writer.write(Event(data="one")) == 1
                assert await writer.write("data: two\n\ndata: three\n\n") == 3
                assert await writer.write(b"data: four\n\n") == 4
                assert await writer.write("") == 4
                await writer.flush()
                assert (await other.get("run")).seq == 4
                await wait_all_tasks_blocked()
                assert gists(here.entries) == gists(there.entries) == ["one", "two", "three", "four"]
                here.leave()
                there.leave()
        record = await ended(log, "run")  # leaving has waited for that
        assert (record.status, record.stop_reason, record.seq) == ("completed", "end_turn", 5)
        with pytest.raises(RunExists):
            await owner.open_run("run").__aenter__()
        assert_nothing_is_left(owner)


@pytest.mark.parametrize(
    "error, status, code, reported",
    [
        (ValueError("secret"), "failed", "ERROR", 1),
        (PublicError("no quota", "NO_QUOTA"), "failed", "NO_QUOTA", 1),
        (ExceptionGroup("", [ValueError("a"), ValueError("b")]), "failed", "ERROR", 1),
        (RunCancelled("run", "own words"), "cancelled", None, 0),
        (KeyboardInterrupt(), "failed", "INTERRUPTED", 0),
    ],
    ids=repr,
)
async def test_an_exception_of_the_body_ends_the_run_and_goes_on(
    autojump_clock: MockClock, error: BaseException, status: str, code: str | None, reported: int
) -> None:
    log, notes = MemoryLog(), Notes()
    async with open_supervisor(log, observer=notes) as supervisor:
        with pytest.raises(type(error)) as caught:  # noqa: PT012
            async with supervisor.open_run("run") as writer:
                await writer.write(FIRST)
                raise error
        assert caught.value is error
        record = await ended(log, "run")
        assert (record.status, record.error and record.error.code) == (status, code)
        assert len(notes.errors) == reported


async def test_a_cancel_cuts_the_body_short_and_the_caller_is_told(autojump_clock: MockClock) -> None:
    log, witness = MemoryLog(), Witness()
    async with two_supervisors(log) as (owner, other):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_cancel_after, 3, other, "run")
            with pytest.raises(RunCancelled) as caught:  # noqa: PT012
                async with owner.open_run("run") as writer:
                    await writer.write(FIRST)
                    with witness.watching():
                        await trio.sleep_forever()
        assert (caught.value.run_id, caught.value.reason) == ("run", "enough")
        assert (witness.saw, trio.current_time()) == ("run cancelled: enough", near(3))
        assert gists(await entries_of(log, "run")) == ["first", "cancelled", "[DONE]"]
        assert (await ended(log, "run")).cancel_reason == "enough"
        await trio.sleep(100)  # the scope of the block is over: nothing more is cancelled


async def _cancel_after(seconds: float, supervisor: Supervisor, run_id: str) -> None:
    await trio.sleep(seconds)
    await supervisor.cancel(run_id, "enough")


@pytest.mark.parametrize("limits, at, stop_reason", [({"timeout": 5}, 5, "timeout"), ({"max_silence": 5}, 7, "silent")])
async def test_a_clock_cuts_the_body_short_and_the_caller_is_told(
    autojump_clock: MockClock, limits: dict[str, Any], at: float, stop_reason: str
) -> None:
    log = MemoryLog()
    async with open_supervisor(log) as supervisor:
        with pytest.raises(RunEnded) as caught:  # noqa: PT012
            async with supervisor.open_run("run", **limits) as writer:
                await trio.sleep(2)
                await writer.write(FIRST)
                await trio.sleep_forever()
        assert trio.current_time() == near(at)
        record = await ended(log, "run")
        assert (record.status, record.stop_reason) == ("failed", stop_reason)
        assert caught.value.run is not None
        assert caught.value.run.stop_reason == stop_reason


async def test_a_body_that_ends_by_itself_is_told_nothing_of_a_cancel(autojump_clock: MockClock) -> None:
    log = MemoryLog()
    async with open_supervisor(log) as supervisor:
        async with supervisor.open_run("run") as writer:
            await supervisor.cancel("run", "enough")
            # no checkpoint from here on
            assert writer.id == "run"
        assert (await ended(log, "run")).status == "cancelled"


async def test_a_cancellation_from_outside_goes_on_and_the_run_is_interrupted(autojump_clock: MockClock) -> None:
    view = View()
    view.before["append"] = slow(1)
    async with open_supervisor(view) as supervisor:
        with trio.move_on_after(3) as scope:
            async with supervisor.open_run("run") as writer:
                await writer.write(FIRST)
                await trio.sleep_forever()
        assert scope.cancelled_caught
        assert trio.current_time() == near(4)  # leaving has waited until that was stored
        assert gists(await entries_of(view, "run")) == ["first", "error INTERRUPTED", "[DONE]"]
        assert (await ended(view, "run")).stop_reason == "interrupted"


async def test_a_body_under_a_shield_writes_into_the_void_once_it_is_cancelled(autojump_clock: MockClock) -> None:
    log, notes = MemoryLog(), Notes()
    async with open_supervisor(log, cancel_grace=4, observer=notes) as supervisor:
        with pytest.raises(RunCancelled):  # noqa: PT012
            async with supervisor.open_run("run") as writer:
                await writer.write(FIRST)
                await supervisor.cancel("run")
                with trio.CancelScope(shield=True):
                    assert await writer.write(Event(data="stale")) == 1
                    await writer.flush()
                    await trio.sleep(6)  # for longer than the grace: the run ends without it
                    assert (await supervisor.get("run")).status == "cancelled"
                    await writer.write(Event(data="stale"))
                    with pytest.raises(RunEnded):
                        await writer.write(Event(data="stale"))
                await trio.sleep_forever()
        assert [seconds for _, seconds, _ in notes.stuck] == [4]
        assert gists(await entries_of(log, "run")) == ["first", "cancelled", "[DONE]"]


async def test_what_is_no_chunk_raises_where_it_is_written_and_the_run_goes_on(autojump_clock: MockClock) -> None:
    async with open_supervisor(MemoryLog(), max_event_bytes=100) as supervisor:
        async with supervisor.open_run("run") as writer:
            for wrong in (5, None, "data: half", Event(data="a", id="1"), "data: one\n\nid: 2\n\n", "data: \ud83d\n\n"):
                with pytest.raises(InvalidChunk):
                    await writer.write(wrong)
            with pytest.raises(EventTooLarge):
                await writer.write(Event(data="x" * 100))
            assert await writer.write(FIRST) == 1
        assert gists(await entries_of(supervisor.log, "run")) == ["first", "[DONE]"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "last, status",
    [(Event(data="[DONE]"), "completed"), (Event(data="no", event="error"), "failed"), (("no", 500), "failed")],
)
async def test_nothing_is_written_after_what_ends_the_run(autojump_clock: MockClock, last: Any, status: str) -> None:
    log = MemoryLog()
    async with open_supervisor(log) as supervisor:
        async with supervisor.open_run("run") as writer:
            await writer.write(FIRST)
            await writer.write(last)
            with pytest.raises(RunEnded):
                await writer.write(FIRST)
        with pytest.raises(RunEnded):
            await writer.write(FIRST)
        assert (await ended(log, "run")).status == status


async def test_a_body_that_goes_on_after_the_runs_end_is_cut_short(autojump_clock: MockClock) -> None:
    log = MemoryLog()
    async with open_supervisor(log, cancel_grace=4) as supervisor:
        with pytest.raises(RunEnded):  # noqa: PT012
            async with supervisor.open_run("run") as writer:
                await writer.write(Event(data="[DONE]"))
                await trio.sleep_forever()
        assert trio.current_time() == near(4)
        assert (await ended(log, "run")).status == "completed"


async def test_several_tasks_may_write_and_each_ones_chunks_keep_their_order(autojump_clock: MockClock) -> None:
    view = View()
    view.before["append"] = slow(0.01)

    async with open_supervisor(view, max_pending_bytes=200) as supervisor:
        async with supervisor.open_run("run") as writer, trio.open_nursery() as nursery:

            async def write(name: str) -> None:
                for number in range(50):
                    seq = await writer.write(f"data: {name}{number}\n\ndata: {name}{number}+\n\n")
                    positions[f"{name}{number}+"] = seq

            positions: dict[str, int] = {}
            for name in "abc":
                nursery.start_soon(write, name)
        await ended(view, "run")
        found = gists(await entries_of(view, "run"))[:-1]
        for name in "abc":
            own = [text for text in found if text.startswith(name)]
            assert own == [f"{name}{number}{half}" for number in range(50) for half in ("", "+")]
        assert all(found[seq - 1] == text and found[seq - 2] + "+" == text for text, seq in positions.items())


async def test_nothing_follows_what_ends_the_run_from_another_task(autojump_clock: MockClock) -> None:
    view = View()
    outcomes = set()
    async with open_supervisor(view, max_pending_bytes=100) as supervisor:
        view.before["append"] = slow(1)

        async def write(writer: RunWriter, data: str, event: str | None = None) -> None:
            try:
                await writer.write(Event(data, event))
            except RunEnded:
                refused.append(data)

        for _ in range(20):  # Trio wakes tasks in any order
            refused: list[str] = []
            async with supervisor.open_run() as writer, trio.open_nursery() as nursery:
                await writer.write(Event("x" * 100))
                nursery.start_soon(write, writer, "no", "error")
                nursery.start_soon(write, writer, "a")
            await ended(view, writer.id)
            stored = gists(await entries_of(view, writer.id))[1:]
            assert stored == (["error no", "[DONE]"] if refused else ["a", "error no", "[DONE]"])
            outcomes.add(len(refused))
    assert outcomes == {0, 1}


async def test_a_fenced_body_is_cut_short_and_the_caller_is_told(autojump_clock: MockClock) -> None:
    view, witness = View(), Witness()
    async with open_supervisor(view.log, lease=6), open_supervisor(view, lease=6) as owner:
        with pytest.raises(RunEnded):  # noqa: PT012
            async with owner.open_run("run"):
                view.before["renew"] = slow(20)
                with witness.watching():
                    await trio.sleep_forever()
        assert witness.saw == "fenced"


async def test_a_body_whose_supervisor_fails_is_cut_short(autojump_clock: MockClock) -> None:
    view, witness = View(), Witness()
    async with trio.open_nursery() as nursery:

        async def by_hand(supervisor: Supervisor) -> None:
            with pytest.raises(RunEnded):  # noqa: PT012
                async with supervisor.open_run("run"):
                    with witness.watching():
                        await trio.sleep_forever()

        with pytest.raises(Exception, match="a service of the supervisor died"):  # noqa: PT012
            async with open_supervisor(view) as supervisor:
                nursery.start_soon(by_hand, supervisor)  # noqa: ASYNC111
                await wait_all_tasks_blocked()
                view.before["cancel_requests"] = broken
                await trio.sleep_forever()
    assert witness.saw == "shutdown: a service of the supervisor died"
