"""Behind nginx with the shipped configuration: streams pass at once, are cut and resumed, and logs hold no secrets."""

from __future__ import annotations

from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import h11
import httpx2
import pytest
import trio
from hypercorn.config import Config

from penstock import MemoryLog, open_log, open_supervisor
from penstock.asgi.lifespan import MAX_BODY_BYTES
from penstock.server.config import new_config
from tests.support import browser
from tests.support.connections import readers
from tests.support.nginx import SHIPPED, WHY_NOT, executable, free_ports, nginx_before
from tests.support.serving import Tap, eventually, quiet_config, serving
from tests.support.wire import DONE, Block, ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.nginx import Connection, Nginx
    from tests.support.serving import Server
    from tests.support.wire import Reader

pytestmark = pytest.mark.skipif(executable() is None, reason=WHY_NOT)

PROTOCOLS: Final = ["HTTP/1.1", "HTTP/2"]
RETRY: Final = Block(retry="1000")
PING: Final = Block(comment="ping")


class Http2Reader:
    def __init__(self, connection: Connection, number: int) -> None:
        self.connection = connection
        self.number = number
        self._taken = 0

    async def take(self, n: int) -> list[Block]:
        self._taken += n
        return (await self.connection.blocks(self.number, self._taken))[-n:]

    async def rest(self) -> list[Block]:
        return (await self.connection.whole(self.number))[self._taken :]


@asynccontextmanager
async def reading(nginx: Nginx, protocol: str, run_id: str, after: int = 0) -> AsyncIterator[Http2Reader | Reader]:
    path, cursor = f"/v1/runs/{run_id}/stream", str(after)
    if protocol == "HTTP/2":
        async with nginx.http2() as connection:
            yield Http2Reader(connection, await connection.get(path, last_event_id=cursor))
    else:
        async with nginx.opened("GET", path, headers={"Last-Event-ID": cursor}) as reader:
            yield reader


async def is_cut(reader: Reader) -> list[Block]:
    seen: list[Block] = []
    try:
        while True:
            seen += await reader.take(1)
    except (h11.RemoteProtocolError, trio.BrokenResourceError):
        return seen


# Through at once


@pytest.mark.parametrize("protocol", PROTOCOLS)
async def test_an_event_is_with_its_reader_before_the_producer_goes_on(protocol: str) -> None:
    tap = Tap()
    async with serving({"tap": tap}) as server, nginx_before(server.port) as nginx:
        run_id = await nginx.start("tap")
        async with reading(nginx, protocol, run_id) as reader:
            for seq in range(1, 6):
                tap.feed(f"event {seq}")
                assert await reader.take(1) == [Block(seq, data=f"event {seq}")]
            tap.end()
            assert await reader.rest() == [Block(6, data=DONE)]


async def test_twenty_streams_go_over_one_http2_connection() -> None:
    taps = {f"tap-{number}": Tap() for number in range(20)}
    async with serving(taps) as server, nginx_before(server.port) as nginx, nginx.http2() as connection:
        numbers = [await connection.get(f"/v1/runs/{await nginx.start(name)}/stream") for name in taps]
        for seq in (1, 2):
            for number, (name, tap) in zip(numbers, taps.items(), strict=True):
                tap.feed(f"{name}, {seq}")
                assert (await connection.blocks(number, seq))[-1] == Block(seq, data=f"{name}, {seq}")
        assert not connection.over


async def test_a_stream_is_not_compressed_for_a_client_that_accepts_it() -> None:
    async with serving() as server, nginx_before(server.port) as nginx:
        path = f"/v1/runs/{await nginx.start('count', 3)}/stream"
        answer = await nginx.client.get(path, headers={"Accept-Encoding": "gzip"})
        assert "content-encoding" not in answer.headers
        assert answer.text.endswith("data: [DONE]\n\n")


# Answers


