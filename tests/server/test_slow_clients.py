"""Clients that send as little as they can for as long as they may: the server closes them, and keeps nothing."""

from __future__ import annotations

import gc
import struct
from contextlib import AsyncExitStack, suppress
from typing import TYPE_CHECKING, Final, NamedTuple

import pytest
import trio
from hypercorn.trio.tcp_server import TCPServer

from tests.support.certificates import tls_config
from tests.support.connections import BRIEF, SOON, brief_config, unharmed
from tests.support.http2_clients import Ends
from tests.support.serving import Tap, eventually, serving
from tests.support.wire import ids

if TYPE_CHECKING:
    from tests.support.serving import Server


PACE: Final = 0.02
"""Seconds between two bytes of a client that trickles: there are always more before its time is over."""
CLIENTS: Final = 2
"""How many there are of each kind."""
PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, SETTINGS, PING = 0, 1, 4, 6
FRAME_HEADER, MAX_FRAME = 9, 16_384
SETTLED: Final = PREFACE + struct.pack(">I", 0)[1:] + bytes([SETTINGS, 0]) + bytes(4)


def frame(kind: int, payload: bytes = b"", *, flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


class Says(NamedTuple):
    begin: bytes
    again: bytes = b""
    pace: float = PACE


def begun(extra: str = "") -> bytes:
    return f"POST /v1/runs HTTP/1.1\r\nhost: localhost\r\n{extra}".encode()


def half_a_request() -> bytes:
    """Of HTTP/2, whose headers are whole and whose body never ends."""
    client = Ends(None)  # type: ignore[arg-type]
    number = client.begin("POST", "/v1/runs")
    client.h2.send_data(number, b'{"producer": ')
    return client.h2.data_to_send()


def half_a_websocket() -> bytes:
    """Of HTTP/2 (RFC 8441), without a version: the answer is 400, and the client keeps its side open."""
    client = Ends(None)  # type: ignore[arg-type]
    client.begin("CONNECT", "/v1/runs", (":protocol", "websocket"))
    return client.h2.data_to_send()


WEBSOCKET: Final = "connection: upgrade\r\nupgrade: websocket\r\n"
SLOW: Final[dict[str, Says]] = {
    "nothing": Says(b""),
    "a byte of a method now and then": Says(b"", b"G"),
    "half a request line": Says(b"GET /v1/ru"),
    "empty lines now and then": Says(b"", b"\r\n"),
    "a byte of a header now and then": Says(begun("x: "), b"x"),
    "a header now and then": Says(begun(), b"x: y\r\n"),
    "half a body": Says(begun("content-length: 100\r\n\r\n{")),
    "a byte of a body now and then": Says(begun("content-length: 100000\r\n\r\n"), b" "),
    "a chunk of a body now and then": Says(begun("transfer-encoding: chunked\r\n\r\n"), b"1\r\nx\r\n"),
    "half a chunk": Says(begun("transfer-encoding: chunked\r\n\r\nffff\r\n")),
    "a trailer now and then": Says(begun("transfer-encoding: chunked\r\n\r\n0\r\n"), b"x: y\r\n"),
    "a body that it asks leave for": Says(begun("content-length: 100\r\nexpect: 100-continue\r\n\r\n")),
    "a websocket that is none": Says(begun(WEBSOCKET + "\r\n").replace(b"POST", b"GET")),
    "a websocket, and a byte now and then": Says(begun(WEBSOCKET + "\r\n").replace(b"POST", b"GET"), b"x"),
    "half a preface of HTTP/2": Says(PREFACE[:10]),
    "a preface of HTTP/2 byte by byte": Says(PREFACE[:18], b"\r"),
    "a preface of HTTP/2 and nothing else": Says(SETTLED),
    "half a frame": Says(SETTLED + frame(HEADERS, bytes(100), stream=1)[:20]),
    "pings": Says(SETTLED, frame(PING, bytes(8))),
    "headers without an end": Says(SETTLED + frame(HEADERS, b"\x82", stream=1)),
    "half a body over HTTP/2": Says(half_a_request()),
    "a websocket over HTTP/2 without a version": Says(half_a_websocket()),
}
"""Clients, by what they send."""


async def send(stream: trio.abc.SendStream, says: Says) -> None:
    with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
        await stream.send_all(says.begin)
        while says.again:  # noqa: ASYNC110  (it waits for nothing: so slow it is)
            await trio.sleep(says.pace)
            await stream.send_all(says.again)


async def until_closed(stream: trio.abc.ReceiveStream) -> None:
    with suppress(trio.BrokenResourceError):
        while await stream.receive_some():
            pass


def kept() -> int:
    gc.collect()
    return sum(isinstance(each, TCPServer) for each in gc.get_objects())


async def stays(server: Server, says: Says) -> bool:
    """Whether a client that sends this is still connected when the server has had time to close it."""
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream, trio.open_nursery() as nursery:
        nursery.start_soon(send, stream, says)
        with trio.move_on_after(SOON) as scope:
            await until_closed(stream)
        nursery.cancel_scope.cancel()
    return scope.cancelled_caught


async def test_clients_that_send_little_are_closed_and_leave_nothing_and_others_are_served() -> None:
    async with unharmed() as server:
        run_id = await server.start("count", 2)
        await server.ended_run(run_id)
        server.service.limits.body_timeout = BRIEF  # from now on
        await eventually(lambda: len(server.connections()) == 1)  # of the reader that is watched
        tasks, memory = server.tasks(), kept()
        stayed: set[str] = set()

        async def connect(name: str) -> None:
            if await stays(server, SLOW[name]):
                stayed.add(name)

        async with trio.open_nursery() as nursery:
            for name in list(SLOW) * CLIENTS:
                nursery.start_soon(connect, name)
            await eventually(lambda: len(server.connections()) > CLIENTS)
            assert ids(await server.read(run_id)) == [1, 2, 3]
        assert stayed == set()
        with trio.fail_after(SOON):
            await eventually(lambda: server.tasks() == tasks)
        assert kept() <= memory
        assert server.service.supervisor.live_runs == 1


async def test_a_frame_that_is_longer_than_a_frame_may_be_ends_its_connection() -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server, await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        client = Ends(stream)
        number = await client.get(f"/v1/runs/{await server.start('tap')}/stream")
        await client.until_headers(number)  # so the connection is not idle, and nothing else would close it
        await stream.send_all(frame(DATA, bytes(MAX_FRAME + 1), stream=number)[:FRAME_HEADER])
        with trio.fail_after(SOON):
            await until_closed(stream)


HELLO: Final = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03"
"""The beginning of a handshake, of 512 bytes."""


@pytest.mark.parametrize("says", [Says(b""), Says(HELLO, b"x")], ids=["nothing", "a byte now and then"])
async def test_a_handshake_that_does_not_end_is_closed_and_leaves_nothing(says: Says) -> None:
    before = kept()
    with tls_config("h2", "http/1.1") as (config, trusts):
        brief_config(config).ssl_handshake_timeout = BRIEF
        async with serving(config=config) as server, AsyncExitStack() as stack:
            connect = trio.open_tcp_stream
            streams = [await stack.enter_async_context(await connect("127.0.0.1", server.port)) for _ in range(CLIENTS)]
            async with trio.open_nursery() as nursery:
                for stream in streams:
                    nursery.start_soon(send, stream, says)
                async with await trio.open_ssl_over_tcp_stream(
                    "127.0.0.1", server.port, https_compatible=True, ssl_context=trusts
                ) as other:
                    await other.send_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n")
                    assert (await other.receive_some()).startswith(b"HTTP/1.1 200")
                with trio.fail_after(SOON):
                    for stream in streams:
                        await until_closed(stream)
                    await eventually(lambda: not server.connections())
                nursery.cancel_scope.cancel()
            assert kept() <= before  # that of tests before this one may have gone meanwhile


async def test_a_client_that_says_nothing_after_its_handshake_is_closed() -> None:
    for alpn in ("h2", "http/1.1"):
        with tls_config(alpn) as (config, trusts):
            trusts.set_alpn_protocols([alpn])
            async with serving(config=brief_config(config)) as server:
                stream = await trio.open_ssl_over_tcp_stream(
                    "127.0.0.1", server.port, https_compatible=True, ssl_context=trusts
                )
                async with stream:
                    await stream.do_handshake()
                    assert stream.selected_alpn_protocol() == alpn
                    with trio.fail_after(SOON):
                        await until_closed(stream)
                        await eventually(lambda: not server.connections())
