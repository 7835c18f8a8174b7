"""A server in a process of its own: its log output, its secrets, its garbage collector, its exit code.

| code | what happened |
|---|---|
| 0 | a clean shutdown |
| 1 | a service of the supervisor died, or the event log could not be reached |
| 2 | a wrong argument |
| 3 | a producer ignored its cancellation, and the process ended without it |
| 75 | a worker could not reach the event log; another try may succeed |

Hypercorn gets sockets that listen already (`sockets.py`): a wrong address is refused before anything starts.
"""

from __future__ import annotations

import gc
import logging
import os
import signal
import sys
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Final, NoReturn

import click
import trio

from penstock.cli.options import forget_secrets
from penstock.errors import ConfigurationError, Draining, LogUnavailable, SupervisorFailed, single_error
from penstock.exception_groups import open_nursery
from penstock.observer.logging import SingleLineFormatter
from penstock.server.config import USER_TIMEOUT
from penstock.server.workers import SIGNALS, UNREACHABLE, ParentLink, ProcessManager

if TYPE_CHECKING:
    import socket
    from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from hypercorn.config import Config
    from starlette.applications import Starlette

    from penstock.asgi.lifespan import AppLifespan
    from penstock.log import EventLog
    from penstock.server.serve import Shutdown
    from penstock.supervisor.live_runs import StuckRun

SERVICE_DIED: Final = 1
STUCK: Final = 3
STOPPED: Final = "stopped; every run has its last entry"
STOPPED_AFTER_DEATHS: Final = "stopped; the runs of workers that died end when their leases are over"
METRICS_FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"
"""The environment variable of the folder in which the workers count; see `penstock.observer.prometheus`."""
WORKER_OPTION: Final = "--inherit"
"""The option that makes a process a worker: its number, and the file descriptors of its link and of its sockets."""
GC_THRESHOLDS: Final = (10_000, 5, 5)
"""The arguments of `gc.set_threshold`.

Python's default of 700 objects is reached each time that a thousand readers wake up, so that a large fan-out spends a
quarter of its time in the collector; 10,000 is more than they make. The lower second and third numbers keep the cycles
that failing producers leave from waiting ten times as long as they would by default.
"""


def say(message: str) -> None:
    """Write one line to standard error. A server goes on when its terminal is gone."""
    with suppress(OSError):
        click.echo(f"penstock: {message}", err=True)


def curl(options: str, *, authenticated: bool) -> str:
    """The beginning of a command line for a request; a token is named by its variable and not shown."""
    return f"curl {options}" + (' -H "Authorization: Bearer $PENSTOCK_TOKEN"' if authenticated else "")


def collect_rarely() -> None:
    """Let the garbage collector run more rarely, and never over what is imported already; garbage stays longer."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(*GC_THRESHOLDS)


@dataclass(frozen=True, slots=True)
class LogConfig:
    """How log records reach standard error: penstock's from `level` on, all others from WARNING on."""

    level: str = "info"
    form: str = "text"

    def apply(self, worker: int | None) -> logging.Logger:
        """Configure Python's logging; `worker` is the number that records show. Returns Hypercorn's logger."""
        formatter: logging.Formatter
        if self.form == "json":
            from pythonjsonlogger.json import JsonFormatter  # noqa: PLC0415  (the usual form is text)

            formatter = JsonFormatter(
                "{asctime}{levelname}{name}{message}",
                style="{",
                rename_fields={"asctime": "time", "levelname": "level", "name": "logger"},
                static_fields={} if worker is None else {"worker": worker},
                datefmt="%Y-%m-%dT%H:%M:%S%z",
            )
        else:
            prefix = "" if worker is None else f"worker {worker}: "
            formatter = SingleLineFormatter(f"%(asctime)s %(levelname)s {prefix}%(message)s")
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(formatter)
        logging.basicConfig(level=logging.WARNING, handlers=[handler])
        logging.getLogger("penstock").setLevel(self.level.upper())
        return logging.getLogger("hypercorn.error")


def host(
    make_app: Callable[[EventLog], Starlette],
    log: AbstractAsyncContextManager[EventLog],
    config: Config,
    sockets: Sequence[socket.socket],
    *,
    log_config: LogConfig,
    ready: Callable[[AppLifespan, Sequence[str], Shutdown], Awaitable[None]],
    link: ParentLink | None = None,
    tcp_user_timeout: float = USER_TIMEOUT,
) -> int:
    """Serve on listening sockets, which Hypercorn takes over, until a signal; returns the exit code.

    `make_app` is `create_app` with all its arguments but the log. `ready` is called once connections are accepted, and
    cancelled when the server has ended. A worker has a `link` to its parent.
    """
    import penstock.server.serve  # noqa: F401, PLC0415  (the parent of workers does without Hypercorn's server)

    config.errorlog = log_config.apply(None if link is None else link.number)
    config.loglevel = "WARNING"
    config.bind = [f"fd://{sock.detach()}" for sock in sockets]
    forget_secrets()
    collect_rarely()
    try:
        unstored = trio.run(_serve, make_app, log, config, ready, link, tcp_user_timeout)
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
        say("a service of the supervisor died (its traceback is above); readers were asked to reconnect")
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


