"""P7: what do idle readers cost?"""

from __future__ import annotations

import time
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final, TypeAlias

import httpx2

from benchmarks.checkout import HERE
from benchmarks.clients import WAIT, held, started_run, starting, stream_of
from benchmarks.model import Case, Chart, Comparison, Figure, Goal, Question
from benchmarks.processes import module, serving
from benchmarks.redis_server import redis_server

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
    from contextlib import AbstractContextManager

    from benchmarks.checkout import Checkout
    from benchmarks.model import Figures, Scale
    from benchmarks.processes import Server
    from benchmarks.redis_server import Asked, Redis

LEASE: Final = 30.0
"""Seconds of penstock's leases. A server looks for lost runs only when it has been there for so long."""
WINDOW: Final = LEASE / 3
"""Seconds of a turn, in which penstock renews every lease once."""
PINGED: Final = 30.0
"""Seconds of a turn in which each reader is pinged exactly twice, and each lease renewed three times."""
CPU: Final = "server, ms CPU/s"
LASTS: Final = 3600
"""Seconds for which the runs are silent: for longer than the question takes."""
SOME, MANY = 100, 1000
FLAT: Final = 1.2
"""The ratio up to which two figures count as equal."""
COMMANDS, CONNECTIONS = "commands/s", "connections"
OURS: Final = {
    (
        readers,
        runs,
    ): f"penstock, {readers or 'no':{'' if not readers else ','}} readers of {runs:,} run{'s' * (runs > 1)}"
    for readers, runs in ((0, 1), (SOME, 1), (MANY, 1), (SOME, SOME), (0, MANY), (MANY, MANY))
}
PREDECESSOR: Final = f"predecessor's design, {SOME} readers of 1 run"
ASSISTANT: Final = f"assistant-stream, {SOME} readers of 1 run"


COMPARED: Final = ((MANY, 1), (0, MANY), (MANY, MANY))
Makers: TypeAlias = "Mapping[str, Callable[[Redis], AbstractContextManager[Server]]]"


@dataclass(slots=True)
class Idle:
    """A server and its Redis; a turn measures from the end of the last one."""

    server: Server
    redis: Redis
    asked: Asked
    window: float
    _since: float = field(init=False)
    _commands: int = field(init=False)
    _cpu: tuple[float, float] = field(init=False)

    def __post_init__(self) -> None:
        self._begin()

    def _begin(self) -> None:
        self._since, self._commands = time.monotonic(), self.asked.commands
        self._cpu = self.server.cpu(), self.redis.cpu()

    def turn(self) -> Figures:
        """Measure to the end of the window, if it has not ended yet."""
        time.sleep(max(0.0, self._since + self.window - time.monotonic()))
        seconds = time.monotonic() - self._since
        figures = {
            COMMANDS: (self.asked.commands - self._commands) / seconds,
            CONNECTIONS: self.redis.connections(),
            CPU: (self.server.cpu() - self._cpu[0]) / seconds * 1000,
            "Redis, ms CPU/s": (self.redis.cpu() - self._cpu[1]) / seconds * 1000,
        }
        self._begin()
        return figures


@contextmanager
def penstock_idle(redis: Redis, *, readers: int, runs: int, checkout: Checkout = HERE) -> Iterator[Server]:
    """Runs and readers: all of one run, or one reader for each run."""
    with checkout.penstock(log=redis.url, drain_timeout=0) as server, ExitStack() as stack:
        if runs == 1:
            url = stream_of(server, started_run(server, "silence", seconds=LASTS))
            with held(url, readers=SOME):
                pass
            if readers:
                stack.enter_context(held(url, readers=readers))
        else:
            stack.enter_context(held(f"{server.url}/v1/runs", readers=runs, **starting("silence", seconds=LASTS)))
            if not readers:
                stack.close()
        yield server


@contextmanager
def predecessor_idle(redis: Redis, *, readers: int) -> Iterator[Server]:
    """Readers of one run."""
    with serving(module("servers.predecessor", url=redis.url)) as server:
        given = {"producer": "silence", "seconds": LASTS}
        run = httpx2.post(f"{server.url}/runs", json=given, timeout=WAIT).raise_for_status().json()
        with held(f"{server.url}/runs/{run['id']}/stream", readers=readers):
            yield server


