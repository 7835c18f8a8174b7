"""Direct responses whose source and whose server never wait: they can be cancelled, at any speed."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from penstock import EventStreamResponse
from penstock.asgi.sender import BURST, BURST_SECONDS

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from trio.testing import MockClock

NO_END: Final = 20 * BURST
"""Chunks after which a source that should have been cancelled gives up."""
TURN: Final = BURST + 1
"""Sends until others have their turn: those whose times are not noted, and one whose time is."""
SPEEDS: Final = [0.0, BURST_SECONDS / BURST, 10.0]
"""Seconds of a processor that a chunk takes."""


class Busy:
    """A source that never waits, and what it takes: time of the processor."""

    def __init__(self, clock: MockClock, seconds: float, then: dict[int, Callable[[], object]]) -> None:
        self.yielded = 0
        self.closed = False
        self._clock = clock
        self._seconds = seconds
        self._then = then

    async def chunks(self) -> AsyncIterator[bytes]:
        try:
            while self.yielded < NO_END:
                self._clock.jump(self._seconds)
                self.yielded += 1
                self._then.get(self.yielded, int)()
                yield b"data: x\n\n"
        finally:
            self.closed = True


class Unwaiting:
    """A server whose `send` never waits, and a client that can leave."""

    def __init__(self) -> None:
        self.sent: list[Any] = []
        self.leave = trio.Event()

    async def receive(self) -> dict[str, Any]:
        await self.leave.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        self.sent.append(message)

    async def call(self, source: Any, **options: Any) -> None:
        scope = {"type": "http", "method": "GET", "path": "/", "asgi": {"spec_version": "2.1"}}
        await EventStreamResponse(source, **options)(scope, self.receive, self.send)


def at_any_speed(test: Callable[..., Awaitable[None]]) -> Any:
    return pytest.mark.parametrize("seconds", SPEEDS)(pytest.mark.parametrize("after", [1, 7 * BURST + 3])(test))


@at_any_speed
async def test_a_source_that_never_waits_is_cancelled_when_its_client_leaves(
    mock_clock: MockClock, seconds: float, after: int
) -> None:
    server = Unwaiting()
    busy = Busy(mock_clock, seconds, {after: server.leave.set})
    await server.call(busy.chunks())
    assert busy.closed
    assert busy.yielded <= after + 4 * TURN  # two of the listener's, to begin and to hear; and rounds have no order


@at_any_speed
@pytest.mark.parametrize("on_disconnect", ["cancel", "detach"])
async def test_a_source_that_never_waits_is_cancelled_by_a_shutdown(
    mock_clock: MockClock, seconds: float, after: int, on_disconnect: str
) -> None:
    server = Unwaiting()
    with trio.CancelScope() as scope:
        busy = Busy(mock_clock, seconds, {after: partial(scope.cancel, reason="a shutdown")})
        await server.call(busy.chunks(), on_disconnect=on_disconnect)
    assert scope.cancelled_caught
    assert busy.closed
    assert busy.yielded <= after + TURN
    assert b"INTERRUPTED" in b"".join(message.get("body", b"") for message in server.sent)


@pytest.mark.parametrize("seconds", SPEEDS)
async def test_a_source_that_never_waits_leaves_others_their_turn(mock_clock: MockClock, seconds: float) -> None:
    turns = 0
    server = Unwaiting()
    at: dict[int, int] = {}

    async def sibling() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    def note() -> None:
        at[busy.yielded] = turns

    busy = Busy(mock_clock, seconds, dict.fromkeys(range(1, NO_END + 1), note))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(sibling)
        await server.call(busy.chunks())
        nursery.cancel_scope.cancel()
    assert len(at) == NO_END
    assert all(at[n + 2 * TURN] > at[n] for n in range(1, NO_END - 2 * TURN))  # twice, as rounds have no order
