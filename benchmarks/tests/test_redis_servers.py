"""The redis-servers that the suite runs against: real ones, and gone afterwards."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import redis
import trio
from tests.support.redis_servers import let_pass, redis_server, redis_servers, shared_server

if TYPE_CHECKING:
    from collections.abc import Iterator

VERSIONS = list(redis_servers())


@pytest.fixture
def _looked_for_anew() -> Iterator[None]:
    redis_servers.cache_clear()
    yield
    redis_servers.cache_clear()


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("version", VERSIONS)
async def test_each_version_runs_as_what_it_says(version: str) -> None:
    async with redis_server(executable=redis_servers()[version]) as server:
        assert (await server.command("INFO", "server"))["redis_version"] == version


async def test_a_server_is_gone_when_its_block_is_left_paused_or_not() -> None:
    async with redis_server() as server, redis_server() as paused:
        paused.pause()
    assert not is_running(server.pid)
    assert not is_running(paused.pid)
    assert not server.folder.exists()


async def test_a_paused_server_does_not_answer_until_it_is_resumed() -> None:
    async with redis_server() as server, trio.open_nursery() as nursery:
        answers, answered = trio.open_memory_channel[Any](1)

        async def ask() -> None:
            await answers.send(await server.command("PING"))

        server.pause()
        nursery.start_soon(ask)
        with trio.move_on_after(0.1) as waiting:
            await answered.receive()
        assert waiting.cancelled_caught
        with trio.move_on_after(0.01) as waiting:
            await server.command("PING")
        assert waiting.cancelled_caught
        server.resume()
        assert await answered.receive()


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("empty", [False, True])
async def test_a_killed_server_has_its_data_again_unless_it_starts_empty(version: str, *, empty: bool) -> None:
    async with redis_server(persistent=True, executable=redis_servers()[version]) as server:
        url = server.url
        await server.command("SET", "key", "value")
        await server.kill()
        with pytest.raises(redis.ConnectionError):
            await server.command("PING")
        await server.restart(empty=empty)
        assert await server.command("GET", "key") == (None if empty else "value")
        assert server.url == url


def test_the_shared_server_ends_with_its_process() -> None:
    ask = "from tests.support.redis_servers import *; print(shared_server().log, shared_server().folder)"
    said = subprocess.run(
        [sys.executable, "-c", ask], check=True, capture_output=True, text=True, cwd=Path(__file__).parents[2]
    ).stdout
    pid = re.search(r"pid=(\d+)", said)
    assert pid
    assert not is_running(int(pid[1]))
    assert not Path(said.split()[-1]).exists()


@pytest.mark.parametrize("version", VERSIONS)
async def test_time_passes_for_ttls_leases_and_live_runs(version: str) -> None:
    server = shared_server(version)
    server.flushall()
    await server.command("SET", "short", "", "PX", 59_000)
    await server.command("SET", "long", "", "PX", 100_000)
    await server.command("SET", "for-ever", "")
    await server.command("HSET", "run:meta", "lease_end", 1_700_000_000_000, "state", "running")
    await server.command("HSET", "ended:meta", "lease_end", "")
    await server.command("HSET", "other", "lease_end", 5)
    await server.command("ZADD", "sse:live", 1_700_000_000_000, "run", 1_700_000_000_001.5, "two")
    await let_pass(server, 60.0)
    assert await server.command("EXISTS", "short") == 0
    assert 30_000 < await server.command("PTTL", "long") <= 40_000
    assert await server.command("PTTL", "for-ever") == -1
    assert await server.command("HGETALL", "run:meta") == {"lease_end": "1699999940000", "state": "running"}
    assert await server.command("HGET", "ended:meta", "lease_end") == ""
    assert await server.command("HGET", "other", "lease_end") == "5"
    assert await server.command("ZRANGE", "sse:live", 0, -1) == ["run", "two"]
    assert await server.command("ZSCORE", "sse:live", "run") == 1_699_999_940_000
