"""A connection ends with its client, alone if its protocol fails, and notifies all responses on it."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, H2Protocol
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from trio.testing import wait_all_tasks_blocked

from penstock import EventStreamResponse
from tests.support.connections import (
    LEAVING,
    SOON,
    brief,
    buffer_of,
    is_over,
    is_over_soon,
    jammed,
    joined,
    leave,
    patient_config,
    readers,
    served,
    stays,
    unharmed,
    with_reset,
)
from tests.support.endpoints import KIB, with_endless, with_tapped
from tests.support.http2_clients import Http2, Windows, without_window
from tests.support.serving import Tap, eventually
from tests.support.wire import Wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from tests.support.serving import Server


@pytest.mark.parametrize("how", LEAVING)
@pytest.mark.parametrize("path", ["/healthz", "/v1/runs/{running}/stream"])
async def test_a_response_that_an_http2_client_has_not_taken_ends_with_the_client(path: str, how: str) -> None:
    async with unharmed() as server:
        running = await server.start("silent")
        async with joined(server) as (stream, task):
            client = Windows(stream)
            await client.until_headers(await client.get(path.format(running=running)))
            await wait_all_tasks_blocked(0.01)
            assert readers(server, running) == [1 if "running" in path else 0]
            await leave(client, how)
            await is_over_soon(task, server)
            assert readers(server, running) == [0]
        assert (await server.run(running))["status"] == "running"


@pytest.mark.parametrize("how", LEAVING)
async def test_a_response_that_comes_when_its_http2_client_is_gone_is_dropped(how: str) -> None:
    asked, gone = trio.Event(), trio.Event()

    async def late(_request: Request) -> PlainTextResponse:
        asked.set()
        await gone.wait()
        return PlainTextResponse("too late")

    async with unharmed() as server, joined(server) as (stream, task):
        server.app.router.routes.append(Route("/late", late))
        client = Http2(stream)
        protocol = served(stream).protocol
        await client.get("/late")
        await asked.wait()
        await leave(client, how)
        await eventually(lambda: protocol.protocol.closed)
        gone.set()
        await is_over_soon(task, server)


# A connection that is lost


@pytest.mark.parametrize("how", LEAVING)
async def test_all_responses_that_wait_to_send_end_with_their_connection(how: str) -> None:
    async with unharmed() as server:
        run_ids = [await server.start("silent") for _ in range(8)]
        with_endless(server)
        async with jammed(server, run_ids) as (client, task):
            await leave(client, how)
            with trio.fail_after(SOON):
                await eventually(lambda: readers(server, *run_ids) == [0] * 8)
            await is_over_soon(task, server)
        assert {run["status"] for run in (await server.client.get("/v1/runs")).json()["runs"]} == {"running"}


@pytest.mark.parametrize("how", ["close", "goaway"])
async def test_all_readers_that_wait_for_a_window_end_with_their_connection(how: str) -> None:
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


async def test_a_response_that_leaves_its_request_unread_does_not_hold_up_the_end_of_others() -> None:
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

        def noticed() -> bool:
            tap.feed("more")  # so that a send finds out
            return readers(server, run_id) == [0]

        try:
            with trio.fail_after(SOON):
                await eventually(noticed)
        finally:
            over.set()


class Detached:
    """A source that runs to its end without its client: it yields so many events before a pause, and after it."""

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


@pytest.mark.parametrize("before", [1, 5_000])
@pytest.mark.parametrize("client, how", [(gone_from_http1, "reset"), (gone_from_http2, "close")])
async def test_a_detached_source_runs_to_its_end_when_its_client_is_gone(client: Any, how: str, before: int) -> None:
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


async def test_an_error_in_a_connection_ends_it_and_is_logged_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail(_event: Any) -> None:
        raise ValueError("one line\nand another, which the client has sent")

    tap = Tap()
    async with brief({"tap": tap}, complains=True) as server:
        run_id, silent = await server.start("tap"), await server.start("silent")
        async with server.reading(run_id) as reader, without_window(server) as client:
            await client.until_headers(await client.get(f"/v1/runs/{silent}/stream"))
            assert readers(server, silent) == [1]
            protocol = served(client.socket).protocol.protocol
            monkeypatch.setattr(protocol, "_handle_events", fail)
            client.h2.ping(b"is read!")
            await client.send()
            while await client.socket.receive_some():
                pass
            await eventually(lambda: readers(server, silent) == [0])
            tap.feed("goes on")
            assert [block.data for block in await reader.take(1)] == ["goes on"]
            assert (await server.run(silent))["status"] == "running"
        assert (await server.client.get("/healthz")).status_code == 200
        assert not server.ended.is_set()
    (said,) = server.complaints
    assert said.levelno == logging.WARNING
    assert said.exc_info is None
    assert "a connection ended with an error of its protocol: ValueError at " in said.getMessage()
    assert "line" not in said.getMessage()


async def body(client: Http2) -> list[int]:
    number = client.begin("POST", "/v1/runs")
    client.h2.send_data(number, b"{}")
    await client.send()
    return [number]


async def change_of_mind(client: Http2) -> list[int]:
    client.h2.reset_stream(client.begin("GET", "/", ends=True))
    await client.send()
    return []


@asynccontextmanager
async def shutting_down(server: Server) -> AsyncIterator[tuple[Wire, Tap, Windows, trio.lowlevel.Task]]:
    """A reader whose stream goes on while a server shuts down, what feeds it, and another client's connection."""
    tap = Tap()
    with_tapped(server, tap)
    async with await server.wire() as wire, joined(server) as (stream, task):
        await wire.send("GET", "/tapped")
        tap.feed("before")
        await wire.until(b"data: before\n\n")
        client = Windows(stream)
        await client.until_headers(await client.get("/healthz"))  # and takes no more of it: so it is kept
        terminated = served(stream).context.terminated
        server.shutdown.set()
        await eventually(terminated.is_set)
        yield wire, tap, client, task


@pytest.mark.parametrize("ask", [body, change_of_mind])
async def test_a_request_during_a_shutdown_is_refused_and_ends_nothing(ask: Any) -> None:
    async with brief(config=patient_config()) as server:
        async with shutting_down(server) as (wire, tap, client, task):
            for number in await ask(client):
                while number not in client.over:
                    await client.receive()
            client.h2.ping(b"all well")  # its answer comes after all that is sent about the request
            await client.send()
            await client.receive()
            assert not is_over(task, server)
            tap.feed("after")
            tap.end()
            received = await wire.rest()
        await server.ended.wait()
    assert b"data: after\n\n" in received
    assert received.endswith(b"\r\n0\r\n\r\n")


async def test_priorities_are_ignored_and_not_kept() -> None:
    async with brief() as server, without_window(server) as client:
        for number in range(1001, 1021, 2):
            client.h2.prioritize(number, weight=1, depends_on=number - 2)
        number = await client.get("/healthz")
        await client.open(number)
        assert await client.whole_body(number) == b'{"status":"alive"}'
        protocol = served(client.socket).protocol.protocol
        assert isinstance(protocol, H2Protocol)
        assert len(protocol.priority._streams) <= 2
