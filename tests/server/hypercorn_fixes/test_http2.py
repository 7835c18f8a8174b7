"""HTTP/2: streams with backpressure, which end whole or are reset, on connections that are closed when idle."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import httpx2
import pytest
import trio
from h2.errors import ErrorCodes
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, BUFFER_LOW_WATER, BufferCompleteError, StreamBuffer
from hypercorn.trio.worker_context import EventWrapper
from starlette.responses import StreamingResponse
from starlette.routing import Route
from trio.testing import wait_all_tasks_blocked

from penstock import Event, EventStreamResponse
from penstock.asgi.sender import MAX_SEND
from penstock.server.hypercorn_fixes import connection as connection_module
from penstock.server.hypercorn_fixes.http2 import PatchedStreamBuffer
from tests.support.connections import (
    SOON,
    Ending,
    brief,
    brief_config,
    buffer_of,
    is_over,
    is_over_soon,
    joined,
    patient_config,
    readers,
    served,
    stays,
    unharmed,
)
from tests.support.endpoints import KIB, flood, with_endless, with_tapped
from tests.support.http2_clients import WHOLE, Ends, Http2, ShutEnds, Windows, connected, without_window
from tests.support.serving import PRODUCERS, Silence, Tap, eventually, family, serving
from tests.support.wire import DONE, Block, blocks_of, ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.requests import Request

    from tests.support.serving import Server


async def test_the_api_works_over_http2() -> None:
    async with serving() as server, httpx2.AsyncClient(base_url=server.url, http1=False, http2=True) as client:
        started = await client.post("/v1/runs", json={"producer": "count", "input": 200})
        assert (started.http_version, started.status_code) == ("HTTP/2", 201)
        stream = await client.get(started.headers["location"], headers={"Last-Event-ID": "100"})
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert ids(blocks_of(stream.text)) == list(range(101, 202))
        over = await client.get(started.headers["location"], headers={"Last-Event-ID": "201"})
        assert (over.status_code, over.content) == (204, b"")
        assert (await client.head(started.headers["location"])).status_code == 200
        assert (await client.get("/v1/runs/nobody")).json()["code"] == "RUN_NOT_FOUND"
        assert len(server.connections()) == 1


@pytest.mark.parametrize("method, path, status", [("POST", "/v1/runs", 413), ("GET", "/healthz", 200)])
async def test_a_request_still_being_sent_is_answered(method: str, path: str, status: int) -> None:
    async with serving() as server, httpx2.AsyncClient(base_url=server.url, http1=False, http2=True) as client:
        run_id = await server.start("silent")
        for _ in range(2):
            answer = await client.request(method, path, content=b" " * 2_000_000)
            assert answer.status_code == status
        assert not server.ended.is_set()
        assert (await server.run(run_id))["status"] == "running"


async def test_two_streams_run_at_once_on_one_connection() -> None:
    one, two = Tap(), Tap()
    async with serving({"one": one, "two": two}) as server, connected(server) as streams:
        first = await streams.get(f"/v1/runs/{await server.start('one')}/stream")
        second = await streams.get(f"/v1/runs/{await server.start('two')}/stream")
        for seq in range(1, 6):
            one.feed(f"one {seq}")
            assert (await streams.blocks(first, seq))[-1] == Block(seq, data=f"one {seq}")
            two.feed(f"two {seq}")
            assert (await streams.blocks(second, seq))[-1] == Block(seq, data=f"two {seq}")
        one.end()
        assert (await streams.whole(first))[-1] == Block(6, data=DONE)
        assert second not in streams.over
        two.feed("goes on")
        two.end()
        assert (await streams.whole(second))[-2:] == [Block(6, data="goes on"), Block(7, data=DONE)]


async def test_headers_come_at_once_and_a_stream_that_is_reset_leaves_nothing_and_its_neighbour_alone() -> None:
    tap = Tap()
    async with serving({**PRODUCERS, "tap": tap}) as server, connected(server) as streams:
        silent, fed = await server.start("silent"), await server.start("tap")
        doomed = await streams.get(f"/v1/runs/{silent}/stream")
        while doomed not in streams.headers:
            await streams.receive()
        assert streams.headers[doomed][":status"] == "200"
        stays = await streams.get(f"/v1/runs/{fed}/stream")
        tap.feed("before")
        await streams.blocks(stays, 1)
        assert readers(server, silent) == [1]
        await streams.reset(doomed)
        await eventually(lambda: readers(server, silent) == [0])
        assert (await server.run(silent))["status"] == "running"
        tap.feed("after")
        tap.end()
        assert ids(await streams.whole(stays)) == [1, 2, 3]


async def test_a_connection_that_is_lost_ends_all_of_its_readers_and_none_of_their_runs() -> None:
    async with serving() as server:
        run_ids = [await server.start("silent") for _ in range(5)]
        await wait_all_tasks_blocked()  # an answer is with its client before its task is over
        before = server.tasks()
        async with connected(server) as streams:
            for run_id in run_ids:
                await streams.get(f"/v1/runs/{run_id}/stream")
            while len(streams.headers) < len(run_ids):
                await streams.receive()
        await eventually(lambda: readers(server, *run_ids) == [0] * len(run_ids))
        await eventually(lambda: server.tasks() == before)
        assert {run["status"] for run in (await server.client.get("/v1/runs")).json()["runs"]} == {"running"}


WIDE: Final = 16_000
"""The size of an event that fills one frame, and more than the sockets of a client that does not read."""
FIRST: Final = Block(data="first")


def with_direct(server: Server, *later: str | Exception) -> trio.Event:
    """Let the server stream at /direct: one event at once, and when the event is set that this returns, the others."""
    go = trio.Event()

    async def source() -> AsyncIterator[Event]:
        yield Event(data="first")
        await go.wait()
        for each in later:
            if isinstance(each, Exception):
                raise each
            yield Event(data=each)

    async def direct(_request: Request) -> EventStreamResponse:
        return EventStreamResponse(source(), observer=Silence())

    server.app.router.routes.append(Route("/direct", direct, methods=["GET", "POST"]))
    return go


@asynccontextmanager
async def ends(server: Server) -> AsyncIterator[Ends]:
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        yield Ends(stream)


async def grace(client: Ends, server: Server) -> None:
    """Shut the server down, up to the point at which the last responses have their time."""
    server.shutdown.set()
    terminated = served(client.socket).context.terminated
    await eventually(terminated.is_set)


async def test_responses_that_end_during_the_grace_of_a_shutdown_reach_their_clients_whole() -> None:
    later = ["x" * WIDE] * 3 + ["last"]
    async with brief(config=patient_config()) as server, ends(server) as client:
        go = with_direct(server, *later)
        numbers = [await client.get("/direct") for _ in range(5)]
        for number in numbers:
            assert await client.blocks(number, 1) == [FIRST]
        await grace(client, server)
        go.set()
        await client.until_closed()
        assert client.ends == dict.fromkeys(numbers, WHOLE)
        for number in numbers:
            assert [block.data for block in blocks_of(client.bodies[number])] == ["first", *later]


async def test_a_response_is_over_only_when_its_client_has_the_end_of_its_stream() -> None:
    async with brief(config=patient_config()) as server, joined(server) as (stream, _task):
        go = with_direct(server, "x" * WIDE)
        client = Ends(stream)
        served(stream).stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, 4096)
        assert await client.blocks(await client.get("/direct"), 1) == [FIRST]
        await grace(client, server)
        go.set()
        await eventually(served(stream).send_lock.locked)
        await wait_all_tasks_blocked(0.02)  # for tasks that do not wait for this send
        assert served(stream).send_lock.locked()
        await client.until_closed()
        (body,) = client.bodies.values()
        assert blocks_of(body) == [FIRST, Block(data="x" * WIDE)]
    assert [*client.ends.values()] == [WHOLE]


async def cut_off(what: str) -> tuple[list[Block], dict[int, str | ErrorCodes]]:
    """The blocks of a silent stream, of a direct response or a run, that the server's end has cut off; and its end."""
    ending = Ending("cancelled" if what == "run" else "asked")
    async with brief(run=ending.run) as server, ends(server) as client:
        with_direct(server)
        path = "/direct" if what == "direct" else f"/v1/runs/{await server.start('silent')}/stream"
        number = await client.get(path)
        await client.until_headers(number)
        if what == "direct":
            await client.blocks(number, 1)
        ending.now(server)
        await client.until_closed()
        return blocks_of(client.bodies[number]), client.ends


