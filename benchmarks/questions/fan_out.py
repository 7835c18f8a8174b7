"""P5: how fast does an event reach all readers of its run?"""

from __future__ import annotations

import json
import shutil
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final

import httpx2

from benchmarks.checkout import HERE
from benchmarks.clients import WAIT, reading, started_run, stream_of
from benchmarks.model import Case, Chart, Comparison, Figure, Goal, Question
from benchmarks.processes import serving

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.checkout import Checkout
    from benchmarks.model import Figures, Scale
    from benchmarks.processes import Server

READERS: Final = (1, 100, 1000)
RATE, SIZE, SECONDS = 50, 100, 2.5
WARM_UP: Final = 0.5
"""Seconds of events before those that are measured."""
CONNECTING: Final = 0.002
"""Seconds that one reader is given to connect, before there are events."""
FOR_LONG: Final = 300
"""Seconds that a run would last if it was not cancelled."""
DURABLE: Final = Path(__file__).parents[1] / "servers" / "durable"
INSTALL: Final = "npm ci --prefix benchmarks/servers/durable"


def fan_out(
    server: Server, url: str, *, readers: int, rate: float, seconds: float, warm_up: float = WARM_UP
) -> Figures:
    """Let readers read a stream with `rate` events a second, and measure what arrives in some seconds.

    Args:
        server: whose CPU is measured, in the same seconds.
        url: the stream; its events have marks.
        readers: how many.
        rate: events a second that are to be made. One less than this and `seconds` promise is no loss: it was beside
            either end.
        seconds: how long.
        warm_up: seconds before, from when all readers had their headers.
    """
    load = reading(url, readers=readers, seconds=seconds, warm_up=warm_up)
    load.wait_for("measuring")
    before = server.cpu()
    load.wait_for("measured")
    cpu = server.cpu() - before
    seen = load.result()
    return {
        "delivered/s": seen["arrived"] / seconds,
        "delivered share": seen["events"] / readers / max(seen["made"], rate * seconds - 1),
        "p50 ms": seen.get("p50", float("nan")),
        "p99 ms": seen.get("p99", float("nan")),
        "server CPU, cores": cpu / seconds,
        "µs CPU/event": cpu / max(seen["arrived"], 1) * 1e6,
        "generator busy": seen["busy"],
    }


@contextmanager
def penstock_ticks(server: Server, *, rate: float, size: int = SIZE, offset: float = 0) -> Iterator[str]:
    """Run a producer of `rate` events a second, from `offset` seconds on, during the block; yields its stream's URL."""
    run_id = started_run(server, "ticks", rate=rate, size=size, seconds=FOR_LONG, offset=offset)
    try:
        yield stream_of(server, run_id)
    finally:
        httpx2.post(f"{server.url}/v1/runs/{run_id}/cancel", json={}, timeout=WAIT).raise_for_status()


def penstock_fan_out(server: Server, *, readers: int, rate: float, seconds: float, size: int = SIZE) -> Figures:
    """`fan_out` of a new run, which begins when all readers are connected."""
    offset = readers * CONNECTING
    with penstock_ticks(server, rate=rate, size=size, offset=offset) as url:
        return fan_out(server, url, readers=readers, rate=rate, seconds=seconds, warm_up=offset + WARM_UP)


@contextmanager
def durable_ticks(server: Server, *, offset: float = 0) -> Iterator[str]:
    """A stream of the Durable Streams server, which has its rate from its options, in the same way."""
    url = f"{server.url}/v1/stream/{token_hex(8)}/{round(offset * 1000)}"
    httpx2.put(url, headers={"Content-Type": "text/plain"}, timeout=WAIT).raise_for_status()
    try:
        yield f"{url}?offset=-1&live=sse"
    finally:
        httpx2.delete(url, timeout=WAIT).raise_for_status()


def durable_missing() -> str | None:
    """Why the Durable Streams server cannot be started, or None."""
    if shutil.which("node") is None:
        return "no node in PATH"
    if not (DURABLE / "node_modules").is_dir():
        return f"not installed: {INSTALL}"
    return None


