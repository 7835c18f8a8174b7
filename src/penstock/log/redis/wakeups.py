"""Wake-ups through Redis: one subscription connection per process, and what is done when it breaks.

    keeper  ── SUBSCRIBE, UNSUBSCRIBE, PING ──▶ Redis
    pump    ◀── messages, confirmations, pongs ── Redis

Messages are lost only with their connection. So it is pinged every `PING_INTERVAL`; one that has not answered by the
next ping is given up. After every new connection the last seq of each run is looked up, and that is told as if it had
been a message. Besides, a run that falls silent is looked up once, and then about every `CHECK_INTERVAL` like all
others, in case something between here and Redis swallows messages without breaking a connection.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import asynccontextmanager
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING, Final

import trio

from penstock.errors import LogUnavailable
from penstock.groups import raise_bare
from penstock.log import News
from penstock.log.redis.client import ANSWER_TIMEOUT
from penstock.log.redis.records import touch
from penstock.log.retries import SHORTEST_PAUSE, patiently
from penstock.observer import logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from penstock.log.redis.client import Client, Subscription
    from penstock.log.redis.records import Keys

PING_INTERVAL: Final = 5.0
"""Seconds between two signs of life of the subscription connection."""
CHECK_INTERVAL: Final = 60.0
"""Within about so many seconds the last seq of a silent run is looked up, message or no message."""
FAILING_TIMEOUT: Final = 1.0
"""How many seconds a subscription waits while no connection can be made."""
MAX_SEQ_DIGITS: Final = 16
"""The most digits of a seq; what else is published on a run's channel is none of ours."""
CHANNELS_PER_COMMAND: Final = 500
"""The most channels in one SUBSCRIBE or UNSUBSCRIBE."""


