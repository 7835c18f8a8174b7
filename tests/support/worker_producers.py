"""What workers serve, in processes of their own. It imports no more than they need: each of them waits for that."""

from __future__ import annotations

import os
from itertools import count as count_on
from typing import TYPE_CHECKING, Any, Final

import trio

import penstock.server.serve
from penstock import Event, command

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


async def silent(_input: Any) -> AsyncIterator[Event]:
    yield Event(data=str(os.getpid()))
    await trio.sleep(3600)


async def ticking(_input: Any) -> AsyncIterator[Event]:
    yield Event(data=str(os.getpid()))
    for number in count_on(1):
        await trio.sleep(0.02)
        yield Event(data=str(number))


async def stubborn(_input: Any) -> AsyncIterator[Event]:
    """Keeps its task, in a process that abandons it sooner than others."""
    penstock.server.serve.ABANDON_AFTER = 0.2  # type: ignore[misc]
    yield Event(data=str(os.getpid()))
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()


producers: Final = {
    "silent": silent,
    "ticking": ticking,
    "stubborn": stubborn,
    "signals": lambda _input: command(["grep", "^Sig", "/proc/self/status"]),
}
