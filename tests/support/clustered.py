"""A Redis Cluster in the place of one redis-server, for tests that can have either; and where runs come to lie in it.

    clustered()                 the shared cluster, as if it were a server: commands find their nodes
    PREFIXES                    prefixes of a log: whichever a test has, its runs lie on other nodes
    prefix_for(name)            the one of these for a test of this name
    in_order(log)               the log, made to wait for what a log in a cluster does in the background
    everywhere, on_a_cluster    decorators of tests: run on each version and on the cluster, or on one server and there

Of a cluster that a test stirs up itself, see `redis_clusters.py`.
"""

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
    from collections.abc import Sequence

    from tests.support.redis_clusters import Cluster

L = TypeVar("L")

CLUSTER: Final = "redis cluster"
"""Stands for the shared cluster where a test is parametrised by the version of its server."""
NODES: Final = 3

in_cluster_group: Final = pytest.param(CLUSTER, marks=pytest.mark.xdist_group("cluster"))
"""The same as a parameter: these tests run in one process, so that only one process starts the shared cluster."""

everywhere = pytest.mark.parametrize("server", [*redis_servers(), in_cluster_group], indirect=True)
"""For a test in a file whose `server` is of each version."""
on_a_cluster = pytest.mark.parametrize("server", [None, in_cluster_group], indirect=True, ids=["redis", CLUSTER])
"""For a test whose `server` is that of `conftest.py`."""

_TO_EACH: Final = {"SCRIPT", "KEYS", "DBSIZE", "PUBSUB"}
"""Commands that are about a whole server."""


class ClusteredServer(Endpoint):
    """A cluster as if it were one server."""

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
        """The calls of each command, of all nodes."""
        calls: Counter[str] = Counter()
        for node in await self.cluster.masters():
            calls.update(await node.stats())
        return calls

    async def clients(self) -> list[dict[str, str]]:
        """The connections that the nodes have."""
        return [client for node in await self.cluster.masters() for client in await node.clients()]

    def flushall(self) -> None:
        self.cluster.flushall()


@cache
def clustered() -> ClusteredServer:
    """The cluster of three nodes that every test of this process may use."""
    return ClusteredServer(shared_cluster())


def in_order(log: L) -> L:
    """The log: from now on each of its calls has had all of its effect when it returns."""
    if isinstance(log, RedisLog):
        log._servers.best_effort = log._servers.execute  # type: ignore[assignment]  # what one server does anyway
    return log


def node_of(key: str) -> int:
    """The number of the node of the shared cluster that has a key."""
    return key_slot(key.encode()) * NODES // REDIS_CLUSTER_HASH_SLOTS


def nodes_of(prefix: str, runs: Sequence[str]) -> list[int]:
    """The numbers of the nodes on which these runs lie under a prefix."""
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