async def test_answers_are_the_same_as_without_nginx() -> None:
    async with serving(log=MemoryLog(max_entries=5), tail_entries=5) as server, nginx_before(server.port) as nginx:
        run_id = await server.start("count", 20)
        await server.ended_run(run_id)
        silent = await server.start("silent")
        stream = f"/v1/runs/{run_id}/stream"
        asked: list[tuple[str, str, dict[str, Any], int]] = [
            ("GET", "/healthz", {}, 200),
            ("GET", "/v1/runs?limit=1&status=completed", {}, 200),
            ("GET", f"/v1/runs/{run_id}", {}, 200),
            ("GET", f"{stream}?starting_after=18", {}, 200),
            ("GET", f"{stream}?starting_after=17", {"headers": {"Last-Event-ID": "19"}}, 200),
            ("POST", stream, {"json": {"starting_after": 20}}, 200),
            ("GET", f"{stream}?tail=2", {}, 200),
            ("HEAD", f"{stream}?starting_after=18", {}, 200),
            ("HEAD", f"/v1/runs/{silent}/stream", {}, 200),
            ("GET", stream, {"headers": {"Last-Event-ID": "21"}}, 204),
            ("GET", f"{stream}?starting_after=21", {}, 204),
            ("GET", f"{stream}?starting_after=3", {}, 410),
            ("GET", f"{stream}?starting_after=three", {}, 400),
            ("GET", "/v1/runs/nobody/stream", {}, 404),
            ("GET", "/nowhere", {}, 404),
            ("PUT", "/v1/runs", {}, 405),
            ("POST", f"/v1/runs/{run_id}/cancel", {}, 409),
            ("POST", "/v1/runs", {"json": {"producer": "count", "input": 1, "run_id": silent}}, 409),
        ]
        for method, path, more, status in asked:
            direct = await server.client.request(method, path, **more)
            through = await nginx.client.request(method, path, **more)
            assert (direct.status_code, through.status_code) == (status, status), path
            assert through.content == direct.content, path
            for name in ("content-type", "cache-control", "allow"):
                assert through.headers.get(name) == direct.headers.get(name), (path, name)


async def test_a_run_that_is_started_says_where_its_stream_is_without_a_host() -> None:
    async with serving() as server, nginx_before(server.port, http2=True) as nginx:
        answer = await nginx.client.post("/v1/runs", json={"producer": "count", "input": 2})
        assert (answer.http_version, answer.status_code) == ("HTTP/2", 201)
        run_id = answer.headers["penstock-run-id"]
        assert answer.headers["location"] == f"/v1/runs/{run_id}/stream"
        again = await nginx.client.get(answer.headers["location"])
        assert again.text.count("\nid: ") == 2
        streamed = await nginx.client.post("/v1/runs", json={"producer": "count", "input": 2, "stream": True})
        assert (streamed.status_code, streamed.text) == (201, again.text)


async def test_a_page_that_came_through_nginx_may_post_and_another_sites_may_not() -> None:
    async with serving() as server, nginx_before(server.port) as nginx:
        for origin, status in [(nginx.url, 201), ("https://example.com", 403)]:
            headers = {"Origin": origin, "Content-Type": "text/plain"}
            body = b'{"producer": "count", "input": 1}'
            assert (await nginx.client.post("/v1/runs", content=body, headers=headers)).status_code == status


async def test_penstock_gets_nginxs_forwarding_headers_and_not_the_clients() -> None:
    async with hanging_up() as (port, seen), nginx_before(port) as nginx:
        await nginx.client.get("/", headers={"X-Forwarded-For": "192.0.2.1", "X-Forwarded-Proto": "gopher"})
        lines = seen[0].decode().split("\r\n")
        told = {"Host": f"127.0.0.1:{nginx.port}", "X-Forwarded-For": "127.0.0.1", "X-Forwarded-Proto": "https"}
        assert {f"{name}: {value}" for name, value in told.items()} <= set(lines)
        assert not {line.partition(" ")[2] for line in lines} & {"192.0.2.1", "gopher"}


async def test_requests_share_a_connection_with_penstock() -> None:
    async with serving() as server, nginx_before(server.port, workers="1") as nginx:
        connections = []
        for _ in range(3):
            assert (await nginx.client.get("/healthz")).status_code == 200
            connections.append(server.connections())
        assert len(connections[0]) == 1
        assert connections == [connections[0]] * 3


# Limits


@pytest.mark.parametrize("size, status", [(MAX_BODY_BYTES, 201), (MAX_BODY_BYTES + 1, 413)])
async def test_nginx_takes_bodies_up_to_penstocks_own_limit(size: int, status: int) -> None:
    async with serving() as server, nginx_before(server.port) as nginx:
        body = b'{"producer": "count", "input": 1}'
        answer = await nginx.client.post("/v1/runs", content=body.ljust(size))
        assert answer.status_code == status


