"""The turns of requests: thousands of readers and callers on a few connections."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

import trio

from penstock.errors import LogUnavailable
from penstock.log.redis.client import ANSWER_TIMEOUT

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from penstock.log.redis.client import Client, Command


class Requests:
    """Commands for readers and callers, of whom there may be thousands: they take turns on a few connections.

    Args:
        client: the way to Redis.
        at_once: the most that are under way.
    """

    def __init__(self, client: Client, at_once: int) -> None:
        self._client = client
        self._turns = trio.CapacityLimiter(at_once)

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        """`Client.execute`, when it is this request's turn.

        Raises:
            LogUnavailable: as there, and also if its turn does not come within `ANSWER_TIMEOUT`.
        """
        async with self.turn() as client:
            return await client.execute(commands)

    async def ask(self, *command: Any) -> Any:
        """`Client.ask`, when it is this request's turn.

        Raises:
            LogUnavailable: as there, and also if its turn does not come within `ANSWER_TIMEOUT`.
        """
        async with self.turn() as client:
            return await client.ask(*command)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[Client]:
        """The client, for as long as it is this request's turn.

        Raises:
            LogUnavailable: its turn does not come within `ANSWER_TIMEOUT`.
        """
        with trio.move_on_after(ANSWER_TIMEOUT) as waiting:
            await self._turns.acquire()
        if waiting.cancelled_caught:
            words = f"has not come to a request for {ANSWER_TIMEOUT:g} s"
            raise LogUnavailable(f"Redis at {self._client.address} {words}")
        try:
            yield self._client
        finally:
            self._turns.release()
