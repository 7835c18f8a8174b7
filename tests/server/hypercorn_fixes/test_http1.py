"""HTTP/1.1: chunks framed without h11, requests that come early, upgrades that are not taken up."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

import h11
import pytest
import trio
from starlette.responses import StreamingResponse
from starlette.routing import Route, WebSocketRoute
from trio.testing import wait_all_tasks_blocked
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, RejectConnection, RejectData, Request

from penstock import EventStreamResponse
from tests.support.connections import (
    SOON,
    brief,
    is_over_soon,
    joined,
    leave,
    patient_config,
    readers,
    served,
    unharmed,
    with_reset,
)
from tests.support.endpoints import with_tapped
from tests.support.http2_clients import Http2
from tests.support.serving import Silence, Tap, eventually, serving
from tests.support.wire import Wire, ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.requests import Request as HttpRequest
    from starlette.types import Receive, Scope, Send
    from starlette.websockets import WebSocket

    from tests.support.serving import Server


SIZES: Final = (1, 15, 16, 0, 255, 256, 4095, 65535, 65536, 1)
ALL: Final = "sizes=" + ",".join(map(str, SIZES))
OVER: Final = "Too much data for declared Content-Length"
BROKEN: Final = "Can't send data when our state is ERROR"


def pieces(target: str) -> list[bytes]:
    (sizes,) = parse_qs(target.partition("?")[2])["sizes"]
    return [random.Random(size).randbytes(size) for size in map(int, sizes.split(","))]


class Says:
    """An application that sends pieces of these sizes, with their `length` in a header if it is given."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.before: Callable[[int], None] = lambda _number: None
        """Called before each piece, with its number from 0."""

    async def __call__(self, scope: Scope, _receive: Receive, send: Send) -> None:
        target = "?" + scope["query_string"].decode()
        lengths = parse_qs(target[1:]).get("length", [])
        headers = [(b"content-length", length.encode()) for length in lengths]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        bodies = [*pieces(target), b""]
        for number, body in enumerate(bodies):
            self.before(number)
            try:
                await send({"type": "http.response.body", "body": body, "more_body": number + 1 < len(bodies)})
            except h11.LocalProtocolError as error:
                self.errors.append(str(error))


@asynccontextmanager
async def saying() -> AsyncIterator[tuple[Server, Says, Wire]]:
    """A server with such an application at /says, and a connection to it."""
    async with serving() as server, await server.wire() as wire:
        says = Says()
        server.app.router.routes.append(Route("/says", says, methods=None))
        yield server, says, wire


