"""Starting runs in Redis, and putting back those that it has lost: records, lists of runs, idempotency keys.

A start writes in this order: the idempotency key, if there is one; the run's place in the list of live runs, which is
where a reaper looks; the record. So a start that breaks off anywhere leaves at most a key that leads to no run (the
next start under it then uses that id), a hint that leads to no record (the next reaper removes it), or a run that
nobody renews (its lease ends it). Under an idempotency key nobody is answered with such a run: until its starter has
heard of it the record is `pending`, and whoever repeats the start waits, and then takes it over.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import trio

from penstock.errors import IdempotencyConflict, LogUnavailable, RunExists
from penstock.log import Started
from penstock.log.redis import scripts
from penstock.log.redis.client import call
from penstock.log.redis.schema import LOST, appended_of, checked, fields_of, ms, record_of, run_of
from penstock.runs import RunStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from penstock.log import Appended, Idempotency, Lease
    from penstock.log.redis.backend import Backend, Command, RequestLimiter
    from penstock.log.redis.indexes import RunIndexes
    from penstock.log.redis.schema import Keys
    from penstock.runs import Run

LISTED_RUNS: Final = 10_000
"""The newest runs that `list` knows of."""
PENDING_LIMIT: Final = 2.0
"""How many seconds a start under an idempotency key waits for another one under the same key to come to something."""
PENDING_PAUSE: Final = 0.05
"""Seconds between two looks at that."""
PURGE_INTERVAL: Final = 60.0
"""Seconds between two looks for idempotency keys of runs that have gone without a word."""
FORGETTING: Final = 1.0
"""How many seconds taking back a start may take whose caller is gone."""


@dataclass(slots=True)
class _Kept:
    """The idempotency key of a run of this process, for how many milliseconds it is kept, and since when."""

    idempotency: Idempotency
    ttl: int
    at: float


class RunStarter:
    """How the runs of this process come to be in Redis.

    Args:
        servers: the way there.
        requests: the same, in turns.
        keys: the names of the keys.
        lists: where the lists of runs are.
        ttl: how long a run is kept after its end, in milliseconds.
    """

    def __init__(self, servers: Backend, requests: RequestLimiter, keys: Keys, lists: RunIndexes, ttl: int) -> None:
        self._servers = servers
        self._requests = requests
        self._keys = keys
        self._lists = lists
        self._ttl = ttl
        self._idempotency: dict[str, _Kept] = {}
        """The keys of this process's runs, which are kept for as long as the runs are."""
        self._purged_at = trio.current_time()

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
                self._purge()
                self._idempotency[run.id] = _Kept(idempotency, self._kept(lease), trio.current_time())
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
        async with self._requests.slot(keys.record(run.id)) as servers:
            listing = self._lists.runs_of(run.id)
            hint = call(scripts.ENLIST, [self._lists.live_of(run.id)], ms(lease.seconds), "1", run.id)
            start = [
                ("ZADD", listing, "NX", repr(run.created_at), run.id),
                ("ZREMRANGEBYRANK", listing, 0, -LISTED_RUNS - 1),
                call(scripts.START, record, lease.epoch, self._ttl, ms(lease.seconds), *fields),
            ]
            try:
                enlisted, listed, *_, reply = await servers.in_stages([hint], start)
                mine, flat = checked(reply)
                checked(enlisted)
                if mine == b"1" and not listed:  # by an older run with this id
                    await servers.ask("ZADD", listing, repr(run.created_at), run.id)
            except BaseException:
                await self._forget(servers, run.id, lease.epoch)  # noqa: ASYNC102  (it has a shield with a deadline)
                raise
            if mine == b"1" and idempotency is not None:
                await self._make_known(servers, run.id)
        return mine == b"1", record_of(flat)

    async def _make_known(self, servers: Backend, run_id: str) -> None:
        """Say that the run's starter knows of it, even if it is cancelled: from here on there is nothing to take back.

        If nobody hears that, a repeated start may take the run over while it is still without an entry.
        """
        with trio.move_on_after(FORGETTING, shield=True):
            try:
                await servers.ask("HDEL", self._keys.record(run_id), "pending")
            except LogUnavailable:
                return

    async def _reserve(self, run: Run, idempotency: Idempotency, ttl: int) -> Started | str:
        """Take the idempotency key: the id to start under, or what a start under this key has led to before."""
        key = self._keys.idempotency(idempotency.key)
        value = json.dumps([idempotency.fingerprint, run.id])
        commands = [("SET", key, value, "NX", "PX", ttl), ("GET", key)]
        taken, there = await self._requests.execute(commands, replicated=True)
        if checked(taken):
            return run.id
        fingerprint, known = json.loads(checked(there) or value)
        same = bool(fingerprint == idempotency.fingerprint)
        record = await self._come_to_something(known, idempotency)
        of_the_key = record.get("idempotency") == idempotency.key
        if of_the_key and "pending" not in record:
            if not same:
                raise IdempotencyConflict(idempotency.key, known)
            return Started(run_of(known, record), created=False)
        if of_the_key:  # its starter is gone, and knows nothing of it
            await self._requests.ask(*call(scripts.FORGET, [self._keys.record(known)], record["epoch"]))
        if same and not (of_the_key and record["status"] != RunStatus.RUNNING):
            return str(known)  # its start broke off, or the run has expired
        await self._requests.ask("SET", key, value, "PX", ttl)
        return run.id

    async def _come_to_something(self, run_id: str, idempotency: Idempotency) -> Mapping[str, str]:
        """Wait until a start that may be under way has a record, and its starter knows; the record as it is then."""
        until = trio.current_time() + PENDING_LIMIT
        while True:
            record = record_of(await self._requests.ask("HGETALL", self._keys.record(run_id)))
            under_way = not record or (record.get("idempotency") == idempotency.key and "pending" in record)
            if not under_way or trio.current_time() >= until:
                return record
            await trio.sleep(PENDING_PAUSE)

    async def _forget(self, servers: Backend, run_id: str, epoch: str) -> None:
        """Take back a start of which nobody will know, if Redis can be reached; if not, it ends with its lease."""
        with trio.move_on_after(FORGETTING, shield=True):
            try:
                if await servers.ask(*call(scripts.FORGET, [self._keys.record(run_id)], epoch)):
                    lists = (self._lists.live_of(run_id), self._lists.runs_of(run_id))
                    await servers.execute([("ZREM", each, run_id) for each in lists])
            except LogUnavailable:
                return  # what there is, is reaped

    async def restore(self, run: Run, lease: Lease, oldest: int) -> Appended:
        """See `RedisLog.restore`."""
        keys = self._keys
        kept = self._idempotency.get(run.id)
        fields = fields_of(run, lease.owner, None if kept is None else kept.idempotency)
        record = [keys.stream(run.id), keys.record(run.id)]
        if kept is not None:
            value = json.dumps([kept.idempotency.fingerprint, run.id])
            key = keys.idempotency(kept.idempotency.key)
            await self._servers.best_effort([("SET", key, value, "NX", "PX", kept.ttl)])
        async with self._requests.slot(keys.record(run.id)) as servers:
            hint = call(scripts.ENLIST, [self._lists.live_of(run.id)], ms(lease.seconds), "1", run.id)
            restore = call(scripts.RESTORE, record, lease.epoch, self._ttl, ms(lease.seconds), oldest, *fields)
            listing = ("ZADD", self._lists.runs_of(run.id), repr(run.created_at), run.id)
            restored = appended_of((await servers.in_stages([hint], [listing, restore]))[-1])
        if restored.status in LOST:
            self.drop([run.id])
        return restored

    def keep(self, runs: Iterable[str]) -> list[Command]:
        """What keeps the idempotency keys of these runs for as long as the runs themselves."""
        commands: list[Command] = []
        for run_id in runs:
            if (kept := self._idempotency.get(run_id)) is not None:
                kept.at = trio.current_time()
                commands.append(("PEXPIRE", self._keys.idempotency(kept.idempotency.key), kept.ttl))
        return commands

    async def over(self, runs: Sequence[str]) -> None:
        """Write what is written beside the scripts for runs of this process that have ended.

        Raises:
            LogUnavailable: Redis cannot be reached.
        """
        if runs:
            gone = [("ZREM", live, *ended) for live, ended in self._lists.by_live(runs).items()]
            await self._servers.best_effort([*gone, *self.keep(runs)])
            self.drop(runs)

    def _kept(self, lease: Lease) -> int:
        """For how many milliseconds a record is kept after its last sign of life, as the scripts reckon it."""
        return max(self._ttl, 4 * ms(lease.seconds))

    def _purge(self) -> None:
        """Drop the keys of runs that nobody has renewed or ended here: they were given up, and others end them."""
        now = trio.current_time()
        if now - self._purged_at >= PURGE_INTERVAL:
            self._purged_at = now
            self.drop([run_id for run_id, kept in self._idempotency.items() if kept.at + kept.ttl / 1000 < now])

    def drop(self, runs: Iterable[str]) -> None:
        """These are no longer runs of this process."""
        for run_id in runs:
            self._idempotency.pop(run_id, None)
