"""keepalive(): a heartbeat around any source. All time here is virtual."""

# ruff: noqa: PT012  (what is tested is a block)

from __future__ import annotations

import gc
import weakref
from contextlib import asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.testing

from penstock.errors import ConfigurationError
from penstock.sources.keepalive import PING, keepalive

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

request_id: ContextVar[str] = ContextVar("request_id")


async def counting(count: int, every: float = 0.0) -> AsyncIterator[bytes]:
    for number in range(count):
        if every:
            await trio.sleep(every)
        yield b"data: %d\n\n" % number


async def collect(source: Any, interval: float = 15.0) -> list[Any]:
    async with keepalive(source, interval) as chunks:
        return [chunk async for chunk in chunks]


async def test_a_source_without_silence_passes_unchanged_and_without_pings(autojump_clock: MockClock) -> None:
    assert await collect(counting(5)) == [b"data: %d\n\n" % number for number in range(5)]


async def test_d04_a_ping_comes_on_silence_and_only_on_silence(autojump_clock: MockClock) -> None:
    # 300 s of stream, but never 15 s of silence: "regardless of data" there would be 20 pings
    assert PING not in await collect(counting(30, every=10), interval=15)
    # 40 s of silence before each chunk: two pings each
    assert await collect(counting(2, every=40), interval=15) == [
        PING, PING, b"data: 0\n\n", PING, PING, b"data: 1\n\n",
    ]  # fmt: skip


async def test_pings_come_at_the_interval_to_the_second(autojump_clock: MockClock) -> None:
    start = trio.current_time()
    async with keepalive(counting(1, every=50), 20) as chunks:
        times = [(chunk, trio.current_time() - start) async for chunk in chunks]
    assert times == [(PING, 20), (PING, 40), (b"data: 0\n\n", 50)]


async def test_a_ping_can_be_made_by_a_function(autojump_clock: MockClock) -> None:
    numbers = iter(range(10))
    async with keepalive(counting(1, every=25), 10, ping=lambda: f": {next(numbers)}\n\n") as chunks:
        assert [chunk async for chunk in chunks] == [": 0\n\n", ": 1\n\n", b"data: 0\n\n"]


@pytest.mark.parametrize("interval", [0, -1, float("nan")])
async def test_an_interval_that_is_not_above_zero_is_refused(autojump_clock: MockClock, interval: float) -> None:
    with pytest.raises(ConfigurationError, match="interval"):
        async with keepalive(counting(1), interval):
            raise AssertionError("entered")


class Endless:
    """An async iterator that is no generator, as fast as can be, which says how far it has run."""

    def __init__(self) -> None:
        self.made = 0
        self.closed = False

    def __aiter__(self) -> Endless:
        return self

    async def __anext__(self) -> int:
        await trio.lowlevel.checkpoint()
        self.made += 1
        return self.made

    async def aclose(self) -> None:
        self.closed = True


async def test_d01_leaving_the_block_of_a_fast_source_is_immediate(autojump_clock: MockClock) -> None:
    start = trio.current_time()
    source = Endless()
    async with keepalive(source) as chunks:
        assert await anext(chunks) == 1
    assert source.closed
    assert trio.current_time() == start


async def test_d01_leaving_a_silent_sources_block_is_immediate_and_runs_its_finally(autojump_clock: MockClock) -> None:
    events = []

    async def silent() -> AsyncIterator[bytes]:
        try:
            yield b"data: x\n\n"
            await trio.sleep_forever()
        except trio.Cancelled as cancelled:
            events.append(cancelled.reason)
            raise
        finally:
            events.append("finally")

    start = trio.current_time()
    async with keepalive(silent()) as chunks:
        await anext(chunks)
        await trio.testing.wait_all_tasks_blocked()
    assert events == ["the keepalive block was left", "finally"]
    assert trio.current_time() == start


async def test_d02_the_source_runs_at_most_one_chunk_ahead(autojump_clock: MockClock) -> None:
    source = Endless()
    async with keepalive(source) as chunks:
        await trio.testing.wait_all_tasks_blocked()
        assert source.made == 1
        for taken in range(1, 20):
            assert await anext(chunks) == taken
            await trio.testing.wait_all_tasks_blocked()
            assert source.made == taken + 1


async def test_all_that_was_yielded_comes_before_what_was_raised_and_that_comes_bare(autojump_clock: MockClock) -> None:
    error = ValueError("too bad")

    async def failing() -> AsyncIterator[int]:
        yield 1
        yield 2
        raise error

    taken = []
    with pytest.raises(ValueError, match="too bad") as caught:
        async with keepalive(failing()) as chunks:
            async for chunk in chunks:
                await trio.sleep(1)  # the source has long raised when its second chunk is taken
                taken.append(chunk)
    assert taken == [1, 2]
    assert caught.value is error
    assert caught.value.__context__ is None
    assert "failing" in [frame.name for frame in caught.traceback]


async def test_after_the_end_the_iterator_stays_at_its_end(autojump_clock: MockClock) -> None:
    async with keepalive(counting(1)) as chunks:
        await anext(chunks)
        for _ in range(3):
            with pytest.raises(StopAsyncIteration):
                await anext(chunks)


async def test_after_an_error_the_iterator_is_at_its_end(autojump_clock: MockClock) -> None:
    async def failing() -> AsyncIterator[int]:
        raise ValueError("at once")
        yield 1

    async with keepalive(failing()) as chunks:
        with pytest.raises(ValueError, match="at once"):
            await anext(chunks)
        with pytest.raises(StopAsyncIteration):
            await anext(chunks)


