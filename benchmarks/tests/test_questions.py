"""The questions of the benchmarks, without asking them: what they are called, and what their goals compare."""

from __future__ import annotations

from importlib import import_module
from inspect import isclass
from pkgutil import iter_modules
from types import ModuleType
from unittest.mock import MagicMock

import pytest

from benchmarks import questions as asked
from benchmarks.model import Scale

MODULES = [import_module(f"{asked.__name__}.{module.name}") for module in iter_modules(asked.__path__)]
STARTING = {
    "benchmarks.checkout",
    "benchmarks.clients",
    "benchmarks.load",
    "benchmarks.processes",
    "benchmarks.redis_cluster",
    "benchmarks.redis_server",
}
"""What is imported from these starts processes, or talks to them."""


def names_of_cases(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What a question's cases are called; nothing is started for it."""
    for name, value in vars(module).copy().items():
        starts = getattr(value, "__module__", "") in STARTING and not isclass(value)
        if starts or (isinstance(value, ModuleType) and value.__name__ in {"httpx2", "subprocess"}):
            monkeypatch.setattr(module, name, MagicMock())
    with module.QUESTION.cases(Scale(quick=True)) as cases:
        return [case.name for case in cases]


def test_no_two_questions_share_a_number_or_a_name() -> None:
    numbers = [module.QUESTION.number for module in MODULES]
    assert len({*numbers}) == len(numbers), sorted(numbers)
    assert [module.QUESTION.name for module in MODULES] == [module.__name__.rpartition(".")[2] for module in MODULES]


def test_questions_come_in_the_order_of_their_numbers() -> None:
    numbers = [question.number for question in asked.questions().values()]
    assert numbers == sorted(numbers)
    assert len(numbers) == len(MODULES)


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.QUESTION.name)
def test_goals_and_charts_name_cases_that_there_are(module: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    names = names_of_cases(module, monkeypatch)
    assert len({*names}) == len(names)
    for goal in module.QUESTION.goals:
        assert goal.at_least is None or goal.at_most is None, goal
        assert {figure.case for figure in (goal.of, goal.to) if figure is not None} <= {*names}, goal
    for chart in module.QUESTION.charts:
        assert {case for points in (chart.series or {}).values() for _, case in points} <= {*names}, chart
