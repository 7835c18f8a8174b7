"""The benchmarks' own parts: what is judged, and in what order it is measured."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from benchmarks.model import Case, Figure, Figures, Goal, Outcome, Question, Scale, Spread, percentile, spread
from benchmarks.running import answered

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

# What is judged

HUNDRED = list(range(1, 101))


@pytest.mark.parametrize(
    "values, percent, value",
    [
        (HUNDRED, 0, 1),
        (HUNDRED, 1, 1),
        (HUNDRED, 50, 50),
        (HUNDRED, 99, 99),
        (HUNDRED, 99.5, 100),
        (HUNDRED, 100, 100),
        ([1, 2], 50, 1),
        ([1, 2], 51, 2),
        ([1, 2, 3], 50, 2),
        (HUNDRED[:10], 99, 10),
        ([7], 1, 7),
        ([7], 99, 7),
    ],
)
def test_a_percentile_is_the_value_of_the_nearest_rank(values: list[float], percent: float, value: float) -> None:
    assert percentile(values, percent) == value


@pytest.mark.parametrize(
    "quick, asked_for, counted, measured",
    [(False, 5, 5, 5), (False, 1000, 1000, 1000), (True, 5, 10, 1), (True, 1000, 20, 100), (True, 15, 10, 1.5)],
)
def test_a_quick_run_measures_little_but_something(quick: bool, asked_for: int, counted: int, measured: float) -> None:
    assert Scale(quick=quick).count(asked_for) == counted
    assert Scale(quick=quick).seconds(asked_for) == measured


def test_a_spread_is_the_median_and_both_ends() -> None:
    assert spread([3, 9, 1]) == Spread(3, 1, 9)
    assert spread([1, 2]) == Spread(1.5, 1, 2)


OURS, THEIRS, NOBODY = Figure("penstock", "ms"), Figure("other", "ms"), Figure("nobody", "ms")
FIGURES = {OURS: Spread(30, 1, 900), THEIRS: Spread(20, 1, 900), Figure("idle", "ms"): Spread(0, 0, 0)}
HALF_MORE = {"of": OURS, "to": THEIRS}


@pytest.mark.parametrize(
    "given, value, target, outcome",
    [
        pytest.param({"of": OURS, "at_most": 30}, 30, "≤ 30", Outcome.REACHED, id="the most that is good enough"),
        pytest.param({"of": OURS, "at_most": 29}, 30, "≤ 29", Outcome.MISSED, id="more than that"),
        pytest.param({"of": OURS, "at_least": 30}, 30, "≥ 30", Outcome.REACHED, id="the least that is good enough"),
        pytest.param({"of": OURS, "at_least": 31}, 30, "≥ 31", Outcome.MISSED, id="less than that"),
        pytest.param({**HALF_MORE, "at_most": 1.5}, 1.5, "≤ 1.5 ×", Outcome.REACHED, id="a ratio"),
        pytest.param({**HALF_MORE, "at_least": 1.6}, 1.5, "≥ 1.6 ×", Outcome.MISSED, id="a ratio that is too small"),
        pytest.param({"of": NOBODY, "at_most": 1}, None, "≤ 1", Outcome.UNKNOWN, id="no figure"),
        pytest.param({"of": OURS, "to": NOBODY, "at_most": 1}, None, "≤ 1 ×", Outcome.UNKNOWN, id="no divisor"),
        pytest.param(
            {"of": OURS, "to": Figure("idle", "ms"), "at_most": 1}, None, "≤ 1 ×", Outcome.UNKNOWN, id="divisor zero"
        ),
        pytest.param(
            {**HALF_MORE, "at_least": 9, "cores": 4}, 1.5, "≥ 9 ×", Outcome.MISSED, id="as many cores as it takes"
        ),
        pytest.param(
            {**HALF_MORE, "at_least": 9, "cores": 5},
            1.5,
            "≥ 9 ×, judged on 5 cores",
            Outcome.REPORTED,
            id="one core too few",
        ),
        pytest.param(
            {"of": NOBODY, "at_least": 9, "cores": 5}, None, "≥ 9", Outcome.UNKNOWN, id="too few and no figure"
        ),
        pytest.param({"of": OURS}, 30, "–", Outcome.REPORTED, id="nothing to reach"),
        pytest.param(HALF_MORE, 1.5, "– ×", Outcome.REPORTED, id="a ratio and nothing to reach"),
        pytest.param({"of": NOBODY}, None, "–", Outcome.UNKNOWN, id="nothing to reach and no figure"),
    ],
)
def test_a_goal_is_judged_by_medians(given: dict[str, Any], value: float | None, target: str, outcome: Outcome) -> None:
    assert Goal("words", **given).judged(FIGURES, cores=4) == ("words", value, target, outcome)


# In what order it is measured


class Turns:
    """Cases that note when they have their turn, and measure how many turns there were before."""

    def __init__(self, *names: str, missing: str | None = None) -> None:
        self.cases = [Case(name, lambda name=name: self.take(name)) for name in names]  # type: ignore[misc]
        if missing is not None:
            self.cases.insert(1, Case(missing, lambda: self.take(missing), "no node"))
        self.noted: list[str] = []

    def take(self, name: str) -> Figures:
        self.noted.append(name)
        return {"before": len(self.noted) - 1}

    @contextmanager
    def open(self, scale: Scale) -> Iterator[Sequence[Case]]:
        self.noted.append(f"quick: {scale.quick}")
        yield self.cases
        self.noted.append("left")


def question(turns: Turns) -> Question:
    return Question(1, "order", "in what order", turns.open, ())


def test_every_case_has_its_turn_and_then_every_case_again() -> None:
    turns = Turns("a", "b", "c")
    answer = answered(question(turns), Scale(quick=True), rounds=2, say=lambda _: None)
    assert turns.noted == ["quick: True", "a", "b", "c", "a", "b", "c", "left"]
    assert answer.turns == {
        "a": [{"before": 1}, {"before": 4}],
        "b": [{"before": 2}, {"before": 5}],
        "c": [{"before": 3}, {"before": 6}],
    }


def test_a_case_that_is_missing_has_no_turn_and_says_why() -> None:
    turns = Turns("a", "b", missing="c")
    answer = answered(question(turns), Scale(), rounds=1, say=lambda _: None)
    assert turns.noted == ["quick: False", "a", "b", "left"]
    assert answer.missing == {"c": "no node"}
    assert [*answer.turns] == ["a", "b"]


def test_the_cases_are_put_away_when_a_turn_fails() -> None:
    left = []

    @contextmanager
    def cases(_: Scale) -> Iterator[Sequence[Case]]:
        try:
            yield [Case("a", dict), Case("b", lambda: {"x": 1 / 0})]
        finally:
            left.append(True)

    failing = Question(1, "failing", "", cases, ())
    with pytest.raises(ZeroDivisionError):
        answered(failing, Scale(), rounds=1, say=lambda _: None)
    assert left
