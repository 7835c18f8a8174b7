"""What the log needs of Redis: of one server (`client.py`), or of the nodes of a cluster (`cluster.py`).

A *part* is what may be out of reach on its own: a node of a cluster; of one server there is one, with the name "".

The turns of requests: thousands of readers and callers on a few connections to each part.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from penstock.errors import LogUnavailable
from penstock.log.redis.client import ANSWER_TIMEOUT
from penstock.log.redis.slots import key_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Sequence
    from contextlib import AbstractAsyncContextManager

    from penstock.log.redis.client import Subscription

Command = tuple[Any, ...]
"""A command and its arguments."""


class Backend(Protocol):
    """One Redis, or the nodes of a cluster."""

    @property
    def address(self) -> str:
        """Where it is, without any password."""

    @property
    def clustered(self) -> bool:
        """Keys are on slots, slots on nodes: a command has keys of one slot, and messages are published on theirs."""

    def shard(self, key: str) -> str:
        """The part that has this key or channel, as far as is known. Never blocks."""

    def shards(self) -> Collection[str]:
        """All parts, as far as is known; at least one."""

    async def learn(self) -> None:
        """See to it that it is known which parts there are.

        Raises:
            LogUnavailable: none of them says so.
        """

    def is_moving(self, key: str) -> bool:
        """Whether this key may be on its way to another part at the moment. Never blocks."""

    def here_since(self, key: str) -> float:
        """When this key came to its part, by Trio's clock; long ago, if nobody has seen it come. Never blocks."""

    def watch(self, moved: Callable[[], None]) -> Callable[[], None]:
        """Have `moved` called whenever keys have come to another part, until what is returned is called."""

    def doubt(self) -> None:
        """Somebody has seen a sign that keys are on another part than is known: look. Never blocks."""

    async def execute(
        self, commands: Sequence[Command], *, replicated: bool = False, wait_for_migration: bool = False
    ) -> list[Any]:
        """Send commands, in as few round trips as is good for others; their replies, in order.

        Each part's commands reach it in their order. A command that was refused has its exception as its reply:
        `LogFull`, or a `redis.exceptions.ResponseError`. In a cluster it may be `LogUnavailable`: its node is away, and
        others are not, or its keys are on their way from node to node.

        Args:
            commands: what to send.
            replicated: return when as many replicas have it as `open_log` was told to wait for.
            wait_for_migration: in a cluster, wait for keys that are being moved from one node to another; else
                what is about them is `LogUnavailable` sooner, so that nothing waits for it.

        Raises:
            LogUnavailable: no part of it could be reached, answered in time, or was in a state to.
        """

    async def in_stages(self, *stages: Sequence[Command]) -> list[Any]:
        """`execute`, `kept` and `patient`, with what is in a later stage done after what is in an earlier one.

        Raises:
            LogUnavailable: as for `execute`, and if anything of an earlier stage could not be done.
        """

    async def ask(self, *command: Any, replicated: bool = False) -> Any:
        """Send one command; its reply.

        Raises:
            LogUnavailable: as for `execute`, and also if the command was refused.
        """

    async def best_effort(self, commands: Sequence[Command]) -> None:
        """Send what is good to have, of any part, without keeping the caller waiting for a part that is away.

        Raises:
            LogUnavailable: there is one part, and it cannot be reached.
        """

    def subscription(self, shard: str) -> AbstractAsyncContextManager[Subscription]:
        """A connection of its own to this part, which listens to channels."""


SEVERAL: Final = "several"
"""Stands for the part of requests that are about several."""


class RequestLimiter:
    """Commands for readers and callers, of whom there may be thousands: they take turns on a few connections.

    Each part has turns of its own, so that nobody waits behind those who wait for a part that is away.

    Args:
        servers: the way to Redis.
        at_once: the most that are under way to one part.
    """

    def __init__(self, servers: Backend, at_once: int) -> None:
        self._servers = servers
        self._at_once = at_once
        self._turns: dict[str, trio.CapacityLimiter] = {}

    async def execute(self, commands: Sequence[Command], *, replicated: bool = False) -> list[Any]:
        """`Backend.execute`, when it is this request's turn.

        Raises:
            LogUnavailable: as there, and also if its turn does not come within `ANSWER_TIMEOUT`.
        """
        async with self.slot(*map(key_of, commands)) as servers:
            return await servers.execute(commands, replicated=replicated, wait_for_migration=True)

    async def ask(self, *command: Any, replicated: bool = False) -> Any:
        """`Backend.ask`, when it is this request's turn.

        Raises:
            LogUnavailable: as there, and also if its turn does not come within `ANSWER_TIMEOUT`.
        """
        async with self.slot(key_of(command)) as servers:
            return await servers.ask(*command, replicated=replicated)

    @asynccontextmanager
    async def slot(self, *keys: str) -> AsyncIterator[Backend]:
        """The way to Redis, for as long as it is this request's turn at the part that has the keys.

        Requests of several parts have turns of their own: they may wait for each of them.

        Raises:
            LogUnavailable: its turn does not come within `ANSWER_TIMEOUT`.
        """
        shards = {self._servers.shard(key) for key in keys}
        shard = shards.pop() if len(shards) == 1 else SEVERAL
        if shard not in self._turns:
            self._turns = {shard: turns for shard, turns in self._turns.items() if turns.statistics().borrowed_tokens}
            self._turns[shard] = trio.CapacityLimiter(self._at_once)
        turns = self._turns[shard]
        with trio.move_on_after(ANSWER_TIMEOUT) as waiting:
            await turns.acquire()
        if waiting.cancelled_caught:
            words = f"has not come to a request for {ANSWER_TIMEOUT:g} s"
            raise LogUnavailable(f"Redis at {self._servers.address} {words}")
        try:
            yield self._servers
        finally:
            turns.release()
