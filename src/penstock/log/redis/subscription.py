"""A connection that listens to channels, on the loop of its client."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from redis import exceptions
from redis.asyncio.client import PubSub

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from penstock.log.redis.client import Client


_KINDS: Final = {"smessage": "message", "ssubscribe": "subscribe", "sunsubscribe": "unsubscribe", "pong": "pong"}
"""The messages of a shard's channels, by the names of ordinary ones."""


class OneConnection(PubSub):
    """A PubSub that does not connect again by itself, in whichever task first sees that its connection is gone."""

    async def connect(self) -> None:
        """Connect the first time."""
        if self.connection is None:
            await super().connect()  # type: ignore[no-untyped-call]
        self._check_connection()

    async def parse_response(self, block: bool = True, timeout: float = 0) -> Any:
        """Wait for what comes."""
        self._check_connection()
        return await super().parse_response(block, timeout)

    async def _execute(self, conn: Any, command: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        return await whole(command, *args, **kwargs)

    def _check_connection(self) -> None:
        if self.connection is None or not self.connection.is_connected:
            raise exceptions.ConnectionError("the connection is gone")


class Subscription:
    """One connection that listens. All that goes wrong with it is `LogUnavailable`, and it is of no use then."""

    def __init__(self, client: Client, pubsub: OneConnection) -> None:
        self._client = client
        self._pubsub = pubsub

    async def subscribe(self, channels: Sequence[str]) -> None:
        """Ask for these channels; a message of kind `subscribe` confirms each."""
        if self._client.clustered:
            await self._client.run(_each(self._pubsub.ssubscribe, channels))
        else:
            await self._client.run(_called(self._pubsub.subscribe, *channels))

    async def unsubscribe(self, channels: Sequence[str]) -> None:
        """Ask for these channels no more."""
        if self._client.clustered:
            await self._client.run(_each(self._pubsub.sunsubscribe, channels))
        else:
            await self._client.run(_called(self._pubsub.unsubscribe, *channels))

    async def ping(self) -> None:
        """Ask for a sign of life: a message of kind `pong`."""
        await self._client.run(_called(self._pubsub.ping))

    async def pump(self, take: Callable[[str, str, bytes], None]) -> None:
        """Hand over every message (kind, channel, data), until the connection breaks.

        The kinds are those of ordinary channels: those of a shard's are the same words with an `s` before them.
        """

        async def listen() -> None:
            while True:
                message = await self._pubsub.get_message(timeout=None)
                if message is not None:
                    channel, data = message["channel"] or b"", message["data"]
                    kind = message["type"] if not self._client.clustered else _KINDS.get(message["type"], "")
                    take(kind, channel.decode(), data if isinstance(data, bytes) else b"")

        await self._client.run(listen(), deadline=float("inf"))


async def _called(function: Callable[..., Awaitable[Any]], *args: Any) -> None:
    """Call it on the loop, and not before: what is cancelled on the way there leaves nothing that was not awaited."""
    await function(*args)


async def _each(function: Callable[..., Awaitable[Any]], args: Sequence[str]) -> None:
    """The same, one by one: a cluster wants the channels of one command on one slot."""
    for arg in args:
        await function(arg)


async def whole(function: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    """Call what may write to a connection that has just been lost.

    asyncio's transport (Python 3.12 and 3.13) then looks for the loop that it has let go: no error of ours, but of the
    connection.
    """
    try:
        return await function(*args, **kwargs)
    except AttributeError as error:
        if "_add_writer" not in str(error):
            raise
        raise exceptions.ConnectionError("the connection is gone") from error
