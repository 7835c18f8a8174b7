"""Reads a stream from Redis with redis-py alone, page by page: the floor for any reader."""

from __future__ import annotations

import asyncio
import json
import time

from redis.asyncio import Redis

from benchmarks.processes import options

PAGE = 1000


async def main() -> dict[str, float]:
    """Page through to the end."""
    given = options()
    async with Redis.from_url(given["url"]) as client:
        began, cpu = time.monotonic(), time.process_time()
        seen, start = 0, "-"
        while page := await client.execute_command("XRANGE", given["key"], start, "+", "COUNT", PAGE):  # type: ignore[no-untyped-call]
            seen += len(page)
            start = f"({page[-1][0].decode()}"
        seconds = time.monotonic() - began
    return {"events/s": seen / seconds, "µs CPU/event": (time.process_time() - cpu) / seen * 1e6}


if __name__ == "__main__":
    print(json.dumps(asyncio.run(main())))
