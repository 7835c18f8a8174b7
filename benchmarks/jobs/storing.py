"""Stores events as `store` does, in one of several processes that start at the same moment.

    python -m benchmarks.jobs.storing '{"url": "redis://127.0.0.1:6379", "name": "a", "runs": 100, "count": 20000, ...}'

Options: `url` of the log; `name`, which the ids of the runs begin with (see `run_ids`); `runs`; `count`, the events of
all of them together; `size`, the bytes that are stored of each; `pending`, how many events of each run may wait for
their acknowledgement. It prints `ready` when the runs have been started, waits for a line, and prints `done` when all
of them have ended, which is acknowledged after all of their events.
"""

from __future__ import annotations

import json
import sys
import time
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import trio

from benchmarks.jobs.store import FRAME, NUMBERED, WARM_UP, burst
from benchmarks.processes import options
from penstock import LoggingObserver, RunStatus, open_log, open_supervisor
from penstock.cli.host import collect_rarely

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from penstock import EventLog, Run


def run_ids(name: str, runs: int) -> list[str]:
    """The ids of the runs, for this job and for the one that follows them."""
    return [f"{name}-{number}" for number in range(runs)]


class Endings(LoggingObserver):
    """Sets an event when the last run has ended; `Supervisor.wait` for each run would add to the load."""

    def __init__(self, runs: int, each: int) -> None:
        super().__init__()
        self.all = trio.Event()
        self.lacking: list[Run] = []
        """Runs that have not stored `each` events."""
        self._left, self._each = runs, each

    def run_ended(self, run: Run) -> None:
        super().run_ended(run)
        if run.status is not RunStatus.COMPLETED or run.seq <= self._each:
            self.lacking.append(run)
        self._left -= 1
        if not self._left:
            self.all.set()


async def wait_for_start() -> None:
    """Print `ready` and wait for a line on standard input."""
    print("ready", flush=True)
    await trio.to_thread.run_sync(sys.stdin.readline)


def at_work() -> float:
    """The seconds in which this thread, the main one, has run or waited for a core; no number but on Linux."""
    path = Path("/proc/self/schedstat")
    if not path.exists():
        return float("nan")
    ran, waited, _ = path.read_text().split()
    return (int(ran) + int(waited)) / 1e9


async def stored(
    log: EventLog, ids: Sequence[str], each: int, ready: Callable[[], Awaitable[None]], *, size: int, pending: int
) -> dict[str, float]:
    """Store `each` events in each of the runs; the clock starts when `ready` returns.

    Raises:
        AssertionError: a run lacks events.
    """
    endings, go, pending = Endings(len(ids), each), trio.Event(), pending * (size + NUMBERED)
    settings = {"max_pending_bytes": pending, "max_process_pending_bytes": pending * len(ids)}
    async with open_supervisor(log, observer=endings, **settings) as supervisor:
        for run_id in ids:
            await supervisor.start(burst, go, each, "x" * (size - FRAME), run_id=run_id)
        await ready()
        began, busy, working = time.monotonic(), time.process_time(), at_work()
        go.set()
        await endings.all.wait()
        ended, busy, working = time.monotonic(), time.process_time() - busy, at_work() - working
    if endings.lacking:
        raise AssertionError(f"a run lacks events: {endings.lacking[0]}")
    asleep = ended - began - working
    return {"events": each * len(ids), "began": began, "ended": ended, "busy": busy, "asleep": asleep}


async def main(given: Mapping[str, Any]) -> dict[str, float]:
    """Store a few events, wait for the start, then store those that count."""
    name, runs = given["name"], given["runs"]
    store = partial(stored, size=given["size"], pending=given["pending"])
    async with open_log(given["url"]) as log:
        await store(log, run_ids(f"{name}-warm", runs), max(1, WARM_UP // runs), trio.lowlevel.checkpoint)
        figures = await store(log, run_ids(name, runs), given["count"] // runs, wait_for_start)
        print("done", flush=True)
    return figures


if __name__ == "__main__":
    collect_rarely()  # as `penstock serve` does
    print(json.dumps(trio.run(main, options())))
