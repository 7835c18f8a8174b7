"""P12: what does a second worker bring?"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from benchmarks.clients import read, started_run, stream_of
from benchmarks.model import Case, Chart, Figure, Goal, Question
from benchmarks.processes import BenchmarkError, penstock, serving
from benchmarks.redis_server import redis_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.model import Figures, Scale
    from benchmarks.processes import Server

READERS, COUNT, SIZE = 200, 5_000, 100
ONE, TWO = "penstock, 1 worker", "penstock, 2 workers"
CORES: Final = 4
"""Two for the workers, one for Redis, one for the load generator."""


def delivered(server: Server, *, readers: int, count: int) -> Figures:
    """Start a run that yields as fast as it can, and let many read it from its first event to its end.

    Raises:
        BenchmarkError: an event is missing.
    """
    run_id = started_run(server, "burst", count=count, size=SIZE)
    before = server.cpu()
    seen = read(stream_of(server, run_id), readers=readers)
    cpu = server.cpu() - before
    if seen["fewest"] < count or seen["ended"] < readers:
        raise BenchmarkError(
            f"{server.url}: a reader has {seen['fewest']} events of {count}; {seen['ended']} have ended"
        )
    return {
        "delivered/s": seen["events"] / seen["seconds"],
        "server CPU, cores": cpu / seen["seconds"],
        "µs CPU/event": cpu / seen["events"] * 1e6,
        "generator busy": seen["busy"],
    }


@contextmanager
def cases(scale: Scale) -> Iterator[Sequence[Case]]:
    """Both servers on one Redis; only one of them has something to do at a time."""
    count = scale.count(COUNT)
    with (
        redis_server() as redis,
        serving(penstock(log=redis.url, max_entries=count + 1, workers=1)) as one,
        serving(penstock(log=redis.url, max_entries=count + 1, workers=2)) as two,
    ):
        turn = partial(delivered, readers=READERS, count=count)
        yield [Case(ONE, partial(turn, one)), Case(TWO, partial(turn, two))]


QUESTION = Question(
    number=12,
    name="workers",
    asks=f"{READERS} readers of one run with more events than one core can send: two workers to one",
    cases=cases,
    goals=[
        Goal(
            "delivered/s, to 1 worker",
            Figure(TWO, "delivered/s"),
            Figure(ONE, "delivered/s"),
            at_least=1.6,
            cores=CORES,
        )
    ],
    charts=[Chart("Delivered to all readers together", "delivered/s")],
    notes="""\
`penstock serve --log redis://… --workers N`. A run yields as fast as it can, in one of the workers; the system deals
the readers out to all of them. The time is that of all readers: from the first request until each reader has had every
event and the end. Most of it is catching up, out of Redis. Events at a given rate would not do: how many of them go
to a late reader in one piece, and how far the producer is slowed by the readers in its worker, change that figure
more than a second worker does. Four cores are two for the workers, one for Redis and one for the load generator; on
fewer the workers share theirs with those, and the figure is only reported.
""",
)
