"""Random operations on an event log beside the plainest model of one.

Another log gets the same treatment by deriving from `LogMachine` and saying how it is opened and how its time passes;
what is left of the model between two steps is all in the log, which is opened anew for every step.

Time passes in steps of 8 s, and what runs out does so at least 3 s before or after the end of a step: so much may a
real server be ahead of the model.
"""

from __future__ import annotations

import math
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import pytest
import trio
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from trio.testing import MockClock

from penstock.errors import IdempotencyConflict, RunExists, RunNotFound
from penstock.log import Appended, AppendStatus, CancelStatus, Idempotency, Lease, Notifications, Page
from penstock.log.memory import MemoryLog
from penstock.runs import Ending, RunStatus
from tests.support.examples import examples
from tests.support.logs import CANCELLED, COMPLETED, FAILED, LOST_ENDING, batch, record, seqs

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from trio.abc import Clock

    from penstock.log import EventLog

RUN_IDS = ["a", "b", "c"]
EPOCHS = ["mine", "yours"]
MAX_ENTRIES = 12
TTL = 60.0
LEASE = 12.0
SHORTER, LONGER = 4.0, 101.0
"""Other leases: one that is over after one step of time, and one of which four are more than the TTL."""
STOPPED = replace(CANCELLED, cancel_reason=None)

run_ids = st.sampled_from(RUN_IDS)
epochs = st.sampled_from(EPOCHS)


@dataclass
class Model:
    owner: str
    """The epoch under which it was started."""
    lease: float
    lease_end: float
    kept_until: float
    key: tuple[str, str] | None = None
    first: int = 1
    """What is before that is lost, however few entries there are."""
    last: int = 0
    ending: Ending | None = None
    cancel_requested: bool = False
    words: str | None = None
    reaped: bool = False

    @property
    def epoch(self) -> str | None:
        return None if self.reaped else self.owner

    @property
    def status(self) -> RunStatus:
        return RunStatus.RUNNING if self.ending is None else self.ending.status


@dataclass
class World:
    runs: dict[str, Model] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)


