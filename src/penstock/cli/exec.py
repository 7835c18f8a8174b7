"""`penstock exec`: one command as one run, whose output is a stream."""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click
import trio

from penstock.cli.host import LogConfig, curl, host, say
from penstock.cli.options import CONTEXT, auth_options, authorization_options, option, shared_options
from penstock.cli.sockets import listening
from penstock.errors import PublicError
from penstock.log.open import open_log
from penstock.observer.logging import LoggingObserver, escape_unprintable
from penstock.runs import RunStatus, check_run_id
from penstock.server.config import new_config
from penstock.sources.command import command
from penstock.sse import Decoder

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.asgi.lifespan import AppLifespan
    from penstock.runs import Run
    from penstock.server.serve import Shutdown

TERMINATED: Final = 128 + signal.SIGTERM  # the exit code of a command that SIGTERM ended, as in a shell
NOT_STARTED: Final = 127  # the exit code of a command that could not be started, as in a shell
MAX_ENTRIES: Final = 1_000_000
TTL: Final = 10 * 365 * 86_400.0
"""The one run is kept for as long as the process lives, whole up to the log's limit of bytes."""
EXIT_CODES: Final = """\b
Exit codes:
  0  a clean shutdown              2  a wrong argument
  1  a service of the server died  with --exit-after: the command's own (127: not started, 143: cancelled)
"""


@click.command(name="exec", epilog=EXIT_CODES, context_settings={**CONTEXT, "allow_interspersed_args": False})
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENT]...")
@shared_options
@authorization_options
@option("--run-id", default="exec", help="The run's id, which is part of the stream's URL.")
@option(
    "--exit-after",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="End so long after the command has ended, with its exit code; until then, readers that were cut off can come "
    "back. By default the stream stays until Ctrl-C.",
)
def exec_(
    argv: Sequence[str],
    bind: Sequence[str],
    *,
    log_level: str,
    log_format: str,
    run_id: str,
    exit_after: float | None,
    **auth: Any,
) -> None:
    """Run a command, and serve its output as a resumable stream.

    Every line becomes an event, `stdout` or `stderr`; then comes `exit` with the exit code, then [DONE]. A reader gets
    all of it from the first line on, whenever it comes. Ctrl-C ends the command. Nothing else can be started over HTTP.

    \b
    Examples:
      penstock exec -- make -j2
      penstock exec --exit-after 5 -- sh -c 'make test 2>&1 | tee test.log'
    """  # noqa: D301  (click reads this backspace as: leave these lines as they are)
    from penstock.asgi.app import create_app  # noqa: PLC0415  (`--help` and other commands do without Starlette)

    if shutil.which(argv[0]) is None:
        raise click.BadParameter(
            f"there is no program {argv[0]!r} to run; for a shell's line, give: sh -c {shlex.quote(' '.join(argv))}",
            param_hint="COMMAND",
        )
    try:
        run = CommandRun(argv, check_run_id(run_id), exit_after)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--run-id") from None
    allowed = auth_options(**auth)
    make_app = partial(create_app, {}, **allowed.for_app, observer=ExecObserver(), drain_timeout=0.0, max_duration=0.0)
    log = open_log("memory://", max_entries=MAX_ENTRIES, ttl=TTL)
    with listening(bind, anywhere=allowed.anywhere) as sockets:
        log_config = LogConfig(log_level, log_format)
        failure = host(make_app, log, new_config(), sockets, log_config=log_config, ready=run.ready)
    sys.exit(failure or (0 if exit_after is None else run.exit_code))


@dataclass(eq=False)
class CommandRun:
    """The one run of `penstock exec`."""

    argv: Sequence[str]
    run_id: str
    exit_after: float | None
    exit_code: int = TERMINATED

    async def ready(self, lifespan: AppLifespan, urls: Sequence[str], shutdown: Shutdown) -> None:
        """Start the command, say where its stream is, and wait for its end; with `exit_after`, shut down."""
        supervisor = lifespan.supervisor
        await supervisor.start(lambda: command(self.argv), run_id=self.run_id, name="command")
        authenticated = lifespan.access.authorizer is not None
        url = f"{urls[0]}/v1/runs/{self.run_id}"
        say(f"running  {shlex.join(self.argv)}")
        say(f"stream   {url}/stream")
        say(f"try:     {curl('-N', authenticated=authenticated)} {url}/stream")
        say(f"         {curl('-X POST', authenticated=authenticated)} {url}/cancel")
        run = await supervisor.wait(self.run_id)
        exit_event = None
        async with supervisor.follow(self.run_id, last=3) as entries:  # exit, perhaps an error, [DONE]
            decoder = Decoder()
            async for entry in entries:
                for message in decoder.feed(entry.data):
                    if message.event == "exit":
                        exit_event = json.loads(message.data)
        stays = "" if supervisor.draining or self.exit_after is not None else "; its stream stays until Ctrl-C"
        took = (run.ended_at or 0) - (run.started_at or 0)
        say(f"the command {self._outcome(run, exit_event)}; {took:.1f} s, {run.seq} entries{stays}")
        if self.exit_after is not None:
            await trio.sleep(self.exit_after)
            shutdown.drain()

    def _outcome(self, run: Run, exit_event: dict[str, Any] | None) -> str:
        """How the command ended, in a few words; sets the exit code."""
        if exit_event is not None:
            self.exit_code = exit_event["exit_code"]
            by_signal = f" ({exit_event['signal']})" if "signal" in exit_event else ""
            return f"ended with exit code {self.exit_code}{by_signal}"
        if run.status is RunStatus.CANCELLED:
            how = "was cancelled" + (f" ({run.cancel_reason})" if run.cancel_reason else "")
        elif run.error is not None and run.error.code == "COMMAND_NOT_STARTED":
            self.exit_code = NOT_STARTED
            how = f"was not started: {run.error.message}"
        else:
            how = f"was ended: {run.error.message if run.error is not None else run.stop_reason}"
        return escape_unprintable(how)


class ExecObserver(LoggingObserver):
    """Logs what goes wrong, but not how the command ended: `CommandRun` says that."""

    def run_ended(self, run: Run) -> None:
        pass

    def on_error(self, error: BaseException, *, error_id: str, where: str) -> None:
        if not isinstance(error, PublicError):
            super().on_error(error, error_id=error_id, where=where)
