"""assistant-stream's resumable streams in Redis, on uvicorn, as its documentation has them.

    POST /runs/ID?rate=20&seconds=5     starts a run, and streams it
    GET  /runs/ID                       streams it (again)

Both read what is stored; the run goes on without its readers. Option: `url`, the Redis.
"""

from __future__ import annotations

import asyncio
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from assistant_stream.resumable import (
    create_redis_resumable_stream_store,
    create_resumable_assistant_stream_response,
    create_resumable_stream_context,
    create_resume_assistant_stream_response,
)
from assistant_stream.serialization import AssistantTransportEncoder
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.routing import Route

from benchmarks.processes import options
from benchmarks.servers.uvicorn import serve

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from assistant_stream import RunController
    from starlette.requests import Request
    from starlette.responses import Response


def application(url: str) -> Starlette:
    """The routes, on a Redis."""
    redis = Redis.from_url(url)
    context = create_resumable_stream_context(store=create_redis_resumable_stream_store(redis))

    async def start(request: Request) -> Response:
        rate, seconds = float(request.query_params["rate"]), float(request.query_params["seconds"])

        async def ticks(controller: RunController) -> None:
            loop = asyncio.get_running_loop()
            started = loop.time()
            for number in range(round(rate * seconds)):
                await asyncio.sleep(started + number / rate - loop.time())
                controller.append_text(f"t={time.monotonic_ns()};")

        response: Response = await create_resumable_assistant_stream_response(
            context=context,
            stream_id=request.path_params["run_id"],
            callback=ticks,
            encoder=AssistantTransportEncoder(),
        )
        return response

    async def resume(request: Request) -> Response:
        response: Response = await create_resume_assistant_stream_response(
            context=context, stream_id=request.path_params["run_id"], encoder=AssistantTransportEncoder()
        )
        return response

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncGenerator[None]:
        yield
        await redis.aclose()

    routes = [Route("/runs/{run_id}", start, methods=["POST"]), Route("/runs/{run_id}", resume)]
    return Starlette(routes=routes, lifespan=lifespan)


if __name__ == "__main__":
    serve(application(options()["url"]))
