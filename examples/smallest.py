"""The smallest endpoint: an async generator as a stream of Server-Sent Events. No log, no runs, any ASGI server.

Run it:    hypercorn -k trio examples/smallest.py:app        (or: uvicorn --app-dir examples smallest:app)
Try it:    curl -N http://127.0.0.1:8000/
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import anyio
from starlette.applications import Starlette
from starlette.routing import Route

from penstock import Event, EventStreamResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request


async def count() -> AsyncIterator[Event]:
    """Count to five. When the client goes away, the `sleep` is where this is cancelled."""
    for number in range(1, 6):
        yield Event(data=str(number), id=str(number))
        await anyio.sleep(0.2)


async def endpoint(_request: Request) -> EventStreamResponse:
    """Answer with the stream: pings when it is silent, an error event if it fails, gone when the client is."""
    return EventStreamResponse(count())


app = Starlette(routes=[Route("/", endpoint)])
