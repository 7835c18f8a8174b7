"""What a real supervisor notifies its observers of: each event once; and that no observer can do harm."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from penstock.errors import RunCancelled, RunExists, SupervisorFailed
from penstock.log.memory import MemoryLog
from penstock.observer import Commit, Figures, Observer, Observers
from penstock.runs import RunStatus
from penstock.sse import Event
from penstock.supervisor import open_supervisor
from tests.support.logs import LEASE as ANOTHERS
from tests.support.logs import LOST_ENDING, record
from tests.support.observers import CONTINUAL, HOOKS, FailingObserver, RecordingObserver
from tests.support.serving import problem, serving
from tests.support.supervising import (
    FIRST,
    View,
    Witness,
    broken,
    come_back,
    count,
    entries_of,
    go_away,
    near,
    readers,
    slow,
    unavailable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock


LEASE: Final = 6.0
OVER_HTTP: Final = {"stream_started", "stream_ended", "pinged", "refused"}
ENDS: Final = {"completes": "completed", "fails": "failed", "holds-on": "cancelled", "fenced": "lost", "lost": "lost"}


# All that can happen to runs and their log, in one minute


async def fails() -> AsyncIterator[Event]:
    yield FIRST
    raise ValueError("oops")


async def holds_on() -> AsyncIterator[Event]:
    yield FIRST
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(3)


async def eventful(observer: Observer) -> dict[str, str]:
    """A supervisor to which everything happens once; how its runs ended."""
    view = View()
    async with open_supervisor(view, lease=LEASE, cancel_grace=1.0, observer=observer) as supervisor:
        await supervisor.wait((await supervisor.start(count, 3, run_id="completes")).id)
        await supervisor.wait((await supervisor.start(fails, run_id="fails")).id)
        await supervisor.start(holds_on, run_id="holds-on")
        await trio.sleep(1)
        await supervisor.cancel("holds-on")
        await trio.sleep(10)
        go_away(view)
        await trio.sleep(2.5)
        come_back(view)
        await supervisor.start(Witness().waits, run_id="fenced")
        await trio.sleep(1)
        view.before["renew"] = slow(30)  # its own reaper finds the lease run out
        await trio.sleep(50)
        await view.log.start(record("lost"), ANOTHERS)
        await trio.sleep(ANOTHERS.seconds + 2)
        return {run.id: str(run.status) for run in await supervisor.list()}


async def test_everything_that_happens_is_recorded_once(autojump_clock: MockClock) -> None:
    recorded = RecordingObserver()
    assert await eventful(recorded) == ENDS
    warned = recorded.of("warning")
    assert warned
    assert recorded.counts() == {
        "run_started": 4,
        "run_ended": 3,
        "run_cancelled": 1,
        "run_stuck": 1,
        "run_fenced": 1,
        "runs_lost": 2,
        "on_error": 1,
        "outage_began": 1,
        "outage_ended": 1,
        "warning": len(warned),
    }
    assert recorded.counts().keys() == set(HOOKS) - OVER_HTTP - CONTINUAL
    assert [run.id for run in recorded.of("run_started")] == ["completes", "fails", "holds-on", "fenced"]
    assert [(run.id, str(run.status)) for run in recorded.of("run_ended")] == [*ENDS.items()][:3]
    assert recorded.of("run_cancelled") == [("holds-on", near(1))]
    ((stuck, seconds, stack),) = recorded.of("run_stuck")
    assert (stuck, seconds) == ("holds-on", near(1))
    assert "in holds_on" in stack
    assert (recorded.of("run_fenced"), recorded.of("runs_lost")) == (["fenced"], [["fenced"], ["lost"]])
    assert recorded.of("outage_ended") == [pytest.approx(2.5, abs=1)]  # it is looked at once a second


async def test_an_observer_whose_every_hook_fails_harms_no_run(autojump_clock: MockClock) -> None:
    failing, recorded = FailingObserver(), RecordingObserver()
    assert await eventful(Observers(failing, recorded)) == ENDS
    assert set(failing.called) == set(HOOKS) - OVER_HTTP
    assert recorded.counts().keys() == set(HOOKS) - OVER_HTTP - CONTINUAL
    alone = FailingObserver()
    assert await eventful(alone) == ENDS
    assert set(alone.called) == set(failing.called)


async def test_an_observer_whose_every_hook_fails_harms_no_reader_over_http() -> None:
    failing = FailingObserver()
    async with serving(metrics=failing, ping_interval=0.01) as server:
        assert [block.data for block in await server.read(await server.start("count", 3))] == ["1", "2", "3", "[DONE]"]
        assert (await server.read(await server.start("fail")))[-1].data == "[DONE]"
        problem(await server.client.get("/v1/runs/nowhere"), 404, "RUN_NOT_FOUND")
        problem(await server.client.get("/v1/runs/nowhere/stream"), 404, "RUN_NOT_FOUND")
        async with server.reading(run_id := await server.start("silent")) as reader:
            assert [block.comment for block in await reader.take(2)] == ["ping", "ping"]
            await server.client.post(f"/v1/runs/{run_id}/cancel")
            assert (await reader.rest())[-1].data == "[DONE]"
    assert set(failing.called) == OVER_HTTP | CONTINUAL | {"run_started", "run_ended", "run_cancelled", "on_error"}


# Runs


async def test_the_records_that_are_recorded_are_those_of_the_log(autojump_clock: MockClock) -> None:
    recorded = RecordingObserver()
    async with open_supervisor(log := MemoryLog(), observer=recorded) as supervisor:
        started = await supervisor.start(count, 3, run_id="r", name="counts", metadata={"user": "u"})
        assert recorded.of("run_started") == [started]
        assert started.status is RunStatus.RUNNING
        await supervisor.wait("r")
        (ended,) = recorded.of("run_ended")
        kept = await log.get("r")
        assert (ended.status, ended.stop_reason, ended.seq, ended.metadata) == (
            "completed",
            "end_turn",
            4,
            kept.metadata,
        )
        assert (ended.id, ended.producer, ended.started_at) == (kept.id, kept.producer, kept.started_at)
        assert ended.ended_at == pytest.approx(kept.ended_at)
        async with supervisor.open_run("by-hand") as run:
            await run.write(FIRST)
        assert (
            [run.id for run in recorded.of("run_started")]
            == [run.id for run in recorded.of("run_ended")]
            == ["r", "by-hand"]
        )


async def test_of_a_run_that_is_not_created_nothing_is_recorded(autojump_clock: MockClock) -> None:
    recorded = RecordingObserver()
    async with open_supervisor(MemoryLog(), observer=recorded) as supervisor:
        for _ in range(3):
            await supervisor.start(count, 3, run_id="r", idempotency_key="k")
        with pytest.raises(RunExists):
            await supervisor.start(count, 3, run_id="r")
        await supervisor.wait("r")
    assert recorded.counts() == {"run_started": 1, "run_ended": 1}


@pytest.mark.parametrize("elsewhere", [False, True], ids=["at its owner", "elsewhere"])
async def test_a_cancels_time_is_recorded_from_when_the_owner_heard(autojump_clock: MockClock, elsewhere: bool) -> None:
    recorded, view = RecordingObserver(), View()
    async with open_supervisor(view.log) as other, open_supervisor(view, observer=recorded) as owner:
        run_id = (await owner.start(holds_on)).id
        await trio.sleep(1.2)
        if elsewhere:
            view.before["cancel_requests"] = slow(5)  # the request is five seconds on its way
        await (other if elsewhere else owner).cancel(run_id)
        await owner.wait(run_id)
        assert trio.current_time() == near(1.2 + 5 * elsewhere + 3)
        assert recorded.of("run_cancelled") == [(run_id, near(3))]
        assert [name for name, _ in recorded.calls if name.startswith("run_")][-2:] == ["run_ended", "run_cancelled"]


async def test_a_cancel_that_meets_the_runs_end_is_recorded_as_one_that_took_no_time(autojump_clock: MockClock) -> None:
    recorded, view = RecordingObserver(), View()

    async def cancel_first() -> None:
        view.before.pop("append", None)
        await view.log.request_cancel("r", "too late")

    async with open_supervisor(view, observer=recorded) as supervisor:
        view.wakeups_of_cancels = False
        view.before["append"] = cancel_first
        await supervisor.start(count, 3, run_id="r")
        assert (await supervisor.wait("r")).status == "cancelled"
    assert recorded.counts() == {"run_started": 1, "run_ended": 1, "run_cancelled": 1}
    assert recorded.of("run_cancelled") == [("r", near(0))]


async def gives_up() -> AsyncIterator[Event]:
    yield FIRST
    raise RunCancelled(None, "by itself")


@pytest.mark.parametrize(
    "producer, timeout, status",
    [(gives_up, None, "cancelled"), (holds_on, 2.0, "failed"), (fails, None, "failed")],
    ids=["cancelled by itself", "timed out", "failed"],
)
async def test_a_run_that_nobody_cancelled_has_no_time_of_a_cancel(
    autojump_clock: MockClock, producer: Any, timeout: float | None, status: str
) -> None:
    recorded = RecordingObserver()
    async with open_supervisor(MemoryLog(), observer=recorded) as supervisor:
        run_id = (await supervisor.start(producer, timeout=timeout)).id
        assert (await supervisor.wait(run_id)).status == status
    assert "run_cancelled" not in recorded.counts()
    assert len(recorded.of("run_ended")) == 1


async def test_a_cancel_that_comes_after_the_timeout_has_no_time(autojump_clock: MockClock) -> None:
    recorded = RecordingObserver()
    async with open_supervisor(MemoryLog(), observer=recorded) as supervisor:
        run_id = (await supervisor.start(holds_on, timeout=2.0)).id
        await trio.sleep(3)
        await supervisor.cancel(run_id)
        assert (await supervisor.wait(run_id)).stop_reason == "timeout"
    assert recorded.counts() == {"run_started": 1, "run_ended": 1}


# Errors


async def test_an_error_is_recorded_with_the_id_that_clients_are_shown(autojump_clock: MockClock) -> None:
    recorded = RecordingObserver()
    async with open_supervisor(MemoryLog(), observer=recorded) as supervisor:
        run = await supervisor.wait((await supervisor.start(fails)).id)
        ((error, error_id, where),) = recorded.of("on_error")
        assert (repr(error), where) == ("ValueError('oops')", f"run {run.id}")
        assert run.error is not None
        assert run.error.error_id == error_id


async def fails_late() -> AsyncIterator[Event]:
    yield FIRST
    try:
        await trio.sleep_forever()
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(5)
        raise ValueError("late")


async def fails_late_in_its_cleanup() -> AsyncIterator[Event]:
    try:
        yield Event(data="[DONE]")
    finally:
        with trio.CancelScope(shield=True):
            await trio.sleep(5)
        raise ValueError("late")


@pytest.mark.parametrize("producer", [fails_late, fails_late_in_its_cleanup])
async def test_an_error_after_a_runs_end_has_an_id_of_its_own(autojump_clock: MockClock, producer: Any) -> None:
    recorded = RecordingObserver()
    async with open_supervisor(MemoryLog(), observer=recorded, cancel_grace=1.0) as supervisor:
        run_id = (await supervisor.start(producer)).id
        await trio.sleep(1)
        await supervisor.cancel(run_id)
        await trio.sleep(10)
    ((error, _, where),) = recorded.of("on_error")
    assert (repr(error), where) == ("ValueError('late')", f"run {run_id}, after its end")


async def test_what_a_service_died_of_is_recorded_and_the_figures_end_at_zero(autojump_clock: MockClock) -> None:
    recorded, view = RecordingObserver(), View()
    with pytest.raises(SupervisorFailed):  # noqa: PT012
        async with open_supervisor(view, observer=recorded) as supervisor:
            await supervisor.start(Witness().waits)
            await trio.sleep(1)
            view.before["cancel_requests"] = broken
            await trio.sleep_forever()
    ((error, _, where),) = recorded.of("on_error")
    assert (type(error), where) == (ZeroDivisionError, "the supervisor's services")
    assert recorded.of("figures")[-1] == Figures(0, 0, 0, 0, 0, 0)
    assert not recorded.of("run_ended")  # nothing is pretended


# The log


async def test_commits_add_up_to_what_the_log_keeps(autojump_clock: MockClock) -> None:
    recorded, view = RecordingObserver(), View()
    view.before["append"] = slow(0.25)
    async with open_supervisor(view, observer=recorded) as supervisor:
        ids = [(await supervisor.start(count, n, 0.1 * (n % 3))).id for n in (1, 20, 300)]
        for run_id in ids:
            await supervisor.wait(run_id)
    kept = [entry for run_id in ids for entry in await entries_of(view, run_id)]
    commits = recorded.of("committed")
    assert sum(commit.entries for commit in commits) == len(kept) == 324
    assert sum(commit.bytes for commit in commits) == sum(len(entry.wire) for entry in kept)
    assert max(commit.runs for commit in commits) >= 2
    assert view.calls["append"] == len(commits)
    assert all(commit.seconds == pytest.approx(0.25) for commit in commits)


async def test_a_commits_time_includes_the_attempts_that_failed(autojump_clock: MockClock) -> None:
    recorded, view = RecordingObserver(), View()
    async with open_supervisor(view, observer=recorded) as supervisor:
        run_id = (await supervisor.start(Witness().waits)).id
        await trio.sleep(1)
        recorded.calls.clear()
        view.before["append"] = unavailable
        await supervisor.cancel(run_id)
        await trio.sleep(7)
        view.before.clear()
        await supervisor.wait(run_id)
        (commit,) = recorded.of("committed")
        assert commit == Commit(
            1, 2, sum(len(each.wire) for each in (await entries_of(view, run_id))[1:]), commit.seconds
        )
        assert 7 <= commit.seconds == near(trio.current_time() - 1)


async def test_what_is_not_stored_is_recorded_as_no_commit(autojump_clock: MockClock) -> None:
    recorded, view = RecordingObserver(), View()
    async with open_supervisor(view, observer=recorded, lease=LEASE) as supervisor:
        run = await supervisor.start(count, 3, 10.0)
        await trio.sleep(11)
        view.before |= {"renew": unavailable, "reap": unavailable}
        await trio.sleep(LEASE)
        assert await view.log.reap(lambda: LOST_ENDING) == [run.id]
        assert len(recorded.of("committed")) == 1
        await trio.sleep(10)
    assert len(recorded.of("committed")) == 1
    assert recorded.of("run_fenced") == [run.id]


@pytest.mark.parametrize("away", [0.5, 7.5])
async def test_an_outage_is_recorded_when_it_begins_and_when_it_ends(autojump_clock: MockClock, away: float) -> None:
    recorded, view = RecordingObserver(), View()
    async with open_supervisor(view, observer=recorded) as supervisor:
        await supervisor.start(Witness().waits, run_id="r")
        for _ in range(3):
            await trio.sleep_until(trio.current_time() // 1 + 10.25)
            go_away(view)
            await trio.sleep(away)
            come_back(view)
            await trio.sleep(5)
    noticed = away > 0.75  # it is looked at once a second
    assert len(recorded.of("outage_began")) == len(recorded.of("outage_ended")) == 3 * noticed
    assert all(seconds == pytest.approx(away, abs=1.2) for seconds in recorded.of("outage_ended"))
    order = [name for name, _ in recorded.calls if name.startswith("outage")]
    assert order == ["outage_began", "outage_ended"] * (3 * noticed)


async def test_figures_are_recorded_once_a_second_when_asked_for_and_at_the_end(autojump_clock: MockClock) -> None:
    recorded = RecordingObserver()
    async with open_supervisor(MemoryLog(), observer=recorded) as supervisor:
        await trio.sleep(5.5)
        assert len(recorded.of("figures")) == 5
        supervisor.tell_figures()
        assert len(recorded.of("figures")) == 6
    assert recorded.of("figures") == [Figures(0, 0, 0, 0, 0, 0)] * 7


async def test_figures_say_how_much_there_is_and_add_up_to_what_readers_were_handed(autojump_clock: MockClock) -> None:
    recorded, view = RecordingObserver(), View()
    async with open_supervisor(view, observer=recorded) as supervisor:
        runs = [await supervisor.start(count, n, 0.3) for n in (10, 20, 30)]
        which = [(supervisor, run.id) for run in runs for _ in range(4)]
        async with readers(*which) as following:
            await trio.sleep(1.4)
            supervisor.tell_figures()
            kept = [await entries_of(view, run.id) for run in runs]
            tails = sum(len(entry.wire) for entries in kept for entry in entries)
            now = recorded.of("figures")[-1]
            assert (now.runs, now.readers, now.pending_bytes, now.tail_bytes) == (3, 12, 0, tails)
            view.before["append"] = slow(3)
            await trio.sleep(1)
            pending = sum(each.buffer.size for each in supervisor._runs.by_id.values())
            supervisor.tell_figures()
            assert recorded.of("figures")[-1].pending_bytes == pending > 0
            view.before.clear()
            following[0].leave()
            await trio.sleep(0.1)
            supervisor.tell_figures()
            assert recorded.of("figures")[-1].readers == 11
        handed = [entry for reader in following for entry in reader.entries]
    figures = recorded.of("figures")
    assert len(figures) > 8
    assert sum(each.entries_out for each in figures) == len(handed)
    assert sum(each.bytes_out for each in figures) == sum(len(entry.wire) for entry in handed)
    assert figures[-1] == Figures(0, 0, 0, 0, figures[-1].entries_out, figures[-1].bytes_out)
