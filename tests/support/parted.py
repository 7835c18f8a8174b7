"""A log of several parts in memory, each of which can be out of reach, for tests of what a part may hold up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from penstock.errors import LogUnavailable
from penstock.log import Appended, AppendStatus
from tests.support.logs import Unreliable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from penstock.log import Batch, Lease, LostEnding, Page
    from penstock.runs import Run

ANSWER_TIMEOUT = 5.0
"""After so many seconds a part that is silent counts as out of reach."""


class Parted(Unreliable):
    """An unreliable log of several shards with these names."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = [*names]
        """The parts that there are."""
        self.where: dict[str, str] = {}
        """The parts of the runs; what is not named is on the first."""
        self.gone: set[str] = set()
        """The parts that cannot be reached: every call says so at once."""
        self.full: set[str] = set()
        """The runs for which there is no room, but for their ends."""
        self.asked: list[tuple[float, str, str]] = []
        """When each part was asked, and what."""
        self.renewed: list[tuple[float, list[str]]] = []
        """When leases were renewed, and of which runs."""
        self._silent: dict[str, trio.Event] = {}

    def shard(self, run_id: str) -> str:
        return self.where.get(run_id, self.names[0])

    def shards(self) -> Sequence[str]:
        return [*self.names]

    def silence(self, shard: str) -> None:
        self._silent[shard] = trio.Event()

    def speak(self, shard: str) -> None:
        """The part answers again, what it has been asked meanwhile as well."""
        self._silent.pop(shard).set()

    async def _reach(self, call: str, *shards: str) -> set[str]:
        """Wait for those that are silent, so long; which cannot be reached, if others can."""
        self.asked += [(trio.current_time(), call, shard) for shard in dict.fromkeys(shards)]
        for shard in shards:
            if shard in self._silent:
                with trio.move_on_after(ANSWER_TIMEOUT) as waiting:
                    await self._silent[shard].wait()
                if waiting.cancelled_caught:
                    raise LogUnavailable(f"part {shard} has not answered")
        gone = self.gone & {*shards}
        if gone and gone == {*shards}:
            await trio.lowlevel.checkpoint()
            raise LogUnavailable(f"part {', '.join(sorted(gone))} is away")
        return gone

    async def append(self, batches: Sequence[Batch]) -> Sequence[Appended]:
        await self._arrive("append")
        gone = await self._reach("append", *[self.shard(batch.run_id) for batch in batches])
        away = {batch.run_id for batch in batches if self.shard(batch.run_id) in gone}
        replies = iter(await super().append([batch for batch in batches if batch.run_id not in away]))
        words = "the part is away"
        return [
            Appended(AppendStatus.AWAY, words=words) if batch.run_id in away else next(replies) for batch in batches
        ]

    def _append(self, batch: Batch) -> Appended:
        if batch.run_id in self.full and not batch.final:
            return Appended(AppendStatus.FULL, words="no room")
        return super()._append(batch)

    async def read(self, run_id: str, after: int, **limits: int) -> Page:
        await self._reach("read", self.shard(run_id))
        return await super().read(run_id, after, **limits)

    async def get(self, run_id: str) -> Run:
        await self._reach("get", self.shard(run_id))
        return await super().get(run_id)

    async def fetch(self, positions: Mapping[str, int]) -> Mapping[str, Page | None]:
        await self._arrive("fetch")
        gone = await self._reach("fetch", *map(self.shard, positions))
        return await super().fetch({each: after for each, after in positions.items() if self.shard(each) not in gone})

    async def restore(self, run: Run, lease: Lease, oldest: int) -> Appended:
        await self._reach("restore", self.shard(run.id))
        return await super().restore(run, lease, oldest)

    async def renew(self, owner: str, epochs: Mapping[str, str], seconds: float) -> Mapping[str, AppendStatus]:
        if epochs:
            self.renewed.append((trio.current_time(), sorted(epochs)))
        gone = await self._reach("renew", *map(self.shard, epochs))
        there = {each: epoch for each, epoch in epochs.items() if self.shard(each) not in gone}
        return await super().renew(owner, there, seconds)

    async def reap(
        self, lost_ending: Callable[[], LostEnding], *, shard: str | None = None, **where: Any
    ) -> Sequence[str]:
        await self.check(shard)
        if self.gone or self._silent:
            return []  # it would be the runs of all parts
        return await super().reap(lost_ending, **where)

    async def check(self, shard: str | None = None) -> None:
        await self._reach("check", *(self.names if shard is None else [shard]))
        await super().check()
