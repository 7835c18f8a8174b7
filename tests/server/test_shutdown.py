"""A shutdown that is asked for word by word, as a parent does of a worker; and what is left when a server has ended."""

from __future__ import annotations

import os
import subprocess
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import trio

import penstock.server.serve
from penstock import ConfigurationError, Event, MemoryLog, create_app, serve
from penstock.cli.sockets import listen
from penstock.server.serve import Shutdown
from tests.server.test_tcp_user_timeout import sockets_at
from tests.support.serving import PRODUCERS, Server, Tap, eventually, quiet_config, serving
from tests.support.wire import DONE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from hypercorn.config import Config

    from penstock.supervisor.services import StuckRun

LONG = 30.0
"""Seconds that nobody here waits for."""


class Stubborn:
    """A producer that will not let go before it is allowed to; in the end it does, or a failure would be a hang."""

    def __init__(self) -> None:
        self.allowed = trio.Event()

    async def __call__(self, _input: Any) -> AsyncIterator[Event]:
        yield Event(data="mine")
        with trio.move_on_after(LONG, shield=True):
            await self.allowed.wait()


def impatient() -> Config:
    """Connections have next to no time after a drain."""
    config = quiet_config()
    config.graceful_timeout = 0.05
    return config


def told(
    shutdown: Shutdown, producers: dict[str, Any], *, log: Any = "memory://", abandon: Any = None, **knobs: Any
) -> AbstractAsyncContextManager[Server]:
    """A server that is told by this shutdown when to end."""
    run = partial(serve, signals=(), shutdown=shutdown, abandon=abandon)
    return serving(producers, log, config=impatient(), run=run, **knobs)


async def does_not_accept(server: Server) -> None:
    """Wait until the server has closed its sockets."""
    with suppress(OSError):
        while True:
            await (await trio.open_tcp_stream("127.0.0.1", server.port)).aclose()


async def goes_on(server: Server) -> None:
    """It has not ended, for a while that is long beside what its connections get."""
    with trio.move_on_after(0.4) as scope:
        await server.ended.wait()
    assert scope.cancelled_caught, "the server has ended"


async def has_ended(server: Server) -> None:
    """Wait until the server has ended, which is long before anybody's patience is."""
    with trio.fail_after(LONG / 2):
        await server.ended.wait()


# Leaving


async def test_who_leaves_gives_a_run_that_nobody_reads_its_time_and_refuses_connections_meanwhile() -> None:
    tap, log, shutdown = Tap(), MemoryLog(), Shutdown()
    async with told(shutdown, {"tap": tap}, log=log, drain_timeout=LONG) as server:
        run_id = await server.start("tap")
        shutdown.stop_accepting()
        await does_not_accept(server)
        await goes_on(server)
        tap.feed("late")
        tap.end()
        await has_ended(server)
    assert (tap.reason, (await log.get(run_id)).status) == (None, "completed")
    assert [entry.terminal for entry in (await log.read(run_id, 0)).entries] == [False, True]


async def test_who_leaves_gives_a_reader_of_its_run_the_rest_of_it() -> None:
    tap, shutdown = Tap(), Shutdown()
    async with told(shutdown, {"tap": tap}, drain_timeout=LONG) as server:
        async with server.reading(await server.start("tap")) as reader:
            tap.feed("early")
            await reader.take(1)
            shutdown.stop_accepting()
            await does_not_accept(server)
            await goes_on(server)
            tap.feed("late")
            tap.end()
            assert [block.data for block in await reader.rest()] == ["late", DONE]
        await has_ended(server)


async def test_who_leaves_and_is_hurried_interrupts_its_runs() -> None:
    tap, log, shutdown = Tap(), MemoryLog(), Shutdown()
    async with told(shutdown, {"tap": tap}, log=log, drain_timeout=3600.0) as server:
        run_id = await server.start("tap")
        shutdown.stop_accepting()
        await does_not_accept(server)
        assert (await log.get(run_id)).status == "running"
        shutdown.force()
        await has_ended(server)
    run = await log.get(run_id)
    assert (tap.reason, run.status, run.stop_reason) == ("shutdown", "failed", "interrupted")


async def test_who_drains_still_accepts_until_it_is_told_to_leave() -> None:
    tap, shutdown = Tap(), Shutdown()
    async with told(shutdown, {"tap": tap}, drain_timeout=LONG) as server:
        run_id = await server.start("tap")
        shutdown.drain()
        await goes_on(server)
        async with server.opened("GET", f"/v1/runs/{run_id}") as reader:
            assert reader.status == 200
        shutdown.stop_accepting()
        await does_not_accept(server)
        assert not server.ended.is_set()
        tap.end()
        await has_ended(server)


async def test_the_first_word_may_be_to_hurry_and_skips_nothing() -> None:
    tap, shutdown = Tap(), Shutdown()
    async with told(shutdown, {"tap": tap}, drain_timeout=3600.0) as server:
        await server.start("tap")
        shutdown.force()
        await goes_on(server)
        assert tap.reason is None
        shutdown.force()
        await has_ended(server)
    assert tap.reason == "shutdown"


