"""What an observer is told of streams: how each has ended, and just as much as its client has received."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest
from starlette.routing import Route

from penstock import Event, EventStreamResponse, MemoryLog, PublicError, RunCancelled, StreamRejected
from penstock.observer import StreamEnd
from penstock.supervisor import open_supervisor
from tests.asgi.test_http_streams import unchunked
from tests.support.asgi import Client, forever, on_both, timed
from tests.support.asgi import Log as Life
from tests.support.observers import RecordingObserver as Told
from tests.support.serving import Tap, eventually, family, problem, quiet_config, serving
from tests.support.supervising import near
from tests.support.wire import DONE, Block, blocks_of, ids

if TYPE_CHECKING:
    from starlette.requests import Request

    from tests.support.serving import Server

FIRST = b"data: first\n\n"


def with_source(server: Server, make_source: Any, **options: Any) -> None:
    """Let the server stream this at /direct, and tell its observers of it."""

    async def direct(_request: Request) -> EventStreamResponse:
        return EventStreamResponse(make_source(), observer=server.service.observer, **options)

    server.app.router.routes.append(Route("/direct", direct, methods=["GET", "POST"]))


async def end_of(told: Told) -> StreamEnd:
    """How the one stream that there was has ended, waited for."""
    await eventually(lambda: bool(told.of("stream_ended")))
    ((name, run_id), (other, end)) = [call for call in told.calls if call[0].startswith("stream")]
    assert (name, other) == ("stream_started", "stream_ended")
    assert isinstance(end, StreamEnd)
    assert end.run_id == run_id
    assert end.seconds >= 0
    return end


async def wire_of(server: Server, run_id: str, first: int, last: int) -> bytes:
    """A run's entries as they go on the wire, read beside HTTP."""
    async with server.service.supervisor.follow(run_id, first - 1) as entries:
        taken = []
        async for entry in entries:
            taken.append(entry.wire)
            if entry.seq == last:
                break
    return b"".join(taken)


# Runs


@pytest.mark.parametrize(
    "query, headers, entries",
    [({}, {}, 10), ({"starting_after": 4}, {}, 6), ({}, {"Last-Event-ID": "7"}, 3), ({"tail": 2}, {}, 2)],
    ids=["whole", "after a cursor", "resumed", "the last two"],
)
async def test_a_stream_that_was_read_to_its_end(query: dict[str, Any], headers: dict[str, str], entries: int) -> None:
    told = Told()
    async with serving(metrics=told) as server:
        run_id = await server.start("count", 9)
        await server.ended_run(run_id)
        answer = await server.client.get(f"/v1/runs/{run_id}/stream", params=query, headers=headers)
        end = await end_of(told)
        assert end == StreamEnd("ended", run_id, 10, entries, len(answer.content), end.seconds)
        assert answer.content.count(b"id: ") == entries
        assert not told.of("pinged")


async def test_a_stream_that_began_with_its_run() -> None:
    told = Told()
    async with serving(metrics=told) as server:
        answer = await server.client.post("/v1/runs", json={"producer": "count", "input": 2000, "stream": True})
        run_id = answer.headers["penstock-run-id"]
        end = await end_of(told)
        assert end == StreamEnd("ended", run_id, 2001, 2001, len(answer.content), end.seconds)


async def test_pings_are_counted_one_by_one_and_are_none_of_a_streams_bytes() -> None:
    told, tap = Told(), Tap()
    async with serving({"tap": tap}, metrics=told, ping_interval=0.01) as server:
        run_id = await server.start("tap")
        async with server.reading(run_id) as reader:
            blocks = await reader.take(3)
            tap.feed("said")
            tap.end()
            blocks += await reader.rest()
        pings = blocks.count(Block(comment="ping"))
        assert pings >= 3
        assert [block.data for block in blocks if block.data] == ["said", DONE]
        end = await end_of(told)
        assert end == StreamEnd("ended", run_id, 2, 2, len(await wire_of(server, run_id, 1, 2)), end.seconds)
        assert len(told.of("pinged")) == pings


