"""The producers that penstock serves in these measurements."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import trio

from benchmarks.servers.phases import first_tick
from penstock import Event

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator


async def burst(given: Any) -> AsyncGenerator[Event]:
    """`count` events of `size` bytes, one by one, as fast as they are taken."""
    data = "x" * given["size"]
    for _ in range(given["count"]):
        yield Event(data)


async def ticks(given: Any) -> AsyncGenerator[Event]:
    """`rate` events a second for `seconds`, each with the time at which it was made, in `size` bytes."""
    size = given.get("size", 0)
    started = trio.current_time() + first_tick(given)
    for number in range(round(given["rate"] * given["seconds"])):
        await trio.sleep_until(started + number / given["rate"])
        yield Event(f"t={time.monotonic_ns()};".ljust(size, "x"))


async def silence(given: Any) -> AsyncGenerator[Event]:
    """One event, and then none for `seconds`."""
    yield Event("here")
    await trio.sleep(given["seconds"])


producers = {"burst": burst, "ticks": ticks, "silence": silence}
