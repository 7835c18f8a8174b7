"""Sends: whole and in order, at once where the system takes them, over when the connection is."""

from __future__ import annotations

import errno
import os
import random
import socket
import struct
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
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

from penstock.server.hypercorn_fixes import connection as connection_module
from penstock.server.hypercorn_fixes.connection import AT_ONCE, PatchedTCPServer, SendDeadline
from tests.support.certificates import tls_config
from tests.support.connections import (
    SMALL,
    SOON,
    is_over_soon,
    jammed,
    joined,
    served,
    small_socket,
    unharmed,
    with_reset,
)
from tests.support.endpoints import KIB, with_endless, with_tapped
from tests.support.http2_clients import OPEN, Http2
from tests.support.serving import Tap, eventually, quiet_config, serving
from tests.support.wire import Wire, ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from hypercorn.events import Event
    from starlette.requests import Request

    from tests.support.serving import Server


async def test_sends_end_at_the_earliest_time_set_and_are_whole_before(autojump_clock: trio.testing.MockClock) -> None:
    sends = SendDeadline()
    ended: list[float] = []
    start = trio.current_time()

    async def send() -> None:
        with sends.shielded():
            await trio.sleep_forever()
        ended.append(trio.current_time() - start)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        sends.end_by(start + 10)
        sends.end_by(start + 20)
    assert ended == [10]
    with trio.fail_after(1):
        await send()  # one that begins too late


async def reads_all_of_another(client: Http2, server: Server) -> None:
    with trio.fail_after(SOON):
        run_id = await server.start("count", 50)
        number = await client.get(f"/v1/runs/{run_id}/stream")
        assert ids(await client.whole(number)) == list(range(1, 52))


async def test_an_answer_that_is_cancelled_in_mid_frame_leaves_other_streams_of_its_connection_whole() -> None:
    async with serving() as server:
        endless = with_endless(server)
        async with jammed(server) as (client, _):
            await client.reset(1)
            client.h2.ping(b"the last")
            await client.send()
            lock = served(client.socket).send_lock
            await eventually(lambda: lock.statistics().tasks_waiting > 0)  # so it has read the reset
            await wait_all_tasks_blocked(0.01)
            assert not endless.left
            await reads_all_of_another(client, server)


async def test_an_answer_that_is_cancelled_before_its_headers_are_sent_leaves_other_streams_whole() -> None:
    async with serving() as server:
        with_endless(server)
        async with jammed(server) as (client, _):
            lock = served(client.socket).send_lock
            second = await client.get("/endless?name=second")
            await eventually(lambda: lock.statistics().tasks_waiting == 1)
            await client.reset(second)
            protocol = served(client.socket).protocol.protocol
            await eventually(lambda: second not in protocol.streams)
            await wait_all_tasks_blocked(0.01)
            third = await client.get("/endless?name=second")
            await client.until_headers(third)
            assert client.headers[third]["x-name"] == "second"
            await reads_all_of_another(client, server)


class HeldEnd:
    """Holds up the end of the sending side of connections until `go_on`, as a busy system may."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun = trio.Event()
        self.go_on = trio.Event()
        say = trio.SocketStream.send_eof

        async def send_eof(stream: trio.SocketStream) -> None:
            with stream._send_conflict_detector:
                self.begun.set()
                await self.go_on.wait()
            await say(stream)

        patch.setattr(trio.SocketStream, "send_eof", send_eof)


async def test_a_send_that_meets_the_end_of_its_connection_ends_quietly(monkeypatch: pytest.MonkeyPatch) -> None:
    tap, end = Tap(), HeldEnd(monkeypatch)
    async with unharmed() as server, joined(server) as (stream, task):
        with_tapped(server, tap)
        client = Http2(stream)
        number = await client.get("/tapped")
        tap.feed("first")
        await client.blocks(number, 1)
        lock = served(stream).send_lock
        await lock.acquire()
        tap.feed("second")
        await eventually(lambda: lock.statistics().tasks_waiting == 1)
        client.h2.close_connection()
        await client.send()
        await end.begun.wait()
        lock.release()
        await wait_all_tasks_blocked()
        end.go_on.set()
        with trio.fail_after(SOON):
            await tap.closed.wait()
        await is_over_soon(task, server)


# How many turns sends take, and leave to other tasks


MANY: Final = 10 * AT_ONCE
"""Sends that the buffers of a connection take without a reader, if they are small."""
NO_END: Final = 40 * AT_ONCE
"""Sends after which a response that should have ended gives up, so that the test does."""


class Turns:
    def __init__(self) -> None:
        self.taken = 0

    async def run(self) -> None:
        while True:
            self.taken += 1
            await trio.lowlevel.checkpoint()


class Flood:
    """An application that sends without waiting; `at_each` has the turns that other tasks had had at each send."""

    def __init__(self, server: Server, sends: int, turns: Turns | None = None, chunk: bytes = b"x" * 20) -> None:
        self.turns = turns or Turns()
        self.at_each: list[int] = []
        self.first: Callable[[], Any] = lambda: None
        """Called in the same step as the sends after it."""
        self.over = trio.Event()
        self._sends = sends
        self._chunk = chunk
        server.app.router.routes += [Route("/flood", self)]

    async def __call__(self, _scope: Any, _receive: Any, send: Any) -> None:
        try:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            self.first()
            for _ in range(self._sends):
                await send({"type": "http.response.body", "body": self._chunk, "more_body": True})
                self.at_each.append(self.turns.taken)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self.over.set()


class Record:
    """What connections have done: the turns that other tasks had had at each send, and those notified of a loss."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.turns = Turns()
        self.at_each: list[int] = []
        self.notified: list[PatchedTCPServer] = []
        protocol_send, notify_lost = PatchedTCPServer.protocol_send, PatchedTCPServer._notify_lost

        async def send(connection: PatchedTCPServer, event: Event) -> None:
            if isinstance(event, RawData):
                self.at_each.append(self.turns.taken)
            await protocol_send(connection, event)

        async def notify(connection: PatchedTCPServer) -> None:
            self.notified.append(connection)
            await notify_lost(connection)

        patch.setattr(PatchedTCPServer, "protocol_send", send)
        patch.setattr(PatchedTCPServer, "_notify_lost", notify)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Record:
    return Record(monkeypatch)


