"""Callbacks at a time: one task for all deadlines of all runs, and for the pings of their readers (`asgi/sender.py`).

A run's deadlines each record a cause before they cancel, which the deadline of a cancel scope cannot do, and a sleeping
task for each would double the number of tasks. A timer that is cancelled lets go of its callback at once, and the heap
is swept when more than half of it is cancelled, so that nothing of an ended run stays here for long.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import Callable

SWEEP_AT_LEAST: Final = 64  # with no more cancelled timers than this, a sweep costs more than it frees


@dataclass(slots=True, order=True)
class Timer:
    """A callback at a time of Trio's clock, in seconds."""

    when: float
    callback: Callable[[], None] | None = field(compare=False)
    timers: Timers = field(compare=False, repr=False)

    def cancel(self) -> None:
        """Do not call back. Does nothing after the callback."""
        if self.callback is not None:
            self.callback = None
            self.timers.sweep()


class Timers:
    """Calls back, synchronously, at given times of Trio's clock."""

    def __init__(self) -> None:
        self._heap: list[Timer] = []
        self._cancelled = 0
        self._sooner = trio.Event()

    def at(self, when: float, callback: Callable[[], None]) -> Timer:
        timer = Timer(when, callback, self)
        heapq.heappush(self._heap, timer)
        if self._heap[0] is timer:
            self._sooner.set()
        return timer

    def sweep(self) -> None:
        """Count one more cancelled timer, and drop all of them once they are more than half."""
        self._cancelled += 1
        if self._cancelled > max(len(self._heap) // 2, SWEEP_AT_LEAST):
            self._heap = [timer for timer in self._heap if timer.callback is not None]
            heapq.heapify(self._heap)
            self._cancelled = 0

    async def run(self) -> None:
        while True:
            self._sooner = trio.Event()
            with trio.move_on_at(self._heap[0].when if self._heap else inf):
                await self._sooner.wait()
            now = trio.current_time()
            while self._heap and self._heap[0].when <= now:
                self._fire(heapq.heappop(self._heap))

    def _fire(self, timer: Timer) -> None:
        callback, timer.callback = timer.callback, None
        if callback is None:
            self._cancelled -= 1
        else:
            callback()
