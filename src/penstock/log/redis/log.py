"""RedisLog: the event log that many processes share.

Each operation is a few commands in one round trip. Each command may be sent twice, and is one atomic step on one
cluster slot. What belongs to other slots (indexes, inboxes, idempotency keys) is written beside it, in an order in
which nothing is lost if the operation breaks off. Appends, fetches and lease rounds do not wait behind readers.
"""

from __future__ import annotations

import json
import secrets
import struct
import time
from math import inf
from operator import itemgetter
from typing import TYPE_CHECKING, Final

import trio

from penstock.errors import ConfigurationError, LogUnavailable, RunNotFound
from penstock.log import PAGE_BYTES, PAGE_ENTRIES, AppendStatus, CancelReply, CancelStatus
from penstock.log.redis import schema, scripts
from penstock.log.redis.backend import RequestLimiter
from penstock.log.redis.errors import checked, is_away
from penstock.log.redis.indexes import RunIndexes
from penstock.log.redis.notifications import open_notifications
from penstock.log.redis.reap import Reaper
from penstock.log.redis.schema import LOST, Keys, ms, record_of
from penstock.log.redis.slots import call
from penstock.log.redis.start import IdempotencyKeys, RunStarter

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from penstock.log import Appended, Batch, Idempotency, Lease, LostEnding, Page, Started
    from penstock.log.redis.backend import Backend, Topology
    from penstock.log.redis.notifications import RedisNotifications
    from penstock.log.redis.slots import Command
    from penstock.runs import Run, RunStatus

REQUESTS_AT_ONCE: Final = 8
"""The most requests of readers and callers, and so connections, that are under way to one shard."""
INBOX_TTL: Final = 60_000  # the least time, in milliseconds, for which an inbox keeps what its owner has not fetched
UNLISTED_AFTER: Final = 60.0
"""Seconds after its start after which a run without a record is taken off its index; before, it may be on its way."""
ANY_TIMEOUT: Final = 0.5  # seconds that a node of a cluster may take to answer a check before another one is asked
LIST_PAGE: Final = 100  # the records that `list` looks up in one round trip


