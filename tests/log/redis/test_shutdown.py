"""`penstock serve` shut down while its Redis is there, is dead, or stands still: its exit code and its last words."""

from __future__ import annotations

import signal
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Final

import httpx2
import pytest
import trio

from tests.support.command_line import Program, penstock
from tests.support.proxy import proxy
from tests.support.redis_runs import SOON, until, whole
from tests.support.redis_servers import RedisServer, redis_server
from tests.support.serving import GUARD, Client
from tests.support.wire import DONE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from pathlib import Path

    from tests.support.wire import Reader

MODULE: Final = '''\
"""Producers that never end."""

import trio

from penstock import Event


async def silent(_input):
    yield Event(data="one")
    await trio.sleep_forever()


async def clings(_input):
    yield Event(data="one")
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()


producers = {"silent": silent, "clings": clings}
'''
STORED: Final = "penstock: stopped; every run has its last entry"
BRISK: Final = 0.5
"""Seconds for each of the three times of a shutdown."""
TIMES: Final = ("--drain-timeout", BRISK, "--cancel-grace", BRISK, "--finalize-timeout", BRISK)


class Served(Client):
    def __init__(self, program: Program, url: str, client: httpx2.AsyncClient) -> None:
        super().__init__(url, client)
        self.program = program

    async def shut_down(self, seconds: float) -> int:
        """Its exit code, after a SIGTERM, within so many seconds."""
        self.program.process.send_signal(signal.SIGTERM)
        with trio.fail_after(seconds):
            return await self.program.end()


@pytest.fixture
def serve(tmp_path: Path) -> Sequence[object]:
    (tmp_path / "endless.py").write_text(MODULE)
    return ("serve", "--producers", f"{tmp_path / 'endless.py'}:producers", "--bind", "127.0.0.1:0", *TIMES, "--log")


@asynccontextmanager
async def served(*words: object) -> AsyncIterator[Served]:
    async with penstock(*words) as program, httpx2.AsyncClient(timeout=GUARD) as client:
        url = (await program.until(r"serving on (http://127\.0\.0\.1:\d+)"))[1]
        yield Served(program, url, client)


async def out_of_reach(redis: RedisServer, how: str) -> None:
    """Nobody reaches it any more."""
    if how == "dead":
        await redis.kill()
    else:
        redis.pause()


async def with_readers(server: Served, stack: AsyncExitStack, producer: str, runs: int) -> list[Reader]:
    """Start so many runs; a reader of each, who has got its first entry."""
    reading = []
    for number in range(runs):
        run_id = await server.start(producer, run_id=f"run-{number}")
        reading.append(await stack.enter_async_context(server.reading(run_id)))
        assert [block.data for block in await reading[-1].take(1)] == ["one"]
    return reading


# With runs


@pytest.mark.parametrize(
    "how,runs,words", [("dead", 1, "1 run could not"), ("stands still", 2, "2 runs could not")], ids=["dead", "still"]
)
async def test_a_server_that_is_shut_down_with_its_redis_out_of_reach_says_how_many_runs_have_no_last_entry(
    serve: Sequence[object], how: str, runs: int, words: str
) -> None:
    async with redis_server() as redis, served(*serve, redis.url) as server, AsyncExitStack() as stack:
        reading = await with_readers(server, stack, "silent", runs)
        await out_of_reach(redis, how)
        assert await server.shut_down(3 * BRISK + 10) == 1
        assert words in server.program.lines[-1]
        assert "every run has its last entry" not in server.program.words
        assert "Traceback" not in server.program.words
        for reader in reading:  # sent away in good order, to come back elsewhere
            assert [(block.retry, block.data) for block in await reader.rest()] == [("1000", None)]


async def test_a_redis_that_goes_on_during_the_shutdown_is_given_the_last_entries(serve: Sequence[object]) -> None:
    patient = ("--finalize-timeout", 10)
    async with redis_server() as redis, served(*serve, redis.url, *patient) as server, AsyncExitStack() as stack:
        (reader,) = await with_readers(server, stack, "silent", 1)
        redis.pause()
        async with trio.open_nursery() as nursery:
            codes: list[int] = []

            async def shut_down() -> None:
                codes.append(await server.shut_down(SOON))

            nursery.start_soon(shut_down)
            await refuses_runs(server)
            redis.resume()
        assert codes == [0]
        assert server.program.lines[-1] == STORED
        error, done = await reader.rest()
        assert (error.json["code"], done.data) == ("INTERRUPTED", DONE)
        record = await whole(redis, "run-0")
        assert (record["status"], record["stop_reason"]) == ("failed", "interrupted")
        assert "Traceback" not in server.program.words


async def test_a_second_signal_while_the_redis_is_dead_ends_the_wait_for_the_runs(serve: Sequence[object]) -> None:
    patient = ("--drain-timeout", 3600, "--outage-limit", 300)
    async with redis_server() as redis, served(*serve, redis.url, *patient) as server, AsyncExitStack() as stack:
        (reader,) = await with_readers(server, stack, "silent", 1)
        await redis.kill()
        server.program.process.send_signal(signal.SIGTERM)
        await refuses_runs(server)
        assert await server.shut_down(2 * BRISK + 10) == 1
        assert "1 run could not be given a last entry" in server.program.lines[-1]
        assert [block.retry for block in await reader.rest()] == ["1000"]


async def refuses_runs(server: Served) -> None:
    with trio.fail_after(SOON):
        while (await server.client.get("/readyz")).json().get("code") != "DRAINING":  # noqa: ASYNC110  (each is a request)
            await trio.sleep(0.01)


async def test_a_producer_that_never_ends_holds_up_no_server_whose_redis_is_dead(serve: Sequence[object]) -> None:
    async with redis_server() as redis, served(*serve, redis.url) as server, AsyncExitStack() as stack:
        (reader,) = await with_readers(server, stack, "clings", 1)
        await redis.kill()
        assert await server.shut_down(2 * BRISK + 10) == 3
        assert "the producer of run run-0 has not let go, and stands here:" in server.program.words
        assert "in clings\n    await trio.sleep_forever()" in server.program.words
        assert "1 of their runs have no last entries" in server.program.lines[-1]
        assert "ends with code 3" in server.program.lines[-1]
        assert "have their last entries" not in server.program.words
        assert "every run has its last entry" not in server.program.words
        assert [block.retry for block in await reader.rest()] == ["1000"]


async def test_a_server_that_waits_for_a_stalled_redis_just_ends_at_a_shutdown(serve: Sequence[object]) -> None:
    async with redis_server() as redis, proxy(redis.port) as between:
        redis.pause()
        async with penstock(*serve, between.url) as program:
            await until(lambda: between.connections)  # and by then signals are the server's
            program.process.send_signal(signal.SIGTERM)
            with trio.fail_after(8):
                code = await program.end()
    assert code in {0, 1}, program.words
    assert ("stopped before it was ready" if code == 0 else "not started") in program.lines[-1]
    assert "every run" not in program.words
    assert "Traceback" not in program.words