async def test_headers_that_nginx_takes_penstock_takes_as_well() -> None:
    async with serving() as server, nginx_before(server.port) as nginx:
        long, too_long = "x" * (7 * 1024 - 16), "x" * (7 * 1024)
        for headers, status in [
            ({"x-1": long, "x-2": long}, 200),
            ({"x-1": too_long}, 400),
            ({"x-1": long, "x-2": long, "x-3": long}, 400),
        ]:
            assert (await nginx.client.get("/healthz", headers=headers)).status_code == status


def test_the_shipped_file_agrees_with_penstocks_defaults() -> None:
    tokens = SHIPPED.read_text().split()

    def after(*directive: str) -> str:
        (start,) = [n for n in range(len(tokens)) if tuple(tokens[n : n + len(directive)]) == directive]
        return tokens[start + len(directive)].rstrip(";")

    assert [after("upstream", "penstock", "{", "server")] == new_config().bind
    seconds = after("keepalive", "32;", "keepalive_timeout").removesuffix("s")
    assert int(seconds) < Config().keep_alive_timeout
    assert after("client_max_body_size") == f"{MAX_BODY_BYTES // 1024**2}m"
    assert int(after("large_client_header_buffers", "2").removesuffix("k")) * 2048 < Config().h11_max_incomplete_size


async def test_pings_keep_a_stream_open_for_longer_than_nginx_waits() -> None:
    tap = Tap()
    async with (
        serving({"tap": tap}, ping_interval=0.2) as server,
        nginx_before(server.port, http="proxy_read_timeout 1s;") as nginx,
    ):
        run_id = await nginx.start("tap")
        async with nginx.reading(run_id) as reader:
            assert await reader.take(8) == [PING] * 8
            tap.feed("at last")
            while (block := await reader.next()) == PING:
                pass
            assert block == Block(1, data="at last")


async def test_without_pings_nginx_ends_a_silent_stream_and_its_reader_resumes() -> None:
    tap = Tap()
    async with (
        serving({"tap": tap}, ping_interval=None) as server,
        nginx_before(server.port, http="proxy_read_timeout 1s;") as nginx,
    ):
        run_id = await nginx.start("tap")
        async with nginx.reading(run_id) as reader:
            tap.feed("before")
            assert await is_cut(reader) == [Block(1, data="before")]
        assert (await server.run(run_id))["status"] == "running"
        tap.feed("after")
        tap.end()
        assert await nginx.read(run_id, starting_after=1) == [Block(2, data="after"), Block(3, data=DONE)]


# Cut, and resumed


@pytest.mark.parametrize("protocol", ["HTTP/1.1", "reset"])
async def test_a_client_that_goes_away_is_noticed_by_penstock_and_resumes(protocol: str) -> None:
    tap = Tap()
    async with serving({"tap": tap}) as server, nginx_before(server.port) as nginx:
        run_id = await nginx.start("tap")
        seen: list[Block] = []
        for cut in range(3):
            tap.feed(f"{cut}, seen", f"{cut}, seen by the next")
            async with reading(nginx, protocol.replace("reset", "HTTP/2"), run_id, after=len(seen)) as reader:
                seen += await reader.take(1)
                assert readers(server, run_id) == [1]
                if protocol == "reset":
                    assert isinstance(reader, Http2Reader)
                    await reader.connection.reset(reader.number)
                    await eventually(lambda: readers(server, run_id) == [0])
            await eventually(lambda: readers(server, run_id) == [0])
        tap.end()
        seen += await nginx.read(run_id, starting_after=len(seen))
        assert ids(seen) == list(range(1, 8))
        assert [block.data for block in seen[:6]] == [
            f"{cut}, seen{then}" for cut in range(3) for then in ("", " by the next")
        ]


async def test_a_reload_of_nginx_leaves_streams_alone() -> None:
    tap = Tap()
    async with serving({"tap": tap}) as server, nginx_before(server.port) as nginx:
        run_id = await nginx.start("tap")
        async with reading(nginx, "HTTP/2", run_id) as reader:
            tap.feed("before")
            await reader.take(1)
            old = await nginx.reload()
            async with reading(nginx, "HTTP/2", run_id, after=1) as another:
                tap.feed("after")
                assert await reader.take(1) == await another.take(1) == [Block(2, data="after")]
                await eventually(lambda: len(nginx.workers() & old) == 1)
                tap.end()
                assert await reader.rest() == [Block(3, data=DONE)]
        await eventually(lambda: not nginx.workers() & old)