@pytest.mark.parametrize("how", ["closes", "resets"])
async def test_a_client_that_goes_away(how: str) -> None:
    told, tap = Told(), Tap()
    async with serving({"tap": tap}, metrics=told) as server:
        run_id = await server.start("tap")
        async with server.reading(run_id) as reader:
            tap.feed("one", "two", "three")
            await reader.take(3)
            if how == "resets":
                await reader.wire.reset()
        end = await end_of(told)
        assert end == StreamEnd("disconnected", run_id, 3, 3, len(await wire_of(server, run_id, 1, 3)), end.seconds)
        tap.feed("four")
        tap.end()
        assert (await server.ended_run(run_id))["seq"] == 5
        assert len(told.of("stream_ended")) == 1


async def test_a_run_that_a_shutdown_interrupts_and_that_its_reader_sees_the_end_of() -> None:
    told = Told()
    async with serving(metrics=told) as server:
        run_id = await server.start("silent")
        async with server.reading(run_id) as reader:
            server.shutdown.set()
            blocks = await reader.rest()
        await server.ended.wait()
        assert [block.event or block.data for block in blocks] == ["error", DONE]
        end = await end_of(told)
        kept = await server.service.supervisor.log.read(run_id, 0)
        size = sum(len(entry.wire) for entry in kept.entries)
        assert end == StreamEnd("ended", run_id, 2, 2, size, end.seconds)


async def test_a_reader_of_a_run_elsewhere_is_released_by_a_drain() -> None:
    told, tap, log = Told(), Tap(), MemoryLog()
    async with open_supervisor(log, drain_timeout=0.0) as owner, serving({}, log, metrics=told) as server:
        run_id = (await owner.start(tap, None)).id
        tap.feed("one", "two")
        async with server.reading(run_id) as reader:
            await reader.take(2)
            server.shutdown.set()
            assert await reader.rest() == [Block(retry="1000")]
        await server.ended.wait()
        size = sum(len(entry.wire) for entry in (await log.read(run_id, 0)).entries)
        end = await end_of(told)
        assert end == StreamEnd("READER_RELEASED", run_id, 2, 2, size, end.seconds)


async def test_a_reader_that_trimming_has_overtaken() -> None:
    told, tap = Told(), Tap()
    piece = "x" * 1_000_000
    async with serving({"tap": tap}, MemoryLog(max_entries=3), metrics=told, tail_entries=2) as server:
        run_id = await server.start("tap")
        async with await server.wire() as wire, server.reading(run_id) as reader:
            await wire.send("GET", f"/v1/runs/{run_id}/stream", connection="close")
            await wire.until(b"\r\n\r\n")
            for _ in range(40):  # more than the buffers between server and client hold
                tap.feed(piece)
                await reader.take(1)
            body = unchunked((await wire.rest()).partition(b"\r\n\r\n")[2])
        blocks = blocks_of(body)
        (late,) = [end for end in told.of("stream_ended") if end.cause == "CURSOR_EXPIRED"]
        said = body.rpartition(b": CURSOR_EXPIRED")[0]
        last = max(ids(blocks))
        assert late == StreamEnd("CURSOR_EXPIRED", run_id, last, last, len(said), late.seconds)


async def test_what_is_answered_without_a_stream_is_told_as_a_refusal_or_not_at_all() -> None:
    told = Told()
    async with serving(log=MemoryLog(max_entries=5), metrics=told, max_readers=1) as server:
        run_id = await server.start("count", 9)
        await server.ended_run(run_id)
        path = f"/v1/runs/{run_id}/stream"
        client = server.client
        assert (await client.get(path, params={"starting_after": 10})).status_code == 204
        assert (await client.head(path, params={"starting_after": 8})).status_code == 200
        assert told.of("refused") == []
        problem(await client.get(path), 410, "CURSOR_EXPIRED")
        problem(await client.get("/v1/runs/nowhere/stream"), 404, "RUN_NOT_FOUND")
        problem(await client.get(path, params={"starting_after": "x"}), 400, "BAD_CURSOR")
        problem(await client.delete(path), 405, "METHOD_NOT_ALLOWED")
        problem(await client.get("/nowhere"), 404, "NOT_FOUND")
        problem(await client.post("/v1/runs", json={"producer": "nobody"}), 400, "UNKNOWN_PRODUCER")
        refused = [(410, "CURSOR_EXPIRED"), (404, "RUN_NOT_FOUND"), (400, "BAD_CURSOR")]
        refused += [(405, "METHOD_NOT_ALLOWED"), (404, "NOT_FOUND"), (400, "UNKNOWN_PRODUCER")]
        await eventually(lambda: len(told.of("refused")) == len(refused))
        assert sorted(told.of("refused")) == sorted(refused)
        assert not told.of("stream_started")
        assert not told.of("stream_ended")
        async with server.reading(await server.start("silent")):
            problem(await client.get(path, params={"starting_after": 8}), 503, "TOO_MANY_READERS")
        await eventually(lambda: told.of("refused")[-1] == (503, "TOO_MANY_READERS"))
        await eventually(lambda: len(told.of("stream_ended")) == 1)
        assert len(told.of("stream_started")) == 1
        assert not told.of("on_error")


