"""A cluster of Redis: which node has which keys (`ClusterTopology`), and commands to the nodes (`Cluster`).

An unreachable node holds up what is on it, and nothing else (redis-py's cluster client waits for the slowest of all).
After `MOVED` and `ASK` a command is sent to the node that is named; after `TRYAGAIN`, when some of its keys have moved,
to the same one after a pause, if the caller waits for that. When a node is unreachable or slow, others are asked which
node has which slots; commands under way to a node that is no primary any more are sent to the one in its place.
"""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from random import sample
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio
from redis import exceptions

from penstock.errors import LogUnavailable
from penstock.exception_groups import open_nursery
from penstock.log.redis import urls
from penstock.log.redis.client import CLOSE_TIMEOUT, client_of_node, open_loop
from penstock.log.redis.errors import checked, classify, is_away, message_of, unavailable
from penstock.log.redis.slots import NO_SHARD, Slots, key_of, slot_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence

    from penstock.log.redis.client import Client, Subscription
    from penstock.log.redis.slots import Command, Place
    from penstock.log.redis.urls import ParsedUrl

SUSPECT_AFTER: Final = 1.0
"""Seconds without an answer after which a node may have been replaced; and those that a reply about slots may take."""
LEARN_PAUSE: Final = 0.25  # seconds between two questions which node has which slots
MIGRATION_PAUSE: Final = 0.02  # seconds until a command is sent again whose keys are on their way to another node
MIGRATION_LIMIT: Final = 2.0  # seconds for which the commands of a caller that waits for migrations are sent again
REDIRECTION_LIMIT: Final = 0.5
"""Seconds for which other commands (commits, fetches) are sent again; these do not wait for a migration."""
MOVING_FOR: Final = 1.0  # seconds for which a slot counts as moving after a node has said so


class Unreachable(LogUnavailable):
    """A node has not answered, or would refuse any command."""


STALE_NODE: Final = LogUnavailable("the node is no primary any more")
"""The reply of a node that has been replaced meanwhile."""
_REDIRECTIONS: Final = (exceptions.AskError, exceptions.TryAgainError)
"""These say where to go, not what is wrong (`MovedError` is an `AskError`)."""


class Redirected(NamedTuple):
    """Commands that must be sent again, by their numbers."""

    numbers: list[int]
    asks: dict[int, Place]  # the node for each that must be preceded by `ASKING`
    moved: list[tuple[int, Place]]  # slots that have moved to another node, for good
    wait: bool  # some of their keys are on their way


def classify_at(reply: Any, place: Place, address: str) -> Any:
    """The reply of a node, classified: what is wrong with the node is returned as `LogUnavailable`, not raised."""
    if isinstance(reply, exceptions.AskError) and reply.host in {"", "?"}:
        reply.host = place[0]  # the node does not know its own host
    if not isinstance(reply, exceptions.ResponseError) or isinstance(reply, _REDIRECTIONS) or _has_left(reply):
        return reply
    if isinstance(reply, exceptions.ClusterDownError) and "slot not served" in message_of(reply):
        return unavailable(reply, address)
    try:
        return classify(reply, address)
    except LogUnavailable as error:
        return Unreachable(str(error))


def redirected(commands: Sequence[Command], numbers: Sequence[int], replies: Sequence[Any]) -> Redirected:
    """Which of these commands must be sent again; also each that follows one on its slot, and so may depend on it."""
    found = Redirected([], {}, [], any(_is_in_migration(replies[n]) for n in numbers))
    slots: set[int] = set()
    for n in numbers:
        reply, slot = replies[n], slot_of(key_of(commands[n]))
        if isinstance(reply, exceptions.MovedError):
            found.moved.append((reply.slot_id, (reply.host, reply.port)))
        elif isinstance(reply, exceptions.AskError):
            found.asks[n] = (reply.host, reply.port)
        elif not _is_in_migration(reply) and reply is not STALE_NODE and slot not in slots:
            continue
        found.numbers.append(n)
        slots.add(slot)
    return found


def _is_in_migration(reply: Any) -> bool:
    return isinstance(reply, exceptions.TryAgainError) or _has_left(reply)