async def test_a_stream_that_a_reload_cuts_resumes_without_gap_or_repeat() -> None:
    tap = Tap()
    async with (
        serving({"tap": tap}) as server,
        nginx_before(server.port, main="worker_shutdown_timeout 100ms;") as nginx,
    ):
        run_id = await nginx.start("tap")
        seen: list[Block] = []
        for cut in range(2):
            async with nginx.reading(run_id, starting_after=len(seen)) as reader:
                tap.feed(f"{cut}, seen")
                seen += await reader.take(1)
                await nginx.reload()
                seen += await is_cut(reader)
            tap.feed(f"{cut}, while nobody reads")
        tap.end()
        seen += await nginx.read(run_id, starting_after=len(seen))
        assert ids(seen) == list(range(1, 6))


def at(port: int) -> Config:
    config = quiet_config()
    config.bind = [f"127.0.0.1:{port}"]
    return config


async def test_a_server_that_is_started_again_behind_nginx_is_found_again() -> None:
    tap, (port,) = Tap(), free_ports(1)
    async with open_log("memory://") as log, open_supervisor(log) as elsewhere, nginx_before(port) as nginx:
        run_id = (await elsewhere.start(tap, None)).id
        async with serving(log=log, config=at(port)) as server, nginx.reading(run_id) as reader:
            tap.feed("before")
            seen = await reader.take(1)
            server.shutdown.set()
            assert await reader.rest() == [RETRY]
        tap.feed("meanwhile")
        assert (await nginx.client.get("/readyz")).status_code == 502
        with pytest.raises(httpx2.RemoteProtocolError):  # a status would end an EventSource for good
            await nginx.client.get(f"/v1/runs/{run_id}/stream?starting_after=1")
        async with nginx.http2() as connection:
            numbers = [await connection.get(path) for path in (f"/v1/runs/{run_id}/stream", "/readyz")]
            while len(connection.ends) < len(numbers):
                await connection.receive()
            assert set(connection.headers) == {numbers[1]}
        async with serving(log=log, config=at(port)):
            tap.end()
            seen += await nginx.read(run_id, starting_after=1)
            assert (await nginx.client.get("/readyz")).status_code == 200
        assert seen == [Block(1, data="before"), Block(2, data="meanwhile"), Block(3, data=DONE)]


@pytest.mark.skipif(browser.executable() is None, reason=browser.WHY_NOT)
async def test_a_browser_outlasts_a_server_that_is_started_again_behind_nginx() -> None:
    tap, (port,), site = Tap(), free_ports(1), browser.Site()
    site.tells = True
    async with open_log("memory://") as log, open_supervisor(log) as elsewhere, nginx_before(port) as nginx:
        site.run_ids = [(await elsewhere.start(tap, None)).id]
        async with serving(log=log, config=at(port), run=site.serve) as server, AsyncExitStack() as stack:
            await stack.enter_async_context(browser.chromium(f"{nginx.url}/page"))
            tap.feed("before")
            assert await site.said.receive() == {"event": "before"}
            server.shutdown.set()
            await server.ended.wait()
            await eventually(lambda: '/stream HTTP/2.0" 444 ' in nginx.logs["penstock.access.log"])
            after = stack.pop_all()
        async with after, serving(log=log, config=at(port), run=site.serve):
            tap.feed("after")
            tap.end()
            while "streams" not in (said := await site.said.receive()):
                pass
        (stream,) = said["streams"]
        assert stream["events"] == [["1", "before"], ["2", "after"], ["3", DONE]]
        assert [(asked.last_event_id, asked.status) for asked in site.asked] == [(None, 200), ("1", 200), ("3", 204)]


def before_both(*ports: int, **options: Any) -> Any:
    """An nginx before two servers, which take turns: one worker counts."""
    first, second = ports
    two = f"server 127.0.0.1:{first} max_fails=0; server 127.0.0.1:{second}"
    return nginx_before(first, shipped={f"server 127.0.0.1:{first}": two}, workers="1", **options)


