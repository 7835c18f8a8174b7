"""Each correction of Hypercorn's faults, against the real server: with it, and without it."""

from __future__ import annotations

import binascii
import logging
import math
import socket
import struct
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final

import hypercorn.protocol.h2
import hypercorn.trio
import hypercorn.trio.run
import pytest
import trio
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, BUFFER_LOW_WATER, BufferCompleteError, StreamBuffer
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import EventWrapper
from starlette.routing import Route
from trio.testing import wait_all_tasks_blocked

from penstock import ConfigurationError, EventStreamResponse, create_app, serve
from penstock.cli import serving as serve_command
from penstock.exchange import MAX_SEND
from penstock.http import corrections
from penstock.http.corrections import MAX_USER_TIMEOUT, BoundedBuffer, Connection, Sends
from tests.serving import PRODUCERS, Tap, eventually, family, quiet_config, serving
from tests.stalling import (
    KIB,
    as_it_is,
    buffer_of,
    flood,
    served,
    small_socket,
    sockets_at,
    stalled,
    with_endless,
    without_window,
)
from tests.test_cli import ran, refused
from tests.test_http2 import Streams, connected
from tests.wire import DONE, ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable
    from contextlib import AbstractAsyncContextManager

    from hypercorn.config import Config
    from starlette.requests import Request

    from penstock.cli.hosting import Hosted
    from tests.serving import Server
    from tests.stalling import Windows

SOON: Final = 15.0
"""Seconds within which something has happened that takes a second or two."""
USER_TIMEOUT: Final = socket.TCP_USER_TIMEOUT
MILLION: Final = 1_000_000


def giving_up_after(seconds: float, **knobs: Any) -> AbstractAsyncContextManager[Server]:
    """A server with this TCP user timeout."""
    return serving(run=partial(serve, signals=(), tcp_user_timeout=seconds), **knobs)


# The TCP user timeout


@pytest.mark.parametrize("inherited", [False, True])
@pytest.mark.parametrize(
    "seconds, milliseconds", [(1.5, 1500), (0.0001, 1), (0, 0), (MAX_USER_TIMEOUT, 2**31 - 1), (None, 30_000)]
)
async def test_listening_and_accepted_sockets_have_the_timeout(
    seconds: float | None, milliseconds: int, *, inherited: bool
) -> None:
    config = quiet_config()
    if inherited:
        config.bind = [f"fd://{socket.create_server(('127.0.0.1', 0)).detach()}"]
    run = partial(serve, signals=(), **({} if seconds is None else {"tcp_user_timeout": seconds}))  # type: ignore[arg-type]
    async with serving(config=config, run=run) as server:
        assert (await server.client.get("/healthz")).status_code == 200
        async with AsyncExitStack() as stack:
            sockets = [stack.enter_context(each) for each in sockets_at(server.port)]
            listening = [each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for each in sockets]
            assert sorted(listening) == [0, 1]
            assert [each.getsockopt(socket.IPPROTO_TCP, USER_TIMEOUT) for each in sockets] == [milliseconds] * 2


@pytest.mark.parametrize(
    "seconds", [-1, -0.001, math.nan, math.inf, True, None, "1", math.nextafter(MAX_USER_TIMEOUT, math.inf), 2**31]
)
async def test_a_timeout_that_no_socket_takes_is_refused(seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match="tcp_user_timeout"):
        await serve(create_app({}), quiet_config(), signals=(), tcp_user_timeout=seconds)


def test_the_command_line_takes_a_timeout_up_to_what_a_socket_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    hosted: list[Hosted] = []

    def host(what: Hosted, *_sockets: Any, **_how: Any) -> int:
        hosted.append(what)
        return 0

    monkeypatch.setattr(serve_command, "host", host)
    command = ("serve", "--producers", "examples/agent.py:producers", "--bind", "127.0.0.1:0")
    for seconds in ("0", "0.5", "2147483.647"):
        assert ran(*command, "--tcp-user-timeout", seconds).exit_code == 0
    assert ran(*command).exit_code == 0
    assert [each.tcp_user_timeout for each in hosted] == [0, 0.5, MAX_USER_TIMEOUT, 30.0]


