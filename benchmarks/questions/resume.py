"""P6: does a resume near the end take longer, the more is stored?"""

from __future__ import annotations

import time
from contextlib import contextmanager
from functools import partial
from http.client import HTTPConnection
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import httpx2

from benchmarks.clients import WAIT, stored_run, stream_of
from benchmarks.model import Case, Chart, Figure, Goal, Question, percentile
from benchmarks.processes import BenchmarkError, module, penstock, serving
from benchmarks.redis_server import redis_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.model import Figures, Scale
    from benchmarks.processes import Server
    from benchmarks.redis_server import Redis

SIZES, LAST, SIZE = (100, 10_000, 1_000_000), 10, 100
RESUMES, WATCHED = 300, 200
SLOW_RESUMES, SLOW_WATCHED = 50, 10
P50, COMMANDS = "p50 ms", "commands"
OURS = {size: f"penstock, {size:,} entries" for size in SIZES}
PREDECESSOR = f"predecessor's design, {SIZES[1]:,} entries"


def resumed(url: str, redis: Redis, *, times: int, watched: int) -> Figures:
    """Resume again and again over one connection, and again while Redis says what it is asked.

    Raises:
        BenchmarkError: the stream was not what was missing.
    """
    parts = urlsplit(url)
    connection = HTTPConnection(parts.hostname or "", parts.port, timeout=WAIT)

    def resume() -> float:
        began = time.perf_counter()
        connection.request("GET", f"{parts.path}?{parts.query}")
        body = connection.getresponse().read()
        took = time.perf_counter() - began
        if (events := body.count(b"data: ")) != LAST:
            raise BenchmarkError(f"{url}: {events} events of {LAST}")
        return took * 1000

    resume()
    took = sorted(resume() for _ in range(times))
    with redis.watched() as asked:
        for _ in range(watched):
            resume()
    connection.close()
    return {P50: percentile(took, 50), "p99 ms": percentile(took, 99), COMMANDS: round(asked.commands / watched, 1)}


def stored_by_predecessor(server: Server, count: int) -> str:
    """Start a run, and wait for its end; where its stream is."""
    given = {"producer": "burst", "count": count, "size": SIZE}
    run = httpx2.post(f"{server.url}/runs", json=given, timeout=WAIT).raise_for_status().json()
    url = f"{server.url}/runs/{run['id']}/stream"
    httpx2.get(url, timeout=WAIT).raise_for_status()
    return url


@contextmanager
def cases(scale: Scale) -> Iterator[Sequence[Case]]:
    """Runs of three sizes that have ended, read from a server which did not run them."""
    sizes = {size: scale.count(size) for size in SIZES}
    most, times, watched = max(sizes.values()) + 1, scale.count(RESUMES), scale.count(WATCHED)
    with redis_server() as redis, redis_server() as other, serving(penstock(log=redis.url, max_entries=most)) as server:
        with serving(penstock(log=redis.url, max_entries=most)) as owner:
            stored = {size: stored_run(owner, "burst", count=count, size=SIZE) for size, count in sizes.items()}
        ours = [
            Case(
                OURS[size],
                partial(
                    resumed,
                    f"{stream_of(server, stored[size])}?starting_after={count + 1 - LAST}",
                    redis,
                    times=times,
                    watched=watched,
                ),
            )
            for size, count in sizes.items()
        ]
        with serving(module("servers.predecessor", url=other.url, max_entries=most)) as predecessor:
            url = f"{stored_by_predecessor(predecessor, sizes[SIZES[1]])}?starting_after={sizes[SIZES[1]] + 1 - LAST}"
            slow = partial(resumed, url, other, times=scale.count(SLOW_RESUMES), watched=min(watched, SLOW_WATCHED))
            yield [*ours, Case(PREDECESSOR, slow)]


QUESTION = Question(
    number=6,
    name="resume",
    asks=f"resuming for the last {LAST} of 100, 10,000 and 1,000,000 stored entries",
    cases=cases,
    goals=[
        *(Goal(f"commands per resume, {size:,} entries", Figure(OURS[size], COMMANDS), at_most=3) for size in SIZES),
        *(
            Goal(
                f"p50, {size:,} entries to {SIZES[0]:,}",
                Figure(OURS[size], P50),
                Figure(OURS[SIZES[0]], P50),
                at_most=1.3,
            )
            for size in SIZES[1:]
        ),
    ],
    charts=[Chart(f"Resuming for the last {LAST} entries", P50, log=True)],
    notes="""\
- A resume is a `GET` with `starting_after`, timed from before the request is sent until the last byte of the stream is
  there, one after the other over one connection that is kept alive. The run has ended, so the stream ends by itself.
- The server that answers is not the one that ran the runs: nothing of them is in its memory, so what it sends comes
  from Redis.
- A difference of 30 % counts as the same time: so much two turns of one case may differ.
- The commands to Redis are reported by its `MONITOR`, over resumes that are not timed, rounded to a tenth: the server
  also looks for cancels and lost runs now and then. What a script does within Redis is not counted.
- The floor is a round trip over HTTP and two to Redis: a reader subscribes to a run before it looks at it, lest it miss
  what is added in between; then one script looks up the run's record and the entries that follow. No reader waits for
  the third command, which ends the subscription.
""",
)
