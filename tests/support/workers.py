"""`penstock serve` with several workers: a parent and its children in a process group of their own. Linux only.

A client cannot choose its worker. So all others are stopped for a moment (`only`), and the one that is left answers.
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import sys
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from tests.support.command_line import environment
from tests.support.processes import Process, process_of
from tests.support.serving import eventually
from tests.support.wire import DONE, Block, ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator, Mapping

    import httpx2

    from tests.support.wire import Reader

STOPPED: Final = "penstock: stopped; every run has its last entry"
REPLACED: Final = "another one takes its place"
INTERRUPTED: Final = ["INTERRUPTED", DONE]
CANCELLED: Final = ["cancelled", DONE]
AWAY: Final = [Block(retry="1000")]
"""All that comes to a reader that is to come back."""
HOUR: Final = ("--drain-timeout", 3600)
MOMENT: Final = ("--drain-timeout", 0.3)


def state_of(pid: int) -> str:
    """What a process is doing, in one letter of Linux's: `T` is stopped, `Z` is over; nothing if it is not there."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def is_gone(pid: int) -> bool:
    return state_of(pid) in {"", "Z", "X"}


def send(pid: int, number: signal.Signals) -> None:
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
        try:
            children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        except (FileNotFoundError, ProcessLookupError):
            return {}
        found = {}
        for pid in children:
            with suppress(FileNotFoundError, ProcessLookupError):
                if number := re.search(r"--inherit=(\d+),", Path(f"/proc/{pid}/cmdline").read_text()):
                    found[int(number[1])] = int(pid)
        return found

    def signal_group(self, number: signal.Signals) -> None:
        os.killpg(self.pid, number)

    async def says(self, line: str, times: int = 1) -> None:
        await eventually(lambda: self.said.count(line) >= times)

    async def successor(self, number: int, before: int) -> int:
        await eventually(lambda: self.pids().get(number, before) != before)
        return self.pids()[number]

    @asynccontextmanager
    async def only(self, pid: int) -> AsyncIterator[None]:
        """Only this worker accepts connections, for as long as the block takes; the others stand still."""
        with stopped(*(other for other in self.pids().values() if other != pid)) as others:
            await eventually(lambda: all(state_of(other) in {"T", "Z", ""} for other in others))
            yield

    async def start_at(self, pid: int, producer: str) -> str:
        body = {"producer": producer, "input": None}
        async with self.only(pid), self.opened("POST", "/v1/runs", json_body=body) as reader:
            assert reader.status == 201
            run_id = reader.headers["penstock-run-id"]
        async with self.reading(run_id) as reader:  # any worker has it
            (block,) = await reader.take(1)
        if producer != "signals":
            assert block.data == str(pid)
        return run_id

    @asynccontextmanager
    async def reading_at(self, pid: int, run_id: str, **query: Any) -> AsyncIterator[Reader]:
        async with AsyncExitStack() as stack:
            async with self.only(pid):
                reader = await stack.enter_async_context(self.reading(run_id, **query))
            yield reader

    async def ask_at(self, pid: int, method: str, path: str, body: Any = None) -> int:
        async with self.only(pid), self.opened(method, path, json_body=body) as reader:
            return reader.status

    async def is_draining(self) -> None:
        while (await self.client.get("/readyz")).status_code != 503:  # noqa: ASYNC110  (each look is a request)
            await trio.lowlevel.checkpoint()


@contextmanager
def stopped(*pids: int) -> Iterator[tuple[int, ...]]:
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


async def has_stopped(server: Workers, code: int = 0) -> None:
    """Wait until the server has ended with this code, and no process of it is left."""
    assert await server.exit_code() == code, server.said
    await server.silent.wait()
    if code == 0:
        assert server.last_line == STOPPED
    else:
        assert server.last_line == f"penstock: stopped with code {code}; why is said above"


async def nothing_comes(reader: Reader) -> None:
    with trio.move_on_after(0.5) as scope:
        assert await reader.next() is None, "the stream went on"
        raise AssertionError("the stream ended")
    assert scope.cancelled_caught


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
    through: tuple[str, ...] = (),
    serves: bool = True,
    env: Mapping[str, str] | None = None,
) -> AsyncIterator[Workers]:
    """So many workers, over a Redis in which they have keys of their own. None of them may leave a traceback.

    `before` comes before `serve` on the command line; `through` is a program that is given the whole line, and becomes
    what that says; without `count`, the options or the environment say how many.
    """
    line: list[object] = [sys.executable, "-m", "penstock", *before, "serve", "--log", log, "--bind", "127.0.0.1:0"]
    line += ["--prefix", f"{secrets.token_hex(4)}:run:", "--producers", "tests.support.worker_producers:producers"]
    if count is not None:
        line += ["--workers", count]
    words = [str(word) for word in [*through, *line, *options]]
    async with process_of(Workers, *words, env=environment(**(env or {})), serves=serves) as server:
        yield server
        assert "Traceback" not in server.said, server.said
        assert "KeyboardInterrupt" not in server.said, server.said
