"""`LoggingObserver`: log records with a sentence for people, and its parts for programs.

The parts are attributes of the record: `event` (the hook's name), `run_id`, `cause` and so on; a formatter can write
them as JSON. In text from clients or producers every unprintable character is escaped, so that it cannot forge a log
line. No record holds a credential.
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
    """Writes to the logger `penstock`: a record for each call of a hook, but none for pings, commits and figures.

    | level | hooks |
    |---|---|
    | ERROR | `on_error`, with the traceback (of a `PublicError` only its message, at WARNING) |
    | WARNING | `run_fenced`, `run_stuck` (with the stack), `runs_lost`, `outage_began`, `outage_ended`, `warning` |
    | INFO | `run_ended`, `stream_ended` of a run |
    | DEBUG | `run_started`, `refused`, `stream_ended` of a response without a run |
    """

    def run_started(self, run: Run) -> None:
        text = f"run {run.id} started: {run.producer}"
        _log(logging.DEBUG, "run_started", text, run_id=run.id, producer=run.producer)

    def run_ended(self, run: Run) -> None:
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
        _log(logging.WARNING, "run_fenced", f"run {run_id} was taken over by another owner", run_id=run_id)

    def run_stuck(self, run_id: str, seconds: float, stack: str) -> None:
        logger.warning(
            "run %s was cancelled %.0f s ago and is still running, here:\n%s",
            run_id,
            seconds,
            stack,
            extra={"event": "run_stuck", "run_id": run_id, "seconds": round(seconds, 3)},
        )

    def runs_lost(self, run_ids: Sequence[str]) -> None:
        for run_id in run_ids:
            text = f"run {run_id} ended lost: its owner's lease had expired"
            _log(logging.WARNING, "run_lost", text, run_id=run_id, cause="lost")

    def stream_ended(self, end: StreamEnd) -> None:
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
        _log(logging.DEBUG, "refused", f"a request was refused: {status} {code}", status=status, cause=code)

    def outage_began(self) -> None:
        _log(logging.WARNING, "outage_began", "the event log cannot be reached")

    def outage_ended(self, seconds: float) -> None:
        text = f"the event log can be reached again, after {seconds:.1f} s"
        _log(logging.WARNING, "outage_ended", text, seconds=round(seconds, 3))

    def on_error(self, error: BaseException, *, error_id: str, where: str) -> None:
        extra = {"event": "error", "where": where, "error_id": error_id}
        if isinstance(error, PublicError):
            code, message = words_for_clients(error)
            logger.warning(
                "%s: %s: %s [%s]",
                escape_unprintable(where),
                escape_unprintable(code),
                escape_unprintable(message),
                error_id,
                extra={**extra, "cause": code},
            )
        else:
            extra["cause"] = type(error).__name__
            message = escape_unprintable(encodable(error))
            logger.error("%s: %s [%s]", escape_unprintable(where), message, error_id, exc_info=error, extra=extra)

    def warning(self, message: str) -> None:
        _log(logging.WARNING, "warning", message)


def _log(level: int, event: str, text: str, **parts: Any) -> None:
    if logger.isEnabledFor(level):
        logger.log(level, "%s", escape_unprintable(text), extra={"event": event, **parts})


class SingleLineFormatter(logging.Formatter):
    """For people: only a record begins a line, whatever text it holds. Tracebacks are indented."""

    def formatException(self, ei: Any) -> str:  # noqa: N802  (logging's name)
        return "\n".join(f"  {escape_unprintable(line)}" for line in super().formatException(ei).split("\n"))


def escape_unprintable(text: str) -> str:
    """Return the text with each unprintable character escaped, as in a Python string."""
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else ascii(each)[1:-1] for each in text)
