"""A Redis Cluster in the place of one redis-server, for tests that can have either; and where its runs lie."""

from __future__ import annotations

from collections import Counter
from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Any, Final, TypeVar
from zlib import crc32

import pytest
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from penstock.log.redis.log import RedisLog
from penstock.log.redis.schema import Keys
from tests.support.redis_clusters import shared_cluster
from tests.support.redis_servers import Endpoint, redis_servers

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from penstock.supervisor import Supervisor
    from tests.support.redis_clusters import Cluster
    from tests.support.redis_servers import RedisServer

L = TypeVar("L")

CLUSTER: Final = "redis cluster"
"""Stands for the shared cluster where a test is parametrised by the version of its server."""
NODES: Final = 3

shares_a_cluster = pytest.mark.xdist_group("cluster")
"""Tests with this mark run in one process, which starts the shared cluster once."""
on_the_cluster = pytest.param(CLUSTER, marks=shares_a_cluster, id=CLUSTER)
"""The shared cluster, where a test is parametrised by its server."""
everywhere = pytest.mark.parametrize("server", [*redis_servers(), on_the_cluster], indirect=True)
"""For a test in a file whose `server` is of each version."""
on_a_cluster = pytest.mark.parametrize("server", [pytest.param(None, id="redis"), on_the_cluster], indirect=True)
"""For a test whose `server` is that of `conftest.py`."""

_TO_EACH: Final = {"SCRIPT", "KEYS", "DBSIZE", "PUBSUB"}
"""Commands that are about a whole server."""


class ClusteredServer(Endpoint):
    def __init__(self, cluster: Cluster[Any]) -> None:
        self.cluster = cluster

    @property
    def url(self) -> str:
        return self.cluster.url

    @property
    def is_living(self) -> bool:
        return True

    async def command(self, *words: Any) -> Any:
        """The reply of the node that has the key; the replies of all together, if there is no key."""
        if words[0] in {"EVAL", "EVALSHA"} and words[2]:
            return await self.cluster.command(*words, key=words[3])
        if words[0] not in {"EVAL", "EVALSHA", *_TO_EACH}:
            return await self.cluster.command(*words, key=words[1])
        replies = [*(await self.cluster.each(*words)).values()]
        if isinstance(replies[0], list):
            return [each for reply in replies for each in reply]
        return sum(replies) if isinstance(replies[0], int) else replies[0]

    async def stats(self) -> dict[str, int]:
        calls: Counter[str] = Counter()
        for node in await self.cluster.masters():
            calls.update(await node.stats())
        return calls

    async def clients(self) -> list[dict[str, str]]:
        return [client for node in await self.cluster.masters() for client in await node.clients()]

    def flushall(self) -> None:
        self.cluster.flushall()


class Works:
    """A cluster of three masters that tests stir up one after another, and names of what is to be on each of them."""

    def __init__(self, cluster: Cluster[RedisServer]) -> None:
        self.cluster = cluster
        self.server = ClusteredServer(cluster)
        self.url = cluster.url
        self.first, self.second, self.third = self.nodes = cluster.nodes
        self._taken: set[int] = set()

    def node_of(self, key: str) -> RedisServer:
        return self.nodes[node_of(key)]

    def name_on(self, node: RedisServer, key_of: Callable[[str], str]) -> str:
        """A name whose key is on this node, on a slot of its own: no other call returns one on that slot."""
        for name in (f"name-{number}" for number in count()):
            slot = self.cluster.slot(key_of(name))
            if slot not in self._taken and self.node_of(key_of(name)) is node:
                self._taken.add(slot)
                return name
        raise AssertionError("there are names without end")

    def run_on(self, node: RedisServer) -> str:
        return self.name_on(node, Keys().record)

    def key_on(self, node: RedisServer) -> str:
        return self.name_on(node, Keys().idempotency)

    def last_without_inbox(self, *supervisors: Supervisor) -> list[RedisServer]:
        """The nodes, the last of them one that has the inbox of none of these two."""
        inboxes = {self.node_of(Keys().inbox(each._owner)) for each in supervisors}
        return sorted(self.nodes, key=lambda node: node not in inboxes)


@cache
def clustered() -> ClusteredServer:
    return ClusteredServer(shared_cluster())


def in_order(log: L) -> L:
    """The log: from now on each of its calls has had all of its effect when it returns."""
    if isinstance(log, RedisLog):
        log._backend.best_effort = log._backend.execute  # type: ignore[assignment]  # what one server does anyway
    return log


def node_of(key: str) -> int:
    return key_slot(key.encode()) * NODES // REDIS_CLUSTER_HASH_SLOTS


def nodes_of(prefix: str, runs: Sequence[str]) -> list[int]:
    return [node_of(Keys(prefix).record(run_id)) for run_id in runs]


def _prefix(node: int) -> str:
    """One under which the run "r" is on this node, and "a", "b", "c" are on one each."""
    tried = (f"{number}:run:" for number in count())
    return next(
        each for each in tried if nodes_of(each, "r") == [node] and len(set(nodes_of(each, ["a", "b", "c"]))) == NODES
    )


PREFIXES: Final = tuple(map(_prefix, range(NODES)))


def prefix_for(name: str) -> str:
    """The prefix for a test of this name: always the same one."""
    return PREFIXES[crc32(name.encode()) % NODES]
