"""A run's record and a run's life: values, and a table."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from penstock.runs import CAUSES, Cause, Ending, Run, RunError, RunStatus, StopReason, check_run_id, new_run_id

TERMINAL = [status for status in RunStatus if status.terminal]


@pytest.mark.parametrize("status", TERMINAL)
def test_a_terminal_status_is_final(status: RunStatus) -> None:
    run = Run("r", "p").ended(Ending(status, "x"), seq=3, at=1.0)
    with pytest.raises(ValueError, match=f"'r' is {status} and cannot become failed"):
        run.ended(Ending(RunStatus.FAILED, "y"), seq=4, at=2.0)


def test_every_cause_ends_a_run() -> None:
    assert set(CAUSES) == set(Cause)
    assert all(row.status.terminal for row in CAUSES.values())


def test_a_run_cannot_end_running() -> None:
    with pytest.raises(ValueError, match="cannot end running"):
        Ending(RunStatus.RUNNING, StopReason.END_TURN)


@pytest.mark.parametrize("status", TERMINAL)
def test_an_ending_is_copied_into_the_record(status: RunStatus) -> None:
    error = RunError("CODE", "words", "err-1")
    run = Run("r", "p", created_at=1.0, started_at=2.0, metadata={"a": 1})
    ended = run.ended(Ending(status, "why", error, "cancelled because"), seq=7, at=9.5)
    assert ended == Run("r", "p", status, "why", "cancelled because", error, 7, 1.0, 2.0, 9.5, {"a": 1})
    assert (run.outcome, ended.outcome) == (None, status)


def test_the_reason_of_a_cancel_stays_unless_the_ending_has_another() -> None:
    run = Run("r", "p", cancel_reason="first")
    assert run.ended(Ending(RunStatus.FAILED, "error"), seq=1, at=0.0).cancel_reason == "first"
    assert run.ended(Ending(RunStatus.FAILED, "error", None, ""), seq=1, at=0.0).cancel_reason == ""


def test_a_running_record_in_json_has_every_member() -> None:
    run = Run("r", "p", created_at=1.5, started_at=2.5, metadata={"user": {"id": 7}})
    assert json.loads(json.dumps(run.to_json())) == {
        "id": "r",
        "producer": "p",
        "status": "running",
        "stop_reason": None,
        "cancel_reason": None,
        "error": None,
        "seq": 0,
        "created_at": 1.5,
        "started_at": 2.5,
        "ended_at": None,
        "metadata": {"user": {"id": 7}},
    }


def test_an_ended_record_in_json_says_how_it_ended() -> None:
    ending = Ending(RunStatus.FAILED, StopReason.TIMEOUT, RunError("TIMEOUT", "too long", "err-2"), "stop")
    shown = json.loads(json.dumps(Run("r", "p").ended(ending, seq=12, at=99.0).to_json()))
    assert shown["status"] == "failed"
    assert shown["stop_reason"] == "timeout"
    assert shown["cancel_reason"] == "stop"
    assert shown["error"] == {"code": "TIMEOUT", "message": "too long", "error_id": "err-2"}
    assert (shown["seq"], shown["ended_at"]) == (12, 99.0)


def test_the_metadata_shown_is_a_copy() -> None:
    metadata = {"a": 1}
    Run("r", "p", metadata=metadata).to_json()["metadata"]["a"] = 2
    assert metadata == {"a": 1}


@pytest.mark.parametrize("run_id", ["a", "-", "run:1.2_3-X", "a" * 128])
def test_a_run_id_is_returned_as_it_is(run_id: str) -> None:
    assert check_run_id(run_id) is run_id


@pytest.mark.parametrize(
    "run_id", ["", ".", "..", "a" * 129, "a\n", "\na", "a b", "a/b", "ä", "٣", "a\0", "a{b}", None, 7, b"a"]
)
def test_what_is_no_run_id_is_refused(run_id: Any) -> None:
    with pytest.raises(ValueError, match="1 to 128 letters"):
        check_run_id(run_id)


def test_a_refusal_does_not_repeat_a_huge_id() -> None:
    with pytest.raises(ValueError, match="a run id is") as caught:
        check_run_id("x" * 1_000_000)
    assert len(str(caught.value)) < 300


def test_made_run_ids_sort_by_the_time_of_their_making(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    for milliseconds in (0, 9, 10, 15, 16, 255, 256, 1_000_000, 0x0FFFFFFFFF, 0x1000000000, 1_800_000_000_000, 2**47):
        monkeypatch.setattr(time, "time", lambda now=milliseconds / 1000: now)
        made.append(new_run_id())
    assert made == sorted(made)


def test_a_made_run_id_is_one_and_no_two_are_alike() -> None:
    made = {check_run_id(new_run_id()) for _ in range(10_000)}
    assert len(made) == 10_000
    assert {len(run_id) for run_id in made} == {len("run-") + 12 + 1 + 24}