def asked(target: str, method: str = "GET", version: str = "1.1", **headers: str) -> bytes:
    lines = [
        f"{method} {target} HTTP/{version}",
        "host: localhost",
        *(f"{name}: {value}" for name, value in headers.items()),
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def by_h11(request: bytes, head: bytes) -> bytes:
    """The whole response with this head, its framing made by h11."""
    http = h11.Connection(h11.SERVER)
    http.receive_data(request)
    event = http.next_event()
    assert isinstance(event, h11.Request)
    method, target = event.method, event.target.decode()
    status, *fields = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    given = [tuple(field.split(b": ", 1)) for field in fields]
    kept: Any = [(name, value) for name, value in given if name not in {b"transfer-encoding", b"connection"}]
    events: list[Any] = [h11.Response(status_code=int(status.split()[1]), headers=kept)]
    if method != b"HEAD":
        events += [h11.Data(data=piece) for piece in pieces(target)]
    return b"".join(http.send(each) or b"" for each in [*events, h11.EndOfMessage()])


async def answer(wire: Wire, request: bytes) -> tuple[bytes, bytes]:
    await wire.stream.send_all(request)
    head, mark, _ = (await wire.until(b"\r\n\r\n")).partition(b"\r\n\r\n")
    whole = by_h11(request, head + mark)
    while len(wire.received) < len(whole):
        piece = await wire.stream.receive_some()
        assert piece, "the server closed the connection"
        wire.received += piece
    response, wire.received = wire.received, b""
    return response, whole


async def test_chunks_of_all_sizes_are_byte_by_byte_what_h11_makes() -> None:
    async with saying() as (_, says, wire):
        response, whole = await answer(wire, asked(f"/says?{ALL}"))
        assert response == whole
        for size in (b"1", b"f", b"10", b"ff", b"100", b"fff", b"ffff", b"10000"):
            assert b"\r\n" + size + b"\r\n" in response
        assert response.endswith(b"\r\n0\r\n\r\n")
        assert not says.errors


async def test_a_response_to_http_1_0_has_no_chunks_and_ends_with_its_connection() -> None:
    async with saying() as (_, says, wire):
        request = asked(f"/says?{ALL}", version="1.0")
        response, whole = await answer(wire, request)
        assert response == whole
        assert response.endswith(b"\r\n\r\n" + b"".join(pieces(f"?{ALL}")))
        assert await wire.rest() == b""
        assert not says.errors


async def test_each_response_on_a_connection_is_framed_in_its_own_way() -> None:
    length = f"length={sum(SIZES)}"
    async with saying() as (_, says, wire):
        for target in (ALL, f"{ALL}&{length}", "sizes=0", f"{ALL}&{length}", "sizes=7"):
            for method in ("GET", "HEAD", "POST"):
                request = asked(f"/says?{target}", method, **({"content-length": "0"} if method == "POST" else {}))
                response, whole = await answer(wire, request)
                assert response == whole, (method, target)
                assert (b"chunked" in response.partition(b"\r\n\r\n")[0]) == ("length" not in target)
        response, whole = await answer(wire, asked(f"/says?{ALL}", connection="close"))
        assert response == whole
        assert await wire.rest() == b""
        assert not says.errors


@pytest.mark.parametrize("sizes, through", [("3,4,5,6,7,8", 1), ("0,3,0,4,5", 1), ("0", 0), ("3,4,5&length=12", 3)])
async def test_only_a_responses_first_chunk_uses_h11(monkeypatch: pytest.MonkeyPatch, sizes: str, through: int) -> None:
    seen: list[bytes] = []
    send = h11.Connection.send_with_data_passthrough

    def noted(http: h11.Connection, event: Any) -> Any:
        if isinstance(event, h11.Data) and counting:
            seen.append(event.data)
        return send(http, event)

    monkeypatch.setattr(h11.Connection, "send_with_data_passthrough", noted)
    async with saying() as (_, _says, wire):
        sent = [piece for piece in pieces(f"?sizes={sizes}") if piece]
        for _ in range(2):
            counting, request = True, asked(f"/says?sizes={sizes}")
            await wire.stream.send_all(request)
            await wire.until(
                b"\r\n\r\n", sent[-1] if sent else b"0\r\n\r\n", b"" if "length" in sizes else b"0\r\n\r\n"
            )
            counting, wire.received = False, b""
            assert seen == sent[:through]
            seen.clear()


# What goes wrong


async def test_more_than_the_declared_length_is_an_error_and_does_not_leave() -> None:
    async with saying() as (_, says, wire):
        assert (await answer(wire, asked(f"/says?{ALL}")))[0]
        await wire.stream.send_all(asked("/says?sizes=6,5,1&length=10"))
        assert (await wire.rest()).endswith(b"\r\n\r\n" + pieces("?sizes=6")[0])
        assert says.errors == [OVER, BROKEN, BROKEN]


async def test_less_than_the_declared_length_is_an_error_at_the_end() -> None:
    async with saying() as (_, says, wire):
        await wire.stream.send_all(asked("/says?sizes=6,3&length=10"))
        assert (await wire.rest()).endswith(b"\r\n\r\n" + b"".join(pieces("?sizes=6,3")))
        assert says.errors == ["Too little data for declared Content-Length"]


async def test_on_a_connection_in_error_nothing_more_is_framed() -> None:
    async with saying() as (_, says, wire):

        def break_it(number: int) -> None:
            if number == 2:
                served(wire.stream).protocol.protocol.connection.send_failed()

        says.before = break_it
        await wire.stream.send_all(asked("/says?sizes=6,7,8,9"))
        one, other = pieces("?sizes=6,7")
        assert (await wire.rest()).endswith(b"\r\n\r\n6\r\n" + one + b"\r\n7\r\n" + other + b"\r\n")
        assert says.errors == [BROKEN] * 3


async def echo(socket: WebSocket) -> None:
    await socket.accept()
    for _ in SIZES:
        await socket.send_bytes(await socket.receive_bytes())
    await socket.close()


async def denial(socket: WebSocket) -> None:
    async def body() -> AsyncIterator[bytes]:
        for piece in pieces(f"?{ALL}"):
            yield piece

    await socket.send_denial_response(StreamingResponse(body(), status_code=403))


class Socket:
    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.protocol = WSConnection(ConnectionType.CLIENT)
        self._events: list[Any] = []

    async def send(self, event: Any) -> None:
        await self.wire.stream.send_all(self.protocol.send(event))

    async def next(self) -> Any:
        while not self._events:
            self.protocol.receive_data(await self.wire.stream.receive_some() or None)
            self._events += self.protocol.events()
        return self._events.pop(0)


async def test_the_messages_of_a_websocket_are_sent_as_they_are() -> None:
    async with saying() as (server, _, wire):
        server.app.router.routes.append(WebSocketRoute("/echo", echo))
        client = Socket(wire)
        await client.send(Request(host="x", target="/echo"))
        assert isinstance(await client.next(), AcceptConnection)
        for message in pieces(f"?{ALL}"):
            await client.send(BytesMessage(data=message))
            received, finished = bytearray(), False
            while not finished:
                event = await client.next()
                received += event.data
                finished = event.message_finished
            assert bytes(received) == message


async def test_the_refusal_of_a_websocket_comes_whole() -> None:
    async with saying() as (server, _, wire):
        server.app.router.routes.append(WebSocketRoute("/denial", denial))
        client, received, finished = Socket(wire), bytearray(), False
        await client.send(Request(host="x", target="/denial"))
        refusal = await client.next()
        assert isinstance(refusal, RejectConnection)
        assert refusal.status_code == 403
        while not finished:
            event = await client.next()
            assert isinstance(event, RejectData)
            received += event.data
            finished = event.body_finished
        assert bytes(received) == b"".join(pieces(f"?{ALL}"))


# Requests that come early


async def send_two(stream: trio.SocketStream, one: str, other: str) -> None:
    await stream.send_all(
        b"".join(b"GET %b HTTP/1.1\r\nhost: localhost\r\n\r\n" % path.encode() for path in (one, other))
    )


async def test_two_requests_that_come_at_once_are_answered_in_their_order() -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server:
        run_id = await server.start("tap")
        async with joined(server) as (stream, task):
            wire = Wire(stream)
            await send_two(stream, f"/v1/runs/{run_id}/stream", "/healthz")
            tap.feed("one")
            await wire.until(b"data: one\n\n")
            tap.feed("two")
            tap.end()
            first, _, second = (await wire.until(b"data: [DONE]\n\n", b'"status"')).partition(b"\r\n0\r\n\r\n")
            assert first.startswith(b"HTTP/1.1 200")
            assert first.endswith(b"data: [DONE]\n\n")
            assert b"data: two\n\n" in first
            assert second.startswith(b"HTTP/1.1 200")
            await stream.aclose()
            await is_over_soon(task, server)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_reader_without_pings_ends_with_a_client_that_sent_a_second_request_early(how: str) -> None:
    async with unharmed() as server:
        run_id = await server.start("silent")
        async with joined(server, partial(trio.open_tcp_stream, "127.0.0.1")) as (stream, task):
            await send_two(stream, f"/v1/runs/{run_id}/stream?include_pings=false", "/healthz")
            await Wire(stream).until(b"text/event-stream")
            await eventually(lambda: readers(server, run_id) == [1])
            if how == "reset":
                with_reset(stream)
        await is_over_soon(task, server)
        assert readers(server, run_id) == [0]


async def test_a_client_that_sends_more_than_headers_may_have_before_its_answer_is_over_is_cut_off() -> None:
    async with unharmed() as server:
        run_id = await server.start("silent")
        async with joined(server) as (stream, task):
            await stream.send_all(f"GET /v1/runs/{run_id}/stream HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
            await eventually(lambda: readers(server, run_id) == [1])
            with suppress(trio.BrokenResourceError):
                for _ in range(20):
                    await stream.send_all(b"x" * 1024)
            await is_over_soon(task, server)


async def test_a_second_request_that_came_early_does_not_hold_up_a_shutdown() -> None:
    async with brief(config=patient_config()) as server, joined(server) as (stream, task):
        tap, wire = Tap(), Wire(stream)
        with_tapped(server, tap)
        await send_two(stream, "/tapped", "/healthz")
        tap.feed("before")
        await wire.until(b"data: before\n\n")
        server.shutdown.set()
        await eventually(served(stream).context.terminated.is_set)
        tap.end()
        assert (await wire.rest()).endswith(b"\r\n0\r\n\r\n")
        await is_over_soon(task, server)


WEBSOCKET: Final[dict[str, Any]] = {
    "upgrade": "websocket",
    "connection": "upgrade",
    "sec_websocket_version": "13",
    "sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ==",
}


async def test_a_websocket_is_refused_and_its_connection_ends() -> None:
    async with unharmed() as server:
        run_id = await server.start("silent")
        async with joined(server) as (stream, task):
            wire = Wire(stream)
            await wire.send("GET", f"/v1/runs/{run_id}/stream", **WEBSOCKET)
            assert (await wire.rest()).startswith(b"HTTP/1.1 403")
            await is_over_soon(task, server)
        assert (await server.run(run_id))["status"] == "running"


@pytest.mark.parametrize("framing", ["content-length: 5", "transfer-encoding: chunked"])
async def test_a_request_whose_body_is_late_is_answered_and_the_connection_goes_on(framing: str) -> None:
    async with brief() as server, await server.wire() as wire:
        await wire.stream.send_all(f"POST /nowhere HTTP/1.1\r\nhost: localhost\r\n{framing}\r\n\r\n".encode())
        head = (await wire.until(b"404", b"\r\n\r\n")).lower()
        await wire.stream.send_all(b"5\r\nhello\r\n0\r\n\r\n" if "chunked" in framing else b"hello")
        await wire.send("GET", "/healthz", connection="close")
        assert (await wire.rest()).count(b"HTTP/1.1 ") == 2, head


async def failing() -> AsyncIterator[bytes]:
    yield b"data: first\n\n"
    raise ValueError("in the middle")


async def test_a_failed_response_to_a_request_that_is_still_being_sent_ends_once() -> None:
    async def answer(_request: HttpRequest) -> EventStreamResponse:
        return EventStreamResponse(failing(), observer=Silence())

    async with brief() as server, await server.wire() as wire:
        server.app.router.routes.append(Route("/failing", answer, methods=["POST"]))
        await wire.stream.send_all(b"POST /failing HTTP/1.1\r\nhost: localhost\r\ncontent-length: 10\r\n\r\n123")
        await wire.until(b"event: error\n", b"data: [DONE]\n\n")
        await wait_all_tasks_blocked(0.01)
        server.shutdown.set()
        with trio.fail_after(SOON):
            body = await wire.rest()
        assert (body.count(b"data: first"), body.count(b"event: error"), body.count(b"[DONE]")) == (1, 1, 1)


async def test_a_request_that_offers_an_upgrade_to_http2_is_answered_over_http1() -> None:
    offer: dict[str, Any] = {
        "upgrade": "h2c",
        "connection": "upgrade, http2-settings",
        "http2_settings": "AAMAAABkAAQAoAAAAAIAAAAA",
    }
    async with unharmed() as server:
        run_id = await server.start("count", 3)
        async with joined(server) as (stream, task):
            wire = Wire(stream)
            for _ in range(2):  # the connection goes on as it was
                wire.received = b""
                await wire.send("GET", f"/v1/runs/{run_id}/stream", **offer)
                answer = await wire.until(b"data: [DONE]\n\n", b"\r\n0\r\n\r\n")
                assert answer.startswith(b"HTTP/1.1 200")
                assert answer.count(b"id: ") == 4
            await stream.aclose()
            await is_over_soon(task, server)


async def test_http2_by_prior_knowledge_is_spoken_when_its_preface_comes_in_pieces() -> None:
    async with unharmed() as server:
        run_id = await server.start("count", 3)
        async with joined(server) as (stream, task):
            client = Http2(stream)
            preface = client.h2.data_to_send()
            for start in range(0, len(preface), 5):
                await stream.send_all(preface[start : start + 5])
                await wait_all_tasks_blocked()
            assert ids(await client.whole(await client.get(f"/v1/runs/{run_id}/stream"))) == [1, 2, 3, 4]
            await leave(client, "goaway")
            await is_over_soon(task, server)
