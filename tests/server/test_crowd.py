"""Many clients come and go at any moment: they leave nothing behind, and other readers see everything."""

from __future__ import annotations

from contextlib import suppress
from random import Random
from typing import TYPE_CHECKING, Any, Final

import trio

from tests.support.connections import SOON, readers
from tests.support.crowd import in_two_places, misbehave
from tests.support.http2_clients import Http2
from tests.support.serving import Tap, eventually
from tests.support.wire import Reader, Wire, ids

if TYPE_CHECKING:
    from collections.abc import Callable


CROWD: Final = 60
AT_ONCE: Final = 20
READERS: Final = 6


async def reads_on(stream: Any, path: str, *, speaks_http2: bool, started: Callable[[], None]) -> list[int]:
    """A reader that stays to the end; the ids that it was sent."""
    if speaks_http2:
        client = Http2(stream)
        number = await client.get(path)
        await client.until_headers(number)
        started()
        return ids(await client.whole(number))
    reader = Reader(Wire(stream))
    await reader.ask("GET", path, {}, b"")
    started()
    return ids(await reader.rest())


async def test_a_crowd_that_comes_and_goes_leaves_nothing_and_readers_see_everything() -> None:
    random, tap = Random(1), Tap()
    async with in_two_places({"tap": tap}, ping_interval=0.1) as (server, here):
        run_id, other = await server.start("tap"), await server.start("silent")
        path = f"/v1/runs/{run_id}/stream"
        paths = [path, f"/v1/runs/{other}/stream", "/v1/runs", "/healthz", "/nowhere"]
        seen: list[list[int]] = []
        ready = trio.Semaphore(0)

        async def read(number: int) -> None:
            tls, http2 = number % 2 == 0, number % 4 != 1
            async with await here.connect(tls=tls) as stream:
                seen.append(await reads_on(stream, path, speaks_http2=http2, started=ready.release))

        async def come_and_go(seat: trio.Semaphore, behaviour: Random) -> None:
            tls, http2 = behaviour.choice([(False, False), (False, True), (True, True)])
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await misbehave(await here.connect(tls=tls), behaviour, paths, speaks_http2=http2)
            tap.feed("one more")
            seat.release()

        async with trio.open_nursery() as nursery:
            for number in range(READERS):
                nursery.start_soon(read, number)
            for _ in range(READERS):
                await ready.acquire()
            await eventually(lambda: len(server.connections()) == READERS)
            theirs = set(server.connections())
            seats = trio.Semaphore(AT_ONCE)
            async with trio.open_nursery() as crowd:
                for _ in range(CROWD):
                    await seats.acquire()
                    crowd.start_soon(come_and_go, seats, Random(random.random()))
            with trio.fail_after(SOON):
                await eventually(lambda: set(server.connections()) == theirs)
                await eventually(lambda: readers(server, run_id, other) == [READERS, 0])
            tap.end()
        assert seen == [list(range(1, CROWD + 2))] * READERS
        assert (await server.run(other))["status"] == "running"
