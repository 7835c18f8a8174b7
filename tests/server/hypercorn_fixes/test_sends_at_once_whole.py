"""Sends that the system takes at once, or in part: what comes is whole and in order, whoever sends and is cancelled."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
from contextlib import asynccontextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, Final

import h11
import pytest
import trio
from hypercorn.config import Config
from hypercorn.events import RawData
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from trio.testing import wait_all_tasks_blocked

from penstock.server import hypercorn_fixes as corrections
from penstock.server.hypercorn_fixes import AT_ONCE, PatchedTCPServer
from tests.support.connections import SMALL, SOON, is_over_soon, joined, served, small_socket, with_reset
from tests.support.endpoints import KIB, with_endless
from tests.support.http2_clients import OPEN, Http2
from tests.support.serving import eventually, serving
from tests.support.wire import Wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.requests import Request

    from tests.support.serving import Server

BIG: Final = 2**20
"""More than a connection with small buffers takes."""


# Bodies, by seed


def pieces(seed: int) -> list[bytes]:
    """What a response is made of: little and much, in any order; no two of them are alike."""
    rng = random.Random(seed)
    return [rng.randbytes(rng.choice([1, 20, 300, 5000, 40_000, 200_000])) for _ in range(60)]


def with_bodies(server: Server) -> None:
    """Let the server stream them at /body?seed=..., or send them whole, with their length."""

    async def source(seed: int) -> AsyncIterator[bytes]:
        for piece in pieces(seed):
            yield piece

    async def body(request: Request) -> Response:
        seed = int(request.query_params["seed"])
        if "whole" in request.query_params:
            return Response(b"".join(pieces(seed)))
        return StreamingResponse(source(seed))

    server.app.router.routes.append(Route("/body", body))


def with_small_buffer(stream: trio.SocketStream) -> None:
    """What the server sends to this client is taken in part, mostly."""
    served(stream).stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)


@pytest.mark.parametrize("how", ["", "&whole"])
async def test_over_http1_bodies_come_byte_by_byte_on_a_connection_that_takes_little(how: str) -> None:
    async with serving() as server, joined(server) as (stream, _):
        with_bodies(server)
        with_small_buffer(stream)
        http = h11.Connection(h11.CLIENT)
        for seed in range(3):
            await Wire(stream).send("GET", f"/body?seed={seed}{how}")
            http.send(h11.Request(method="GET", target="/", headers=[("host", "localhost")]))
            http.send(h11.EndOfMessage())
            body = bytearray()
            while not isinstance(event := http.next_event(), h11.EndOfMessage):
                if event is h11.NEED_DATA:
                    http.receive_data(await stream.receive_some(random.Random(len(body)).randint(1, 20_000)))
                elif isinstance(event, h11.Data):
                    body += event.data
            assert bytes(body) == b"".join(pieces(seed))
            http.start_next_cycle()


async def test_over_http2_many_streams_and_pings_come_byte_by_byte_on_a_connection_that_takes_little() -> None:
    async with serving() as server, joined(server) as (stream, _):
        with_bodies(server)
        with_small_buffer(stream)
        client = Http2(stream)
        client.h2.increment_flow_control_window(OPEN)
        numbers = [await client.get(f"/body?seed={seed}") for seed in range(5)]
        sent = 0
        while not client.over.issuperset(numbers):
            client.h2.ping(struct.pack("!Q", sent))
            sent += 1
            await client.receive()
        assert sent > len(numbers)
        assert [client.bodies[number] for number in numbers] == [b"".join(pieces(seed)) for seed in range(5)]


# Several who send on one connection


@asynccontextmanager
async def connection() -> AsyncIterator[tuple[PatchedTCPServer, trio.SocketStream]]:
    """A connection whose sends are the test's, with small buffers, and its client."""
    listening = trio.socket.socket()
    await listening.bind(("127.0.0.1", 0))
    listening.listen()
    async with (
        trio.SocketListener(listening) as listener,
        await small_socket(listening.getsockname()[1]) as client,
        await listener.accept() as stream,
    ):
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        made: Any = PatchedTCPServer(None, Config(), None, None, stream)  # type: ignore[arg-type]
        yield made, client


def record(name: int, size: int) -> bytes:
    """Bytes that say how many they are, and whose."""
    return struct.pack("!BL", name, size) + bytes([name]) * size


async def records(client: trio.SocketStream, size: int) -> list[tuple[int, int]]:
    """Take so much in, slowly, and take it apart: whose records came, and how much was in them."""
    received = bytearray()
    while len(received) < size:
        received += await client.receive_some(3000)
    found = []
    while received:
        name, length = struct.unpack_from("!BL", received)
        assert received[5 : 5 + length] == bytes([name]) * length, "two records are mixed up"
        found.append((name, length))
        del received[: 5 + length]
    return found


async def test_who_comes_while_another_waits_in_mid_send_waits_for_their_turn_in_order() -> None:
    async with connection() as (made, client), trio.open_nursery() as nursery:
        nursery.start_soon(made.protocol_send, RawData(data=record(0, BIG)))
        await wait_all_tasks_blocked(0.01)
        for name in range(1, 5):
            nursery.start_soon(made.protocol_send, RawData(data=record(name, 10)))
            await wait_all_tasks_blocked()
        assert await records(client, BIG + 5 + 4 * 15) == [(0, BIG), *((name, 10) for name in range(1, 5))]


