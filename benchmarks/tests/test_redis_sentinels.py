"""The Redis Sentinels that the suite runs against: real ones, that agree on a master as often as one dies."""

from __future__ import annotations

import pytest
import redis
import trio
from tests.support.redis_sentinels import NAME, Sentinels, Server, redis_sentinels
from tests.support.redis_servers import _free_port, _talk, redis_server, redis_servers

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


async def test_they_fail_over_three_times_in_a_row_and_make_replicas_of_the_dead_that_come_back() -> None:
    async with redis_sentinels(executable=redis_servers()[LATEST]) as whole:
        for number in range(3):
            killed = await whole.kill_master()
            assert killed is whole.servers[number % 2]
            master = await whole.failed_over(killed)
            assert master is not killed
            await master.command("SET", f"key-{number}", "value")
            await killed.restart(empty=True)
            await whole.in_sync()
            assert await _role(killed) == "slave"
            assert await whole.master() is master
            assert await killed.command("DBSIZE") == number + 1


async def test_a_minority_of_sentinels_names_no_master_and_those_that_come_back_do_again() -> None:
    async with redis_sentinels(executable=redis_servers()[LATEST]) as whole:
        killed, paused, _ = whole.sentinels
        paused.pause()
        assert await whole.master() is whole.servers[0]
        await killed.kill()
        with pytest.raises(LookupError, match="no majority"):
            await whole.master()
        paused.resume()
        assert await whole.master() is whole.servers[0]
        await killed.restart(empty=True)
        await whole.in_sync()
        assert await killed.command("SENTINEL", "MYID") == killed.id


async def test_passwords_are_asked_for_and_stand_in_the_url() -> None:
    own, of_sentinels = "sesame", "secret"
    async with redis_sentinels(
        executable=redis_servers()[LATEST], password=own, sentinel_password=of_sentinels
    ) as whole:
        assert whole.url.startswith(f"redis+sentinel://:{own}@127.0.0.1:")
        assert whole.url.endswith(f"/{NAME}/0?sentinel_password={of_sentinels}")
        for server in (*whole.servers, *whole.sentinels):
            with pytest.raises(redis.AuthenticationError):
                await trio.to_thread.run_sync(_talk, f"redis://127.0.0.1:{server.port}", ("PING",))
        assert [await _role(server) for server in whole.servers] == ["master", "slave"]


async def test_they_are_gone_when_the_block_is_left_paused_or_not() -> None:
    async with redis_sentinels(executable=redis_servers()[LATEST], appendonly="yes") as whole:
        assert await whole.servers[1].command("CONFIG GET", "appendonly") == {"appendonly": "yes"}
        whole.sentinels[0].pause()
        whole.servers[0].pause()
        await whole.sentinels[1].kill()
    for server in (*whole.servers, *whole.sentinels):
        assert not is_running(server.pid)
        assert not server.folder.exists()


async def test_they_are_gone_when_they_are_cancelled_while_they_get_to_know_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[Sentinels] = []

    def never(whole: Sentinels, _view: object) -> bool:
        seen.append(whole)
        scope.cancel()
        return False

    monkeypatch.setattr(Sentinels, "_is_in_sync", never)
    with trio.CancelScope() as scope:
        async with redis_sentinels():
            pytest.fail("they never agree")
    (whole,) = seen
    assert not any(is_running(server.pid) for server in (*whole.servers, *whole.sentinels))


async def test_a_sentinel_whose_port_is_taken_takes_another_and_the_others_hear_of_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with redis_server() as other:
        fresh = [_free_port() for _ in range(5)]
        ports = iter([*fresh[:4], other.port, fresh[4]])
        monkeypatch.setattr("tests.support.redis_servers._free_port", lambda: next(ports))
        async with redis_sentinels(executable=redis_servers()[LATEST]) as whole:
            assert [server.port for server in (*whole.servers, *whole.sentinels)] == fresh


async def test_what_does_not_come_about_is_an_error_with_what_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    async with redis_sentinels(executable=redis_servers()[LATEST], replicas=0) as whole:
        monkeypatch.setattr("tests.support.redis_sentinels.GUARD", 0)
        with pytest.raises(RuntimeError, match=r"did not come about.*_Said\(master="):
            await whole.failed_over(whole.servers[0])
