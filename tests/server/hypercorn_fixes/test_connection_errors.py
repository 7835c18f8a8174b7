"""An error in one connection is its own: whatever a client sends, the others go on, also during a shutdown."""

from __future__ import annotations

import logging
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from hypercorn.protocol.h2 import H2Protocol

from tests.support.connections import SOON, brief, is_over, is_over_soon, joined, patient_config, readers, served
from tests.support.endpoints import with_tapped
from tests.support.http2_clients import UNCHECKED, Http2, Windows, without_window
from tests.support.serving import Tap, eventually
from tests.support.uncorrected import STOCK, Spreads, as_it_is, dying_servers, in_place_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.serving import Server
    from tests.support.wire import Wire

# What Hypercorn stumbles over


async def path_that_is_not_ascii(client: Http2) -> None:
    await client.get("/\xff")


async def connect_without_a_path(client: Http2) -> None:
    number = client.h2.get_next_available_stream_id()
    client.h2.send_headers(number, [(":method", "CONNECT"), (":authority", "localhost")])
    await client.send()


async def method_that_is_not_ascii(client: Http2) -> None:
    client.begin("G\xffT", "/", ends=True)
    await client.send()


POISON: Final = [path_that_is_not_ascii, connect_without_a_path, method_that_is_not_ascii]


@pytest.mark.parametrize("poison", POISON)
async def test_an_error_in_one_connection_ends_that_connection_and_is_said_in_one_line(poison: Any) -> None:
    tap = Tap()
    async with brief({"tap": tap}, complains=True) as server:
        run_id, silent = await server.start("tap"), await server.start("silent")
        async with server.reading(run_id) as reader, without_window(server, **UNCHECKED) as client:
            number = await client.get(f"/v1/runs/{silent}/stream")
            await client.until_headers(number)
            assert readers(server, silent) == [1]
            await poison(client)
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
    assert "a connection ended with an error of its protocol" in said.getMessage()
    assert "\n" not in said.getMessage()


@pytest.mark.parametrize("poison", POISON)
async def test_without_the_correction_it_ends_the_server(poison: Any) -> None:
    run, died = dying_servers()
    with as_it_is("TCPServer"):
        async with brief(run=run, complains=True) as server, without_window(server, **UNCHECKED) as client:
            await poison(client)
            with trio.fail_after(SOON):
                await server.ended.wait()
    assert len(died) == 1


# Requests during a shutdown


async def body(client: Http2) -> list[int]:
    """A request, and its body at once; what is to be refused."""
    number = client.begin("POST", "/v1/runs")
    client.h2.send_data(number, b"{}")
    await client.send()
    return [number]


async def change_of_mind(client: Http2) -> list[int]:
    """A request that is taken back at once."""
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
            client.h2.ping(b"all well")  # an answer to that comes after all that was to be said of the request
            await client.send()
            await client.receive()
            assert not is_over(task, server)
            tap.feed("after")
            tap.end()
            received = await wire.rest()
        await server.ended.wait()
    assert b"data: after\n\n" in received
    assert received.endswith(b"\r\n0\r\n\r\n")


@pytest.mark.parametrize("ask", [body, change_of_mind])
async def test_without_the_corrections_it_ends_the_others_too(ask: Any) -> None:
    run, died = dying_servers()
    with in_place_of(TCPServer=Spreads, H2Protocol=STOCK["H2Protocol"]):
        async with brief(config=patient_config(), run=run, complains=True) as server:
            async with shutting_down(server) as (wire, tap, client, task):
                await ask(client)
                await is_over_soon(task, server)
                tap.feed("after")
                tap.end()
                received = await wire.rest()
            await server.ended.wait()
    assert b"data: after\n\n" not in received
    assert len(died) == 1


# Priorities


async def test_priorities_are_of_no_account_and_keep_no_memory() -> None:
    async with brief() as server, without_window(server) as client:
        for number in range(1001, 5001, 2):
            client.h2.prioritize(number, weight=1, depends_on=number - 2)
        number = await client.get("/healthz")
        await client.open(number)
        assert await client.whole_body(number) == b'{"status":"alive"}'
        protocol = served(client.socket).protocol.protocol
        assert isinstance(protocol, H2Protocol)
        assert len(protocol.priority._streams) <= 2
