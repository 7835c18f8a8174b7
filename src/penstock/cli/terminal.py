"""Output for a terminal: lines on standard output and standard error, and a status line while a run is followed.

What a server sends may hold control sequences. It reaches a terminal only through `visible`, or as JSON in ASCII.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Self

import click
from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from penstock.cli.host import say

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from rich.console import RenderableType

    from penstock.sse import Message

UNWRITTEN: Final = 1  # the exit code when standard output cannot be written
NATURAL_WIDTH: Final = 10_000
"""The width of a table in columns. No cell is cut or folded, so that an id can be copied and a line be searched."""
STYLES: Final = {"running": "cyan", "completed": "green", "failed": "red", "cancelled": "yellow", "lost": "magenta"}
NOTHING: Final = "–"

_UNSAFE: Final = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but TAB and LF, DEL, C1
    r"\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"  # what changes the direction of what follows, or the line
    r"\ud800-\udfff]"  # halves of surrogate pairs, which nothing can write
)


def visible(text: str, *, one_line: bool = False) -> str:
    r"""The text with an escape for all that could control a terminal (ESC: `\x1b`); `one_line`: for TAB and LF, too."""
    if one_line:
        text = text.replace("\t", "\\t").replace("\n", "\\n")
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def warn(message: str) -> None:
    """Write one line to standard error, whatever is in it."""
    say(visible(message, one_line=True))


def emit(text: str) -> None:
    """Write lines to standard output, at once. If its reader has closed it, the program ends, without an error."""
    try:
        click.echo(text)
    except BrokenPipeError:
        leave_unread()
    except OSError as error:
        _drop_stdout()
        warn(f"standard output cannot be written: {error.strerror}")
        sys.exit(UNWRITTEN)


def leave_unread() -> None:
    """End the program, since the reader of standard output has closed it."""
    _drop_stdout()
    sys.exit(0)


def _drop_stdout() -> None:
    # Python flushes standard output once more at its exit, and would report an error.
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


# Records


def show(renderable: RenderableType) -> None:
    coloured = sys.stdout is not None and sys.stdout.isatty()
    text = io.StringIO()  # not standard output itself, whose errors rich would handle
    console = Console(
        file=text, force_terminal=coloured, width=NATURAL_WIDTH, markup=False, emoji=False, highlight=False
    )
    console.print(renderable, crop=False)
    emit("\n".join(line.rstrip() for line in text.getvalue().splitlines()))


def _in_one_line(value: Any) -> str:
    if value is None:
        return NOTHING
    return visible(value if isinstance(value, str) else json.dumps(value), one_line=True)


def _local_time(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value:
        return NOTHING
    try:
        return datetime.fromtimestamp(value).astimezone().replace(tzinfo=None).isoformat(" ", "seconds")
    except (ValueError, OverflowError, OSError):
        return _in_one_line(value)


def _took(record: Mapping[str, Any]) -> str:
    try:
        return f"{record['ended_at'] - record['started_at']:.1f} s"
    except (KeyError, TypeError, OverflowError):
        return NOTHING


def _status(record: Mapping[str, Any]) -> str:
    reason = record.get("stop_reason")
    return _in_one_line(record["status"]) + ("" if reason is None else f" ({_in_one_line(reason)})")


def table_of(records: list[dict[str, Any]]) -> RenderableType:
    table = Table("id", "producer", "status", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("entries", justify="right")
    table.add_column("started")
    table.add_column("took", justify="right")
    for record in records:
        table.add_row(
            Text(_in_one_line(record["id"])),
            Text(_in_one_line(record.get("producer"))),
            Text(_status(record), STYLES.get(record["status"], "")),
            Text(_in_one_line(record.get("seq"))),
            Text(_local_time(record.get("started_at"))),
            Text(_took(record)),
        )
    return table


def fields_of(record: dict[str, Any]) -> RenderableType:
    grid = Table.grid("name", "value", padding=(0, 2, 0, 0))
    for name, value in record.items():
        text = _in_one_line(value)
        if name.endswith("_at"):
            text = _local_time(value)
        elif isinstance(value, dict) and value:
            text = "\n".join(f"{_in_one_line(key)}: {_in_one_line(each)}" for key, each in value.items())
        style = STYLES.get(value, "") if name == "status" and isinstance(value, str) else ""
        label = "entries" if name == "seq" else name.replace("_", " ")
        grid.add_row(Text(_in_one_line(label), "dim"), Text(text, style))
        if name == "ended_at":
            grid.add_row(Text("took", "dim"), Text(_took(record)))
    return grid


# Following


@dataclass
class Progress:
    """How far the following of a run is; `size` in bytes, `began` and `until` (the next try) by the screen's clock."""

    began: float
    events: int = 0
    size: int = 0
    reconnects: int = 0
    state: str = "connecting"
    until: float | None = None

    def line(self, now: float) -> str:
        due = "" if self.until is None else f", again in {max(self.until - now, 0):.1f} s"
        return f"{self.state}{due} · {self.figures(now)}"

    def figures(self, now: float) -> str:
        figures = f"{_counted(self.events, 'event')}, {_counted(self.size, 'byte')}, {now - self.began:.1f} s"
        return figures + (f", {_counted(self.reconnects, 'reconnect')}" if self.reconnects else "")


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}" + ("" if count == 1 else "s")


