"""One subscription connection, and what is done when it breaks.

    keeper  ── SUBSCRIBE, UNSUBSCRIBE, PING ──▶ Redis
    pump    ◀── messages, confirmations, pongs ── Redis

Messages are lost only with their connection. So it is pinged every `PING_INTERVAL`; one that has not answered by the
next ping is given up. After every new connection the last seq of each run is looked up, and that is told as if it had
been a message. Besides, a run that falls silent is looked up once, and then about every `CHECK_INTERVAL` like all
others, in case something between here and Redis swallows messages without breaking a connection.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from itertools import islice
from math import ceil
from typing import TYPE_CHECKING, Final, Protocol

import trio
from redis.exceptions import ClusterDownError, MovedError

from penstock.errors import LogUnavailable
from penstock.log.redis.client import ANSWER_TIMEOUT
from penstock.log.redis.slots import slot_of
from penstock.log.retries import SHORTEST_PAUSE, patiently
from penstock.observer import logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.log.redis.servers import Servers
    from penstock.log.redis.subscription import Subscription

PING_INTERVAL: Final = 5.0
"""Seconds between two signs of life of the subscription connection."""
CHECK_INTERVAL: Final = 60.0
"""Within about so many seconds the last seq of a silent run is looked up, message or no message."""
FAILING_TIMEOUT: Final = 1.0
"""How many seconds a subscription waits while no connection can be made."""
CHANNELS_PER_COMMAND: Final = 500
"""The most channels in one SUBSCRIBE or UNSUBSCRIBE."""


class Told(Protocol):
    """Whoever is told what a listener hears. What is synchronous never blocks."""

    def heard(self, channel: str, data: bytes) -> bool:
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


class Listener:
    """What one part of Redis tells, over one connection at a time.

    Args:
        servers: the way to Redis.
        part: the part.
        told: told what is heard.
    """

    def __init__(self, servers: Servers, part: str, told: Told) -> None:
        self.part = part
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
        self._astray: set[str] = set()
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
        return self.part or self._servers.address

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
                await patiently(self._session, what="listen to Redis", on_warning=logger.warning)
                await trio.sleep(SHORTEST_PAUSE)

    async def _session(self) -> None:
        """One connection, to its end: returns if it was of use, else raises `LogUnavailable`."""
        self._sent.clear()
        self._unconfirmed.clear()
        self._astray.clear()
        self._pong_due = False
        for channel, confirmed in self.channels.items():
            if confirmed.is_set():
                self.channels[channel] = trio.Event()
        self._proven = False
        broken = ""
        try:
            async with self._servers.subscription(self.part) as subscription:
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
            if self._astray:
                await self._look_for_the_astray()
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

    async def _look_for_the_astray(self) -> None:
        """Find out where they are. Those that are here after all are asked for again."""
        astray, self._astray = self._astray, set()
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
            if channel in self.channels and self._told.heard(channel, data):
                self._stirred.add(channel)
        elif kind == "subscribe":
            self._confirm(channel)
        elif kind == "unsubscribe":
            if channel in self._sent and channel not in self._unconfirmed:  # nobody has asked for that
                self._go_astray(channel)
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
                self._go_astray(channel)
                self._lot.unpark_all()
                return

    def _go_astray(self, channel: str) -> None:
        self._astray.add(channel)
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
