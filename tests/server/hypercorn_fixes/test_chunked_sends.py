"""Chunks of a body that are framed without h11: byte by byte what h11 makes of them, on every kind of response."""

from __future__ import annotations

import random
from contextlib import asynccontextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import parse_qs

import h11
import pytest
from hypercorn.protocol.h11 import H11Protocol
from starlette.responses import StreamingResponse
from starlette.routing import Route, WebSocketRoute
from wsproto import ConnectionType, WSConnection
from wsproto.events import AcceptConnection, BytesMessage, RejectConnection, RejectData, Request

from penstock.server.hypercorn_fixes.http1 import PatchedH11
from tests.support.connections import served
from tests.support.serving import serving
from tests.support.uncorrected import in_place_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from starlette.types import Receive, Scope, Send
    from starlette.websockets import WebSocket

    from tests.support.serving import Server
    from tests.support.wire import Wire

SIZES: Final = (1, 15, 16, 0, 255, 256, 4095, 65535, 65536, 1)
ALL: Final = "sizes=" + ",".join(map(str, SIZES))
OVER: Final = "Too much data for declared Content-Length"
BROKEN: Final = "Can't send data when our state is ERROR"


class ThroughH11(PatchedH11):
    """As in Hypercorn: every chunk of a body goes through all of h11."""

    stream_send = H11Protocol.stream_send


WAYS: Final[dict[str, type[PatchedH11] | None]] = {"with the correction": None, "without it": ThroughH11}
either_way: Final = pytest.mark.parametrize("kind", WAYS.values(), ids=WAYS)


def pieces(target: str) -> list[bytes]:
    """What is sent to whoever asks for this, piece by piece: any bytes."""
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
async def saying(kind: type[PatchedH11] | None) -> AsyncIterator[tuple[Server, Says, Wire]]:
    """A server with such an application at /says, and a connection to it."""
    with nullcontext() if kind is None else in_place_of(H11Protocol=kind):
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
    """A response, and what it should be; the connection goes on."""
    await wire.stream.send_all(request)
    head, mark, _ = (await wire.until(b"\r\n\r\n")).partition(b"\r\n\r\n")
    whole = by_h11(request, head + mark)
    while len(wire.received) < len(whole):
        piece = await wire.stream.receive_some()
        assert piece, "the server closed the connection"
        wire.received += piece
    response, wire.received = wire.received, b""
    return response, whole


@either_way
async def test_chunks_of_all_sizes_are_byte_by_byte_what_h11_makes(kind: type[PatchedH11] | None) -> None:
    async with saying(kind) as (_, says, wire):
        response, whole = await answer(wire, asked(f"/says?{ALL}"))
        assert response == whole
        for size in (b"1", b"f", b"10", b"ff", b"100", b"fff", b"ffff", b"10000"):
            assert b"\r\n" + size + b"\r\n" in response
        assert response.endswith(b"\r\n0\r\n\r\n")
        assert not says.errors


@either_way
async def test_a_response_to_http_1_0_has_no_chunks_and_ends_with_its_connection(kind: type[PatchedH11] | None) -> None:
    async with saying(kind) as (_, says, wire):
        request = asked(f"/says?{ALL}", version="1.0")
        response, whole = await answer(wire, request)
        assert response == whole
        assert response.endswith(b"\r\n\r\n" + b"".join(pieces(f"?{ALL}")))
        assert await wire.rest() == b""
        assert not says.errors


@either_way
async def test_each_response_on_a_connection_is_framed_in_its_own_way(kind: type[PatchedH11] | None) -> None:
    length = f"length={sum(SIZES)}"
    async with saying(kind) as (_, says, wire):
        for target in (ALL, f"{ALL}&{length}", ALL, ALL, "sizes=0", f"{ALL}&{length}", f"{ALL}&{length}", "sizes=7"):
            for method in ("GET", "HEAD", "POST", "GET"):
                request = asked(f"/says?{target}", method, **({"content-length": "0"} if method == "POST" else {}))
                response, whole = await answer(wire, request)
                assert response == whole, (method, target)
                assert (b"chunked" in response.partition(b"\r\n\r\n")[0]) == ("length" not in target)
        response, whole = await answer(wire, asked(f"/says?{ALL}", connection="close"))
        assert response == whole
        assert await wire.rest() == b""
        assert not says.errors


