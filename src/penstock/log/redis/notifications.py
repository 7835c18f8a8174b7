"""One subscription connection, and what is done when it breaks.

    keeper  ── SUBSCRIBE, UNSUBSCRIBE, PING ──▶ Redis
    pump    ◀── messages, confirmations, pongs ── Redis

Messages are lost only with their connection. So it is pinged every `PING_INTERVAL`; one that has not answered by the
next ping is given up. After every new connection the last seq of each run is looked up, and that is told as if it had
been a message. Besides, a run that falls silent is looked up once, and then about every `CHECK_INTERVAL` like all
others, in case something between here and Redis swallows messages without breaking a connection.

Wake-ups through Redis: one subscription connection per process and part, each with a task of its own.

In a cluster a channel is on a slot, and only the nodes that have the slot tell of it. When slots come to another node
their channels come to its listener, and their runs are looked up there once Redis has confirmed it.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import asynccontextmanager, suppress
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING, Final, Protocol

import trio
from redis.exceptions import ClusterDownError, MovedError

from penstock.backoff import SHORTEST_PAUSE, retry_while_unavailable
from penstock.errors import LogUnavailable
from penstock.exception_groups import raise_single
from penstock.log import Notification
from penstock.log.redis.client import ANSWER_TIMEOUT
from penstock.log.redis.slots import slot_of
from penstock.observer import logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from penstock.log.redis.backend import Backend
    from penstock.log.redis.client import Subscription
    from penstock.log.redis.schema import Keys

PING_INTERVAL: Final = 5.0
"""Seconds between two signs of life of the subscription connection."""
CHECK_INTERVAL: Final = 60.0
"""Within about so many seconds the last seq of a silent run is looked up, message or no message."""
FAILING_TIMEOUT: Final = 1.0
"""How many seconds a subscription waits while no connection can be made."""
CHANNELS_PER_COMMAND: Final = 500
"""The most channels in one SUBSCRIBE or UNSUBSCRIBE."""


class NotificationSink(Protocol):
    """Whoever is told what a listener hears. What is synchronous never blocks."""

    def on_message(self, channel: str, data: bytes) -> bool:
        """A message has come; whether it was one of a run's."""

    def is_run(self, channel: str) -> bool:
        """Whether it is a run's channel, so that it can be looked up."""

    def reconnected(self) -> None:
        """The connection is a new one, and messages may have been lost before it."""

    async def look_up(self, channels: Sequence[str]) -> None:
        """Tell of the runs of these channels as if each had sent a message.

        Raises:
            LogUnavailable: Redis cannot be reached.
        """


