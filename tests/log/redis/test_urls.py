"""The URLs that name a Redis, its Sentinels or a cluster: what they mean, and what is said if they mean nothing."""

from __future__ import annotations

import random
import re
import socket
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.asyncio.connection import SSLConnection
from redis.crc import REDIS_CLUSTER_HASH_SLOTS

from penstock.errors import ConfigurationError, LogUnavailable
from penstock.log.open import REDIS, open_log
from penstock.log.redis import urls
from penstock.log.redis.client import Client
from penstock.log.redis.cluster import Cluster
from penstock.log.redis.log import RedisLog
from tests.log.redis.test_client import words_of
from tests.support.clustered import shares_a_cluster
from tests.support.logs import LEASE, batch, record
from tests.support.redis_clusters import cluster_server, redis_cluster, shared_cluster
from tests.support.redis_runs import until_it_is
from tests.support.redis_servers import Endpoint, redis_server, redis_servers

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock.log import EventLog
    from penstock.log.redis.urls import ParsedUrl

SECRET = "open-sesame"  # noqa: S105  (it opens nothing)
CLUSTERS = ["redis+cluster", "rediss+cluster"]
SENTINELS = ["redis+sentinel", "rediss+sentinel"]


async def opened(url: str, **options: Any) -> RedisLog:
    async with open_log(url, **options) as log:
        assert isinstance(log, RedisLog)
        return log


async def refused(url: str) -> str:
    """What is said of a URL that opens nothing; never its password, wherever that stands."""
    with pytest.raises(ConfigurationError) as raised:
        await opened(url)
    assert SECRET not in words_of(raised.value)
    return str(raised.value)


# Clusters


@pytest.mark.parametrize(
    "rest, hosts, label",
    [
        ("host", [("host", 6379)], "host:6379"),
        ("host/0", [("host", 6379)], "host:6379"),
        ("host:7000", [("host", 7000)], "host:7000"),
        ("host:65535", [("host", 65535)], "host:65535"),
        ("host:", [("host", 6379)], "host:6379"),
        ("HOST.Example:7000", [("host.example", 7000)], "host.example:7000"),
        ("10.0.0.1:7000", [("10.0.0.1", 7000)], "10.0.0.1:7000"),
        ("[::1]:7000", [("::1", 7000)], "[::1]:7000"),
        ("[2001:db8::7]", [("2001:db8::7", 6379)], "[2001:db8::7]:6379"),
        ("a:1,b,c:3", [("a", 1), ("b", 6379), ("c", 3)], "a:1,b:6379,c:3"),
        ("a:1,[::2]:2,[::3]/0", [("a", 1), ("::2", 2), ("::3", 6379)], "a:1,[::2]:2,[::3]:6379"),
    ],
)
def test_a_cluster_is_named_by_some_of_its_nodes(rest: str, hosts: list[tuple[str, int]], label: str) -> None:
    for user in ("", f":{SECRET}@", f"user:{SECRET}@"):
        for query in ("", "?client_name=penstock"):
            there = urls.parse_cluster(f"redis+cluster://{user}{rest}{query}")
            assert (there.hosts, there.label) == (hosts, label)
            assert (there.service, there.sentinel_options) == (None, None)
            assert not there.options.keys() & {"host", "port", "db", "path"}


@pytest.mark.parametrize(
    "user, options",
    [
        ("", {}),
        ("@", {}),
        (":@", {}),
        (f":{SECRET}@", {"password": SECRET}),
        (f"user:{SECRET}@", {"username": "user", "password": SECRET}),
        ("user@", {"username": "user"}),
        ("us%40er:p%2Fa%3Fs%23s%3A%25%5B%2C@", {"username": "us@er", "password": "p/a?s#s:%[,"}),
        ("user:a:b@", {"username": "user", "password": "a:b"}),
        ("user:a@b@", {"username": "user", "password": "a@b"}),
        ("user:a,b@", {"username": "user", "password": "a,b"}),
        (
            "%C3%BCser:%E2%82%AC@",
            {"username": "\N{LATIN SMALL LETTER U WITH DIAERESIS}ser", "password": "\N{EURO SIGN}"},
        ),
    ],
)
def test_user_and_password_stand_before_the_hosts_with_escapes(user: str, options: dict[str, str]) -> None:
    assert urls.parse_cluster(f"redis+cluster://{user}a,b:7000").options == options
    assert urls.parse_sentinel(f"redis+sentinel://{user}a,b:7000/runs").options == options | {"db": 0}


