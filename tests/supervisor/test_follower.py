"""The follower: replay, then live, without a seam."""

from __future__ import annotations

from itertools import product

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock, wait_all_tasks_blocked

from penstock.log import PAGE_ENTRIES, Batch, Entry
from penstock.supervisor.follower import BODY_BYTES
from tests.support.committing import committing
from tests.support.following import Reading, read_to_the_end, reading
from tests.support.logs import CANCELLED, COMPLETED, DONE, LEASE, in_virtual_time, record

# --- no seam --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, 1, 60, 10_000])
async def test_at_every_cursor_a_replay_goes_over_into_live_without_a_seam(
    autojump_clock: MockClock, limit: int | None
) -> None:
    for there in range(6):
        for after in range(there + 1):
            async with reading() as works:
                await works.run(there)
                seen: list[int] = []
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(read_into, seen, works, after, limit)
                    await wait_all_tasks_blocked()
                    assert seen == list(range(after + 1, there + 1))
                    for seq in range(there + 1, 9):
                        await works.append(seq, seq, COMPLETED if seq == 8 else None)
                        if seq % 2:
                            await wait_all_tasks_blocked()
                assert seen == list(range(after + 1, 9))


async def read_into(seen: list[int], works: Reading, after: int, limit: int | None) -> None:
    async with works.follow(after) as follower:
        assert not follower.at_end
        await read_to_the_end(follower, limit, seen)


PLACES = ["before read", "after read", "between", "while waiting", "before fetch", "after fetch"]


@pytest.mark.parametrize("after", [0, 1, 2])
async def test_wherever_an_append_falls_between_replay_and_live_it_is_seen_once(
    autojump_clock: MockClock, after: int
) -> None:
    for places in product([False, True], repeat=len(PLACES)):
        wanted = {place for place, wants in zip(PLACES, places, strict=True) if wants}
        async with reading() as works:
            await works.run(2)
            await at_each_place(works, wanted, after)


async def at_each_place(works: Reading, wanted: set[str], after: int) -> None:
    """Append two entries at each of the wanted places, once, and read all."""
    last = 2
    turn = trio.Lock()

    async def reach(place: str) -> None:
        nonlocal last
        if place in wanted:
            wanted.discard(place)
            async with turn:
                last += 2
                await works.append(last - 1, last)

    async def before(call: str) -> None:
        await reach(f"before {call}")

    async def after_it(call: str) -> None:
        await reach(f"after {call}")

    works.log.before, works.log.after = before, after_it
    seen: list[int] = []

    async def read() -> None:
        async with works.follow(after) as follower:
            await reach("between")
            seen.extend(await read_to_the_end(follower))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await wait_all_tasks_blocked()
        await reach("while waiting")
        await trio.sleep(1)
        wanted.clear()
        await works.append(last + 1, last + 1, COMPLETED)
        await trio.sleep(1)
    assert seen == list(range(after + 1, last + 2))


async def test_a_run_of_this_process_is_followed_from_its_own_tail(autojump_clock: MockClock) -> None:
    async with committing() as works:
        buffer = await works.run()
        async with reading(works.log) as elsewhere:
            elsewhere.fetcher.tails = works.tails
            works.put(buffer, 3)
            await works.committer.flush(buffer)
            seen: list[int] = []

            async def read() -> None:
                async with elsewhere.follow(1) as follower:
                    seen.extend([entry.seq async for entry in follower])

            async with trio.open_nursery() as nursery:
                nursery.start_soon(read)
                await wait_all_tasks_blocked()
                assert seen == [2, 3] or len(buffer.tail._lot) == 1
                works.put(buffer, 2)
                works.committer.close(buffer, [DONE], COMPLETED)
            assert seen == [2, 3, 4, 5, 6]
            assert works.log.calls["fetch"] == 0
            assert not elsewhere.wakeups.subscribed


# --- the tail and the log -------------------------------------------------------------------------------------------


