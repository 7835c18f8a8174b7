"""Cancelled at every await, and in every order: whatever the schedule, runs end, readers are whole, nothing is left.

`CancelAt` cancels a call in its n-th wait. For n = 1, 2, 3 ... until the call gets through, so every wait of it is hit.
"""

from __future__ import annotations

from contextlib import AsyncExitStack, suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from penstock.errors import Draining, RunCancelled, RunExists
from penstock.log.memory import MemoryLog
from penstock.sse import Event
from penstock.supervisor import Supervisor, open_supervisor
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
    read,
    slow,
    two_supervisors,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from penstock.log import Entry


class CancelAt(trio.abc.Instrument):
    """Cancels a scope in the n-th wait of the task that makes it."""

    def __init__(self, n: int) -> None:
        self.scope = trio.CancelScope()
        self._left = n
        self._task = trio.lowlevel.current_task()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        if task is self._task:
            self._left -= 1
            if self._left == 0:
                self.scope.cancel()


async def at_every_await(case: Callable[[CancelAt], Awaitable[None]]) -> int:
    """Run the case with a cancellation in the 1st, 2nd ... wait, until it gets through; the number of waits."""
    for n in range(1, 500):
        cancelling = CancelAt(n)
        await case(cancelling)
        if not cancelling.scope.cancel_called:
            return n - 1
    raise AssertionError("it never gets through")


class Cut:
    """Where a case puts the call that is to be cut."""

    def __init__(self, cancelling: CancelAt) -> None:
        self._cancelling = cancelling

    def __enter__(self) -> None:
        trio.lowlevel.add_instrument(self._cancelling)
        self._cancelling.scope.__enter__()

    def __exit__(self, *raised: Any) -> bool:  # noqa: PYI036
        trio.lowlevel.remove_instrument(self._cancelling)
        return bool(self._cancelling.scope.__exit__(*raised))


async def start(owner: Supervisor, _other: Supervisor) -> None:
    await owner.start(count, 5, run_id="new", idempotency_key="k", timeout=9)


async def cancel(owner: Supervisor, _other: Supervisor) -> None:
    await owner.cancel("old", "enough")


async def cancel_elsewhere(_owner: Supervisor, other: Supervisor) -> None:
    await other.cancel("old", "enough")


async def wait(owner: Supervisor, _other: Supervisor) -> None:
    await owner.wait("finite")


async def wait_elsewhere(_owner: Supervisor, other: Supervisor) -> None:
    await other.wait("finite")


async def follow(owner: Supervisor, _other: Supervisor) -> None:
    assert len(await read(owner, "finite")) == 6


async def follow_elsewhere(_owner: Supervisor, other: Supervisor) -> None:
    assert len(await read(other, "finite")) == 6


async def open_run(owner: Supervisor, _other: Supervisor) -> None:
    async with owner.open_run("new", timeout=9) as writer:
        for _ in range(3):
            await writer.write(FIRST)
        await writer.flush()
        await writer.write(FIRST)


async def drain(owner: Supervisor, _other: Supervisor) -> None:
    await owner.drain(0.5)


CALLS = [start, cancel, cancel_elsewhere, wait, wait_elsewhere, follow, follow_elsewhere, open_run, drain]


@pytest.mark.parametrize("delay", [0, 0.01], ids=["fast log", "slow log"])
@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
async def test_i7_a_call_that_is_cancelled_in_any_wait_is_over_and_leaves_everything_whole(
    autojump_clock: MockClock, call: Callable[[Supervisor, Supervisor], Awaitable[None]], delay: float
) -> None:
    # Fails if `Fetcher.reading` keeps the tail when it is cancelled, if `Services.starting` never forgets a start, if
    # `writing` does not conclude a body that is cancelled, and if anything swallows `Cancelled`.
    async def case(cancelling: CancelAt) -> None:
        view, witness = View(), Witness()
        for operation in ("start", "request_cancel", "read", "get", "subscribe"):
            view.before[operation] = slow(delay)
        view.after["append"] = slow(delay)
        async with two_supervisors(view, drain_timeout=0, cancel_grace=2) as (owner, other):
            await owner.start(witness.waits, run_id="old")
            await owner.start(count, 5, 0.003, run_id="finite")
            with Cut(cancelling):
                await call(owner, other)
                await trio.lowlevel.checkpoint()  # what a shield has kept from the call comes here
            assert cancelling.scope.cancelled_caught is cancelling.scope.cancel_called
            assert (await view.log.get("old")).status in {"running", "cancelled", "failed"}
            for supervisor in (owner, other):
                with suppress(Draining):
                    await supervisor.start(count, 1)
            if not owner.draining:
                assert len(await read(other, "finite")) == 6
                await other.cancel("old")
                assert (await owner.wait("old")).status == "cancelled"
                await trio.sleep(0.2)
                if any(run.id == "new" for run in await owner.list()):
                    assert (await owner.wait("new")).status in {"completed", "failed"}
                assert_nothing_is_left(owner)
                assert_nothing_is_left(other)
        for run in await view.list():
            await ended(view, run.id)
        assert_nothing_is_left(owner)
        assert_nothing_is_left(other)

    assert await at_every_await(case) >= 1


