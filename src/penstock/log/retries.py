"""Trying again while the log cannot be reached: with pauses that grow, and that no two processes share.

Nothing is dropped meanwhile and nobody gives up here; what is to happen after `outage_limit` is decided in `watch.py`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, TypeVar

import trio
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from penstock.errors import LogUnavailable

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

FIRST_PAUSE: Final = 0.2
"""The longest first pause, in seconds. Each is drawn at random, and its limit doubles."""
LONGEST_PAUSE: Final = 2.0
"""The longest pause of all, in seconds: so late may it be noticed that the log is back."""

T = TypeVar("T")


async def patiently(call: Callable[[], Awaitable[T]], *, what: str, on_warning: Callable[[str], None]) -> T:
    """Call until the log can be reached. A checkpoint if the call is one; cancelling it stops the trying.

    Args:
        call: what may raise `LogUnavailable`, and may be called again.
        what: what that does, for the warnings.
        on_warning: told before each pause.

    Returns:
        What the call returns.
    """

    def warn(state: RetryCallState) -> None:
        error = None if state.outcome is None else state.outcome.exception()
        on_warning(f"cannot {what}: {error}; trying again")

    retrying = AsyncRetrying(
        retry=retry_if_exception_type(LogUnavailable),
        wait=wait_random_exponential(multiplier=FIRST_PAUSE, max=LONGEST_PAUSE),
        before_sleep=warn,
        sleep=trio.sleep,
        reraise=True,
    )
    return await retrying(call)
