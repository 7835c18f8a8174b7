"""Starting a run: sources, ids, keys, and what is refused."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock.errors import ConfigurationError, IdempotencyConflict, RunExists
from penstock.log.memory import MemoryLog
from penstock.supervisor import open_supervisor
from tests.support.supervising import Notes, assert_nothing_is_left, count, ended, gists, read, two_supervisors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

    from penstock.sse import Event

COUNTED = ["1", "2", "3", "[DONE]"]


async def test_a_started_run_is_there_for_every_reader(autojump_clock: MockClock) -> None:
    log = MemoryLog()
    async with two_supervisors(log) as (owner, other):
        before = time.time()
        run = await owner.start(count, 3, metadata={"user": "ü", "tags": [1, None]})
        assert (run.status, run.producer, run.seq, run.stop_reason, run.error) == ("running", "count", 0, None, None)
        assert before <= run.created_at <= run.started_at <= time.time()
        assert run.ended_at is None
        assert await owner.get(run.id) == await other.get(run.id) == run
        assert gists(await read(other, run.id)) == gists(await read(owner, run.id)) == COUNTED
        record = await other.wait(run.id)
        assert (record.status, record.seq, record.metadata) == ("completed", 4, {"user": "ü", "tags": [1, None]})
        assert record == await ended(log, run.id)


async def test_run_ids_are_the_callers_or_made_and_made_ones_sort_by_time(autojump_clock: MockClock) -> None:
    async with open_supervisor(MemoryLog()) as supervisor:
        assert (await supervisor.start(count, 1, run_id="a.b_c:D-9")).id == "a.b_c:D-9"
        ids = []
        for _ in range(3):
            ids.append((await supervisor.start(count, 1)).id)
            now = time.time()
            while time.time() < now + 0.002:  # noqa: ASYNC110  (ids have the real time in them, in milliseconds)
                await trio.lowlevel.checkpoint()
        assert sorted(set(ids)) == ids
        for bad in ("", "a b", "x" * 129, "ä", "a/b", "a\n", 5):
            with pytest.raises(ValueError, match="run id"):
                await supervisor.start(count, 1, run_id=bad)  # type: ignore[arg-type]
        with pytest.raises(RunExists) as caught:
            await supervisor.start(count, 1, run_id="a.b_c:D-9")
        assert caught.value.run.id == "a.b_c:D-9"


class Iterator:
    def __init__(self, numbers: int) -> None:
        self._numbers = iter(range(1, numbers + 1))

    def __aiter__(self) -> Iterator:
        return self

    async def __anext__(self) -> str:
        await trio.lowlevel.checkpoint()
        for number in self._numbers:
            return f"data: {number}\n\n"
        raise StopAsyncIteration


@asynccontextmanager
async def managed(numbers: int) -> AsyncIterator[Iterator]:
    yield Iterator(numbers)


async def awaited(numbers: int) -> AsyncIterator[Event]:
    await trio.lowlevel.checkpoint()
    return count(numbers)


@pytest.mark.parametrize("source", [count, Iterator, managed, awaited], ids=lambda source: source.__name__)
@pytest.mark.parametrize("called", ["with arguments", "without", "before"])
async def test_any_source_is_a_producer(autojump_clock: MockClock, source: Any, called: str) -> None:
    async with open_supervisor(MemoryLog()) as supervisor:
        if called == "with arguments":
            run = await supervisor.start(source, 3)
        elif called == "without":
            run = await supervisor.start(lambda: source(3), name="three")
            assert run.producer == "three"
        else:
            run = await supervisor.start(source(3))
        assert gists(await read(supervisor, run.id)) == COUNTED


async def test_what_is_no_source_fails_its_run_and_nothing_else(autojump_clock: MockClock) -> None:
    notes = Notes()
    async with open_supervisor(MemoryLog(), observer=notes) as supervisor:
        for nonsense in (5, None, [1, 2], lambda: 5, lambda required: required):
            run = await supervisor.start(nonsense)
            record = await supervisor.wait(run.id)
            assert (record.status, record.error and record.error.code) == ("failed", "ERROR")
        assert [type(error) for error, _, _ in notes.errors] == [TypeError] * 5
        with pytest.raises(ValueError, match="can be called"):
            await supervisor.start(count(3), 3)


async def test_a_key_starts_one_run_and_the_same_key_for_something_else_is_refused(autojump_clock: MockClock) -> None:
    log = MemoryLog()
    async with two_supervisors(log) as (owner, other):
        first = await owner.start_once(count, 3, idempotency_key="k", metadata={"a": 1})
        again = await other.start_once(count, 3, idempotency_key="k", metadata={"a": 1})
        assert (first.created, again.created, again.run.id) == (True, False, first.run.id)
        record = await owner.wait(first.run.id)
        assert await owner.start(count, 3, idempotency_key="k", metadata={"a": 1}) == record
        different: list[tuple[tuple[Any, ...], dict[str, Any]]] = [
            ((4,), {"metadata": {"a": 1}}),
            ((3,), {}),
            ((3,), {"metadata": {"a": 1}, "timeout": 5}),
            ((3,), {"metadata": {"a": 1}, "name": "other"}),
        ]
        for args, request in different:
            with pytest.raises(IdempotencyConflict) as caught:
                await owner.start(count, *args, idempotency_key="k", **request)
            assert caught.value.run_id == first.run.id
        assert len(await owner.list()) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": 0},
        {"timeout": -1},
        {"timeout": float("inf")},
        {"timeout": float("nan")},
        {"timeout": True},
        {"max_silence": 0},
        {"max_silence": "1"},
        {"metadata": {"a": {1}}},
        {"metadata": {"a": float("nan")}},
        {"metadata": {"a": "\ud83d"}},
        {"metadata": [1]},
        {"name": "\ud83d"},
        {"run_id": "a b"},
    ],
    ids=repr,
)
async def test_a_wrong_argument_is_refused_and_starts_nothing(autojump_clock: MockClock, wrong: dict[str, Any]) -> None:
    async with open_supervisor(MemoryLog()) as supervisor:
        with pytest.raises(ValueError, match=r"."):
            await supervisor.start(count, 1, **wrong)
        assert await supervisor.list() == []
        assert_nothing_is_left(supervisor)


async def test_a_wrong_knob_is_refused_before_anything_starts(autojump_clock: MockClock) -> None:
    for knobs in ({"lease": 0}, {"flush_size": 1.5}, {"dialect": "klingon"}, {"no_such_knob": 1}):
        with pytest.raises(ConfigurationError, match=next(iter(knobs))):
            await open_supervisor(MemoryLog(), **knobs).__aenter__()
