"""Python's garbage collector in a process that serves.

It looks for cycles whenever 700 more objects were made than were let go, and that many are made whenever a thousand
readers are woken: with its default it takes about a quarter of the time of a large fan-out. Now and then it looks at
every object there is, and everything waits.

A server in a process of its own: its sockets, its words on the terminal, its exit code.

| code | what happened |
|---|---|
| 0 | a clean shutdown |
| 1 | a service of the supervisor died |
| 2 | a wrong argument |
| 3 | a producer would not let go: the process ended without it |
| 75 | a worker has not found the event log, and another may |

Sockets come bound from `listening.py`, and are handed to Hypercorn: what is wrong with an address is known before
anything starts.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click
import trio
from pythonjsonlogger.json import JsonFormatter

from penstock.asgi.app import create_app
from penstock.asgi.lifespan import BODY_TIMEOUT, MAX_BODY_BYTES
from penstock.cli.options import AuthOptions, forget_secrets
from penstock.errors import ConfigurationError, Draining, LogUnavailable, SupervisorFailed, single_error
from penstock.exception_groups import raise_single
from penstock.log.open import open_log
from penstock.observer.logging import SingleLineFormatter
from penstock.server.serve import ABANDON_AFTER, MAX_HEADER_BYTES, SIGNALS, USER_TIMEOUT, Shutdown, new_config, serve
from penstock.server.workers import UNREACHABLE, ParentLink, ProcessManager

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence

    from penstock.asgi.lifespan import AppLifespan
    from penstock.observer import Observer
    from penstock.supervisor.services import StuckRun

THRESHOLDS: Final = (10_000, 5, 5)
"""How many more objects are made than let go before it looks at them; then of how many such looks one goes further.

What a thousand readers make when they are woken is less than the first. The others see to it that what failing
producers leave in cycles of their own does not wait ten times as long as it would.
"""


def collect_rarely() -> None:
    """Let it look more rarely, and never at what the program has imported. Call it once, before there is anything else.

    What it finds is found later, so more memory may wait for it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)


SERVICE_DIED: Final = 1
STUCK: Final = 3
STOPPED: Final = "stopped; every run has its last entry"
STOPPED_AFTER_DEATHS: Final = "stopped; the runs of workers that died end when their leases are over"
COUNTS: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable of the folder in which the workers count; see `penstock.metrics`."""
WORKER_OPTION: Final = "--inherit"
"""The option that makes a process a worker: its number, and the file descriptors of its words and of its sockets."""


@dataclass(frozen=True, slots=True)
class Hosted:
    """What a server serves, and how.

    Attributes:
        producers: what runs can be started of.
        admission: who may use it.
        log_url: the event log.
        limits: `open_log`'s `ttl`, `max_entries`, `prefix` and `wait_replicas`.
        ping_interval: see `create_app`.
        max_body_bytes: see `create_app`.
        body_timeout: see `create_app`.
        max_header_bytes: see `new_config`.
        knobs: the supervisor's.
        tcp_user_timeout: see `serve`.
        certfile: the path of a certificate, for TLS.
        keyfile: that of its private key.
        observer: told of what happens; by default it goes to penstock's log.
    """

    producers: Mapping[str, Any]
    admission: AuthOptions = field(default_factory=AuthOptions)
    log_url: str = "memory://"
    limits: Mapping[str, Any] = field(default_factory=dict)
    ping_interval: float | None = 15.0
    max_body_bytes: int = MAX_BODY_BYTES
    body_timeout: float = BODY_TIMEOUT
    max_header_bytes: int = MAX_HEADER_BYTES
    knobs: Mapping[str, Any] = field(default_factory=dict)
    tcp_user_timeout: float = USER_TIMEOUT
    certfile: str | None = None
    keyfile: str | None = None
    observer: Observer | None = None


def say(words: str) -> None:
    """One line to the terminal; standard output is for others. If nobody reads it any more, that ends no server."""
    with suppress(OSError):
        click.echo(f"penstock: {words}", err=True)


def curl(options: str, *, asks: bool) -> str:
    """The beginning of a command that talks to the server, which `asks` for tokens or not; the token is not in it."""
    return f"curl {options}" + (' -H "Authorization: Bearer $PENSTOCK_TOKEN"' if asks else "")


@dataclass(frozen=True, slots=True)
class LogConfig:
    """How what is logged goes to stderr: penstock's from `level` on, all else from WARNING on."""

    level: str = "info"
    form: str = "text"

    def take(self, worker: int | None) -> logging.Logger:
        """Let it go there; Hypercorn's logger."""
        handler = logging.StreamHandler(sys.stderr)
        if self.form == "json":
            parts = {"asctime": "time", "levelname": "level", "name": "logger"}
            handler.setFormatter(
                JsonFormatter(
                    "{asctime}{levelname}{name}{message}",
                    style="{",
                    rename_fields=parts,
                    static_fields={} if worker is None else {"worker": worker},
                    datefmt="%Y-%m-%dT%H:%M:%S%z",
                )
            )
        else:
            who = "" if worker is None else f"worker {worker}: "
            handler.setFormatter(SingleLineFormatter(f"%(asctime)s %(levelname)s {who}%(message)s"))
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        logging.getLogger("penstock").setLevel(self.level.upper())
        return logging.getLogger("hypercorn.error")


