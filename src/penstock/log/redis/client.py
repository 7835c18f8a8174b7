"""redis-py's asyncio client, for Trio: the only file that knows asyncio.

It lives on one `trio_asyncio` loop, which is reached by its handle: a task that serves a request sees no current loop.
Every call crosses to it and back, with a deadline of Trio's around it; a call that is cancelled there disconnects its
own connection and no other, so no reply is ever taken for another's.

redis-py's own retries and timeouts are off. What is sent here may be sent twice, since every command that penstock
sends is one that may be: so a broken connection is tried again, once and at once, and what is still wrong then is
`LogUnavailable`.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import redis.asyncio
import trio
import trio_asyncio
from redis import exceptions
from redis.asyncio.client import PubSub
from redis.asyncio.connection import parse_url
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from penstock.errors import ConfigurationError, LogUnavailable
from penstock.groups import raise_unchanged
from penstock.log.redis.refusals import judged, unavailable
from penstock.log.redis.scripts import BY_DIGEST, Script

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence

Command = tuple[Any, ...]
"""A command and its arguments."""

ANSWER_TIMEOUT: Final = 5.0
"""How many seconds Redis may take to answer before it counts as out of reach."""
COMMANDS_PER_ROUND_TRIP: Final = 100
"""The most commands that are packed at once: packing thousands would hold up every other task."""
BYTES_PER_ROUND_TRIP: Final = 1024 * 1024
"""The size at which a round trip is full (its last command may go beyond it)."""
OPTIONS: Final[dict[str, Any]] = {
    "protocol": 2,
    "decode_responses": False,
    "socket_timeout": None,
    "socket_connect_timeout": None,
    "health_check_interval": 0,
    "max_connections": None,
    "retry": Retry(NoBackoff(), 0),
}
"""How connections are made, whatever a URL says: Trio's deadlines are the only timeouts, and nothing is retried."""
CALLBACKS_PER_ROUND: Final = 64
"""How many more of asyncio's callbacks run in one round of Trio's scheduler, if they are ready."""
_CLOSING: Final = 1.0
"""How many seconds closing a connection may take."""
_SCRIPT_TRIES: Final = 3
"""How often a script is sent to a server that keeps forgetting it."""


def call(script: Script, keys: Sequence[str], *args: Any) -> Command:
    """The command that runs a script."""
    return ("EVALSHA", script.digest, len(keys), *keys, *args)


class Client:
    """Commands to one Redis, on a few connections. Made by `open_client`."""

    def __init__(self, client: redis.asyncio.Redis, loop: trio_asyncio.TrioEventLoop, address: str) -> None:
        self.address = address
        """Where Redis is, without any password."""
        self._client = client
        self._loop = loop

    async def execute(self, commands: Sequence[Command]) -> list[Any]:
        """Send commands, in as few round trips as is good for others; their replies, in order.

        A command that was refused has its exception as its reply: `LogFull`, or a `redis.exceptions.ResponseError`.

        Raises:
            LogUnavailable: Redis could not be reached, did not answer in time, or is in no state to.
        """
        replies: list[Any] = []
        piece: list[Command] = []
        size = 0
        for command in commands:
            piece.append(command)
            size += sum(len(word) for word in command if isinstance(word, bytes | str))
            if len(piece) == COMMANDS_PER_ROUND_TRIP or size >= BYTES_PER_ROUND_TRIP:
                replies += await self._execute(piece)
                piece, size = [], 0
        if piece:
            replies += await self._execute(piece)
        return replies

    async def ask(self, *command: Any) -> Any:
        """Send one command; its reply.

        Raises:
            LogUnavailable: as for `execute`, and also if the command was refused.
        """
        (reply,) = await self._execute([command])
        if isinstance(reply, LogUnavailable):
            raise reply
        if isinstance(reply, Exception):
            raise LogUnavailable(f"Redis at {self.address} refuses a command: {reply}") from reply
        return reply

    async def _execute(self, commands: list[Command]) -> list[Any]:
        replies = await self._send(commands)
        for _ in range(_SCRIPT_TRIES):
            forgotten = [n for n, reply in enumerate(replies) if isinstance(reply, exceptions.NoScriptError)]
            if not forgotten:
                break
            digests = dict.fromkeys(commands[n][1] for n in forgotten)
            loads: list[Command] = [("SCRIPT LOAD", BY_DIGEST[digest].source) for digest in digests]
            again = await self._send(loads + [commands[n] for n in forgotten])
            for reply in again[: len(loads)]:
                if isinstance(reply, exceptions.ResponseError):
                    raise unavailable(reply, self.address)
            for n, reply in zip(forgotten, again[len(loads) :], strict=True):
                replies[n] = reply
        return [
            judged(reply, self.address) if isinstance(reply, exceptions.ResponseError) else reply for reply in replies
        ]

    async def _send(self, commands: list[Command]) -> list[Any]:
        async def round_trip() -> list[Any]:
            if len(commands) == 1:
                try:
                    return [await _whole(self._client.execute_command, *commands[0])]
                except exceptions.ResponseError as error:
                    return [error]
            async with self._client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                replies: list[Any] = await _whole(pipeline.execute, raise_on_error=False)
                return replies

        async def twice() -> list[Any]:
            try:
                return await round_trip()
            except (exceptions.AuthenticationError, exceptions.TimeoutError):
                raise
            except exceptions.ConnectionError:
                await self._client.execute_command("PING")  # type: ignore[no-untyped-call]  # a plainer word, if refused
                return await round_trip()

        replies: list[Any] = await self.run(twice())
        return replies

    async def run(self, work: Coroutine[Any, Any, Any], *, deadline: float | None = None) -> Any:
        """Run asyncio code on the loop, until it returns or its time is over."""
        seconds = ANSWER_TIMEOUT if deadline is None else deadline
        try:
            with trio.fail_after(seconds):
                return await self._loop.run_aio_coroutine(work)
        except trio.TooSlowError:
            raise LogUnavailable(f"Redis at {self.address} has not answered for {seconds:g} s") from None
        except asyncio.CancelledError:  # asyncio's own: a cancellation from here is Trio's
            raise LogUnavailable(f"the connection to Redis at {self.address} was closed") from None  # noqa: ASYNC104
        except (exceptions.RedisError, OSError) as error:
            raise unavailable(error, self.address) from error

    @asynccontextmanager
    async def subscription(self) -> AsyncIterator[Subscription]:
        """A connection of its own that listens to channels."""
        pubsub = _OneConnection(self._client.connection_pool)
        try:
            yield Subscription(self, pubsub)
        finally:
            with trio.move_on_after(_CLOSING, shield=True):
                await self._loop.run_aio_coroutine(pubsub.aclose())  # type: ignore[no-untyped-call]


