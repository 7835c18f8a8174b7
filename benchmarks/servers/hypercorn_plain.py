"""Hypercorn's trio worker as it is, with a plain StreamingResponse: what one gets without penstock."""

from __future__ import annotations

import socket
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


async def burst(request: Request) -> StreamingResponse:
    """`count` events of `size` bytes, with ids; `joined` of them in a chunk."""
    asked = {name: int(value) for name, value in request.query_params.items()}
    data = b"x" * asked["size"]

    async def chunks() -> AsyncGenerator[bytes]:
        for first in range(1, asked["count"] + 1, asked["joined"]):
            last = min(first + asked["joined"], asked["count"] + 1)
            yield b"".join(b"id: %d\ndata: %b\n\n" % (seq, data) for seq in range(first, last))

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
