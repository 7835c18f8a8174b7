"""Stalls, kills and fails over Redis servers under runs and readers, and measures which of them notice.

    a process with 100 runs ──▶ redis-servers ──▶ a process with 200 readers
                                     ▲
               SIGSTOP, SIGKILL, a failover, slots that move

    cluster     three masters with a replica each; one master stalls, is replaced meanwhile, and is killed
    stalled     as cluster, but the other nodes do not notice the stall before the master is killed
    sentinel    a master with two replicas, killed again and again
    slots       three masters; the slots of all runs, and more, move to the next master and back

Every reader sees 1, 2, 3 ... to the end, without gap or repeat; every run is completed, or its readers learn that
the log has lost entries of it. The runs on the other nodes of a cluster notice nothing: this measures their pauses.

`python -m benchmarks.faults.failover --help` lists the options. Servers, processes and the clock are real.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from abc import abstractmethod
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, Final, NamedTuple, cast

import trio
from tests.support.redis_clusters import redis_cluster
from tests.support.redis_runs import record_of, whole
from tests.support.redis_sentinels import redis_sentinels
from tests.support.redis_servers import _talk

from benchmarks.faults.chaos import option, parser_of
from benchmarks.faults.failover_process import Child, child
from benchmarks.faults.failover_verdict import CONCERNED, OTHERS, Answer, Limits, Reading, Story, judge, table

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.support.redis_servers import RedisServer

GUARD: Final = 60.0
"""Seconds until all runs have ended, and their readers have read it, after the request to end."""
LONG: Final = 1000.0
"""A node timeout, in seconds, within which no node is replaced."""
REFUSED: Final = 12.0
"""Seconds within which a start fails whose server is away: it waits for its turn, for an answer, and takes it back."""
CANCELS: Final = 10
"""The runs that are cancelled while a node stands still."""
STEP: Final = 0.01
"""Seconds between two steps of the move of a slot that has keys."""


@dataclass(frozen=True)
class Settings:
    """The options of the command."""

    runs: int = option(100, "how many runs there are")
    readers: int = option(200, "how many readers they have together")
    rate: float = option(10.0, "the events a second of each run")
    calm: float = option(8.0, "the seconds before the trouble, and after it")
    stall: float = option(20.0, "cluster, stalled: for how many seconds a master stands still before it is killed")
    node_timeout: float = option(2.0, "cluster: after how many seconds without an answer a node is replaced")
    kills: int = option(5, "sentinel: how often the master is killed")
    slots: int = option(300, "slots: how many slots are moved, and back")
    lease: float = option(10.0, "the lease of the runs, in seconds")
    notice: float = option(
        1.0, "by how many seconds the longest pause of others may grow; a start or cancel may take it"
    )
    recover: float = option(8.0, "seconds from the end of the trouble until those concerned go on")
    seed: int = option(1, "repeats the choices that are made here")


class Report(NamedTuple):
    wrong: list[str]
    story: Story
    table: list[str]


class Trial:
    """A whole trial; a subclass makes the trouble."""

    owners: Child
    readers: Child
    asking: trio.Nursery

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.story = Story(Limits(settings.notice, settings.recover, REFUSED))
        self.choose = Random(settings.seed)
        self.wrong: list[str] = []
        self.late = 0.0
        self.did = "starting"
        """The present step, for the progress line."""
        self.runs = [f"run-{number}" for number in range(1, settings.runs + 1)]
        self._probes = count(1)
        self._began = time.monotonic()

    @abstractmethod
    def servers(self) -> Any:
        """The servers, as an async context manager that yields their URL."""

    @abstractmethod
    async def prepare(self) -> None:
        """Choose the runs that are concerned; the processes run already."""

    @abstractmethod
    async def trouble(self) -> None:
        """What is done to the servers."""

    async def meanwhile(self) -> None:
        """What else happens during that: runs are started."""
        while True:
            self.asking.start_soon(self.probe, self.group_of("late"))
            await trio.sleep(0.5)

    @abstractmethod
    async def node_of(self, run: str) -> RedisServer:
        """Where a run is in the end."""

    def group_of(self, run: str) -> str:  # noqa: ARG002
        """The group of a run."""
        return CONCERNED

    async def go(self, folder: Path, show: Callable[[str], None]) -> None:
        """Run the trial, from the first server to the last reader."""
        s, story = self.settings, self.story
        async with self.servers() as url, trio.open_nursery() as nursery:
            async with (
                child(url, s.lease, folder / "owners", nursery) as self.owners,
                child(url, s.lease, folder / "readers", nursery) as self.readers,
            ):
                nursery.start_soon(self._tick, show)
                await self.prepare()
                await self._populate()
                story.calm = time.monotonic()
                self.did = "all is calm"
                await trio.sleep(s.calm)
                story.trouble = time.monotonic()
                async with trio.open_nursery() as self.asking:
                    async with trio.open_nursery() as causes:
                        causes.start_soon(self.meanwhile)
                        await self.trouble()
                        causes.cancel_scope.cancel()
                    self.did = "all is calm again"
                    await trio.sleep(s.calm)
                story.enough = time.monotonic()
                await self._finish(folder)
            nursery.cancel_scope.cancel()

    async def _populate(self) -> None:
        every = 1 / self.settings.rate
        for run in self.runs:
            self.story.groups[run] = self.group_of(run)
            await self.owners.send("start", run, every=every)
        for run in self.runs:
            if (error := (await self.owners.heard("start", run))["error"]) is not None:
                raise RuntimeError(f"{run} could not be started: {error}")
        followed = [self.runs[number % self.settings.runs] for number in range(self.settings.readers)]
        followed += self.runs[self.settings.runs :]
        for number, run in enumerate(followed, 1):
            await self.readers.send("follow", run, reader=f"reader {number}")
        while self.readers.stands["readers"] < len(followed):  # noqa: ASYNC110  (it says so now and then)
            await trio.sleep(0.1)

    async def _finish(self, folder: Path) -> None:
        self.did = "the runs end"
        await self.owners.send("enough")
        with trio.move_on_after(GUARD):
            while self.readers.stands["readers"] or self.owners.stands["runs"]:  # noqa: ASYNC110  (the same)
                await trio.sleep(0.2)
        self.did = "looking at what is left"
        async with trio.open_nursery() as nursery:
            for one, name in ((self.owners, "owners"), (self.readers, "readers")):
                nursery.start_soon(self._report, one, folder / f"{name}.json", name)
        await self._audit()
        await self.owners.stop()
        await self.readers.stop()
        for one, name in ((self.owners, "owners"), (self.readers, "readers")):
            if one.code != 0:
                self.wrong.append(f"the process of the {name} ended with code {one.code}")
            lines = one.output.splitlines()
            bad = [line for line in lines if " ERROR " in line or "Traceback" in line or "Error:" in line]
            self.wrong += [f"the process of the {name} said: {line}" for line in bad[:5]]

    async def _report(self, one: Child, to: Path, name: str) -> None:
        runs = [*self.story.groups] if name == "readers" else []
        await one.ask("report", to=str(to), runs=runs)
        said = json.loads(await trio.Path(to).read_text())
        self.story.readings += map(Reading.of, said["followings"])
        self.story.records |= said["records"]
        self.late = max(self.late, said["late"])
        if said["left"]:
            self.wrong.append(f"the process of the {name} has left: {said['left']}")

    async def _audit(self) -> None:
        """Look at what Redis itself has of the runs that are complete."""
        for run, record in self.story.records.items():
            if record["status"] == "completed":
                try:
                    await whole(await self.node_of(run), run)
                except (AssertionError, IndexError, KeyError) as error:
                    self.wrong.append(f"{run} is not whole in Redis: {error!r}")

    async def probe(self, group: str, *, key: Callable[[str], bool] = lambda _: True) -> None:
        """Start a run more whose id is one of these, and read it."""
        run = next(name for name in (f"late-{n}" for n in self._probes) if key(name))
        answer = Answer(run, group, time.monotonic())
        self.story.starts.append(answer)
        said = await self.owners.ask("start", run, every=1 / self.settings.rate)
        answer.took, answer.error = said["took"], said["error"]
        if answer.error is None:
            self.story.groups[run] = group
            await self.readers.send("follow", run, reader="a late reader")

    async def cancel(self, run: str) -> None:
        """Cancel a run of those that are not concerned, from the readers' process."""
        answer = Answer(run, OTHERS, time.monotonic())
        self.story.cancels.append(answer)
        said = await self.readers.ask("cancel", run)
        answer.took, answer.error = said["took"], said["error"]

    async def _tick(self, show: Callable[[str], None]) -> None:
        while True:
            await trio.sleep(3.0)
            show(self.progress())

    def progress(self) -> str:
        """The state of the trial, in a line."""
        runs, stands = self.owners.stands["runs"], self.readers.stands
        return (
            f"{time.monotonic() - self._began:4.0f} s  {self.did}; {runs} runs, {stands['readers']} readers, "
            f"{stands['entries']:,} entries, {stands['faults']} faults"
        )

    def figures(self) -> dict[str, str]:
        """More rows for the table."""
        warnings = sum(one.output.count(" WARNING ") for one in (self.owners, self.readers))
        return {"warnings": f"{warnings}", "latest tick of a process": f"{self.late:.2f} s"}


