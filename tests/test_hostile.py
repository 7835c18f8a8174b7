"""Producers and callers that do what none should: each harms itself at most."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock import (
    ConfigurationError,
    Event,
    LogUnavailable,
    MemoryLog,
    PublicError,
    RunEnded,
    RunExists,
    Supervisor,
    keepalive,
    open_supervisor,
)
from penstock.asgi.requests import stream_request
from penstock.errors import EventTooLarge

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from trio.testing import MockClock

    from penstock import RunWriter
    from penstock.log import Appended, Batch


async def innocent() -> AsyncIterator[Event]:
    yield Event(data="before")
    await trio.sleep(5)
    yield Event(data="after")


async def yields_inside_a_nursery() -> AsyncIterator[str]:
    async with trio.open_nursery():
        yield "data: 1\n\n"  # noqa: ASYNC101, ASYNC119
        yield "data: [DONE]\n\n"  # noqa: ASYNC101, ASYNC119


async def yields_an_error_inside_a_nursery() -> AsyncIterator[str]:
    async with trio.open_nursery():
        yield "event: error\ndata: no\n\n"  # noqa: ASYNC101, ASYNC119


async def yields_inside_a_scope_that_expires() -> AsyncIterator[str]:
    with trio.move_on_after(0.5):
        while True:
            yield "data: x\n\n"  # noqa: ASYNC101, ASYNC119
            trio.lowlevel.current_clock().jump(0.01)  # type: ignore[attr-defined]


class ForgetfulError(PublicError):
    def __init__(self) -> None:
        """Forgets to call `PublicError`."""


class Strange(BaseException):
    """What another event loop's `CancelledError` is here: no `Exception`, and nobody's cancellation."""


def raises(error: BaseException) -> Any:
    async def producer() -> AsyncIterator[Event]:
        yield Event(data="x")
        raise error

    return producer


@pytest.mark.parametrize(
    "producer, status",
    [
        (yields_inside_a_nursery, "completed"),
        (yields_an_error_inside_a_nursery, "failed"),
        (yields_inside_a_scope_that_expires, "failed"),
        (raises(SystemExit(1)), "failed"),
        (raises(GeneratorExit()), "failed"),
        (raises(Strange()), "failed"),
        (raises(ForgetfulError()), "failed"),
    ],
)
async def test_whatever_a_producer_does_the_others_go_on(autojump_clock: MockClock, producer: Any, status: str) -> None:
    async with open_supervisor(MemoryLog()) as supervisor:
        other = await supervisor.start(innocent)
        run = await supervisor.start(producer)
        assert (await supervisor.wait(run.id)).status == status
        assert (await supervisor.wait(other.id)).status == "completed"


async def test_a_producer_that_yields_inside_a_nursery_can_be_cancelled(autojump_clock: MockClock) -> None:
    async def producer() -> AsyncIterator[str]:
        async with trio.open_nursery():
            while True:
                yield "data: 1\n\n"  # noqa: ASYNC101, ASYNC119
                await trio.sleep(0.1)

    async with open_supervisor(MemoryLog()) as supervisor:
        run = await supervisor.start(producer)
        await trio.sleep(1)
        await supervisor.cancel(run.id)
        assert (await supervisor.wait(run.id)).status == "cancelled"


async def test_an_error_that_a_sources_own_block_swallows_still_fails_the_run(autojump_clock: MockClock) -> None:
    @asynccontextmanager
    async def source() -> AsyncIterator[AsyncIterator[Any]]:
        async def chunks() -> AsyncIterator[Any]:
            yield "data: 1\n\n"
            yield 5

        with suppress(ValueError):
            yield chunks()

    async with open_supervisor(MemoryLog()) as supervisor:
        run = await supervisor.wait((await supervisor.start(source())).id)
        assert (run.status, run.error and run.error.code) == ("failed", "INVALID_CHUNK")


async def test_keepalive_does_not_take_a_sources_own_deadline_for_its_end(autojump_clock: MockClock) -> None:
    async def source() -> AsyncIterator[int]:
        with trio.move_on_after(0.2):
            for number in range(1000):
                yield number  # noqa: ASYNC101, ASYNC119

    with pytest.raises(RuntimeError, match="across a yield"):  # noqa: PT012  (the block is what is tested)
        async with keepalive(source()) as chunks:
            async for _ in chunks:
                await trio.sleep(0.05)


async def test_a_busy_run_elsewhere_keeps_no_other_readers_waiting(autojump_clock: MockClock) -> None:
    async def floods() -> AsyncIterator[Event]:
        while True:
            yield Event(data="x" * 130_000)
            await trio.sleep(0.0007)

    async def ticks() -> AsyncIterator[Event]:
        for number in range(10):
            yield Event(data=str(number))
            await trio.sleep(0.1)

    log = MemoryLog()
    async with open_supervisor(log, drain_timeout=0) as owner, open_supervisor(log) as other:
        flood = await owner.start(floods)
        run = await owner.start(ticks)
        async with other.follow(flood.id), other.follow(run.id) as follower:
            arrived = [trio.current_time() async for _ in follower]
        assert max(later - sooner for sooner, later in pairwise([0, *arrived])) < 0.5


@pytest.mark.parametrize("knob", ["timeout", "max_silence"])
async def test_a_duration_without_end_is_refused_before_there_is_a_run(knob: str) -> None:
    async with open_supervisor(MemoryLog()) as supervisor:
        wanted: Any = {knob: 10**400}
        with pytest.raises(ConfigurationError, match=knob):
            await supervisor.start(innocent, **wanted)
        assert not await supervisor.list()


@pytest.mark.parametrize(
    "wrong", [{"reason": 5}, {"reason": b"x"}, {"reason": "\ud800"}], ids=["int", "bytes", "surrogate"]
)
async def test_a_reason_that_is_none_is_refused(wrong: Any) -> None:
    async with open_supervisor(MemoryLog(), drain_timeout=0) as supervisor:
        run = await supervisor.start(innocent)
        with pytest.raises(ValueError, match=r"reason|surrogates"):
            await supervisor.cancel(run.id, **wrong)


@pytest.mark.parametrize("wrong", [-1, float("nan"), "x", True])
async def test_a_drain_that_cannot_be_begins_none(wrong: Any) -> None:
    async with open_supervisor(MemoryLog(), drain_timeout=0) as supervisor:
        with pytest.raises(ConfigurationError):
            await supervisor.drain(wrong)
        await supervisor.start(innocent)


async def test_arguments_of_any_kind_make_a_fingerprint(autojump_clock: MockClock) -> None:
    async def takes(_value: Any) -> AsyncIterator[Event]:
        yield Event(data="x")

    async with open_supervisor(MemoryLog()) as supervisor:
        value = {1: 2, "a": object}
        first = await supervisor.start(takes, value, idempotency_key="k")
        assert (await supervisor.start(takes, value, idempotency_key="k")).id == first.id
        with pytest.raises(ValueError, match="idempotency key"):
            await supervisor.start(takes, value, idempotency_key="")


async def test_metadata_stay_as_they_were_when_the_run_started() -> None:
    async with open_supervisor(MemoryLog(), drain_timeout=0) as supervisor:
        tags = ["a"]
        run = await supervisor.start(innocent, metadata={"tags": tags})
        tags.append("b")
        assert (await supervisor.get(run.id)).metadata == {"tags": ["a"]}


@pytest.mark.parametrize("limit", ["max_entries", "max_run_bytes", "max_bytes"])
def test_a_count_is_a_whole_number(limit: str) -> None:
    wanted: Any = {limit: 1e2}
    with pytest.raises(ConfigurationError, match=f"{limit} is a whole number"):
        MemoryLog(**wanted)


async def test_a_writer_that_is_full_does_not_wait_for_the_linger(autojump_clock: MockClock) -> None:
    async with open_supervisor(MemoryLog(), flush_interval=60, max_pending_bytes=10_000) as supervisor:
        async with supervisor.open_run() as writer:
            for _ in range(5):
                await writer.write(Event(data="x" * 10_000))
        assert trio.current_time() < 1


async def test_a_chunk_is_no_larger_than_what_a_run_may_have_pending(autojump_clock: MockClock) -> None:
    async with (
        open_supervisor(MemoryLog(), max_event_bytes=100, max_pending_bytes=200) as supervisor,
        supervisor.open_run() as writer,
    ):
        await writer.write("data:\n\n" * 28)  # 196 bytes
        with pytest.raises(EventTooLarge, match="several chunks"):
            await writer.write("data:\n\n" * 29)


async def test_an_id_whose_producer_holds_on_is_not_given_away(autojump_clock: MockClock) -> None:
    async def stuck() -> AsyncIterator[Event]:
        with trio.CancelScope(shield=True):
            await trio.sleep(100)
        yield Event(data="late")

    async def held(supervisor: Supervisor) -> None:
        await supervisor.start(stuck, run_id="a")
        await supervisor.cancel("a")
        await supervisor.wait("a")
        await trio.sleep(30)  # the log has forgotten it
        with pytest.raises(RunExists):
            await supervisor.start(innocent, run_id="a")
        assert [each.run_id for each in supervisor.stuck] == ["a"]

    async with open_supervisor(MemoryLog(ttl=5), cancel_grace=1) as supervisor:
        await held(supervisor)


class Away(MemoryLog):
    async def append(self, batches: Sequence[Batch]) -> Sequence[Appended]:
        await trio.lowlevel.checkpoint()
        raise LogUnavailable(f"{len(batches)} batches in vain")


async def test_a_flush_that_nothing_can_fulfil_ends(autojump_clock: MockClock) -> None:
    refused = trio.Event()

    async def flush(writer: RunWriter) -> None:
        with pytest.raises(RunEnded):
            await writer.flush()
        refused.set()

    async with trio.open_nursery() as nursery:
        async with (
            open_supervisor(Away(), drain_timeout=0, cancel_grace=1, finalize_timeout=1) as supervisor,
            supervisor.open_run() as writer,
        ):
            await writer.write(Event(data="x"))
            nursery.start_soon(flush, writer)  # noqa: ASYNC111
        await refused.wait()


def test_an_empty_last_event_id_is_none() -> None:
    assert stream_request({}, {"starting_after": "3"}, {"last-event-id": ""}).after == 3
