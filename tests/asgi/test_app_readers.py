"""Readers that go away, come back, read slowly or are many: no event is lost, and nobody else notices."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock import Event
from tests.support.serving import PRODUCERS, Tap, eventually, serving
from tests.support.wire import DONE, Block, ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock.supervisor.tail import Tail
    from tests.support.serving import Server


def tail_of(server: Server, run_id: str) -> Tail:
    tail = server.service.supervisor._tails.get(run_id)
    assert tail is not None
    return tail


async def reading_stops(server: Server, run_id: str) -> None:
    """Wait until only the run itself uses its tail."""
    await eventually(lambda: tail_of(server, run_id).users == 1)


# Cut, and resumed


@pytest.mark.parametrize("how", ["FIN", "RST"])
async def test_a_reader_that_was_cut_off_resumes_at_the_next_event_exactly(how: str) -> None:
    tap = Tap()
    async with serving({"tap": tap}) as server:
        run_id = await server.start("tap")
        seen: list[Block] = []
        for cut in range(4):
            async with server.opened(
                "GET", f"/v1/runs/{run_id}/stream", headers={"Last-Event-ID": str(len(seen))}
            ) as reader:
                tap.feed(f"{cut}a", f"{cut}b")
                seen += await reader.take(2)
                if how == "RST":
                    await reader.wire.reset()
            tap.feed(f"{cut}c")  # while nobody reads
            await reading_stops(server, run_id)
            async with server.reading(run_id, starting_after=len(seen)) as reader:
                seen += await reader.take(1)
        tap.end()
        seen += await server.read(run_id, starting_after=len(seen))
        assert seen == [*(Block(n + 1, data=f"{n // 3}{'abc'[n % 3]}") for n in range(12)), Block(13, data=DONE)]
        assert await server.read(run_id) == seen


async def test_a_disconnect_leaves_the_run_and_its_other_readers_alone() -> None:
    tap = Tap()
    async with serving({"tap": tap}) as server:
        run_id = await server.start("tap")
        async with server.reading(run_id) as stays:
            async with server.reading(run_id) as goes:
                tap.feed("one")
                assert await goes.take(1) == await stays.take(1)
                assert tail_of(server, run_id).users == 3
                await goes.wire.reset()
            await eventually(lambda: tail_of(server, run_id).users == 2)
            assert (await server.run(run_id))["status"] == "running"
            assert not tap.closed.is_set()
            tap.feed("two")
            assert await stays.take(1) == [Block(2, data="two")]
            tap.end()
            assert await stays.rest() == [Block(3, data=DONE)]
        assert tap.reason is None
        assert (await server.run(run_id))["status"] == "completed"


async def test_d15_a_disconnect_leaves_no_task_no_tail_and_no_subscription() -> None:
    async with serving() as here, serving(log=here.service.supervisor.log) as elsewhere:  # two servers on one log
        run_id = await here.start("silent")
        supervisor = elsewhere.service.supervisor
        wakeups: Any = supervisor._fetcher._notifications
        await wait_all_tasks_blocked()  # an answer is with its client before its task is over
        before = elsewhere.tasks()
        for _ in range(3):
            wires = [await elsewhere.wire() for _ in range(5)]
            for wire in wires:
                await wire.send("GET", f"/v1/runs/{run_id}/stream")
                await wire.until(b"\r\n\r\n")
            assert len(supervisor._tails.all()) == 1
            assert run_id in wakeups._subscribed
            assert elsewhere.tasks() > before
            for number, wire in enumerate(wires):
                await (wire.reset() if number % 2 else wire.stream.aclose())
            await eventually(lambda: elsewhere.tasks() == before and not supervisor._tails.all())
            assert not wakeups._subscribed
            assert not wakeups._moved
        assert tail_of(here, run_id).users == 1
        assert (await here.run(run_id))["status"] == "running"


async def test_nothing_is_left_of_a_run_that_has_ended_and_has_no_reader() -> None:
    async with serving() as server:
        supervisor = server.service.supervisor
        for _ in range(3):
            run_id = await server.start("count", 5)
            await server.read(run_id)
            await server.read(run_id, starting_after=3)
        await eventually(lambda: not supervisor._runs.by_id and not supervisor._tails.all())
        assert supervisor._tails.size == 0


async def test_a_half_close_ends_the_reader_and_not_the_run() -> None:
    async with serving() as server:
        run_id = await server.start("silent")
        async with server.reading(run_id) as reader:
            await reader.wire.stream.send_eof()
            await reading_stops(server, run_id)
        assert (await server.run(run_id))["status"] == "running"


# Slow ones


async def test_a_client_that_never_reads_holds_up_nobody() -> None:
    tap = Tap()
    async with serving({**PRODUCERS, "tap": tap}) as server:
        run_id = await server.start("tap")
        async with await server.wire() as stalled, server.reading(run_id) as reader:
            await stalled.send("GET", f"/v1/runs/{run_id}/stream")
            await stalled.until(b"\r\n\r\n")
            for seq in range(1, 41):  # 20 MB: more than the buffers on its way hold
                tap.feed("x" * 500_000)
                (block,) = await reader.take(1)
                assert block.id == seq
            tap.end()
            assert await reader.rest() == [Block(41, data=DONE)]
            assert ids(await server.read(await server.start("count", 3))) == [1, 2, 3, 4]
            await stalled.reset()


# Many


async def test_many_runs_whose_readers_are_cut_at_random_arrive_once_and_in_order() -> None:
    async def bursts(seed: int) -> AsyncIterator[Event]:
        chance = random.Random(seed)
        for number in range(1, 61):
            yield Event(data=f"{seed}:{number}")
            if chance.random() < 0.2:
                await trio.lowlevel.checkpoint()

    async with serving({"bursts": bursts}) as server:
        cuts = 0

        async def follow(seed: int) -> None:
            nonlocal cuts
            chance = random.Random(-seed)
            run_id = await server.start("bursts", seed)
            seen: list[Block] = []
            while not (seen and seen[-1].data == DONE):
                header = {"Last-Event-ID": str(len(seen))}
                async with server.opened("GET", f"/v1/runs/{run_id}/stream", headers=header) as reader:
                    for _ in range(chance.randrange(25)):
                        block = await reader.next()
                        if block is None:
                            break
                        seen.append(block)
                    else:
                        cuts += 1
                        if chance.random() < 0.5:
                            await reader.wire.reset()
            assert seen == [*(Block(n, data=f"{seed}:{n}") for n in range(1, 61)), Block(61, data=DONE)]

        async with trio.open_nursery() as nursery:
            for seed in range(15):
                nursery.start_soon(follow, seed)
        assert cuts > 15
        statuses = [run["status"] for run in (await server.client.get("/v1/runs?limit=100")).json()["runs"]]
        assert statuses == ["completed"] * 15


# Cancelled from afar


async def test_d06_a_cancel_over_http_reaches_a_silent_producer_and_its_readers_at_once() -> None:
    async with serving(cancel_check_interval=3600.0) as server:
        run_id = await server.start("silent")
        async with server.reading(run_id) as reader:
            asked = trio.current_time()
            answer = await server.client.post(f"/v1/runs/{run_id}/cancel", json={"reason": "enough"})
            assert answer.status_code == 202
            cancelled, done = await reader.rest()
            took = trio.current_time() - asked
        assert (cancelled.event, cancelled.json["reason"], done) == ("cancelled", "enough", Block(2, data=DONE))
        assert took < 20, "the producer is silent for an hour, and nobody polls"
        print(f"cancelled over HTTP in {took * 1000:.1f} ms")  # noqa: T201


async def test_a_cancel_at_another_server_of_the_same_log_arrives_at_once() -> None:
    async with (
        serving(cancel_check_interval=3600.0) as here,
        serving(log=here.service.supervisor.log, cancel_check_interval=3600.0) as elsewhere,
    ):
        run_id = await here.start("silent")
        async with elsewhere.reading(run_id) as reader:
            assert (await elsewhere.client.post(f"/v1/runs/{run_id}/cancel")).status_code == 202
            assert ids(await reader.rest()) == [1, 2]
        assert (await here.run(run_id))["status"] == "cancelled"
