"""How the answers of the benchmarks are shown, as tables, as JSON and in Markdown; and where they are published."""

from __future__ import annotations

import json
import math
from contextlib import nullcontext
from dataclasses import replace
from typing import TYPE_CHECKING

import pytest

from benchmarks import page
from benchmarks.model import Answer, Chart, Figure, Goal, Question
from benchmarks.report import as_json, section, shown, tables

if TYPE_CHECKING:
    from pathlib import Path

MACHINE = {"machine": "a machine", "python": "3", "penstock": "1"}


@pytest.fixture
def answer() -> Answer:
    goals = [
        Goal("one to other", Figure("one", "ms"), Figure("other", "ms"), at_most=0.5),
        Goal("events", Figure("one", "events"), at_least=5),
        Goal("third", Figure("third", "ms"), at_least=5),
    ]
    charts = [Chart("Bars", "ms"), Chart("Lines", "ms", {"all": [(1, "one"), (10, "other")]}, "size", log=True)]
    question = Question(1, "shown", "how", lambda _: nullcontext([]), goals, charts, "Mind *this*.")
    turns = {
        "one": [{"ms": 3.0, "events": 4.0}, {"ms": 2.0, "events": 4.0}, {"ms": 1.0, "events": 4.0}],
        "other": [{"ms": 1.0}, {"ms": 1.0}, {"ms": 1.0}],
    }
    return Answer(question, turns, {"third": "no node"}, 12.34)


@pytest.mark.parametrize(
    "value, text",
    [
        (0, "0"),
        (0.012345, "0.0123"),
        (12.345, "12.3"),
        (999.4, "999"),
        (1000, "1,000"),
        (1234567.8, "1,234,568"),
        (-1234.5, "-1,234"),
        (math.nan, "–"),
    ],
)
def test_three_digits_count(value: float, text: str) -> None:
    assert shown(value) == text


def test_a_table_has_a_row_for_each_case_and_a_cell_for_each_figure(answer: Answer) -> None:
    figures, goals = ([[*column.cells] for column in table.columns] for table in tables(answer, cores=2))
    assert [column.header for column in tables(answer, cores=2)[0].columns] == ["case", "ms", "events"]
    assert figures == [["one", "other", "third (no node)"], ["2", "1", "–"], ["4", "", "–"]]
    assert goals[:3] == [["one to other", "events", "third"], ["2 ×", "4", "–"], ["≤ 0.5 ×", "≥ 5", "≥ 5"]]
    assert [cell.partition("]")[2] for cell in map(str, goals[3])] == ["MISS[/]", "MISS[/]", "not measured[/]"]


def test_what_is_not_a_number_is_null(answer: Answer) -> None:
    told = as_json([replace(answer, turns={"one": [{"ms": math.nan}]})], MACHINE, rounds=1, cores=2)
    assert json.loads(told)["questions"]["shown"]["figures"]["one"]["ms"]["turns"] == [None]
    assert "NaN" not in told


def test_programs_are_told_everything(answer: Answer) -> None:
    told = json.loads(as_json([answer], MACHINE, rounds=3, cores=2))
    assert {name: told[name] for name in ("machine", "rounds")} == {"machine": MACHINE, "rounds": 3}
    assert [*told["questions"]] == ["shown"]
    found = told["questions"]["shown"]
    assert {name: found[name] for name in ("number", "asks", "seconds", "missing")} == {
        "number": 1,
        "asks": "how",
        "seconds": 12.3,
        "missing": {"third": "no node"},
    }
    assert found["figures"]["one"]["ms"] == {"median": 2, "lowest": 1, "highest": 3, "turns": [3, 2, 1]}
    assert [*found["figures"]["other"]] == ["ms"]
    assert found["goals"][0] == {"says": "one to other", "value": 2, "target": "≤ 0.5 ×", "outcome": "missed"}
    assert found["goals"][2] == {"says": "third", "value": None, "target": "≥ 5", "outcome": "unknown"}


def test_a_section_has_the_figures_the_notes_and_the_plots(answer: Answer) -> None:
    text = "\n".join(section(answer, ["performance/shown.svg"]))
    assert text.startswith("## shown\n\nhow\n\n| | ms | events |\n|---|---:|---:|\n| one | 2 | 4 |\n| other | 1 |  |\n")
    assert text.endswith("\n\nMind *this*.\n\n![how](performance/shown.svg)\n")


# Where it is published

BEFORE, AFTER = "# Speed\n\nBy hand.\n\n", "\n\nAlso by hand.\n"


@pytest.fixture
def docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(page, "DOCS", tmp_path)
    (tmp_path / "performance.md").write_text(f"{BEFORE}{page.BEGIN}\nold figures\n{page.END}{AFTER}")
    return tmp_path


def test_only_what_is_between_the_marks_is_written(docs: Path, answer: Answer) -> None:
    assert page.published([answer], MACHINE, rounds=3, cores=2) == docs / "performance.md"
    text = (docs / "performance.md").read_text()
    assert text.startswith(f"{BEFORE}{page.BEGIN}\n\nMeasured on: a machine.\npython 3, penstock 1.\n")
    assert text.endswith(f"{page.END}{AFTER}")
    assert "old figures" not in text
    assert text.count(page.BEGIN) == text.count(page.END) == 1
