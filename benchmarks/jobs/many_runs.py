"""Many runs alive in one process, each with an event every second, spread evenly over the second.

Options: `url` of the log; `runs`; `size`, the bytes that are stored of each event; `rate`, the events of a run in a
second, 1 by default; `warm_up` in seconds; `windows`, and the `seconds` of each; `watch`: whether to look for stalls.

It prints `windows`, a list with the figures of each. An event's latency is the time from just before its producer
yields it until the log's reply to the append with it is there: `Timed` stands between the supervisor and the log, and
looks at the clock before and after each append. A stall is how late a task wakes that sleeps 5 ms again and again.
"""

from __future__ import annotations

import gc
import json
import time
from collections import defaultdict, deque
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any, cast

import redis
import trio

from benchmarks.jobs.store import FRAME
from benchmarks.model import percentile
from benchmarks.processes import options
from benchmarks.redis_server import cpu_at
from penstock import Event, open_log, open_supervisor
from penstock.cli.host import collect_rarely

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from penstock import EventLog
    from penstock.log import Appended, Batch

NAP = 0.005
"""Seconds that the task sleeps which watches for stalls."""


@dataclass(slots=True)
class Window:
    """What happened in some seconds."""

    latencies: list[float] = field(default_factory=list)
    """Seconds from yield to acknowledged."""
    commits: list[float] = field(default_factory=list)
    """Seconds of each append."""
    stall: float = 0.0
    """The longest that a waking task was late, in seconds."""
    collection: float = 0.0
    """The longest that Python's garbage collector took, in seconds."""


@dataclass(slots=True)
class Seen:
    """What has been made, and the window that takes it down."""

    window: Window = field(default_factory=Window)
    stored: int = 0
    """The events that are acknowledged."""
    made: defaultdict[str, deque[float]] = field(default_factory=lambda: defaultdict(deque))
    """For each run, when the events were made that are not acknowledged yet."""
    go: trio.Event = field(default_factory=trio.Event)
    start: float = 0.0
    """When the first event is due, once `go` is set."""
    collecting_since: float = 0.0


class Timed:
    """The log, with a clock at its appends."""

    def __init__(self, log: EventLog, seen: Seen) -> None:
        self._log = log
        self._seen = seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    async def append(self, batches: Sequence[Batch]) -> Sequence[Appended]:
        """Append, and take down how long that took, and how old the events are by now."""
        began = time.monotonic()
        appended = await self._log.append(batches)
        now, window = time.monotonic(), self._seen.window
        window.commits.append(now - began)
        for batch in batches:
            made = self._seen.made[batch.run_id]
            for _ in range(min(len(batch.entries), len(made))):
                window.latencies.append(now - made.popleft())
                self._seen.stored += 1
        return appended


async def ticks(seen: Seen, run_id: str, first: float, rate: float, data: str) -> AsyncGenerator[Event]:
    """`rate` events a second, without an end, the first of them `first` seconds after all may begin."""
    await seen.go.wait()
    made, due = seen.made[run_id], seen.start + first
    while rate:
        await trio.sleep_until(due)
        due += 1 / rate
        made.append(time.monotonic())
        yield Event(data)
    await trio.sleep_forever()


async def watching(seen: Seen) -> None:
    """Notice how late one wakes."""
    while True:
        due = trio.current_time() + NAP
        await trio.sleep_until(due)
        seen.window.stall = max(seen.window.stall, trio.current_time() - due)


def collected(seen: Seen, phase: str, _: Mapping[str, int]) -> None:
    """Notice how long the garbage collector takes."""
    now = time.monotonic()
    if phase == "start":
        seen.collecting_since = now
    else:
        seen.window.collection = max(seen.window.collection, now - seen.collecting_since)


def memory_at(url: str) -> int:
    """The bytes that Redis uses."""
    with redis.Redis.from_url(url) as client:
        return int(client.info("memory")["used_memory"])


async def measured(seen: Seen, url: str, seconds: float, *, empty: int) -> dict[str, float]:
    """What happens in the next seconds; the Redis used `empty` bytes before anything was stored."""
    spent = await trio.to_thread.run_sync(cpu_at, url)
    seen.window = window = Window()
    wall, busy = time.monotonic(), time.process_time()
    await trio.sleep(seconds)
    wall, busy = time.monotonic() - wall, time.process_time() - busy
    seen.window = Window()
    spent = await trio.to_thread.run_sync(cpu_at, url) - spent
    held = await trio.to_thread.run_sync(memory_at, url) - empty
    latencies, commits, events = sorted(window.latencies), sorted(window.commits), len(window.latencies)
    return {
        "events/s": events / wall,
        "µs CPU/event": busy / events * 1e6 if events else 0.0,
        "p50 ms": percentile(latencies, 50) * 1e3,
        "p99 ms": percentile(latencies, 99) * 1e3,
        "Python cores": busy / wall,
        "Redis cores": spent / wall,
        "commits/s": len(commits) / wall,
        "commit p50 ms": percentile(commits, 50) * 1e3,
        "longest stall ms": window.stall * 1e3,
        "longest GC ms": window.collection * 1e3,
        "Redis bytes/event": held / seen.stored if seen.stored else 0.0,
    }


async def main(given: Mapping[str, Any]) -> dict[str, Any]:
    """Start the runs, let them settle, and measure window after window."""
    runs, rate, data = given["runs"], given.get("rate", 1.0), "x" * (given["size"] - FRAME)
    seen, url = Seen(), given["url"]
    empty = memory_at(url)
    async with (
        open_log(url) as log,
        open_supervisor(cast("EventLog", Timed(log, seen))) as supervisor,
        trio.open_nursery() as nursery,
    ):
        for number in range(runs):
            run_id = f"run-{number}"
            first = number / runs / rate if rate else 0.0
            await supervisor.start(ticks, seen, run_id, first, rate, data, run_id=run_id)
        if given.get("watch"):
            nursery.start_soon(watching, seen)
            gc.callbacks.append(partial(collected, seen))
        seen.start = trio.current_time()
        seen.go.set()
        await trio.sleep(given["warm_up"])
        windows = [await measured(seen, url, given["seconds"], empty=empty) for _ in range(given["windows"])]
        nursery.cancel_scope.cancel()
        supervisor.interrupt()
    return {"windows": windows}


if __name__ == "__main__":
    collect_rarely()  # as `penstock serve` does
    print(json.dumps(trio.run(main, options())))
