"""The proxy between a client and a redis-server, over raw sockets: what it passes on, and what it loses on purpose."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import pytest
import redis
import trio
from tests.support.proxy import Proxy, _end, proxy
from tests.support.redis_servers import shared_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

GUARD = 10


@pytest.fixture
async def between() -> AsyncIterator[Proxy]:
    server = shared_server()
    server.flushall()
    async with proxy(server.port) as between:
        yield between


class Talk:
    """One connection of a client."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream

    async def send(self, *lines: str) -> None:
        await self.stream.send_all("".join(f"{line}\r\n" for line in lines).encode())

    async def hear(self, *lines: str) -> None:
        """Exactly these lines come."""
        expected = "".join(f"{line}\r\n" for line in lines).encode()
        heard = b""
        with trio.fail_after(GUARD):
            while len(heard) < len(expected) and (piece := await self.stream.receive_some(len(expected) - len(heard))):
                heard += piece
        assert heard == expected

    async def ask(self, line: str, *reply: str) -> None:
        await self.send(line)
        await self.hear(*reply)

    async def skip_reply_to(self, line: str) -> None:
        await self.send(line)
        heard = bytearray()
        with trio.fail_after(GUARD):
            while _end(heard) is None:
                heard += await self.stream.receive_some()

    async def is_broken(self) -> bool:
        with trio.fail_after(GUARD):
            try:
                return not await self.stream.receive_some()
            except trio.BrokenResourceError:
                return True

    async def is_silent(self) -> bool:
        with trio.move_on_after(0.05) as waiting:
            await self.stream.receive_some()
        return waiting.cancelled_caught


@asynccontextmanager
async def talk(between: Proxy) -> AsyncIterator[Talk]:
    async with await trio.open_tcp_stream("127.0.0.1", between.port) as stream:
        yield Talk(stream)


async def test_requests_and_replies_pass_and_are_counted(between: Proxy) -> None:
    async with talk(between) as one:
        await one.ask("SET key 1", "+OK")
        await one.ask("*2\r\n$3\r\nget\r\n$3\r\nkey", "$1", "1")
        await one.send("GET key", "PING", "GET nothing", "MGET key nothing")
        await one.hear("$1", "1", "+PONG", "$-1", "*2", "$1", "1", "$-1")
        assert between.connections == 1
    assert between.requests == {"SET": 1, "GET": 3, "PING": 1, "MGET": 1}


@pytest.mark.parametrize("protocol", [2, 3])
async def test_redis_py_works_through_it(between: Proxy, protocol: int) -> None:
    value = "x" * 300_000

    def use() -> None:
        with redis.Redis.from_url(between.url, protocol=protocol, decode_responses=True) as client:
            client.set("key", value)
            assert client.get("key") == value
            client.hset("hash", mapping={"a": 1})
            assert client.hgetall("hash") == {"a": "1"}
            assert client.pipeline().incr("n").incr("n").execute() == [1, 2]

    await trio.to_thread.run_sync(use)


@pytest.mark.parametrize("hello", ["HELLO 2", "HELLO 3"])
async def test_a_lost_reply_follows_its_effect_and_breaks_the_connection(between: Proxy, hello: str) -> None:
    between.drop_reply_when(lambda reply: reply.command == "SET" and reply.arguments[0] == b"key", times=1)
    async with talk(between) as one, talk(between) as other:
        await one.skip_reply_to(hello)
        await other.ask("SET another 1", "+OK")
        await one.send("SET key 1")
        assert await one.is_broken()
        await other.ask("GET key", "$1", "1")
        await other.ask("SET key 2", "+OK")
    assert between.lost == 1


async def test_a_cut_breaks_all_connections_and_new_ones_are_accepted(between: Proxy) -> None:
    async with talk(between) as one, talk(between) as two:
        await one.ask("PING", "+PONG")
        await two.ask("PING", "+PONG")
        between.cut()
        assert between.connections == 0
        assert await one.is_broken()
        assert await two.is_broken()
    async with talk(between) as three:
        await three.ask("PING", "+PONG")


async def test_what_is_refused_is_accepted_again_on_the_same_port(between: Proxy) -> None:
    port = between.port
    for _ in range(3):
        async with talk(between) as one:
            await one.ask("PING", "+PONG")
            between.refuse()
            assert await one.is_broken()
        with pytest.raises(OSError, match=r"failed"):
            await trio.open_tcp_stream("127.0.0.1", port)
        await between.accept()
        await between.accept()  # nothing more to do
        assert between.port == port


async def test_a_stall_holds_up_both_directions_until_it_goes_on(between: Proxy) -> None:
    async with talk(between) as one:
        await one.ask("SUBSCRIBE news", "*3", "$9", "subscribe", "$4", "news", ":1")
        between.stall()
        async with talk(between) as two:
            await two.send("SET key 1")
            await shared_server().command("PUBLISH", "news", "rain")
            assert await two.is_silent()
            assert await one.is_silent()
            assert await shared_server().command("EXISTS", "key") == 0
            assert between.connections == 2
            between.go_on()
            await two.hear("+OK")
            await one.hear("*3", "$7", "message", "$4", "news", "$4", "rain")


@pytest.mark.parametrize("protocol", [2, 3])
async def test_messages_are_passed_on_or_swallowed(between: Proxy, protocol: int) -> None:
    mark = "*" if protocol == 2 else ">"
    async with talk(between) as one:
        if protocol == 3:
            between.drop_reply_when(lambda reply: reply.command != "HELLO")  # a push is no reply
            await one.skip_reply_to("HELLO 3")
        await one.ask("SUBSCRIBE a", f"{mark}3", "$9", "subscribe", "$1", "a", ":1")
        between.drop_messages = True
        await shared_server().command("PUBLISH", "a", "1")
        await one.ask("SUBSCRIBE b", f"{mark}3", "$9", "subscribe", "$1", "b", ":2")
        between.drop_messages = False
        await shared_server().command("PUBLISH", "b", "2")
        await one.hear(f"{mark}3", "$7", "message", "$1", "b", "$1", "2")
        if protocol == 2:
            await one.ask("PING", "*2", "$4", "pong", "$0", "")
    assert between.swallowed == 1


@pytest.mark.parametrize(
    "frame",
    [
        b"+OK\r\n",
        b"$0\r\n\r\n",
        b"$-1\r\n",
        b"*-1\r\n",
        b"*0\r\n",
        b"*2\r\n*1\r\n:1\r\n$4\r\n\r\n\r\n\r\n",
        b"%1\r\n+k\r\n*1\r\n_\r\n",
        b"~2\r\n#t\r\n,1.5\r\n",
        b">2\r\n+message\r\n=5\r\ntxt:a\r\n",
        b"|1\r\n+ttl\r\n:9\r\n$1\r\na\r\n",
        b"!3\r\nERR\r\n",
    ],
)
def test_the_end_of_a_reply_is_found_and_not_before_it_is_there(frame: bytes) -> None:
    assert _end(bytearray(frame + b"+more\r\n")) == len(frame)
    assert {_end(bytearray(frame[:length])) for length in range(len(frame))} == {None}