async def test_a_direct_response_that_is_cut_off_says_so_and_ends_its_stream() -> None:
    (first, error, done), how = await cut_off("direct")
    assert (first, error.event, done.data) == (FIRST, "error", DONE)
    assert [*how.values()] == [WHOLE]


async def test_a_reader_of_a_run_that_is_cut_off_is_told_to_come_back_and_its_stream_ends() -> None:
    (retry,), how = await cut_off("run")
    assert retry.retry is not None
    assert [*how.values()] == [WHOLE]


@asynccontextmanager
async def idle(server: Server, how: str) -> AsyncIterator[tuple[Ends, trio.lowlevel.Task]]:
    """A client that has begun HTTP/2 and asks for nothing, or whose only stream it has reset; and what serves it."""
    run_id = await server.start("silent")
    async with joined(server) as (stream, task):
        client = Ends(stream)
        await client.send()
        await client.receive()
        if how == "reset":
            number = await client.get(f"/v1/runs/{run_id}/stream")
            await client.until_headers(number)
            await client.reset(number)
        yield client, task


IDLE: Final = ["reset", "preface"]


@pytest.mark.parametrize("how", IDLE)
async def test_a_connection_without_streams_is_closed_when_its_time_is_over_but_its_client_may_go_first(
    how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection_module, "LINGER", 2 * SOON)
    async with unharmed() as server, idle(server, how) as (client, task):
        with trio.fail_after(SOON):
            await client.until_closed()
        await wait_all_tasks_blocked(0.02)
        assert not is_over(task, server)
        await client.socket.aclose()
        await is_over_soon(task, server)


