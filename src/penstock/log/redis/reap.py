"""Ending the runs of the dead: what stands in the lists of live runs beyond its lease, if the record agrees.

A lease is over by the clock of the server that has the run, at a time at which that server was asked for it; and not
before the run has been there for a lease, since another server's clock may have written when it ends. So a server that
stood still kills nobody, nor does one whose clock is not that of another.
"""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import trio

from penstock.errors import LogUnavailable
from penstock.log.redis import scripts
from penstock.log.redis.client import call
from penstock.log.redis.errors import is_away
from penstock.log.redis.schema import checked, fields_of_ending, ms, touch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from penstock.log import LostEnding
    from penstock.log.redis.backend import Backend, Command
    from penstock.log.redis.indexes import RunIndexes
    from penstock.log.redis.schema import Keys
    from penstock.log.redis.start import RunStarter

REAPED_AT_ONCE: Final = 100
"""The most runs of one list that are reaped in one round trip."""
CLOCK_TOLERANCE: Final = 1.0
"""So many seconds may Redis' clock gain on this process's between two looks for dead owners."""


_LONG: Final = 1e9
"""More seconds than any lease has."""


class Reaper:
    """What looks for dead owners in Redis.

    Args:
        servers: the way there.
        keys: the names of the keys.
        lists: where the lists of runs are.
        starting: told of the runs that are over.
        publish: the command that wakes readers.
        ttl: how long a run is kept after its end, in milliseconds.
    """

    def __init__(
        self, servers: Backend, keys: Keys, lists: RunIndexes, starting: RunStarter, *, publish: str, ttl: int
    ) -> None:
        self._servers = servers
        self._keys = keys
        self._lists = lists
        self._starting = starting
        self._publish = publish
        self._ttl = ttl
        self._clocks: dict[str, tuple[bytes, float]] = {}
        """What each part's clock (ms) and this process's said at the last look there."""

    async def reap(self, shard: str, obituary: Callable[[], LostEnding], ready: Callable[[str], bool]) -> Sequence[str]:
        """Look through the lists of one part; the runs that were ended. See `RedisLog.reap`."""
        reaped: list[str] = []
        starts = dict.fromkeys(self._lists.live(shard) or [self._lists.probe(shard)], 0)
        while starts:
            due = await self._due(shard, starts)
            full = [key for key, (_, dead) in due.items() if len(dead) == REAPED_AT_ONCE]
            left = {key: await self._reap_all(key, *due[key], obituary, ready, reaped) for key in due if due[key][1]}
            starts = {key: starts[key] + left[key] for key in full}
        return reaped

    async def _due(self, shard: str, starts: dict[str, int]) -> dict[str, tuple[bytes, Sequence[str]]]:
        """The time, and the runs whose lease may be over by these lists, from a place in each on.

        Raises:
            LogUnavailable: Redis cannot be reached, or its clock has been set forward: no lease is over by that.
        """
        began = trio.current_time()
        looks = [call(scripts.DUE, [key], start, REAPED_AT_ONCE) for key, start in starts.items()]
        touched, *replies = await self._servers.execute([touch(self._lists.probe(shard)), *looks], replicated=True)
        checked(touched)
        due: dict[str, tuple[bytes, Sequence[str]]] = {}
        odd: list[Command] = []
        for key, reply in zip(starts, replies, strict=True):
            now, ids = checked(reply)
            last, self._clocks[shard] = self._clocks.get(shard), (now, began)
            if last is not None and (int(now) - int(last[0])) / 1000 > trio.current_time() - last[1] + CLOCK_TOLERANCE:
                raise LogUnavailable("the clock of Redis has been set forward")
            due[key] = (now, [each.decode(errors="replace") for each in ids])
            no_ids = [each for each, run_id in zip(ids, due[key][1], strict=True) if run_id.encode() != each]
            odd += [("ZREM", key, *no_ids)] if no_ids else []
        if odd:
            await self._servers.execute(odd)
        return due

    async def _reap_all(
        self,
        key: str,
        now: bytes,
        dead: Sequence[str],
        obituary: Callable[[], LostEnding],
        ready: Callable[[str], bool],
        reaped: list[str],
    ) -> int:
        """Reap what was due by this list, and note it in `reaped`; how many stay on the list for now."""
        doomed = [run_id for run_id in dead if ready(self._servers.shard(self._keys.record(run_id)))]
        nows = await self._nows(doomed, now)
        reaps = [self._reap(run_id, nows[run_id], obituary()) for run_id in nows]
        try:
            replies = await self._servers.execute(reaps)
        except LogUnavailable:
            if not self._servers.clustered:
                raise
            return len(dead)  # it is the runs' parts that are away
        over: list[str] = []
        alive: list[Command] = []
        for run_id, reply in zip(nows, replies, strict=True):
            if is_away(reply):
                continue  # the next round has it again
            # What is refused is no record of a run: whatever it is, it keeps no other from being reaped.
            status, lease = (b"GONE", 0) if isinstance(reply, Exception) else reply
            if status == b"OK":
                alive.append(call(scripts.ENLIST, [key], lease, "", run_id))
            else:
                over.append(run_id)
            if status == b"FENCED":
                reaped.append(run_id)
        await self._servers.execute([*alive, ("ZREM", key, *over)] if over else alive)
        await self._servers.best_effort(self._starting.keep(over))
        self._starting.drop(over)
        return len(dead) - len(over) - len(alive)

    async def _nows(self, runs: Sequence[str], now: bytes) -> dict[str, bytes]:
        """The time by the clock of the server that has each run; in a cluster that may not be the list's."""
        if not self._servers.clustered:
            return dict.fromkeys(runs, now)
        asks = [call(scripts.NOW, [self._keys.record(run_id)]) for run_id in runs]
        with suppress(LogUnavailable):  # its runs stay where they are
            replies = await self._servers.execute(asks)
            return {run_id: reply for run_id, reply in zip(runs, replies, strict=True) if isinstance(reply, bytes)}
        return {}

    def _reap(self, run_id: str, now: bytes, words: LostEnding) -> Command:
        keys = [self._keys.stream(run_id), self._keys.record(run_id)]
        ending = fields_of_ending(words.ending)
        here = min(trio.current_time() - self._servers.here_since(keys[1]), _LONG)
        return call(
            scripts.REAP,
            keys,
            now,
            ms(here),
            self._ttl,
            self._keys.wake(run_id),
            self._publish,
            len(ending),
            *ending,
            *words.blocks,
        )
