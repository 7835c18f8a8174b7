"""The ways out of a supervisor, and what becomes of its runs."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.errors import Draining, ReaderReleased
from penstock.log.memory import MemoryLog
from penstock.sse import Event
from penstock.supervisor import open_supervisor
from tests.support.supervising import (
    FIRST,
    Witness,
    count,
    ended,
    entries_of,
    gists,
    near,
    read,
    readers,
    two_supervisors,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock


async def test_draining_interrupts_what_goes_on_and_keeps_only_its_own_readers(autojump_clock: MockClock) -> None:
    log, witness = MemoryLog(), Witness()
    async with two_supervisors(log) as (owner, other):
        mine = await owner.start(witness.waits)
        theirs = await other.start(Witness().waits)
        async with readers((owner, mine.id), (other, mine.id), (owner, theirs.id)) as (stays, elsewhere, goes):
            await wait_all_tasks_blocked()
            await owner.drain(3)
        assert isinstance(goes.error, ReaderReleased)
        assert goes.ended_at == 0
        assert gists(stays.entries) == gists(elsewhere.entries) == ["first", "error INTERRUPTED", "[DONE]"]
        assert stays.error is elsewhere.error is None
        assert (witness.saw, witness.saw_at) == ("shutdown", 3)
        record = await ended(log, mine.id)
        assert record.error is not None
        assert (record.status, record.stop_reason, record.error.code) == ("failed", "interrupted", "INTERRUPTED")
        assert (await other.get(theirs.id)).status == "running"
        for refused in (owner.start(count, 1), owner.check(), owner.open_run().__aenter__()):
            with pytest.raises(Draining):
                await refused
        with pytest.raises(ReaderReleased):
            await owner.follow(theirs.id).__aenter__()
        assert gists(await read(owner, mine.id)) == ["first", "error INTERRUPTED", "[DONE]"]
        await other.cancel(theirs.id)


class OfTheBody(Exception):
    pass


@pytest.mark.parametrize("error", [OfTheBody(), KeyboardInterrupt(), ExceptionGroup("", [OfTheBody()])], ids=repr)
async def test_a_supervisor_left_by_an_exception_interrupts_its_runs_and_raises_it_as_it_is(
    autojump_clock: MockClock, error: BaseException
) -> None:
    log, witness, run_id = MemoryLog(), Witness(), ""
    with pytest.raises(type(error)) as caught:  # noqa: PT012
        async with open_supervisor(log) as supervisor:
            run_id = (await supervisor.start(witness.waits)).id
            await wait_all_tasks_blocked()
            raise error
    assert repr(caught.value) == repr(error)
    assert (witness.saw, trio.current_time()) == ("shutdown", near(0))
    record = await ended(log, run_id)
    assert (record.status, record.stop_reason) == ("failed", "interrupted")
    assert gists(await entries_of(log, run_id)) == ["first", "error INTERRUPTED", "[DONE]"]


async def test_a_supervisor_that_is_cancelled_from_outside_interrupts_its_runs(autojump_clock: MockClock) -> None:
    log, witness, ended_by_itself = MemoryLog(), Witness(), Witness()
    run_ids = []

    async def ends_slowly() -> AsyncIterator[Event]:
        with ended_by_itself.watching():
            yield FIRST  # noqa: ASYNC119
            try:
                yield Event(data="[DONE]")  # noqa: ASYNC119
            finally:
                await trio.sleep(60)  # noqa: ASYNC102

    with trio.move_on_after(5) as scope:
        async with open_supervisor(log) as supervisor:
            run_ids = [(await supervisor.start(producer)).id for producer in (witness.waits, ends_slowly)]
            await trio.sleep_forever()
    assert scope.cancelled_caught
    assert trio.current_time() == near(5)
    record = await ended(log, run_ids[0])
    assert (record.status, record.stop_reason) == ("failed", "interrupted")
    assert witness.left
    # its loop was over before that: the cancellation reaches its cleanup, and does not change how it ended
    assert (await ended(log, run_ids[1])).status == "completed"
    assert ended_by_itself.left
