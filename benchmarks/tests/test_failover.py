"""Redis servers that stand still, die and hand over slots, for some seconds; and that the judge sees what is wrong.

The long form is `python -m benchmarks.faults.failover`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from benchmarks.faults.failover import Settings, failover
from benchmarks.faults.failover_verdict import CONCERNED, OTHERS, Answer, Limits, Reading, Story, judge, table

SHORT = Settings(
    runs=6, readers=9, calm=0.3, stall=2.0, node_timeout=1.0, kills=1, slots=8, lease=2.5, notice=20.0, recover=30.0
)
"""With time for a machine that has the rest of the suite to do at the same time."""


@pytest.mark.parametrize("scenario", ["cluster", "stalled", "sentinel", "slots"])
@pytest.mark.timeout(400)  # a busy machine takes minutes
async def test_servers_fail_or_hand_over_and_every_reader_sees_every_run_once_in_order_and_to_its_end(
    scenario: str,
) -> None:
    report = await failover(scenario, SHORT)
    words = "\n".join([*report.table, *report.wrong])
    assert not report.wrong, words
    assert len(report.story.readings) >= SHORT.readers, words
    assert report.story.outages, words


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
        pytest.param(story(reading("run-2", error="ERROR"), status="failed"), "saw the end ERROR", id="error"),
        pytest.param(story(reading("run-2", error="RUN_LOST"), status="lost"), "is lost in the end", id="lost"),
        pytest.param(story(status="failed"), "saw the end completed", id="record"),
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
