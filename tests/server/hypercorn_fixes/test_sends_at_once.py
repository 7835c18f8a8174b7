"""Sends that the system takes at once: the turns that they take, those that they leave to others, and who is told."""

from __future__ import annotations

import socket
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from hypercorn.events import RawData
from starlette.routing import Route, WebSocketRoute
from trio.testing import wait_all_tasks_blocked

from penstock import serve
from penstock.server.hypercorn_fixes import AT_ONCE, PatchedTCPServer
from tests.server.hypercorn_fixes.test_versions import nothing_is_corrected
from tests.support.certificates import tls_config
from tests.support.connections import SMALL, SOON, brief, is_over_soon, joined, served, with_reset
from tests.support.endpoints import with_endless
from tests.support.http2_clients import OPEN, Http2
from tests.support.serving import eventually, serving
from tests.support.stalling import stalled
from tests.support.uncorrected import as_it_is, in_place_of
from tests.support.wire import Wire

if TYPE_CHECKING:
    from collections.abc import Callable

    from hypercorn.events import Event

    from tests.support.serving import Server

MANY: Final = 10 * AT_ONCE
"""Sends that the buffers of a connection take without a reader, if they are small."""
NO_END: Final = 100 * AT_ONCE
"""Sends after which a response that should have ended gives up, so that the test does."""
UPGRADE: Final = (
    b"GET /socket HTTP/1.1\r\nhost: localhost\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
    b"sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)


class Turns:
    """A task that does nothing, and counts its turns."""

    def __init__(self) -> None:
        self.taken = 0

    async def run(self) -> None:
        while True:
            self.taken += 1
            await trio.lowlevel.checkpoint()


class Flood:
    """An application that sends and never waits for anything else; in `at_each` it says how many turns others had."""

    def __init__(self, server: Server, sends: int, turns: Turns | None = None, chunk: bytes = b"x" * 20) -> None:
        self.turns = turns or Turns()
        self.at_each: list[int] = []
        self.first: Callable[[], Any] = lambda: None
        """Called in the same step as the sends after it."""
        self.over = trio.Event()
        self._sends = sends
        self._chunk = chunk
        server.app.router.routes += [Route("/flood", self), WebSocketRoute("/socket", self)]

    async def __call__(self, scope: Any, _receive: Any, send: Any) -> None:
        try:
            await self._flood(self._http if scope["type"] == "http" else self._websocket, send)
        finally:
            self.over.set()

    async def _flood(self, message: Callable[[str], dict[str, Any]], send: Any) -> None:
        await send(message("start"))
        self.first()
        for _ in range(self._sends):
            await send(message("chunk"))
            self.at_each.append(self.turns.taken)
        await send(message("end"))

    def _http(self, what: str) -> dict[str, Any]:
        if what == "start":
            return {"type": "http.response.start", "status": 200, "headers": []}
        chunk = self._chunk if what == "chunk" else b""
        return {"type": "http.response.body", "body": chunk, "more_body": bool(chunk)}

    def _websocket(self, what: str) -> dict[str, Any]:
        if what == "chunk":
            return {"type": "websocket.send", "bytes": self._chunk}
        return {"type": "websocket.accept" if what == "start" else "websocket.close"}


class Watched(PatchedTCPServer):
    """One that knows how many turns others had at each of its sends, and how often it was lost."""

    turns: Turns
    at_each: list[int]
    told: list[PatchedTCPServer]

    async def protocol_send(self, event: Event) -> None:
        if isinstance(event, RawData):
            self.at_each.append(self.turns.taken)
        await super().protocol_send(event)

    async def _tell(self) -> None:
        self.told.append(self)
        await super()._tell()


def watched(turns: Turns) -> type[Watched]:
    class OneOfThem(Watched):
        pass

    OneOfThem.turns, OneOfThem.at_each, OneOfThem.told = turns, [], []
    return OneOfThem


def taken(at_each: list[int]) -> int:
    return at_each[-1] - at_each[0]


def starved(at_each: list[int]) -> list[int]:
    """Where so many sends follow each other that others had no turn since the first of them.

    A task that waits for a round may be the last in this one and the first in the next: between two it has not waited
    for, others have theirs.
    """
    return [n for n in range(len(at_each) - 2 * AT_ONCE) if at_each[n] == at_each[n + 2 * AT_ONCE]]


async def small_sends() -> list[int]:
    """How many turns another task had at each of many small sends of one response."""
    async with serving() as server, await server.wire() as wire, trio.open_nursery() as nursery:
        flood = Flood(server, MANY)
        nursery.start_soon(flood.turns.run)
        await wire.send("GET", "/flood")
        await flood.over.wait()
        assert (await wire.until(b"\r\n0\r\n\r\n")).count(b"x" * 20) == MANY
        nursery.cancel_scope.cancel()
    return flood.at_each


# What they cost, and leave to others


async def test_of_many_small_sends_one_in_32_takes_a_round_of_the_scheduler() -> None:
    assert abs(taken(await small_sends()) - MANY // AT_ONCE) <= 1


async def test_without_the_correction_each_takes_one() -> None:
    with as_it_is("TCPServer"):
        assert taken(await small_sends()) >= MANY - 1


async def test_on_a_version_of_hypercorn_that_is_not_known_each_takes_one(monkeypatch: pytest.MonkeyPatch) -> None:
    nothing_is_corrected(monkeypatch)
    assert taken(await small_sends()) >= MANY - 1


async def ask_over_http1(stream: trio.SocketStream) -> None:
    await Wire(stream).send("GET", "/flood")


async def ask_over_http2(stream: trio.SocketStream) -> None:
    client = Http2(stream)
    client.h2.increment_flow_control_window(OPEN)
    for _ in range(3):
        number = client.begin("GET", "/flood", ends=True)
        client.h2.increment_flow_control_window(OPEN, number)
    await client.send()  # all of it: what comes may end the connection


async def ask_over_websocket(stream: trio.SocketStream) -> None:
    await stream.send_all(UPGRADE)


ASKS: Final = [ask_over_http1, ask_over_http2, ask_over_websocket]


@pytest.mark.parametrize("ask", ASKS)
async def test_a_client_that_always_reads_cannot_keep_others_from_their_turn(ask: Any) -> None:
    turns = Turns()
    with in_place_of(TCPServer=(kind := watched(turns))):
        async with serving() as server, await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
            flood = Flood(server, NO_END, turns, chunk=b"x" * 2000)
            async with trio.open_nursery() as nursery:
                nursery.start_soon(turns.run)
                await ask(stream)
                size = NO_END * 2000 * (3 if ask is ask_over_http2 else 1)
                while size > 0:
                    size -= len(await stream.receive_some(2**20))
                await flood.over.wait()
                nursery.cancel_scope.cancel()
    assert len(kind.at_each) > 10 * AT_ONCE
    assert not starved(kind.at_each)


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


# The client does not read


async def test_a_client_that_never_reads_lets_the_source_wait_until_sends_must_be_over() -> None:
    async with serving() as server:
        endless = with_endless(server)
        async with joined(server) as (stream, task):
            connection = served(stream)
            connection.stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
            await Wire(stream).send("GET", "/endless")
            await eventually(connection.send_lock.locked)
            await wait_all_tasks_blocked(0.01)
            assert connection.send_lock.locked()
            await wait_all_tasks_blocked(0.05)
            held = endless.yielded[""]
            assert held < 1000
            connection._sends.end_by(trio.current_time())
            await eventually(lambda: endless.yielded[""] > held)
            with_reset(stream)
            stream.socket.close()
            await is_over_soon(task, server)


async def test_a_client_that_never_reads_is_given_up_by_tcp() -> None:
    async with brief(run=partial(serve, signals=(), tcp_user_timeout=1.0)) as server:
        endless = with_endless(server)
        async with stalled(server, "/endless"):
            with trio.fail_after(SOON):
                await eventually(lambda: endless.left == {""})
