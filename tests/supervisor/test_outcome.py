"""How a run ends, as a table: recorded facts in, last entries and the record's ending out."""

from __future__ import annotations

import json
from itertools import product

import pytest

from penstock.errors import InvalidChunk, LogUnavailable, PublicError, RunCancelled, RunEnded
from penstock.runs import Cause, Ending, RunError, RunStatus
from penstock.sse.dialects import DIALECTS, DONE, Dialect
from penstock.supervisor.outcome import RunFacts, decide

PLAIN = DIALECTS["plain"]
LETTA = DIALECTS["letta"]

both = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)


def shown(code: str, message: str) -> RunError:
    return RunError(code, message, "err-1")


def end(facts: RunFacts, dialect: Dialect = PLAIN, *, expose_errors: bool = False) -> tuple[list[bytes], Ending]:
    return decide(facts, dialect, error_id="err-1", expose_errors=expose_errors)


BY_CAUSE = {
    Cause.RETURNED: Ending(RunStatus.COMPLETED, "end_turn"),
    Cause.STOPPED: Ending(RunStatus.FAILED, "error"),
    Cause.RAISED: Ending(RunStatus.FAILED, "error", shown("ERROR", "the run failed")),
    Cause.CANCEL: Ending(RunStatus.CANCELLED, "cancelled", None, "words"),
    Cause.TIMEOUT: Ending(RunStatus.FAILED, "timeout", shown("TIMEOUT", "the run took longer than its timeout")),
    Cause.SILENT: Ending(RunStatus.FAILED, "silent", shown("SILENT", "the run was silent for too long")),
    Cause.SHUTDOWN: Ending(RunStatus.FAILED, "interrupted", shown("INTERRUPTED", "the server was shut down")),
    Cause.FENCED: Ending(RunStatus.LOST, "lost"),
    Cause.DIVERGED: Ending(RunStatus.FAILED, "error", shown("LOG_DIVERGED", "the log lost a part of this run")),
    Cause.UNAVAILABLE: Ending(RunStatus.LOST, "lost"),
    Cause.ABANDONED: Ending(RunStatus.LOST, "lost", shown("RUN_LOST", "the process that ran it is gone")),
}


@both
@pytest.mark.parametrize("cause", Cause)
def test_every_cause_ends_a_run_by_its_row(cause: Cause, dialect: Dialect) -> None:
    blocks, ending = end(RunFacts(cause=cause, reason="words"), dialect)
    assert ending == BY_CAUSE[cause]
    if ending.status is RunStatus.CANCELLED:
        assert blocks == [dialect.cancelled("the run was cancelled", "words"), DONE]
    elif ending.error is None:
        assert blocks == [DONE]
    else:
        assert blocks == [dialect.error(ending.error), DONE]


FACTS = [
    RunFacts(error, cause, words, said, reported, untold)
    for error, cause, words, said, reported, untold in product(
        [None, ValueError("x"), RunCancelled("r", "why"), ExceptionGroup("g", [ValueError(), RunCancelled()])],
        [None, *Cause],
        [None, "words"],
        [None, "end_turn", "cancelled", "odd"],
        [None, ("CODE", "words")],
        [False, True],
    )
]


@both
def test_the_last_block_is_always_done_and_the_only_one(dialect: Dialect) -> None:
    for facts in FACTS:
        blocks, _ = end(facts, dialect)
        assert blocks[-1] == DONE, facts
        assert blocks.count(DONE) == 1, facts
        assert len(blocks) <= 2, facts


def test_a_run_has_an_error_on_record_exactly_if_it_failed_or_was_lost_with_something_to_say() -> None:
    for facts in FACTS:
        _, ending = end(facts)
        if ending.status in {RunStatus.COMPLETED, RunStatus.CANCELLED}:
            assert ending.error is None, facts
        elif ending.error is not None:
            assert ending.error.error_id == "err-1", facts


@pytest.mark.parametrize(
    "said, status",
    [
        (None, RunStatus.COMPLETED),
        ("end_turn", RunStatus.COMPLETED),
        ("max_steps", RunStatus.COMPLETED),
        ("tool_rule", RunStatus.COMPLETED),
        ("requires_approval", RunStatus.COMPLETED),
        ("cancelled", RunStatus.CANCELLED),
        ("error", RunStatus.FAILED),
        ("insufficient_credits", RunStatus.FAILED),
        ("END_TURN", RunStatus.FAILED),
    ],
)
def test_what_a_producer_says_of_why_it_stopped_decides(said: str | None, status: RunStatus) -> None:
    blocks, ending = end(RunFacts(stop_reason=said))
    error = shown("STOPPED", f"the producer stopped: {said}") if status is RunStatus.FAILED else None
    assert (blocks, ending) == ([DONE], Ending(status, said or "end_turn", error))


def test_an_exception_comes_before_everything_and_keeps_the_words_of_the_cause() -> None:
    everything = RunFacts(ValueError("secret"), Cause.CANCEL, "stop", "end_turn", ("CODE", "words"), not_stored=True)
    error = shown("ERROR", "the run failed")
    assert end(everything) == ([PLAIN.error(error), DONE], Ending(RunStatus.FAILED, "error", error, "stop"))


