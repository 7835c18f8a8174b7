"""P0: how much can the load generator take in? Its own limit must not pass for that of a server."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

from benchmarks.clients import rate
from benchmarks.model import Case, Chart, Figure, Goal, Question
from benchmarks.processes import module, serving
from benchmarks.questions.fan_out import RATE, SECONDS, SIZE, fan_out

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.model import Scale

COUNT, TIMES, READERS = 200_000, 20, 1000
FULL_RATE: Final = 400
"""Events a second that are more than a thousand readers can be written."""
ONE = "one reader, prepared bytes"
MANY = f"{READERS:,} readers, {RATE} events/s each"
FULL = f"{READERS:,} readers, as many as one core writes"


@contextmanager
def cases(scale: Scale) -> Iterator[Sequence[Case]]:
    """A server that does nothing but write."""
    count, seconds = scale.count(COUNT), scale.seconds(SECONDS)
    with serving(module("servers.blast")) as blast:
        burst = f"{blast.url}/burst?count={count}&size={SIZE}&times={TIMES}"

        def ticks(often: int) -> str:
            return f"{blast.url}/ticks?rate={often}&size={SIZE}"

        many = partial(fan_out, readers=READERS, seconds=seconds)
        yield [
            Case(ONE, partial(rate, blast, burst, events=count * TIMES)),
            Case(MANY, partial(many, blast, ticks(RATE), rate=RATE)),
            Case(FULL, partial(many, blast, ticks(FULL_RATE), rate=FULL_RATE)),
        ]


QUESTION = Question(
    number=0,
    name="load",
    asks="what the load generator takes in of a server that does nothing but write",
    cases=cases,
    goals=[
        Goal(
            f"{READERS:,} readers at {RATE} events/s: its share of a core", Figure(MANY, "generator busy"), at_most=0.8
        ),
        Goal(f"{READERS:,} readers at {RATE} events/s: all taken in", Figure(MANY, "delivered share"), at_least=1),
    ],
    charts=[Chart("How busy the load generator is with it", "generator busy")],
    notes="""\
This says whether the other figures are the servers' or the load generator's. The server is plain sockets in one
thread without any framework. For one reader it sends bytes that were made before: the events/s are the most that one
connection can show, in pieces as large as the system hands them out, and the replay of any server has to stay well
below. For a thousand readers it makes an event and writes it to each in turn, in a loop: p50 and p99 are then the
time that these writes and their reading take, which a server in one thread of Python is hardly below; and what the
last case delivers is the most that can be seen to arrive one by one. There either of the two is the limit: the one
whose share of a core is near 1.

Every other question that reads over HTTP has the generator's share of a core in a column of its own: while that is
well below 1, the generator waits for the server. On two cores the generator, the server and Redis also wait for each
other.
""",
)
