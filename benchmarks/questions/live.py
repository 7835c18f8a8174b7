"""P2: how fast do live events come, one by one?"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.checkout import HERE
from benchmarks.clients import rate, starting
from benchmarks.model import Case, Chart, Comparison, Figure, Goal, Question
from benchmarks.processes import module, serving

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.checkout import Checkout
    from benchmarks.model import Scale

COUNT, SIZE = 50_000, 100
RUN, DIRECT = "penstock, a run in memory", "penstock, a source without a run"
SSE_STARLETTE, FASTAPI = "uvicorn + sse-starlette", "uvicorn + FastAPI's SSE"
PLAIN = "Hypercorn trio, plain StreamingResponse"

NOTES = f"""\
A request asks for a stream, and its source yields {COUNT:,} events of about 120 bytes, one by one, without ever
waiting by itself. With a run, the request is the one that starts it (`"stream": true`), so the reader is there from
the first event on; the producer waits for no reader, and what has come together while a send was under way goes out
in the next one. All others are asked for one event at a time, and send each by itself.
"""


@contextmanager
def compared(checkout: Checkout, scale: Scale) -> Iterator[Sequence[Case]]:
    count = scale.count(COUNT)
    asked = starting("burst", count=count, size=SIZE)
    with checkout.penstock(max_entries=count + 1) as run, checkout.server("servers.direct") as direct:
        yield [
            Case(RUN, partial(rate, run, f"{run.url}/v1/runs", events=count, **asked)),
            Case(DIRECT, partial(rate, direct, f"{direct.url}/burst?count={count}&size={SIZE}", events=count)),
        ]


@contextmanager
def cases(scale: Scale) -> Iterator[Sequence[Case]]:
    """The request of each reader starts its stream."""
    count = scale.count(COUNT)
    query = f"burst?count={count}&size={SIZE}"
    with (
        compared(HERE, scale) as (run, direct),
        serving(module("servers.uvicorn_sse")) as starlette,
        serving(module("servers.fastapi_sse")) as fastapi,
        serving(module("servers.hypercorn_plain")) as plain,
    ):
        yield [
            run,
            Case(SSE_STARLETTE, partial(rate, starlette, f"{starlette.url}/{query}", events=count)),
            Case(FASTAPI, partial(rate, fastapi, f"{fastapi.url}/{query}", events=count)),
            direct,
            Case(PLAIN, partial(rate, plain, f"{plain.url}/{query}&joined=1", events=count)),
        ]


QUESTION = Question(
    number=2,
    name="live",
    asks="live events one by one to one reader, as fast as the producer yields",
    cases=cases,
    goals=[
        Goal(
            "a run in memory, to uvicorn + sse-starlette",
            Figure(RUN, "events/s"),
            Figure(SSE_STARLETTE, "events/s"),
            at_least=1,
        ),
        Goal(
            "a source without a run, to uvicorn + sse-starlette",
            Figure(DIRECT, "events/s"),
            Figure(SSE_STARLETTE, "events/s"),
            at_least=1,
        ),
    ],
    charts=[Chart("Live events to one reader", "events/s")],
    notes=NOTES,
    comparison=Comparison("µs CPU/event", compared),
)
