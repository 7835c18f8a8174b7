"""What a source may be, and that opening one and leaving it happen in one task."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Self

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from penstock.sse.chunks import opened

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator
    from types import TracebackType


class Diary:
    """What a source has done, and in which task."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.tasks: set[trio.lowlevel.Task] = set()

    def note(self, line: str) -> None:
        self.lines.append(line)
        self.tasks.add(trio.lowlevel.current_task())


@pytest.fixture
def diary() -> Diary:
    return Diary()


async def generator(diary: Diary) -> AsyncGenerator[str, None]:
    diary.note("opened")
    try:
        for letter in "abc":
            diary.note(letter)
            yield letter
    finally:
        diary.note("finally")


class Plain:
    """An async iterator without `aclose`."""

    def __init__(self, diary: Diary) -> None:
        self.left = iter("abc")
        self.diary = diary

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> str:
        await trio.lowlevel.checkpoint()
        for letter in self.left:
            self.diary.note(letter)
            return letter
        raise StopAsyncIteration


class Iterable:
    """An async iterable that makes its iterator when asked for one."""

    def __init__(self, diary: Diary) -> None:
        self.diary = diary

    def __aiter__(self) -> AsyncIterator[str]:
        return generator(self.diary)


class Manager:
    """A context manager that hands out a generator."""

    def __init__(self, diary: Diary, *, swallow: bool = False) -> None:
        self.diary = diary
        self.swallow = swallow

    async def __aenter__(self) -> AsyncIterator[str]:
        self.diary.note("entered")
        return generator(self.diary)

    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        self.diary.note("left" if exc is None else f"left by {type(exc).__name__}")
        return self.swallow


@asynccontextmanager
async def with_a_nursery(diary: Diary) -> AsyncIterator[AsyncIterator[str]]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.sleep_forever)
        yield generator(diary)
        nursery.cancel_scope.cancel()
    diary.note("left")


async def promised(source: Any) -> Any:
    await trio.sleep(1)
    return source


def make(kind: str, diary: Diary) -> Any:
    makers: dict[str, Any] = {
        "a generator": generator,
        "a plain iterator": Plain,
        "an iterable": Iterable,
        "a context manager": Manager,
        "a context manager with a nursery": with_a_nursery,
        "an awaitable of a generator": lambda diary: promised(generator(diary)),
        "an awaitable of a context manager": lambda diary: promised(Manager(diary)),
    }
    return makers[kind](diary)


KINDS = {
    "a generator": (["opened"], ["finally"]),
    "a plain iterator": ([], []),
    "an iterable": (["opened"], ["finally"]),
    "a context manager": (["entered", "opened"], ["finally", "left"]),
    "a context manager with a nursery": (["opened"], ["finally", "left"]),
    "an awaitable of a generator": (["opened"], ["finally"]),
    "an awaitable of a context manager": (["entered", "opened"], ["finally", "left"]),
}
kinds = pytest.mark.parametrize("kind, before, after", [(kind, *lines) for kind, lines in KINDS.items()])


@kinds
async def test_a_source_is_iterated_to_its_end_in_one_task(
    autojump_clock: MockClock, diary: Diary, kind: str, before: list[str], after: list[str]
) -> None:
    async with opened(make(kind, diary)) as chunks:
        assert [chunk async for chunk in chunks] == ["a", "b", "c"]
    assert diary.lines == [*before, "a", "b", "c", *after]
    assert diary.tasks == {trio.lowlevel.current_task()}


@kinds
async def test_leaving_early_closes_a_source_in_the_same_task_before_it_goes_on(
    autojump_clock: MockClock, diary: Diary, kind: str, before: list[str], after: list[str]
) -> None:
    async with opened(make(kind, diary)) as chunks:
        assert await anext(chunks) == "a"
    assert diary.lines == [*before, "a", *after]
    assert diary.tasks == {trio.lowlevel.current_task()}


@kinds
async def test_a_source_that_was_opened_and_never_iterated_is_closed(
    autojump_clock: MockClock, diary: Diary, kind: str, before: list[str], after: list[str]
) -> None:
    async with opened(make(kind, diary)):
        pass
    # A generator that never began has no `finally` to run.
    assert diary.lines == [*(line for line in before if line != "opened"), *(line for line in after if line == "left")]


