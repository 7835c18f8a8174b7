"""serve(): Hypercorn's trio worker, with a drain.

Hypercorn tells an application nothing of a shutdown: at SIGTERM it stops accepting, and `graceful_timeout` later it
cancels whatever still runs. So `serve` owns the signals and Hypercorn's `shutdown_trigger`, and drains *before* it
fires that:

    signal ──▶ not ready, new runs 503, readers of runs elsewhere released
           ──▶ this process's runs end by themselves; after drain_timeout they are interrupted
           ──▶ every run has its terminal entry, and its readers have it
           ──▶ the trigger: listeners closed, the last responses end, the lifespan ends

A second signal skips the waiting, also that of Hypercorn for its last connections. A service of the supervisor that
dies fires the trigger at once.
"""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING, Final, cast

import hypercorn.trio
import trio
from hypercorn.config import Config

from penstock.errors import ConfigurationError, Draining, SupervisorFailed, single_error
from penstock.groups import raise_unchanged
from penstock.http.app import Service

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from hypercorn.typing import Framework
    from starlette.applications import Starlette

    from penstock.supervisor import StuckRun, Supervisor

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
"""The signals that ask for a shutdown."""
BACKLOG: Final = 1024
"""The connections that may wait to be accepted. With Hypercorn's 100, some of a burst of 1,000 wait 13 s in vain."""
ABANDON_AFTER: Final = 5.0
"""Seconds that a producer may still hold on to its task after everything else of a shutdown is done."""


def new_config() -> Config:
    """Hypercorn's configuration, with a backlog that takes a burst of readers who all come back at once."""
    config = Config()
    config.backlog = BACKLOG
    return config


async def serve(
    app: Starlette,
    config: Config | None = None,
    *,
    signals: Sequence[signal.Signals] = SIGNALS,
    shutdown_trigger: Callable[[], Awaitable[object]] | None = None,
    abandon: Callable[[Sequence[StuckRun]], None] | None = None,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an application of `create_app` until a signal, the trigger, or a cancellation from outside.

    A cancellation from outside skips the drain: runs are interrupted, and still get their terminal entries.

    Args:
        app: made by `create_app`.
        config: Hypercorn's; by default `new_config()`, which binds to 127.0.0.1:8000. `read_timeout` must stay None: it
            ends idle streams.
        signals: what asks for a shutdown; empty for an embedder who handles signals, and outside the main thread.
        shutdown_trigger: returns when a shutdown is wanted for another reason.
        abandon: called with the runs whose producers have not let go `ABANDON_AFTER` seconds after all else of the
            shutdown is done. Nothing in Trio can abandon a task, so all that it can do is to end the process; without
            it, serve waits.
        task_status: is given the URLs that are served, once connections are accepted.

    Raises:
        ConfigurationError: the application or the configuration cannot be served, or the event log's URL be opened.
        LogUnavailable: the event log cannot be reached to begin with.
        Draining: it was shut down before it had started, and `task_status` waits for that.
        OSError: the address cannot be bound.
        SupervisorFailed: a service of the supervisor died.
    """
    config = new_config() if config is None else config
    service = getattr(app.state, "penstock", None)
    if not isinstance(service, Service):
        raise ConfigurationError("serve() needs an application made by create_app()")
    if config.read_timeout is not None:
        raise ConfigurationError("Hypercorn's read_timeout must stay None: it takes a silent reader for a disconnect")
    down = trio.Event()
    urls: list[str] | None = None
    framework = cast("Framework", app)  # Hypercorn's types of an application are narrower than Starlette's

    async def accept(task_status: trio.TaskStatus[list[str]]) -> None:  # noqa: ASYNC128  (Hypercorn passes it on)
        await hypercorn.trio.serve(framework, config, shutdown_trigger=down.wait, task_status=task_status)
        scope.cancel(reason="the server has ended")

    try:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(_shut_down, service, signals, shutdown_trigger, abandon, down, scope)
                urls = await nursery.start(accept)
                if service.running:  # or its start has failed, and Hypercorn has not noticed yet
                    task_status.started(urls)
    except BaseExceptionGroup as group:  # of Hypercorn's nurseries and this one: the caller should see what went wrong
        raise_unchanged(service.startup_error or single_error(group))
    if urls is None and task_status is not trio.TASK_STATUS_IGNORED:  # somebody waits to hear that it has started
        raise Draining("shut down before it had started")
    if service.failed.is_set():
        raise SupervisorFailed("a service of the supervisor died")


async def _shut_down(
    service: Service,
    signals: Sequence[signal.Signals],
    shutdown_trigger: Callable[[], Awaitable[object]] | None,
    abandon: Callable[[Sequence[StuckRun]], None] | None,
    down: trio.Event,
    server: trio.CancelScope,
    task_status: trio.TaskStatus[None],
) -> None:
    """Wait for a reason to shut down, drain, and set `down`; before the start is over, cancel the `server`.

    It listens for signals until the server has ended.
    """
    asked = trio.Event()
    async with trio.open_nursery() as nursery:
        if signals:
            await nursery.start(_listen, service, signals, asked, down, server)
        for reason in (service.failed.wait, shutdown_trigger):
            if reason is not None:
                nursery.start_soon(_set_after, reason, asked)
        task_status.started()
        await asked.wait()
        if not service.running:
            server.cancel(reason="shut down before it had started")
            await trio.lowlevel.checkpoint()
        if not service.failed.is_set():
            await _drain(service)
        down.set()
        if abandon is not None:
            await _abandon(service.supervisor, abandon)


async def _listen(
    service: Service,
    signals: Sequence[signal.Signals],
    asked: trio.Event,
    down: trio.Event,
    server: trio.CancelScope,
    task_status: trio.TaskStatus[None],
) -> None:
    """The first signal asks for a shutdown; the next ones take its patience away.

    Once all runs are over, the next one takes away what Hypercorn still waits for, and any after that ends the process.
    """
    with trio.open_signal_receiver(*signals) as received:
        task_status.started()
        async for _ in received:
            if down.is_set():
                server.cancel(reason="a signal during the last wait")
                return
            if asked.is_set() and service.running:
                service.supervisor.interrupt()
            asked.set()


async def _set_after(reason: Callable[[], Awaitable[object]], event: trio.Event) -> None:
    await reason()
    event.set()


async def _drain(service: Service) -> None:
    """Drain, unless there is nothing left to drain with."""

    async def give_up() -> None:
        await service.failed.wait()
        nursery.cancel_scope.cancel(reason="a service of the supervisor died")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(give_up)
        await service.supervisor.drain()
        nursery.cancel_scope.cancel(reason="the drain is over")


async def _abandon(supervisor: Supervisor, abandon: Callable[[Sequence[StuckRun]], None]) -> None:
    """Give producers that hold on to their tasks a last chance, then give them up; until the server has ended."""
    while True:
        known = {run.run_id for run in supervisor.stuck}
        await trio.sleep(ABANDON_AFTER)
        if stuck := [run for run in supervisor.stuck if run.run_id in known]:
            abandon(stuck)
