"""What the nodes of a cluster reply that is no answer: where to go, or what is wrong with them. Pure functions.

A cluster of Redis: its nodes, each with a client of its own, and which of them has what.

redis-py's cluster client sends what it is given to all nodes at once and waits for the slowest. Here a node that is
away holds up what is on it, and nothing else: whoever sends commands for one node waits for that node alone.

| a node answers | |
|---|---|
| `MOVED` | the slot is another's: there, at once |
| `ASK` | the slot is on its way, and this key is there already: there, once |
| `TRYAGAIN` | some of the keys are here, some there: again, a `PAUSE` later, if somebody waits for that alone |
| `CLUSTERDOWN`, nothing, or no connection | it is away: what was for it is `LogUnavailable` |

The others are asked whose slots are when one is away, or has not answered for `SLOW`. What is under way to a node that
is no primary any more then is sent to the one that has taken its place.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from random import sample
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio
from redis import exceptions

from penstock.errors import LogUnavailable
from penstock.exception_groups import raise_single
from penstock.log.redis import urls as addresses
from penstock.log.redis.client import CLOSING, answer, client_at, open_loop
from penstock.log.redis.errors import classify, is_away, unavailable, words_of
from penstock.log.redis.slots import NOWHERE, Slots, key_of, slot_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Sequence

    from penstock.log.redis.backend import Command
    from penstock.log.redis.client import Client, Subscription
    from penstock.log.redis.urls import Addresses

Place = tuple[str, int]
"""Host and port."""


class Unreachable(LogUnavailable):
    """A node has not answered, or would answer so whatever it is asked."""


STALE_NODE: Final = LogUnavailable("the node is no primary any more")
"""The reply of a node that has been replaced meanwhile."""
_REDIRECTIONS: Final = (exceptions.AskError, exceptions.TryAgainError)
"""These say where to go, not what is wrong (`MovedError` is an `AskError`)."""


class Redirected(NamedTuple):
    """Commands that are to be sent again.

    Attributes:
        left: their numbers.
        asks: which of them to a node that is to be told that it is `ASKING`.
        moved: slots that have come to another node, for good.
        wait: some of their keys are on their way.
    """

    left: list[int]
    asks: dict[int, Place]
    moved: list[tuple[int, Place]]
    wait: bool


def classify_at(reply: Any, place: Place, address: str) -> Any:
    """A reply as it is to be taken that came from a node: what is wrong with it is `LogUnavailable`, not raised."""
    if isinstance(reply, exceptions.AskError) and reply.host in {"", "?"}:
        reply.host = place[0]  # it does not know its own
    if not isinstance(reply, exceptions.ResponseError) or isinstance(reply, _REDIRECTIONS) or _is_away_from(reply):
        return reply
    if isinstance(reply, exceptions.ClusterDownError) and "slot not served" in words_of(reply):
        return unavailable(reply, address)
    try:
        return classify(reply, address)
    except LogUnavailable as error:
        return Unreachable(str(error))


def redirected(commands: Sequence[Command], numbers: Sequence[int], replies: Sequence[Any]) -> Redirected:
    """Which of these commands are to be sent again.

    What comes after one that is, on the same slot, is sent again after it: it may have counted on it.
    """
    found = Redirected([], {}, [], any(map(_is_on_its_way, (replies[n] for n in numbers))))
    slots: set[int] = set()
    for n in numbers:
        reply, slot = replies[n], slot_of(key_of(commands[n]))
        if isinstance(reply, exceptions.MovedError):
            found.moved.append((reply.slot_id, (reply.host, reply.port)))
        elif isinstance(reply, exceptions.AskError):
            found.asks[n] = (reply.host, reply.port)
        elif not _is_on_its_way(reply) and reply is not STALE_NODE and slot not in slots:
            continue
        found.left.append(n)
        slots.add(slot)
    return found


def _is_on_its_way(reply: Any) -> bool:
    return isinstance(reply, exceptions.TryAgainError) or _is_away_from(reply)


def _is_away_from(reply: Any) -> bool:
    """A key has moved away under a script."""
    return isinstance(reply, exceptions.ResponseError) and "non local key" in words_of(reply)


SLOW: Final = 1.0
"""A node that has not answered for so many seconds may have been replaced; so long may one say nothing of slots."""
ASK_PAUSE: Final = 0.25
"""Seconds between two such questions."""
PAUSE: Final = 0.02
"""Seconds until a command is sent again whose keys are on their way to another node."""
PATIENCE: Final = 2.0
"""For how many seconds commands are sent again that are said to belong elsewhere."""
HASTE: Final = 0.5
"""The same where others wait for them, and not at all if it is only a matter of waiting."""
MOVING: Final = 1.0
"""For so many seconds after a word to that effect a slot counts as being moved."""


class _Node:
    """A primary, and what is under way to it."""

    def __init__(self, place: tuple[str, int], client: Client) -> None:
        self.place = place
        self.client = client
        self.away = False
        """It could not be reached the last time."""
        self.under_way: dict[trio.CancelScope, float] = {}
        """... and since when."""


class Cluster:
    """Commands to the nodes of a cluster. Made by `open_cluster`."""

    clustered = True

    def __init__(self, there: Addresses, make: Callable[[tuple[str, int]], Client]) -> None:
        self.address = there.label
        """Where the cluster is, without any password."""
        self._hosts = there.hosts
        self._make = make
        self._slots = Slots()
        self._nodes: dict[str, _Node] = {}
        self._on_moved: list[Callable[[], None]] = []
        self._asking = trio.Lock()
        self._asked = 0
        """How often the slots have been asked for."""
        self._doubt = trio.Event()
        self._asked_at: dict[int, float] = {}
        """When a node last said of a slot that keys of it are elsewhere already."""
        self._beside: dict[str, dict[Command, None]] = {}
        """What is to be sent to each part when it can be; there is a task for each that has any."""
        self.nursery: trio.Nursery | None = None
        """Where these tasks are, while the cluster is open."""

    def shard(self, key: str) -> str:
        """The address of the node that has this key, or "" if none is known to."""
        return self._slots.owner(key)

    def shards(self) -> Collection[str]:
        """The addresses of the primaries, those that answer first; "" alone while none is known."""
        return sorted(self._slots.primaries, key=lambda shard: shard in self._nodes and self._nodes[shard].away) or (
            NOWHERE,
        )

    def watch(self, moved: Callable[[], None]) -> Callable[[], None]:
        """Have `moved` called whenever slots have come to another node, until what is returned is called."""
        self._on_moved.append(moved)
        return lambda: self._on_moved.remove(moved)

    def is_moving(self, key: str) -> bool:
        """See `Backend.is_moving`."""
        at = self._asked_at.get(slot_of(key))
        if at is not None and trio.current_time() - at > MOVING:
            del self._asked_at[slot_of(key)]
            return False
        return at is not None

    def here_since(self, key: str) -> float:
        """See `Backend.here_since`."""
        return self._slots.since[slot_of(key)]

    def doubt(self) -> None:
        """Ask whose slots are, soon."""
        self._doubt.set()

    async def execute(
        self, commands: Sequence[Command], *, replicated: bool = False, wait_for_migration: bool = False
    ) -> list[Any]:
        """See `Backend.execute`. The commands for several nodes are sent at the same time."""
        if not commands:
            await trio.lowlevel.checkpoint()
            return []
        await self.learn()
        replies: list[Any] = [None] * len(commands)
        again = await self._round(commands, [*range(len(commands))], {}, replies, kept=replicated)
        with trio.move_on_after(PATIENCE if wait_for_migration else HASTE):
            while again.left and (wait_for_migration or not again.wait):
                await trio.sleep(PAUSE if again.wait else 0)
                again = await self._round(commands, again.left, again.asks, replies, kept=replicated)
        for n in again.left:
            replies[n] = LogUnavailable(f"Redis at {self.address} is moving what a command is about: {replies[n]}")
        if all(isinstance(reply, Unreachable) for reply in replies):
            raise LogUnavailable(str(replies[0]))
        return replies

    async def in_stages(self, *stages: Sequence[Command]) -> list[Any]:
        """See `Backend.in_stages`: nodes do not wait for each other, so each stage waits for the one before."""
        replies: list[Any] = []
        for stage in stages:
            for reply in replies:
                if is_away(reply):
                    raise reply
            replies += await self.execute(stage, replicated=True, wait_for_migration=True)
        return replies

    async def ask(self, *command: Any, replicated: bool = False) -> Any:
        """See `Backend.ask`."""
        (reply,) = await self.execute([command], replicated=replicated, wait_for_migration=True)
        return answer(reply, self.address)

    async def best_effort(self, commands: Sequence[Command]) -> None:
        """Send these in the background; what cannot be done is forgotten."""
        await trio.lowlevel.checkpoint()
        for command in commands:
            shard = self.shard(key_of(command))
            if shard not in self._beside:
                self._beside[shard] = {}
                if self.nursery is not None:
                    self.nursery.start_soon(self._send_best_effort, shard)
            self._beside[shard][command] = None

    @asynccontextmanager
    async def subscription(self, shard: str) -> AsyncIterator[Subscription]:
        """A connection to a node, for the channels of its slots.

        Raises:
            LogUnavailable: it is no primary any more.
        """
        place = self._slots.primaries.get(shard)
        if place is None:
            self.doubt()
            raise LogUnavailable(f"no node of the cluster at {self.address} has the slot")
        async with self._node(place).client.subscription() as subscription:
            yield subscription

    async def aclose(self) -> None:
        """Close all connections. It has a shield with a deadline."""
        nodes, self._nodes = self._nodes, {}
        with trio.move_on_after(CLOSING, shield=True):
            async with trio.open_nursery() as nursery:
                for node in nodes.values():
                    nursery.start_soon(node.client.aclose)

    # Where things are

    async def learn(self) -> None:
        """See `Backend.learn`."""
        if not self._slots.primaries:
            await self._ask_whose(self._asked)

    def _node(self, place: tuple[str, int]) -> _Node:
        address = addresses.address_of(*place)
        if address not in self._nodes:
            self._nodes[address] = _Node(place, self._make(place))
        return self._nodes[address]

    async def _ask_whose(self, asked: int) -> None:
        """Ask the cluster whose slots are, unless that has been done since the `asked`th time.

        Raises:
            LogUnavailable: none of the nodes that are known says so.
        """
        async with self._asking:
            if self._asked != asked:
                return
            primaries = sample([*self._slots.primaries.values()], len(self._slots.primaries))
            trouble = LogUnavailable(f"none of the nodes of the cluster at {self.address} answers")
            for place in [*sorted(primaries, key=self._is_away), *self._slots.replicas, *self._hosts]:
                try:
                    news = self._slots.replace(await self._slots_by(place), place[0], now=trio.current_time())
                except LogUnavailable as error:
                    trouble = error
                except ValueError as error:
                    trouble = LogUnavailable(f"Redis at {addresses.address_of(*place)}: {error}")
                else:
                    self._asked += 1
                    if news:
                        await self._moved()
                    return
            raise trouble

    def _is_away(self, place: tuple[str, int]) -> bool:
        node = self._nodes.get(addresses.address_of(*place))
        return node is not None and (node.away or bool(node.under_way))

    async def _slots_by(self, place: tuple[str, int]) -> Sequence[Any]:
        """What a node says whose slots are."""
        node = self._nodes.get(addresses.address_of(*place))
        client = self._make(place) if node is None else node.client
        try:
            with trio.fail_after(SLOW):
                said: Sequence[Any] = await client.ask("CLUSTER SLOTS")
                return said
        except trio.TooSlowError:
            raise LogUnavailable(f"Redis at {client.address} has not answered for {SLOW:g} s") from None
        finally:
            if node is None:
                await client.aclose()  # noqa: ASYNC102  (it has a shield with a deadline)

    async def _moved(self) -> None:
        """Tell who has asked for it, and leave the nodes that are no primaries any more."""
        gone = [address for address in self._nodes if address not in self._slots.primaries]
        left = [self._nodes.pop(address) for address in gone]
        for node in left:
            for scope in node.under_way:
                scope.cancel(reason="the node is no primary any more")
        self._tell()
        for node in left:
            await node.client.aclose()

    def _tell(self) -> None:
        for moved in [*self._on_moved]:
            moved()

    @trio.lowlevel.enable_ki_protection
    async def keep_up(self) -> None:
        """Ask whose slots are when there is a doubt, until cancelled."""
        while True:
            with trio.move_on_after(SLOW):
                await self._doubt.wait()
            if self._doubt.is_set() or self._is_slow():
                self._doubt = trio.Event()
                with suppress(LogUnavailable):  # whoever sends something hears of it
                    await self._ask_whose(self._asked)
                await trio.sleep(ASK_PAUSE)

    def _is_slow(self) -> bool:
        since = min((began for node in self._nodes.values() for began in node.under_way.values()), default=None)
        return since is not None and trio.current_time() - since >= SLOW

    @trio.lowlevel.enable_ki_protection
    async def _send_best_effort(self, shard: str) -> None:
        """Send what was left for it, and what is left meanwhile."""
        while commands := [*self._beside[shard]]:
            self._beside[shard] = {}
            with suppress(LogUnavailable):  # it was good to have, no more
                await self.execute(commands)
        del self._beside[shard]

    # Sending

    async def _round(
        self,
        commands: Sequence[Command],
        numbers: Sequence[int],
        asks: dict[int, tuple[str, int]],
        replies: list[Any],
        *,
        kept: bool,
    ) -> Redirected:
        """Send these commands to their nodes, and put the replies where they belong; which are to be sent again."""
        by_node: dict[tuple[_Node | None, bool], list[int]] = {}
        for n in numbers:
            place = asks.get(n) or self._slots.primaries.get(self._slots.owner(key_of(commands[n])))
            by_node.setdefault((place and self._node(place), n in asks), []).append(n)

        async def one(node: _Node | None, asking: bool, ns: list[int]) -> None:
            sent = [commands[n] for n in ns]
            for n, reply in zip(ns, await self._at(node, sent, asking=asking, kept=kept), strict=True):
                replies[n] = reply

        if len(by_node) == 1:
            ((node, asking), ns) = next(iter(by_node.items()))
            await one(node, asking, ns)
        else:
            async with trio.open_nursery() as nursery:
                for (node, asking), ns in by_node.items():
                    nursery.start_soon(one, node, asking, ns)
        again = redirected(commands, numbers, replies)
        now = trio.current_time()
        self._asked_at.update((slot_of(key_of(commands[n])), now) for n in again.asks)
        news = [slot for slot, place in again.moved if self._slots.moved(slot, *place, now=now)]
        if news:
            self.doubt()
            self._tell()
        return again

    async def _at(self, node: _Node | None, commands: Sequence[Command], *, asking: bool, kept: bool) -> Sequence[Any]:
        """The replies of one node; what is wrong with the node is the reply to each."""
        if node is None:
            self.doubt()
            await trio.lowlevel.checkpoint()
            return [Unreachable(f"no node of the cluster at {self.address} has the slot")] * len(commands)
        sent = [each for command in commands for each in (("ASKING",), command)] if asking else commands
        replies: Sequence[Any] = [STALE_NODE] * len(commands)
        if self._nodes.get(node.client.address) is not node:  # its connections have been closed
            await trio.lowlevel.checkpoint()
            return replies
        with trio.CancelScope() as scope:
            node.under_way[scope] = began = trio.current_time()
            away = True
            try:
                replies = await node.client.replies(sent, replicated=kept)
                replies = replies[1::2] if asking else replies
                away = False
            except LogUnavailable as error:
                self.doubt()
                replies = [Unreachable(str(error))] * len(commands)
            finally:
                del node.under_way[scope]
                if not away or replies[0] is not STALE_NODE or trio.current_time() - began >= SLOW:
                    node.away = away
        replies = [classify_at(reply, node.place, node.client.address) for reply in replies]
        if any(map(is_away, replies)):
            self.doubt()
        return replies


@asynccontextmanager
async def open_cluster(url: str, *, wait_replicas: int = 0) -> AsyncIterator[Cluster]:
    """The way to a cluster for as long as the block lasts; it is looked at when it is needed.

    Args:
        url: `redis+cluster://` or `rediss+cluster://`.
        wait_replicas: how many replicas of a node are to have what is sent as `kept`.

    Raises:
        ConfigurationError: the URL cannot be read.
    """
    there = addresses.cluster(url)
    async with open_loop() as loop:
        client_at(there.hosts[0], there.options, loop)  # not connected, but it knows what it cannot be made of
        cluster = Cluster(there, lambda place: client_at(place, there.options, loop, wait_replicas=wait_replicas))
        try:
            async with trio.open_nursery() as cluster.nursery:
                cluster.nursery.start_soon(cluster.keep_up)
                yield cluster
                cluster.nursery.cancel_scope.cancel(reason="the cluster is left")
        except BaseExceptionGroup as group:
            raise_single(group, trio.Cancelled)  # the nursery is nothing that a caller should see
        finally:
            await cluster.aclose()  # noqa: ASYNC102  (it has a shield with a deadline)