class LogMachine(RuleBasedStateMachine):
    """The machine for a MemoryLog that keeps few entries."""

    def __init__(self) -> None:
        super().__init__()
        self.world = World()
        self.clock: Clock | None = None
        self.now = 0.0
        self.memory: MemoryLog | None = None
        self.listed: dict[str, tuple[int, RunStatus]] | None = None
        """What the log must list when the next step begins."""

    # What another log overrides

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[EventLog]:
        if self.memory is None:
            self.memory = MemoryLog(max_entries=MAX_ENTRIES, ttl=TTL)
        yield self.memory

    def make_clock(self) -> Clock | None:
        return MockClock(autojump_threshold=0)

    async def elapse(self, seconds: float) -> None:
        await trio.sleep(seconds)

    def empty(self) -> None:
        self.memory = None

    def oldest(self, model: Model) -> range:
        """What the oldest seq may be."""
        oldest = max(model.first, model.last - MAX_ENTRIES + 1)
        return range(oldest, oldest + 1)

    def kept_until(self, lease: float) -> float:  # noqa: ARG002  (memory keeps it for ever)
        """How long a run is kept that goes on under this lease, if nothing is heard of it from now on."""
        return math.inf

    def lease_renewed(self, model: Model, seconds: float) -> None:
        """A renewal is for so long; what an append is worth is another matter."""

    def stands_at(self, model: Model) -> int:
        """How far the log goes, as `restore` sees it."""
        return model.last

    # How a step is taken

    def step(self, action: Callable[[EventLog], Awaitable[None]]) -> None:
        listed, self.listed = self.listed, None

        async def main() -> None:
            async with self.opened() as log:
                if listed is not None:
                    assert {run.id: (run.seq, run.status) for run in await log.list(limit=1_000)} == listed
                await action(log)

        trio.run(main, clock=self.clock)

    def expire(self) -> None:
        for run_id, model in list(self.world.runs.items()):
            if model.kept_until <= self.now:
                del self.world.runs[run_id]
                if model.key is not None:
                    del self.world.keys[model.key[0]]
        self.listed = {run_id: (model.last, model.status) for run_id, model in self.world.runs.items()}

    # The rules

    @initialize(there=st.lists(run_ids, unique=True))
    def begin(self, there: list[str]) -> None:
        self.clock = self.make_clock()
        self.empty()
        for run_id in there:
            self.start(run_id, "mine", None, "x")

    @rule(run_id=run_ids, epoch=epochs, key=st.sampled_from([None, "k1", "k2"]), asked=st.sampled_from(["x", "x", "y"]))
    def start(self, run_id: str, epoch: str, key: str | None, asked: str) -> None:
        self.expire()
        runs, keys = self.world.runs, self.world.keys
        idempotency = None if key is None else Idempotency(key, asked)
        if run_id in runs or key in keys:
            epoch = "another's"  # no two starts share a token: the same one is the same start, sent again

        async def action(log: EventLog) -> None:
            started = log.start(record(run_id), Lease("owner", epoch, LEASE), idempotency)
            if key in keys:
                known = runs[keys[key]].key
                if known != (key, asked):
                    with pytest.raises(IdempotencyConflict):
                        await started
                else:
                    assert (await started).run == await log.get(keys[key])
            elif run_id in runs:
                with pytest.raises(RunExists):
                    await started
            else:
                assert (await started).created
                runs[run_id] = self.started(epoch)
                runs[run_id].key = None if key is None else (key, asked)
                if key is not None:
                    keys[key] = run_id

        self.step(action)

    def started(self, epoch: str) -> Model:
        return Model(epoch, LEASE, self.now + LEASE, self.kept_until(LEASE))

    @rule(
        run_id=run_ids,
        epoch=st.sampled_from(["", "", "", "other"]),
        back=st.integers(-1, 4),
        count=st.integers(1, 6),
        ending=st.sampled_from([None, None, None, COMPLETED, FAILED, STOPPED]),
        twice=st.booleans(),
    )
    def append(self, run_id: str, epoch: str, back: int, count: int, ending: Ending | None, twice: bool) -> None:
        self.expire()
        model = self.world.runs.get(run_id)
        last = 0 if model is None else model.last
        first = max(last + 1 - back, 1)
        shown = epoch or ("mine" if model is None else model.owner)
        upto = first + count - 1
        if ending is not None and (model is None or model.ending is None):
            upto = max(upto, last + 1)  # a terminal entry is new, or the run would have ended
        what = batch(first, upto, ending, run_id=run_id, epoch=shown)

        async def action(log: EventLog) -> None:
            for _ in range(1 + twice):
                (reply,) = await log.append([what])
                self.compare(reply, self.appended(model, shown, first, upto, ending))

        self.step(action)

    @rule(
        order=st.permutations([(run_id, mine) for run_id in RUN_IDS for mine in (True, False)]), count=st.integers(1, 9)
    )
    def second_owner(self, order: list[tuple[str, bool]], count: int) -> None:
        """In one call with what the owners append, somebody else appends to the same runs."""
        self.expire()
        batches, expected = [], []
        for run_id, mine in order:
            model = self.world.runs.get(run_id)
            epoch = model.owner if model is not None and mine else "usurper"
            first = 1 if model is None else model.last + 1
            batches.append(batch(first, first + count - 1, run_id=run_id, epoch=epoch))
            expected.append(self.appended(model, epoch, first, first + count - 1, None))

        async def action(log: EventLog) -> None:
            for reply, each in zip(await log.append(batches), expected, strict=True):
                self.compare(reply, each)

        self.step(action)

    def compare(self, reply: Appended, expected: Appended) -> None:
        if expected.status in {AppendStatus.GONE, AppendStatus.FENCED}:
            expected = replace(reply, status=expected.status)  # all else is said "as far as the reply knows"
        assert reply == expected

    def appended(self, model: Model | None, epoch: str, first: int, last: int, ending: Ending | None) -> Appended:
        """What the reply must be; the model is changed by it."""
        if model is None:
            return Appended(AppendStatus.GONE)
        if model.epoch != epoch:
            status = AppendStatus.FENCED
        elif model.ending is not None:
            status = AppendStatus.OK if last <= model.last else AppendStatus.ENDED
        elif first > model.last + 1:
            status = AppendStatus.HOLE
        elif ending is COMPLETED and model.cancel_requested:
            status = AppendStatus.CANCELLED
        else:
            status = AppendStatus.OK
            model.last = max(model.last, last)
            model.lease_end = self.now + model.lease
            model.kept_until = self.kept_until(model.lease)
            if ending is not None:
                self.end(model, ending)
        words = model.words if model.cancel_requested else None
        return Appended(status, model.last, cancelled=model.cancel_requested, cancel=words)

    def end(self, model: Model, ending: Ending) -> None:
        model.ending, model.kept_until = ending, self.now + TTL

    @rule(run_id=run_ids, words=st.sampled_from(["why", None]))
    def cancel(self, run_id: str, words: str | None) -> None:
        self.expire()
        model = self.world.runs.get(run_id)

        async def action(log: EventLog) -> None:
            if model is None:
                with pytest.raises(RunNotFound):
                    await log.request_cancel(run_id, words)
                return
            async with log.wakeups("owner") as wakeups:
                reply = await log.request_cancel(run_id, words)
                told = reply.status is not CancelStatus.ENDED
                if model.ending is not None:
                    assert reply.status is CancelStatus.ENDED
                elif model.cancel_requested:
                    assert reply.status is CancelStatus.REPEATED
                else:
                    assert reply.status is CancelStatus.REQUESTED
                    model.cancel_requested, model.words = True, words
                    model.kept_until = self.kept_until(model.lease)
                    with trio.fail_after(5):
                        assert (await wakeups.wait()).cancel
                    assert dict(await log.cancel_requests("owner")) == {run_id: words}
                requests = dict(await log.cancel_requests("owner"))
                # a repeated request may be handed over again, since the first may have been lost on its way
                assert requests in ([{}, {run_id: model.words}] if told else [{}])
                assert dict(await log.cancel_requests("owner")) == {}

        self.step(action)

    @rule(run_id=run_ids, epoch=epochs, seconds=st.sampled_from([SHORTER, LEASE, LONGER]))
    def renew(self, run_id: str, epoch: str, seconds: float) -> None:
        self.expire()
        model = self.world.runs.get(run_id)
        if model is None:
            expected = AppendStatus.GONE
        elif model.epoch != epoch:
            expected = AppendStatus.FENCED
        elif model.ending is not None:
            expected = AppendStatus.ENDED
        else:
            expected = AppendStatus.OK
            model.lease_end = self.now + seconds
            model.kept_until = self.kept_until(seconds)
            self.lease_renewed(model, seconds)

        async def action(log: EventLog) -> None:
            assert dict(await log.renew("owner", {run_id: epoch}, seconds)) == {run_id: expected}

        self.step(action)

    @rule(run_id=run_ids, epoch=st.sampled_from(["", "", "mine", "yours"]), beyond=st.integers(-6, 6))
    def restore(self, run_id: str, epoch: str, beyond: int) -> None:
        """An owner puts back what is lost or what it takes for lost, from its oldest entry on."""
        self.expire()
        model = self.world.runs.get(run_id)
        shown = epoch or ("mine" if model is None else model.owner)
        oldest = max(1, (0 if model is None else model.last) + 1 + beyond)
        if model is not None and (model.epoch != shown or model.ending is not None):
            status = AppendStatus.FENCED if model.epoch != shown else AppendStatus.ENDED
        else:
            if model is None:
                model = self.world.runs[run_id] = self.started(shown)
            status = AppendStatus.OK
            if (last := self.stands_at(model)) < oldest - 1:
                status = AppendStatus.HOLE
                last = oldest - 1
            if last < model.last or status is AppendStatus.HOLE:
                model.first, model.last = last + 1, last
            model.lease_end = self.now + LEASE
            model.kept_until = self.kept_until(LEASE)
        expected = Appended(status, model.last)

        async def action(log: EventLog) -> None:
            self.compare(await log.restore(record(run_id), Lease("owner", shown, LEASE), oldest), expected)

        self.step(action)

    @precondition(lambda self: self.world.runs)
    @rule()
    def all_is_lost(self) -> None:
        self.empty()
        self.world = World()
        self.listed = None

    @rule(seconds=st.sampled_from([8.0, 8.0, 64.0]))
    def time_passes(self, seconds: float) -> None:
        async def action(log: EventLog) -> None:
            await self.elapse(seconds)

        self.step(action)
        self.now += seconds

    @rule(seconds=st.sampled_from([0.0, 8.0, 16.0]))
    def reap(self, seconds: float) -> None:
        if seconds:
            self.time_passes(seconds)
        self.expire()
        dead = {
            run_id for run_id, model in self.world.runs.items() if model.ending is None and model.lease_end < self.now
        }

        async def action(log: EventLog) -> None:
            assert set(await log.reap(lambda: LOST_ENDING)) == dead

        self.step(action)
        for run_id in dead:
            model = self.world.runs[run_id]
            model.reaped = True
            model.last += len(LOST_ENDING.blocks)
            self.end(model, LOST_ENDING.ending)

    @rule(run_id=run_ids, after=st.integers(0, 30), limit=st.integers(1, 8), by_fetch=st.booleans())
    def read(self, run_id: str, after: int, limit: int, by_fetch: bool) -> None:
        self.expire()
        model = self.world.runs.get(run_id)

        async def action(log: EventLog) -> None:
            if by_fetch:
                page = (await log.fetch({run_id: after}))[run_id]
                assert (page is None) == (model is None)
            elif model is None:
                with pytest.raises(RunNotFound):
                    await log.read(run_id, after)
                return
            else:
                page = await log.read(run_id, after, max_entries=limit)
            if page is not None and model is not None:
                self.check(page, model, after, 1_000 if by_fetch else limit)

        self.step(action)

    @rule(run_id=run_ids, after=st.integers(0, 30), limit=st.integers(2, 8), size=st.sampled_from([1, 60, 10_000]))
    def resume(self, run_id: str, after: int, limit: int, size: int) -> None:
        """Read on from a cursor until there is no more, page by page."""
        self.expire()
        model = self.world.runs.get(run_id)

        async def action(log: EventLog) -> None:
            if model is None:
                return
            page = await log.read(run_id, after, max_entries=limit, max_bytes=size)
            assert page.oldest_seq in self.oldest_after(model, after)
            seen = list(page.entries)
            while page.entries:
                page = await log.read(run_id, seen[-1].seq, max_entries=limit, max_bytes=size)
                assert page.oldest_seq == seen[-1].seq + 1
                seen += page.entries
            assert seqs(seen) == list(range(max(after + 1, model.last + 1 - len(seen)), model.last + 1))
            assert not seen or seen[0].seq in self.oldest_after(model, after)
            assert bool(seen) == (after < model.last and model.first <= model.last)

        self.step(action)

    def oldest_after(self, model: Model, after: int) -> list[int]:
        return [max(each, min(after, model.last) + 1) for each in self.oldest(model)]

    def check(self, page: Page, model: Model, after: int, limit: int) -> None:
        run = page.run
        assert (run.seq, run.status, run.stop_reason) == (
            model.last,
            model.status,
            None if model.ending is None else model.ending.stop_reason,
        )
        assert (run.ended_at is None) == (model.ending is None)
        assert run.cancel_reason == model.words
        assert page.oldest_seq in self.oldest_after(model, after)
        start = max(after + 1, page.oldest_seq)
        assert seqs(page.entries) == list(range(start, min(model.last, start + limit - 1) + 1))
        assert [each.seq for each in page.entries if each.terminal] == [
            each.seq for each in page.entries if model.ending is not None and each.seq == model.last
        ]

    @precondition(lambda self: self.world.runs)
    @rule(data=st.data())
    def a_subscriber_is_told_of_what_comes_after(self, data: st.DataObject) -> None:
        self.expire()
        running = [run_id for run_id, model in self.world.runs.items() if model.ending is None]
        if not running:
            return
        run_id = data.draw(st.sampled_from(running))
        model = self.world.runs[run_id]

        async def told(wakeups: Notifications) -> Mapping[str, int]:
            with trio.fail_after(5):
                return (await wakeups.wait()).moved

        async def action(log: EventLog) -> None:
            async with log.wakeups("reader") as wakeups:
                await wakeups.subscribe(run_id)
                await log.append([batch(model.last + 1, model.last + 2, run_id=run_id, epoch=model.owner)])
                assert dict(await told(wakeups)) == {run_id: model.last + 2}

        self.step(action)
        self.appended(model, model.owner, model.last + 1, model.last + 2, None)

    def teardown(self) -> None:
        if self.world.runs:
            self.resume("a", 0, 8, 60)


LogMachine.TestCase.settings = settings(max_examples=examples(60), stateful_step_count=40)
TestMemoryLog = LogMachine.TestCase
