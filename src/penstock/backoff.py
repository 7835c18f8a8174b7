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
SHORTEST_PAUSE: Final = 0.05
"""The shortest pause of all, in seconds."""
LONGEST_PAUSE: Final = 2.0
"""The longest pause of all, in seconds: so late may it be noticed that the log is back."""
WARNING_INTERVAL: Final = 10.0
"""Seconds between two warnings of the same trouble."""

T = TypeVar("T")


async def retry_while_unavailable(
    call: Callable[[], Awaitable[T]], *, what: str, on_warning: Callable[[str], None]
) -> T:
    """Call until the log can be reached. A checkpoint if the call is one; cancelling it stops the trying.

    Args:
        call: what may raise `LogUnavailable`, and may be called again.
        what: what that does, for the warnings.
        on_warning: told of the first failure, and then every `WARNING_INTERVAL`.

    Returns:
        What the call returns.
    """
    try:
        return await call()  # as nearly always: the machinery below costs more than many a call
    except LogUnavailable as error:
        on_warning(f"cannot {what}: {error}; trying again")
    warned = trio.current_time()

    def warn(state: RetryCallState) -> None:
        nonlocal warned
        if state.outcome is not None and trio.current_time() - warned >= WARNING_INTERVAL:
            warned = trio.current_time()
            on_warning(f"still cannot {what}: {state.outcome.exception()}; trying again")

    pauses = wait_random_exponential(multiplier=FIRST_PAUSE, min=SHORTEST_PAUSE, max=LONGEST_PAUSE)
    retrying = AsyncRetrying(
        retry=retry_if_exception_type(LogUnavailable), wait=pauses, before_sleep=warn, sleep=trio.sleep, reraise=True
    )
    await trio.sleep(pauses(RetryCallState(retrying, None, (), {})))
    return await retrying(call)
