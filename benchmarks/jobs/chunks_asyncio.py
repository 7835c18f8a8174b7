"""What a chunk costs on asyncio: through the predecessor's design, and through Starlette's response.

python -m benchmarks.jobs.chunks_asyncio '{"way": "predecessor", "count": 50000}'
"""

from __future__ import annotations

import asyncio
import json
import time
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import StreamingResponse

from benchmarks.jobs.chunks import bare, is_cancelled, measured
from benchmarks.processes import options

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from starlette.types import ASGIApp, Send

PING: Final = b": ping\n\n"


def predecessor(chunks: AsyncGenerator[bytes]) -> ASGIApp:
    """Wrapper around wrapper, as plainly as possible."""
    return ResponseWithStatus(kept_alive(watched(chunks)), media_type="text/event-stream")


async def watched(chunks: AsyncGenerator[bytes], interval: float = 0.5) -> AsyncGenerator[bytes]:
    """Look at the status when a chunk comes, if the last look is that long ago."""
    looked = time.monotonic()
    async for chunk in chunks:
        if (now := time.monotonic()) - looked >= interval:
            looked = now
            if await is_cancelled():
                return
        yield chunk


async def kept_alive(chunks: AsyncGenerator[bytes], interval: float = 30.0) -> AsyncGenerator[bytes]:
    """A task fills a queue; whoever has waited that long for it pings."""
    queue: asyncio.Queue[bytes | None] = asyncio.Queue()

    async def fill() -> None:
        try:
            async for chunk in chunks:
                await queue.put(chunk)
        finally:
            await queue.put(None)

    task = asyncio.create_task(fill())
    try:
        while True:
            try:
                chunk = await asyncio.wait_for(queue.get(), interval)
            except TimeoutError:
                yield PING
                continue
            if chunk is None:
                return
            yield chunk
    finally:
        task.cancel()


class ResponseWithStatus(StreamingResponse):
    """A chunk may be `(content, status)`; the first one's status is the response's."""

    async def stream_response(self, send: Send) -> None:
        """Look at the first chunk, and then send the headers and all of them."""
        chunks = aiter(self.body_iterator)
        content, self.status_code = _parted(await anext(chunks))
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        await send({"type": "http.response.body", "body": content, "more_body": True})
        async for chunk in chunks:
            content, _ = _parted(chunk)
            await send({"type": "http.response.body", "body": content, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


def _parted(chunk: Any) -> tuple[bytes, int]:
    content, status = chunk if isinstance(chunk, tuple) else (chunk, 200)
    return content.encode() if isinstance(content, str) else content, status


WAYS: Final[dict[str, Callable[[AsyncGenerator[bytes]], ASGIApp]]] = {"predecessor": predecessor, "bare": bare}

if __name__ == "__main__":
    way = WAYS[options()["way"]]
    print(json.dumps(asyncio.run(measured(way, partial(asyncio.sleep, 0), asyncio.Event().wait))))
