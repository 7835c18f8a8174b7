"""Writes the figures into `docs/performance.md`, between two marks; the rest of the page is written by hand."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from benchmarks.plots import plotted
from benchmarks.report import as_json, section, summary

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.model import Answer

DOCS: Final = Path(__file__).parents[1] / "docs"
BEGIN: Final = "<!-- figures: written by `just bench --publish` -->"
END: Final = "<!-- the end of the figures -->"


def written(
    folder: Path, answers: Sequence[Answer], machine: Mapping[str, str], *, rounds: int, cores: int
) -> list[str]:
    """Write `results.json` and the plots into a folder; return the lines of Markdown that show them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(as_json(answers, machine, rounds=rounds, cores=cores))
    lines = [", ".join(f"{name} {what}" for name, what in machine.items() if name != "machine") + ".", ""]
    lines = [f"Measured on: {machine['machine']}.", *lines, *summary(answers, cores=cores), ""]
    for answer in answers:
        lines += section(answer, [f"{folder.name}/{plot}" for plot in plotted(answer, folder)])
    return lines


def published(answers: Sequence[Answer], machine: Mapping[str, str], *, rounds: int, cores: int) -> Path:
    """Write the results, the plots and the page; return the page's path."""
    page = DOCS / "performance.md"
    lines = written(DOCS / "performance", answers, machine, rounds=rounds, cores=cores)
    before, _, rest = page.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    page.write_text("\n".join([before + BEGIN, "", *lines, END + after]))
    return page