@pytest.mark.parametrize("seconds", ["-0.001", "2147483.648", "nan", "inf", "soon"])
def test_the_command_line_refuses_any_other_timeout(seconds: str) -> None:
    command = ("serve", "--producers", "examples/agent.py:producers", "--bind", "127.0.0.1:0")
    words = refused(*command, "--tcp-user-timeout", seconds)
    assert "user-timeout" in words.replace("_", "-")


@pytest.mark.parametrize("seconds, times", [(1.0, 1), (0, 0)])
async def test_a_system_without_the_timeout_is_warned_of_and_served(
    seconds: float, times: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(corrections, "_TCP_USER_TIMEOUT", None)
    async with giving_up_after(seconds) as server:
        assert ids(await server.read(await server.start("count", 3))) == [1, 2, 3, 4]
    assert caplog.text.count("no TCP_USER_TIMEOUT") == times


async def test_a_client_that_stops_reading_is_given_up_and_its_run_and_other_readers_go_on() -> None:
    tap = Tap()
    async with giving_up_after(1.0, producers={"tap": tap}) as server:
        tails = server.service.supervisor._services.tails
        run_id = await server.start("tap")
        tap.feed(*["x" * 10_000] * 1000)  # more than the sockets of both sides hold
        async with server.reading(run_id) as reader:
            await reader.take(1000)
            before = server.tasks()
            async with stalled(server, f"/v1/runs/{run_id}/stream"):
                await eventually(lambda: tails.get(run_id).users == 3)  # type: ignore[union-attr]
                with trio.fail_after(SOON):
                    await eventually(lambda: tails.get(run_id).users == 2)  # type: ignore[union-attr]
                    await eventually(lambda: server.tasks() == before)
            tap.feed("after")
            assert (await reader.take(1))[0].data == "after"
            assert (await server.run(run_id))["status"] == "running"
            tap.end()
            assert [block.data for block in await reader.rest()] == [DONE]


async def test_without_the_timeout_such_a_client_stays_for_as_long_as_it_likes() -> None:
    async with giving_up_after(0) as patient, giving_up_after(1.0) as strict:
        stays, goes = with_endless(patient), with_endless(strict)
        async with stalled(patient, "/endless?name=one"):
            for name in ("one", "two", "three"):
                async with stalled(strict, f"/endless?name={name}"):
                    await eventually(lambda name=name: name in goes.left)  # type: ignore[misc]
            assert not stays.left
        await eventually(lambda: stays.left == {"one"})


def quick_config() -> Config:
    """Connections without requests are closed at once."""
    config = quiet_config()
    config.keep_alive_timeout = 0.05
    return config


# The buffer of an HTTP/2 stream


async def test_a_stream_without_a_window_waits_and_its_neighbour_flows() -> None:
    async with serving() as server, without_window(server) as client:
        endless = with_endless(server)
        shut, flows = await client.get("/endless?name=shut"), await client.get("/endless?name=flows")
        await client.open(flows)
        taken = 0
        while taken < 10 * MILLION:
            await client.receive()
            taken += client.forget(flows)
        assert BUFFER_HIGH_WATER <= len(buffer_of(client, shut).buffer) < BUFFER_HIGH_WATER + len(KIB)
        assert endless.yielded["shut"] <= BUFFER_HIGH_WATER / len(KIB) + 1


async def test_without_the_correction_a_stream_without_a_window_is_kept_in_memory_without_a_limit() -> None:
    with as_it_is("StreamBuffer"):
        async with serving() as server, without_window(server) as client:
            with_endless(server)
            shut = await client.get("/endless?name=shut")
            await client.until_headers(shut)
            kept = buffer_of(client, shut)
            await eventually(lambda: len(kept.buffer) > 10 * MILLION)


async def test_when_the_window_opens_a_replay_arrives_whole_in_order_and_once() -> None:
    async with serving({"flood": flood}) as server, without_window(server) as client:
        run_id = await server.start("flood", [2000, 1000])
        await server.ended_run(run_id)
        waits, flows = [await client.get(f"/v1/runs/{run_id}/stream") for _ in range(2)]
        await client.open(flows)
        assert ids(await client.whole(flows)) == list(range(1, 2002))
        assert 0 < len(buffer_of(client, waits).buffer) < BUFFER_HIGH_WATER + MAX_SEND
        assert client.bodies[waits] == b""
        taken = 0
        for size in (1, BUFFER_HIGH_WATER - 1, 1, BUFFER_HIGH_WATER, MAX_SEND):
            await client.open(waits, size)
            await client.until_size(waits, taken := taken + size)
        await client.open(waits)
        blocks = await client.whole(waits)
        assert ids(blocks) == list(range(1, 2002))
        assert [block.data.split()[0] for block in blocks if block.data] == [*map(str, range(1, 2001)), DONE]


@pytest.mark.parametrize("size", [3, 16_384, 16_385, 32_767, 32_768, 32_769, 65_536, 200_000])
async def test_a_stream_that_ends_while_its_buffer_is_full_ends_when_that_is_read(size: int) -> None:
    body = b":".ljust(size - 2, b"x") + b"\n\n"

    async def source() -> AsyncIterator[bytes]:
        yield body

    async def answer(_request: Request) -> EventStreamResponse:
        return EventStreamResponse(source())

    async with serving() as server, without_window(server) as client:
        server.app.router.routes.append(Route("/short", answer))
        number = await client.get("/short")
        await client.until_headers(number)
        await wait_all_tasks_blocked()
        await client.open(number, 1)
        await client.until_size(number, 1)
        assert number not in client.over
        await client.open(number)
        assert await client.whole_body(number) == body
        protocol = served(client.socket).protocol.protocol
        await eventually(lambda: not protocol.stream_buffers and not protocol.streams)


@pytest.mark.parametrize("how", ["reset", "close"])
async def test_a_reader_that_goes_while_a_send_to_it_waits_lets_go_of_that(how: str) -> None:
    async with serving(config=quick_config()) as server:
        run_id, endless = await server.start("count", 3), with_endless(server)
        async with without_window(server) as client:
            number = await client.get("/endless?name=shut")
            await client.until_headers(number)
            kept = buffer_of(client, number)
            await eventually(lambda: len(kept.buffer) >= BUFFER_HIGH_WATER)
            await wait_all_tasks_blocked()
            if how == "reset":
                await client.reset(number)
                await eventually(lambda: endless.left == {"shut"})
                other = await client.get(f"/v1/runs/{run_id}/stream")
                await client.open(other)
                assert ids(await client.whole(other)) == [1, 2, 3, 4]
        await eventually(lambda: endless.left == {"shut"})
        await eventually(lambda: not server.connections())


def answering(task: trio.lowlevel.Task) -> int:
    """How many requests a connection is answering."""
    return sum("_handle" in each.name for each in family(task))


async def waits_for_nobody(server: Server, client: Windows) -> trio.lowlevel.Task:
    """Ask for an answer that ends, and take none of it; the task of the connection."""
    await client.until_headers(await client.get("/healthz"))
    (task,) = server.connections()
    assert answering(task) == 1
    return task


@pytest.mark.parametrize("path", ["/healthz", "/endless?name=one"])
async def test_a_stream_that_is_reset_while_its_window_is_shut_leaves_nothing_behind(path: str) -> None:
    async with serving() as server, without_window(server) as client:
        with_endless(server)
        await client.until_headers(number := await client.get(path))
        (task,) = server.connections()
        buffers = served(client.socket).protocol.protocol.stream_buffers
        await eventually(lambda: len(buffers[number].buffer) > 0)
        await client.reset(number)
        with suppress(trio.TooSlowError), trio.fail_after(5):
            await eventually(lambda: not buffers and not answering(task))
        assert (len(buffers), answering(task)) == (0, 0)


async def test_an_answer_that_nobody_takes_is_given_up_with_its_connection_and_for_ever_without_the_correction() -> (
    None
):
    async with serving(config=quick_config()) as server:
        with as_it_is("H2Protocol"):
            async with without_window(server) as client:
                stock = await waits_for_nobody(server, client)
        await eventually(lambda: not [each for each in family(stock) if "_idle_timeout" in each.name])
        async with without_window(server) as client:
            await client.until_headers(await client.get("/healthz"))
        with trio.fail_after(SOON):
            await eventually(lambda: server.connections() == [stock])
        assert answering(stock) == 1


async def pushed(buffer: StreamBuffer, nursery: trio.Nursery, size: int) -> Callable[[], bool]:
    """Push so many bytes; whether that has returned, to be asked when all tasks wait."""
    returned = []

    async def push() -> None:
        await buffer.push(b"x" * size)
        returned.append(size)

    nursery.start_soon(push)
    await wait_all_tasks_blocked()
    return lambda: bool(returned)


@pytest.mark.parametrize("before", [0, 1, BUFFER_HIGH_WATER - 1])
async def test_a_push_waits_from_the_high_water_mark_on_until_less_than_the_low_water_mark_is_left(before: int) -> None:
    buffer = BoundedBuffer(EventWrapper)
    async with trio.open_nursery() as nursery:
        await buffer.push(b"x" * before)
        if before < BUFFER_HIGH_WATER - 1:
            assert (await pushed(buffer, nursery, BUFFER_HIGH_WATER - 1 - before))()
        waits = await pushed(buffer, nursery, 1)
        for size, left in [(0, BUFFER_HIGH_WATER), (BUFFER_LOW_WATER, BUFFER_LOW_WATER), (0, BUFFER_LOW_WATER)]:
            assert len(await buffer.pop(int(size))) == size
            await wait_all_tasks_blocked()
            assert (len(buffer.buffer), waits()) == (left, False)
        await buffer.pop(1)
        await wait_all_tasks_blocked()
        assert waits()
        assert (await pushed(buffer, nursery, 1))()
        assert not (await pushed(buffer, nursery, BUFFER_HIGH_WATER))()  # the mark counts again
        nursery.cancel_scope.cancel()


async def test_a_buffer_gives_out_what_was_put_in_and_no_more_than_it_is_asked_for() -> None:
    buffer = BoundedBuffer(EventWrapper)
    await buffer.push(b"one, ")
    await buffer.push(b"")
    await buffer.push(b"two")
    assert [await buffer.pop(size) for size in (0, 4, 100, 1)] == [b"", b"one,", b" two", b""]
    buffer.set_complete()
    assert buffer.complete
    await buffer.drain()
    with pytest.raises(BufferCompleteError):
        await buffer.push(b"late")


async def test_a_buffer_that_is_closed_lets_go_of_whoever_waits_for_it() -> None:
    buffer = BoundedBuffer(EventWrapper)
    async with trio.open_nursery() as nursery:
        waits = await pushed(buffer, nursery, BUFFER_HIGH_WATER)
        nursery.start_soon(buffer.drain)
        assert not waits()
        await buffer.close()
    assert waits()
    with pytest.raises(BufferCompleteError):
        await buffer.push(b"late")


async def test_several_senders_that_wait_for_one_stream_all_go_on() -> None:
    buffer = BoundedBuffer(EventWrapper)
    async with trio.open_nursery() as nursery:
        waiting = [await pushed(buffer, nursery, BUFFER_HIGH_WATER) for _ in range(3)]
        assert not any(each() for each in waiting)
        await buffer.pop(3 * BUFFER_HIGH_WATER)
        await wait_all_tasks_blocked()
        returned = [each() for each in waiting]
        nursery.cancel_scope.cancel()
    assert returned == [True] * 3


# The last sends


async def test_sends_end_at_the_earliest_time_that_was_set_and_are_whole_until_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    sends = Sends()
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


@asynccontextmanager
async def jammed(server: Server) -> AsyncIterator[Streams]:
    """An HTTP/2 client that does not read, so that the first answer with a wide header stops in mid-frame."""
    async with await small_socket(server.port) as stream:
        client = Streams(stream)
        await stream.send_all(client.h2.data_to_send())
        await client.receive()
        served(stream).stream.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        await client.get("/endless?name=first&wide=40000")
        await eventually(served(stream).send_lock.locked)
        await wait_all_tasks_blocked(0.01)
        assert served(stream).send_lock.locked()
        yield client


async def test_an_answer_that_is_cancelled_in_mid_frame_leaves_other_streams_of_its_connection_whole() -> None:
    async with serving() as server:
        endless = with_endless(server)
        async with jammed(server) as client:
            await client.reset(1)
            client.h2.ping(b"the last")
            await client.socket.send_all(client.h2.data_to_send())
            lock = served(client.socket).send_lock
            await eventually(lambda: lock.statistics().tasks_waiting > 0)  # so it has read the reset
            await wait_all_tasks_blocked(0.01)
            assert not endless.left
            await reads_all_of_another(client, server)


async def test_an_answer_that_is_cancelled_before_its_headers_are_sent_leaves_other_streams_whole() -> None:
    async with serving() as server:
        with_endless(server)
        async with jammed(server) as client:
            lock = served(client.socket).send_lock
            second = await client.get("/endless?name=second")
            await eventually(lambda: lock.statistics().tasks_waiting == 1)
            await client.reset(second)
            protocol = served(client.socket).protocol.protocol
            await eventually(lambda: second not in protocol.streams)
            await wait_all_tasks_blocked(0.01)
            third = await client.get("/endless?name=second")
            while third not in client.headers:
                await client.receive()
            assert client.headers[third]["x-name"] == "second"
            await reads_all_of_another(client, server)


async def reads_all_of_another(client: Streams, server: Server) -> None:
    """What comes on this connection is in order: a stream of it is whole."""
    with trio.fail_after(SOON):
        run_id = await server.start("count", 50)
        number = await client.get(f"/v1/runs/{run_id}/stream")
        assert ids(await client.whole(number)) == list(range(1, 52))


# An error in one connection


async def path_that_is_not_ascii(client: Windows) -> None:
    await client.get("/\xff")


async def connect_without_a_path(client: Windows) -> None:
    number = client.h2.get_next_available_stream_id()
    client.h2.send_headers(number, [(":method", "CONNECT"), (":authority", "x")])
    await client.socket.send_all(client.h2.data_to_send())


async def priorities_of_streams_that_nobody_opens(client: Windows) -> None:
    for number in range(1001, 3101, 2):
        client.h2.prioritize(number, weight=1)
    await client.socket.send_all(client.h2.data_to_send())


POISON: Final = [path_that_is_not_ascii, connect_without_a_path, priorities_of_streams_that_nobody_opens]
UNCHECKED: Final = {"validate_outbound_headers": False, "normalize_outbound_headers": False, "header_encoding": "utf-8"}


@pytest.mark.parametrize("poison", POISON)
async def test_an_error_in_one_connection_ends_that_connection_and_is_said_in_one_line(poison: Any) -> None:
    tap = Tap()
    async with serving({**PRODUCERS, "tap": tap}, complains=True) as server:
        run_id, silent = await server.start("tap"), await server.start("silent")
        tails = server.service.supervisor._services.tails
        async with server.reading(run_id) as reader, without_window(server, **UNCHECKED) as client:
            number = await client.get(f"/v1/runs/{silent}/stream")
            await client.until_headers(number)
            assert tails.get(silent).users == 2  # type: ignore[union-attr]
            await poison(client)
            while await client.socket.receive_some():
                pass
            await eventually(lambda: tails.get(silent).users == 1)  # type: ignore[union-attr]
            tap.feed("goes on")
            assert [block.data for block in await reader.take(1)] == ["goes on"]
            assert (await server.run(silent))["status"] == "running"
        assert (await server.client.get("/healthz")).status_code == 200
        assert not server.ended.is_set()
    (said,) = server.complaints
    assert said.levelno == logging.WARNING
    assert said.exc_info is None
    assert "a connection ended with an error of its protocol" in said.getMessage()
    assert "\n" not in said.getMessage()


@pytest.mark.parametrize("poison", POISON)
async def test_without_the_correction_it_ends_the_server(poison: Any) -> None:
    errors: list[BaseException] = []

    async def run(*args: Any, **kwargs: Any) -> None:
        try:
            await serve(*args, signals=(), **kwargs)
        except Exception as error:  # noqa: BLE001  (each poison has its own)
            errors.append(error)

    with as_it_is("TCPServer"):
        async with serving(run=run, complains=True) as server, without_window(server, **UNCHECKED) as client:
            await poison(client)
            with trio.fail_after(SOON):
                await server.ended.wait()
    assert len(errors) == 1


# How connections end


async def test_when_a_connection_breaks_all_of_its_readers_end() -> None:
    async with serving() as server:
        endless = with_endless(server)
        async with jammed(server) as client:
            for name in ("second", "third", "fourth"):
                await client.get(f"/endless?name={name}")
            lock = served(client.socket).send_lock
            await eventually(lambda: lock.statistics().tasks_waiting >= 3)
            client.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        with trio.fail_after(SOON):
            await eventually(lambda: endless.left == {"first", "second", "third", "fourth"})
            await eventually(lambda: not server.connections())


async def ask_twice_and_go(server: Server, how: str) -> None:
    """Send two requests at once, of which the first is never answered to its end, and go away."""
    endless = with_endless(server)
    async with await small_socket(server.port) as client:
        request = b"GET /endless?name=%b HTTP/1.1\r\nhost: x\r\n\r\n"
        await client.send_all(request % b"one" + request % b"two")
        await eventually(lambda: "one" in endless.yielded)
        await wait_all_tasks_blocked(0.01)
        if how == "reset":
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    await wait_all_tasks_blocked(0.01)


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_second_request_that_came_early_keeps_its_connection_only_without_the_correction(how: str) -> None:
    async with AsyncExitStack() as stack:
        with as_it_is("TCPServer"):
            stock = await stack.enter_async_context(serving())
        await ask_twice_and_go(stock, how)
        kept = stock.connections()
        assert len(kept) == 1
        corrected = await stack.enter_async_context(serving())
        await ask_twice_and_go(corrected, how)
        with trio.fail_after(SOON):
            await eventually(lambda: corrected.connections() == kept)


@pytest.mark.parametrize(
    "headers",
    [
        {"upgrade": "h2c", "connection": "upgrade, http2-settings", "http2_settings": ""},
        {"upgrade": "h2c", "connection": "upgrade, http2-settings", "http2_settings": "\xff"},
        {"upgrade": "h2c", "connection": "upgrade, http2-settings", "http2_settings": "A"},
        {"upgrade": "h2c", "connection": "upgrade"},
    ],
)
async def test_an_upgrade_to_http2_is_not_taken_up(headers: dict[str, str]) -> None:
    async with serving() as server, await server.wire() as wire:
        await wire.send("GET", "/healthz", body=b"", **headers)
        assert (await wire.until(b"\r\n\r\n")).startswith(b"HTTP/1.1 200")
        assert not server.ended.is_set()


async def hears_the_word_after_ten_requests(config: Config) -> bool:
    """Whether a stream goes on after ten more requests on its connection."""
    tap = Tap()
    async with serving({"tap": tap}, config=config) as server, connected(server) as streams:
        run_id = await server.start("tap")
        number = await streams.get(f"/v1/runs/{run_id}/stream")
        for _ in range(10):
            await streams.get("/healthz")
        async with server.reading(run_id) as reader:
            await eventually(lambda: server.service.supervisor._services.tails.get(run_id).users == 3)  # type: ignore[union-attr]
            tap.feed("the word")
            await reader.take(1)
        with trio.move_on_after(1):
            return [block.data for block in await streams.blocks(number, 1)] == ["the word"]
    return False


async def test_a_stream_goes_on_however_many_requests_its_connection_has_had(monkeypatch: pytest.MonkeyPatch) -> None:
    config = quiet_config()
    config.keep_alive_max_requests = 3
    assert await hears_the_word_after_ten_requests(config)
    assert config.keep_alive_max_requests == 3
    nothing_is_corrected(monkeypatch)
    assert not await hears_the_word_after_ten_requests(config)


async def test_without_the_correction_an_upgrade_may_end_the_server() -> None:
    ended = trio.Event()

    async def run(*args: Any, **kwargs: Any) -> None:
        with pytest.raises(binascii.Error):
            await serve(*args, signals=(), **kwargs)
        ended.set()

    with as_it_is("H11Protocol", "TCPServer"):
        async with serving(run=run, complains=True) as server, await server.wire() as wire:
            await wire.send("GET", "/healthz", upgrade="h2c", connection="upgrade", http2_settings="A")
            with trio.fail_after(SOON):
                await ended.wait()


# Which versions, and whose classes


def in_place() -> list[Any]:
    """What Hypercorn uses where there is a correction."""
    return [getattr(each.module, each.name) for each in corrections.REPLACEMENTS]


def nothing_is_corrected(patch: pytest.MonkeyPatch) -> None:
    """As it is on a version that nobody knows."""
    patch.setattr(corrections, "KNOWN", ())
    for each in corrections.REPLACEMENTS:
        patch.setattr(each.module, each.name, each.original)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_on_a_version_that_is_not_known_nothing_is_replaced_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nothing_is_corrected(monkeypatch)
    async with serving() as server:
        assert ids(await server.read(await server.start("count", 3))) == [1, 2, 3, 4]
        assert in_place() == [each.original for each in corrections.REPLACEMENTS]
    (said,) = warnings(caplog)
    for words in (version("hypercorn"), "hold up a shutdown", "memory without a limit", "may end the server"):
        assert words in said


async def test_a_class_that_somebody_else_has_replaced_is_left_alone_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Theirs(TCPServer):
        pass

    monkeypatch.setattr(hypercorn.trio.run, "TCPServer", Theirs)
    async with serving() as server:
        assert ids(await server.read(await server.start("count", 3))) == [1, 2, 3, 4]
        assert in_place() == [
            Theirs if each.name == "TCPServer" else each.corrected for each in corrections.REPLACEMENTS
        ]
    assert warnings(caplog) == ["hypercorn.trio.run.TCPServer has been replaced by somebody else, and is not corrected"]


async def test_what_is_corrected_already_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        async with serving():
            assert in_place() == [each.corrected for each in corrections.REPLACEMENTS]
    assert not warnings(caplog)


async def test_a_server_that_did_not_ask_for_corrections_behaves_as_it_would_without_penstock() -> None:
    died: list[BaseException] = []

    async def plain(*args: Any, **kwargs: Any) -> None:
        try:
            await hypercorn.trio.serve(*args, **kwargs)
        except BaseExceptionGroup as error:
            died.append(error)

    async with serving() as ours, serving(run=plain, complains=True) as theirs:
        async with connected(ours) as one, connected(theirs) as other:
            for streams in (one, other):
                await streams.blocks(await streams.get("/"), 0)
                await streams.receive()
            assert type(served(one.socket)) is Connection
            assert type(served(other.socket)) is TCPServer
        async with without_window(theirs, **UNCHECKED) as client:
            await path_that_is_not_ascii(client)
            with trio.fail_after(SOON):
                await theirs.ended.wait()
        assert len(died) == 1
        assert ids(await ours.read(await ours.start("count", 3))) == [1, 2, 3, 4]