async def _serve(
    make_app: Callable[[EventLog], Starlette],
    log: AbstractAsyncContextManager[EventLog],
    config: Config,
    ready: Callable[[AppLifespan, Sequence[str], Shutdown], Awaitable[None]],
    link: ParentLink | None,
    tcp_user_timeout: float,
) -> int:
    """Serve; returns the number of runs whose last entries could not be stored."""
    from penstock.server.serve import Shutdown, serve  # noqa: PLC0415  (see `host`)

    shutdown = Shutdown()
    async with open_nursery() as outer:
        if link is not None:
            await outer.start(link.obey, shutdown)
        async with log as opened:
            app = make_app(opened)
            signals = SIGNALS if link is None else ()
            serve_app = partial(serve, app, config, signals=signals, shutdown=shutdown, abandon=_abandon)

            async def serve_until_the_end(task_status: trio.TaskStatus[list[str]]) -> None:  # noqa: ASYNC128
                await serve_app(tcp_user_timeout=tcp_user_timeout, task_status=task_status)
                inner.cancel_scope.cancel(reason="the server has ended")

            async with open_nursery() as inner:  # inside the log's block: the log outlives the server
                urls = await inner.start(serve_until_the_end)
                await ready(app.state.penstock, urls, shutdown)
        outer.cancel_scope.cancel(reason="the server has ended")
    lifespan: AppLifespan = app.state.penstock
    return lifespan.supervisor.unstored if lifespan.running else 0


def _abandon(stuck: Sequence[StuckRun]) -> NoReturn:
    """End the process although producers still run: Trio cannot abandon a task."""
    from penstock.server.serve import ABANDON_AFTER  # noqa: PLC0415  (see `host`)

    for run in stuck:
        say(f"the producer of run {run.run_id} has not let go, and stands here:\n{run.stack.rstrip()}")
    plural = "s" if len(stuck) > 1 else ""
    lost = sum(not run.stored for run in stuck)
    stored = f"{lost} of their runs have no last entries" if lost else "all runs have their last entries"
    say(
        f"{len(stuck)} producer{plural} did not end within {ABANDON_AFTER:g} s; {stored}, and the process ends with "
        f"code {STUCK}"
    )
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(STUCK)


# Workers


def host_workers(
    count: int,
    sockets: Sequence[socket.socket],
    arguments: Sequence[str],
    max_deaths: int,
    environment: Mapping[str, str],
    announce: Callable[[str], None],
) -> int:
    """Keep `count` workers, with these arguments of `penstock serve`, until a signal; returns the exit code."""

    def command(number: int, fds: Sequence[int], link: int) -> list[str]:
        worker = ",".join(map(str, (number, link, *fds)))
        # Python's -P: as with the program `penstock`, no file of the working directory hides a module.
        return [sys.executable, "-P", "-m", "penstock", "serve", f"{WORKER_OPTION}={worker}", *arguments]

    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # a parent that ignores it gets no exit codes
    with _metrics_folder() as folder:
        manager = ProcessManager(
            count,
            command,
            sockets,
            say=say,
            announce=announce,
            max_deaths=max_deaths,
            environment={**environment, METRICS_FOLDER: folder},
            on_end=partial(_forget_metrics, folder=folder),
        )

        async def keep() -> tuple[int, int]:
            return await manager.run(), manager.recent_deaths

        code, deaths = trio.run(keep)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # all is over, and the code is known
    if code:
        say(f"stopped with code {code}; why is said above")
    else:
        say(STOPPED_AFTER_DEATHS if deaths else STOPPED)
    return code


@contextmanager
def _metrics_folder() -> Iterator[str]:
    """The folder in which the workers count: the one that the environment names, or a temporary one."""
    if METRICS_FOLDER in os.environ:
        yield os.environ[METRICS_FOLDER]
    else:
        with TemporaryDirectory(prefix="penstock-metrics-", ignore_cleanup_errors=True) as folder:
            yield folder


def _forget_metrics(pid: int, *, folder: str) -> None:
    from penstock.observer.prometheus import forget  # noqa: PLC0415  (only a parent needs it, once a worker has ended)

    with suppress(OSError):  # the folder may belong to another program
        forget(pid, folder)