class NodeSubscription:
    """What one part of Redis tells, over one connection at a time.

    Args:
        servers: the way to Redis.
        part: the part.
        told: told what is heard.
    """

    def __init__(self, servers: Backend, shard: str, told: NotificationSink) -> None:
        self.shard = shard
        self.channels: dict[str, trio.Event] = {}
        """The channels that are wanted; the event is set while Redis has confirmed that they are listened to."""
        self.failing = False
        """No connection of use could be made the last time."""
        self.scope = trio.CancelScope()
        """Cancelled when there is nothing more to listen to."""
        self._servers = servers
        self._told = told
        self._sent: set[str] = set()
        """The channels that this connection has asked for, and has not given up since."""
        self._unconfirmed: Counter[str] = Counter()
        """How many of its requests for a channel this connection has not confirmed yet."""
        self._arrived: set[str] = set()
        """Channels that have come from another part: messages may have been lost on the way."""
        self._misrouted: set[str] = set()
        """Channels whose slot the node gave away, or has not: they are looked for, and asked for again."""
        self._poke = trio.Event()
        self._pong_due = False
        self._reconnecting = False
        self._proven = False
        """This connection has been of use."""
        self._stirred: set[str] = set()
        self._quiet: set[str] = set()
        self._turn = 0
        self._lot = trio.lowlevel.ParkingLot()

    @property
    def address(self) -> str:
        """Where it listens."""
        return self.shard or self._servers.address

    def want(self, channel: str) -> None:
        """Listen to this channel. Never blocks."""
        confirmed = self.channels[channel] = trio.Event()
        if channel in self._sent and channel not in self._unconfirmed:  # given up a moment ago, and not told so yet
            confirmed.set()
        self._poke.set()

    def adopt(self, channel: str, confirmed: trio.Event) -> None:
        """Listen to a channel that has been listened to elsewhere; who waits for its confirmation goes on waiting."""
        self.channels[channel] = trio.Event() if confirmed.is_set() else confirmed
        self._sent.discard(channel)
        self._arrived.add(channel)
        self._poke.set()

    def leave(self, channel: str) -> trio.Event | None:
        """Listen to this channel no more. Never blocks."""
        confirmed = self.channels.pop(channel, None)
        if confirmed is not None:
            self._stirred.discard(channel)
            self._quiet.discard(channel)
            self._arrived.discard(channel)
            self._poke.set()
        return confirmed

    async def confirmed(self, channel: str) -> None:
        """Wait until Redis listens to this channel for us.

        Raises:
            LogUnavailable: it has not confirmed it in time.
        """
        seconds = FAILING_TIMEOUT if self.failing else ANSWER_TIMEOUT
        with trio.move_on_after(seconds):
            await self.channels[channel].wait()
            return
        raise LogUnavailable(f"Redis at {self.address} has not confirmed a subscription in {seconds:g} s")

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Keep a connection, until `scope` is cancelled."""
        with self.scope:
            while True:
                while not self.channels:
                    self._poke = trio.Event()
                    await self._poke.wait()
                await retry_while_unavailable(self._session, what="listen to Redis", on_warning=logger.warning)
                await trio.sleep(SHORTEST_PAUSE)

    async def _session(self) -> None:
        """One connection, to its end: returns if it was of use, else raises `LogUnavailable`."""
        self._sent.clear()
        self._unconfirmed.clear()
        self._misrouted.clear()
        self._pong_due = False
        for channel, confirmed in self.channels.items():
            if confirmed.is_set():
                self.channels[channel] = trio.Event()
        self._proven = False
        broken = ""
        try:
            async with self._servers.subscription(self.shard) as subscription:
                await self._send(subscription)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, subscription)
                    nursery.start_soon(self._keep, subscription)
        except* LogUnavailable as errors:
            broken = " and ".join(str(error) for error in errors.exceptions)
        self.failing = not self._proven
        self._servers.doubt()
        if self.failing:
            raise LogUnavailable(broken)
        logger.warning("the subscription to Redis broke: %s", broken)
        self._reconnecting = True

    async def _pump(self, subscription: Subscription) -> None:
        """Take what comes. What is refused because its slot is another node's does the connection no harm."""
        while True:
            try:
                await subscription.pump(self._take)
            except LogUnavailable as error:
                cause = error.__cause__
                if isinstance(cause, MovedError):
                    self._refused(cause.slot_id)
                elif isinstance(cause, ClusterDownError) and "slot not served" in str(cause):
                    self._refused(None)
                else:
                    raise

    async def _keep(self, subscription: Subscription) -> None:
        """Ask for the channels that are wanted, and for signs of life."""
        with trio.move_on_after(ANSWER_TIMEOUT):
            while self._unconfirmed:
                await self._lot.park()
        if self._unconfirmed:
            raise LogUnavailable(f"Redis at {self.address} has not confirmed what it was asked to tell")
        if self._reconnecting:
            self._told.reconnected()
            await self._told.look_up([*self.channels])
        self._proven, self.failing = True, False
        due = trio.current_time() + PING_INTERVAL
        while True:
            with trio.move_on_at(due):
                await self._poke.wait()
            self._poke = trio.Event()
            if self._misrouted:
                await self._look_up_misrouted()
            await self._send(subscription)
            if arrived := [each for each in self._arrived if each in self.channels and self.channels[each].is_set()]:
                self._arrived.difference_update(arrived)
                await self._told.look_up(arrived)
            if trio.current_time() < due:
                continue
            if self._pong_due:
                raise LogUnavailable(f"Redis at {self.address} has not answered a ping for {PING_INTERVAL} s")
            self._pong_due = True
            due = trio.current_time() + PING_INTERVAL
            await subscription.ping()
            await self._told.look_up(self._to_check())

    async def _look_up_misrouted(self) -> None:
        """Find out where they are. Those that are here after all are asked for again."""
        astray, self._misrouted = self._misrouted, set()
        with trio.move_on_after(FAILING_TIMEOUT), suppress(LogUnavailable):  # it is not this node that is away
            await self._told.look_up([*astray])
        await trio.sleep(SHORTEST_PAUSE)
        self._sent -= astray
        self._arrived |= astray & self.channels.keys()

    async def _send(self, subscription: Subscription) -> None:
        """Make what this connection listens to what is wanted."""
        while piece := [*islice((each for each in self._sent if each not in self.channels), CHANNELS_PER_COMMAND)]:
            self._sent.difference_update(piece)
            await subscription.unsubscribe(piece)
        while piece := [*islice((each for each in self.channels if each not in self._sent), CHANNELS_PER_COMMAND)]:
            self._sent.update(piece)
            self._unconfirmed.update(piece)
            await subscription.subscribe(piece)

    def _take(self, kind: str, channel: str, data: bytes) -> None:
        """A message has come."""
        if kind == "message":
            if channel in self.channels and self._told.on_message(channel, data):
                self._stirred.add(channel)
        elif kind == "subscribe":
            self._confirm(channel)
        elif kind == "unsubscribe":
            if channel in self._sent and channel not in self._unconfirmed:  # nobody has asked for that
                self._mark_misrouted(channel)
        elif kind == "pong":
            self._pong_due = False
        self._lot.unpark_all()

    def _refused(self, slot: int | None) -> None:
        """A request for a channel on this slot, or to hear of it no more, has been refused: another node has it.

        Of a slot that nobody has (None) the refusal says no more than that: it is the oldest request.
        """
        for channel in self._unconfirmed:
            if slot is None or slot_of(channel) == slot:
                del self._unconfirmed[channel]
                self._mark_misrouted(channel)
                self._lot.unpark_all()
                return

    def _mark_misrouted(self, channel: str) -> None:
        self._misrouted.add(channel)
        self._servers.doubt()
        self._poke.set()

    def _confirm(self, channel: str) -> None:
        self._unconfirmed[channel] -= 1
        if self._unconfirmed[channel] <= 0:
            del self._unconfirmed[channel]
            if channel in self._sent and channel in self.channels:
                self.channels[channel].set()
                if channel in self._arrived:
                    self._poke.set()

    def _to_check(self) -> list[str]:
        """The channels whose turn it is: those that have fallen silent, and a share of all."""
        fallen_silent = self._quiet - self._stirred
        self._quiet, self._stirred = self._stirred, set()
        channels = [channel for channel in self.channels if self._told.is_run(channel)]
        share = ceil(len(channels) * PING_INTERVAL / CHECK_INTERVAL)
        self._turn = self._turn if self._turn < len(channels) else 0
        turn = channels[self._turn : self._turn + share]
        self._turn += share
        return [*fallen_silent.union(turn)]


