"""Calls of penstock's HTTP API, and the start of the load generator, for the questions."""

from __future__ import annotations

import json
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final

import httpx2

from benchmarks.processes import BenchmarkError, Job, job, job_started, module

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.processes import Server

WAIT: Final = 120.0
"""Seconds until a run must have ended."""
ENOUGH: Final = 0.5
"""The shortest time, in seconds, for which a rate is measured."""
LOOK: Final = 0.02
"""Seconds between two requests for a run's status."""


def started_run(server: Server, producer: str, **given: Any) -> str:
    """Start a run and return its id."""
    answer = httpx2.post(f"{server.url}/v1/runs", json={"producer": producer, "input": given}, timeout=WAIT)
    answer.raise_for_status()
    return str(answer.json()["id"])


def stream_of(server: Server, run_id: str) -> str:
    """The URL of a run's stream."""
    return f"{server.url}/v1/runs/{run_id}/stream"


def stored_run(server: Server, producer: str, **given: Any) -> str:
    """Start a run, wait for its end and return its id.

    Raises:
        BenchmarkError: it did not complete.
    """
    run_id = started_run(server, producer, **given)
    until, status = time.monotonic() + WAIT, "running"
    while status == "running" and time.monotonic() < until:
        time.sleep(LOOK)
        status = httpx2.get(f"{server.url}/v1/runs/{run_id}", timeout=WAIT).raise_for_status().json()["status"]
    if status != "completed":
        raise BenchmarkError(f"run {run_id} is {status}, not completed")
    return run_id


def read(urls: Sequence[str] | str, *, readers: int = 1, **given: Any) -> dict[str, float]:
    """Run the load generator; `load.py` lists the options and the figures."""
    urls = [urls] if isinstance(urls, str) else urls
    return job(module("load", urls=urls, readers=readers, **given))


def reading(urls: Sequence[str] | str, *, readers: int = 1, **given: Any) -> Job:
    """Start the load generator and return when all of its readers are connected."""
    urls = [urls] if isinstance(urls, str) else urls
    load = job_started(module("load", urls=urls, readers=readers, **given))
    load.wait_for("ready")
    return load


def starting(producer: str, **given: Any) -> dict[str, Any]:
    """The request to `/v1/runs` that starts a run and is answered with its stream."""
    return {
        "method": "POST",
        "headers": {"Content-Type": "application/json"},
        "body": json.dumps({"producer": producer, "input": given, "stream": True}),
    }


@contextmanager
def held(urls: Sequence[str] | str, *, readers: int, **given: Any) -> Iterator[None]:
    """Hold connections open while the block lasts.

    Raises:
        BenchmarkError: a connection was lost before the end of the block.
    """
    load, left = reading(urls, readers=readers, hold=True, **given), 0.0
    try:
        yield
    finally:
        left = load.result()["reading"]
    if left < readers:
        raise BenchmarkError(f"{readers - left:g} of {readers} connections to {urls} were lost")


def rate(server: Server, url: str, *, events: int, **given: Any) -> dict[str, float]:
    """Read a stream to its end at full speed, repeatedly until that has taken `ENOUGH`.

    Raises:
        BenchmarkError: an event is missing.
    """
    before, total, seconds, busy = server.cpu(), 0.0, 0.0, 0.0
    while seconds < ENOUGH:
        seen = read(url, **given)
        if seen["events"] < events:
            raise BenchmarkError(f"{url}: {seen['events']} events of {events}")
        total, seconds, busy = total + seen["events"], seconds + seen["seconds"], max(busy, seen["busy"])
    return {
        "events/s": total / seconds,
        "µs CPU/event": (server.cpu() - before) / total * 1e6,
        "generator busy": busy,
    }