async def test_an_event_source_that_is_to_come_back_counts_as_refused_and_not_as_a_stream() -> None:
    told = Told()
    async with serving(metrics=told, max_readers=1) as server:
        run_id = await server.start("silent")
        path = f"/v1/runs/{run_id}/stream"
        async with server.reading(run_id):
            answer = await server.client.get(path, headers={"Accept": "text/event-stream"})
            assert (answer.status_code, answer.text) == (200, "retry: 1000\n\n")
        assert told.of("stream_started") == [run_id]
        assert told.of("refused") == [(503, "TOO_MANY_READERS")]


# Responses without a run


@pytest.mark.parametrize(
    "then, cause, errors",
    [
        (None, "ended", []),
        (ValueError("oops"), "ERROR", ["ValueError('oops')"]),
        (PublicError("not today", "CLOSED"), "CLOSED", ["PublicError('not today')"]),
        (RunCancelled(None, "enough"), "RUN_CANCELLED", []),
        (StreamRejected(409, "TOO_LATE", "it has begun"), "TOO_LATE", ["StreamRejected('it has begun')"]),
        (GeneratorExit(), "ERROR", ["RuntimeError('the source raised GeneratorExit')"]),
    ],
    ids=["it ends", "it fails", "it says why", "it was cancelled", "it refuses late", "it closes itself"],
)
async def test_how_a_source_of_ones_own_ends(then: Any, cause: str, errors: list[str]) -> None:
    told = Told()
    async with serving(metrics=told) as server:
        with_source(server, lambda: Life().source(FIRST, "data: é\n\n", then=then))
        answer = await server.client.get("/direct")
        assert answer.status_code == 200
        said = FIRST + "data: é\n\n".encode()
        assert answer.content.startswith(said)
        end = await end_of(told)
        assert end == StreamEnd(cause, None, None, None, len(said), end.seconds)
        assert [repr(error) for error, *_ in told.of("on_error")] == errors
        for _, error_id, where in told.of("on_error"):
            assert where == "response to GET /direct"
            assert error_id.encode() in answer.content
        assert not told.of("refused")


@pytest.mark.parametrize(
    "error, status, code, errors",
    [(StreamRejected(409, "PENDING", "wait"), 409, "PENDING", 0), (ValueError("oops"), 500, "ERROR", 1)],
    ids=["refuses", "fails"],
)
async def test_a_source_that_says_nothing_first_has_no_stream(error: Any, status: int, code: str, errors: int) -> None:
    told = Told()
    async with serving(metrics=told) as server:
        with_source(server, lambda: Life().source(then=error))
        problem(await server.client.get("/direct"), status, code)
        await eventually(lambda: bool(told.of("refused")))
        assert told.counts() == {"refused": 1} | ({"on_error": 1} if errors else {})
        assert told.of("refused") == [(status, code)]


async def test_a_source_that_runs_on_without_its_client_ends_as_disconnected_when_it_is_over() -> None:
    told, tap = Told(), Tap()
    async with serving(metrics=told) as server:
        with_source(server, lambda: tap(None), on_disconnect="detach")
        tap.feed("one")
        async with server.opened("GET", "/direct") as reader:
            await reader.take(1)
        await eventually(lambda: not any("_listen" in task.name for task in family(server.connections()[0])))
        tap.feed("two")
        assert not told.of("stream_ended")
        tap.feed("three")
        tap.end()
        await tap.closed.wait()
        end = await end_of(told)
        assert end == StreamEnd("disconnected", None, None, None, len(Event(data="one").encode()), end.seconds)


