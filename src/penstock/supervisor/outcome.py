"""How a run ends: decided from recorded facts, in one pure function.

Neither `cancelled_caught` nor an exception's type says how a producer's body ended: it may swallow a cancellation,
shield itself from it, or raise while it is being cancelled. So whoever cancels records the *cause* first, and the run's
task records what happened; this module turns those facts into the run's last entries and its record's ending. In this
order:

1. an exception other than `Cancelled` and `RunCancelled`: failed, with the cause's words kept beside the error;
2. a recorded cause: its row in `CAUSES`;
3. `RunCancelled`: cancelled;
4. an error that the producer reported itself: failed;
5. what it said of why it stopped, or nothing: completed, cancelled or failed.

The last entry is always `[DONE]`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from penstock.errors import RunCancelled, encodable, single_error, words_for_clients
from penstock.runs import CAUSES, COMPLETING, Cause, Ending, RunError, RunStatus, StopReason
from penstock.sse.dialects import DONE

if TYPE_CHECKING:
    from penstock.sse.dialects import Dialect


@dataclass(frozen=True, slots=True)
class RunFacts:
    """What is on record when a run ends.

    Attributes:
        error: what the producer raised, apart from `Cancelled`.
        cause: the first cause that was recorded.
        words: the words that came with the cause.
        said: the stop reason that the producer gave.
        reported: the code and words of an error that the producer yielded.
        untold: `reported` is not among the run's entries yet.
    """

    error: BaseException | None = None
    cause: Cause | None = None
    reason: str | None = None
    stop_reason: str | None = None
    yielded_error: tuple[str, str] | None = None
    not_stored: bool = False


def decide(
    facts: RunFacts, dialect: Dialect, *, error_id: str, expose_errors: bool = False
) -> tuple[list[bytes], Ending]:
    """The run's last blocks, and its record's ending."""
    error = None if facts.error is None else single_error(facts.error)
    if error is not None and not isinstance(error, RunCancelled):
        code, message = words_for_clients(error, expose_errors=expose_errors)
        shown = RunError(code, message, error_id)
        kept = None if facts.cause is None else facts.reason or CAUSES[facts.cause].scope_reason
        return [dialect.error(shown), DONE], Ending(RunStatus.FAILED, StopReason.ERROR, shown, kept)
    cause, words = facts.cause, facts.reason
    if cause is None and error is not None:
        cause, words = Cause.CANCEL, None if error.reason is None else encodable(error.reason)
    if cause is not None:
        return _by_cause(cause, words, dialect, error_id)
    if facts.yielded_error is not None:
        shown = RunError(*facts.yielded_error, error_id)
        blocks = [dialect.error(shown), DONE] if facts.not_stored else [DONE]
        return blocks, Ending(RunStatus.FAILED, StopReason.ERROR, shown)
    return [DONE], _by_stop_reason(facts.stop_reason, error_id)


def _by_cause(cause: Cause, words: str | None, dialect: Dialect, error_id: str) -> tuple[list[bytes], Ending]:
    row = CAUSES[cause]
    if row.status is RunStatus.CANCELLED:
        return [dialect.cancelled(row.message, words), DONE], Ending(row.status, row.stop_reason, cancel_reason=words)
    if row.code is None:
        return [DONE], Ending(row.status, row.stop_reason)
    shown = RunError(row.code, row.message, error_id)
    return [dialect.error(shown), DONE], Ending(row.status, row.stop_reason, shown)


def _by_stop_reason(said: str | None, error_id: str) -> Ending:
    if said is None:
        row = CAUSES[Cause.RETURNED]
        return Ending(row.status, row.stop_reason)
    if said in COMPLETING:
        return Ending(RunStatus.COMPLETED, said)
    if said == StopReason.CANCELLED:
        return Ending(RunStatus.CANCELLED, said)
    shown = RunError("STOPPED", f"the producer stopped: {said}", error_id)
    return Ending(CAUSES[Cause.STOPPED].status, said, shown)
