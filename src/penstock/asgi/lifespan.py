"""What an application has beside its routes: the event log, the supervisor, and their state.

The supervisor runs in a task of its own beside the application's lifespan. If one of its services dies, the exception
must not end the lifespan, because the server would be torn down without notifying any client. It is recorded instead:
readers are released, `/readyz` reports it, and `serve()` shuts down.
"""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import trio

from penstock.errors import SupervisorFailed
from penstock.log.open import open_log
from penstock.observer import Observer, Observers, checked
from penstock.observer.logging import LoggingObserver
from penstock.sse.dialects import dialect_named
from penstock.supervisor import Supervisor, open_supervisor
from penstock.supervisor.settings import Settings

if TYPE_CHECKING:
    from collections.abc import Mapping

    from penstock.asgi.auth import AccessControl
    from penstock.log import EventLog
    from penstock.observer.prometheus import Metrics

MAX_BODY_BYTES: Final = 1024 * 1024
"""The default limit on a request's body."""
BODY_TIMEOUT: Final = 30.0
"""The default for the seconds that a request's body may take to arrive."""


@dataclass(slots=True)
class RequestLimits:
    """The limits on a request's body: its size, and the seconds from the request's headers to its end."""

    max_body_bytes: int = MAX_BODY_BYTES
    body_timeout: float = BODY_TIMEOUT


class AppLifespan:
    """The log and the supervisor of an application, which has it as `app.state.penstock`."""

    def __init__(
        self,
        producers: Mapping[str, Any],
        log: str | EventLog,
        settings: Mapping[str, Any],
        *,
        access: AccessControl,
        limits: RequestLimits,
        observer: Observer | None,
        metrics: Metrics | None,
        ping_interval: float | None,
    ) -> None:
        self.producers = dict(producers)
        self.access = access
        self.limits = limits
        self.metrics = metrics
        self.settings = Settings.of(settings)
        self.dialect = dialect_named(self.settings.dialect)
        self.ping_interval = ping_interval
        self.failed = trio.Event()
        """A service of the supervisor has died."""
        self.startup_error: Exception | None = None
        """The error that opening the log or the supervisor raised. (A server passes on no more than its message.)"""
        self._log = log
        self.observer = checked(LoggingObserver() if observer is None else observer)
        if metrics is not None:
            self.observer = Observers(self.observer, metrics)
        self._settings = dict(settings)
        self._supervisor: Supervisor | None = None
        self._stopping = trio.Event()
        self._drained = trio.Event()
        self._drained.set()

    @property
    def patience(self) -> float:
        """The longest that a drain takes, and one second more."""
        settings = self.settings
        return settings.drain_timeout + settings.cancel_grace + settings.finalize_timeout + 1.0

    @property
    def running(self) -> bool:
        """Whether the supervisor has been opened."""
        return self._supervisor is not None

    @property
    def supervisor(self) -> Supervisor:
        """The supervisor; raises `SupervisorFailed` if the application's lifespan has not opened it."""
        if self._supervisor is None:
            raise SupervisorFailed("the application is not running: its server must support the ASGI lifespan protocol")
        return self._supervisor

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hold the log and the supervisor open until `stop`. After they are open an error sets `failed`."""
        started = False
        self._stopping = trio.Event()  # it may have been run before
        try:
            async with AsyncExitStack() as stack:
                log = await stack.enter_async_context(open_log(self._log)) if isinstance(self._log, str) else self._log
                self._supervisor = await stack.enter_async_context(
                    open_supervisor(log, observer=self.observer, **self._settings)
                )
                started = True
                task_status.started()
                await self._stopping.wait()
        except Exception as error:  # the supervisor has reported it to its observer
            if not started:
                self.startup_error = error
                raise
            self.failed.set()

    async def drain(self) -> None:
        """Drain the supervisor (`Supervisor.drain`), or return when one of its services dies."""

        async def give_up() -> None:
            await self.failed.wait()
            nursery.cancel_scope.cancel(reason="a service of the supervisor died")

        self._drained = trio.Event()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(give_up)
                await self.supervisor.drain()
                nursery.cancel_scope.cancel(reason="the drain is over")
        finally:
            self._drained.set()

    async def drained(self) -> None:
        """Wait for a drain that is under way. A server waits for open streams only, and a run may have no reader."""
        await self._drained.wait()

    def stop(self) -> None:
        """Let `run` return when the supervisor's runs are over."""
        self._stopping.set()
