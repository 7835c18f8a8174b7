"""What servers stream to those who break off, stall or come late: beside the API, at paths of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import trio
from starlette.routing import Route

from penstock import Event, EventStreamResponse

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request

    from tests.support.serving import Server, Tap

KIB: Final = Event(data="x" * 1016).encode()
"""An event of 1,024 bytes as it is sent by a response without a run."""


async def flood(value: Any) -> AsyncIterator[Event]:
    """A producer: `[n, size]`, so many events of this size, which are numbered."""
    n, size = value
    for number in range(1, n + 1):
        yield Event(data=f"{number} ".ljust(size, "x"))


class Endless:
    """Streams events of 1 KiB for ever, to whoever asks, and counts what it has yielded to each of them."""

    def __init__(self) -> None:
        self.yielded: dict[str, int] = {}
        """By the name that a reader has given itself."""
        self.left: set[str] = set()
        """The readers whose sources are closed."""

    async def answer(self, request: Request) -> EventStreamResponse:
        """The endpoint; `wide` is the size of a header, and after `pause` events nothing comes any more."""
        asked = request.query_params
        name = asked.get("name", "")
        headers = {"x-name": name, "x-wide": "w" * int(asked.get("wide", "0"))}
        return EventStreamResponse(self._source(name, int(asked.get("pause", "0"))), headers=headers)

    async def _source(self, name: str, pause: int) -> AsyncIterator[bytes]:
        self.yielded[name] = 0
        try:
            while not pause or self.yielded[name] < pause:
                self.yielded[name] += 1
                yield KIB
            await trio.sleep_forever()
        finally:
            self.left.add(name)


def with_endless(server: Server) -> Endless:
    """Let the server stream without end at /endless?name=..."""
    endless = Endless()
    server.app.router.routes.append(Route("/endless", endless.answer))
    return endless


def with_tapped(server: Server, tap: Tap) -> None:
    """Let the server stream at /tapped what a test feeds it; nobody ends that but the test."""

    async def tapped(_request: Request) -> EventStreamResponse:
        return EventStreamResponse(tap(None))

    server.app.router.routes.append(Route("/tapped", tapped, methods=["GET", "POST"]))
