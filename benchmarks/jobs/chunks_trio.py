"""Measures the CPU of a chunk on Trio: through penstock, as its docs recommend, and through Starlette's response.

python -m benchmarks.jobs.chunks_trio '{"way": "all", "count": 50000}'
"""

from __future__ import annotations

import json
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

import penstock
from benchmarks.jobs.chunks import bare, is_cancelled, measured
from benchmarks.processes import options

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Callable

    from starlette.types import ASGIApp


def alone(chunks: AsyncGenerator[bytes]) -> ASGIApp:
    """The response alone, with its own pings."""
    return penstock.EventStreamResponse(chunks)


def watched(chunks: AsyncGenerator[bytes]) -> ASGIApp:
    """The response and `cancel_when`."""

    @asynccontextmanager
    async def source() -> AsyncIterator[AsyncIterator[bytes]]:
        async with penstock.cancel_when(is_cancelled):
            yield chunks

    return penstock.EventStreamResponse(source())


def all_of_it(chunks: AsyncGenerator[bytes]) -> ASGIApp:
    """The response, `cancel_when`, and `keepalive` around the source."""

    @asynccontextmanager
    async def source() -> AsyncIterator[AsyncIterator[bytes]]:
        async with penstock.cancel_when(is_cancelled), penstock.keepalive(chunks) as kept_alive:
            yield kept_alive

    return penstock.EventStreamResponse(source())


WAYS: Final[dict[str, Callable[[AsyncGenerator[bytes]], ASGIApp]]] = {
    "all": all_of_it,
    "watched": watched,
    "alone": alone,
    "bare": bare,
}

if __name__ == "__main__":
    way = WAYS[options()["way"]]
    print(json.dumps(trio.run(measured, way, trio.lowlevel.checkpoint, trio.sleep_forever)))
