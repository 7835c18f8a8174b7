"""A server in a process of its own: its sockets, its words on the terminal, its exit code.

| code | what happened |
|---|---|
| 0 | a clean shutdown |
| 1 | a service of the supervisor died |
| 2 | a wrong argument |
| 3 | a producer would not let go: the process ended without it |

Sockets are bound here and handed to Hypercorn, so that a port in use, or an address that everybody can reach, is
known before anything starts.
"""

from __future__ import annotations

import ipaddress
import logging
import os
import socket
import sys
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click
import trio

from penstock.errors import ConfigurationError, Draining, LogUnavailable, SupervisorFailed, single_error
from penstock.groups import raise_bare
from penstock.http.app import MAX_BODY_BYTES, create_app
from penstock.http.server import ABANDON_AFTER, new_config, serve
from penstock.log.urls import open_log

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from penstock.http.app import Service
    from penstock.observer import Observer
    from penstock.supervisor import StuckRun

SERVICE_DIED: Final = 1
STUCK: Final = 3
MAX_PORT: Final = 65535


@dataclass(frozen=True, slots=True)
class Hosted:
    """What a server serves, and how.

    Attributes:
        producers: what runs can be started of.
        log_url: the event log.
        limits: `open_log`'s `ttl`, `max_entries` and `prefix`.
        ping_interval: see `create_app`.
        max_body_bytes: see `create_app`.
        knobs: the supervisor's.
        observer: told of what happens; by default it goes to penstock's log.
    """

    producers: Mapping[str, Any]
    log_url: str = "memory://"
    limits: Mapping[str, Any] = field(default_factory=dict)
    ping_interval: float | None = 15.0
    max_body_bytes: int = MAX_BODY_BYTES
    knobs: Mapping[str, Any] = field(default_factory=dict)
    observer: Observer | None = None


def say(words: str) -> None:
    """One line to the terminal; standard output is for others."""
    click.echo(f"penstock: {words}", err=True)


def log_to_stderr(level: str) -> logging.Logger:
    """Send what is logged to stderr: penstock's from `level` on, all else from WARNING on; Hypercorn's logger."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger("penstock").setLevel(level.upper())
    return logging.getLogger("hypercorn.error")


def listen(binds: Sequence[str], *, insecure: bool) -> list[socket.socket]:
    """Bind and listen, on all of the addresses or on none.

    Args:
        binds: `HOST:PORT` each; a port of 0 is a free one.
        insecure: allow addresses that others than this machine can reach.

    Raises:
        ConfigurationError: an address is not one, is not loopback, or cannot be bound.
    """
    with ExitStack() as stack:
        sockets = [stack.enter_context(_listen(bind, insecure=insecure)) for bind in binds]
        stack.pop_all()
    return sockets


def _listen(bind: str, *, insecure: bool) -> socket.socket:
    host, colon, digits = bind.rpartition(":")
    port = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= len(str(MAX_PORT)) else -1
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not 0 <= port <= MAX_PORT:
        raise ConfigurationError(
            f"{bind!r} is not HOST:PORT, such as 127.0.0.1:8000 or [::1]:8000 (port 0: a free one)"
        )
    try:
        family, _, _, _, address = min(
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE),
            key=lambda found: found[0] is not socket.AF_INET,  # a name with both gets the one that clients try first
        )
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"{bind}: there is no address of that name ({error}); check the spelling") from None
    if not insecure and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ConfigurationError(
            f"{bind} can be reached from other machines, and whoever reaches it can start, read and cancel every run; "
            "bind to 127.0.0.1 behind a proxy that asks who is there, or add --insecure if the network itself is safe"
        )
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if family is socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen()
    except OSError as error:
        sock.close()
        raise ConfigurationError(
            f"{bind} cannot be bound: {error.strerror}; choose another port, or 0 for a free one"
        ) from None
    return sock


def host(
    hosted: Hosted,
    sockets: Sequence[socket.socket],
    *,
    log_level: str,
    ready: Callable[[Service, Sequence[str], trio.Event], Awaitable[None]],
) -> int:
    """Serve until a signal; the exit code.

    Args:
        hosted: what.
        sockets: from `listen`; they are closed in the end.
        log_level: from which level on penstock's own log is shown.
        ready: called with the service, the URLs and an event that asks for a shutdown, once connections are accepted;
            it is cancelled when the server has ended.

    Raises:
        ConfigurationError: a knob has a value that it cannot have, or there is no such log.
        KeyboardInterrupt: Ctrl-C, before signals were the server's.
        SystemExit: with code 0, if it was shut down before it was ready.
    """
    unstored = 0
    try:
        unstored = trio.run(partial(_host, hosted, sockets, log_to_stderr(log_level), ready))
    except LogUnavailable as error:
        say(f"{error}; not started")
        return SERVICE_DIED
    except Draining:
        say("stopped before it was ready")
        sys.exit(0)
    except SupervisorFailed:
        say("a service of the supervisor died (its traceback is above); readers were told to come back")
        return SERVICE_DIED
    except BaseExceptionGroup as group:
        if isinstance(single_error(group), KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    finally:
        for sock in sockets:
            sock.close()
    if unstored:
        runs = "1 run" if unstored == 1 else f"{unstored} runs"
        say(
            f"stopped; {runs} could not be given a last entry: the event log is out of reach, and their leases end them"
        )
        return SERVICE_DIED
    return 0


async def _host(
    hosted: Hosted,
    sockets: Sequence[socket.socket],
    logger: logging.Logger,
    ready: Callable[[Service, Sequence[str], trio.Event], Awaitable[None]],
) -> int:
    """Serve; the number of runs whose last entries could not be stored."""
    async with open_log(hosted.log_url, **hosted.limits) as log:
        app = create_app(
            hosted.producers,
            log,
            observer=hosted.observer,
            ping_interval=hosted.ping_interval,
            max_body_bytes=hosted.max_body_bytes,
            **hosted.knobs,
        )
        config = new_config()
        config.errorlog = logger
        config.loglevel = "WARNING"
        config.bind = [f"fd://{sock.detach()}" for sock in sockets]
        down = trio.Event()

        async def server(task_status: trio.TaskStatus[list[str]]) -> None:  # noqa: ASYNC128  (serve passes it on)
            await serve(app, config, shutdown_trigger=down.wait, abandon=_abandon, task_status=task_status)
            nursery.cancel_scope.cancel(reason="the server has ended")

        try:
            async with trio.open_nursery() as nursery:
                urls = await nursery.start(server)
                await ready(app.state.penstock, urls, down)
        except BaseExceptionGroup as group:
            raise_bare(group, trio.Cancelled)
        service: Service = app.state.penstock
        return service.supervisor.unstored if service.running else 0


def _abandon(stuck: Sequence[StuckRun]) -> NoReturn:
    """End the process without the tasks that hold it up."""
    for run in stuck:
        say(f"the producer of run {run.run_id} has not let go, and stands here:\n{run.stack.rstrip()}")
    several = "s" if len(stuck) > 1 else ""
    lost = sum(not run.stored for run in stuck)
    stored = f"{lost} of their runs have no last entries" if lost else "all runs have their last entries"
    say(
        f"{len(stuck)} producer{several} would not let go within {ABANDON_AFTER:g} s; {stored}, and the process ends "
        f"with code {STUCK}"
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STUCK)
