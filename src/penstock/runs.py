"""A run's record, and a run's life as a table.

A run is *running* from the step in which the log creates its record until the step in which the log stores its terminal
entry. What can end it is a `Cause`, and `LIFE` says, for every state and cause, which state follows; the code asks the
table, and the diagram in the documentation is drawn from it. A cause that has no row for a state changes nothing there:
that is why a terminal status is final.

    running --returned--> completed        running --cancel----> cancelled
    running --raised----> failed           running --timeout---> failed        ... see LIFE

`CAUSES` holds the other columns of a cause: the stop reason, the code and words that clients get, and what the producer
is told through `CancelScope.cancel(reason=...)`. Everything here is a plain value: no I/O, no clock of its own.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field, replace
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

RUN_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_NOT_IN_A_PATH: Final = frozenset({".", ".."})  # clients resolve them before they ask (RFC 3986, section 5.2.4)


class RunStatus(StrEnum):
    """Where a run is in its life. All but `RUNNING` are terminal, and final."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"

    @property
    def terminal(self) -> bool:
        """True once the run has ended."""
        return self is not RunStatus.RUNNING


class Outcome(StrEnum):
    """How a run ended: the terminal half of `RunStatus`."""

    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"


class StopReason(StrEnum):
    """The stop reasons with a meaning of their own. A producer may give any other; the run is then `failed`."""

    END_TURN = "end_turn"
    MAX_STEPS = "max_steps"
    TOOL_RULE = "tool_rule"
    REQUIRES_APPROVAL = "requires_approval"
    CANCELLED = "cancelled"
    ERROR = "error"
    TIMEOUT = "timeout"
    SILENT = "silent"
    INTERRUPTED = "interrupted"
    LOST = "lost"


COMPLETING: Final = frozenset(
    {StopReason.END_TURN, StopReason.MAX_STEPS, StopReason.TOOL_RULE, StopReason.REQUIRES_APPROVAL}
)
"""The stop reasons with which a producer completes its run."""


class Cause(StrEnum):
    """What ends a run."""

    RETURNED = "returned"
    """The producer returned, or yielded `[DONE]`."""
    STOPPED = "stopped"
    """... after it had given a stop reason that is none of `COMPLETING`."""
    RAISED = "raised"
    """The producer raised, or yielded an error event or an error status."""
    CANCEL = "cancel"
    """Somebody asked for it, from any process; or the producer raised `RunCancelled`."""
    TIMEOUT = "timeout"
    SILENT = "silent"
    SHUTDOWN = "shutdown"
    """The process shuts down, or the supervisor's own scope was cancelled from outside."""
    FENCED = "fenced"
    """Another owner has the run now, and ends it."""
    DIVERGED = "diverged"
    """The log lost entries that this process no longer has."""
    UNAVAILABLE = "unavailable"
    """The log could not be reached for longer than `outage_limit`; a reaper ends the run."""
    ABANDONED = "abandoned"
    """The owner's lease ran out: its process is dead, or cut off."""


@dataclass(frozen=True, slots=True)
class CauseRow:
    """One row of the table of causes.

    Attributes:
        status: the status that the run ends with, as far as this owner knows.
        stop_reason: the record's stop reason, unless the producer said another.
        scope_reason: what the producer reads in `Cancelled.reason`; None if its scope is not cancelled.
        code: the code of the error or cancelled entry before `[DONE]`; None if there is none.
        message: the words beside that code, or of the cancelled entry.
    """

    status: RunStatus
    stop_reason: str
    scope_reason: str | None = None
    code: str | None = None
    message: str = ""


CAUSES: Final[Mapping[Cause, CauseRow]] = MappingProxyType(
    {
        Cause.RETURNED: CauseRow(RunStatus.COMPLETED, StopReason.END_TURN),
        Cause.STOPPED: CauseRow(RunStatus.FAILED, StopReason.ERROR),
        Cause.RAISED: CauseRow(RunStatus.FAILED, StopReason.ERROR, None, "ERROR", "the run failed"),
        Cause.CANCEL: CauseRow(
            RunStatus.CANCELLED, StopReason.CANCELLED, "run cancelled", "RUN_CANCELLED", "the run was cancelled"
        ),
        Cause.TIMEOUT: CauseRow(
            RunStatus.FAILED, StopReason.TIMEOUT, "run timed out", "TIMEOUT", "the run took longer than its timeout"
        ),
        Cause.SILENT: CauseRow(
            RunStatus.FAILED, StopReason.SILENT, "run was silent", "SILENT", "the run was silent for too long"
        ),
        Cause.SHUTDOWN: CauseRow(
            RunStatus.FAILED, StopReason.INTERRUPTED, "shutdown", "INTERRUPTED", "the server was shut down"
        ),
        Cause.FENCED: CauseRow(RunStatus.LOST, StopReason.LOST, "fenced"),
        Cause.DIVERGED: CauseRow(
            RunStatus.FAILED, StopReason.ERROR, "log diverged", "LOG_DIVERGED", "the log lost a part of this run"
        ),
        Cause.UNAVAILABLE: CauseRow(RunStatus.LOST, StopReason.LOST, "log unavailable"),
        Cause.ABANDONED: CauseRow(RunStatus.LOST, StopReason.LOST, None, "RUN_LOST", "the process that ran it is gone"),
    }
)

