"""The URLs that name a Redis, or many. What is wrong with one is said without quoting it: it may hold a password.

How connections are made: to a server that is named, or to the one that Sentinels name.
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

from penstock.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

ONE: Final = "redis://[[USER]:PASSWORD@]HOST[:PORT][/DB]"
CLUSTER: Final = "redis+cluster://[[USER]:PASSWORD@]HOST[:PORT],HOST[:PORT],..."
SENTINEL: Final = "redis+sentinel://[[USER]:PASSWORD@]HOST[:PORT],HOST[:PORT],.../SERVICE[/DB]"
ESCAPES: Final = "with % escapes for what is no letter or digit"
REDIS_PORT: Final = 6379
SENTINEL_PORT: Final = 26379
LAST_PORT: Final = 65535


@dataclass(frozen=True, slots=True)
class Addresses:
    """What a URL names.

    Attributes:
        label: where that is, without any password, for messages.
        hosts: host and port of each server; empty for `unix://`.
        service: the name that Sentinel knows the primary by; None: it is no URL of Sentinels.
        options: how redis-py is to make connections: password, database, TLS.
        shape: what such a URL looks like.
        sentinel_options: the same for the Sentinels themselves.
    """

    label: str
    hosts: Sequence[tuple[str, int]]
    options: dict[str, Any]
    shape: str
    service: str | None = None
    sentinel_options: dict[str, Any] | None = None


def one(url: str) -> Addresses:
    """What `redis://`, `rediss://` or `unix://` names.

    Raises:
        ConfigurationError: redis-py cannot read it.
    """
    shape = f"write {ONE}, {ESCAPES}"
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
    return Addresses(label, [], _options(url, shape), shape)


def cluster(url: str) -> Addresses:
    """What `redis+cluster://` or `rediss+cluster://` names: some nodes of a cluster, which know the others.

    Raises:
        ConfigurationError: it cannot be read.
    """
    shape = f"write {CLUSTER}, {ESCAPES}"
    scheme, user, hosts, path, query = _many(url, REDIS_PORT, shape)
    options = _options(f"{scheme}://{user}localhost{query}", shape)
    if path not in {"", "0"} or options.get("db"):
        raise ConfigurationError(f"a cluster has one database, so nothing follows its hosts; {shape}")
    return Addresses(_label(hosts), hosts, _without_host(options), shape)


def sentinel(url: str) -> Addresses:
    """What `redis+sentinel://` or `rediss+sentinel://` names: Sentinels, and a service that they watch.

    User and password are those of the Redis; `?sentinel_username=...&sentinel_password=...` those of the Sentinels.

    Raises:
        ConfigurationError: it cannot be read.
    """
    shape = f"write {SENTINEL}, {ESCAPES}"
    scheme, user, hosts, path, query = _many(url, SENTINEL_PORT, shape)
    service, _, database = path.partition("/")
    if not service or not (database or "0").isdecimal() or not database.isascii():
        words = "after the Sentinels comes the name of the service that they watch, and perhaps a database's number"
        raise ConfigurationError(f"{words}; {shape}")
    options = _without_host(_options(f"{scheme}://{user}localhost/{database or 0}{query}", shape))
    own = {name: options.pop(f"sentinel_{name}", None) for name in ("username", "password")}
    same = {name: value for name, value in options.items() if name not in {"db", "username", "password"}}
    return Addresses(f"{_label(hosts)}/{unquote(service)}", hosts, options, shape, unquote(service), {**same, **own})


def _many(url: str, port: int, shape: str) -> tuple[str, str, list[tuple[str, int]], str, str]:
    """A URL of many hosts: its scheme as redis-py has it, user with `@`, hosts, path, and query with `?`."""
    scheme, _, rest = url.partition("://")
    rest, mark, query = rest.partition("?")
    place, _, path = rest.partition("/")
    user, at, names = place.rpartition("@")
    if "#" in url or "@" in path + query or {"@", ","} <= {*user} or not url.isprintable() or " " in url:
        raise ConfigurationError(f"this is no URL of a Redis; {shape}")
    hosts: list[tuple[str, int]] = []
    for name in names.split(","):
        try:
            parts = urlsplit(f"//{name}")
            host, said = parts.hostname, parts.port if parts.netloc == name else 0
        except ValueError:
            host, said = None, 0
        if not host or said == 0:
            words = "the hosts in the URL are names or addresses, each with a port from 1 to"
            raise ConfigurationError(f"{words} {LAST_PORT}; {shape}")
        hosts.append((host, said or port))
    return scheme.partition("+")[0], user + at, hosts, path.strip("/"), mark + query


def _options(url: str, shape: str) -> dict[str, Any]:
    try:
        urlsplit(url)
    except ValueError:  # it quotes what it does not understand
        raise ConfigurationError(f"this is no URL of a Redis; {shape}") from None
    try:
        return dict(parse_url(url))
    except (ValueError, TypeError, exceptions.RedisError) as error:
        raise ConfigurationError(f"this is no URL of a Redis: {error}; {shape}") from None


def _without_host(options: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if name not in {"host", "port"}}


def _label(hosts: Sequence[tuple[str, int]]) -> str:
    return ",".join(address_of(host, port) for host, port in hosts)


def address_of(host: str, port: int) -> str:
    """A host and a port in one word."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


