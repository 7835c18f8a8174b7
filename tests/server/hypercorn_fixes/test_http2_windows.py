"""HTTP/2 streams whose windows stay shut: what is kept for them, until when, and for whom they wait."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import pytest
import trio
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, BUFFER_LOW_WATER, BufferCompleteError, StreamBuffer
from hypercorn.trio.worker_context import EventWrapper
from starlette.routing import Route
from trio.testing import wait_all_tasks_blocked

from penstock import EventStreamResponse
from penstock.asgi.sender import MAX_SEND
from penstock.server.hypercorn_fixes.http2 import PatchedStreamBuffer
from tests.support.connections import SOON, buffer_of, joined, served
from tests.support.endpoints import KIB, flood, with_endless
from tests.support.http2_clients import Windows, without_window
from tests.support.serving import eventually, family, serving
from tests.support.uncorrected import as_it_is
from tests.support.wire import DONE, ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.requests import Request


MILLION: Final = 1_000_000


async def test_a_stream_without_a_window_waits_and_its_neighbour_flows() -> None:
    async with serving() as server, without_window(server) as client:
        endless = with_endless(server)
        shut, flows = await client.get("/endless?name=shut"), await client.get("/endless?name=flows")
        await client.open(flows)
        taken = 0
        while taken < 3 * MILLION:
            await client.receive()
            taken += client.forget(flows)
        assert BUFFER_HIGH_WATER <= len(buffer_of(client, shut).buffer) < BUFFER_HIGH_WATER + len(KIB)
        assert endless.yielded["shut"] <= BUFFER_HIGH_WATER / len(KIB) + 1


async def test_without_the_correction_a_stream_without_a_window_is_kept_in_memory_without_a_limit() -> None:
    with as_it_is("StreamBuffer"):
        async with serving() as server, without_window(server) as client:
            with_endless(server)
            shut = await client.get("/endless?name=shut")
            await client.until_headers(shut)
            kept = buffer_of(client, shut)
            await eventually(lambda: len(kept.buffer) > 3 * MILLION)


async def test_when_the_window_opens_a_replay_arrives_whole_in_order_and_once() -> None:
    async with serving({"flood": flood}) as server, without_window(server) as client:
        run_id = await server.start("flood", [2000, 1000])
        await server.ended_run(run_id)
        waits, flows = [await client.get(f"/v1/runs/{run_id}/stream") for _ in range(2)]
        await client.open(flows)
        assert ids(await client.whole(flows)) == list(range(1, 2002))
        assert 0 < len(buffer_of(client, waits).buffer) < BUFFER_HIGH_WATER + MAX_SEND
        assert client.bodies[waits] == b""
        taken = 0
        for size in (1, BUFFER_HIGH_WATER - 1, 1, BUFFER_HIGH_WATER, MAX_SEND):
            await client.open(waits, size)
            await client.until_size(waits, taken := taken + size)
        await client.open(waits)
        blocks = await client.whole(waits)
        assert ids(blocks) == list(range(1, 2002))
        assert [block.data.split()[0] for block in blocks if block.data] == [*map(str, range(1, 2001)), DONE]


@pytest.mark.parametrize("size", [3, 16_384, 16_385, 32_767, 32_768, 32_769, 65_536, 200_000])
async def test_a_stream_that_ends_while_its_buffer_is_full_ends_when_that_is_read(size: int) -> None:
    body = b":".ljust(size - 2, b"x") + b"\n\n"

    async def source() -> AsyncIterator[bytes]:
        yield body

    async def answer(_request: Request) -> EventStreamResponse:
        return EventStreamResponse(source())

    async with serving() as server, without_window(server) as client:
        server.app.router.routes.append(Route("/short", answer))
        number = await client.get("/short")
        await client.until_headers(number)
        await wait_all_tasks_blocked()
        await client.open(number, 1)
        await client.until_size(number, 1)
        assert number not in client.over
        await client.open(number)
        assert await client.whole_body(number) == body
        protocol = served(client.socket).protocol.protocol
        await eventually(lambda: not protocol.stream_buffers and not protocol.streams)


@pytest.mark.parametrize("path", ["/healthz", "/endless?name=shut"])
async def test_a_stream_that_is_reset_while_a_send_to_it_waits_leaves_nothing_behind_and_others_alone(
    path: str,
) -> None:
    async with serving() as server:
        run_id, endless = await server.start("count", 3), with_endless(server)
        async with joined(server) as (stream, task):
            client = Windows(stream)
            await client.until_headers(number := await client.get(path))
            buffers = served(stream).protocol.protocol.stream_buffers
            await eventually(lambda: len(buffers[number].buffer) > 0)
            await wait_all_tasks_blocked()
            assert "healthz" in path or len(buffers[number].buffer) >= BUFFER_HIGH_WATER
            await client.reset(number)
            with trio.fail_after(SOON):
                await eventually(lambda: not buffers)
                await eventually(
                    lambda: not [each for each in family(task) if "_handle" in each.name]
                )  # nobody answers
            assert endless.left == endless.yielded.keys()
            other = await client.get(f"/v1/runs/{run_id}/stream")
            await client.open(other)
            assert ids(await client.whole(other)) == [1, 2, 3, 4]


# The buffer alone


async def pushed(buffer: StreamBuffer, nursery: trio.Nursery, size: int) -> Callable[[], bool]:
    """Push so many bytes; whether that has returned, to be asked when all tasks wait."""
    returned = []

    async def push() -> None:
        await buffer.push(b"x" * size)
        returned.append(size)

    nursery.start_soon(push)
    await wait_all_tasks_blocked()
    return lambda: bool(returned)


@pytest.mark.parametrize("before", [0, 1, BUFFER_HIGH_WATER - 1])
async def test_a_push_waits_from_the_high_water_mark_on_until_less_than_the_low_water_mark_is_left(before: int) -> None:
    buffer = PatchedStreamBuffer(EventWrapper)
    async with trio.open_nursery() as nursery:
        await buffer.push(b"x" * before)
        if before < BUFFER_HIGH_WATER - 1:
            assert (await pushed(buffer, nursery, BUFFER_HIGH_WATER - 1 - before))()
        waits = await pushed(buffer, nursery, 1)
        for size, left in [(0, BUFFER_HIGH_WATER), (BUFFER_LOW_WATER, BUFFER_LOW_WATER), (0, BUFFER_LOW_WATER)]:
            assert len(await buffer.pop(int(size))) == size
            await wait_all_tasks_blocked()
            assert (len(buffer.buffer), waits()) == (left, False)
        await buffer.pop(1)
        await wait_all_tasks_blocked()
        assert waits()
        assert (await pushed(buffer, nursery, 1))()
        assert not (await pushed(buffer, nursery, BUFFER_HIGH_WATER))()  # the mark counts again
        nursery.cancel_scope.cancel()


async def test_a_buffer_gives_out_what_was_put_in_and_no_more_than_it_is_asked_for() -> None:
    buffer = PatchedStreamBuffer(EventWrapper)
    await buffer.push(b"one, ")
    await buffer.push(b"")
    await buffer.push(b"two")
    assert [await buffer.pop(size) for size in (0, 4, 100, 1)] == [b"", b"one,", b" two", b""]
    buffer.set_complete()
    assert buffer.complete
    await buffer.drain()
    with pytest.raises(BufferCompleteError):
        await buffer.push(b"late")


async def test_a_buffer_that_is_closed_lets_go_of_whoever_waits_for_it() -> None:
    buffer = PatchedStreamBuffer(EventWrapper)
    async with trio.open_nursery() as nursery:
        waits = await pushed(buffer, nursery, BUFFER_HIGH_WATER)
        nursery.start_soon(buffer.drain)
        assert not waits()
        await buffer.close()
    assert waits()
    with pytest.raises(BufferCompleteError):
        await buffer.push(b"late")


async def test_several_senders_that_wait_for_one_stream_all_go_on() -> None:
    buffer = PatchedStreamBuffer(EventWrapper)
    async with trio.open_nursery() as nursery:
        waiting = [await pushed(buffer, nursery, BUFFER_HIGH_WATER) for _ in range(3)]
        assert not any(each() for each in waiting)
        await buffer.pop(3 * BUFFER_HIGH_WATER)
        await wait_all_tasks_blocked()
        returned = [each() for each in waiting]
        nursery.cancel_scope.cancel()
    assert returned == [True] * 3
