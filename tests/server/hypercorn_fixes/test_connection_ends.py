"""A connection ends with its client, and everybody who answers on it hears of that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from trio.testing import wait_all_tasks_blocked

from penstock import EventStreamResponse
from tests.support.connections import (
    LEAVING,
    SOON,
    brief,
    buffer_of,
    is_over_soon,
    jammed,
    joined,
    leave,
    readers,
    served,
    stays,
    unharmed,
    with_reset,
)
from tests.support.endpoints import KIB, with_endless
from tests.support.http2_clients import Http2, Windows
from tests.support.serving import Tap, eventually, family
from tests.support.uncorrected import ForgetsOne, TellsInTheSender, as_it_is, in_place_of
from tests.support.wire import Wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from tests.support.serving import Server

# An answer that waits for an HTTP/2 client that is gone


@pytest.mark.parametrize("how", LEAVING)
@pytest.mark.parametrize(
    "path", ["/healthz", "/nowhere", "/v1/runs/{over}", "/v1/runs/{over}/stream", "/v1/runs/{running}/stream"]
)
async def test_an_answer_that_an_http2_client_has_not_taken_is_over_when_that_is_gone(path: str, how: str) -> None:
    async with unharmed() as server:
        over, running = await server.start("count", 3), await server.start("silent")
        await server.ended_run(over)
        async with joined(server) as (stream, task):
            client = Windows(stream)
            await client.until_headers(await client.get(path.format(over=over, running=running)))
            await wait_all_tasks_blocked(0.01)
            assert readers(server, running) == [1 if "running" in path else 0]
            await leave(client, how)
            await is_over_soon(task, server)
            assert readers(server, running) == [0]
        assert (await server.run(running))["status"] == "running"


@pytest.mark.parametrize("how", LEAVING)
async def test_without_the_correction_it_waits_for_ever(how: str) -> None:
    with as_it_is("H2Protocol"):
        async with brief() as server, joined(server) as (stream, task):
            client = Windows(stream)
            await client.until_headers(await client.get("/healthz"))
            await wait_all_tasks_blocked(0.01)
            await leave(client, how)
            assert await stays(task, server)
            (waits,) = family(task)
            assert "_handle" in waits.name


class Late:
    """An answer that is given when its client is gone."""

    def __init__(self, server: Server) -> None:
        self.asked = trio.Event()
        self.gone = trio.Event()
        server.app.router.routes.append(Route("/late", self.answer))

    async def answer(self, _request: Request) -> PlainTextResponse:
        self.asked.set()
        await self.gone.wait()
        return PlainTextResponse("too late")

    async def to(self, stream: trio.SocketStream, how: str) -> None:
        """Give it to the client of this connection, who leaves."""
        client = Http2(stream)
        protocol = served(stream).protocol
        await client.get("/late")
        await self.asked.wait()
        await leave(client, how)
        await eventually(lambda: protocol.protocol.closed)
        self.gone.set()


@pytest.mark.parametrize("how", LEAVING)
async def test_an_answer_that_comes_when_its_http2_client_is_gone_goes_nowhere(how: str) -> None:
    async with unharmed() as server:
        late = Late(server)
        async with joined(server) as (stream, task):
            await late.to(stream, how)
            await is_over_soon(task, server)


@pytest.mark.parametrize("how", LEAVING)
async def test_without_the_correction_that_answer_waits_for_ever(how: str) -> None:
    with as_it_is("H2Protocol"):
        async with brief() as server:
            late = Late(server)
            async with joined(server) as (stream, task):
                await late.to(stream, how)
                assert await stays(task, server)


# Who hears that a connection is lost


@pytest.mark.parametrize("how", LEAVING)
async def test_when_a_connection_is_lost_all_responses_hear_that_wait_to_send(how: str) -> None:
    async with unharmed() as server:
        run_ids = [await server.start("silent") for _ in range(8)]
        with_endless(server)
        async with jammed(server, run_ids) as (client, task):
            await leave(client, how)
            with trio.fail_after(SOON):
                await eventually(lambda: readers(server, *run_ids) == [0] * 8)
            await is_over_soon(task, server)
        assert {run["status"] for run in (await server.client.get("/v1/runs")).json()["runs"]} == {"running"}


@pytest.mark.parametrize("how", LEAVING)
async def test_when_a_connection_is_lost_all_readers_hear_that_wait_for_a_window(how: str) -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server:
        run_id = await server.start("tap")
        tap.feed(*["x" * 10_000] * 10)
        async with joined(server) as (stream, task):
            client = Windows(stream)
            numbers = [await client.get(f"/v1/runs/{run_id}/stream") for _ in range(8)]
            await client.until_headers(*numbers)
            await wait_all_tasks_blocked(0.01)
            assert all(len(buffer_of(client, number).buffer) >= BUFFER_HIGH_WATER for number in numbers)
            assert readers(server, run_id) == [8]
            await leave(client, how)
            await is_over_soon(task, server)
            assert readers(server, run_id) == [0]
        assert (await server.run(run_id))["status"] == "running"


def with_waiting(server: Server, over: trio.Event) -> None:
    """Let the server take requests at /waiting, and neither read nor answer them until they are `over`."""

    async def waiting(_request: Request) -> PlainTextResponse:
        await over.wait()
        return PlainTextResponse("over")

    server.app.router.routes.append(Route("/waiting", waiting, methods=["POST"]))


async def test_a_response_that_leaves_its_request_unread_keeps_no_other_from_hearing_of_the_loss() -> None:
    tap, over = Tap(), trio.Event()
    async with brief({"tap": tap}, complains=True) as server:
        with_waiting(server, over)
        run_id = await server.start("tap")
        async with joined(server) as (stream, _):
            client = Http2(stream)
            number = client.begin("POST", "/waiting")
            reader = await client.get(f"/v1/runs/{run_id}/stream")
            await client.until_headers(reader)
            for _ in range(30):  # more than are kept for it
                client.h2.send_data(number, b"x")
            await client.send()
            await wait_all_tasks_blocked(0.01)
            with_reset(stream)

        def told() -> bool:
            tap.feed("more")  # so that a send finds out
            return readers(server, run_id) == [0]

        try:
            with trio.fail_after(SOON):
                await eventually(told)
        finally:
            over.set()


@pytest.mark.parametrize("how", LEAVING)
async def test_without_the_corrections_some_of_them_never_do(how: str) -> None:
    with in_place_of(TCPServer=TellsInTheSender, H2Protocol=ForgetsOne):
        async with brief() as server:
            run_ids = [await server.start("silent") for _ in range(8)]
            with_endless(server)
            async with jammed(server, run_ids) as (client, task):
                await leave(client, how)
                with trio.fail_after(SOON):
                    await eventually(lambda: sum(readers(server, *run_ids)) < 8)
                assert await stays(task, server)
                assert sum(readers(server, *run_ids)) > 0


# Sources that outlive their client


class Detached:
    """A source that runs to its end without its client: before a pause, and after it, it says this much."""

    def __init__(self, server: Server, before: int, after: int) -> None:
        self.go_on, self.over = trio.Event(), trio.Event()
        self.yielded = 0
        self._before, self._after = before, after
        server.app.router.routes.append(Route("/detached", self._answer))

    async def _answer(self, _request: Request) -> EventStreamResponse:
        return EventStreamResponse(self._source(trio.lowlevel.current_task()), on_disconnect="detach")

    async def _source(self, task: trio.lowlevel.Task) -> AsyncIterator[bytes]:
        for count in (self._before, self._after):
            for _ in range(count):
                yield KIB
                assert trio.lowlevel.current_task() is task
                self.yielded += 1
            await self.go_on.wait()
        self.over.set()


async def gone_from_http1(stream: trio.SocketStream, how: str) -> None:
    await stream.send_all(b"GET /detached HTTP/1.1\r\nhost: localhost\r\n\r\n")
    await Wire(stream).until(b"\r\n\r\n")
    await wait_all_tasks_blocked(0.01)
    if how == "reset":
        with_reset(stream)
    await stream.aclose()


async def gone_from_http2(stream: trio.SocketStream, how: str) -> None:
    client = Windows(stream)
    await client.until_headers(await client.get("/detached"))
    await wait_all_tasks_blocked(0.01)
    await leave(client, how)


@pytest.mark.parametrize("before", [1, 10_000])
@pytest.mark.parametrize(
    "client, how", [*((gone_from_http1, how) for how in LEAVING[:2]), *((gone_from_http2, how) for how in LEAVING)]
)
async def test_a_detached_source_runs_to_its_end_in_its_task_when_its_client_is_gone(
    client: Any, how: str, before: int
) -> None:
    async with unharmed() as server:
        source = Detached(server, before, after=1000)
        async with joined(server) as (stream, task):
            await client(stream, how)
            assert source.yielded < before or before == 1  # if there is much, it waits in a send
            with trio.fail_after(SOON):
                await eventually(lambda: source.yielded >= before)
                assert await stays(task, server)
                source.go_on.set()
                await source.over.wait()
            await is_over_soon(task, server)
        assert source.yielded == before + 1000
