"""What every event log promises of leases, cancel requests and wake-ups."""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from penstock.log import AppendStatus, Lease, LostEnding, Notification
from penstock.runs import RunStatus
from tests.support.logs import COMPLETED, DONE, LOST, LOST_ENDING, batch, record

if TYPE_CHECKING:
    from trio.abc import Clock

    from penstock.log import EventLog
    from penstock.runs import Run
    from tests.conftest import Elapse

OK, FENCED, ENDED, GONE = AppendStatus.OK, AppendStatus.FENCED, AppendStatus.ENDED, AppendStatus.GONE


async def start(log: EventLog, run_id: str = "r", seconds: float = 2.0, owner: str = "owner") -> Run:
    return (await log.start(record(run_id), Lease(owner, "epoch", seconds))).run


async def reap(log: EventLog) -> list[str]:
    return sorted(await log.reap(lambda: LOST_ENDING))


# --- leases ---------------------------------------------------------------------------------------------------------


async def test_a_run_whose_lease_has_run_out_ends_with_an_obituary(log: EventLog, clock: Clock, elapse: Elapse) -> None:
    started = await start(log)
    await log.append([batch(1, 3)])
    await elapse(2.5)
    assert await reap(log) == ["r"]
    run = await log.get("r")
    assert run.ended_at is not None
    assert run == started.ended(LOST, seq=5, at=run.ended_at)
    entries = (await log.read("r", 3)).entries
    assert [(each.seq, each.data, each.terminal) for each in entries] == [
        (4, LOST_ENDING.blocks[0], False),
        (5, DONE, True),
    ]
    assert all(each.timestamp > 1_600_000_000_000 for each in entries)


async def test_a_run_is_reaped_once_and_an_ended_one_never(log: EventLog, clock: Clock, elapse: Elapse) -> None:
    await start(log, "dead")
    await start(log, "ended")
    await log.append([batch(1, 1, COMPLETED, run_id="ended")])
    await elapse(2.5)
    assert await reap(log) == ["dead"]
    assert await reap(log) == []
    assert (await log.get("ended")).status is RunStatus.COMPLETED


async def test_each_dead_run_has_an_obituary_of_its_own(log: EventLog, clock: Clock, elapse: Elapse) -> None:
    for run_id in ("a", "b", "c"):
        await start(log, run_id)
    await elapse(2.5)
    made: list[bytes] = []

    def lost_ending() -> LostEnding:
        made.append(b"data: lost_ending %d\n\n" % len(made))
        return LostEnding([made[-1], DONE], LOST)

    assert sorted(await log.reap(lost_ending)) == ["a", "b", "c"]
    first = [(await log.read(run_id, 0)).entries[0].data for run_id in ("a", "b", "c")]
    assert sorted(first) == made
    assert len(made) == 3


async def test_appending_keeps_a_run_alive_for_one_lease(log: EventLog, clock: Clock, elapse: Elapse) -> None:
    await start(log)
    for seq in (1, 2, 3):
        await elapse(1.5)
        await log.append([batch(seq, seq)])
    assert await reap(log) == []
    await elapse(2.5)
    assert await reap(log) == ["r"]


async def test_renewals_are_answered_run_by_run(log: EventLog, clock: Clock, elapse: Elapse) -> None:
    await start(log, "reaped", 1.0)
    await elapse(1.5)
    await reap(log)
    for run_id in ("mine", "another's", "ended"):
        await start(log, run_id)
    await log.append([batch(1, 1, COMPLETED, run_id="ended")])
    epochs = {"mine": "epoch", "another's": "wrong", "ended": "epoch", "gone": "epoch", "reaped": "epoch"}
    assert await log.renew("owner", epochs, 2.0) == {
        "mine": OK,
        "another's": FENCED,
        "ended": ENDED,
        "gone": GONE,
        "reaped": FENCED,
    }


