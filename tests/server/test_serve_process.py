"""Servers in processes of their own: signals, exit codes, and Hypercorn without `serve`."""

from __future__ import annotations

import signal
import sys
from contextlib import AsyncExitStack, suppress

import trio

from tests.support.processes import Process, process, serving_process
from tests.support.serving import GUARD
from tests.support.wire import DONE, Block, Reader, ids


async def drains(server: Process) -> None:
    while (await server.client.get("/readyz")).status_code != 503:  # noqa: ASYNC110  (each look is a request)
        await trio.lowlevel.checkpoint()


async def does_not_accept(server: Process) -> None:
    with suppress(OSError):
        while True:
            async with await server.wire():
                await trio.lowlevel.checkpoint()


def ends(blocks: list[Block]) -> list[str | None]:
    return [block.json["code"] if block.event == "error" else block.data for block in blocks[-2:]]


async def test_sigterm_with_twenty_open_streams_tells_each_of_them_how_its_run_ended() -> None:
    seen: list[list[Block]] = []
    ready = trio.Semaphore(0)

    async def follow(server: Process, run_id: str) -> None:
        async with server.reading(run_id) as reader:
            ready.release()
            seen.append(await reader.rest())

    async with serving_process(drain_timeout=0.2) as server:
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(follow, server, await server.start("silent", run_id=f"run-{number}"))
            for _ in range(20):
                await ready.acquire()
            server.signal(signal.SIGTERM)
        with trio.fail_after(30):  # drain_timeout, finalize_timeout, and a lot
            assert await server.exit_code() == 0
        assert [ends(blocks) for blocks in seen] == [["INTERRUPTED", DONE]] * 20
        assert "Traceback" not in server.said


async def test_the_first_signal_drains_and_the_second_skips_the_waiting() -> None:
    async with serving_process(drain_timeout=3600.0) as server:
        run_id = await server.start("silent")
        async with server.reading(run_id) as reader:
            server.signal(signal.SIGTERM)
            await drains(server)
            refused = await server.client.post("/v1/runs", json={"producer": "count", "input": 1})
            assert (refused.status_code, refused.json()["code"]) == (503, "DRAINING")
            assert refused.headers["retry-after"]
            assert (await server.run(run_id))["status"] == "running"
            server.signal(signal.SIGINT)
            assert ends(await reader.rest()) == ["INTERRUPTED", DONE]
        assert await server.exit_code() == 0
        assert "Traceback" not in server.said


async def test_a_signal_during_the_last_wait_ends_that_as_well() -> None:
    async with serving_process(drain_timeout=3600.0) as server, await server.wire() as wire:
        await wire.stream.send_all(b"POST /v1/runs HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
        await server.client.get("/healthz")  # and by then the half of a request has been seen
        server.signal(signal.SIGINT)
        await does_not_accept(server)
        server.signal(signal.SIGTERM)
        assert await server.exit_code() == 0
        assert "Traceback" not in server.said


async def test_under_plain_hypercorn_the_api_works_and_sigterm_ends_it() -> None:
    command = (sys.executable, "-m", "hypercorn", "-k", "trio", "--graceful-timeout", "1", "--bind", "127.0.0.1:0")
    async with process(*command, "tests.support.served:app") as server:
        assert (await server.client.get("/readyz")).status_code == 200
        assert ids(await server.read(await server.start("count", 3))) == [1, 2, 3, 4]
        silent = await server.start("silent")
        async with server.reading(silent) as reader:
            assert (await server.client.post(f"/v1/runs/{silent}/cancel")).status_code == 202
            cancelled, done = await reader.rest()
            assert (cancelled.event, done.data) == ("cancelled", DONE)
        open_stream = await server.start("silent")
        async with await server.wire() as wire:
            reader = Reader(wire)
            await reader.ask("GET", f"/v1/runs/{open_stream}/stream", {}, b"")
            server.signal(signal.SIGTERM)
            assert await reader.rest() == [Block(retry="1000")]
        assert await server.exit_code() == 0


async def test_a_burst_of_connections_waits_for_a_server_that_is_busy() -> None:
    producers = ("--producers", "examples/agent.py:producers")
    async with process(sys.executable, "-m", "penstock", "serve", "--bind", "127.0.0.1:0", *producers) as server:
        async with AsyncExitStack() as connections:
            server.signal(signal.SIGSTOP)
            # A connection that finds no place waits for as long as the server stands still.
            with trio.fail_after(GUARD):
                for _ in range(300):
                    await connections.enter_async_context(await server.wire())
            server.signal(signal.SIGCONT)
        server.signal(signal.SIGTERM)
        assert await server.exit_code() == 0
