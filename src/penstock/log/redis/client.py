"""A connection that listens to channels, on the loop of its client.

redis-py's asyncio client, for Trio: the only file that knows asyncio.

It lives on one `trio_asyncio` loop, which is reached by its handle: a task that serves a request sees no current loop.
Every call crosses to it and back, with a deadline of Trio's around it; a call that is cancelled there disconnects its
own connection and no other, so no reply is ever taken for another's.

redis-py's own retries and timeouts are off. What is sent here may be sent twice, since every command that penstock
sends is one that may be: so a broken connection is tried again, once and at once, and what is still wrong then is
`LogUnavailable`.

Where Sentinels watch over the server, they are asked for each new connection. So whenever a server says that it is a
replica, the connections to it are dropped.
"""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from math import inf
from typing import TYPE_CHECKING, Any, Final

import redis.asyncio
import trio
import trio_asyncio
from redis import exceptions
from redis.asyncio.client import PubSub

from penstock.errors import LogUnavailable
from penstock.exception_groups import reraise
from penstock.log.redis import urls as addresses
from penstock.log.redis.errors import classify, unavailable, words_of
from penstock.log.redis.scripts import BY_DIGEST, Script
from penstock.log.redis.urls import pool_of, sentinels_of, watched_pool

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence

    from penstock.log.redis.backend import Command

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


ANSWER_TIMEOUT: Final = 5.0
"""How many seconds Redis may take to answer before it counts as out of reach."""
COMMANDS_PER_ROUND_TRIP: Final = 100
"""The most commands that are packed at once: packing thousands would hold up every other task."""
BYTES_PER_ROUND_TRIP: Final = 1024 * 1024
"""The size at which a round trip is full (its last command may go beyond it)."""
REPLICAS_TIMEOUT: Final = 1.0
"""How many seconds the replicas that a write waits for may take."""
CALLBACKS_PER_ROUND: Final = 64
"""How many more of asyncio's callbacks run in one round of Trio's scheduler, if they are ready."""
CLOSING: Final = 1.0
"""How many seconds closing a connection may take."""
_SCRIPT_TRIES: Final = 3
"""How often a script is sent to a server that keeps forgetting it."""


def call(script: Script, keys: Sequence[str], *args: Any) -> Command:
    """The command that runs a script."""
    return ("EVALSHA", script.digest, len(keys), *keys, *args)


