"""P8: what does a chunk cost that is kept alive and watched?"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.checkout import HERE
from benchmarks.model import Case, Chart, Comparison, Figure, Goal, Question

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.checkout import Checkout
    from benchmarks.model import Scale

COUNT = 100_000
FIGURE = "µs CPU/chunk"
WATCHED, ALL = "penstock, response + cancel_when", "penstock, response + cancel_when + keepalive"
BARE = "StreamingResponse, Trio"
WAYS = {
    WATCHED: ("jobs.chunks_trio", "watched"),
    ALL: ("jobs.chunks_trio", "all"),
    "penstock, response alone": ("jobs.chunks_trio", "alone"),
    BARE: ("jobs.chunks_trio", "bare"),
    "predecessor's design, asyncio": ("jobs.chunks_asyncio", "predecessor"),
    "StreamingResponse, asyncio": ("jobs.chunks_asyncio", "bare"),
}

NOTES = """\
No server and no socket: the application is called with a `send` that only counts. The source lets the other tasks
run before each chunk, in the cheapest way of its library, so that as little as possible hides what is added.
CPU is that of the whole process, system calls included.

`EventStreamResponse` keeps its stream alive by itself: a timer beside the source sends the pings, and a chunk pays
for noting the time. With `cancel_when` around the source that is all that a stream needs. `keepalive` is for streams
that are sent by something else; it is measured around the same source in the same response, where its pings are the
second ones. The predecessor's design is a queue filled by a task and emptied through `wait_for`, a status that is
looked at when a chunk comes, and a response that takes chunks with a status.

The floor is a plain `StreamingResponse`: one turn of the event loop, and one `send`. Whatever waits for a chunk with
a time limit without interrupting the source has to iterate it in a task of its own, and to hand each chunk over to
another: that is at least one more step of a task, and in `keepalive` also the channel between them and a cancel scope
for each wait.
"""


def cases_of(checkout: Checkout, scale: Scale) -> list[Case]:
    """They differ in what is between the source and `send`; each turn is a process of its own."""
    count = scale.count(COUNT)
    return [Case(name, partial(checkout.job, job, way=way, count=count)) for name, (job, way) in WAYS.items()]


@contextmanager
def cases(scale: Scale) -> Iterator[Sequence[Case]]:
    yield cases_of(HERE, scale)


@contextmanager
def compared(checkout: Checkout, scale: Scale) -> Iterator[Sequence[Case]]:
    yield [case for case in cases_of(checkout, scale) if case.name.startswith("penstock")]


QUESTION = Question(
    number=8,
    name="chunk_cost",
    asks="CPU per chunk of keepalive, cancel watch and response, for a source that suspends each time",
    cases=cases,
    goals=[
        Goal(f"{says}, to a bare StreamingResponse", Figure(case, FIGURE), Figure(BARE, FIGURE), at_most=1.5)
        for says, case in (("the response's own pings, and cancel_when", WATCHED), ("keepalive() as well", ALL))
    ],
    charts=[Chart("CPU per chunk", FIGURE)],
    notes=NOTES,
    comparison=Comparison(FIGURE, compared),
)