class RedisLog:
    """An `EventLog` in Redis 6.2 or later, or in a cluster of Redis 7 or later; see `open_log` for its arguments.

    An async method raises `LogUnavailable` if Redis cannot be reached, or takes no writes; what it writes beside one
    atomic step may have been written then, and also if it was cancelled.
    """

    def __init__(
        self,
        backend: Backend,
        topology: Topology,
        *,
        ttl: float = 10_800.0,
        max_entries: int = 10_000,
        prefix: str = "sse:run:",
    ) -> None:
        if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0.001 <= ttl < 2**53 / 1000:  # noqa: PLR2004
            raise ConfigurationError(f"ttl is a number of seconds above 0, not {ttl!r}")
        if isinstance(max_entries, bool) or not isinstance(max_entries, int) or not max_entries > 0:
            raise ConfigurationError(f"max_entries is a whole number above 0, not {max_entries!r}")
        self._backend = backend
        self._topology = topology
        self._publish = topology.publish_command
        self._ttl = ms(ttl)
        self._max_entries = max_entries
        self._keys = keys = Keys(prefix)
        self._indexes = RunIndexes(keys, topology)
        self._limiter = RequestLimiter(backend, topology, REQUESTS_AT_ONCE)
        self._idempotency_keys = IdempotencyKeys(keys)
        self._starter = RunStarter(backend, self._limiter, keys, self._indexes, self._idempotency_keys, self._ttl)
        self._reaper = Reaper(backend, topology, keys, self._indexes, self._idempotency_keys, self._ttl)
        self._renewed_cancels: dict[str, dict[str, str | None]] = {}
        """For each owner, the cancel requests that came with a renewal: the inbox may have missed them."""
        self._taken: dict[str, list[str]] = {}
        """For each owner, the runs whose requests have been fetched, and must be removed from its inbox."""

    # Writing

    async def start(self, run: Run, lease: Lease, idempotency: Idempotency | None = None) -> Started:
        return await self._starter.start(run, lease, idempotency)

    async def restore(self, run: Run, lease: Lease, oldest: int) -> Appended:
        return await self._starter.restore(run, lease, oldest)

    async def append(self, batches: Sequence[Batch]) -> Sequence[Appended]:
        replies = await self._backend.execute([self._append(batch) for batch in batches], replicated=True)
        appended = [schema.appended_of(reply) for reply in replies]
        stored = [pair for pair in zip(batches, appended, strict=True) if pair[1].status is AppendStatus.OK]
        if ended := [batch.run_id for batch, _ in stored if batch.ending is not None]:
            unlist = [("ZREM", live, *runs) for live, runs in self._indexes.by_live(ended).items()]
            await self._backend.best_effort([*unlist, *self._idempotency_keys.renew(ended)])
            self._idempotency_keys.drop(ended)
        # While a slot is moving, a message may have been published where no process listens any more.
        wakes = [
            (self._publish, self._keys.wake(batch.run_id), reply.seq)
            for batch, reply in stored
            if self._topology.is_moving(self._keys.record(batch.run_id))
        ]
        if wakes:
            await self._backend.best_effort(wakes)
        self._idempotency_keys.drop(
            batch.run_id for batch, reply in zip(batches, appended, strict=True) if reply.status in LOST
        )
        return appended

    def _append(self, batch: Batch) -> Command:
        keys = [self._keys.stream(batch.run_id), self._keys.record(batch.run_id)]
        limits = (batch.epoch, self._ttl, self._max_entries, batch.entries[0].seq)
        ending = schema.fields_of_ending(batch.ending)
        final = "1" if batch.final or ending else ""
        wires = [entry.wire for entry in batch.entries]
        lengths = struct.pack(f"<{len(wires)}I", *map(len, wires))
        timestamps = struct.pack(f"<{len(wires)}d", *[entry.timestamp for entry in batch.entries])
        what = (b"".join(wires), lengths, timestamps, self._keys.wake(batch.run_id), self._publish)
        return call(scripts.APPEND, keys, *limits, final, len(ending), *ending, *what)

    # Reading

    async def read(
        self, run_id: str, after: int, *, max_entries: int = PAGE_ENTRIES, max_bytes: int = PAGE_BYTES
    ) -> Page:
        (reply,) = await self._limiter.execute([self._read(run_id, after, max_entries, max_bytes)])
        page = schema.page_of(run_id, after, reply)
        if page is None:
            raise RunNotFound(run_id)
        return page

    async def fetch(self, positions: Mapping[str, int]) -> Mapping[str, Page | None]:
        commands = [self._read(run_id, after, PAGE_ENTRIES, PAGE_BYTES) for run_id, after in positions.items()]
        replies = await self._backend.execute(commands)
        return {
            run_id: schema.page_of(run_id, after, reply)
            for (run_id, after), reply in zip(positions.items(), replies, strict=True)
            if not is_away(reply)
        }

    def _read(self, run_id: str, after: int, max_entries: int, max_bytes: int) -> Command:
        keys = [self._keys.stream(run_id), self._keys.record(run_id)]
        return call(scripts.PAGE, keys, min(after, 2**53), max_entries, max_bytes)

    async def get(self, run_id: str) -> Run:
        (reply,) = await self._limiter.execute([("HGETALL", self._keys.record(run_id))])
        run = schema.found(run_id, reply)
        if run is None:
            raise RunNotFound(run_id)
        return run

    async def list(self, *, limit: int = 50, status: RunStatus | None = None) -> Sequence[Run]:
        runs: dict[str, Run] = {}
        gone: list[Command] = []
        start, end = 0, LIST_PAGE
        while len(runs) < limit and (page := await self._newest(start, end)):
            replies = await self._limiter.execute([("HGETALL", self._keys.record(run_id)) for run_id, _, _ in page])
            for (run_id, created_at, index), reply in zip(page, replies, strict=True):
                run = schema.found(run_id, reply)
                if run is not None and status in {None, run.status}:
                    runs[run_id] = run
                elif run is None and created_at < time.time() - UNLISTED_AFTER:
                    gone.append(("ZREM", index, run_id))
            start, end = end, 2 * end
        if gone:
            await self._backend.best_effort(gone)
        return [*runs.values()][:limit]

    async def _newest(self, start: int, end: int) -> Sequence[tuple[str, float, str]]:
        """Some of the listed runs, newest first: their ids, when they were created, and the index that lists them."""
        indexes = self._indexes.runs()
        page = (start, end - 1) if len(indexes) == 1 else (0, end - 1)
        replies = await self._limiter.execute([("ZREVRANGE", index, *page, "WITHSCORES") for index in indexes])
        listed = [
            (each.decode(errors="replace"), float(created_at), index)
            for index, flat in zip(indexes, map(checked, replies), strict=True)
            for each, created_at in zip(flat[::2], flat[1::2], strict=True)
        ]
        if len(indexes) == 1:
            return listed
        return sorted(listed, key=itemgetter(1), reverse=True)[start:end]

    # Cancelling

    async def request_cancel(self, run_id: str, reason: str | None) -> CancelReply:
        # If only the inbox's node of a cluster is unreachable, the run's next append or renewal brings the request.
        reason_args = ("1", reason) if reason is not None else ("", "")
        keys = [self._keys.stream(run_id), self._keys.record(run_id)]
        command = call(scripts.CANCEL, keys, secrets.token_hex(8), self._ttl, *reason_args)
        status, flat = await self._limiter.ask(*command, replicated=True)
        if status == b"GONE":
            raise RunNotFound(run_id)
        record = record_of(flat)
        met = CancelStatus[status.decode()]
        if met is not CancelStatus.ENDED:  # a repeated request as well: the first may have broken off here
            inbox, channel = self._keys.inbox(record["owner"]), self._keys.process(record["owner"])
            why = json.dumps(record.get("cancel_reason"))
            post = call(scripts.POST, [inbox], max(self._ttl, INBOX_TTL), channel, self._publish, run_id, why)
            await self._backend.best_effort([post])
        return CancelReply(met, schema.run_of(run_id, record))

    async def cancel_requests(self, owner: str) -> Mapping[str, str | None]:
        # What this call returns, the next one removes from the inbox.
        if self._topology.is_cluster and owner in self._renewed_cancels:
            # The inbox may be on an unreachable node: the next call reads it.
            await trio.lowlevel.checkpoint()
            return self._renewed_cancels.pop(owner)
        inbox = self._keys.inbox(owner)
        taken = self._taken.get(owner, [])
        commands: list[Command] = [("HDEL", inbox, *taken)] if taken else []
        flat = checked((await self._backend.execute([*commands, ("HGETALL", inbox)]))[-1])
        requests = {run_id: schema.reason_of(reason) for run_id, reason in record_of(flat).items()}
        self._taken.pop(owner, None)
        if requests:
            self._taken[owner] = [*requests]
        return requests | self._renewed_cancels.pop(owner, {})

    # Leases

    async def renew(self, owner: str, epochs: Mapping[str, str], seconds: float) -> Mapping[str, AppendStatus]:
        if not epochs:
            return {}
        runs, most = [*epochs], self._topology.renewal_batch
        pieces = [runs[start : start + most] for start in range(0, len(runs), most)]
        renewed = await self._backend.execute([self._renew(piece, epochs, ms(seconds)) for piece in pieces])
        replies: dict[str, AppendStatus] = {}
        for piece, reply in zip(pieces, renewed, strict=True):
            if not is_away(reply):
                for run_id, (status, cancelled, reason) in zip(piece, checked(reply), strict=True):
                    replies[run_id] = AppendStatus[status.decode()]
                    if cancelled and replies[run_id] is AppendStatus.OK:
                        self._renewed_cancels.setdefault(owner, {})[run_id] = schema.text_of(reason)
        self._idempotency_keys.drop(run_id for run_id, status in replies.items() if status in LOST)
        alive = [run_id for run_id, status in replies.items() if status is AppendStatus.OK]
        enlist = [
            call(scripts.ENLIST, [live], ms(seconds), "", *listed)
            for live, listed in self._indexes.by_live(alive).items()
        ]
        streams: list[Command] = []
        if self._topology.is_cluster:  # RENEW has had the record alone: two keys would wait for a migration
            kept = max(self._ttl, 4 * ms(seconds))
            streams = [("PEXPIRE", self._keys.stream(run_id), kept) for run_id in alive]
        await self._backend.best_effort([*enlist, *streams, *self._idempotency_keys.renew(alive)])
        return replies

    def _renew(self, piece: Sequence[str], epochs: Mapping[str, str], lease: int) -> Command:
        stream = self._keys.record if self._topology.is_cluster else self._keys.stream
        keys = [key for run_id in piece for key in (stream(run_id), self._keys.record(run_id))]
        return call(scripts.RENEW, keys, lease, self._ttl, *[epochs[run_id] for run_id in piece])

    async def reap(
        self,
        lost_ending: Callable[[], LostEnding],
        *,
        shard: str | None = None,
        ready: Callable[[str], bool] = lambda shard: True,  # noqa: ARG005
    ) -> Sequence[str]:
        shards = self._topology.shards() if shard is None else [shard]
        return [run_id for each in shards for run_id in await self._reaper.reap(each, lost_ending, ready)]

    # The rest

    def wakeups(self, owner: str) -> AbstractAsyncContextManager[RedisNotifications]:
        return open_notifications(self._backend, self._topology, self._keys, self.check, owner)

    def shard(self, run_id: str) -> str:
        return self._topology.shard(self._keys.record(run_id))

    def shards(self) -> Collection[str]:
        return self._topology.shards()

    async def check(self, shard: str | None = None) -> None:
        if shard is not None:
            await self._backend.ask(*schema.touch(self._indexes.probe(shard)), replicated=True)
            return
        await self._topology.learn()
        failure = LogUnavailable("there is no Redis")
        for each in self._topology.shards():
            try:
                with trio.fail_after(ANY_TIMEOUT if len(self._topology.shards()) > 1 else inf):
                    await self.check(each)
            except LogUnavailable as error:
                failure = error
            except trio.TooSlowError:
                failure = LogUnavailable(f"Redis at {each} has not answered for {ANY_TIMEOUT:g} s")
            else:
                return
        raise failure
