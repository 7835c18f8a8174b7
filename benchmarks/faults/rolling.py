"""Restarts a server of several workers under load, then kills a worker every second, and checks what readers see.

    penstock serve --workers 4   parent ─┬─ worker 1 ─┐                 ┌─ 200 readers, each on a run,
                   ▲                     ├─ worker 2 ─┼─ redis-server ──┤  and on the next one when that is over;
    SIGTERM to all ┘ then SIGKILL to one ┴─ ...      ─┘                 └─ back with its cursor when it is cut off

The checked promises: a reader sees 1, 2, 3 ... to the end of its run over any number of reconnects. At
a restart /readyz says 503 before connections are refused, every run has its last entry, and the server ends with code 0
and says so. Only the runs of a killed worker are lost, another worker takes its place, and readers of these runs
learn it a lease and little more after the kill; or after the start of the first worker that then lives for so long,
since a new worker waits for a lease before it ends lost runs.

`python -m benchmarks.faults.rolling --help` lists the options. The servers, the readers and the verdict are those of
`chaos.py`.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

import trio
from tests.support.redis_runs import record_of

from benchmarks.faults import chaos
from benchmarks.faults.chaos import GONE, UNAVAILABLE, Chaos, Server, main, option, parser_of
from benchmarks.faults.chaos_verdict import Life, slowest_notice
from penstock.cli.host import STOPPED, STOPPED_AFTER_DEATHS

if TYPE_CHECKING:
    import random
    from collections.abc import Callable

    from tests.support.redis_servers import RedisServer

    from benchmarks.faults.chaos_verdict import Order, Story

KILLED: Final = f"was ended by signal {signal.SIGKILL:d}"
"""The parent's message about a worker that was killed."""


RESTART: Final = 3.0
"""Seconds that a restart takes, about, beyond the drain."""


@dataclass(frozen=True)
class Settings(chaos.Settings):
    """The options of the command."""

    seconds: float = field(default=0.0, init=False)
    servers: int = field(default=1, init=False)
    workers: int = option(4, "how many workers the server has")
    restarts: int = option(3, "how often the server is restarted, in the first phase")
    calm: float = option(7.0, "how long the server is left alone before each restart, in seconds")
    drain_timeout: float = option(2.0, "how long runs may go on when the server is to end, in seconds")
    killing: float = option(30.0, "how long workers are killed, in the second phase, in seconds")
    kill_every: float = option(1.0, "the seconds from one kill to the next")
    runs: int = option(500, "how many runs are started, all the time")
    readers: int = option(200, "how many readers there are at a time; each follows one run after the other")
    shortest: float = option(3.0, "the seconds that the shortest run takes")
    longest: float = option(12.0, "the seconds that the longest run takes")
    slack: float = option(4.0, "how many seconds after kill and lease readers may hear that a run is lost")

    def __post_init__(self) -> None:
        restart = self.drain_timeout + RESTART
        object.__setattr__(self, "seconds", self.restarts * (self.calm + restart) + self.lease + self.killing)


