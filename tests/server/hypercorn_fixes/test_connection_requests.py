"""More than one request on a connection: the next before the answer to the first, and very many."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from h2.connection import ConnectionState

import penstock.server.serve
from penstock.asgi import request_body as bodies
from penstock.server import hypercorn_fixes as corrections
from tests.support.connections import (
    SOON,
    Ending,
    brief,
    brief_config,
    is_over_soon,
    joined,
    patient_config,
    readers,
    served,
    stays,
    unharmed,
    with_reset,
)
from tests.support.endpoints import with_tapped
from tests.support.http2_clients import Http2
from tests.support.serving import Tap, eventually, family
from tests.support.uncorrected import STOCK, ReadsOn, TellsInTheSender, in_place_of
from tests.support.wire import DONE, Wire

if TYPE_CHECKING:
    from hypercorn.config import Config

    from penstock.server.hypercorn_fixes import PatchedTCPServer, SendDeadline
    from tests.support.serving import Server

# Requests that come early


async def send_two(stream: trio.SocketStream, one: str, other: str) -> None:
    await stream.send_all(
        b"".join(b"GET %b HTTP/1.1\r\nhost: localhost\r\n\r\n" % path.encode() for path in (one, other))
    )


async def test_two_requests_that_come_at_once_are_answered_in_their_order() -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server:
        run_id = await server.start("tap")
        async with joined(server) as (stream, task):
            wire = Wire(stream)
            await send_two(stream, f"/v1/runs/{run_id}/stream", "/healthz")
            tap.feed("one")
            await wire.until(b"data: one\n\n")
            tap.feed("two")
            tap.end()
            first, _, second = (await wire.until(b"data: [DONE]\n\n", b'"status"')).partition(b"\r\n0\r\n\r\n")
            assert first.startswith(b"HTTP/1.1 200")
            assert first.endswith(b"data: [DONE]\n\n")
            assert b"data: two\n\n" in first
            assert second.startswith(b"HTTP/1.1 200")
            await stream.aclose()
            await is_over_soon(task, server)


async def leaves_early(server: Server, tap: Tap, how: str) -> trio.lowlevel.Task:
    """A client that sends a second request, and goes in the middle of the first answer; the connection's task."""
    run_id = await server.start("tap")
    async with joined(server, partial(trio.open_tcp_stream, "127.0.0.1")) as (stream, task):
        await send_two(stream, f"/v1/runs/{run_id}/stream", "/healthz")
        tap.feed("first")
        await Wire(stream).until(b"data: first\n\n")
        await eventually(lambda: readers(server, run_id) == [1])
        if how == "reset":
            with_reset(stream)

    def gone() -> bool:
        tap.feed("more")  # nobody reads, so only a send finds out
        return readers(server, run_id) == [0]

    with trio.fail_after(SOON):
        await eventually(gone)
    assert (await server.run(run_id))["status"] == "running"
    return task


