"""Observers: what they are told, and that none of them can do harm."""

from __future__ import annotations

import logging
import re
from typing import Any

import pytest

from penstock.notes import LoggingObserver
from penstock.observer import Observer, new_error_id, tell
from penstock.runs import Ending, Run, RunStatus

RUN = Run("r-1", "agent")


def test_a_hook_is_called_with_what_it_is_told() -> None:
    told: list[Any] = []

    def hook(*args: Any, **kwargs: Any) -> None:
        told.append((args, kwargs))

    tell(hook, 1, two=2)
    assert told == [((1,), {"two": 2})]


def test_what_a_hook_raises_is_logged_and_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    def clumsy(_: str) -> None:
        raise ValueError("oops")

    tell(clumsy, "x")
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == ("penstock", "ERROR", "the observer's clumsy failed")
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "oops"


def test_a_hook_without_a_name_may_fail_as_well(caplog: pytest.LogCaptureFixture) -> None:
    class Nameless:
        def __call__(self) -> None:
            raise ValueError("oops")

        def __repr__(self) -> str:
            return "<nameless>"

    tell(Nameless())
    assert caplog.messages == ["the observer's <nameless> failed"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_is_not_held_back(error: type[BaseException]) -> None:
    def stop() -> None:
        raise error

    with pytest.raises(error):
        tell(stop)


def test_the_logging_observer_writes_a_line_for_everything(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG, logger="penstock")
    observer: Observer = LoggingObserver()
    error = ValueError("broke")
    observer.run_started(RUN)
    observer.run_ended(RUN.ended(Ending(RunStatus.FAILED, "timeout"), seq=9, at=1.0))
    observer.run_fenced("r-1")
    observer.run_stuck("r-1", 10.4, "  File x, line 1")
    observer.on_error(error, error_id="err-7", where="run r-1")
    observer.warning("cannot commit: 100 % gone")
    assert [(record.levelname, record.getMessage()) for record in caplog.records] == [
        ("DEBUG", "run r-1 started: agent"),
        ("INFO", "run r-1 ended failed (timeout) after 9 entries, 1.000 s"),
        ("WARNING", "run r-1 was taken over by another owner"),
        ("WARNING", "run r-1 was cancelled 10 s ago and has not let go; it stands here:\n  File x, line 1"),
        ("ERROR", "run r-1: broke [err-7]"),
        ("WARNING", "cannot commit: 100 % gone"),
    ]
    assert {record.name for record in caplog.records} == {"penstock"}
    assert caplog.records[4].exc_info == (ValueError, error, None)


def test_error_ids_are_short_and_no_two_are_alike() -> None:
    made = {new_error_id() for _ in range(1000)}
    assert len(made) == 1000
    assert all(re.fullmatch(r"err-[0-9a-f]{16}", error_id) for error_id in made)
