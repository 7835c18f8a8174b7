"""`penstock serve` with several workers: a parent and its children in a process group of their own, told apart.

Whoever connects cannot choose a worker: any that waits for connections may take the next one. So for a moment all the
others are stopped (`only`), and whatever is asked meanwhile is answered by the one that is left.

What they serve is here, too, as `tests.workers:producers`. Linux only: who is whose child is read from `/proc`.

And a parent in the test's own process, with puppets for workers (`family`): they do what the test says.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import socket
import sys
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from functools import partial
from itertools import count as count_on
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio
from trio.testing import MockClock

import penstock.http.shutdown
from penstock import Event, command
from penstock.http.workers import DEATHS, Parent
from tests.command_line import environment
from tests.processes import Process, process_of
from tests.serving import eventually
from tests.wire import DONE, Block, ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence

    import httpx2

    from tests.wire import Reader

STOPPED: Final = "penstock: stopped; every run has its last entry"
REPLACED: Final = "another one takes its place"
INTERRUPTED: Final = ["INTERRUPTED", DONE]
CANCELLED: Final = ["cancelled", DONE]
AWAY: Final = [Block(retry="1000")]
"""All that a reader is told who is to come back."""


# Producers


async def silent(_input: Any) -> AsyncIterator[Event]:
    """Says where it runs, and then nothing for an hour."""
    yield Event(data=str(os.getpid()))
    await trio.sleep(3600)


async def ticking(_input: Any) -> AsyncIterator[Event]:
    """Says where it runs, and then counts until it is told to stop."""
    yield Event(data=str(os.getpid()))
    for number in count_on(1):
        await trio.sleep(0.02)
        yield Event(data=str(number))


async def stubborn(_input: Any) -> AsyncIterator[Event]:
    """Will not let go, in a process that has less patience with that than others."""
    penstock.http.shutdown.ABANDON_AFTER = 0.2  # type: ignore[misc]
    yield Event(data=str(os.getpid()))
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()


producers: Final = {
    "silent": silent,
    "ticking": ticking,
    "stubborn": stubborn,
    "signals": lambda _input: command(["grep", "^Sig", "/proc/self/status"]),
}


# Processes


def state_of(pid: int) -> str:
    """What a process is doing, in one letter of Linux's: `T` is stopped, `Z` is over; nothing if it is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_gone(pid: int) -> bool:
    return state_of(pid) in {"", "Z", "X"}


def send(pid: int, number: signal.Signals) -> None:
    """A signal to one process, if it is still there."""
    with suppress(ProcessLookupError):
        os.kill(pid, number)


class Workers(Process):
    """The parent, and through it its workers. Each request has a connection of its own, and so any worker answers."""

    def __init__(self, child: trio.Process, url: str, client: httpx2.AsyncClient) -> None:
        super().__init__(child, url, client)
        client.headers["connection"] = "close"

    @property
    def last_line(self) -> str:
        return self.said.rstrip().rpartition("\n")[2]

    def pids(self) -> dict[int, int]:
        """The workers that are there now: the process of each, by its number."""
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            return {}
        found = {}
        for pid in children:
            with suppress(FileNotFoundError, ProcessLookupError):
                if number := re.search(r"--worker=(\d+),", Path(f"/proc/{pid}/cmdline").read_text()):
                    found[int(number[1])] = int(pid)
        return found

    def signal_group(self, number: signal.Signals) -> None:
        """A signal to the parent and all workers at once, as Ctrl-C in a terminal is."""
        os.killpg(self.pid, number)

    async def says(self, words: str, times: int = 1) -> None:
        """Wait until it has said this so many times."""
        await eventually(lambda: self.said.count(words) >= times)

    async def successor(self, number: int, before: int) -> int:
        """The process that has taken the place of this one, waited for."""
        await eventually(lambda: self.pids().get(number, before) != before)
        return self.pids()[number]

    @asynccontextmanager
    async def only(self, pid: int) -> AsyncIterator[None]:
        """Only this worker accepts connections, for as long as the block takes; the others stand still."""
        with stopped(*(other for other in self.pids().values() if other != pid)) as others:
            await eventually(lambda: all(state_of(other) in {"T", "Z", ""} for other in others))
            yield

    async def start_at(self, pid: int, producer: str) -> str:
        """Start a run in this worker; its id."""
        body = {"producer": producer, "input": None}
        async with self.only(pid), self.opened("POST", "/v1/runs", json_body=body) as reader:
            assert reader.status == 201
            run_id = reader.headers["penstock-run-id"]
        async with self.reading(run_id) as reader:  # any worker can tell
            (block,) = await reader.take(1)
        if producer != "signals":
            assert block.data == str(pid)
        return run_id

    @asynccontextmanager
    async def reading_at(self, pid: int, run_id: str, **query: Any) -> AsyncIterator[Reader]:
        """A reader of a run whom this worker serves."""
        async with AsyncExitStack() as stack:
            async with self.only(pid):
                reader = await stack.enter_async_context(self.reading(run_id, **query))
            yield reader

    async def ask_at(self, pid: int, method: str, path: str, body: Any = None) -> int:
        """The status that this worker answers with."""
        async with self.only(pid), self.opened(method, path, json_body=body) as reader:
            return reader.status

    async def is_draining(self) -> None:
        """Wait until whoever answers says so."""
        while (await self.client.get("/readyz")).status_code != 503:  # noqa: ASYNC110  (each look is a request)
            await trio.lowlevel.checkpoint()


