"""The program `penstock`: its group of commands.

A command's options stand in its own module: `serve.py`, `exec.py`, `runs.py`; `demo.py` has what `penstock demo` does.
Each option is an environment variable, too: `--cancel-grace` is `PENSTOCK_CANCEL_GRACE`. A wrong argument ends the
program with exit code 2 and one message that says what to do, without a traceback.
"""

from __future__ import annotations

import signal
import sys
from typing import Any, Final

import click

from penstock.cli.exec import exec_
from penstock.cli.host import say
from penstock.cli.options import ARGUMENTS, CONTEXT, option
from penstock.cli.runs import runs
from penstock.cli.serve import serve

INTERRUPTED: Final = 128 + signal.SIGINT


class Commands(click.Group):
    """The commands. Ctrl-C before a server handles signals ends them with the exit code of an interrupted program."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Keep the arguments: `serve` starts its workers with the same ones."""
        ctx.meta[ARGUMENTS] = list(args)
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
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

    A run is one execution of an agent, a build, any async generator of events. Its events are kept in a log. A reader
    may lose its connection, come back with the id of the last event that it saw, and miss nothing. A client may cancel
    a run, which then stops at once.

    \b
    Examples:
      penstock demo                                        see it work, in a few seconds
      penstock exec -- make -j2                            a command's output as a stream
      penstock serve --producers mymodule:producers        your own producers
      curl -N http://127.0.0.1:8000/v1/runs/exec/stream    read a stream
    """  # noqa: D301  (click reads this backspace as: leave these lines as they are)


@main.command(context_settings=CONTEXT, short_help="See it work: a command over HTTP, cut, resumed, compared.")
@option("--port", default=0, type=click.IntRange(0, 65535), help="The server's port; 0 is a free one.")
def demo(port: int) -> None:
    """Watch it work: a real command over HTTP, cut twice, resumed, compared; then a cancel.

    Starts `penstock serve`, runs Python's compileall over the standard library as a run, reads it with an independent
    client, cuts the connection twice in mid-stream, resumes, and compares what arrived with what the command wrote.
    Then it cancels a silent run and takes the time. The exit code is 0 only if every check held. Nothing is left
    running.
    """
    from penstock.cli.demo import run_demo  # noqa: PLC0415  (no other command needs its HTTP client and progress bar)

    sys.exit(run_demo(port))


for each in (exec_, runs, serve):
    main.add_command(each)
