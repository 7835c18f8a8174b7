"""How a run ends: decided from recorded facts, in one pure function.

Neither `cancelled_caught` nor an exception's type says how a producer's body ended: a body may swallow a cancellation,
shield itself from it, or raise while it is being cancelled. So the facts are recorded as they happen. The first rule
that applies decides:

1. the producer raised an exception other than `Cancelled` and `RunCancelled`: failed, and the record keeps the reason
   of the cause beside the error;
2. a cause is recorded: its row in `CAUSES`;
3. the producer raised `RunCancelled`: cancelled;
4. the producer yielded an error: failed;
5. the producer gave a stop reason, or none: completed, cancelled or failed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.errors import RunCancelled, encodable, single_error, words_for_clients
from penstock.runs import CAUSES, COMPLETING, Cause, Ending, RunError, RunStatus, StopReason
from penstock.sse.dialects import DONE

if TYPE_CHECKING:
    from penstock.sse.dialects import Dialect


@dataclass(slots=True)
class RunFacts:
    """What has been recorded of a run."""

    error: BaseException | None = None  # what the producer raised, without cancellations
    cause: Cause | None = None  # the first cause that was recorded
    reason: str | None = None  # the reason given with the cause
    stop_reason: str | None = None  # the stop reason that the producer gave
    yielded_error: tuple[str, str] | None = None  # the code and message of an error that the producer yielded
    not_stored: bool = False  # `yielded_error` is not among the run's entries yet
    interrupted: bool = False  # something outside the run ended the producer without a cause: it counts as a shutdown


def decide(
    facts: RunFacts, dialect: Dialect, *, error_id: str, expose_errors: bool = False
) -> tuple[list[bytes], Ending]:
    error = None if facts.error is None else single_error(facts.error)
    cause, reason = facts.cause, facts.reason
    if cause is None and facts.interrupted:
        cause = Cause.SHUTDOWN
    if error is not None and not isinstance(error, RunCancelled):
        code, message = words_for_clients(error, expose_errors=expose_errors)
        shown = RunError(code, message, error_id)
        kept = None if cause is None else reason or CAUSES[cause].scope_reason
        return [dialect.error(shown), DONE], Ending(RunStatus.FAILED, StopReason.ERROR, shown, kept)
    if cause is None and error is not None:
        cause, reason = Cause.CANCEL, None if error.reason is None else encodable(error.reason)
    if cause is not None:
        return _by_cause(cause, reason, dialect, error_id)
    if facts.yielded_error is not None:
        shown = RunError(*facts.yielded_error, error_id)
        blocks = [dialect.error(shown), DONE] if facts.not_stored else [DONE]
        return blocks, Ending(RunStatus.FAILED, StopReason.ERROR, shown)
    return [DONE], _by_stop_reason(facts.stop_reason, error_id)


def _by_cause(cause: Cause, reason: str | None, dialect: Dialect, error_id: str) -> tuple[list[bytes], Ending]:
    row = CAUSES[cause]
    if row.status is RunStatus.CANCELLED:
        return [dialect.cancelled(row.message, reason), DONE], Ending(row.status, row.stop_reason, cancel_reason=reason)
    if row.code is None:
        return [DONE], Ending(row.status, row.stop_reason)
    shown = RunError(row.code, row.message, error_id)
    return [dialect.error(shown), DONE], Ending(row.status, row.stop_reason, shown)


def _by_stop_reason(stop_reason: str | None, error_id: str) -> Ending:
    if stop_reason is None:
        row = CAUSES[Cause.RETURNED]
        return Ending(row.status, row.stop_reason)
    if stop_reason in COMPLETING:
        return Ending(RunStatus.COMPLETED, stop_reason)
    if stop_reason == StopReason.CANCELLED:
        return Ending(RunStatus.CANCELLED, stop_reason)
    shown = RunError("STOPPED", f"the producer stopped: {stop_reason}", error_id)
    return Ending(CAUSES[Cause.STOPPED].status, stop_reason, shown)
