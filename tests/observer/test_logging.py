"""What is written to the log: a sentence and its parts for each thing, as text and as JSON, and no line but its own."""

from __future__ import annotations

import json
import logging
import re
from datetime import datetime
from signal import SIGTERM
from typing import TYPE_CHECKING, Any, Final

import httpx2
import pytest

from penstock.errors import PublicError
from penstock.observer import Commit, Figures, Observer, StreamEnd
from penstock.observer.logging import LoggingObserver
from penstock.runs import Ending, Run, RunError, RunStatus
from tests.support.command_line import penstock
from tests.support.wire import blocks_of
from tests.support.workers import has_stopped, serving_workers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.command_line import Program
    from tests.support.redis_servers import Endpoint

RUN: Final = Run("r-1", "agent", started_at=2.0)
DONE: Final = RUN.ended(Ending(RunStatus.COMPLETED, "end_turn"), seq=9, at=3.25)
CANCELLED: Final = RUN.ended(Ending(RunStatus.CANCELLED, "cancelled", cancel_reason="not\nneeded"), seq=2, at=3.0)
FAILED: Final = RUN.ended(Ending(RunStatus.FAILED, "timeout", RunError("TIMEOUT", "too long", "err-1")), seq=9, at=3.0)
FORGED: Final = "2001-01-01 00:00:00,000 INFO forged"
BREAKS: Final = ["\n", "\r", "\r\n", "\v", "\f", "\x1c", "\x1d", "\x1e", "\x85", "\u2028", "\u2029"]
"""All that some program takes for the end of a line."""
UNPRINTABLE: Final = ["\x00", "\x08", "\x1b[2K\x1b[1A", "\x7f", "\x9b", "\u202e"]
HOSTILE: Final = "".join(f"{each}{FORGED}" for each in [*BREAKS, *UNPRINTABLE])


def tell_stream(end: StreamEnd) -> Callable[[Observer], None]:
    return lambda observer: observer.stream_ended(end)


LINES: Final[list[tuple[Callable[[Observer], None], str, str, dict[str, Any]]]] = [
    (
        lambda observer: observer.run_started(RUN),
        "DEBUG",
        "run r-1 started: agent",
        {"event": "run_started", "run_id": "r-1", "producer": "agent"},
    ),
    (
        lambda observer: observer.run_ended(DONE),
        "INFO",
        "run r-1 ended completed (end_turn) after 9 entries, 1.250 s",
        {
            "event": "run_ended",
            "run_id": "r-1",
            "producer": "agent",
            "status": "completed",
            "cause": "end_turn",
            "cancel_reason": None,
            "error_code": None,
            "error_id": None,
            "entries": 9,
            "seconds": 1.25,
        },
    ),
    (
        lambda observer: observer.run_ended(CANCELLED),
        "INFO",
        r"run r-1 ended cancelled (cancelled, 'not\nneeded') after 2 entries, 1.000 s",
        {"event": "run_ended", "status": "cancelled", "cause": "cancelled", "cancel_reason": "not\nneeded"},
    ),
    (
        lambda observer: observer.run_ended(FAILED),
        "INFO",
        "run r-1 ended failed (timeout, TIMEOUT [err-1]) after 9 entries, 1.000 s",
        {"event": "run_ended", "status": "failed", "cause": "timeout", "error_code": "TIMEOUT", "error_id": "err-1"},
    ),
    (
        lambda observer: observer.run_fenced("r-1"),
        "WARNING",
        "run r-1 was taken over by another owner",
        {"event": "run_fenced", "run_id": "r-1"},
    ),
    (
        lambda observer: observer.run_stuck("r-1", 10.4, "  File x, line 1"),
        "WARNING",
        "run r-1 was cancelled 10 s ago and is still running, here:\n  File x, line 1",
        {"event": "run_stuck", "run_id": "r-1", "seconds": 10.4},
    ),
    (
        lambda observer: observer.runs_lost(["r-1"]),
        "WARNING",
        "run r-1 ended lost: its owner's lease had expired",
        {"event": "run_lost", "run_id": "r-1", "cause": "lost"},
    ),
    (
        tell_stream(StreamEnd("ended", "r-1", 9, 4, 99, 0.5)),
        "INFO",
        "a stream of run r-1 ended: ended; 4 entries up to 9, 99 bytes, 0.500 s",
        {
            "event": "stream_ended",
            "run_id": "r-1",
            "cause": "ended",
            "cursor": 9,
            "entries": 4,
            "bytes": 99,
            "seconds": 0.5,
        },
    ),
    (
        tell_stream(StreamEnd("MADE\nUP", None, None, None, 99, 0.5)),
        "DEBUG",
        r"a response's stream ended: MADE\nUP; 99 bytes, 0.500 s",
        {"event": "stream_ended", "run_id": None, "cause": "MADE\nUP", "cursor": None, "entries": None, "bytes": 99},
    ),
    (
        lambda observer: observer.refused(404, "RUN_NOT_FOUND"),
        "DEBUG",
        "a request was refused: 404 RUN_NOT_FOUND",
        {"event": "refused", "status": 404, "cause": "RUN_NOT_FOUND"},
    ),
    (lambda observer: observer.outage_began(), "WARNING", "the event log cannot be reached", {"event": "outage_began"}),
    (
        lambda observer: observer.outage_ended(2.5),
        "WARNING",
        "the event log can be reached again, after 2.5 s",
        {"event": "outage_ended", "seconds": 2.5},
    ),
    (
        lambda observer: observer.on_error(ValueError("broke"), error_id="err-7", where="run r-1"),
        "ERROR",
        "run r-1: broke [err-7]",
        {"event": "error", "where": "run r-1", "error_id": "err-7", "cause": "ValueError"},
    ),
    (
        lambda observer: observer.on_error(PublicError("no\nmore", "QUOTA"), error_id="err-7", where="GET /\n"),
        "WARNING",
        r"GET /\n: QUOTA: no\nmore [err-7]",
        {"event": "error", "where": "GET /\n", "error_id": "err-7", "cause": "QUOTA"},
    ),
    (
        lambda observer: observer.warning("cannot commit: 100 % gone"),
        "WARNING",
        "cannot commit: 100 % gone",
        {"event": "warning"},
    ),
]


