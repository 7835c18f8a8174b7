"""serve(): Hypercorn's trio worker with a drain, and with patches of those of its faults that hurt streams.

    SERVING ──▶ DRAINING ──▶ DRAINED ──▶ Hypercorn closes the listeners, and after its grace the last connections;
                                         the lifespan ends, and the supervisor with it

Hypercorn does not notify an application of a shutdown: at its trigger it stops accepting, and `graceful_timeout` later
it cancels what is left. So the drain comes *before* the trigger, except after `stop_accepting()`: there Hypercorn waits
meanwhile. The first signal drains, the next ones force. A service of the supervisor that dies ends the drain at once.
"""

from __future__ import annotations

import copy
import signal
from enum import Enum, auto
from functools import partial
from typing import TYPE_CHECKING, Any, Final, cast

import hypercorn.trio
import trio

from penstock.asgi.lifespan import AppLifespan
from penstock.asgi.request_body import EARLY_END
from penstock.errors import ConfigurationError, Draining, SupervisorFailed, single_error
from penstock.exception_groups import reraise
from penstock.observer import notify
from penstock.server.config import MAX_USER_TIMEOUT, USER_TIMEOUT, new_config
from penstock.server.hypercorn_fixes import apply, are_known
from penstock.server.hypercorn_fixes.connection import time_out_stalled
from penstock.server.hypercorn_fixes.http2 import LAST_SENDS
from penstock.supervisor.settings import check_duration

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from hypercorn.config import Config, Sockets
    from hypercorn.typing import Framework
    from starlette.applications import Starlette

    from penstock.server.hypercorn_fixes.connection import SendDeadline
    from penstock.supervisor import Supervisor
    from penstock.supervisor.live_runs import StuckRun

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)  # the signals that ask for a shutdown
ABANDON_AFTER: Final = 5.0  # seconds that a producer may keep its task after everything else of a shutdown is done


class Phase(Enum):
    """How far a shutdown is."""

    SERVING = auto()
    DRAINING = auto()
    DRAINED = auto()  # the runs have ended; the last connections may be cut


