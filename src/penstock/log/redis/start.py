"""Starting runs in Redis, and putting back those that it has lost: records, indexes, idempotency keys.

A start writes the idempotency key, if there is one; the run in the index of live runs; the record. If it breaks off,
it leaves at most a key that leads to no run (the next start under it uses that id), an indexed id without a record (the
next reaper removes it), or a run that no process renews (its lease ends it). No start under a key returns such a run:
the record is `pending` until its starter has the reply; a repeated start waits for that, and then takes the run over.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

import trio

from penstock.errors import IdempotencyConflict, LogUnavailable, RunExists
from penstock.log import Started
from penstock.log.redis import scripts
from penstock.log.redis.errors import checked
from penstock.log.redis.schema import LOST, appended_of, fields_of, ms, record_of, run_of
from penstock.log.redis.slots import call
from penstock.runs import RunStatus

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from penstock.log import Appended, Idempotency, Lease
    from penstock.log.redis.backend import Backend, RequestLimiter
    from penstock.log.redis.indexes import RunIndexes
    from penstock.log.redis.schema import Keys
    from penstock.log.redis.slots import Command
    from penstock.runs import Run

LISTED_RUNS: Final = 10_000  # the most runs that `list` can find: the newest ones
PENDING_LIMIT: Final = 2.0  # seconds that a start waits for another start under the same idempotency key
PENDING_PAUSE: Final = 0.05  # seconds between two looks at that
PURGE_INTERVAL: Final = 60.0
"""Seconds between two looks for idempotency keys of runs that are neither renewed nor ended here."""
FORGET_TIMEOUT: Final = 1.0  # seconds that taking back a cancelled start may take


@dataclass(slots=True)
class _Kept:
    """An idempotency key, for how many milliseconds Redis keeps it, and when that was renewed last."""

    idempotency: Idempotency
    ttl: int
    at: float


class IdempotencyKeys:
    """The idempotency keys of this process's live runs, which Redis must keep for as long as the runs themselves."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys
        self._kept: dict[str, _Kept] = {}
        self._purged_at = trio.current_time()

    def add(self, run_id: str, idempotency: Idempotency, ttl: int) -> None:
        """A run has been started under a key that Redis keeps for `ttl` milliseconds."""
        now = trio.current_time()
        if now - self._purged_at >= PURGE_INTERVAL:  # of runs that were given up here; other processes end those
            self._purged_at = now
            self.drop([each for each, kept in self._kept.items() if kept.at + kept.ttl / 1000 < now])
        self._kept[run_id] = _Kept(idempotency, ttl, now)

    def get(self, run_id: str) -> Idempotency | None:
        kept = self._kept.get(run_id)
        return None if kept is None else kept.idempotency

    def set_again(self, run_id: str) -> list[Command]:
        """The command that puts back the key of a run, if it has one and Redis has lost it."""
        if (kept := self._kept.get(run_id)) is None:
            return []
        value = json.dumps([kept.idempotency.fingerprint, run_id])
        return [("SET", self._keys.idempotency(kept.idempotency.key), value, "NX", "PX", kept.ttl)]

    def renew(self, runs: Iterable[str]) -> list[Command]:
        commands: list[Command] = []
        for run_id in runs:
            if (kept := self._kept.get(run_id)) is not None:
                kept.at = trio.current_time()
                commands.append(("PEXPIRE", self._keys.idempotency(kept.idempotency.key), kept.ttl))
        return commands

    def drop(self, runs: Iterable[str]) -> None:
        for run_id in runs:
            self._kept.pop(run_id, None)


