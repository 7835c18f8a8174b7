"""Real Redis Sentinels for the suite: a master with its replicas, and those that watch it, all of a test's own.

Each server has a configuration file of its own, which is what the sentinels rewrite. So a killed master comes back as
a master that knows of nothing, and the sentinels make it a replica: at once from 7.0 on, else after ten seconds.
"""

from __future__ import annotations

import json
import secrets
import tempfile
from collections import Counter
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import redis
import trio

from tests.support.redis_servers import GUARD, Option, RedisServer, _talk, _version, redis_servers, running

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

Word = str | int

PAUSE = 0.02
"""Seconds between two looks at what they say."""

FAILOVER_TIMEOUT = 2.0
"""Seconds for each step of a failover. One that fails, as in a split vote, is begun again twice as long afterwards."""

NAME = "runs"
"""What the sentinels call the master."""

_HASTE = {"PING-PERIOD": 300, "INFO-PERIOD": 200, "PUBLISH-PERIOD": 200, "MIN-LINK-RECONNECT-PERIOD": 100}
"""Milliseconds between two of what sentinels do every one, two or ten seconds; from 7.0 on they can be told."""

DOWN_AFTER = {"6": 1.5, "7": 1.0}
"""Seconds without an answer after which a sentinel finds a server down, by version.

The time until its first PING counts as silence: with less, every failover would be followed by another.
"""


Kind = TypeVar("Kind", bound=RedisServer)


class Server(RedisServer):
    """A redis-server with a file that is rewritten, and outlives its data."""

    @property
    def _conf(self) -> Path:
        return self.folder / "redis.conf"

    def _command_line(self) -> list[str]:
        self._conf.touch()
        executable, *options = super()._command_line()
        return [executable, str(self._conf), *options]

    def _follow(self, master: RedisServer) -> None:
        with self._conf.open("a") as conf:
            conf.write(_lines([("replicaof", "127.0.0.1", master.port)]))


class Sentinel(RedisServer):
    """One that watches; it has no data, and remembers all else when it is restarted."""

    _watched: Sequence[tuple[Word, ...]] = ()

    def __init__(self, executable: Path, folder: Path, options: Mapping[str, Option]) -> None:
        super().__init__(executable, folder, options)
        self.id = secrets.token_hex(20)

    @property
    def _conf(self) -> Path:
        return self.folder / "sentinel.conf"

    def _choose_ports(self) -> None:
        super()._choose_ports()
        self._conf.unlink(missing_ok=True)

    def _watch(self, *settings: tuple[Word, ...]) -> None:
        self._watched = settings

    def _command_line(self) -> list[str]:
        (self.folder / "data").mkdir(exist_ok=True)
        if not self._conf.exists():
            own: list[tuple[Word, ...]] = [
                ("bind", "127.0.0.1"),
                ("port", self.port),
                ("dir", str(self.folder / "data")),
                ("logfile", str(self.folder / "log")),
                ("sentinel", "myid", self.id),
            ]
            if password := self._options.get("requirepass"):
                own.append(("requirepass", str(password)))
            self._conf.write_text(_lines([*own, *(("sentinel", *words) for words in self._watched)]))
        return [str(self._executable), str(self._conf), "--sentinel"]

    async def _launch(self) -> bool:
        if not await super()._launch():
            return False
        with suppress(redis.ResponseError):  # 6.2 cannot be hurried
            await self.command("SENTINEL", "DEBUG", *chain.from_iterable(_HASTE.items()))
        return True


@dataclass(frozen=True)
class _Said:
    """What one sentinel says, by ports: the master, the replicas that it could promote, the sentinels that it hears."""

    master: int
    replicas: frozenset[int]
    sentinels: frozenset[int]


@dataclass(frozen=True)
class _View:
    """What the living say, by port; a role is None for a master, its port for a replica in sync, else 0."""

    sentinels: Mapping[int, _Said]
    roles: Mapping[int, int | None]


