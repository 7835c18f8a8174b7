"""A parent of workers in the test's own process, with puppets for workers (`family`): they do what the test says."""

from __future__ import annotations

import os
import signal
import socket
import sys
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Final

import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from penstock.server.workers import DEATHS, ProcessManager

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

CHILD: Final = """
import os, select, signal, socket, sys

test = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
words = socket.socket(fileno=int(sys.argv[2]))
blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [])
test.sendall(f"{sys.argv[3]} {os.getpid()} {int({signal.SIGTERM, signal.SIGINT} <= blocked)}\\n".encode())
orders = test.makefile("rb", buffering=0)  # or orders that have been read would be waited for
hears = [words, test]
while True:
    readable = select.select(hears, [], [])[0]
    if words in readable:
        heard = words.recv(1000)
        test.sendall(heard or b"nobody\\n")
        if not heard:
            hears.remove(words)
    elif test in readable:
        order, _, rest = orders.readline().decode().rstrip("\\n").partition(" ")
        if order == "say":
            words.sendall(rest.encode().decode("unicode_escape").encode())
        elif order == "repeat":
            number, word = rest.split()
            words.sendall(b"ready " + word.encode() * int(number) + b"\\n")
        elif order == "exit":
            os._exit(int(rest))
        elif order == "unblock":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM, signal.SIGINT})
            test.sendall(b"unblocked\\n")
        elif order == "close":
            hears.remove(words)
            words.close()
        else:
            os._exit(99)
"""
"""A worker that tells the test what it hears, and does what the test says, one order at a time."""


class Puppet:
    def __init__(self, stream: trio.SocketStream) -> None:
        self._stream = stream
        self._received = b""
        self.number = 0
        self.pid = 0
        self.blocked = False
        """Whether it was born with the signals blocked."""

    async def introduce(self) -> None:
        number, pid, blocked = (await self.hears()).split()
        self.number, self.pid, self.blocked = int(number), int(pid), blocked == "1"

    async def hears(self) -> str:
        """The next word from its parent; `gone` when the process is."""
        while b"\n" not in self._received:
            try:
                piece = await self._stream.receive_some()
            except trio.BrokenResourceError:
                piece = b""
            self._received += piece or b"gone\n"
        word, _, self._received = self._received.partition(b"\n")
        return word.decode()

    async def does(self, order: str) -> None:
        await self._stream.send_all(order.encode() + b"\n")

    async def is_ready(self, news: str = "news") -> None:
        await self.does(f"say ready {news}\\n")

    async def ends(self, code: int = 0) -> None:
        """It exits, and is gone when this returns."""
        await self.does(f"exit {code}")
        while await self.hears() != "gone":
            pass


class Family:
    """A parent in this process, its children, and what it has said."""

    def __init__(
        self,
        count: int,
        port: int,
        max_deaths: int,
        missing: frozenset[int],
        arrived: trio.MemoryReceiveChannel[Puppet],
    ) -> None:
        listening = socket.create_server(("127.0.0.1", 0))
        self.sockets = [listening]
        self.said: list[str] = []
        self.announced: list[str] = []
        self.spawned: list[int] = []
        self.code: int | None = None
        self._missing = missing
        """Workers whose program is not there."""
        self._port = port
        self._arrived = arrived
        self.parent = ProcessManager(
            count,
            self._command,
            self.sockets,
            say=self.said.append,
            announce=self.announced.append,
            max_deaths=max_deaths,
        )
        self.ended = trio.Event()

    def _command(self, number: int, _fds: Sequence[int], words: int) -> list[str]:
        self.spawned.append(number)
        if number in self._missing:
            return ["/nowhere/at/all"]
        return [sys.executable, "-I", "-S", "-c", CHILD, str(self._port), str(words), str(number)]

    async def run(self, task_status: trio.TaskStatus[None]) -> None:
        task_status.started()
        self.code = await self.parent.run()
        self.ended.set()

    async def next(self) -> Puppet:
        return await self._arrived.receive()

    async def ready(self, count: int) -> list[Puppet]:
        puppets = []
        for number in range(1, count + 1):
            puppets.append(await self.next())
            if number == 1:
                await puppets[0].is_ready()
        for puppet in puppets[1:]:
            await puppet.is_ready(f"news of {puppet.number}")
        await until(lambda: bool(self.announced))
        return sorted(puppets, key=lambda puppet: puppet.number)

    async def end(self) -> int:
        await self.ended.wait()
        assert self.code is not None
        return self.code


async def until(condition: Callable[[], bool]) -> None:
    """Wait until it is so; by turns, for here the clock stands still."""
    while not condition():  # noqa: ASYNC110
        await trio.to_thread.run_sync(os.sched_yield)


@asynccontextmanager
async def family(count: int, max_deaths: int = DEATHS, missing: frozenset[int] = frozenset()) -> AsyncIterator[Family]:
    arrivals, arrived = trio.open_memory_channel[Puppet](100)

    async def welcome(stream: trio.SocketStream) -> None:
        puppet = Puppet(stream)
        await puppet.introduce()
        await arrivals.send(puppet)
        await trio.sleep_forever()  # or the connection would be closed

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, welcome, 0, host="127.0.0.1"))
        ours = Family(count, listener.socket.getsockname()[1], max_deaths, missing, arrived)
        await nursery.start(ours.run)
        try:
            yield ours
        finally:
            ours.parent._ending.set()
            if isinstance(clock := trio.lowlevel.current_clock(), MockClock):
                clock.rate = 1.0  # the parent may be giving somebody a moment
            for worker in ours.parent._workers.values():
                worker.process.kill()
            with trio.CancelScope(shield=True):
                await ours.ended.wait()
            for sock in ours.sockets:
                sock.close()
        nursery.cancel_scope.cancel(reason="the test is over")


def signal_here(number: signal.Signals = signal.SIGTERM) -> None:
    os.kill(os.getpid(), number)


async def settle() -> None:
    await wait_all_tasks_blocked(0.02)
