"""One process of a failover test: a supervisor that takes commands on stdin and reports their results on stdout.

    python -m benchmarks.faults.failover_process URL LEASE

A line each, in JSON. `do` is one of these, and `run` the run that it is about:

    start     a run that yields an event `every` seconds, until `enough`
    follow    read a run to its end, as `reader`, coming back with the cursor when sent away
    cancel    ask for it
    enough    all runs of this process are to end
    report    write down what the readers saw, and the record of each of `runs`, to the file `to`

All but `follow` are answered, when done, with `do`, `run`, `took`, and `error`, if something was raised. All times are
those of the monotonic clock, which is the same for all processes.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import time
from array import array
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final

import trio
from tests.support.command_line import environment
from tests.support.processes import ROOT
from tests.support.redis_runs import left_over, supervisor_at
from tests.support.wire import block_of

from benchmarks.faults.chaos_producers import content
from benchmarks.faults.chaos_verdict import Following, Sequence
from penstock.errors import LogUnavailable, PenstockError, ReaderReleased, RunNotFound
from penstock.sse import Event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.wire import Block

    from penstock.log import Entry
    from penstock.supervisor import Supervisor

PULSE: Final = 0.3
"""Seconds between two reports of the state."""
TICK: Final = 0.1
"""Seconds between two looks at how late this process is."""
MISSING: Final = 12.0
"""For how many seconds a run that was started may be missing, for who has just come."""
PAUSE: Final = (0.05, 0.4)
"""The shortest and longest time, in seconds, that a reader stays away after a refusal."""
SETTLED: Final = 15.0
"""Seconds after which nothing may be left of runs that are over."""


class Process:
    """What one process does."""

    def __init__(self, supervisor: Supervisor, nursery: trio.Nursery) -> None:
        self._supervisor = supervisor
        self._nursery = nursery
        self._enough = trio.Event()
        self._followings: list[tuple[Following, array[float]]] = []
        self._choose = Random(supervisor._owner)
        self._late = 0.0

    async def obey(self) -> None:
        """Do what comes in, until that is over."""
        _say(do="ready", run=self._supervisor._owner, took=0.0)
        rest = b""
        async with trio.lowlevel.FdStream(os.dup(sys.stdin.fileno())) as stdin:
            async for piece in stdin:
                *lines, rest = (rest + piece).split(b"\n")
                for line in lines:
                    self._nursery.start_soon(self._do, json.loads(line))

    async def tick(self) -> None:
        """Notice how late this process is."""
        while True:
            due = trio.current_time() + TICK
            await trio.sleep_until(due)
            self._late = max(self._late, trio.current_time() - due)

    async def pulse(self) -> None:
        """Say how it stands, again and again."""
        while True:
            await trio.sleep(PULSE)
            over = sum(following.sequence.over for following, _ in self._followings)
            entries = sum(following.sequence.cursor for following, _ in self._followings)
            faults = sum(len(following.sequence.faults) for following, _ in self._followings)
            readers = len(self._followings) - over
            _say(do="stands", runs=self._supervisor.live_runs, readers=readers, entries=entries, faults=faults)

    async def _do(self, order: dict[str, Any]) -> None:
        what, run, began, error = order["do"], order.get("run", ""), time.monotonic(), None
        try:
            if what == "start":
                await self._supervisor.start(self._says, run, order["every"], run_id=run)
            elif what == "follow":
                await self._follow(run, order["reader"])
                return
            elif what == "cancel":
                await self._supervisor.cancel(run)
            elif what == "enough":
                self._enough.set()
            elif what == "report":
                await self._report(order["runs"], Path(order["to"]))
        except PenstockError as raised:
            error = f"{type(raised).__name__}: {raised}"
        _say(do=what, run=run, at=began, took=time.monotonic() - began, error=error)

    async def _says(self, run: str, every: float) -> AsyncIterator[Event]:
        """A run's events; one that was delayed does not catch up."""
        execution = os.urandom(8).hex()
        due = trio.current_time() + self._choose.uniform(0.0, every)
        number = 0
        while not self._enough.is_set():
            number += 1
            yield Event.json(content(run, number, execution))
            await trio.sleep_until(due)
            due = max(due + every, trio.current_time())

    async def _follow(self, run: str, reader: str) -> None:
        following = Following(reader, run, time.monotonic(), Sequence(run))
        arrivals = array("d")
        self._followings.append((following, arrivals))
        sequence = following.sequence
        while not sequence.over:
            try:
                async with self._supervisor.follow(run, sequence.cursor) as entries:
                    async for entry in entries:
                        arrivals.append(time.monotonic())
                        sequence.take(_block_of(entry))
                if not sequence.over:
                    sequence.fault(f"the end came after {sequence.cursor}, and was not said")
                    return
            except (ReaderReleased, LogUnavailable) as error:
                following.step(time.monotonic(), f"was sent away: {error};")
            except RunNotFound as error:
                following.step(time.monotonic(), f"was refused: {error};")
                if time.monotonic() - following.began > MISSING or sequence.cursor:
                    sequence.fault(f"{error}, after {sequence.cursor}")
                    return
            except PenstockError as error:
                sequence.fault(f"{type(error).__name__}: {error}, after {sequence.cursor}")
                return
            if not sequence.over:
                following.cuts += 1
                await trio.sleep(self._choose.uniform(*PAUSE))
        following.ended = time.monotonic()

    async def _report(self, runs: list[str], to: Path) -> None:
        with trio.move_on_after(SETTLED):
            while left_over(self._supervisor):  # noqa: ASYNC110  (there is no event for it)
                await trio.sleep(0.05)
        records: dict[str, Any] = {}
        for run in runs:
            try:
                records[run] = (await self._supervisor.get(run)).to_json()
            except PenstockError as error:
                records[run] = {"status": str(error), "seq": 0}
        followings = [
            {**asdict(following), "path": [*following.path], "arrivals": [*arrivals]}
            for following, arrivals in self._followings
        ]
        left = repr(left_over(self._supervisor)) if left_over(self._supervisor) else ""
        report = {"followings": followings, "records": records, "left": left, "late": self._late}
        await trio.Path(to).write_text(json.dumps(report))