class OfCluster(Trial):
    """Trouble with one master of a cluster."""

    replicas = 1
    detected = True
    """The other nodes notice a stall."""

    @asynccontextmanager
    async def servers(self) -> AsyncIterator[str]:
        timeout = self.settings.node_timeout if self.detected else LONG
        async with redis_cluster(replicas=self.replicas, node_timeout=timeout) as self.cluster:
            self.places = {slot: node for node in self.cluster.nodes[:3] for slot in await _slots(node)}
            yield self.cluster.url

    async def prepare(self) -> None:
        """The master that the owners' cancel requests are on is the one that stands still."""
        self.victim = self.place(f"{{sse:proc:{self.owners.owner}}}:inbox")
        others = [run for run in (f"cancel-{n}" for n in range(1000)) if self.group_of(run) == OTHERS]
        self.doomed = others[:CANCELS]
        self.runs += self.doomed

    def place(self, key: str) -> RedisServer:
        """The master that had this key at first."""
        return self.places[self.cluster.slot(key)]

    def group_of(self, run: str) -> str:
        return CONCERNED if self.place(record_of(run)) is self.victim else OTHERS

    async def node_of(self, run: str) -> RedisServer:
        return await self.cluster.node_of(record_of(run))

    async def trouble(self) -> None:
        (replica,) = await self.cluster.replicas(self.victim)
        began = self.story.trouble = time.monotonic()
        self.victim.pause()
        self.did = "a master stands still"
        if self.detected:
            await self.cluster.failed_over(self.victim)
            self.story.outages.append(time.monotonic() - began)
            self.did = "a master stands still, and has been replaced"
        await trio.sleep(max(0.0, began + self.settings.stall - time.monotonic()))
        await self.victim.kill()
        self.did = "a master has been killed"
        if not self.detected:
            await self.cluster.promote(replica, "TAKEOVER")
            self.story.outages.append(time.monotonic() - began)
        await self.cluster.settled()

    async def meanwhile(self) -> None:
        for doomed in self.doomed:
            self.asking.start_soon(partial(self.probe, OTHERS, key=lambda run: self.group_of(run) == OTHERS))
            self.asking.start_soon(partial(self.probe, CONCERNED, key=lambda run: self.group_of(run) == CONCERNED))
            self.asking.start_soon(self.cancel, doomed)
            await trio.sleep(self.settings.stall / (CANCELS + 1))


