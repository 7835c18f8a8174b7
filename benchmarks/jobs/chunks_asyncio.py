"""Measures the CPU of a chunk on asyncio: through the predecessor's design, and through Starlette's response.

python -m benchmarks.jobs.chunks_asyncio '{"way": "predecessor", "count": 50000}'
"""

from __future__ import annotations

import asyncio
import json
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from starlette.responses import StreamingResponse

from benchmarks.jobs.chunks import bare, is_cancelled, measured
from benchmarks.processes import options
from benchmarks.servers.predecessor import until_cancelled, with_pings

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Callable

    from starlette.types import ASGIApp, Send


def predecessor(chunks: AsyncGenerator[bytes]) -> ASGIApp:
    """The predecessor's wrappers around the source."""
    return ResponseWithStatus(with_pings(until_cancelled(chunks, is_cancelled)), media_type="text/event-stream")


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
