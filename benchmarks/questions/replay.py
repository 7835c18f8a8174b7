"""P1: how fast is what was stored read?"""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from benchmarks.clients import rate, stored_run, stream_of
from benchmarks.model import Case, Chart, Figure, Goal, Question
from benchmarks.processes import job, module, penstock, serving
from benchmarks.redis_server import redis_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.model import Scale

COUNT, SIZE, JOINED = 200_000, 100, 64
MEMORY, REDIS = "penstock, memory", "penstock, Redis"
SSE_STARLETTE = "uvicorn + sse-starlette"
PLAIN = f"Hypercorn trio, {JOINED} events joined"
PAGING = "bare XRANGE paging, redis-py"


@contextmanager
def cases(scale: Scale) -> Iterator[Sequence[Case]]:
    """A run that has ended, in both logs; its peers make their events as they go."""
    count = scale.count(COUNT)
    query = f"count={count}&size={SIZE}"
    with (
        redis_server() as redis,
        serving(penstock(max_entries=count + 1)) as memory,
        serving(penstock(log=redis.url, max_entries=count + 1)) as shared,
        serving(module("servers.uvicorn_sse")) as starlette,
        serving(module("servers.hypercorn_plain")) as plain,
    ):
        in_memory = stored_run(memory, "burst", count=count, size=SIZE)
        in_redis = stored_run(shared, "burst", count=count, size=SIZE)
        key = f"sse:run:{in_redis}"
        yield [
            Case(MEMORY, partial(rate, memory, stream_of(memory, in_memory), events=count)),
            Case(SSE_STARLETTE, partial(rate, starlette, f"{starlette.url}/burst?{query}", events=count)),
            Case(PLAIN, partial(rate, plain, f"{plain.url}/burst?{query}&joined={JOINED}", events=count)),
            Case(REDIS, partial(rate, shared, stream_of(shared, in_redis), events=count)),
            Case(PAGING, partial(job, module("jobs.paging", url=redis.url, key=key, count=count))),
        ]


def _faster(says: str, case: str, peer: str, at_least: float) -> Goal:
    return Goal(says, Figure(case, "events/s"), Figure(peer, "events/s"), at_least=at_least)


QUESTION = Question(
    number=1,
    name="replay",
    asks="replaying 200,000 stored events of about 120 bytes to one client",
    cases=cases,
    goals=[
        _faster("memory, to uvicorn + sse-starlette", MEMORY, SSE_STARLETTE, 12),
        _faster("memory, to Hypercorn with 64 events joined", MEMORY, PLAIN, 0.7),
        _faster("Redis, to bare paging", REDIS, PAGING, 0.6),
    ],
    charts=[Chart("Replay to one client", "events/s")],
    notes=f"""\
- The run has ended, and lies in the log; its peers have what they send at hand, too, but for sse-starlette, which
  makes each event when it sends it, as it always does. A turn reads again and again for half a second at least.
- penstock joins what is ready, up to 64 KiB in one send; the plain response joins {JOINED} events.
- At such rates the load generator is not idle (*generator busy*): what `load` shows for one connection is what can be
  seen.
- Bare paging is the client's whole time with Redis: XRANGE of 1,000 at a time, hiredis, nothing done with the events.
  Its CPU is the client's, that of the others the server's.
""",
)
