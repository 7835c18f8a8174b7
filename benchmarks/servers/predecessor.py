"""The design of penstock's predecessor, as plainly as it can be written: asyncio, uvicorn, redis-py, and polling.

    POST /runs                  {"producer": "ticks", "run_id": "a", "rate": 20, "seconds": 5}: starts a run
    GET  /runs/ID/stream        its events; ?starting_after=N resumes after event N
    POST /runs/ID/cancel        asks it to stop

A run is a task that puts what its producer makes into a buffer, which is flushed every half a second, or at 50 chunks,
by a pipeline of XADDs. A reader polls the run's stream in Redis ten times a second, from its beginning on. A
cancel is a key in Redis; producer and readers look at it as chunks come by, at most every half a second.

Options: `url`, the Redis; `max_entries`, to how many a run's stream is trimmed.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final, TypeVar

from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.responses import JSONResponse, StreamingResponse
from starlette.routing import Route

from benchmarks.processes import options
from benchmarks.servers.phases import first_tick
from benchmarks.servers.uvicorn import serve

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from starlette.requests import Request

T = TypeVar("T")
FLUSH_AFTER: Final = 0.5
"""Seconds between two flushes of a run's buffer."""
FLUSH_AT: Final = 50
"""Chunks that are flushed at once."""
POLL: Final = 0.1
"""Seconds between two looks of a reader that has found nothing."""
BATCH: Final = 100
"""Entries that are read at a time."""
STATUS: Final = 0.5
"""Seconds between two looks at whether a run is cancelled."""
PING: Final = 30.0
"""Seconds of silence after which a reader is pinged."""
TTL: Final = 10_800
"""Seconds for which Redis keeps a run."""
MAX_ENTRIES: Final = 10_000
CONNECTIONS: Final = 10_000
"""Of the pool: it is not to run out, whatever is measured."""


@dataclass(slots=True)
class Writer:
    """The chunks of a run that are not stored yet."""

    redis: Redis
    run_id: str
    max_entries: int
    _buffer: list[dict[Any, Any]] = field(default_factory=list)
    _made: int = 0
    _flushing: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def write(self, data: str, *, complete: bool = False) -> None:
        """Buffer a chunk."""
        self._made += 1
        entry = {"data": data, "seq_id": self._made, "timestamp": time.time(), "complete": int(complete)}
        self._buffer.append(entry)
        if complete or len(self._buffer) >= FLUSH_AT:
            await self.flush()

    async def flush(self) -> None:
        """Store what is buffered."""
        async with self._flushing:
            if not self._buffer:
                return
            entries, self._buffer = self._buffer, []
            key = stream_key(self.run_id)
            async with self.redis.pipeline(transaction=False) as pipe:
                for entry in entries:
                    pipe.xadd(key, entry, maxlen=self.max_entries, approximate=True)
                pipe.expire(key, TTL)
                await pipe.execute()

    async def flush_for_ever(self) -> None:
        """Flush at intervals."""
        while True:
            await asyncio.sleep(FLUSH_AFTER)
            await self.flush()


def stream_key(run_id: str) -> str:
    """The key of a run's chunks."""
    return f"run:{run_id}:stream"


def status_key(run_id: str) -> str:
    """The key of a run's status."""
    return f"run:{run_id}:status"


async def burst(given: dict[str, Any]) -> AsyncGenerator[str]:
    """`count` chunks of `size` bytes."""
    data = "x" * given["size"]
    for _ in range(given["count"]):
        yield data


async def ticks(given: dict[str, Any]) -> AsyncGenerator[str]:
    """`rate` chunks a second for `seconds`, each with the time at which it was made."""
    loop = asyncio.get_running_loop()
    started = loop.time() + first_tick(given)
    for number in range(round(given["rate"] * given["seconds"])):
        await asyncio.sleep(started + number / given["rate"] - loop.time())
        yield f"t={time.monotonic_ns()};"


async def silence(given: dict[str, Any]) -> AsyncGenerator[str]:
    """One chunk, and then none for `seconds`."""
    yield "here"
    await asyncio.sleep(given["seconds"])


PRODUCERS: Final = {"burst": burst, "ticks": ticks, "silence": silence}