def _has_left(reply: Any) -> bool:
    """Whether a key has moved away while a script was using it."""
    return isinstance(reply, exceptions.ResponseError) and "non local key" in message_of(reply)


class Node:
    """A primary: its client, whether it was unreachable the last time, and the requests under way since when."""

    def __init__(self, place: Place, client: Client) -> None:
        self.place = place
        self.client = client
        self.away = False
        self.under_way: dict[trio.CancelScope, float] = {}

    async def send(self, commands: Sequence[Command], *, asking: bool, replicated: bool) -> Sequence[Any]:
        """The replies to commands; what is wrong with the node is the reply to each."""
        sent = [each for command in commands for each in (("ASKING",), command)] if asking else commands
        replies: Sequence[Any] = [STALE_NODE] * len(commands)
        with trio.CancelScope() as scope:  # cancelled when the node is replaced
            self.under_way[scope] = began = trio.current_time()
            away = True
            try:
                replies = await self.client.replies(sent, replicated=replicated)
                replies = replies[1::2] if asking else replies
                away = False
            except LogUnavailable as error:
                replies = [Unreachable(str(error))] * len(commands)
            finally:
                del self.under_way[scope]
                if not away or replies[0] is not STALE_NODE or trio.current_time() - began >= SUSPECT_AFTER:
                    self.away = away
        return [classify_at(reply, self.place, self.client.address) for reply in replies]