class Sentinels:
    def __init__(self, servers: Sequence[Server], sentinels: Sequence[Sentinel]) -> None:
        self.servers = list(servers)
        self.sentinels = list(sentinels)

    @property
    def url(self) -> str:
        hosts = ",".join(f"127.0.0.1:{sentinel.port}" for sentinel in self.sentinels)
        password = self.sentinels[0]._options.get("requirepass")
        query = f"?sentinel_password={password}" if password else ""
        return f"redis+sentinel://{self.servers[0]._credentials}{hosts}/{NAME}/0{query}"

    async def master(self) -> Server:
        view = await self._asked()
        named = Counter(said.master for said in view.sentinels.values())
        for port, votes in named.most_common(1):
            if votes * 2 > len(self.sentinels):
                return self._server(port)
        raise LookupError(f"no majority of the sentinels names a master: {view}")

    async def kill_master(self) -> Server:
        master = await self.master()
        await master.kill()
        return master

    async def failed_over(self, from_: Server) -> Server:
        """Wait until all sentinels that live name another master, which says that it is one; who that is."""

        def is_done(view: _View) -> bool:
            master = self._agreed(view)
            return master not in {None, from_.port} and view.roles.get(master or 0, 0) is None

        view = await self._until(is_done)
        return self._server(self._agreed(view) or 0)

    async def in_sync(self) -> None:
        await self._until(self._is_in_sync)

    async def rejoin(self, server: Server, *, empty: bool = True) -> None:
        """Restart it as a replica of the present master, and wait until it is in sync."""
        server._follow(await self.master())
        await server.restart(empty=empty)
        await self.in_sync()

    def _server(self, port: int) -> Server:
        return next(server for server in self.servers if server.port == port)

    def _agreed(self, view: _View) -> int | None:
        named = {said.master for said in view.sentinels.values()}
        return named.pop() if len(named) == 1 else None

    def _is_in_sync(self, view: _View) -> bool:
        master = self._agreed(view)
        replicas = {port for port, role in view.roles.items() if role == master}
        return (
            master is not None
            and view.roles.get(master, 0) is None
            and {master} | replicas == view.roles.keys()
            and all(
                said.replicas == replicas and said.sentinels | {port} == view.sentinels.keys()
                for port, said in view.sentinels.items()
            )
        )

    def _look(self) -> _View:
        sentinels, roles = {}, {}
        for sentinel in self.sentinels:
            if sentinel.is_living:
                with suppress(redis.ConnectionError):  # it has died just now, or is about to live again
                    sentinels[sentinel.port] = _said(sentinel.url)
        for server in self.servers:
            if server.is_living:
                with suppress(redis.ConnectionError):
                    roles[server.port] = _role(server.url)
        return _View(sentinels, roles)

    async def _asked(self) -> _View:
        return await trio.to_thread.run_sync(self._look, abandon_on_cancel=True)

    async def _until(self, condition: Callable[[_View], bool]) -> _View:
        deadline = trio.current_time() + GUARD
        while not condition(view := await self._asked()):
            if trio.current_time() > deadline:
                raise RuntimeError(f"that did not come about within {GUARD} s; they say: {view}")
            await trio.sleep(PAUSE)
        return view


def _said(url: str) -> _Said:
    words = (("SENTINEL", about, NAME) for about in ("GET-MASTER-ADDR-BY-NAME", "REPLICAS", "SENTINELS"))
    (_, port), replicas, sentinels = _talk(url, *words)
    return _Said(int(port), _in_reach(replicas), _in_reach(sentinels))


def _in_reach(instances: Iterable[Sequence[str]]) -> frozenset[int]:
    told = [dict(zip(words[::2], words[1::2], strict=True)) for words in instances]
    bad = {"s_down", "o_down", "disconnected"}
    return frozenset(int(one["port"]) for one in told if not bad & set(one["flags"].split(",")))


def _role(url: str) -> int | None:
    (role,) = _talk(url, ("ROLE",))
    if role[0] == "master":
        return None
    return role[2] if role[3] == "connected" else 0


def _lines(settings: Iterable[tuple[Word, ...]]) -> str:
    return "".join(" ".join(json.dumps(str(word), ensure_ascii=False) for word in words) + "\n" for words in settings)


def _made(kind: type[Kind], number: int, executable: Path, above: Path, options: Mapping[str, Option]) -> Kind:
    folder = above / f"{kind.__name__}-{number}"
    folder.mkdir()
    return kind(executable, folder, options)


@asynccontextmanager
async def redis_sentinels(
    *,
    replicas: int = 1,
    sentinels: int = 3,
    quorum: int = 2,
    executable: Path | None = None,
    down_after: float | None = None,
    password: str | None = None,
    sentinel_password: str | None = None,
    **options: Option,
) -> AsyncIterator[Sentinels]:
    """A master and all that belongs to it: in sync, and killed when the block is left, whatever has become of it.

    A `quorum` of the sentinels must find it down, each after `down_after` seconds without an answer. The sentinels
    seldom have a password; the other options are settings of redis.conf for the master and its replicas.
    """
    path = executable or next(iter(redis_servers().values()))
    patience = DOWN_AFTER.get(_version(path)[0], DOWN_AFTER["7"]) if down_after is None else down_after
    settings: dict[str, Option] = {"repl_diskless_sync_delay": 0, **options}
    if password:
        settings |= {"requirepass": password, "masterauth": password}
    own: dict[str, Option] = {"requirepass": sentinel_password} if sentinel_password else {}
    async with AsyncExitStack() as stack:
        above = tempfile.TemporaryDirectory(prefix="penstock-redis-", ignore_cleanup_errors=True)
        folder = Path(stack.enter_context(above))
        servers = [_made(Server, number, path, folder, settings) for number in range(1 + replicas)]
        watchers = [_made(Sentinel, number, path, folder, own) for number in range(sentinels)]
        for server in servers:
            if server is not servers[0]:
                server._follow(servers[0])
            await stack.enter_async_context(running(server))
        for watcher in watchers:
            watcher._watch(
                ("monitor", NAME, "127.0.0.1", servers[0].port, quorum),
                ("down-after-milliseconds", NAME, round(patience * 1000)),
                ("failover-timeout", NAME, round(FAILOVER_TIMEOUT * 1000)),
                *([("auth-pass", NAME, password)] if password else []),
                # what they would hear within seconds
                *(("known-replica", NAME, "127.0.0.1", server.port) for server in servers[1:]),
                *(
                    ("known-sentinel", NAME, "127.0.0.1", other.port, other.id)
                    for other in watchers
                    if other is not watcher
                ),
            )
            await stack.enter_async_context(running(watcher))
        whole = Sentinels(servers, watchers)
        await whole.in_sync()
        yield whole