class Shutdown:
    """A shutdown of one server, asked for in steps. A step cannot be taken back. The methods are synchronous."""

    def __init__(self) -> None:
        self.phase = Phase.SERVING
        self.closing = trio.Event()  # Hypercorn's trigger: it closes the listeners when this is set
        self._asked = trio.Event()
        self._leaving = trio.Event()
        self._skip: Callable[[], None] = lambda: None

    def drain(self) -> None:
        """End when the runs have ended: they get `drain_timeout`, and meanwhile new runs are refused (503).

        Connections are accepted until then; readers of other processes' runs are released.
        """
        if self.phase is Phase.SERVING:
            self.phase = Phase.DRAINING
        self._asked.set()

    def stop_accepting(self) -> None:
        """`drain`, and close the listeners at once: sibling processes have them open, too."""
        self.drain()
        self._leaving.set()

    def force(self) -> None:
        """`drain`; the next call skips the wait for the runs, the one after that the wait for the last connections."""
        if self.phase is Phase.SERVING:
            self.drain()
        else:
            self._skip()

    async def run(
        self,
        service: AppLifespan,
        config: Config,
        sends: SendDeadline,
        server: trio.CancelScope,
        abandon: Callable[[Sequence[StuckRun]], None] | None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Wait until a shutdown is asked for, or the service fails, and shut down; it ends with the scope `server`."""

        def interrupt() -> None:
            if service.running:
                service.supervisor.interrupt()

        self._skip = interrupt
        grace = config.graceful_timeout
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.drain_after, service.failed.wait)
                task_status.started()
                await self._asked.wait()
                if not service.running:
                    server.cancel(reason="shut down before it had started")
                    await trio.lowlevel.checkpoint()
                nursery.start_soon(self._close_when_leaving, service, config)
                await service.drain()
                self.phase = Phase.DRAINED
                self._skip = partial(server.cancel, reason="a signal during the last wait")
                closed_early = self.closing.is_set()
                self.closing.set()
                sends.end_by(trio.current_time() + grace + LAST_SENDS)
                if abandon is not None:
                    nursery.start_soon(_abandon, service.supervisor, abandon)
                if closed_early:  # Hypercorn's own grace is as long as the whole drain then
                    await trio.sleep(grace)
                    server.cancel(reason="the last connections have had their time")
        finally:
            sends.end_by(trio.current_time() + LAST_SENDS)

    async def listen(
        self, signals: Sequence[signal.Signals], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Force with each signal, until one has come in the last phase: the next one then ends the process."""
        with trio.open_signal_receiver(*signals) as received:
            task_status.started()
            async for _ in received:
                last = self.phase is Phase.DRAINED
                self.force()
                if last:
                    return

    async def drain_after(self, wait: Callable[[], Awaitable[object]]) -> None:
        """Drain when `wait` has returned."""
        await wait()
        self.drain()

    async def _close_when_leaving(self, service: AppLifespan, config: Config) -> None:
        await self._leaving.wait()
        config.graceful_timeout = config.shutdown_timeout = service.patience
        self.closing.set()


async def _abandon(supervisor: Supervisor, abandon: Callable[[Sequence[StuckRun]], None]) -> None:
    """Call `abandon` with the producers that keep their tasks for `ABANDON_AFTER`, also while all else is cancelled."""
    while True:
        if known := {run.run_id for run in supervisor.stuck}:
            with trio.move_on_after(ABANDON_AFTER, shield=True):
                await supervisor.let_go()
        else:
            await trio.sleep(ABANDON_AFTER)
        if stuck := [run for run in supervisor.stuck if run.run_id in known]:
            abandon(stuck)


async def serve(
    app: Starlette,
    config: Config | None = None,
    *,
    signals: Sequence[signal.Signals] = SIGNALS,
    shutdown_trigger: Callable[[], Awaitable[object]] | None = None,
    shutdown: Shutdown | None = None,
    abandon: Callable[[Sequence[StuckRun]], None] | None = None,
    tcp_user_timeout: float = USER_TIMEOUT,
    task_status: trio.TaskStatus[list[str]] = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve an application of `create_app` until a signal, the trigger, or a cancellation. A checkpoint.

    A cancellation skips the drain: the runs are interrupted, and their terminal entries are still stored.

    Args:
        app: made by `create_app`.
        config: Hypercorn's; by default `new_config()`, which binds to 127.0.0.1:8000. With `certfile` and `keyfile` it
            serves TLS, and HTTP/2 to browsers. `read_timeout` and `max_requests` must stay None: the first ends idle
            streams, the second ends the server without a drain. It is not changed.
        signals: the signals that ask for a shutdown; empty for an embedder that handles signals, and outside the main
            thread.
        shutdown_trigger: an async function that returns when a shutdown is wanted for another reason.
        shutdown: to ask for a shutdown in several steps, as signals do; a `penstock.server.serve.Shutdown`.
        abandon: called with the runs whose producers have kept their tasks for `ABANDON_AFTER` seconds after all else
            of the shutdown is done. Trio cannot abandon a task, so it can only end the process; without it `serve`
            waits.
        tcp_user_timeout: seconds after which TCP ends the connection of a client that takes nothing in; 0 leaves it to
            the system. Only Linux has that (RFC 5482).
        task_status: started with the URLs that are served, when connections are accepted.

    Raises:
        ConfigurationError: the application, the configuration or the event log's URL cannot be used.
        LogUnavailable: the event log cannot be reached at the start.
        Draining: it was shut down before it had started, and `task_status` waits for that.
        OSError: the address cannot be bound, or the certificate not be read.
        SupervisorFailed: a service of the supervisor died.
    """
    service = getattr(app.state, "penstock", None)
    if not isinstance(service, AppLifespan):
        raise ConfigurationError("serve() needs an application made by create_app()")
    config = new_config() if config is None else config
    _check(config, tcp_user_timeout)
    shutdown = Shutdown() if shutdown is None else shutdown
    config = _own(config, tcp_user_timeout, service)
    sends = apply(config, lambda message: notify(service.observer.warning, message))
    extensions: dict[str, Any] = {EARLY_END: {}} if are_known() else {}
    urls: list[str] | None = None

    def with_extensions(scope: Any, *channels: Any) -> Awaitable[None]:  # not async: a frame less for every response
        scope.setdefault("extensions", {}).update(extensions)
        return app(scope, *channels)

    async def accept(task_status: trio.TaskStatus[list[str]]) -> None:  # noqa: ASYNC128  (Hypercorn passes it on)
        framework = cast("Framework", with_extensions)  # Hypercorn's types of an application are narrower
        trigger = shutdown.closing.wait
        await hypercorn.trio.serve(framework, config, shutdown_trigger=trigger, task_status=task_status, mode="asgi")
        scope.cancel(reason="the server has ended")

    try:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                if signals:
                    await nursery.start(shutdown.listen, signals)
                if shutdown_trigger is not None:
                    nursery.start_soon(shutdown.drain_after, shutdown_trigger)
                await nursery.start(shutdown.run, service, config, sends, scope, abandon)
                urls = await nursery.start(accept)
                if service.running:  # otherwise its start has failed, and Hypercorn has not noticed yet
                    task_status.started(urls)
    except BaseExceptionGroup as group:  # of Hypercorn's nurseries, and of this one
        reraise(service.startup_error or single_error(group))
    if urls is None and task_status is not trio.TASK_STATUS_IGNORED:  # the caller waits for the start
        raise Draining("shut down before it had started")
    if service.failed.is_set():
        raise SupervisorFailed("a service of the supervisor died")


def _check(config: Config, tcp_user_timeout: float) -> None:
    """Refuse a configuration that breaks streams or the drain."""
    if config.read_timeout is not None:
        raise ConfigurationError("Hypercorn's read_timeout must stay None: it takes a silent reader for a disconnect")
    if config.max_requests is not None:
        raise ConfigurationError("Hypercorn's max_requests must stay None: it ends a server without a drain")
    check_duration("tcp_user_timeout", tcp_user_timeout, zero=True)
    if tcp_user_timeout is None or tcp_user_timeout > MAX_USER_TIMEOUT:
        message = f"tcp_user_timeout is at most {MAX_USER_TIMEOUT} s, not {tcp_user_timeout!r}; 0 = none"
        raise ConfigurationError(message)


def _own(config: Config, tcp_user_timeout: float, service: AppLifespan) -> Config:
    """A copy of `config` for this server alone, whose sockets have the TCP user timeout."""
    own = copy.copy(config)

    def create_sockets() -> Sockets:
        sockets = config.create_sockets()
        listening = [*sockets.secure_sockets, *sockets.insecure_sockets]
        for sock in listening:
            sock.set_inheritable(False)  # otherwise a producer's child process would keep the address
        if not time_out_stalled(listening, tcp_user_timeout) and tcp_user_timeout:
            notify(
                service.observer.warning,
                "this system has no TCP_USER_TIMEOUT: a client that stops reading keeps its connection until the "
                "system ends it, or the server ends",
            )
        return sockets

    own.create_sockets = create_sockets  # type: ignore[method-assign]
    return own
