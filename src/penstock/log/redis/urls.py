"""The URLs that name a Redis or many, and the pools of connections that they describe.

An error never quotes a URL, which may hold a password.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import unquote, urlsplit

import redis.asyncio
from redis import exceptions
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import (
    MasterNotFoundError,
    Sentinel,
    SentinelConnectionPool,
    SentinelManagedConnection,
    SentinelManagedSSLConnection,
)
from redis.backoff import NoBackoff
from redis.driver_info import DriverInfo

from penstock.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

SERVER: Final = "redis://[[USER]:PASSWORD@]HOST[:PORT][/DB]"
CLUSTER: Final = "redis+cluster://[[USER]:PASSWORD@]HOST[:PORT],HOST[:PORT],..."
SENTINEL: Final = "redis+sentinel://[[USER]:PASSWORD@]HOST[:PORT],HOST[:PORT],.../SERVICE[/DB]"
ESCAPES: Final = "with % escapes for what is no letter or digit"
REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379
LAST_PORT: Final = 65535
SENTINEL_TIMEOUT: Final = 1.0  # seconds that a Sentinel may take to answer before the next one is asked
OPTIONS: Final[dict[str, Any]] = {
    "protocol": 2,
    "decode_responses": False,
    "socket_timeout": None,
    "socket_connect_timeout": None,
    "health_check_interval": 0,
    "max_connections": None,
    "retry": Retry(NoBackoff(), 0),
    "driver_info": DriverInfo(),  # else each connection reads the version of redis-py from the disk
}
"""How connections are made, whatever a URL says: Trio's deadlines are the only timeouts, and nothing is retried."""


@dataclass(frozen=True, slots=True)
class ParsedUrl:
    """What a URL names; `label` says it in messages, without any password, and `shape` what such a URL looks like."""

    label: str
    hosts: Sequence[tuple[str, int]]  # host and port of each server; empty for one server
    options: dict[str, Any]  # how redis-py makes connections: password, database, TLS
    shape: str
    service: str | None = None  # the name by which Sentinels know the primary
    sentinel_options: dict[str, Any] | None = None  # `options` for the Sentinels themselves


def parse_server(url: str) -> ParsedUrl:
    """Read `redis://`, `rediss://` or `unix://`; `ConfigurationError` if redis-py cannot."""
    shape = f"write {SERVER}, {ESCAPES}"
    try:
        parts = urlsplit(url)
        host = parts.hostname or "localhost"
        label = parts.path if parts.scheme == "unix" else f"{host}:{parts.port or REDIS_PORT}"
    except ValueError:
        raise ConfigurationError(f"this is no URL of a Redis; {shape}") from None
    if "@" in parts.query:
        raise ConfigurationError(f"this is no URL of a Redis; {shape}")
    if parts.fragment or (parts.scheme != "unix" and not (parts.path.strip("/") or "0").isdigit()):
        raise ConfigurationError(f"what follows the slash in the URL of a Redis is the number of a database; {shape}")
    return ParsedUrl(label, [], _options(url, shape), shape)


def parse_cluster(url: str) -> ParsedUrl:
    """Read `redis+cluster://` or `rediss+cluster://`: some nodes of a cluster, which know the others."""
    shape = f"write {CLUSTER}, {ESCAPES}"
    scheme, user, hosts, path, query = _split(url, REDIS_PORT, shape)
    options = _options(f"{scheme}://{user}localhost{query}", shape)
    if path not in {"", "0"} or options.get("db"):
        raise ConfigurationError(f"a cluster has one database, so nothing follows its hosts; {shape}")
    return ParsedUrl(_label(hosts), hosts, _without_host(options), shape)


def parse_sentinel(url: str) -> ParsedUrl:
    """Read `redis+sentinel://` or `rediss+sentinel://`: Sentinels, and the service that they watch.

    User and password are those of the Redis; `?sentinel_username=...&sentinel_password=...` those of the Sentinels.
    """
    shape = f"write {SENTINEL}, {ESCAPES}"
    scheme, user, hosts, path, query = _split(url, SENTINEL_PORT, shape)
    service, _, database = path.partition("/")
    if not service or not (database or "0").isdecimal() or not database.isascii():
        message = "after the Sentinels comes the name of the service that they watch, and perhaps a database's number"
        raise ConfigurationError(f"{message}; {shape}")
    options = _without_host(_options(f"{scheme}://{user}localhost/{database or 0}{query}", shape))
    own = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    same = {name: value for name, value in options.items() if name not in {"db", "username", "password"}}
    return ParsedUrl(f"{_label(hosts)}/{unquote(service)}", hosts, options, shape, unquote(service), {**same, **own})


