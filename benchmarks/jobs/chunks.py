"""Sends chunks through a response without a server: its `send` only counts.

The jobs `chunks_trio` and `chunks_asyncio` put the measured code between the source and `send`. They are separate so
that no process that measures a peer imports penstock.
"""

from __future__ import annotations

import gc
import time
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import StreamingResponse

from benchmarks.processes import options

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Awaitable, Callable

    from starlette.types import ASGIApp, Message

CHUNK: Final = b"id: 1\ndata: " + b"x" * 100 + b"\n\n"
WARM_UP: Final = 2_000
"""Chunks that go through before it is measured."""
SCOPE: Final = {"type": "http", "asgi": {"version": "3.0", "spec_version": "2.1"}, "method": "GET", "path": "/"}


async def source(count: int, suspend: Callable[[], Awaitable[object]]) -> AsyncGenerator[bytes]:
    """Yield chunks; the other tasks run before each."""
    for _ in range(count):
        await suspend()
        yield CHUNK


def bare(chunks: AsyncGenerator[bytes]) -> ASGIApp:
    """Starlette's response, which streams, and no more."""
    return StreamingResponse(chunks, media_type="text/event-stream")


async def is_cancelled() -> bool:
    """No run is ever cancelled here."""
    return False


async def measured(
    respond: Callable[[AsyncGenerator[bytes]], ASGIApp],
    suspend: Callable[[], Awaitable[object]],
    wait: Callable[[], Awaitable[Any]],
) -> dict[str, float]:
    """Let the chunks through, first a few and then all.

    Args:
        respond: makes the response of a source.
        suspend: lets the other tasks run.
        wait: waits forever, as `receive` does while the client is connected.
    """
    seen = 0

    async def send(message: Message) -> None:
        nonlocal seen
        seen += message.get("body") == CHUNK

    async def through(count: int) -> float:
        nonlocal seen
        seen = 0
        gc.collect()
        began = time.process_time()
        await respond(source(count, suspend))(SCOPE, wait, send)
        cpu = time.process_time() - began
        if seen != count:
            raise RuntimeError(f"{seen} chunks of {count}")
        return cpu

    count = options()["count"]
    await through(WARM_UP)
    return {"µs CPU/chunk": await through(count) / count * 1e6}
