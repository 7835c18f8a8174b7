"""A run's record, and the table of what ends a run.

A run is *running* from the step in which the log creates its record until the step in which the log stores its terminal
entry. Its `Cause` decides how it ends; the first one that the run's owner records counts. docs/life.md is drawn from
`CAUSES`. All values here are plain: no I/O, no clock of their own.
"""

from __future__ import annotations

import re
import secrets
import time
from dataclasses import dataclass, field, fields, replace
from enum import StrEnum
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from collections.abc import Mapping

RUN_ID: Final = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_NOT_IN_A_PATH: Final = frozenset({".", ".."})  # clients remove them from a URL's path (RFC 3986, section 5.2.4)


class RunStatus(StrEnum):
    """Whether a run is running, or how it ended. All but `RUNNING` are terminal, and final."""

    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    LOST = "lost"

    @property
    def terminal(self) -> bool:
        """Whether a run with this status has ended."""
        return self is not RunStatus.RUNNING


Outcome = RunStatus  # how a run ended: one of the terminal statuses


class StopReason(StrEnum):
    """The stop reasons that have a meaning. A producer may give any other one, and its run then ends `failed`."""

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

    RETURNED = "returned"  # the producer returned, or yielded `[DONE]`
    STOPPED = "stopped"  # the producer returned after it had given a stop reason that is not in `COMPLETING`
    RAISED = "raised"  # the producer raised, or yielded an error event or an error status
    CANCEL = "cancel"  # a cancel request, from any process; or the producer raised `RunCancelled`
    TIMEOUT = "timeout"
    SILENT = "silent"
    SHUTDOWN = "shutdown"  # the process shuts down, or the supervisor's own scope is cancelled from outside
    FENCED = "fenced"  # the run has another owner now, which ends it
    DIVERGED = "diverged"  # the log lost entries that this process no longer has
    UNAVAILABLE = "unavailable"  # the log was unreachable for longer than `outage_limit`; another process reaps the run
    ABANDONED = "abandoned"  # the owner's lease has expired: its process has died, or cannot reach the log


@dataclass(frozen=True, slots=True)
class CauseRow:
    """One row of the table of causes."""

    status: RunStatus  # with which the run ends, as far as its owner knows
    stop_reason: str  # the record's, unless the producer gave another
    scope_reason: str | None = None  # what the producer reads in `Cancelled.reason`; None: its scope is not cancelled
    code: str | None = None  # of the error or cancelled entry before `[DONE]`; None if there is no such entry
    message: str = ""  # of that entry


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


@dataclass(frozen=True, slots=True)
class RunError:
    """What went wrong, as clients see it: a `code` for programs, and a `message` for people.

    `error_id` names the exception in the server's log.
    """

    code: str
    message: str
    error_id: str

    def to_json(self) -> dict[str, str]:
        """Return the members of `error` in a run's JSON."""
        return {"code": self.code, "message": self.message, "error_id": self.error_id}


@dataclass(frozen=True, slots=True)
class Ending:
    """How a run ends: the log copies it into the record in the step in which it stores the terminal entry."""

    status: RunStatus
    stop_reason: str
    error: RunError | None = None
    cancel_reason: str | None = None

    def __post_init__(self) -> None:
        if not self.status.terminal:
            raise ValueError(f"a run cannot end {self.status}")


@dataclass(frozen=True, slots=True)
class Run:
    """A run's record, as the log stores it. Times are seconds since the Unix epoch.

    Attributes:
        id: 1 to 128 characters of `[A-Za-z0-9._:-]`.
        producer: the producer's name.
        status: whether the run is running, or how it ended.
        stop_reason: why it ended (see `StopReason`); None while it runs.
        cancel_reason: the reason that a cancel request gave, even if the run then ended otherwise.
        error: what went wrong, if the run failed or was lost.
        seq: the highest seq stored.
        created_at: when its start was requested.
        started_at: when the log created the record.
        ended_at: when the log stored the terminal entry; None while it runs.
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
        return self.status if self.status.terminal else None

    def ended(self, ending: Ending, *, seq: int, at: float) -> Run:
        """Return the record after `ending`, whose terminal entry `seq` was stored `at` seconds since the Unix epoch.

        Raises `ValueError` if the run has ended already: a terminal status is final.
        """
        if self.status.terminal:
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
        """Return the record as the HTTP API shows it."""
        return {
            **{each.name: getattr(self, each.name) for each in fields(self)},
            "status": self.status.value,
            "error": None if self.error is None else self.error.to_json(),
            "metadata": dict(self.metadata),
        }


def new_run_id() -> str:
    """Return an unguessable run id (96 random bits) that sorts by the time of its creation (in milliseconds)."""
    return f"run-{int(time.time() * 1000):012x}-{secrets.token_hex(12)}"


def check_run_id(run_id: str) -> str:
    """Return `run_id`, or raise `ValueError` if it is not a valid one."""
    if not isinstance(run_id, str) or RUN_ID.fullmatch(run_id) is None or run_id in _NOT_IN_A_PATH:
        raise ValueError(
            f"a run id is 1 to 128 letters, digits, '.', '_', ':' or '-', and not '.' or '..'; not {run_id!r:.160}"
        )
    return run_id