async def test_requests_are_taken_by_the_owner_once(log: EventLog, clock: Clock) -> None:
    async with log.wakeups("owner"), log.wakeups("other"):
        await start(log, "a")
        await start(log, "b")
        await start(log, "c", owner="other")
        assert dict(await log.cancel_requests("owner")) == {}
        await log.request_cancel("a", "why")
        await log.request_cancel("b", None)
        await log.request_cancel("c", "theirs")
        await log.request_cancel("a", "again")
        assert dict(await log.cancel_requests("owner")) == {"a": "why", "b": None}
        assert dict(await log.cancel_requests("owner")) == {}
        assert dict(await log.cancel_requests("other")) == {"c": "theirs"}


# --- wake-ups -------------------------------------------------------------------------------------------------------


async def test_what_was_appended_since_the_subscription_is_told(log: EventLog, clock: Clock) -> None:
    await start(log, "a")
    await start(log, "b")
    async with log.wakeups("reader") as wakeups:
        await wakeups.subscribe("a")
        await wakeups.subscribe("b")
        await log.append([batch(1, 3, run_id="a")])
        await log.append([batch(1, 1, run_id="b"), batch(4, 5, run_id="a")])
        seen: dict[str, int] = {}
        with trio.fail_after(5):
            while seen != {"a": 5, "b": 1}:
                news = await wakeups.wait()
                assert news.moved
                assert not news.cancel
                seen |= news.moved


async def test_the_end_is_told_whoever_writes_it(log: EventLog, clock: Clock, elapse: Elapse) -> None:
    await start(log, "ends")
    await start(log, "dies")
    async with log.wakeups("reader") as wakeups:
        await wakeups.subscribe("ends")
        await wakeups.subscribe("dies")
        await log.append([batch(1, 2, COMPLETED, run_id="ends")])
        await elapse(2.5)
        await reap(log)
        seen: dict[str, int] = {}
        with trio.fail_after(5):
            while seen != {"ends": 2, "dies": 2}:
                seen |= (await wakeups.wait()).moved


async def test_a_run_without_a_subscription_and_one_unsubscribed_are_not_told(log: EventLog, clock: Clock) -> None:
    for run_id in ("never", "no more", "told"):
        await start(log, run_id)
    async with log.wakeups("reader") as wakeups:
        await wakeups.subscribe("no more")
        await wakeups.subscribe("told")
        await log.append([batch(1, 1, run_id="no more")])
        wakeups.unsubscribe("no more")
        wakeups.unsubscribe("never subscribed")
        await log.append([batch(1, 1, run_id="never")])
        await log.append([batch(2, 2, run_id="no more")])
        await log.append([batch(1, 1, run_id="told")])
        seen: dict[str, int] = {}
        with trio.fail_after(5):
            while "told" not in seen:
                seen |= (await wakeups.wait()).moved
        assert seen == {"told": 1}


async def test_a_cancel_request_wakes_the_owner_and_nobody_else(log: EventLog, clock: Clock) -> None:
    await start(log)
    async with log.wakeups("owner") as owner, log.wakeups("other") as other:
        await other.subscribe("r")
        await log.request_cancel("r", "stop")
        with trio.fail_after(5):
            assert await owner.wait() == Notification({}, cancel=True)
        await log.append([batch(1, 1)])
        with trio.fail_after(5):
            assert await other.wait() == Notification({"r": 1})


async def test_a_wait_that_is_cancelled_loses_nothing(log: EventLog, clock: Clock) -> None:
    await start(log)
    async with log.wakeups("owner") as wakeups:
        await wakeups.subscribe("r")
        with trio.move_on_after(0.1):
            await wakeups.wait()
        await log.append([batch(1, 1)])
        await log.request_cancel("r", "stop")
        with trio.CancelScope() as scope:
            scope.cancel()
            await wakeups.wait()
        assert scope.cancelled_caught
        moved: dict[str, int] = {}
        cancel = False
        with trio.fail_after(5):
            while not (moved and cancel):
                news = await wakeups.wait()
                moved |= news.moved
                cancel = cancel or news.cancel
        assert moved == {"r": 1}


async def test_every_subscriber_is_told(log: EventLog, clock: Clock) -> None:
    await start(log)
    async with log.wakeups("one") as one, log.wakeups("two") as two:
        for wakeups in (one, two):
            await wakeups.subscribe("r")
        await log.append([batch(1, 1)])
        for wakeups in (one, two):
            with trio.fail_after(5):
                assert (await wakeups.wait()).moved == {"r": 1}
