"""The command line: `penstock serve`, `penstock exec`, `penstock demo`.

Here are the words: commands, and what they print. What they do is in `loading.py` (finding producers), `hosting.py`
(sockets, serving, exit codes), `executing.py` (the run of `penstock exec`) and `penstock/demo`. Every option is an
environment variable, too: `--cancel-grace` is `PENSTOCK_CANCEL_GRACE`. What is wrong with the words ends with exit code
2 and a line that says what to do, never with a traceback of penstock's own.
"""

from __future__ import annotations

import json
import shlex
import shutil
import signal
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from penstock.cli.executing import EXEC_ENTRIES, EXEC_TTL, ExecObserver, Execution
from penstock.cli.hosting import Hosted, host, listen, say
from penstock.cli.loading import ModuleFailed, load_producers
from penstock.cli.options import binary, knob_options, option, shared_options
from penstock.errors import ConfigurationError
from penstock.http.app import MAX_BODY_BYTES
from penstock.runs import check_run_id

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import trio

    from penstock.http.app import Service

INTERRUPTED: Final = 128 + signal.SIGINT
EXIT_CODES: Final = """\b
Exit codes:
  0  a clean shutdown           2  a wrong argument
  1  a part of the server died, or the log could not be reached, to begin with or in the end
  3  a producer would not let go
"""

CONTEXT: Final = {
    "auto_envvar_prefix": "PENSTOCK",
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    "show_default": True,
}


class Commands(click.Group):
    """The commands; Ctrl-C before there is anything to drain ends them with the exit code that shells give it."""

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


@main.command(epilog=EXIT_CODES, context_settings=CONTEXT)
@option(
    "--producers",
    required=True,
    metavar="MODULE:ATTRIBUTE",
    help='What runs can be started of: a mapping such as producers = {"agent": agent} in a module, or in a file '
    "(path/to/file.py:ATTRIBUTE). A producer is called with the request's input.",
)
@option(
    "--log",
    "log_url",
    default="memory://",
    metavar="URL",
    envvar="PENSTOCK_LOG",
    help="The event log. memory:// is this process's memory, gone with it; redis://[:PASSWORD@]HOST[:PORT][/DB] "
    "(rediss:// over TLS, unix:///PATH) is a Redis that any number of servers share. A password is better kept in the "
    "environment variable.",
)
@shared_options
@option(
    "--ttl",
    default=10_800.0,
    metavar="SECONDS",
    help="How long a run is kept after its end.",
    type=click.FloatRange(min=0, min_open=True),
)
@option(
    "--max-entries",
    default=10_000,
    metavar="ENTRIES",
    type=click.IntRange(min=1),
    help="How many entries are kept of one run.",
)
@option(
    "--prefix",
    default="sse:run:",
    metavar="PREFIX",
    help="What the keys of entries in Redis begin with; it ends with run:, and all others begin with what is before.",
)
@option(
    "--ping-interval",
    default=15.0,
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    help="After how long without a send a stream is pinged; 0 = never.",
)
@option(
    "--max-body-bytes",
    default=MAX_BODY_BYTES,
    show_default=binary(MAX_BODY_BYTES),
    metavar="BYTES",
    type=click.IntRange(min=1),
    help="The largest body of a request.",
)
@knob_options
def serve(
    producers: str,
    log_url: str,
    bind: Sequence[str],
    *,
    insecure: bool,
    log_level: str,
    ttl: float,
    max_entries: int,
    prefix: str,
    ping_interval: float,
    max_body_bytes: int,
    **knobs: Any,
) -> None:
    """Serve producers over HTTP, with a page for browsers.

    Ctrl-C or SIGTERM drains: no new runs, those that are there may go on for --drain-timeout, then they are
    interrupted; a second signal skips the waiting. Every run gets its last entry.

    \b
    Examples:
      penstock serve --producers mypackage.agents:producers
      penstock serve --producers ./agents.py:producers --bind 127.0.0.1:0 --cancel-grace 3
      penstock serve --producers agents:producers --log redis://localhost     (as many of these as you like)
      PENSTOCK_BIND="127.0.0.1:8000 [::1]:8000" penstock serve --producers agents:producers
    """  # noqa: D301  (click takes this backspace for: leave these lines as they are)
    try:
        hosted = Hosted(
            load_producers(producers),
            log_url,
            {"ttl": ttl, "max_entries": max_entries, "prefix": prefix},
            ping_interval or None,
            max_body_bytes,
            knobs,
        )
    except ConfigurationError as error:
        raise click.BadParameter(str(error), param_hint="--producers") from None
    except ModuleFailed as error:
        click.echo(error.traceback, err=True, nl=False)
        raise click.BadParameter(str(error), param_hint="--producers") from None
    _leave(hosted, bind, insecure=insecure, log_level=log_level, ready=partial(_announce, log_url=log_url))


