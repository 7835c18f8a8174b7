"""uvicorn (httptools, uvloop) with sse-starlette."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sse_starlette import EventSourceResponse
from starlette.applications import Starlette
from starlette.routing import Route

from benchmarks.servers.uvicorn import serve

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request


async def burst(request: Request) -> EventSourceResponse:
    """`count` events of `size` bytes, with ids."""
    count, data = int(request.query_params["count"]), "x" * int(request.query_params["size"])

    async def events() -> AsyncGenerator[dict[str, str]]:
        for seq in range(1, count + 1):
            yield {"id": str(seq), "data": data}

    return EventSourceResponse(events(), sep="\n")


serve(Starlette(routes=[Route("/burst", burst)]))
