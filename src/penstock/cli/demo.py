"""What the demo claims, judged from what was received and what was written: pure functions.

The main job, to watch: a real command's output over HTTP, cut twice, resumed, compared; then a cancel.

    penstock serve        a process of its own, on a free port
      └─ tee ── compileall, over a part of the standard library ──▶ written.txt
           │
           └─▶ run ─▶ log ─▶ HTTP ─▶ httpx2:  connection 1 ✂   connection 2 ✂   connection 3, to the end

Nothing that judges is penstock's: the client is httpx2, and what the command wrote is read from a file
that the command's own process tree wrote. Everything happens in a temporary folder; the server is ended whatever
happens, Ctrl-C included.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import click
import httpx2
import trio

from penstock.cli.demo_producers import COMPILED, COPY, FOLDERS
from penstock.errors import single_error

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, AsyncIterator, Sequence

CANCEL_LIMIT_SECONDS: Final = 1.0
CANCEL_TARGET_SECONDS: Final = 0.05
CUTS: Final = (0.25, 0.5)
"""After which shares of the lines to be expected the connection is cut."""
MISSED: Final = 10
"""How many more lines the command is let write after each cut, before the client comes back."""
NO_CONTENT: Final = 204


class Received(NamedTuple):
    """One event, as the client got it."""

    id: int
    event: str
    data: str


@dataclass(slots=True)
class Cut:
    """How it was when a connection had been cut."""

    after: int
    """The id of the last event that was read."""
    running: bool
    """Whether the run was still going on when the client came back."""
    missed: int
    """The events that were stored while nobody listened."""


@dataclass(slots=True)
class Reading:
    """What all connections together brought."""

    events: list[Received] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    status_at_end: int = 0
    """What a request with the last id was answered."""

    @property
    def last_id(self) -> int:
        """The cursor to come back with."""
        return self.events[-1].id if self.events else 0

    @property
    def lines(self) -> list[str]:
        """The command's output, as it arrived."""
        return [event.data for event in self.events if event.event in {"stdout", "stderr"}]


class Check(NamedTuple):
    """One claim, and whether it held."""

    held: bool
    words: str


def difference(written: Sequence[str], arrived: Sequence[str]) -> str | None:
    """Where what arrived first differs from what was written; None if it does not."""
    for number, (line, got) in enumerate(zip(written, arrived, strict=False), 1):
        if line != got:
            return f"line {number} was written as {line!r:.100}, and arrived as {got!r:.100}"
    if len(written) != len(arrived):
        return f"{len(written)} lines were written, and {len(arrived)} arrived"
    return None


def id_fault(ids: Sequence[int]) -> str | None:
    """What is wrong with the ids, which are to be 1, 2, 3 …; None if nothing is."""
    for expected, got in enumerate(ids, 1):
        if got != expected:
            return f"id {got} came where {expected} was due"
    return None if ids else "there are none"


def judge_reading(reading: Reading, written: Sequence[str], compiled: int) -> list[Check]:
    """The checks of the first part."""
    events, lines = reading.events, reading.lines
    announced = sum(line.startswith("Compiling ") for line in written)
    exits = [event.data for event in events if event.event == "exit"]
    apart = difference(written, lines)
    fault = id_fault([event.id for event in events])
    done = bool(events) and events[-1].data == "[DONE]" and sum(event.data == "[DONE]" for event in events) == 1
    cuts = "; ".join(f"after id {cut.after}, {cut.missed} more were stored before it came back" for cut in reading.cuts)
    return [
        Check(
            len(written) > MISSED and exits == ['{"exit_code":0}'] and compiled == announced,
            f"the command wrote {len(written)} lines into its own file, and {compiled} compiled files; "
            f"its exit event: {', '.join(exits) or 'none'}",
        ),
        Check(
            len(reading.cuts) == len(CUTS) and all(cut.running and cut.missed > 0 for cut in reading.cuts),
            f"cut {len(reading.cuts)} times in mid-stream: {cuts}",
        ),
        Check(
            apart is None,
            f"{len(lines)} lines arrived over HTTP: "
            + ("every line, once, in order" if apart is None else f"NOT what was written: {apart}"),
        ),
        Check(
            fault is None,
            f"ids 1 to {reading.last_id} over {len(reading.cuts) + 1} connections"
            + (", no gap, no repeat" if fault is None else f": {fault}"),
        ),
        Check(
            done and reading.status_at_end == NO_CONTENT,
            f"[DONE] came {'last' if done else 'NOT last, or not once'}; "
            f"a request with the last id was answered {reading.status_at_end}",
        ),
    ]


def judge_cancel(seconds: float, names: Sequence[str], last: str) -> Check:
    """The check of the second part; `names` and `last` are the events' types and the last one's data."""
    return Check(
        seconds < CANCEL_LIMIT_SECONDS and "cancelled" in names and last == "[DONE]",
        f"a silent run was cancelled by another client: {seconds * 1000:.1f} ms from the request to the end of the "
        f"stream (target {CANCEL_TARGET_SECONDS * 1000:.0f} ms, limit {CANCEL_LIMIT_SECONDS * 1000:.0f} ms)",
    )


