"""Wake-ups through Redis: one subscription connection per process and part, each with a task of its own.

In a cluster a channel is on a slot, and only the nodes that have the slot tell of it. When slots come to another node
their channels come to its listener, and their runs are looked up there once Redis has confirmed it.
"""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Final

import trio

from penstock.errors import LogUnavailable
from penstock.groups import raise_bare
from penstock.log import News
from penstock.log.redis.listener import Listener

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from penstock.log.redis.records import Keys
    from penstock.log.redis.servers import Servers

MAX_SEQ_DIGITS: Final = 16
"""The most digits of a seq; what else is published on a run's channel is none of ours."""


class RedisWakeups:
    """The wake-ups of one supervisor. Made by `open_wakeups`."""

    def __init__(self, servers: Servers, keys: Keys, owner: str, nursery: trio.Nursery) -> None:
        self._servers = servers
        self._keys = keys
        self._process = keys.process(owner)
        self._nursery = nursery
        self._listeners: dict[str, Listener] = {}
        self._channels: dict[str, Listener] = {}
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
            listener = self._channels[channel] = self._listener(self._servers.part(channel))
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

    async def wait(self) -> News:
        """All that there is to tell, as soon as there is anything. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while not (self._moved or self._cancel or self._reconnected):
            await self._lot.park()
        news = News(self._moved, self._cancel, self._reconnected)
        self._moved, self._cancel, self._reconnected = {}, False, False
        return news

    def _listener(self, part: str) -> Listener:
        if part not in self._listeners:
            listener = self._listeners[part] = Listener(self._servers, part, self)
            self._nursery.start_soon(listener.run)
        return self._listeners[part]

    def rearrange(self) -> None:
        """Keys have come to other parts: listen to their channels there."""
        for channel, listener in self._channels.items():
            part = self._servers.part(channel)
            if part != listener.part and (confirmed := listener.leave(channel)) is not None:
                self._channels[channel] = self._listener(part)
                self._channels[channel].adopt(channel, confirmed)
        for part, listener in [*self._listeners.items()]:
            if not listener.channels and part not in self._servers.parts():
                del self._listeners[part]
                listener.scope.cancel(reason="the node is no primary any more")

    # What a listener tells

    def heard(self, channel: str, data: bytes) -> bool:
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
    servers: Servers, keys: Keys, check: Callable[[], Awaitable[None]], owner: str
) -> AsyncIterator[RedisWakeups]:
    """The wake-ups of the supervisor named `owner`, for as long as the block lasts.

    Raises:
        LogUnavailable: Redis cannot be reached to begin with, or takes no writes. (In a cluster the node may be away
            that would tell of cancel requests: they are looked for, too.)
    """
    await check()
    try:
        async with trio.open_nursery() as nursery:
            wakeups = RedisWakeups(servers, keys, owner, nursery)
            unwatch = servers.watch(wakeups.rearrange)
            try:
                await wakeups.listen(keys.process(owner), may_fail=servers.clustered)
                yield wakeups
            finally:
                unwatch()
            nursery.cancel_scope.cancel(reason="the supervisor has ended")
    except BaseExceptionGroup as group:
        raise_bare(group, trio.Cancelled)
