"""What each URL of an event log opens."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from penstock.errors import ConfigurationError
from penstock.log.memory import MemoryLog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock.log import EventLog

REDIS: Final = frozenset(
    {"redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"}
)
"""The schemes that name a Redis, or many."""


@asynccontextmanager
async def open_log(
    url: str,
    *,
    ttl: float = 10_800.0,
    max_entries: int = 10_000,
    prefix: str = "sse:run:",
    wait_replicas: int = 0,
) -> AsyncIterator[EventLog]:
    """Open the event log that a URL names, for as long as the block lasts.

    Args:
        url: `memory://`: this process's memory, gone with it. `redis://[[USER]:PASSWORD@]HOST[:PORT][/DB]`,
            `rediss://...` (the same over TLS) or `unix://[[USER]:PASSWORD@]/PATH[?db=DB]`: a Redis, which any number of
            processes share. `redis+sentinel://[[USER]:PASSWORD@]HOST[:PORT],HOST[:PORT],.../SERVICE[/DB]`: the Redis
            that Sentinels name. `redis+cluster://[[USER]:PASSWORD@]HOST[:PORT],HOST[:PORT],...`: a cluster of Redis 7
            or later. Both over TLS: `rediss+...`. Nothing is sent to them before the log is used.
        ttl: how long a run is kept after its end, in seconds.
        max_entries: the entries that are kept of one run.
        prefix: what the keys of entries begin with in Redis; it ends with `run:`, and all other keys begin with what is
            before that.
        wait_replicas: how many replicas must have a write in Redis before it counts. Where fewer have it within a
            second, that is as if Redis were away, and the write is sent again.

    Yields:
        The log, for `open_supervisor`.

    Raises:
        ConfigurationError: there is no log of that kind, or a limit is not above 0.
    """
    scheme, separator, _ = str(url).partition("://")
    if url == "memory://" and wait_replicas:
        raise ConfigurationError("memory:// has no replicas that a write could wait for (wait_replicas)")
    if url == "memory://":
        yield MemoryLog(ttl=ttl, max_entries=max_entries)
    elif separator and scheme in REDIS:
        if isinstance(wait_replicas, bool) or not isinstance(wait_replicas, int) or wait_replicas < 0:
            raise ConfigurationError(f"wait_replicas is a whole number, 0 or above, not {wait_replicas!r}")
        # Importing trio-asyncio gives the whole process other asyncio event loops, and slower ones.
        from penstock.log.redis.backend import SingleServer  # noqa: PLC0415
        from penstock.log.redis.client import open_client  # noqa: PLC0415
        from penstock.log.redis.cluster import open_cluster  # noqa: PLC0415
        from penstock.log.redis.log import RedisLog  # noqa: PLC0415

        if scheme.endswith("+cluster"):
            async with open_cluster(url, wait_replicas=wait_replicas) as cluster:
                yield RedisLog(cluster, cluster.topology, ttl=ttl, max_entries=max_entries, prefix=prefix)
        else:
            async with open_client(url, wait_replicas=wait_replicas) as client:
                yield RedisLog(client, SingleServer(), ttl=ttl, max_entries=max_entries, prefix=prefix)
    else:
        raise ConfigurationError(
            f"there is no event log {_shown(url)}; there is memory://, redis://HOST:PORT/DB, rediss://..., unix:///PATH,"
            " redis+sentinel://HOST:PORT,HOST:PORT/SERVICE and redis+cluster://HOST:PORT,HOST:PORT"
        )


def _shown(url: str) -> str:
    """The URL without what may be a password."""
    scheme, separator, _ = str(url).partition("://")
    if "@" not in str(url):
        return repr(url)
    return repr(f"{scheme}://...") if separator and "@" not in scheme else "of that kind"
