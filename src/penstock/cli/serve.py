"""`penstock serve`: its options, what it says, and whether it is one process, several workers' parent, or a worker."""

from __future__ import annotations

import ipaddress
import json
import shlex
import socket
import sys
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import click

from penstock.asgi.lifespan import BODY_TIMEOUT, MAX_BODY_BYTES
from penstock.cli.host import WORKER_OPTION, Hosted, LogConfig, curl, host, host_workers, say
from penstock.cli.options import (
    ARGUMENTS,
    CONTEXT,
    auth_options,
    authorization_options,
    binary,
    option,
    settings_options,
    shared_options,
)
from penstock.cli.producers import ModuleFailed, load_producers
from penstock.cli.sockets import check_certificate, listening
from penstock.errors import ConfigurationError
from penstock.server.hypercorn_fixes.connection import MAX_USER_TIMEOUT
from penstock.server.serve import MAX_HEADER_BYTES, USER_TIMEOUT
from penstock.server.workers import DEATHS, DEATHS_WITHIN, ParentLink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.asgi.lifespan import AppLifespan
    from penstock.server.serve import Shutdown

LEAST_HEADER_BYTES: Final = 1024
"""A browser's own headers take about this much."""
EXIT_CODES: Final = """\b
Exit codes:
  0  a clean shutdown           2  a wrong argument
  1  a part of the server died, or the log could not be reached, to begin with or in the end
  3  a producer would not let go
"""


@click.command(epilog=EXIT_CODES, context_settings=CONTEXT)
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
    "(rediss:// over TLS, unix:///PATH) is a Redis that any number of servers share; "
    "redis+sentinel://HOST[:PORT],.../SERVICE[/DB] is the one that Sentinels name, redis+cluster://HOST[:PORT],... a "
    "cluster. A password is better kept in the environment variable.",
)
@shared_options
@authorization_options
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
    "--wait-replicas",
    default=0,
    metavar="REPLICAS",
    type=click.IntRange(min=0),
    help="How many replicas must have a write in Redis before it counts: a failover then loses less, and each commit "
    "takes longer.",
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
@option(
    "--body-timeout",
    default=BODY_TIMEOUT,
    metavar="SECONDS",
    type=click.FloatRange(min=0, min_open=True),
    help="How long a request's body may take to arrive.",
)
@option(
    "--max-header-bytes",
    default=MAX_HEADER_BYTES,
    show_default=binary(MAX_HEADER_BYTES),
    metavar="BYTES",
    type=click.IntRange(min=LEAST_HEADER_BYTES),
    help="The largest headers of a request, with its first line.",
)
@option(
    "--workers",
    default=1,
    metavar="WORKERS",
    type=click.IntRange(min=1),
    help="How many processes serve behind the same address. Several need a log that they share, such as redis://.",
)
@option(
    "--max-worker-deaths",
    default=DEATHS,
    metavar="DEATHS",
    type=click.IntRange(min=1),
    help=f"A worker that dies is replaced; so many that die within {DEATHS_WITHIN:g} s end the server.",
)
@option(
    "--certfile",
    metavar="PATH",
    help="Serve TLS with this certificate (PEM, with those that vouch for it). Browsers then use HTTP/2; otherwise "
    "they read no more than six streams at a time.",
)
@option("--keyfile", metavar="PATH", help="The certificate's private key (PEM), if it is not in the same file.")
@option(
    "--tcp-user-timeout",
    default=USER_TIMEOUT,
    metavar="SECONDS",
    type=click.FloatRange(min=0, max=MAX_USER_TIMEOUT),
    help="After how long a client that takes nothing in is given up; 0 = when the system does. Linux only.",
)
@click.option(WORKER_OPTION, "inherit", hidden=True, allow_from_autoenv=False)
@settings_options
@click.pass_context
def serve(
    ctx: click.Context,
    /,
    *,
    producers: str,
    log_url: str,
    bind: Sequence[str],
    log_level: str,
    log_format: str,
    token: str | None,
    tokens: str | None,
    link_secret: str | None,
    allow_origin: Sequence[str],
    allow_host: Sequence[str],
    insecure: bool,
    ttl: float,
    max_entries: int,
    prefix: str,
    wait_replicas: int,
    ping_interval: float,
    max_body_bytes: int,
    body_timeout: float,
    max_header_bytes: int,
    workers: int,
    max_worker_deaths: int,
    certfile: str | None,
    keyfile: str | None,
    tcp_user_timeout: float,
    inherit: str | None,
    **knobs: Any,
) -> None:
    """Serve producers over HTTP, with a page for browsers.

    Ctrl-C or SIGTERM drains: no new runs, those that are there may go on for --drain-timeout, then they are
    interrupted; a second signal skips the waiting. Every run gets its last entry.

    \b
    Examples:
      penstock serve --producers mypackage.agents:producers
      penstock serve --producers ./agents.py:producers --bind 127.0.0.1:0 --cancel-grace 3
      penstock serve --producers agents:producers --log redis://localhost --workers 4
      penstock serve --producers agents:producers --certfile cert.pem --keyfile key.pem
      PENSTOCK_TOKEN=... penstock serve --producers agents:producers --bind 0.0.0.0:8000
      PENSTOCK_BIND="127.0.0.1:8000 [::1]:8000" penstock serve --producers agents:producers
    """  # noqa: D301  (click takes this backspace for: leave these lines as they are)
    keyfile = keyfile or certfile
    _check(workers, log_url, certfile, keyfile)
    admitted = auth_options(
        token=token,
        tokens=tokens,
        link_secret=link_secret,
        allow_origin=allow_origin,
        allow_host=allow_host,
        insecure=insecure,
        worker=inherit is not None,
    )
    if workers > 1 and inherit is None:
        words: list[str] = ctx.meta[ARGUMENTS]
        arguments = words[words.index(str(ctx.info_name)) + 1 :]
        with listening(bind, anywhere=admitted.anywhere) as sockets:
            announce = partial(_announce, log_url=log_url, workers=workers)
            sys.exit(host_workers(workers, sockets, arguments, max_worker_deaths, admitted.for_workers, announce))
    link, inherited = (None, []) if inherit is None else _inherited(inherit)
    try:
        hosted = Hosted(
            load_producers(producers),
            admitted,
            log_url=log_url,
            limits={"ttl": ttl, "max_entries": max_entries, "prefix": prefix, "wait_replicas": wait_replicas},
            ping_interval=ping_interval or None,
            max_body_bytes=max_body_bytes,
            body_timeout=body_timeout,
            max_header_bytes=max_header_bytes,
            knobs=knobs,
            tcp_user_timeout=tcp_user_timeout,
            certfile=certfile,
            keyfile=keyfile,
        )
    except ConfigurationError as error:
        raise click.BadParameter(str(error), param_hint="--producers") from None
    except ModuleFailed as error:
        click.echo(error.traceback, err=True, nl=False)
        raise click.BadParameter(str(error), param_hint="--producers") from None
    notes = LogConfig(log_level, log_format)
    if link is not None:
        sys.exit(host(hosted, inherited, notes=notes, ready=partial(_report, link), link=link))
    with listening(bind, anywhere=admitted.anywhere) as sockets:
        sys.exit(host(hosted, sockets, notes=notes, ready=partial(_ready, log_url)))


