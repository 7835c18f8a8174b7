"""Shows answers on a terminal, as JSON, and as sections of a page."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

from rich import box
from rich.table import Table

from benchmarks.model import Figure, Outcome

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.model import Answer, Spread, Verdict

STYLES = {Outcome.REACHED: "green", Outcome.MISSED: "bold red", Outcome.REPORTED: "yellow", Outcome.UNKNOWN: "yellow"}


def tables(answer: Answer, *, cores: int) -> list[Table]:
    """The figures of a question and the outcomes of its goals."""
    question = answer.question
    title = f"P{question.number} {question.name}: {question.asks}"
    figures = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    head, *rows = _cells(answer)
    for name in head:
        figures.add_column(name, justify="right" if figures.columns else "left")
    for cells in rows:
        figures.add_row(*cells)
    goals = Table(title_justify="left", box=None)
    for column in ("", "is", "to reach", ""):
        goals.add_column(column)
    for verdict in answer.verdicts(cores=cores):
        style = STYLES[verdict.outcome]
        goals.add_row(verdict.says, shown_value(verdict), verdict.target, f"[{style}]{verdict.outcome.value}[/]")
    return [figures, goals] if question.goals else [figures]


def as_json(answers: Sequence[Answer], machine: Mapping[str, str], *, rounds: int, cores: int) -> str:
    """Everything, for programs."""
    questions: dict[str, Any] = {}
    for answer in answers:
        spreads = answer.spreads()
        questions[answer.question.name] = {
            "number": answer.question.number,
            "asks": answer.question.asks,
            "seconds": round(answer.seconds, 1),
            "figures": {
                case: {
                    name: {**spreads[Figure(case, name)]._asdict(), "turns": [turn[name] for turn in turns]}
                    for name in turns[0]
                }
                for case, turns in answer.turns.items()
            },
            "missing": dict(answer.missing),
            "goals": [
                {**verdict._asdict(), "outcome": verdict.outcome.name.lower()}
                for verdict in answer.verdicts(cores=cores)
            ],
        }
    everything = {"machine": dict(machine), "rounds": rounds, "questions": questions}
    return json.dumps(finite(everything), indent=1, allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """The same value with None for NaN and infinity, which JSON does not have."""
    if isinstance(value, dict):
        return {name: finite(each) for name, each in value.items()}
    if isinstance(value, list):
        return [finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summary(answers: Sequence[Answer], *, cores: int) -> list[str]:
    """The goals of all questions as a table in Markdown."""
    lines = ["| # | question | compared | is | to reach | |", "|---|---|---|---|---|---|"]
    for answer in answers:
        number, name = f"P{answer.question.number}", f"[{answer.question.name}](#{answer.question.name})"
        for verdict in answer.verdicts(cores=cores):
            result = f"**{verdict.outcome.value}**" if verdict.outcome is Outcome.MISSED else verdict.outcome.value
            lines.append(
                f"| {number} | {name} | {verdict.says} | {shown_value(verdict)} | {verdict.target} | {result} |"
            )
            number = name = ""
    return lines


def section(answer: Answer, plots: Sequence[str]) -> list[str]:
    """A question's section of the page, in Markdown."""
    (_, *head), *rows = _cells(answer)
    lines = [f"## {answer.question.name}", "", f"{answer.question.asks}", ""]
    lines += [f"| | {' | '.join(head)} |", "|---|" + "---:|" * len(head)]
    lines += [f"| {' | '.join(cells)} |" for cells in rows]
    lines += ["", *([answer.question.notes, ""] if answer.question.notes else [])]
    return lines + [line for plot in plots for line in (f"![{answer.question.asks}]({plot})", "")]


def shown(value: float) -> str:
    """A figure with three significant digits."""
    if value != value:  # noqa: PLR0124  (not a number)
        return "–"
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def shown_value(verdict: Verdict) -> str:
    """The measured value of a goal."""
    return "–" if verdict.value is None else shown(verdict.value) + (" ×" if "×" in verdict.target else "")


def _names(answer: Answer) -> list[str]:
    """The names of all cases' figures, in order of appearance."""
    return list(dict.fromkeys(name for turns in answer.turns.values() for turn in turns[:1] for name in turn))


def _cells(answer: Answer) -> list[list[str]]:
    """The table of the figures, its head first: a row for each case, or for each figure if there are fewer figures."""
    spreads, names = answer.spreads(), _names(answer)
    rows = [["case", *names]]
    rows += [[case, *(_cell(spreads.get(Figure(case, name))) for name in names)] for case in answer.turns]
    rows += [[f"{case} ({why})", *["–"] * len(names)] for case, why in answer.missing.items()]
    if len(names) < len(rows):
        return rows
    return [["figure", *(row[0] for row in rows[1:])], *map(list, zip(*(row[1:] for row in rows), strict=True))]


def _cell(spread: Spread | None) -> str:
    return "" if spread is None else shown(spread.median)
