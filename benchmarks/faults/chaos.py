"""Kills servers that share one Redis again and again, and checks what their readers see.

    penstock serve  1 ─┐                 ┌─ reader 1: run-7, drops, comes back to server 3 with its cursor, ...
    penstock serve  2 ─┼─ redis-server   ├─ reader 2: ...
    penstock serve  3 ─┘                 └─ ...
          ▲
       SIGKILL every few seconds, and started again at once on the same port

The checked promises: every reader of a run sees 1, 2, 3 ... to its end, without gap or repeat, from any server and over
any number of reconnects. A run whose server lives is completed; a run whose server was killed is lost, and its readers
learn it a lease and little more after the kill. A start whose answer was lost is repeated under the same key and leads
to one run, begun once.

`python -m benchmarks.faults.chaos --help` lists the options. Processes, sockets and the clock are real: `--seed`
repeats only the choices made here.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field, fields
from functools import partial
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Final, NamedTuple

import h11
import trio
from tests.support.command_line import environment
from tests.support.processes import ROOT
from tests.support.redis_runs import record_of
from tests.support.redis_servers import redis_server
from tests.support.wire import Reader, Wire

from benchmarks.faults.chaos_verdict import STATUSES, Following, Life, Order, Sequence, Story, judge, table

if TYPE_CHECKING:
    from collections.abc import Callable

    from tests.support.redis_servers import RedisServer

GUARD: Final = 15.0
"""Seconds beyond the slowest expected step, after which a wait counts as a hang."""
GONE: Final = (OSError, trio.BrokenResourceError, h11.RemoteProtocolError)
"""The errors of a client whose server is down or goes down."""
CREATED: Final = 201
STARTED: Final = (200, CREATED)
UNAVAILABLE: Final = 503
PORTS: Final = range(20_000, 32_000)
"""Below the ephemeral ports: an outgoing connection could take the port of a server that is down."""
PAUSE: Final = (0.02, 0.4)
"""The shortest and longest time, in seconds, that a reader stays away."""
PATIENCE: Final = (0.2, 9.0)
"""The shortest and longest time, in seconds, after which a reader drops its connection."""
AUDITORS: Final = 16
NOTICED: Final = 2.0
"""Seconds beyond the lease within which a lost run's readers learn of it."""


def option(default: Any, says: str) -> Any:
    return field(default=default, metadata={"says": says})


@dataclass(frozen=True)
class Settings:
    """The options of the command."""

    seconds: float = option(
        60.0, "for how long runs are started and servers killed; to see the last runs end takes longer"
    )
    servers: int = option(4, "how many servers there are")
    runs: int = option(200, "how many runs are started")
    readers: int = option(400, "how many readers there are at a time; each follows one run after the other")
    lease: float = option(3.0, "the servers' lease, in seconds")
    shortest: float = option(5.0, "the seconds that the shortest run takes")
    longest: float = option(30.0, "the seconds that the longest run takes")
    kill_every: float = option(4.0, "the seconds between two kills, on average")
    slack: float = option(NOTICED, "how many seconds after kill and lease readers may hear that a run is lost")
    seed: int = option(1, "repeats the choices that are made here: who is killed when, what runs say when")


class Report(NamedTuple):
    wrong: list[str]
    story: Story
    table: list[str]


