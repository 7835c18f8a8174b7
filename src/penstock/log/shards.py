"""The shards of a log, and the work that is done for each of them by a task of its own.

A shard that cannot be reached holds up the worker that waits for it, and no other. A worker is made on its first use,
or a second after the log first names its shard; it is closed once the log no longer names the shard and it is idle. A
run may move at any time: a worker hands over what has moved, and `Shards.of` gives the worker that has the run now.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, Final, Generic, TypeVar

import trio

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator

    from penstock.log import EventLog

SHARDS_INTERVAL: Final = 1.0  # seconds between two looks at which shards there are


class ShardWorker(ABC):
    """The work for one shard."""

    def __init__(self, shard: str) -> None:
        self.shard = shard
        self.closed = False
        """True once the shard is gone: a caller that keeps a reference asks `Shards.of` for another worker."""
        self._scope = trio.CancelScope()

    @property
    def idle(self) -> bool:
        """True if nothing is lost when the worker is closed."""
        return True

    @abstractmethod
    async def run(self) -> None:
        """Work until cancelled."""

    @trio.lowlevel.enable_ki_protection
    async def run_until_closed(self) -> None:
        """Run as a task of `Shards`. Ctrl-C goes to the program's own code, never to a worker."""
        with self._scope:
            await self.run()

    def close(self) -> None:
        self.closed = True
        self._scope.cancel(reason=f"the log has no shard {self.shard!r} any more")


W = TypeVar("W", bound=ShardWorker)


class Shards(Generic[W]):
    """One worker, made by `make`, for each shard that the log names."""

    def __init__(self, log: EventLog, make: Callable[[str], W]) -> None:
        self.started = False  # True once `run` has made the first workers: a shard that has none by then is new
        self._log = log
        self._make = make
        self._workers: dict[str, W] = {}
        self._nursery: trio.Nursery | None = None

    def __iter__(self) -> Iterator[W]:
        return iter([*self._workers.values()])

    def of(self, run_id: str) -> W:
        """The worker of the shard that has this run now. Synchronous."""
        return self._worker(self._log.shard(run_id))

    def get(self, shard: str) -> W | None:
        return self._workers.get(shard)

    def start_soon(self, work: Callable[..., Awaitable[object]], *args: Any) -> bool:
        """Start a task beside the workers, which ends with them; False if they are not running."""
        if self._nursery is None:
            return False
        self._nursery.start_soon(work, *args)
        return True

    async def run(self) -> None:
        """Run the workers until cancelled; look once a second for shards that are new or gone."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                for worker in self:
                    self._start(worker)
                while True:
                    self._update()
                    self.started = True
                    await trio.sleep(SHARDS_INTERVAL)
            finally:
                # The nursery is still open, but what is started there now would be cancelled before it has begun.
                self._nursery = None

    def _update(self) -> None:
        shards = self._log.shards()
        for worker in self:
            if worker.shard not in shards and worker.idle:
                del self._workers[worker.shard]
                worker.close()
        for shard in shards:
            self._worker(shard)

    def _worker(self, shard: str) -> W:
        worker = self._workers.get(shard)
        if worker is None:
            worker = self._workers[shard] = self._make(shard)
            self._start(worker)
        return worker

    def _start(self, worker: W) -> None:
        self.start_soon(worker.run_until_closed)