async def test_a_reader_that_comes_to_a_server_that_drains_is_served_by_another() -> None:
    own, tap = Tap(), Tap()
    async with (
        open_log("memory://") as log,
        serving({"tap": tap}, log) as stays,
        serving({"own": own}, log, drain_timeout=3600.0) as goes,
        before_both(goes.port, stays.port) as nginx,
    ):
        run_id, _ = await stays.start("tap"), await goes.start("own")
        goes.shutdown.set()
        await eventually(lambda: goes.service.supervisor.draining)
        assert (await goes.client.get(f"/v1/runs/{run_id}/stream")).status_code == 503
        async with AsyncExitStack() as stack:
            for count in range(1, 5):
                await stack.enter_async_context(nginx.reading(run_id))
                assert readers(stays, run_id) == [count]
        assert {(await nginx.client.get("/readyz")).status_code for _ in range(4)} == {200}
        tap.end()
        own.end()


@asynccontextmanager
async def hanging_up() -> AsyncIterator[tuple[int, list[bytes]]]:
    """The port of a server that reads a request and hangs up, and the requests that it has read."""
    seen: list[bytes] = []

    async def hang_up(stream: trio.SocketStream) -> None:
        async with stream:
            request = b""
            while not request.endswith((b"\r\n\r\n", b"}")) and (piece := await stream.receive_some()):
                request += piece
            seen.append(request)

    async with trio.open_nursery() as nursery:
        (listener,) = await nursery.start(partial(trio.serve_tcp, hang_up, 0, host="127.0.0.1"))
        yield listener.socket.getsockname()[1], seen
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("method, asked", [("GET", 2), ("POST", 1)])
async def test_only_a_request_that_starts_nothing_is_tried_with_a_second_server(method: str, asked: int) -> None:
    async with hanging_up() as (first, seen), hanging_up() as (second, more), before_both(first, second) as nginx:
        answer = await nginx.client.request(method, "/v1/runs", json={"producer": "x"} if method == "POST" else None)
        assert answer.status_code == 502
        assert len(seen) + len(more) == asked


SECRET: Final = "link=c2VjcmV0"  # noqa: S105  (of nothing)


async def gets_into_trouble(nginx: Nginx, server: Server, run_id: str) -> None:
    """Have nginx do all that it could log an error about, with a link in each request line."""
    stream = f"/v1/runs/{run_id}/stream?{SECRET}"
    async with nginx.opened("GET", stream, headers={"Referer": f"https://example.com/?{SECRET}"}) as reader:
        await reader.take(1)
        await is_cut(reader)  # it was silent for too long
    async with nginx.opened("GET", stream) as reader:
        await reader.take(1)  # and is left
    assert (await nginx.client.post(f"/v1/runs?{SECRET}", content=bytes(MAX_BODY_BYTES + 1))).status_code == 413
    assert (await nginx.client.get(f"/?{SECRET}", headers={"x": "x" * 8000})).status_code == 400
    server.shutdown.set()
    await server.ended.wait()
    assert (await nginx.client.get(f"/v1/runs?{SECRET}")).status_code == 502
    with pytest.raises(httpx2.RemoteProtocolError):
        await nginx.client.get(stream)


async def test_a_signed_link_is_in_no_log_of_nginx() -> None:
    tap = Tap()
    async with (
        serving({"tap": tap}, ping_interval=None) as server,
        nginx_before(server.port, http="proxy_read_timeout 1s;") as nginx,
    ):
        run_id = await server.start("tap")
        tap.feed("an event")
        await gets_into_trouble(nginx, server, run_id)
        await eventually(lambda: nginx.logs["penstock.access.log"].count(f" /v1/runs/{run_id}/stream ") == 3)
        assert SECRET not in "".join(nginx.logs.values())


async def test_a_signed_link_is_in_no_log_when_nginx_has_no_connections_left() -> None:
    async with serving() as server, nginx_before(server.port, workers="1", connections="6") as nginx:
        path = f"/v1/runs/{await server.start('silent')}/stream?{SECRET}"
        async with nginx.http2() as connection:
            for _ in range(6):
                await connection.get(path)
            while not connection.ends:
                await connection.receive()
        assert SECRET not in "".join(nginx.logs.values())