async def test_a_connection_with_one_stream_left_is_not_idle() -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server, idle(server, "preface") as (client, task):
        run_ids = [await server.start("tap"), await server.start("silent")]
        left, gone = [await client.get(f"/v1/runs/{run_id}/stream") for run_id in run_ids]
        await client.until_headers(left, gone)
        assert readers(server, *run_ids) == [1, 1]
        await client.reset(gone)
        await eventually(lambda: readers(server, *run_ids) == [1, 0])
        await wait_all_tasks_blocked()
        assert await stays(task, server)
        tap.end()
        assert [block.data for block in await client.whole(left)] == [DONE]


# Responses that fail


def with_failing(server: Server) -> None:
    async def pieces() -> AsyncIterator[bytes]:
        yield b"piece"
        raise ValueError("in the middle")

    async def failing(_request: Request) -> StreamingResponse:
        return StreamingResponse(pieces())

    server.app.router.routes.append(Route("/failing", failing))


async def test_a_response_that_fails_after_its_headers_is_reset_and_leaves_nothing_and_its_neighbour_alone() -> None:
    tap = Tap()
    async with unharmed(complains=True) as server, ends(server) as client:
        with_failing(server)
        with_tapped(server, tap)
        tap.feed("before")
        neighbour = await client.get("/tapped")
        await client.blocks(neighbour, 1)
        failed = [await client.get("/failing") for _ in range(3)]
        while not client.over.issuperset(failed):
            await client.receive()
        assert client.ends == dict.fromkeys(failed, ErrorCodes.INTERNAL_ERROR)
        assert {client.headers[number][":status"] for number in failed} == {"200"}
        protocol = served(client.socket).protocol.protocol
        with trio.fail_after(SOON):
            await eventually(lambda: [*protocol.stream_buffers] == [*protocol.streams] == [neighbour])
        assert {record.getMessage() for record in server.complaints} == {"Error in ASGI Framework"}
        tap.feed("after")
        tap.end()
        assert [block.data for block in await client.whole(neighbour)] == ["before", "after"]
        assert client.ends[neighbour] == WHOLE


async def test_a_failed_response_that_its_client_does_not_take_is_reset_too_and_not_kept() -> None:
    async with unharmed(complains=True) as server, joined(server) as (stream, _task):
        with_failing(server)
        client = ShutEnds(stream)
        number = await client.get("/failing")
        await client.until_headers(number)
        await eventually(lambda: bool(server.complaints))
        await wait_all_tasks_blocked(0.02)
        assert await client.whole_body(number) == b""
        assert client.ends == {number: ErrorCodes.INTERNAL_ERROR}
        with pytest.raises(KeyError):
            buffer_of(client, number)


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


@pytest.mark.parametrize("size", [3, 16_385, 32_767, 32_768, 200_000])
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
async def test_a_stream_that_is_reset_while_a_send_to_it_waits_leaves_nothing_and_others_alone(path: str) -> None:
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
                )  # no response is left
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


async def test_a_websocket_over_http2_is_refused_and_its_neighbour_goes_on() -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server, joined(server) as (stream, _):
        client = Http2(stream)
        stays_open = await client.get(f"/v1/runs/{await server.start('tap')}/stream")
        await client.until_headers(stays_open)
        number = client.begin("CONNECT", "/", (":protocol", "websocket"), ("sec-websocket-version", "13"))
        await client.send()
        assert await client.whole_body(number) == b""
        assert client.headers[number][":status"] == "403"
        tap.feed("goes on")
        tap.end()
        assert [block.data for block in await client.whole(stays_open)] == ["goes on", DONE]


LIMIT: Final = 3
"""The requests that Hypercorn is to let one connection have."""
REQUESTS: Final = 2 * LIMIT


async def test_a_stream_goes_on_after_more_requests_than_hypercorns_limit() -> None:
    tap, config = Tap(), brief_config()
    config.keep_alive_max_requests = LIMIT
    async with unharmed({"tap": tap}, config=config) as server, joined(server) as (stream, _):
        client = Http2(stream)
        number = await client.get(f"/v1/runs/{await server.start('tap')}/stream")
        tap.feed("before")
        await client.blocks(number, 1)
        for _ in range(REQUESTS):
            asked = await client.get("/healthz")
            await client.whole_body(asked)
            assert client.headers[asked][":status"] == "200"
        tap.feed("after")
        tap.end()
        assert [block.data for block in await client.whole(number)] == ["before", "after", DONE]
    assert config.keep_alive_max_requests == LIMIT  # what was given to `serve` is as it was