def test_a_cause_without_words_is_kept_beside_an_exception_by_what_the_producer_was_told() -> None:
    assert end(RunFacts(ValueError(), Cause.TIMEOUT))[1].cancel_reason == "run timed out"
    assert end(RunFacts(ValueError()))[1].cancel_reason is None


def test_a_cause_comes_before_what_the_producer_raised_on_being_cancelled_said_or_reported() -> None:
    facts = RunFacts(
        RunCancelled("r", "its words"), Cause.TIMEOUT, None, "end_turn", ("CODE", "words"), not_stored=True
    )
    assert end(facts)[1] == BY_CAUSE[Cause.TIMEOUT]


def test_run_cancelled_comes_before_what_the_producer_said_or_reported() -> None:
    blocks, ending = end(RunFacts(RunCancelled("r", "why"), None, None, "end_turn", ("CODE", "words")))
    assert blocks == [PLAIN.cancelled("the run was cancelled", "why"), DONE]
    assert ending == Ending(RunStatus.CANCELLED, "cancelled", None, "why")


def test_a_reported_error_comes_before_what_the_producer_said() -> None:
    error = shown("CODE", "words")
    ending = Ending(RunStatus.FAILED, "error", error)
    assert end(RunFacts(stop_reason="end_turn", yielded_error=("CODE", "words"))) == ([DONE], ending)
    assert end(RunFacts(yielded_error=("CODE", "words"), not_stored=True)) == ([PLAIN.error(error), DONE], ending)


@pytest.mark.parametrize(
    "error, status",
    [
        (RunCancelled("r", "why"), RunStatus.CANCELLED),
        (ExceptionGroup("g", [RunCancelled("r", "why")]), RunStatus.CANCELLED),
        (ExceptionGroup("g", [ExceptionGroup("h", [RunCancelled("r", "why")])]), RunStatus.CANCELLED),
        (ExceptionGroup("g", [RunCancelled("r", "why"), RunCancelled("r", "other")]), RunStatus.CANCELLED),
        (ExceptionGroup("g", [RunCancelled("r", "why"), ValueError()]), RunStatus.FAILED),
        (ExceptionGroup("g", [ValueError(), ValueError()]), RunStatus.FAILED),
    ],
)
def test_a_group_of_run_cancelled_alone_is_one(error: Exception, status: RunStatus) -> None:
    ending = end(RunFacts(error))[1]
    assert ending.status is status
    assert ending.cancel_reason == ("why" if status is RunStatus.CANCELLED else None)


@pytest.mark.parametrize(
    "error, hidden, exposed",
    [
        (ValueError("secret"), ("ERROR", "the run failed"), ("ERROR", "secret")),
        (ExceptionGroup("g", [ValueError("secret")]), ("ERROR", "the run failed"), ("ERROR", "secret")),
        (PublicError("said aloud"), ("ERROR", "said aloud"), ("ERROR", "said aloud")),
        (PublicError("said aloud", "QUOTA"), ("QUOTA", "said aloud"), ("QUOTA", "said aloud")),
        (ExceptionGroup("g", [PublicError("p", "C")]), ("C", "p"), ("C", "p")),
        (LogUnavailable("down"), ("LOG_UNAVAILABLE", "the run failed"), ("LOG_UNAVAILABLE", "down")),
        (InvalidChunk("bad"), ("INVALID_CHUNK", "the run failed"), ("INVALID_CHUNK", "bad")),
        (
            RunEnded("r"),
            ("RUN_ENDED", "the run failed"),
            ("RUN_ENDED", "run 'r' has ended; nothing can be added to it"),
        ),
    ],
)
def test_clients_see_the_words_of_an_exception_only_if_it_is_public_or_errors_are_exposed(
    error: Exception, hidden: tuple[str, str], exposed: tuple[str, str]
) -> None:
    assert end(RunFacts(error))[1].error == shown(*hidden)
    assert end(RunFacts(error), expose_errors=True)[1].error == shown(*exposed)


class Wordless(Exception):
    def __str__(self) -> str:
        raise RuntimeError("has no words")


@both
@pytest.mark.parametrize("expose_errors", [False, True])
@pytest.mark.parametrize(
    "error",
    [
        ValueError("half \ud800 a pair"),
        PublicError("half \ud800 a pair", "C\ud800"),
        PublicError(ValueError("not a str"), 7),  # type: ignore[arg-type]
        RunCancelled("r", "half \ud800 a pair"),
        RunCancelled("r", 7),  # type: ignore[arg-type]
        Wordless(),
        RunCancelled("\ud800"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_d26_whatever_an_exception_holds_the_run_ends_with_entries_that_can_be_stored(
    error: Exception, dialect: Dialect, expose_errors: bool
) -> None:
    blocks, ending = end(RunFacts(error), dialect, expose_errors=expose_errors)
    assert b"".join(blocks).decode().endswith("data: [DONE]\n\n")
    json.dumps([ending.cancel_reason, ending.error and ending.error.to_json()], ensure_ascii=False).encode()


def test_letta_spells_a_cancelled_run_as_a_stop_reason() -> None:
    blocks, _ = end(RunFacts(cause=Cause.CANCEL, reason="w"), LETTA)
    assert blocks == [b'data: {"message_type":"stop_reason","stop_reason":"cancelled"}\n\n', DONE]
