"""P10: does a process with thousands of runs stay quick?"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.model import Case, Chart, Figure, Goal, Question
from benchmarks.processes import job, module
from benchmarks.redis_server import redis_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.model import Figures, Scale
    from benchmarks.redis_server import Redis

MANY, FEW, SIZE = 5000, 100, 200
WINDOWS, SECONDS, SHORT = 3, 20.0, 12.0
OURS, BESIDE = f"penstock, {MANY:,} runs", f"penstock, {FEW} runs"
LATER = f"p50, {WINDOWS}. window to 1."
STALL, WORST = "stall, commits", "longest stall, commits"
SHARE = "share of the events due"


@contextmanager
def cases(scale: Scale) -> Iterator[Sequence[Case]]:
    """Each in a process of its own, never both at a time."""
    many, few = scale.count(MANY), scale.count(FEW)
    with redis_server() as redis:
        left: list[Figures] = []
        yield [
            Case(BESIDE, lambda: _windows(redis, runs=few, windows=1, seconds=scale.seconds(SHORT))[0]),
            Case(OURS, partial(_minute, left, redis, runs=many, windows=WINDOWS, seconds=scale.seconds(SECONDS))),
        ]


def _minute(left: list[Figures], redis: Redis, **given: Any) -> Figures:
    """The next window of a minute, of which the first one measures all."""
    if not left:
        windows = _windows(redis, **given)
        later = windows[-1]["p50 ms"] / windows[0]["p50 ms"]
        worst = max(window[STALL] for window in windows)  # of the minute: a median of its thirds would hide it
        left += [window | {LATER: later, WORST: worst} for window in windows]
    return left.pop(0)


def _windows(redis: Redis, **given: Any) -> list[dict[str, float]]:
    redis.client.flushall()
    windows = job(module("jobs.many_runs", url=redis.url, size=SIZE, warm_up=2.0, watch=True, **given))["windows"]
    return [
        window
        | {STALL: window["longest stall ms"] / window["commit p50 ms"], SHARE: window["events/s"] / given["runs"]}
        for window in windows
    ]


QUESTION = Question(
    number=10,
    name="many_runs",
    asks="5,000 runs alive in one process, an event per second each, stored in Redis",
    cases=cases,
    goals=[
        Goal("cores of Python", Figure(OURS, "Python cores"), at_most=0.7),
        Goal(f"p50 to that of {FEW} runs", Figure(OURS, "p50 ms"), Figure(BESIDE, "p50 ms"), at_most=8),
        Goal("longest stall of the loop, in commits", Figure(OURS, WORST), at_most=50),
        Goal("steady for a minute: p50 of its last third to that of its first", Figure(OURS, LATER), at_most=1.5),
        Goal("acknowledged events per second, to those that are due", Figure(OURS, SHARE), at_least=0.99),
    ],
    charts=[Chart("From yield to acknowledged", "p50 ms"), Chart("CPU of Python", "Python cores")],
    notes=f"""\
- A supervisor in a process without HTTP, with the settings that it has by itself: leases are renewed every 10 s, cancel
  requests looked for twice a second. The runs' events are spread evenly over the second, each {SIZE} bytes in Redis.
- {MANY:,} runs are measured for a minute without a break: {WINDOWS} windows of {SECONDS:g} s, one for each round.
- Latency: from just before a producer's `yield` until the log's reply to the append is there. A thin layer between the
  supervisor and the log looks at the clock before and after each append; its CPU counts as penstock's.
- Longest stall: how late a task woke that slept 5 ms again and again. It is divided by the median time of an append,
  one round trip with all that had come by then. Beside it stands the longest pause of Python's garbage collector.
- Bytes of Redis per event are all that it uses at the end of the window, the runs' records, the connections and the
  blocks that Redis reserves included, by all events stored until then: the more events a run has, the fewer.
- The longest stall of a minute is the garbage collector's, if it looks at everything in that minute at all (*longest
  GC*). With Python's own thresholds it did so every few seconds, for a third of a second.
""",
)
