"""The command line: `penstock serve`, `penstock exec`, `penstock runs`, `penstock demo`.

Here, in `serving.py` and in `runs.py` are the words: commands, and what they print. What they do is in `loading.py`
(finding producers), `listening.py` (addresses, certificates), `admitting.py` (tokens), `hosting.py` (serving, workers,
exit codes), `executing.py` (the run of `penstock exec`), `client.py` and `following.py` (`penstock runs`) and
`penstock/demo`. Every option is an environment variable, too: `--cancel-grace` is `PENSTOCK_CANCEL_GRACE`. What is
wrong with the words ends with exit code 2 and a line that says what to do, never with a traceback of penstock's own.
"""

from __future__ import annotations

import shlex
import shutil
import signal
import sys
from typing import TYPE_CHECKING, Any, Final

import click

from penstock.cli.exec import EXEC_ENTRIES, EXEC_TTL, CommandRun, ExecObserver
from penstock.cli.host import Hosted, LogConfig, host, say
from penstock.cli.options import ARGUMENTS, CONTEXT, auth_options, authorization_options, option, shared_options
from penstock.cli.runs import runs
from penstock.cli.serve import serve
from penstock.cli.sockets import listening
from penstock.runs import check_run_id

if TYPE_CHECKING:
    from collections.abc import Sequence

INTERRUPTED: Final = 128 + signal.SIGINT


class Commands(click.Group):
    """The commands; Ctrl-C before there is anything to drain ends them with the exit code that shells give it."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Remember the words: `serve` starts its workers with the same ones."""
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            say("stopped before it was ready")
            sys.exit(INTERRUPTED)


@click.group(
    cls=Commands,
    context_settings=CONTEXT,
    epilog="Every option of a command is an environment variable, too, whose name stands beside it.",
)
@click.version_option(package_name="penstock", message="penstock %(version)s")
def main() -> None:
    """Serve runs as resumable, cancellable Server-Sent-Event streams.

    A run is one execution of an agent, a build, any async generator of events. Its events are kept in a log; readers
    may drop, come back with the id of the last event that they saw, and miss nothing. Anyone may cancel a run, and it
    stops at once.

    \b
    Examples:
      penstock demo                                        see it work, in a few seconds
      penstock exec -- make -j2                            a command's output as a stream
      penstock serve --producers mymodule:producers        your own producers
      curl -N http://127.0.0.1:8000/v1/runs/exec/stream    read a stream
    """  # noqa: D301  (click takes this backspace for: leave these lines as they are)


main.add_command(serve)
main.add_command(runs)


@main.command(
    name="exec",
    epilog="""\b
Exit codes:
  0  a clean shutdown           2  a wrong argument
  1  a part of the server died  with --exit-after: the command's own (127: not started, 143: cancelled)
""",
    context_settings={**CONTEXT, "allow_interspersed_args": False},
)
@click.argument("argv", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- COMMAND [ARGUMENT]...")
@shared_options
@authorization_options
@option("--run-id", default="exec", help="The run's id, a part of the stream's URL.")
@option(
    "--exit-after",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Leave so long after the command has ended (readers who were cut off can come back until then), with its exit "
    "code. By default the stream stays until Ctrl-C.",
)
def exec_(
    argv: Sequence[str],
    bind: Sequence[str],
    *,
    log_level: str,
    log_format: str,
    run_id: str,
    exit_after: float | None,
    **who: Any,
) -> None:
    """Run a command, and serve its output as a resumable stream.

    Every line becomes an event, `stdout` or `stderr`; then comes `exit` with the exit code, then [DONE]. Readers see it
    from the first line on, whenever they come. Ctrl-C ends the command. Nothing else can be started over HTTP.

    \b
    Examples:
      penstock exec -- make -j2
      penstock exec --exit-after 5 -- sh -c 'make test 2>&1 | tee test.log'
    """  # noqa: D301  (click takes this backspace for: leave these lines as they are)
    if shutil.which(argv[0]) is None:
        raise click.BadParameter(
            f"there is no program {argv[0]!r} to run; for a shell's line, give: sh -c {shlex.quote(' '.join(argv))}",
            param_hint="COMMAND",
        )
    try:
        execution = CommandRun(argv, check_run_id(run_id), exit_after)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--run-id") from None
    admitted = auth_options(**who)
    limits = {"max_entries": EXEC_ENTRIES, "ttl": EXEC_TTL}
    knobs = {"drain_timeout": 0.0, "max_duration": 0.0}
    hosted = Hosted({}, admitted, limits=limits, knobs=knobs, observer=ExecObserver())
    with listening(bind, anywhere=admitted.anywhere) as sockets:
        failure = host(hosted, sockets, notes=LogConfig(log_level, log_format), ready=execution.ready)
    sys.exit(failure or (0 if exit_after is None else execution.exit_code))


@main.command(context_settings=CONTEXT, short_help="See it work: a command over HTTP, cut, resumed, compared.")
@option("--port", default=0, type=click.IntRange(0, 65535), help="The server's port; 0 is a free one.")
def demo(port: int) -> None:
    """Watch it work: a real command over HTTP, cut twice, resumed, compared; then a cancel.

    Starts `penstock serve`, runs Python's compileall over the standard library as a run, reads it with an independent
    client, cuts the connection twice in mid-stream, resumes, and compares what arrived with what the command wrote.
    Then a silent run is cancelled, and the time is taken. Exits with 0 only if all of it held; leaves nothing running.
    """
    from penstock.cli.demo import run_demo  # noqa: PLC0415  (nothing else needs an HTTP client at once)

    sys.exit(run_demo(port))
