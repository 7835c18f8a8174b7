"""`penstock runs list | show | follow | cancel`: runs of a server, for people and for programs.

Here are the commands and their options. `client.py` asks the server, `following.py` follows a run, `screen.py` is what
a terminal sees. They are imported when a command is carried out: what they need is not needed for a `--help`.

Standard output is for what was asked for, standard error for everything else.
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
LOOK: Final = 0.2
"""Seconds between two looks whether anybody still reads standard output."""
_TOKEN: Final = re.compile(r"[\x21-\x7e]+")


# Options


def _connection_options(*, group: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The options that say where the server is, as the group has them, and as each command has them again."""
    each = option if group else partial(click.option, allow_from_autoenv=False, show_default=False)
    url: dict[str, Any] = {"default": "http://127.0.0.1:8000"} if group else {}

    def with_options(function: Callable[..., None]) -> Callable[..., None]:
        for given in (
            each(
                "--cafile",
                metavar="PATH",
                help="Trust the authority whose certificate is in this file (PEM), and not the usual ones.",
            ),
            each(
                "--token",
                metavar="TOKEN",
                help="What lets you in, sent as `Authorization: Bearer TOKEN`. Better kept in PENSTOCK_TOKEN: every "
                "user of this machine may see the words of a command line in the list of processes.",
            ),
            each("--url", metavar="URL", help="Where the server is; PENSTOCK_URL says the same.", **url),
        ):
            function = given(function)
        return function

    return with_options


def _server(url: str, token: str | None, cafile: str | None) -> ApiClient:
    """Where the server is, checked. No value is repeated: there may be secrets in it.

    Raises:
        BadParameter: there can be no server there.
    """
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
        except ssl.SSLError:
            words = f"there is no certificate of an authority in {cafile}: in PEM it begins with -----BEGIN CERTIFICATE"
            raise click.BadParameter(words, param_hint="--cafile") from None
        except OSError as error:
            words = f"{cafile} cannot be read: {error.strerror}"
            raise click.BadParameter(words, param_hint="--cafile") from None
    return ApiClient(url.rstrip("/"), token, tls)


def _run_id(_ctx: click.Context, _parameter: click.Parameter, value: str) -> str:
    try:
        return check_run_id(value)
    except ValueError as error:
        raise click.BadParameter(str(error)) from None


def _command(runs: click.Group, **settings: Any) -> Callable[[Callable[..., None]], click.Command]:
    """A command of the group: what it does is given a server, and what ends it early becomes one line and a code."""

    def decorated(function: Callable[..., None]) -> click.Command:
        @wraps(function)
        @click.pass_context
        def run(ctx: click.Context, /, **given: Any) -> None:
            from penstock.cli.api import CommandFailed, ConnectionFailed  # noqa: PLC0415  (see above)
            from penstock.cli.terminal import tell  # noqa: PLC0415

            own = {name: given.pop(name) for name in ("url", "token", "cafile")}
            where = {name: ctx.obj[name] if value is None else value for name, value in own.items()}
            if isinstance(sys.stdout, io.TextIOWrapper):
                sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may know fewer characters than others
            try:
                with _server(**where) as server:
                    function(server, **given)
            except (CommandFailed, ConnectionFailed) as error:
                tell(str(error))
                sys.exit(CANNOT)
            except KeyboardInterrupt:
                say("stopped")
                sys.exit(INTERRUPTED)

        return runs.command(context_settings=CONTEXT, **settings)(_connection_options(group=False)(run))

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
    """  # noqa: D301  (click takes this backspace for: leave these lines as they are)
    ctx.obj = where


# Commands


@_command(runs, name="list")
@option("--limit", default=20, type=click.IntRange(1, MAX_LIST), metavar="RUNS", help="How many of them.")
@option("--status", type=click.Choice([each.value for each in RunStatus]), help="Only those that are at this point.")
@_json(help="One JSON object per line: the records as they come.")
def list_runs(server: ApiClient, /, *, limit: int, status: str | None, as_json: bool) -> None:
    """The runs of the server, the newest first."""
    from penstock.cli.api import runs_in  # noqa: PLC0415  (see above)
    from penstock.cli.terminal import emit, show, table_of  # noqa: PLC0415

    query: dict[str, str | int] = {"limit": limit} if status is None else {"limit": limit, "status": status}
    records = runs_in(server.ask("GET", "/v1/runs", query=query))
    if as_json:
        for record in records:
            emit(json.dumps(record))
    elif records:
        show(table_of(records))
    else:
        say("there are no runs" + ("" if status is None else f" that are {status}"))


@_command(runs, name="show")
@_argument
@_json(help="The record on one line, as it comes.")
def show_run(server: ApiClient, /, *, run_id: str, as_json: bool) -> None:
    """Everything that is known of a run, but its events."""
    from penstock.cli.api import record_in  # noqa: PLC0415  (see above)
    from penstock.cli.terminal import emit, fields_of, show  # noqa: PLC0415

    record = record_in(server.ask("GET", f"/v1/runs/{run_id}"))
    if as_json:
        emit(json.dumps(record))
    else:
        show(fields_of(record))


@_command(runs, name="cancel")
@_argument
@option("--reason", metavar="WORDS", help="Why; whoever follows the run is told.")
@_json(help="The record on one line, as it comes.")
def cancel_run(server: ApiClient, /, *, run_id: str, reason: str | None, as_json: bool) -> None:
    """Ask a run to stop. The exit code is 1 if it had ended already."""
    from penstock.cli.api import cancelled_in  # noqa: PLC0415  (see above)
    from penstock.cli.terminal import emit, visible  # noqa: PLC0415

    body = {} if reason is None else {"reason": reason}
    met = cancelled_in(server.ask("POST", f"/v1/runs/{run_id}/cancel", body=body))
    emit(json.dumps(met.record) if as_json else visible(f"run {run_id} {met.words}", one_line=True))
    if met.ended:
        sys.exit(CANNOT)


FOLLOW_CODES: Final = """\b
Exit codes:
  0  the run completed          3  it was cancelled           5  it was lost
  1  it cannot be followed on   4  it failed                  6  it completed, but events are missing
  2  a wrong argument           130, 143  Ctrl-C, SIGTERM
