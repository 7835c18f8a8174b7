"""The API over HTTP/2 in clear text: several streams on one connection."""

from __future__ import annotations

from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import h2.config
import h2.connection
import h2.events
import httpx2
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from tests.support.serving import PRODUCERS, Tap, eventually, serving
from tests.support.wire import DONE, Block, block_of, blocks_of, ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.serving import Server


class Streams:
    """One connection, and what has come in on each of its streams."""

    def __init__(self, socket: trio.SocketStream) -> None:
        self.socket = socket
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=True, header_encoding="utf-8"))
        self.h2.initiate_connection()
        self.headers: dict[int, dict[str, str]] = {}
        self.bodies: dict[int, bytes] = {}
        self.over: set[int] = set()

    async def get(self, path: str, **headers: str) -> int:
        """Ask; the stream's number."""
        number = self.h2.get_next_available_stream_id()
        pseudo = {":method": "GET", ":path": path, ":scheme": "http", ":authority": "localhost"}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        self.h2.send_headers(number, [*(pseudo | named).items()], end_stream=True)
        self.bodies[number] = b""
        await self.socket.send_all(self.h2.data_to_send())
        return number

    async def reset(self, number: int) -> None:
        self.h2.reset_stream(number)
        await self.socket.send_all(self.h2.data_to_send())

    async def receive(self) -> None:
        """Take in whatever comes next."""
        for event in self.h2.receive_data(await self.socket.receive_some()):
            if isinstance(event, h2.events.ResponseReceived):
                self.headers[event.stream_id] = {str(name): str(value) for name, value in event.headers}
            elif isinstance(event, h2.events.DataReceived):
                self.bodies[event.stream_id] += event.data
                self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            elif isinstance(event, h2.events.StreamEnded | h2.events.StreamReset):
                self.over.add(event.stream_id)
        await self.socket.send_all(self.h2.data_to_send())

    async def blocks(self, number: int, count: int) -> list[Block]:
        """The first `count` blocks of a stream."""
        while self.bodies[number].count(b"\n\n") < count:
            assert number not in self.over, self.bodies[number]
            await self.receive()
        return [block_of(text) for text in self.bodies[number].decode().split("\n\n")[:count]]

    async def whole(self, number: int) -> list[Block]:
        """All blocks of a stream that ends."""
        while number not in self.over:
            await self.receive()
        return blocks_of(self.bodies[number])


@asynccontextmanager
async def connected(server: Server) -> AsyncIterator[Streams]:
    async with await trio.open_tcp_stream("127.0.0.1", server.port) as socket:
        yield Streams(socket)


async def test_the_api_works_over_http2() -> None:
    async with serving() as server, httpx2.AsyncClient(base_url=server.url, http1=False, http2=True) as client:
        started = await client.post("/v1/runs", json={"producer": "count", "input": 200})
        assert (started.http_version, started.status_code) == ("HTTP/2", 201)
        stream = await client.get(started.headers["location"], headers={"Last-Event-ID": "100"})
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert ids(blocks_of(stream.text)) == list(range(101, 202))
        over = await client.get(started.headers["location"], headers={"Last-Event-ID": "201"})
        assert (over.status_code, over.content) == (204, b"")
        assert (await client.head(started.headers["location"])).status_code == 200
        assert (await client.get("/v1/runs/nobody")).json()["code"] == "RUN_NOT_FOUND"
        assert len(server.connections()) == 1


@pytest.mark.parametrize(
    "method, path, status",
    [("POST", "/v1/runs", 413), ("POST", "/nowhere", 404), ("PUT", "/v1/runs", 405), ("GET", "/healthz", 200)],
)
async def test_an_answer_to_a_request_that_is_still_being_sent_does_not_take_the_server_down(
    method: str, path: str, status: int
) -> None:
    async with serving() as server, httpx2.AsyncClient(base_url=server.url, http1=False, http2=True) as client:
        run_id = await server.start("silent")
        for _ in range(3):
            answer = await client.request(method, path, content=b" " * 2_000_000)
            assert answer.status_code == status
        assert not server.ended.is_set()
        assert (await server.run(run_id))["status"] == "running"


async def test_two_streams_run_at_once_on_one_connection() -> None:
    one, two = Tap(), Tap()
    async with serving({"one": one, "two": two}) as server, connected(server) as streams:
        first = await streams.get(f"/v1/runs/{await server.start('one')}/stream")
        second = await streams.get(f"/v1/runs/{await server.start('two')}/stream")
        for seq in range(1, 6):
            one.feed(f"one {seq}")
            assert (await streams.blocks(first, seq))[-1] == Block(seq, data=f"one {seq}")
            two.feed(f"two {seq}")
            assert (await streams.blocks(second, seq))[-1] == Block(seq, data=f"two {seq}")
        one.end()
        assert (await streams.whole(first))[-1] == Block(6, data=DONE)
        assert second not in streams.over
        two.feed("goes on")
        two.end()
        assert (await streams.whole(second))[-2:] == [Block(6, data="goes on"), Block(7, data=DONE)]


async def test_headers_come_at_once_and_a_stream_that_is_reset_leaves_nothing_and_its_neighbour_alone() -> None:
    tap = Tap()
    async with serving({**PRODUCERS, "tap": tap}) as server, connected(server) as streams:
        services = server.service.supervisor._services
        silent, fed = await server.start("silent"), await server.start("tap")
        doomed = await streams.get(f"/v1/runs/{silent}/stream")
        while doomed not in streams.headers:
            await streams.receive()
        assert streams.headers[doomed][":status"] == "200"
        stays = await streams.get(f"/v1/runs/{fed}/stream")
        tap.feed("before")
        await streams.blocks(stays, 1)
        assert services.tails.get(silent).users == 2  # type: ignore[union-attr]
        await streams.reset(doomed)
        await eventually(lambda: services.tails.get(silent).users == 1)  # type: ignore[union-attr]
        assert (await server.run(silent))["status"] == "running"
        tap.feed("after")
        tap.end()
        assert ids(await streams.whole(stays)) == [1, 2, 3]


async def test_a_connection_that_is_lost_ends_all_of_its_readers_and_none_of_their_runs() -> None:
    async with serving() as server:
        services = server.service.supervisor._services
        run_ids = [await server.start("silent") for _ in range(5)]
        await wait_all_tasks_blocked()  # an answer is with its client before its task is over
        before = server.tasks()
        async with connected(server) as streams:
            for run_id in run_ids:
                await streams.get(f"/v1/runs/{run_id}/stream")
            while len(streams.headers) < len(run_ids):
                await streams.receive()
        await eventually(lambda: all(tail.users == 1 for tail in services.tails.all()))
        await eventually(lambda: server.tasks() == before)
        assert {run["status"] for run in (await server.client.get("/v1/runs")).json()["runs"]} == {"running"}
