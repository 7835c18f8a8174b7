"""What ends a run, cause by cause: what the producer sees, what is stored, what the record says, what live readers get.

One table for what happens within one supervisor. Every row runs in both dialects, with a reader in the supervisor that
owns the run and one in another supervisor on the same log. What needs two owners, or a log that misbehaves, is in
`test_causes_between_owners.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.errors import PublicError, RunCancelled
from penstock.log.memory import MemoryLog
from penstock.sse import Event
from tests.support.producers import (
    cleanup_raises,
    hangs_after_done,
    hangs_after_what_is_no_chunk,
    makes_an_error_of_it,
    raises,
    raises_in_a_nursery_while_cancelled,
    refuses_to_close,
    swallows_and_goes_on,
    swallows_and_returns,
    waits,
    yields,
)
from tests.support.supervising import Notes, Witness, ended, entries_of, gists, near, readers, two_supervisors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from trio.testing import MockClock

    from penstock.supervisor import Supervisor

LIMIT = 200
"""`max_event_bytes` in this file."""

# What happens to the run after its first event


async def cancel(supervisor: Supervisor, run_id: str) -> None:
    await supervisor.cancel(run_id, "stop pressed")


async def cancel_without_words(supervisor: Supervisor, run_id: str) -> None:
    await supervisor.cancel(run_id)


async def interrupt(supervisor: Supervisor, run_id: str) -> None:
    await supervisor.drain(3)


@dataclass(frozen=True)
class Row:
    name: str
    producer: Callable[[Witness], Any]
    then: Callable[[Supervisor, str], Any] | None = None
    saw: str | None = None
    entries: tuple[str, ...] = ("first", "[DONE]")
    status: str = "completed"
    stop_reason: str = "end_turn"
    code: str | None = None
    message: str | None = None
    cancel_reason: str | None = None
    after: float = 0.0
    """Seconds from the first event to the end."""
    reported: int = 0
    """The exceptions that the observer is told of."""
    limits: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


def failed(name: str, producer: Callable[[Witness], Any], code: str, *, message: str | None = None, **more: Any) -> Row:
    usual: dict[str, Any] = {"entries": ("first", f"error {code}", "[DONE]"), "stop_reason": "error", "reported": 1}
    return Row(name, producer, status="failed", code=code, message=message, **usual | more)


def cancelled(name: str, producer: Callable[[Witness], Any], **more: Any) -> Row:
    usual: dict[str, Any] = {"saw": "run cancelled: stop pressed", "then": cancel, "cancel_reason": "stop pressed"}
    entries = ("first", "cancelled", "[DONE]")
    return Row(name, producer, entries=entries, status="cancelled", stop_reason="cancelled", **usual | more)


ROWS = [
    # It ends by itself
    Row("it returns", yields()),
    Row("it yields [DONE] as an Event", yields(Event(data="[DONE]"), "data: more\n\n")),
    Row("it yields [DONE] in a str", yields("data: [DONE]\n\n", "data: more\n\n")),
    Row("it yields [DONE] in bytes", yields(b"data: [DONE]\r\n\r\n", "data: more\n\n")),
    Row(
        "it yields [DONE] between other blocks, of which those before it count",
        yields("data: one\n\ndata: [DONE]\n\ndata: more\n\n"),
        entries=("first", "one", "[DONE]"),
    ),
    Row(
        "it yields [DONE] inside message text",
        yields(
            "data: say [DONE]\n\n", Event(data="[DONE] "), b"data: [DONE]\ndata: \n\n", Event(event="[DONE]", data="")
        ),
        entries=("first", "say [DONE]", "[DONE] ", "[DONE]\n", "[DONE] ", "[DONE]"),
    ),
    *(
        Row(
            f"it says {reason}",
            yields(Event.stop(reason)),
            stop_reason=reason,
            entries=("first", f"stop {reason}", "[DONE]"),
        )
        for reason in ("end_turn", "max_steps", "tool_rule", "requires_approval")
    ),
    Row(
        "it says cancelled",
        yields(Event.stop("cancelled")),
        status="cancelled",
        stop_reason="cancelled",
        entries=("first", "cancelled", "[DONE]"),
    ),
    failed(
        "it says anything else",
        yields(Event.stop("no_quota")),
        "STOPPED",
        message="the producer stopped: no_quota",
        stop_reason="no_quota",
        entries=("first", "stop no_quota", "[DONE]"),
        reported=0,
    ),
    Row(
        "it says why twice: the last word counts, and it may go on after it",
        yields(Event.stop("max_steps"), "data: one\n\n", Event.stop("tool_rule")),
        stop_reason="tool_rule",
        entries=("first", "stop max_steps", "one", "stop tool_rule", "[DONE]"),
    ),
    # It raises
    failed("it raises", raises(ValueError("secret")), "ERROR", message="the run failed"),
    failed("it raises what may be shown", raises(PublicError("no quota", "NO_QUOTA")), "NO_QUOTA", message="no quota"),
    failed(
        "it raises a group of one",
        raises(ExceptionGroup("nursery", [PublicError("no quota", "NO_QUOTA")])),
        "NO_QUOTA",
        message="no quota",
    ),
    failed(
        "it raises a group of two",
        raises(ExceptionGroup("nursery", [ValueError("a"), PublicError("no quota", "NO_QUOTA")])),
        "ERROR",
        message="the run failed",
    ),
    failed("it raises what is no text", raises(PublicError(5, None)), "None", message="5"),  # type: ignore[arg-type]
    cancelled(
        "it raises RunCancelled",
        raises(RunCancelled(None, "own words")),
        then=None,
        saw=None,
        cancel_reason="own words",
    ),
    cancelled(
        "it raises RunCancelled in a group of groups",
        raises(BaseExceptionGroup("", [ExceptionGroup("", [RunCancelled()]), RunCancelled()])),
        then=None,
        saw=None,
        cancel_reason=None,
    ),
    cancelled(
        "it raises RunCancelled with half of a surrogate pair",
        raises(RunCancelled(None, "own \ud83d words")),
        then=None,
        saw=None,
        cancel_reason="own ? words",
    ),
    failed(
        "it raises RunCancelled beside an error", raises(ExceptionGroup("", [RunCancelled(), ValueError()])), "ERROR"
    ),
    # It yields what ends it
    failed(
        "it yields an error event",
        yields(Event.json({"code": "MINE", "message": "my words"}, event="error"), "data: more\n\n"),
        "MINE",
        message="my words",
        entries=("first", "error MINE", "[DONE]"),
        reported=0,
    ),
    failed(
        "it yields an error event in bytes, and not in JSON",
        yields(b"event: error\ndata: out of memory\n\ndata: more\n\n"),
        "ERROR",
        message="out of memory",
        entries=("first", "error out of memory", "[DONE]"),
        reported=0,
    ),
    Row("it yields a tuple with 201", yields(("data: one\n\n", 201)), entries=("first", "one", "[DONE]")),
    failed(
        "it yields a tuple with 429",
        yields(("slow down", 429), "data: more\n\n"),
        "STATUS_429",
        message="slow down",
        reported=0,
    ),
    failed("it yields a tuple that is no pair", yields(("data: one\n\n", "200")), "INVALID_CHUNK"),
    failed("it yields what is no chunk", yields({"data": "one"}), "INVALID_CHUNK"),
    failed("it yields half a block", yields("data: one\n\ndata: two\n"), "INVALID_CHUNK"),
    failed("it yields an id", yields(Event(data="one", id="7")), "INVALID_CHUNK"),
    failed(
        "it yields an id line, of which nothing is stored", yields("data: one\n\nid: 7\ndata: two\n\n"), "INVALID_CHUNK"
    ),
    failed("it yields half of a surrogate pair", yields("data: \ud83d\n\n"), "INVALID_CHUNK"),
    Row(
        "it yields an event at the limit",
        yields(Event(data="x" * (LIMIT - len("data: \n\n")))),
        entries=("first", "x" * (LIMIT - 8), "[DONE]"),
    ),
    failed("it yields an event over the limit", yields(Event(data="x" * (LIMIT - 7))), "EVENT_TOO_LARGE"),
    # It is cancelled
    cancelled("somebody cancels it", waits),
    cancelled(
        "somebody cancels it without words", waits, then=cancel_without_words, saw="run cancelled", cancel_reason=None
    ),
    cancelled("it swallows the cancel and goes on yielding", swallows_and_goes_on),
    cancelled("it swallows the cancel and returns", swallows_and_returns),
    cancelled("it makes an error of its own of the cancel", makes_an_error_of_it),
    failed(
        "cleanup raises while it is cancelled",
        cleanup_raises,
        "ERROR",
        then=cancel,
        saw="run cancelled: stop pressed",
        cancel_reason="stop pressed",
    ),
    failed(
        "a child of it raises while it is cancelled",
        raises_in_a_nursery_while_cancelled,
        "CLEANUP",
        message="cleanup failed",
        then=cancel,
        saw="run cancelled: stop pressed",
        cancel_reason="stop pressed",
    ),
    failed("it yields when it should close", refuses_to_close, "ERROR"),
    # Clocks
    failed(
        "it takes longer than its timeout",
        waits,
        "TIMEOUT",
        limits={"timeout": 7},
        after=7,
        saw="run timed out",
        stop_reason="timeout",
        reported=0,
    ),
    failed(
        "it is silent for too long",
        waits,
        "SILENT",
        limits={"timeout": 9, "max_silence": 4},
        after=4,
        saw="run was silent",
        stop_reason="silent",
        reported=0,
    ),
    failed(
        "cleanup raises after the timeout",
        cleanup_raises,
        "ERROR",
        limits={"timeout": 7},
        after=7,
        saw="run timed out",
        cancel_reason="run timed out",
    ),
    failed(
        "the server shuts down, and it does not end within the time it has",
        waits,
        "INTERRUPTED",
        then=interrupt,
        after=3,
        saw="shutdown",
        stop_reason="interrupted",
        reported=0,
    ),
    # Cleanup that never ends
    Row("cleanup hangs after [DONE]", hangs_after_done, after=10, saw="the run has ended"),
    failed(
        "cleanup hangs after what is no chunk",
        hangs_after_what_is_no_chunk,
        "INVALID_CHUNK",
        after=10,
        saw="the run has ended",
    ),
]


@pytest.mark.parametrize("dialect", ["plain", "letta"])
@pytest.mark.parametrize("row", ROWS, ids=str)
async def test_what_ends_a_run(autojump_clock: MockClock, row: Row, dialect: str) -> None:
    log, notes, witness = MemoryLog(), Notes(), Witness()
    knobs: dict[str, Any] = {"dialect": dialect, "observer": notes, "max_event_bytes": LIMIT}
    async with two_supervisors(log, **knobs) as (owner, other):
        begin = trio.Event()
        run = await owner.start(_Delayed(begin, row.producer(witness)), **row.limits)
        async with readers((owner, run.id), (other, run.id)) as (here, there):
            began = trio.current_time()
            begin.set()
            if row.then is not None:
                await wait_all_tasks_blocked()
                await row.then(owner, run.id)
        record = await ended(log, run.id)
        entries = await entries_of(log, run.id)
        assert gists(entries) == list(row.entries)
        assert (record.status, record.stop_reason) == (row.status, row.stop_reason)
        assert (record.error and record.error.code) == row.code
        assert record.cancel_reason == row.cancel_reason
        if row.message is not None:
            assert record.error is not None
            assert record.error.message == row.message
        assert (witness.saw, witness.left) == (row.saw, True)
        assert len(notes.errors) == row.reported
        assert [replace(known, ended_at=record.ended_at) for known in notes.ended] == [record]
        for reader in (here, there):
            assert reader.error is None
            assert reader.entries == entries
            assert reader.ended_at == near(began + row.after)


class _Delayed:
    """A generator that begins later. It is closed as the generator itself would be."""

    def __init__(self, begin: trio.Event, source: AsyncIterator[Any]) -> None:
        self._begin = begin
        self._source = source
        self.aclose = source.aclose  # type: ignore[attr-defined]

    def __aiter__(self) -> _Delayed:
        return self

    async def __anext__(self) -> Any:
        await self._begin.wait()
        return await anext(self._source)
