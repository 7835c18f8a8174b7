"""Hooks for monitoring: a protocol, the data that it passes, and how several observers are notified at once.

An observer is notified of what has happened; it decides nothing. Its methods are called synchronously in the task in
which the thing happened, so they must be quick, and an exception that one of them raises is logged and goes no further.
Derive an observer of your own from `NullObserver`.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from functools import wraps
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Protocol, runtime_checkable

from penstock.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from penstock.runs import Run

logger: Final = logging.getLogger("penstock")

P = ParamSpec("P")

FIGURES_INTERVAL: Final = 1.0
"""Seconds between two calls of `Observer.figures`."""


@dataclass(frozen=True, slots=True)
class Commit:
    """One append that the log has acknowledged.

    It stored `entries` entries of `runs` runs, whose size on the wire is `bytes`, and took `seconds`, including the
    repeated attempts of an outage.
    """

    runs: int
    entries: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """How the stream of an `EventStreamResponse` has ended.

    Attributes:
        cause: `ended` if everything was sent; `disconnected` if the client disconnected; `interrupted` if the server
            shut down; `failed` if the server could not send; else the code of the error, such as `READER_RELEASED`.
        run_id: the run whose entries it sent; None for a response without a run.
        cursor: the seq of the last entry that it took; None for a response without a run.
        entries: the number of entries that it took; None for a response without a run.
        bytes: the bytes sent, without the pings and the control events of the server's own.
        seconds: its duration.
    """

    cause: str
    run_id: str | None
    cursor: int | None
    entries: int | None
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Figures:
    """The current sizes and counts of a supervisor, and what its readers took since the figures before.

    Attributes:
        runs: its runs that have not ended.
        readers: its readers, over HTTP or not.
        pending_bytes: the bytes that wait for the log's acknowledgement.
        tail_bytes: the bytes of recent entries in memory.
        entries_out: the entries that readers took since the figures before.
        bytes_out: their size on the wire.
    """

    runs: int
    readers: int
    pending_bytes: int
    tail_bytes: int
    entries_out: int
    bytes_out: int


@runtime_checkable
class Observer(Protocol):
    """The hooks of an observer."""

    def run_started(self, run: Run) -> None:
        """The log has created the record of a run of this process."""

    def run_ended(self, run: Run) -> None:
        """The log has stored the terminal entry of a run of this process; `run` is as its owner knows it."""

    def run_cancelled(self, run_id: str, seconds: float) -> None:
        """The run `run_id` has ended cancelled, `seconds` after this process, its owner, received the request."""

    def run_fenced(self, run_id: str) -> None:
        """A run of this process has another owner now, or was ended by one; the log takes no more entries from here."""

    def run_stuck(self, run_id: str, seconds: float, stack: str) -> None:
        """The producer of `run_id` is still there `seconds` after it was cancelled; `stack` is its task's stack."""

    def runs_lost(self, run_ids: Sequence[str]) -> None:
        """This process has ended runs of other processes, whose leases had expired, as lost."""

    def stream_started(self, run_id: str | None) -> None:
        """The headers of a stream are being sent; `run_id` is None for a response without a run."""

    def stream_ended(self, end: StreamEnd) -> None:
        """A stream whose headers were sent is over."""

    def pinged(self) -> None:
        """A stream was sent a ping."""

    def refused(self, status: int, code: str) -> None:
        """A request was answered with an error: the HTTP status `status` and the code `code`."""

    def committed(self, commit: Commit) -> None:
        """The log has acknowledged an append."""

    def outage_began(self) -> None:
        """The log, or a shard of it, cannot be reached; this is noticed within a second or so."""

    def outage_ended(self, seconds: float) -> None:
        """The whole log can be reached again, after so many seconds."""

    def figures(self, figures: Figures) -> None:
        """Current sizes and counts: every `FIGURES_INTERVAL`, before metrics are shown, and at the end."""

    def on_error(self, error: BaseException, *, error_id: str, where: str) -> None:
        """An `error` ended `where` (a run or a response); clients see `error_id` in place of its message."""

    def warning(self, message: str) -> None:
        """An attempt failed, and will be repeated."""


class NullObserver:
    """An observer whose hooks do nothing; see `Observer` for what they mean."""

    def run_started(self, run: Run) -> None: ...
    def run_ended(self, run: Run) -> None: ...
    def run_cancelled(self, run_id: str, seconds: float) -> None: ...
    def run_fenced(self, run_id: str) -> None: ...
    def run_stuck(self, run_id: str, seconds: float, stack: str) -> None: ...
    def runs_lost(self, run_ids: Sequence[str]) -> None: ...
    def stream_started(self, run_id: str | None) -> None: ...
    def stream_ended(self, end: StreamEnd) -> None: ...
    def pinged(self) -> None: ...
    def refused(self, status: int, code: str) -> None: ...
    def committed(self, commit: Commit) -> None: ...
    def outage_began(self) -> None: ...
    def outage_ended(self, seconds: float) -> None: ...
    def figures(self, figures: Figures) -> None: ...
    def on_error(self, error: BaseException, *, error_id: str, where: str) -> None: ...
    def warning(self, message: str) -> None: ...


class Observers(NullObserver):
    """Notifies several observers, in order; an exception of one does not keep the others from being notified."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers


def _for_each(hook: Callable[..., None]) -> Callable[..., None]:
    @wraps(hook)
    def notify_each(self: Observers, *args: Any, **kwargs: Any) -> None:
        for observer in self._observers:
            notify(getattr(observer, hook.__name__), *args, **kwargs)

    return notify_each


for _name, _hook in vars(NullObserver).items():
    if not _name.startswith("_"):
        setattr(Observers, _name, _for_each(_hook))


def checked(observer: Observer) -> Observer:
    """Return `observer` if it has every hook, or raise `ConfigurationError`."""
    if not isinstance(observer, Observer):
        raise ConfigurationError("an observer has every hook of penstock.Observer; derive it from NullObserver")
    return observer


def notify(hook: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call an observer's hook; an exception that it raises is logged and goes no further."""
    try:
        hook(*args, **kwargs)
    except Exception:
        logger.exception("the observer's %s failed", getattr(hook, "__name__", hook))


def new_error_id() -> str:
    """Return an id that clients see, and that the server's log has beside the exception."""
    return f"err-{secrets.token_hex(8)}"
