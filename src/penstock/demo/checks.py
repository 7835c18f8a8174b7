"""What the demo claims, judged from what was received and what was written: pure functions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Sequence

CANCEL_LIMIT_SECONDS: Final = 1.0
CANCEL_TARGET_SECONDS: Final = 0.05
CUTS: Final = (0.25, 0.5)
"""After which shares of the lines to be expected the connection is cut."""
MISSED: Final = 10
"""How many more lines the command is let write after each cut, before the client comes back."""
NO_CONTENT: Final = 204


class Received(NamedTuple):
    """One event, as the client got it."""

    id: int
    event: str
    data: str


@dataclass(slots=True)
class Cut:
    """How it was when a connection had been cut."""

    after: int
    """The id of the last event that was read."""
    running: bool
    """Whether the run was still going on when the client came back."""
    missed: int
    """The events that were stored while nobody listened."""


@dataclass(slots=True)
class Reading:
    """What all connections together brought."""

    events: list[Received] = field(default_factory=list)
    cuts: list[Cut] = field(default_factory=list)
    status_at_end: int = 0
    """What a request with the last id was answered."""

    @property
    def last_id(self) -> int:
        """The cursor to come back with."""
        return self.events[-1].id if self.events else 0

    @property
    def lines(self) -> list[str]:
        """The command's output, as it arrived."""
        return [event.data for event in self.events if event.event in {"stdout", "stderr"}]


class Check(NamedTuple):
    """One claim, and whether it held."""

    held: bool
    words: str


def difference(written: Sequence[str], arrived: Sequence[str]) -> str | None:
    """Where what arrived first differs from what was written; None if it does not."""
    for number, (line, got) in enumerate(zip(written, arrived, strict=False), 1):
        if line != got:
            return f"line {number} was written as {line!r:.100}, and arrived as {got!r:.100}"
    if len(written) != len(arrived):
        return f"{len(written)} lines were written, and {len(arrived)} arrived"
    return None


def id_fault(ids: Sequence[int]) -> str | None:
    """What is wrong with the ids, which are to be 1, 2, 3 …; None if nothing is."""
    for expected, got in enumerate(ids, 1):
        if got != expected:
            return f"id {got} came where {expected} was due"
    return None if ids else "there are none"


def judge_reading(reading: Reading, written: Sequence[str], compiled: int) -> list[Check]:
    """The checks of the first part."""
    events, lines = reading.events, reading.lines
    announced = sum(line.startswith("Compiling ") for line in written)
    exits = [event.data for event in events if event.event == "exit"]
    apart = difference(written, lines)
    fault = id_fault([event.id for event in events])
    done = bool(events) and events[-1].data == "[DONE]" and sum(event.data == "[DONE]" for event in events) == 1
    cuts = "; ".join(f"after id {cut.after}, {cut.missed} more were stored before it came back" for cut in reading.cuts)
    return [
        Check(
            len(written) > MISSED and exits == ['{"exit_code":0}'] and compiled == announced,
            f"the command wrote {len(written)} lines into its own file, and {compiled} compiled files; "
            f"its exit event: {', '.join(exits) or 'none'}",
        ),
        Check(
            len(reading.cuts) == len(CUTS) and all(cut.running and cut.missed > 0 for cut in reading.cuts),
            f"cut {len(reading.cuts)} times in mid-stream: {cuts}",
        ),
        Check(
            apart is None,
            f"{len(lines)} lines arrived over HTTP: "
            + ("every line, once, in order" if apart is None else f"NOT what was written: {apart}"),
        ),
        Check(
            fault is None,
            f"ids 1 to {reading.last_id} over {len(reading.cuts) + 1} connections"
            + (", no gap, no repeat" if fault is None else f": {fault}"),
        ),
        Check(
            done and reading.status_at_end == NO_CONTENT,
            f"[DONE] came {'last' if done else 'NOT last, or not once'}; "
            f"a request with the last id was answered {reading.status_at_end}",
        ),
    ]


def judge_cancel(seconds: float, names: Sequence[str], last: str) -> Check:
    """The check of the second part; `names` and `last` are the events' types and the last one's data."""
    return Check(
        seconds < CANCEL_LIMIT_SECONDS and "cancelled" in names and last == "[DONE]",
        f"a silent run was cancelled by another client: {seconds * 1000:.1f} ms from the request to the end of the "
        f"stream (target {CANCEL_TARGET_SECONDS * 1000:.0f} ms, limit {CANCEL_LIMIT_SECONDS * 1000:.0f} ms)",
    )
