"""What each URL of an event log opens."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from penstock.errors import ConfigurationError
from penstock.log.memory import MemoryLog

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock.log import EventLog


@asynccontextmanager
async def open_log(url: str, *, ttl: float = 10_800.0, max_entries: int = 10_000) -> AsyncIterator[EventLog]:
    """Open the event log that a URL names, for as long as the block lasts.

    Args:
        url: `memory://`: this process's memory, gone with it.
        ttl: how long a run is kept after its end, in seconds.
        max_entries: the entries that are kept of one run.

    Yields:
        The log, for `open_supervisor`.

    Raises:
        ConfigurationError: there is no log of that kind, or a limit is not above 0.
    """
    scheme = urlsplit(url).scheme
    if scheme != "memory" or url != "memory://":
        raise ConfigurationError(f"there is no event log {url!r}; there is memory://")
    yield MemoryLog(ttl=ttl, max_entries=max_entries)