async def test_an_error_in_the_block_closes_the_source_and_stays_what_it_is(diary: Diary) -> None:
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine") as caught:  # noqa: PT012  (the block is what is left)
        async with opened(Manager(diary)) as chunks:
            await anext(chunks)
            raise error
    assert caught.value is error
    assert diary.lines == ["entered", "opened", "a", "finally", "left by ValueError"]


async def test_an_error_of_the_source_is_raised_by_the_step_that_met_it(diary: Diary) -> None:
    async def broken() -> AsyncGenerator[str, None]:
        try:
            yield "a"
            raise ValueError("broke")
        finally:
            diary.note("finally")

    async with opened(broken()) as chunks:
        assert await anext(chunks) == "a"
        with pytest.raises(ValueError, match="broke"):
            await anext(chunks)
    assert diary.lines == ["finally"]


async def test_an_error_of_the_sources_cleanup_is_raised_on_leaving() -> None:
    async def untidy() -> AsyncGenerator[str, None]:
        try:
            yield "a"
        finally:
            raise ValueError("untidy")

    with pytest.raises(ValueError, match="untidy"):
        async with opened(untidy()) as chunks:
            await anext(chunks)


async def test_an_awaitable_that_fails_raises_what_it_failed_with() -> None:
    async def refuse() -> Any:
        await trio.lowlevel.checkpoint()
        raise PermissionError("no")

    with pytest.raises(PermissionError, match="no"):
        async with opened(refuse()):
            raise AssertionError("opened")


async def test_cancelling_runs_the_sources_finally_where_it_may_still_await(autojump_clock: MockClock) -> None:
    cleaned = []

    async def silent() -> AsyncGenerator[str, None]:
        try:
            yield "a"
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(5, shield=True):
                await trio.sleep(2)
                cleaned.append(trio.current_time())

    start = trio.current_time()
    with trio.move_on_after(1) as scope:
        async with opened(silent()) as chunks:
            async for _ in chunks:
                pass
    assert scope.cancelled_caught
    assert cleaned == [start + 3]


async def test_a_scope_that_a_source_holds_across_its_yields_is_its_own(autojump_clock: MockClock) -> None:
    async def scoped() -> AsyncGenerator[str, None]:
        with trio.move_on_after(10) as scope:
            yield "a"  # noqa: ASYNC101, ASYNC119
            await trio.sleep(3)
            yield "b"  # noqa: ASYNC101, ASYNC119
            await trio.sleep_forever()
        assert scope.cancelled_caught
        yield "c"

    start = trio.current_time()
    async with opened(scoped()) as chunks:
        assert [chunk async for chunk in chunks] == ["a", "b", "c"]
    assert trio.current_time() - start == 10


async def test_a_channel_is_a_source_and_is_closed(autojump_clock: MockClock) -> None:
    send, receive = trio.open_memory_channel[str](1)
    async with opened(receive) as chunks:
        await send.send("a")
        assert await anext(chunks) == "a"
    with pytest.raises(trio.BrokenResourceError):
        await send.send("b")


async def test_a_plain_iterator_is_cancelled_where_it_waits(autojump_clock: MockClock) -> None:
    class Silent:
        def __aiter__(self) -> Self:
            return self

        async def __anext__(self) -> str:
            await trio.sleep_forever()
            raise AssertionError

    async def read() -> None:
        async with opened(Silent()) as chunks:
            async for _ in chunks:
                pass

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    assert nursery.cancel_scope.cancelled_caught


@pytest.mark.parametrize("source", [None, 7, "data: x\n\n", ["data: x\n\n"], iter("ab"), object(), generator])
async def test_what_is_no_source_is_a_type_error_that_says_what_one_is(source: Any) -> None:
    with pytest.raises(TypeError, match=r"a source is an async iterable, such as an async generator, or .* is neither"):
        async with opened(source):
            raise AssertionError("opened")


async def test_a_context_manager_that_hands_out_no_source_is_left_again(diary: Diary) -> None:
    class Empty(Manager):
        async def __aenter__(self) -> Any:
            return None

    with pytest.raises(TypeError, match="NoneType is neither"):
        async with opened(Empty(diary)):
            raise AssertionError("opened")
    assert diary.lines == ["left by TypeError"]
