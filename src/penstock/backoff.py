"""Retries: pauses that grow, and a call that is repeated while the log is unavailable.

The pauses are drawn at random, so that several processes do not retry in step. `Backoff` yields the pauses of any
retry. `retry_while_unavailable` never gives up: the lease keeper decides what happens after `outage_limit`.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final, TypeVar

import trio
from tenacity import RetryCallState, Retrying, wait_random_exponential

from penstock.errors import LogUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

FIRST_PAUSE: Final = 0.2  # the upper limit of the first pause, in seconds; it doubles with each retry
SHORTEST_PAUSE: Final = 0.05  # the lower limit of every pause, in seconds
LONGEST_PAUSE: Final = 2.0
"""The upper limit of every pause, in seconds: the end of an outage is noticed this late at most."""
WARNING_INTERVAL: Final = 10.0  # seconds between two warnings about the same outage

T = TypeVar("T")


class Backoff:
    """Pauses, in seconds: each is drawn at random below a limit, which is `first` and doubles up to `longest`."""

    def __init__(self, *, first: float, shortest: float, longest: float) -> None:
        self._wait = wait_random_exponential(multiplier=first, min=shortest, max=longest)
        self.reset()

    def next(self) -> float:
        pause = self._wait(self._state)
        self._state.attempt_number += 1
        return pause

    def reset(self) -> None:
        """Begin again with short pauses, after a success."""
        # A wait of tenacity expects the state of a call that tenacity retries; here the state only counts attempts.
        self._state = RetryCallState(Retrying(), None, (), {})


async def retry_while_unavailable(
    call: Callable[[], Awaitable[T]], *, what: str, on_warning: Callable[[str], None]
) -> T:
    """Call `call` until it does not raise `LogUnavailable`, and return its result.

    `on_warning` receives "cannot `what`" at the first failure, and then every `WARNING_INTERVAL`.
    """
    backoff = None
    warned = -inf
    while True:
        try:
            return await call()
        except LogUnavailable as error:
            if trio.current_time() - warned >= WARNING_INTERVAL:
                on_warning(f"{'cannot' if backoff is None else 'still cannot'} {what}: {error}; trying again")
                warned = trio.current_time()
        backoff = backoff or Backoff(first=FIRST_PAUSE, shortest=SHORTEST_PAUSE, longest=LONGEST_PAUSE)
        await trio.sleep(backoff.next())