class Group(Server):
    """A server that is a parent and its workers.

    Attributes:
        workers: the lives of all that were seen, by name.
        spared: how often none was killed, since no other served.
    """

    suffix: ClassVar[str] = "/{pid}"

    def __init__(self, port: int, redis: str, witness: Path, settings: Settings) -> None:
        options = f"--workers {settings.workers} --max-worker-deaths 1000 --drain-timeout {settings.drain_timeout}"
        super().__init__(1, port, redis, witness, settings.lease, *options.split())
        self.workers: dict[str, Life] = {}
        self.spared = 0

    def look(self) -> list[Life]:
        """The workers that are there."""
        assert self._process is not None
        parent = self._process.pid
        children = ""
        with suppress(OSError):
            children = Path(f"/proc/{parent}/task/{parent}/children").read_text()
        names = [f"{self.life.name}/{pid}" for pid in children.split()]
        lives = [self.workers.setdefault(name, Life(name, trio.current_time())) for name in names]
        return [life for life in lives if life.killed is None]

    def killed(self) -> int:
        """How many workers were killed."""
        return sum(life.killed is not None for life in self.workers.values())

    def kill_one(self, choose: random.Random) -> None:
        """Kill a worker if another one serves: otherwise slow starts would leave none that serves."""
        there = self.look()
        life = choose.choice(there) if there else None
        if life is None or not any(other.ready for other in there if other is not life):
            self.spared += 1
            return
        life.killed = trio.current_time()
        os.kill(int(life.name.partition("/")[2]), signal.SIGKILL)

    async def restart(self) -> tuple[float, float]:
        """Stop it and wait until it serves again; the seconds until it had ended, and until it served."""
        there, before, began = self.look(), self.life, trio.current_time()
        for life in there:
            life.stopped = began
        await self.stop(again=True)
        ended = trio.current_time()
        while self.life is before or self.life.ready is None:  # noqa: ASYNC110  (there is no event for it)
            await trio.sleep(0.01)
        return ended - began, self.life.ready - began

    def _signal(self, process: trio.Process, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)

    async def _listen_to(  # noqa: ASYNC128  (it hands it on)
        self, process: trio.Process, task_status: trio.TaskStatus[None]
    ) -> None:
        before = len(self.said)
        await super()._listen_to(process, task_status)
        last = self.said[before:].rpartition("penstock: ")[2].strip()
        mourned = KILLED in self.said[before:]
        if last != STOPPED and not (mourned and last == STOPPED_AFTER_DEATHS):
            self.wrong.append(f"the last that server {self.life.name} said is {last!r}")


