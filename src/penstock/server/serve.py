"""How a server ends: who asks for it, and in which order things go.

    drain()    not ready, new runs 503, readers of runs elsewhere released; this process's runs have `drain_timeout`
    leave()    the same, but the listeners are closed at once: siblings have them open, too
    hurry()    once: runs are interrupted; when they are over: the last connections are cut

    asked ──▶ draining ──▶ drained ──▶ down: Hypercorn closes the listeners, and after its grace what is left

Hypercorn tells an application nothing of a shutdown: at SIGTERM it stops accepting, and `graceful_timeout` later it
cancels whatever still runs. So the drain comes *before* `down`, which is Hypercorn's trigger, except for a worker that
leaves: there Hypercorn waits meanwhile.

serve(): Hypercorn's trio worker, with a drain, and without those of its faults that hurt streams.

    signal ──▶ not ready, new runs 503, readers of runs elsewhere released
           ──▶ this process's runs end by themselves; after drain_timeout they are interrupted
           ──▶ every run has its terminal entry, and its readers have it
           ──▶ the trigger: listeners closed, the last responses end, the lifespan ends

A second signal skips the waiting, also that of Hypercorn for its last connections. A service of the supervisor that
dies fires the trigger at once. `shutdown.py` has the order of leaving, `corrections.py` Hypercorn's faults.
"""

from __future__ import annotations

import copy
import signal
from typing import TYPE_CHECKING, Any, Final, cast

import hypercorn.trio
import trio
from hypercorn.config import Config, Sockets

from penstock.asgi.lifespan import AppLifespan
from penstock.asgi.request_body import EARLY_END
from penstock.errors import ConfigurationError, Draining, SupervisorFailed, single_error
from penstock.exception_groups import reraise
from penstock.observer import notify
from penstock.server.hypercorn_fixes import MAX_USER_TIMEOUT, apply, are_known, time_out_stalled
from penstock.server.hypercorn_fixes.http2 import LAST_WORDS
from penstock.supervisor.settings import check_duration

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from hypercorn.typing import Framework
    from starlette.applications import Starlette

    from penstock.server.hypercorn_fixes import SendDeadline
    from penstock.supervisor import Supervisor
    from penstock.supervisor.services import StuckRun

ABANDON_AFTER: Final = 5.0
"""Seconds that a producer may still hold on to its task after everything else of a shutdown is done."""


