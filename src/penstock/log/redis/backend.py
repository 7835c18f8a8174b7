"""What the log needs of Redis: a way to send commands, and the shard on which each key is.

`Backend` sends commands; it is a `Client` (one server) or a `Cluster`. `Topology` says where keys are; it is
`SingleServer` or a `ClusterTopology`. A *shard* is what may be unreachable alone: a node of a cluster, named by its
address; the shard of a single server is named "".
"""

from __future__ import annotations

import sys
from contextlib import asynccontextmanager
from math import inf
from typing import TYPE_CHECKING, Any, Final, Protocol

import trio

from penstock.errors import LogUnavailable
from penstock.log.redis.slots import key_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Sequence
    from contextlib import AbstractAsyncContextManager

    from penstock.log.redis.client import Subscription
    from penstock.log.redis.slots import Command

# Read as `backend.ANSWER_TIMEOUT` everywhere, so that one assignment changes it for all.
ANSWER_TIMEOUT: Final = 5.0  # seconds without a reply after which Redis counts as unreachable


class Backend(Protocol):
    """One Redis, or the nodes of a cluster."""

    @property
    def address(self) -> str:
        """Where it is, without any password."""

    async def execute(
        self, commands: Sequence[Command], *, replicated: bool = False, wait_for_migration: bool = False
    ) -> list[Any]:
        """Send commands in round trips of a limited size; their replies, in order.

        Each shard's commands reach it in their order. The reply to a refused command is an exception: `LogFull`, or a
        `redis.exceptions.ResponseError`. In a cluster it may be `LogUnavailable`: its node is unreachable while others
        are not, or its keys are being moved to another node; with `wait_for_migration` that is waited for, which
        holds up the other commands. With `replicated` it returns when the replicas have it that `open_log` wants.

        Raises:
            LogUnavailable: no shard concerned could be reached, answered in time, or could serve.
        """

    async def in_stages(self, *stages: Sequence[Command]) -> list[Any]:
        """`execute` with `replicated` and `wait_for_migration`; each stage begins when the one before is done.

        An unreachable shard in an earlier stage raises `LogUnavailable`.
        """

    async def ask(self, *command: Any, replicated: bool = False) -> Any:
        """`execute` for one command; its reply. A refusal raises `LogUnavailable`, too."""

    async def best_effort(self, commands: Sequence[Command]) -> None:
        """Send commands whose effect the log can do without; an unreachable node does not hold up the caller."""

    def subscription(self, shard: str) -> AbstractAsyncContextManager[Subscription]:
        """Open a connection to this shard that listens to channels."""


class Topology(Protocol):
    """Where keys are, as far as is known. No method but `learn` blocks."""

    @property
    def is_cluster(self) -> bool:
        """Whether the keys around a run (lists, inboxes) may be on other servers, with clocks of their own."""

    @property
    def publish_command(self) -> str:
        """The command that publishes a message."""

    @property
    def renewal_batch(self) -> int:
        """The most leases that one command may renew."""

    def shard(self, key: str) -> str:
        """The shard that has this key or channel."""

    def shards(self) -> Collection[str]:
        """All shards; at least one."""

    async def learn(self) -> None:
        """Find out which shards there are, unless that is known; `LogUnavailable` if no node says so."""

    def is_moving(self, key: str) -> bool:
        """Whether this key may be on its way to another shard."""

    def here_since(self, key: str) -> float:
        """When this key came to its shard, by Trio's clock; minus infinity if that was not seen."""

    def watch(self, moved: Callable[[], None]) -> Callable[[], None]:
        """Call `moved` whenever keys have come to another shard, until what is returned is called."""

    def doubt(self) -> None:
        """Note a sign that keys are on another shard than is known: find out soon."""


class SingleServer:
    """The topology of one server: one shard, on which all keys stay."""

    is_cluster = False
    publish_command = "PUBLISH"
    renewal_batch = sys.maxsize

    def shard(self, key: str) -> str:  # noqa: ARG002
        return ""

    def shards(self) -> Collection[str]:
        return ("",)

    async def learn(self) -> None:
        pass

    def is_moving(self, key: str) -> bool:  # noqa: ARG002
        return False

    def here_since(self, key: str) -> float:  # noqa: ARG002
        return -inf

    def watch(self, moved: Callable[[], None]) -> Callable[[], None]:  # noqa: ARG002
        return lambda: None

    def doubt(self) -> None:
        pass


_SEVERAL: Final = "several"  # stands for the shard of a request that concerns several


class RequestLimiter:
    """At most `at_once` requests of readers and callers are under way to each shard, over as many connections.

    No request waits behind those to another shard. It raises `LogUnavailable` after `ANSWER_TIMEOUT` without a slot.
    """

    def __init__(self, backend: Backend, topology: Topology, at_once: int) -> None:
        self._backend = backend
        self._topology = topology
        self._at_once = at_once
        self._slots: dict[str, trio.CapacityLimiter] = {}

    async def execute(self, commands: Sequence[Command], *, replicated: bool = False) -> list[Any]:
        async with self.slot(*map(key_of, commands)):
            return await self._backend.execute(commands, replicated=replicated, wait_for_migration=True)

    async def ask(self, *command: Any, replicated: bool = False) -> Any:
        async with self.slot(key_of(command)):
            return await self._backend.ask(*command, replicated=replicated)

    @asynccontextmanager
    async def slot(self, *keys: str) -> AsyncIterator[None]:
        """Hold a slot of the shard that has the keys. Requests to several shards have slots of their own."""
        shards = {self._topology.shard(key) for key in keys}
        shard = shards.pop() if len(shards) == 1 else _SEVERAL
        if shard not in self._slots:
            self._slots = {shard: slots for shard, slots in self._slots.items() if slots.statistics().borrowed_tokens}
            self._slots[shard] = trio.CapacityLimiter(self._at_once)
        slots = self._slots[shard]
        with trio.move_on_after(ANSWER_TIMEOUT) as waiting:
            await slots.acquire()
        if waiting.cancelled_caught:
            raise LogUnavailable(f"Redis at {self._backend.address} has not come to a request for {ANSWER_TIMEOUT:g} s")
        try:
            yield
        finally:
            slots.release()