class Server:
    """A server that is started again whenever it ends, on the same port.

    Attributes:
        life: its present process, or the last one.
        said: what its processes have written to stderr.
    """

    suffix: ClassVar[str] = ""
    """What its producers' witness adds to the name of its life."""

    def __init__(self, number: int, port: int, redis: str, witness: Path, lease: float, *more: str) -> None:
        self.number = number
        self.port = port
        self.lives: list[Life] = []
        self.said = ""
        self.wrong: list[str] = []
        options = f"--bind 127.0.0.1:{port} --log {redis} --lease {lease} --ping-interval 1 --log-level warning"
        self._arguments = ("--producers", "benchmarks.faults.chaos_producers:producers", *options.split(), *more)
        self._witness = witness
        self._process: trio.Process | None = None
        self._stopped = False

    @property
    def life(self) -> Life:
        return self.lives[-1]

    def kill(self) -> None:
        """Kill it with SIGKILL."""
        assert self._process is not None
        self.life.killed = trio.current_time()
        self._process.kill()

    async def stop(self, *, again: bool = False) -> None:
        """End it with SIGTERM; it must end with code 0 and in time.

        Args:
            again: start it again.
        """
        assert self._process is not None
        life, process = self.life, self._process
        self._stopped = not again
        life.stopped = trio.current_time()
        self._signal(process, signal.SIGTERM)
        with trio.move_on_after(GUARD):
            if code := await process.wait():
                self.wrong.append(f"server {life.name} ended with code {code} when it was told to stop")
            return
        self.wrong.append(f"server {life.name} did not stop")
        self._signal(process, signal.SIGKILL)

    def _signal(self, process: trio.Process, number: signal.Signals) -> None:
        process.send_signal(number)

    async def keep_up(self, task_status: trio.TaskStatus[None]) -> None:  # noqa: ASYNC128  (it hands it on)
        """Start it, and start it again, until it is stopped; it has started when it first serves."""
        while not self._stopped:
            self.lives.append(Life(f"{self.number}.{len(self.lives) + 1}", trio.current_time()))
            process = await trio.lowlevel.open_process(
                [sys.executable, "-m", "penstock", "serve", *self._arguments],
                cwd=ROOT,
                env=environment(CHAOS_SERVER=self.life.name + self.suffix, CHAOS_WITNESS=str(self._witness)),
                start_new_session=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
            )
            self._process = process
            try:
                await self._listen_to(process, task_status)
                code = await process.wait()
            finally:
                with trio.CancelScope(shield=True):  # noqa: ASYNC102  (the end of what was killed is near)
                    self._signal(process, signal.SIGKILL)
                    await process.wait()
            if self.life.killed is None and self.life.stopped is None:
                self.wrong.append(f"server {self.life.name} ended by itself, with code {code}")
                await trio.sleep(1)

    async def _listen_to(self, process: trio.Process, task_status: trio.TaskStatus[None]) -> None:
        assert process.stderr is not None
        said = b""
        async with process.stderr as stderr:
            while piece := await stderr.receive_some():
                said += piece
                if self.life.ready is None and b"serving on" in said:
                    self.life.ready = trio.current_time()
                    if len(self.lives) == 1:
                        task_status.started()
        self.said += said.decode()


