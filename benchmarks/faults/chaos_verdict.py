"""The observations of a chaos test, and the judge of them. Nothing here does I/O or waits.

    Sequence    what one reader has seen of one run: every block is looked at when it comes
    Following   that, with the times: from when to when, how often cut off, how soon back
    Life        one process that served, from its start to its kill
    Order       a run that was asked for, and the servers that were asked
    judge       did every run end as it had to, for all readers and in time?

All times are Trio's.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Final

from tests.support.wire import DONE

from benchmarks.faults.chaos_producers import content, schedule

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from collections.abc import Sequence as Several

    from tests.support.wire import Block

LOST: Final = "RUN_LOST"
INTERRUPTED: Final = "INTERRUPTED"
STATUSES: Final = {None: "completed", LOST: "lost", INTERRUPTED: "failed"}
"""The status in a run's record, by the error that its readers saw."""
FAULTS: Final = 3
"""The faults of one reader that are shown; later ones mostly follow from the first."""
STEPS: Final = 8
"""The steps of a reader that are kept, to explain a long wait."""


@dataclass
class Sequence:
    """What one reader has seen of one run.

    Attributes:
        cursor: the id of its last entry.
        error: the code of the error event, if there was one.
        over: it has seen the end.
        late: how late the latest event was said, in seconds.
    """

    run: str
    cursor: int = 0
    error: str | None = None
    over: bool = False
    execution: str | None = None
    late: float = 0.0
    gaps: int = 0
    repeats: int = 0
    pings: int = 0
    faults: list[str] = field(default_factory=list)

    def take(self, block: Block) -> None:
        """Look at the next block."""
        if block.id is None:
            self.pings += block.comment is not None
            return
        if self.over:
            self.fault(f"{block} after the end")
        if block.id <= self.cursor:
            self.repeats += 1
            self.fault(f"{block.id} after {self.cursor}")
            return
        if block.id > self.cursor + 1:
            self.gaps += 1
            self.fault(f"{block.id} after {self.cursor}")
        self.cursor = block.id
        if block.data == DONE:
            self.over = True
        elif block.event == "error":
            self.error = block.json["code"]
        else:
            self._look_at(block)

    def _look_at(self, block: Block) -> None:
        said = block.json
        if self.execution is None:
            self.execution = said.get("execution")
        late = said.get("late", 0.0)
        self.late = max(self.late, late)
        if said != content(self.run, self.cursor, str(self.execution), late=late) or self.error is not None:
            self.fault(f"{self.cursor} is {block}, of execution {self.execution}, error {self.error}")

    def fault(self, text: str) -> None:
        """Remember that this is wrong."""
        if len(self.faults) < FAULTS:
            self.faults.append(text)


@dataclass
class Following:
    """One reader's way through one run.

    Attributes:
        began: when it first wanted to connect.
        ended: when its stream was over, having said so; None: it never was.
        where: the server that it asked last.
        drops: how often it went away by itself.
        cuts: how often its stream broke, or ended too early.
        refusals: how often no server was there, or a server was starting or draining.
        slowest: the longest it took to be back after its pause, through all refusals.
        pauses: from when to when it stayed away by itself.
        path: when something happened last, and what.
    """

    reader: str
    run: str
    began: float
    sequence: Sequence
    ended: float | None = None
    where: str = ""
    drops: int = 0
    cuts: int = 0
    refusals: int = 0
    slowest: float = 0.0
    pauses: list[tuple[float, float]] = field(default_factory=list)
    path: deque[tuple[float, str]] = field(default_factory=partial(deque, maxlen=STEPS))

    def __str__(self) -> str:
        return f"{self.reader} of {self.run}"

    def step(self, now: float, text: str) -> None:
        """Remember what has happened."""
        self.path.append((now, f"{text} {self.where} with {self.sequence.cursor}"))

    def history(self, since: float) -> str:
        """The last steps, in seconds since then."""
        return ", ".join(f"{now - since:+.2f} {text}" for now, text in self.path)


@dataclass
class Life:
    """One process that served: its name is that of its server, and a number.

    Attributes:
        ready: when it said that it serves.
        killed: when it was killed; None: it was not.
        stopped: when it was sent SIGTERM; None: it was not.
    """

    name: str
    born: float
    ready: float | None = None
    killed: float | None = None
    stopped: float | None = None


