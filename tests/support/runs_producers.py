"""What servers run whose runs are followed from a command line, in processes of their own."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from penstock import Event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


async def until_told(path: Any) -> AsyncIterator[Event]:
    for number in count(1):
        yield Event(data=str(number))
        await trio.sleep(0.01)
        if Path(path).exists():  # noqa: ASYNC240  (nobody waits for it)
            return


async def silent(_input: Any) -> AsyncIterator[Event]:
    yield Event(data="only this")
    await trio.sleep(3600)


producers: Final = {"until_told": until_told, "silent": silent}
