"""The two nurseries of a supervisor: services outlive runs, whatever the way out, and what comes of it if one dies."""

from __future__ import annotations

import signal
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from penstock.errors import LogUnavailable, RunEnded, SupervisorFailed
from penstock.log.memory import MemoryLog
from penstock.supervisor import Supervisor, open_supervisor
from tests.support.supervising import (
    FIRST,
    Notes,
    View,
    Witness,
    broken,
    count,
    ended,
    entries_of,
    gists,
    near,
    read,
    shielded,
    slow,
    unavailable,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from penstock.sse import Event
    from penstock.supervisor.follower import Follower

INTERRUPTED = ["first", "error INTERRUPTED", "[DONE]"]


# The order of leaving


class Stopped(Exception):
    pass


async def returns() -> None:
    await wait_all_tasks_blocked()


async def raises() -> None:
    await wait_all_tasks_blocked()
    raise Stopped


async def is_interrupted() -> None:
    await wait_all_tasks_blocked()
    raise KeyboardInterrupt


async def is_cancelled() -> None:
    await trio.sleep_forever()


@pytest.mark.parametrize("slow_log", [0, 2], ids=["fast log", "slow log"])
@pytest.mark.parametrize("body", [returns, raises, is_interrupted, is_cancelled], ids=lambda body: body.__name__)
async def test_however_it_is_left_every_run_gets_its_end_while_the_services_are_there(
    autojump_clock: MockClock, body: Callable[[], Awaitable[None]], slow_log: float
) -> None:
    view, notes = View(), Notes()
    cleaned_up = []

    async def cleans_up() -> AsyncIterator[Event]:
        yield FIRST
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(3, shield=True):
                await trio.sleep(1)
            cleaned_up.append(True)

    async def never_begins() -> AsyncIterator[Event]:
        await trio.sleep_forever()
        yield FIRST

    outside = trio.CancelScope()
    raised: BaseException | None = None
    try:
        with outside:
            async with open_supervisor(view, drain_timeout=4, observer=notes) as supervisor:
                for producer in (cleans_up, never_begins):
                    await supervisor.start(producer, run_id=producer.__name__)
                await wait_all_tasks_blocked()
                view.before["append"] = slow(slow_log)
                if body is is_cancelled:
                    outside.cancel()
                await body()
    except (Stopped, KeyboardInterrupt) as error:
        raised = error
    errors: dict[Any, Any] = {raises: Stopped, is_interrupted: KeyboardInterrupt}
    assert type(raised) is errors.get(body, type(None))
    assert outside.cancelled_caught is (body is is_cancelled)
    assert trio.current_time() == near((4 if body is returns else 0) + max(1, 2 * slow_log))
    assert cleaned_up == [True]
    for run_id, expected in (("cleans_up", INTERRUPTED), ("never_begins", INTERRUPTED[1:])):
        record = await ended(view, run_id)
        assert (record.status, record.stop_reason) == ("failed", "interrupted")
        assert gists(await entries_of(view, run_id)) == expected
    assert len(notes.ended) == 2
    assert notes.errors == []


async def test_ctrl_c_in_a_producer_is_no_end_of_its_own_and_goes_on(autojump_clock: MockClock) -> None:
    log, witness = MemoryLog(), Witness()

    async def pressed() -> AsyncIterator[Event]:
        yield FIRST
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # noqa: PT012
        async with open_supervisor(log) as supervisor:
            await supervisor.start(witness.waits, run_id="other")
            await supervisor.start(pressed, run_id="pressed")
            await trio.sleep_forever()
    for run_id in ("other", "pressed"):
        assert (await ended(log, run_id)).stop_reason == "interrupted"
        assert gists(await entries_of(log, run_id)) == INTERRUPTED


async def test_a_stuck_producer_holds_it_up_and_is_reported_every_ten_seconds(autojump_clock: MockClock) -> None:
    log, notes, let_go = MemoryLog(), Notes(), trio.Event()

    async def holds_on() -> AsyncIterator[Event]:
        yield FIRST
        await shielded(let_go)

    async def lets_go_later() -> None:
        await trio.sleep(65)
        assert (await ended(log, "stuck")).stop_reason == "interrupted"
        let_go.set()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(lets_go_later)
        async with open_supervisor(log, observer=notes, drain_timeout=5, cancel_grace=4) as supervisor:
            await supervisor.start(holds_on, run_id="stuck")
        assert trio.current_time() == near(65)
    assert [seconds for _, seconds, _ in notes.stuck] == [4, 14, 24, 34, 44, 54]


async def test_a_run_by_hand_in_a_task_of_somebody_else_is_ended_with_its_grace(autojump_clock: MockClock) -> None:
    log, let_go = MemoryLog(), trio.Event()

    async def by_hand(supervisor: Supervisor) -> None:
        async with supervisor.open_run("by-hand") as writer:
            await writer.write(FIRST)
            await shielded(let_go)

    async with trio.open_nursery() as nursery:
        with pytest.raises(Stopped):  # noqa: PT012
            async with open_supervisor(log, cancel_grace=7, finalize_timeout=1) as supervisor:
                nursery.start_soon(by_hand, supervisor)  # noqa: ASYNC111
                await wait_all_tasks_blocked()
                raise Stopped
        assert trio.current_time() == near(7)
        assert gists(await entries_of(log, "by-hand")) == INTERRUPTED
        assert (await ended(log, "by-hand")).stop_reason == "interrupted"
        let_go.set()


async def test_a_reader_that_stays_longer_than_the_supervisor_is_released(autojump_clock: MockClock) -> None:
    log = MemoryLog()
    async with open_supervisor(log) as other, trio.open_nursery() as nursery:
        run = await other.start(Witness().waits)
        async with open_supervisor(log) as supervisor:
            following = supervisor.follow(run.id)
            await following.__aenter__()
            assert (await anext(following)).seq == 1
            waiting = Catch()
            nursery.start_soon(waiting.run, partial(anext, following))
            await wait_all_tasks_blocked()
        await wait_all_tasks_blocked()
        assert type(waiting.error).__name__ == "ReaderReleased"
        await following.__aexit__(None, None, None)
        await other.cancel(run.id)


async def read_on(follower: Follower) -> None:
    async for _ in follower:
        pass


class Catch:
    error: BaseException | None = None

    async def run(self, call: Callable[[], Any]) -> None:
        try:
            await call()
        except Exception as error:  # noqa: BLE001  (it is what the test looks at)
            self.error = error


# Beginning


async def test_a_log_that_is_away_to_begin_with_is_raised_as_it_is(autojump_clock: MockClock) -> None:
    view = View()
    view.before["wakeups"] = unavailable
    with pytest.raises(LogUnavailable):
        await open_supervisor(view).__aenter__()


async def test_a_beginning_that_takes_for_ever_can_be_cancelled(autojump_clock: MockClock) -> None:
    view = View()
    view.before["wakeups"] = trio.sleep_forever
    with trio.move_on_after(3) as scope:
        await open_supervisor(view).__aenter__()
    assert (scope.cancelled_caught, trio.current_time()) == (True, 3)


async def test_a_supervisor_in_a_scope_that_is_cancelled_already_does_not_begin(autojump_clock: MockClock) -> None:
    with trio.CancelScope() as scope:
        scope.cancel()
        await open_supervisor(MemoryLog()).__aenter__()
    assert scope.cancelled_caught


# A service that dies

DEADLY = {
    "append": "the committer",
    "wait": "the fetcher",
    "cancel_requests": "the watch",
    "renew": "the renewals",
    "check": "the reaper, before it reaps",
    "reap": "the reaper",
}


@pytest.mark.parametrize("operation", DEADLY)
async def test_a_service_that_dies_ends_the_supervisor_honestly(autojump_clock: MockClock, operation: str) -> None:
    view, notes, witness = View(), Notes(), Witness()
    other_view = View(view.log)
    refused, waited = Catch(), Catch()
    async with open_supervisor(other_view, lease=1e6) as other, trio.open_nursery() as nursery:
        theirs = await other.start(count, 1000, 1)
        with pytest.raises(SupervisorFailed) as caught:  # noqa: PT012
            async with open_supervisor(view, observer=notes, lease=9) as supervisor:
                mine = await supervisor.start(witness.waits)
                follows = [supervisor.follow(mine.id), supervisor.follow(theirs.id)]
                gone = [Catch(), Catch()]
                for catch, follower in zip(gone, follows, strict=True):
                    await follower.__aenter__()
                    nursery.start_soon(catch.run, partial(read_on, follower))  # noqa: ASYNC111
                nursery.start_soon(waited.run, partial(supervisor.wait, mine.id))  # noqa: ASYNC111
                await trio.sleep(12 if operation == "reap" else 1)
                view.before[operation] = broken
                if operation == "append":
                    await supervisor.start(count, 1)
                try:
                    await trio.sleep_forever()
                finally:
                    with trio.CancelScope(shield=True):
                        await refused.run(partial(supervisor.start, count, 1))
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        assert [type(error).__name__ for error, _, _ in notes.errors] == ["ZeroDivisionError"]
        assert notes.ended == []
        assert witness.saw == "shutdown: a service of the supervisor died"
        for catch in (*gone, refused, waited):
            assert isinstance(catch.error, SupervisorFailed)
        assert (await view.log.get(mine.id)).status == "running"
        assert gists(await entries_of(view.log, mine.id)) == ["first"]
        for follower in follows:
            await follower.__aexit__(None, None, None)
        await other.cancel(theirs.id)


async def test_the_exception_of_the_body_goes_before_the_failure_of_a_service(autojump_clock: MockClock) -> None:
    view = View()
    with pytest.raises(Stopped):  # noqa: PT012
        async with open_supervisor(view):
            view.before["cancel_requests"] = broken
            try:
                await trio.sleep_forever()
            finally:
                raise Stopped


async def test_a_service_that_dies_while_draining_ends_the_drain(autojump_clock: MockClock) -> None:
    view = View()
    with pytest.raises(SupervisorFailed):  # noqa: PT012
        async with open_supervisor(view, drain_timeout=100) as supervisor:
            await supervisor.start(Witness().waits)
            await trio.sleep(5)
            view.before["cancel_requests"] = broken
    assert 5 <= trio.current_time() <= 5.5


async def test_a_start_that_the_death_of_a_service_overtakes_is_refused(autojump_clock: MockClock) -> None:
    view, late = View(), Catch()
    async with trio.open_nursery() as nursery:
        with pytest.raises(SupervisorFailed):  # noqa: PT012
            async with open_supervisor(view) as supervisor:
                view.after["start"] = slow(2)
                view.before["cancel_requests"] = broken
                nursery.start_soon(late.run, partial(supervisor.start, Witness().waits, run_id="late"))  # noqa: ASYNC111
                await trio.sleep_forever()
    assert isinstance(late.error, SupervisorFailed)
    assert (await view.log.get("late")).status == "running"


async def test_whoever_waits_under_a_shield_for_a_service_that_died_is_told(autojump_clock: MockClock) -> None:
    view, flushed = View(), Catch()
    with pytest.raises(SupervisorFailed):  # noqa: PT012
        async with open_supervisor(view) as supervisor:
            view.before["append"] = broken
            with trio.CancelScope(shield=True):
                async with supervisor.open_run() as writer:
                    await writer.write(FIRST)
                    with trio.CancelScope(shield=True):
                        await flushed.run(writer.flush)
    assert isinstance(flushed.error, RunEnded)


def test_ctrl_c_while_a_service_works_reaches_the_body_and_every_run_has_its_end() -> None:
    view = View()

    async def press_ctrl_c() -> None:
        await trio.lowlevel.checkpoint()
        view.before.clear()
        signal.raise_signal(signal.SIGINT)

    async def main() -> None:
        async with open_supervisor(view) as supervisor:
            await supervisor.start(Witness().waits, run_id="run")
            await wait_all_tasks_blocked()
            view.before["cancel_requests"] = press_ctrl_c
            await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        trio.run(main, clock=MockClock(autojump_threshold=0))

    async def look() -> None:
        assert (await ended(view, "run")).stop_reason == "interrupted"
        async with open_supervisor(view) as supervisor:
            assert gists(await read(supervisor, "run")) == INTERRUPTED

    trio.run(look, clock=MockClock())
