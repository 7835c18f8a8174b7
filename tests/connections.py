"""Connections that their clients leave, and servers in which one correction of Hypercorn's faults is missing."""

from __future__ import annotations

import socket
import ssl
import struct
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import h2.config
import h2.connection
import h2.settings
import pytest
import trio
import trustme
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from trio.testing import wait_all_tasks_blocked

from penstock import Event, EventStreamResponse, serve
from penstock.http import corrections
from tests.serving import PRODUCERS, Tap, eventually, family, quiet_config, serving
from tests.stalling import KIB, Windows, served, small_socket
from tests.test_http2 import Streams
from tests.wire import DONE, Wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator, Sequence
    from pathlib import Path
    from random import Random

    from hypercorn.config import Config
    from starlette.requests import Request

    from tests.serving import Server

BRIEF: Final = 0.2
"""Seconds that a connection is kept without a request, and that the last ones have at a shutdown: then they are cut."""
SOON: Final = 15.0
"""Seconds within which something has happened that takes no time to speak of."""
LEAVING: Final = ["close", "reset", "goaway"]
"""How a client goes: it closes its socket, with FIN or RST; or says that it goes, in HTTP/2's words, and stays."""


def brief_config() -> Config:
    config = quiet_config()
    config.graceful_timeout = config.keep_alive_timeout = BRIEF
    return config


@asynccontextmanager
async def brief(producers: Any = None, **knobs: Any) -> AsyncIterator[Server]:
    """A server that keeps no connection for longer than it must; nor does `server.client`."""
    knobs.setdefault("config", brief_config())
    async with serving({**PRODUCERS, **(producers or {})}, **knobs) as server:
        server.client.headers["connection"] = "close"
        yield server


@asynccontextmanager
async def unharmed(producers: Any = None, **knobs: Any) -> AsyncIterator[Server]:
    """Such a server, and a reader on a connection of its own, to whom nothing may happen while the block runs."""
    tap = Tap()
    async with brief({"watched": tap, **(producers or {})}, **knobs) as server:
        async with server.reading(await server.start("watched")) as reader:
            yield server
            assert not server.ended.is_set()
            tap.feed("goes on")
            tap.end()
            assert [block.data for block in await reader.rest()] == ["goes on", DONE]
        assert (await server.client.get("/healthz")).status_code == 200


@contextmanager
def in_place_of(**kinds: type[Any]) -> Iterator[None]:
    """These take the place of Hypercorn's classes, instead of the corrected ones, for servers that start in here."""
    with pytest.MonkeyPatch.context() as patch:
        pieces = {each.name: each for each in corrections.REPLACEMENTS}
        for name, kind in kinds.items():
            patch.setattr(pieces[name].module, name, pieces[name].original)
            pieces[name] = pieces[name]._replace(corrected=kind)
        patch.setattr(corrections, "REPLACEMENTS", tuple(pieces.values()))
        yield


@contextmanager
def dying_servers() -> Iterator[tuple[Any, list[BaseException]]]:
    """How to run servers that do not survive, and what they have died of."""
    died: list[BaseException] = []

    async def run(*args: Any, **kwargs: Any) -> None:
        try:
            await serve(*args, signals=(), **kwargs)
        except Exception as error:  # noqa: BLE001  (the test asks which)
            died.append(error)

    yield run, died


@asynccontextmanager
async def joined(
    server: Server, connect: Callable[[int], Any] = small_socket
) -> AsyncIterator[tuple[trio.SocketStream, trio.lowlevel.Task]]:
    """A client's connection, and the task that serves it; no other client may come meanwhile."""
    before = set(server.connections())
    async with await connect(server.port) as stream:
        await eventually(lambda: not before.issuperset(server.connections()))
        (task,) = before.symmetric_difference(server.connections()) - before
        await wait_all_tasks_blocked()  # so that there is an object, too
        yield stream, task


def is_over(task: trio.lowlevel.Task, server: Server) -> bool:
    """Whether a connection has ended, for the server."""
    return task not in server.connections()


async def is_over_soon(task: trio.lowlevel.Task, server: Server) -> None:
    with trio.fail_after(SOON):
        await eventually(lambda: is_over(task, server))


