"""What a connection may become: HTTP/2 by prior knowledge, but not by an upgrade, and no WebSocket."""

from __future__ import annotations

from typing import Any, Final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.connections import SOON, brief, is_over_soon, joined, leave, stays, unharmed
from tests.support.http2_clients import Http2
from tests.support.serving import Tap
from tests.support.uncorrected import as_it_is, dying_servers
from tests.support.wire import DONE, Wire, ids

# Upgrades


H2C: Final[dict[str, Any]] = {"upgrade": "h2c", "connection": "upgrade, http2-settings"}
SETTINGS: Final[dict[str, dict[str, Any]]] = {
    "none": {},
    "good": {"http2_settings": "AAMAAABkAAQAoAAAAAIAAAAA"},
    "empty": {"http2_settings": ""},
    "no ASCII": {"http2_settings": "\xff"},
    "no base64": {"http2_settings": "A"},
    "half": {"http2_settings": "AAMA"},
    "a bad value": {"http2_settings": "AAT_____"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
async def test_a_request_that_offers_an_upgrade_to_http2_is_answered_over_http1(settings: dict[str, Any]) -> None:
    async with unharmed() as server:
        run_id = await server.start("count", 3)
        async with joined(server) as (stream, task):
            wire = Wire(stream)
            for _ in range(2):  # and the connection goes on as it was
                wire.received = b""
                await wire.send("GET", f"/v1/runs/{run_id}/stream", **H2C, **settings)
                answer = await wire.until(b"data: [DONE]\n\n", b"\r\n0\r\n\r\n")
                assert answer.startswith(b"HTTP/1.1 200")
                assert answer.count(b"id: ") == 4
            await stream.aclose()
            await is_over_soon(task, server)


async def test_a_connect_that_offers_an_upgrade_to_http2_ends_with_its_client() -> None:
    async with unharmed() as server, joined(server) as (stream, task):
        await stream.send_all(b"CONNECT x:1 HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 4")
        await stream.aclose()
        await is_over_soon(task, server)


async def test_without_the_correction_that_connect_never_ends() -> None:
    with as_it_is("H11Protocol"):
        async with brief() as server, joined(server) as (stream, task):
            await stream.send_all(
                b"CONNECT x:1 HTTP/1.1\r\nhost: localhost\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n"
            )
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 101")
            await wait_all_tasks_blocked(0.01)
            await stream.aclose()
            assert await stays(task, server)


@pytest.mark.parametrize("settings", ["no base64", "half", "a bad value"])
async def test_without_the_correction_an_upgrade_to_http2_can_end_the_server(settings: str) -> None:
    run, died = dying_servers()
    with as_it_is("H11Protocol", "TCPServer"):
        async with brief(run=run, complains=True) as server, await server.wire() as wire:
            await wire.send("GET", "/healthz", **H2C, **SETTINGS[settings])
            with trio.fail_after(SOON):
                await server.ended.wait()
    assert len(died) == 1


async def test_http2_by_prior_knowledge_is_spoken_however_its_preface_is_cut() -> None:
    async with unharmed() as server:
        run_id = await server.start("count", 3)
        async with joined(server) as (stream, task):
            client = Http2(stream)
            preface = client.h2.data_to_send()
            for start in range(len(preface)):
                await stream.send_all(preface[start : start + 1])
                await wait_all_tasks_blocked()
            assert ids(await client.whole(await client.get(f"/v1/runs/{run_id}/stream"))) == [1, 2, 3, 4]
            await leave(client, "goaway")
            await is_over_soon(task, server)


WEBSOCKET: Final[dict[str, Any]] = {
    "upgrade": "websocket",
    "connection": "upgrade",
    "sec_websocket_version": "13",
    "sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@pytest.mark.parametrize("path", ["/", "/v1/runs", "/v1/runs/{}/stream"])
async def test_a_websocket_is_refused_and_nothing_ends_but_its_connection(path: str) -> None:
    async with unharmed() as server:
        run_id = await server.start("silent")
        async with joined(server) as (stream, task):
            wire = Wire(stream)
            await wire.send("GET", path.format(run_id), **WEBSOCKET)
            assert (await wire.rest()).startswith(b"HTTP/1.1 403")
            await is_over_soon(task, server)
        assert (await server.run(run_id))["status"] == "running"


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