async def _announce(service: Service, urls: Sequence[str], _down: trio.Event, *, log_url: str) -> None:
    names = sorted(service.producers)
    say(f"serving on {' and '.join(urls)} (log: {log_url.partition('?')[0].rpartition('@')[2]})")
    say(f"producers: {', '.join(names) or 'none, so that nothing can be started'}")
    if names:
        body = json.dumps({"producer": names[0], "input": "hello", "stream": True}, ensure_ascii=False)
        say(f"try:  curl -N -d {shlex.quote(body)} {urls[0]}/v1/runs")
    say(f"or open {urls[0]}/ in a browser; Ctrl-C stops")


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
@option("--run-id", default="exec", help="The run's id, a part of the stream's URL.")
@option(
    "--exit-after",
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="Leave so long after the command has ended (readers who were cut off can come back until then), with its exit "
    "code. By default the stream stays until Ctrl-C.",
)
def exec_(
    argv: Sequence[str], bind: Sequence[str], *, insecure: bool, log_level: str, run_id: str, exit_after: float | None
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
        execution = Execution(argv, check_run_id(run_id), exit_after)
    except ValueError as error:
        raise click.BadParameter(str(error), param_hint="--run-id") from None
    limits = {"max_entries": EXEC_ENTRIES, "ttl": EXEC_TTL}
    hosted = Hosted({}, limits=limits, knobs={"drain_timeout": 0.0}, observer=ExecObserver())
    _leave(
        hosted,
        bind,
        insecure=insecure,
        log_level=log_level,
        ready=execution.ready,
        code=lambda: 0 if exit_after is None else execution.exit_code,
    )


@main.command(context_settings=CONTEXT, short_help="See it work: a command over HTTP, cut, resumed, compared.")
@option("--port", default=0, type=click.IntRange(0, 65535), help="The server's port; 0 is a free one.")
def demo(port: int) -> None:
    """Watch it work: a real command over HTTP, cut twice, resumed, compared; then a cancel.

    Starts `penstock serve`, runs Python's compileall over the standard library as a run, reads it with an independent
    client, cuts the connection twice in mid-stream, resumes, and compares what arrived with what the command wrote.
    Then a silent run is cancelled, and the time is taken. Exits with 0 only if all of it held; leaves nothing running.
    """
    try:
        from penstock.demo.performance import run_demo  # noqa: PLC0415  (it needs httpx2, which nothing else here does)
    except ModuleNotFoundError as error:
        if error.name != "httpx2":
            raise
        raise click.ClickException(f'{error.name} is missing; install it with: pip install "penstock[demo]"') from None
    sys.exit(run_demo(port))


def _leave(
    hosted: Hosted,
    bind: Sequence[str],
    *,
    code: Callable[[], int] = lambda: 0,
    **how: Any,
) -> None:
    """Serve, and end the process with what came of it."""
    insecure = how.pop("insecure")
    try:
        sockets = listen(bind, insecure=insecure)
    except ConfigurationError as error:
        raise click.BadParameter(str(error), param_hint="--bind") from None
    try:
        failure = host(hosted, sockets, **how)
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from None
    if not failure:
        say("stopped; every run has its last entry")
    sys.exit(failure or code())
