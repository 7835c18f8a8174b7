"""penstock inside a Trio application, without any HTTP: a build, two people who watch it, and one who stops it.

Run it:    python examples/embedded.py
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import trio

import penstock

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


async def build(target: str) -> AsyncIterator[penstock.Event]:
    """A producer: it knows nothing of who reads, or who may stop it."""
    try:
        for step in range(1, 1000):
            yield penstock.Event.json({"target": target, "step": step})
            await trio.sleep(0.01)
    except trio.Cancelled as cancelled:
        print(f"build: stopped ({cancelled.reason}), tidying up")
        raise


async def watch(supervisor: penstock.Supervisor, run_id: str, name: str, *, after: int) -> None:
    """A reader: from its cursor on it sees every entry once, those that are there and those to come."""
    seen = 0
    async with supervisor.follow(run_id, after=after) as entries:
        async for entry in entries:
            seen += 1
            if entry.terminal:
                print(f"{name}: saw {seen} entries, up to {entry.seq}")


async def main() -> None:
    """Start a run, watch it twice, stop it, and read its record."""
    async with penstock.open_log("memory://") as log, penstock.open_supervisor(log) as supervisor:
        run = await supervisor.start(build, "docs")
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: watch(supervisor, run.id, "Ann", after=0))
            nursery.start_soon(lambda: watch(supervisor, run.id, "Ben", after=10))
            await trio.sleep(0.3)
            await supervisor.cancel(run.id, reason="Ann pressed stop")
        run = await supervisor.wait(run.id)
        print(f"{run.status}: {run.cancel_reason}, {run.seq} entries")


if __name__ == "__main__":
    trio.run(main)
