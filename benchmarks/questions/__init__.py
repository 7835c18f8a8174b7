"""The questions, one module each, which defines `QUESTION`."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.model import Question


@cache
def questions() -> Mapping[str, Question]:
    """All questions by name, in the order of their numbers."""
    found: list[Question] = [import_module(f"{__name__}.{module.name}").QUESTION for module in iter_modules(__path__)]
    return {question.name: question for question in sorted(found, key=lambda question: question.number)}
