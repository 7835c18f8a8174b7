"""Cancels over a real Redis: from another supervisor than the run's own, with the wake-up and without."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import trio

from penstock.errors import RunCancelled
from penstock.log import CancelStatus
from tests.support.clustered import on_a_cluster
from tests.support.redis_runs import (
    Ticks,
    last_seq,
    nothing_is_left,
    same_everywhere,
    stored,
    supervisor_at,
    supervisors,
    until,
    whole,
)
from tests.support.supervising import FIRST, Notes, Witness, gists, readers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock.sse import Event
    from penstock.supervisor import Supervisor
    from tests.support.proxy import Proxy
    from tests.support.redis_servers import Endpoint

CANCELLED = ["first", "cancelled", "[DONE]"]
NEVER = 30.0
"""A `cancel_check_interval` that no test waits for."""


@on_a_cluster
async def test_a_cancel_through_another_supervisor_stops_a_silent_run_at_once(server: Endpoint) -> None:
    witness = Witness()
    async with supervisors(server.url, server.url, cancel_check_interval=NEVER) as (owner, other):
        run = await owner.start(witness.waits)
        async with readers((owner, run.id), (other, run.id)) as following:
            await until(lambda: min(map(last_seq, following)) == 1)
            asked = trio.current_time()
            reply = await other.cancel(run.id, "user pressed stop")
            assert reply.status is CancelStatus.REQUESTED
            await until(lambda: witness.left)
        assert witness.saw_at - asked < 0.25
        assert witness.saw == "run cancelled: user pressed stop"
        assert all(gists(reader.entries) == CANCELLED for reader in following)
        assert max(reader.ended_at or NEVER for reader in following) - asked < 0.5
        record = await same_everywhere(server, run.id, following)
        assert (record["status"], record["cancel_reason"]) == ("cancelled", "user pressed stop")
        assert (await other.cancel(run.id)).status is CancelStatus.ENDED
        await nothing_is_left(owner)
        await nothing_is_left(other)


@on_a_cluster
async def test_many_silent_runs_are_cancelled_at_once_each_for_its_own_reason(server: Endpoint) -> None:
    witnesses = [Witness() for _ in range(20)]
    async with supervisors(server.url, server.url, cancel_check_interval=NEVER) as (owner, other):
        runs = [await owner.start(witness.waits) for witness in witnesses]
        async with trio.open_nursery() as nursery:
            for number, run in enumerate(runs):
                nursery.start_soon(other.cancel, run.id, str(number))
        await until(lambda: all(witness.left for witness in witnesses), 5)
        assert [witness.saw for witness in witnesses] == [f"run cancelled: {number}" for number in range(20)]
        for run in runs:
            await other.wait(run.id)
            assert (await whole(server, run.id))["status"] == "cancelled"


async def test_a_cancel_that_was_not_read_from_the_inbox_comes_with_an_append_or_a_renewal(server: Endpoint) -> None:
    silent, ticks = Witness(), Ticks()
    async with supervisors(server.url, server.url, cancel_check_interval=0.2, lease=1.5) as (owner, other):
        runs = [await owner.start(silent.waits), await owner.start(ticks)]
        async with readers(*((other, run.id) for run in runs)) as following:
            await until(lambda: min(map(last_seq, following)) >= 1)
            for run in runs:  # as if the second half of the request had never been sent
                await server.command("HSET", f"{{sse:run:{run.id}}}:meta", "cancelled", "token", "cancel_reason", "so")
            await until(lambda: silent.left and ticks.left, 3)
        assert silent.saw == "run cancelled: so"
        for run, reader in zip(runs, following, strict=True):
            record = await same_everywhere(server, run.id, [reader])
            assert (record["status"], record["cancel_reason"]) == ("cancelled", "so")


@pytest.mark.parametrize("wakeups", [True, False])
async def test_a_cancel_that_was_accepted_never_ends_completed(server: Endpoint, between: Proxy, wakeups: bool) -> None:
    """Thirty runs that end by themselves about when they are cancelled; the first before, the last never."""
    replies: dict[str, CancelStatus] = {}

    async def producer(number: int) -> AsyncIterator[Event]:
        yield FIRST
        if number:
            await trio.sleep(number * 0.003 if number < 29 else NEVER)

    async def cancel(supervisor: Supervisor, run_id: str, number: int) -> None:
        if not number:
            await supervisor.wait(run_id)
        await trio.sleep(0.04)
        replies[run_id] = (await supervisor.cancel(run_id)).status

    async with supervisors(between.url, server.url, cancel_check_interval=0.2) as (owner, other):
        between.drop_messages = not wakeups
        async with trio.open_nursery() as nursery:
            for number in range(30):
                run = await owner.start(producer, number)
                nursery.start_soon(cancel, other, run.id, number)
        for run_id, status in replies.items():
            await owner.wait(run_id)
            record = await whole(server, run_id)
            assert (status, record["status"]) in {
                (CancelStatus.REQUESTED, "cancelled"),
                (CancelStatus.ENDED, "completed"),
            }
            assert len(await stored(server, run_id)) == (3 if status is CancelStatus.REQUESTED else 2)
    assert {*replies.values()} == {CancelStatus.REQUESTED, CancelStatus.ENDED}


async def test_a_cancel_while_the_owner_is_cut_off_is_kept_for_it(server: Endpoint, between: Proxy) -> None:
    notes, witness = Notes(), Witness()
    async with supervisors(server.url) as (other,), supervisor_at(between.url, observer=notes) as owner:
        run = await owner.start(witness.waits)
        async with readers((other, run.id)) as (reader,):
            await until(lambda: last_seq(reader) == 1)
            between.refuse()
            assert (await other.cancel(run.id, "meanwhile")).status is CancelStatus.REQUESTED
            await until(lambda: notes.warnings)
            assert not witness.left  # what cannot be looked up cancels nothing
            await between.accept()
        assert witness.saw == "run cancelled: meanwhile"
        assert gists(reader.entries) == CANCELLED


async def test_a_body_that_writes_its_run_by_hand_is_cut_short_by_another_supervisor(server: Endpoint) -> None:
    async with supervisors(server.url, server.url) as (owner, other):
        with pytest.raises(RunCancelled, match="enough"):  # noqa: PT012
            async with owner.open_run("by-hand") as writer:
                await writer.write(FIRST)
                await other.cancel("by-hand", "enough")
                await trio.sleep_forever()
        assert (await whole(server, "by-hand"))["status"] == "cancelled"