@pytest.mark.parametrize("scheme", CLUSTERS)
def test_the_options_of_a_cluster_are_those_of_each_connection(scheme: str) -> None:
    there = urls.parse_cluster(
        f"{scheme}://user:{SECRET}@a,b?ssl_ca_certs=%2Fetc%2Fca.pem&client_name=x&socket_read_size=1"
    )
    secure = {"connection_class": SSLConnection} if scheme == "rediss+cluster" else {}
    words = {"ssl_ca_certs": "/etc/ca.pem", "client_name": "x", "socket_read_size": 1}
    assert there.options == {"username": "user", "password": SECRET, **words, **secure}


@pytest.mark.parametrize("option", ["host", "port"])
def test_an_option_does_not_say_where_a_cluster_is(option: str) -> None:
    for there in (
        urls.parse_cluster(f"redis+cluster://a?{option}=7"),
        urls.parse_sentinel(f"redis+sentinel://a/runs?{option}=7"),
    ):
        assert option not in there.options
        assert option not in (there.sentinel_options or {})
        assert there.hosts[0][0] == "a"


@pytest.mark.parametrize(
    "rest, hosts, service, database",
    [
        ("a/runs", [("a", 26379)], "runs", 0),
        ("a/runs/", [("a", 26379)], "runs", 0),
        ("a/runs/7", [("a", 26379)], "runs", 7),
        ("a:1,b,[::1]:3,[::2]/runs/15", [("a", 1), ("b", 26379), ("::1", 3), ("::2", 26379)], "runs", 15),
        ("a/my-runs.eu", [("a", 26379)], "my-runs.eu", 0),
        ("a/my%20runs%2F1/2", [("a", 26379)], "my runs/1", 2),
    ],
)
@pytest.mark.parametrize("user", ["", f"user:{SECRET}@"])
def test_sentinels_stand_before_the_service_that_they_watch_and_a_database_after_it(
    user: str, rest: str, hosts: list[tuple[str, int]], service: str, database: int
) -> None:
    there = urls.parse_sentinel(f"redis+sentinel://{user}{rest}")
    assert (there.hosts, there.service, there.options["db"]) == (hosts, service, database)
    places = ",".join(f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for host, port in hosts)
    assert there.label == f"{places}/{service}"
    assert not there.options.keys() & {"host", "port"}


def test_user_and_password_of_the_sentinels_are_options_of_their_own() -> None:
    words = "sentinel_username=guard&sentinel_password=ot%2Fher&ssl_ca_certs=%2Fca.pem"
    there = urls.parse_sentinel(f"rediss+sentinel://user:{SECRET}@a/runs/3?{words}")
    same = {"connection_class": SSLConnection, "ssl_ca_certs": "/ca.pem"}
    assert there.options == {"username": "user", "password": SECRET, "db": 3, **same}
    assert there.sentinel_options == {"username": "guard", "password": "ot/her", **same}


# What is none


NO_HOSTS = "the hosts in the URL are names or addresses, each with a port from 1 to 65535"
NO_DATABASE = "a cluster has one database, so nothing follows its hosts"
NO_SERVICE = "after the Sentinels comes the name of the service that they watch, and perhaps a database's number"
NO_URL = "this is no URL of a Redis"


@pytest.mark.parametrize("scheme", ["redis+cluster", "rediss+sentinel"])
async def test_hosts_that_are_none_are_refused_and_the_shape_is_said(scheme: str) -> None:
    user = f"user:{SECRET}@"
    shape = urls.CLUSTER if scheme in CLUSTERS else urls.SENTINEL
    tail = "" if scheme in CLUSTERS else "/runs"
    none = ["", ":7000", ",", "a,", ",a", "a,,b", "a:1:2", "a:1,b:x", "[::1", "::1", "[nothing]:1", "a\N{ACCOUNT OF}b"]
    for hosts in [*none, "a:0", "a:65536", "a:99999999999", "a:-1", "a:port"]:
        assert await refused(f"{scheme}://{user}{hosts}{tail}") == f"{NO_HOSTS}; write {shape}, {urls.ESCAPES}"


