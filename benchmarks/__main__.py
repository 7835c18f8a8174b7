"""The command line: `python -m benchmarks [NAME ...]`, or `just bench [NAME ...]`."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click
import httpx2
import psutil
import redis
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks.machine import cores, described
from benchmarks.model import ROUNDS, Answer, Outcome, Scale
from benchmarks.page import published, written
from benchmarks.processes import BenchmarkError
from benchmarks.questions import questions
from benchmarks.report import shown, tables
from benchmarks.running import answered

if TYPE_CHECKING:
    from collections.abc import Iterator

FAILURES = (BenchmarkError, OSError, httpx2.HTTPError, psutil.Error, redis.RedisError)
"""What a server or a job that has ended, or a full disk, comes as."""


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("names", nargs=-1, type=click.Choice([*questions()]), metavar="[NAME]...")
@click.option("--rounds", type=click.IntRange(min=1), default=ROUNDS, show_default=True, help="Turns of each case.")
@click.option(
    "--quick", is_flag=True, help="Little of everything, once: shows that it works. Its figures mean nothing."
)
@click.option(
    "--output",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("build/bench"),
    show_default=True,
    help="Where results.json and the plots go.",
)
@click.option("--publish", is_flag=True, help="Write docs/performance.md and its plots; for a run of all questions.")
@click.option("--list", "listing", is_flag=True, help="List the questions, and end.")
def main(names: tuple[str, ...], *, rounds: int, quick: bool, output: Path, publish: bool, listing: bool) -> None:
    """Measure penstock beside what one would take instead, in one run, as ratios.

    Without a NAME all questions are asked, which takes some minutes. Let the machine do nothing else meanwhile.
    """
    console = Console()
    if listing:
        for question in questions().values():
            console.print(f"{question.name:12} P{question.number:<3} {question.asks}", highlight=False, soft_wrap=True)
        return
    if publish and (names or quick):
        raise click.UsageError("--publish is for a run of all questions at full length")
    chosen = [questions()[name] for name in dict.fromkeys(names)] or [*questions().values()]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it leaves nothing behind either
    scale, began = Scale(quick=quick), time.monotonic()
    with _told("getting ready"):
        machine = described()
        output.mkdir(parents=True, exist_ok=True)
    answers: list[Answer] = []
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task("", total=len(chosen))
        for question in chosen:

            def say(words: str, name: str = question.name) -> None:
                progress.update(bar, description=f"{name}: {words}")
                if not console.is_terminal:
                    console.print(f"{time.monotonic() - began:5.0f} s  {name}: {words}", highlight=False)

            with _told(question.name):
                answer = answered(question, scale, rounds=1 if quick else rounds, say=say)
            answers.append(answer)
            for table in tables(answer, cores=cores()):
                progress.console.print(table)
            progress.advance(bar)
            with _told("what was measured"):  # each time, so that what fails later takes nothing with it
                written(output, answers, machine, rounds=1 if quick else rounds, cores=cores())
    if publish:
        click.echo(f"{published(answers, machine, rounds=rounds, cores=cores())} is written")
    else:
        click.echo(f"{output}/results.json and the plots beside it are written")
    outcomes = [verdict.outcome for answer in answers for verdict in answer.verdicts(cores=cores())]
    counts = ", ".join(f"{outcomes.count(outcome)} {outcome.value}" for outcome in Outcome)
    click.echo(f"{len(answers)} questions in {shown(time.monotonic() - began)} s: {counts}")


@contextmanager
def _told(of: str) -> Iterator[None]:
    """What fails here is told in a line, and not as a traceback."""
    try:
        yield
    except FAILURES as error:
        raise click.ClickException(f"{of}: {error}") from error


if __name__ == "__main__":
    sys.exit(main())
