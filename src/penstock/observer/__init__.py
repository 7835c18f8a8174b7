"""Hooks for whoever watches: a protocol, what it is told, and how several are told at once.

An observer is told of what has happened; it decides nothing. Its methods are called synchronously in the task in which
the thing happened, so they must be quick, and an exception that one of them raises is logged and goes no further.

| told | of |
|---|---|
| `run_started`, `run_ended`, `run_fenced`, `run_stuck`, `runs_lost`, `run_cancelled` | runs |
| `stream_started`, `stream_ended`, `pinged`, `refused` | whoever reads them over HTTP |
| `committed`, `outage_began`, `outage_ended` | the event log |
| `figures` | how much there is of everything, once a second |
| `on_error`, `warning` | what went wrong |

`LoggingObserver` (in `notes.py`) writes it down, `Metrics` (in `metrics.py`) counts it, `Observers` tells several, and
`NullObserver` takes no notice: whoever wants a part of it derives from that.
"""

from __future__ import annotations

import logging
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, ParamSpec, Protocol, runtime_checkable

from penstock.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from penstock.runs import Run

logger: Final = logging.getLogger("penstock")

P = ParamSpec("P")

FIGURES_INTERVAL: Final = 1.0
"""Seconds between two figures."""


@dataclass(frozen=True, slots=True)
class Commit:
    """What the log has acknowledged in one append.

    Attributes:
        runs: how many runs wrote to it.
        entries: how many entries it stored.
        bytes: their size, as they go on the wire.
        seconds: how long it took, with every new attempt while the log could not be reached.
    """

    runs: int
    entries: int
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class StreamEnd:
    """How the stream of an `EventStreamResponse` has ended.

    Attributes:
        cause: `ended` if all was sent that there was; `disconnected` if the client went away; `interrupted` if the
            server did; `failed` if the server could not send; else the code of what went wrong, such as
            `READER_RELEASED`.
        run_id: whose entries it sent; None for a response without a run.
        cursor: the seq of the last entry that was handed to it; None for a response without a run.
        entries: how many it was handed; None for a response without a run.
        bytes: what was sent, without pings and last words of the server's own.
        seconds: how long it took.
    """

    cause: str
    run_id: str | None
    cursor: int | None
    entries: int | None
    bytes: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Figures:
    """How much a supervisor has of everything, and what its readers have been handed since it was last told.

    Attributes:
        runs: its runs that have not ended.
        readers: readers, over HTTP or not.
        pending_bytes: what waits for the log's acknowledgement.
        tail_bytes: the recent entries that are at hand.
        entries_out: entries handed to readers since the figures before.
        bytes_out: their size, as they go on the wire.
    """

    runs: int
    readers: int
    pending_bytes: int
    tail_bytes: int
    entries_out: int
    bytes_out: int


@runtime_checkable
class Observer(Protocol):
    """What an observer is told."""

    def run_started(self, run: Run) -> None:
        """A run of this process has been created in the log."""

    def run_ended(self, run: Run) -> None:
        """The terminal entry of a run of this process has been stored; `run` is as its owner knows it."""

    def run_cancelled(self, run_id: str, seconds: float) -> None:
        """... as it was asked to: so many seconds after this process, its owner, had heard of that."""

    def run_fenced(self, run_id: str) -> None:
        """A run of this process has a new owner, or was ended by one; what happens here no longer counts."""

    def run_stuck(self, run_id: str, seconds: float, stack: str) -> None:
        """A producer has not let go for `seconds` after it was cancelled; `stack` says where it stands."""

    def runs_lost(self, run_ids: Sequence[str]) -> None:
        """Runs of others, whose leases had run out, have been ended from here, as lost."""

    def stream_started(self, run_id: str | None) -> None:
        """The headers of a stream are being sent; `run_id` is None for a response without a run."""

    def stream_ended(self, end: StreamEnd) -> None:
        """... and it is over."""

    def pinged(self) -> None:
        """A stream has been sent a ping."""

    def refused(self, status: int, code: str) -> None:
        """A request has been answered with this HTTP status and code instead of what it asked for."""

    def committed(self, commit: Commit) -> None:
        """The log has acknowledged an append."""

    def outage_began(self) -> None:
        """The log, or a node of its cluster, cannot be reached, as far as a look once a second can tell."""

    def outage_ended(self, seconds: float) -> None:
        """... and all of it can be again, after so many seconds."""

    def figures(self, figures: Figures) -> None:
        """How much there is of everything; every `FIGURES_INTERVAL`, when it is asked for, and at the end."""

    def on_error(self, error: BaseException, *, error_id: str, where: str) -> None:
        """An exception ended `where` (a run or a response), and clients were shown `error_id` instead of its words."""

    def warning(self, message: str) -> None:
        """Something failed that will be tried again."""


class NullObserver:
    """Takes no notice of anything."""

    def _nothing(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing happens."""

    run_started = run_ended = run_cancelled = run_fenced = run_stuck = runs_lost = _nothing
    stream_started = stream_ended = pinged = refused = _nothing
    committed = outage_began = outage_ended = figures = on_error = warning = _nothing


class Observers(NullObserver):
    """Tells several observers, each of them whatever the others do."""

    def __init__(self, *observers: Observer) -> None:
        self._observers = observers


def _tells_all(name: str) -> Callable[..., None]:
    def hook(self: Observers, *args: Any, **kwargs: Any) -> None:
        for observer in self._observers:
            notify(getattr(observer, name), *args, **kwargs)

    hook.__name__ = name
    return hook


HOOKS: Final = tuple(name for name in vars(Observer) if not name.startswith("_"))
"""The names of what an observer is told."""
for _name in HOOKS:
    setattr(Observers, _name, _tells_all(_name))


def checked(observer: Observer) -> Observer:
    """The observer, if it is one.

    Raises:
        ConfigurationError: it has not every hook.
    """
    if not isinstance(observer, Observer):
        raise ConfigurationError("an observer has every hook of penstock.Observer; derive it from NullObserver")
    return observer


def notify(hook: Callable[P, None], *args: P.args, **kwargs: P.kwargs) -> None:
    """Call an observer's hook; what it raises is logged, and harms nobody."""
    try:
        hook(*args, **kwargs)
    except Exception:
        logger.exception("the observer's %s failed", getattr(hook, "__name__", hook))


def new_error_id() -> str:
    """An id that ties what a client is shown to a line in the server's log."""
    return f"err-{secrets.token_hex(8)}"
