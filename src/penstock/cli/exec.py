"""What `penstock exec` does once its server is up: start the command, say where its stream is, note its end."""

from __future__ import annotations

import json
import shlex
import signal
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import trio

from penstock.cli.host import curl, say
from penstock.errors import PublicError
from penstock.observer.logging import LoggingObserver, escape_unprintable
from penstock.runs import RunStatus
from penstock.sources.command import command
from penstock.sse import Decoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.asgi.lifespan import AppLifespan
    from penstock.runs import Run
    from penstock.server.serve import Shutdown

TERMINATED: Final = 128 + signal.SIGTERM
"""The exit code of a command that SIGTERM ended, as in a shell."""
NOT_STARTED: Final = 127
"""The exit code of a command that could not be started, as in a shell."""
EXEC_ENTRIES: Final = 1_000_000
EXEC_TTL: Final = 10 * 365 * 86_400.0
"""`penstock exec` keeps its one run for as long as it is there itself, whole up to the log's limit of bytes."""


@dataclass(eq=False)
class CommandRun:
    """The one run of `penstock exec`."""

    argv: Sequence[str]
    run_id: str
    exit_after: float | None
    exit_code: int = TERMINATED

    async def ready(self, service: AppLifespan, urls: Sequence[str], shutdown: Shutdown) -> None:
        """Start the command, say where its stream is, and stay until it has ended."""
        supervisor = service.supervisor
        await supervisor.start(lambda: command(self.argv), run_id=self.run_id, name="command")
        say(f"running  {shlex.join(self.argv)}")
        asks = service.access.authorizer is not None
        say(f"stream   {urls[0]}/v1/runs/{self.run_id}/stream")
        say(f"try:     {curl('-N', asks=asks)} {urls[0]}/v1/runs/{self.run_id}/stream")
        say(f"         {curl('-X POST', asks=asks)} {urls[0]}/v1/runs/{self.run_id}/cancel")
        run = await supervisor.wait(self.run_id)
        said = None
        async with supervisor.follow(self.run_id, last=3) as entries:  # exit, perhaps an error, [DONE]
            decoder = Decoder()
            async for entry in entries:
                for message in decoder.feed(entry.data):
                    if message.event == "exit":
                        said = json.loads(message.data)
        self._note(run, said, leaving=supervisor.draining or self.exit_after is not None)
        if self.exit_after is not None:
            await trio.sleep(self.exit_after)
            shutdown.drain()

    def _note(self, run: Run, said: dict[str, Any] | None, *, leaving: bool) -> None:
        took = (run.ended_at or 0) - (run.started_at or 0)
        if said is not None:
            self.exit_code = said["exit_code"]
            how = f"ended with exit code {said['exit_code']}" + (f" ({said['signal']})" if "signal" in said else "")
        elif run.status is RunStatus.CANCELLED:
            how = "was cancelled" + (f" ({run.cancel_reason})" if run.cancel_reason else "")
        elif run.error is not None and run.error.code == "COMMAND_NOT_STARTED":
            self.exit_code = NOT_STARTED
            how = f"was not started: {run.error.message}"
        else:
            how = f"was ended: {run.error.message if run.error is not None else run.stop_reason}"
        stays = "" if leaving else "; its stream stays until Ctrl-C"
        say(f"the command {escape_unprintable(how)}; {took:.1f} s, {run.seq} entries{stays}")


class ExecObserver(LoggingObserver):
    """For `penstock exec`, which says itself how its run ended."""

    def run_ended(self, run: Run) -> None:
        """Nothing."""

    def on_error(self, error: BaseException, *, error_id: str, where: str) -> None:
        """Nothing, if it is only what the command itself came to."""
        if not isinstance(error, PublicError):
            super().on_error(error, error_id=error_id, where=where)