async def test_a_source_of_ones_own_that_a_shutdown_cuts_short_is_interrupted() -> None:
    told, tap = Told(), Tap()
    config = quiet_config()
    config.graceful_timeout = 0.05
    async with serving(metrics=told, config=config) as server:
        with_source(server, lambda: tap(None))
        tap.feed("one")
        async with server.opened("GET", "/direct") as reader:
            await reader.take(1)
            server.shutdown.set()
            assert [block.event or block.data for block in await reader.rest()] == ["error", DONE]
        await server.ended.wait()
        end = await end_of(told)
        assert end == StreamEnd("interrupted", None, None, None, len(Event(data="one").encode()), end.seconds)


# On Trio and on asyncio, without a socket


@on_both
async def test_the_time_of_a_stream_begins_with_its_headers() -> None:
    told = Told()
    await Client().get(timed((1, FIRST), (5, FIRST), (2, FIRST)), observer=told, run_id="r-1")
    assert told.of("stream_started") == ["r-1"]
    assert told.of("stream_ended") == [StreamEnd("ended", "r-1", None, None, 3 * len(FIRST), near(7))]


@on_both
async def test_headers_that_are_sent_before_the_first_chunk_begin_the_stream() -> None:
    told = Told()
    await Client().get(timed((10, FIRST)), observer=told, first_chunk_timeout=2, ping_interval=3)
    assert told.of("stream_ended") == [StreamEnd("ended", None, None, None, len(FIRST), near(8))]
    assert len(told.of("pinged")) == 2


@on_both
async def test_a_cancellation_from_outside_ends_a_stream_as_interrupted_and_one_without_headers_not_at_all() -> None:
    for source, ends in ((timed((1, FIRST), (9, FIRST)), ["interrupted"]), (timed((9, FIRST)), [])):
        told = Told()
        with anyio.move_on_after(5):
            await Client().get(source, observer=told, first_chunk_timeout=100)
        assert [end.cause for end in told.of("stream_ended")] == ends
        assert len(told.of("stream_started")) == len(ends)
        assert told.of("refused") == ([] if ends else [(503, "INTERRUPTED")])
        assert all(end.bytes == len(FIRST) for end in told.of("stream_ended"))


@on_both
@pytest.mark.parametrize("then", [None, StreamRejected(409, "LATE", "too late")], ids=["yields", "refuses"])
async def test_a_client_that_is_gone_before_the_headers_has_had_no_stream_and_no_refusal(then: Any) -> None:
    told, client = Told(), Client()
    response = EventStreamResponse(
        timed((5, FIRST if then is None else then)), observer=told, on_disconnect="detach", first_chunk_timeout=100
    )
    async with anyio.create_task_group() as group:
        group.start_soon(client.call, response)
        await anyio.sleep(1)
        client.leave()
    assert client.sent == []
    assert told.calls == []


@on_both
async def test_a_client_that_is_gone_while_a_source_waits_ends_the_stream_then() -> None:
    told, client = Told(), Client()
    response = EventStreamResponse(Life().source(FIRST, then=forever), observer=told)
    async with anyio.create_task_group() as group:
        group.start_soon(client.call, response)
        await anyio.sleep(4)
        client.leave()
    assert told.of("stream_ended") == [StreamEnd("disconnected", None, None, None, len(FIRST), near(4))]


@on_both
async def test_a_chunk_that_was_sent_in_part_is_none_of_a_streams_bytes() -> None:
    told, client = Told(), Client()
    client.slow = 1.0
    large = b"data: " + b"x" * 300_000 + b"\n\n"
    response = EventStreamResponse(Life().source(FIRST, large), observer=told)
    async with anyio.create_task_group() as group:
        group.start_soon(client.call, response)
        await anyio.sleep(4.5)
        client.leave()
    assert b"x" in client.body
    assert [(end.cause, end.bytes) for end in told.of("stream_ended")] == [("disconnected", len(FIRST))]
