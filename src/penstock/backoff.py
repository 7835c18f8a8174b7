"""Pauses between tries: they grow, and are drawn at random, so that no two processes try at the same moments.

`Backoff` gives the pauses of any retry; `retry_while_unavailable` retries a call for as long as the log is unavailable.
It drops nothing and never gives up: the lease keeper decides what happens after `outage_limit`.
"""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Final, TypeVar

import trio
from tenacity import RetryCallState, Retrying, wait_random_exponential

from penstock.errors import LogUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

FIRST_PAUSE: Final = 0.2
"""The longest first pause, in seconds; the limit doubles with each try."""
SHORTEST_PAUSE: Final = 0.05
"""The shortest pause of all, in seconds."""
LONGEST_PAUSE: Final = 2.0
"""The longest pause of all, in seconds: a log that is back is noticed this late at most."""
WARNING_INTERVAL: Final = 10.0
"""Seconds between two warnings of the same outage."""

T = TypeVar("T")


class Backoff:
    """The pauses between the tries of one call.

    Args:
        first: the longest first pause, in seconds. Each pause is drawn at random below a limit, which doubles.
        shortest: no pause is shorter, in seconds.
        longest: no pause is longer, in seconds.
    """

    def __init__(self, *, first: float, shortest: float, longest: float) -> None:
        self._wait = wait_random_exponential(multiplier=first, min=shortest, max=longest)
        self.reset()

    def next(self) -> float:
        """The next pause, in seconds."""
        pause = self._wait(self._state)
        self._state.attempt_number += 1
        return pause

    def reset(self) -> None:
        """Start with short pauses again, after a success."""
        # tenacity's waits take the state of a call that it retries itself: here it only counts the tries.
        self._state = RetryCallState(Retrying(), None, (), {})


async def retry_while_unavailable(
    call: Callable[[], Awaitable[T]], *, what: str, on_warning: Callable[[str], None]
) -> T:
    """Call until the log can be reached. A checkpoint if the call is one; a cancellation ends the retries.

    Args:
        call: what may raise `LogUnavailable`, and may be called again.
        what: what that does, for the warnings.
        on_warning: receives the first failure, and then one every `WARNING_INTERVAL`.

    Returns:
        What the call returns.
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
