"""The indexes of runs: where `list` finds the newest runs, and where a reaper finds the live ones.

One server has two: `sse:runs`, by creation, and `sse:live`, by the end of the lease. In a cluster an index is a key
like any other, without whose node no run could be started or renewed. So a cluster has sixteen of each, and a run is
listed in one on its own node. That may change; a run that is listed twice, or on another node, does no harm: its record
decides, and a reaper looks through all indexes.
"""

from __future__ import annotations

from functools import cache
from itertools import count
from typing import TYPE_CHECKING, Final
from zlib import crc32

from redis.crc import REDIS_CLUSTER_HASH_SLOTS

from penstock.log.redis.slots import slot_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from penstock.log.redis.backend import Topology
    from penstock.log.redis.schema import Keys

NUMBERS: Final = (18, 249, 72, 223, 105, 2, 95, 235, 265, 34, 413, 155, 273, 363, 405, 48)
"""The numbers of the indexes in a cluster. Each is near the middle of a sixteenth of the slots, in their order, so that
each of up to sixteen primaries with even slots has an index."""


class RunIndexes:
    """The indexes of one log."""

    def __init__(self, keys: Keys, topology: Topology) -> None:
        self._keys = keys
        self._topology = topology
        self._numbers: Sequence[int | None] = NUMBERS if topology.is_cluster else [None]
        self._on: dict[str, list[int | None]] = {}  # the numbers of the indexes on each shard; a cache
        self._probes: dict[str, str] = {}
        topology.watch(self._on_moved)

    def _on_moved(self) -> None:
        self._on.clear()
        self._probes.clear()

    def runs_of(self, run_id: str) -> str:
        return self._keys.runs(self._number(run_id))

    def live_of(self, run_id: str) -> str:
        return self._keys.live(self._number(run_id))

    def by_live(self, runs: Iterable[str]) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for run_id in runs:
            found.setdefault(self.live_of(run_id), []).append(run_id)
        return found

    def runs(self) -> list[str]:
        return [self._keys.runs(number) for number in self._numbers]

    def live(self, shard: str) -> list[str]:
        return [self._keys.live(number) for number in self._numbers_on(shard)]

    def probe(self, shard: str) -> str:
        """A key on this shard that may be touched: an index, if the shard has any."""
        if shard not in self._probes:
            names = (self._keys.live(number) for number in self._numbers_on(shard) or _number_of_each_slot())
            found = next((name for name in names if self._topology.shard(name) == shard), None)
            self._probes[shard] = found or self._keys.live(self._numbers[0])
        return self._probes[shard]

    def _number(self, run_id: str) -> int | None:
        numbers = self._numbers_on(self._topology.shard(self._keys.record(run_id))) or self._numbers
        return numbers[crc32(run_id.encode(errors="replace")) % len(numbers)]

    def _numbers_on(self, shard: str) -> list[int | None]:
        if shard not in self._on:
            shard_of, live = self._topology.shard, self._keys.live
            self._on[shard] = [number for number in self._numbers if shard_of(live(number)) == shard]
        return self._on[shard]


@cache
def _number_of_each_slot() -> Sequence[int]:
    """For each slot a number that in braces makes a key of that slot. Takes 0.2 s at its first call."""
    found: dict[int, int] = {}
    numbers = count()
    while len(found) < REDIS_CLUSTER_HASH_SLOTS:
        number = next(numbers)
        found.setdefault(slot_of(f"{{{number}}}"), number)
    return [*found.values()]