@pytest.mark.parametrize(
    "url, words",
    [
        ("redis+cluster://a/1", NO_DATABASE),
        ("redis+sentinel://a", NO_SERVICE),
        ("redis+sentinel://a/runs/x", NO_SERVICE),
        ("redis+cluster://a?socket_read_size=x", NO_URL),
        ("redis+sentinel://a/runs?socket_read_size=x", NO_URL),
        ("redis+cluster://a?db=x", NO_URL),
        ("redis+cluster://a?db=1", NO_DATABASE),
        ("rediss+sentinel://a/runs?nonsense=1", NO_URL),
        ("redis+cluster://a?ssl_ca_certs=x", NO_URL),
        ("redis+cluster://a?maint_notifications_config=1", NO_URL),
        ("redis+sentinel://a/runs?sentinel_manager=1", NO_URL),
    ],
)
async def test_what_follows_the_hosts_and_means_nothing_is_refused_and_the_shape_is_said(url: str, words: str) -> None:
    scheme, _, rest = url.partition("://")
    said = await refused(f"{scheme}://user:{SECRET}@{rest}")
    assert said.startswith(words)
    assert f"; write {urls.CLUSTER if scheme in CLUSTERS else urls.SENTINEL}" in said


UNESCAPED = [f"{SECRET}{sign}rest" for sign in "#/?[]\N{ACCOUNT OF}"] + [f"{first}{SECRET}" for first in "#/?"]
UNESCAPED += [f"12{sign}{SECRET}" for sign in "#/?["]


@pytest.mark.parametrize("scheme", ["redis+cluster", "redis+sentinel", "redis"])
@pytest.mark.parametrize("password", UNESCAPED)
async def test_a_password_without_its_escapes_is_refused_and_not_quoted(scheme: str, password: str) -> None:
    tail = "/runs" if scheme in SENTINELS else ""
    hosts = "host:6379" if scheme == "redis" else "a:1,b"
    for user in ("user", ""):
        said = await refused(f"{scheme}://{user}:{password}@{hosts}{tail}")
        assert "with % escapes for what is no letter or digit" in said


@pytest.mark.parametrize("scheme", sorted(REDIS))
async def test_each_scheme_opens_a_log_and_sends_nothing(scheme: str) -> None:
    rest = {"unix": "/nowhere", "sentinel": "nobody.invalid/runs"}.get(scheme.rpartition("+")[2], "nobody.invalid")
    with trio.fail_after(5):
        log = await opened(f"{scheme}://user:{SECRET}@{rest}", wait_replicas=2)
    servers = log._backend
    assert isinstance(servers, Cluster if scheme in CLUSTERS else Client)
    assert log._topology.is_cluster is (scheme in CLUSTERS)
    assert SECRET not in servers.address
    assert servers.address.startswith("/nowhere" if scheme == "unix" else "nobody.invalid:")


async def test_a_number_of_replicas_that_is_none_is_refused() -> None:
    for value in (-1, 1.0, 0.5, "1", None, True, False):
        with pytest.raises(ConfigurationError, match=r"^wait_replicas is a whole number, 0 or above, not ") as raised:
            await opened("redis://host", wait_replicas=value)
        assert str(raised.value).endswith(f"not {value!r}")


# What a URL does not fit


def cluster_of(server: Endpoint, user: str = "") -> str:
    return f"redis+cluster://{user}127.0.0.1:{server.port}"


async def unreachable(url: str) -> str:
    async with open_log(url) as log:
        with pytest.raises(LogUnavailable) as raised:
            await log.check()
    assert SECRET not in words_of(raised.value)
    return str(raised.value)


async def test_the_url_of_a_cluster_with_a_server_that_is_no_node_says_what_to_write() -> None:
    for executable in redis_servers().values():
        async with redis_server(executable=executable) as server:
            words = f"Redis at 127.0.0.1:{server.port} cannot serve: it is no node of a cluster; write redis:// for it"
            assert await unreachable(cluster_of(server)) == words


@shares_a_cluster
async def test_the_url_of_one_server_with_a_node_of_a_cluster_says_what_to_write() -> None:
    words = "it is a node of a cluster, and not the one for this key; write redis+cluster:// for it"
    said = [await unreachable(node.url) for node in shared_cluster().nodes if node is not await home_of("sse:live")]
    assert len(said) == 2
    assert all(words in each for each in said)


