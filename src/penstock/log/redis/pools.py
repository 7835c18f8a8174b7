"""How connections are made: to a server that is named, or to the one that Sentinels name."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import redis.asyncio
from redis import exceptions
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
    from collections.abc import Iterator

    from penstock.log.redis.addresses import Addresses

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