class RedisWakeups:
    """The wake-ups of one supervisor. Made by `open_wakeups`."""

    def __init__(self, client: Client, keys: Keys, owner: str) -> None:
        self._client = client
        self._keys = keys
        self._process = keys.process(owner)
        self._channels: dict[str, trio.Event] = {self._process: trio.Event()}
        """The channels that are wanted; the event is set while Redis has confirmed that they are listened to."""
        self._sent: set[str] = set()
        """The channels that this connection has asked for, and has not given up since."""
        self._unconfirmed: Counter[str] = Counter()
        """How many of its requests for a channel this connection has not confirmed yet."""
        self._poke = trio.Event()
        self._pong_due = False
        self._reconnecting = False
        self._proven = False
        """This connection has been of use."""
        self._failing = False
        """No connection of use could be made the last time."""
        self._stirred: set[str] = set()
        self._quiet: set[str] = set()
        self._turn = 0
        self._moved: dict[str, int] = {}
        self._cancel = False
        self._reconnected = False
        self._lot = trio.lowlevel.ParkingLot()

    async def subscribe(self, run_id: str) -> None:
        """From the return on, every append to the run is told. A checkpoint.

        Raises:
            LogUnavailable: Redis has not confirmed it in time.
        """
        await self._listening(self._keys.wake(run_id))

    async def _listening(self, channel: str) -> None:
        if channel not in self._channels:
            confirmed = self._channels[channel] = trio.Event()
            if channel in self._sent and channel not in self._unconfirmed:  # given up a moment ago, and not told so yet
                confirmed.set()
            self._poke.set()
        seconds = FAILING_TIMEOUT if self._failing else ANSWER_TIMEOUT
        with trio.move_on_after(seconds):
            await self._channels[channel].wait()
            return
        raise LogUnavailable(f"Redis at {self._client.address} has not confirmed a subscription in {seconds:g} s")

    def unsubscribe(self, run_id: str) -> None:
        """Tell of the run no more. Never blocks."""
        if self._channels.pop(self._keys.wake(run_id), None) is not None:
            self._moved.pop(run_id, None)
            self._stirred.discard(run_id)
            self._quiet.discard(run_id)
            self._poke.set()

    async def wait(self) -> News:
        """All that there is to tell, as soon as there is anything. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while not (self._moved or self._cancel or self._reconnected):
            await self._lot.park()
        news = News(self._moved, self._cancel, self._reconnected)
        self._moved, self._cancel, self._reconnected = {}, False, False
        return news

    async def run(self) -> None:
        """Keep a connection, until cancelled."""
        while True:
            await patiently(self._session, what="listen to Redis", on_warning=logger.warning)
            await trio.sleep(SHORTEST_PAUSE)

    async def _session(self) -> None:
        """One connection, to its end: returns if it was of use, else raises `LogUnavailable`."""
        self._sent.clear()
        self._unconfirmed.clear()
        self._pong_due = False
        for channel, confirmed in self._channels.items():
            if confirmed.is_set():
                self._channels[channel] = trio.Event()
        self._proven = False
        broken = ""
        try:
            async with self._client.subscription() as subscription:
                await self._send(subscription)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(subscription.pump, self._take)
                    nursery.start_soon(self._keep, subscription)
        except* LogUnavailable as errors:
            broken = " and ".join(str(error) for error in errors.exceptions)
        self._failing = not self._proven
        if self._failing:
            raise LogUnavailable(broken)
        logger.warning("the subscription to Redis broke: %s", broken)
        self._reconnecting = True

    async def _keep(self, subscription: Subscription) -> None:
        """Ask for the channels that are wanted, and for signs of life."""
        with trio.move_on_after(ANSWER_TIMEOUT):
            while self._unconfirmed:
                await self._lot.park()
        if self._unconfirmed:
            raise LogUnavailable(f"Redis at {self._client.address} has not confirmed what it was asked to tell")
        if self._reconnecting:
            self._reconnected = True
            self._lot.unpark_all()
            await self._look_up(self._runs())
        self._proven, self._failing = True, False
        due = trio.current_time() + PING_INTERVAL
        while True:
            with trio.move_on_at(due):
                await self._poke.wait()
            self._poke = trio.Event()
            await self._send(subscription)
            if trio.current_time() < due:
                continue
            if self._pong_due:
                raise LogUnavailable(f"Redis at {self._client.address} has not answered a ping for {PING_INTERVAL} s")
            self._pong_due = True
            due = trio.current_time() + PING_INTERVAL
            await subscription.ping()
            await self._look_up(self._to_check())

    async def _send(self, subscription: Subscription) -> None:
        """Make what this connection listens to what is wanted."""
        while piece := [*islice((each for each in self._sent if each not in self._channels), CHANNELS_PER_COMMAND)]:
            self._sent.difference_update(piece)
            await subscription.unsubscribe(piece)
        while piece := [*islice((each for each in self._channels if each not in self._sent), CHANNELS_PER_COMMAND)]:
            self._sent.update(piece)
            self._unconfirmed.update(piece)
            await subscription.subscribe(piece)

    def _take(self, kind: str, channel: str, data: bytes) -> None:
        """A message has come."""
        if kind == "message":
            if channel == self._process:
                self._cancel = True
            elif channel in self._channels and data.isdigit() and len(data) <= MAX_SEQ_DIGITS:
                run_id = self._keys.woken(channel)
                self._stirred.add(run_id)
                self._moved[run_id] = max(self._moved.get(run_id, 0), int(data))
        elif kind == "subscribe":
            self._unconfirmed[channel] -= 1
            if self._unconfirmed[channel] <= 0:
                del self._unconfirmed[channel]
                if channel in self._sent and channel in self._channels:
                    self._channels[channel].set()
        elif kind == "pong":
            self._pong_due = False
        self._lot.unpark_all()

    def _runs(self) -> list[str]:
        return [self._keys.woken(channel) for channel in self._channels if channel != self._process]

    def _to_check(self) -> list[str]:
        """The runs whose turn it is: those that have fallen silent, and a share of all."""
        fallen_silent = self._quiet - self._stirred
        self._quiet, self._stirred = self._stirred, set()
        runs = self._runs()
        share = ceil(len(runs) * PING_INTERVAL / CHECK_INTERVAL)
        self._turn = self._turn if self._turn < len(runs) else 0
        turn = runs[self._turn : self._turn + share]
        self._turn += share
        return [*fallen_silent.union(turn)]

    async def _look_up(self, runs: Sequence[str]) -> None:
        """Tell of the runs as if each had sent a message."""
        if not runs:
            return
        replies = await self._client.execute([("HGET", self._keys.record(run_id), "seq") for run_id in runs])
        for run_id, reply in zip(runs, replies, strict=True):
            known = reply is None or (isinstance(reply, bytes) and reply.isdigit() and len(reply) <= MAX_SEQ_DIGITS)
            if known and self._keys.wake(run_id) in self._channels:
                seq = sys.maxsize if reply is None else int(reply)
                self._moved[run_id] = max(self._moved.get(run_id, 0), seq)
        self._lot.unpark_all()


@asynccontextmanager
async def open_wakeups(client: Client, keys: Keys, owner: str) -> AsyncIterator[RedisWakeups]:
    """The wake-ups of the supervisor named `owner`, for as long as the block lasts.

    Raises:
        LogUnavailable: Redis cannot be reached to begin with, or takes no writes.
    """
    await client.ask(*touch(keys))
    wakeups = RedisWakeups(client, keys, owner)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wakeups.run)
            await wakeups._listening(wakeups._process)  # noqa: SLF001  (they are two parts of one thing)
            yield wakeups
            nursery.cancel_scope.cancel(reason="the supervisor has ended")
    except BaseExceptionGroup as group:
        raise_bare(group, trio.Cancelled)