def durable_fan_out(server: Server, *, readers: int, rate: float, seconds: float) -> Figures:
    """`fan_out` of a new stream."""
    offset = readers * CONNECTING
    with durable_ticks(server, offset=offset) as url:
        return fan_out(server, url, readers=readers, rate=rate, seconds=seconds, warm_up=offset + WARM_UP)


def of_penstock(readers: int) -> str:
    """The name of penstock's case."""
    return f"penstock, {_so_many(readers)}"


def of_durable(readers: int) -> str:
    """The name of the peer's case."""
    return f"Durable Streams for Node, {_so_many(readers)}"


def _so_many(readers: int) -> str:
    return f"{readers:,} reader{'' if readers == 1 else 's'}"


@contextmanager
def compared(checkout: Checkout, scale: Scale) -> Iterator[Sequence[Case]]:
    given: dict[str, Any] = {"rate": RATE, "seconds": scale.seconds(SECONDS)}
    with checkout.penstock() as server:
        yield [
            Case(of_penstock(readers), partial(penstock_fan_out, server, readers=readers, **given))
            for readers in READERS
        ]


@contextmanager
def cases(scale: Scale) -> Iterator[Sequence[Case]]:
    """A server of each kind, with nothing to do between the turns."""
    given: dict[str, Any] = {"rate": RATE, "seconds": scale.seconds(SECONDS)}
    missing = durable_missing()
    with ExitStack() as stack:
        ours = stack.enter_context(compared(HERE, scale))
        found: list[Case] = []
        argv = ["node", str(DURABLE / "server.mjs"), json.dumps({"rate": RATE, "size": SIZE})]
        durable = None if missing else stack.enter_context(serving(argv))
        for readers, case in zip(READERS, ours, strict=True):
            found.append(case)
            turn = partial(durable_fan_out, durable, readers=readers, **given) if durable else dict
            found.append(Case(of_durable(readers), turn, missing))
        yield found


def _goals() -> Iterator[Goal]:
    for readers in READERS:
        share = Figure(of_penstock(readers), "delivered share")
        yield Goal(f"{_so_many(readers)}: all delivered", share, at_least=1)
    for readers in READERS:
        ours, theirs = Figure(of_penstock(readers), "p50 ms"), Figure(of_durable(readers), "p50 ms")
        yield Goal(f"{_so_many(readers)}: p50, to Durable Streams", ours, theirs, at_most=1)


SERIES: Final = {
    "penstock": [(readers, of_penstock(readers)) for readers in READERS],
    "Durable Streams for Node": [(readers, of_durable(readers)) for readers in READERS],
}

QUESTION = Question(
    number=5,
    name="fan_out",
    asks="1, 100 and 1,000 readers of one run with 50 events/s of about 100 bytes",
    cases=cases,
    goals=[*_goals()],
    charts=[
        Chart("From its making to a reader: half of all events", "p50 ms", SERIES, "readers", log=True),
        Chart("From its making to a reader: all but 1 in 100", "p99 ms", SERIES, "readers", log=True),
        Chart("What the delivery of an event to one reader costs", "µs CPU/event", SERIES, "readers", log=True),
    ],
    comparison=Comparison("µs CPU/event", compared),
    notes="""\
Events are born in the server's process, 50 a second, and carry the time of it; the readers are in one other process,
which takes the time again when it has read them. All have connected before the first. Both servers keep all in
memory. The Durable Streams server is started as its README says. Its events are appended in its own process, straight
to its store and in plain text, and not by a POST for each as its users would: this spares it a request, which would
otherwise be in its p50. For each event it also sends its cursor, in an event of its own; Node hands the system both
at once.

*Delivered* is what came in the measured seconds. The *share* is of the events that were to be made in these seconds,
and counts those that came up to three seconds late: below 1, the server did not keep up, and slowed the producer that
it shares a process with. Then p50 and p99 are those of fewer events. A delivery's floor is a write by the server and
a read by the client, for each reader, one after the other: [load](#load) shows them without any server around them.
The CPU is the server's alone, of the same seconds.

What is missed to Node is CPU for each delivery: Trio's scheduler, Hypercorn and Starlette take it, in Python, and the
write itself is some of it.
""",
)