async def stays(task: trio.lowlevel.Task, server: Server) -> bool:
    """Whether a connection is still there when no timer of it is left, and nothing moves any more."""
    with trio.fail_after(SOON):
        await eventually(lambda: not [each for each in family(task) if "_idle_timeout" in each.name])
    await wait_all_tasks_blocked(0.05)
    return not is_over(task, server)


def readers(server: Server, *run_ids: str) -> list[int]:
    """How many readers each of these runs has."""
    tails = [server.service.supervisor._services.tails.get(run_id) for run_id in run_ids]
    return [0 if tail is None else tail.users - 1 for tail in tails]


def with_reset(stream: trio.SocketStream) -> None:
    """It will be closed by RST."""
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def leave(client: Streams, how: str) -> None:
    """Go away, as an HTTP/2 client; see `LEAVING`."""
    if how == "goaway":
        client.h2.close_connection()
        await client.socket.send_all(client.h2.data_to_send())
        return
    if how == "reset":
        with_reset(client.socket)
    await client.socket.aclose()


async def silent_stream(request: Request) -> EventStreamResponse:
    """Says one thing and then nothing; `wide` is the size of a header."""

    async def source() -> AsyncIterator[Event]:
        yield Event(data="first")
        await trio.sleep_forever()

    return EventStreamResponse(source(), headers={"x-wide": "w" * int(request.query_params.get("wide", "0"))})


@asynccontextmanager
async def jammed(server: Server, run_ids: list[str]) -> AsyncIterator[tuple[Streams, trio.lowlevel.Task]]:
    """A client that does not read, and so many streams on its connection, each of which waits in a send.

    The first waits in mid-frame, in the headers that its own task sends; the others are readers of these runs.
    """
    server.app.router.routes.append(Route("/silent", silent_stream))
    async with joined(server) as (stream, task):
        client = Streams(stream)
        await stream.send_all(client.h2.data_to_send())
        await client.receive()
        connection = served(stream)
        connection.stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await client.get("/silent?wide=40000")
        await eventually(connection.send_lock.locked)
        await wait_all_tasks_blocked(0.01)
        assert connection.send_lock.locked()
        for run_id in run_ids:
            await client.get(f"/v1/runs/{run_id}/stream")
        await eventually(lambda: connection.send_lock.statistics().tasks_waiting == len(run_ids))
        await eventually(lambda: readers(server, *run_ids) == [1] * len(run_ids))
        yield client, task


# Answers that meet the end of their connection


class Late:
    """An answer that is given when its client is gone."""

    def __init__(self, server: Server) -> None:
        self.asked = trio.Event()
        self.gone = trio.Event()
        server.app.router.routes.append(Route("/late", self.answer))

    async def answer(self, _request: Request) -> PlainTextResponse:
        self.asked.set()
        await self.gone.wait()
        return PlainTextResponse("too late")

    async def to(self, stream: trio.SocketStream, how: str) -> None:
        """Give it to the client of this connection, who leaves."""
        client = Streams(stream)
        protocol = served(stream).protocol
        await client.get("/late")
        await self.asked.wait()
        await leave(client, how)
        await eventually(lambda: protocol.protocol.closed)
        self.gone.set()


class HeldEnd:
    """Connections that say that they send no more are held up in saying so, as busy ones may be, until `go_on`."""

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


class Sending:
    """A stream whose next piece is about to be sent when its client ends the connection."""

    def __init__(self, server: Server, patch: pytest.MonkeyPatch) -> None:
        self._tap = Tap()
        self._end = HeldEnd(patch)
        with_tapped(server, self._tap)

    async def over_http1(self, stream: trio.SocketStream) -> None:
        """The client breaks off in its request's body with what is none."""
        wire = Wire(stream)
        await wire.send("POST", "/tapped", transfer_encoding="chunked")
        await stream.send_all(b"2\r\n{}\r\n")
        self._tap.feed("first")
        await wire.until(b"data: first\n\n")
        await self._meet(stream, b"zz\r\n")

    async def over_http2(self, stream: trio.SocketStream) -> None:
        """The client says goodbye, as each does that speaks HTTP/2."""
        client = Streams(stream)
        number = await client.get("/tapped")
        self._tap.feed("first")
        await client.blocks(number, 1)
        client.h2.close_connection()
        await self._meet(stream, client.h2.data_to_send())

    async def _meet(self, stream: trio.SocketStream, last_words: bytes) -> None:
        lock = served(stream).send_lock
        await lock.acquire()
        self._tap.feed("second")
        await eventually(lambda: lock.statistics().tasks_waiting == 1)
        await stream.send_all(last_words)
        await self._end.begun.wait()
        lock.release()
        await wait_all_tasks_blocked()
        self._end.go_on.set()
        with trio.fail_after(SOON):
            await self._tap.closed.wait()


