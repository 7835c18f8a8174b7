"""A real cluster of Redis to measure with: masters only, which share the slots evenly."""

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
"""The slots of a cluster, however many nodes it has."""
NEEDS: Final = 7
"""The major version of Redis that penstock's clusters are made of."""
PAUSE: Final = 0.05
"""Seconds between two looks at whether the nodes have met."""


@dataclass(frozen=True, slots=True)
class RedisCluster:
    """A cluster of one's own, without persistence and without replicas."""

    nodes: Sequence[Redis]

    @property
    def url(self) -> str:
        """Where it is."""
        return "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in self.nodes)


def no_cluster() -> str | None:
    """Why no cluster can be made here, or None."""
    said = subprocess.run([redis_executable(), "--version"], check=True, capture_output=True, text=True).stdout
    version = said.partition("v=")[2].partition(" ")[0]
    return None if int(version.partition(".")[0]) >= NEEDS else f"there is only Redis {version}"


@contextmanager
def redis_cluster(masters: int) -> Iterator[RedisCluster]:
    """A cluster that is empty, until the block is left.

    Raises:
        BenchmarkError: a node does not start, or they do not come together.
    """
    with ExitStack() as stack:
        buses = [free_port() for _ in range(masters)]  # by itself it would be 10,000 more, which may be no port
        nodes = [
            stack.enter_context(redis_server("--cluster-enabled", "yes", "--cluster-port", str(bus))) for bus in buses
        ]
        bounds = pairwise(SLOTS * number // masters for number in range(masters + 1))
        for number, (node, (first, end)) in enumerate(zip(nodes, bounds, strict=True)):
            _told(node, "SET-CONFIG-EPOCH", number + 1)
            _told(node, "ADDSLOTSRANGE", first, end - 1)
            for other, bus in zip(nodes[:number], buses[:number], strict=True):
                _told(node, "MEET", "127.0.0.1", other.port, bus)
        deadline = time.monotonic() + READY_WITHIN
        while not all(_is_whole(node, masters) for node in nodes):
            if time.monotonic() > deadline:
                raise BenchmarkError(f"{masters} nodes have not become a cluster within {READY_WITHIN:g} s")
            time.sleep(PAUSE)
        yield RedisCluster(nodes)


def _told(node: Redis, *words: str | int) -> None:
    node.client.execute_command("CLUSTER", *words)  # type: ignore[no-untyped-call]


def _is_whole(node: Redis, masters: int) -> bool:
    """Whether this node knows of all, and whose all slots are."""
    said = node.client.execute_command("CLUSTER INFO")  # type: ignore[no-untyped-call]
    return said["cluster_state"] == "ok" and int(said["cluster_size"]) == masters
