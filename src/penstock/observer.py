"""Hooks for whoever watches: a protocol, and the observer that writes to `logging`.

An observer is told of what has happened; it decides nothing. Its methods are called synchronously in the task in which
the thing happened, so they must be quick, and an exception that one of them raises is logged and goes no further.
"""

from __future__ import annotations

import logging
import secrets
from typing import TYPE_CHECKING, Final, ParamSpec, Protocol, runtime_checkable

from penstock.errors import PublicError, words_for_clients

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock.runs import Run

logger: Final = logging.getLogger("penstock")

P = ParamSpec("P")


@runtime_checkable
class Observer(Protocol):
    """What an observer is told. Derive from `LoggingObserver` to change a part of it."""

    def run_started(self, run: Run) -> None:
        """A run of this process has been created in the log."""

    def run_ended(self, run: Run) -> None:
        """The terminal entry of a run of this process has been stored; `run` is as its owner knows it."""

    def run_fenced(self, run_id: str) -> None:
        """A run of this process has a new owner, or was ended by one; what happens here no longer counts."""

    def run_stuck(self, run_id: str, seconds: float, stack: str) -> None:
        """A producer has not let go for `seconds` after it was cancelled; `stack` says where it stands."""

    def on_error(self, error: BaseException, *, error_id: str, where: str) -> None:
        """An exception ended `where` (a run or a response), and clients were shown `error_id` instead of its words."""

    def warning(self, message: str) -> None:
        """Something failed that will be tried again."""


class LoggingObserver:
    """Writes a line to the logger `penstock` for everything it is told."""

    def run_started(self, run: Run) -> None:
        """One line, at level DEBUG."""
        logger.debug("run %s started: %s", run.id, run.producer)

    def run_ended(self, run: Run) -> None:
        """One line, at level INFO."""
        logger.info("run %s ended %s (%s) after %d entries", run.id, run.status, run.stop_reason, run.seq)

    def run_fenced(self, run_id: str) -> None:
        """One line, at level WARNING."""
        logger.warning("run %s was taken over by another owner", run_id)

    def run_stuck(self, run_id: str, seconds: float, stack: str) -> None:
        """The stack, at level WARNING."""
        logger.warning(
            "run %s was cancelled %.0f s ago and has not let go; it stands here:\n%s", run_id, seconds, stack
        )

    def on_error(self, error: BaseException, *, error_id: str, where: str) -> None:
        """The traceback, at level ERROR; of an error that was meant for the client one line, at level WARNING."""
        if isinstance(error, PublicError):
            logger.warning("%s: %s: %s [%s]", where, *words_for_clients(error), error_id)
        else:
            logger.error("%s: %s [%s]", where, error, error_id, exc_info=error)

    def warning(self, message: str) -> None:
        """One line, at level WARNING."""
        logger.warning(message)


def tell(hook: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call an observer's hook; what it raises is logged, and harms nobody."""
    try:
        hook(*args, **kwargs)
    except Exception:
        logger.exception("the observer's %s failed", getattr(hook, "__name__", hook))


def new_error_id() -> str:
    """An id that ties what a client is shown to a line in the server's log."""
    return f"err-{secrets.token_hex(8)}"