def _inherited(words: str) -> tuple[ParentLink, list[socket.socket]]:
    """What a worker has from its parent."""
    number, link_fd, *fds = map(int, words.split(","))
    link = ParentLink(number, link_fd)
    link.keep_signals()
    sockets = [socket.socket(fileno=fd) for fd in fds]
    for sock in sockets:
        sock.set_inheritable(False)
    return link, sockets


async def _report(link: ParentLink, service: AppLifespan, urls: Sequence[str], _shutdown: Shutdown) -> None:
    """Tell the parent what there is to announce."""
    await link.ready(_news(service, urls))


async def _ready(log_url: str, service: AppLifespan, urls: Sequence[str], _shutdown: Shutdown) -> None:
    _announce(_news(service, urls), log_url=log_url, workers=1)


def _news(service: AppLifespan, urls: Sequence[str]) -> str:
    return json.dumps([list(urls), sorted(service.producers), service.access.authorizer is not None])


def _announce(news: str, *, log_url: str, workers: int) -> None:
    """Say what is served, where, and how to try it."""
    urls, names, asks = json.loads(news)
    several = f"{workers} workers, " if workers > 1 else ""
    say(f"serving on {' and '.join(urls)} ({several}log: {log_url.partition('?')[0].rpartition('@')[2]})")
    say(f"producers: {', '.join(names) or 'none, so that nothing can be started'}")
    if names:
        body = json.dumps({"producer": names[0], "input": "hello", "stream": True}, ensure_ascii=False)
        say(f"try:  {curl('-N', asks=asks)} -d {shlex.quote(body)} {urls[0]}/v1/runs")
    if asks and any(url.startswith("http:") and not _stays_here(url) for url in urls):
        say("note: tokens cross the network unencrypted; give --certfile, or put a proxy that speaks TLS in front")
    say(f"or open {urls[0]}/ in a browser; Ctrl-C stops")


def _stays_here(url: str) -> bool:
    """Whether what is sent to this URL stays on this machine."""
    return ipaddress.ip_address((urlsplit(url).hostname or "").partition("%")[0]).is_loopback


def _check(workers: int, log_url: str, certfile: str | None, keyfile: str | None) -> None:
    """Refuse what does not go together."""
    if workers > 1 and log_url.startswith("memory:"):
        raise click.BadParameter(
            "memory:// is one process's memory, and several workers have nothing in common there; give them a Redis, "
            "with --log redis://localhost, or serve with one",
            param_hint="--workers",
        )
    if workers > 1 and sys.platform == "win32":
        raise click.BadParameter("this system hands no sockets on to other processes", param_hint="--workers")
    if certfile is None and keyfile is not None:
        raise click.BadParameter("a private key alone is no certificate; give --certfile, too", param_hint="--keyfile")
    if certfile is not None and keyfile is not None:
        try:
            check_certificate(certfile, keyfile)
        except ConfigurationError as error:
            raise click.BadParameter(str(error), param_hint="--certfile") from None