@dataclass
class Order:
    """A run that was asked for.

    Attributes:
        name: its idempotency key, and what its events say.
        unheard: the lives that were asked for it and gave no answer.
        heard: the life that gave one, if it has started the run; None: another had before.
        ids: what it was called in the answers.
        began: when the answer came.
        status: what its record says in the end.
    """

    name: str
    seed: int
    seconds: float
    unheard: list[Life] = field(default_factory=list)
    heard: Life | None = None
    ids: set[str] = field(default_factory=set)
    began: float = 0.0
    status: str | None = None

    @property
    def id(self) -> str:
        return next(iter(self.ids))

    @property
    def total(self) -> int:
        """The number of its events, if it is let."""
        return sum(moment.events for moment in schedule(self.seed, self.seconds))


@dataclass
class Story:
    """All that there was."""

    orders: list[Order]
    followings: list[Following]
    lives: Mapping[str, Life]
    begun: Several[tuple[str, str, str]]
    """Each line of the witness: which run was begun, by which life, in which execution."""
    mortals: Several[Life] = ()
    """The processes that can end lost runs; empty: at every moment one has run for long enough."""


def judge(story: Story, limit: float) -> list[str]:
    """All faults, as messages; empty if there are none.

    Args:
        story: all that there was.
        limit: for how many seconds after a kill the readers of a lost run may wait to hear of it.
    """
    wrong = [f"{f}: {fault}" for f in story.followings for fault in f.sequence.faults]
    by_run: dict[str, list[Following]] = {order.name: [] for order in story.orders}
    for following in story.followings:
        by_run[following.run].append(following)
    for order in story.orders:
        wrong += _judge_run(order, by_run[order.name], story, limit)
    return wrong


def _judge_run(order: Order, followings: list[Following], story: Story, limit: float) -> Iterator[str]:
    begun = [(life, execution) for run, life, execution in story.begun if run == order.name]
    if len(begun) > 1:
        yield f"{order.name} was begun {len(begun)} times: {begun}"
    if len(order.ids) != 1:
        yield f"{order.name} was given {len(order.ids)} ids: {order.ids}"
    yield from _judge_followings(followings, begun)
    ended = [f for f in followings if f.ended is not None]
    yield from _judge_outcome(order, ended, story, limit)


def _judge_followings(followings: list[Following], begun: list[tuple[str, str]]) -> Iterator[str]:
    for following in followings:
        if following.ended is None:
            yield f"{following} never came to its end; {following.history(following.began)}"
        elif begun and following.sequence.execution not in {None, *(execution for _, execution in begun)}:
            yield f"{following} saw execution {following.sequence.execution}, and there were {begun}"


def _judge_outcome(order: Order, ended: list[Following], story: Story, limit: float) -> Iterator[str]:
    outcomes = {(f.sequence.error, f.sequence.cursor) for f in ended}
    if len(outcomes) > 1:
        yield f"the readers of {order.name} disagree on how and where it ended: {outcomes}"
    for error, last in outcomes:
        if error == LOST:
            yield from _judge_lost(order, ended, story, limit)
        elif error == INTERRUPTED:
            yield from _judge_interrupted(order, ended, story)
        elif error is not None:
            yield f"{order.name} ended with the error {error} after {last} entries"
        elif last != order.total + 1:
            yield f"{order.name} is complete with {last} entries, and has {order.total} events"
        if error in STATUSES and order.status != STATUSES[error]:
            yield f"{order.name} was {STATUSES[error]} for its readers, and its record says {order.status}"


def _judge_lost(order: Order, ended: list[Following], story: Story, limit: float) -> Iterator[str]:
    kill = kill_of(order, story)
    if kill is None:
        yield f"{order.name} is lost, and its server lived: {[life.name for life in owners_of(order, story)]}"
        return
    if (early := min(notice(following, kill) for following in ended)) < 0:
        yield f"{order.name} was lost {-early:.2f} s before its server was killed: it was taken from a living one"
        return
    since = informed_from(kill, story, limit)
    for following in ended:
        if (waited := notice(following, since)) > limit:
            yield (
                f"{following}: informed {waited:.2f} s after {since - kill:.2f} s after the kill that it is lost: "
                f"{following.history(kill)}"
            )


