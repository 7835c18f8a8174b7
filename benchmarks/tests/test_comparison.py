"""The comparison of two commits: its interval, what misses, and in what order the commits take turns."""

from __future__ import annotations

import json
import math
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from benchmarks.checkout import HERE, ROOT, Checkout, built
from benchmarks.comparison import CONFIDENCE, Outcome, Row, as_json, compared, sign_interval
from benchmarks.model import Case, Comparison, Question, Scale
from benchmarks.processes import BenchmarkError

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from benchmarks.model import Figures


@pytest.mark.parametrize(
    "ratios, low, high, confidence",
    [
        pytest.param([1.2], 1.2, 1.2, 0, id="one round says nothing of the others"),
        pytest.param([1.2, 0.9, 1.1], 0.9, 1.2, 0.75, id="three"),
        pytest.param([5, 4, 3, 2, 1], 1, 5, 0.9375, id="five are just enough"),
        pytest.param([1, 2, 3, 4, 5, 6, 7], 1, 7, 1 - 2 / 128, id="seven: from the lowest to the highest"),
        pytest.param([*range(1, 12)], 3, 9, 1 - 2 * (1 + 11 + 55) / 2048, id="eleven: the outermost two are left out"),
    ],
)
def test_the_interval_is_the_narrowest_of_the_sign_test(
    ratios: list[float], low: float, high: float, confidence: float
) -> None:
    found = sign_interval(ratios)
    assert [found.low, found.high] == [low, high]
    assert found.confidence == pytest.approx(confidence)
    assert confidence < CONFIDENCE or len(ratios) >= 5


def row(*ratios: float) -> Row:
    return Row("live", "a run", "µs", [100 * ratio for ratio in ratios], [100.0] * len(ratios))


@pytest.mark.parametrize(
    "ratios, within, outcome",
    [
        ([1.01] * 7, 0.0, Outcome.MISSED),
        ([1.01] * 7, 0.03, Outcome.HELD),
        ([1.04, *[1.2] * 6], 0.03, Outcome.MISSED),
        ([1.02, *[1.2] * 6], 0.03, Outcome.OPEN),
        ([0.9, *[0.8] * 6], 0.0, Outcome.HELD),
        ([1.5] * 4, 0.0, Outcome.OPEN),
    ],
)
def test_a_row_misses_when_all_of_its_interval_is_above_the_limit(
    ratios: list[float], within: float, outcome: Outcome
) -> None:
    assert row(*ratios).outcome(within) is outcome


def test_a_cost_of_nothing_makes_an_infinite_ratio_which_json_shows_as_none() -> None:
    free = Row("idle", "a run", "ms", [1.0], [0.0])
    assert free.ratios == [math.inf]
    kept = json.loads(as_json([free], {"machine": "m"}, commit="c0ffee", within=0.03, began=0.0))
    assert (kept["against"], kept["within"], kept["rows"][0]["ratios"]) == ("c0ffee", 0.03, [None])


def question(noted: list[str], *, figure: str = "µs") -> Question:
    @contextmanager
    def cases(checkout: Checkout, _: Scale) -> Iterator[Sequence[Case]]:
        def turn(case: str) -> Figures:
            noted.append(f"{checkout.name} {case}")
            return {figure: len(noted)}

        yield [Case("a", lambda: turn("a")), Case("b", lambda: turn("b"))]
        noted.append(f"{checkout.name} ended")

    @contextmanager
    def none(_: Scale) -> Iterator[Sequence[Case]]:
        yield []

    return Question(1, "order", "in what order", none, (), comparison=Comparison("µs", cases))


def test_the_commits_take_turns_in_each_case_and_change_which_begins() -> None:
    noted: list[str] = []
    this, other = Checkout("this", ROOT), Checkout("other", ROOT)
    rows = compared(question(noted), this, other, Scale(), rounds=2, say=lambda _: None)
    assert noted == [
        *("this a", "other a", "this b", "other b"),
        *("other a", "this a", "other b", "this b"),
        *("other ended", "this ended"),
    ]
    assert rows == [Row("order", "a", "µs", [1, 6], [2, 5]), Row("order", "b", "µs", [3, 8], [4, 7])]


def test_a_figure_that_a_commit_does_not_have_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="'µs' is not among ms"):
        compared(question([], figure="ms"), HERE, HERE, Scale(), rounds=1, say=lambda _: None)


def test_a_job_that_a_commit_does_not_have_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match=r"old has no benchmarks/jobs/store\.py"):
        Checkout("old", tmp_path).job("jobs.store")


def test_a_commit_that_git_does_not_know_is_an_error() -> None:
    with pytest.raises(BenchmarkError, match="failed"), built("0" * 40, lambda _: None):
        pass