@pytest.mark.parametrize("sizes, through", [("3,4,5,6,7,8", 1), ("0,3,0,4,5", 1), ("0", 0), ("3,4,5&length=12", 3)])
@either_way
async def test_only_the_first_chunk_of_a_response_goes_through_h11(
    monkeypatch: pytest.MonkeyPatch, kind: type[PatchedH11] | None, sizes: str, through: int
) -> None:
    seen: list[bytes] = []
    send = h11.Connection.send_with_data_passthrough

    def noted(http: h11.Connection, event: Any) -> Any:
        if isinstance(event, h11.Data) and counting:
            seen.append(event.data)
        return send(http, event)

    monkeypatch.setattr(h11.Connection, "send_with_data_passthrough", noted)
    async with saying(kind) as (_, _says, wire):
        sent = [piece for piece in pieces(f"?sizes={sizes}") if piece]
        for _ in range(2):
            counting, request = True, asked(f"/says?sizes={sizes}")
            await wire.stream.send_all(request)
            await wire.until(
                b"\r\n\r\n", sent[-1] if sent else b"0\r\n\r\n", b"" if "length" in sizes else b"0\r\n\r\n"
            )
            counting, wire.received = False, b""
            assert seen == (sent if kind else sent[:through])
            seen.clear()


# What goes wrong


@either_way
async def test_more_than_the_declared_length_is_an_error_and_does_not_leave(kind: type[PatchedH11] | None) -> None:
    async with saying(kind) as (_, says, wire):
        assert (await answer(wire, asked(f"/says?{ALL}")))[0]
        await wire.stream.send_all(asked("/says?sizes=6,5,1&length=10"))
        assert (await wire.rest()).endswith(b"\r\n\r\n" + pieces("?sizes=6")[0])
        assert says.errors == [OVER, BROKEN, BROKEN]


@either_way
async def test_less_than_the_declared_length_is_an_error_at_the_end(kind: type[PatchedH11] | None) -> None:
    async with saying(kind) as (_, says, wire):
        await wire.stream.send_all(asked("/says?sizes=6,3&length=10"))
        assert (await wire.rest()).endswith(b"\r\n\r\n" + b"".join(pieces("?sizes=6,3")))
        assert says.errors == ["Too little data for declared Content-Length"]


@either_way
async def test_on_a_connection_in_error_nothing_more_is_framed(kind: type[PatchedH11] | None) -> None:
    async with saying(kind) as (_, says, wire):

        def break_it(number: int) -> None:
            if number == 2:
                served(wire.stream).protocol.protocol.connection.send_failed()

        says.before = break_it
        await wire.stream.send_all(asked("/says?sizes=6,7,8,9"))
        one, other = pieces("?sizes=6,7")
        assert (await wire.rest()).endswith(b"\r\n\r\n6\r\n" + one + b"\r\n7\r\n" + other + b"\r\n")
        assert says.errors == [BROKEN] * 3


# WebSockets


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
    """A WebSocket's client."""

    def __init__(self, wire: Wire) -> None:
        self.wire = wire
        self.protocol = WSConnection(ConnectionType.CLIENT)
        self._events: list[Any] = []

    async def send(self, event: Any) -> None:
        await self.wire.stream.send_all(self.protocol.send(event))

    async def next(self) -> Any:
        """The next event."""
        while not self._events:
            self.protocol.receive_data(await self.wire.stream.receive_some() or None)
            self._events += self.protocol.events()
        return self._events.pop(0)


@either_way
async def test_the_messages_of_a_websocket_are_sent_as_they_are(kind: type[PatchedH11] | None) -> None:
    async with saying(kind) as (server, _, wire):
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


@either_way
async def test_the_refusal_of_a_websocket_comes_whole(kind: type[PatchedH11] | None) -> None:
    async with saying(kind) as (server, _, wire):
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
