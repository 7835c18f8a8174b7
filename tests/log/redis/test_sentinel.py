"""The client of a Redis that Sentinels name, which follows them; and writes that count when replicas have them."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock.errors import LogUnavailable
from penstock.log import AppendStatus
from penstock.log.open import open_log
from penstock.log.redis import scripts
from penstock.log.redis.client import Client, open_client
from penstock.log.redis.slots import call
from tests.log.redis.test_client import words_of
from tests.support.clustered import shares_a_cluster
from tests.support.logs import COMPLETED, LEASE, batch, record, seqs
from tests.support.redis_clusters import shared_cluster
from tests.support.redis_runs import until_it_is
from tests.support.redis_sentinels import NAME, Sentinels, redis_sentinels
from tests.support.redis_servers import Endpoint, _free_port, redis_server

if TYPE_CHECKING:
    from tests.support.redis_servers import RedisServer

GUARD = 30
until = partial(until_it_is, wanted=True, seconds=GUARD)
SECRET, OTHER = "open-sesame", "other-word"
ENLIST = call(scripts.ENLIST, ["live"], 60_000, "1", "r")


async def ours(server: Endpoint) -> list[dict[str, str]]:
    clients = await server.clients()
    return [each for each in clients if not each["name"] and not {*each["flags"]} & {"S", "M"}]


async def nobody_of_ours_is_connected(*servers: Endpoint) -> None:
    async def nobody() -> bool:
        return not [client for server in servers for client in await ours(server)]

    await until(nobody)


async def is_taken(client: Client, value: str) -> bool:
    try:
        return bool(await client.ask("SET", "key", value) == b"OK")
    except LogUnavailable:
        return False


async def unreachable(url: str) -> str:
    async with open_client(url) as client:
        with trio.fail_after(GUARD), pytest.raises(LogUnavailable) as raised:
            await client.ask("PING")
    said = words_of(raised.value)
    assert SECRET not in said
    assert OTHER not in said
    return str(raised.value)


def sentinels_at(*servers: Endpoint, service: str = NAME, user: str = "", query: str = "") -> str:
    places = ",".join(f"127.0.0.1:{server.port}" for server in servers)
    return f"redis+sentinel://{user}{places}/{service}{query}"


# Who is the primary


async def test_a_failover_is_followed() -> None:
    async with redis_sentinels() as whole, open_client(whole.url) as client:
        first, second = whole.servers
        assert await client.execute([("SET", "key", "before"), ENLIST, ("GET", "key")]) == [b"OK", None, b"before"]

        await whole.kill_master()
        await until(lambda: is_taken(client, "after"))
        assert await second.command("GET", "key") == "after"
        assert await whole.failed_over(first) is second
        assert [await client.ask(*ENLIST), await client.ask("ZCARD", "live")] == [None, 1]


async def test_who_has_been_demoted_and_still_answers_is_left() -> None:
    async with redis_sentinels(sentinels=1, quorum=1) as whole, open_client(whole.url) as client:
        first, second = whole.servers
        await client.ask(*ENLIST)
        assert len(await ours(first)) == 1
        await hand_over(whole, first, second)
        assert await client.execute([("GET", "key"), ENLIST]) == [None, None]
        assert await client.ask("ZCARD", "live") == 1
        assert await client.ask("SET", "key", 1) == b"OK"
        assert await second.command("GET", "key") == "1"
        await nobody_of_ours_is_connected(first)

        await hand_over(whole, second, first)
        assert await client.ask("SET", "key", 2) == b"OK"
        assert await first.command("GET", "key") == "2"
        await nobody_of_ours_is_connected(second)


async def hand_over(whole: Sentinels, old: RedisServer, new: RedisServer) -> None:
    """Make another server the primary without a word to the clients; the only Sentinel says so at once."""
    (sentinel,) = whole.sentinels
    await sentinel.command("SENTINEL", "REMOVE", NAME)
    await new.command("REPLICAOF", "NO", "ONE")
    await old.command("REPLICAOF", "127.0.0.1", new.port)
    await sentinel.command("SENTINEL", "MONITOR", NAME, "127.0.0.1", new.port, 1)


async def test_sentinels_that_are_dead_or_stalled_are_passed_over() -> None:
    async with redis_sentinels() as whole:
        dead, stalled, living = whole.sentinels
        await dead.kill()
        stalled.pause()
        with trio.fail_after(GUARD):
            async with open_client(sentinels_at(dead, stalled, living)) as client:
                assert await client.ask("SET", "key", 1) == b"OK"
                await whole.servers[0].command("CLIENT", "KILL", "TYPE", "normal")
                assert await client.ask("SET", "key", 2) == b"OK"
            assert "127.0.0.1" in await unreachable(sentinels_at(dead, stalled))
        await nobody_of_ours_is_connected(whole.servers[0])


async def test_a_name_that_no_sentinel_knows_and_sentinels_that_are_none_are_out_of_reach() -> None:
    async with redis_sentinels(sentinels=1, quorum=1) as whole:
        (sentinel,) = whole.sentinels
        nobody = f"redis+sentinel://127.0.0.1:{_free_port()},127.0.0.1:{_free_port()}/{NAME}"
        server = sentinels_at(whole.servers[0])
        for url in (sentinels_at(sentinel, service="nobody"), nobody, server):
            said = await unreachable(url)
            assert f"Redis at {url.partition('://')[2]}" in said
            assert "Sentinel" in said
            assert "object at 0x" not in said
            assert len(said) < 400
        assert "'nobody'" in await unreachable(sentinels_at(sentinel, service="nobody"))


async def test_the_servers_have_one_password_and_the_sentinels_another() -> None:
    async with redis_sentinels(sentinels=1, quorum=1, password=SECRET, sentinel_password=OTHER) as whole:
        async with open_client(whole.url) as client:
            assert await client.execute([("SET", "key", 1), ("GET", "key")]) == [b"OK", b"1"]
            assert SECRET not in client.address
            assert OTHER not in client.address
        (sentinel,) = whole.sentinels
        right = f"?sentinel_password={OTHER}"
        url = sentinels_at(sentinel, query=right)
        assert "it wants a password; name it in the URL" in await unreachable(url)
        url = sentinels_at(sentinel, user=f":{OTHER}@", query=right)
        assert "it refuses the user or the password in the URL" in await unreachable(url)
        assert "sentinel_password" in await unreachable(sentinels_at(sentinel, user=f":{SECRET}@"))
        url = sentinels_at(sentinel, user=f":{SECRET}@", query=f"?sentinel_password={SECRET}")
        assert "sentinel_password" in await unreachable(url)


async def in_sync(replica: Endpoint) -> bool:
    return bool((await replica.command("INFO", "replication"))["master_link_status"] == "up")


def wait_for_replicas(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """For so long; where they are to have it in time, for longer than any machine takes."""
    monkeypatch.setattr("penstock.log.redis.client.REPLICAS_TIMEOUT", seconds)
    monkeypatch.setattr("penstock.log.redis.backend.ANSWER_TIMEOUT", 2.0 * GUARD)


async def test_a_write_is_repeated_until_the_replicas_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    options: dict[str, Any] = {"repl_diskless_sync_delay": 0}
    async with (
        redis_server(**options) as primary,
        redis_server(replicaof=("127.0.0.1", primary.port), **options) as replica,
        open_log(primary.url, wait_replicas=1) as log,
        open_log(primary.url, wait_replicas=2) as demanding,
    ):
        await until(lambda: in_sync(replica))
        wait_for_replicas(monkeypatch, GUARD)
        assert (await log.start(record(), LEASE)).created
        assert [each.status for each in await log.append([batch(1, 2)])] == [AppendStatus.OK]
        assert await replica.command("XLEN", "sse:run:r") == 2

        replica.pause()
        wait_for_replicas(monkeypatch, 0.3)
        words = r"0 of the 1 replicas that must have a write have it within 0\.3 s"
        with pytest.raises(LogUnavailable, match=words):
            await log.append([batch(3, 4)])
        with pytest.raises(LogUnavailable, match=words):
            await log.start(record("other"), LEASE)
        with pytest.raises(LogUnavailable, match=words):
            await log.request_cancel("r", "enough")
        assert (await log.get("r")).seq == 4  # whoever reads waits for nobody
        assert seqs((await log.read("r", 0)).entries) == [1, 2, 3, 4]

        replica.resume()
        wait_for_replicas(monkeypatch, GUARD)
        assert [each.status for each in await log.append([batch(3, 4)])] == [AppendStatus.OK]
        assert (await log.start(record("other"), LEASE)).created
        assert seqs((await log.read("r", 0)).entries) == [1, 2, 3, 4]
        assert await replica.command("XLEN", "sse:run:r") == 4
        (ended,) = await log.append([batch(5, 5, COMPLETED)])
        assert ended.status is not AppendStatus.AWAY

        wait_for_replicas(monkeypatch, 0.3)
        with pytest.raises(LogUnavailable, match=r"[01] of the 2 replicas that must have a write have it"):
            await demanding.append([batch(1, 1, run_id="other")])
        wait_for_replicas(monkeypatch, GUARD)
        assert [each.status for each in await log.append([batch(1, 1, run_id="other")])] == [AppendStatus.OK]
        assert seqs((await log.read("other", 0)).entries) == [1]


@shares_a_cluster
async def test_replicas_that_a_cluster_has_not_are_waited_for_on_each_node(monkeypatch: pytest.MonkeyPatch) -> None:
    wait_for_replicas(monkeypatch, 0.3)
    shared = shared_cluster()
    shared.flushall()
    async with open_log(shared.url) as log, open_log(shared.url, wait_replicas=1) as demanding:
        for run_id in ("a", "b", "c"):
            await log.start(record(run_id), LEASE)
        with pytest.raises(LogUnavailable, match="0 of the 1 replicas that must have a write have it"):
            await demanding.append([batch(1, 1, run_id=run_id) for run_id in ("a", "b", "c")])
        assert [each.status for each in await log.append([batch(1, 2, run_id="a")])] == [AppendStatus.OK]
        assert seqs((await demanding.read("a", 0)).entries) == [1, 2]