class _OneConnection(PubSub):
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
        return await _whole(command, *args, **kwargs)

    def _check_connection(self) -> None:
        if self.connection is None or not self.connection.is_connected:
            raise exceptions.ConnectionError("the connection is gone")


class Subscription:
    """One connection that listens. All that goes wrong with it is `LogUnavailable`, and it is of no use then."""

    def __init__(self, client: Client, pubsub: _OneConnection) -> None:
        self._client = client
        self._pubsub = pubsub

    async def subscribe(self, channels: Sequence[str]) -> None:
        """Ask for these channels; a message of kind `subscribe` confirms each."""
        await self._client.run(_called(self._pubsub.subscribe, *channels))

    async def unsubscribe(self, channels: Sequence[str]) -> None:
        """Ask for these channels no more."""
        await self._client.run(_called(self._pubsub.unsubscribe, *channels))

    async def ping(self) -> None:
        """Ask for a sign of life: a message of kind `pong`."""
        await self._client.run(_called(self._pubsub.ping))

    async def pump(self, take: Callable[[str, str, bytes], None]) -> None:
        """Hand over every message (kind, channel, data), until the connection breaks."""

        async def listen() -> None:
            while True:
                message = await self._pubsub.get_message(timeout=None)
                if message is not None:
                    channel, data = message["channel"] or b"", message["data"]
                    take(message["type"], channel.decode(), data if isinstance(data, bytes) else b"")

        await self._client.run(listen(), deadline=float("inf"))


async def _whole(function: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
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


async def _called(function: Callable[..., Awaitable[Any]], *args: Any) -> None:
    """Call it on the loop, and not before: what is cancelled on the way there leaves nothing that was not awaited."""
    await function(*args)


@asynccontextmanager
async def open_client(url: str) -> AsyncIterator[Client]:
    """A client for as long as the block lasts; the connections are made when they are needed.

    Raises:
        ConfigurationError: redis-py cannot read the URL.
    """
    address, pool = _pool(url)
    raised: BaseException | None = None
    try:
        async with trio_asyncio.open_loop() as loop:
            _hurry(loop)
            client = redis.asyncio.Redis.from_pool(pool)
            client.response_callbacks.clear()  # replies are taken as they come
            try:
                yield Client(client, loop, address)
            except BaseException as error:
                raised = error
                raise
            finally:
                with trio.move_on_after(_CLOSING, shield=True):
                    await loop.run_aio_coroutine(client.aclose())
    except BaseExceptionGroup:
        if raised is None:
            raise
        raise_unchanged(raised)  # the loop's nurseries are nothing that a caller should see


def _hurry(loop: trio_asyncio.TrioEventLoop) -> None:
    """Let a loop run all the callbacks that are ready, not one in each round of Trio's scheduler.

    trio-asyncio (0.16) does the latter, and a command takes several callbacks: where the rounds are long, since there
    are many streams to serve, Redis would be asked a few times a second. There is no public way to say so; on a version
    whose loop has no such step, this does nothing.
    """
    step: Callable[..., Awaitable[None]] | None = getattr(loop, "_main_loop_one", None)
    if step is None:
        return

    async def steps(*, no_wait: bool = False) -> None:
        await step(no_wait=no_wait)
        for _ in range(CALLBACKS_PER_ROUND):
            try:
                await step(no_wait=True)
            except trio.WouldBlock:
                return

    loop._main_loop_one = steps  # noqa: SLF001


def _pool(url: str) -> tuple[str, redis.asyncio.ConnectionPool]:
    """The address that a URL names, and the connections to it. What is wrong with a URL is said without quoting it."""
    shape = "write redis://[[USER]:PASSWORD@]HOST[:PORT][/DB], with % escapes for what is no letter or digit"
    try:
        parts = urlsplit(url)
        address = parts.path if parts.scheme == "unix" else f"{parts.hostname or 'localhost'}:{parts.port or 6379}"
    except ValueError:
        raise ConfigurationError(f"this is no URL of a Redis; {shape}") from None
    if parts.fragment or (parts.scheme != "unix" and not (parts.path.strip("/") or "0").isdigit()):
        raise ConfigurationError(f"what follows the slash in the URL of a Redis is the number of a database; {shape}")
    try:
        pool = redis.asyncio.ConnectionPool(**{**parse_url(url), **OPTIONS})
        pool.make_connection()  # type: ignore[no-untyped-call]  # not connected, but it knows what it cannot be made of
    except (ValueError, TypeError, exceptions.RedisError) as error:
        raise ConfigurationError(f"this is no URL of a Redis: {error}; {shape}") from None
    return address, pool