def _judge_interrupted(order: Order, ended: list[Following], story: Story) -> Iterator[str]:
    stopped = [life.stopped for life in owners_of(order, story) if life.stopped is not None]
    if not stopped or min(following.ended or 0.0 for following in ended) < min(stopped):
        yield f"{order.name} was interrupted before its server was sent SIGTERM"


def owners_of(order: Order, story: Story) -> list[Life]:
    """The process that has begun a run, else the one that has started it, else those that may have."""
    begun = [story.lives[life] for run, life, _ in story.begun if run == order.name]
    return begun or ([order.heard] if order.heard is not None else order.unheard)


def kill_of(order: Order, story: Story) -> float | None:
    """When the owner of a run was killed, at the latest; None: it was not."""
    return max((life.killed for life in owners_of(order, story) if life.killed is not None), default=None)


def notice(following: Following, kill: float, *, pauses: bool = False) -> float:
    """How long this reader waited for the end of a run that was lost at this time.

    Args:
        following: the reader's.
        kill: the time.
        pauses: with the time that the reader itself stayed away; a server can do nothing about that.
    """
    assert following.ended is not None
    since = max(kill, following.began)
    away = sum(max(0.0, end - max(begin, since)) for begin, end in following.pauses)
    return following.ended - since - (0.0 if pauses else away)


def informed_from(kill: float, story: Story, limit: float) -> float:
    """The time from which readers of a run that was lost at this time must learn of it within `limit`.

    A new process ends no lost runs at first, so one is needed that lives for so long.
    """
    times = [(max(kill, life.ready), life.killed or life.stopped or inf) for life in story.mortals if life.ready]
    return min((since for since, gone in times if gone > since + limit), default=kill)


def slowest_notice(story: Story, *, pauses: bool, limit: float | None = None) -> float:
    """The longest that a reader waited for the end of a run that was lost; with a limit: from `informed_from` on."""
    kills = {order.name: kill_of(order, story) for order in story.orders}
    return max(
        (
            notice(f, kill if limit is None else informed_from(kill, story, limit), pauses=pauses)
            for f in story.followings
            if f.ended is not None and f.sequence.error == LOST and (kill := kills[f.run]) is not None
        ),
        default=0.0,
    )


def table(story: Story, more: Mapping[str, str]) -> list[str]:
    """The counts, a line each."""
    lives = story.lives.values()
    statuses = [order.status for order in story.orders]
    sequences = [f.sequence for f in story.followings]
    rows = {
        "runs": f"{len(story.orders)}",
        "  completed": f"{statuses.count('completed')}",
        "  lost": f"{statuses.count('lost')}",
        "  asked for again after a kill": f"{sum(bool(order.unheard) for order in story.orders)}",
        "kills": f"{sum(life.killed is not None for life in lives)}",
        "slowest start of a server": f"{max((x.ready - x.born for x in lives if x.ready), default=0.0):.2f} s",
        "streams followed to their end": f"{sum(f.ended is not None for f in story.followings)}",
        "  of": f"{len(story.followings)}",
        "reconnects": f"{sum(f.drops + f.cuts for f in story.followings)}",
        "  the reader dropped it": f"{sum(f.drops for f in story.followings)}",
        "  the server was gone": f"{sum(f.cuts for f in story.followings)}",
        "attempts refused": f"{sum(f.refusals for f in story.followings)}",
        "entries delivered": f"{sum(s.cursor for s in sequences):,}",
        "pings": f"{sum(s.pings for s in sequences):,}",
        "gaps": f"{sum(s.gaps for s in sequences)}",
        "repeats": f"{sum(s.repeats for s in sequences)}",
        "slowest lost-notice": f"{slowest_notice(story, pauses=True):.2f} s",
        "  without readers' own pauses": f"{slowest_notice(story, pauses=False):.2f} s",
        "slowest resume": f"{max((f.slowest for f in story.followings), default=0.0):.2f} s",
        "latest event of a producer": f"{max((s.late for s in sequences), default=0.0):.2f} s",
        **more,
    }
    width = max(map(len, rows))
    return [f"{name:<{width}}  {value:>10}" for name, value in rows.items()]
