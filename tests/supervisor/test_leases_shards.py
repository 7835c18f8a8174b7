"""The rounds of the watch for a log of several parts: they begin and end with a part, and know of no other's outage."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock.backoff import LONGEST_PAUSE
from penstock.errors import LogUnavailable, ReaderReleased
from penstock.supervisor import Supervisor, open_supervisor
from penstock.supervisor.leases import REAP_INTERVAL
from tests.support.parted import ANSWER_TIMEOUT, Parted
from tests.support.supervising import Notes, assert_nothing_is_left, count, ended, gists, readers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock

LEASE = 6.0
LIMIT = 4.0
TOO_LATE = LIMIT + ANSWER_TIMEOUT + 2.0
"""When an outage has surely been noticed, in seconds after it began."""
BACK = LONGEST_PAUSE + REAP_INTERVAL + 0.1
"""So late may it be noticed that a part is back."""


class Outages(Notes):
    def __init__(self) -> None:
        super().__init__()
        self.told: list[tuple[str, float]] = []

    def outage_began(self) -> None:
        self.told.append(("began", trio.current_time()))

    def outage_ended(self, seconds: float) -> None:
        self.told.append(("ended", seconds))


class House:
    def __init__(self, *shards: str) -> None:
        self.log = Parted(*shards)
        self.log.where = {f"on-{shard}": shard for shard in shards}
        self.outages = Outages()
        self.supervisor: Supervisor

    def asked(self, shard: str, call: str | None = None, since: float = 0.0) -> list[float]:
        return [at for at, what, of in self.log.asked if of == shard and call in {None, what} and at >= since]

    def renewals(self, run_id: str, since: float) -> list[float]:
        return [at for at, runs in self.log.renewed if run_id in runs and at >= since]

    def lives(self, run_id: str) -> bool:
        return run_id in self.supervisor._runs.by_id


@asynccontextmanager
async def house(*shards: str, **knobs: Any) -> AsyncIterator[House]:
    works = House(*shards)
    knobs = {"lease": LEASE, "outage_limit": LIMIT, **knobs}
    async with open_supervisor(works.log, observer=works.outages, drain_timeout=0.0, **knobs) as works.supervisor:
        for run_id in [*works.log.where]:
            await works.supervisor.start(count, 100_000, 0.5, run_id=run_id)
        await trio.sleep(5)
        yield works
        await trio.sleep(BACK)
        await works.supervisor.drain(0)
        await trio.sleep(1)
        assert_nothing_is_left(works.supervisor)


async def test_every_part_is_looked_at_and_its_runs_renewed_by_themselves(autojump_clock: MockClock) -> None:
    async with house("a", "b", "c") as works:
        since = trio.current_time()
        await trio.sleep(3 * LEASE)
        for shard in ("a", "b", "c"):
            assert len(works.asked(shard, "check", since)) >= 3 * LEASE / REAP_INTERVAL - 2
            assert 8 <= len(works.renewals(f"on-{shard}", since)) <= 10
        assert all(len(runs) == 1 for _, runs in works.log.renewed)


async def test_the_runs_of_a_part_that_is_new_are_renewed_at_once(autojump_clock: MockClock) -> None:
    async with house("a", "b", lease=3_000.0) as works:
        since = trio.current_time()
        works.log.names.append("c")
        works.log.where["on-b"] = "c"
        await trio.sleep(REAP_INTERVAL + 0.1)
        assert works.renewals("on-a", since) == []
        assert len(works.renewals("on-b", since)) == 1
        await trio.sleep(10 * REAP_INTERVAL)
        assert len(works.renewals("on-b", since)) == 1
        assert len(works.asked("c", "check", since)) >= 9


async def test_the_runs_of_a_supervisor_that_has_just_come_need_no_renewal(autojump_clock: MockClock) -> None:
    async with house("a", "b", lease=3_000.0) as works:
        assert works.log.renewed == []


@pytest.mark.parametrize("seconds", [0.0, 3.1, TOO_LATE], ids=["well", "away", "in an outage"])
@pytest.mark.parametrize("how", ["gone", "silent"])
async def test_the_rounds_of_a_part_that_is_no_more_end(autojump_clock: MockClock, how: str, seconds: float) -> None:
    async with house("a", "b") as works:
        if seconds:
            works.log.silence("b") if how == "silent" else works.log.gone.add("b")
        await trio.sleep(seconds)
        works.log.names.remove("b")
        works.log.where["on-b"] = "a"
        await trio.sleep(BACK)
        assert works.lives("on-a")
        assert works.lives("on-b") == (seconds < TOO_LATE)
        since = trio.current_time()
        await trio.sleep(20)
        assert works.asked("b", since=since) == []
        assert [what for what, _ in works.outages.told] == (["began", "ended"] if seconds else [])
        works.log.gone.clear()
        if "b" in works.log._silent:
            works.log.speak("b")
        assert works.supervisor._fetcher._away == {}


@pytest.mark.parametrize("how", ["gone", "silent"])
async def test_an_outage_of_a_shard_ends_its_runs_and_readers_alone(autojump_clock: MockClock, how: str) -> None:
    async with house("a", "b") as works:
        async with readers(*((works.supervisor, run_id) for run_id in ("on-a", "on-b"))) as (stays, goes):
            works.log.silence("b") if how == "silent" else works.log.gone.add("b")
            began = trio.current_time()
            await trio.sleep(TOO_LATE)
            assert isinstance(goes.error, ReaderReleased)
            assert (goes.ended_at or 0) - began >= LIMIT
            assert not works.lives("on-b")
            seen = len(stays.entries)
            await trio.sleep(10)
            assert len(stays.entries) >= seen + 18
            with pytest.raises(LogUnavailable):
                async with works.supervisor.follow("on-b"):
                    pass
            works.log.speak("b") if how == "silent" else works.log.gone.remove("b")
            await trio.sleep(BACK)
            works.log.where["again"] = "b"
            await works.supervisor.start(count, 5, run_id="again")
            async with readers((works.supervisor, "again")) as (again,):
                pass
            assert gists(again.entries) == ["1", "2", "3", "4", "5", "[DONE]"]
            stays.leave()
        assert stays.error is None
        assert works.lives("on-a")
        assert (await ended(works.log, "again")).status == "completed"


async def test_an_outage_lasts_from_the_first_shard_away_to_the_last_one_back(autojump_clock: MockClock) -> None:
    async with house("a", "b", "c", outage_limit=3_600.0) as works:
        began = trio.current_time()
        works.log.gone.add("a")
        await trio.sleep(10)
        works.log.gone.add("b")
        await trio.sleep(10)
        works.log.gone.remove("a")
        await trio.sleep(10)
        assert [what for what, _ in works.outages.told] == ["began"]
        works.log.gone.add("a")
        await trio.sleep(10)
        works.log.gone.clear()
        await trio.sleep(BACK)
        (first, at), (last, seconds) = works.outages.told
        assert (first, last) == ("began", "ended")
        assert at - began <= REAP_INTERVAL
        assert 39 <= seconds <= 40 + BACK
        works.log.gone.add("c")
        await trio.sleep(10)
        works.log.gone.clear()
        await trio.sleep(BACK)
        assert [what for what, _ in works.outages.told] == ["began", "ended"] * 2


async def test_a_run_whose_part_is_away_for_less_than_the_limit_loses_nothing(autojump_clock: MockClock) -> None:
    async with house("a", "b") as works, readers(*((works.supervisor, run) for run in ("on-a", "on-b"))) as both:
        for shard in ("a", "b", "a"):
            works.log.gone.add(shard)
            await trio.sleep(LIMIT / 2)
            works.log.gone.remove(shard)
            await trio.sleep(BACK)
        for run_id in ("on-a", "on-b"):
            await works.supervisor.cancel(run_id)
        await trio.sleep(BACK)
        assert [reader.error for reader in both] == [None, None]
        for reader, run_id in zip(both, ("on-a", "on-b"), strict=True):
            run = await ended(works.log, run_id)
            assert [entry.seq for entry in reader.entries] == [*range(1, run.seq + 1)]
