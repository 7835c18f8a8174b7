"""Where the lists of runs are.

One Redis has two of them: `sse:runs`, the runs by the time of their making, and `sse:live`, by the end of their lease.
In a cluster a list is a key like any other, and with its node the starts and the renewals of all runs would be away. So
there are sixteen of each, and a run stands in one that is on its own node. Where that is may change; a run that stands
in two lists, or in one on another node, does no harm: the records decide, and a reaper looks through all lists.
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

    from penstock.log.redis.backend import Backend
    from penstock.log.redis.schema import Keys

NUMBERS: Final = (18, 249, 72, 223, 105, 2, 95, 235, 265, 34, 413, 155, 273, 363, 405, 48)
"""The numbers of the lists in a cluster. Each is near the middle of a sixteenth of the slots, in their order, so that
each of up to so many primaries has a list if their slots are even."""


class RunIndexes:
    """The lists of one log.

    Args:
        keys: how they are called.
        servers: where keys are.
    """

    def __init__(self, keys: Keys, servers: Backend) -> None:
        self._keys = keys
        self._servers = servers
        self._numbers: Sequence[int | None] = NUMBERS if servers.clustered else [None]
        self._on: dict[str, list[int | None]] = {}
        """The lists on each part, as far as somebody has asked."""
        self._probes: dict[str, str] = {}
        servers.watch(self._moved)

    def _moved(self) -> None:
        self._on.clear()
        self._probes.clear()

    def runs_of(self, run_id: str) -> str:
        """The list by age in which a run stands."""
        return self._keys.runs(self._number(run_id))

    def live_of(self, run_id: str) -> str:
        """The list by lease in which a run stands."""
        return self._keys.live(self._number(run_id))

    def by_live(self, runs: Iterable[str]) -> dict[str, list[str]]:
        """These runs by the lists by lease in which they stand."""
        found: dict[str, list[str]] = {}
        for run_id in runs:
            found.setdefault(self.live_of(run_id), []).append(run_id)
        return found

    def runs(self) -> list[str]:
        """All lists by age."""
        return [self._keys.runs(number) for number in self._numbers]

    def live(self, shard: str) -> list[str]:
        """The lists by lease on one part."""
        return [self._keys.live(number) for number in self._numbers_on(shard)]

    def probe(self, shard: str) -> str:
        """A key of this part which may be touched: one of its lists, if it has any."""
        if shard not in self._probes:
            numbers = self._numbers_on(shard) or (_names() if self._servers.clustered else [None])
            names = (self._keys.live(number) for number in numbers)
            found = next((name for name in names if self._servers.shard(name) == shard), None)
            self._probes[shard] = found or self._keys.live(self._numbers[0])
        return self._probes[shard]

    def _number(self, run_id: str) -> int | None:
        there = self._numbers_on(self._servers.shard(self._keys.record(run_id))) or self._numbers
        return there[crc32(run_id.encode(errors="replace")) % len(there)]

    def _numbers_on(self, shard: str) -> list[int | None]:
        if shard not in self._on:
            self._on[shard] = [
                number for number in self._numbers if self._servers.shard(self._keys.live(number)) == shard
            ]
        return self._on[shard]


@cache
def _names() -> Sequence[int]:
    """A number for each slot, in no order: with it in braces a key is there. Takes a tenth of a second or two, once."""
    found: dict[int, int] = {}
    numbers = count()
    while len(found) < REDIS_CLUSTER_HASH_SLOTS:
        number = next(numbers)
        found.setdefault(slot_of(f"{{{number}}}"), number)
    return [*found.values()]
