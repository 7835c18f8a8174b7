"""uvicorn (httptools, uvloop) with the SSE that FastAPI brings."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fastapi import FastAPI
from fastapi.sse import EventSourceResponse, ServerSentEvent

from benchmarks.servers.uvicorn import serve

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

app = FastAPI()


@app.get("/burst", response_class=EventSourceResponse, response_model=None)
async def burst(count: int, size: int) -> AsyncGenerator[ServerSentEvent]:
    """`count` events of `size` bytes, with ids."""
    data = "x" * size
    for seq in range(1, count + 1):
        yield ServerSentEvent(raw_data=data, id=str(seq))


serve(app)
