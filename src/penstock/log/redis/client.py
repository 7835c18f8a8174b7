"""One Redis server: redis-py's asyncio client, for Trio. The only file that knows asyncio.

Every call crosses to one `trio_asyncio` loop and back under a deadline of Trio's. A call that is cancelled there
disconnects its own connection and no other, so that no reply is ever taken for another's. Every command that penstock
sends may be sent twice, so one whose connection breaks is sent again once, at once. With Sentinels, each new connection
asks them for the primary; so the connections to a server that says that it is a replica are dropped.
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
from penstock.log.redis import backend, urls
from penstock.log.redis.errors import checked, classify, message_of, unavailable
from penstock.log.redis.scripts import BY_DIGEST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence

    from penstock.log.redis.slots import Command, Place

COMMANDS_PER_ROUND_TRIP: Final = 100
"""The most commands that are packed at once: packing thousands would hold up every other task."""
BYTES_PER_ROUND_TRIP: Final = 1024 * 1024  # the size at which a round trip is full (its last command may go beyond it)
REPLICAS_TIMEOUT: Final = 1.0  # seconds that the replicas may take for which a write waits
CALLBACKS_PER_ROUND: Final = 64
"""How many more of asyncio's callbacks run in one round of Trio's scheduler, if they are ready."""
CLOSE_TIMEOUT: Final = 1.0  # seconds that closing a connection may take
_SCRIPT_TRIES: Final = 3  # how often a script is sent to a server that keeps forgetting it
_KINDS: Final = {"smessage": "message", "ssubscribe": "subscribe", "sunsubscribe": "unsubscribe"}
"""The kinds of messages of sharded channels, by the names of ordinary ones."""


class OneConnection(PubSub):
    """A PubSub that never connects again: by itself it would do so in whichever task first met the loss."""

    async def connect(self) -> None:
        if self.connection is None:
            await super().connect()  # type: ignore[no-untyped-call]
        self._check_connection()

    async def parse_response(self, block: bool = True, timeout: float = 0) -> Any:
        self._check_connection()
        return await super().parse_response(block, timeout)

    async def _execute(self, conn: Any, command: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ARG002
        return await call_redis_py(command, *args, **kwargs)

    def _check_connection(self) -> None:
        if self.connection is None or not self.connection.is_connected:
            raise exceptions.ConnectionError("the connection is gone")


class Subscription:
    """A connection that listens to channels, in a cluster to sharded ones; of no use after a `LogUnavailable`."""

    def __init__(self, client: Client, pubsub: OneConnection, *, sharded: bool) -> None:
        self._client = client
        self._pubsub = pubsub
        self._sharded = sharded

    async def subscribe(self, channels: Sequence[str]) -> None:
        """Ask for channels; a message of kind `subscribe` confirms each."""
        await self._send("subscribe", channels)

    async def unsubscribe(self, channels: Sequence[str]) -> None:
        await self._send("unsubscribe", channels)

    async def ping(self) -> None:
        await self._send("ping", ())

    async def _send(self, name: str, channels: Sequence[str]) -> None:
        async def send() -> None:
            if not self._sharded or name == "ping":
                await getattr(self._pubsub, name)(*channels)
            else:
                for channel in channels:  # the sharded channels of one command must be on one slot
                    await getattr(self._pubsub, f"s{name}")(channel)

        await self._client.run(send())

    async def pump(self, take: Callable[[str, str, bytes], None]) -> None:
        """Pass every message (kind, channel, data) to `take` until the connection breaks; no kind says "sharded"."""

        async def listen() -> None:
            while True:
                message = await self._pubsub.get_message(timeout=None)
                if message is not None:
                    kind, channel, data = message["type"], message["channel"] or b"", message["data"]
                    take(_KINDS.get(kind, kind), channel.decode(), data if isinstance(data, bytes) else b"")

        await self._client.run(listen(), timeout=inf)


async def call_redis_py(function: Callable[..., Awaitable[Any]], *args: Any, **kwargs: Any) -> Any:
    """Call what may write to a connection that has just been lost."""
    # asyncio's transport (Python 3.12 and 3.13) then looks for the loop that it has let go: an error of the connection.
    try:
        return await function(*args, **kwargs)
    except AttributeError as error:
        if "_add_writer" not in str(error):
            raise
        raise exceptions.ConnectionError("the connection is gone") from error


class Client:
    """Commands to one Redis, on a few connections. Made by `open_client`. A `Backend`."""

    def __init__(
        self,
        redis_py: redis.asyncio.Redis,
        loop: trio_asyncio.TrioEventLoop,
        address: str,
        *,
        wait_replicas: int = 0,
        sharded: bool = False,
    ) -> None:
        self.address = address
        redis_py.response_callbacks.clear()  # replies are taken as they come
        self._redis_py = redis_py
        self._loop = loop
        self._wait_replicas = wait_replicas
        self._sharded = sharded

    async def execute(
        self,
        commands: Sequence[Command],
        *,
        replicated: bool = False,
        wait_for_migration: bool = False,  # noqa: ARG002
    ) -> list[Any]:
        replies: list[Any] = []
        for piece in _pieces(commands):
            replies += [
                classify(reply, self.address) if isinstance(reply, exceptions.ResponseError) else reply
                for reply in await self._send(piece, replicated=replicated)
            ]
        return replies

    async def replies(self, commands: Sequence[Command], *, replicated: bool = False) -> list[Any]:
        """`execute` for a caller that classifies refusals: each is returned as it came."""
        return [reply for piece in _pieces(commands) for reply in await self._send(piece, replicated=replicated)]

    async def in_stages(self, *stages: Sequence[Command]) -> list[Any]:
        return await self.execute([command for stage in stages for command in stage], replicated=True)

    async def ask(self, *command: Any, replicated: bool = False) -> Any:
        (reply,) = await self.execute([command], replicated=replicated)
        return checked(reply, self.address)

    async def best_effort(self, commands: Sequence[Command]) -> None:
        await self.execute(commands)

    async def _send(self, commands: list[Command], *, replicated: bool) -> list[Any]:
        """One round trip, and another one if the server does not know a script."""
        replies = await self._round_trip(commands, replicated=replicated)
        for _ in range(_SCRIPT_TRIES):
            forgotten = [n for n, reply in enumerate(replies) if isinstance(reply, exceptions.NoScriptError)]
            if not forgotten:
                break
            digests = dict.fromkeys(commands[n][1] for n in forgotten)
            loads: list[Command] = [("SCRIPT LOAD", BY_DIGEST[digest].source) for digest in digests]
            repeated = await self._round_trip(loads + [commands[n] for n in forgotten], replicated=replicated)
            for reply in repeated[: len(loads)]:
                if isinstance(reply, exceptions.ResponseError):
                    raise unavailable(reply, self.address)
            for n, reply in zip(forgotten, repeated[len(loads) :], strict=True):
                replies[n] = reply
        if any(isinstance(reply, exceptions.ResponseError) and "READONLY" in message_of(reply) for reply in replies):
            await self.run(self._redis_py.connection_pool.disconnect(inuse_connections=False))
        return replies

    async def _round_trip(self, commands: list[Command], *, replicated: bool) -> list[Any]:
        if not replicated or not self._wait_replicas:
            replies: list[Any] = await self.run(self._send_twice(commands))
            return replies
        wait = ("WAIT", self._wait_replicas, round(REPLICAS_TIMEOUT * 1000))
        *replies, written = await self.run(self._send_twice([*commands, wait]))
        if isinstance(written, exceptions.ResponseError):
            raise unavailable(written, self.address)
        if written < self._wait_replicas:
            message = f"{written} of the {self._wait_replicas} replicas that must have a write have it"
            raise LogUnavailable(f"Redis at {self.address}: {message} within {REPLICAS_TIMEOUT:g} s")
        return replies

    async def _send_twice(self, commands: list[Command]) -> list[Any]:
        """Send on the loop; and again, over a new connection, if the connection breaks."""
        try:
            return await self._send_on_loop(commands)
        except (exceptions.AuthenticationError, exceptions.TimeoutError):
            raise
        except exceptions.ConnectionError:
            await self._redis_py.execute_command("PING")  # type: ignore[no-untyped-call]  # its refusal is plainer
            return await self._send_on_loop(commands)

    async def _send_on_loop(self, commands: list[Command]) -> list[Any]:
        if len(commands) == 1:
            try:
                return [await call_redis_py(self._redis_py.execute_command, *commands[0])]
            except exceptions.ResponseError as error:
                return [error]
        async with self._redis_py.pipeline(transaction=False) as pipeline:
            for command in commands:
                pipeline.execute_command(*command)
            replies: list[Any] = await call_redis_py(pipeline.execute, raise_on_error=False)
            return replies

    async def run(self, work: Coroutine[Any, Any, Any], *, timeout: float | None = None) -> Any:
        """Run asyncio code on the loop; `LogUnavailable` after `timeout` (or `ANSWER_TIMEOUT`), and for its errors."""
        seconds = backend.ANSWER_TIMEOUT if timeout is None else timeout
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
        pubsub = OneConnection(self._redis_py.connection_pool)
        try:
            yield Subscription(self, pubsub, sharded=self._sharded)
        finally:
            with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
                await self._loop.run_aio_coroutine(pubsub.aclose())  # type: ignore[no-untyped-call]

    async def aclose(self) -> None:
        """Close the connections, within `CLOSE_TIMEOUT` even when cancelled."""
        with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
            await self._loop.run_aio_coroutine(self._redis_py.aclose())


def _pieces(commands: Sequence[Command]) -> Iterator[list[Command]]:
    piece: list[Command] = []
    size = 0
    for command in commands:
        piece.append(command)
        size += sum(len(arg) for arg in command if isinstance(arg, bytes | str))
        if len(piece) == COMMANDS_PER_ROUND_TRIP or size >= BYTES_PER_ROUND_TRIP:
            yield piece
            piece, size = [], 0
    if piece:
        yield piece


@asynccontextmanager
async def open_loop() -> AsyncIterator[trio_asyncio.TrioEventLoop]:
    """The loop on which clients live, for as long as the block lasts. What the block raises leaves it unchanged."""
    raised: BaseException | None = None
    try:
        async with trio_asyncio.open_loop() as loop:
            _run_more_callbacks(loop)
            try:
                yield loop
            except BaseException as error:
                raised = error
                raise
    except BaseExceptionGroup:
        if raised is None:
            raise
        reraise(raised)  # the group is that of the loop's own nurseries


@asynccontextmanager
async def open_client(url: str, *, wait_replicas: int = 0) -> AsyncIterator[Client]:
    """A client of the server, or the Sentinels, that a URL names. It connects when it is first used."""
    sentinels = None
    if url.partition("://")[0].endswith("+sentinel"):
        parsed = urls.parse_sentinel(url)
        sentinels = urls.sentinels_of(parsed)
        pool: redis.asyncio.ConnectionPool = urls.sentinel_pool(parsed, sentinels)
    else:
        parsed = urls.parse_server(url)
        pool = urls.server_pool(parsed.options, parsed.shape)
    async with open_loop() as loop:
        client = Client(redis.asyncio.Redis.from_pool(pool), loop, parsed.label, wait_replicas=wait_replicas)
        try:
            yield client
        finally:
            await client.aclose()  # noqa: ASYNC102  (it has a shield with a deadline)
            if sentinels is not None:
                with trio.move_on_after(CLOSE_TIMEOUT, shield=True):
                    await loop.run_aio_coroutine(sentinels.aclose())


def client_of_node(
    place: Place, options: dict[str, Any], loop: trio_asyncio.TrioEventLoop, *, wait_replicas: int = 0
) -> Client:
    """A client of one node of a cluster, for the caller to close."""
    host, port = place
    pool = urls.server_pool({**options, "host": host, "port": port}, f"write {urls.CLUSTER}")
    redis_py = redis.asyncio.Redis.from_pool(pool)
    return Client(redis_py, loop, urls.address_of(host, port), wait_replicas=wait_replicas, sharded=True)


def _run_more_callbacks(loop: trio_asyncio.TrioEventLoop) -> None:
    """Make a loop run all callbacks that are ready, not one in each round of Trio's scheduler."""
    # trio-asyncio (0.16) does the latter, and a command takes several callbacks: where rounds are long, because there
    # are many streams to serve, Redis would be asked a few times a second. There is no public way to change that.
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