LIFE: Final[Mapping[RunStatus, Mapping[Cause, RunStatus]]] = MappingProxyType(
    {
        RunStatus.RUNNING: MappingProxyType({cause: row.status for cause, row in CAUSES.items()}),
        RunStatus.COMPLETED: MappingProxyType({}),
        RunStatus.FAILED: MappingProxyType({}),
        RunStatus.CANCELLED: MappingProxyType({}),
        RunStatus.LOST: MappingProxyType({}),
    }
)
"""Every transition that a run may make. What is not here does not happen."""


@dataclass(frozen=True, slots=True)
class RunError:
    """What went wrong, as clients may see it. The exception itself stays in the server's log, under `error_id`."""

    code: str
    message: str
    error_id: str

    def to_json(self) -> dict[str, str]:
        """The error's members in a run's JSON."""
        return {"code": self.code, "message": self.message, "error_id": self.error_id}


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ends: what its record takes over in the same step in which its terminal entry is stored."""

    status: RunStatus
    stop_reason: str
    error: RunError | None = None
    cancel_reason: str | None = None

    def __post_init__(self) -> None:
        if not self.status.terminal:
            raise ValueError(f"a run cannot end {self.status}")


@dataclass(frozen=True, slots=True)
class Run:
    """A run's record, as the log has it. Times are seconds since the Unix epoch.

    Attributes:
        id: 1 to 128 characters of `[A-Za-z0-9._:-]`.
        producer: the name of what runs.
        status: where the run is in its life.
        stop_reason: why it ended (see `StopReason`); None while it runs.
        cancel_reason: the words of whoever cancelled it, also when it then ended otherwise.
        error: what went wrong, if it failed or was lost.
        seq: the highest seq stored.
        created_at: when its start was asked for.
        started_at: when the log accepted it.
        ended_at: when its terminal entry was stored; None while it runs.
        metadata: the caller's own JSON object.
    """

    id: str
    producer: str
    status: RunStatus = RunStatus.RUNNING
    stop_reason: str | None = None
    cancel_reason: str | None = None
    error: RunError | None = None
    seq: int = 0
    created_at: float = 0.0
    started_at: float = 0.0
    ended_at: float | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def outcome(self) -> Outcome | None:
        """How the run ended; None while it runs."""
        return Outcome(self.status.value) if self.status.terminal else None

    def ended(self, ending: Ending, *, seq: int, at: float) -> Run:
        """The record after `ending`, with `seq` as its terminal entry, at time `at`.

        Raises:
            ValueError: the run has ended already, and a terminal status is final.
        """
        if ending.status not in LIFE[self.status].values():
            raise ValueError(f"run {self.id!r} is {self.status} and cannot become {ending.status}")
        return replace(
            self,
            status=ending.status,
            stop_reason=ending.stop_reason,
            error=ending.error,
            cancel_reason=self.cancel_reason if ending.cancel_reason is None else ending.cancel_reason,
            seq=seq,
            ended_at=at,
        )

    def to_json(self) -> dict[str, Any]:
        """The record as the HTTP API shows it."""
        return {
            "id": self.id,
            "producer": self.producer,
            "status": self.status.value,
            "stop_reason": self.stop_reason,
            "cancel_reason": self.cancel_reason,
            "error": None if self.error is None else self.error.to_json(),
            "seq": self.seq,
            "created_at": self.created_at,
            "started_at": self.started_at,
            "ended_at": self.ended_at,
            "metadata": dict(self.metadata),
        }


def new_run_id() -> str:
    """A run id that nobody can guess (96 random bits) and that sorts by the time of its making (milliseconds)."""
    return f"run-{int(time.time() * 1000):012x}-{secrets.token_hex(12)}"


def check_run_id(run_id: str) -> str:
    """Return `run_id` if it is one.

    Raises:
        ValueError: it is not 1 to 128 characters of `[A-Za-z0-9._:-]`, or is `.` or `..`.
    """
    if not isinstance(run_id, str) or RUN_ID.fullmatch(run_id) is None or run_id in _NOT_IN_A_PATH:
        raise ValueError(
            f"a run id is 1 to 128 letters, digits, '.', '_', ':' or '-', and not '.' or '..'; not {run_id!r:.160}"
        )
    return run_id
