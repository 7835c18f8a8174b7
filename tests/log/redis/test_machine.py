"""The random operations of `test_log_machine.py` on real redis-servers and a cluster, beside the same model.

What differs from memory, and is in the overridden methods: Redis trims approximately, drops a running run of which
nobody has heard for long, and looks at the stream itself when a run is put back.
"""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from hypothesis import Phase, settings

from penstock.log.open import open_log
from penstock.log.redis.log import RedisLog
from tests.log.test_log_machine import MAX_ENTRIES, TTL, LogMachine, Model
from tests.support.clustered import CLUSTER, PREFIXES, clustered, in_order, shares_a_cluster
from tests.support.redis_servers import let_pass, redis_servers, shared_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock.log import EventLog

VERSION = next(iter(redis_servers()))
PHASES = [Phase.explicit, Phase.reuse, Phase.generate]
"""To shrink an example would take minutes with a real server."""


class RedisLogMachine(LogMachine):
    """The machine for a RedisLog that keeps few entries, on the first version."""

    version = VERSION
    prefix = "sse:run:"

    def __init__(self) -> None:
        super().__init__()
        self.server = clustered() if self.version == CLUSTER else shared_server(self.version)
        self.synchronous = 0.0
        """When the server's time and the model's were the same, by the monotonic clock."""

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[EventLog]:
        async with open_log(self.server.url, max_entries=MAX_ENTRIES, ttl=TTL, prefix=self.prefix) as log:
            assert isinstance(log, RedisLog)
            await self.keep_the_keys(log)  # those of runs that have expired since the step before are gone
            yield in_order(log)
            await self.keep_the_keys(log)

    async def keep_the_keys(self, log: RedisLog) -> None:
        """Keep idempotency keys exactly as long as their runs, as the owner's process does by its renewals.

        No step knows what the process before it knew; so neither can it renew the keys.
        """
        keep = [log._keys.idempotency(key) for key in self.world.keys]
        drop = [log._keys.idempotency(key) for key in {"k1", "k2"} - self.world.keys.keys()]
        await log._backend.execute([*(("PERSIST", key) for key in keep), *(("DEL", key) for key in drop)])

    def make_clock(self) -> None:
        return None

    async def elapse(self, seconds: float) -> None:
        now = time.monotonic()
        await let_pass(self.server, seconds - (now - self.synchronous))
        self.synchronous = now

    def empty(self) -> None:
        self.server.flushall()
        self.synchronous = time.monotonic()

    def oldest(self, model: Model) -> range:
        """Whole nodes of the stream are trimmed, never more than asked for."""
        return range(model.first, super().oldest(model).stop)

    def kept_until(self, lease: float) -> float:
        return self.now + max(TTL, 4 * lease)

    def lease_renewed(self, model: Model, seconds: float) -> None:
        model.lease = seconds

    def stands_at(self, model: Model) -> int:
        return model.last if model.last >= model.first else 0


class ClusterLogMachine(RedisLogMachine):
    """The same on a cluster, in which each of the runs is on another node."""

    version = CLUSTER
    prefix = PREFIXES[0]


SETTINGS = settings(max_examples=8, stateful_step_count=30, deadline=None, phases=PHASES)
RedisLogMachine.TestCase.settings = SETTINGS
ClusterLogMachine.TestCase.settings = settings(SETTINGS, max_examples=3)  # each takes twice as long
TestRedisLog = RedisLogMachine.TestCase
TestClusterLog = shares_a_cluster(ClusterLogMachine.TestCase)