class ClusterTopology:
    """The nodes of a cluster, of which the URL names some, and which of them has which keys. A `Topology`."""

    is_cluster = True
    publish_command = "SPUBLISH"
    # A renewal concerns one run, so that none waits for the migration of another.
    renewal_batch = 1

    def __init__(self, parsed: ParsedUrl, make: Callable[[Place], Client]) -> None:
        self.address = parsed.label
        self._hosts = parsed.hosts
        self._make = make
        self._slots = Slots()
        self._nodes: dict[str, Node] = {}
        self._on_moved: list[Callable[[], None]] = []
        self._learning = trio.Lock()
        self._learned = 0  # how often the slots have been learned
        self._doubt = trio.Event()
        self._asked_at: dict[int, float] = {}
        """When a node last said of a slot that some of its keys have moved already."""

    def shard(self, key: str) -> str:
        return self._slots.owner(key)

    def shards(self) -> Collection[str]:
        """The addresses of the primaries, reachable ones first; "" alone while none is known."""
        return sorted(self._slots.primaries, key=lambda shard: shard in self._nodes and self._nodes[shard].away) or (
            NO_SHARD,
        )

    def watch(self, moved: Callable[[], None]) -> Callable[[], None]:
        self._on_moved.append(moved)
        return lambda: self._on_moved.remove(moved)

    def is_moving(self, key: str) -> bool:
        at = self._asked_at.get(slot_of(key))
        if at is not None and trio.current_time() - at > MOVING_FOR:
            del self._asked_at[slot_of(key)]
            return False
        return at is not None

    def here_since(self, key: str) -> float:
        return self._slots.since[slot_of(key)]

    def doubt(self) -> None:
        self._doubt.set()

    async def learn(self) -> None:
        if not self._slots.primaries:
            await self._ask_for_slots(self._learned)

    # Nodes

    def node_at(self, place: Place) -> Node:
        """The node at a place; its client is made at the first call."""
        address = urls.address_of(*place)
        if address not in self._nodes:
            self._nodes[address] = Node(place, self._make(place))
        return self._nodes[address]

    def node_of(self, shard: str) -> Node | None:
        place = self._slots.primaries.get(shard)
        return place and self.node_at(place)

    def is_current(self, node: Node) -> bool:
        """False after the node's connections have been closed."""
        return self._nodes.get(node.client.address) is node

    async def aclose(self) -> None:
        """Close all connections, within `CLOSE_TIMEOUT` even when cancelled."""
        nodes, self._nodes = self._nodes, {}
        with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
            async with trio.open_nursery() as nursery:
                for node in nodes.values():
                    nursery.start_soon(node.client.aclose)

    # Learning

    def note(self, asked: Iterable[int], moved: Iterable[tuple[int, Place]]) -> None:
        now = trio.current_time()
        self._asked_at.update((slot, now) for slot in asked)
        if [slot for slot, place in moved if self._slots.moved(slot, *place, now=now)]:
            self.doubt()
            self._notify()

    @trio.lowlevel.enable_ki_protection
    async def keep_up(self) -> None:
        """Learn the slots whenever there is a doubt, until cancelled."""
        while True:
            with trio.move_on_after(SUSPECT_AFTER):
                await self._doubt.wait()
            if self._doubt.is_set() or self._has_slow_node():
                self._doubt = trio.Event()
                with suppress(LogUnavailable):  # whatever is sent to the cluster meets the same error
                    await self._ask_for_slots(self._learned)
                await trio.sleep(LEARN_PAUSE)

    def _has_slow_node(self) -> bool:
        since = min((began for node in self._nodes.values() for began in node.under_way.values()), default=None)
        return since is not None and trio.current_time() - since >= SUSPECT_AFTER

    async def _ask_for_slots(self, learned: int) -> None:
        """Ask which node has which slots, unless another task has done so since the `learned`th time."""
        async with self._learning:
            if self._learned != learned:
                return
            primaries = sample([*self._slots.primaries.values()], len(self._slots.primaries))
            failure = LogUnavailable(f"none of the nodes of the cluster at {self.address} answers")
            for place in [*sorted(primaries, key=self._is_busy), *self._slots.replicas, *self._hosts]:
                try:
                    changed = self._slots.replace(await self._slots_by(place), place[0], now=trio.current_time())
                except LogUnavailable as error:
                    failure = error
                except ValueError as error:
                    failure = LogUnavailable(f"Redis at {urls.address_of(*place)}: {error}")
                else:
                    self._learned += 1
                    if changed:
                        await self._leave_old_nodes()
                    return
            raise failure

    def _is_busy(self, place: Place) -> bool:
        node = self._nodes.get(urls.address_of(*place))
        return node is not None and (node.away or bool(node.under_way))

    async def _slots_by(self, place: Place) -> Sequence[Any]:
        node = self._nodes.get(urls.address_of(*place))
        client = self._make(place) if node is None else node.client
        try:
            with trio.fail_after(SUSPECT_AFTER):
                reply: Sequence[Any] = await client.ask("CLUSTER SLOTS")
                return reply
        except trio.TooSlowError:
            raise LogUnavailable(f"Redis at {client.address} has not answered for {SUSPECT_AFTER:g} s") from None
        finally:
            if node is None:
                await client.aclose()  # noqa: ASYNC102  (it has a shield with a deadline)

    async def _leave_old_nodes(self) -> None:
        old = [self._nodes.pop(address) for address in {*self._nodes} - {*self._slots.primaries}]
        for node in old:
            for scope in node.under_way:
                scope.cancel(reason="the node is no primary any more")
        self._notify()
        for node in old:
            await node.client.aclose()

    def _notify(self) -> None:
        for moved in [*self._on_moved]:
            moved()


