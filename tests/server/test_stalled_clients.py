"""Clients that stall: servers end in spite of them, and do not take memory for them."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

import penstock.server.serve
from tests.server.test_serve_process import ends
from tests.support.certificates import tls_config
from tests.support.connections import BRIEF, Ending, brief, brief_config
from tests.support.endpoints import flood, with_endless
from tests.support.http2_clients import without_window
from tests.support.processes import process
from tests.support.stalling import CLIENTS, all_stalled, over_tls, stalled
from tests.support.uncorrected import STOCK, as_it_is
from tests.support.wire import DONE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.processes import Process
    from tests.support.serving import Client, Server
    from tests.support.wire import Block

MIB: Final = 1024 * 1024
LITTLE: Final = 15 * MIB
"""Less than a single stream takes whose neighbour is read as in these tests, if it is kept in memory."""
USER_TIMEOUT: Final = 1.0
DRAIN_TIMEOUT: Final = 0.2
MARGIN: Final = 15.0
"""Seconds that a busy machine may take longer."""
STALLED: Final = 10
READING: Final = 50


# Shutdown, in this process


async def accepts_no_more(server: Client) -> None:
    """Wait until the server has closed its socket."""
    with suppress(OSError):
        while True:
            async with await server.wire():
                await trio.lowlevel.checkpoint()


@pytest.mark.parametrize("how", ["told", "cancelled"])
@pytest.mark.parametrize("client", CLIENTS)
async def test_a_client_that_does_not_read_holds_up_the_end_only_without_the_correction(
    client: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penstock.server.serve, "LAST_WORDS", BRIEF)
    endings = Ending(how), Ending(how)
    async with AsyncExitStack() as stack:
        config, trusts = stack.enter_context(tls_config("http/1.1")) if client is over_tls else (None, None)
        config = brief_config(config)
        config.keep_alive_timeout = MARGIN  # or a halt of the machine before a request ends the connection

        async def start(ending: Ending) -> Server:
            running = brief({"flood": flood}, config=config, run=ending.run, complains=True)
            server = await stack.enter_async_context(running)
            with_endless(server)
            return server

        with as_it_is("TCPServer"):
            stock = await start(endings[0])
        held = await stack.enter_async_context(client(stock, trusts))
        corrected = await start(endings[1])
        await stack.enter_async_context(client(corrected, trusts))
        await all_stalled(corrected, 2)
        endings[0].now(stock)
        await accepts_no_more(stock)
        with trio.fail_after(MARGIN):
            endings[1].now(corrected)
            await corrected.ended.wait()
        assert not stock.ended.is_set()
        await held.aclose()
        with trio.fail_after(MARGIN):
            await stock.ended.wait()


# Shutdown, and memory, of a process


def stalling_process(*, without: list[str] | None = None, **knobs: Any) -> Any:
    """A server with short time limits, without these corrections."""
    options = {"without": without or [], "tcp_user_timeout": USER_TIMEOUT, "drain_timeout": DRAIN_TIMEOUT} | knobs
    return process(sys.executable, "-m", "tests.support.uncorrected", json.dumps(options))


def resident(server: Process) -> int:
    """The memory that a process has, in bytes."""
    status = Path(f"/proc/{server._process.pid}/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


@asynccontextmanager
async def crowded(server: Process) -> AsyncIterator[list[list[Block]]]:
    """Clients that never read, and readers, all of which are being served; what the readers got to their ends."""
    big = await server.start("flood", [600, 10_000])
    while (await server.run(big))["status"] == "running":  # noqa: ASYNC110  (each look is a request)
        await trio.lowlevel.checkpoint()
    seen: list[list[Block]] = []
    ready = trio.Semaphore(0)

    async def follow(run_id: str) -> None:
        async with server.reading(run_id) as reader:
            ready.release()
            seen.append(await reader.rest())

    async with trio.open_nursery() as nursery, AsyncExitStack() as stack:
        for number in range(STALLED):
            path = f"/v1/runs/{big}/stream" if number % 2 else "/endless"
            await stack.enter_async_context(stalled(server, path))
        for _ in range(READING):
            nursery.start_soon(follow, await server.start("silent"))
        for _ in range(READING):
            await ready.acquire()
        yield seen


async def test_clients_that_never_read_hold_up_the_end_of_a_process_only_without_the_corrections() -> None:
    async with (
        stalling_process(without=[*STOCK], tcp_user_timeout=0) as stock,
        stalling_process() as corrected,
        crowded(stock) as theirs,
        crowded(corrected) as seen,
    ):
        for server in (stock, corrected):
            server.signal(signal.SIGTERM)
        with trio.fail_after(DRAIN_TIMEOUT + USER_TIMEOUT + MARGIN):
            assert await corrected.exit_code() == 0
        assert len(seen) == READING
        assert all(ends(blocks) == ["INTERRUPTED", DONE] for blocks in seen)
        assert "Traceback" not in corrected.said
        with trio.fail_after(MARGIN):
            await accepts_no_more(stock)
            while len(theirs) < READING:  # noqa: ASYNC110  (its readers have ended as well)
                await trio.sleep(0.01)
        assert stock._process.poll() is None
        stock.signal(signal.SIGKILL)


@pytest.mark.parametrize("correction", ["the user timeout alone", "the end of sends alone"])
async def test_either_of_two_corrections_lets_a_process_end(correction: str) -> None:
    alone = {"without": ["TCPServer"]} if correction == "the user timeout alone" else {"tcp_user_timeout": 0}
    async with stalling_process(**alone) as server, crowded(server) as seen:
        server.signal(signal.SIGTERM)
        with trio.fail_after(DRAIN_TIMEOUT + USER_TIMEOUT + MARGIN):
            assert await server.exit_code() == 0
        assert len(seen) == READING


async def read_at_full_speed(server: Process, path: str, size: int) -> None:
    """Take so many bytes of a stream, from its beginning again if it ends before that."""
    while size > 0:
        async with await server.wire() as wire:
            await wire.send("GET", path, connection="close")
            await wire.until(b"HTTP/1.1 200")
            while size > 0 and (piece := await wire.stream.receive_some(MIB)):
                size -= len(piece)


async def stored(server: Process) -> str:
    """The path of a run's stream, of 9 MB, all of which is stored."""
    run_id = await server.start("flood", [9000, 1000])
    while (await server.run(run_id))["status"] == "running":  # noqa: ASYNC110  (each look is a request)
        await trio.lowlevel.checkpoint()
    return f"/v1/runs/{run_id}/stream"


