"""P13: how long does a cancel take from one server to the other, and back to the reader?"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from benchmarks.model import Case, Chart, Figure, Goal, Question
from benchmarks.processes import job, module, penstock, serving
from benchmarks.questions.latency import OTHER, RATE, named, penstock_latency
from benchmarks.redis_server import redis_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.model import Scale
    from benchmarks.processes import Server

CANCELS: Final = 40
FEW: Final = 3
"""Of the predecessor, which takes its time."""
LATENCY_SECONDS: Final = 3.0
FOREVER: Final = 60.0
"""Seconds for which a run would go on."""

TICKING, SILENT = "penstock, producer ticks", "penstock, producer is silent"
PREDECESSOR = "predecessor's design, producer ticks"
LATENCY = f"{named(OTHER, 1)}: an event"

TICKS: Final = {"rate": RATE, "seconds": FOREVER}
SILENCE: Final = {"seconds": FOREVER}


def _penstock(owner: Server, other: Server, producer: str, given: dict[str, float], count: int) -> dict[str, Any]:
    """Runs on one server, read and cancelled on the other."""
    run = f"{other.url}/v1/runs/ID"
    body = {"producer": producer, "input": given}
    return _cancelling(f"{owner.url}/v1/runs", body, run, count)


def _predecessor(owner: Server, other: Server, count: int) -> dict[str, Any]:
    return _cancelling(f"{owner.url}/runs", {"producer": "ticks", **TICKS}, f"{other.url}/runs/ID", count)


def _cancelling(runs: str, body: dict[str, Any], run: str, count: int) -> dict[str, Any]:
    given = {"runs": runs, "body": body, "stream": f"{run}/stream", "cancel": f"{run}/cancel", "count": count}
    return job(module("jobs.cancelling", **given))


@contextmanager
def cases(scale: Scale) -> Iterator[Sequence[Case]]:
    """Two servers of each kind, all on one Redis."""
    seconds, count = scale.seconds(LATENCY_SECONDS), scale.count(CANCELS)
    with (
        redis_server() as redis,
        serving(penstock(log=redis.url)) as owner,
        serving(penstock(log=redis.url)) as other,
        serving(module("servers.predecessor", url=redis.url)) as old_owner,
        serving(module("servers.predecessor", url=redis.url)) as old_other,
    ):
        yield [
            Case(LATENCY, partial(penstock_latency, owner, other, runs=1, seconds=seconds)),
            Case(TICKING, partial(_penstock, owner, other, "ticks", TICKS, count)),
            Case(SILENT, partial(_penstock, owner, other, "silence", SILENCE, count)),
            Case(PREDECESSOR, partial(_predecessor, old_owner, old_other, FEW)),
        ]


QUESTION = Question(
    number=13,
    name="cancel",
    asks="cancel posted to another server until the reader's stream ended",
    cases=cases,
    goals=[
        Goal(f"{case.removeprefix('penstock, ')}: p50, to that of an event", Figure(case, "p50 ms"), latency, at_most=5)
        for latency in [Figure(LATENCY, "p50 ms")]
        for case in (TICKING, SILENT)
    ],
    charts=[Chart("Cancel to the end of the stream, median", "p50 ms", log=True)],
    notes="""\
The run is on one server; its reader and the client that cancels it are on another, so that the cancel crosses Redis on
its way to the producer, and the end of the run crosses it on its way back. The clock runs from before the request is
sent, over an open connection, as soon as the reader has the first event, until the reader has the end of the response's
body: the producer has been stopped by then, and the run's last entry is stored. It is compared with the way of one
event from a producer on one server to a reader on the other, measured as in the question `latency`.

The predecessor's design looks for a cancel as chunks come by, at most every half a second. With a silent producer it
notices nothing until the producer makes its next chunk or ends, so there is no figure of it.
""",
)
