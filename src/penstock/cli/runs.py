"""`penstock runs list | show | follow | cancel`: runs of a server, for people and for programs.

`api.py`, `follow.py` and `terminal.py` are imported when a command runs: their libraries take a while, and `--help`
needs none of them. Standard output gets what the command asked for, standard error everything else.
"""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import ssl
import stat
import sys
from contextlib import contextmanager, suppress
from functools import partial, wraps
from math import inf
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import click

from penstock.cli.host import say
from penstock.cli.options import CONTEXT, option
from penstock.runs import RunStatus, check_run_id

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from penstock.cli.api import ApiClient

CANNOT: Final = 1
INTERRUPTED: Final = 128 + signal.SIGINT
TERMINATED: Final = 128 + signal.SIGTERM
MAX_LIST: Final = 1000
POLL_INTERVAL: Final = 0.2  # seconds between two checks whether standard output still has a reader
_TOKEN: Final = re.compile(r"[\x21-\x7e]+")
_SEQ: Final = click.IntRange(0, 10**18 - 1)


# Options


def _connection_options(*, group: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options that name the server; the group has them, and each command has them again."""
    each = option if group else partial(click.option, allow_from_autoenv=False, show_default=False)
    url: dict[str, Any] = {"default": "http://127.0.0.1:8000"} if group else {}

    def with_options(function: Callable[..., None]) -> Callable[..., None]:
        for add in (
            each(
                "--cafile",
                metavar="PATH",
                help="Trust the authority whose certificate is in this file (PEM), instead of the usual ones.",
            ),
            each(
                "--token",
                metavar="TOKEN",
                help="The token to send, as `Authorization: Bearer TOKEN`. Keep it in PENSTOCK_TOKEN: every user of "
                "this machine can read a command line in the list of processes.",
            ),
            each("--url", metavar="URL", help="The URL of the server; PENSTOCK_URL sets it, too.", **url),
        ):
            function = add(function)
        return function

    return with_options


def _client(url: str, token: str | None, cafile: str | None) -> ApiClient:
    """Check the options, whose values may hold secrets: no message repeats them."""
    from penstock.cli.api import ApiClient  # noqa: PLC0415  (see above)

    try:
        parts = urlsplit(url)
        usable = parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    else:
        if parts.username is not None or parts.password is not None:
            raise click.BadParameter("a name or a password has no place in it; there is --token", param_hint="--url")
    if not usable or not url.isprintable() or " " in url or "?" in url or "#" in url:
        raise click.BadParameter("it is no URL of a server, such as http://127.0.0.1:8000", param_hint="--url")
    if token is not None and _TOKEN.fullmatch(token) is None:
        raise click.BadParameter("a token is visible ASCII characters, without blanks", param_hint="--token")
    tls = None
    if cafile is not None:
        try:
            tls = ssl.create_default_context(cafile=cafile)
        except OSError as error:  # SSLError is one, too
            message = f"{cafile} cannot be read: {error.strerror}"
            if isinstance(error, ssl.SSLError):
                message = (
                    f"there is no certificate of an authority in {cafile}: in PEM it begins with -----BEGIN CERTIFICATE"
                )
            raise click.BadParameter(message, param_hint="--cafile") from None
    return ApiClient(url.rstrip("/"), token, tls)


def _run_id(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    try:
        return check_run_id(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _command(group: click.Group, **settings: Any) -> Callable[[Callable[..., None]], click.Command]:
    """A command of the group, whose function gets a client; a failure becomes one line and an exit code."""

    def decorated(function: Callable[..., None]) -> click.Command:
        @wraps(function)
        @click.pass_context
        def run(ctx: click.Context, /, **given: Any) -> None:
            from penstock.cli.api import CommandFailed, ConnectionFailed  # noqa: PLC0415  (see above)
            from penstock.cli.terminal import warn  # noqa: PLC0415

            own = {name: given.pop(name) for name in ("url", "token", "cafile")}
            where = {name: ctx.obj[name] if value is None else value for name, value in own.items()}
            if isinstance(sys.stdout, io.TextIOWrapper):
                if isinstance(sys.stdout.buffer, io.RawIOBase):  # python -u: a signal would cut a long write short
                    sys.stdout = io.TextIOWrapper(io.BufferedWriter(sys.stdout.buffer), sys.stdout.encoding)
                sys.stdout.reconfigure(errors="backslashreplace")  # its encoding may lack characters of a producer's
            try:
                with _client(**where) as client:
                    function(client, **given)
            except (CommandFailed, ConnectionFailed) as error:
                warn(str(error))
                sys.exit(CANNOT)
            except KeyboardInterrupt:
                say("stopped")
                sys.exit(INTERRUPTED)

        return group.command(context_settings=CONTEXT, **settings)(_connection_options(group=False)(run))

    return decorated


_json: Final = partial(option, "--json", "as_json", envvar="PENSTOCK_JSON", is_flag=True)
_argument: Final = click.argument("run_id", metavar="RUN_ID", callback=_run_id)


@click.group(context_settings=CONTEXT)
@_connection_options(group=True)
@click.pass_context
def runs(ctx: click.Context, /, **where: str | None) -> None:
    """List, show, follow and cancel the runs of a server.

    \b
    Examples:
      penstock runs list --status running
      penstock runs follow exec | head
      penstock runs follow r1 --json --after 41 | jq -r .data
      penstock runs --url https://runs.example.com cancel r1 --reason enough
    """  # noqa: D301  (click reads this backspace as: leave these lines as they are)
    ctx.obj = where


# Commands


@_command(runs, name="list")
@option("--limit", default=20, type=click.IntRange(1, MAX_LIST), metavar="RUNS", help="The most runs to list.")
@option("--status", type=click.Choice([each.value for each in RunStatus]), help="List only runs with this status.")
@_json(help="Print the records as the server sends them, one JSON object per line.")
def list_runs(client: ApiClient, /, *, limit: int, status: str | None, as_json: bool) -> None:
    """List the runs of the server, the newest first."""
    from penstock.cli import api, terminal  # noqa: PLC0415  (see above)

    params: dict[str, str | int] = {"limit": limit} if status is None else {"limit": limit, "status": status}
    records = api.runs_in(client.ask("GET", "/v1/runs", params=params))
    if as_json:
        for record in records:
            terminal.emit(json.dumps(record))
    elif records:
        terminal.show(terminal.table_of(records))
    else:
        say("there are no runs" + ("" if status is None else f" that are {status}"))


@_command(runs, name="show")
@_argument
@_json(help="Print the record as the server sends it, on one line.")
def show_run(client: ApiClient, /, *, run_id: str, as_json: bool) -> None:
    """Show the record of a run."""
    from penstock.cli import api, terminal  # noqa: PLC0415  (see above)

    record = api.record_in(client.ask("GET", f"/v1/runs/{run_id}"))
    if as_json:
        terminal.emit(json.dumps(record))
    else:
        terminal.show(terminal.fields_of(record))


@_command(runs, name="cancel")
@_argument
@option("--reason", metavar="TEXT", help="Why; the run's readers see it.")
@_json(help="Print the record as the server sends it, on one line.")
def cancel_run(client: ApiClient, /, *, run_id: str, reason: str | None, as_json: bool) -> None:
    """Ask a run to stop. The exit code is 1 if it had ended already."""
    from penstock.cli import api, terminal  # noqa: PLC0415  (see above)

    body = {} if reason is None else {"reason": reason}
    result = api.cancelled_in(client.ask("POST", f"/v1/runs/{run_id}/cancel", json=body))
    message = terminal.visible(f"run {run_id} {result.outcome}", one_line=True)
    terminal.emit(json.dumps(result.record) if as_json else message)
    if result.ended:
        sys.exit(CANNOT)


FOLLOW_CODES: Final = """\b
Exit codes:
  0  the run completed          3  it was cancelled           5  it was lost
  1  it cannot be followed on   4  it failed                  6  it completed, but events are missing
  2  a wrong argument           130, 143  Ctrl-C, SIGTERM
"""


@_command(runs, name="follow", epilog=FOLLOW_CODES, short_help="Print every event of a run once, in order.")
@_argument
@option("--after", default=0, type=_SEQ, metavar="ID", help="Begin after the event with this id.")
@option("--tail", type=_SEQ, metavar="EVENTS", help="Begin with the last so many events.")
@option(
    "--give-up-after",
    default=60.0,
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="How long to retry while there is no stream; 0 = without limit.",
)
@option("--quiet", is_flag=True, help="Print no progress to standard error, but warnings and errors.")
@_json(help='Print one JSON object per line: {"id": 7, "event": "message", "data": "..."}.')
def follow_run(
    client: ApiClient, /, *, run_id: str, after: int, tail: int | None, give_up_after: float, quiet: bool, as_json: bool
) -> None:
    """Print every event of a run once, in order, until the run has ended: its id, its type, its data.

    It reconnects by itself when a connection breaks, a server restarts, or a server asks it to wait. An event that a
    server sends twice is printed once. The last event of a run is [DONE]. The last line on standard error and the exit
    code say how the run ended.
    """
    from penstock.cli.follow import follow  # noqa: PLC0415  (see above)

    limit = give_up_after if give_up_after > 0 else inf
    with _ending_in_order():
        sys.exit(follow(client, run_id, after=after, tail=tail, give_up_after=limit, quiet=quiet, as_json=as_json))


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """End on SIGTERM, so that the terminal is restored; and when the reader of standard output has closed it."""
    if sys.platform == "win32":  # it has no such signals
        yield
        return

    from penstock.cli.terminal import leave_unread  # noqa: PLC0415  (see above)

    def check(*_signal: object) -> None:
        if any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in poll.poll(0)):
            leave_unread()

    poll = select.poll()
    fd = _stdout_pipe()
    on_alarm = signal.getsignal(signal.SIGALRM)
    on_terminate = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        if fd is not None:
            poll.register(fd, 0)
            signal.signal(signal.SIGALRM, check)
            signal.setitimer(signal.ITIMER_REAL, POLL_INTERVAL, POLL_INTERVAL)
        yield
    finally:
        if fd is not None:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, on_alarm)
        signal.signal(signal.SIGTERM, on_terminate)


def _stdout_pipe() -> int | None:
    """The file descriptor of standard output, if that is a pipe; a file and a terminal have no reader to lose."""
    with suppress(OSError, ValueError, AttributeError):  # it is closed, or not of this process
        fd = sys.stdout.fileno()
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            return fd
    return None
