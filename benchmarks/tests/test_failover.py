"""Redis servers that stand still, die and hand over slots, for some seconds; and that the judge sees what is wrong.

The long form is `python -m benchmarks.faults.failover`.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import trio
from tests.support.redis_clusters import redis_cluster
from tests.support.redis_runs import Ticks, exactly_once, last_seq, record_of, supervisors, until, until_it_is
from tests.support.redis_servers import _talk
from tests.support.supervising import Reader

from benchmarks.faults.failover import Settings, failover
from benchmarks.faults.failover_verdict import CONCERNED, OTHERS, Answer, Limits, Reading, Story, judge, table
from penstock.log.open import open_log

SHORT = Settings(
    runs=6, readers=9, calm=0.3, stall=2.0, node_timeout=1.0, kills=1, slots=8, lease=2.5, notice=20.0, recover=30.0
)
"""With time for a machine that has the rest of the suite to do at the same time."""


@pytest.mark.parametrize("scenario", ["cluster", "stalled", "sentinel", "slots"])
async def test_servers_fail_or_hand_over_and_every_reader_sees_every_run_once_in_order_and_to_its_end(
    scenario: str,
) -> None:
    report = await failover(scenario, SHORT)
    words = "\n".join([*report.table, *report.wrong])
    assert not report.wrong, words
    assert len(report.story.readings) >= SHORT.readers, words
    assert report.story.outages, words


# What this has found


async def go_on(following: list[Reader], entries: int) -> None:
    """Wait until each of them has got so many more."""
    goals = [(reader, last_seq(reader) + entries) for reader in following]
    await until(lambda: all(last_seq(reader) >= goal for reader, goal in goals))


async def test_a_slot_that_moves_breaks_no_subscription_of_the_node_that_had_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        redis_cluster() as cluster,
        supervisors(cluster.url, cluster.url) as (owner, other),
        trio.open_nursery() as nursery,
    ):
        ticks = Ticks(0.02)
        runs = [(await owner.start(ticks)).id for _ in range(6)]
        following = [Reader(other, run) for run in runs]
        for reader in following:
            await nursery.start(reader.run)
        node = await cluster.node_of(record_of(runs[0]))
        away = next(each for each in cluster.nodes if each is not node)
        for to in (away, node):
            await cluster.move_slot(cluster.slot(record_of(runs[0])), to)
            await go_on(following, 10)
        ticks.enough.set()
        await until(lambda: all(reader.ended_at for reader in following))
        for reader in following:
            exactly_once(reader)
    assert "subscription" not in caplog.text


async def test_a_slot_that_was_given_away_and_back_at_once_is_listened_to_again() -> None:
    async with redis_cluster() as cluster, open_log(cluster.url) as log, log.wakeups("owner") as wakeups:
        await wakeups.subscribe("run-1")
        channel = "{sse:run:run-1}:wake"
        node = await cluster.node_of(channel)
        away = next(each for each in cluster.nodes if each is not node)
        names = [await each.command("CLUSTER MYID") for each in (away, node)]
        moves = [("CLUSTER", "SETSLOT", cluster.slot(channel), "NODE", name) for name in names]
        await trio.to_thread.run_sync(partial(_talk, node.url, *moves))

        async def listeners() -> int:
            (_, number) = await node.command("PUBSUB", "SHARDNUMSUB", channel)
            return int(number)

        await until_it_is(listeners, 1)


async def test_a_run_whose_keys_are_apart_keeps_no_other_run_of_its_node_waiting() -> None:
    async with redis_cluster() as cluster, supervisors(cluster.url) as (owner,), trio.open_nursery() as nursery:
        ticks = Ticks(0.02)
        runs = [(await owner.start(ticks)).id for _ in range(12)]
        node = await cluster.node_of(record_of(runs[0]))
        away = next(each for each in cluster.nodes if each is not node)
        others = [run for run in runs[1:] if await cluster.node_of(record_of(run)) is node]
        following = [Reader(owner, run) for run in others]
        for reader in following:
            await nursery.start(reader.run)
        slot = cluster.slot(record_of(runs[0]))
        await cluster.begin_move(slot, away)
        await cluster.move_keys(slot, away, at_most=1)
        for _ in range(3):
            await go_on(following, 20)
        await cluster.finish_move(slot, away)
        ticks.enough.set()
        assert (await owner.wait(runs[0])).status == "completed"
        await until(lambda: all(reader.ended_at for reader in following))


# The judge

LIMITS = Limits(notice=1.0, recover=5.0, refuse=12.0)
LAST = 40
"""The seq of the entry that ends each run here."""


def reading(run: str, **other: Any) -> Reading:
    """A reader who got an entry each second, from 0 on, and the end."""
    all_is_well: dict[str, Any] = {
        "began": 0.0, "ended": 39.0, "cuts": 0, "cursor": LAST, "error": None, "over": True, "gaps": 0, "repeats": 0,
        "faults": [], "arrivals": [float(second) for second in range(LAST)],
    }  # fmt: skip
    return Reading("a reader", run, **{**all_is_well, **other})


def paused(since: int, seconds: float) -> list[float]:
    """Arrivals with a pause."""
    return [second if second <= since else second + seconds - 1 for second in map(float, range(LAST))]


def story(*readings: Reading, status: str = "completed", **other: Any) -> Story:
    """Of two runs, one concerned by what was away from 10 to 20, when all ended at 60."""
    readings = readings or (reading("run-1"), reading("run-2"))
    records = {run: {"status": status if run == "run-2" else "completed", "seq": LAST} for run in ("run-1", "run-2")}
    groups = {"run-1": OTHERS, "run-2": CONCERNED}
    whole = Story(LIMITS, groups, records, [*readings], calm=0.5, trouble=10.0, enough=60.0, outages=[10.0])
    return replace(whole, **other)


def test_what_may_be_is_well() -> None:
    starts = [Answer("run-1", OTHERS, 11.0, 0.9), Answer("run-3", CONCERNED, 11.0, 11.0, "LogUnavailable: away")]
    assert judge(story()) == []
    assert judge(story(reading("run-1", arrivals=paused(12, 1.9)), reading("run-2", arrivals=paused(12, 14.9)))) == []
    assert judge(story(reading("run-2", error="LOG_DIVERGED"), status="failed")) == []
    assert judge(story(starts=starts)) == []
    cancel = Answer("run-2", OTHERS, 38.5, 0.1)
    assert judge(story(reading("run-2", error="RUN_CANCELLED"), status="cancelled", cancels=[cancel])) == []


@pytest.mark.parametrize(
    "seen, words",
    [
        pytest.param(story(reading("run-1", faults=["3 after 1"])), "3 after 1", id="gap"),
        pytest.param(story(reading("run-1", ended=None, cursor=7)), "never came to its end: it is at 7", id="hangs"),
        pytest.param(story(reading("run-1", cursor=39)), "ended with entry 39", id="short"),
        pytest.param(story(reading("run-2", error="ERROR"), status="failed"), "told the end ERROR", id="error"),
        pytest.param(story(reading("run-2", error="RUN_LOST"), status="lost"), "is lost in the end", id="lost"),
        pytest.param(story(status="failed"), "told the end completed", id="record"),
        pytest.param(story(records={}), "is unknown in the end", id="no record"),
        pytest.param(story(reading("run-2", error="RUN_CANCELLED"), status="cancelled"), "was not", id="cancelled"),
        pytest.param(story(cancels=[Answer("run-1", OTHERS, 38.5, 0.1)]), "completed, and was cancelled", id="ignored"),
        pytest.param(story(reading("run-1", arrivals=paused(12, 2.1))), "1 other runs paused", id="noticed"),
        pytest.param(story(reading("run-2", arrivals=paused(12, 15.1))), "paused for 15.10 s", id="did not recover"),
        pytest.param(story(starts=[Answer("run-1", OTHERS, 11.0, 1.1)]), "took 1.10 s (+1.0 s)", id="slow start"),
        pytest.param(story(starts=[Answer("x", OTHERS, 11.0, 0.1, "LogUnavailable: no")]), "took 0.10", id="refused"),
        pytest.param(story(starts=[Answer("x", CONCERNED, 11.0, 0.1, "ValueError: no")]), "ValueError", id="raised"),
        pytest.param(story(starts=[Answer("x", CONCERNED, 11.0, 12.1, "LogUnavailable")]), "took 12.10", id="hung"),
        pytest.param(story(starts=[Answer("x", CONCERNED, 11.0)]), "took inf s", id="no answer"),
        pytest.param(story(cancels=[Answer("run-1", OTHERS, 37.9, 0.1)]), "effect after 1.10 s", id="slow cancel"),
        pytest.param(story(cancels=[Answer("run-1", OTHERS, 39.0, 0.1, "LogUnavailable")]), "raised", id="no cancel"),
    ],
)  # fmt: skip
def test_what_should_not_be_is_named(seen: Story, words: str) -> None:
    said = judge(seen)
    assert any(words in each for each in said), said


def test_the_table_shows_the_longest_pause_of_each_group() -> None:
    said = "\n".join(table(story(reading("run-1"), reading("run-2", arrivals=paused(12, 14.5))), {"more": "figures"}))
    assert "14.50 s" in said
    assert "+15.5 s" not in said.split("concerned, before")[0]
    assert "figures" in said