GUARD_SECONDS: Final = 60.0
"""After so long the demo gives up; it takes a few seconds."""
LEAVE_LIMIT_SECONDS: Final = 5.0
"""How long the server may take from SIGTERM to its exit."""
INTERRUPTED: Final = 128 + signal.SIGINT


class DemoError(Exception):
    """The demo could not be carried out."""


# Showing


class DemoScreen:
    """Progress: a bar on a terminal, a line for each step elsewhere."""

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()

    def step(self, words: str) -> None:
        """Something begins."""
        self._clear()
        click.echo(f"  {words}")

    def bar(self, done: int, total: int, words: str) -> None:
        """How far it is."""
        if self._live:
            width = 30
            filled = min(width, width * done // max(total, 1))
            click.echo(f"\r  [{'#' * filled}{'-' * (width - filled)}] {done} lines, {words}\x1b[K", nl=False)

    def report(self, checks: Sequence[Check], seconds: float) -> None:
        """Every claim, and the sum of it."""
        self._clear()
        click.echo("")
        for check in checks:
            mark = click.style("ok    ", fg="green") if check.held else click.style("FAILED", fg="red", bold=True)
            click.echo(f"  {mark}  {check.words}")
        failed = sum(not check.held for check in checks)
        sum_of_it = f"{failed} of {len(checks)} checks FAILED" if failed else f"all {len(checks)} checks held"
        click.echo(f"\n  {sum_of_it}; {seconds:.1f} s")

    def _clear(self) -> None:
        if self._live:
            click.echo("\r\x1b[K", nl=False)


# Doing


@dataclass(slots=True)
class DemoServer:
    """`penstock serve`, in a process of its own."""

    process: trio.Process
    url: str = ""
    said: list[str] = field(default_factory=list)

    async def listen(self, task_status: trio.TaskStatus[None]) -> None:
        """Take what it prints, so that no full pipe holds it up; it has started when it has said where it is."""
        assert self.process.stderr is not None  # noqa: S101  (a pipe, as it was started)
        rest = b""
        async for piece in self.process.stderr:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                self.said.append(line.decode(errors="replace"))
                if not self.url and (found := re.search(r"serving on (http://\S+)", self.said[-1])):
                    self.url = found[1]
                    task_status.started()
        if not self.url:
            raise DemoError("the server did not start; it said:\n" + "\n".join(self.said))

    async def leave(self) -> Check:
        """SIGTERM, and what came of it."""
        begun = time.perf_counter()
        self.process.terminate()
        with trio.move_on_after(LEAVE_LIMIT_SECONDS):
            await self.process.wait()
        took, code = time.perf_counter() - begun, self.process.returncode
        if code is None:
            return Check(held=False, words=f"the server was still there {took:.1f} s after SIGTERM")
        return Check(code == 0, f"the server left with exit code {code}, {took * 1000:.0f} ms after SIGTERM")


@asynccontextmanager
async def serving(folder: Path, port: int) -> AsyncIterator[DemoServer]:
    """A server that works in a folder; it is gone when the block is left, whatever the way out."""
    argv = [sys.executable, "-m", "penstock", "serve", "--producers", "penstock.cli.demo_producers:producers"]
    argv += ["--bind", f"127.0.0.1:{port}", "--log-level", "warning", "--drain-timeout", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    environment["PYTHONUNBUFFERED"] = "1"
    # In a session of its own: a Ctrl-C in the terminal is the demo's, which then ends the server in good order.
    process = await trio.lowlevel.open_process(
        argv, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    try:
        async with trio.open_nursery() as nursery:
            server = DemoServer(process)
            await nursery.start(server.listen)
            yield server
            nursery.cancel_scope.cancel(reason="the demo is over")
    finally:
        with trio.CancelScope(shield=True):  # it has a deadline: `leave` has one, and SIGKILL cannot be ignored
            if process.returncode is None:
                await DemoServer(process).leave()
            if process.returncode is None:
                process.kill()
            await process.wait()
        if process.stderr is not None:
            await process.stderr.aclose()


def client_of(server: DemoServer) -> httpx2.AsyncClient:
    """A client without a past; `trust_env`: no proxy stands between the demo and this machine."""
    return httpx2.AsyncClient(base_url=server.url, timeout=GUARD_SECONDS, trust_env=False)


async def start(client: httpx2.AsyncClient, producer: str) -> str:
    """Start a run; the path of its record."""
    answer = await client.post("/v1/runs", json={"producer": producer})
    answer.raise_for_status()
    return f"/v1/runs/{answer.json()['id']}"


async def record(client: httpx2.AsyncClient, run: str) -> dict[str, Any]:
    """A run's record."""
    answer = await client.get(run)
    answer.raise_for_status()
    members: dict[str, Any] = answer.json()
    return members


def _events(source: httpx2.EventSource) -> AsyncGenerator[httpx2.ServerSentEvent, None]:
    """The events, as the generator that they are: it is to be closed when the reading stops before their end."""
    return cast("AsyncGenerator[httpx2.ServerSentEvent, None]", aiter(source))


async def read(server: DemoServer, run: str, reading: Reading, up_to: float, screen: DemoScreen, total: int) -> None:
    """One connection: read on from where the reading stands, up to an id; then close the socket."""
    headers = {"Last-Event-ID": str(reading.last_id)} if reading.events else {}
    words = f"connection {len(reading.cuts) + 1}"
    async with (
        client_of(server) as client,
        client.sse(f"{run}/stream", headers=headers) as source,
        aclosing(_events(source)) as events,
    ):
        async for event in events:
            reading.events.append(Received(int(event.id or 0), event.event, event.data))
            screen.bar(reading.last_id, total, words)
            if reading.last_id >= up_to:
                return


async def read_with_cuts(server: DemoServer, run: str, screen: DemoScreen, total: int) -> Reading:
    """Read a run from its beginning to its end, over connections that are cut."""
    reading = Reading()
    async with client_of(server) as other:
        for share in CUTS:
            await read(server, run, reading, int(total * share), screen, total)
            now = await record(other, run)
            while now["status"] == "running" and now["seq"] < reading.last_id + MISSED:
                await trio.sleep(0.02)
                now = await record(other, run)
            cut = Cut(reading.last_id, now["status"] == "running", now["seq"] - reading.last_id)
            reading.cuts.append(cut)
            screen.step(f"cut after id {cut.after}; the run goes on, {cut.missed} more are stored. Back with that id")
        await read(server, run, reading, float("inf"), screen, total)
        answer = await other.get(f"{run}/stream", headers={"Last-Event-ID": str(reading.last_id)})
        reading.status_at_end = answer.status_code
    return reading


async def cancel_silent_run(server: DemoServer) -> Check:
    """Start a run that says nothing, read it, and have another client cancel it."""
    names: list[str] = []
    last, ended = "", 0.0
    listening = trio.Event()

    async def listen() -> None:
        nonlocal last, ended
        async with (
            client_of(server) as client,
            client.sse(f"{run}/stream") as source,
            aclosing(_events(source)) as events,
        ):
            async for event in events:
                names.append(event.event)
                last = event.data
                listening.set()
        ended = time.perf_counter()

    async with client_of(server) as other:
        run = await start(other, "silent")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await listening.wait()
            begun = time.perf_counter()
            (await other.post(f"{run}/cancel", json={"reason": "the demo's second client"})).raise_for_status()
    return judge_cancel(ended - begun, names, last)


async def demonstrate(folder: Path, port: int, screen: DemoScreen) -> list[Check]:
    """Everything, in a scratch folder."""
    total = sum(1 for where in FOLDERS for _ in where.glob("*.py")) + len(FOLDERS)
    async with serving(folder, port) as server:
        screen.step(f"penstock serve is up at {server.url}, process {server.process.pid}")
        async with client_of(server) as client:
            run = await start(client, "build")
        screen.step(f"compileall runs over {total - len(FOLDERS)} files; its output is {server.url}{run}/stream")
        reading = await read_with_cuts(server, run, screen, total)
        written = (folder / COPY).read_bytes().decode().split("\n")[:-1]
        compiled = sum(1 for _ in (folder / COMPILED).rglob("*.pyc"))
        checks = judge_reading(reading, written, compiled)
        screen.step("a silent run: one client reads it, another one cancels it")
        checks.append(await cancel_silent_run(server))
        checks.append(await server.leave())
        if not all(check.held for check in checks):
            screen.step("\n    ".join(["the server said:", *server.said]))
        return checks


async def _until_signalled(port: int, screen: DemoScreen) -> list[Check] | None:
    """The checks; None if a signal came first."""
    checks: list[Check] | None = None

    async def give_up(task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            task_status.started()
            await anext(aiter(signals))
            nursery.cancel_scope.cancel(reason="a signal")

    with tempfile.TemporaryDirectory(prefix="penstock-demo-") as folder:
        async with trio.open_nursery() as nursery:
            await nursery.start(give_up)
            with trio.fail_after(GUARD_SECONDS):
                checks = await demonstrate(Path(folder), port, screen)
            nursery.cancel_scope.cancel(reason="the demo is over")
    return checks


def run_demo(port: int = 0) -> int:
    """Carry it out, with progress and a report on stdout; the exit code: 0 only if every check held."""
    begun = time.perf_counter()
    screen = DemoScreen()
    click.echo("penstock demo: a real command over HTTP, cut twice, resumed, compared; then a cancel")
    try:
        checks = trio.run(partial(_until_signalled, port, screen))
    except Exception as error:
        match single_error(error):
            case DemoError() | httpx2.HTTPError() | OSError() as failure:
                click.echo(f"\nthe demo FAILED: {str(failure) or type(failure).__name__}", err=True)
            case trio.TooSlowError():
                click.echo(f"\nthe demo FAILED: it was not done after {GUARD_SECONDS:g} s", err=True)
            case _:
                raise
        return 1
    if checks is None:
        click.echo("\nstopped by a signal; nothing is left running", err=True)
        return INTERRUPTED
    screen.report(checks, time.perf_counter() - begun)
    return 0 if all(check.held for check in checks) else 1