"""


@_command(runs, name="follow", epilog=FOLLOW_CODES, short_help="Print every event of a run once, in order.")
@_argument
@option(
    "--after", default=0, type=click.IntRange(0, 10**18 - 1), metavar="ID", help="Begin after the event of this id."
)
@option("--tail", type=click.IntRange(0, 10**18 - 1), metavar="EVENTS", help="Begin with the last so many events.")
@option(
    "--give-up-after",
    default=60.0,
    type=click.FloatRange(min=0),
    metavar="SECONDS",
    help="For how long to try when there is no stream to be had; 0 = for ever.",
)
@option("--quiet", is_flag=True, help="Nothing about progress on standard error; what goes wrong is said all the same.")
@_json(help='One JSON object per line: {"id": 7, "event": "message", "data": "..."}.')
def follow_run(
    server: ApiClient, /, *, run_id: str, after: int, tail: int | None, give_up_after: float, quiet: bool, as_json: bool
) -> None:
    """Print every event of a run once, in order, until the run has ended: its id, its type, its data.

    It goes on by itself when a connection breaks, a server is restarted, or one asks for patience; whatever a server
    sends twice is printed once. The last event of a run is [DONE]. How it ended is said on standard error, and is the
    exit code.
    """
    from penstock.cli.follow import follow  # noqa: PLC0415  (see above)

    limit = give_up_after if give_up_after > 0 else inf
    with _leaving_in_order():
        sys.exit(follow(server, run_id, after=after, tail=tail, give_up_after=limit, quiet=quiet, as_json=as_json))


@contextmanager
def _leaving_in_order() -> Iterator[None]:
    """SIGTERM leaves a terminal as it should be; and nobody at the other end of standard output ends a silent wait."""
    if sys.platform == "win32":  # where there are no such signals
        yield
        return

    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        with _noticed_unread():
            yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _noticed_unread() -> Iterator[None]:
    """If standard output is a pipe: look now and then whether anybody has its other end, and leave if not."""
    from penstock.cli.terminal import leave_unread  # noqa: PLC0415  (see above)

    def look(*_signal: object) -> None:
        if any(event & (select.POLLERR | select.POLLHUP | select.POLLNVAL) for _, event in poll.poll(0)):
            leave_unread()

    fd = _pipe()
    if fd is None:
        yield
        return
    poll = select.poll()
    poll.register(fd, 0)
    ticking = signal.signal(signal.SIGALRM, look)
    signal.setitimer(signal.ITIMER_REAL, LOOK, LOOK)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, ticking)


def _pipe() -> int | None:
    """The file descriptor of standard output, if that is a pipe; a file and a terminal have no other end."""
    with suppress(OSError, ValueError, AttributeError):  # it is closed, or not of this process
        fd = sys.stdout.fileno()
        if stat.S_ISFIFO(os.fstat(fd).st_mode):
            return fd
    return None