class Screen:
    """Prints events and messages: a context manager, with a status line on a terminal for as long as it is open."""

    def __init__(self, progress: Progress, *, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self.progress = progress
        self._quiet = quiet
        self._console = Console(stderr=True, markup=False, emoji=False, highlight=False)
        self._live: Live | None = None
        self._shared = False
        if not quiet and sys.stderr is not None and sys.stderr.isatty() and self._console.is_interactive:
            self._shared = _one_terminal()
            self._live = Live(
                get_renderable=lambda: Text(
                    visible(progress.line(clock()), one_line=True), no_wrap=True, overflow="ellipsis"
                ),
                console=self._console,
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )

    def __enter__(self) -> Self:
        if self._live is not None:
            self._live.start(refresh=True)
        return self

    def __exit__(self, *_exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def event(self, text: str) -> None:
        """Print an event to standard output; above the status line, if both are on the same terminal."""
        if self._shared:
            self._console.out(text)
        else:
            emit(text)

    def warn(self, message: str) -> None:
        """Print one line to standard error, also when quiet."""
        if self._live is None:
            warn(message)
        else:
            self._console.out(f"penstock: {visible(message, one_line=True)}")

    def connected(self) -> None:
        self.progress.state, self.progress.until = "connected", None

    def reconnecting(self, reason: str, cursor: int, pause: float, now: float) -> None:
        self.progress.reconnects += 1
        self.progress.state, self.progress.until = reason, now + pause
        if self._live is None and not self._quiet:
            self.warn(f"{reason}; going on after {cursor} in {pause:.1f} s")

    def ended(self, outcome: str, now: float) -> None:
        if not self._quiet:
            self.warn(f"{outcome}; {self.progress.figures(now)}")


def _one_terminal() -> bool:
    """Whether standard output and standard error are the same terminal."""
    try:
        return sys.stdout.isatty() and os.fstat(1).st_rdev == os.fstat(2).st_rdev
    except (OSError, AttributeError):  # one of them is closed
        return False


def event_as_text(seq: int, message: Message) -> str:
    """An event for people; further lines of its data stand beneath the first."""
    head = f"{seq}  {visible(message.event, one_line=True)}  "
    return head + visible(message.data).replace("\n", "\n" + " " * len(head))


def event_as_json(seq: int, message: Message) -> str:
    """An event for programs, in ASCII."""
    return json.dumps({"id": seq, "event": message.event, "data": message.data})


def describe_end(record: dict[str, Any]) -> str:
    reason = record.get("stop_reason")
    text = f"run {record['id']}: {record['status']}" + (f" ({reason})" if reason else "")
    error = record.get("error")
    if isinstance(error, dict):
        text += f", {error.get('code')}: {error.get('message')}"
    elif record.get("cancel_reason"):
        text += f": {record['cancel_reason']}"
    return text
