"""`penstock demo`: a real command's output over HTTP, cut twice, resumed, compared; then a cancel.

    penstock serve        a process of its own, on a free port
      └─ tee ── compileall, over a part of the standard library ──▶ written.txt
           │
           └─▶ run ─▶ log ─▶ HTTP ─▶ httpx2:  connection 1 ✂   connection 2 ✂   connection 3, to the end

The checks rely on nothing of penstock's: the client is httpx2, and what the command wrote is read from a file that the
command's own processes wrote. The server is ended on every way out.
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
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import click
import httpx2
import trio
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from penstock.cli.demo_producers import COMPILED, COPY, FOLDERS
from penstock.errors import single_error
from penstock.exception_groups import open_nursery

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

CANCEL_LIMIT: Final = 1.0
CANCEL_TARGET: Final = 0.05  # seconds from the request to cancel a run to the end of its stream
CUTS: Final = (0.25, 0.5)  # the shares of the expected lines after which the client cuts its connection
MISSED: Final = 10  # how many lines the command writes after each cut before the client reconnects
GUARD: Final = 60.0  # seconds after which the demo gives up; it takes a few seconds
LEAVE_LIMIT: Final = 5.0  # seconds from SIGTERM to the exit of the server
NO_CONTENT: Final = 204
INTERRUPTED: Final = 128 + signal.SIGINT


class DemoError(Exception):
    """The demo could not be carried out."""


# Checks: pure functions


class Received(NamedTuple):
    """One event, as the client received it."""

    id: int
    event: str
    data: str


class Cut(NamedTuple):
    """A cut after the event `after`; when the client reconnected, `missed` more were stored."""

    after: int
    running: bool
    missed: int


@dataclass(slots=True)
class Reading:
    """What all connections together received, and the status of a last request with the last id."""

    events: list[Received] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    status_at_end: int = 0

    @property
    def last_id(self) -> int:
        return self.events[-1].id if self.events else 0


class Check(NamedTuple):
    """One claim, and whether it held."""

    held: bool
    claim: str


def difference(written: Sequence[str], arrived: Sequence[str]) -> str | None:
    """The first difference between the lines that were written and those that arrived; None if there is none."""
    for number, (line, got) in enumerate(zip(written, arrived, strict=False), 1):
        if line != got:
            return f"line {number} was written as {line!r:.100}, and arrived as {got!r:.100}"
    if len(written) != len(arrived):
        return f"{len(written)} lines were written, and {len(arrived)} arrived"
    return None


def id_fault(ids: Sequence[int]) -> str | None:
    """The first id that is not the next of 1, 2, 3 …; None if all are."""
    for expected, got in enumerate(ids, 1):
        if got != expected:
            return f"id {got} came where {expected} was due"
    return None if ids else "there are none"


def check_reading(reading: Reading, written: Sequence[str], compiled: int) -> list[Check]:
    """Compare what arrived with the lines that the command wrote, and with the number of files that it compiled."""
    events, cuts = reading.events, reading.cuts
    lines = [event.data for event in events if event.event in {"stdout", "stderr"}]
    exits = [event.data for event in events if event.event == "exit"]
    done = [event.data == "[DONE]" for event in events]
    announced = sum(line.startswith("Compiling ") for line in written)
    apart, fault = difference(written, lines), id_fault([event.id for event in events])
    done_last = done.count(True) == 1 and done[-1]
    missed = "; ".join(f"after id {cut.after}, {cut.missed} more were stored before it came back" for cut in cuts)
    return [
        Check(
            len(written) > MISSED and exits == ['{"exit_code":0}'] and compiled == announced,
            f"the command wrote {len(written)} lines into its own file, and {compiled} compiled files; "
            f"its exit event: {', '.join(exits) or 'none'}",
        ),
        Check(
            len(cuts) == len(CUTS) and all(cut.running and cut.missed > 0 for cut in cuts),
            f"cut {len(cuts)} times in mid-stream: {missed}",
        ),
        Check(
            apart is None,
            f"{len(lines)} lines arrived over HTTP: "
            + ("every line, once, in order" if apart is None else f"NOT what was written: {apart}"),
        ),
        Check(
            fault is None,
            f"ids 1 to {reading.last_id} over {len(cuts) + 1} connections"
            + (", no gap, no repeat" if fault is None else f": {fault}"),
        ),
        Check(
            done_last and reading.status_at_end == NO_CONTENT,
            f"[DONE] came {'last' if done_last else 'NOT last, or not once'}; "
            f"a request with the last id was answered {reading.status_at_end}",
        ),
    ]


def check_cancel(seconds: float, names: Sequence[str], last: str) -> Check:
    return Check(
        seconds < CANCEL_LIMIT and "cancelled" in names and last == "[DONE]",
        f"a silent run was cancelled by another client: {seconds * 1000:.1f} ms from the request to the end of the "
        f"stream (target {CANCEL_TARGET * 1000:.0f} ms, limit {CANCEL_LIMIT * 1000:.0f} ms)",
    )


# Output


class DemoScreen(Progress):
    """Prints a line for each step, above a progress bar if standard output is a terminal."""

    def __init__(self) -> None:
        console = Console(markup=False, emoji=False, highlight=False, soft_wrap=True)
        columns = (TextColumn(" "), BarColumn(30), MofNCompleteColumn(), TextColumn("lines, {task.description}"))
        super().__init__(*columns, console=console, transient=True, disable=not console.is_interactive)
        self._task = self.add_task("", total=None, visible=False)

    def step(self, message: str) -> None:
        self.console.print(f"  {message}")

    def bar(self, done: int, total: int, description: str) -> None:
        self.update(self._task, completed=done, total=max(done, total), description=description, visible=done < total)

    def report(self, checks: Sequence[Check], seconds: float) -> None:
        click.echo("")
        for check in checks:
            mark = click.style("ok    ", fg="green") if check.held else click.style("FAILED", fg="red", bold=True)
            click.echo(f"  {mark}  {check.claim}")
        failed = sum(not check.held for check in checks)
        summary = f"{failed} of {len(checks)} checks FAILED" if failed else f"all {len(checks)} checks held"
        click.echo(f"\n  {summary}; {seconds:.1f} s")


# I/O


@dataclass(slots=True)
class DemoServer:
    """`penstock serve`, in a process of its own."""

    process: trio.Process
    url: str = ""
    output: list[str] = field(default_factory=list)

    async def listen(self, task_status: trio.TaskStatus[None]) -> None:
        """Read what it prints, so that it never waits for a full pipe; it has started when it has printed its URL."""
        assert self.process.stderr is not None  # noqa: S101  (a pipe, as it was started)
        rest = b""
        async for piece in self.process.stderr:
            *lines, rest = (rest + piece).split(b"\n")
            for line in lines:
                self.output.append(line.decode(errors="replace"))
                if not self.url and (found := re.search(r"serving on (http://\S+)", self.output[-1])):
                    self.url = found[1]
                    task_status.started()
        if not self.url:
            raise DemoError("the server did not start; it said:\n" + "\n".join(self.output))

    async def leave(self) -> Check:
        begun = time.perf_counter()
        self.process.terminate()
        with trio.move_on_after(LEAVE_LIMIT):
            await self.process.wait()
        took, code = time.perf_counter() - begun, self.process.returncode
        if code is None:
            return Check(held=False, claim=f"the server was still there {took:.1f} s after SIGTERM")
        return Check(code == 0, f"the server left with exit code {code}, {took * 1000:.0f} ms after SIGTERM")

    def client(self) -> httpx2.AsyncClient:
        """A new client; without `trust_env`, since no proxy stands between the demo and this machine."""
        return httpx2.AsyncClient(base_url=self.url, timeout=GUARD, trust_env=False)


@asynccontextmanager
async def serving(folder: Path, port: int) -> AsyncIterator[DemoServer]:
    """Start a server that works in `folder`; it has ended when the block is left, on every way out."""
    argv = [sys.executable, "-m", "penstock", "serve", "--producers", "penstock.cli.demo_producers:producers"]
    argv += ["--bind", f"127.0.0.1:{port}", "--log-level", "warning", "--drain-timeout", "0"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    environment["PYTHONUNBUFFERED"] = "1"
    # In a session of its own: a Ctrl-C in the terminal reaches the demo alone, which then ends the server in order.
    process = await trio.lowlevel.open_process(
        argv, cwd=folder, env=environment, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True
    )
    server = DemoServer(process)
    try:
        async with trio.open_nursery() as nursery:
            await nursery.start(server.listen)
            yield server
            nursery.cancel_scope.cancel(reason="the demo is over")
    finally:
        with trio.CancelScope(shield=True):  # it has a deadline: `leave` has one, and SIGKILL cannot be ignored
            if process.returncode is None:
                await server.leave()
            if process.returncode is None:
                process.kill()
            await process.wait()
        if process.stderr is not None:
            await process.stderr.aclose()


async def start(client: httpx2.AsyncClient, producer: str) -> str:
    response = await client.post("/v1/runs", json={"producer": producer})
    return f"/v1/runs/{response.raise_for_status().json()['id']}"


async def record(client: httpx2.AsyncClient, run: str) -> Any:
    return (await client.get(run)).raise_for_status().json()


async def read(server: DemoServer, run: str, reading: Reading, up_to: float, screen: DemoScreen, total: int) -> None:
    """Read on from the last id, over one connection, up to another id; then close the socket."""
    headers = {"Last-Event-ID": str(reading.last_id)} if reading.events else {}
    async with (
        server.client() as client,
        client.sse(f"{run}/stream", headers=headers) as source,
        aclosing(aiter(source)) as events,  # type: ignore[type-var]  # httpx2 does not say that it is a generator
    ):
        async for event in events:
            reading.events.append(Received(int(event.id or 0), event.event, event.data))
            screen.bar(reading.last_id, total, f"connection {len(reading.cuts) + 1}")
            if reading.last_id >= up_to:
                return


async def read_with_cuts(server: DemoServer, run: str, screen: DemoScreen, total: int) -> Reading:
    reading = Reading()
    async with server.client() as other:
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
        response = await other.get(f"{run}/stream", headers={"Last-Event-ID": str(reading.last_id)})
        reading.status_at_end = response.status_code
    return reading


async def cancel_silent_run(server: DemoServer) -> Check:
    received: list[tuple[str, str]] = []
    first = trio.Event()

    async def listen() -> None:
        async with server.client() as client, client.sse(f"{run}/stream") as source:
            async for event in source:
                received.append((event.event, event.data))
                first.set()

    async with server.client() as other:
        run = await start(other, "silent")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listen)
            await first.wait()
            begun = time.perf_counter()
            (await other.post(f"{run}/cancel", json={"reason": "the demo's second client"})).raise_for_status()
        seconds = time.perf_counter() - begun
    return check_cancel(seconds, [name for name, _ in received], received[-1][1])


async def demonstrate(folder: Path, port: int, screen: DemoScreen) -> list[Check]:
    total = sum(1 for where in FOLDERS for _ in where.glob("*.py")) + len(FOLDERS)
    async with serving(folder, port) as server:
        screen.step(f"penstock serve is up at {server.url}, process {server.process.pid}")
        async with server.client() as client:
            run = await start(client, "build")
        screen.step(f"compileall runs over {total - len(FOLDERS)} files; its output is {server.url}{run}/stream")
        reading = await read_with_cuts(server, run, screen, total)
        written = (folder / COPY).read_bytes().decode().split("\n")[:-1]
        compiled = sum(1 for _ in (folder / COMPILED).rglob("*.pyc"))
        checks = check_reading(reading, written, compiled)
        screen.step("a silent run: one client reads it, another one cancels it")
        checks.append(await cancel_silent_run(server))
        checks.append(await server.leave())
        if not all(check.held for check in checks):
            screen.step("\n    ".join(["the server said:", *server.output]))
        return checks


async def _until_signalled(port: int, screen: DemoScreen) -> list[Check] | None:
    """Carry out the demo; returns None if a signal ended it."""
    checks: list[Check] | None = None

    async def give_up(task_status: trio.TaskStatus[None]) -> None:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            task_status.started()
            await anext(aiter(signals))
            nursery.cancel_scope.cancel(reason="a signal")

    with tempfile.TemporaryDirectory(prefix="penstock-demo-") as folder, screen:
        async with open_nursery() as nursery:
            await nursery.start(give_up)
            with trio.fail_after(GUARD):
                checks = await demonstrate(Path(folder), port, screen)
            nursery.cancel_scope.cancel(reason="the demo is over")
    return checks


def run_demo(port: int = 0) -> int:
    """Carry out the demo, with progress and a report on stdout; returns 0 only if every check held."""
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
                click.echo(f"\nthe demo FAILED: it was not done after {GUARD:g} s", err=True)
            case _:
                raise
        return 1
    if checks is None:
        click.echo("\nstopped by a signal; nothing is left running", err=True)
        return INTERRUPTED
    screen.report(checks, time.perf_counter() - begun)
    return 0 if all(check.held for check in checks) else 1
