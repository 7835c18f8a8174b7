"""How HTTP/2 streams and connections end: whole, at a shutdown too; or visibly not, if a response fails; or idle."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import pytest
import trio
from h2.errors import ErrorCodes
from starlette.responses import StreamingResponse
from starlette.routing import Route
from trio.testing import wait_all_tasks_blocked

from penstock import Event, EventStreamResponse
from penstock.server import hypercorn_fixes as corrections
from tests.support.connections import (
    SOON,
    Ending,
    brief,
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
from tests.support.endpoints import with_tapped
from tests.support.http2_clients import WHOLE, Ends, ShutEnds
from tests.support.serving import Silence, Tap, eventually
from tests.support.uncorrected import as_it_is
from tests.support.wire import DONE, Block, blocks_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from tests.support.serving import Server

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


# Responses that end during a shutdown


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


async def ends_in_a_full_socket() -> Ends:
    """A client that did not read while its response ended, during a shutdown, and reads then; what it has seen."""
    async with brief(config=patient_config()) as server, joined(server) as (stream, _task):
        go = with_direct(server, "x" * WIDE)
        client = Ends(stream)
        served(stream).stream.setsockopt(trio.socket.SOL_SOCKET, trio.socket.SO_SNDBUF, 4096)
        assert await client.blocks(await client.get("/direct"), 1) == [FIRST]
        await grace(client, server)
        go.set()
        await eventually(served(stream).send_lock.locked)
        await wait_all_tasks_blocked(0.02)  # for whatever does not wait for this send
        assert served(stream).send_lock.locked()
        await client.until_closed()
        (body,) = client.bodies.values()
        assert blocks_of(body) == [FIRST, Block(data="x" * WIDE)]
    return client


async def test_a_response_is_over_only_when_its_client_can_see_that() -> None:
    assert [*(await ends_in_a_full_socket()).ends.values()] == [WHOLE]


async def test_without_the_correction_the_frame_that_ends_the_stream_is_lost() -> None:
    with as_it_is("H2Protocol"):
        assert not (await ends_in_a_full_socket()).ends


# Last words


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


@pytest.mark.parametrize("what, seen", [("direct", [FIRST]), ("run", [])])
async def test_without_the_correction_no_last_word_gets_through(what: str, seen: list[Block]) -> None:
    with as_it_is("H2Protocol"):
        assert await cut_off(what) == (seen, {})


# Connections that are idle


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
    monkeypatch.setattr(corrections, "LINGER", 2 * SOON)
    async with unharmed() as server, idle(server, how) as (client, task):
        with trio.fail_after(SOON):
            await client.until_closed()
        await wait_all_tasks_blocked(0.02)
        assert not is_over(task, server)
        await client.socket.aclose()
        await is_over_soon(task, server)


@pytest.mark.parametrize("how", IDLE)
async def test_without_the_correction_it_stays(how: str) -> None:
    with as_it_is("H2Protocol"):
        async with brief() as server, idle(server, how) as (_client, task):
            assert await stays(task, server)


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
    """Let the server begin a response at /failing, and fail."""

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


@asynccontextmanager
async def failed_unread(server: Server) -> AsyncIterator[tuple[ShutEnds, int]]:
    """A client that has let nothing of a response in, and that response, which has failed; all has come to rest."""
    with_failing(server)
    async with joined(server) as (stream, _task):
        client = ShutEnds(stream)
        number = await client.get("/failing")
        await client.until_headers(number)
        await eventually(lambda: bool(server.complaints))
        await wait_all_tasks_blocked(0.02)
        yield client, number


async def test_a_failed_response_that_its_client_does_not_take_is_reset_too_and_not_kept() -> None:
    async with unharmed(complains=True) as server, failed_unread(server) as (client, number):
        assert await client.whole_body(number) == b""
        assert client.ends == {number: ErrorCodes.INTERNAL_ERROR}
        with pytest.raises(KeyError):
            buffer_of(client, number)


async def test_without_the_correction_a_failed_response_is_kept_and_its_stream_never_ends() -> None:
    with as_it_is("H2Protocol"):
        async with brief(complains=True) as server, failed_unread(server) as (client, number):
            await client.until_headers(await client.get("/healthz"))
            assert bytes(buffer_of(client, number).buffer) == b"piece"
            assert number not in client.over


# Requests that never end


async def test_a_failed_response_to_a_request_that_is_still_being_sent_says_its_last_words_once() -> None:
    async with brief() as server, await server.wire() as wire:
        with_direct(server, ValueError("in the middle")).set()
        await wire.stream.send_all(b"POST /direct HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n123")
        await wire.until(b"event: error\n", b"data: [DONE]\n\n")
        await wait_all_tasks_blocked(0.01)
        server.shutdown.set()
        with trio.fail_after(SOON):
            body = await wire.rest()
        assert (body.count(b"data: first"), body.count(b"event: error"), body.count(b"[DONE]")) == (1, 1, 1)
