"""What readers do, and what is done to them, is nothing to the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from penstock.log.memory import MemoryLog
from tests.support.supervising import Witness, assert_nothing_is_left, count, gists, read, readers, two_supervisors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

    from penstock.sse import Event


async def test_a_reader_that_leaves_does_nothing_to_the_run_nor_to_other_readers(autojump_clock: MockClock) -> None:
    log, witness = MemoryLog(), Witness()
    async with two_supervisors(log) as (owner, other):

        async def producer() -> AsyncIterator[Event]:
            with witness.watching():
                async for event in count(10, every=1):
                    yield event  # noqa: ASYNC119

        run = await owner.start(producer)
        async with readers((owner, run.id), (other, run.id)) as stay:
            for supervisor in (owner, other):
                async with supervisor.follow(run.id) as leaves:
                    assert (await anext(leaves)).seq == 1
                with trio.move_on_after(0.5):
                    await read(supervisor, run.id)
            assert (await owner.get(run.id)).status == "running"
            assert witness.saw is None
        for reader in stay:
            assert gists(reader.entries) == [*map(str, range(1, 11)), "[DONE]"]
        assert_nothing_is_left(owner)
        assert_nothing_is_left(other)
