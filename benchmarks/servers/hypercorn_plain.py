"""Hypercorn's trio worker as it is, with a plain StreamingResponse: what one gets without penstock."""

from __future__ import annotations

import socket
from functools import cache
from typing import TYPE_CHECKING, Any

import hypercorn.trio
import trio
from hypercorn.config import Config
from starlette.applications import Starlette
from starlette.responses import StreamingResponse
from starlette.routing import Route

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request


@cache
def joined(*, count: int, size: int, joined: int) -> list[bytes]:
    """Events, encoded once, as those of a log are."""
    events = [b"id: %d\ndata: %b\n\n" % (seq, b"x" * size) for seq in range(1, count + 1)]
    return [b"".join(events[first : first + joined]) for first in range(0, count, joined)]


async def burst(request: Request) -> StreamingResponse:
    """`count` events of `size` bytes, with ids; `joined` of them in a chunk."""
    made = joined(**{name: int(value) for name, value in request.query_params.items()})

    async def chunks() -> AsyncGenerator[bytes]:
        for chunk in made:
            yield chunk

    return StreamingResponse(chunks(), media_type="text/event-stream")


async def silence(_request: Request) -> StreamingResponse:
    """One event, and then none."""

    async def chunks() -> AsyncGenerator[bytes]:
        yield b"data: here\n\n"
        await trio.sleep_forever()

    return StreamingResponse(chunks(), media_type="text/event-stream")


async def main() -> None:
    """Serve until SIGTERM."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    config = Config()
    config.bind = [f"fd://{sock.fileno()}"]
    config.backlog = 1024
    config.graceful_timeout = 0.1
    config.loglevel = "ERROR"
    print(f"http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
    app: Any = Starlette(routes=[Route("/burst", burst), Route("/silence", silence)])
    await hypercorn.trio.serve(app, config)


trio.run(main)
