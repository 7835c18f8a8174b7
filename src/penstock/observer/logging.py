"""What happens, written to `logging`: a line for people, and its parts for programs.

Each record of the logger `penstock` has a sentence as its message, and as attributes what the sentence is made of:
`event` (the hook's name), `run_id`, `cause` and so on, which a formatter can write as JSON (`penstock serve
--log-format json` does). Words that come from clients or producers are shown with everything unprintable escaped, so
that nobody can write lines of his own. No credential is ever among them.
"""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from penstock.errors import PublicError, encodable, words_for_clients
from penstock.observer import NullObserver, logger

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.observer import StreamEnd
    from penstock.runs import Run


class LoggingObserver(NullObserver):
    """Writes a line to the logger `penstock` for everything that is rare enough: not for pings, commits and figures."""

    def run_started(self, run: Run) -> None:
        """One line, at level DEBUG."""
        _log(
            logging.DEBUG, "run_started", f"run {run.id} started: {run.producer}", run_id=run.id, producer=run.producer
        )

    def run_ended(self, run: Run) -> None:
        """One line, at level INFO."""
        seconds = (run.ended_at or 0.0) - run.started_at
        why = str(run.stop_reason)
        why += "" if run.error is None else f", {run.error.code} [{run.error.error_id}]"
        why += "" if run.cancel_reason is None else f", {run.cancel_reason!r}"
        _log(
            logging.INFO,
            "run_ended",
            f"run {run.id} ended {run.status} ({why}) after {run.seq} entries, {seconds:.3f} s",
            run_id=run.id,
            producer=run.producer,
            status=run.status.value,
            cause=run.stop_reason,
            cancel_reason=run.cancel_reason,
            error_code=None if run.error is None else run.error.code,
            error_id=None if run.error is None else run.error.error_id,
            entries=run.seq,
            seconds=round(seconds, 3),
        )

    def run_fenced(self, run_id: str) -> None:
        """One line, at level WARNING."""
        _log(logging.WARNING, "run_fenced", f"run {run_id} was taken over by another owner", run_id=run_id)

    def run_stuck(self, run_id: str, seconds: float, stack: str) -> None:
        """The stack, at level WARNING."""
        logger.warning(
            "run %s was cancelled %.0f s ago and has not let go; it stands here:\n%s",
            run_id,
            seconds,
            stack,
            extra={"event": "run_stuck", "run_id": run_id, "seconds": round(seconds, 3)},
        )

    def runs_lost(self, run_ids: Sequence[str]) -> None:
        """One line for each, at level WARNING."""
        for run_id in run_ids:
            words = f"run {run_id} ended lost: its owner's lease had run out"
            _log(logging.WARNING, "run_lost", words, run_id=run_id, cause="lost")

    def stream_ended(self, end: StreamEnd) -> None:
        """One line, at level INFO; of a response without a run, at level DEBUG."""
        whose = "a response's stream" if end.run_id is None else f"a stream of run {end.run_id}"
        came = "" if end.entries is None else f"{end.entries} entries up to {end.cursor}, "
        _log(
            logging.DEBUG if end.run_id is None else logging.INFO,
            "stream_ended",
            f"{whose} ended: {end.cause}; {came}{end.bytes} bytes, {end.seconds:.3f} s",
            run_id=end.run_id,
            cause=end.cause,
            cursor=end.cursor,
            entries=end.entries,
            bytes=end.bytes,
            seconds=round(end.seconds, 3),
        )

    def refused(self, status: int, code: str) -> None:
        """One line, at level DEBUG."""
        _log(logging.DEBUG, "refused", f"a request was refused: {status} {code}", status=status, cause=code)

    def outage_began(self) -> None:
        """One line, at level WARNING."""
        _log(logging.WARNING, "outage_began", "the event log cannot be reached")

    def outage_ended(self, seconds: float) -> None:
        """One line, at level WARNING."""
        words = f"the event log can be reached again, after {seconds:.1f} s"
        _log(logging.WARNING, "outage_ended", words, seconds=round(seconds, 3))

    def on_error(self, error: BaseException, *, error_id: str, where: str) -> None:
        """The traceback, at level ERROR; of an error that was meant for the client one line, at level WARNING."""
        extra = {"event": "error", "where": where, "error_id": error_id}
        if isinstance(error, PublicError):
            code, words = words_for_clients(error)
            logger.warning(
                "%s: %s: %s [%s]",
                escape_unprintable(where),
                escape_unprintable(code),
                escape_unprintable(words),
                error_id,
                extra={**extra, "cause": code},
            )
        else:
            extra["cause"] = type(error).__name__
            words = escape_unprintable(encodable(error))
            logger.error("%s: %s [%s]", escape_unprintable(where), words, error_id, exc_info=error, extra=extra)

    def warning(self, message: str) -> None:
        """One line, at level WARNING."""
        _log(logging.WARNING, "warning", message)


def _log(level: int, event: str, words: str, **parts: Any) -> None:
    if logger.isEnabledFor(level):
        logger.log(level, "%s", escape_unprintable(words), extra={"event": event, **parts})


class SingleLineFormatter(logging.Formatter):
    """For people: nothing begins a line but a record, whatever words there are in it. Tracebacks are indented."""

    def formatException(self, ei: Any) -> str:  # noqa: N802  (logging's name)
        """The traceback."""
        return "\n".join(f"  {escape_unprintable(line)}" for line in super().formatException(ei).split("\n"))


def escape_unprintable(words: str) -> str:
    """The words, with what is not printable escaped."""
    if words.isprintable():
        return words
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in words)
