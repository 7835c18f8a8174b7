"""Readers of runs that live elsewhere, in a test: a real fetcher and real tails on a log that can fail."""

from __future__ import annotations

from contextlib import asynccontextmanager
from types import coroutine
from typing import TYPE_CHECKING, Any, TypeVar

import trio

from penstock.log import AppendStatus, Notification
from penstock.observer import NullObserver
from penstock.sse import Decoder
from penstock.supervisor.fetcher import Fetcher
from penstock.supervisor.follower import Follower, Readers
from penstock.supervisor.settings import Settings
from penstock.supervisor.tail import Tails
from tests.support.logs import LEASE, Unreliable, batch, record

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Generator

    from penstock.log import Notifications
    from penstock.runs import Ending

T = TypeVar("T")


class Lossy:
    """Wake-ups of which some are lost, as with a connection."""

    def __init__(self, wakeups: Notifications) -> None:
        self.wakeups = wakeups
        self.deaf = False
        """What is told now is lost."""
        self.subscribed: set[str] = set()

    async def subscribe(self, run_id: str) -> None:
        self.subscribed.add(run_id)
        await self.wakeups.subscribe(run_id)

    def unsubscribe(self, run_id: str) -> None:
        self.subscribed.discard(run_id)
        self.wakeups.unsubscribe(run_id)

    async def wait(self) -> Notification:
        while True:
            told = await self.wakeups.wait()
            if not self.deaf:
                return told


class Reading(NullObserver):
    def __init__(self, log: Unreliable, tails: Tails, spacing: float) -> None:
        self.log = log
        self.tails = tails
        self.warnings: list[str] = []
        self.wakeups: Lossy
        self.readers = Readers(most=10_000, most_of_a_run=10_000)
        self.fetcher = Fetcher(log, tails, Settings(commit_spacing=spacing), self)

    def warning(self, message: str) -> None:
        self.warnings.append(message)

    async def dispatch(self) -> None:
        while True:
            self.fetcher.moved((await self.wakeups.wait()).moved)

    async def run(self, last: int = 0, ending: Ending | None = None, *, run_id: str = "r", size: int = 0) -> None:
        await self.log.start(record(run_id), LEASE)
        if last:
            await self.append(1, last, ending, run_id=run_id, size=size)

    async def append(
        self, first: int, last: int, ending: Ending | None = None, *, run_id: str = "r", size: int = 0
    ) -> None:
        """What another process appends, whatever this one's connection is like."""
        replies = await super(Unreliable, self.log).append([batch(first, last, ending, run_id=run_id, size=size)])
        assert replies[0].status is AppendStatus.OK

    def follow(self, after: int = 0, *, run_id: str = "r", last: int | None = None) -> Follower:
        return Follower(self.fetcher, run_id, readers=self.readers, after=after, last=last)

    def left_behind(self) -> list[Any]:
        inner: Any = self.wakeups.wakeups
        return [*self.tails.all(), *self.wakeups.subscribed, *inner._subscribed, *inner._moved]


@asynccontextmanager
async def reading(
    log: Unreliable | None = None, *, tail_entries: int = 1000, tail_bytes: int = 256 * 1024, spacing: float = 0.002
) -> AsyncIterator[Reading]:
    """A process that reads, as long as the block; at its end no reader has left anything behind."""
    tails = Tails(max_entries=tail_entries, max_bytes=tail_bytes, max_process_bytes=256 * 1024 * 1024)
    works = Reading(Unreliable() if log is None else log, tails, spacing)
    async with works.log.wakeups("reader") as wakeups, trio.open_nursery() as nursery:
        works.wakeups = Lossy(wakeups)
        works.fetcher.connect(works.wakeups)
        nursery.start_soon(works.fetcher.shards.run)
        nursery.start_soon(works.dispatch)
        yield works
        assert works.left_behind() == []
        assert tails.size == 0
        nursery.cancel_scope.cancel()


def seqs_of(body: bytes) -> list[int]:
    """The seqs of the entries in a body, which must all be whole."""
    assert not body or body.endswith(b"\n\n")
    messages = Decoder().feed(body)
    assert [message.data.partition(".")[0] for message in messages] == [
        f"entry {message.last_event_id}" for message in messages
    ]
    return [int(message.last_event_id) for message in messages]


async def read_to_the_end(follower: Follower, limit: int | None = None, seen: list[int] | None = None) -> list[int]:
    """All that a follower which has been entered hands over, entry by entry or in bodies; added to `seen`."""
    seen = [] if seen is None else seen
    if limit is None:
        async for entry in follower:
            seen.append(entry.seq)
            assert follower.cursor == entry.seq
        return seen
    while body := await follower.next_body(limit):
        seen += seqs_of(body)
        assert follower.cursor == seen[-1]
    return seen


@coroutine
def cancelling_at(step: int, scope: trio.CancelScope, awaitable: Awaitable[T]) -> Generator[Any, Any, T]:
    """Await something, and cancel `scope` as it waits for the `step`-th time."""
    inner: Any = awaitable.__await__()
    resume, value = inner.send, None
    for number in range(1_000_000):
        try:
            trap = resume(value)
        except StopIteration as stop:
            return stop.value  # type: ignore[no-any-return]
        if number == step:
            scope.cancel()
        try:
            resume, value = inner.send, (yield trap)
        except BaseException as error:  # noqa: ASYNC103, BLE001  (it goes on to whom it is meant for)
            resume, value = inner.throw, error
    raise AssertionError("never ends")