class Stalled(OfCluster):
    """The other nodes do not notice the stall."""

    detected = False


class Slots(OfCluster):
    """Slots that move to the next master, and back."""

    replicas = 0

    async def prepare(self) -> None:
        own = dict.fromkeys(self.cluster.slot(record_of(run)) for run in self.runs)
        more = [slot for slot in self.choose.sample(range(2**14), self.settings.slots) if slot not in own]
        self.moving = [*own, *more[: max(0, self.settings.slots - len(own))]]
        self.choose.shuffle(self.moving)
        self._ids = [await node.command("CLUSTER MYID") for node in self.cluster.nodes]
        self._longest = 0.0

    def group_of(self, run: str) -> str:  # noqa: ARG002
        return CONCERNED

    meanwhile = Trial.meanwhile

    async def trouble(self) -> None:
        for back in (False, True):
            for number, slot in enumerate(self.moving):
                self.did = f"{number} of {len(self.moving)} slots have been moved{' back' if back else ''}"
                await self._move(slot, back=back)
        self.story.outages.append(self._longest)
        await self.cluster.settled()

    async def _move(self, slot: int, *, back: bool) -> None:
        """Move a slot as a resharding does it, with its keys one by one."""
        nodes = self.cluster.nodes
        home = nodes.index(self.places[slot])
        one, two = ((home + 1) % 3, home) if back else (home, (home + 1) % 3)
        source, to, third = nodes[one], nodes[two], nodes[3 - one - two]
        began = time.monotonic()
        await _told(to, ("CLUSTER", "SETSLOT", slot, "IMPORTING", self._ids[one]))
        await _told(source, ("CLUSTER", "SETSLOT", slot, "MIGRATING", self._ids[two]))
        while keys := (await _told(source, ("CLUSTER", "GETKEYSINSLOT", slot, 1)))[0]:
            await trio.sleep(STEP)
            await _told(source, ("MIGRATE", "127.0.0.1", to.port, "", 0, 5000, "KEYS", *keys))
            await trio.sleep(STEP)
        for node in (to, source, third):
            await _told(node, ("CLUSTER", "SETSLOT", slot, "NODE", self._ids[two]))
        self._longest = max(self._longest, time.monotonic() - began)