@pytest.mark.parametrize("how", ["close", "reset"])
@pytest.mark.parametrize("early", [b"x", b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"])
async def test_a_reader_of_a_silent_run_without_pings_goes_with_a_client_that_has_sent_too_much(
    how: str, early: bytes
) -> None:
    async with unharmed() as server:
        run_id = await server.start("silent")
        async with joined(server, partial(trio.open_tcp_stream, "127.0.0.1")) as (stream, task):
            target = f"/v1/runs/{run_id}/stream?include_pings=false"
            await stream.send_all(f"GET {target} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode() + early)
            await Wire(stream).until(b"text/event-stream")
            await eventually(lambda: readers(server, run_id) == [1])
            if how == "reset":
                with_reset(stream)
        await is_over_soon(task, server)
        assert readers(server, run_id) == [0]


async def test_a_client_that_sends_more_than_headers_may_have_before_its_answer_is_over_is_cut_off() -> None:
    async with unharmed() as server:
        run_id = await server.start("silent")
        async with joined(server) as (stream, task):
            await stream.send_all(f"GET /v1/runs/{run_id}/stream HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            await eventually(lambda: readers(server, run_id) == [1])
            with suppress(trio.BrokenResourceError):
                for _ in range(20):
                    await stream.send_all(b"x" * 1024)
            await is_over_soon(task, server)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_sent_a_second_request_early_takes_its_connection_along(how: str) -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server:
        await is_over_soon(await leaves_early(server, tap, how), server)


@pytest.mark.parametrize("kind", [ReadsOn, TellsInTheSender])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_without_the_correction_it_leaves_its_connection_behind(how: str, kind: type[PatchedTCPServer]) -> None:
    tap = Tap()
    with in_place_of(TCPServer=kind, H11Protocol=STOCK["H11Protocol"]):
        async with brief({"tap": tap}) as server:
            task = await leaves_early(server, tap, how)
            with trio.fail_after(SOON):
                await eventually(lambda: not family(task))  # no response is left that could wake it
            assert await stays(task, server)


async def comes_early_at_the_end(server: Server, stream: trio.SocketStream) -> None:
    """A second request, behind one whose answer ends when the server does."""
    tap, wire = Tap(), Wire(stream)
    with_tapped(server, tap)
    await send_two(stream, "/tapped", "/healthz")
    tap.feed("before")
    await wire.until(b"data: before\n\n")
    server.shutdown.set()
    await eventually(served(stream).context.terminated.is_set)
    tap.end()
    assert (await wire.rest()).endswith(b"\r\n0\r\n\r\n")


async def test_a_second_request_that_came_early_does_not_hold_up_a_shutdown() -> None:
    async with brief(config=patient_config()) as server, joined(server) as (stream, task):
        await comes_early_at_the_end(server, stream)
        await is_over_soon(task, server)


@pytest.mark.parametrize("kind", [ReadsOn, TellsInTheSender])
async def test_without_the_correction_it_does(kind: type[PatchedTCPServer]) -> None:
    ending = Ending("cancelled")
    with in_place_of(TCPServer=kind, H11Protocol=STOCK["H11Protocol"]):
        async with brief(config=patient_config(), run=ending.run) as server, joined(server) as (stream, task):
            await comes_early_at_the_end(server, stream)
            assert await stays(task, server)
            ending.now(server)


# Many requests on one connection


LIMIT: Final = 3
"""The requests that Hypercorn is to let one connection have."""
REQUESTS: Final = 10


def limited_config() -> Config:
    config = brief_config()
    config.keep_alive_max_requests = LIMIT
    return config


async def asks_often(client: Http2) -> int:
    """Make more requests than that; how many are answered."""
    for answered in range(REQUESTS):
        number = await client.get("/healthz")
        while number not in client.over:
            if client.h2.state_machine.state is ConnectionState.CLOSED:
                return answered  # it has been told to go away
            await client.receive()
        assert client.headers[number][":status"] == "200"
    return REQUESTS


async def test_a_stream_goes_on_however_many_requests_its_connection_has_had() -> None:
    tap, config = Tap(), limited_config()
    async with unharmed({"tap": tap}, config=config) as server, joined(server) as (stream, _):
        client = Http2(stream)
        number = await client.get(f"/v1/runs/{await server.start('tap')}/stream")
        tap.feed("before")
        await client.blocks(number, 1)
        assert await asks_often(client) == REQUESTS
        tap.feed("after")
        tap.end()
        assert [block.data for block in await client.whole(number)] == ["before", "after", DONE]
    assert config.keep_alive_max_requests == LIMIT  # what was given to `serve` is as it was


async def test_without_the_correction_it_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def correct(config: Config, warn: Any) -> SendDeadline:
        sends = corrections.apply(config, warn)
        config.keep_alive_max_requests = LIMIT
        return sends

    monkeypatch.setattr(penstock.server.serve, "correct", correct)
    tap = Tap()
    async with brief({"tap": tap}) as server, joined(server) as (stream, _):
        client, run_id = Http2(stream), await server.start("tap")
        number = await client.get(f"/v1/runs/{run_id}/stream")
        tap.feed("before")
        await client.blocks(number, 1)
        assert await asks_often(client) < REQUESTS
        assert readers(server, run_id) == [1]
        tap.feed("after")
        tap.end()
        rest = await Wire(stream).rest()  # all that comes until the server closes it
        assert b"after" not in rest
        assert DONE.encode() not in rest


# Requests without a body


@pytest.fixture
def looked_after(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The requests to whose end the response waits."""
    seen: list[Any] = []

    class Noted(bodies._Request):
        def __init__(self, *args: Any, **named: Any) -> None:
            super().__init__(*args, **named)
            seen.append(self)

    monkeypatch.setattr(bodies, "_Request", Noted)
    return seen


@pytest.mark.parametrize("method", ["GET", "HEAD", "POST", "DELETE"])
@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(
    "framing, waits",
    [
        ("x-content-length: 5\r\ncontent-type: a/b\r\n", 0),
        ("content-length: 0\r\n", 1),
        ("Content-Length: 0\r\n", 1),
        ("transfer-encoding: chunked\r\n", 1),
        ("TRANSFER-ENCODING: chunked\r\n", 1),
    ],
)
async def test_only_a_request_of_http1_that_says_how_its_body_ends_is_waited_for(
    looked_after: list[Any], framing: str, waits: int, version: str, method: str
) -> None:
    body = "0\r\n\r\n" if "chunked" in framing else ""
    async with brief() as server, await server.wire() as wire:
        request = f"{method} /nowhere HTTP/{version}\r\nhost: localhost\r\nconnection: close\r\n{framing}\r\n{body}"
        await wire.stream.send_all(request.encode())
        assert (await wire.rest()).startswith(b"HTTP/1.1 404")
    assert len(looked_after) == waits


@pytest.mark.parametrize("framing", ["content-length: 5", "transfer-encoding: chunked"])
async def test_a_request_of_http1_whose_body_is_late_is_answered_and_the_answer_ends_when_that_has_come(
    framing: str,
) -> None:
    async with brief() as server, await server.wire() as wire:
        await wire.stream.send_all(f"POST /nowhere HTTP/1.1\r\nhost: localhost\r\n{framing}\r\n\r\n".encode())
        head = (await wire.until(b"404", b"\r\n\r\n")).lower()
        await wire.stream.send_all(b"5\r\nhello\r\n0\r\n\r\n" if "chunked" in framing else b"hello")
        await wire.send("GET", "/healthz", connection="close")
        assert (await wire.rest()).count(b"HTTP/1.1 ") == 2, head  # and the connection goes on


async def test_every_request_of_http2_is_waited_for(looked_after: list[Any]) -> None:
    async with brief() as server, joined(server) as (stream, _):
        client = Http2(stream)
        number = await client.get("/healthz")
        while number not in client.over:
            await client.receive()
        assert len(looked_after) == 1
        assert looked_after[0].over
