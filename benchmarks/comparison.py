"""Two commits side by side: the ratio of their costs, with an interval, and whether it misses.

    question ──▶ a case of this commit, the same case of the other ──▶ a round: one turn each, in changing order
                                                                         └── ratio this / other
    seven rounds ──▶ seven ratios ──▶ median and interval ──▶ outcome

Every figure compared is a cost, so a ratio above 1 means that this commit is slower. The two turns of a round follow
each other, so that a slow minute of the machine weighs on both, and each round begins with the other commit.

The interval is that of the sign test: a range between two of the sorted ratios, which contains the true median with a
probability that depends on their number only, whatever their distribution. With seven rounds it reaches from the
lowest ratio to the highest, and holds with a probability of 98.4 % (1 - 2 / 2⁷). A row misses when all of its interval
lies above the limit: with seven rounds, when this commit cost more in every single one.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import ExitStack
from dataclasses import dataclass
from enum import Enum
from statistics import median
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from rich import box
from rich.table import Table

from benchmarks.processes import BenchmarkError
from benchmarks.report import finite, shown

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.checkout import Checkout
    from benchmarks.model import Case, Question, Scale

ROUNDS: Final = 7
CONFIDENCE: Final = 0.9
"""The least probability of an interval by which a row is judged; it takes five rounds."""


class Interval(NamedTuple):
    """A range that contains the median ratio, and the probability of that."""

    low: float
    high: float
    confidence: float


class Outcome(Enum):
    """Where a row's interval lies."""

    MISSED = "MISS"
    """All of it is above the limit: this commit is slower."""
    OPEN = "open"
    """The limit lies within it, or there were too few rounds: these rounds do not decide."""
    HELD = "pass"
    """None of it is above the limit."""


STYLES: Final = {Outcome.MISSED: "bold red", Outcome.OPEN: "yellow", Outcome.HELD: "green"}


def sign_interval(ratios: Sequence[float]) -> Interval:
    """The narrowest interval of the sign test that has `CONFIDENCE`; the lowest and the highest ratio if none has."""
    ordered, count = sorted(ratios), len(ratios)
    outside = [sum(math.comb(count, i) for i in range(cut + 1)) / 2**count for cut in range((count + 1) // 2)]
    cut = max((cut for cut, tail in enumerate(outside) if 1 - 2 * tail >= CONFIDENCE), default=0)
    return Interval(ordered[cut], ordered[count - 1 - cut], max(0.0, 1 - 2 * outside[cut]))


@dataclass(frozen=True, slots=True)
class Row:
    """One case of both commits, in the order of the rounds."""

    question: str
    case: str
    figure: str
    this: Sequence[float]
    other: Sequence[float]

    @property
    def ratios(self) -> list[float]:
        return [a / b if b else math.inf for a, b in zip(self.this, self.other, strict=True)]

    @property
    def interval(self) -> Interval:
        return sign_interval(self.ratios)

    def outcome(self, within: float) -> Outcome:
        """Judge the interval by the limit `1 + within`."""
        low, high, confidence = self.interval
        if confidence < CONFIDENCE or low <= 1 + within < high:
            return Outcome.OPEN
        return Outcome.MISSED if low > 1 + within else Outcome.HELD


def compared(
    question: Question, this: Checkout, other: Checkout, scale: Scale, *, rounds: int, say: Callable[[str], None]
) -> list[Row]:
    """Let both commits take turns.

    Args:
        question: one that has a `comparison`.
        this: the commit that is judged.
        other: the commit that it is judged by.
        scale: how much is measured.
        rounds: the turns of each case and commit.
        say: called with what is done next.

    Raises:
        BenchmarkError: a case could not have its turn.
    """
    comparison = question.comparison
    assert comparison is not None
    say("getting ready")
    with ExitStack() as stack:
        pairs = _pairs(*(stack.enter_context(comparison.cases(each, scale)) for each in (this, other)))
        costs: dict[str, tuple[list[float], list[float]]] = {ours.name: ([], []) for ours, _ in pairs}
        for number in range(rounds):
            for pair in pairs:
                say(f"{pair[0].name}, round {number + 1} of {rounds}")
                for side in (0, 1) if number % 2 == 0 else (1, 0):
                    costs[pair[0].name][side].append(_cost(pair[side], comparison.figure))
        say("clearing up")
    return [Row(question.name, name, comparison.figure, *both) for name, both in costs.items()]


def _pairs(ours: Sequence[Case], theirs: Sequence[Case]) -> list[tuple[Case, Case]]:
    return [*zip(ours, theirs, strict=True)]


def _cost(case: Case, figure: str) -> float:
    figures = case.turn()
    if figure not in figures:
        raise BenchmarkError(f"{case.name}: the figure {figure!r} is not among {', '.join(figures)}")
    return figures[figure]


def table(rows: Sequence[Row], this: Checkout, other: Checkout, *, within: float) -> Table:
    """The rows of a question, for a terminal."""
    found = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for name in ("question", "case", "cost", this.name, other.name, "ratio", "interval", ""):
        found.add_column(name, justify="left" if name in {"question", "case", "cost", ""} else "right", no_wrap=True)
    for row in rows:
        outcome, (low, high, _) = row.outcome(within), row.interval
        cells = (shown(median(row.this)), shown(median(row.other)), f"{median(row.ratios):.3f}")
        verdict = f"[{STYLES[outcome]}]{outcome.value}[/]"
        found.add_row(
            row.question, row.case.removeprefix("penstock, "), row.figure, *cells, f"{low:.3f} - {high:.3f}", verdict
        )
    return found


def as_json(rows: Sequence[Row], machine: Mapping[str, str], *, commit: str, within: float, began: float) -> str:
    """Everything, for programs."""
    found: list[dict[str, Any]] = [
        {
            "question": row.question,
            "case": row.case,
            "figure": row.figure,
            "this": list(row.this),
            "other": list(row.other),
            "ratios": row.ratios,
            "ratio": median(row.ratios),
            "interval": row.interval._asdict(),
            "outcome": row.outcome(within).name.lower(),
        }
        for row in rows
    ]
    seconds = round(time.monotonic() - began, 1)
    everything = {"machine": dict(machine), "against": commit, "within": within, "seconds": seconds, "rows": found}
    return json.dumps(finite(everything), indent=1, allow_nan=False) + "\n"
