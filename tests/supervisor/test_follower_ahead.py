"""A reader of a long history: the next page is read while one is used, and nobody can tell but by the time."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock import Event, MemoryLog, open_supervisor
from penstock.asgi.sender import MAX_SEND
from penstock.errors import CursorExpired, LogUnavailable, RunNotFound
from penstock.log import Entry
from penstock.supervisor.fetcher import MISSING_GRACE, Prefetch
from tests.support.following import cancelling_at, read_to_the_end, reading, seqs_of
from tests.support.logs import COMPLETED, Unreliable
from tests.support.supervising import View, broken, slow

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

    from penstock.log import Page
    from penstock.supervisor.follower import Follower

HALF: Final = 100_000
"""The size of entries of which a page holds two."""


async def take(follower: Follower, count: int) -> list[int]:
    return [(await anext(follower)).seq for _ in range(count)]


class Asked:
    """Takes notes of what is read of a log, and when; a read waits until it may go on, and may fail."""

    def __init__(self, log: Unreliable) -> None:
        self.times: list[float] = []
        self.fails: dict[int, Exception] = {}
        """What a read fails of, by its number, the first being 1."""
        self.held = inf
        """From this one on they wait..."""
        self.go_on = trio.Event()
        """... for this."""
        log.before = self.note

    @property
    def count(self) -> int:
        return len(self.times)

    async def note(self, call: str) -> None:
        if call == "read":
            self.times.append(trio.current_time())
            number = self.count
            if number >= self.held:
                await self.go_on.wait()
            if (error := self.fails.get(number)) is not None:
                raise error


async def test_the_next_page_is_asked_for_while_one_is_used_and_no_more_than_that(autojump_clock: MockClock) -> None:
    async with reading(tail_entries=1) as works:
        await works.run(12, COMPLETED, size=HALF)
        asked = Asked(works.log)
        async with works.follow() as follower:
            seen = []
            for count, before in [(2, 1), (1, 3), (1, 3), (1, 4), (1, 4), (1, 5), (1, 5), (1, 6), (1, 6)]:
                seen += await take(follower, count)
                await trio.sleep(100)
                assert asked.count == before, seen
            assert seen + await read_to_the_end(follower) == list(range(1, 13))
        assert asked.count == 6  # each page once


async def test_a_slow_log_and_a_slow_reader_do_not_wait_for_each_other(autojump_clock: MockClock) -> None:
    async with reading(tail_entries=1) as works:
        await works.run(12, COMPLETED, size=HALF)
        works.log.latency = 1.0
        began = trio.current_time()
        async with works.follow() as follower:
            while page := await follower.next_body(2 * HALF):
                assert len(seqs_of(page)) == 2
                await trio.sleep(1.0)
        # The first two pages are waited for, as they always were; of the others the time is that of the reader alone.
        assert trio.current_time() - began == pytest.approx(2 + 6)


@pytest.mark.parametrize("after", [0, 10, 19, 20])
async def test_a_reader_who_has_all_that_is_left_in_one_page_reads_once(autojump_clock: MockClock, after: int) -> None:
    async with reading() as works:
        await works.run(20)
        async with works.follow(after) as follower:
            assert await take(follower, 20 - after) == list(range(after + 1, 21))
            with trio.move_on_after(10):
                await anext(follower)
        assert works.log.calls["read"] == 1


async def test_what_the_tail_has_is_not_read_ahead(autojump_clock: MockClock) -> None:
    async with reading(tail_entries=8) as works:
        await works.run(4, size=HALF)
        async with works.follow(4) as live, works.follow() as follower:
            await works.append(5, 12, COMPLETED, size=10)
            await wait_all_tasks_blocked()
            before = works.log.calls["read"]
            assert await read_to_the_end(follower) == list(range(1, 13))
            assert works.log.calls["read"] == before + 1
            assert await read_to_the_end(live) == list(range(5, 13))


@pytest.mark.parametrize("limit", [None, 1, HALF, 10 * HALF])
async def test_the_log_is_asked_as_often_as_there_are_pages(autojump_clock: MockClock, limit: int | None) -> None:
    async with reading(tail_entries=1) as works:
        await works.run(21, COMPLETED, size=HALF)
        async with works.follow() as follower:
            assert await read_to_the_end(follower, limit) == list(range(1, 22))
        assert works.log.calls["read"] == 11


@pytest.mark.parametrize("error", [LogUnavailable("away"), RunNotFound("r")], ids=lambda error: type(error).__name__)
async def test_a_page_that_could_not_be_read_ahead_is_read_when_it_is_asked_for(
    autojump_clock: MockClock, error: Exception
) -> None:
    async with reading(tail_entries=1) as works:
        await works.run(12, COMPLETED, size=HALF)
        asked = Asked(works.log)
        asked.fails = {3: error, 5: error}
        async with works.follow() as follower:
            assert await read_to_the_end(follower) == list(range(1, 13))
        assert asked.count == 8
        assert works.warnings == []  # nobody had to wait


async def test_a_run_that_is_gone_is_told_of_when_its_grace_is_over_and_not_before(autojump_clock: MockClock) -> None:
    async with reading(tail_entries=1) as works:
        await works.run(12, COMPLETED, size=HALF)
        async with works.follow() as follower:
            await take(follower, 3)
            await wait_all_tasks_blocked()
            del works.log._runs["r"]
            await trio.sleep(1_000)
            assert await take(follower, 3) == [4, 5, 6]  # what was read ahead is there all the same
            asked_at = trio.current_time()
            with pytest.raises(RunNotFound):
                await anext(follower)
            assert MISSING_GRACE <= trio.current_time() - asked_at < 2 * MISSING_GRACE


@pytest.mark.parametrize("when", ["before it was read ahead", "after that"])
async def test_what_was_trimmed_in_between_is_told_with_the_oldest_there_is(
    autojump_clock: MockClock, when: str
) -> None:
    async with reading(Unreliable(max_entries=12), tail_entries=1) as works:
        await works.run(12, size=HALF)
        asked = Asked(works.log)
        async with works.follow() as follower:
            asked.held = 3 if when == "before it was read ahead" else inf
            seen = await take(follower, 3)
            await wait_all_tasks_blocked()
            await works.append(13, 20, size=HALF)
            asked.go_on.set()
            with pytest.raises(CursorExpired) as told:
                await read_to_the_end(follower, seen=seen)
        assert seen == [1, 2, 3, 4] if when == "before it was read ahead" else [1, 2, 3, 4, 5, 6]
        assert told.value.oldest_seq == 9


async def test_an_error_of_the_log_that_none_should_have_harms_the_reader_alone_who_reads_ahead(
    autojump_clock: MockClock,
) -> None:
    async with open_supervisor(view := View(), tail_entries=1) as supervisor:
        run = await supervisor.start(pages)
        await supervisor.wait(run.id)
        async with supervisor.follow(run.id) as follower:
            await take(follower, 2)
            view.after["read"] = partial(broken_after, view, view.calls["read"] + 1)
            with pytest.raises(ZeroDivisionError):
                await read_to_the_end(follower)
        view.after.clear()
        assert (await supervisor.wait((await supervisor.start(pages)).id)).status == "completed"


async def broken_after(view: View, reads: int) -> None:
    if view.calls["read"] > reads:
        await broken()


async def pages() -> AsyncIterator[Event]:
    for _ in range(11):
        yield Event(data="x" * HALF)


async def test_a_reader_that_leaves_leaves_nothing_behind_when_the_read_is_over(autojump_clock: MockClock) -> None:
    async with reading(tail_entries=1) as works:
        await works.run(12, COMPLETED, size=HALF)
        tasks = trio.lowlevel.current_statistics().tasks_living
        asked = Asked(works.log)
        asked.held = 3
        async with works.follow() as follower:
            await take(follower, 3)
            assert isinstance(follower._ahead, Prefetch)
            known = weakref.ref(follower._ahead)
            await wait_all_tasks_blocked()
        assert works.left_behind() == []
        assert follower._ahead is None
        asked.go_on.set()
        await wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        gc.collect()
        assert known() is None
        async with follower:  # and who comes back goes on
            assert await read_to_the_end(follower) == list(range(4, 13))


@pytest.mark.parametrize("limit", [None, 60, 3 * HALF])
@pytest.mark.parametrize("latency", [0.0, 0.01])
async def test_cancelling_a_reader_at_any_checkpoint_loses_and_repeats_nothing_of_what_is_read_ahead(
    autojump_clock: MockClock, limit: int | None, latency: float
) -> None:
    step, caught = 0, True
    while caught:
        async with reading(tail_entries=1) as works:
            await works.run(9, COMPLETED, size=HALF)
            works.log.latency = latency
            async with works.follow() as follower:
                seen: list[int] = []
                with trio.CancelScope() as scope:
                    await cancelling_at(step, scope, read_on(follower, limit, seen))
                caught = scope.cancelled_caught
                await read_on(follower, limit, seen)
            assert seen == list(range(1, 10)), step
        step += 1
    assert step >= 5


async def read_on(follower: Follower, limit: int | None, seen: list[int]) -> None:
    """Read to the end, in bodies or entry by entry; what is handed over is noted before anything else can happen."""
    while taken := await anext(follower, None) if limit is None else await follower.next_body(limit):
        seen += [taken.seq] if isinstance(taken, Entry) else seqs_of(taken)


@pytest.mark.parametrize("under_way", [True, False])
async def test_of_a_run_that_has_ended_the_rest_can_be_read_when_the_supervisor_is_closed(
    autojump_clock: MockClock, under_way: bool
) -> None:
    view = View(MemoryLog())
    async with open_supervisor(view, tail_entries=1) as supervisor:
        run = await supervisor.start(pages)
        await supervisor.wait(run.id)
        follower = await supervisor.follow(run.id).__aenter__()
        if under_way:
            view.before["read"] = slow(1.0)
            await take(follower, 3)
            assert follower._ahead is not None
        seen = follower.cursor
    assert await read_to_the_end(follower) == list(range(seen + 1, 13))
    await follower.__aexit__(None, None, None)
    tails: Any = supervisor._tails
    assert (tails.all(), tails.size) == ([], 0)


async def test_a_page_that_was_read_ahead_while_the_log_had_lost_its_entries_is_read_again(
    autojump_clock: MockClock,
) -> None:
    async with reading(tail_entries=1) as works:
        await works.run(12, COMPLETED, size=MAX_SEND * 2)
        read, pages = works.log.read, 0

        async def without_entries_once(*args: Any, **options: Any) -> Page:
            nonlocal pages
            pages += 1
            page = await read(*args, **options)
            return replace(page, entries=[]) if pages == 3 else page

        works.log.read = without_entries_once  # type: ignore[method-assign]
        async with works.follow() as follower:
            assert await read_to_the_end(follower) == list(range(1, 13))
        assert pages > 3
