"""The committer with several shards: one that is away holds up its own runs, and a run that moves loses nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.backoff import LONGEST_PAUSE
from penstock.supervisor.committer import FULL_PAUSE
from tests.support.committing import Works, committing, forget, shown
from tests.support.logs import COMPLETED, DONE, seqs
from tests.support.parted import Parted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from trio.testing import MockClock

    from penstock.supervisor.write_buffer import WriteBuffer

BACK = LONGEST_PAUSE + 1.0
"""So many seconds later a shard that is back has been asked again, whatever there was to ask it."""


def away(log: Parted, shard: str, how: str) -> Callable[[], None]:
    """The shard cannot be reached, or does not answer; what brings it back."""
    if how == "silent":
        log.silence(shard)
        return lambda: log.speak(shard)
    log.gone.add(shard)
    return lambda: log.gone.remove(shard)


def sizes(works: Works) -> dict[str, int]:
    return {worker.shard: worker.size for worker in works.committer.shards}


async def all_is_stored(works: Works, *buffers: WriteBuffer) -> None:
    """Nothing waits any more, nothing of that is counted anywhere, and readers saw it all."""
    for buffer in buffers:
        assert await works.stored(buffer.run_id) == seqs(shown(buffer.tail)) == list(range(1, buffer.seq + 1))
    assert all(worker.idle for worker in works.committer.shards)
    assert {*sizes(works).values()} == {0}


@pytest.mark.parametrize("how", ["gone", "silent"])
async def test_a_shard_that_is_away_holds_up_its_own_runs_alone(autojump_clock: MockClock, how: str) -> None:
    log = Parted("a", "b", "c")
    log.where = {"1": "a", "2": "b", "3": "c", "4": "b"}
    async with committing(log) as works:
        buffers = [await works.run(run_id) for run_id in log.where]
        back = away(log, "b", how)
        began = trio.current_time()
        for buffer in buffers:
            works.put(buffer, 3)
        for _ in range(50):
            for buffer in (buffers[0], buffers[2]):
                works.put(buffer)
                await works.committer.flush(buffer)
        assert trio.current_time() - began < 1
        assert [buffer.stored for buffer in buffers] == [53, 0, 53, 0]
        assert sizes(works) == {"a": 0, "b": buffers[1].size + buffers[3].size, "c": 0}
        await trio.sleep(100)
        back()
        await trio.sleep(BACK)
        await all_is_stored(works, *buffers)


async def test_a_shard_that_is_away_takes_no_room_of_the_others(autojump_clock: MockClock) -> None:
    log = Parted("a", "b")
    log.where = {"1": "a", "2": "b"}
    async with committing(log, max_process_pending_bytes=8_000) as works, trio.open_nursery() as nursery:
        held, free = await works.run("1"), await works.run("2")
        log.silence("a")
        works.put(held)
        await wait_all_tasks_blocked()
        nursery.start_soon(works.write, held, 200, 100)
        await wait_all_tasks_blocked()
        assert 4_000 <= held.size < 4_000 + 100  # its share
        await works.write(free, 200, 100)
        await works.committer.flush(free)
        assert held.stored == 0
        assert free.stored == 200
        log.speak("a")
        await trio.sleep(10)
        await all_is_stored(works, held, free)
        assert held.seq == 201


async def test_the_share_of_a_shard_is_that_of_the_shards_that_there_are_now(autojump_clock: MockClock) -> None:
    log = Parted("a")
    async with committing(log, max_process_pending_bytes=8_000) as works, trio.open_nursery() as nursery:
        buffer = await works.run()
        for shards, share in ((["a"], 8_000), (["a", "b"], 4_000), (["a", "b", "c", "d"], 2_000), (["a"], 8_000)):
            log.names = shards
            works.put(buffer)
            await works.committer.flush(buffer)
            log.silence("a")
            nursery.start_soon(works.write, buffer, 200, 100)
            await wait_all_tasks_blocked()
            assert share <= works.committer.pending_bytes < share + 100
            log.speak("a")
            await trio.sleep(10)
        await all_is_stored(works, buffer)


class Moves:
    """A run on shard a, of which something waits there for one reason or another, until it is on shard b."""

    def __init__(self, works: Works, log: Parted, buffer: WriteBuffer, other: WriteBuffer) -> None:
        self.works = works
        self.log = log
        self.buffer = buffer
        self.other = other

    async def pending(self) -> None:
        """The worker waits for more to come."""

    async def away(self) -> None:
        self.log.gone.add("a")
        await self.tried()

    async def silent(self) -> None:
        self.log.silence("a")
        self.works.put(self.other)
        await self.tried()

    async def lost(self) -> None:
        forget(self.log, "r")
        self.works.committer.restore(self.buffer)
        await self.tried()

    async def lost_and_away(self) -> None:
        self.log.gone.add("a")
        await self.lost()

    async def without_room(self) -> None:
        self.log.full.add("r")
        await self.tried()

    async def tried(self) -> None:
        self.works.committer.shards.of(self.buffer.run_id).commit_now()
        await trio.sleep(FULL_PAUSE / 2)

    def moved(self) -> None:
        """It is on shard b, which can be reached, and there is nothing wrong with shard a any more."""
        self.log.where["r"] = "b"
        self.log.full.clear()
        self.log.gone.clear()
        if "a" in self.log._silent:
            self.log.speak("a")


@pytest.mark.parametrize("closing", [False, True])
@pytest.mark.parametrize(
    "wait", [Moves.pending, Moves.away, Moves.silent, Moves.lost, Moves.lost_and_away, Moves.without_room]
)
async def test_a_run_that_moves_loses_nothing_and_is_counted_once(
    autojump_clock: MockClock, wait: Callable[[Moves], Awaitable[None]], closing: bool
) -> None:
    log = Parted("a", "b")
    log.where = {"r": "a", "other": "a"}
    async with committing(log, flush_interval=1.0) as works:
        buffer, other = await works.run(), await works.run("other")
        works.put(buffer, 5, 100)
        await works.committer.flush(buffer)
        works.put(buffer, 5, 100)
        moves = Moves(works, log, buffer, other)
        await wait(moves)
        if closing:
            works.committer.close(buffer, [DONE], COMPLETED)
        else:
            works.put(buffer, 5, 100)
        moves.moved()
        await trio.sleep(BACK + FULL_PAUSE)
        if not closing:
            works.put(buffer, 1, 100)
            await works.committer.flush(buffer)
            assert buffer.committer is works.committer.shards.get("b")
            works.committer.close(buffer, [DONE], COMPLETED)
        await works.settled()
        await works.committer.flush(other)
        await all_is_stored(works, buffer, other)
        assert works.owners["r"].told == ["settled"]


async def test_a_run_of_which_something_is_lost_and_something_new_moves_once(autojump_clock: MockClock) -> None:
    log = Parted("a", "b")
    log.where = {"r": "a", "other": "a"}
    async with committing(log) as works:
        buffer, other = await works.run(), await works.run("other")
        works.put(buffer, 5, 100)
        await works.committer.flush(buffer)
        log.silence("a")
        works.put(other)
        await wait_all_tasks_blocked()  # the worker of a waits
        works.put(buffer, 3, 100)
        works.committer.restore(buffer)  # a renewal has found nothing of it
        forget(log, "r")
        log.where["r"] = "b"
        log.speak("a")
        await trio.sleep(BACK)
        await all_is_stored(works, buffer, other)


async def test_a_run_that_goes_to_and_fro_is_committed_by_one_worker_at_a_time(autojump_clock: MockClock) -> None:
    log = Parted("a", "b")
    log.where = {"r": "a", "other": "a"}
    async with committing(log) as works:
        buffer = await works.run()
        log.full.add("r")
        works.put(buffer, 3, 100)
        await trio.sleep(FULL_PAUSE / 5)  # the worker of a is to ask again
        log.where["r"] = "b"
        works.committer.restore(buffer)  # ... and hands it over before that
        await wait_all_tasks_blocked()
        log.full.clear()
        log.silence("b")
        await trio.sleep(FULL_PAUSE / 5)
        works.put(buffer, 3, 100)
        await wait_all_tasks_blocked()
        log.where["r"] = "a"
        await trio.sleep(FULL_PAUSE)
        works.put(buffer, 30, 100)
        log.speak("b")
        await trio.sleep(BACK)
        works.committer.close(buffer, [DONE], COMPLETED)
        await works.settled()
        await all_is_stored(works, buffer)
        assert works.owners["r"].told == ["settled"]


async def test_a_producer_that_waits_for_room_goes_on_when_its_run_has_moved(autojump_clock: MockClock) -> None:
    log = Parted("a", "b")
    log.where = {"r": "a", "other": "a"}
    async with committing(log, max_process_pending_bytes=2_000) as works, trio.open_nursery() as nursery:
        buffer, other = await works.run(), await works.run("other")
        log.full |= {"r", "other"}
        nursery.start_soon(works.write, other, 20, 100)
        nursery.start_soon(works.write, buffer, 20, 100)
        await trio.sleep(FULL_PAUSE * 3)
        assert buffer.seq < 20
        log.where["r"] = "b"
        log.full.remove("r")
        await trio.sleep(FULL_PAUSE * 3)
        assert buffer.stored == 20
        assert other.stored == 0
        log.full.clear()
        await trio.sleep(BACK)
        await all_is_stored(works, buffer, other)


async def test_a_run_that_moves_leaves_its_room_to_those_that_stay(autojump_clock: MockClock) -> None:
    log = Parted("a", "b")
    log.where = {"r": "a", "other": "a"}
    async with committing(log, max_process_pending_bytes=2_000) as works, trio.open_nursery() as nursery:
        buffer, other = await works.run(), await works.run("other")
        works.put(other)
        await works.committer.flush(other)
        log.full.add("r")
        works.put(buffer, 15, 100)
        await trio.sleep(FULL_PAUSE / 5)
        nursery.start_soon(works.write, other, 3, 100)
        await trio.sleep(FULL_PAUSE * 2)
        assert other.stored == 1
        log.where["r"] = "b"
        await trio.sleep(FULL_PAUSE * 2)
        assert (buffer.stored, other.stored) == (0, 4)
        log.full.clear()
        await trio.sleep(BACK)
        await all_is_stored(works, buffer, other)


async def test_a_lost_run_is_put_back_where_it_is_now_without_a_write(autojump_clock: MockClock) -> None:
    log = Parted("a", "b")
    log.where = {"r": "a", "other": "a"}
    async with committing(log) as works:
        buffer, other = await works.run(), await works.run("other")
        works.put(buffer, 5)
        await works.committer.flush(buffer)
        log.silence("a")
        works.put(other)
        await wait_all_tasks_blocked()  # the worker of a waits
        works.committer.restore(buffer)
        forget(log, "r")
        log.where["r"] = "b"
        log.speak("a")
        await trio.sleep(BACK)
        await all_is_stored(works, buffer, other)


async def test_what_was_away_while_others_were_not_is_asked_for_again(autojump_clock: MockClock) -> None:
    log = Parted("a", "b")
    async with committing(log) as works:
        moving, staying = await works.run("moving"), await works.run("staying")

        async def move(call: str) -> None:
            if call == "append" and "moving" not in log.where:
                log.where["moving"] = "b"
                log.gone.add("b")

        log.before = move
        for buffer in (moving, staying):
            works.put(buffer, 3)
        await works.committer.flush(staying)
        assert (moving.stored, staying.stored) == (0, 3)
        assert works.warnings == ["cannot commit: the part is away; trying again"]
        for _ in range(20):
            works.put(staying)
            await works.committer.flush(staying)
        await trio.sleep(20)
        assert moving.stored == 0
        log.gone.clear()
        await trio.sleep(BACK)
        await all_is_stored(works, moving, staying)
        assert works.owners["moving"].told == []


async def test_a_run_goes_on_when_the_worker_of_its_former_shard_is_closed(autojump_clock: MockClock) -> None:
    log = Parted("0", "stays")
    log.where = {"r": "0", "other": "stays"}
    async with committing(log) as works:
        buffer, other = await works.run(), await works.run("other")
        for number in range(1, 20):
            works.put(buffer, 3)
            works.put(other)
            await works.committer.flush(buffer)
            log.names[0] = log.where["r"] = str(number)
            await trio.sleep(1)
        works.put(buffer)
        await works.committer.flush(buffer)
        assert {"19", "stays"} <= {worker.shard for worker in works.committer.shards}
        await all_is_stored(works, buffer, other)


async def test_a_worker_with_something_pending_is_not_closed(autojump_clock: MockClock) -> None:
    log = Parted("a")
    async with committing(log) as works:
        buffer, other = await works.run(), await works.run("other")
        log.silence("a")
        works.put(buffer, 3)
        await wait_all_tasks_blocked()
        log.names, log.where = ["b"], {"other": "b", "r": "a"}
        works.put(other)
        await works.committer.flush(other)
        log.where["r"] = "b"
        log.speak("a")
        await trio.sleep(BACK)
        await all_is_stored(works, buffer, other)


async def test_a_moved_run_does_not_wait_for_a_restore_on_a_shard_that_is_away(autojump_clock: MockClock) -> None:
    log = Parted("a", "b")
    log.where = {"r": "a", "other": "a"}
    async with committing(log) as works:
        buffer, other = await works.run(), await works.run("other")
        for each in (buffer, other):
            works.put(each, 3, 100)
            await works.committer.flush(each)
        log.silence("a")
        works.committer.restore(buffer)
        await trio.sleep(BACK)
        log.where["other"] = "b"
        works.put(other, 3, 100)
        with trio.fail_after(BACK):
            await works.committer.flush(other)
        log.speak("a")
        await trio.sleep(BACK)
        await all_is_stored(works, buffer, other)
