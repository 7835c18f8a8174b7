"""Clients that stall, each in its own way: they ask for more than they read."""

from __future__ import annotations

from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Final

import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.connections import small_socket
from tests.support.http2_clients import OPEN, Ends
from tests.support.serving import family

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from ssl import SSLContext

    from tests.support.serving import Client, Server


@asynccontextmanager
async def stalled(server: Client, path: str, tls: SSLContext | None = None) -> AsyncIterator[trio.abc.Stream]:
    """A client that has read the first bytes of an answer, and then reads no more."""
    stream: trio.abc.Stream = await small_socket(server.port)
    if tls is not None:
        stream = trio.SSLStream(stream, tls, server_hostname="127.0.0.1", https_compatible=True)
    async with stream:
        await stream.send_all(f"GET {path} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        assert await stream.receive_some(12) == b"HTTP/1.1 200"
        yield stream


async def trickle(stream: trio.abc.Stream) -> None:
    """Read, but so slowly that what is on its way would take minutes."""
    with suppress(trio.ClosedResourceError, trio.BrokenResourceError):
        while await stream.receive_some(100):  # noqa: ASYNC110  (it waits for nothing: so slow it is)
            await trio.sleep(0.02)


@asynccontextmanager
async def over_http1(server: Server, _trusts: SSLContext | None) -> AsyncIterator[trio.abc.Stream]:
    async with stalled(server, "/endless") as client:
        yield client


@asynccontextmanager
async def following_a_run(server: Server, _trusts: SSLContext | None) -> AsyncIterator[trio.abc.Stream]:
    run_id = await server.start("flood", [600, 10_000])
    await server.ended_run(run_id)
    async with stalled(server, f"/v1/runs/{run_id}/stream") as client:
        yield client


@asynccontextmanager
async def trickling(server: Server, _trusts: SSLContext | None) -> AsyncIterator[trio.abc.Stream]:
    async with stalled(server, "/endless") as client, trio.open_nursery() as nursery:
        nursery.start_soon(trickle, client)
        yield client
        nursery.cancel_scope.cancel()


@asynccontextmanager
async def over_tls(server: Server, trusts: SSLContext | None) -> AsyncIterator[trio.abc.Stream]:
    async with stalled(server, "/endless", trusts) as client:
        yield client


@asynccontextmanager
async def over_http2(server: Server, _trusts: SSLContext | None) -> AsyncIterator[trio.abc.Stream]:
    async with await small_socket(server.port) as stream:
        client = Ends(stream)
        client.h2.increment_flow_control_window(OPEN)
        number = await client.get("/endless")
        await client.until_headers(number)
        assert client.headers[number][":status"] == "200"
        client.h2.increment_flow_control_window(OPEN, number)
        await client.send()
        yield stream


CLIENTS: Final = [over_http1, following_a_run, trickling, over_tls, over_http2]
"""Each leads to its connection, once it has stalled."""


def waits_in_a_send(connection: trio.lowlevel.Task) -> bool:
    """Whether a task of a connection waits for its client, or the system, to take in what it sends."""
    sending = trio.SocketStream.send_all.__code__
    return any(
        frame.f_code is sending for task in (connection, *family(connection)) for frame, _ in task.iter_await_frames()
    )


async def all_stalled(server: Server, count: int) -> None:
    """Wait until so many connections, of all servers in this loop, wait in a send, and nothing else moves."""
    await wait_all_tasks_blocked(0.01)
    while sum(map(waits_in_a_send, server.connections())) < count:
        await wait_all_tasks_blocked(0.01)
