"""Stores events with redis-py alone, as its docs recommend: pipelines of 50 XADDs, each awaited before the next.

Options: `url`; `runs`, each of which is a task; `count`, the events of all runs together; `size`, the bytes of each;
`connections`, which the tasks share; `on_trio`: on trio-asyncio's event loop instead of asyncio's own.
"""

from __future__ import annotations

import asyncio
import json
import time
from typing import TYPE_CHECKING, Any

from redis.asyncio import BlockingConnectionPool, Redis

from benchmarks.processes import options
from benchmarks.redis_server import cpu_at

if TYPE_CHECKING:
    from collections.abc import Mapping

PIPED = 50
"""XADDs in a pipeline."""
WARM_UP = 2000
"""Events that are stored before the clock runs."""


async def write(client: Redis, key: str, count: int, data: bytes) -> None:
    """Add events to one stream."""
    for first in range(1, count + 1, PIPED):
        pipe = client.pipeline(transaction=False)
        for seq in range(first, min(first + PIPED, count + 1)):
            fields: dict[Any, Any] = {"seq_id": seq, "data": data, "timestamp": round(time.time() * 1000)}
            pipe.xadd(key, fields, id=f"{seq}-0")
        await pipe.execute()


async def stored(client: Redis, name: str, *, runs: int, count: int, size: int) -> None:
    """Store `count` events in `runs` streams together."""
    async with asyncio.TaskGroup() as tasks:
        for number in range(runs):
            tasks.create_task(write(client, f"{name}:{number}", count // runs, b"x" * size))


async def main(given: Mapping[str, Any]) -> dict[str, float]:
    """Store a few events, then those that count."""
    url, runs, size = given["url"], given["runs"], given["size"]
    pool = BlockingConnectionPool.from_url(url, max_connections=given["connections"], timeout=None)
    async with Redis(connection_pool=pool) as client:
        await stored(client, "warm", runs=runs, count=max(WARM_UP, runs * PIPED), size=size)
        redis, busy, wall = cpu_at(url), time.process_time(), time.monotonic()
        await stored(client, "run", runs=runs, count=given["count"], size=size)
        wall, busy, redis = time.monotonic() - wall, time.process_time() - busy, cpu_at(url) - redis
    count = given["count"] // runs * runs
    return {
        "events/s": count / wall,
        "µs Python CPU/event": busy / count * 1e6,
        "µs Redis CPU/event": redis / count * 1e6,
    }


if __name__ == "__main__":
    given = options()
    if given.pop("on_trio", False):
        import trio_asyncio  # which changes asyncio's own loops as well

        print(json.dumps(trio_asyncio.run(trio_asyncio.aio_as_trio(main), given)))
    else:
        print(json.dumps(asyncio.run(main(given))))
