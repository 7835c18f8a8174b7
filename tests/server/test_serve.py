"""serve(): the drain, and every other way to stop."""

from __future__ import annotations

import gc
import socket
import warnings
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import trio
from hypercorn.config import Config
from starlette.applications import Starlette

import penstock.server.serve
from penstock import ConfigurationError, Event, MemoryLog, SupervisorFailed, create_app, serve
from tests.support.serving import PRODUCERS, Tap, eventually, quiet_config, serving
from tests.support.wire import DONE, Block

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from penstock.log import Appended, Batch
    from penstock.supervisor.services import StuckRun

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
            async with server.reading(run_id) as late:  # a reader who comes back during the drain
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


async def test_a_drain_with_nothing_to_wait_for_is_over_at_once() -> None:
    async with serving(drain_timeout=3600.0) as server:
        await server.read(await server.start("count", 3))
        server.shutdown.set()
        await server.ended.wait()


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


# Deaths


class Dying(MemoryLog):
    """Raises what no log should, once it is told to."""

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


async def test_a_producer_that_does_not_let_go_is_handed_to_abandon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penstock.server.serve, "ABANDON_AFTER", 0.05)
    let_go = trio.Event()
    given_up: list[StuckRun] = []

    async def stubborn(_input: Any) -> AsyncIterator[Event]:
        yield Event(data="mine")
        with trio.move_on_after(50, shield=True):
            await let_go.wait()

    def abandon(stuck: Sequence[StuckRun]) -> None:
        given_up.extend(stuck)
        let_go.set()  # a program would end itself here

    async with serving({"stubborn": stubborn}, cancel_grace=0.05, abandon=abandon) as server:
        run_id = await server.start("stubborn")
        async with server.reading(run_id) as reader:
            await reader.take(1)
            server.shutdown.set()
            error, done = await reader.rest()  # long before the producer lets go
            assert (error.json["code"], done.data) == ("INTERRUPTED", DONE)
        await server.ended.wait()
    ((stuck_id, stack),) = [(stuck.run_id, stuck.stack) for stuck in given_up]
    assert stuck_id == run_id
    assert "let_go.wait()" in stack


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


async def test_a_shutdown_before_the_start_is_over_is_no_error() -> None:
    class Slow(MemoryLog):
        """Takes for ever to open, as one does whose server is not there."""

        @asynccontextmanager
        async def wakeups(self, owner: str) -> AsyncIterator[Any]:
            opening.set()
            await trio.sleep_forever()
            async with super().wakeups(owner) as wakeups:
                yield wakeups

    opening = trio.Event()
    with trio.fail_after(50):
        await serve(create_app(PRODUCERS, Slow()), quiet_config(), signals=(), shutdown_trigger=opening.wait)
        await serve(create_app(PRODUCERS), quiet_config(), signals=(), shutdown_trigger=trio.lowlevel.checkpoint)


# What cannot be served


async def test_an_application_that_create_app_did_not_make_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="create_app"):
        await serve(Starlette())


async def test_a_read_timeout_is_refused() -> None:
    config = Config()
    config.read_timeout = 5
    with pytest.raises(ConfigurationError, match="read_timeout"):
        await serve(create_app({}), config)


@pytest.mark.parametrize("knobs", [{"nonsense": 1}, {"lease": 0}, {"ping_interval": 0}, {"dialect": "latin"}])
def test_a_knob_that_cannot_be_is_refused_before_anything_starts(knobs: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(knobs))):
        create_app({}, **knobs)


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
