"""The observations of a failover test, and the judge of them. Nothing here does I/O or waits.

    Reading    what one reader has seen of one run, and when
    Answer     what came of a start, or of a cancel
    judge      did every run end as it may, for all readers, and did the other runs notice nothing?

All times are those of the monotonic clock.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from math import inf
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from benchmarks.faults.chaos_verdict import FAULTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

OTHERS: Final = "others"
"""The group of the runs that must not notice anything."""
CONCERNED: Final = "concerned"
"""The group of the runs whose server is away for some time, or whose slot is moved."""
ENDS: Final = {None: "completed", "LOG_DIVERGED": "failed", "RUN_CANCELLED": "cancelled"}
"""The status in a run's record at its end, by the error that its readers saw."""


@dataclass
class Reading:
    """What one reader has seen of one run."""

    reader: str
    run: str
    began: float
    ended: float | None
    cuts: int
    cursor: int
    error: str | None
    over: bool
    gaps: int
    repeats: int
    faults: Sequence[str]
    arrivals: Sequence[float]
    path: Sequence[tuple[float, str]] = ()

    @classmethod
    def of(cls, said: Mapping[str, Any]) -> Reading:
        """From the report of a process."""
        more = {name: said["sequence"][name] for name in ("cursor", "error", "over", "gaps", "repeats", "faults")}
        own = {name: said[name] for name in ("reader", "run", "began", "ended", "cuts", "arrivals", "path")}
        return cls(**own, **more)

    def __str__(self) -> str:
        return f"{self.reader} of {self.run}"

    def pauses(self, since: float, until: float) -> Iterator[float]:
        """The seconds between any two entries of which the later one came in this time."""
        for one, two in pairwise(self.arrivals):
            if since < two <= until:
                yield two - one


@dataclass
class Answer:
    """What came of a start, or of the cancel of a run.

    Attributes:
        at: when it was asked for.
        took: how long it took, in seconds.
        error: what was raised.
    """

    run: str
    group: str
    at: float
    took: float = inf
    error: str | None = None


class Limits(NamedTuple):
    """What may be, in seconds.

    Attributes:
        notice: how much longer others may pause than before, a start on their node may take, or their cancel.
        recover: how much longer those concerned may pause than the trouble itself.
        refuse: how long a start may take that fails.
    """

    notice: float
    recover: float
    refuse: float


@dataclass
class Story:
    """All that there was.

    Attributes:
        groups: the group of each run that was started.
        records: what their records say in the end.
        cancelled: which of them were cancelled.
        calm: when all readers were connected and nothing had failed yet.
        trouble: when it began.
        enough: when the runs were asked to end.
        outages: for how long something was away, each time.
    """

    limits: Limits
    groups: dict[str, str] = field(default_factory=dict)
    records: dict[str, Any] = field(default_factory=dict)
    readings: list[Reading] = field(default_factory=list)
    starts: list[Answer] = field(default_factory=list)
    cancels: list[Answer] = field(default_factory=list)
    calm: float = 0.0
    trouble: float = inf
    enough: float = inf
    outages: list[float] = field(default_factory=list)

    def of(self, group: str) -> list[Reading]:
        """The readings of the runs of a group."""
        return [reading for reading in self.readings if self.groups.get(reading.run) == group]

    def pauses(self, group: str) -> tuple[list[float], list[float]]:
        """All pauses of a group, sorted: before the trouble, and from then on until the runs were to end."""
        before: list[float] = []
        during: list[float] = []
        for reading in self.of(group):
            before += reading.pauses(max(self.calm, reading.began), self.trouble)
            during += reading.pauses(self.trouble, self.enough)
        return sorted(before), sorted(during)


def judge(story: Story) -> list[str]:
    """All faults, as messages; empty if there are none."""
    wrong = [f"{reading}: {fault}" for reading in story.readings for fault in reading.faults[:FAULTS]]
    by_run: dict[str, list[Reading]] = {run: [] for run in story.groups}
    for reading in story.readings:
        by_run.setdefault(reading.run, []).append(reading)
    for run, readings in by_run.items():
        wrong += _judge_run(run, readings, story)
    return [*wrong, *_judge_pauses(story), *_judge_starts(story), *_judge_cancels(story)]


def _judge_run(run: str, readings: list[Reading], story: Story) -> Iterator[str]:
    record = story.records.get(run, {"status": "unknown", "seq": 0})
    status, seq = record["status"], record["seq"]
    for reading in readings:
        if reading.ended is None:
            way = ", ".join(f"{at - story.trouble:+.2f} {text}" for at, text in reading.path)
            yield f"{reading} never came to its end: it is at {reading.cursor} of {seq}, {status}; {way}"
        elif ENDS.get(reading.error, f"a run with the error {reading.error}") != status:
            yield f"{reading} saw the end {reading.error or 'completed'}, and its record says {status}"
        elif reading.cursor != seq:
            yield f"{reading} ended with entry {reading.cursor}, and its record says {seq}"
    if status not in ENDS.values():
        yield f"{run} ({story.groups.get(run)}) is {status} in the end: {record}"
    elif (status == "cancelled") != any(run == cancel.run for cancel in story.cancels):
        yield f"{run} is {status}, and was {'not ' if status == 'cancelled' else ''}cancelled"


