"""The same endpoints under plain Starlette, under a BaseHTTPMiddleware and under FastAPI, for `servers.py`.

Sources make *marks*: `/happened/NAME` answers once the mark is there, `/happen/NAME` makes one that a source awaits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
from fastapi import FastAPI
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.requests import Request  # noqa: TC002  (FastAPI looks at the annotations)
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Mount, Route

from penstock.asgi.response import EventStreamResponse
from penstock.errors import StreamRejected
from penstock.sse import Event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

_marks: dict[str, anyio.Event] = {}


def mark(name: str) -> anyio.Event:
    return _marks.setdefault(name, anyio.Event())


async def happened(request: Request) -> Response:
    await mark(request.path_params["name"]).wait()
    return PlainTextResponse("yes")


async def happen(request: Request) -> Response:
    mark(request.path_params["name"]).set()
    return PlainTextResponse("done")


async def source(name: str) -> AsyncIterator[Any]:
    """Waits for the mark NAME.go between its chunks, and marks how it ends."""
    try:
        yield b"data: first\n\n"
        await mark(f"{name}.go").wait()
        yield b"data: last\n\n"
        mark(f"{name}.ended").set()
    except anyio.get_cancelled_exc_class():
        mark(f"{name}.cancelled").set()
        raise
    finally:
        mark(f"{name}.closed").set()


async def waiting(name: str) -> AsyncIterator[Any]:
    await mark(f"{name}.go").wait()
    yield Event("late")


async def endless(name: str) -> AsyncIterator[Any]:
    try:
        while True:
            yield b"data: x\n\n"
    finally:
        mark(f"{name}.closed").set()


async def chunks(*values: Any) -> AsyncIterator[Any]:
    for value in values:
        await anyio.lowlevel.checkpoint()
        if isinstance(value, Exception):
            raise value
        yield value


def named(request: Request) -> str:
    return request.query_params["name"]


async def content(_request: Request) -> Response:
    large = "x" * 200_000
    return EventStreamResponse(chunks(Event("one", id="1"), "data: two\n\n", b"data: three\n\n", Event(large)))


async def empty(_request: Request) -> Response:
    return EventStreamResponse(chunks())


async def headers_first(request: Request) -> Response:
    return EventStreamResponse(waiting(named(request)), first_chunk_timeout=0.01, ping_interval=None)


async def pings(request: Request) -> Response:
    return EventStreamResponse(source(named(request)), ping_interval=0.02)


async def rejected(_request: Request) -> Response:
    return EventStreamResponse(chunks(StreamRejected(409, "PENDING_APPROVAL", "approve first")))


async def fails(_request: Request) -> Response:
    return EventStreamResponse(chunks(ValueError("secret")))


async def fails_later(_request: Request) -> Response:
    return EventStreamResponse(chunks(b"data: one\n\n", ValueError("secret")))


async def status(_request: Request) -> Response:
    return EventStreamResponse(chunks(("data: created\n\n", 201), b"data: more\n\n"))


async def cancels(request: Request) -> Response:
    return EventStreamResponse(source(named(request)))


async def detaches(request: Request) -> Response:
    return EventStreamResponse(source(named(request)), on_disconnect="detach")


async def floods(request: Request) -> Response:
    return EventStreamResponse(endless(named(request)))


ENDPOINTS: dict[str, Callable[[Request], Awaitable[Response]]] = {
    "/content": content,
    "/empty": empty,
    "/headers_first": headers_first,
    "/pings": pings,
    "/rejected": rejected,
    "/fails": fails,
    "/fails_later": fails_later,
    "/status": status,
    "/cancels": cancels,
    "/detaches": detaches,
    "/floods": floods,
}


class PassThrough(BaseHTTPMiddleware):
    async def dispatch(self, request: Request, call_next: Any) -> Response:
        response: Response = await call_next(request)
        return response


routes = [Route(path, endpoint, methods=["GET", "POST"]) for path, endpoint in ENDPOINTS.items()]
fastapi = FastAPI()
for path, endpoint in ENDPOINTS.items():
    fastapi.add_api_route(path, endpoint, methods=["GET", "HEAD", "POST"], response_model=None)

app = Starlette(
    routes=[
        Route("/happened/{name}", happened),
        Route("/happen/{name}", happen),
        Mount("/plain", Starlette(routes=routes)),
        Mount("/middleware", Starlette(routes=routes, middleware=[Middleware(PassThrough)])),
        Mount("/fastapi", fastapi),
    ]
)