async def until_cancelled(source: AsyncGenerator[T], cancelled: Callable[[], Awaitable[bool]]) -> AsyncGenerator[T]:
    """Pass chunks on until the run is cancelled; a cancel is noticed with the next chunk."""
    looked = time.monotonic()
    async with aclosing(source):
        async for chunk in source:
            if (now := time.monotonic()) - looked >= STATUS:
                looked = now
                if await cancelled():
                    return
            yield chunk  # noqa: ASYNC119  (that is its design)


async def with_pings(source: AsyncGenerator[bytes], *, every: float = PING) -> AsyncGenerator[bytes]:
    """Pass chunks on through a queue, and a comment after some seconds without a chunk."""
    queue: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def fill() -> None:
        try:
            async with aclosing(source):
                async for chunk in source:
                    await queue.put(chunk)
        finally:
            queue.put_nowait(None)

    filling = asyncio.create_task(fill())
    try:
        while True:
            try:
                chunk = await asyncio.wait_for(queue.get(), every)
            except TimeoutError:
                yield b": ping\n\n"
                continue
            if chunk is None:
                break
            yield chunk
        await filling
    finally:
        filling.cancel()


async def stored(redis: Redis, run_id: str, starting_after: int) -> AsyncGenerator[bytes]:
    """A run's chunks after one of them, as events."""
    last = "-"
    while True:
        entries: Any = await redis.xrange(stream_key(run_id), last, "+", count=BATCH)
        for entry_id, entry in entries:
            last = f"({entry_id.decode()}"
            seq = int(entry[b"seq_id"])
            if seq > starting_after:
                yield b"id: %d\ndata: %b\n\n" % (seq, entry[b"data"])
            if entry[b"complete"] == b"1":
                return
        if not entries:
            await asyncio.sleep(POLL)


def application(url: str, max_entries: int = MAX_ENTRIES) -> Starlette:
    """The routes, on a Redis."""
    redis = Redis.from_url(url, max_connections=CONNECTIONS)
    tasks: set[asyncio.Task[None]] = set()

    async def cancelled(run_id: str) -> bool:
        return bool(await redis.get(status_key(run_id)) == b"cancelled")

    async def produce(run_id: str, given: dict[str, Any]) -> None:
        writer = Writer(redis, run_id, max_entries)
        flusher = asyncio.create_task(writer.flush_for_ever())
        try:
            made = PRODUCERS[given["producer"]](given)
            async with aclosing(until_cancelled(made, lambda: cancelled(run_id))) as chunks:
                async for chunk in chunks:
                    await writer.write(chunk)
        finally:
            flusher.cancel()
            with suppress(asyncio.CancelledError):
                await flusher
            await writer.write("[DONE]", complete=True)
        await redis.set(status_key(run_id), "completed", ex=TTL, nx=True)

    async def start(request: Request) -> JSONResponse:
        given = await request.json()
        run_id = given.get("run_id") or uuid.uuid4().hex
        task = asyncio.create_task(produce(run_id, given))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        return JSONResponse({"id": run_id}, status_code=201)

    async def stream(request: Request) -> StreamingResponse:
        run_id = request.path_params["run_id"]
        chunks = stored(redis, run_id, int(request.query_params.get("starting_after", 0)))
        watched = until_cancelled(chunks, lambda: cancelled(run_id))
        return StreamingResponse(with_pings(watched), media_type="text/event-stream")

    async def cancel(request: Request) -> JSONResponse:
        await redis.set(status_key(request.path_params["run_id"]), "cancelled", ex=TTL)
        return JSONResponse({"status": "cancelled"})

    async def status(request: Request) -> JSONResponse:
        found: Any = await redis.get(status_key(request.path_params["run_id"]))
        return JSONResponse({"status": found.decode() if found else "running"})

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        yield
        for task in [*tasks]:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await redis.aclose()

    routes = [
        Route("/runs", start, methods=["POST"]),
        Route("/runs/{run_id}", status),
        Route("/runs/{run_id}/stream", stream),
        Route("/runs/{run_id}/cancel", cancel, methods=["POST"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan)


if __name__ == "__main__":
    given = options()
    serve(application(given["url"], given.get("max_entries", MAX_ENTRIES)))
