"""Bodies that arrive late, slowly or never: they have `body_timeout`, and nobody else waits for them."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import hypercorn.trio
import pytest
import trio

from penstock import serve
from penstock.asgi.auth import Token, TokenAuthorizer
from penstock.asgi.lifespan import RequestLimits
from penstock.asgi.request_body import DrainRequestBody
from tests.support.connections import SOON, brief, is_over_soon, joined, readers, unharmed, with_reset
from tests.support.endpoints import flood
from tests.support.http2_clients import WHOLE, Ends
from tests.support.serving import Tap, eventually, serving
from tests.support.supervising import View
from tests.support.wire import DONE, Wire, ids

if TYPE_CHECKING:
    from collections.abc import Callable

    from starlette.types import Message, Receive, Scope, Send
    from trio.testing import MockClock

    from tests.support.serving import Server

BODY_TIMEOUT: Final = 0.2
"""That of a server once it is made to hurry."""
PACE: Final = 0.005
"""Seconds between two bytes of a body that trickles."""
START: Final = b'{"producer": "count", "input": 2}'
MANY: Final = 8
"""Streams of one connection: in which order the tasks of each are run is up to chance."""
TINY: Final = b"1\r\nx\r\n"
"""A chunk of one byte; a thousand of them may be read at once."""


async def trickle(send: Callable[[], Any]) -> None:
    """Send a little again and again, for as long as somebody takes it."""
    try:
        while True:
            await send()
            await trio.sleep(PACE)  # so slow it is
    except (trio.BrokenResourceError, trio.ClosedResourceError, trio.EndOfChannel):
        pass


async def answer_to(wire: Wire, *, trickles: bool = False) -> bytes:
    """All that comes until the server closes the connection, while the body goes on coming or not."""
    with trio.fail_after(SOON):
        async with trio.open_nursery() as nursery:
            if trickles:
                nursery.start_soon(trickle, partial(wire.stream.send_all, TINY))
            received = await wire.rest()
            nursery.cancel_scope.cancel()
    return received


def hurry(server: Server) -> None:
    """From now on bodies have no more time than that; those of the requests before may be late on a busy machine."""
    server.service.limits.body_timeout = BODY_TIMEOUT


def started(server: Server) -> int:
    """How many runs there are beside the one that `unharmed` watches."""
    return len(server.service.supervisor._runs.by_id) - 1


# Bodies that somebody waits for


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/runs/{run_id}/cancel", "/v1/runs/{run_id}/stream"])
@pytest.mark.parametrize("sent", ["nothing", "half of it", "a byte now and then"])
async def test_over_http1_a_body_that_does_not_end_is_answered_408_and_its_connection_closed(
    path: str, sent: str
) -> None:
    async with unharmed() as server:
        run_id = await server.start("silent")
        hurry(server)
        async with joined(server) as (stream, task):
            wire = Wire(stream)
            await wire.send("POST", path.format(run_id=run_id), transfer_encoding="chunked")
            if sent == "half of it":
                await stream.send_all(b"10\r\n" + START[:16] + b"\r\n")
            answer = await answer_to(wire, trickles=sent == "a byte now and then")
            assert answer.startswith(b"HTTP/1.1 408")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["code"] == "BODY_TIMEOUT"
            await is_over_soon(task, server)
        assert started(server) == 1
        assert readers(server, run_id) == [0]
        assert (await server.run(run_id))["status"] == "running"


async def test_over_http2_it_is_answered_408_and_its_connection_goes_on_with_all_its_streams() -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server:
        run_id = await server.start("tap")
        hurry(server)
        async with joined(server) as (stream, _):
            client = Ends(stream)
            reads = await client.get(f"/v1/runs/{run_id}/stream")
            for path in ("/v1/runs", f"/v1/runs/{run_id}/cancel", f"/v1/runs/{run_id}/stream"):
                number = client.begin("POST", path)
                client.h2.send_data(number, START[:16])
                await client.send()
                assert json.loads(await client.whole_body(number))["code"] == "BODY_TIMEOUT"
                assert (client.headers[number][":status"], client.ends[number]) == ("408", WHOLE)
                tap.feed("goes on")
            await client.blocks(reads, 3)
            tap.end()
            assert ids(await client.whole(reads)) == [1, 2, 3, 4]
        assert started(server) == 0


@pytest.mark.parametrize("framing", [{"content_length": str(len(START))}, {"transfer_encoding": "chunked"}])
async def test_over_http1_a_body_that_comes_in_many_pieces_in_time_is_taken(framing: Any) -> None:
    async with unharmed() as server, await server.wire() as wire:
        await wire.send("POST", "/v1/runs", connection="close", **framing)
        for byte in START:
            await wire.stream.send_all(b"%c" % byte if "content_length" in framing else b"1\r\n%c\r\n" % byte)
        await wire.stream.send_all(b"" if "content_length" in framing else b"0\r\n\r\n")
        assert (await wire.rest()).startswith(b"HTTP/1.1 201")


async def test_over_http2_a_body_that_comes_in_many_pieces_in_time_is_taken() -> None:
    async with unharmed() as server, joined(server) as (stream, _):
        client = Ends(stream)
        number = client.begin("POST", "/v1/runs")
        for byte in START:
            client.h2.send_data(number, b"%c" % byte)
            await client.send()
        client.h2.end_stream(number)
        await client.send()
        run_id = json.loads(await client.whole_body(number))["id"]
        assert ids(await server.read(run_id)) == [1, 2, 3]


# Streams whose requests have bodies


@pytest.mark.parametrize("trickles", [False, True])
async def test_over_http1_a_stream_whose_request_does_not_end_is_cut_off_and_its_run_goes_on(*, trickles: bool) -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server:
        run_id = await server.start("tap")
        hurry(server)
        async with joined(server) as (stream, task):
            wire = Wire(stream)
            await wire.send("GET", f"/v1/runs/{run_id}/stream", transfer_encoding="chunked")
            tap.feed("before")
            answer = await answer_to(wire, trickles=trickles)
            assert b"data: before\n\n" in answer
            assert not answer.endswith(b"\r\n0\r\n\r\n"), "it is not whole"
            await is_over_soon(task, server)
        assert readers(server, run_id) == [0]
        tap.end()
        assert ids(await server.read(run_id)) == [1, 2]


async def test_over_http1_a_stream_whose_request_has_ended_in_time_goes_on_after_that() -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server:
        run_id = await server.start("tap")
        hurry(server)
        async with await server.wire() as reads, await server.wire() as unending:
            await reads.send("GET", f"/v1/runs/{run_id}/stream", body=b"hello", connection="close")
            await reads.until(b"HTTP/1.1 200")
            await unending.send("GET", f"/v1/runs/{run_id}/stream", content_length="5")
            await answer_to(unending)  # so the time is over
            tap.feed("after")
            tap.end()
            assert b"data: after\n\n" in await reads.rest()
            assert reads.received.endswith(b"\r\n0\r\n\r\n")


async def test_over_http2_a_stream_whose_request_does_not_end_is_cut_off_alone() -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server:
        run_id = await server.start("tap")
        hurry(server)
        async with joined(server) as (stream, _):
            client = Ends(stream)
            reads = await client.get(f"/v1/runs/{run_id}/stream")
            number = client.begin("GET", f"/v1/runs/{run_id}/stream")
            await client.send()
            while number not in client.ends:
                await client.receive()
            assert (client.headers[number][":status"], client.ends[number] == WHOLE) == ("200", False)
            await eventually(lambda: readers(server, run_id) == [1])
            tap.feed("goes on")
            tap.end()
            assert ids(await client.whole(reads)) == [1, 2]


async def test_a_stream_that_has_not_begun_when_the_time_is_over_is_answered_408() -> None:
    view, looks_up = View(), trio.Event()
    async with unharmed(log=view) as server:
        run_id = await server.start("silent")
        hurry(server)
        view.before["read"] = looks_up.wait
        async with await server.wire() as wire:
            await wire.send("GET", f"/v1/runs/{run_id}/stream", content_length="5")
            answer = await answer_to(wire)
            assert b"BODY_TIMEOUT" in answer
            assert answer.startswith(b"HTTP/1.1 408")
        looks_up.set()
        assert server.observer.errors == []


# Answers that do not wait for the body


EARLY: Final = [("/nowhere", b"404"), ("/v1/producers", b"405"), ("/v1/runs", b"401"), ("/healthz", b"405")]


@pytest.mark.parametrize("path, status", EARLY)
@pytest.mark.parametrize("trickles", [False, True])
async def test_over_http1_an_answer_comes_at_once_and_ends_when_the_time_for_the_body_is_over(
    path: str, status: bytes, *, trickles: bool
) -> None:
    authorizer = TokenAuthorizer({"a": Token.of("x" * 16)})
    async with serving(authorizer=authorizer) as server:
        hurry(server)
        async with joined(server) as (stream, task):
            wire = Wire(stream)
            sent = trio.current_time()
            await wire.send("POST", path, transfer_encoding="chunked")
            answer = await answer_to(wire, trickles=trickles)
            assert answer.startswith(b"HTTP/1.1 " + status)
            assert trio.current_time() - sent >= BODY_TIMEOUT
            await is_over_soon(task, server)
        assert (await server.client.get("/healthz")).status_code == 200


async def test_over_http1_a_body_that_is_too_large_and_goes_on_coming_is_answered_413_and_cut_off() -> None:
    async with unharmed(max_body_bytes=100) as server, joined(server) as (stream, task):
        hurry(server)
        wire = Wire(stream)
        await wire.send("POST", "/v1/runs", transfer_encoding="chunked")
        await stream.send_all(TINY * 101)
        assert (await answer_to(wire, trickles=True)).startswith(b"HTTP/1.1 413")
        await is_over_soon(task, server)


async def keeps_sending(client: Ends, number: int, size: int) -> None:
    """Send pieces of this size, as many as the server takes, until the stream is over."""
    while number not in client.over:
        while number not in client.over and client.h2.local_flow_control_window(number) >= size:
            client.h2.send_data(number, b" " * size)
        await client.send()
        with trio.move_on_after(PACE):
            await client.receive()


@pytest.mark.parametrize("size", [100, 1000, 16_000])
@pytest.mark.parametrize("path", ["/nowhere", "/v1/runs/nobody/cancel", "/v1/runs/{run_id}/stream"])
async def test_over_http2_a_body_that_pours_in_without_end_is_cut_off_alone(path: str, size: int) -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server:
        run_id = await server.start("tap")
        hurry(server)
        async with joined(server) as (stream, _):
            client = Ends(stream)
            reads = await client.get(f"/v1/runs/{run_id}/stream")
            with trio.fail_after(SOON):
                number = client.begin("POST", path.format(run_id=run_id))
                await keeps_sending(client, number, size)
                again = await client.get("/healthz")
                await client.whole_body(again)
                tap.feed("goes on")
                tap.end()
                assert ids(await client.whole(reads)) == [1, 2]
        assert not server.complaints, "nor is it an error of the connection's"


class Ponders(TokenAuthorizer):
    """Takes longer to know some clients than a body may take to arrive."""

    def __init__(self) -> None:
        super().__init__({"a": Token.of("x" * 16)})

    async def authenticate(self, request: Any) -> Any:
        if "x-unknown" in request.headers:
            await trio.sleep(2 * BODY_TIMEOUT)
        return await super().authenticate(request)


async def test_over_http1_an_answer_that_took_longer_than_a_body_may_leaves_no_connection_behind() -> None:
    async with serving(authorizer=Ponders()) as server, joined(server) as (stream, task):
        hurry(server)
        wire = Wire(stream)
        await wire.send("GET", "/v1/runs", transfer_encoding="chunked", x_unknown="yes")
        await stream.send_all(TINY * 1000)
        assert (await answer_to(wire)).startswith(b"HTTP/1.1 401")
        await is_over_soon(task, server)


async def test_over_http2_an_answer_that_took_longer_than_a_body_may_keeps_its_connection_from_nothing() -> None:
    async with serving(authorizer=Ponders()) as server, joined(server) as (stream, _):
        hurry(server)
        client = Ends(stream)
        number = client.begin("GET", "/v1/runs", ("x-unknown", "yes"))
        for _ in range(200):
            client.h2.send_data(number, b" ")
        await client.send()
        with trio.fail_after(SOON):
            await client.whole_body(number)
            assert client.headers[number][":status"] == "401"
            again = await client.get("/healthz")
            await client.whole_body(again)


@pytest.mark.parametrize("leaves", [False, True])
async def test_a_client_that_pours_in_a_body_and_reads_nothing_leaves_no_connection_behind(*, leaves: bool) -> None:
    run = partial(serve, signals=(), tcp_user_timeout=1.0)
    async with unharmed({"flood": flood}, run=run) as server:
        run_id = await server.start("flood", [1000, 10_000])
        await server.ended_run(run_id)
        hurry(server)
        async with joined(server) as (stream, task):
            wire = Wire(stream)
            await wire.send("GET", f"/v1/runs/{run_id}/stream", transfer_encoding="chunked")
            assert await stream.receive_some(12) == b"HTTP/1.1 200"
            with trio.move_on_after(2 * BODY_TIMEOUT):
                await trickle(partial(stream.send_all, TINY * 1000))
            if leaves:
                with_reset(stream)
                await stream.aclose()
            await is_over_soon(task, server)


# Without the corrections


def under_plain_hypercorn(**knobs: Any) -> Any:
    return brief(run=hypercorn.trio.serve, **knobs)


async def time_is_over(server: Server) -> None:
    """Wait until a request that begins now has had its time."""
    async with await server.wire() as wire:
        await wire.send("POST", "/v1/runs", content_length="5")
        assert (await answer_to(wire)).startswith(b"HTTP/1.1 408")


async def test_under_plain_hypercorn_an_http2_response_does_not_end_before_its_request() -> None:
    tap = Tap()
    async with under_plain_hypercorn(producers={"tap": tap}) as server, joined(server) as (stream, _):
        client = Ends(stream)
        run_id = await server.start("tap")
        hurry(server)
        early = [client.begin("POST", "/nowhere") for _ in range(MANY)]
        read = [client.begin("GET", f"/v1/runs/{run_id}/stream") for _ in range(MANY)]
        await client.send()
        with trio.fail_after(SOON):
            await client.until_headers(*early, *read)
            await time_is_over(server)
            assert readers(server, run_id) == [MANY]
            tap.feed("after that")
            tap.end()
            while not all(DONE.encode() in client.bodies[number] for number in read):
                await client.receive()
            again = await client.get("/healthz")
            await client.whole_body(again)
            assert list(client.ends) == [again]
            for number in (*early, *read):
                client.h2.send_data(number, b"the rest", end_stream=True)
            await client.send()
            for number in (*early, *read):
                await client.whole_body(number)
        assert client.ends == dict.fromkeys((again, *early, *read), WHOLE)
        assert (await server.client.get("/healthz")).status_code == 200


async def test_under_plain_hypercorn_a_body_that_somebody_waits_for_has_its_time_nevertheless() -> None:
    async with under_plain_hypercorn() as server, joined(server) as (stream, _):
        hurry(server)
        client = Ends(stream)
        number = client.begin("POST", "/v1/runs")
        await client.send()
        await client.until_headers(number)
        assert client.headers[number][":status"] == "408"
        client.h2.send_data(number, START, end_stream=True)
        await client.send()
        assert json.loads(await client.whole_body(number))["code"] == "BODY_TIMEOUT"
        assert not server.service.supervisor.live_runs


async def test_an_end_whose_wait_was_cancelled_repeats_nothing_when_it_is_sent_again(
    autojump_clock: MockClock,
) -> None:
    sent = []

    async def send(message: Message) -> None:
        await trio.lowlevel.checkpoint()
        sent.append(message)

    async def receive() -> Message:
        await trio.sleep(5)
        return {"type": "http.request", "body": b"", "more_body": False}

    async def app(_scope: Scope, _receive: Receive, send: Send) -> None:
        end: Message = {"type": "http.response.body", "body": b"all", "more_body": False}
        await send({"type": "http.response.start", "status": 200, "headers": []})
        with trio.move_on_after(1):
            await send(end)
        await send(end)

    scope = {"type": "http", "http_version": "1.1", "headers": [(b"content-length", b"1")]}
    await DrainRequestBody(app, RequestLimits(100, 10))(scope, receive, send)
    assert [(each.get("body"), each.get("more_body")) for each in sent[1:]] == [(b"all", True), (b"", False)]
