"""The committer: group commit on the way in, for all runs of a process.

A log may have parts that can be out of reach each on its own, the nodes of a cluster. Each has a lane here, which is a
task: whoever waits for a part that is away waits in its lane alone. A log of one part has one lane (`lane.py`).

Memory is bounded by `max_pending_bytes` for a run and `max_process_pending_bytes` for all, of which each lane has its
share: beyond them `room()` waits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

from penstock.errors import RunEnded
from penstock.lane import Commits, Lane

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from penstock.log import EventLog
    from penstock.observer import Commit
    from penstock.outbox import Outbox
    from penstock.runs import Ending


class Committer:
    """Commits what is pending in all outboxes of a process.

    Args:
        log: where it goes.
        flush_interval: how long a commit waits for more entries to join it, in seconds.
        flush_size: the number of pending entries of one run that ends that wait.
        spacing: how long a commit is held back after the start of a large one, in seconds; after a small one, less.
        max_pending_bytes: what one run may have pending before `room()` waits.
        max_process_pending_bytes: the same for all runs together.
        on_warning: told when the log cannot be reached.
        on_commit: told of what the log has acknowledged.
    """

    def __init__(
        self,
        log: EventLog,
        *,
        flush_interval: float,
        flush_size: int,
        spacing: float,
        max_pending_bytes: int,
        max_process_pending_bytes: int,
        on_warning: Callable[[str], None],
        on_commit: Callable[[Commit], None],
    ) -> None:
        self._log = log
        self._flush_size = flush_size
        self._max_pending = max_pending_bytes
        self._commits = Commits(
            log,
            flush_interval,
            spacing,
            max_pending_bytes,
            max_process_pending_bytes,
            on_warning,
            on_commit,
            self._hand_over,
        )
        self._lanes: dict[str, Lane] = {}
        self._nursery: trio.Nursery | None = None

    @property
    def pending_bytes(self) -> int:
        """The bytes that wait for their acknowledgement, of all runs."""
        return sum(lane.size for lane in self._lanes.values())

    @property
    def waiting(self) -> list[Outbox]:
        """The outboxes of which something is still to be done."""
        return [outbox for lane in self._lanes.values() for outbox in lane.waiting]

    def put(self, outbox: Outbox, blocks: Sequence[bytes]) -> None:
        """Add entries to an outbox, and see to it that they are committed. Synchronous; call `room` before."""
        lane = self._lane(outbox)
        lane.size += outbox.put(blocks)
        lane.mark(outbox, urgent=len(outbox.entries) >= self._flush_size)

    def close(self, outbox: Outbox, blocks: Sequence[bytes], ending: Ending) -> None:
        """Add a run's last entries, which never wait for room, with its ending."""
        lane = self._lane(outbox)
        lane.size += outbox.close(blocks, ending)
        lane.mark(outbox, urgent=True)

    async def flush(self, outbox: Outbox) -> None:
        """Commit what is pending without any linger, and wait until the log has acknowledged it. A checkpoint.

        Raises:
            RunEnded: it never will.
        """
        await trio.lowlevel.checkpoint()
        goal = outbox.seq
        if outbox.entries:
            self._lane(outbox).mark(outbox, urgent=True)
        while outbox.stored < goal:
            if outbox.abandoned:
                raise RunEnded(outbox.run_id)
            await outbox.vacancy.park()

    def abandon(self, outbox: Outbox) -> None:
        """Give the run up: another owner has it."""
        if not outbox.abandoned and not outbox.settled:
            outbox.owner.run_lost()
            self.drop(outbox)

    def drop(self, outbox: Outbox) -> None:
        """Forget what is pending, and take nothing more; its owner knows. Who waits for room goes on."""
        self._lane(outbox).drop(outbox)

    def restore(self, outbox: Outbox) -> None:
        """See to it that the log is given again what it has lost of a run. Synchronous."""
        self._lane(outbox).restore(outbox)

    def is_full(self, outbox: Outbox) -> bool:
        """True if a write to the outbox has to wait."""
        return self._lane(outbox).is_full(outbox)

    async def room(self, outbox: Outbox) -> None:
        """Wait until the outbox takes more. A checkpoint."""
        await trio.lowlevel.checkpoint()
        while (lane := self._lane(outbox)).is_full(outbox):
            lane.hurry()
            await (outbox.vacancy if outbox.size >= self._max_pending else lane.room).park()

    def _lane(self, outbox: Outbox) -> Lane:
        lane = outbox.lane
        if lane is None or lane.closed:
            lane = outbox.lane = self._lane_of(self._log.part(outbox.run_id))
        return lane

    def _lane_of(self, part: str) -> Lane:
        if part not in self._lanes:
            self._close_lanes()
            lane = self._lanes[part] = Lane(part, self._commits)
            if self._nursery is not None and not self._nursery.cancel_scope.cancel_called:
                self._nursery.start_soon(lane.run)
        return self._lanes[part]

    def _close_lanes(self) -> None:
        """Close the lanes of parts that there are no more, once nothing is left in them."""
        parts = self._log.parts()
        for part, lane in [*self._lanes.items()]:
            if part not in parts and lane.idle:
                del self._lanes[part]
                lane.close()

    def _hand_over(self, lane: Lane, outbox: Outbox) -> Lane:
        """The run is on another part now."""
        outbox.lane = other = self._lane_of(self._log.part(outbox.run_id))
        lane.size -= outbox.size
        other.size += outbox.size
        lane.room.unpark_all()
        return other

    async def run(self) -> None:
        """Do it, until cancelled."""
        try:
            async with trio.open_nursery() as self._nursery:
                for lane in self._lanes.values():
                    self._nursery.start_soon(lane.run)
                for part in self._log.parts():
                    self._lane_of(part)
                await trio.sleep_forever()
        finally:
            self._nursery = None