class Client:
    """Commands to one Redis, on a few connections. Made by `open_client`.

    Args:
        client: redis-py's, on `loop`.
        loop: where that lives.
        address: where the server is, without any password.
        wait_replicas: how many replicas are to have what is sent as `kept`.
        clustered: it is a node of a cluster.
    """

    def __init__(
        self,
        client: redis.asyncio.Redis,
        loop: trio_asyncio.TrioEventLoop,
        address: str,
        *,
        wait_replicas: int = 0,
        clustered: bool = False,
    ) -> None:
        self.address = address
        """Where Redis is, without any password."""
        self.clustered = clustered
        """Its channels are those of a shard, and it may refuse what belongs to other nodes."""
        client.response_callbacks.clear()  # replies are taken as they come
        self._client = client
        self._loop = loop
        self._wait_replicas = wait_replicas

    def shard(self, key: str) -> str:  # noqa: ARG002
        """There is one part."""
        return ""

    def shards(self) -> Sequence[str]:
        """The only one."""
        return ("",)

    async def learn(self) -> None:
        """There is nothing to learn."""

    def is_moving(self, key: str) -> bool:  # noqa: ARG002
        """Keys stay where they are."""
        return False

    def here_since(self, key: str) -> float:  # noqa: ARG002
        """It has always been there."""
        return -inf

    def watch(self, moved: Callable[[], None]) -> Callable[[], None]:  # noqa: ARG002
        """Keys stay where they are."""
        return lambda: None

    def doubt(self) -> None:
        """There is no doubt about that."""

    async def execute(
        self,
        commands: Sequence[Command],
        *,
        replicated: bool = False,
        wait_for_migration: bool = False,  # noqa: ARG002
    ) -> list[Any]:
        """Send commands, in as few round trips as is good for others; their replies, in order.

        A command that was refused has its exception as its reply: `LogFull`, or a `redis.exceptions.ResponseError`.

        Raises:
            LogUnavailable: Redis could not be reached, did not answer in time, or is in no state to.
        """
        judged_replies: list[Any] = []
        for piece in _pieces(commands):
            judged_replies += self._classify(await self._replies(piece, replicated=replicated))
        return judged_replies

    async def in_stages(self, *stages: Sequence[Command]) -> list[Any]:
        """The same: one server does things in the order in which they come."""
        return await self.execute([command for stage in stages for command in stage], replicated=True)

    async def ask(self, *command: Any, replicated: bool = False) -> Any:
        """Send one command; its reply.

        Raises:
            LogUnavailable: as for `execute`, and also if the command was refused.
        """
        (reply,) = self._classify(await self._replies([command], replicated=replicated))
        return answer(reply, self.address)

    async def best_effort(self, commands: Sequence[Command]) -> None:
        """`execute`: what is good to have is as near as anything else."""
        await self.execute(commands)

    async def replies(self, commands: Sequence[Command], *, replicated: bool = False) -> list[Any]:
        """`execute` for who judges the replies: each refusal is there as it came.

        Raises:
            LogUnavailable: Redis could not be reached, or did not answer in time.
        """
        return [reply for piece in _pieces(commands) for reply in await self._replies(piece, replicated=replicated)]

    def _classify(self, replies: Sequence[Any]) -> list[Any]:
        return [
            classify(reply, self.address) if isinstance(reply, exceptions.ResponseError) else reply for reply in replies
        ]

    async def _replies(self, commands: list[Command], *, replicated: bool) -> list[Any]:
        replies = await self._send_replicated(commands) if replicated else await self._send(commands)
        for _ in range(_SCRIPT_TRIES):
            forgotten = [n for n, reply in enumerate(replies) if isinstance(reply, exceptions.NoScriptError)]
            if not forgotten:
                break
            digests = dict.fromkeys(commands[n][1] for n in forgotten)
            loads: list[Command] = [("SCRIPT LOAD", BY_DIGEST[digest].source) for digest in digests]
            again = loads + [commands[n] for n in forgotten]
            repeated = await self._send_replicated(again) if replicated else await self._send(again)
            for reply in repeated[: len(loads)]:
                if isinstance(reply, exceptions.ResponseError):
                    raise unavailable(reply, self.address)
            for n, reply in zip(forgotten, repeated[len(loads) :], strict=True):
                replies[n] = reply
        if any(isinstance(reply, exceptions.ResponseError) and "READONLY" in words_of(reply) for reply in replies):
            await self.run(self._client.connection_pool.disconnect(inuse_connections=False))
        return replies

    async def _send_replicated(self, commands: list[Command]) -> list[Any]:
        """`_send`, and see to it that enough replicas have it."""
        if not self._wait_replicas:
            return await self._send(commands)
        wait = ("WAIT", self._wait_replicas, round(REPLICAS_TIMEOUT * 1000))
        *replies, there = await self._send([*commands, wait])
        if isinstance(there, exceptions.ResponseError):
            raise unavailable(there, self.address)
        if there < self._wait_replicas:
            words = f"{there} of the {self._wait_replicas} replicas that were to have it have taken a write"
            raise LogUnavailable(f"Redis at {self.address}: {words} within {REPLICAS_TIMEOUT:g} s")
        return replies

    async def _send(self, commands: list[Command]) -> list[Any]:
        async def round_trip() -> list[Any]:
            if len(commands) == 1:
                try:
                    return [await whole(self._client.execute_command, *commands[0])]
                except exceptions.ResponseError as error:
                    return [error]
            async with self._client.pipeline(transaction=False) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                replies: list[Any] = await whole(pipeline.execute, raise_on_error=False)
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
    async def subscription(self, shard: str = "") -> AsyncIterator[Subscription]:  # noqa: ARG002
        """A connection of its own that listens to channels."""
        pubsub = OneConnection(self._client.connection_pool)
        try:
            yield Subscription(self, pubsub)
        finally:
            with trio.move_on_after(CLOSING, shield=True):
                await self._loop.run_aio_coroutine(pubsub.aclose())  # type: ignore[no-untyped-call]

    async def aclose(self) -> None:
        """Close the connections. It has a shield with a deadline."""
        with trio.move_on_after(CLOSING, shield=True):
            await self._loop.run_aio_coroutine(self._client.aclose())