async def test_a_reader_that_fell_off_the_tail_reads_on_from_the_log(autojump_clock: MockClock) -> None:
    async with reading(tail_entries=3) as works:
        await works.run(1)
        async with works.follow() as slow:
            assert (await anext(slow)).seq == 1
            for seq in range(2, 21):
                await works.append(seq, seq, COMPLETED if seq == 20 else None)
                await trio.sleep(0.1)
            assert works.tails.all()[0].last == 20
            assert await read_to_the_end(slow) == list(range(2, 21))


async def test_d38_a_resume_near_the_end_of_a_long_run_takes_at_most_three_calls(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(10_000, COMPLETED)
        async with works.follow(9_990) as follower:
            assert await read_to_the_end(follower, BODY_BYTES) == list(range(9_991, 10_001))
        assert works.log.calls.total() <= 3


async def test_a_replay_of_a_long_run_takes_one_call_for_every_page(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(10 * PAGE_ENTRIES, COMPLETED)
        async with works.follow() as follower:
            assert await read_to_the_end(follower) == list(range(1, 10 * PAGE_ENTRIES + 1))
        assert works.log.calls["read"] <= 11


async def test_d11_a_replay_of_an_ended_run_is_complete(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.run(700)
        await works.log.request_cancel("r", "stop")
        await works.append(701, 702)
        await works.append(703, 703, CANCELLED)
        async with works.follow() as follower:
            assert await read_to_the_end(follower, 1_000) == list(range(1, 704))


async def test_d36_an_entry_with_empty_data_is_delivered(autojump_clock: MockClock) -> None:
    async with reading() as works:
        await works.log.start(record(), LEASE)
        blocks = [b"data: \n\n", b"data\n\n", b": \n\n", DONE]
        made = [Entry.of(seq, block, 1, terminal=seq == 4) for seq, block in enumerate(blocks, 1)]
        await works.log.append([Batch("r", "epoch", made, COMPLETED)])
        async with works.follow() as follower:
            assert [entry.data async for entry in follower] == blocks
        async with works.follow() as follower:
            assert await follower.next_body() == b"".join(entry.wire for entry in made)


# --- everything at once ---------------------------------------------------------------------------------------------

steps = st.lists(
    st.tuples(
        st.sampled_from(["append", "append", "sleep", "reader", "deaf", "hearing"]),
        st.integers(0, 12),
        st.sampled_from([None, 1, 50, 120, 10_000]),
    ),
    max_size=30,
)


@settings(max_examples=120, deadline=None)
@given(steps, st.integers(1, 8), st.sampled_from([0.0, 0.03]), st.sampled_from([0.0, 0.002, 0.05]))
def test_whatever_happens_every_reader_sees_every_entry_once_and_in_order(
    steps: list[tuple[str, int, int | None]], tail_entries: int, latency: float, spacing: float
) -> None:
    async def main() -> None:
        async with reading(tail_entries=tail_entries, spacing=spacing) as works, trio.open_nursery() as nursery:
            log = works.log
            log.latency = latency
            last, seen = 0, []
            await works.run()

            async def read(after: int, limit: int | None) -> None:
                async with works.follow(after) as follower:
                    seen.append((after, await read_to_the_end(follower, limit)))

            for step, amount, limit in steps:
                if step == "append" and amount:
                    await works.append(last + 1, last + amount)
                    last += amount
                elif step == "sleep":
                    await trio.sleep(amount / 50)
                elif step == "reader":
                    nursery.start_soon(read, min(amount, last), limit)
                    await trio.sleep(latency)
                elif step in {"deaf", "hearing"}:
                    works.wakeups.deaf = step == "deaf"
            works.wakeups.deaf = False
            await trio.sleep(1)
            await works.append(last + 1, last + 1, COMPLETED)
            nursery.start_soon(read, 0, None)
            await trio.sleep(10)
            for after, entries in seen:
                assert entries == list(range(after + 1, last + 2))
            assert len(seen) == 1 + sum(step == "reader" for step, _, _ in steps)

    in_virtual_time(main)
