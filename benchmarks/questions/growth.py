"""P11: does an event cost more when there are more runs, or more readers?"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from benchmarks.model import Case, Chart, Figure, Goal, Question
from benchmarks.processes import job, module, penstock, serving
from benchmarks.questions.fan_out import RATE, penstock_fan_out
from benchmarks.redis_server import redis_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.model import Figures, Scale
    from benchmarks.processes import Server
    from benchmarks.redis_server import Redis

COUNT, EACH, SIZE, SECONDS, WINDOWS, BASE = 100_000, 200, 200, 3.0, 3, 10
PENDING: Final = 100
"""Events of each run that may be under way."""
SIZES: Final = (1, 10, 100, 1000)
ALIVE: Final = (10, 100, 1000, 5000)
COST, SERVER = "µs CPU/event", "µs Redis CPU/event"
CORES: Final = ("Python cores", "Redis cores")
STORE = {size: f"penstock, storing, {size:,} run{'s' * (size > 1)}" for size in SIZES}
READ = {size: f"penstock, {size:,} reader{'s' * (size > 1)}" for size in SIZES}
LIVE = {size: f"penstock, {size:,} runs alive" for size in ALIVE}


@contextmanager
def cases(scale: Scale) -> Iterator[Sequence[Case]]:
    """Each size of each kind."""
    seconds = scale.seconds(SECONDS)
    with redis_server() as redis, serving(penstock()) as server:
        idle = _windows(redis, runs=BASE, rate=0, windows=1, seconds=seconds)[0]
        left: dict[int, list[Figures]] = {size: [] for size in ALIVE}
        yield [
            *(Case(STORE[size], partial(_store, redis, runs=size, count=scale.count(COUNT))) for size in SIZES),
            *(Case(READ[size], partial(_read, server, readers=size, seconds=seconds)) for size in SIZES),
            *(Case(LIVE[size], partial(_alive, redis, left[size], idle, size, seconds)) for size in ALIVE),
        ]


def _store(redis: Redis, *, runs: int, count: int) -> Figures:
    redis.client.flushall()
    given = {"runs": runs, "count": max(count, EACH * runs), "size": SIZE, "window": PENDING * max(runs, BASE)}
    seen = job(module("jobs.store", url=redis.url, **given))
    return {COST: seen["µs Python CPU/event"], SERVER: seen[SERVER]}


def _read(server: Server, *, readers: int, seconds: float) -> Figures:
    return {COST: penstock_fan_out(server, readers=readers, rate=RATE, seconds=seconds)[COST]}


def _alive(redis: Redis, left: list[Figures], idle: Figures, runs: int, seconds: float) -> Figures:
    """The next of some windows in a row, of which the first turn measures all."""
    if not left:
        for window in _windows(redis, runs=runs, rate=1, windows=WINDOWS, seconds=seconds):
            python, server = ((window[cores] - idle[cores]) / window["events/s"] for cores in CORES)
            left.append({COST: python * 1e6, SERVER: server * 1e6})
    return left.pop(0)


def _windows(redis: Redis, *, runs: int, rate: int, windows: int, seconds: float) -> list[dict[str, float]]:
    redis.client.flushall()
    given = {"runs": runs, "rate": rate, "size": SIZE, "warm_up": 1.0, "windows": windows, "seconds": seconds}
    found: list[dict[str, float]] = job(module("jobs.many_runs", url=redis.url, **given))["windows"]
    return found


def _goals(kind: str, names: dict[int, str]) -> Iterator[Goal]:
    for size, name in names.items():
        if size != BASE:
            yield Goal(f"{kind} {size:,} to {BASE}", Figure(name, COST), Figure(names[BASE], COST), at_most=1.3)


def _chart(title: str, across: str, names: dict[int, str]) -> Chart:
    return Chart(title, COST, {"penstock": list(names.items())}, across)


QUESTION = Question(
    number=11,
    name="growth",
    asks="the CPU that an event costs penstock, when there are more runs or more readers",
    cases=cases,
    goals=[
        *_goals("storing at full speed, runs:", STORE),
        *_goals("reading one run, readers:", READ),
        *_goals("runs alive, an event a second:", LIVE),
    ],
    charts=[
        _chart("Storing at full speed", "runs", STORE),
        _chart(f"Delivering {RATE} events a second of one run", "readers", READ),
        _chart("Storing an event a second for each run", "runs", LIVE),
    ],
    notes=f"""\
- Storing is `store` with fewer events, and with as many events under way for each run, however many there are (in
  `store` it is as many for all together, so that with 1,000 runs each append would hold two of each). What is judged
  is Python's CPU; that of Redis stands beside it.
- Reading is `fan_out`: the CPU of the server by the events that arrived, each of which counts once for every reader.
  What the making of an event costs is shared by its readers, and one bears it alone: that goal cannot be reached.
- Runs alive are `many_runs`: {WINDOWS} windows of {SECONDS:g} s in a row, one for each round. With few runs, what a
  process does in any case (looking for cancel requests and for leases that have run out) would count as the cost of
  their few events: what it takes with {BASE} silent runs is subtracted everywhere. That makes the figure at {BASE}
  runs smaller, and the goal harder. A single run makes too few events in this time to say what one costs. Their
  events come one by one, each in an append of its own; more runs share appends.
- Why an event of 1,000 runs costs more to store was not looked into. Each has 200 of them, so that its end weighs more.
""",
)
