"""P9: what does a stream cost on which nothing happens?"""

from __future__ import annotations

import resource
import time
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from benchmarks.clients import held, started_run, starting, stream_of
from benchmarks.load import allow_files
from benchmarks.model import Case, Chart, Figure, Goal, Question
from benchmarks.processes import BenchmarkError, module, penstock, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from benchmarks.model import Figures, Scale
    from benchmarks.processes import Server

SIZES = (1_000, 5_000)
ONE_RUN, OWN_RUNS, PLAIN = "penstock, one run", "penstock, a run each", "Hypercorn trio, plain StreamingResponse"
FEW = 20
"""Streams that come and go before it is measured, for what a server makes once."""
SECONDS = 3600.0
"""A silence that outlasts the measurement."""
STEADY, LOOK, PATIENCE = 0.5, 0.05, 20.0
"""Seconds without growth after which memory has settled; between two looks; and after which it should have."""

NOTES = f"""\
Each turn has a server of its own. {FEW} streams come and go; then resident memory is read, so many readers connect
and have their headers, memory has not changed for {STEADY:g} s, and it is read again: the difference, by the streams.
Each stream has had one event, and is silent. *{ONE_RUN}*: all read the same run. *{OWN_RUNS}*: each reader has
started a run of its own, so its record, its producer and its log are in the figure; it is reported only. The floor is
what the server needs of each connection, which is all that there is in the plain response.
"""


def _one_run(server: Server) -> dict[str, Any]:
    return {"urls": stream_of(server, started_run(server, "silence", seconds=SECONDS))}


def _own_runs(server: Server) -> dict[str, Any]:
    return {"urls": f"{server.url}/v1/runs", **starting("silence", seconds=SECONDS)}


def _plain(server: Server) -> dict[str, Any]:
    return {"urls": f"{server.url}/silence"}


def _settled(server: Server) -> float:
    """Resident memory, when it no longer changes."""
    until = time.monotonic() + PATIENCE
    seen, since = server.rss(), time.monotonic()
    while time.monotonic() < since + STEADY:
        if time.monotonic() > until:
            raise BenchmarkError(f"the memory of {server.url} did not settle in {PATIENCE:g} s")
        time.sleep(LOOK)
        if (now := server.rss()) != seen:
            seen, since = now, time.monotonic()
    return seen


def _measured(argv: Sequence[str], asks: Callable[[Server], dict[str, Any]], readers: Mapping[str, int]) -> Figures:
    """The growth of the server's memory with readers, and then with more readers."""
    figures: dict[str, float] = {}
    with serving(argv) as server, ExitStack() as connected:
        asked = asks(server)
        with held(readers=FEW, **asked):
            pass
        before, there = _settled(server), 0
        for name, number in readers.items():
            connected.enter_context(held(readers=number - there, **asked))
            there = number
            figures[name] = (_settled(server) - before) / number / 1024
    return figures | {"MiB with none": before / 1024**2}


@contextmanager
def cases(scale: Scale) -> Iterator[Sequence[Case]]:
    """A server for each turn, since memory that was used once stays with a process."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    allow_files(max(SIZES))
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    serves = penstock(drain_timeout=0)
    try:
        yield [
            Case(
                kind,
                partial(_measured, argv, asks, {_figure(size): scale.count(size) for size in sizes}),
                f"only {allowed:,} files may be open here" if scale.count(max(sizes)) + 100 > allowed else None,
            )
            for kind, argv, asks, sizes in (
                (ONE_RUN, serves, _one_run, SIZES),
                (PLAIN, module("servers.hypercorn_plain"), _plain, SIZES),
                (OWN_RUNS, serves, _own_runs, SIZES[:1]),
            )
        ]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def _figure(size: int) -> str:
    return f"KiB/stream of {size:,}"


QUESTION = Question(
    number=9,
    name="memory",
    asks="memory of a stream on which nothing happens, with 1,000 and 5,000 connections",
    cases=cases,
    goals=[
        Goal(
            f"{size:,} readers of one run, to Hypercorn's plain response",
            Figure(ONE_RUN, _figure(size)),
            Figure(PLAIN, _figure(size)),
            at_most=1.15,
        )
        for size in SIZES
    ],
    charts=[Chart(f"Memory of an idle stream, {size:,} connections", _figure(size)) for size in SIZES],
    notes=NOTES,
)
