"""Starting runs in Redis, and putting back those that it has lost: records, lists of runs, idempotency keys.

A start writes in this order: the idempotency key, if there is one; the run's place in the list of live runs, which is
where a reaper looks; the record. So a start that breaks off anywhere leaves at most a key that leads to no run (the
next start under it then uses that id), a hint that leads to no record (the next reaper removes it), or a run that
nobody renews (its lease ends it).
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import TYPE_CHECKING, Final

import trio

from penstock.errors import IdempotencyConflict, LogUnavailable, RunExists
from penstock.log import Started
from penstock.log.redis import scripts
from penstock.log.redis.client import call
from penstock.log.redis.records import fields_of, ms, record_of, run_of
from penstock.log.redis.replies import LOST, appended_of, checked

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from penstock.log import Appended, Idempotency, Lease
    from penstock.log.redis.client import Client, Command
    from penstock.log.redis.records import Keys
    from penstock.log.redis.requests import Requests
    from penstock.runs import Run

LISTED_RUNS: Final = 10_000
"""The newest runs that `list` knows of."""
FORGETTING: Final = 1.0
"""How many seconds taking back a start may take whose caller is gone."""


class Starting:
    """How the runs of this process come to be in Redis.

    Args:
        requests: the way there.
        keys: the names of the keys.
        ttl: how long a run is kept after its end, in milliseconds.
    """

    def __init__(self, requests: Requests, keys: Keys, ttl: int) -> None:
        self._requests = requests
        self._keys = keys
        self._ttl = ttl
        self._idempotency: dict[str, tuple[Idempotency, int]] = {}
        """The keys of this process's runs, and for how many milliseconds they are kept: as long as the runs are."""

    async def start(self, run: Run, lease: Lease, idempotency: Idempotency | None) -> Started:
        """See `RedisLog.start`."""
        if idempotency is not None:
            there = await self._reserve(run, idempotency, self._kept(lease))
            if isinstance(there, Started):
                return there
            run = replace(run, id=there)
        created, record = await self._create(run, lease, idempotency)
        found = run_of(run.id, record)
        if created:
            if idempotency is not None:
                self._idempotency[run.id] = idempotency, self._kept(lease)
            return Started(found, created=True)
        if idempotency is None or record.get("idempotency") != idempotency.key:
            raise RunExists(found)
        if record.get("fingerprint") != idempotency.fingerprint:
            raise IdempotencyConflict(idempotency.key, run.id)
        return Started(found, created=False)

    async def _create(self, run: Run, lease: Lease, idempotency: Idempotency | None) -> tuple[bool, Mapping[str, str]]:
        """Create the record if there is none: whether it is this start's, and the record."""
        keys = self._keys
        record = [keys.stream(run.id), keys.record(run.id)]
        fields = fields_of(run, lease.owner, idempotency)
        commands = [
            call(scripts.ENLIST, [keys.live], ms(lease.seconds), "1", run.id),
            ("ZADD", keys.runs, "NX", repr(run.created_at), run.id),
            ("ZREMRANGEBYRANK", keys.runs, 0, -LISTED_RUNS - 1),
            call(scripts.START, record, lease.epoch, self._ttl, ms(lease.seconds), *fields),
        ]
        async with self._requests.turn() as client:
            try:
                enlisted, listed, *_, reply = await client.execute(commands)
                mine, flat = checked(reply)
                checked(enlisted)
                if mine == b"1" and not listed:  # by an older run with this id
                    await client.ask("ZADD", keys.runs, repr(run.created_at), run.id)
            except BaseException:
                await self._forget(client, run.id, lease.epoch)  # noqa: ASYNC102  (it has a shield with a deadline)
                raise
        return mine == b"1", record_of(flat)

    async def _reserve(self, run: Run, idempotency: Idempotency, ttl: int) -> Started | str:
        """Take the idempotency key: the id to start under, or what a start under this key has led to before."""
        key = self._keys.idempotency(idempotency.key)
        value = json.dumps([idempotency.fingerprint, run.id])
        _, there = await self._requests.execute([("SET", key, value, "NX", "PX", ttl), ("GET", key)])
        fingerprint, known = json.loads(checked(there) or value)
        if known == run.id and fingerprint == idempotency.fingerprint:
            return run.id
        record = record_of(await self._requests.ask("HGETALL", self._keys.record(known)))
        if record.get("idempotency") == idempotency.key:
            if fingerprint != idempotency.fingerprint:
                raise IdempotencyConflict(idempotency.key, known)
            return Started(run_of(known, record), created=False)
        if fingerprint == idempotency.fingerprint:
            return str(known)  # its start broke off, or the run has expired
        await self._requests.ask("SET", key, value, "PX", ttl)
        return run.id

    async def _forget(self, client: Client, run_id: str, epoch: str) -> None:
        """Take back a start of which nobody will know, if Redis can be reached; if not, it ends with its lease."""
        with trio.move_on_after(FORGETTING, shield=True):
            try:
                if await client.ask(*call(scripts.FORGET, [self._keys.record(run_id)], epoch)):
                    await client.execute(
                        [("ZREM", self._keys.live, run_id), ("ZREM", self._keys.runs, run_id)],
                    )
            except LogUnavailable:
                return  # what there is, is reaped

    async def restore(self, run: Run, lease: Lease, oldest: int) -> Appended:
        """See `RedisLog.restore`."""
        keys = self._keys
        idempotency, ttl = self._idempotency.get(run.id, (None, 0))
        fields = fields_of(run, lease.owner, idempotency)
        record = [keys.stream(run.id), keys.record(run.id)]
        commands = [
            call(scripts.ENLIST, [keys.live], ms(lease.seconds), "1", run.id),
            ("ZADD", keys.runs, repr(run.created_at), run.id),
            call(scripts.RESTORE, record, lease.epoch, self._ttl, ms(lease.seconds), oldest, *fields),
        ]
        if idempotency is not None:
            value = json.dumps([idempotency.fingerprint, run.id])
            commands.insert(0, ("SET", keys.idempotency(idempotency.key), value, "NX", "PX", ttl))
        restored = appended_of((await self._requests.execute(commands))[-1])
        if restored.status in LOST:
            self.drop([run.id])
        return restored

    def keep(self, runs: Iterable[str]) -> list[Command]:
        """What keeps the idempotency keys of these runs for as long as the runs themselves."""
        known = [self._idempotency[run_id] for run_id in runs if run_id in self._idempotency]
        return [("PEXPIRE", self._keys.idempotency(each.key), ttl) for each, ttl in known]

    def over(self, runs: Iterable[str]) -> list[Command]:
        """What is written beside the scripts for runs that have ended."""
        ended = [*runs]
        if not ended:
            return []
        commands = [("ZREM", self._keys.live, *ended), *self.keep(ended)]
        self.drop(ended)
        return commands

    def _kept(self, lease: Lease) -> int:
        """For how many milliseconds a record is kept after its last sign of life, as the scripts reckon it."""
        return max(self._ttl, 4 * ms(lease.seconds))

    def drop(self, runs: Iterable[str]) -> None:
        """These are no longer runs of this process."""
        for run_id in runs:
            self._idempotency.pop(run_id, None)
