"""Charts of the answers, as SVG."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import matplotlib as mpl

from benchmarks.model import Figure
from benchmarks.report import shown

mpl.use("svg")
from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from matplotlib.axes import Axes

    from benchmarks.model import Answer, Chart, Spread

OURS = "#1f6f8b"
OTHERS = "#b0b7bd"
NUMBERS = StrMethodFormatter("{x:,g}")


def plotted(answer: Answer, folder: Path) -> list[str]:
    """Write a question's charts into a folder; return the names of the files."""
    files = []
    with mpl.rc_context({"svg.hashsalt": "penstock", "svg.fonttype": "none", "font.size": 9}):
        for number, chart in enumerate(answer.question.charts, start=1):
            name = f"{answer.question.name}{'' if len(answer.question.charts) == 1 else f'-{number}'}.svg"
            figure, axes = plt.subplots(figsize=(7.2, 3.2), layout="constrained")
            spreads = answer.spreads()
            (_lines if chart.series else _bars)(axes, chart, spreads)
            axes.set_title(chart.title, loc="left")
            axes.spines[["top", "right"]].set_visible(False)
            figure.savefig(folder / name, format="svg", metadata={"Date": None, "Creator": "penstock's benchmarks"})
            plt.close(figure)
            files.append(name)
    return files


def _bars(axes: Axes, chart: Chart, spreads: Mapping[Figure, Spread]) -> None:
    rows = [(figure.case, spread) for figure, spread in spreads.items() if figure.name == chart.figure][::-1]
    names, values = [name for name, _ in rows], [spread.median for _, spread in rows]
    ends = [[s.median - s.lowest for _, s in rows], [s.highest - s.median for _, s in rows]]
    colours = [OURS if name.startswith("penstock") else OTHERS for name in names]
    bars = axes.barh(names, values, xerr=ends, color=colours, error_kw={"lw": 1, "capsize": 2})
    axes.bar_label(bars, labels=[shown(value) for value in values], padding=4)
    axes.set_xlabel(chart.figure)
    axes.margins(x=0.15)
    if chart.log and values:
        axes.set_xscale("log")
        axes.set_xlim(*_decades(min(values), 2 * max(values)))  # with room for the last label
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_formatter(NUMBERS)


def _decades(lowest: float, highest: float) -> tuple[float, float]:
    """The ends of a logarithmic axis, at whole decades; a shorter axis would magnify a few per cent."""
    return 10.0 ** math.floor(math.log10(lowest)), 10.0 ** math.ceil(math.log10(highest))


def _lines(axes: Axes, chart: Chart, spreads: Mapping[Figure, Spread]) -> None:
    assert chart.series is not None
    for label, points in chart.series.items():
        found = [
            (size, spreads[Figure(case, chart.figure)])
            for size, case in points
            if Figure(case, chart.figure) in spreads
        ]
        if not found:
            continue
        sizes = [size for size, _ in found]
        colour = OURS if label.startswith("penstock") else OTHERS
        axes.plot(sizes, [spread.median for _, spread in found], marker="o", label=label, color=colour)
        lowest, highest = [s.lowest for _, s in found], [s.highest for _, s in found]
        axes.fill_between(sizes, lowest, highest, color=colour, alpha=0.15, linewidth=0)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(NUMBERS)
    axes.set_xlabel(chart.across)
    axes.set_ylabel(chart.figure)
    if chart.log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(NUMBERS)
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.set_ylim(*_decades(*axes.get_ylim()))
    else:
        axes.margins(y=0.1)
        axes.set_ylim(bottom=0)
    if len(chart.series) > 1:
        axes.legend(frameon=False)