class Moody:
    """A system that takes what it likes of each write: nothing, a part or all of it; or is interrupted or full."""

    def __init__(self, seed: int, write: Callable[[int, Any], int]) -> None:
        self._rng = random.Random(seed)
        self._write = write

    def write(self, descriptor: int, data: Any) -> int:
        match self._rng.randrange(5):
            case 0:
                return 0
            case 1:
                raise BlockingIOError(errno.EAGAIN, "full")
            case 2:
                return self._write(descriptor, data)
        return self._write(descriptor, memoryview(data)[: self._rng.randint(1, len(data))])


@pytest.mark.parametrize("seed", range(10))
async def test_nothing_gets_in_between_whatever_the_system_takes_of_each_write(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also in the very step in which a part has been taken: the next one to send comes before anything else."""
    monkeypatch.setattr(corrections, "os", SimpleNamespace(write=Moody(seed, os.write).write))
    rng = random.Random(seed)
    sizes = [[rng.choice([0, 1, 100, 3000, 30_000]) for _ in range(30)] for _ in range(6)]

    async def send_all(name: int) -> None:
        for size in sizes[name]:
            with trio.CancelScope() as scope:  # which makes no difference to a send
                if rng.random() < 0.3:
                    scope.cancel()
                await made.protocol_send(RawData(data=record(name, size)))
            if rng.random() < 0.3:
                await trio.lowlevel.checkpoint()

    async with connection() as (made, client), trio.open_nursery() as nursery:
        for name in range(len(sizes)):
            nursery.start_soon(send_all, name)
        came = await records(client, sum(5 + size for each in sizes for size in each))
    for name, each in enumerate(sizes):
        assert [size for of, size in came if of == name] == each


async def test_nothing_is_sent_for_no_bytes_and_nobody_is_waited_for() -> None:
    async with connection() as (made, client), trio.open_nursery() as nursery:
        for _ in range(100):
            await made.protocol_send(RawData(data=b""))
        nursery.start_soon(made.protocol_send, RawData(data=record(1, BIG)))
        nursery.start_soon(made.protocol_send, RawData(data=b""))
        assert await records(client, BIG + 5) == [(1, BIG)]
        await made.protocol_send(RawData(data=b""))
    assert not made._lost


# Cancelled


async def test_a_send_that_is_cancelled_in_the_middle_is_whole() -> None:
    async with connection() as (made, client), trio.open_nursery() as nursery:
        scope = trio.CancelScope()

        async def send() -> None:
            with scope:
                await made.protocol_send(RawData(data=record(1, BIG)))

        nursery.start_soon(send)
        await wait_all_tasks_blocked(0.01)
        assert made.send_lock.locked()
        scope.cancel()
        await wait_all_tasks_blocked(0.01)
        nursery.start_soon(made.protocol_send, RawData(data=record(2, 10)))
        assert await records(client, BIG + 5 + 15) == [(1, BIG), (2, 10)]


class Cancelled:
    """An application all of whose sends are cancelled before they begin, but for the last."""

    async def __call__(self, _scope: Any, _receive: Any, send: Any) -> None:
        with trio.CancelScope() as scope:
            scope.cancel()
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"4")]})
            await send({"type": "http.response.body", "body": b"done", "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def test_a_connection_whose_response_is_cancelled_when_all_is_sent_serves_the_next_request() -> None:
    async with serving() as server, await server.wire() as wire:
        server.app.router.routes.append(Route("/cancelled", Cancelled()))
        for _ in range(2 * AT_ONCE):
            wire.received = b""
            await wire.send("GET", "/cancelled")
            await wire.until(b"\r\n\r\ndone")


async def test_a_stream_that_is_cancelled_leaves_its_connection_to_others() -> None:
    async with serving() as server, joined(server) as (stream, _):
        endless, client = with_endless(server), Http2(stream)
        with_bodies(server)
        client.h2.increment_flow_control_window(OPEN)
        for _ in range(5):
            doomed = await client.get("/endless")
            await client.until_headers(doomed)
            await client.reset(doomed)
            await eventually(lambda: endless.left == {""})
            endless.left.clear()
            number = await client.get("/body?seed=1")
            assert await client.whole_body(number) == b"".join(pieces(1))


# When all sends must be over


@asynccontextmanager
async def cut_off(server: Server) -> AsyncIterator[tuple[trio.SocketStream, PatchedTCPServer]]:
    """A client that did not read, and whose response was cut off in the middle of a send and goes on."""
    endless = with_endless(server)
    async with joined(server) as (stream, task):
        made = served(stream)
        with_small_buffer(stream)
        await Wire(stream).send("GET", "/endless")
        await eventually(made.send_lock.locked)
        await wait_all_tasks_blocked(0.05)
        assert made.send_lock.locked()
        made._sends.end_by(trio.current_time())
        held = endless.yielded[""]
        await eventually(lambda: endless.yielded[""] > held)
        yield stream, made
        with_reset(stream)
        stream.socket.close()
        await is_over_soon(task, server)


async def test_when_sends_must_be_over_nothing_more_is_sent_after_what_was_cut_off() -> None:
    chunk = b"400\r\n" + KIB + b"\r\n"
    async with serving() as server, cut_off(server) as (stream, _):
        received = bytearray()
        with trio.move_on_after(SOON):
            while len(received) < BIG and (piece := await stream.receive_some()):
                received += piece
                body = bytes(received).partition(b"\r\n\r\n")[2]
                assert body == (chunk * (len(body) // len(chunk) + 1))[: len(body)], "something is missing in between"