OPTIONS: Final[dict[str, Any]] = {
    "protocol": 2,
    "decode_responses": False,
    "socket_timeout": None,
    "socket_connect_timeout": None,
    "health_check_interval": 0,
    "max_connections": None,
    "retry": Retry(NoBackoff(), 0),
}
"""How connections are made, whatever a URL says: Trio's deadlines are the only timeouts, and nothing is retried."""
SENTINEL_TIMEOUT: Final = 1.0
"""How many seconds a Sentinel may take to answer before the next one is asked."""


class Sentinels(Sentinel):
    """Sentinels, which say in plain words when none of them helps."""

    async def discover_master(self, service_name: str) -> Any:
        """Where the primary is."""
        try:
            return await super().discover_master(service_name)
        except (MasterNotFoundError, exceptions.ResponseError) as error:
            words = f"none of the Sentinels names a primary {service_name!r}"
            if "AuthenticationError" in str(error):
                words = "the Sentinels want a password, or another; write ?sentinel_password=PASSWORD at the end"
            elif not isinstance(error, MasterNotFoundError):
                words = "what answers is no Sentinel; write redis:// for a server"
            raise exceptions.ConnectionError(words) from None


def sentinels_of(there: Addresses) -> Sentinels:
    """The Sentinels of a URL. One that does not answer is passed over for the next."""
    options = {**(there.sentinel_options or {}), **OPTIONS}
    timeouts = {"socket_timeout": SENTINEL_TIMEOUT, "socket_connect_timeout": SENTINEL_TIMEOUT}
    secure = options.pop("connection_class", None) is not None
    with _readable(there.shape):
        return Sentinels(there.hosts, sentinel_kwargs={**options, **timeouts, "ssl": secure})  # type: ignore[no-untyped-call]


def pool_of(options: dict[str, Any], shape: str) -> redis.asyncio.ConnectionPool:
    """The connections to a server."""
    with _readable(shape):
        pool = redis.asyncio.ConnectionPool(**{**options, **OPTIONS})
        pool.make_connection()  # type: ignore[no-untyped-call]  # not connected, but it knows what it cannot be made of
        return pool


def watched_pool(there: Addresses, sentinel: Sentinels) -> redis.asyncio.ConnectionPool:
    """The connections to the server that Sentinels name."""
    options = {**there.options, **OPTIONS}
    secure = options.pop("connection_class", None) is not None
    kind = SentinelManagedSSLConnection if secure else SentinelManagedConnection
    with _readable(there.shape):
        pool = SentinelConnectionPool(there.service, sentinel, connection_class=kind, **options)  # type: ignore[no-untyped-call]
        pool.make_connection()  # type: ignore[no-untyped-call]
        return pool


@contextmanager
def _readable(shape: str) -> Iterator[None]:
    """What redis-py cannot make anything of is said to be no URL."""
    try:
        yield
    except (ValueError, TypeError, AttributeError, exceptions.RedisError) as error:
        raise ConfigurationError(f"this is no URL of a Redis: {error}; {shape}") from None
