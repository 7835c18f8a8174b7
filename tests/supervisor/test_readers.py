"""The limits on readers: one too many is refused, the others go on, and whoever goes or never came takes no room."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock import Event, Follower, MemoryLog, Supervisor, open_supervisor
from penstock.errors import CursorExpired, LogUnavailable, RunNotFound, TooManyReaders, TooManyReadersOfRun
from penstock.supervisor.follower import Readers
from tests.support.serving import PRODUCERS, Tap, eventually, problem, serving
from tests.support.supervising import View, count, gist, slow, unavailable
from tests.support.wire import DONE, Block

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from trio.testing import MockClock

    from tests.support.serving import Server

LIMITS: Final = {"max_readers": 4, "max_readers_per_run": 3}


async def waits() -> AsyncIterator[Event]:
    await trio.sleep_forever()
    yield Event(data="never")


def live(owner: Supervisor | Server) -> int:
    supervisor = owner if isinstance(owner, Supervisor) else owner.service.supervisor
    readers = supervisor._readers
    assert readers.live == sum(readers._of_runs.values())
    assert 0 not in readers._of_runs.values()
    return readers.live


@asynccontextmanager
async def supervising(log: Any = None, **knobs: Any) -> AsyncIterator[Supervisor]:
    log = MemoryLog() if log is None else log
    async with open_supervisor(log, drain_timeout=0, **{**LIMITS, **knobs}) as supervisor:
        yield supervisor
        assert live(supervisor) == 0


async def is_refused(follower: Follower, error: type[Exception]) -> None:
    with pytest.raises(error) as refusal:
        async with follower:
            raise AssertionError("it was entered")
    assert type(refusal.value) is error


def test_readers_are_counted_by_their_runs() -> None:
    readers = Readers(most=3, most_of_a_run=2)
    for run_id in ("a", "a", "b"):
        readers.come(run_id)
    for run_id in ("a", "b", "c"):
        with pytest.raises(TooManyReaders):
            readers.come(run_id)
    readers.go("b")
    with pytest.raises(TooManyReadersOfRun, match="'a' has 2"):
        readers.come("a")
    readers.come("c")
    for run_id in ("a", "a", "c"):
        readers.go(run_id)
    assert (readers.live, dict(readers._of_runs)) == (0, {})


# In process


async def test_a_run_has_as_many_readers_as_are_allowed_and_other_runs_their_own(autojump_clock: MockClock) -> None:
    async with supervising() as supervisor, AsyncExitStack() as stack:
        run, other = [(await supervisor.start(waits)).id for _ in range(2)]
        first = await stack.enter_async_context(supervisor.follow(run))
        for _ in range(2):
            await stack.enter_async_context(supervisor.follow(run))
        await is_refused(supervisor.follow(run), TooManyReadersOfRun)
        async with supervisor.follow(other):
            await is_refused(supervisor.follow(other), TooManyReaders)
            await is_refused(supervisor.follow(run), TooManyReaders)
        assert live(supervisor) == 3
        await first.__aexit__(None, None, None)
        async with supervisor.follow(run):
            await is_refused(supervisor.follow(run), TooManyReadersOfRun)


async def test_a_reader_at_the_end_of_its_run_counts_until_it_is_left_and_only_once(autojump_clock: MockClock) -> None:
    async with supervising(max_readers=1) as supervisor:
        run = await supervisor.wait((await supervisor.start(count, 3)).id)
        follower = supervisor.follow(run.id)
        async with follower:
            assert [entry.seq async for entry in follower] == [1, 2, 3, 4]
            with pytest.raises(RuntimeError, match="entered already"):
                await follower.__aenter__()
            assert live(supervisor) == 1
        await follower.__aexit__(None, None, None)  # it has been left
        async with follower:
            assert live(supervisor) == 1


async def test_a_body_that_fails_or_is_cancelled_makes_room(autojump_clock: MockClock) -> None:
    async with supervising(max_readers=1) as supervisor:
        run = await supervisor.start(waits)
        for _ in range(3):
            with pytest.raises(ZeroDivisionError):
                async with supervisor.follow(run.id):
                    raise ZeroDivisionError
            with trio.move_on_after(1):
                async with supervisor.follow(run.id) as follower:
                    await anext(follower)
            assert live(supervisor) == 0


async def test_a_reader_that_does_not_find_what_it_wants_takes_no_room(autojump_clock: MockClock) -> None:
    view = View(MemoryLog(max_entries=2))
    async with supervising(view, max_readers=1, tail_entries=1) as supervisor:
        run = await supervisor.wait((await supervisor.start(count, 9)).id)
        for _ in range(3):
            await is_refused(supervisor.follow("nobody"), RunNotFound)
            await is_refused(supervisor.follow(run.id, 1), CursorExpired)
            view.before["read"] = unavailable
            await is_refused(supervisor.follow(run.id), LogUnavailable)
            view.before.clear()
            assert live(supervisor) == 0
        async with supervisor.follow(run.id, last=1) as follower:
            assert [gist(entry) async for entry in follower] == [DONE]


@pytest.mark.parametrize("operation", ["read", "subscribe"])
async def test_an_entry_that_is_cancelled_takes_no_room(autojump_clock: MockClock, operation: str) -> None:
    view = View()
    async with supervising(view) as elsewhere, open_supervisor(view, drain_timeout=0) as owner:
        run = await owner.start(waits)
        view.before[operation] = slow(10)
        for _ in range(3):
            with trio.move_on_after(1) as scope:
                async with elsewhere.follow(run.id):
                    raise AssertionError("it was entered")
            assert scope.cancelled_caught
            assert live(elsewhere) == 0


async def test_readers_that_come_at_once_count_before_their_look_up(autojump_clock: MockClock) -> None:
    view = View()
    async with supervising(view) as supervisor, trio.open_nursery() as nursery:
        run = await supervisor.start(waits)
        view.before["read"] = slow(5)
        refused: list[TooManyReaders] = []

        async def follow() -> None:
            try:
                async with supervisor.follow(run.id):
                    await trio.sleep_forever()
            except TooManyReaders as error:
                refused.append(error)

        for _ in range(10):
            nursery.start_soon(follow)
        await wait_all_tasks_blocked()
        assert (len(refused), live(supervisor)) == (7, 3)
        nursery.cancel_scope.cancel()


async def test_who_waits_for_a_run_is_no_reader(autojump_clock: MockClock) -> None:
    async with supervising(max_readers=1) as supervisor, trio.open_nursery() as nursery:
        run = await supervisor.start(count, 3, 1.0)
        for _ in range(5):
            nursery.start_soon(supervisor.wait, run.id)
        async with supervisor.follow(run.id):
            await supervisor.wait(run.id)


# Over HTTP


@asynccontextmanager
async def crowded(**knobs: Any) -> AsyncIterator[tuple[Server, Tap, str]]:
    """A server, and what a run of it is fed by; in the end no reader is counted."""
    tap = Tap()
    async with serving({**PRODUCERS, "tap": tap}, **{**LIMITS, **knobs}) as server:
        yield server, tap, await server.start("tap")
        await eventually(lambda: live(server) == 0)


async def test_over_http_one_reader_of_a_run_too_many_is_answered_429_and_there_is_room_when_one_has_gone() -> None:
    async with crowded() as (server, tap, run_id):
        other = await server.start("silent")
        path = f"/v1/runs/{run_id}/stream"
        async with server.reading(run_id) as first, server.reading(run_id) as second:
            async with server.reading(run_id):
                for method in ("GET", "POST"):
                    answer = await server.client.request(method, path)
                    assert run_id in problem(answer, 429, "TOO_MANY_READERS_OF_RUN")["detail"]
                    assert int(answer.headers["retry-after"]) > 0
                head = await server.client.head(path)
                assert (head.status_code, head.content) == (429, b"")
                async with server.reading(other):
                    answer = await server.client.get(f"/v1/runs/{other}/stream")
                    problem(answer, 503, "TOO_MANY_READERS")
                    assert int(answer.headers["retry-after"]) > 0
                    assert (await server.run(run_id))["status"] == "running"  # who only looks is no reader
            await eventually(lambda: live(server) == 2)
            async with server.reading(run_id) as third:
                tap.feed("all")
                for reader in (first, second, third):
                    assert await reader.take(1) == [Block(1, data="all")]


async def test_a_start_that_streams_is_a_reader_and_its_run_goes_on_if_it_is_refused() -> None:
    async with crowded(max_readers=2) as (server, _, run_id):
        body = {"producer": "silent", "stream": True}
        async with server.opened("POST", "/v1/runs", json_body=body) as started, server.reading(run_id):
            assert (started.status, live(server)) == (201, 2)
            refused = await server.client.post("/v1/runs", json={**body, "run_id": "mine"})
            problem(refused, 503, "TOO_MANY_READERS")
            assert int(refused.headers["retry-after"]) > 0
        assert (await server.run("mine"))["status"] == "running"
        await eventually(lambda: live(server) == 0)
        async with server.reading("mine"):
            assert live(server) == 1


async def empty(server: Server, run_id: str) -> None:
    """204: there is nothing after the end."""
    assert (await server.client.get(f"/v1/runs/{run_id}/stream?starting_after=10")).status_code == 204


async def missing(server: Server, _run_id: str) -> None:
    problem(await server.client.get("/v1/runs/nobody/stream"), 404, "RUN_NOT_FOUND")


async def headers_only(server: Server, run_id: str) -> None:
    assert (await server.client.head(f"/v1/runs/{run_id}/stream?tail=1")).status_code == 200


async def cut(server: Server, _run_id: str) -> None:
    async with server.reading(await server.start("silent")) as reader:
        await reader.wire.reset()


@pytest.mark.parametrize("request_it", [empty, missing, headers_only, cut])
async def test_no_answer_leaves_a_reader_counted(request_it: Callable[[Server, str], Any]) -> None:
    log = MemoryLog(max_entries=2)
    async with serving(log=log, max_readers=1, tail_entries=1) as server:
        run_id = await server.start("count", 9)
        await server.ended_run(run_id)
        for _ in range(3):
            await request_it(server, run_id)
            await eventually(lambda: live(server) == 0)
        async with server.reading(run_id, tail=1) as reader:
            assert len(await reader.rest()) == 1
