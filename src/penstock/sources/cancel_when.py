"""`cancel_when`: cut a block short when something, somewhere, says so.

    nursery ┬─ the block
            └─ the watch:  poll ──▶ yes: record the reason, then cancel the nursery
                             ▲   └─▶ no, or the poll failed: wait, or until `wake()`
                             └───────────────┘

The watch polls in a task of its own, so a slow poll delays no chunk, and a block that waits for something is cut short
as well as one that is busy. What happened is recorded before anything is cancelled and never deduced afterwards:

| the block | and a cancel was asked for | leaves |
|---|---|---|
| ends by itself, returning or raising | whether or not | as it ended |
| is left by `Cancelled` | yes | `RunCancelled` |
| is left by `Cancelled` | but it came from outside, too | `Cancelled` |

Once the block has ended, an answer that is still under way is not taken any more. A poll that fails never cancels.
"""

from __future__ import annotations

import inspect
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import trio

from penstock.errors import ConfigurationError, RunCancelled
from penstock.exception_groups import is_cancellation, raise_single
from penstock.observer import Observer, notify
from penstock.observer.logging import LoggingObserver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MAX_BACKOFF: Final = 10.0
"""The longest pause, in seconds, after polls that failed (an `interval` that is longer still stays as it is)."""


class CancelWatch:
    """What a `cancel_when` block knows of itself.

    Attributes:
        requested: a cancel was asked for while the block was running.
        reason: the words that came with it, if any.
    """

    def __init__(
        self, is_cancelled: Callable[[], Any], interval: float, run_id: str | None, observer: Observer
    ) -> None:
        self.requested = False
        self.reason: str | None = None
        self._is_cancelled = is_cancelled
        self._interval = interval
        self._run_id = run_id
        self._observer = observer
        self._ended = False
        self._woken = trio.Event()
        self._polling = trio.CancelScope()

    def wake(self) -> None:
        """Poll now, or again if a poll is under way. Not a checkpoint; to be called in Trio's thread."""
        self._woken.set()

    async def run(self, block: trio.CancelScope) -> None:
        """Poll until a cancel is asked for or the block ends, and in the first case cancel it."""
        failures = 0
        with self._polling:
            while True:
                self._woken = trio.Event()  # before the poll: a wake-up during it asks for another
                pause = self._interval
                try:
                    answer = self._is_cancelled()
                    if inspect.isawaitable(answer):
                        answer = await answer
                except (Exception, BaseExceptionGroup) as error:
                    if not _is_failure(error):
                        raise
                    failures += 1
                    pause = max(min(self._interval * 2**failures, MAX_BACKOFF), self._interval)
                    self._warn(error, pause)
                else:
                    failures = 0
                    if answer and not self._ended:
                        self._cancel(answer, block)  # this task, too: it ends with its next step
                with trio.move_on_after(pause):
                    await self._woken.wait()

    def end(self) -> None:
        """The block has ended: nothing is recorded any more."""
        self._ended = True
        self._polling.cancel(reason="the cancel_when block has ended")

    def _cancel(self, answer: object, block: trio.CancelScope) -> None:
        self.requested = True
        self.reason = answer if isinstance(answer, str) else None
        block.cancel(reason="run cancelled" if self.reason is None else f"run cancelled: {self.reason}")

    def _warn(self, error: BaseException, pause: float) -> None:
        if self._ended:
            return
        of = "" if self._run_id is None else f" of run {self._run_id}"
        notify(self._observer.warning, f"looking for a cancel{of} failed, next try in {pause:g} s: {error!r}")


def _is_failure(error: BaseException) -> bool:
    """Whether a poll just failed; perhaps while it was being cancelled, which the watch then notices by itself."""
    return not isinstance(error, BaseExceptionGroup) or error.split((Exception, trio.Cancelled))[1] is None


@asynccontextmanager
async def cancel_when(
    is_cancelled: Callable[[], Any],
    interval: float = 0.5,
    *,
    run_id: str | None = None,
    observer: Observer | None = None,
) -> AsyncIterator[CancelWatch]:
    """Cancel the block as soon as `is_cancelled()` says so, and then raise `RunCancelled`.

    An async context manager that hands out a `Watch`. Asks at once, in a background task, and then `interval` seconds
    after each answer. A question that fails is a warning, and is put again after twice the pause, up to `MAX_BACKOFF`.
    Leaving the block cancels a question that is still open and waits for that.

    A cancellation from outside passes through as it is. A block that catches `Cancelled` and ends all the same has
    ended by itself.

    Args:
        is_cancelled: takes no arguments; async or not. It returns something false, or True, or the reason as a str.
        interval: seconds of Trio's clock; more than 0.
        run_id: for `RunCancelled` and for warnings.
        observer: is told of questions that fail; the default writes to the logger `penstock`.

    Raises:
        ConfigurationError: the interval is not above 0.
        RunCancelled: a cancel was asked for, and cut the block short.
        Exception: what the block raised, bare.
    """
    if not interval > 0:
        raise ConfigurationError(f"interval is a number of seconds above 0, not {interval!r}")
    watch = CancelWatch(is_cancelled, interval, run_id, LoggingObserver() if observer is None else observer)
    cut_short = False
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch.run, nursery.cancel_scope)
            try:
                yield watch
            except BaseException as error:
                cut_short = is_cancellation(error, trio.Cancelled)
                raise
            finally:
                watch.end()
    except BaseExceptionGroup as group:
        raise_single(group, trio.Cancelled)
    # Only a cancellation that came from nowhere but here has been caught by the nursery, and gets to this line.
    if cut_short and watch.requested:
        raise RunCancelled(run_id, watch.reason)