@contextmanager
def assistant_idle(redis: Redis, *, readers: int) -> Iterator[Server]:
    """Readers of one run; one of them starts it."""
    with (
        serving(module("servers.assistant", url=redis.url)) as server,
        held(f"{server.url}/runs/idle?rate={2 / LASTS}&seconds={LASTS}", readers=1, method="POST"),
        held(f"{server.url}/runs/idle", readers=readers - 1),
    ):
        yield server


@contextmanager
def cases(scale: Scale) -> Iterator[Sequence[Case]]:
    """All of them at the same time, each with a server and a Redis of its own: they do next to nothing."""
    some = scale.count(SOME)
    makers: Makers = {
        **_ours(HERE, scale, OURS),
        PREDECESSOR: partial(predecessor_idle, readers=some),
        ASSISTANT: partial(assistant_idle, readers=some),
    }
    with opened(makers, scale, window=WINDOW) as found:
        yield found


@contextmanager
def compared(checkout: Checkout, scale: Scale) -> Iterator[Sequence[Case]]:
    """The cases whose CPU is large enough to compare."""
    with opened(_ours(checkout, scale, COMPARED), scale, window=PINGED) as found:
        yield found


def _ours(checkout: Checkout, scale: Scale, keys: Iterable[tuple[int, int]]) -> Makers:
    def count(number: int) -> int:
        return scale.count(number) if number > 1 else number

    return {
        OURS[readers, runs]: partial(penstock_idle, readers=count(readers), runs=count(runs), checkout=checkout)
        for readers, runs in keys
    }


@contextmanager
def opened(makers: Makers, scale: Scale, *, window: float) -> Iterator[Sequence[Case]]:
    with ExitStack() as stack:
        begun = []
        for name, maker in makers.items():
            redis = stack.enter_context(redis_server())
            server = stack.enter_context(maker(redis))
            begun.append((name, server, redis, stack.enter_context(redis.watched())))
        time.sleep(scale.seconds(LEASE))
        idle = {name: Idle(server, redis, asked, scale.seconds(window)) for name, server, redis, asked in begun}
        yield [Case(name, each.turn) for name, each in idle.items()]


def _few(key: tuple[int, int]) -> Goal:
    return Goal(f"commands/s, {OURS[key].removeprefix('penstock, ')}", Figure(OURS[key], COMMANDS), at_most=30)


def _flat(figure: str, key: tuple[int, int], to: tuple[int, int]) -> Goal:
    (readers, runs), (fewer, _) = key, to
    says = f"{figure}, {readers:,} readers to {fewer or 'none'}, {runs:,} run{'s' * (runs > 1)}"
    return Goal(says, Figure(OURS[key], figure), Figure(OURS[to], figure), at_most=FLAT)


QUESTION = Question(
    number=7,
    name="idle",
    asks="what 0, 100 and 1,000 idle readers cost Redis, all of one run and each of a run of its own",
    cases=cases,
    goals=[
        *(_few(key) for key in OURS),
        _flat(COMMANDS, (SOME, 1), (0, 1)),
        _flat(COMMANDS, (MANY, 1), (0, 1)),
        _flat(COMMANDS, (MANY, MANY), (0, MANY)),
        _flat(CONNECTIONS, (MANY, 1), (0, 1)),
        _flat(CONNECTIONS, (MANY, 1), (SOME, 1)),
        _flat(CONNECTIONS, (MANY, MANY), (0, MANY)),
    ],
    comparison=Comparison(CPU, compared),
    charts=[Chart("What idle readers ask Redis for", COMMANDS, log=True)],
    notes=f"""\
- Every run has had one event and is then silent; its readers stay. With as many runs as readers, each reader has begun
  the run that it reads. Where {MANY:,} runs have no readers, the readers that started them have left.
- Each case has a server and a Redis of its own, and all of them are there at the same time. A turn is {WINDOW:g}
  seconds, in which penstock renews each lease once; Redis' `MONITOR` reports every command in them. What a script does
  within Redis is not counted, and neither is the connection that watches.
- It begins when all servers have been there for a lease, from when on they also look for lost runs.
- What is left with no readers is the floor: the looks for cancels and for lost runs, by each process, and the renewals.
  Those come all at once, {SOME} runs in a command, so a little less or more than one round of them may fall into a
  turn. That is nothing for one run; with {MANY:,} it is more than any difference that readers make. Pings come from
  the server alone.
- Readers that come all at once look their runs up over a few connections, at most a fixed number.
  Once made, those stay, so every server has had readers before, who have left again. One that never had any holds two.
- The peers have {SOME} readers only. Redis' CPU contains what `MONITOR` costs it.
""",
)
