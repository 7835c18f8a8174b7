"""P4: how long does an event take from its producer through Redis to its reader?"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from uuid import uuid4

import httpx2

from benchmarks.checkout import HERE
from benchmarks.clients import WAIT, read, reading, stream_of
from benchmarks.model import Case, Chart, Comparison, Figure, Goal, Question
from benchmarks.processes import BenchmarkError, job_started, module, serving
from benchmarks.redis_server import redis_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.checkout import Checkout
    from benchmarks.model import Scale
    from benchmarks.processes import Server
    from benchmarks.redis_server import Redis

RATE: Final = 20
"""Events a second of each run."""
MANY: Final = 100
SECONDS: Final = {1: 3.0, MANY: 2.0}
"""What is measured, by the number of runs."""
WARM_UP: Final = 0.5
SPARE: Final = 0.5
"""Seconds for which a producer that cannot be cancelled goes on after that."""
FOREVER: Final = 120.0
"""Seconds for which one that can be would."""
LEAST: Final = 0.9
"""The share of the events of the measured time that must have come; fewer means that something is wrong."""

SAME, OTHER = "penstock, same server", "penstock, other server"
PREDECESSOR, FLOOR = "predecessor's design", "floor: XADD, XREAD BLOCK, send"
ASSISTANT = "assistant-stream, Redis"


def named(case: str, runs: int) -> str:
    """A case, with its size."""
    return f"{case}, {runs} run{'s' if runs > 1 else ''}"


def _figures(seen: Mapping[str, float], *, runs: int, seconds: float) -> dict[str, float]:
    expected = RATE * runs * seconds
    if seen["events"] < LEAST * expected:
        raise BenchmarkError(f"{seen['events']} events of {expected:g} in the measured time")
    figures = {f"{name} ms": seen[name] for name in ("p50", "p99", "max")}
    return figures | {"events": seen["events"], "generator busy": seen["busy"]}


@contextmanager
def _started(url: str, bodies: Sequence[Mapping[str, Any]]) -> Iterator[list[str]]:
    """The ids of runs that go on while the block lasts, and are cancelled then."""
    with httpx2.Client(timeout=WAIT) as client:
        ids = [str(client.post(url, json=body).raise_for_status().json()["id"]) for body in bodies]
        yield ids
        for run_id in ids:
            client.post(f"{url}/{run_id}/cancel", json={}).raise_for_status()


def _inputs(runs: int) -> list[dict[str, Any]]:
    """What each run is started with; their ticks are spread evenly."""
    return [{"rate": RATE, "seconds": FOREVER, "phase": number / runs / RATE} for number in range(runs)]


def penstock_latency(owner: Server, follower: Server, *, runs: int, seconds: float) -> dict[str, float]:
    """Runs on one server, and a reader of each on another, or on the same."""
    bodies = [{"producer": "ticks", "input": given} for given in _inputs(runs)]
    with _started(f"{owner.url}/v1/runs", bodies) as ids:
        urls = [stream_of(follower, run_id) for run_id in ids]
        return _figures(read(urls, readers=runs, seconds=seconds, warm_up=WARM_UP), runs=runs, seconds=seconds)


def _predecessor(server: Server, *, runs: int, seconds: float) -> dict[str, float]:
    bodies = [{"producer": "ticks", **given} for given in _inputs(runs)]
    with _started(f"{server.url}/runs", bodies) as ids:
        urls = [f"{server.url}/runs/{run_id}/stream" for run_id in ids]
        return _figures(read(urls, readers=runs, seconds=seconds, warm_up=WARM_UP), runs=runs, seconds=seconds)


def _assistant(server: Server, *, seconds: float) -> dict[str, float]:
    query = f"rate={RATE}&seconds={WARM_UP + seconds + SPARE}"
    seen = read(f"{server.url}/runs/{uuid4()}?{query}", method="POST", seconds=seconds, warm_up=WARM_UP)
    return _figures(seen, runs=1, seconds=seconds)


def _floor(server: Server, redis: Redis, *, runs: int, seconds: float) -> dict[str, float]:
    names = [str(uuid4()) for _ in range(runs)]
    load = reading([f"{server.url}/{name}" for name in names], readers=runs, seconds=seconds, warm_up=WARM_UP)
    length = WARM_UP + seconds + SPARE
    producer = job_started(module("jobs.ticking", port=redis.port, names=names, rate=RATE, seconds=length))
    seen = load.result()
    producer.result()
    return _figures(seen, runs=runs, seconds=seconds)


@contextmanager
def compared(checkout: Checkout, scale: Scale) -> Iterator[Sequence[Case]]:
    with redis_server() as redis, opened(checkout, redis, scale) as found:
        yield found


@contextmanager
def opened(checkout: Checkout, redis: Redis, scale: Scale) -> Iterator[Sequence[Case]]:
    """Two servers on one Redis."""
    with checkout.penstock(log=redis.url) as owner, checkout.penstock(log=redis.url) as other:
        yield [
            Case(
                named(name, runs), partial(penstock_latency, owner, follower, runs=runs, seconds=_seconds(runs, scale))
            )
            for runs in SECONDS
            for name, follower in ((SAME, owner), (OTHER, other))
        ]


def _seconds(runs: int, scale: Scale) -> float:
    return scale.seconds(SECONDS[runs])


@contextmanager
def cases(scale: Scale) -> Iterator[Sequence[Case]]:
    """All servers share a Redis; those that do not have their turn are idle."""
    with (
        redis_server() as redis,
        opened(HERE, redis, scale) as ours,
        serving(module("servers.predecessor", url=redis.url)) as predecessor,
        serving(module("servers.assistant", url=redis.url)) as assistant,
        serving(module("servers.floor", port=redis.port)) as floor,
    ):
        found: list[Case] = []
        for runs, pair in zip(SECONDS, (ours[:2], ours[2:]), strict=True):
            much: dict[str, Any] = {"runs": runs, "seconds": _seconds(runs, scale)}
            found += [
                *pair,
                Case(named(PREDECESSOR, runs), partial(_predecessor, predecessor, **much)),
                Case(named(FLOOR, runs), partial(_floor, floor, redis, **much)),
            ]
        found.append(Case(named(ASSISTANT, 1), partial(_assistant, assistant, seconds=_seconds(1, scale))))
        yield found


def _goals() -> Iterator[Goal]:
    for runs in (1, MANY):
        for case in (SAME, OTHER):
            size = named(case.removeprefix("penstock, "), runs)
            for name in ("p50", "p99"):
                predecessor, of, floor = (Figure(named(of, runs), f"{name} ms") for of in (PREDECESSOR, case, FLOOR))
                yield Goal(f"{size}: the predecessor's {name} to penstock's", predecessor, of, at_least=100)
                yield Goal(f"{size}: {name}, to the floor's", of, floor, at_most=4)


QUESTION = Question(
    number=4,
    name="latency",
    asks="producer to HTTP client at 20 events/s through Redis, 1 run and 100 runs",
    cases=cases,
    goals=[*_goals()],
    comparison=Comparison("p50 ms", compared),
    charts=[
        Chart("Producer to reader, median", "p50 ms", log=True),
        Chart("Producer to reader, 99th percentile", "p99 ms", log=True),
    ],
    notes="""\
Each event carries the time at which its producer made it, on the clock that all processes of the machine share; its
latency is what that clock shows more when the load generator has read it. 100 runs have 100 readers, one each, and
tick at times that are spread evenly over the twentieth of a second. *Other server* is a second `penstock serve` on the
same Redis: the run is on one, its reader on the other. With one run there are so few events that p99 is the slowest.

**The floor** is the least that a way through Redis takes with a Hypercorn send at its end: a process that does nothing
but XADD, one after the other, over one plain socket; and a bare ASGI application (no framework) on Hypercorn's trio
worker, in which each request has a connection to Redis of its own, a plain Trio socket, on which it does XREAD BLOCK,
and sends each entry at once. hiredis parses the replies. There is no pool, no batching, no fence and no expiry, nothing
is retried, and one hundred readers cost one hundred connections.

The predecessor's design flushes each run's buffer every half a second, or at 50 chunks, and its readers poll ten times
a second. assistant-stream has its default settings (its readers poll ten times a second, too); it answers the request
that starts a run from the same store that others resume from.

With 100 runs the floor is lower than with one, since nothing falls asleep between two events. What penstock adds to it
is its own work for each event in the one thread that all runs share: while one is stored, the next ones wait for that.
""",
)