def _split(url: str, port: int, shape: str) -> tuple[str, str, list[tuple[str, int]], str, str]:
    """A URL with many hosts: its scheme as redis-py has it, user with `@`, hosts, path, and query with `?`."""
    scheme, _, rest = url.partition("://")
    rest, mark, query = rest.partition("?")
    authority, _, path = rest.partition("/")
    user, at, names = authority.rpartition("@")
    if "#" in url or "@" in path + query or {"@", ","} <= {*user} or not url.isprintable() or " " in url:
        raise ConfigurationError(f"this is no URL of a Redis; {shape}")
    hosts: list[tuple[str, int]] = []
    for name in names.split(","):
        try:
            parts = urlsplit(f"//{name}")
            host, given = parts.hostname, parts.port if parts.netloc == name else 0
        except ValueError:
            host, given = None, 0
        if not host or given == 0:
            message = "the hosts in the URL are names or addresses, each with a port from 1 to"
            raise ConfigurationError(f"{message} {LAST_PORT}; {shape}")
        hosts.append((host, given or port))
    return scheme.partition("+")[0], user + at, hosts, path.strip("/"), mark + query


def _options(url: str, shape: str) -> dict[str, Any]:
    try:
        urlsplit(url)
    except ValueError:  # its message quotes the URL
        raise ConfigurationError(f"this is no URL of a Redis; {shape}") from None
    with _readable(shape):
        return dict(parse_url(url))


def _without_host(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in {"host", "port"}}


def _label(hosts: Sequence[tuple[str, int]]) -> str:
    return ",".join(address_of(host, port) for host, port in hosts)


def address_of(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Sentinels(Sentinel):
    """Sentinels whose errors say plainly why none of them helps."""

    async def discover_master(self, service_name: str) -> Any:
        try:
            return await super().discover_master(service_name)
        except (MasterNotFoundError, exceptions.ResponseError) as error:
            message = f"none of the Sentinels names a primary {service_name!r}"
            if "AuthenticationError" in str(error):
                message = "the Sentinels want a password, or another; write ?sentinel_password=PASSWORD at the end"
            elif not isinstance(error, MasterNotFoundError):
                message = "what answers is no Sentinel; write redis:// for a server"
            raise exceptions.ConnectionError(message) from None


def sentinels_of(parsed: ParsedUrl) -> Sentinels:
    """The Sentinels of a URL. One that does not answer is passed over for the next."""
    options = {**(parsed.sentinel_options or {}), **OPTIONS}
    timeouts = {"socket_timeout": SENTINEL_TIMEOUT, "socket_connect_timeout": SENTINEL_TIMEOUT}
    secure = options.pop("connection_class", None) is not None
    with _readable(parsed.shape):
        return Sentinels(parsed.hosts, sentinel_kwargs={**options, **timeouts, "ssl": secure})  # type: ignore[no-untyped-call]


def server_pool(options: dict[str, Any], shape: str) -> redis.asyncio.ConnectionPool:
    with _readable(shape):
        pool = redis.asyncio.ConnectionPool(**{**options, **OPTIONS})
        pool.make_connection()  # type: ignore[no-untyped-call]  # not connected, but unreadable options raise here
        return pool


def sentinel_pool(parsed: ParsedUrl, sentinels: Sentinels) -> redis.asyncio.ConnectionPool:
    options = {**parsed.options, **OPTIONS}
    secure = options.pop("connection_class", None) is not None
    kind = SentinelManagedSSLConnection if secure else SentinelManagedConnection
    with _readable(parsed.shape):
        pool = SentinelConnectionPool(parsed.service, sentinels, connection_class=kind, **options)  # type: ignore[no-untyped-call]
        pool.make_connection()  # type: ignore[no-untyped-call]
        return pool


@contextmanager
def _readable(shape: str) -> Iterator[None]:
    """Turn what redis-py raises for options that it cannot read into a `ConfigurationError`."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, exceptions.RedisError) as error:
        raise ConfigurationError(f"this is no URL of a Redis: {error}; {shape}") from None
