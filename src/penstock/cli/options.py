"""Options: what is common to all commands, and one option for each knob of `Settings`, made from its fields."""

from __future__ import annotations

from dataclasses import fields
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from penstock.dialects import DIALECTS
from penstock.settings import MIB, Settings

if TYPE_CHECKING:
    from collections.abc import Callable
    from dataclasses import Field

option: Final = partial(click.option, show_envvar=True)
FORMATS: Final = ("text", "json")
LEVELS: Final = ("debug", "info", "warning", "error")
CONTEXT: Final = {
    "auto_envvar_prefix": "PENSTOCK",
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    "show_default": True,
}
"""What click is told of every command."""
ARGUMENTS: Final = "penstock.arguments"
"""Where click's context has the words of the whole command line."""
UNITS: Final = {"s": "SECONDS", "bytes": "BYTES", "entries": "ENTRIES", "runs": "RUNS", "readers": "READERS"}
"""How a unit is written where an option's value stands."""


def shared_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that `serve` and `exec` share, but for those of `admitting.py`."""
    options = (
        option(
            "--bind",
            multiple=True,
            default=("127.0.0.1:8000",),
            metavar="HOST:PORT",
            help="Where to listen; port 0 is a free one. May be given several times.",
        ),
        option(
            "--log-level",
            type=click.Choice(LEVELS),
            default="info",
            help="From which level on penstock's own log goes to stderr.",
        ),
        option(
            "--log-format",
            type=click.Choice(FORMATS),
            default="text",
            help="Whether it is written for people, or as one JSON object a line.",
        ),
    )
    for each in reversed(options):
        function = each(function)
    return function


def knob_options(function: Callable[..., None]) -> Callable[..., None]:
    """An option for each field of `Settings`."""
    for knob in reversed(fields(Settings)):
        function = _knob_option(knob)(function)
    return function


def _knob_option(knob: Field[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    name = "--" + knob.name.replace("_", "-")
    says: str = knob.metadata["says"]
    default: Any = knob.default
    details: dict[str, Any] = {
        "default": default,
        "help": says[0].upper() + says[1:] + ".",
    }
    if knob.name == "dialect":
        details["type"] = click.Choice(sorted(DIALECTS))
    elif isinstance(default, bool):
        details["is_flag"] = True
    elif "least" in knob.metadata:
        numbers = click.IntRange if isinstance(default, int) else click.FloatRange
        details["type"] = numbers(min=knob.metadata["least"], min_open=knob.metadata["above"])
        if knob.metadata["unit"] == "bytes":
            details["show_default"] = binary(default)
        details["metavar"] = UNITS.get(knob.metadata["unit"], knob.metadata["unit"].upper())
    return option(name, knob.name, **details)


def binary(size: int) -> str:
    """A size as people write it; the value itself is always in bytes."""
    for unit, factor in (("MiB", MIB), ("KiB", MIB // 1024)):
        if size % factor == 0:
            return f"{size} = {size // factor} {unit}"
    return str(size)
