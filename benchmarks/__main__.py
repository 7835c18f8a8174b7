"""The command line: `python -m benchmarks [NAME ...]`, or `just bench [NAME ...]`."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click
import httpx2
import psutil
import redis
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import comparison
from benchmarks.checkout import HERE, built
from benchmarks.comparison import compared
from benchmarks.machine import cores, described
from benchmarks.model import ROUNDS, Answer, Outcome, Scale
from benchmarks.page import published, written
from benchmarks.processes import BenchmarkError
from benchmarks.questions import questions
from benchmarks.report import shown, tables
from benchmarks.running import answered

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from benchmarks.comparison import Row
    from benchmarks.model import Question

FAILURES = (BenchmarkError, OSError, httpx2.HTTPError, psutil.Error, redis.RedisError)
"""The errors of a server or job that has ended, or of a full disk."""


WIDTH = 140
"""Columns of a table that goes to a file or a pipe."""


class Percent(click.ParamType[float]):
    """A share, written as `3%` or `3`."""

    name = "percent"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        try:
            share = float(str(value).removesuffix("%")) / 100
        except ValueError:
            share = -1
        if not 0 <= share < 1:
            self.fail(f"{value!r} is not a percentage like 3%", param, ctx)
        return share


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, type=click.Choice([*questions()]), metavar="[NAME]...")
@click.option(
    "--rounds",
    type=click.IntRange(min=1),
    help=f"Turns of each case.  [default: {ROUNDS}; {comparison.ROUNDS} with --against]",
)
@click.option(
    "--quick", is_flag=True, help="A small amount of everything, once: for a trial; its figures mean nothing."
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/bench"),
    show_default=True,
    help="The folder of results.json, of the plots and of against.json.",
)
@click.option("--against", metavar="COMMIT", help="Compare the working tree with another commit.")
@click.option(
    "--within",
    type=Percent(),
    default="0%",
    show_default=True,
    help="With --against: how much more than the other commit a row may cost.",
)
@click.option("--publish", is_flag=True, help="Write docs/performance.md and its plots; for a run of all questions.")
@click.option("--list", "listing", is_flag=True, help="List the questions.")
def main(
    names: tuple[str, ...],
    *,
    rounds: int | None,
    quick: bool,
    output: Path,
    against: str | None,
    within: float,
    publish: bool,
    listing: bool,
) -> None:
    """Measure penstock beside its peers, or beside another commit, as ratios.

    Without a NAME all questions are asked, which takes about a quarter of an hour. The machine should do nothing else
    meanwhile.

    With --against, another commit is extracted and installed in a temporary folder, which is removed afterwards. Both
    commits take turns, seven rounds, in penstock's cases of the questions that compare commits (--list marks them).
    Every row compares a cost: CPU per chunk or event; for idle CPU per second; for latency the median. It shows the
    median of the rounds' ratios, this commit to the other, and an interval from the lowest to the highest ratio,
    which contains the true median with a probability of 98.4 %. A row misses if all of its interval lies above 1, or
    above 1.03 with --within 3%; the exit code is then 1. A row whose interval contains the limit is open: more rounds,
    or a machine with nothing else to do, may decide it. The working tree is measured as it is, with changes that are
    not committed.
    """
    console = Console()
    if not console.is_terminal:
        console.width = WIDTH
    if listing:
        for question in questions().values():
            mark = "±" if question.comparison else " "
            console.print(
                f"{mark} {question.name:12} P{question.number:<3} {question.asks}", highlight=False, soft_wrap=True
            )
        console.print("± compares commits, with --against", highlight=False)
        return
    if publish and (names or quick or against):
        raise click.UsageError("--publish is for a run of all questions at full length, without --against")
    chosen = [questions()[name] for name in dict.fromkeys(names)] or [*questions().values()]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # SIGTERM cleans up as Ctrl-C does
    if against is not None:
        run = Run(console, output, Scale(quick=quick), rounds or (1 if quick else comparison.ROUNDS))
        sys.exit(compare(run, _comparing(chosen, named=bool(names)), against, within=within))
    measure(Run(console, output, Scale(quick=quick), rounds or (1 if quick else ROUNDS)), chosen, publish=publish)


class Run:
    """One call of the command: what it measures by, and how it shows progress."""

    def __init__(self, console: Console, output: Path, scale: Scale, rounds: int) -> None:
        self.console, self.output, self.scale, self.rounds = console, output, scale, rounds
        self.began = time.monotonic()
        with failing("getting ready"):
            self.machine = described()
            output.mkdir(parents=True, exist_ok=True)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=console, transient=True)
        self.bar = self.progress.add_task("", total=None)

    def say(self, text: str) -> None:
        self.progress.update(self.bar, description=text)
        if not self.console.is_terminal:
            self.console.print(f"{time.monotonic() - self.began:5.0f} s  {text}", highlight=False)

    @contextmanager
    def asking(self, question: Question) -> Iterator[Callable[[str], None]]:
        """Ask a question of several; yields what shows its progress."""
        with failing(question.name):
            yield lambda text: self.say(f"{question.name}: {text}")
        self.progress.advance(self.bar)


def measure(run: Run, chosen: Sequence[Question], *, publish: bool) -> None:
    """Ask the questions, and write their answers after each."""
    answers: list[Answer] = []
    run.progress.update(run.bar, total=len(chosen))
    with run.progress:
        for question in chosen:
            with run.asking(question) as say:
                answers.append(answered(question, run.scale, rounds=run.rounds, say=say))
                for table in tables(answers[-1], cores=cores()):
                    run.progress.console.print(table)
                # After each question, so that a later failure loses nothing.
                written(run.output, answers, run.machine, rounds=run.rounds, cores=cores())
    if publish:
        click.echo(f"{published(answers, run.machine, rounds=run.rounds, cores=cores())} is written")
    else:
        click.echo(f"{run.output}/results.json and the plots beside it are written")
    outcomes = [verdict.outcome for answer in answers for verdict in answer.verdicts(cores=cores())]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome.value}" for outcome in Outcome)
    click.echo(f"{len(answers)} questions in {shown(time.monotonic() - run.began)} s: {counts}")


def _comparing(chosen: Sequence[Question], *, named: bool) -> list[Question]:
    """The questions that compare commits.

    Raises:
        UsageError: one that was named does not.
    """
    if named and (without := [question.name for question in chosen if question.comparison is None]):
        raise click.UsageError(f"{', '.join(without)} cannot be asked with --against")
    return [question for question in chosen if question.comparison is not None]


def compare(run: Run, chosen: Sequence[Question], commit: str, *, within: float) -> int:
    """Compare the working tree with a commit; the exit code."""
    rows: list[Row] = []
    run.progress.update(run.bar, total=len(chosen))
    with failing(commit), run.progress, built(commit, run.say) as other:
        for question in chosen:
            with run.asking(question) as say:
                rows += compared(question, HERE, other, run.scale, rounds=run.rounds, say=say)
                kept = comparison.as_json(rows, run.machine, commit=other.name, within=within, began=run.began)
                (run.output / "against.json").write_text(kept)
    run.console.print(comparison.table(rows, HERE, other, within=within))
    click.echo(f"{run.output}/against.json is written")
    outcomes = [row.outcome(within) for row in rows]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome.value}" for outcome in comparison.Outcome)
    ratios = shown(median(ratio for row in rows for ratio in row.ratios))
    click.echo(f"{len(rows)} rows in {shown(time.monotonic() - run.began)} s, median ratio {ratios}: {counts}")
    return int(comparison.Outcome.MISSED in outcomes)


@contextmanager
def failing(of: str) -> Iterator[None]:
    """Report a failure in one line instead of a traceback."""
    try:
        yield
    except FAILURES as error:
        raise click.ClickException(f"{of}: {error}") from error


if __name__ == "__main__":
    main()
