"""penstock without runs: an endpoint that answers with a stream of its own, served by `penstock.serve`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

import penstock
from penstock.server.config import new_config

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from starlette.requests import Request


async def burst(request: Request) -> penstock.EventStreamResponse:
    """`count` events of `size` bytes, with ids."""
    count, data = int(request.query_params["count"]), "x" * int(request.query_params["size"])

    async def events() -> AsyncGenerator[penstock.Event]:
        for seq in range(1, count + 1):
            yield penstock.Event(data, id=str(seq))

    return penstock.EventStreamResponse(events())


async def main() -> None:
    """Serve until SIGTERM."""
    app = penstock.create_app({})
    app.add_route("/burst", burst)
    config = new_config()
    config.bind = ["127.0.0.1:0"]
    config.loglevel = "WARNING"
    async with trio.open_nursery() as nursery:
        urls = await nursery.start(penstock.serve, app, config)
        print(urls[0], flush=True)


trio.run(main)
