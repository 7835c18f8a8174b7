"""Ends runs whose lease has expired: candidates come from the indexes of live runs, and the record decides.

Expiry is judged by the clock of the server that holds the run, as read for this look; and a run is not ended before it
has been on that server for a lease, since the end of its lease may have been written by another server's clock. So
neither a clock that differs from another nor a server that stood still can end a live run.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

from penstock.errors import LogUnavailable
from penstock.log.redis import scripts
from penstock.log.redis.errors import checked, is_away
from penstock.log.redis.schema import fields_of_ending, ms, touch
from penstock.log.redis.slots import call

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from penstock.log import LostEnding
    from penstock.log.redis.backend import Backend, Topology
    from penstock.log.redis.indexes import RunIndexes
    from penstock.log.redis.schema import Keys
    from penstock.log.redis.slots import Command
    from penstock.log.redis.start import IdempotencyKeys

REAPED_AT_ONCE: Final = 100  # the most runs of one index that are ended in one round trip
CLOCK_TOLERANCE: Final = 1.0  # seconds by which Redis' clock may gain on this process's between two looks
_LONG: Final = 1e9  # more seconds than any lease has


@dataclass(eq=False, slots=True)
class Reaper:
    """Ends the runs whose lease has expired; they are kept for `_ttl` milliseconds."""

    _backend: Backend
    _topology: Topology
    _keys: Keys
    _indexes: RunIndexes
    _idempotency_keys: IdempotencyKeys
    _ttl: int
    _clocks: dict[str, tuple[bytes, float]] = field(default_factory=dict)
    """The clock of each shard (ms) and this process's at the last look there."""

    async def reap(
        self, shard: str, make_ending: Callable[[], LostEnding], ready: Callable[[str], bool]
    ) -> Sequence[str]:
        reaped: list[str] = []
        starts = dict.fromkeys(self._indexes.live(shard) or [self._indexes.probe(shard)], 0)
        while starts:
            due = await self._due(shard, starts)
            full = [index for index, (_, runs) in due.items() if len(runs) == REAPED_AT_ONCE]
            left = {
                index: await self._reap_all(index, now, runs, make_ending, ready, reaped)
                for index, (now, runs) in due.items()
                if runs
            }
            starts = {index: starts[index] + left[index] for index in full}
        return reaped

    async def _due(self, shard: str, starts: dict[str, int]) -> dict[str, tuple[bytes, Sequence[str]]]:
        """For each index, from its start on: the server's time, and the runs whose lease may have expired."""
        began = trio.current_time()
        looks = [call(scripts.DUE, [index], start, REAPED_AT_ONCE) for index, start in starts.items()]
        touched, *replies = await self._backend.execute([touch(self._indexes.probe(shard)), *looks], replicated=True)
        checked(touched)
        due: dict[str, tuple[bytes, Sequence[str]]] = {}
        unreadable: list[Command] = []
        for index, reply in zip(starts, replies, strict=True):
            now, ids = checked(reply)
            last, self._clocks[shard] = self._clocks.get(shard), (now, began)
            if last is not None and (int(now) - int(last[0])) / 1000 > trio.current_time() - last[1] + CLOCK_TOLERANCE:
                # That expires no lease.
                raise LogUnavailable("the clock of Redis has been set forward")
            due[index] = (now, [each.decode(errors="replace") for each in ids])
            no_ids = [each for each, run_id in zip(ids, due[index][1], strict=True) if run_id.encode() != each]
            if no_ids:
                unreadable.append(("ZREM", index, *no_ids))
        if unreadable:
            await self._backend.execute(unreadable)
        return due

    async def _reap_all(
        self,
        index: str,
        now: bytes,
        due: Sequence[str],
        make_ending: Callable[[], LostEnding],
        ready: Callable[[str], bool],
        reaped: list[str],
    ) -> int:
        """End these runs if their records agree, and add them to `reaped`; how many stay on the index for now."""
        shard_of, record_of = self._topology.shard, self._keys.record
        nows = await self._clocks_of([run_id for run_id in due if ready(shard_of(record_of(run_id)))], now)
        reaps = [self._reap(run_id, nows[run_id], make_ending()) for run_id in nows]
        try:
            replies = await self._backend.execute(reaps)
        except LogUnavailable:
            if not self._topology.is_cluster:
                raise
            return len(due)  # the runs' own shards are unreachable, not that of the index
        over: list[str] = []
        alive: list[Command] = []
        for run_id, reply in zip(nows, replies, strict=True):
            if is_away(reply):
                continue  # the next look finds it again
            # What is refused is no record of a run: it must not keep other runs from being ended.
            status, lease = (b"GONE", 0) if isinstance(reply, Exception) else reply
            if status == b"OK":
                alive.append(call(scripts.ENLIST, [index], lease, "", run_id))
            else:
                over.append(run_id)
            if status == b"FENCED":
                reaped.append(run_id)
        await self._backend.execute([*alive, ("ZREM", index, *over)] if over else alive)
        await self._backend.best_effort(self._idempotency_keys.renew(over))
        self._idempotency_keys.drop(over)
        return len(due) - len(over) - len(alive)

    async def _clocks_of(self, runs: Sequence[str], now: bytes) -> dict[str, bytes]:
        """For each run the time of the server that has it: in a cluster that may not be the server of the index."""
        if not self._topology.is_cluster:
            return dict.fromkeys(runs, now)
        asks = [call(scripts.NOW, [self._keys.record(run_id)]) for run_id in runs]
        with suppress(LogUnavailable):  # then none of these runs is ended now
            replies = await self._backend.execute(asks)
            return {run_id: reply for run_id, reply in zip(runs, replies, strict=True) if isinstance(reply, bytes)}
        return {}

    def _reap(self, run_id: str, now: bytes, lost: LostEnding) -> Command:
        keys = [self._keys.stream(run_id), self._keys.record(run_id)]
        ending = fields_of_ending(lost.ending)
        here = min(trio.current_time() - self._topology.here_since(keys[1]), _LONG)
        wake = (self._keys.wake(run_id), self._topology.publish_command)
        return call(scripts.REAP, keys, now, ms(here), self._ttl, *wake, len(ending), *ending, *lost.blocks)
