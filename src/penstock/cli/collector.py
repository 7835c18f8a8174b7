"""Python's garbage collector in a process that serves.

It looks for cycles whenever 700 more objects were made than were let go, and that many are made whenever a thousand
readers are woken: with its default it takes a quarter of the time of a large fan-out, and finds nothing, since what
streams are made of has no cycles. Now and then it looks at every object there is, and everything waits.
"""

from __future__ import annotations

import gc
from typing import Final

YOUNG: Final = 20_000
"""How many more objects are made than let go before it looks at them."""


def collect_rarely() -> None:
    """Let it look more rarely, and never at what the program has imported. Call it once, before there is anything else.

    What it still finds is found later: some megabytes may wait for it.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, *gc.get_threshold()[1:])