def _judge_pauses(story: Story) -> Iterator[str]:
    before, during = story.pauses(OTHERS)
    limit = _last(before) + story.limits.notice
    if _last(during) > limit:
        who = {f"{each.run} {worst:.2f} s" for each in story.of(OTHERS)
               if (worst := _last(sorted(each.pauses(story.trouble, story.enough)))) > limit}  # fmt: skip
        some = ", ".join(sorted(who)[:8])
        yield f"{len(who)} other runs paused for longer than {limit:.2f} s, up to {_last(during):.2f} s: {some}"
    _, during = story.pauses(CONCERNED)
    limit = max(story.outages, default=0.0) + story.limits.recover
    if _last(during) > limit:
        yield f"a run concerned paused for {_last(during):.2f} s, and the trouble was over {limit:.2f} s earlier"


def _judge_starts(story: Story) -> Iterator[str]:
    for start in story.starts:
        if start.error is not None and not start.error.startswith("LogUnavailable"):
            yield f"the start of {start.run} raised {start.error}"
        elif start.took > story.limits.refuse or (
            start.group == OTHERS and (start.error is not None or start.took > story.limits.notice)
        ):
            yield f"the start of {start.run} took {start.took:.2f} s {story_time(story, start.at)}: {start.error}"


def _judge_cancels(story: Story) -> Iterator[str]:
    for cancel in story.cancels:
        if cancel.error is not None:
            yield f"the cancel of {cancel.run} {story_time(story, cancel.at)} raised {cancel.error}"
        elif (took := effect(cancel, story)) > story.limits.notice:
            yield f"the cancel of {cancel.run} {story_time(story, cancel.at)} took effect after {took:.2f} s"


def story_time(story: Story, at: float) -> str:
    """A time, for people."""
    return f"({at - story.trouble:+.1f} s)"


def effect(cancel: Answer, story: Story) -> float:
    """How long after a cancel was asked for its readers saw the end."""
    ends = [reading.ended or inf for reading in story.readings if reading.run == cancel.run]
    return max(ends, default=inf) - cancel.at


def _last(numbers: Sequence[float]) -> float:
    return numbers[-1] if numbers else 0.0


def _share(numbers: Sequence[float], share: float) -> float:
    return numbers[int(share * (len(numbers) - 1))] if numbers else 0.0


def _seconds(numbers: Sequence[float]) -> str:
    return f"{_share(numbers, 0.5):6.2f} {_share(numbers, 0.99):6.2f} {_last(numbers):6.2f} s"


def table(story: Story, more: Mapping[str, str]) -> list[str]:
    """The figures, a line each."""
    statuses = [(story.records.get(run, {}).get("status"), group) for run, group in story.groups.items()]
    rows: dict[str, str] = {}
    for group in (OTHERS, CONCERNED):
        rows[f"runs, {group}"] = f"{sum(each == group for _, each in statuses)}"
        for status in sorted({str(status) for status, each in statuses if each == group}):
            rows[f"  {status}, {group}"] = f"{statuses.count((status, group))}"
    rows["readers, to the end"] = f"{sum(each.ended is not None for each in story.readings)} of {len(story.readings)}"
    rows["  sent away, and back"] = f"{sum(each.cuts for each in story.readings)}"
    rows["entries delivered"] = f"{sum(len(each.arrivals) for each in story.readings):,}"
    rows["gaps, repeats"] = f"{sum(r.gaps for r in story.readings)}, {sum(r.repeats for r in story.readings)}"
    rows["pauses: median, p99, longest"] = ""
    for group in (OTHERS, CONCERNED):
        rows |= _pauses(story, group)
    for group in (OTHERS, CONCERNED):
        rows |= _starts(story, group)
    if story.cancels:
        rows[f"cancels took effect: {len(story.cancels)}"] = _seconds(sorted(effect(c, story) for c in story.cancels))
    if story.outages:
        rows["away"] = ", ".join(f"{seconds:.1f}" for seconds in story.outages) + " s"
    rows |= more
    width = max(map(len, rows))
    return [f"{name:<{width}}  {value:>24}" for name, value in rows.items()]


def _pauses(story: Story, group: str) -> dict[str, str]:
    rows = {}
    for phase, pauses in zip(("before", "during"), story.pauses(group), strict=True):
        if pauses:
            rows[f"  {group}, {phase}"] = _seconds(pauses)
    if worst := _each_runs_longest(story.of(group), story):
        rows[f"  {group}, each run's longest"] = _seconds(worst)
        rows[f"  {group}, the longest was over"] = _longest_at(story.of(group), story)
    return rows


def _starts(story: Story, group: str) -> dict[str, str]:
    rows = {}
    for title, refused in (("starts", False), ("starts refused", True)):
        took = sorted(
            start.took for start in story.starts if (start.group, start.error is not None) == (group, refused)
        )
        if took:
            rows[f"{title}, {group}: {len(took)}"] = _seconds(took)
    return rows


def _longest_at(readings: Iterable[Reading], story: Story) -> str:
    """Where the longest pause was over."""
    ends = [
        (two - one, two)
        for reading in readings
        for one, two in pairwise(reading.arrivals)
        if story.trouble < two <= story.enough
    ]
    return story_time(story, max(ends)[1]) if ends else ""


def _each_runs_longest(readings: Iterable[Reading], story: Story) -> list[float]:
    longest: dict[str, float] = {}
    for reading in readings:
        pauses = reading.pauses(story.trouble, story.enough)
        longest[reading.run] = max([longest.get(reading.run, 0.0), *pauses])
    return sorted(longest.values())
