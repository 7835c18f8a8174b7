"""What each URL of an event log opens."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from penstock.errors import ConfigurationError
from penstock.log.memory import MemoryLog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock.log import EventLog


@asynccontextmanager
async def open_log(
    url: str, *, ttl: float = 10_800.0, max_entries: int = 10_000, prefix: str = "sse:run:"
) -> AsyncIterator[EventLog]:
    """Open the event log that a URL names, for as long as the block lasts.

    Args:
        url: `memory://`: this process's memory, gone with it. `redis://[[USER]:PASSWORD@]HOST[:PORT][/DB]`,
            `rediss://...` (the same over TLS) or `unix://[[USER]:PASSWORD@]/PATH[?db=DB]`: a Redis, which any number of
            processes share. Nothing is sent to it before the log is used.
        ttl: how long a run is kept after its end, in seconds.
        max_entries: the entries that are kept of one run.
        prefix: what the keys of entries begin with in Redis; it ends with `run:`, and all other keys begin with what is
            before that.

    Yields:
        The log, for `open_supervisor`.

    Raises:
        ConfigurationError: there is no log of that kind, or a limit is not above 0.
    """
    scheme, separator, _ = str(url).partition("://")
    if url == "memory://":
        yield MemoryLog(ttl=ttl, max_entries=max_entries)
    elif separator and scheme in {"redis", "rediss", "unix"}:
        # Importing trio-asyncio gives the whole process other asyncio event loops, and slower ones.
        from penstock.log.redis.client import open_client  # noqa: PLC0415
        from penstock.log.redis.log import RedisLog  # noqa: PLC0415

        async with open_client(url) as client:
            yield RedisLog(client, ttl=ttl, max_entries=max_entries, prefix=prefix)
    else:
        raise ConfigurationError(
            f"there is no event log {_shown(url)}; there is memory://, redis://HOST:PORT/DB, rediss://... and unix:///PATH"
        )


def _shown(url: str) -> str:
    """The URL without what may be a password."""
    scheme, separator, _ = str(url).partition("://")
    if "@" not in str(url):
        return repr(url)
    return repr(f"{scheme}://...") if separator and "@" not in scheme else "of that kind"