@dataclass(eq=False, slots=True)
class RunStarter:
    """Starts the runs of this process; they are kept for `_ttl` milliseconds after their end."""

    _backend: Backend
    _limiter: RequestLimiter
    _keys: Keys
    _indexes: RunIndexes
    _idempotency_keys: IdempotencyKeys
    _ttl: int

    async def start(self, run: Run, lease: Lease, idempotency: Idempotency | None) -> Started:
        ttl = max(self._ttl, 4 * ms(lease.seconds))  # as long as the scripts keep a record after its last renewal
        if idempotency is not None:
            reserved = await self._reserve(run, idempotency, ttl)
            if isinstance(reserved, Started):
                return reserved
            run = replace(run, id=reserved)
        created, record = await self._create(run, lease, idempotency)
        found = run_of(run.id, record)
        if created:
            if idempotency is not None:
                self._idempotency_keys.add(run.id, idempotency, ttl)
            return Started(found, created=True)
        if idempotency is None or record.get("idempotency") != idempotency.key:
            raise RunExists(found)
        if record.get("fingerprint") != idempotency.fingerprint:
            raise IdempotencyConflict(idempotency.key, run.id)
        return Started(found, created=False)

    async def _create(self, run: Run, lease: Lease, idempotency: Idempotency | None) -> tuple[bool, Mapping[str, str]]:
        keys = self._keys
        record = [keys.stream(run.id), keys.record(run.id)]
        fields = fields_of(run, lease.owner, idempotency)
        async with self._limiter.slot(keys.record(run.id)):
            listing = self._indexes.runs_of(run.id)
            enlist = call(scripts.ENLIST, [self._indexes.live_of(run.id)], ms(lease.seconds), "1", run.id)
            start = [
                ("ZADD", listing, "NX", repr(run.created_at), run.id),
                ("ZREMRANGEBYRANK", listing, 0, -LISTED_RUNS - 1),
                call(scripts.START, record, lease.epoch, self._ttl, ms(lease.seconds), *fields),
            ]
            try:
                enlisted, listed, *_, reply = await self._backend.in_stages([enlist], start)
                created, flat = checked(reply)
                checked(enlisted)
                if created == b"1" and not listed:  # an older run with this id is listed
                    await self._backend.ask("ZADD", listing, repr(run.created_at), run.id)
            except BaseException:
                await self._forget(run.id, lease.epoch)  # noqa: ASYNC102  (it has a shield with a deadline)
                raise
            if created == b"1" and idempotency is not None:
                await self._confirm(run.id)
        return created == b"1", record_of(flat)

    async def _confirm(self, run_id: str) -> None:
        """Record, even if cancelled, that the starter knows of its run: the start cannot be taken back any more."""
        # If that fails, a repeated start may take the run over while it has no entry yet.
        with trio.move_on_after(FORGET_TIMEOUT, shield=True), suppress(LogUnavailable):
            await self._backend.ask("HDEL", self._keys.record(run_id), "pending")

    async def _reserve(self, run: Run, idempotency: Idempotency, ttl: int) -> Started | str:
        """Take the idempotency key: the id to start under, or the run that a start under this key has created."""
        key = self._keys.idempotency(idempotency.key)
        value = json.dumps([idempotency.fingerprint, run.id])
        commands = [("SET", key, value, "NX", "PX", ttl), ("GET", key)]
        taken, there = await self._limiter.execute(commands, replicated=True)
        if checked(taken):
            return run.id
        fingerprint, known = json.loads(checked(there) or value)
        same = bool(fingerprint == idempotency.fingerprint)
        record = await self._settled_record(known, idempotency)
        of_the_key = record.get("idempotency") == idempotency.key
        if of_the_key and "pending" not in record:
            if not same:
                raise IdempotencyConflict(idempotency.key, known)
            return Started(run_of(known, record), created=False)
        if of_the_key:  # its starter is gone, and has not received the run
            await self._limiter.ask(*call(scripts.FORGET, [self._keys.record(known)], record["epoch"]))
        if same and not (of_the_key and record["status"] != RunStatus.RUNNING):
            return str(known)  # its start broke off, or the run has expired
        await self._limiter.ask("SET", key, value, "PX", ttl)
        return run.id

    async def _settled_record(self, run_id: str, idempotency: Idempotency) -> Mapping[str, str]:
        """The record once a start that may be under way is over, or `PENDING_LIMIT` is."""
        until = trio.current_time() + PENDING_LIMIT
        while True:
            record = record_of(await self._limiter.ask("HGETALL", self._keys.record(run_id)))
            under_way = not record or (record.get("idempotency") == idempotency.key and "pending" in record)
            if not under_way or trio.current_time() >= until:
                return record
            await trio.sleep(PENDING_PAUSE)

    async def _forget(self, run_id: str, epoch: str) -> None:
        """Take back a start that failed or was cancelled. If Redis cannot be reached, the run ends with its lease."""
        with trio.move_on_after(FORGET_TIMEOUT, shield=True), suppress(LogUnavailable):
            if await self._backend.ask(*call(scripts.FORGET, [self._keys.record(run_id)], epoch)):
                indexes = (self._indexes.live_of(run_id), self._indexes.runs_of(run_id))
                await self._backend.execute([("ZREM", index, run_id) for index in indexes])

    async def restore(self, run: Run, lease: Lease, oldest: int) -> Appended:
        keys, indexes = self._keys, self._indexes
        fields = fields_of(run, lease.owner, self._idempotency_keys.get(run.id))
        record = [keys.stream(run.id), keys.record(run.id)]
        if key := self._idempotency_keys.set_again(run.id):
            await self._backend.best_effort(key)
        async with self._limiter.slot(keys.record(run.id)):
            enlist = call(scripts.ENLIST, [indexes.live_of(run.id)], ms(lease.seconds), "1", run.id)
            restore = call(scripts.RESTORE, record, lease.epoch, self._ttl, ms(lease.seconds), oldest, *fields)
            listing = ("ZADD", indexes.runs_of(run.id), repr(run.created_at), run.id)
            restored = appended_of((await self._backend.in_stages([enlist], [listing, restore]))[-1])
        if restored.status in LOST:
            self._idempotency_keys.drop([run.id])
        return restored
