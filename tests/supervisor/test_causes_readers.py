"""What readers do, and what is done to them, is nothing to the run."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.errors import CursorExpired
from penstock.log.memory import MemoryLog
from tests.support.supervising import (
    FIRST,
    Witness,
    assert_nothing_is_left,
    count,
    gists,
    read,
    readers,
    two_supervisors,
)

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


async def test_a_reader_that_is_overtaken_by_trimming_is_told_where_the_log_begins(autojump_clock: MockClock) -> None:
    log = MemoryLog(max_entries=50)
    async with two_supervisors(log, tail_entries=10) as (owner, other):
        go_on = trio.Event()

        async def producer() -> AsyncIterator[Event]:
            yield FIRST
            await go_on.wait()
            async for event in count(200):
                yield event
            await trio.sleep_forever()

        run = await owner.start(producer)
        async with owner.follow(run.id) as here, other.follow(run.id) as there:
            assert (await anext(here)).seq == (await anext(there)).seq == 1
            go_on.set()
            await wait_all_tasks_blocked()
            for reader in (here, there):
                with pytest.raises(CursorExpired) as caught:
                    await anext(reader)
                assert (caught.value.after, caught.value.oldest_seq) == (1, 152)
                assert reader.cursor == 1
        with pytest.raises(CursorExpired):
            await other.follow(run.id, 150).__aenter__()
        assert (await owner.get(run.id)).status == "running"
        async with owner.follow(run.id, 151) as resumed:
            assert (await anext(resumed)).seq == 152
        await owner.cancel(run.id)
