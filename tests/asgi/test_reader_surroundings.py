"""What a reader's pings are sent in, and what it makes of a log that has lost something for a moment."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from penstock.asgi.sender import MAX_SEND
from tests.asgi.test_response_clock import INTERVAL, ONE, Clocked
from tests.asgi.test_response_follower import OneAtATime
from tests.supervisor.test_timers import running
from tests.support.asgi import PING
from tests.support.following import read_to_the_end, reading
from tests.support.logs import COMPLETED

if TYPE_CHECKING:
    from trio.testing import MockClock

    from penstock.log import Page

request_of: ContextVar[str] = ContextVar("request_of")


class Noting(OneAtATime):
    """Notes for each body which request it was sent for, as a middleware may look it up."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[bytes, str]] = []

    async def send(self, message: Any) -> None:
        self.noted.append((message.get("body", b""), request_of.get()))
        await super().send(message)


async def test_a_ping_that_the_clock_calls_for_is_sent_with_the_variables_of_its_request(
    autojump_clock: MockClock,
) -> None:
    async with running() as timers:
        request_of.set("mine")
        client = Noting()
        await client.get(Clocked(timers, INTERVAL * 2.5, ONE), ping_interval=INTERVAL)
        assert {(body, name) for body, name in client.noted if body} == {(PING, "mine"), (ONE, "mine")}


async def test_a_page_that_was_read_ahead_while_the_log_had_lost_its_entries_is_read_again(
    autojump_clock: MockClock,
) -> None:
    async with reading(tail_entries=1) as works:
        await works.run(12, COMPLETED, size=MAX_SEND * 2)
        read, pages = works.log.read, 0

        async def without_entries_once(*args: Any, **options: Any) -> Page:
            nonlocal pages
            pages += 1
            page = await read(*args, **options)
            return replace(page, entries=[]) if pages == 3 else page

        works.log.read = without_entries_once  # type: ignore[method-assign]
        async with works.follow() as follower:
            assert await read_to_the_end(follower) == list(range(1, 13))
        assert pages > 3
