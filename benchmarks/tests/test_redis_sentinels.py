"""The Redis Sentinels that the suite runs against: real ones, that agree on a master as often as one dies."""

from __future__ import annotations

import pytest
from tests.support.redis_sentinels import NAME, Server, redis_sentinels
from tests.support.redis_servers import redis_servers

from benchmarks.tests.test_redis_servers import is_running

VERSIONS = list(redis_servers())
LATEST = max(VERSIONS, key=lambda version: [int(number) for number in version.split(".")])


async def _role(server: Server) -> str:
    return str((await server.command("ROLE"))[0])


@pytest.mark.parametrize("version", VERSIONS)
async def test_all_know_each_other_and_a_replica_takes_over(version: str) -> None:
    async with redis_sentinels(executable=redis_servers()[version], replicas=2) as whole:
        ports = [sentinel.port for sentinel in whole.sentinels]
        assert whole.url == "redis+sentinel://" + ",".join(f"127.0.0.1:{port}" for port in ports) + f"/{NAME}/0"
        for sentinel in whole.sentinels:
            assert (await sentinel.command("INFO", "server"))["redis_version"] == version
            told = await sentinel.command("SENTINEL MASTER", NAME)
            assert (told["num-slaves"], told["num-other-sentinels"], told["quorum"]) == (2, 2, 2)
        first = whole.servers[0]
        assert await whole.master() is first
        assert [await _role(server) for server in whole.servers] == ["master", "slave", "slave"]
        await first.command("SET", "key", "value")
        await first.command("WAIT", 2, 0)

        assert await whole.kill_master() is first
        second = await whole.failed_over(first)
        assert second in whole.servers[1:]
        assert await whole.master() is second
        assert await _role(second) == "master"
        assert await second.command("GET", "key") == "value"

        await whole.rejoin(first)
        assert "user request" not in first.log  # nobody had to tell it whom to follow
        assert await _role(first) == "slave"
        assert await first.command("GET", "key") == "value"
        assert await whole.master() is second


async def test_they_are_gone_when_the_block_is_left_paused_or_not() -> None:
    async with redis_sentinels(executable=redis_servers()[LATEST], appendonly="yes") as whole:
        assert await whole.servers[1].command("CONFIG GET", "appendonly") == {"appendonly": "yes"}
        whole.sentinels[0].pause()
        whole.servers[0].pause()
        await whole.sentinels[1].kill()
    for server in (*whole.servers, *whole.sentinels):
        assert not is_running(server.pid)
        assert not server.folder.exists()