@pytest.mark.parametrize("delay", [0, 0.01], ids=["fast log", "slow log"])
async def test_i7_a_supervisor_that_is_cancelled_in_any_wait_ends_its_runs_and_goes(
    autojump_clock: MockClock, delay: float
) -> None:
    # Fails if the services have no shield of their own, and if `Services.run` puts it up before it has started.
    async def case(cancelling: CancelAt) -> None:
        view, notes = View(), Notes()
        view.after["append"] = slow(delay)
        with Cut(cancelling):
            async with open_supervisor(view, observer=notes, drain_timeout=1) as supervisor:
                await supervisor.start(Witness().waits)
                await supervisor.start(count, 3)
                async with supervisor.open_run() as writer:
                    await writer.write(FIRST)
                    await trio.sleep(0.1)
                await supervisor.start(Witness().waits)
                await trio.sleep(0.1)
        runs = await view.list()
        for run in runs:
            await ended(view, run.id)
        assert len(notes.started) == len(notes.ended) == len(runs)
        assert notes.errors == []

    assert await at_every_await(case) >= 8


@pytest.mark.parametrize("after", [1, 3, 5])
async def test_i7_a_run_that_is_cancelled_in_any_of_its_waits_has_one_end(
    autojump_clock: MockClock, after: int
) -> None:
    # Fails if `Execution.finish` does not set `ended`, so that causes are recorded after the loop.
    async def case(cancelling: CancelAt) -> None:
        view = View()
        view.after["append"] = slow(0.01 * (after % 3))
        over = False

        async def producer() -> AsyncIterator[Event]:
            nonlocal over
            cancelling._task = trio.lowlevel.current_task()
            trio.lowlevel.add_instrument(cancelling)
            try:
                async for event in count(after, 0.01):
                    yield event
                over = True
                yield Event(data="[DONE]")
            finally:
                with trio.move_on_after(1, shield=True):
                    await trio.sleep(0.005)

        async with open_supervisor(view) as supervisor:
            run = await supervisor.start(producer)
            cancelling.scope = Remote(supervisor, run.id)  # type: ignore[assignment]
            record = await supervisor.wait(run.id)
            trio.lowlevel.remove_instrument(cancelling)
            assert record == await ended(view, run.id)
            texts = gists(await entries_of(view, run.id))
            if over:
                assert record.status == "completed"
                assert texts == [*map(str, range(1, after + 1)), "[DONE]"]
            else:
                assert record.stop_reason == "interrupted"
                assert texts[-2:] == ["error INTERRUPTED", "[DONE]"]
                assert texts[:-2] == [*map(str, range(1, len(texts) - 1))]
            await wait_all_tasks_blocked()
            assert_nothing_is_left(supervisor)

    await at_every_await(case)


class Remote:
    """What stands in for a scope: it interrupts a run."""

    def __init__(self, supervisor: Supervisor, run_id: str) -> None:
        self._supervisor = supervisor
        self._run_id = run_id
        self.cancel_called = False

    def cancel(self) -> None:
        self.cancel_called = True
        self._supervisor.interrupt()