async def test_iterating_after_the_block_is_an_error_that_says_so(autojump_clock: MockClock) -> None:
    async with keepalive(counting(1)) as chunks:
        pass
    with pytest.raises(trio.ClosedResourceError, match="has been left"):
        await anext(chunks)


async def test_two_tasks_cannot_iterate_at_once(autojump_clock: MockClock) -> None:
    async with keepalive(counting(1, every=10)) as chunks, trio.open_nursery() as nursery:
        nursery.start_soon(anext, chunks)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(trio.BusyResourceError):
            await anext(chunks)


async def test_an_exception_of_the_body_leaves_bare(autojump_clock: MockClock) -> None:
    with pytest.raises(LookupError) as caught:
        async with keepalive(Endless()) as chunks:
            async for _ in chunks:
                raise LookupError("mine")
    assert caught.value.__context__ is None


async def test_a_group_that_the_body_raises_stays_the_group_it_is(autojump_clock: MockClock) -> None:
    with pytest.RaisesGroup(LookupError, match="mine"):
        async with keepalive(Endless()):
            raise ExceptionGroup("mine", [LookupError("one")])


async def test_an_error_that_the_block_did_not_stay_for_is_raised_when_it_is_left(autojump_clock: MockClock) -> None:
    async def failing() -> AsyncIterator[int]:
        yield 1
        raise ValueError("unseen")

    with pytest.raises(ValueError, match="unseen"):
        async with keepalive(failing()) as chunks:
            await anext(chunks)
            await trio.testing.wait_all_tasks_blocked()


async def test_an_error_of_the_sources_cleanup_is_raised_when_the_block_is_left(autojump_clock: MockClock) -> None:
    async def untidy() -> AsyncIterator[int]:
        try:
            yield 1
            await trio.sleep_forever()
        finally:
            raise ValueError("untidy")

    with pytest.raises(ValueError, match="untidy"):
        async with keepalive(untidy()) as chunks:
            await anext(chunks)
    with pytest.RaisesGroup(LookupError, ValueError):
        async with keepalive(untidy()) as chunks:
            await anext(chunks)
            raise LookupError("mine")


async def test_a_cancellation_from_outside_reaches_body_and_source_and_stays_one(autojump_clock: MockClock) -> None:
    events = []

    async def silent() -> AsyncIterator[int]:
        try:
            yield 1
            await trio.sleep_forever()
        finally:
            events.append("source")

    with trio.move_on_after(5) as scope:
        async with keepalive(silent()) as chunks:
            try:
                async for _ in chunks:
                    pass
            except trio.Cancelled:
                events.append("body")
                raise
    assert scope.cancelled_caught
    assert sorted(events) == ["body", "source"]


async def test_a_scope_that_the_source_holds_across_a_yield_stays_whole(autojump_clock: MockClock) -> None:
    @asynccontextmanager
    async def scoped() -> AsyncIterator[AsyncIterator[Any]]:
        with trio.move_on_after(100):  # noqa: ASYNC100  (the checkpoints are its user's)
            yield scoped_chunks()

    async def scoped_chunks() -> AsyncIterator[str]:
        with trio.move_on_after(30):
            yield "first"  # noqa: ASYNC101, ASYNC119  (not to be imitated, but sources do it)
            await trio.sleep(60)
        yield "timed out"

    assert await collect(scoped(), interval=20) == ["first", PING, "timed out"]


async def test_an_awaitable_of_a_source_is_a_source(autojump_clock: MockClock) -> None:
    async def connect() -> AsyncIterator[bytes]:
        await trio.sleep(20)
        return counting(1)

    assert await collect(connect()) == [PING, b"data: 0\n\n"]


async def test_what_is_no_source_is_a_type_error_from_the_iterator(autojump_clock: MockClock) -> None:
    with pytest.raises(TypeError, match="async iterable"):
        await collect(42)


async def test_the_source_sees_the_context_variables_of_the_block(autojump_clock: MockClock) -> None:
    async def source() -> AsyncIterator[str]:
        yield request_id.get()

    request_id.set("r-1")
    assert await collect(source()) == ["r-1"]


async def test_keyboard_interrupt_in_the_source_ends_the_block_bare(autojump_clock: MockClock) -> None:
    async def interrupted() -> AsyncIterator[int]:
        yield 1
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        async with keepalive(interrupted()) as chunks:
            async for _ in chunks:
                pass


async def test_cancelling_a_step_of_the_iterator_loses_no_chunk(autojump_clock: MockClock) -> None:
    taken: list[bytes] = []
    async with keepalive(counting(20, every=0.7), 100) as chunks:
        while len(taken) < 20:
            with trio.move_on_after(0.5):
                taken.append(await anext(chunks))
    assert taken == [b"data: %d\n\n" % number for number in range(20)]


async def test_no_garbage_is_left_for_the_cycle_collector(autojump_clock: MockClock) -> None:
    class Noted(Exception):
        pass

    async def failing() -> AsyncIterator[int]:
        yield 1
        raise Noted

    async def seen() -> weakref.ref[Noted]:
        try:
            async with keepalive(failing()) as chunks:
                async for _ in chunks:
                    pass
        except Noted as error:
            return weakref.ref(error)
        raise AssertionError

    async def of_the_body() -> weakref.ref[Noted]:
        try:
            async with keepalive(Endless()):
                raise Noted  # noqa: TRY301
        except Noted as error:
            return weakref.ref(error)

    gc.collect()
    gc.disable()
    try:
        for reference in (await seen(), await of_the_body()):
            assert reference() is None
    finally:
        gc.enable()