def host(
    hosted: Hosted,
    sockets: Sequence[socket.socket],
    *,
    notes: LogConfig,
    ready: Callable[[AppLifespan, Sequence[str], Shutdown], Awaitable[None]],
    link: ParentLink | None = None,
) -> int:
    """Serve until a signal; the exit code.

    Args:
        hosted: what.
        sockets: bound and listening; Hypercorn gets them.
        notes: how what is logged is shown.
        ready: called with the service, the URLs and what a shutdown can be asked of, once connections are accepted; it
            is cancelled when the server has ended.
        link: to the parent, for a worker.

    Raises:
        UsageError: a knob has a value that it cannot have, or there is no such log.
        KeyboardInterrupt: Ctrl-C, before signals were the server's.
        SystemExit: with code 0, if it was shut down before it was ready.
    """
    unstored = 0
    try:
        logger = notes.take(None if link is None else link.number)
        forget_secrets()
        collect_rarely()
        unstored = trio.run(partial(_host, hosted, sockets, logger, ready, link))
    except ConfigurationError as error:
        raise click.UsageError(str(error)) from None
    except LogUnavailable as error:
        say(f"{error}; not started")
        return SERVICE_DIED if link is None else UNREACHABLE
    except Draining:
        if link is None:
            say("stopped before it was ready")
        sys.exit(0)
    except SupervisorFailed:
        say("a service of the supervisor died (its traceback is above); readers were told to come back")
        return SERVICE_DIED
    except BaseExceptionGroup as group:
        if isinstance(single_error(group), KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise
    if unstored:
        runs = "1 run" if unstored == 1 else f"{unstored} runs"
        say(
            f"stopped; {runs} could not be given a last entry: the event log is out of reach, and their leases end them"
        )
        return SERVICE_DIED
    if link is None:
        say(STOPPED)
    return 0


async def _host(
    hosted: Hosted,
    sockets: Sequence[socket.socket],
    logger: logging.Logger,
    ready: Callable[[AppLifespan, Sequence[str], Shutdown], Awaitable[None]],
    link: ParentLink | None,
) -> int:
    """Serve; the number of runs whose last entries could not be stored."""
    shutdown = Shutdown()
    try:
        async with trio.open_nursery() as nursery:
            if link is not None:
                await nursery.start(link.obey, shutdown)
            signals = SIGNALS if link is None else ()
            unstored = await _serve(hosted, sockets, logger, ready, shutdown, signals)
            nursery.cancel_scope.cancel(reason="the server has ended")
    except BaseExceptionGroup as group:
        raise_single(group, trio.Cancelled)
    return unstored


async def _serve(
    hosted: Hosted,
    sockets: Sequence[socket.socket],
    logger: logging.Logger,
    ready: Callable[[AppLifespan, Sequence[str], Shutdown], Awaitable[None]],
    shutdown: Shutdown,
    signals: Sequence[signal.Signals],
) -> int:
    async with open_log(hosted.log_url, **hosted.limits) as log:
        app = create_app(
            hosted.producers,
            log,
            authorizer=hosted.admission.authorizer,
            allowed_hosts=hosted.admission.allowed_hosts,
            allowed_origins=hosted.admission.allowed_origins,
            observer=hosted.observer,
            ping_interval=hosted.ping_interval,
            max_body_bytes=hosted.max_body_bytes,
            body_timeout=hosted.body_timeout,
            **hosted.knobs,
        )
        config = new_config(hosted.max_header_bytes)
        config.errorlog = logger
        config.loglevel = "WARNING"
        config.bind = [f"fd://{sock.detach()}" for sock in sockets]
        config.certfile, config.keyfile = hosted.certfile, hosted.keyfile
        serve_app = partial(
            serve,
            app,
            config,
            signals=signals,
            shutdown=shutdown,
            abandon=_abandon,
            tcp_user_timeout=hosted.tcp_user_timeout,
        )

        async def server(task_status: trio.TaskStatus[list[str]]) -> None:  # noqa: ASYNC128  (serve passes it on)
            await serve_app(task_status=task_status)
            nursery.cancel_scope.cancel(reason="the server has ended")

        try:
            async with trio.open_nursery() as nursery:
                urls = await nursery.start(server)
                await ready(app.state.penstock, urls, shutdown)
        except BaseExceptionGroup as group:
            raise_single(group, trio.Cancelled)
        service: AppLifespan = app.state.penstock
        return service.supervisor.unstored if service.running else 0


def host_workers(
    count: int,
    sockets: Sequence[socket.socket],
    arguments: Sequence[str],
    max_deaths: int,
    environment: Mapping[str, str],
    announce: Callable[[str], None],
) -> int:
    """Keep `count` workers until a signal; the exit code.

    Args:
        count: how many.
        sockets: from `listening`; they are closed in the end.
        arguments: of `penstock serve`; one is added that makes it a worker.
        max_deaths: see `ProcessManager`.
        environment: what workers find in theirs, beside what is in this process's.
        announce: says that the server is there, from what the first worker has said of itself.
    """

    def command(number: int, fds: Sequence[int], words: int) -> list[str]:
        worker = ",".join(map(str, (number, words, *fds)))
        # Python's -P: as with the program `penstock`, no file of the present folder hides a module.
        return [sys.executable, "-P", "-m", "penstock", "serve", f"{WORKER_OPTION}={worker}", *arguments]

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # whoever ignores it does not hear how a child has ended
    with _counting() as folder:
        parent = ProcessManager(
            count,
            command,
            sockets,
            say=say,
            announce=announce,
            max_deaths=max_deaths,
            environment={**environment, COUNTS: folder},
            on_end=partial(_forget, folder=folder),
        )
        code, deaths = trio.run(_keep, parent)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # all is over, and the code is known
    if code:
        say(f"stopped with code {code}; why is said above")
    else:
        say(STOPPED_AFTER_DEATHS if deaths else STOPPED)
    return code


@contextmanager
def _counting() -> Iterator[str]:
    """The folder in which the workers count for their metrics; one of its own, unless the environment names another."""
    if COUNTS in os.environ:
        yield os.environ[COUNTS]
    else:
        with TemporaryDirectory(prefix="penstock-metrics-", ignore_cleanup_errors=True) as folder:
            yield folder


def _forget(pid: int, *, folder: str) -> None:
    from penstock.observer.prometheus import forget  # noqa: PLC0415  (only a parent needs it, and not before a worker has ended)

    with suppress(OSError):  # the folder is somebody else's, perhaps
        forget(pid, folder)


async def _keep(parent: ProcessManager) -> tuple[int, int]:
    return await parent.run(), parent.recent_deaths


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