class World:
    def __init__(self, owners: tuple[Supervisor, Supervisor], view: View, nursery: trio.Nursery) -> None:
        self.owners = owners
        self.view = view
        self.nursery = nursery
        self.expected: dict[str, int] = {}
        self.readers: list[Resuming] = []
        self.cancelled: set[str] = set()

    async def start(self, where: int, events: int, pause: int) -> None:
        run_id = f"run-{len(self.expected)}"
        self.expected[run_id] = events
        await self.owners[where].start(count, events, pause / 10, run_id=run_id)
        with pytest.raises(RunExists):
            await self.owners[1 - where].start(count, 1, run_id=run_id)

    async def write(self, where: int, events: int) -> None:
        run_id = f"run-{len(self.expected)}"
        self.expected[run_id] = events
        with suppress(RunCancelled):
            async with self.owners[where].open_run(run_id) as writer:
                for number in range(1, events + 1):
                    await writer.write(Event(data=str(number)))
                    await trio.sleep(0.1)

    async def cancel(self, where: int, which: int) -> None:
        if self.expected:
            run_id = f"run-{which % len(self.expected)}"
            reply = await self.owners[where].cancel(run_id, "why")
            if reply.status.name != "ENDED":
                self.cancelled.add(run_id)

    async def follow(self, where: int, which: int) -> None:
        if self.expected:
            reader = Resuming(self, where, f"run-{which % len(self.expected)}")
            self.readers.append(reader)
            self.nursery.start_soon(reader.run)

    async def cut(self, which: int) -> None:
        if self.readers:
            self.readers[which % len(self.readers)].scope.cancel()

    async def pause(self, tenths: int) -> None:
        await trio.sleep(tenths / 10)

    async def slow(self, hundredths: int) -> None:
        self.view.before["append"] = self.view.after["append"] = slow(hundredths / 100)


class Resuming:
    """A reader that comes back with its cursor, to the other supervisor, whenever it is cut."""

    def __init__(self, world: World, where: int, run_id: str) -> None:
        self.world = world
        self.where = where
        self.run_id = run_id
        self.got: list[Entry] = []
        self.scope = trio.CancelScope()

    async def run(self) -> None:
        while not self.got or not self.got[-1].terminal:
            with self.scope:
                async with self.world.owners[self.where].follow(self.run_id, len(self.got)) as entries:
                    async for entry in entries:
                        self.got.append(entry)
            self.scope = trio.CancelScope()
            self.where = 1 - self.where


small = st.integers(0, 3)
where = st.integers(0, 1)
STEPS = st.one_of(
    st.tuples(st.just("start"), where, st.integers(0, 12), small),
    st.tuples(st.just("write"), where, small),
    st.tuples(st.just("cancel"), where, small),
    st.tuples(st.just("follow"), where, small),
    st.tuples(st.just("cut"), small),
    st.tuples(st.just("pause"), st.integers(0, 5)),
    st.tuples(st.just("slow"), st.integers(0, 30)),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(STEPS, min_size=2, max_size=25), st.integers(1, 50))
def test_i2_i3_in_any_order_of_starts_cancels_and_cuts_every_run_ends_and_every_reader_is_whole(
    steps: list[tuple[Any, ...]], tail_entries: int
) -> None:
    # Fails if `Tail.take` begins one too early, if `Fetcher.reading` keeps the tail when it is cancelled, and if a
    # checkpoint comes between looking and parking in `Follower._fill`.
    async def main() -> None:
        view = View(MemoryLog())
        async with AsyncExitStack() as stack:
            knobs: dict[str, Any] = {"tail_entries": tail_entries, "drain_timeout": 60}
            owners = await stack.enter_async_context(two_supervisors(view, **knobs))
            async with trio.open_nursery() as nursery:
                world = World(owners, view, nursery)
                for name, *args in steps:
                    await getattr(world, name)(*args)
            for run_id, events in world.expected.items():
                record = await owners[0].wait(run_id)
                assert await ended(view, run_id) == record
                texts = gists(await entries_of(view, run_id))
                if record.status == "completed":
                    assert run_id not in world.cancelled
                    assert texts == [*map(str, range(1, events + 1)), "[DONE]"]
                else:
                    assert (record.status, run_id in world.cancelled) == ("cancelled", True)
                    assert texts == [*map(str, range(1, len(texts) - 1)), "cancelled", "[DONE]"]
            for reader in world.readers:
                assert reader.got == await entries_of(view, reader.run_id)
            await trio.sleep(10)  # for the last acknowledgements
            for owner in owners:
                assert_nothing_is_left(owner)

    trio.run(partial(main), clock=MockClock(autojump_threshold=0))
