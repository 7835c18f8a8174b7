"""`penstock serve`: its options, its announcement, and its roles: a single process, a parent of workers, a worker."""

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
from penstock.cli.host import WORKER_OPTION, LogConfig, curl, host, host_workers, say
from penstock.cli.options import (
    ARGUMENTS,
    AUTH_OPTIONS,
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
from penstock.log.open import open_log
from penstock.server.config import MAX_HEADER_BYTES, MAX_USER_TIMEOUT, USER_TIMEOUT, new_config
from penstock.server.workers import DEATHS, DEATHS_WITHIN, ParentLink

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.asgi.lifespan import AppLifespan
    from penstock.server.serve import Shutdown

LEAST_HEADER_BYTES: Final = 1024  # a browser's own headers take about this many bytes
FROM_1: Final = click.IntRange(min=1)
ABOVE_0: Final = click.FloatRange(min=0, min_open=True)
EXIT_CODES: Final = """\b
Exit codes:
  0  a clean shutdown           2  a wrong argument
  1  a service of the server died, or the log could not be reached at the start or at the end
  3  a producer ignored its cancellation
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
    help="The event log. memory:// is this process's memory and ends with it; redis://[:PASSWORD@]HOST[:PORT][/DB] "
    "(rediss:// over TLS, unix:///PATH) is a Redis that any number of servers share; "
    "redis+sentinel://HOST[:PORT],.../SERVICE[/DB] is the Redis that Sentinels name; redis+cluster://HOST[:PORT],... "
    "is a cluster. Keep a password in the environment variable rather than here.",
)
@shared_options
@authorization_options
@option("--ttl", default=10_800.0, metavar="SECONDS", type=ABOVE_0, help="How long a run is kept after its end.")
@option("--max-entries", default=10_000, metavar="ENTRIES", type=FROM_1, help="How many entries of one run are kept.")
@option(
    "--prefix",
    default="sse:run:",
    metavar="PREFIX",
    help="The prefix of the keys of entries in Redis. It ends with run:; other keys begin with what is before that.",
)
@option(
    "--wait-replicas",
    default=0,
    metavar="REPLICAS",
    type=click.IntRange(min=0),
    help="How many Redis replicas must have a write before it counts: a failover then loses less, and each commit "
    "takes longer.",
)
@option(
    "--ping-interval",
    default=15.0,
    metavar="SECONDS",
    type=click.FloatRange(min=0),
    help="How long a stream may be silent before it sends a ping; 0 = never.",
)
@option(
    "--max-body-bytes",
    default=MAX_BODY_BYTES,
    show_default=binary(MAX_BODY_BYTES),
    metavar="BYTES",
    type=FROM_1,
    help="The largest body of a request.",
)
@option(
    "--body-timeout",
    default=BODY_TIMEOUT,
    metavar="SECONDS",
    type=ABOVE_0,
    help="How long a request's body may take to arrive.",
)
@option(
    "--max-header-bytes",
    default=MAX_HEADER_BYTES,
    show_default=binary(MAX_HEADER_BYTES),
    metavar="BYTES",
    type=click.IntRange(min=LEAST_HEADER_BYTES),
    help="The largest headers of a request, including its first line.",
)
@option(
    "--workers",
    default=1,
    metavar="WORKERS",
    type=FROM_1,
    help="How many processes serve behind the same address. Several need a log that they share, such as redis://.",
)
@option(
    "--max-worker-deaths",
    default=DEATHS,
    metavar="DEATHS",
    type=FROM_1,
    help=f"A worker that dies is replaced; so many deaths within {DEATHS_WITHIN:g} s end the server.",
)
@option(
    "--certfile",
    metavar="PATH",
    help="Serve TLS with this certificate (PEM, with its chain). Browsers then use HTTP/2; otherwise they read no "
    "more than six streams at a time.",
)
@option("--keyfile", metavar="PATH", help="The certificate's private key (PEM), if it is not in the same file.")
@option(
    "--tcp-user-timeout",
    default=USER_TIMEOUT,
    metavar="SECONDS",
    type=click.FloatRange(min=0, max=MAX_USER_TIMEOUT),
    help="How long a client may read nothing before its connection is closed; 0 = as long as the system allows. "
    "Linux only.",
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
    **settings: Any,
) -> None:
    """Serve producers over HTTP, with a page for browsers.

    Ctrl-C or SIGTERM drains: no run can be started any more, the present runs may go on for --drain-timeout, then they
    are interrupted. A second signal skips the waiting. Every run gets its last entry.

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
    auth = auth_options(worker=inherit is not None, **{name: settings.pop(name) for name in AUTH_OPTIONS})
    if workers > 1 and inherit is None:
        given: list[str] = ctx.meta[ARGUMENTS]
        arguments = given[given.index(str(ctx.info_name)) + 1 :]
        announce_first = partial(announce, log_url=log_url, workers=workers)
        with listening(bind, anywhere=auth.anywhere) as sockets:
            sys.exit(host_workers(workers, sockets, arguments, max_worker_deaths, auth.for_workers, announce_first))
    link, inherited = (None, []) if inherit is None else _inherited(inherit)
    from penstock.asgi.app import create_app  # noqa: PLC0415  (a parent of workers does without Starlette)

    try:
        make_app = partial(
            create_app,
            load_producers(producers),
            **auth.for_app,
            ping_interval=ping_interval or None,
            max_body_bytes=max_body_bytes,
            body_timeout=body_timeout,
            **settings,
        )
    except (ConfigurationError, ModuleFailed) as error:
        if isinstance(error, ModuleFailed):
            click.echo(error.traceback, err=True, nl=False)
        raise click.BadParameter(str(error), param_hint="--producers") from None
    log = open_log(log_url, ttl=ttl, max_entries=max_entries, prefix=prefix, wait_replicas=wait_replicas)
    config = new_config(max_header_bytes)
    config.certfile, config.keyfile = certfile, keyfile
    run = partial(
        host, make_app, log, config, log_config=LogConfig(log_level, log_format), tcp_user_timeout=tcp_user_timeout
    )
    if link is not None:
        sys.exit(run(inherited, ready=partial(_report, link), link=link))
    with listening(bind, anywhere=auth.anywhere) as sockets:
        sys.exit(run(sockets, ready=partial(_announce_itself, log_url)))


def _inherited(numbers: str) -> tuple[ParentLink, list[socket.socket]]:
    """The link and the sockets that a worker inherits from its parent."""
    number, link_fd, *fds = map(int, numbers.split(","))
    link = ParentLink(number, link_fd)
    link.keep_signals()
    sockets = [socket.socket(fileno=fd) for fd in fds]
    for sock in sockets:
        sock.set_inheritable(False)
    return link, sockets


async def _report(link: ParentLink, lifespan: AppLifespan, urls: Sequence[str], _shutdown: Shutdown) -> None:
    await link.ready(_summary(lifespan, urls))


async def _announce_itself(log_url: str, lifespan: AppLifespan, urls: Sequence[str], _shutdown: Shutdown) -> None:
    announce(_summary(lifespan, urls), log_url=log_url, workers=1)


def _summary(lifespan: AppLifespan, urls: Sequence[str]) -> str:
    """What `announce` needs to know of a server, as text that a worker can send to its parent."""
    return json.dumps([list(urls), sorted(lifespan.producers), lifespan.access.authorizer is not None])


def announce(summary: str, *, log_url: str, workers: int) -> None:
    """Say what is served, where, and how to try it."""
    urls, names, authenticated = json.loads(summary)
    several = f"{workers} workers, " if workers > 1 else ""
    say(f"serving on {' and '.join(urls)} ({several}log: {log_url.partition('?')[0].rpartition('@')[2]})")
    say(f"producers: {', '.join(names) or 'none, so that nothing can be started'}")
    if names:
        body = json.dumps({"producer": names[0], "input": "hello", "stream": True}, ensure_ascii=False)
        say(f"try:  {curl('-N', authenticated=authenticated)} -d {shlex.quote(body)} {urls[0]}/v1/runs")
    if authenticated and any(url.startswith("http:") and not _is_local(url) for url in urls):
        say("note: tokens cross the network unencrypted; give --certfile, or put a proxy that speaks TLS in front")
    say(f"or open {urls[0]}/ in a browser; Ctrl-C stops")


def _is_local(url: str) -> bool:
    return ipaddress.ip_address((urlsplit(url).hostname or "").partition("%")[0]).is_loopback


def _check(workers: int, log_url: str, certfile: str | None, keyfile: str | None) -> None:
    if workers > 1 and log_url.startswith("memory:"):
        raise click.BadParameter(
            "memory:// is one process's memory, which several workers do not share; give them a Redis, with "
            "--log redis://localhost, or serve with one",
            param_hint="--workers",
        )
    if workers > 1 and sys.platform == "win32":
        raise click.BadParameter("this system passes no sockets on to other processes", param_hint="--workers")
    if certfile is None and keyfile is not None:
        raise click.BadParameter("a private key alone is no certificate; give --certfile, too", param_hint="--keyfile")
    if certfile is not None and keyfile is not None:
        try:
            check_certificate(certfile, keyfile)
        except ConfigurationError as error:
            raise click.BadParameter(str(error), param_hint="--certfile") from None