class OfSentinel(Trial):
    """A master that is killed again and again."""

    @asynccontextmanager
    async def servers(self) -> AsyncIterator[str]:
        async with redis_sentinels(replicas=2) as self.sentinels:
            yield self.sentinels.url

    async def prepare(self) -> None:
        pass

    async def node_of(self, run: str) -> RedisServer:  # noqa: ARG002
        return await self.sentinels.master()

    async def trouble(self) -> None:
        for number in range(1, self.settings.kills + 1):
            began = time.monotonic()
            killed = await self.sentinels.kill_master()
            self.did = f"master {number} has been killed"
            await self.sentinels.failed_over(killed)
            self.story.outages.append(time.monotonic() - began)
            self.did = f"master {number} has been replaced"
            await self.sentinels.rejoin(killed, empty=bool(number % 2))
            self.did = f"master {number} is a replica"
            await trio.sleep(self.choose.uniform(0.5, 2.0))


async def _slots(node: RedisServer) -> set[int]:
    """The slots that a node has, by what it says."""
    said = await node.command("CLUSTER", "SLOTS")
    return {slot for first, last, owner, *_ in said for slot in range(first, last + 1) if owner[1] == node.port}


async def _told(node: RedisServer, *commands: tuple[Any, ...]) -> list[Any]:
    return await trio.to_thread.run_sync(partial(_talk, node.url, *commands))


TRIALS: Final[dict[str, type[Trial]]] = {
    "cluster": OfCluster, "stalled": Stalled, "sentinel": OfSentinel, "slots": Slots
}  # fmt: skip


async def failover(scenario: str, settings: Settings, show: Callable[[str], None] = lambda _: None) -> Report:
    """Let it happen, and say what is wrong with what has come of it.

    Args:
        scenario: one of `TRIALS`.
        settings: how much of it.
        show: is given a line every few seconds about how it stands.
    """
    with tempfile.TemporaryDirectory(prefix="penstock-failover-") as folder:
        trial = TRIALS[scenario](settings)
        await trial.go(Path(folder), show)
        figures = trial.figures()
    return Report([*judge(trial.story), *trial.wrong], trial.story, table(trial.story, figures))


def _show(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main() -> int:
    """All scenarios that were asked for, each with its table, and what is wrong. The exit code."""
    parser = parser_of(
        cast("Any", Settings),
        "just failover",
        "Runs in one process, their readers in another, over real Redis servers that stand still, die, and hand over "
        "their slots. Then see whether every reader of every run has seen all of it once, in order, to its end, and "
        "whether the runs on the servers that were well noticed anything. Exits with 1, and a list, if anything is "
        "wrong. It takes most of two cores: on a machine with other work, the pauses mean little.",
    )
    parser.add_argument("scenario", nargs="*", default=[*TRIALS], help=f"{', '.join(TRIALS)}; by default all")
    options = vars(parser.parse_args())
    if unknown := [name for name in options["scenario"] if name not in TRIALS]:
        parser.error(f"there is no scenario {unknown[0]}; there are {', '.join(TRIALS)}")
    scenarios = options.pop("scenario")
    wrong = 0
    for scenario in scenarios:
        _show(f"{scenario}:")
        report = trio.run(failover, scenario, Settings(**options), _show)
        _show("\n".join(["", *report.table, ""]))
        for each in report.wrong:
            _show(f"WRONG: {each}")
        _show(f"{scenario}: {len(report.wrong) or 'nothing'} {'things are' if len(report.wrong) > 1 else 'is'} wrong\n")
        wrong += len(report.wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