@pytest.mark.parametrize("tell, level, words, parts", LINES, ids=[parts["event"] for *_, parts in LINES])
def test_each_thing_is_a_sentence_with_its_parts(
    caplog: pytest.LogCaptureFixture, tell: Callable[[Observer], None], level: str, words: str, parts: dict[str, Any]
) -> None:
    caplog.set_level(logging.DEBUG, logger="penstock")
    tell(LoggingObserver())
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == ("penstock", level, words)
    assert {name: record.__dict__.get(name) for name in parts} == parts
    assert bool(record.exc_info) == (level == "ERROR")


def test_what_happens_all_the_time_is_not_written_down(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="penstock")
    observer: Observer = LoggingObserver()
    observer.pinged()
    observer.stream_started("r-1")
    observer.run_cancelled("r-1", 1.0)
    observer.committed(Commit(1, 2, 3, 4.0))
    observer.figures(Figures(1, 2, 3, 4, 5, 6))
    observer.runs_lost([])
    assert not caplog.records


def test_of_several_lost_runs_each_has_a_line(caplog: pytest.LogCaptureFixture) -> None:
    LoggingObserver().runs_lost(["r-1", "r-2"])
    assert [record.__dict__["run_id"] for record in caplog.records] == ["r-1", "r-2"]


@pytest.mark.parametrize("break_", [*BREAKS, *UNPRINTABLE], ids=ascii)
def test_words_of_others_are_shown_without_anything_unprintable(caplog: pytest.LogCaptureFixture, break_: str) -> None:
    caplog.set_level(logging.DEBUG, logger="penstock")
    hostile = f"before{break_}{FORGED}"
    observer: Observer = LoggingObserver()
    observer.run_started(Run("r-1", hostile))
    observer.run_ended(RUN.ended(Ending(RunStatus.CANCELLED, hostile, cancel_reason=hostile), seq=2, at=3.0))
    error = RunError(hostile, hostile, "err-1")
    observer.run_ended(RUN.ended(Ending(RunStatus.FAILED, hostile, error), seq=2, at=3.0))
    observer.stream_ended(StreamEnd(hostile, None, None, None, 9, 0.5))
    observer.refused(400, hostile)
    observer.on_error(PublicError(hostile, hostile), error_id="err-7", where=hostile)
    observer.warning(hostile)
    assert [message.isprintable() for message in caplog.messages] == [True] * 7


def test_an_errors_words_are_shown_without_anything_unprintable(caplog: pytest.LogCaptureFixture) -> None:
    LoggingObserver().on_error(ValueError(HOSTILE), error_id="err-7", where="run r-1")
    (message,) = caplog.messages
    assert message.isprintable()
    assert message.startswith("run r-1: ")


class MuteError(ValueError):
    """An exception that cannot say what it is."""

    def __str__(self) -> str:
        raise RuntimeError("no words")


def test_an_error_that_cannot_say_what_it_is_has_its_line_all_the_same(caplog: pytest.LogCaptureFixture) -> None:
    LoggingObserver().on_error(MuteError(), error_id="err-7", where="run r-1")
    (record,) = caplog.records
    assert record.getMessage().startswith("run r-1: ")
    assert record.getMessage().endswith(" [err-7]")


# A real server


PROGRAM: Final = """
import trio
from penstock import Event, PublicError

async def says(words):
    yield Event(data="one")
    yield Event.stop(words)

async def fails(words):
    yield Event(data="one")
    raise ValueError(words)

async def complains(words):
    yield Event(data="one")
    raise PublicError(words, words)

async def waits(words):
    yield Event(data="one")
    await trio.sleep_forever()

producers = {"says": says, "fails": fails, "complains": complains, "waits": waits}
"""


