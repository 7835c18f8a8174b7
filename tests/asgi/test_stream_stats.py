"""What an observer is notified of about streams: how each has ended, and just as much as its client has received."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import anyio
import pytest

from penstock import EventStreamResponse, MemoryLog, PublicError, RunCancelled, StreamRejected
from penstock.errors import ReaderReleased
from penstock.observer import StreamEnd
from penstock.supervisor import open_supervisor
from tests.support.asgi import Client, Follower, forever, on_both, timed
from tests.support.asgi import Log as Life
from tests.support.observers import RecordingObserver
from tests.support.serving import Tap, eventually, problem, serving
from tests.support.supervising import near
from tests.support.wire import DONE, Block

if TYPE_CHECKING:
    from tests.support.serving import Server

FIRST = b"data: first\n\n"


async def end_of(observer: RecordingObserver) -> StreamEnd:
    """How the one stream that there was has ended, waited for."""
    await eventually(lambda: bool(observer.of("stream_ended")))
    ((name, run_id), (other, end)) = [call for call in observer.calls if call[0].startswith("stream")]
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


async def test_a_stream_that_was_read_to_its_end_counts_from_its_cursor() -> None:
    for query, headers, entries in (({}, {}, 10), ({"starting_after": 4}, {}, 6), ({}, {"Last-Event-ID": "7"}, 3)):
        observer = RecordingObserver()
        async with serving(metrics=observer) as server:
            run_id = await server.start("count", 9)
            await server.ended_run(run_id)
            answer = await server.client.get(f"/v1/runs/{run_id}/stream", params=query, headers=headers)
            end = await end_of(observer)
            assert end == StreamEnd("ended", run_id, 10, entries, len(answer.content), end.seconds)
            assert answer.content.count(b"id: ") == entries
            assert not observer.of("pinged")


async def test_a_client_that_goes_away() -> None:
    observer, tap = RecordingObserver(), Tap()
    async with serving({"tap": tap}, metrics=observer) as server:
        run_id = await server.start("tap")
        async with server.reading(run_id) as reader:
            tap.feed("one", "two", "three")
            await reader.take(3)
            await reader.wire.reset()
        end = await end_of(observer)
        assert end == StreamEnd("disconnected", run_id, 3, 3, len(await wire_of(server, run_id, 1, 3)), end.seconds)
        tap.feed("four")
        tap.end()
        assert (await server.ended_run(run_id))["seq"] == 5
        assert len(observer.of("stream_ended")) == 1


async def test_pings_are_counted_one_by_one_and_are_none_of_a_streams_bytes() -> None:
    observer, tap = RecordingObserver(), Tap()
    async with serving({"tap": tap}, metrics=observer, ping_interval=0.01) as server:
        run_id = await server.start("tap")
        async with server.reading(run_id) as reader:
            blocks = await reader.take(3)
            tap.feed("said")
            tap.end()
            blocks += await reader.rest()
        pings = blocks.count(Block(comment="ping"))
        assert pings >= 3
        assert [block.data for block in blocks if block.data] == ["said", DONE]
        end = await end_of(observer)
        assert end == StreamEnd("ended", run_id, 2, 2, len(await wire_of(server, run_id, 1, 2)), end.seconds)
        assert len(observer.of("pinged")) == pings


async def test_a_reader_of_a_run_elsewhere_is_released_by_a_drain() -> None:
    observer, tap, log = RecordingObserver(), Tap(), MemoryLog()
    async with open_supervisor(log, drain_timeout=0.0) as owner, serving({}, log, metrics=observer) as server:
        run_id = (await owner.start(tap, None)).id
        tap.feed("one", "two")
        async with server.reading(run_id) as reader:
            await reader.take(2)
            server.shutdown.set()
            assert await reader.rest() == [Block(retry="1000")]
        await server.ended.wait()
        size = sum(len(entry.wire) for entry in (await log.read(run_id, 0)).entries)
        end = await end_of(observer)
        assert end == StreamEnd("READER_RELEASED", run_id, 2, 2, size, end.seconds)


async def test_what_is_answered_without_a_stream_is_told_as_a_refusal_or_not_at_all() -> None:
    observer = RecordingObserver()
    async with serving(log=MemoryLog(max_entries=5), metrics=observer, max_readers=1) as server:
        run_id = await server.start("count", 9)
        await server.ended_run(run_id)
        path = f"/v1/runs/{run_id}/stream"
        client = server.client
        assert (await client.get(path, params={"starting_after": 10})).status_code == 204
        assert (await client.head(path, params={"starting_after": 8})).status_code == 200
        assert observer.of("refused") == []
        problem(await client.get(path), 410, "CURSOR_EXPIRED")
        problem(await client.get("/v1/runs/nowhere/stream"), 404, "RUN_NOT_FOUND")
        problem(await client.get(path, params={"starting_after": "x"}), 400, "BAD_CURSOR")
        problem(await client.delete(path), 405, "METHOD_NOT_ALLOWED")
        problem(await client.get("/nowhere"), 404, "NOT_FOUND")
        problem(await client.post("/v1/runs", json={"producer": "nobody"}), 400, "UNKNOWN_PRODUCER")
        refused = [(410, "CURSOR_EXPIRED"), (404, "RUN_NOT_FOUND"), (400, "BAD_CURSOR")]
        refused += [(405, "METHOD_NOT_ALLOWED"), (404, "NOT_FOUND"), (400, "UNKNOWN_PRODUCER")]
        await eventually(lambda: len(observer.of("refused")) == len(refused))
        assert sorted(observer.of("refused")) == sorted(refused)
        assert not observer.of("stream_started")
        assert not observer.of("stream_ended")
        async with server.reading(await server.start("silent")):
            problem(await client.get(path, params={"starting_after": 8}), 503, "TOO_MANY_READERS")
        await eventually(lambda: observer.of("refused")[-1] == (503, "TOO_MANY_READERS"))
        await eventually(lambda: len(observer.of("stream_ended")) == 1)
        assert len(observer.of("stream_started")) == 1
        assert not observer.of("on_error")


# On Trio and on asyncio, without a socket


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
@on_both
async def test_how_a_source_without_a_run_ends(then: Any, cause: str, errors: list[str]) -> None:
    observer, client = RecordingObserver(), Client()
    await client.get(Life().source(FIRST, "data: é\n\n", then=then), observer=observer)
    said = FIRST + "data: é\n\n".encode()
    assert client.body.startswith(said)
    (end,) = observer.of("stream_ended")
    assert end == StreamEnd(cause, None, None, None, len(said), end.seconds)
    assert [repr(error) for error, *_ in observer.of("on_error")] == errors
    for _, error_id, where in observer.of("on_error"):
        assert where == "response to GET /stream"
        assert error_id.encode() in client.body
    assert not observer.of("refused")


@pytest.mark.parametrize(
    "error, status, code", [(StreamRejected(409, "PENDING", "wait"), 409, "PENDING"), (ValueError(), 500, "ERROR")]
)
@on_both
async def test_a_source_that_fails_before_its_first_chunk_has_no_stream(error: Any, status: int, code: str) -> None:
    observer = RecordingObserver()
    await Client().get(Life().source(then=error), observer=observer)
    assert observer.counts() == {"refused": 1} | ({"on_error": 1} if status == 500 else {})
    assert observer.of("refused") == [(status, code)]


@on_both
async def test_an_event_source_that_is_to_come_back_counts_as_refused_and_not_as_a_stream() -> None:
    observer, client = RecordingObserver(), Client()
    client.scope["headers"] = [(b"accept", b"text/event-stream")]
    await client.get(Follower(entering=ReaderReleased()), observer=observer)
    assert client.body == b"retry: 1000\n\n"
    assert observer.calls == [("refused", (503, "READER_RELEASED"))]


@on_both
async def test_a_source_that_runs_on_without_its_client_ends_as_disconnected_when_it_is_over() -> None:
    observer, client = RecordingObserver(), Client()
    source = timed((0, FIRST), (5, FIRST), (5, FIRST))
    response = EventStreamResponse(source, observer=observer, on_disconnect="detach")
    async with anyio.create_task_group() as group:
        group.start_soon(client.call, response)
        await anyio.sleep(3)
        client.leave()
        await anyio.sleep(4)
        assert not observer.of("stream_ended")
    assert observer.of("stream_ended") == [StreamEnd("disconnected", None, None, None, len(FIRST), near(10))]


@on_both
async def test_the_time_of_a_stream_begins_with_its_headers() -> None:
    observer = RecordingObserver()
    await Client().get(timed((1, FIRST), (5, FIRST), (2, FIRST)), observer=observer, run_id="r-1")
    assert observer.of("stream_started") == ["r-1"]
    assert observer.of("stream_ended") == [StreamEnd("ended", "r-1", None, None, 3 * len(FIRST), near(7))]


@on_both
async def test_headers_that_are_sent_before_the_first_chunk_begin_the_stream() -> None:
    observer = RecordingObserver()
    await Client().get(timed((10, FIRST)), observer=observer, first_chunk_timeout=2, ping_interval=3)
    assert observer.of("stream_ended") == [StreamEnd("ended", None, None, None, len(FIRST), near(8))]
    assert len(observer.of("pinged")) == 2


@on_both
async def test_a_cancellation_from_outside_ends_a_stream_as_interrupted_and_one_without_headers_not_at_all() -> None:
    for source, ends in ((timed((1, FIRST), (9, FIRST)), ["interrupted"]), (timed((9, FIRST)), [])):
        observer = RecordingObserver()
        with anyio.move_on_after(5):
            await Client().get(source, observer=observer, first_chunk_timeout=100)
        assert [end.cause for end in observer.of("stream_ended")] == ends
        assert len(observer.of("stream_started")) == len(ends)
        assert observer.of("refused") == ([] if ends else [(503, "INTERRUPTED")])
        assert all(end.bytes == len(FIRST) for end in observer.of("stream_ended"))


@on_both
@pytest.mark.parametrize("then", [None, StreamRejected(409, "LATE", "too late")], ids=["yields", "refuses"])
async def test_a_client_that_is_gone_before_the_headers_has_had_no_stream_and_no_refusal(then: Any) -> None:
    observer, client = RecordingObserver(), Client()
    response = EventStreamResponse(
        timed((5, FIRST if then is None else then)), observer=observer, on_disconnect="detach", first_chunk_timeout=100
    )
    async with anyio.create_task_group() as group:
        group.start_soon(client.call, response)
        await anyio.sleep(1)
        client.leave()
    assert client.sent == []
    assert observer.calls == []


@on_both
async def test_a_client_that_is_gone_while_a_source_waits_ends_the_stream_then() -> None:
    observer, client = RecordingObserver(), Client()
    response = EventStreamResponse(Life().source(FIRST, then=forever), observer=observer)
    async with anyio.create_task_group() as group:
        group.start_soon(client.call, response)
        await anyio.sleep(4)
        client.leave()
    assert observer.of("stream_ended") == [StreamEnd("disconnected", None, None, None, len(FIRST), near(4))]


@on_both
async def test_a_chunk_that_was_sent_in_part_is_none_of_a_streams_bytes() -> None:
    observer, client = RecordingObserver(), Client()
    client.slow = 1.0
    large = b"data: " + b"x" * 300_000 + b"\n\n"
    response = EventStreamResponse(Life().source(FIRST, large), observer=observer)
    async with anyio.create_task_group() as group:
        group.start_soon(client.call, response)
        await anyio.sleep(4.5)
        client.leave()
    assert b"x" in client.body
    assert [(end.cause, end.bytes) for end in observer.of("stream_ended")] == [("disconnected", len(FIRST))]