# Requests during a shutdown


def with_tapped(server: Server, tap: Tap) -> None:
    """Let the server stream at /tapped what a test feeds it; nobody ends that but the test."""

    async def tapped(_request: Request) -> EventStreamResponse:
        return EventStreamResponse(tap(None))

    server.app.router.routes.append(Route("/tapped", tapped, methods=["GET", "POST"]))


def patient_config(seconds: float = 2 * SOON) -> Config:
    """At a shutdown connections have more time than a test."""
    config = brief_config()
    config.graceful_timeout = seconds
    return config


def with_waiting(server: Server, over: trio.Event) -> None:
    """Let the server take requests at /waiting, and neither read nor answer them until they are `over`."""

    async def waiting(_request: Request) -> PlainTextResponse:
        await over.wait()
        return PlainTextResponse("over")

    server.app.router.routes.append(Route("/waiting", waiting, methods=["POST"]))


def post(client: Streams, path: str) -> int:
    """Begin a request that has a body, still to be sent; the stream's number."""
    number = client.h2.get_next_available_stream_id()
    pseudo = {":method": "POST", ":path": path, ":scheme": "http", ":authority": "x"}
    client.h2.send_headers(number, [*pseudo.items()])
    client.bodies[number] = b""
    return number


async def body(client: Windows) -> None:
    """A request, and its body at once."""
    client.h2.send_data(post(client, "/v1/runs"), b"{}")
    await client.socket.send_all(client.h2.data_to_send())


async def change_of_mind(client: Windows) -> None:
    """A request that is taken back at once."""
    number = client.h2.get_next_available_stream_id()
    pseudo = {":method": "GET", ":path": "/", ":scheme": "http", ":authority": "x"}
    client.h2.send_headers(number, [*pseudo.items()], end_stream=True)
    client.h2.reset_stream(number)
    await client.socket.send_all(client.h2.data_to_send())


async def asks_at_the_end(server: Server, ask: Any, tap: Tap) -> bytes:
    """What a reader is sent whose stream goes on, while another client asks a server that is shutting down."""

    with_tapped(server, tap)
    async with await server.wire() as wire, joined(server) as (stream, task):
        await wire.send("GET", "/tapped")
        tap.feed("before")
        await wire.until(b"data: before\n\n")
        client = Windows(stream)
        await client.until_headers(await client.get("/healthz"))  # and takes no more of it: so it is kept
        terminated = served(stream).context.terminated
        server.shutdown.set()
        await eventually(terminated.is_set)
        await ask(client)
        await is_over_soon(task, server)
        tap.feed("after")
        tap.end()
        return await wire.rest()


# Sources that outlive their client


class Detached:
    """A source that runs to its end without its client: before a pause, and after it, it says this much."""

    def __init__(self, server: Server, before: int, after: int) -> None:
        self.go_on, self.over = trio.Event(), trio.Event()
        self.yielded = 0
        self._before, self._after = before, after
        server.app.router.routes.append(Route("/detached", self._answer))

    async def _answer(self, _request: Request) -> EventStreamResponse:
        return EventStreamResponse(self._source(trio.lowlevel.current_task()), on_disconnect="detach")

    async def _source(self, task: trio.lowlevel.Task) -> AsyncIterator[bytes]:
        for count in (self._before, self._after):
            for _ in range(count):
                yield KIB
                assert trio.lowlevel.current_task() is task
                self.yielded += 1
            await self.go_on.wait()
        self.over.set()


async def gone_from_http1(stream: trio.SocketStream, how: str) -> None:
    await stream.send_all(b"GET /detached HTTP/1.1\r\nhost: x\r\n\r\n")
    await Wire(stream).until(b"\r\n\r\n")
    await wait_all_tasks_blocked(0.01)
    if how == "reset":
        with_reset(stream)
    await stream.aclose()


