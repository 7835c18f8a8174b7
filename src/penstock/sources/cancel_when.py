"""`cancel_when`: cancel a block as soon as a function, which is polled, says so.

The watch polls in a task of its own, so a slow poll delays no chunk. It records the request before it cancels:

| the block | requested | leaves |
|---|---|---|
| ends by itself, returning or raising | yes or no | as it ended |
| is left by `Cancelled` | yes | `RunCancelled` |
| is left by `Cancelled`, also from outside | yes or no | `Cancelled` |

The result of a poll that ends after the block is ignored.
"""

from __future__ import annotations

import inspect
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import trio

from penstock.errors import ConfigurationError, RunCancelled
from penstock.exception_groups import holds_only, is_cancellation, open_nursery
from penstock.observer import Observer, notify
from penstock.observer.logging import LoggingObserver

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

MAX_BACKOFF: Final = 10.0
"""The longest pause, in seconds, after polls that failed (an `interval` that is longer still stays as it is)."""


class CancelWatch:
    """The watch of one `cancel_when` block.

    Attributes:
        requested: whether a poll has requested a cancel while the block was running.
        reason: the reason that the poll gave, if any.
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
        """Poll now, or once more if a poll is under way. Not a checkpoint; to be called in Trio's thread."""
        self._woken.set()

    async def run(self, block: trio.CancelScope) -> None:
        """Poll until the block ends, and cancel it when a poll says so."""
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
                    if isinstance(error, BaseExceptionGroup) and not holds_only(error, (Exception, trio.Cancelled)):
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
        """Stop polling: the block has ended, and records nothing any more."""
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


@asynccontextmanager
async def cancel_when(
    is_cancelled: Callable[[], Any],
    interval: float = 0.5,
    *,
    run_id: str | None = None,
    observer: Observer | None = None,
) -> AsyncIterator[CancelWatch]:
    """Cancel the block as soon as `is_cancelled()` says so, and then raise `RunCancelled`.

    An async context manager. A background task polls at once, and then `interval` seconds after each poll has ended. A
    poll that fails makes a warning; each pause after it is twice as long, up to `MAX_BACKOFF`. Leaving the block
    cancels a poll that is under way, and waits until it has ended.

    Entering and leaving are checkpoints only as far as a nursery's are. A cancellation from outside passes through as
    it is. A block that catches the `Cancelled` and does not raise it has ended by itself.

    Args:
        is_cancelled: takes no arguments; async or not. It returns a false value, or True, or the reason as a str.
        interval: seconds of Trio's clock; more than 0.
        run_id: for `RunCancelled` and for warnings.
        observer: notified of polls that fail; the default writes to the logger `penstock`.

    Yields:
        A `CancelWatch`, whose `wake()` polls at once.

    Raises:
        ConfigurationError: the interval is not above 0.
        RunCancelled: a poll has cancelled the block.
        Exception: what the block raised, bare.
    """
    if not interval > 0:
        raise ConfigurationError(f"interval is a number of seconds above 0, not {interval!r}")
    watch = CancelWatch(is_cancelled, interval, run_id, LoggingObserver() if observer is None else observer)
    cut_short = False
    async with open_nursery() as nursery:
        nursery.start_soon(watch.run, nursery.cancel_scope)
        try:
            yield watch
        except BaseException as error:
            cut_short = is_cancellation(error, trio.Cancelled)
            raise
        finally:
            watch.end()
    # The nursery has caught only a cancellation that came from this watch and from nowhere else.
    if cut_short and watch.requested:
        raise RunCancelled(run_id, watch.reason)
