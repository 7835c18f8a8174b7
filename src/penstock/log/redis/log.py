"""RedisLog: the event log that many processes share.

Each operation is a few commands in one round trip, each of which may be sent twice and is one atomic step on one
cluster slot; what belongs to other slots (the lists of runs, inboxes, idempotency keys) is written beside them in an
order in which nothing is lost if it breaks off. Requests share `REQUESTS_AT_ONCE` connections, however many readers
there are; appends, fetches and the watch's rounds do not wait behind them.
"""

from __future__ import annotations

import json
import secrets
import struct
import time
from typing import TYPE_CHECKING, Final

import trio

from penstock.errors import ConfigurationError, LogUnavailable, RunNotFound
from penstock.log import PAGE_BYTES, PAGE_ENTRIES, AppendStatus, CancelReply, CancelStatus
from penstock.log.redis import scripts
from penstock.log.redis.client import call
from penstock.log.redis.records import Keys, fields_of_ending, ms, record_of, run_of, touch
from penstock.log.redis.replies import LOST, appended_of, checked, found, page_of, reason_of, text_of
from penstock.log.redis.requests import Requests
from penstock.log.redis.starting import Starting
from penstock.log.redis.wakeups import RedisWakeups, open_wakeups

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from penstock.log import Appended, Batch, Idempotency, Lease, Obituary, Page, Started
    from penstock.log.redis.client import Client, Command
    from penstock.runs import Run, RunStatus

REQUESTS_AT_ONCE: Final = 8
"""The most requests, and so connections, that are under way for readers and callers."""
REAPED_AT_ONCE: Final = 100
"""The most runs that are reaped in one round trip."""
INBOX_TTL: Final = 60_000
"""The least time, in milliseconds, for which an inbox keeps what its owner has not looked for."""
CLOCK_TOLERANCE: Final = 1.0
"""So many seconds may Redis' clock gain on this process's between two looks for dead owners."""
UNLISTED_AFTER: Final = 60.0
"""So many seconds after its start a run without a record is taken off the list; before, it may be on its way."""
LIST_PAGE: Final = 100
"""The records that `list` looks up in one round trip."""