class Chaos:
    """A whole trial: servers, runs, readers and kills."""

    def __init__(self, settings: Settings, redis: RedisServer, witness: Path) -> None:
        self.settings = settings
        self.redis = redis
        self.witness = witness
        self.servers = self._servers(random.sample(PORTS, settings.servers))
        self.arriving = settings.seconds / 4
        """For how many seconds new readers come."""
        self.ordering = max(0.0, settings.seconds * 0.9 - settings.shortest)
        """For how many seconds runs are started."""
        self.orders = self._orders()
        self.followings: list[Following] = []
        self.wrong: list[str] = []
        self.began = 0.0
        self.latest_tick = 0.0
        self._reading: Counter[str] = Counter()
        self._running: dict[str, Order] = {}
        self._over: list[Order] = []
        self._news = trio.Event()
        self._starting = settings.runs

    def _servers(self, ports: list[int]) -> list[Server]:
        return [Server(n, port, self.redis.url, self.witness, self.settings.lease) for n, port in enumerate(ports, 1)]

    def _orders(self) -> list[Order]:
        choose = self._chooser("orders")
        s = self.settings
        return [
            Order(f"run-{n}", choose.randrange(2**32), choose.uniform(s.shortest, s.longest))
            for n in range(1, s.runs + 1)
        ]

    def _chooser(self, whose: str) -> random.Random:
        return random.Random(f"{self.settings.seed} {whose}")

    def story(self) -> Story:
        lines = self.witness.read_text().splitlines() if self.witness.exists() else []
        begun = [(run, life, execution) for run, life, execution in map(str.split, lines)]
        lives = {life.name: life for server in self.servers for life in server.lives}
        return Story([order for order in self.orders if order.ids], self.followings, lives, begun)

    # Who does what

    async def go_on(self, show: Callable[[str], None]) -> None:
        """Run the trial, from the first start to the last reader."""
        self.began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._tick, show)
            async with trio.open_nursery() as actors:
                actors.start_soon(self._killer)
                actors.start_soon(self._starter)
                for number in range(1, self.settings.readers + 1):
                    actors.start_soon(self._reader, number)
            nursery.cancel_scope.cancel()

    async def _tick(self, show: Callable[[str], None]) -> None:
        for second in count(1):
            due = self.began + second
            await trio.sleep_until(due)
            self.latest_tick = max(self.latest_tick, trio.current_time() - due)
            show(self.progress())

    def progress(self) -> str:
        """The state of the trial, in a line."""
        seconds = trio.current_time() - self.began
        kills = sum(life.killed is not None for server in self.servers for life in server.lives)
        entries = sum(f.sequence.cursor for f in self.followings)
        faults = sum(len(f.sequence.faults) for f in self.followings)
        up = sum(server.life.ready is not None for server in self.servers)
        lost = sum(order.status == "lost" for order in self._over)
        return (
            f"{seconds:4.0f} s  {up} servers, {kills} kills; runs: {self._starting} to start, "
            f"{len(self._running)} going, {len(self._over) - lost} completed, {lost} lost; "
            f"{sum(self._reading.values())} readers, "
            f"{entries:,} entries, {faults + len(self.wrong)} faults"
        )

    async def _killer(self) -> None:
        choose = self._chooser("killer")
        end = self.began + self.settings.seconds
        kills: list[float] = []
        while (due := trio.current_time() + self.settings.kill_every * choose.uniform(0.5, 1.5)) < end:
            await trio.sleep_until(due)
            if victims := self._victims(kills):
                choose.choice(victims).kill()
                kills.append(trio.current_time())

    def _victims(self, kills: list[float]) -> list[Server]:
        """Those who may be killed: at least one who is left has to have been there since the runs in question died.

        Nobody buries a run before having been in touch with Redis for a lease, so that among newcomers alone a lost
        run's readers wait for longer than is promised to them.
        """
        now = trio.current_time()
        since = min([now, *(kill for kill in kills if kill > now - self.settings.lease - NOTICED)])
        old = [server for server in self.servers if server.life.ready is not None and server.life.ready <= since]
        return [server for server in self.servers if set(old) - {server}]

    async def _starter(self) -> None:
        choose = self._chooser("starter")
        times = sorted(choose.uniform(0.0, self.ordering) for _ in self.orders)
        async with trio.open_nursery() as nursery:
            for seconds, order in zip(times, self.orders, strict=True):
                order.seconds = min(order.seconds, max(self.settings.seconds - seconds, self.settings.shortest))
                await trio.sleep_until(self.began + seconds)
                nursery.start_soon(self._start, order)

    async def _start(self, order: Order) -> None:
        choose = self._chooser(order.name)
        wants = {"run": order.name, "seed": order.seed, "seconds": order.seconds}
        body = json.dumps({"producer": "numbered", "input": wants, "metadata": {"name": order.name}}).encode()
        with trio.move_on_after(GUARD * 2) as scope:
            while not order.ids:
                server = choose.choice(self.servers)
                life = server.life
                try:
                    status, text = await self._ask(server, "POST", "/v1/runs", {"Idempotency-Key": order.name}, body)
                except GONE:
                    if life.ready is not None:
                        order.unheard.append(life)
                else:
                    if status in STARTED:
                        order.ids.add(json.loads(text)["id"])
                        order.heard = life if status == CREATED else None
                    elif status != UNAVAILABLE:
                        self.wrong.append(f"{order.name}: server {life.name} will not start it: {status} {text!r}")
                        break
                await trio.sleep(choose.uniform(*PAUSE))
        if scope.cancelled_caught:
            self.wrong.append(f"{order.name} cannot be started: asked {[life.name for life in order.unheard]}")
        order.began = trio.current_time()
        self._starting -= 1
        if order.ids:
            self._running[order.name] = order
        self._tell()

    def _tell(self) -> None:
        self._news.set()
        self._news = trio.Event()

    async def _ask(
        self, server: Server, method: str, path: str, headers: dict[str, str], body: bytes = b""
    ) -> tuple[int, bytes]:
        """A whole answer: its status, and its body."""
        async with Wire(await trio.open_tcp_stream("127.0.0.1", server.port)) as wire:
            reader = Reader(wire)
            await reader.ask(method, path, headers, body)
            text = b""
            while not isinstance(event := await reader._event(), h11.EndOfMessage):
                text += event.data
            return reader.status, text

    # Reading

    async def _reader(self, number: int) -> None:
        choose = self._chooser(f"reader {number}")
        await trio.sleep(choose.uniform(0.0, self.arriving))
        while (order := await self._next(choose)) is not None:
            self._reading[order.name] += 1
            await self._follow(f"reader {number}", order, choose)
            self._reading[order.name] -= 1

    async def _next(self, choose: random.Random) -> Order | None:
        """What to read next: one that few others read, now and then one that is over; None: all are over."""
        while self._starting and not self._running:
            await self._news.wait()
        if not self._running:
            return None
        if self._over and choose.random() < 0.1:
            return choose.choice(self._over)
        return min(choose.choices(list(self._running.values()), k=3), key=lambda order: self._reading[order.name])

    async def _follow(self, name: str, order: Order, choose: random.Random, *, drops: bool = True) -> None:
        """Read a run to its end, whatever it takes."""
        s = self.settings
        following = Following(name, order.name, trio.current_time(), Sequence(order.name))
        self.followings.append(following)
        due = max(following.began, order.began + order.seconds) + s.lease + s.slack + GUARD
        with trio.move_on_at(due):
            while not following.sequence.over:
                back = trio.current_time()
                while not await self._read(following, order, choose, back, drops=drops):
                    await self._pause(following, choose.uniform(*PAUSE))
                if not following.sequence.over:
                    await self._pause(following, choose.uniform(*PAUSE))
            following.ended = trio.current_time()
            following.step(following.ended, "came to the end at")
        if self._running.pop(order.name, None):  # the first who knows; or who has given up, lest the others do as well
            order.status = STATUSES.get(following.sequence.error, "failed")
            self._over.append(order)
            self._tell()

    async def _pause(self, following: Following, seconds: float) -> None:
        began = trio.current_time()
        await trio.sleep(seconds)
        following.pauses.append((began, trio.current_time()))

    async def _read(
        self, following: Following, order: Order, choose: random.Random, back: float, *, drops: bool
    ) -> bool:
        """Read until something comes between; False: nothing could be read."""
        sequence = following.sequence
        server = choose.choice(self.servers)
        following.where = server.life.name
        following.step(trio.current_time(), "asks")
        patience = choose.uniform(*PATIENCE) if drops else math.inf
        headers = {"Last-Event-ID": str(sequence.cursor)} if sequence.cursor else {}
        connected = False
        try:
            async with Wire(await trio.open_tcp_stream("127.0.0.1", server.port)) as wire:
                reader = Reader(wire)
                await reader.ask("GET", f"/v1/runs/{order.id}/stream", headers, b"")
                connected = reader.status == 200
                if not connected:
                    if reader.status != UNAVAILABLE:
                        sequence.fault(f"asked for what follows {sequence.cursor}, was answered {reader.status}")
                    following.step(trio.current_time(), f"was answered {reader.status} by")
                    following.refusals += 1
                    await self._pause(following, float(reader.headers.get("retry-after", 0)))
                    return False
                following.step(trio.current_time(), "found")
                following.slowest = max(following.slowest, trio.current_time() - back)
                with trio.move_on_after(patience) as scope:
                    while (block := await reader.next()) is not None:
                        sequence.take(block)
                if scope.cancelled_caught and not sequence.over:
                    following.drops += 1
                    following.step(trio.current_time(), "dropped")
                    if choose.random() < 0.5:
                        await wire.reset()
                elif not sequence.over:
                    following.cuts += 1
                    following.step(trio.current_time(), "was sent away by")
        except GONE:
            following.step(trio.current_time(), "was cut off by" if connected else "was refused by")
            following.refusals += not connected
            following.cuts += connected and not sequence.over
        return connected

    # Afterwards

    async def audit(self) -> None:
        """Read everything again, and ask for every record: by now all is quiet."""
        while not all(server.life.ready for server in self.servers):  # noqa: ASYNC110  (they tell nobody)
            await trio.sleep(0.01)
        orders = iter([order for order in self.orders if order.ids])
        async with trio.open_nursery() as nursery:
            for number in range(AUDITORS):
                nursery.start_soon(self._auditor, orders, self._chooser(f"auditor {number}"))
        known = {record_of(order.id) for order in self.orders if order.ids}
        for key in {*await self.redis.command("KEYS", "*:meta")} - known:
            await self._look_at_unknown(await self.redis.command("HGETALL", key))
        with trio.move_on_after(self.settings.lease + self.settings.slack):
            while await self.redis.command("ZCARD", "sse:live"):  # noqa: ASYNC110  (nor does Redis)
                await trio.sleep(0.1)
            return
        self.wrong.append(f"all is over, and sse:live is {await self.redis.command('ZRANGE', 'sse:live', 0, -1)}")

    async def _look_at_unknown(self, record: dict[str, str]) -> None:
        """A run that no answer named: it may have died with its starter, which had not heard that it was there."""
        if "pending" not in record or record["status"] != "lost":
            self.wrong.append(f"nobody was told of this run: {record}")

    async def _auditor(self, orders: Any, choose: random.Random) -> None:
        for order in orders:
            await self._follow("the auditor", order, choose, drops=False)
            status, text = await self._ask(choose.choice(self.servers), "GET", f"/v1/runs/{order.id}", {})
            order.status = json.loads(text).get("status") if status == 200 else f"{status}: {text!r}"

    async def stop(self) -> None:
        async with trio.open_nursery() as nursery:
            for server in self.servers:
                nursery.start_soon(server.stop)

    def what_servers_said(self) -> list[str]:
        """What a server should never say."""
        return [
            f"server {server.number} said: {line}"
            for server in self.servers
            for line in server.said.splitlines()
            if " ERROR " in line or "Traceback" in line or "Error:" in line
        ]

    def figures(self, story: Story) -> dict[str, str]:  # noqa: ARG002
        """More rows for the table."""
        warnings = sum(server.said.count(" WARNING ") for server in self.servers)
        return {"warnings of servers": f"{warnings}", "latest tick of this script": f"{self.latest_tick:.2f} s"}