@contextmanager
def stopped(*pids: int) -> Iterator[tuple[int, ...]]:
    """These processes stand still while the block takes."""
    for pid in pids:
        send(pid, signal.SIGSTOP)
    try:
        yield pids
    finally:
        for pid in pids:
            send(pid, signal.SIGCONT)


def ends(blocks: list[Block]) -> list[str | None]:
    """What the last two blocks of a stream are, or the one that it has."""
    return [block.json["code"] if block.event == "error" else block.event or block.data for block in blocks[-2:]]


async def goes_on(server: Workers, reader: Reader, run_id: str) -> None:
    """A run that counts, and this reader of it from the first event on, have noticed nothing until now."""
    before = await reader.take(3)
    now = (await server.run(run_id))["seq"]
    while before[-1].id is not None and before[-1].id <= now:
        before += await reader.take(1)
    assert (await server.client.post(f"/v1/runs/{run_id}/cancel")).status_code == 202
    blocks = before + await reader.rest()
    assert ends(blocks) == CANCELLED
    assert ids(blocks) == list(range(1, len(blocks) + 1))


@asynccontextmanager
async def serving_workers(
    count: int | None,
    log: str,
    *options: object,
    before: tuple[str, ...] = (),
    serves: bool = True,
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[Workers]:
    """So many workers, over a Redis in which they have keys of their own. None of them may leave a traceback.

    Args:
        count: how many; None if the options or the environment say it.
        log: the URL of the Redis.
        options: of the command line, besides those that are needed.
        before: what comes before `serve` on the command line.
        serves: wait until it has said that it serves.
        env: its environment, besides this process's own.
    """
    line: list[object] = [sys.executable, "-m", "penstock", *before, "serve", "--log", log, "--bind", "127.0.0.1:0"]
    line += ["--prefix", f"{secrets.token_hex(4)}:run:", "--producers", "tests.workers:producers"]
    if count is not None:
        line += ["--workers", count]
    words = [str(word) for word in [*line, *options]]
    async with process_of(Workers, *words, env=environment(**(env or {})), serves=serves) as server:
        yield server
        assert "Traceback" not in server.said, server.said
        assert "KeyboardInterrupt" not in server.said, server.said


# Puppets

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
        else:
            os._exit(99)
"""
"""A worker that tells the test what it hears, and does what the test says, one order at a time."""


class Puppet:
    """A worker, seen from the test."""

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
        self.parent = Parent(
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
        """The next child that comes."""
        return await self._arrived.receive()

    async def ready(self, count: int) -> list[Puppet]:
        """The first children, all of them ready; in order."""
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
        """The parent's exit code, waited for."""
        await self.ended.wait()
        assert self.code is not None
        return self.code


async def until(condition: Callable[[], bool]) -> None:
    """Wait until it is so; by turns, for here the clock stands still."""
    while not condition():  # noqa: ASYNC110
        await trio.to_thread.run_sync(os.sched_yield)


@asynccontextmanager
async def family(count: int, max_deaths: int = DEATHS, missing: frozenset[int] = frozenset()) -> AsyncIterator[Family]:
    """A parent that has been started; its children are killed, and then it ends, if it has not by itself."""
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