async def home_of(key: str) -> Endpoint:
    return await shared_cluster().node_of(key)


async def test_a_node_that_belongs_to_no_cluster_yet_says_so() -> None:
    async with redis_server(executable=cluster_server(), cluster_enabled="yes") as server:
        assert "knows no slots: the cluster has not been formed yet" in await unreachable(cluster_of(server))


def port_below_a_bus_port() -> int:
    """A free port whose ten-thousandth successor is free, too: that is where an old node listens to others."""
    while True:
        port = random.randrange(20_000, 30_000)
        with suppress(OSError), socket.socket() as one, socket.socket() as other:
            one.bind(("127.0.0.1", port))
            other.bind(("127.0.0.1", port + 10_000))
            return port


async def test_a_cluster_of_an_old_redis_says_that_it_is_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.support.redis_servers._free_port", port_below_a_bus_port)
    for executable in [path for version, path in redis_servers().items() if version.startswith("6.")]:
        async with redis_server(executable=executable, cluster_enabled=("yes",)) as server:
            await server.command("CLUSTER", "ADDSLOTS", *range(REDIS_CLUSTER_HASH_SLOTS))
            async with open_log(cluster_of(server)) as log:
                await until_it_is(partial(takes_writes, log), wanted=True)
                await log.start(record(), LEASE)
                with pytest.raises(LogUnavailable, match=r"penstock needs Redis 6\.2 or later, and 7\.0 for a cluster"):
                    await log.append([batch(1, 2)])


async def takes_writes(log: EventLog) -> bool:
    try:
        await log.check()
    except LogUnavailable:
        return False
    return True


async def test_a_cluster_with_a_password_wants_it_in_the_url() -> None:
    async with redis_cluster(masters=1, requirepass=SECRET, masterauth=SECRET) as own:
        (node,) = own.nodes
        for user in (f":{SECRET}@", f"default:{SECRET}@"):
            async with open_log(cluster_of(node, user)) as log:
                await log.start(record(user.partition(":")[0] or "r"), LEASE)
        assert "it wants a password; name it in the URL" in await unreachable(cluster_of(node))
        for user in (f":{SECRET}-not@", f"nobody:{SECRET}@", ":not@"):
            said = await unreachable(cluster_of(node, user))
            assert said == f"Redis at 127.0.0.1:{node.port} cannot serve: {WRONG}"


WRONG = "it refuses the user or the password in the URL"


WORDS = "a host runs %41 % %ff \N{ACCOUNT OF} \N{EURO SIGN} \0 0 1 65536 ::1 [::1] :// db= username= sentinel_password="
PIECES = st.sampled_from([*WORDS.split(" "), " ", *"@:/?#[],;=&.-+\\~\"'\t\n"])
ANYTHING = st.one_of(st.text(max_size=40), st.lists(PIECES, max_size=12).map("".join))


def read_by(scheme: str) -> Callable[[str], ParsedUrl]:
    if scheme in CLUSTERS:
        return urls.parse_cluster
    return urls.parse_sentinel if scheme in SENTINELS else urls.parse_server


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(REDIS)), ANYTHING)
def test_anything_after_a_scheme_is_read_or_refused(scheme: str, rest: str) -> None:
    with suppress(ConfigurationError):
        there = read_by(scheme)(f"{scheme}://{rest}")
        assert isinstance(there.label, str)
        assert all(host and 0 < port <= urls.LAST_PORT for host, port in there.hosts)
        assert bool(there.hosts) is (scheme in {*CLUSTERS, *SENTINELS})


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(sorted(REDIS - {"unix"})), st.tuples(ANYTHING, ANYTHING), ANYTHING)
def test_whatever_surrounds_a_password_no_message_shows_it(scheme: str, around: tuple[str, str], rest: str) -> None:
    url = f"{scheme}://user:{around[0]}{SECRET}{around[1]}@{rest}"
    said = ""
    try:
        there = read_by(scheme)(url)
    except ConfigurationError as error:
        said = words_of(error)
    else:
        assert SECRET not in there.label
        assert SECRET not in (there.service or "")
    assert SECRET not in said
    assert not said or re.search(r"; write redis(\+\w+)?://\[\[USER\]:PASSWORD@\]HOST", said)