class Rolling(Chaos):
    """A whole trial: restarts, then kills."""

    settings: Settings
    group: Group

    def __init__(self, settings: Settings, redis: RedisServer, witness: Path) -> None:
        super().__init__(settings, redis, witness)
        self.arriving = 2.0
        self.ordering = settings.seconds
        self.restarts: list[tuple[float, float]] = []
        self.second_phase = inf
        self._killing = trio.Event()

    def _servers(self, ports: list[int]) -> list[Server]:
        self.group = Group(ports[0], self.redis.url, self.witness, self.settings)
        return [self.group]

    async def go_on(self, show: Callable[[str], None]) -> None:
        """Run the trial, from the first start to the last reader."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._see_workers)
            await super().go_on(show)
            nursery.cancel_scope.cancel()

    async def _see_workers(self) -> None:
        """Take down when each begins, and when it has found the others: from then on it can find that they are gone."""
        while True:
            there = {life.name.partition("/")[2]: life for life in self.group.look()}
            for channel in await self.redis.command("PUBSUB", "CHANNELS", "sse:proc:*"):
                life = there.get(channel.rpartition(":")[2].partition("-")[0])
                if life is not None and life.ready is None:
                    life.ready = trio.current_time()
            await trio.sleep(0.1)

    async def _killer(self) -> None:
        s = self.settings
        for _ in range(s.restarts):
            await trio.sleep(s.calm)
            async with trio.open_nursery() as nursery:
                await nursery.start(self._see_it_leave)
                self.restarts.append(await self.group.restart())
                nursery.cancel_scope.cancel()
        await trio.sleep(s.lease)  # from then on workers end the runs of killed ones
        self.second_phase = trio.current_time()
        self._killing.set()
        choose = self._chooser("killer")
        for number in range(int(s.killing / s.kill_every)):
            await trio.sleep_until(self.second_phase + (number + 1) * s.kill_every)
            self.group.kill_one(choose)

    async def _see_it_leave(self, task_status: trio.TaskStatus[None]) -> None:
        """Request /readyz until the server is gone; a load balancer must have been warned before."""
        said = [(await self._ask(self.group, "GET", "/readyz", {}))[0]]
        task_status.started()
        with suppress(*GONE):
            while True:
                said.append((await self._ask(self.group, "GET", "/readyz", {}))[0])
                await trio.sleep(0.01)
        if UNAVAILABLE not in said:
            self.wrong.append(f"server {self.group.life.name} was gone, and /readyz had said {set(said)}")

    async def _start(self, order: Order) -> None:
        s = self.settings
        if trio.current_time() >= self.began + s.seconds - s.killing:
            await self._killing.wait()  # restarts may take longer than was thought, and there must be runs to lose
        await super()._start(order)

    async def _follow(self, name: str, order: Order, choose: random.Random, *, drops: bool = False) -> None:
        await super()._follow(name, order, choose, drops=drops)  # every reconnect is the server's doing

    def progress(self) -> str:
        """The state of the trial, in a line."""
        return f"{super().progress()}; {len(self.restarts)} restarts, {self.group.killed()} workers killed"

    async def audit(self) -> None:
        """Read everything again; by then there are as many workers as there should be."""
        await super().audit()
        begun = {run for run, _, _ in super().story().begun}
        for order in self.orders:
            if order.ids and order.name not in begun:  # only its record names its owner
                owner = await self.redis.command("HGET", record_of(order.id), "owner")
                name = f"{self.group.life.name}/{owner.partition('-')[0]}"
                order.heard = self.group.workers.get(name, order.heard)
        with trio.move_on_after(self.settings.slack):
            while len(self.group.look()) != self.settings.workers:  # noqa: ASYNC110  (there is no event for it)
                await trio.sleep(0.01)
            return
        self.wrong.append(f"there are {len(self.group.look())} workers in the end")

    def story(self) -> Story:
        """With the lives of the workers."""
        story = super().story()
        story.lives = {**story.lives, **self.group.workers}
        story.mortals = [*self.group.workers.values()]
        return story

    def what_servers_said(self) -> list[str]:
        """Messages that a server should not have written, or has not written."""
        wrong = super().what_servers_said()
        if (said := self.group.said.count(KILLED)) != (killed := self.group.killed()):
            wrong.append(f"{killed} workers were killed, and the server said so of {said}")
        return wrong

    def figures(self, story: Story) -> dict[str, str]:
        """More rows for the table."""
        followings = self.followings
        opened = sum(f.drops + f.cuts + (f.ended is not None) for f in followings)
        late = [f for f in followings if f.began >= self.second_phase]
        ended, served = zip(*self.restarts, strict=True)
        notice = slowest_notice(story, pauses=False, limit=self.settings.lease + self.settings.slack)
        return {
            "slowest lost-notice, a worker there": f"{notice:.2f} s",
            "slowest resume, no restarts": f"{max((f.slowest for f in late), default=0.0):.2f} s",
            "kills left out, no other served": f"{self.group.spared}",
            "streams opened": f"{opened:,}",
            "restarts": f"{len(self.restarts)}",
            "  runs interrupted": f"{sum(order.status == 'failed' for order in self.orders)}",
            "  slowest, until it had ended": f"{max(ended):.2f} s",
            "  slowest, until it served again": f"{max(served):.2f} s",
            **super().figures(story),
        }


def _arguments() -> Settings:
    parser = parser_of(
        Settings,
        "just rolling",
        "Start one server of several workers over a Redis, runs on it all the time, and readers of the runs. First "
        "end it with SIGTERM to all its processes and start it again, several times; then kill a worker every second. "
        "Then see whether every reader of every run has seen all of it once, in order, to its end, and soon heard of "
        "what was lost; whether the server warned before it was gone, ended with code 0, and replaced its workers. "
        "Exits with 1, and a list, if anything is wrong. It takes all of two cores: on a machine with other work, "
        "the times mean little.",
    )
    settings = Settings(**vars(parser.parse_args()))
    if settings.workers < 2 or settings.restarts < 1 or not 0 < settings.shortest <= settings.longest:
        parser.error(
            "it takes at least 2 workers, one to kill and one to notice, at least 1 restart, and a shortest run that "
            "is not longer than the longest"
        )
    return settings


if __name__ == "__main__":
    sys.exit(main(_arguments(), Rolling))