def taken(at_each: list[int]) -> int:
    return at_each[-1] - at_each[0]


def starved(at_each: list[int]) -> list[int]:
    """Where so many sends follow each other that others had no turn since the first of them.

    A task that waits for a round may be the last in this one and the first in the next: between two it has not waited
    for, others have theirs.
    """
    return [n for n in range(len(at_each) - 2 * AT_ONCE) if at_each[n] == at_each[n + 2 * AT_ONCE]]


async def test_of_many_small_sends_one_in_32_takes_a_round_of_the_scheduler() -> None:
    async with serving() as server, await server.wire() as wire, trio.open_nursery() as nursery:
        flood = Flood(server, MANY)
        nursery.start_soon(flood.turns.run)
        await wire.send("GET", "/flood")
        await flood.over.wait()
        assert (await wire.until(b"\r\n0\r\n\r\n")).count(b"x" * 20) == MANY
        nursery.cancel_scope.cancel()
    assert abs(taken(flood.at_each) - MANY // AT_ONCE) <= 1


async def ask_over_http1(stream: trio.SocketStream) -> None:
    await Wire(stream).send("GET", "/flood")


async def ask_over_http2(stream: trio.SocketStream) -> None:
    client = Http2(stream)
    client.h2.increment_flow_control_window(OPEN)
    for _ in range(3):
        number = client.begin("GET", "/flood", ends=True)
        client.h2.increment_flow_control_window(OPEN, number)
    await client.send()  # all of it: what comes may end the connection


ASKS: Final = [ask_over_http1, ask_over_http2]


@pytest.mark.parametrize("ask", ASKS)
async def test_a_client_that_always_reads_cannot_keep_others_from_their_turn(ask: Any, recorded: Record) -> None:
    async with serving() as server, await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        flood = Flood(server, NO_END, recorded.turns, chunk=b"x" * 2000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(recorded.turns.run)
            await ask(stream)
            size = NO_END * 2000 * (3 if ask is ask_over_http2 else 1)
            while size > 0:
                size -= len(await stream.receive_some(2**20))
            await flood.over.wait()
            nursery.cancel_scope.cancel()
    assert len(recorded.at_each) > 10 * AT_ONCE
    assert not starved(recorded.at_each)


async def test_over_tls_each_takes_a_round_and_all_of_it_comes() -> None:
    with tls_config("http/1.1") as (config, trusts):
        async with serving(config=config) as server, trio.open_nursery() as nursery:
            flood = Flood(server, MANY)
            nursery.start_soon(flood.turns.run)
            tcp = await trio.open_tcp_stream("127.0.0.1", server.port)
            async with trio.SSLStream(tcp, trusts, server_hostname="127.0.0.1", https_compatible=True) as stream:
                await stream.send_all(b"GET /flood HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                received = b"".join([piece async for piece in stream])
            assert received.count(b"x" * 20) == MANY
            assert received.endswith(b"\r\n0\r\n\r\n")
            assert taken(flood.at_each) >= MANY - 1
            nursery.cancel_scope.cancel()


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def reset(stream: trio.SocketStream, _connection: PatchedTCPServer) -> None:
    if stream.socket.fileno() != -1:
        with_reset(stream)
        stream.socket.close()


def close_here(_stream: trio.SocketStream, connection: PatchedTCPServer) -> None:
    connection.stream.socket.close()


@pytest.mark.parametrize("lose", [reset, close_here])
@pytest.mark.parametrize("ask", ASKS)
async def test_a_send_on_a_lost_connection_notifies_its_responses_once(ask: Any, lose: Any, recorded: Record) -> None:
    async with unharmed(config=quiet_config()) as server:
        flood = Flood(server, MANY, recorded.turns, chunk=b"x" * 2000)
        await eventually(lambda: len(server.connections()) == 1)
        before = descriptors()
        async with joined(server) as (stream, task):
            connection = served(stream)
            flood.first = partial(lose, stream, connection)
            await ask(stream)
            await is_over_soon(task, server)
            notified = recorded.notified.count(connection)
            # The reading task may find it out first, unless it is found in the very step in which it happens.
            assert notified == 1 or (notified == 0 and (lose is reset or ask is ask_over_http2))
        await eventually(lambda: descriptors() <= before)


@pytest.mark.parametrize("ask", ASKS)
async def test_a_response_that_sends_to_a_lost_client_leaves_others_their_turn(ask: Any, recorded: Record) -> None:
    async with serving() as server:
        flood = Flood(server, NO_END, recorded.turns)
        async with joined(server) as (stream, task), trio.open_nursery() as nursery:
            nursery.start_soon(recorded.turns.run)
            flood.first = partial(close_here, stream, served(stream))
            await ask(stream)
            await is_over_soon(task, server)
            nursery.cancel_scope.cancel()
    assert not starved(recorded.at_each)


async def test_a_descriptor_that_another_has_got_meanwhile_is_not_written_to() -> None:
    async with unharmed(config=quiet_config()) as server, joined(server) as (stream, task):
        flood = Flood(server, MANY)
        others: list[socket.socket] = []

        def replace() -> None:
            connection = served(stream)
            number = connection.stream.socket.fileno()
            connection.stream.socket.close()
            while number not in [other.fileno() for other in others]:
                others.extend(socket.socketpair())

        flood.first = replace
        await ask_over_http1(stream)
        await is_over_soon(task, server)
        for other in others:
            other.setblocking(False)
            with pytest.raises(BlockingIOError):
                other.recv(1)
        for other in others:
            other.close()


BIG: Final = 2**20
"""More than a connection with small buffers takes."""


def pieces(seed: int) -> list[bytes]:
    """What a response is made of: little and much, in any order; no two of them are alike."""
    rng = random.Random(seed)
    return [rng.randbytes(rng.choice([1, 20, 300, 5000, 40_000, 200_000])) for _ in range(25)]


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
        for seed in range(2):
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
        numbers = [await client.get(f"/body?seed={seed}") for seed in range(3)]
        sent = 0
        while not client.over.issuperset(numbers):
            client.h2.ping(struct.pack("!Q", sent))
            sent += 1
            await client.receive()
        assert sent > len(numbers)
        assert [client.bodies[number] for number in numbers] == [b"".join(pieces(seed)) for seed in range(3)]


# Several tasks that send on one connection


@asynccontextmanager
async def connection() -> AsyncIterator[tuple[PatchedTCPServer, trio.SocketStream]]:
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


async def test_sends_that_begin_while_another_waits_are_in_order() -> None:
    async with connection() as (made, client), trio.open_nursery() as nursery:
        nursery.start_soon(made.protocol_send, RawData(data=record(0, BIG)))
        await wait_all_tasks_blocked(0.01)
        for name in range(1, 5):
            nursery.start_soon(made.protocol_send, RawData(data=record(name, 10)))
            await wait_all_tasks_blocked()
        assert await records(client, BIG + 5 + 4 * 15) == [(0, BIG), *((name, 10) for name in range(1, 5))]


class Moody:
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


@pytest.mark.parametrize("seed", range(3))
async def test_sends_do_not_mix_whatever_is_taken_of_each_write(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection_module, "os", SimpleNamespace(write=Moody(seed, os.write).write))
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


async def test_a_send_of_no_bytes_does_not_wait() -> None:
    async with connection() as (made, client), trio.open_nursery() as nursery:
        for _ in range(100):
            await made.protocol_send(RawData(data=b""))
        nursery.start_soon(made.protocol_send, RawData(data=record(1, BIG)))
        nursery.start_soon(made.protocol_send, RawData(data=b""))
        assert await records(client, BIG + 5) == [(1, BIG)]
        await made.protocol_send(RawData(data=b""))
    assert not made._lost


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


async def test_when_sends_must_be_over_nothing_more_is_sent_after_what_was_cut_off() -> None:
    chunk = b"400\r\n" + KIB + b"\r\n"
    async with serving() as server, joined(server) as (stream, task):
        endless = with_endless(server)
        made = served(stream)
        with_small_buffer(stream)
        await Wire(stream).send("GET", "/endless")
        await eventually(made.send_lock.locked)
        await wait_all_tasks_blocked(0.05)
        assert made.send_lock.locked()
        held = endless.yielded[""]
        assert held < 1000  # the source waits for its client
        made._sends.end_by(trio.current_time())
        await eventually(lambda: endless.yielded[""] > held)
        received = bytearray()
        with trio.move_on_after(0.5):  # the connection stays open, and nothing comes on it any more
            while piece := await stream.receive_some():
                received += piece
        body = bytes(received).partition(b"\r\n\r\n")[2]
        assert body == (chunk * (len(body) // len(chunk) + 1))[: len(body)], "something is missing in between"
        with_reset(stream)
        stream.socket.close()
        await is_over_soon(task, server)
