"""`Metrics`: an observer that counts, and renders its counts for Prometheus.

Each `Metrics` has a registry of its own. In the multi-process mode of prometheus-client several processes count into
files of a folder that they share, and each renders the sum: it is on if PROMETHEUS_MULTIPROC_DIR names the folder
*before* this module is imported. docs/operating.md says what each metric means, and what to do when it moves.
"""

from __future__ import annotations

import os
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from penstock.errors import ConfigurationError
from penstock.observer import NullObserver
from penstock.runs import RunStatus, StopReason

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.observer import Commit, Figures, StreamEnd
    from penstock.runs import Run

FOLDER: Final = "PROMETHEUS_MULTIPROC_DIR"  # the environment variable that turns the multi-process mode on
MAX_CODES: Final = 100
"""The most codes that one metric distinguishes: applications choose their codes freely, and each costs memory."""
_CODE: Final = re.compile(r"[!-~]{1,64}")
SECONDS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
ENTRIES: Final = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000)  # upper bounds of buckets


class Metrics(NullObserver):
    """An observer that counts. Raises `ConfigurationError` if PROMETHEUS_MULTIPROC_DIR does not name a folder."""

    def __init__(self) -> None:
        self._shared = FOLDER in os.environ
        if self._shared and not Path(os.environ[FOLDER] or "-").is_dir():
            raise ConfigurationError(
                f"{FOLDER} names the folder in which several processes count, and it does not exist"
            )
        self._registry = CollectorRegistry()
        to = None if self._shared else self._registry
        counter, histogram = partial(Counter, registry=to), partial(Histogram, registry=to)
        # In multi-process mode a gauge shows the sum over the processes that are alive.
        gauge = partial(Gauge, registry=to, multiprocess_mode="livesum")
        self._codes: set[str] = set()
        self._causes: set[str] = set()
        self._started = counter("penstock_runs_started", "Runs started by this server")
        self._ended = counter("penstock_runs_ended", "Runs of this server that ended", ["outcome", "stop_reason"])
        self._fenced = counter("penstock_runs_fenced", "Runs taken over by another owner")
        self._stuck = counter("penstock_runs_stuck", "Reports of producers that are still running after a cancel")
        self._lost = counter("penstock_runs_lost", "Runs of other owners that this server ended as lost")
        self._cancel = histogram(
            "penstock_cancel_seconds",
            "Time from the receipt of a cancel by the run's owner until the run's end is stored",
            buckets=SECONDS,
        )
        self._streams = counter("penstock_streams_started", "Streams whose headers were sent")
        self._streams_ended = counter("penstock_streams_ended", "Streams that are over", ["cause"])
        self._pings = counter("penstock_pings", "Pings sent")
        self._refused = counter("penstock_refused", "Requests answered with an error", ["status", "code"])
        self._entries_in = counter("penstock_entries_in", "Entries that the log has acknowledged")
        self._bytes_in = counter("penstock_bytes_in", "Their bytes")
        self._entries_out = counter("penstock_entries_out", "Entries that readers took")
        self._bytes_out = counter("penstock_bytes_out", "Their bytes")
        self._commit_entries = histogram("penstock_commit_entries", "Entries of one commit", buckets=ENTRIES)
        self._commit_seconds = histogram(
            "penstock_commit_seconds", "How long the log took to acknowledge one commit", buckets=SECONDS
        )
        self._outages = counter("penstock_log_outages", "Outages of the log")
        self._away_seconds = counter("penstock_log_away_seconds", "Total length of those outages, once over")
        self._errors = counter("penstock_errors", "Exceptions that ended a run or a response")
        self._away = gauge("penstock_log_away", "Servers that cannot reach the log, or a shard of it, now")
        self._runs = gauge("penstock_runs", "Runs that have not ended")
        self._readers = gauge("penstock_readers", "Readers")
        self._pending = gauge("penstock_pending_bytes", "Bytes that wait for the log's acknowledgement")
        self._tails = gauge("penstock_tail_bytes", "Bytes of recent entries in memory")
        # A series that is missing until its first run cannot be compared with one that is there.
        self._ended.labels(RunStatus.COMPLETED.value, StopReason.END_TURN.value)
        self._ended.labels(RunStatus.CANCELLED.value, StopReason.CANCELLED.value)
        self._ended.labels(RunStatus.LOST.value, StopReason.LOST.value)

    def render(self) -> tuple[bytes, str]:
        """Return the metrics as text, in multi-process mode those of all processes together, and their media type."""
        registry = self._registry
        if self._shared:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry), CONTENT_TYPE_LATEST

    def run_started(self, _run: Run) -> None:
        self._started.inc()

    def run_ended(self, run: Run) -> None:
        known = run.stop_reason in _REASONS  # a producer may give any other
        self._ended.labels(run.status.value, run.stop_reason if known else "other").inc()

    def run_cancelled(self, _run_id: str, seconds: float) -> None:
        self._cancel.observe(seconds)

    def run_fenced(self, _run_id: str) -> None:
        self._fenced.inc()

    def run_stuck(self, _run_id: str, _seconds: float, _stack: str) -> None:
        self._stuck.inc()

    def runs_lost(self, run_ids: Sequence[str]) -> None:
        self._lost.inc(len(run_ids))

    def stream_started(self, _run_id: str | None) -> None:
        self._streams.inc()

    def stream_ended(self, end: StreamEnd) -> None:
        self._streams_ended.labels(_bounded(end.cause, self._causes)).inc()

    def pinged(self) -> None:
        self._pings.inc()

    def refused(self, status: int, code: str) -> None:
        self._refused.labels(status, _bounded(code, self._codes)).inc()

    def committed(self, commit: Commit) -> None:
        self._entries_in.inc(commit.entries)
        self._bytes_in.inc(commit.bytes)
        self._commit_entries.observe(commit.entries)
        self._commit_seconds.observe(commit.seconds)

    def outage_began(self) -> None:
        self._outages.inc()
        self._away.set(1)

    def outage_ended(self, seconds: float) -> None:
        self._away_seconds.inc(seconds)
        self._away.set(0)

    def figures(self, figures: Figures) -> None:
        self._runs.set(figures.runs)
        self._readers.set(figures.readers)
        self._pending.set(figures.pending_bytes)
        self._tails.set(figures.tail_bytes)
        self._entries_out.inc(figures.entries_out)
        self._bytes_out.inc(figures.bytes_out)

    def on_error(self, _error: BaseException, *, error_id: str, where: str) -> None:  # noqa: ARG002
        self._errors.inc()


_REASONS: Final = frozenset(StopReason)


def _bounded(code: str, codes: set[str]) -> str:
    """Return `code` if it is one of the first `MAX_CODES` codes; `codes` holds those."""
    if len(codes) < MAX_CODES and _CODE.fullmatch(code):
        codes.add(code)
    return code if code in codes else "OTHER"


def forget(pid: int, folder: str) -> None:
    """Drop the gauges of a process that has ended and shared `folder`; its counts stay."""
    mark_process_dead(pid, folder)  # type: ignore[no-untyped-call]
