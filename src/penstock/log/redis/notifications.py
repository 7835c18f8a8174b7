"""Notifications through Redis: one subscription connection per process and shard, each kept by a task of its own.

Messages are lost only with their connection. So it is pinged every `PING_INTERVAL`, and given up if a ping has no
answer by the next one. After each new connection the last seq of each run is looked up, and reported like a message; so
it is when a run falls silent, and about every `CHECK_INTERVAL`, in case something swallows messages. When the slot of a
channel moves to another node of a cluster, the channel moves to that node's subscription.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import asynccontextmanager, suppress
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING, Final

import trio
from redis.exceptions import ClusterDownError, MovedError

from penstock.backoff import SHORTEST_PAUSE, retry_while_unavailable
from penstock.errors import LogUnavailable
from penstock.exception_groups import open_nursery
from penstock.log import Notification
from penstock.log.redis import backend as redis_backend
from penstock.log.redis.slots import slot_of
from penstock.observer import logger

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Sequence

    from penstock.log.redis.backend import Backend, Topology
    from penstock.log.redis.client import Subscription
    from penstock.log.redis.schema import Keys

PING_INTERVAL: Final = 5.0  # seconds between two pings of a subscription connection
CHECK_INTERVAL: Final = 60.0
"""Seconds within about which the last seq of a silent run is looked up, message or no message."""
FAILING_TIMEOUT: Final = 1.0  # seconds that a subscription waits while no connection can be made
CHANNELS_PER_COMMAND: Final = 500  # the most channels in one SUBSCRIBE or UNSUBSCRIBE
MAX_SEQ_DIGITS: Final = 16  # the most digits of a seq; a longer message on a run's channel is not penstock's


class RedisNotifications:
    """The notifications of one supervisor. Made by `open_notifications`."""

    def __init__(self, backend: Backend, topology: Topology, keys: Keys, owner: str, nursery: trio.Nursery) -> None:
        self.backend = backend
        self.topology = topology
        self._keys = keys
        self._process = keys.process(owner)
        self._nursery = nursery
        self._subscriptions: dict[str, ShardSubscription] = {}
        self._channels: dict[str, ShardSubscription] = {}  # the subscription of each channel that is wanted
        self._moved: dict[str, int] = {}
        self._cancel = False
        self._reconnected = False
        self._lot = trio.lowlevel.ParkingLot()

    async def subscribe(self, run_id: str) -> None:
        await self.listen(self._keys.wake(run_id))

    async def listen(self, channel: str) -> None:
        """Wait until Redis confirms this channel; `LogUnavailable` if that takes too long (it keeps trying)."""
        if channel not in self._channels:
            subscription = self._channels[channel] = self._subscription(self.topology.shard(channel))
            subscription.add(channel)
        await self._channels[channel].confirmed(channel)

    def unsubscribe(self, run_id: str) -> None:
        channel = self._keys.wake(run_id)
        subscription = self._channels.pop(channel, None)
        if subscription is not None:
            subscription.remove(channel)
            self._moved.pop(run_id, None)

    async def wait(self) -> Notification:
        await trio.lowlevel.checkpoint()
        while not (self._moved or self._cancel or self._reconnected):
            await self._lot.park()
        notification = Notification(self._moved, self._cancel, self._reconnected)
        self._moved, self._cancel, self._reconnected = {}, False, False
        return notification

    def _subscription(self, shard: str) -> ShardSubscription:
        if shard not in self._subscriptions:
            self._subscriptions[shard] = ShardSubscription(self, shard)
            self._nursery.start_soon(self._subscriptions[shard].run)
        return self._subscriptions[shard]

    def follow_slots(self) -> None:
        """Keys have come to other shards: listen to their channels there."""
        for channel, subscription in self._channels.items():
            shard = self.topology.shard(channel)
            if shard != subscription.shard and (confirmed := subscription.remove(channel)) is not None:
                self._channels[channel] = self._subscription(shard)
                self._channels[channel].take_over(channel, confirmed)
        for shard, subscription in [*self._subscriptions.items()]:
            if not subscription.channels and shard not in self.topology.shards():
                del self._subscriptions[shard]
                subscription.scope.cancel(reason="the node is no primary any more")

    # Called by the subscriptions

    def on_message(self, channel: str, data: bytes) -> bool:
        """Report a message; whether it was one of a run's."""
        if channel == self._process:
            self._cancel = True
        elif data.isdigit() and len(data) <= MAX_SEQ_DIGITS:
            self._note_seq(self._keys.run_of_channel(channel), int(data))
        else:
            return False
        self._lot.unpark_all()
        return self.is_run(channel)

    def on_reconnect(self) -> None:
        self._reconnected = True
        self._lot.unpark_all()

    def is_run(self, channel: str) -> bool:
        return channel != self._process

    async def look_up(self, channels: Collection[str]) -> None:
        runs = [self._keys.run_of_channel(channel) for channel in channels if self.is_run(channel)]
        if runs:
            replies = await self.backend.execute([("HGET", self._keys.record(run_id), "seq") for run_id in runs])
            for run_id, reply in zip(runs, replies, strict=True):
                known = reply is None or (isinstance(reply, bytes) and reply.isdigit() and len(reply) <= MAX_SEQ_DIGITS)
                if known and self._keys.wake(run_id) in self._channels:
                    self._note_seq(run_id, sys.maxsize if reply is None else int(reply))
        self._lot.unpark_all()

    def _note_seq(self, run_id: str, seq: int) -> None:
        self._moved[run_id] = max(self._moved.get(run_id, 0), seq)