class RedisLog:
    """An `EventLog` in Redis 6.2 or later. Opened by `open_log`.

    Args:
        client: the connection to it.
        ttl: how long a run is kept after its end, in seconds.
        max_entries: the entries that are kept of one run; Redis may keep some more.
        prefix: see `Keys`.

    Raises:
        ConfigurationError: a limit is not above 0, or the prefix is none.
    """

    def __init__(
        self, client: Client, *, ttl: float = 10_800.0, max_entries: int = 10_000, prefix: str = "sse:run:"
    ) -> None:
        if isinstance(ttl, bool) or not isinstance(ttl, int | float) or not 0.001 <= ttl < 2**53 / 1000:  # noqa: PLR2004
            raise ConfigurationError(f"ttl is a number of seconds above 0, not {ttl!r}")
        if isinstance(max_entries, bool) or not isinstance(max_entries, int) or not max_entries > 0:
            raise ConfigurationError(f"max_entries is a whole number above 0, not {max_entries!r}")
        self._client = client
        self._ttl = ms(ttl)
        self._max_entries = max_entries
        self._keys = Keys(prefix)
        self._requests = Requests(client, REQUESTS_AT_ONCE)
        self._starting = Starting(self._requests, self._keys, self._ttl)
        self._clock: tuple[float, float] | None = None
        """What Redis' clock and this process's said at the last look for dead owners."""
        self._heard: dict[str, dict[str, str | None]] = {}
        """For each owner, the cancel requests that came with a renewal, because the inbox may have missed them."""
        self._taken: dict[str, list[str]] = {}
        """For each owner, the runs whose requests were taken out of the inbox, and are to be removed from it."""

    # Writing

    async def start(self, run: Run, lease: Lease, idempotency: Idempotency | None = None) -> Started:
        """Create the record, unless the idempotency key has led to one before. A checkpoint; cancelled, it leaves none.

        Raises:
            RunExists: the id is in use.
            IdempotencyConflict: the key belongs to another request.
            LogFull: Redis has no room for another run.
            LogUnavailable: Redis cannot be reached. The run may have been created; if so, it ends with its lease.
        """
        return await self._starting.start(run, lease, idempotency)

    async def restore(self, run: Run, lease: Lease, oldest: int) -> Appended:
        """Put a run's record back. A checkpoint; it happens in one step or not at all.

        Raises:
            LogUnavailable: Redis cannot be reached.
        """
        return await self._starting.restore(run, lease, oldest)

    async def append(self, batches: Sequence[Batch]) -> Sequence[Appended]:
        """Store every batch, each on its own. A checkpoint; cancelled, each of them is stored or not.

        Raises:
            LogUnavailable: Redis cannot be reached, or takes no writes; any of the batches may be stored.
        """
        replies = await self._client.execute([self._append(batch) for batch in batches])
        appended = [appended_of(reply) for reply in replies]
        settled = [(batch, reply.status) for batch, reply in zip(batches, appended, strict=True)]
        over = [batch.run_id for batch, status in settled if batch.ending is not None and status is AppendStatus.OK]
        await self._client.execute(self._starting.over(over))
        self._starting.drop(batch.run_id for batch, status in settled if status in LOST)
        return appended

    def _append(self, batch: Batch) -> Command:
        ending = fields_of_ending(batch.ending)
        wires = [entry.wire for entry in batch.entries]
        number = len(wires)
        return call(
            scripts.APPEND,
            [self._keys.stream(batch.run_id), self._keys.record(batch.run_id), self._keys.wake(batch.run_id)],
            batch.epoch,
            self._ttl,
            self._max_entries,
            batch.entries[0].seq,
            "1" if batch.final or ending else "",
            len(ending),
            *ending,
            b"".join(wires),
            struct.pack(f"<{number}I", *map(len, wires)),
            struct.pack(f"<{number}d", *[entry.timestamp for entry in batch.entries]),
        )

    # Reading

    async def read(
        self, run_id: str, after: int, *, max_entries: int = PAGE_ENTRIES, max_bytes: int = PAGE_BYTES
    ) -> Page:
        """A page of what follows `after`. A checkpoint.

        Raises:
            RunNotFound: there is no such run.
            LogUnavailable: Redis cannot be reached.
        """
        (reply,) = await self._requests.execute([self._read(run_id, after, max_entries, max_bytes)])
        page = page_of(run_id, after, reply)
        if page is None:
            raise RunNotFound(run_id)
        return page

    async def fetch(self, positions: Mapping[str, int]) -> Mapping[str, Page | None]:
        """A page for each run. A checkpoint.

        Raises:
            LogUnavailable: Redis cannot be reached.
        """
        commands = [self._read(run_id, after, PAGE_ENTRIES, PAGE_BYTES) for run_id, after in positions.items()]
        replies = await self._client.execute(commands)
        return {
            run_id: page_of(run_id, after, reply)
            for (run_id, after), reply in zip(positions.items(), replies, strict=True)
        }

    def _read(self, run_id: str, after: int, max_entries: int, max_bytes: int) -> Command:
        keys = [self._keys.stream(run_id), self._keys.record(run_id)]
        return call(scripts.PAGE, keys, min(after, 2**53), max_entries, max_bytes)

    async def get(self, run_id: str) -> Run:
        """The record. A checkpoint.

        Raises:
            RunNotFound: there is no such run.
            LogUnavailable: Redis cannot be reached.
        """
        (reply,) = await self._requests.execute([("HGETALL", self._keys.record(run_id))])
        run = found(run_id, reply)
        if run is None:
            raise RunNotFound(run_id)
        return run

    async def list(self, *, limit: int = 50, status: RunStatus | None = None) -> Sequence[Run]:
        """The newest records, newest first. A checkpoint; runs without a record are taken off the list by the way.

        Raises:
            LogUnavailable: Redis cannot be reached.
        """
        runs: dict[str, Run] = {}
        gone: list[str] = []
        start = 0
        while len(runs) < limit:
            page = ("ZREVRANGE", self._keys.runs, start, start + LIST_PAGE - 1, "WITHSCORES")
            listed = await self._requests.ask(*page)
            if not listed:
                break
            ids = [each.decode(errors="replace") for each in listed[::2]]
            replies = await self._requests.execute([("HGETALL", self._keys.record(run_id)) for run_id in ids])
            for run_id, created_at, reply in zip(ids, map(float, listed[1::2]), replies, strict=True):
                run = found(run_id, reply)
                if run is not None and status in {None, run.status}:
                    runs[run_id] = run
                elif run is None and created_at < time.time() - UNLISTED_AFTER:
                    gone.append(run_id)
            start += LIST_PAGE
        if gone:
            await self._requests.ask("ZREM", self._keys.runs, *gone)
        return [*runs.values()][:limit]

    # Cancelling

    async def request_cancel(self, run_id: str, reason: str | None) -> CancelReply:
        """Put a cancel request on record and into the owner's inbox, and wake it. A checkpoint.

        Raises:
            RunNotFound: there is no such run.
            LogUnavailable: Redis cannot be reached; the request may be on record.
        """
        words = ("1", reason) if reason is not None else ("", "")
        keys = [self._keys.stream(run_id), self._keys.record(run_id)]
        command = call(scripts.CANCEL, keys, secrets.token_hex(8), self._ttl, *words)
        what, flat = await self._requests.ask(*command)
        if what == b"GONE":
            raise RunNotFound(run_id)
        record = record_of(flat)
        status = CancelStatus[what.decode()]
        if status is not CancelStatus.ENDED:  # a repeated request as well: the first may have broken off here
            owner, words_on_record = record["owner"], json.dumps(record.get("cancel_reason"))
            post = call(
                scripts.POST,
                [self._keys.inbox(owner)],
                max(self._ttl, INBOX_TTL),
                self._keys.process(owner),
                run_id,
                words_on_record,
            )
            await self._requests.ask(*post)
        return CancelReply(status, run_of(run_id, record))

    async def cancel_requests(self, owner: str) -> Mapping[str, str | None]:
        """Empty the owner's inbox. A checkpoint; a request is removed from it after it was handed over, not before.

        Raises:
            LogUnavailable: Redis cannot be reached.
        """
        inbox = self._keys.inbox(owner)
        taken = self._taken.get(owner, [])
        commands: list[Command] = [("HDEL", inbox, *taken)] if taken else []
        flat = checked((await self._client.execute([*commands, ("HGETALL", inbox)]))[-1])
        requests: dict[str, str | None] = {run_id: reason_of(reason) for run_id, reason in record_of(flat).items()}
        self._taken.pop(owner, None)
        if requests:
            self._taken[owner] = [*requests]
        return requests | self._heard.pop(owner, {})

    # Leases

    async def renew(self, owner: str, epochs: Mapping[str, str], seconds: float) -> Mapping[str, AppendStatus]:
        """Renew the leases whose epoch is right. A checkpoint; cancelled, all are renewed or none.

        Raises:
            LogUnavailable: Redis cannot be reached.
        """
        if not epochs:
            return {}
        keys = [key for run_id in epochs for key in (self._keys.stream(run_id), self._keys.record(run_id))]
        renewed = await self._client.ask(*call(scripts.RENEW, keys, ms(seconds), self._ttl, *epochs.values()))
        replies: dict[str, AppendStatus] = {}
        for run_id, (status, cancelled, reason) in zip(epochs, renewed, strict=True):
            replies[run_id] = AppendStatus[status.decode()]
            if replies[run_id] in LOST:
                self._starting.drop([run_id])
            if cancelled and replies[run_id] is AppendStatus.OK:
                self._heard.setdefault(owner, {})[run_id] = text_of(reason)
        alive = [run_id for run_id, status in replies.items() if status is AppendStatus.OK]
        if alive:
            enlist = call(scripts.ENLIST, [self._keys.live], ms(seconds), "", *alive)
            enlisted, *_ = await self._client.execute([enlist, *self._starting.keep(alive)])
            checked(enlisted)
        return replies

    async def reap(self, obituary: Callable[[], Obituary]) -> Sequence[str]:
        """End the runs whose lease has run out by Redis' clock, `REAPED_AT_ONCE` in one round trip. A checkpoint.

        Raises:
            LogUnavailable: Redis cannot be reached; some may have been reaped.
        """
        reaped: list[str] = []
        while True:
            now, dead = await self._due()
            reaped += await self._reap_all(dead, now, obituary)
            if len(dead) < REAPED_AT_ONCE:
                return reaped

    async def _due(self) -> tuple[bytes, Sequence[str]]:
        """Redis' clock, and the runs whose lease may be over by it.

        Raises:
            LogUnavailable: Redis cannot be reached, or its clock has been set forward: no lease is over by that.
        """
        began = trio.current_time()
        due = call(scripts.DUE, [self._keys.live], REAPED_AT_ONCE)
        touched, reply = await self._client.execute([touch(self._keys), due])
        checked(touched)
        now, ids = checked(reply)
        last, self._clock = self._clock, (int(now) / 1000, began)
        if last is not None and self._clock[0] - last[0] > trio.current_time() - last[1] + CLOCK_TOLERANCE:
            raise LogUnavailable("the clock of Redis has been set forward")
        dead = [each.decode(errors="replace") for each in ids]
        odd = [each for each, run_id in zip(ids, dead, strict=True) if run_id.encode() != each]
        if odd:  # no run's id
            await self._client.execute([("ZREM", self._keys.live, *odd)])
        return now, dead

    async def _reap_all(self, dead: Sequence[str], now: bytes, obituary: Callable[[], Obituary]) -> Sequence[str]:
        """Reap what was due at `now`; the runs that were."""
        replies = await self._client.execute([self._reap(run_id, now, obituary()) for run_id in dead])
        reaped: list[str] = []
        over: list[str] = []
        alive: list[Command] = []
        for run_id, reply in zip(dead, replies, strict=True):
            if isinstance(reply, LogUnavailable):
                continue  # the next round has it again
            # What is refused is no record of a run: whatever it is, it keeps no other from being reaped.
            status, lease = (b"GONE", 0) if isinstance(reply, Exception) else reply
            if status == b"OK":
                alive.append(call(scripts.ENLIST, [self._keys.live], lease, "", run_id))
            else:
                over.append(run_id)
            if status == b"FENCED":
                reaped.append(run_id)
        await self._client.execute([*alive, *self._starting.over(over)])
        return reaped

    def _reap(self, run_id: str, now: bytes, words: Obituary) -> Command:
        keys = [self._keys.stream(run_id), self._keys.record(run_id), self._keys.wake(run_id)]
        ending = fields_of_ending(words.ending)
        return call(scripts.REAP, keys, now, self._ttl, len(ending), *ending, *words.blocks)

    # The rest

    def wakeups(self, owner: str) -> AbstractAsyncContextManager[RedisWakeups]:
        """The wake-ups of the supervisor named `owner`."""
        return open_wakeups(self._client, self._keys, owner)

    async def check(self) -> None:
        """Return if Redis can be reached and takes writes. A checkpoint.

        Raises:
            LogUnavailable: it cannot, or does not.
        """
        await self._client.ask(*touch(self._keys))
