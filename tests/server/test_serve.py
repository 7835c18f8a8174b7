"""serve(): the drain, every other way to stop, and what a server takes and leaves."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import warnings
from contextlib import ExitStack, asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import trio
from starlette.applications import Starlette

import penstock.server.serve
from penstock import ConfigurationError, Event, MemoryLog, SupervisorFailed, create_app, serve
from penstock.cli.sockets import listen
from penstock.errors import Draining
from penstock.server.serve import Phase, Shutdown
from tests.support.connections import sockets_at
from tests.support.serving import PRODUCERS, Server, Tap, eventually, quiet_config, serving
from tests.support.wire import DONE, Block

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from contextlib import AbstractAsyncContextManager

    from hypercorn.config import Config

    from penstock.log import Appended, Batch
    from penstock.supervisor.live_runs import StuckRun


RETRY = Block(retry="1000")


# The drain


async def test_while_it_drains_streams_go_on_and_new_runs_are_refused() -> None:
    tap = Tap()
    async with serving({**PRODUCERS, "tap": tap}, drain_timeout=50.0) as server:
        run_id = await server.start("tap")
        async with server.reading(run_id) as reader:
            tap.feed("before")
            await reader.take(1)
            server.shutdown.set()
            await eventually(lambda: server.service.supervisor.draining)
            async with httpx2.AsyncClient(base_url=server.url) as client:  # a new connection: it still accepts
                for answer in (
                    await client.get("/readyz"),
                    await client.post("/v1/runs", json={"producer": "count", "input": 1}),
                    await client.post("/v1/runs", json={"producer": "count", "input": 1, "stream": True}),
                ):
                    assert (answer.status_code, answer.json()["code"]) == (503, "DRAINING")
                    assert int(answer.headers["retry-after"]) >= 1
                assert (await client.get("/healthz")).status_code == 200
                assert (await client.get(f"/v1/runs/{run_id}")).json()["status"] == "running"
            async with server.reading(run_id) as late:  # a reader that comes back during the drain
                tap.feed("after")
                assert await reader.take(1) == [Block(2, data="after")]
                tap.end()
                assert await reader.rest() == [Block(3, data=DONE)]
                assert [block.data for block in await late.rest()] == ["before", "after", DONE]
        await server.ended.wait()
        with pytest.raises(OSError, match=r"."):
            await server.wire()


async def test_runs_that_outlast_the_drain_are_interrupted_and_their_readers_told() -> None:
    tap = Tap()
    async with serving({**PRODUCERS, "tap": tap}, drain_timeout=0.05) as server:
        run_ids = [await server.start("tap"), await server.start("silent")]
        async with server.reading(run_ids[0]) as first, server.reading(run_ids[1]) as second:
            server.shutdown.set()
            for reader in (first, second):
                error, done = await reader.rest()
                assert (error.id, error.event, error.json["code"]) == (1, "error", "INTERRUPTED")
                assert done == Block(2, data=DONE)
        await server.ended.wait()
        assert tap.reason == "shutdown"
        for run_id in run_ids:
            run = await server.service.supervisor.log.get(run_id)
            assert (run.status, run.stop_reason) == ("failed", "interrupted")


async def test_readers_of_runs_that_live_elsewhere_are_sent_back_when_the_drain_begins() -> None:
    own = Tap()
    async with serving() as here, serving({"own": own}, here.service.supervisor.log, drain_timeout=50.0) as leaving:
        elsewhere, owned = await here.start("silent"), await leaving.start("own")
        async with leaving.reading(elsewhere) as sent_back, leaving.reading(owned) as stays:
            leaving.shutdown.set()
            assert await sent_back.rest() == [RETRY]
            own.feed("x")
            own.end()
            assert await stays.rest() == [Block(1, data="x"), Block(2, data=DONE)]
        await leaving.ended.wait()
        assert (await here.run(elsewhere))["status"] == "running"


class Dying(MemoryLog):
    """A log that raises an unexpected error once `dying` is set."""

    dying = False

    async def append(self, batches: Sequence[Batch]) -> Sequence[Appended]:
        if self.dying:
            raise RuntimeError("a bug")
        return await super().append(batches)


async def test_when_a_service_dies_readers_are_sent_back_and_serve_raises() -> None:
    tap, log = Tap(), Dying()
    with pytest.RaisesGroup(SupervisorFailed, flatten_subgroups=True):
        async with serving({**PRODUCERS, "tap": tap}, log, drain_timeout=3600.0) as server:
            run_ids = [await server.start("tap"), await server.start("silent")]
            async with server.reading(run_ids[0]) as first, server.reading(run_ids[1]) as second:
                tap.feed("x")
                await first.take(1)
                log.dying = True
                tap.feed("y")
                assert await first.rest() == [RETRY]
                assert await second.rest() == [RETRY]
            await server.ended.wait()
    assert tap.closed.is_set()
    assert server.service.failed.is_set()
    assert server.observer.errors[0][0] == "RuntimeError: a bug"
    assert {(await log.get(run_id)).status for run_id in run_ids} == {"running"}, "nothing is pretended"


async def test_a_cancellation_from_outside_skips_the_drain_and_runs_get_their_ends() -> None:
    tap, log = Tap(), MemoryLog()
    app = create_app({**PRODUCERS, "tap": tap}, log, drain_timeout=3600.0)
    with trio.fail_after(50):
        async with trio.open_nursery() as nursery:
            (url,) = await nursery.start(partial(serve, app, quiet_config(), signals=()))
            async with httpx2.AsyncClient(base_url=url) as client:
                for name in ("tap", "silent"):
                    started = await client.post("/v1/runs", json={"producer": name, "run_id": name})
                    assert started.status_code == 201
            nursery.cancel_scope.cancel(reason="from outside")
    assert tap.reason == "from outside"
    for run_id in ("tap", "silent"):
        run = await log.get(run_id)
        assert (run.status, run.stop_reason) == ("failed", "interrupted")
        assert (await log.read(run_id, 0)).entries[-1].terminal


class Slow(MemoryLog):
    """A log that never opens, as one whose server is not there."""

    def __init__(self) -> None:
        super().__init__()
        self.opening = trio.Event()

    @asynccontextmanager
    async def wakeups(self, owner: str) -> AsyncIterator[Any]:
        self.opening.set()
        await trio.sleep_forever()
        async with super().wakeups(owner) as wakeups:
            yield wakeups


async def test_a_shutdown_before_the_start_is_over_is_an_error_for_a_caller_that_waits_for_the_start() -> None:
    log = Slow()
    start = partial(serve, create_app(PRODUCERS, log), quiet_config(), signals=(), shutdown_trigger=log.opening.wait)
    with trio.fail_after(LONG):
        async with trio.open_nursery() as nursery:
            with pytest.raises(Draining):
                await nursery.start(start)


async def test_a_shutdown_before_the_start_is_over_is_no_error_otherwise() -> None:
    log = Slow()
    with trio.fail_after(LONG):
        await serve(create_app(PRODUCERS, log), quiet_config(), signals=(), shutdown_trigger=log.opening.wait)
        await serve(create_app(PRODUCERS), quiet_config(), signals=(), shutdown_trigger=trio.lowlevel.checkpoint)


# Applications and configurations that cannot be served


async def test_an_application_that_create_app_did_not_make_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="create_app"):
        await serve(Starlette())


@pytest.mark.parametrize("limit", ["read_timeout", "max_requests"])
async def test_limits_of_hypercorn_that_end_streams_or_the_drain_are_refused(limit: str) -> None:
    config = quiet_config()
    setattr(config, limit, 1000)
    with trio.fail_after(LONG), pytest.raises(ConfigurationError, match=limit):
        await serve(create_app({}), config, signals=())


async def test_a_log_that_cannot_be_opened_is_a_clear_error() -> None:
    app = create_app(PRODUCERS, log="gopher://localhost")
    with trio.fail_after(50), pytest.raises(ConfigurationError, match="gopher://localhost"):
        await serve(app, quiet_config(), signals=())


async def test_an_address_in_use_is_a_clear_error() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        config = quiet_config()
        config.bind = [f"127.0.0.1:{taken.getsockname()[1]}"]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # of the socket that Hypercorn forgets then
            with trio.fail_after(50), pytest.raises(OSError, match="in use"):
                await serve(create_app(PRODUCERS), config, signals=())
            gc.collect()


LONG = 30.0
"""Seconds that no test waits for."""


class Stubborn:
    """A producer that keeps its task until it is allowed to end; in the end it does, or a failure would be a hang."""

    def __init__(self) -> None:
        self.allowed = trio.Event()

    async def __call__(self, _input: Any) -> AsyncIterator[Event]:
        yield Event(data="mine")
        with trio.move_on_after(LONG, shield=True):
            await self.allowed.wait()


def impatient() -> Config:
    """A configuration that gives connections next to no time after a drain."""
    config = quiet_config()
    config.graceful_timeout = 0.05
    return config


def asked_by(
    shutdown: Shutdown, producers: dict[str, Any], *, log: Any = "memory://", abandon: Any = None, **settings: Any
) -> AbstractAsyncContextManager[Server]:
    """A server that ends when this shutdown is asked for."""
    run = partial(serve, signals=(), shutdown=shutdown, abandon=abandon)
    return serving(producers, log, config=impatient(), run=run, **settings)


async def does_not_accept(server: Server) -> None:
    with suppress(OSError):
        while True:
            await (await trio.open_tcp_stream("127.0.0.1", server.port)).aclose()


async def goes_on(server: Server) -> None:
    """The server has not ended after several times what its connections get."""
    with trio.move_on_after(0.2) as scope:
        await server.ended.wait()
    assert scope.cancelled_caught, "the server has ended"


async def has_ended(server: Server) -> None:
    with trio.fail_after(LONG / 2):
        await server.ended.wait()


# Leaving


async def test_a_server_that_stops_accepting_gives_its_runs_their_time_and_refuses_connections() -> None:
    tap, log, shutdown = Tap(), MemoryLog(), Shutdown()
    async with asked_by(shutdown, {"tap": tap}, log=log, drain_timeout=LONG) as server:
        run_id = await server.start("tap")
        shutdown.stop_accepting()
        await does_not_accept(server)
        await goes_on(server)
        tap.feed("late")
        tap.end()
        await has_ended(server)
    assert (tap.reason, (await log.get(run_id)).status) == (None, "completed")
    assert [entry.terminal for entry in (await log.read(run_id, 0)).entries] == [False, True]


async def test_a_server_that_stops_accepting_gives_a_reader_the_rest_of_its_run() -> None:
    tap, shutdown = Tap(), Shutdown()
    async with asked_by(shutdown, {"tap": tap}, drain_timeout=LONG) as server:
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


async def test_a_server_that_stops_accepting_interrupts_its_runs_when_it_is_forced() -> None:
    tap, log, shutdown = Tap(), MemoryLog(), Shutdown()
    async with asked_by(shutdown, {"tap": tap}, log=log, drain_timeout=3600.0) as server:
        run_id = await server.start("tap")
        shutdown.stop_accepting()
        await does_not_accept(server)
        assert (await log.get(run_id)).status == "running"
        shutdown.force()
        await has_ended(server)
    run = await log.get(run_id)
    assert (tap.reason, run.status, run.stop_reason) == ("shutdown", "failed", "interrupted")


async def test_a_server_that_drains_accepts_until_it_is_to_stop_accepting() -> None:
    tap, shutdown = Tap(), Shutdown()
    async with asked_by(shutdown, {"tap": tap}, drain_timeout=LONG) as server:
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


async def test_the_first_force_is_a_drain_and_skips_nothing() -> None:
    tap, shutdown = Tap(), Shutdown()
    async with asked_by(shutdown, {"tap": tap}, drain_timeout=3600.0) as server:
        await server.start("tap")
        shutdown.force()
        await goes_on(server)
        assert tap.reason is None
        shutdown.force()
        await has_ended(server)
    assert tap.reason == "shutdown"


@pytest.mark.parametrize("step, forces", [("stop_accepting", 0), ("stop_accepting", 2), ("drain", 1)])
async def test_a_producer_that_keeps_its_task_is_abandoned_however_far_the_shutdown_was_forced(
    monkeypatch: pytest.MonkeyPatch, step: str, forces: int
) -> None:
    monkeypatch.setattr(penstock.server.serve, "ABANDON_AFTER", 0.3)
    stubborn, shutdown = Stubborn(), Shutdown()
    given_up: list[StuckRun] = []

    def abandon(stuck: Sequence[StuckRun]) -> None:
        given_up.extend(stuck)
        stubborn.allowed.set()  # a program would end itself here

    patience = {"drain_timeout": 3600.0 if forces else 0.05, "cancel_grace": 0.05}
    async with asked_by(shutdown, {"stubborn": stubborn, **PRODUCERS}, abandon=abandon, **patience) as server:
        run_id = await server.start("stubborn")
        await server.start("silent")
        async with server.reading(run_id) as reader:
            await reader.take(1)
            getattr(shutdown, step)()
            if forces:
                shutdown.force()
            error, done = await reader.rest()  # long before the producer lets go
            assert (error.json["code"], done.data) == ("INTERRUPTED", DONE)
        await eventually(lambda: shutdown.phase is Phase.DRAINED)
        if forces > 1:
            shutdown.force()
        await has_ended(server)
    assert [run.run_id for run in given_up] == [run_id]
    assert given_up[0].stored
    assert "self.allowed.wait()" in given_up[0].stack


@pytest.mark.parametrize("forces", [0, 2])
async def test_a_producer_that_lets_go_in_time_ends_the_server_at_once_and_is_not_abandoned(
    monkeypatch: pytest.MonkeyPatch, forces: int
) -> None:
    monkeypatch.setattr(penstock.server.serve, "ABANDON_AFTER", LONG)
    stubborn, shutdown = Stubborn(), Shutdown()
    given_up: list[StuckRun] = []
    patience = {"drain_timeout": 3600.0 if forces else 0.05, "cancel_grace": 0.05}
    async with asked_by(shutdown, {"stubborn": stubborn}, abandon=given_up.extend, **patience) as server:
        async with server.reading(await server.start("stubborn")) as reader:
            await reader.take(1)
        shutdown.stop_accepting()
        if forces:
            shutdown.force()
        await eventually(lambda: shutdown.phase is Phase.DRAINED)
        if forces > 1:
            shutdown.force()
        await goes_on(server)
        stubborn.allowed.set()
        await has_ended(server)
    assert given_up == []


def open_files(pid: int) -> set[str]:
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
    for step in ("stop_accepting", "drain"):
        shutdown = Shutdown()
        with trio.fail_after(LONG):
            async with trio.open_nursery() as nursery:
                (url,) = await nursery.start(partial(serve, app, config, signals=(), shutdown=shutdown))
                async with httpx2.AsyncClient(base_url=url) as client:
                    assert (await client.get("/readyz")).status_code == 200
                    answer = await client.post("/v1/runs", json={"producer": "count", "input": 2, "stream": True})
                    assert DONE in answer.text
                getattr(shutdown, step)()
        assert config.graceful_timeout == 0.05
