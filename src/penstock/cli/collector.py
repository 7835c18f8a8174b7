"""Python's garbage collector in a process that serves.

It looks for cycles whenever 700 more objects were made than were let go, and that many are made whenever a thousand
readers are woken: with its default it takes about a quarter of the time of a large fan-out. Now and then it looks at
every object there is, and everything waits.
"""

from __future__ import annotations

import gc
from typing import Final

THRESHOLDS: Final = (10_000, 5, 5)
"""How many more objects are made than let go before it looks at them; then of how many such looks one goes further.

What a thousand readers make when they are woken is less than the first. The others see to it that what failing
producers leave in cycles of their own does not wait ten times as long as it would.
"""


def collect_rarely() -> None:
    """Let it look more rarely, and never at what the program has imported. Call it once, before there is anything else.

    What it finds is found later, so more memory may wait for it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(*THRESHOLDS)
