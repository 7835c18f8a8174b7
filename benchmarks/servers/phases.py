"""Decides when a ticking producer makes its first event."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


def first_tick(given: Mapping[str, Any]) -> float:
    """The seconds until the first tick.

    After `offset`; or, if there is a `phase`, when the system's monotonic clock is next so far into a period, so that
    runs whose phases differ tick apart, whenever they were started.
    """
    if "phase" not in given:
        return float(given.get("offset", 0.0))
    return float((given["phase"] - time.monotonic()) % (1 / given["rate"]))