async def served(tmp_path: Path, form: str, words: str, *producers: str) -> tuple[Program, dict[str, str]]:
    """A server's words, in which these have run and said `words`; and the runs, by producer."""
    (tmp_path / "hostile.py").write_text(PROGRAM)
    args = ("serve", "--producers", "./hostile.py:producers", "--bind", "127.0.0.1:0")
    runs = {}
    async with (
        penstock(*args, "--log-format", form, "--log-level", "debug", cwd=tmp_path) as program,
        httpx2.AsyncClient() as client,
    ):
        client.base_url = httpx2.URL((await program.until(r"serving on (\S+)"))[1])
        for producer in producers:
            answer = await client.post("/v1/runs", json={"producer": producer, "input": words})
            runs[producer] = run_id = answer.json()["id"]
            if producer == "waits":
                await client.post(f"/v1/runs/{run_id}/cancel", json={"reason": words})
            stream = await client.get(f"/v1/runs/{run_id}/stream")
            assert blocks_of(stream.text)[-1].data == "[DONE]"
        for path in ("/v1/runs/nowhere", "/%0a%1b%5b2K%E2%80%A8" + FORGED, "/v1/runs/%0a/stream"):
            assert (await client.get(path)).is_client_error
        program.process.send_signal(SIGTERM)
        assert await program.end() == 0
    return program, runs


async def test_as_text_neither_a_request_nor_an_error_makes_a_line_of_its_own(tmp_path: Path) -> None:
    program, runs = await served(tmp_path, "text", HOSTILE, "says", "fails", "complains", "waits")
    assert sum(f"run {run_id} ended" in line for line in program.lines for run_id in runs.values()) == 2 * len(runs)
    (at,) = [number for number, line in enumerate(program.lines) if f"ERROR run {runs['fails']}: " in line]
    assert program.lines[at + 1].strip() == "Traceback (most recent call last):"
    for line in program.lines:
        assert line.isprintable(), line
        assert re.match(r"  |penstock: |\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} (DEBUG|INFO|WARNING|ERROR) ", line), line
        assert not line.startswith("2001"), line


async def test_as_json_every_line_of_the_log_is_one_object_with_its_parts(tmp_path: Path) -> None:
    program, runs = await served(tmp_path, "json", HOSTILE, "says", "fails", "complains", "waits")
    notes = []
    for line in program.lines:
        assert line.isprintable(), line
        if not line.startswith("penstock: "):
            notes.append(json.loads(line))
    for note in notes:
        assert note.keys() >= {"time", "level", "logger", "message", "event"}, note
        assert datetime.fromisoformat(note["time"]).tzinfo is not None
        assert note["logger"] == "penstock"
        assert "worker" not in note
    ended = {note["run_id"]: note for note in notes if note["event"] == "run_ended"}
    assert [ended[runs[each]]["status"] for each in runs] == ["failed", "failed", "failed", "cancelled"]
    assert ended[runs["says"]]["cause"] == ended[runs["waits"]]["cancel_reason"] == HOSTILE
    assert ended[runs["complains"]]["error_code"] == HOSTILE
    streams = [note for note in notes if note["event"] == "stream_ended"]
    assert [(note["run_id"], note["cause"], note["cursor"]) for note in streams] == [
        (runs[each], "ended", ended[runs[each]]["entries"]) for each in runs
    ]
    (error,) = [note for note in notes if note["level"] == "ERROR"]
    assert (error["cause"], error["where"]) == ("ValueError", f"run {runs['fails']}")
    assert error["error_id"] == ended[runs["fails"]]["error_id"]
    assert error["exc_info"].startswith("Traceback (most recent call last):\n")
    assert HOSTILE in error["exc_info"]
    assert [note["cause"] for note in notes if note["event"] == "refused"][:1] == ["RUN_NOT_FOUND"]
    assert len({note["event"] for note in notes}) == 5


@pytest.mark.parametrize("form", ["text", "json"])
async def test_a_workers_lines_say_which_it_is(server: Endpoint, form: str) -> None:
    options = ("--log-format", form, "--log-level", "debug")
    async with serving_workers(2, server.url, *options, "--drain-timeout", 0) as workers:
        runs = {number: await workers.start_at(pid, "silent") for number, pid in workers.pids().items()}
        workers.signal(SIGTERM)
        await has_stopped(workers)
    lines = workers.said.splitlines()
    for number, run_id in runs.items():
        (line,) = [line for line in lines if f"run {run_id} ended failed" in line and "a stream of" not in line]
        if form == "json":
            note = json.loads(line)
            assert (note["worker"], note["run_id"], note["cause"]) == (number, run_id, "interrupted")
        else:
            assert re.match(rf"[-\d]+ [:,\d]+ INFO worker {number}: run {run_id} ended ", line)
    for line in lines:
        if not line.startswith("penstock: "):
            assert json.loads(line)["worker"] in {1, 2} if form == "json" else re.search(" worker [12]: ", line), line
