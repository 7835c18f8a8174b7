"""A page that was read ahead is read again if the log had lost its entries for a moment."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from penstock.asgi.sender import MAX_SEND
from tests.support.following import read_to_the_end, reading
from tests.support.logs import COMPLETED

if TYPE_CHECKING:
    from trio.testing import MockClock

    from penstock.log import Page


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