# Producers that hold on


@pytest.mark.parametrize("word", ["leave", "drain"])
@pytest.mark.parametrize("hurries", [0, 1, 2])
async def test_a_server_without_patience_still_abandons_a_producer_that_holds_on(
    monkeypatch: pytest.MonkeyPatch, word: str, hurries: int
) -> None:
    monkeypatch.setattr(penstock.server.serve, "ABANDON_AFTER", 0.3)
    stubborn, shutdown = Stubborn(), Shutdown()
    given_up: list[StuckRun] = []

    def abandon(stuck: Sequence[StuckRun]) -> None:
        given_up.extend(stuck)
        stubborn.allowed.set()  # a program would end itself here

    patience = {"drain_timeout": 3600.0 if hurries else 0.05, "cancel_grace": 0.05}
    async with told(shutdown, {"stubborn": stubborn, **PRODUCERS}, abandon=abandon, **patience) as server:
        run_id = await server.start("stubborn")
        await server.start("silent")
        async with server.reading(run_id) as reader:
            await reader.take(1)
        getattr(shutdown, word)()
        if hurries:
            shutdown.force()
        await eventually(lambda: shutdown.over)
        if hurries > 1:
            shutdown.force()
        await has_ended(server)
    assert [run.run_id for run in given_up] == [run_id]
    assert given_up[0].stored
    assert "self.allowed.wait()" in given_up[0].stack


@pytest.mark.parametrize("hurries", [0, 1, 2])
async def test_a_producer_that_lets_go_in_time_ends_the_server_at_once_and_is_not_abandoned(
    monkeypatch: pytest.MonkeyPatch, hurries: int
) -> None:
    monkeypatch.setattr(penstock.server.serve, "ABANDON_AFTER", LONG)
    stubborn, shutdown = Stubborn(), Shutdown()
    given_up: list[StuckRun] = []
    patience = {"drain_timeout": 3600.0 if hurries else 0.05, "cancel_grace": 0.05}
    async with told(shutdown, {"stubborn": stubborn}, abandon=given_up.extend, **patience) as server:
        async with server.reading(await server.start("stubborn")) as reader:
            await reader.take(1)
        shutdown.stop_accepting()
        if hurries:
            shutdown.force()
        await eventually(lambda: shutdown.over)
        if hurries > 1:
            shutdown.force()
        await goes_on(server)
        stubborn.allowed.set()
        await has_ended(server)
    assert given_up == []


# What a server takes and leaves


def open_files(pid: int) -> set[str]:
    """What a process has open, as the system names it."""
    return {str(each.readlink()) for each in Path(f"/proc/{pid}/fd").iterdir()}


@pytest.mark.parametrize("inherited", [False, True])
async def test_what_a_producer_starts_does_not_keep_the_address(inherited: bool) -> None:
    config = quiet_config()
    if inherited:
        (sock,) = listen(["127.0.0.1:0"], anywhere=False)
        sock.set_inheritable(True)
        config.bind = [f"fd://{sock.detach()}"]
    async with serving(config=config) as server:
        with ExitStack() as stack:
            sockets = [stack.enter_context(each) for each in sockets_at(server.port)]
            kept = {f"socket:[{os.fstat(each.fileno()).st_ino}]" for each in sockets}
        child = await trio.lowlevel.open_process(
            ["/bin/cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, close_fds=False
        )
        assert child.stdio is not None
        try:
            await child.stdio.send_all(b"there?")
            assert await child.stdio.receive_some() == b"there?"  # and opens and closes nothing any more
            assert kept
            assert kept.isdisjoint(open_files(child.pid))
        finally:
            child.kill()
            with trio.CancelScope(shield=True):
                await child.stdio.aclose()
                await child.wait()


async def test_an_application_can_be_served_again_with_the_same_configuration() -> None:
    app, config = create_app(PRODUCERS), impatient()
    for word in ("leave", "drain", "leave"):
        shutdown = Shutdown()
        with trio.fail_after(LONG):
            async with trio.open_nursery() as nursery:
                (url,) = await nursery.start(partial(serve, app, config, signals=(), shutdown=shutdown))
                async with httpx2.AsyncClient(base_url=url) as client:
                    assert (await client.get("/readyz")).status_code == 200
                    answer = await client.post("/v1/runs", json={"producer": "count", "input": 2, "stream": True})
                    assert DONE in answer.text
                getattr(shutdown, word)()
        assert config.graceful_timeout == 0.05


async def test_a_limit_of_requests_is_refused() -> None:
    config = quiet_config()
    config.max_requests = 1000
    with trio.fail_after(LONG), pytest.raises(ConfigurationError, match="max_requests"):
        await serve(create_app({}), config, signals=())