def answer(reply: Any, address: str) -> Any:
    """The reply to one command that is not to be refused.

    Raises:
        LogUnavailable: it was.
    """
    if isinstance(reply, LogUnavailable):
        raise reply
    if isinstance(reply, Exception):
        raise LogUnavailable(f"Redis at {address} refuses a command: {reply}") from reply
    return reply


def _pieces(commands: Sequence[Command]) -> Iterator[list[Command]]:
    """The commands of each round trip."""
    piece: list[Command] = []
    size = 0
    for command in commands:
        piece.append(command)
        size += sum(len(word) for word in command if isinstance(word, bytes | str))
        if len(piece) == COMMANDS_PER_ROUND_TRIP or size >= BYTES_PER_ROUND_TRIP:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


@asynccontextmanager
async def open_loop() -> AsyncIterator[trio_asyncio.TrioEventLoop]:
    """The loop on which clients live, for as long as the block lasts; what the block raises comes out unchanged."""
    raised: BaseException | None = None
    try:
        async with trio_asyncio.open_loop() as loop:
            _hurry(loop)
            try:
                yield loop
            except BaseException as error:
                raised = error
                raise
    except BaseExceptionGroup:
        if raised is None:
            raise
        reraise(raised)  # the loop's nurseries are nothing that a caller should see


@asynccontextmanager
async def open_client(url: str, *, wait_replicas: int = 0) -> AsyncIterator[Client]:
    """A client for as long as the block lasts; the connections are made when they are needed.

    Args:
        url: `redis://`, `rediss://`, `unix://`, `redis+sentinel://` or `rediss+sentinel://`.
        wait_replicas: how many replicas are to have what is sent as `kept`.

    Raises:
        ConfigurationError: the URL cannot be read.
    """
    watched = url.partition("://")[0].endswith("+sentinel")
    there = addresses.sentinel(url) if watched else addresses.one(url)
    sentinel = sentinels_of(there) if watched else None
    pool = pool_of(there.options, there.shape) if sentinel is None else watched_pool(there, sentinel)
    async with open_loop() as loop:
        client = Client(redis.asyncio.Redis.from_pool(pool), loop, there.label, wait_replicas=wait_replicas)
        try:
            yield client
        finally:
            await client.aclose()  # noqa: ASYNC102  (it has a shield with a deadline)
            if sentinel is not None:
                with trio.move_on_after(CLOSING, shield=True):
                    await loop.run_aio_coroutine(sentinel.aclose())


def client_at(
    place: tuple[str, int], options: dict[str, Any], loop: trio_asyncio.TrioEventLoop, *, wait_replicas: int = 0
) -> Client:
    """A client of one node of a cluster. Whoever makes it closes it."""
    host, port = place
    redis_py = redis.asyncio.Redis.from_pool(
        pool_of({**options, "host": host, "port": port}, f"write {addresses.CLUSTER}")
    )
    address = addresses.address_of(host, port)
    return Client(redis_py, loop, address, wait_replicas=wait_replicas, clustered=True)


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