async def gone_from_http2(stream: trio.SocketStream, how: str) -> None:
    client = Windows(stream)
    await client.until_headers(await client.get("/detached"))
    await wait_all_tasks_blocked(0.01)
    await leave(client, how)


# A crowd


class Places:
    """One server in two places, in clear text and behind TLS; its `config`, and how it is run."""

    def __init__(self, folder: Path) -> None:
        authority = trustme.CA()
        pem = folder / "server.pem"
        authority.issue_cert("localhost").private_key_and_cert_chain_pem.write_to_path(pem)
        self._trust = ssl.create_default_context()
        self._trust.set_alpn_protocols(["h2"])
        authority.configure_trust(self._trust)
        self._ports: dict[str, int] = {}
        self.config = brief_config()
        self.config.certfile = self.config.keyfile = str(pem)
        self.config.insecure_bind = ["127.0.0.1:0"]

    async def run(self, *args: Any, task_status: trio.TaskStatus[list[str]], **kwargs: Any) -> None:  # noqa: ASYNC128
        """`serve`, as `serving` wants it: with one URL."""
        async with trio.open_nursery() as nursery:
            urls: list[str] = await nursery.start(partial(serve, *args, signals=(), **kwargs))
            self._ports = {scheme: int(url.rpartition(":")[2]) for url in urls for scheme in [url.partition(":")[0]]}
            task_status.started([url for url in urls if url.startswith("http:")])

    async def connect(self, *, tls: bool) -> trio.abc.Stream:
        """A client's connection; the one behind TLS is for HTTP/2."""
        if not tls:
            return await trio.open_tcp_stream("127.0.0.1", self._ports["http"])
        transport = await trio.open_tcp_stream("127.0.0.1", self._ports["https"])
        return trio.SSLStream(transport, self._trust, server_hostname="localhost", https_compatible=True)


async def misbehave(stream: trio.abc.Stream, random: Random, paths: Sequence[str], *, speaks_http2: bool) -> None:
    """Ask for this and that, read some of the answers, and go at any moment."""
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    assert isinstance(transport, trio.SocketStream)
    words = (http2_words if speaks_http2 else http1_words)(random, paths)
    if random.random() < 0.5:
        words = words[: random.randrange(len(words))]
    try:
        while words:
            size = random.randint(1, len(words))
            await stream.send_all(words[:size])
            words = words[size:]
            with trio.move_on_after(random.random() * 0.02):
                for _ in range(random.randrange(4)):
                    await stream.receive_some(random.choice([1, 1000, 65_536]))
        if random.random() < 0.5:
            with_reset(transport)
    finally:
        await trio.aclose_forcefully(transport)


def http1_words(random: Random, paths: Sequence[str]) -> bytes:
    path = random.choice(paths)
    head = f"{{}} {path} HTTP/1.1\r\nhost: x\r\n"
    upgrade = "connection: upgrade\r\nupgrade: {}\r\n\r\n"
    websocket = "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    words = random.choice(
        [
            head.format("GET") + "\r\n",
            "".join(f"GET {each} HTTP/1.1\r\nhost: x\r\n\r\n" for each in random.choices(paths, k=4)),
            head.format("POST") + "transfer-encoding: chunked\r\n\r\n2\r\n{}\r\nzz\r\n",
            head.format("POST") + "content-length: 1000\r\n\r\n{",
            head.format("GET") + upgrade.format("h2c"),
            head.format("CONNECT") + upgrade.format("h2c"),
            head.format("GET") + websocket + upgrade.format("websocket"),
        ]
    )
    return words.encode()


def http2_words(random: Random, paths: Sequence[str]) -> bytes:
    client = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True))
    client.initiate_connection()
    client.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: random.choice([0, 1, 65_535])})
    for _ in range(random.randint(1, 8)):
        number = client.get_next_available_stream_id()
        pseudo = {":method": "GET", ":path": random.choice(paths), ":scheme": "http", ":authority": "x"}
        client.send_headers(number, [*pseudo.items()], end_stream=True)
        match random.randrange(4):
            case 0:
                client.reset_stream(number)
            case 1:
                client.increment_flow_control_window(random.randint(1, 100_000), number)
            case 2:
                client.ping(b"are you?")
    if random.random() < 0.5:
        client.close_connection()
    return client.data_to_send()
