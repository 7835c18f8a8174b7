"""A server of several workers that is restarted, then loses workers, for some seconds; and that the judge sees it all.

The long form is `python -m benchmarks.faults.rolling`.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from tests.support.wire import DONE, Block

from benchmarks.faults.chaos import chaos
from benchmarks.faults.chaos_producers import bear_witness
from benchmarks.faults.chaos_verdict import Following, Life, Order, Sequence, Story, judge, slowest_notice
from benchmarks.faults.rolling import Rolling, Settings

if TYPE_CHECKING:
    from pathlib import Path

SHORT = Settings(
    workers=2,
    restarts=1,
    calm=1.2,
    drain_timeout=0.5,
    killing=1.0,
    kill_every=0.5,
    runs=40,
    readers=40,
    lease=1.5,
    shortest=1.0,
    longest=3.0,
    slack=15.0,
)
"""With slack for a machine that has the rest of the suite to do at the same time."""


@pytest.mark.timeout(400)  # a busy machine takes minutes
async def test_a_server_is_restarted_and_loses_workers_and_every_reader_sees_every_run_to_its_end() -> None:
    report = await chaos(SHORT, kind=Rolling)
    words = "\n".join([*report.table, *report.wrong])
    assert not report.wrong, words
    story = report.story
    assert {order.status for order in story.orders} == {"completed", "failed", "lost"}, words
    assert any(life.killed is not None for life in story.mortals), words
    assert sum(life.stopped is not None for life in story.mortals) == SHORT.workers, words
    assert sum(f.cuts for f in story.followings) > 10, words


def test_a_witness_can_tell_workers_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CHAOS_SERVER", "1.1/{pid}")
    monkeypatch.setenv("CHAOS_WITNESS", str(tmp_path / "witness"))
    bear_witness("run-1", "x")
    assert (tmp_path / "witness").read_text() == f"run-1 1.1/{os.getpid()} x\n"


# The judge

LIMIT = 5.0


def told(code: str, ended: float) -> Following:
    """A reader who was told nothing but that its run has ended so."""
    sequence = Sequence("run-1")
    sequence.take(Block(1, event="error", data=f'{{"code": "{code}"}}'))
    sequence.take(Block(2, data=DONE))
    return Following("reader 1", "run-1", 1.0, sequence, ended)


def story(following: Following, owner: Life, status: str, *mortals: Life) -> Story:
    order = Order("run-1", 1, 3.0, heard=owner, ids={"id"}, status=status)
    return Story([order], [following], {owner.name: owner}, [], mortals)


def verdict(following: Following, owner: Life, status: str, *mortals: Life) -> list[str]:
    return judge(story(following, owner, status, *mortals), LIMIT)


def test_a_run_that_is_interrupted_after_its_server_was_told_to_end_is_well() -> None:
    assert verdict(told("INTERRUPTED", 12.0), Life("1.1", 0.0, 0.5, stopped=10.0), "failed") == []


@pytest.mark.parametrize(
    "owner, status, words",
    [
        pytest.param(Life("1.1", 0.0, 0.5), "failed", "before its server was sent SIGTERM", id="not told"),
        pytest.param(
            Life("1.1", 0.0, 0.5, stopped=13.0), "failed", "before its server was sent SIGTERM", id="too early"
        ),
        pytest.param(Life("1.1", 0.0, 0.5, stopped=10.0), "running", "its record says running", id="record"),
    ],
)
def test_an_interruption_that_should_not_be_is_named(owner: Life, status: str, words: str) -> None:
    (said,) = verdict(told("INTERRUPTED", 12.0), owner, status)
    assert words in said


DEAD = Life("1.1/1", 0.0, 0.5, killed=10.0)


@pytest.mark.parametrize(
    "mortals, waited",
    [
        pytest.param([Life("1.1/2", 0.0, 9.0)], 14.0, id="there before and after"),
        pytest.param([Life("1.1/2", 0.0, 12.0)], 12.0, id="has only just come"),
        pytest.param([Life("1.1/2", 0.0, 9.0, killed=14.0), Life("1.1/3", 15.0, 16.0)], 8.0, id="died before its time"),
        pytest.param([Life("1.1/2", 0.0, 9.0, stopped=14.0), Life("1.1/3", 15.0, 16.0)], 8.0, id="was stopped before"),
        pytest.param([Life("1.1/2", 0.0, 9.0, killed=16.0), Life("1.1/3", 15.0, 20.0)], 14.0, id="died afterwards"),
        pytest.param([Life("1.1/2", 0.0), Life("1.1/3", 15.0, 20.0)], 4.0, id="never came so far"),
    ],
)
def test_the_wait_for_a_lost_run_counts_from_when_somebody_stays_who_can_tell(
    mortals: list[Life], waited: float
) -> None:
    following = told("RUN_LOST", 24.0)
    assert slowest_notice(story(following, DEAD, "lost", *mortals), pauses=False, limit=LIMIT) == waited
    assert bool(verdict(following, DEAD, "lost", *mortals)) == (waited > LIMIT)
