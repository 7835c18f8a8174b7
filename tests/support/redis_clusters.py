"""Real Redis Clusters for the suite: one for each test process to share, or one of a test's own.

What is awaited here, by the real clock, is that every living node says so; a paused or killed one is not asked.
"""

from __future__ import annotations

import tempfile
import time
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, cast

import redis
import trio
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from tests.support.redis_servers import (
    GUARD,
    Endpoint,
    Option,
    RedisServer,
    _talk,
    let_pass,
    redis_server,
    redis_servers,
    start_shared,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping, Sequence

PAUSE = 0.05
"""Seconds between two looks at what the nodes say."""

NODE_TIMEOUT = 2.0
"""Seconds without an answer after which the others take a node for failed, if a test does not say."""

Node = TypeVar("Node", bound=Endpoint)


def cluster_server() -> Path:
    """The first redis-server at hand that has all of Redis Cluster: from 7.0 on, with SSUBSCRIBE and SPUBLISH."""
    for version, path in redis_servers().items():
        if int(version.split(".")[0]) >= 7:
            return path
    raise RuntimeError(
        f"Redis Cluster is tested with redis-server 7.0 or later, and there is only {', '.join(redis_servers())}:"
        " install Debian's package redis-server, or name one in PENSTOCK_TEST_REDIS"
    )


@dataclass(frozen=True)
class _Line:
    """What a node knows of one node, itself perhaps: a line of its CLUSTER NODES."""

    id: str
    flags: frozenset[str]
    master_id: str
    epoch: int
    is_linked: bool
    ranges: tuple[str, ...]
    slots: frozenset[int] = field(repr=False)

    @property
    def is_good(self) -> bool:
        return self.is_linked and not self.flags & {"fail", "fail?", "handshake", "noaddr"}


@dataclass(frozen=True)
class _View:
    nodes: Mapping[int, _Line]  # by port
    own: _Line
    ok: bool
    in_sync: bool

    @property
    def is_master(self) -> bool:
        return "master" in self.own.flags


class Cluster(Generic[Node]):
    """A Redis Cluster; its nodes, dead or alive, are the masters that it was made with, then their replicas."""

    def __init__(self, nodes: Sequence[Node], masters: int) -> None:
        self.nodes = list(nodes)
        self._masters = masters
        self._ids: dict[int, str] = {}  # by port

    @property
    def url(self) -> str:
        credentials = self.nodes[0]._credentials
        return f"redis+cluster://{credentials}" + ",".join(
            f"127.0.0.1:{node.port}" for node in self.nodes[: self._masters]
        )

    def slot(self, key: str | bytes) -> int:
        return key_slot(key.encode() if isinstance(key, str) else key)

    async def masters(self) -> list[Node]:
        """The living ones that have slots by now."""
        owners = set((await self._asked(_owners)).values())
        return [node for node in self.nodes if node.port in owners]

    async def replicas(self, master: Node) -> list[Node]:
        """The living ones that follow this one by now."""
        views = await self._asked(lambda views: views)
        return [
            node
            for node in self.nodes
            if node.port in views and views[node.port].own.master_id == self._ids[master.port]
        ]

    async def node_of(self, key: str | bytes) -> Node:
        return await self.node_of_slot(self.slot(key))

    async def node_of_slot(self, slot: int) -> Node:
        return self._node(await self._asked(partial(_owner, slot=slot)))

    async def command(self, *words: Any, key: str | bytes) -> Any:
        return await (await self.node_of(key)).command(*words)

    async def each(self, *words: Any) -> dict[Node, Any]:
        return {node: await node.command(*words) for node in await self.masters()}

    def flushall(self) -> None:
        """Empty all that live: keys, scripts, and figures."""
        for port, view in self._look().items():
            if view.is_master:
                self._node(port).flushall()
            else:
                _talk(self._node(port).url, ("SCRIPT FLUSH",), ("CONFIG RESETSTAT",))

    async def let_pass(self, seconds: float) -> None:
        for node in await self.masters():
            await let_pass(node, seconds)

    async def settled(self) -> None:
        await self._until(self._is_settled)

    async def promote(self, replica: Node, how: Literal["FORCE", "TAKEOVER"] | None = None) -> None:
        """Have this replica, in sync, take its master's place, and wait until all that live say so."""
        await self._until(lambda views: replica.port in views and _is_known(views, replica.port))
        await replica.command("CLUSTER", "FAILOVER", *([how] if how else []))
        await self._taken_over([replica.port])

    async def failed_over(self, master: Node) -> Node:
        others = [node.port for node in self.nodes if node is not master and self._shard(node) == self._shard(master)]
        return await self._taken_over(others)

    async def _taken_over(self, ports: Sequence[int]) -> Node:
        """Wait until one of these is a master, and all that live say so; which that is."""
        # Redis 7.0 counts the votes of a replica's last election again when there is another one soon after: it wins,
        # but its slots stay those of its predecessor, as its epoch is no later one. It is given one here.
        views = await self._until(lambda views: _claimants(views, ports))
        port = max(_claimants(views, ports), key=lambda port: views[port].own.epoch)
        if not _agree_on(views, port):
            await self._node(port).command("CLUSTER", "BUMPEPOCH")  # does nothing if it has the latest
            await self._until(lambda views: port in views and _agree_on(views, port))
        return self._node(port)

    def _shard(self, node: Node) -> int:
        """The number of the shard in which it began, and stays: replicas do not migrate."""
        return self.nodes.index(node) % self._masters

    async def begin_move(self, slot: int, to: Node) -> None:
        source = await self.node_of_slot(slot)
        await to.command("CLUSTER", "SETSLOT", slot, "IMPORTING", self._ids[source.port])
        await source.command("CLUSTER", "SETSLOT", slot, "MIGRATING", self._ids[to.port])

    async def move_keys(self, slot: int, to: Node, *, at_most: int | None = None, keys_at_once: int = 10) -> int:
        """Move keys of a slot whose move has begun; how many. None: until there are none left."""
        source = await self.node_of_slot(slot)
        moved = 0
        while count := min(keys_at_once, keys_at_once if at_most is None else at_most - moved):
            keys = await source.command("CLUSTER", "GETKEYSINSLOT", slot, count)
            if not keys:
                break
            credentials = ["AUTH", password] if (password := to._options.get("requirepass")) else []
            words = ["127.0.0.1", to.port, "", 0, GUARD * 1000, *credentials, "KEYS", *keys]
            await source.command("MIGRATE", *words)
            moved += len(keys)
        return moved

    async def finish_move(self, slot: int, to: Node, *, keys_at_once: int = 10) -> None:
        """Move what keys are left, give the slot to `to`, and wait until all that live say so."""
        source = await self.node_of_slot(slot)
        await self.move_keys(slot, to, keys_at_once=keys_at_once)
        others = [node for node in await self.masters() if node not in {source, to}]
        for node in (to, source, *others):
            await node.command("CLUSTER", "SETSLOT", slot, "NODE", self._ids[to.port])
        await self._until(
            lambda views: (
                to.port in views
                and slot in views[to.port].own.slots
                and all(slot in view.nodes[to.port].slots for view in views.values())
            )
        )

    async def move_slot(self, slot: int, to: Node, *, keys_at_once: int = 10) -> None:
        await self.begin_move(slot, to)
        await self.finish_move(slot, to, keys_at_once=keys_at_once)

    def _node(self, port: int) -> Node:
        return next(node for node in self.nodes if node.port == port)

    def _look(self) -> dict[int, _View]:
        """What those say that live, by port."""
        views = {}
        for node in self.nodes:
            if node.is_living:
                try:
                    views[node.port] = _view(node.url)
                except redis.ConnectionError:
                    continue  # it has died just now, or is about to live again
        return views

    async def _asked(self, question: Callable[[Mapping[int, _View]], Any]) -> Any:
        return question(await trio.to_thread.run_sync(self._look, abandon_on_cancel=True))

    async def _until(self, condition: Callable[[Mapping[int, _View]], object]) -> Mapping[int, _View]:
        deadline = trio.current_time() + GUARD
        while not condition(views := await self._asked(lambda views: views)):
            if trio.current_time() > deadline:
                raise RuntimeError(f"that did not come about within {GUARD} s; the nodes say: {views}")
            await trio.sleep(PAUSE)
        return cast("Mapping[int, _View]", views)

    def _is_settled(self, views: Mapping[int, _View]) -> bool:
        owners = _owners(views)
        return (
            len(owners) == REDIS_CLUSTER_HASH_SLOTS
            and all(_agree_on(views, port) for port in set(owners.values()))
            and all(_is_known(views, port) and view.ok and view.in_sync for port, view in views.items())
        )

    def _form(self) -> None:
        """Make one cluster of the nodes, which have just started; synchronous, for the shared one has no loop yet."""
        masters = self.nodes[: self._masters]
        bounds = [REDIS_CLUSTER_HASH_SLOTS * number // len(masters) for number in range(len(masters) + 1)]
        for number, node in enumerate(self.nodes):
            commands: list[tuple[Any, ...]] = [("CLUSTER MYID",), ("CLUSTER SET-CONFIG-EPOCH", number + 1)]
            if number < len(masters):
                commands.append(("CLUSTER ADDSLOTSRANGE", bounds[number], bounds[number + 1] - 1))
            commands += [("CLUSTER MEET", *_place(other)) for other in self.nodes[:number]]
            self._ids[node.port] = _talk(node.url, *commands)[0]
        self._look_until(self._has_met)
        for node in self.nodes[self._masters :]:
            master = self.nodes[self._shard(node)]
            _talk(node.url, ("CLUSTER REPLICATE", self._ids[master.port]))
        self._look_until(self._is_formed)

    def _look_until(self, condition: Callable[[Mapping[int, _View]], bool]) -> None:
        deadline = time.monotonic() + GUARD
        while not condition(views := self._look()):
            if time.monotonic() > deadline or len(views) < len(self.nodes):
                raise RuntimeError(f"the cluster did not form; its nodes say: {views}")
            time.sleep(PAUSE)

    def _has_met(self, views: Mapping[int, _View]) -> bool:
        return all(self._knows_all(view) for view in views.values())

    def _knows_all(self, view: _View) -> bool:
        known = {port: line.id for port, line in view.nodes.items() if line.is_good}
        return known == self._ids

    def _is_formed(self, views: Mapping[int, _View]) -> bool:
        followed = {node.port: self._ids[self.nodes[self._shard(node)].port] for node in self.nodes[self._masters :]}
        return (
            self._has_met(views)
            and self._is_settled(views)
            and all(
                view.nodes[port].master_id == master for view in views.values() for port, master in followed.items()
            )
        )


def _place(node: Endpoint) -> tuple[Option, ...]:
    return ("127.0.0.1", node.port, node.bus_port)


def _view(url: str) -> _View:
    lines, info, replication = _talk(url, ("CLUSTER", "NODES"), ("CLUSTER INFO",), ("INFO", "replication"))
    nodes = dict(map(_line, lines.splitlines()))
    return _View(
        nodes=nodes,
        own=next(line for line in nodes.values() if "myself" in line.flags),
        ok=info["cluster_state"] == "ok",
        in_sync=replication["role"] == "master" or replication["master_link_status"] == "up",
    )


def _line(text: str) -> tuple[int, _Line]:
    name, address, flags, master, _, _, epoch, link, *ranges = text.split(" ")
    port = int(address.partition("@")[0].rpartition(":")[2])
    slots = _slots(tuple(words for words in ranges if not words.startswith("[")))
    return port, _Line(name, frozenset(flags.split(",")), master, int(epoch), link == "connected", tuple(ranges), slots)


@lru_cache(maxsize=256)  # every look reads the same ones
def _slots(ranges: tuple[str, ...]) -> frozenset[int]:
    bounds = (words.partition("-") for words in ranges)
    return frozenset(slot for first, _, last in bounds for slot in range(int(first), int(last or first) + 1))


def _owner(views: Mapping[int, _View], slot: int) -> int:
    """The port of the one that has the slot: of two that say so of themselves, the one of the later epoch."""
    owners = [port for port, view in views.items() if view.is_master and slot in view.own.slots]
    if not owners:
        raise LookupError(f"none of the living nodes has slot {slot}")
    return max(owners, key=lambda port: views[port].own.epoch)


def _owners(views: Mapping[int, _View]) -> dict[int, int]:
    """As `_owner`, for every slot that one has."""
    owners: dict[int, int] = {}
    for port, view in sorted(views.items(), key=lambda item: item[1].own.epoch):
        if view.is_master:
            owners |= dict.fromkeys(view.own.slots, port)
    return owners


def _claimants(views: Mapping[int, _View], ports: Iterable[int]) -> list[int]:
    return [port for port in ports if port in views and views[port].is_master and views[port].own.slots]


def _is_known(views: Mapping[int, _View], port: int) -> bool:
    """Whether all take this one for what it is, and its links to all stand: else it is not elected."""
    own = views[port].own
    return all(
        view.nodes[port].master_id == own.master_id and views[port].nodes[other].is_linked
        for other, view in views.items()
    )


def _agree_on(views: Mapping[int, _View], port: int) -> bool:
    """Whether all say of this one that it has slots, and the same ones, and is well."""
    slots = views[port].own.slots
    return (
        views[port].is_master
        and bool(slots)
        and all(
            port in view.nodes and view.nodes[port].slots == slots and view.nodes[port].is_good
            for view in views.values()
        )
    )


def _settings(node_timeout: float, options: Mapping[str, Option]) -> dict[str, Option]:
    return {
        "cluster_enabled": "yes",
        "cluster_config_file": "../nodes.conf",  # beside the data: a node that has lost those is still the same node
        "cluster_node_timeout": round(node_timeout * 1000),
        "cluster_announce_ip": "127.0.0.1",
        "cluster_require_full_coverage": "no",
        "cluster_allow_replica_migration": "no",
        "cluster_replica_validity_factor": 0,  # however late it is on a slow machine
        "repl_diskless_sync_delay": 0,
        **options,
    }


@asynccontextmanager
async def redis_cluster(
    *,
    masters: int = 3,
    replicas: int = 0,
    node_timeout: float = NODE_TIMEOUT,
    persistent: bool = False,
    **options: Option,
) -> AsyncIterator[Cluster[RedisServer]]:
    """A Redis Cluster of one's own: formed, in sync, and killed when the block is left, whatever has become of it.

    The masters share the slots evenly, with so many replicas each. After `node_timeout` seconds without an answer the
    others take a node for failed; a replica takes over half a second to a second and a half later.
    """
    settings = _settings(node_timeout, options)
    async with AsyncExitStack() as stack:
        nodes = [
            await stack.enter_async_context(
                redis_server(persistent=persistent, executable=cluster_server(), **settings)
            )
            for _ in range(masters * (1 + replicas))
        ]
        cluster = Cluster(nodes, masters)
        await trio.to_thread.run_sync(cluster._form, abandon_on_cancel=True)  # ends with the nodes
        yield cluster


@contextmanager
def started_cluster(*, node_timeout: float) -> Iterator[Cluster[RedisServer]]:
    with tempfile.TemporaryDirectory(prefix="penstock-redis-", ignore_cleanup_errors=True) as folder:
        nodes = []
        for number in range(3):
            (home := Path(folder, str(number))).mkdir()
            nodes.append(RedisServer(cluster_server(), home, _settings(node_timeout, {})))

        async def each(method: Callable[[RedisServer], Awaitable[None]]) -> None:
            for node in nodes:
                await method(node)

        try:
            trio.run(each, RedisServer._start)
            cluster = Cluster(nodes, len(nodes))
            cluster._form()
            yield cluster
        finally:
            trio.run(each, RedisServer.kill)


@cache
def shared_cluster() -> Cluster[Endpoint]:
    """The one cluster of three masters that all tests of this process use: emptied first, not stopped or changed."""
    settings = _settings(NODE_TIMEOUT, {})
    cluster = Cluster([start_shared(cluster_server(), **settings) for _ in range(3)], 3)
    cluster._form()
    return cluster
