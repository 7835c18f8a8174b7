"""P3: how fast are events stored?"""

from __future__ import annotations

import csv
import shutil
import subprocess
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.checkout import HERE
from benchmarks.model import Case, Chart, Comparison, Figure, Goal, Question
from benchmarks.processes import BenchmarkError
from benchmarks.redis_server import cpu_at, redis_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.checkout import Checkout
    from benchmarks.model import Figures, Scale
    from benchmarks.redis_server import Redis

COUNT, SIZE, WINDOW, MANY, PIPED = 200_000, 200, 2000, 100, 50
PROGRAM = "redis-benchmark"
OURS = {1: "penstock, 1 run", MANY: f"penstock, {MANY} runs"}
PIPELINE = {1: f"redis-py, pipelines of {PIPED}, 1 run", MANY: f"redis-py, pipelines of {PIPED}, {MANY} runs"}
CONNECTIONS = {1: 1, MANY: WINDOW // PIPED}
"""The connections that the runs of a bare pipeline share; as many events are under way as in penstock's cases."""
ON_TRIO = f"redis-py through trio-asyncio, pipelines of {PIPED}, 1 run"
BARE = f"{PROGRAM}, 1 connection, pipelines of {PIPED}"
WIDE = f"{PROGRAM}, 1 connection, pipelines of {WINDOW}"
BEST = f"{PROGRAM}, 8 connections, pipelines of 200"


@contextmanager
def cases(scale: Scale) -> Iterator[Sequence[Case]]:
    """Each begins with an empty Redis."""
    count = scale.count(COUNT)
    missing = None if shutil.which(PROGRAM) else f"there is no {PROGRAM}"
    with redis_server() as redis:

        def ours(runs: int) -> Case:
            return _stored(HERE, redis, runs=runs, count=count)

        def pipeline(runs: int) -> Case:
            turn = partial(_job, HERE, redis, "pipeline", runs=runs, count=count // 2, connections=CONNECTIONS[runs])
            return Case(PIPELINE[runs], turn)

        def bare(name: str, connections: int, piped: int) -> Case:
            return Case(name, partial(_bare, redis, connections=connections, piped=piped, count=2 * count), missing)

        yield [
            *(each(runs) for runs in OURS for each in (ours, pipeline)),
            Case(
                ON_TRIO,
                partial(_job, HERE, redis, "pipeline", runs=1, count=count // 2, connections=1, on_trio=True),
            ),
            bare(BARE, 1, PIPED),
            bare(WIDE, 1, WINDOW),
            bare(BEST, 8, 200),
        ]


@contextmanager
def compared(checkout: Checkout, scale: Scale) -> Iterator[Sequence[Case]]:
    with redis_server() as redis:
        yield [_stored(checkout, redis, runs=runs, count=scale.count(COUNT)) for runs in OURS]


def _stored(checkout: Checkout, redis: Redis, *, runs: int, count: int) -> Case:
    return Case(OURS[runs], partial(_job, checkout, redis, "store", runs=runs, count=count, window=WINDOW))


def _job(checkout: Checkout, redis: Redis, name: str, **given: int) -> Figures:
    redis.client.flushall()
    return checkout.job(f"jobs.{name}", url=redis.url, size=SIZE, **given)


def _bare(redis: Redis, *, connections: int, piped: int, count: int) -> Figures:
    """Let redis-benchmark add to one stream.

    Raises:
        BenchmarkError: it failed.
    """
    redis.client.flushall()
    argv = [PROGRAM, "-p", str(redis.port), "-c", str(connections), "-P", str(piped), "-n", str(count), "--csv"]
    xadd = ["XADD", "stream", "*", "seq_id", "1", "data", "x" * SIZE, "timestamp", "1"]
    before = cpu_at(redis.url)
    done = subprocess.run([*argv, *xadd], capture_output=True, text=True, check=False)
    used = cpu_at(redis.url) - before
    rows = [*csv.DictReader(done.stdout.splitlines())]
    if done.returncode or len(rows) != 1:
        raise BenchmarkError(f"{PROGRAM} failed:\n{done.stdout}{done.stderr}")
    added = redis.client.xlen("stream")
    return {"events/s": float(rows[0]["rps"]), "µs Redis CPU/event": used / added * 1e6}


def _to(peer: str, says: str, runs: int, at_least: float) -> Goal:
    return Goal(f"{OURS[runs]}, to {says}", Figure(OURS[runs], "events/s"), Figure(peer, "events/s"), at_least=at_least)


QUESTION = Question(
    number=3,
    name="store",
    asks="storing events of 200 bytes in Redis, with about 2,000 under way at most",
    cases=cases,
    goals=[
        *(_to(PIPELINE[runs], f"redis-py's pipelines of {PIPED}", runs, 6) for runs in OURS),
        *(_to(BARE, f"{PROGRAM} with one connection", runs, 0.4) for runs in OURS),
    ],
    charts=[Chart("Stored events", "events/s")],
    comparison=Comparison("µs Python CPU/event", compared),
    notes=f"""\
- penstock: a supervisor in a process without HTTP. Producers yield events one by one as fast as they are allowed to;
  `max_pending_bytes` and `max_process_pending_bytes` are what {WINDOW:,} events take, and there are no other
  settings. The clock runs from the moment at which all producers may begin until the last run has ended, which Redis
  acknowledges after all of its events. 200 bytes is the size of the field `data`.
- redis-py: asyncio with hiredis, pipelines of {PIPED} XADDs without a transaction, each awaited before the next one
  of its run, with the same three fields, and ids of its own. {MANY} runs share {CONNECTIONS[MANY]} connections, so
  that as many events are under way. It does less: no epoch is checked, nothing trimmed, no lease renewed, and no
  reader notified.
- redis-py through trio-asyncio is what penstock would do if it sent each event as a separate command.
- {PROGRAM} is a program in C that sends the same prepared bytes again and again: Redis' own share of the work,
  without that of any client that has something to say. With the same pipelines as redis-py's it is what penstock is
  judged by; longer ones, and more connections, show how far Redis goes.
- What bounds penstock is the CPU of its one thread of Python, beside which Redis works: a producer's step, the event,
  its encoding, its place in the buffer, the tail and the append. redis-py alone takes more than that for each
  command: six times its rate would leave a sixth of its time per event for everything. With {MANY} runs the window is
  full of few events of each, and Redis and Python take turns rather than work at the same time.
- Every turn begins with an empty Redis. What it costs is the CPU of its whole process, background work included.
""",
)