class Cluster:
    """Commands to the nodes of a cluster. Made by `open_cluster`. A `Backend`."""

    def __init__(self, topology: ClusterTopology) -> None:
        self.topology = topology
        self.address = topology.address
        self.nursery: trio.Nursery | None = None
        self._best_effort: dict[str, dict[Command, None]] = {}
        """What waits to be sent to each shard; a task of the nursery sends it."""

    async def execute(
        self, commands: Sequence[Command], *, replicated: bool = False, wait_for_migration: bool = False
    ) -> list[Any]:
        """See `Backend.execute`. The commands for several nodes are sent at the same time."""
        if not commands:
            await trio.lowlevel.checkpoint()
            return []
        await self.topology.learn()
        replies: list[Any] = [None] * len(commands)
        again = await self._round(commands, [*range(len(commands))], {}, replies, replicated=replicated)
        with trio.move_on_after(MIGRATION_LIMIT if wait_for_migration else REDIRECTION_LIMIT):
            while again.numbers and (wait_for_migration or not again.wait):
                await trio.sleep(MIGRATION_PAUSE if again.wait else 0)
                again = await self._round(commands, again.numbers, again.asks, replies, replicated=replicated)
        for n in again.numbers:
            replies[n] = LogUnavailable(f"Redis at {self.address} is moving the keys of a command: {replies[n]}")
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
        (reply,) = await self.execute([command], replicated=replicated, wait_for_migration=True)
        return checked(reply, self.address)

    async def best_effort(self, commands: Sequence[Command]) -> None:
        """Send commands in the background; those that fail are forgotten."""
        await trio.lowlevel.checkpoint()
        for command in commands:
            shard = self.topology.shard(key_of(command))
            if shard not in self._best_effort:
                self._best_effort[shard] = {}
                if self.nursery is not None:
                    self.nursery.start_soon(self._send_best_effort, shard)
            self._best_effort[shard][command] = None

    @trio.lowlevel.enable_ki_protection
    async def _send_best_effort(self, shard: str) -> None:
        while commands := [*self._best_effort[shard]]:
            self._best_effort[shard] = {}
            with suppress(LogUnavailable):  # the log can do without it
                await self.execute(commands)
        del self._best_effort[shard]

    @asynccontextmanager
    async def subscription(self, shard: str) -> AsyncIterator[Subscription]:
        node = self.topology.node_of(shard)
        if node is None:
            self.topology.doubt()
            raise LogUnavailable(f"no node of the cluster at {self.address} has the slot")
        async with node.client.subscription() as subscription:
            yield subscription

    async def _round(
        self,
        commands: Sequence[Command],
        numbers: Sequence[int],
        asks: dict[int, Place],
        replies: list[Any],
        *,
        replicated: bool,
    ) -> Redirected:
        """Send the commands with these numbers to their nodes, and store their replies; which must be sent again."""
        by_node: dict[tuple[Node | None, bool], list[int]] = {}
        for n in numbers:
            shard = self.topology.shard(key_of(commands[n]))
            node = self.topology.node_at(asks[n]) if n in asks else self.topology.node_of(shard)
            by_node.setdefault((node, n in asks), []).append(n)

        async def send(node: Node | None, asking: bool, ns: list[int]) -> None:
            sent = [commands[n] for n in ns]
            for n, reply in zip(ns, await self._send(node, sent, asking=asking, replicated=replicated), strict=True):
                replies[n] = reply

        if len(by_node) == 1:
            ((node, asking), ns) = next(iter(by_node.items()))
            await send(node, asking, ns)
        else:
            async with trio.open_nursery() as nursery:
                for (node, asking), ns in by_node.items():
                    nursery.start_soon(send, node, asking, ns)
        again = redirected(commands, numbers, replies)
        self.topology.note((slot_of(key_of(commands[n])) for n in again.asks), again.moved)
        return again

    async def _send(
        self, node: Node | None, commands: Sequence[Command], *, asking: bool, replicated: bool
    ) -> Sequence[Any]:
        """The replies of one node; what is wrong with it is the reply to each, and raises a doubt."""
        if node is None:
            self.topology.doubt()
            await trio.lowlevel.checkpoint()
            return [Unreachable(f"no node of the cluster at {self.address} has the slot")] * len(commands)
        if not self.topology.is_current(node):
            await trio.lowlevel.checkpoint()
            return [STALE_NODE] * len(commands)
        replies = await node.send(commands, asking=asking, replicated=replicated)
        if any(map(is_away, replies)):
            self.topology.doubt()
        return replies


@asynccontextmanager
async def open_cluster(url: str, *, wait_replicas: int = 0) -> AsyncIterator[Cluster]:
    """The cluster that a URL names. It is connected to when it is first used."""
    parsed = urls.parse_cluster(url)
    async with open_loop() as loop:
        # Not connected and not kept: unreadable options raise here, not at the first command.
        client_of_node(parsed.hosts[0], parsed.options, loop)
        topology = ClusterTopology(
            parsed, lambda place: client_of_node(place, parsed.options, loop, wait_replicas=wait_replicas)
        )
        try:
            async with open_nursery() as nursery:
                cluster = Cluster(topology)
                cluster.nursery = nursery
                nursery.start_soon(topology.keep_up)
                yield cluster
                nursery.cancel_scope.cancel(reason="the cluster is closed")
        finally:
            await topology.aclose()  # noqa: ASYNC102  (it has a shield with a deadline)
