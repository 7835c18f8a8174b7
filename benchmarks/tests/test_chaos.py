"""Servers that are killed under their readers, for some seconds; and that the judge of it sees what is wrong.

The long form is `python -m benchmarks.faults.chaos`.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from tests.support.wire import DONE, Block

from benchmarks.faults.chaos import Settings, chaos
from benchmarks.faults.chaos_producers import content, numbered, schedule
from benchmarks.faults.chaos_verdict import Following, Life, Order, Sequence, Story, judge

if TYPE_CHECKING:
    from pathlib import Path

SHORT = Settings(
    seconds=4.0, servers=3, runs=24, readers=40, lease=2.0, shortest=1.0, longest=3.0, kill_every=1.2, slack=30.0
)
"""With slack for a machine that has the rest of the suite to do at the same time."""


@pytest.mark.timeout(400)  # a busy machine takes minutes
async def test_servers_are_killed_and_every_reader_sees_every_run_once_in_order_and_to_its_end() -> None:
    report = await chaos(SHORT)
    words = "\n".join([*report.table, *report.wrong])
    assert not report.wrong, words
    statuses = {order.status for order in report.story.orders}
    assert statuses == {"completed", "lost"}, words
    assert sum(f.drops + f.cuts for f in report.story.followings) > 10, words


# The judge

SEED, SECONDS = 1, 3.0
TOTAL = sum(moment.events for moment in schedule(SEED, SECONDS))


def event(number: int, *, run: str = "run-1", execution: str = "x", words: int = 0) -> Block:
    return Block(number, data=json.dumps(content(run, words or number, execution)))


def error(number: int, code: str) -> Block:
    return Block(number, event="error", data=json.dumps({"code": code}))


def whole(*, until: int = TOTAL, execution: str = "x") -> list[Block]:
    return [event(number, execution=execution) for number in range(1, until + 1)]


def completed() -> list[Block]:
    return [*whole(), Block(TOTAL + 1, data=DONE)]


def lost(*, code: str = "RUN_LOST", until: int = 3) -> list[Block]:
    return [*whole(until=until), error(until + 1, code), Block(until + 2, data=DONE)]


def seen(blocks: list[Block], *, ended: float | None = 13.0, reader: str = "reader 1") -> Following:
    sequence = Sequence("run-1")
    for block in blocks:
        sequence.take(block)
    return Following(reader, "run-1", 1.0, sequence, ended)


def verdict(
    *followings: Following, killed: float | None = None, status: str = "completed", begun: int = 1
) -> list[str]:
    life = Life("1.1", 0.0, 0.5, killed)
    order = Order("run-1", SEED, SECONDS, heard=life, ids={"id"}, status=status)
    lines = [("run-1", "1.1", "xyz"[number]) for number in range(begun)]
    return judge(Story([order], list(followings), {"1.1": life}, lines), limit=5.0)


def test_a_run_that_is_complete_for_all_its_readers_is_well() -> None:
    pings = [Block(comment="ping"), *completed()]
    assert verdict(seen(completed()), seen(pings)) == []


def test_a_run_that_is_lost_with_its_server_is_well_if_its_readers_hear_of_it_in_time() -> None:
    assert verdict(seen(lost()), seen(lost(), ended=14.9), killed=10.0, status="lost") == []
    away = seen(lost(), ended=15.5)
    away.pauses = [(9.0, 9.5), (14.0, 15.0)]
    assert verdict(away, killed=10.0, status="lost") == []
    assert verdict(seen(lost(until=0)), killed=10.0, status="lost", begun=0) == []


@pytest.mark.parametrize(
    "blocks, words",
    [
        pytest.param([event(1), event(3)], "3 after 1", id="gap"),
        pytest.param([event(1), event(2), event(2)], "2 after 2", id="repeat"),
        pytest.param([event(1), event(2, words=1)], "2 is", id="content of another event"),
        pytest.param([event(1, run="run-2")], "1 is", id="content of another run"),
        pytest.param([event(1), event(2, execution="y")], "2 is", id="content of another execution"),
        pytest.param([error(1, "RUN_LOST"), event(2)], "2 is", id="event after the error"),
        pytest.param([Block(1, data=DONE), event(2)], "after the end", id="event after the end"),
    ],
)
def test_what_should_not_follow_is_named(blocks: list[Block], words: str) -> None:
    assert any(words in each for each in verdict(seen(blocks)))


def test_gaps_and_repeats_are_counted() -> None:
    sequence = seen([event(2), event(2), event(5)]).sequence
    assert (sequence.gaps, sequence.repeats) == (2, 1)


@pytest.mark.parametrize(
    "said, words",
    [
        pytest.param(verdict(seen(completed(), ended=None)), "never came to its end", id="hangs"),
        pytest.param(verdict(seen([*whole(until=3), Block(4, data=DONE)])), "is complete with 4", id="cut short"),
        pytest.param(verdict(seen(completed()), seen([Block(1, data=DONE)])), "disagree", id="readers disagree"),
        pytest.param(verdict(seen(lost()), status="lost"), "its server lived", id="lost alive"),
        pytest.param(verdict(seen(lost(), ended=15.1), killed=10.0, status="lost"), "informed 5.10 s after", id="late"),
        pytest.param(
            verdict(seen(lost(), ended=9.0), killed=10.0, status="lost"), "1.00 s before its server", id="too early"
        ),
        pytest.param(verdict(seen(lost(code="ERROR")), status="failed"), "the error ERROR", id="another error"),
        pytest.param(verdict(seen(completed()), status="running"), "its record says running", id="record"),
        pytest.param(verdict(seen(completed()), begun=2), "was begun 2 times", id="begun twice"),
    ],
)
def test_an_end_that_should_not_be_is_named(said: list[str], words: str) -> None:
    assert any(words in each for each in said), said


async def test_a_producer_says_what_its_schedule_says(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, autojump_clock: object
) -> None:
    monkeypatch.setenv("CHAOS_SERVER", "1.1")
    monkeypatch.setenv("CHAOS_WITNESS", str(tmp_path / "witness"))
    order = {"run": "run-1", "seed": SEED, "seconds": SECONDS}
    said = [json.loads(str(event.data)) async for event in numbered(order)]
    run, life, execution = (tmp_path / "witness").read_text().split()
    assert (run, life) == ("run-1", "1.1")
    assert said == [content("run-1", number, execution) for number in range(1, TOTAL + 1)]  # and none of them late
