"""Lets cases take turns: every case once, then every case again, so that a slow minute weighs on all of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from benchmarks.model import Answer, Figures, Question, Scale

if TYPE_CHECKING:
    from collections.abc import Callable


def answered(question: Question, scale: Scale, *, rounds: int, say: Callable[[str], None]) -> Answer:
    """Measure a question.

    Args:
        question: what is asked.
        scale: how much is measured.
        rounds: how often each case has its turn.
        say: called with what is done next.

    Raises:
        BenchmarkError: a case could not have its turn.
    """
    began = time.monotonic()
    say("getting ready")
    with question.cases(scale) as cases:
        turns: dict[str, list[Figures]] = {case.name: [] for case in cases if case.missing is None}
        for number in range(rounds):
            for case in cases:
                if case.missing is None:
                    say(f"{case.name}, round {number + 1} of {rounds}")
                    turns[case.name].append(case.turn())
        missing = {case.name: case.missing for case in cases if case.missing is not None}
        say("clearing up")
    return Answer(question, turns, missing, time.monotonic() - began)
