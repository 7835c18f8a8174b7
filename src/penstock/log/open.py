"""`open_log`: the event log that a URL names."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

from penstock.errors import ConfigurationError, missing_extra
from penstock.log.memory import MemoryLog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock.log import EventLog

REDIS: Final = frozenset(
    {"redis", "rediss", "unix", "redis+sentinel", "rediss+sentinel", "redis+cluster", "rediss+cluster"}
)
"""The schemes of the URLs that name Redis servers."""


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

    Opening sends nothing to Redis: an unreachable server shows on the first use of the log, as `LogUnavailable`.

    Args:
        url: `memory://` names this process's memory; the log ends with the block.
            `redis://[[USER]:PASSWORD@]HOST[:PORT][/DB]`, `rediss://...` (the same over TLS) and
            `unix://[[USER]:PASSWORD@]/PATH[?db=DB]` name a Redis, which any number of processes share.
            `redis+sentinel://[[USER]:PASSWORD@]HOST[:PORT],HOST[:PORT],.../SERVICE[/DB]` names the Redis that Sentinels
            know under SERVICE, and `redis+cluster://[[USER]:PASSWORD@]HOST[:PORT],HOST[:PORT],...` a cluster of Redis 7
            or later; `rediss+sentinel` and `rediss+cluster` are these two over TLS.
        ttl: seconds for which an ended run is kept.
        max_entries: the entries that are kept of one run; the oldest go first.
        prefix: the beginning of the Redis keys that hold entries. It ends with `run:`; all other keys begin with what
            stands before that.
        wait_replicas: the number of replicas that must have a write before Redis counts as having stored it. If fewer
            have it within a second, the write is sent again, as in an outage.

    Yields:
        The log, for `open_supervisor`.

    Raises:
        ConfigurationError: no log has such a URL, an argument is out of range, or the libraries of `penstock[redis]`
            are not installed.
    """
    scheme, separator, _ = str(url).partition("://")
    if url == "memory://" and wait_replicas:
        raise ConfigurationError("memory:// has no replicas that a write could wait for (wait_replicas)")
    if url == "memory://":
        yield MemoryLog(ttl=ttl, max_entries=max_entries)
    elif separator and scheme in REDIS:
        if isinstance(wait_replicas, bool) or not isinstance(wait_replicas, int) or wait_replicas < 0:
            raise ConfigurationError(f"wait_replicas is a whole number, 0 or above, not {wait_replicas!r}")
        try:
            # Importing trio-asyncio gives the whole process other, slower asyncio event loops.
            from penstock.log.redis.backend import SingleServer  # noqa: PLC0415
            from penstock.log.redis.client import open_client  # noqa: PLC0415
            from penstock.log.redis.cluster import open_cluster  # noqa: PLC0415
            from penstock.log.redis.log import RedisLog  # noqa: PLC0415
        except ModuleNotFoundError as error:
            if advice := missing_extra(error, f"a log at {scheme}://"):
                raise ConfigurationError(advice) from error
            raise

        if scheme.endswith("+cluster"):
            async with open_cluster(url, wait_replicas=wait_replicas) as cluster:
                yield RedisLog(cluster, cluster.topology, ttl=ttl, max_entries=max_entries, prefix=prefix)
        else:
            async with open_client(url, wait_replicas=wait_replicas) as client:
                yield RedisLog(client, SingleServer(), ttl=ttl, max_entries=max_entries, prefix=prefix)
    else:
        raise ConfigurationError(
            f"there is no event log {_without_password(url)}; there is memory://, redis://HOST:PORT/DB, rediss://..., "
            "unix:///PATH, redis+sentinel://HOST:PORT,HOST:PORT/SERVICE and redis+cluster://HOST:PORT,HOST:PORT"
        )


def _without_password(url: str) -> str:
    scheme, separator, _ = str(url).partition("://")
    if "@" not in str(url):
        return repr(url)
    return repr(f"{scheme}://...") if separator and "@" not in scheme else "of that kind"