@pytest.mark.parametrize("endless, shut, read", [(True, 1, 30), (True, 20, 5), (False, 40, 20)])
async def test_streams_whose_windows_stay_shut_take_no_memory_while_others_read(
    shut: int, read: int, *, endless: bool
) -> None:
    async with stalling_process() as server, without_window(server) as client:
        path = "/endless" if endless else await stored(server)
        await read_at_full_speed(server, path, 10 * MIB)
        before = resident(server)
        numbers = [await client.get(path) for _ in range(shut)]
        await client.until_headers(*numbers)
        await read_at_full_speed(server, path, read * MIB)
        assert resident(server) - before < LITTLE
        assert not any(client.bodies.values())


@pytest.mark.parametrize("endless, shut", [(True, 1), (False, 40)])
async def test_without_the_correction_they_take_more_and_more_whether_anybody_reads_or_not(
    shut: int, *, endless: bool
) -> None:
    async with stalling_process(without=["StreamBuffer"]) as server, without_window(server) as client:
        path = "/endless" if endless else await stored(server)
        before = resident(server)
        numbers = [await client.get(path) for _ in range(shut)]
        await client.until_headers(*numbers)
        while resident(server) - before < 4 * LITTLE:  # noqa: ASYNC110  (memory tells nobody that it grows)
            await trio.sleep(0.01)
        assert not any(client.bodies.values())