async def chaos(
    settings: Settings, show: Callable[[str], None] = lambda _: None, kind: Callable[..., Chaos] = Chaos
) -> Report:
    """Let it happen, and say what is wrong with what has come of it.

    Args:
        settings: how much of it.
        show: is given a line a second about how it stands.
        kind: what happens.
    """
    with tempfile.TemporaryDirectory(prefix="penstock-chaos-") as folder:
        async with redis_server() as redis, trio.open_nursery() as nursery:
            it = kind(settings, redis, Path(folder) / "witness")
            async with trio.open_nursery() as starting:
                for server in it.servers:
                    starting.start_soon(nursery.start, server.keep_up)
            await it.go_on(show)
            await it.audit()
            await it.stop()
        story = it.story()
    wrong = judge(story, settings.lease + settings.slack)
    wrong += [*it.wrong, *(each for server in it.servers for each in server.wrong), *it.what_servers_said()]
    return Report(wrong, story, table(story, it.figures(story)))


# As a script


def parser_of(settings: type[Settings], prog: str, description: str) -> argparse.ArgumentParser:
    """An option for each of these settings."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    for each in fields(settings):
        if each.init:
            name = "--" + each.name.replace("_", "-")
            parser.add_argument(name, type=type(each.default), default=each.default, help=each.metadata["says"])
    return parser


def _arguments() -> Settings:
    parser = parser_of(
        Settings,
        "python -m benchmarks.faults.chaos",
        "Start servers over one Redis, runs on the servers, and readers of the runs. Kill a server every few "
        "seconds, and start it again. Then see whether every reader of every run has seen all of it once, in "
        "order, to its end, and soon heard of what was lost. Exits with 1, and a list, if anything is wrong. It "
        "takes all of two cores: on a machine with other work, times tell little.",
    )
    settings = Settings(**vars(parser.parse_args()))
    if settings.servers < 2 or not 0 < settings.shortest <= settings.longest:
        parser.error(
            "at least 2 servers, please, one to kill and one to notice, and a shortest run that is not the longer one"
        )
    return settings


def _show(line: str) -> None:
    if sys.stdout.isatty():
        sys.stdout.write(f"\r{line}\x1b[K")
    else:
        sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


def main(settings: Settings, kind: Callable[..., Chaos] = Chaos) -> int:
    """Let it happen, showing how it stands; then the table, and what is wrong. The exit code."""
    report = trio.run(partial(chaos, settings, _show, kind))
    lines = ["", *report.table, ""]
    lines += [f"WRONG: {each}" for each in report.wrong]
    lines.append(f"{len(report.wrong)} things are wrong" if report.wrong else "nothing is wrong")
    sys.stdout.write("\n".join(lines) + "\n")
    return 1 if report.wrong else 0


if __name__ == "__main__":
    sys.exit(main(_arguments()))
