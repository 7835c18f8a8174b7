"""Starts a real Redis Cluster to measure with: masters only, which share the slots evenly."""

from __future__ import annotations

import subprocess
import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from benchmarks.processes import READY_WITHIN, BenchmarkError
from benchmarks.redis_server import free_port, redis_executable, redis_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.redis_server import Redis

SLOTS: Final = 16384
"""The number of slots of every cluster."""
NEEDS: Final = 7
"""The lowest major version of Redis that penstock supports in a cluster."""
PAUSE: Final = 0.05
"""Seconds between two checks of the cluster's state."""


@dataclass(frozen=True, slots=True)
class RedisCluster:
    """A cluster without persistence and without replicas."""

    nodes: Sequence[Redis]

    @property
    def url(self) -> str:
        """The URL of the log in it."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)


def no_cluster() -> str | None:
    """The reason why no cluster can be started here, or None."""
    said = subprocess.run([redis_executable(), "--version"], check=True, capture_output=True, text=True).stdout
    version = said.partition("v=")[2].partition(" ")[0]
    return None if int(version.partition(".")[0]) >= NEEDS else f"there is only Redis {version}"


@contextmanager
def redis_cluster(masters: int) -> Iterator[RedisCluster]:
    """Start an empty cluster; it ends with the block.

    Raises:
        BenchmarkError: a node does not start, or the nodes do not form a cluster in time.
    """
    with ExitStack() as stack:
        buses = [free_port() for _ in range(masters)]  # by itself it would be 10,000 more, which may be no port
        nodes = [
            stack.enter_context(redis_server("--cluster-enabled", "yes", "--cluster-port", str(bus))) for bus in buses
        ]
        bounds = pairwise(SLOTS * number // masters for number in range(masters + 1))
        for number, (node, (first, end)) in enumerate(zip(nodes, bounds, strict=True)):
            _command(node, "SET-CONFIG-EPOCH", number + 1)
            _command(node, "ADDSLOTSRANGE", first, end - 1)
            for other, bus in zip(nodes[:number], buses[:number], strict=True):
                _command(node, "MEET", "127.0.0.1", other.port, bus)
        deadline = time.monotonic() + READY_WITHIN
        while not all(_is_whole(node, masters) for node in nodes):
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{masters} nodes have not become a cluster within {READY_WITHIN:g} s")
            time.sleep(PAUSE)
        yield RedisCluster(nodes)


def _command(node: Redis, *arguments: str | int) -> None:
    node.client.execute_command("CLUSTER", *arguments)  # type: ignore[no-untyped-call]


def _is_whole(node: Redis, masters: int) -> bool:
    """Whether this node knows all nodes and the owners of all slots."""
    said = node.client.execute_command("CLUSTER INFO")  # type: ignore[no-untyped-call]
    return said["cluster_state"] == "ok" and int(said["cluster_size"]) == masters