class ShardSubscription:
    """The channels of one shard, over one connection at a time."""

    def __init__(self, notifications: RedisNotifications, shard: str) -> None:
        self.shard = shard
        self.address = shard or notifications.backend.address
        self.channels: dict[str, trio.Event] = {}
        """The channels that are wanted; the event is set while Redis has confirmed that it sends their messages."""
        self.scope = trio.CancelScope()
        self._notifications = notifications
        self._topology = notifications.topology
        self._failing = False  # the last connection could not be made, or was of no use
        self._proven = False  # this connection has been of use
        self._asked: set[str] = set()  # the channels that this connection has asked for, and not given up since
        self._unconfirmed: Counter[str] = Counter()
        """How many requests for a channel this connection has not confirmed yet."""
        self._arrived: set[str] = set()
        """Channels that have come from another shard: messages may have been lost on the way."""
        self._misrouted: set[str] = set()  # channels whose slot the node has given away, or does not have
        self._changed = trio.Event()
        self._received = trio.lowlevel.ParkingLot()
        self._pong_due = False
        self._reconnecting = False
        self._active: set[str] = set()
        """The channels with messages since the last ping; those between the last two pings are in `_active_before`."""
        self._active_before: set[str] = set()
        self._next_check = 0

    def add(self, channel: str) -> None:
        confirmed = self.channels[channel] = trio.Event()
        if channel in self._asked and channel not in self._unconfirmed:  # removed a moment ago; Redis does not know yet
            confirmed.set()
        self._changed.set()

    def take_over(self, channel: str, confirmed: trio.Event) -> None:
        """Listen to a channel of another shard. Tasks that wait for its confirmation go on waiting."""
        self.channels[channel] = trio.Event() if confirmed.is_set() else confirmed
        self._asked.discard(channel)
        self._arrived.add(channel)
        self._changed.set()

    def remove(self, channel: str) -> trio.Event | None:
        """Stop listening to this channel; its confirmation, if it was listened to."""
        confirmed = self.channels.pop(channel, None)
        if confirmed is not None:
            for channels in (self._active, self._active_before, self._arrived):
                channels.discard(channel)
            self._changed.set()
        return confirmed

    async def confirmed(self, channel: str) -> None:
        seconds = FAILING_TIMEOUT if self._failing else redis_backend.ANSWER_TIMEOUT
        with trio.move_on_after(seconds):
            await self.channels[channel].wait()
            return
        raise LogUnavailable(f"Redis at {self.address} has not confirmed a subscription in {seconds:g} s")

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Keep a connection while any channel is wanted, until `scope` is cancelled."""
        with self.scope:
            while True:
                while not self.channels:
                    self._changed = trio.Event()
                    await self._changed.wait()
                await retry_while_unavailable(self._session, what="listen to Redis", on_warning=logger.warning)
                await trio.sleep(SHORTEST_PAUSE)

    async def _session(self) -> None:
        """One connection, to its end: returns if it was of use, else raises `LogUnavailable`."""
        self._asked.clear()
        self._unconfirmed.clear()
        self._misrouted.clear()
        self._pong_due = self._proven = False
        for channel, confirmed in self.channels.items():
            if confirmed.is_set():
                self.channels[channel] = trio.Event()
        broken = ""
        try:
            async with self._notifications.backend.subscription(self.shard) as subscription:
                await self._send(subscription)
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pump, subscription)
                    nursery.start_soon(self._keep, subscription)
        except* LogUnavailable as errors:
            broken = " and ".join(str(error) for error in errors.exceptions)
        self._failing = not self._proven
        self._topology.doubt()
        if self._failing:
            raise LogUnavailable(broken)
        logger.warning("the subscription to Redis broke: %s", broken)
        self._reconnecting = True

    async def _pump(self, subscription: Subscription) -> None:
        """Take what comes. A refusal because another node has the slot does not harm the connection."""
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
        """Ask for the channels that are wanted, and for pongs; look up runs."""
        with trio.move_on_after(redis_backend.ANSWER_TIMEOUT):
            while self._unconfirmed:
                await self._received.park()
        if self._unconfirmed:
            raise LogUnavailable(f"Redis at {self.address} has not confirmed the subscriptions that it was asked for")
        if self._reconnecting:
            self._notifications.on_reconnect()
            await self._notifications.look_up([*self.channels])
        self._proven, self._failing = True, False
        due = trio.current_time() + PING_INTERVAL
        while True:
            with trio.move_on_at(due):
                await self._changed.wait()
            self._changed = trio.Event()
            if self._misrouted:
                await self._look_up_misrouted()
            await self._send(subscription)
            if arrived := [each for each in self._arrived if each in self.channels and self.channels[each].is_set()]:
                self._arrived.difference_update(arrived)
                await self._notifications.look_up(arrived)
            if trio.current_time() < due:
                continue
            if self._pong_due:
                raise LogUnavailable(f"Redis at {self.address} has not answered a ping for {PING_INTERVAL} s")
            self._pong_due = True
            due = trio.current_time() + PING_INTERVAL
            await subscription.ping()
            await self._notifications.look_up(self._to_check())

    async def _look_up_misrouted(self) -> None:
        """Find out where they are; the look-up learns that. Those that are still wanted here are asked for again."""
        misrouted, self._misrouted = self._misrouted, set()
        # The look-up may meet an unreachable node; this node is not the one.
        with trio.move_on_after(FAILING_TIMEOUT), suppress(LogUnavailable):
            await self._notifications.look_up(misrouted)
        await trio.sleep(SHORTEST_PAUSE)
        self._asked -= misrouted
        self._arrived |= misrouted & self.channels.keys()

    async def _send(self, subscription: Subscription) -> None:
        while piece := [*islice((each for each in self._asked if each not in self.channels), CHANNELS_PER_COMMAND)]:
            self._asked.difference_update(piece)
            await subscription.unsubscribe(piece)
        while piece := [*islice((each for each in self.channels if each not in self._asked), CHANNELS_PER_COMMAND)]:
            self._asked.update(piece)
            self._unconfirmed.update(piece)
            await subscription.subscribe(piece)

    def _take(self, kind: str, channel: str, data: bytes) -> None:
        if kind == "message":
            if channel in self.channels and self._notifications.on_message(channel, data):
                self._active.add(channel)
        elif kind == "subscribe":
            self._confirm(channel)
        elif kind == "unsubscribe":
            if channel in self._asked and channel not in self._unconfirmed:  # Redis ended it: the slot has moved
                self._mark_misrouted(channel)
        elif kind == "pong":
            self._pong_due = False
        self._received.unpark_all()

    def _confirm(self, channel: str) -> None:
        self._unconfirmed[channel] -= 1
        if self._unconfirmed[channel] <= 0:
            del self._unconfirmed[channel]
            if channel in self._asked and channel in self.channels:
                self.channels[channel].set()
                if channel in self._arrived:
                    self._changed.set()

    def _refused(self, slot: int | None) -> None:
        """Another node has this slot of a channel. That no node has a slot names none: it is the oldest request's."""
        for channel in self._unconfirmed:
            if slot is None or slot_of(channel) == slot:
                del self._unconfirmed[channel]
                self._mark_misrouted(channel)
                self._received.unpark_all()
                return

    def _mark_misrouted(self, channel: str) -> None:
        self._misrouted.add(channel)
        self._topology.doubt()
        self._changed.set()

    def _to_check(self) -> Sequence[str]:
        """The channels to look up with this ping: those that have fallen silent, and a share of all."""
        fallen_silent = self._active_before - self._active
        self._active_before, self._active = self._active, set()
        channels = [channel for channel in self.channels if self._notifications.is_run(channel)]
        share = ceil(len(channels) * PING_INTERVAL / CHECK_INTERVAL)
        self._next_check = self._next_check if self._next_check < len(channels) else 0
        due = channels[self._next_check : self._next_check + share]
        self._next_check += share
        return [*fallen_silent.union(due)]


@asynccontextmanager
async def open_notifications(
    backend: Backend, topology: Topology, keys: Keys, check: Callable[[], Awaitable[None]], owner: str
) -> AsyncIterator[RedisNotifications]:
    """The notifications of the supervisor named `owner`; `LogUnavailable` if `check` finds no log that takes writes."""
    await check()
    async with open_nursery() as nursery:
        notifications = RedisNotifications(backend, topology, keys, owner, nursery)
        unwatch = topology.watch(notifications.follow_slots)
        try:
            try:
                await notifications.listen(keys.process(owner))
            except LogUnavailable:
                # Without the one node that sends cancel requests the lease keeper still looks for them.
                if not topology.is_cluster:
                    raise
            yield notifications
        finally:
            unwatch()
        nursery.cancel_scope.cancel(reason="the supervisor has ended")
