"""How a server ends: who asks for it, and in which order things go.

    drain()    not ready, new runs 503, readers of runs elsewhere released; this process's runs have `drain_timeout`
    leave()    the same, but the listeners are closed at once: siblings have them open, too
    hurry()    once: runs are interrupted; when they are over: the last connections are cut

    asked ──▶ draining ──▶ drained ──▶ down: Hypercorn closes the listeners, and after its grace what is left

Hypercorn tells an application nothing of a shutdown: at SIGTERM it stops accepting, and `graceful_timeout` later it
cancels whatever still runs. So the drain comes *before* `down`, which is Hypercorn's trigger, except for a worker that
leaves: there Hypercorn waits meanwhile.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import trio

from penstock.http.http2 import LAST_WORDS

if TYPE_CHECKING:
    import signal
    from collections.abc import Awaitable, Callable, Sequence

    from hypercorn.config import Config

    from penstock.http.corrections import Sends
    from penstock.http.service import Service
    from penstock.services import StuckRun
    from penstock.supervisor import Supervisor

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

    def leave(self) -> None:
        """End when the runs have ended, and accept no more connections: siblings do."""
        self.asked.set()
        self.leaving.set()

    def hurry(self) -> None:
        """Skip what is being waited for: a further signal, or the first."""
        if self.asked.is_set():
            self._hurry()
        self.asked.set()

    async def run(
        self,
        service: Service,
        config: Config,
        sends: Sends,
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

    async def _fail_with(self, service: Service) -> None:
        await service.failed.wait()
        self.asked.set()

    async def _leave(self, service: Service, config: Config) -> None:
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
            shutdown.hurry()
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
