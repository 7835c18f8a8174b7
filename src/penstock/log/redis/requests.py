"""The turns of requests: thousands of readers and callers on a few connections to each part."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import trio

from penstock.errors import LogUnavailable
from penstock.log.redis.client import ANSWER_TIMEOUT
from penstock.log.redis.slots import key_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from penstock.log.redis.servers import Command, Servers


SEVERAL: Final = "several"
"""Stands for the part of requests that are about several."""


class Requests:
    """Commands for readers and callers, of whom there may be thousands: they take turns on a few connections.

    Each part has turns of its own, so that nobody waits behind those who wait for a part that is away.

    Args:
        servers: the way to Redis.
        at_once: the most that are under way to one part.
    """

    def __init__(self, servers: Servers, at_once: int) -> None:
        self._servers = servers
        self._at_once = at_once
        self._turns: dict[str, trio.CapacityLimiter] = {}

    async def execute(self, commands: Sequence[Command], *, kept: bool = False) -> list[Any]:
        """`Servers.execute`, when it is this request's turn.

        Raises:
            LogUnavailable: as there, and also if its turn does not come within `ANSWER_TIMEOUT`.
        """
        async with self.turn(*map(key_of, commands)) as servers:
            return await servers.execute(commands, kept=kept, patient=True)

    async def ask(self, *command: Any, kept: bool = False) -> Any:
        """`Servers.ask`, when it is this request's turn.

        Raises:
            LogUnavailable: as there, and also if its turn does not come within `ANSWER_TIMEOUT`.
        """
        async with self.turn(key_of(command)) as servers:
            return await servers.ask(*command, kept=kept)

    @asynccontextmanager
    async def turn(self, *keys: str) -> AsyncIterator[Servers]:
        """The way to Redis, for as long as it is this request's turn at the part that has the keys.

        Requests of several parts have turns of their own: they may wait for each of them.

        Raises:
            LogUnavailable: its turn does not come within `ANSWER_TIMEOUT`.
        """
        parts = {self._servers.part(key) for key in keys}
        part = parts.pop() if len(parts) == 1 else SEVERAL
        if part not in self._turns:
            self._turns = {part: turns for part, turns in self._turns.items() if turns.statistics().borrowed_tokens}
            self._turns[part] = trio.CapacityLimiter(self._at_once)
        turns = self._turns[part]
        with trio.move_on_after(ANSWER_TIMEOUT) as waiting:
            await turns.acquire()
        if waiting.cancelled_caught:
            words = f"has not come to a request for {ANSWER_TIMEOUT:g} s"
            raise LogUnavailable(f"Redis at {self._servers.address} {words}")
        try:
            yield self._servers
        finally:
            turns.release()