MAX_SEQ_DIGITS: Final = 16
"""The most digits of a seq; what else is published on a run's channel is none of ours."""


class RedisNotifications:
    """The wake-ups of one supervisor. Made by `open_wakeups`."""

    def __init__(self, servers: Backend, keys: Keys, owner: str, nursery: trio.Nursery) -> None:
        self._servers = servers
        self._keys = keys
        self._process = keys.process(owner)
        self._nursery = nursery
        self._listeners: dict[str, NodeSubscription] = {}
        self._channels: dict[str, NodeSubscription] = {}
        """The channels that are wanted, and who listens to them."""
        self._moved: dict[str, int] = {}
        self._cancel = False
        self._reconnected = False
        self._lot = trio.lowlevel.ParkingLot()

    async def subscribe(self, run_id: str) -> None:
        """From the return on, every append to the run is told. A checkpoint.

        Raises:
            LogUnavailable: Redis has not confirmed it in time.
        """
        await self.listen(self._keys.wake(run_id))

    async def listen(self, channel: str, *, may_fail: bool = False) -> None:
        """Wait until this channel is listened to. A checkpoint.

        Raises:
            LogUnavailable: Redis has not confirmed it in time; it goes on trying, and that may be good enough.
        """
        if channel not in self._channels:
            listener = self._channels[channel] = self._listener(self._servers.shard(channel))
            listener.want(channel)
        try:
            await self._channels[channel].confirmed(channel)
        except LogUnavailable:
            if not may_fail:
                raise

    def unsubscribe(self, run_id: str) -> None:
        """Tell of the run no more. Never blocks."""
        channel = self._keys.wake(run_id)
        listener = self._channels.pop(channel, None)
        if listener is not None:
            listener.leave(channel)
            self._moved.pop(run_id, None)

    async def wait(self) -> Notification:
        """All that there is to tell, as soon as there is anything. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while not (self._moved or self._cancel or self._reconnected):
            await self._lot.park()
        news = Notification(self._moved, self._cancel, self._reconnected)
        self._moved, self._cancel, self._reconnected = {}, False, False
        return news

    def _listener(self, shard: str) -> NodeSubscription:
        if shard not in self._listeners:
            listener = self._listeners[shard] = NodeSubscription(self._servers, shard, self)
            self._nursery.start_soon(listener.run)
        return self._listeners[shard]

    def rearrange(self) -> None:
        """Keys have come to other parts: listen to their channels there."""
        for channel, listener in self._channels.items():
            shard = self._servers.shard(channel)
            if shard != listener.shard and (confirmed := listener.leave(channel)) is not None:
                self._channels[channel] = self._listener(shard)
                self._channels[channel].adopt(channel, confirmed)
        for shard, listener in [*self._listeners.items()]:
            if not listener.channels and shard not in self._servers.shards():
                del self._listeners[shard]
                listener.scope.cancel(reason="the node is no primary any more")

    # What a listener tells

    def on_message(self, channel: str, data: bytes) -> bool:
        """A message has come; whether it was one of a run's."""
        if channel == self._process:
            self._cancel = True
        elif data.isdigit() and len(data) <= MAX_SEQ_DIGITS:
            run_id = self._keys.woken(channel)
            self._moved[run_id] = max(self._moved.get(run_id, 0), int(data))
        else:
            return False
        self._lot.unpark_all()
        return self.is_run(channel)

    def is_run(self, channel: str) -> bool:
        """Whether it is a run's channel, so that it can be looked up."""
        return channel != self._process

    def reconnected(self) -> None:
        """Messages may have been lost."""
        self._reconnected = True
        self._lot.unpark_all()

    async def look_up(self, channels: Sequence[str]) -> None:
        """Tell of the runs of these channels as if each had sent a message.

        Raises:
            LogUnavailable: Redis cannot be reached.
        """
        runs = [self._keys.woken(channel) for channel in channels if self.is_run(channel)]
        if runs:
            replies = await self._servers.execute([("HGET", self._keys.record(run_id), "seq") for run_id in runs])
            for run_id, reply in zip(runs, replies, strict=True):
                known = reply is None or (isinstance(reply, bytes) and reply.isdigit() and len(reply) <= MAX_SEQ_DIGITS)
                if known and self._keys.wake(run_id) in self._channels:
                    seq = sys.maxsize if reply is None else int(reply)
                    self._moved[run_id] = max(self._moved.get(run_id, 0), seq)
        self._lot.unpark_all()


@asynccontextmanager
async def open_wakeups(
    servers: Backend, keys: Keys, check: Callable[[], Awaitable[None]], owner: str
) -> AsyncIterator[RedisNotifications]:
    """The wake-ups of the supervisor named `owner`, for as long as the block lasts.

    Raises:
        LogUnavailable: Redis cannot be reached to begin with, or takes no writes. (In a cluster the node may be away
            that would tell of cancel requests: they are looked for, too.)
    """
    await check()
    try:
        async with trio.open_nursery() as nursery:
            wakeups = RedisNotifications(servers, keys, owner, nursery)
            unwatch = servers.watch(wakeups.rearrange)
            try:
                await wakeups.listen(keys.process(owner), may_fail=servers.clustered)
                yield wakeups
            finally:
                unwatch()
            nursery.cancel_scope.cancel(reason="the supervisor has ended")
    except BaseExceptionGroup as group:
        raise_single(group, trio.Cancelled)