class Shutdown:
    """What has been asked of a server. Each word takes it further, none takes anything back; all are synchronous."""

    def __init__(self) -> None:
        self.asked = trio.Event()
        """Somebody wants the server to end."""
        self.leaving = trio.Event()
        """... and its siblings to go on."""
        self.down = trio.Event()
        """It accepts no more connections."""
        self.over = False
        """Its runs have ended; connections may be left."""
        self._hurry: Callable[[], None] = self.asked.set

    def drain(self) -> None:
        """End when the runs have ended, and accept connections until then."""
        self.asked.set()

    def stop_accepting(self) -> None:
        """End when the runs have ended, and accept no more connections: siblings do."""
        self.asked.set()
        self.leaving.set()

    def force(self) -> None:
        """Skip what is being waited for: a further signal, or the first."""
        if self.asked.is_set():
            self._hurry()
        self.asked.set()

    async def run(
        self,
        service: AppLifespan,
        config: Config,
        sends: SendDeadline,
        server: trio.CancelScope,
        abandon: Callable[[Sequence[StuckRun]], None] | None,
        task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Wait until it is asked for, or the service fails, and shut down. It goes on until the server has ended.

        Args:
            service: drained before its connections go.
            config: Hypercorn's; a server that leaves needs more patience of it.
            sends: of the server's connections; none may outlast it.
            server: cancelled if there is nothing to drain yet, or no patience left.
            abandon: see `serve`.
            task_status: is told when it listens.
        """

        def hurry() -> None:
            if self.over:
                server.cancel(reason="a signal during the last wait")
            elif service.running:
                service.supervisor.interrupt()

        self._hurry = hurry
        grace = config.graceful_timeout
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._fail_with, service)
                task_status.started()
                await self.asked.wait()
                if not service.running:
                    server.cancel(reason="shut down before it had started")
                    await trio.lowlevel.checkpoint()
                nursery.start_soon(self._leave, service, config)
                await service.drain()
                self.over = True
                left = self.down.is_set()
                self.down.set()
                sends.end_by(trio.current_time() + grace + LAST_WORDS)
                if abandon is not None:
                    nursery.start_soon(_abandon, service.supervisor, abandon)
                if left:  # Hypercorn has the patience of the whole drain, and nobody else is waited for
                    await trio.sleep(grace)
                    server.cancel(reason="the last connections have had their time")
        finally:
            sends.end_by(trio.current_time() + LAST_WORDS)

    async def _fail_with(self, service: AppLifespan) -> None:
        await service.failed.wait()
        self.asked.set()

    async def _leave(self, service: AppLifespan, config: Config) -> None:
        await self.leaving.wait()
        config.graceful_timeout = config.shutdown_timeout = service.patience
        self.down.set()


async def listen(
    shutdown: Shutdown, signals: Sequence[signal.Signals], task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED
) -> None:
    """Take signals for words: the first asks for a drain, the next ones for hurry.

    Once the last connections are being cut, it listens no more: one more signal ends the process.
    """
    with trio.open_signal_receiver(*signals) as received:
        task_status.started()
        async for _ in received:
            last = shutdown.over
            shutdown.force()
            if last:
                return


async def ask_after(reason: Callable[[], Awaitable[object]], shutdown: Shutdown) -> None:
    """Ask for a drain when `reason` has returned."""
    await reason()
    shutdown.drain()


async def _abandon(supervisor: Supervisor, abandon: Callable[[Sequence[StuckRun]], None]) -> None:
    """Give producers that hold on to their tasks a last chance, then give them up, also if all patience is gone."""
    while True:
        if known := {run.run_id for run in supervisor.stuck}:
            with trio.move_on_after(ABANDON_AFTER, shield=True):
                await supervisor.let_go()
        else:
            await trio.sleep(ABANDON_AFTER)
        if stuck := [run for run in supervisor.stuck if run.run_id in known]:
            abandon(stuck)


SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
"""The signals that ask for a shutdown."""
BACKLOG: Final = 1024
"""The connections that may wait to be accepted. With Hypercorn's 100, some of a burst of 1,000 wait 13 s in vain."""
USER_TIMEOUT: Final = 30.0
"""Seconds after which TCP gives a client up that takes nothing in."""


MAX_HEADER_BYTES: Final = 16 * 1024
"""The default of the limit on a request's line and headers."""


def new_config(max_header_bytes: int = MAX_HEADER_BYTES) -> Config:
    """Hypercorn's configuration, with a backlog that takes a burst of readers who all come back at once.

    Args:
        max_header_bytes: the limit on a request's line and headers; beyond it HTTP/1.1 is answered 431, and HTTP/2
            loses its connection.
    """
    config = Config()
    config.backlog = BACKLOG
    config.h11_max_incomplete_size = max_header_bytes
    config.h2_max_header_list_size = max_header_bytes
    return config


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
    """Serve an application of `create_app` until a signal, the trigger, or a cancellation from outside.

    A cancellation from outside skips the drain: runs are interrupted, and still get their terminal entries.

    Args:
        app: made by `create_app`.
        config: Hypercorn's; by default `new_config()`, which binds to 127.0.0.1:8000. With `certfile` and `keyfile` it
            serves TLS, and HTTP/2 to browsers. `read_timeout` and `max_requests` must stay None: the one ends idle
            streams, the other the server without a drain.
        signals: what asks for a shutdown; empty for an embedder who handles signals, and outside the main thread.
        shutdown_trigger: returns when a shutdown is wanted for another reason.
        shutdown: by which a shutdown can be asked for in several steps, as signals do; a
            `penstock.server.serve.Shutdown`.
        abandon: called with the runs whose producers have not let go `ABANDON_AFTER` seconds after all else of the
            shutdown is done. Nothing in Trio can abandon a task, so all that it can do is to end the process; without
            it, serve waits.
        tcp_user_timeout: seconds after which a client that takes nothing in is given up; 0 = as long as the system
            likes. Only Linux has that (RFC 5482).
        task_status: is given the URLs that are served, once connections are accepted.

    Raises:
        ConfigurationError: the application or the configuration cannot be served, or the event log's URL be opened.
        LogUnavailable: the event log cannot be reached to begin with.
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
    sends = apply(config, lambda words: notify(service.observer.warning, words))
    extensions: dict[str, Any] = {EARLY_END: {}} if are_known() else {}
    urls: list[str] | None = None

    def with_extensions(scope: Any, *channels: Any) -> Awaitable[None]:  # not async: a frame less for every response
        scope.setdefault("extensions", {}).update(extensions)
        return app(scope, *channels)

    async def accept(task_status: trio.TaskStatus[list[str]]) -> None:  # noqa: ASYNC128  (Hypercorn passes it on)
        framework = cast("Framework", with_extensions)  # Hypercorn's types of an application are narrower
        trigger = shutdown.down.wait
        await hypercorn.trio.serve(framework, config, shutdown_trigger=trigger, task_status=task_status, mode="asgi")
        scope.cancel(reason="the server has ended")

    try:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                if signals:
                    await nursery.start(listen, shutdown, signals)
                if shutdown_trigger is not None:
                    nursery.start_soon(ask_after, shutdown_trigger, shutdown)
                await nursery.start(shutdown.run, service, config, sends, scope, abandon)
                urls = await nursery.start(accept)
                if service.running:  # or its start has failed, and Hypercorn has not noticed yet
                    task_status.started(urls)
    except BaseExceptionGroup as group:  # of Hypercorn's nurseries and this one: the caller should see what went wrong
        reraise(service.startup_error or single_error(group))
    if urls is None and task_status is not trio.TASK_STATUS_IGNORED:  # somebody waits to hear that it has started
        raise Draining("shut down before it had started")
    if service.failed.is_set():
        raise SupervisorFailed("a service of the supervisor died")


def _check(config: Config, tcp_user_timeout: float) -> None:
    """Refuse what cannot be served with."""
    if config.read_timeout is not None:
        raise ConfigurationError("Hypercorn's read_timeout must stay None: it takes a silent reader for a disconnect")
    if config.max_requests is not None:
        raise ConfigurationError("Hypercorn's max_requests must stay None: it ends a server without a drain")
    check_duration("tcp_user_timeout", tcp_user_timeout, zero=True)
    if tcp_user_timeout is None or tcp_user_timeout > MAX_USER_TIMEOUT:
        words = f"tcp_user_timeout is at most {MAX_USER_TIMEOUT} s, not {tcp_user_timeout!r}; 0 = none"
        raise ConfigurationError(words)


def _own(config: Config, tcp_user_timeout: float, service: AppLifespan) -> Config:
    """A copy of `config`, for this server alone, whose sockets do not wait for clients that have stalled."""
    own = copy.copy(config)

    def create_sockets() -> Sockets:
        sockets = config.create_sockets()
        listening = [*sockets.secure_sockets, *sockets.insecure_sockets]
        for sock in listening:
            sock.set_inheritable(False)  # or what a producer starts would keep the address when this server has ended
        if not time_out_stalled(listening, tcp_user_timeout) and tcp_user_timeout:
            notify(
                service.observer.warning,
                "this system has no TCP_USER_TIMEOUT: a client that stops reading keeps its connection until the "
                "system gives it up, or the server ends",
            )
        return sockets

    own.create_sockets = create_sockets  # type: ignore[method-assign]
    return own
