"""Stores events with penstock: runs in this process, whose producers yield as fast as they may.

    python -m benchmarks.jobs.store '{"url": "redis://127.0.0.1:6379", "runs": 1, "count": 200000, "size": 200}'

Options: `url` of the log; `runs`; `count`, the events of all runs together; `size`, the bytes that are stored of each;
`window`, how many events of all runs together may wait for their acknowledgement. The clock runs from the moment at
which all producers may begin until all runs have ended, which is acknowledged after all of their events.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import trio

from benchmarks.processes import options
from benchmarks.redis_server import cpu_at
from penstock import Event, RunStatus, open_log, open_supervisor
from penstock.cli.host import collect_rarely

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping

    from penstock import Supervisor

WINDOW = 2000
"""Events that may wait for their acknowledgement."""
WARM_UP = 2000
"""Events that are stored before the clock runs."""
FRAME = len("data: \n\n")
"""What an event has besides its data; all of it is stored."""
NUMBERED = len("id: 100000\n")
"""What is counted with it while it waits."""


async def burst(go: trio.Event, count: int, data: str) -> AsyncGenerator[Event]:
    """Yield events one by one after the common start."""
    await go.wait()
    for _ in range(count):
        yield Event(data)


async def stored(supervisor: Supervisor, url: str, *, runs: int, count: int, size: int) -> dict[str, float]:
    """Store `count` events in `runs` runs together."""
    each, data, go = count // runs, "x" * (size - FRAME), trio.Event()
    started = [await supervisor.start(burst, go, each, data) for _ in range(runs)]
    redis, busy, wall = cpu_at(url), time.process_time(), time.monotonic()
    go.set()
    for run in started:
        ended = await supervisor.wait(run.id)
        if ended.status is not RunStatus.COMPLETED or ended.seq <= each:
            raise AssertionError(f"a run lacks events: {ended}")
    wall, busy, redis = time.monotonic() - wall, time.process_time() - busy, cpu_at(url) - redis
    return {
        "events/s": each * runs / wall,
        "µs Python CPU/event": busy / (each * runs) * 1e6,
        "µs Redis CPU/event": redis / (each * runs) * 1e6,
    }


async def main(given: Mapping[str, Any]) -> dict[str, float]:
    """Store a few events, then those that count."""
    url, runs, size = given["url"], given["runs"], given["size"]
    pending = given.get("window", WINDOW) * (size + NUMBERED)
    settings = {"max_pending_bytes": pending, "max_process_pending_bytes": pending}
    async with open_log(url) as log, open_supervisor(log, **settings) as supervisor:
        await stored(supervisor, url, runs=runs, count=max(WARM_UP, runs), size=size)
        return await stored(supervisor, url, runs=runs, count=given["count"], size=size)


if __name__ == "__main__":
    collect_rarely()  # as `penstock serve` does
    print(json.dumps(trio.run(main, options())))