def _block_of(entry: Entry) -> Block:
    block = block_of(entry.wire.decode().removesuffix("\n\n"))
    return block._replace(event="error") if block.event == "cancelled" else block  # it has a code as well


def _say(**fields: Any) -> None:
    sys.stdout.write(json.dumps(fields) + "\n")
    sys.stdout.flush()


class Child:
    """A process that runs `failover_process.py`."""

    def __init__(self, process: trio.Process, said: Path) -> None:
        self._process = process
        self._said = said
        self._answers: dict[tuple[str, str], dict[str, Any]] = {}
        self._news = trio.Event()
        self._sending = trio.Lock()
        self.stands: dict[str, int] = {"runs": 0, "readers": 0, "entries": 0, "faults": 0}
        """How it stood at last."""
        self.owner = ""
        """Its name in the log."""
        self.code: int | None = None

    async def listen(self) -> None:
        """Take what it says, until it ends."""
        assert self._process.stdout is not None
        rest = b""
        async for piece in self._process.stdout:
            *lines, rest = (rest + piece).split(b"\n")
            for said in map(json.loads, lines):
                if said["do"] == "stands":
                    self.stands = said
                else:
                    self._answers[said["do"], "" if said["do"] == "ready" else said["run"]] = said
            self._news.set()
            self._news = trio.Event()
        self.code = await self._process.wait()
        self._news.set()

    async def send(self, do: str, run: str = "", **more: Any) -> None:
        """Send it a command."""
        assert self._process.stdin is not None
        async with self._sending:
            await self._process.stdin.send_all(json.dumps({"do": do, "run": run, **more}).encode() + b"\n")

    async def heard(self, do: str, run: str = "") -> dict[str, Any]:
        """What it answers to that."""
        while (do, run) not in self._answers:
            if self.code is not None:
                raise RuntimeError(f"the process ended with code {self.code}; its output:\n{self.output}")
            await self._news.wait()
        return self._answers[do, run]

    async def ask(self, do: str, run: str = "", **more: Any) -> dict[str, Any]:
        """`notify`, and what is `heard` then."""
        await self.send(do, run, **more)
        return await self.heard(do, run)

    async def stop(self) -> None:
        """Let it end in order."""
        assert self._process.stdin is not None
        await self._process.stdin.aclose()
        while self.code is None:
            await self._news.wait()

    def kill(self) -> None:
        self._process.kill()

    @property
    def output(self) -> str:
        """What it has written to stderr."""
        return self._said.read_text()


@asynccontextmanager
async def child(url: str, lease: float, said: Path, nursery: trio.Nursery) -> AsyncIterator[Child]:
    """A process that is ready; it is killed if it has not ended when the block is left."""
    with said.open("wb") as stderr:
        process = await trio.lowlevel.open_process(
            [sys.executable, "-m", "benchmarks.faults.failover_process", url, str(lease)],
            cwd=ROOT,
            env=environment(),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
    one = Child(process, said)
    try:
        nursery.start_soon(one.listen)
        one.owner = (await one.heard("ready"))["run"]
        yield one
    finally:
        one.kill()
        with trio.CancelScope(shield=True):
            await process.wait()


async def main(url: str, lease: float) -> None:
    """Serve until stdin is over."""
    async with supervisor_at(url, lease=lease) as supervisor, trio.open_nursery() as nursery:
        process = Process(supervisor, nursery)
        nursery.start_soon(process.tick)
        nursery.start_soon(process.pulse)
        await process.obey()
        nursery.cancel_scope.cancel()


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    with suppress(KeyboardInterrupt):
        trio.run(main, sys.argv[1], float(sys.argv[2]))
