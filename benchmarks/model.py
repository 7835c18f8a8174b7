"""The parts of a benchmark: a question has cases, which take turns, and goals, which judge their medians.

    Question ──▶ Case ──▶ a turn: {"events/s": 51_234.0, ...}     every case once, then again: a round
        │                       └── over all rounds ──▶ Spread (median, lowest, highest)
        └──────▶ Goal ──▶ Verdict: one figure, or the ratio of two, against what it is to reach

Goals judge ratios of two figures of the same run, or counts: a time alone differs from machine to machine and from day
to day.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    from benchmarks.checkout import Checkout

Figures = Mapping[str, float]
"""What one turn measured, by name; the unit is a part of the name."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. A quick run shows that everything works; its figures mean nothing."""

    quick: bool = False

    def count(self, number: int) -> int:
        """The number, or a fiftieth of it in a quick run, at least 10."""
        return max(10, number // 50) if self.quick else number

    def seconds(self, number: float) -> float:
        """The seconds, or a tenth of them in a quick run, at least 1."""
        return max(1.0, number / 10) if self.quick else number


@dataclass(frozen=True, slots=True)
class Case:
    """One of the things that take turns.

    Attributes:
        name: what is measured, as the table shows it.
        turn: measures once.
        missing: why it cannot be measured on this machine, or None.
    """

    name: str
    turn: Callable[[], Figures]
    missing: str | None = None


class Spread(NamedTuple):
    """A figure over all rounds."""

    median: float
    lowest: float
    highest: float


class Outcome(Enum):
    """The outcome of a goal."""

    REACHED = "pass"
    MISSED = "MISS"
    REPORTED = "reported"
    """Measured, but not judged: there is nothing to reach, or not on this machine."""
    UNKNOWN = "not measured"


class Figure(NamedTuple):
    """A figure of a case, by their names."""

    case: str
    name: str


class Verdict(NamedTuple):
    """A goal, its measured value and its outcome."""

    says: str
    value: float | None
    target: str
    outcome: Outcome


@dataclass(frozen=True, slots=True)
class Goal:
    """The limit of a figure, or of the ratio of two. Without `at_least` and `at_most` it is only reported.

    Attributes:
        says: what is compared, in short.
        of: the figure.
        to: what it is divided by; None: by nothing.
        at_least: the lowest value that passes, if more is better.
        at_most: the highest value that passes, if less is better.
        cores: it is judged only on machines with at least this number of cores.
    """

    says: str
    of: Figure
    to: Figure | None = None
    at_least: float | None = None
    at_most: float | None = None
    cores: int = 0

    def judged(self, figures: Mapping[Figure, Spread], *, cores: int) -> Verdict:
        """Compare medians."""
        target = f"≥ {self.at_least:g}" if self.at_least is not None else "–"
        target = f"≤ {self.at_most:g}" if self.at_most is not None else target
        target += " ×" if self.to is not None else ""
        value = self._value(figures)
        if value is None:
            outcome = Outcome.UNKNOWN
        elif self.at_least is None and self.at_most is None:
            outcome = Outcome.REPORTED
        elif cores < self.cores:
            outcome = Outcome.REPORTED
            target += f", judged on {self.cores} cores"
        else:
            low = self.at_least is None or value >= self.at_least
            high = self.at_most is None or value <= self.at_most
            outcome = Outcome.REACHED if low and high else Outcome.MISSED
        return Verdict(self.says, value, target, outcome)

    def _value(self, figures: Mapping[Figure, Spread]) -> float | None:
        if self.of not in figures or (self.to is not None and self.to not in figures):
            return None
        value = figures[self.of].median
        if self.to is None:
            return value
        divisor = figures[self.to].median
        return value / divisor if divisor else None


@dataclass(frozen=True, slots=True)
class Chart:
    """The plot of a question.

    Attributes:
        title: what it is.
        figure: the name of the figure on the axis.
        series: None: a bar for each case that has the figure. Otherwise lines: by their names, pairs of a size and the
            name of the case that has the figure at that size.
        across: what the sizes are.
        log: whether the axis of the figure is logarithmic.
    """

    title: str
    figure: str
    series: Mapping[str, Sequence[tuple[float, str]]] | None = None
    across: str = ""
    log: bool = False


@dataclass(frozen=True, slots=True)
class Comparison:
    """How a question compares two commits.

    Attributes:
        figure: the name of the figure that is compared; it is a cost, so less is better.
        cases: opens a commit's cases, which are penstock's only; both commits are open while they take turns.
    """

    figure: str
    cases: Callable[[Checkout, Scale], AbstractContextManager[Sequence[Case]]]


@dataclass(frozen=True, slots=True)
class Question:
    """A question, and how it is answered.

    Attributes:
        number: its number in the table of goals.
        name: what it is called on the command line.
        asks: the question.
        cases: makes them, and holds what they share (servers, a filled Redis) while they take turns.
        goals: what is to be reached.
        charts: what is plotted.
        notes: what a reader of the figures has to know: how they were taken, and why a goal is out of reach.
        comparison: how it compares two commits; None: it does not.
    """

    number: int
    name: str
    asks: str
    cases: Callable[[Scale], AbstractContextManager[Sequence[Case]]]
    goals: Sequence[Goal]
    charts: Sequence[Chart] = ()
    notes: str = ""
    comparison: Comparison | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """What was measured for a question."""

    question: Question
    turns: Mapping[str, Sequence[Figures]]
    """By case, in the order in which they were taken."""
    missing: Mapping[str, str]
    """Cases that could not be measured, and why."""
    seconds: float
    """How long it took."""

    def spreads(self) -> dict[Figure, Spread]:
        """Every figure over all rounds."""
        return {
            Figure(case, name): spread([turn[name] for turn in turns])
            for case, turns in self.turns.items()
            for name in (turns[0] if turns else ())
        }

    def verdicts(self, *, cores: int) -> list[Verdict]:
        """The outcomes of the goals."""
        figures = self.spreads()
        return [goal.judged(figures, cores=cores) for goal in self.question.goals]


def spread(values: Sequence[float]) -> Spread:
    """The median of some values, and their ends."""
    return Spread(median(values), min(values), max(values))


def percentile(values: Sequence[float], percent: float) -> float:
    """The value that a share of the *sorted* values does not exceed (nearest rank)."""
    return values[max(0, -(-len(values) * percent // 100).__trunc__() - 1)] if values else float("nan")


ROUNDS: Final = 3
"""The fewest rounds of which a median is taken."""
