"""Connections that their clients leave: both ends, what is left of them, and servers with short time limits."""

from __future__ import annotations

import gc
import socket
import struct
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.trio.tcp_server import TCPServer
from trio.testing import wait_all_tasks_blocked

from penstock import serve
from tests.support.http2_clients import Http2
from tests.support.serving import PRODUCERS, Tap, eventually, family, quiet_config, serving
from tests.support.wire import DONE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from hypercorn.config import Config
    from hypercorn.protocol.h2 import StreamBuffer

    from tests.support.http2_clients import Streams
    from tests.support.serving import Server

BRIEF: Final = 0.5
"""Seconds that a connection is kept without a request, and that the last ones have at a shutdown: then they are cut.

A machine may stand still for some tenths of a second between a connection and its first request."""
SOON: Final = 15.0
"""Seconds within which something has happened that takes no time to speak of."""
LEAVING: Final = ["close", "reset", "goaway"]
"""How a client goes: it closes its socket, with FIN or RST; or it sends GOAWAY and keeps it open."""
SMALL: Final = 4096
"""The receive buffer of a client that stalls, in bytes: what does not fit in there stays with the server."""

# Servers


def brief_config(config: Config | None = None) -> Config:
    config = quiet_config() if config is None else config
    config.graceful_timeout = BRIEF
    config.keep_alive_timeout = 3 * BRIEF  # a busy client may take long to send its first request
    return config


def patient_config() -> Config:
    """A configuration in which the last connections of a shutdown have more time than a test."""
    config = brief_config()
    config.graceful_timeout = 2 * SOON
    return config


@asynccontextmanager
async def brief(producers: Any = None, **settings: Any) -> AsyncIterator[Server]:
    """A server that keeps no connection for longer than it must; nor does `server.client`."""
    settings.setdefault("config", brief_config())
    async with serving({**PRODUCERS, **(producers or {})}, **settings) as server:
        server.client.headers["connection"] = "close"
        yield server


@asynccontextmanager
async def unharmed(producers: Any = None, **settings: Any) -> AsyncIterator[Server]:
    """Such a server, and a reader on a connection of its own, to whom nothing may happen while the block runs."""
    tap = Tap()
    async with brief({"watched": tap, **(producers or {})}, **settings) as server:
        async with server.reading(await server.start("watched")) as reader:
            yield server
            assert not server.ended.is_set()
            tap.feed("goes on")
            tap.end()
            assert [block.data for block in await reader.rest()] == ["goes on", DONE]
        assert (await server.client.get("/healthz")).status_code == 200


class Ending:
    """How `serve` is ended in a test: by its trigger, or by a cancellation from outside."""

    def __init__(self, how: str) -> None:
        self._how = how
        self._scope = trio.CancelScope()

    async def run(self, *args: Any, **kwargs: Any) -> None:
        with self._scope:
            await serve(*args, signals=(), tcp_user_timeout=0, **kwargs)

    def now(self, server: Server) -> None:
        if self._how == "cancelled":
            self._scope.cancel()
        else:
            server.shutdown.set()


async def small_socket(port: int) -> trio.SocketStream:
    sock = trio.socket.socket()
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, SMALL)
    await sock.connect(("127.0.0.1", port))
    return trio.SocketStream(sock)


def with_reset(stream: trio.SocketStream) -> None:
    stream.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))


async def leave(client: Http2, how: str) -> None:
    """Go away, as an HTTP/2 client; see `LEAVING`."""
    if how == "goaway":
        client.h2.close_connection()
        await client.send()
        return
    if how == "reset":
        with_reset(client.socket)
    await client.socket.aclose()


def served(client: trio.SocketStream) -> Any:
    """The connection, an object of Hypercorn's, at the other end of this one."""
    address = client.socket.getsockname()
    (found,) = [
        each
        for each in gc.get_objects()
        if isinstance(each, TCPServer)
        and isinstance(each.stream, trio.SocketStream)
        and each.stream.socket.fileno() != -1
        and each.stream.socket.getpeername() == address
    ]
    return found


def buffer_of(client: Streams, number: int) -> StreamBuffer:
    protocol = served(client.socket).protocol.protocol
    assert isinstance(protocol, H2Protocol)
    return protocol.stream_buffers[number]


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


def sockets_at(port: int) -> list[socket.socket]:
    """This process's sockets that are bound to this port, from its file descriptors; duplicates, to be closed."""
    found = []
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir() if entry.is_socket()]:
        sock = socket.fromfd(fd, socket.AF_INET, socket.SOCK_STREAM)
        if sock.getsockname()[1:2] == (port,):
            found.append(sock)
        else:
            sock.close()
    return found


def is_over(task: trio.lowlevel.Task, server: Server) -> bool:
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
    tails = [server.service.supervisor._tails.get(run_id) for run_id in run_ids]
    return [0 if tail is None else tail.users - 1 for tail in tails]


@asynccontextmanager
async def jammed(server: Server, run_ids: Sequence[str] = ()) -> AsyncIterator[tuple[Http2, trio.lowlevel.Task]]:
    """A client that does not read: its first stream waits in mid-frame, the others are readers of these runs."""
    async with joined(server) as (stream, task):
        client = Http2(stream)
        await client.send()
        await client.receive()
        connection = served(stream)
        connection.stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SMALL)
        await client.get("/endless?name=jammed&wide=40000&pause=1")
        await eventually(connection.send_lock.locked)
        await wait_all_tasks_blocked(0.01)
        assert connection.send_lock.locked()
        for run_id in run_ids:
            await client.get(f"/v1/runs/{run_id}/stream")
        await eventually(lambda: connection.send_lock.statistics().tasks_waiting == len(run_ids))
        await eventually(lambda: readers(server, *run_ids) == [1] * len(run_ids))
        yield client, task
