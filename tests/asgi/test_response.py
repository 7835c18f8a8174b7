"""EventStreamResponse: what a stream is made of, how it fails, when headers and pings are sent, and readers of runs."""

from __future__ import annotations

import contextlib
import json
import math
from typing import TYPE_CHECKING, Any

import anyio
import anyio.lowlevel
import pytest
from starlette.background import BackgroundTask

from penstock.asgi.response import BodySource, EventStreamResponse
from penstock.asgi.sender import BURST, MAX_SEND
from penstock.errors import (
    ConfigurationError,
    CursorExpired,
    Draining,
    InvalidChunk,
    LogUnavailable,
    PublicError,
    ReaderReleased,
    RunCancelled,
    RunNotFound,
    StreamRejected,
    SupervisorFailed,
    TooManyReadersOfRun,
)
from penstock.sse import Event
from penstock.supervisor.follower import Follower as RunFollower
from tests.support.asgi import (
    PING,
    Client,
    Errors,
    Follower,
    Log,
    OneAtATime,
    chunks,
    get,
    note,
    on_both,
    timed,
)

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

# What a stream is made of


@on_both
async def test_a_stream_has_its_status_its_headers_and_all_of_its_content() -> None:
    client = await get(chunks(Event("one"), "data: two\n\n", b"data: three\n\n"))
    assert client.status == 200
    assert client.headers == {
        "content-type": "text/event-stream; charset=utf-8",
        "cache-control": "no-store",
        "x-accel-buffering": "no",
    }
    assert client.bodies == [b"data: one\n\n", b"data: two\n\n", b"data: three\n\n"]
    assert client.complete


@on_both
async def test_headers_that_are_given_win_and_a_content_length_does_not() -> None:
    headers = {"Cache-Control": "private", "X-Accel-Buffering": "yes", "X-Mine": "1", "Content-Length": "7"}
    client = await get(chunks(b"data: x\n\n"), status_code=201, headers=headers, media_type="text/plain")
    assert client.status == 201
    assert client.headers == {
        "cache-control": "private",
        "x-accel-buffering": "yes",
        "x-mine": "1",
        "content-type": "text/plain; charset=utf-8",
    }


class Countdown:
    """An async iterator that is no generator."""

    def __init__(self) -> None:
        self.left = 3

    def __aiter__(self) -> Countdown:
        return self

    async def __anext__(self) -> bytes:
        await anyio.lowlevel.checkpoint()
        if not self.left:
            raise StopAsyncIteration
        self.left -= 1
        return b"data: %d\n\n" % self.left


@contextlib.asynccontextmanager
async def managed() -> AsyncIterator[AsyncIterator[bytes]]:
    async with anyio.create_task_group():
        yield Countdown()


async def awaited() -> Countdown:
    await anyio.sleep(1)
    return Countdown()


@pytest.mark.parametrize("make", [Countdown, managed, awaited])
@on_both
async def test_a_source_is_an_iterator_a_context_manager_or_an_awaitable(make: Callable[[], Any]) -> None:
    assert (await get(make())).body == b"data: 2\n\ndata: 1\n\ndata: 0\n\n"


@on_both
async def test_the_source_is_opened_iterated_and_closed_in_the_task_of_the_request() -> None:
    tasks = []

    @contextlib.asynccontextmanager
    async def source() -> AsyncIterator[AsyncIterator[bytes]]:
        tasks.append(anyio.get_current_task().id)
        yield inner()
        tasks.append(anyio.get_current_task().id)

    async def inner() -> AsyncIterator[bytes]:
        tasks.append(anyio.get_current_task().id)
        yield b"data: x\n\n"
        tasks.append(anyio.get_current_task().id)

    await get(source())
    assert tasks == [anyio.get_current_task().id] * 4


@on_both
async def test_scopes_that_a_source_holds_across_its_yields_stay_whole() -> None:
    async def scoped() -> AsyncIterator[bytes]:
        with anyio.move_on_after(50) as scope:
            yield b"data: a\n\n"  # noqa: ASYNC101, ASYNC119  (not to be imitated, but sources do it)
            await anyio.sleep(40)  # pings, meanwhile
            yield b"data: b\n\n"  # noqa: ASYNC101, ASYNC119
            await anyio.sleep_forever()
        assert scope.cancelled_caught
        yield b"data: timed out\n\n"

    client = await get(scoped(), ping_interval=15)
    assert client.bodies == [b"data: a\n\n", PING, PING, b"data: b\n\n", b"data: timed out\n\n"]


@on_both
async def test_the_background_task_runs_after_the_response() -> None:
    ran: list[str] = []
    client = await get(chunks(b"data: x\n\n"), background=BackgroundTask(note, ran))
    assert client.complete
    assert ran == ["background"]


@on_both
async def test_d12_an_empty_source_is_a_whole_empty_stream() -> None:
    client = await get(chunks())
    assert (client.status, client.body, client.complete) == (200, b"", True)
    assert client.headers["content-type"] == "text/event-stream; charset=utf-8"


@on_both
async def test_an_empty_chunk_sends_the_headers_and_nothing_else() -> None:
    client = await get(timed((0, ""), (1, b"data: x\n\n")))
    assert client.times[0] < 1
    assert client.body == b"data: x\n\n"


@on_both
async def test_a_chunk_leaves_in_one_send_up_to_64_kib_and_else_in_pieces_of_that_size() -> None:
    whole = b"data: " + b"x" * (MAX_SEND - 8) + b"\n\n"
    assert len(whole) == MAX_SEND == 65536
    assert (await get(chunks(whole))).bodies == [whole]
    large = b"data: " + b"x" * (2 * MAX_SEND) + b"\n\n"
    client = await get(chunks(b"data: first\n\n", large))
    assert [len(body) for body in client.bodies[1:]] == [MAX_SEND, MAX_SEND, 8]
    assert client.body == b"data: first\n\n" + large


@on_both
async def test_no_ping_gets_in_between_the_pieces_of_a_chunk() -> None:
    client = Client()
    client.slow = 10
    large = b"data: " + b"x" * (3 * MAX_SEND) + b"\n\n"
    await client.get(timed((0, large), (30, b"data: x\n\n")), ping_interval=4)
    assert client.body.startswith(large)
    assert PING in client.bodies


@pytest.mark.parametrize(
    "options",
    [
        {"ping_interval": 0},
        {"ping_interval": -1},
        {"ping_interval": math.nan},
        {"first_chunk_timeout": -1},
        {"first_chunk_timeout": math.nan},
        {"on_disconnect": "ignore"},
        {"dialect": "klingon"},
    ],
)
def test_a_knob_refuses_what_it_cannot_be(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigurationError, match=next(iter(options)).split("_")[-1]):
        EventStreamResponse(chunks(), **options)


@on_both
async def test_what_is_no_http_request_is_refused_clearly() -> None:
    client = Client()
    client.scope["type"] = "websocket"
    with pytest.raises(RuntimeError, match="websocket"):
        await client.get(chunks())


# Errors before anything was sent


@on_both
async def test_d12_an_error_before_the_first_chunk_is_a_whole_response_with_a_code() -> None:
    observer = Errors()
    error = ValueError("the password is 1234")
    client = await get(timed((1, error)), observer=observer, headers={"X-Mine": "1"})
    assert client.status == 500
    assert client.headers["content-type"] == "application/problem+json"
    assert client.headers["cache-control"] == "no-store"
    assert client.headers["x-mine"] == "1"
    assert client.json["code"] == "ERROR"
    assert "1234" not in client.body.decode()
    assert observer.errors == [error]
    assert observer.ids == [client.json["error_id"]]
    assert client.complete


@on_both
async def test_the_words_of_an_error_are_shown_if_that_was_asked_for() -> None:
    client = await get(timed((1, ValueError("lost \ud800 surrogate"))), expose_errors=True, observer=Errors())
    assert client.json["detail"] == "lost ? surrogate"


@pytest.mark.parametrize(
    "error, status, code, words",
    [
        (PublicError("you owe us money", "BILLING"), 500, "BILLING", "you owe us money"),
        (RunNotFound("run-1"), 404, "RUN_NOT_FOUND", str(RunNotFound("run-1"))),
        (ExceptionGroup("outer", [ExceptionGroup("inner", [PublicError("nested", "N")])]), 500, "N", "nested"),
    ],
)
@on_both
async def test_an_error_with_words_of_its_own_shows_them(error: Exception, status: int, code: str, words: str) -> None:
    client = await get(timed((0, error)), observer=Errors())
    assert (client.status, client.json["code"], client.json["detail"]) == (status, code, words)


@on_both
async def test_a_rejection_is_its_status_and_body_in_the_dialect_and_nothing_to_report() -> None:
    observer = Errors()
    rejection = StreamRejected(409, "PENDING_APPROVAL", "approve first", pending_request_id="m-1")
    client = await get(timed((0, rejection)), dialect="letta", observer=observer)
    assert client.status == 409
    assert client.headers["content-type"] == "application/json"
    assert client.json == {
        "detail": {"code": "PENDING_APPROVAL", "message": "approve first", "pending_request_id": "m-1"}
    }
    client = await get(timed((0, rejection)), observer=observer)
    assert client.json == {
        "type": "about:blank",
        "title": "Conflict",
        "status": 409,
        "detail": "approve first",
        "code": "PENDING_APPROVAL",
        "pending_request_id": "m-1",
    }
    assert observer.errors == []


@on_both
async def test_what_is_unavailable_for_now_says_when_to_come_back() -> None:
    client = await get(timed((0, Draining("redis://secret@host is draining"))))
    assert (client.status, client.headers["retry-after"], client.json["code"]) == (503, "1", "DRAINING")
    assert "secret" not in client.body.decode()


@pytest.mark.parametrize("chunk", [42, "data: half a block\n", None, ("data: x\n\n", "200"), ("data: x\n\n", 204)])
@on_both
async def test_a_first_chunk_that_is_none_is_an_error_and_closes_the_source(chunk: Any) -> None:
    log, observer = Log(), Errors()
    client = await get(log.source(chunk, b"data: more\n\n"), observer=observer)
    assert (client.status, client.json["code"]) == (500, "INVALID_CHUNK")
    assert isinstance(observer.errors[0], InvalidChunk)
    assert log == ["closed", "finally"]


@on_both
async def test_what_is_no_source_is_an_error() -> None:
    observer = Errors()
    client = await get(42, observer=observer)
    assert client.status == 500
    assert isinstance(observer.errors[0], TypeError)


# Errors later


@on_both
async def test_d13_a_later_error_is_an_error_event_and_done_with_an_id_instead_of_words() -> None:
    observer = Errors()
    error = ValueError("the password is 1234")
    client = await get(Log().source(b"data: x\n\n", then=error), observer=observer)
    assert client.status == 200
    assert client.complete
    first, event, done = client.messages
    assert (first.data, event.event, done.data) == ("x", "error", "[DONE]")
    shown = json.loads(event.data)
    assert shown.keys() == {"code", "message", "error_id"}
    assert shown["code"] == "ERROR"
    assert "1234" not in event.data
    assert observer.errors == [error]
    assert observer.ids == [shown["error_id"]]


@pytest.mark.parametrize(
    "chunk, code",
    [
        (42, "INVALID_CHUNK"),
        ("data: half a block\n", "INVALID_CHUNK"),
        (b"data: half a block\n", "INVALID_CHUNK"),
        ("data: \ud800\n\n", "INVALID_CHUNK"),
        (("data: x\n\n", 99), "INVALID_CHUNK"),
        (("data: the model is overloaded\n\n", 529), "STATUS_529"),
    ],
)
@on_both
async def test_a_later_chunk_that_is_an_error_ends_the_stream_and_closes_the_source(chunk: Any, code: str) -> None:
    log, observer = Log(), Errors()
    client = await get(log.source(b"data: x\n\n", chunk, b"data: more\n\n"), observer=observer)
    first, event, done = client.messages
    assert (first.data, event.event, done.data) == ("x", "error", "[DONE]")
    shown = json.loads(event.data)
    assert shown["code"] == code
    assert code != "STATUS_529" or shown["message"] == "the model is overloaded"
    assert observer.ids == [shown["error_id"]]
    assert log == ["closed", "finally"]


@on_both
async def test_an_error_while_the_source_is_closed_after_its_bad_chunk_is_reported_beside_it() -> None:
    observer = Errors()

    async def untidy() -> AsyncIterator[Any]:
        try:
            yield 42
        finally:
            raise LookupError("untidy")

    client = await get(untidy(), observer=observer)
    assert client.json["code"] == "INVALID_CHUNK"
    assert [type(error) for error in observer.errors] == [LookupError, InvalidChunk]


@pytest.mark.parametrize("before", [(), (b"data: x\n\n",)], ids=["at once", "later"])
@pytest.mark.parametrize("wrap", [0, 1, 2])
@on_both
async def test_a_source_that_was_cancelled_says_so_and_is_done(before: tuple[bytes, ...], wrap: int) -> None:
    observer = Errors()
    error: Exception = RunCancelled("run-1", "pressed stop")
    for _ in range(wrap):
        error = ExceptionGroup("nursery", [error])
    client = await get(Log().source(*before, then=error), observer=observer)
    assert client.status == 200
    *_, event, done = client.messages
    assert (event.event, json.loads(event.data)["reason"], done.data) == ("cancelled", "pressed stop", "[DONE]")
    assert client.complete
    assert observer.errors == []


@on_both
async def test_words_that_no_event_can_carry_are_replaced() -> None:
    for error in (PublicError("a lone \ud800"), RunCancelled("run-1", "a lone \ud800")):
        client = await get(Log().source(b"data: x\n\n", then=error), observer=Errors())
        assert "a lone ?" in client.messages[1].data
        assert client.messages[2].data == "[DONE]"


@on_both
async def test_in_the_dialect_letta_pings_stops_errors_and_cancellations_are_lettas() -> None:
    steps = ((20, Event.stop("end_turn")), (0, PublicError("no", "NO")))
    client = await get(timed(*steps), ping_interval=15, dialect="letta", run_id="run-1", observer=Errors())
    ping, stop, error, done = client.messages
    assert (json.loads(ping.data)["message_type"], json.loads(ping.data)["run_id"]) == ("ping", "run-1")
    assert json.loads(stop.data) == {"message_type": "stop_reason", "stop_reason": "end_turn"}
    assert (error.event, json.loads(error.data).keys()) == ("error", {"error", "code", "error_id"})
    assert done.data == "[DONE]"
    stop, cancelled, done = (await get(timed((0, RunCancelled())), dialect="letta")).messages
    assert json.loads(stop.data) == {"message_type": "stop_reason", "stop_reason": "cancelled"}
    assert (cancelled.event, done.data) == ("cancelled", "[DONE]")


# A status from the first chunk


@pytest.mark.parametrize("status", [201, 202, 402, 503])
@on_both
async def test_the_first_chunks_status_is_the_responses_and_its_content_is_streamed(status: int) -> None:
    client = await get(chunks(("data: a\n\n", status), b"data: b\n\n"))
    assert client.status == status
    assert client.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert client.body == b"data: a\n\ndata: b\n\n"
    assert client.complete


@on_both
async def test_a_first_error_status_with_words_instead_of_a_block_is_an_error_body() -> None:
    log = Log()
    client = await get(log.source(("no such agent", 404), b"data: x\n\n"))
    assert (client.status, client.json["code"], client.json["detail"]) == (404, "STATUS_404", "no such agent")
    assert log == ["closed", "finally"]


@on_both
async def test_later_successes_are_content() -> None:
    client = await get(chunks(b"data: a\n\n", ("data: b\n\n", 200), (Event("c"), 204)))
    assert client.body == b"data: a\n\ndata: b\n\ndata: c\n\n"


# When headers and pings are sent


@on_both
async def test_d16_headers_are_sent_when_the_first_chunk_is_late() -> None:
    client = await get(timed((20, b"data: x\n\n")), first_chunk_timeout=2, ping_interval=None)
    assert client.times[0] == pytest.approx(2)
    assert client.body == b"data: x\n\n"
    assert client.times[-1] == pytest.approx(20)


@on_both
async def test_nothing_is_sent_before_the_first_chunk_until_then() -> None:
    client = await get(timed((1.5, ("data: x\n\n", 418))), first_chunk_timeout=2, ping_interval=0.4)
    assert client.times[0] == pytest.approx(1.5)
    assert client.status == 418


@on_both
async def test_the_headers_can_be_sent_at_once() -> None:
    client = await get(timed((5, b"data: x\n\n")), first_chunk_timeout=0)
    assert client.times[0] == 0


@pytest.mark.parametrize(
    "late, code",
    [(ValueError("late"), "ERROR"), (("data: no\n\n", 500), "STATUS_500"), (StreamRejected(409, "NO", "no"), "NO")],
)
@on_both
async def test_once_the_headers_are_out_a_status_can_only_be_an_error_event(late: Any, code: str) -> None:
    client = await get(timed((5, late)), first_chunk_timeout=2, observer=Errors())
    assert client.status == 200
    assert (client.messages[0].event, json.loads(client.messages[0].data)["code"]) == ("error", code)
    assert client.messages[1].data == "[DONE]"


@on_both
async def test_pings_flow_from_the_headers_on_and_after_the_interval_of_silence_only() -> None:
    client = await get(
        timed((50, b"data: a\n\n"), (10, b"data: b\n\n"), (14, b"data: c\n\n"), (31, b"data: d\n\n")),
        first_chunk_timeout=2,
        ping_interval=15,
    )
    sent = [(round(when, 3), message.get("body")) for when, message in zip(client.times, client.sent, strict=True)]
    assert sent[2:-1] == [
        (17, PING), (32, PING), (47, PING), (50, b"data: a\n\n"), (60, b"data: b\n\n"), (74, b"data: c\n\n"),
        (89, PING), (104, PING), (105, b"data: d\n\n"),
    ]  # fmt: skip


@on_both
async def test_a_ping_is_on_time_although_the_first_chunk_came_before_its_timeout() -> None:
    client = await get(timed((1, b"data: a\n\n"), (55, b"data: b\n\n")), first_chunk_timeout=50, ping_interval=20)
    assert client.times[2:-2] == pytest.approx([21, 41])


@on_both
async def test_without_an_interval_there_are_no_pings() -> None:
    client = await get(timed((1, b"data: a\n\n"), (1000, b"data: b\n\n")), ping_interval=None)
    assert PING not in client.bodies


@on_both
async def test_a_slow_client_gets_no_ping_while_a_chunk_is_being_sent() -> None:
    client = Client()
    client.slow = 50
    await client.get(timed((0, b"data: a\n\n"), (1, b"data: b\n\n")), ping_interval=15)
    assert client.bodies == [b"data: a\n\n", b"data: b\n\n"]


@on_both
async def test_a_chunk_waits_for_a_ping_that_is_being_sent() -> None:
    client = Client()
    client.slow = 2  # the ping takes from 17 to 19, and the chunk comes at 18
    await client.get(timed((0, b"data: a\n\n"), (14, b"data: b\n\n")), ping_interval=13)
    assert client.bodies == [b"data: a\n\n", PING, b"data: b\n\n"]
    client = Client()
    client.slow = 2  # the same with the headers
    await client.get(timed((3, b"data: a\n\n")), first_chunk_timeout=2)
    assert client.bodies == [b"data: a\n\n"]


@on_both
async def test_pings_still_come_on_time_after_a_burst() -> None:
    client = await get(
        timed(*[(0, b"data: x\n\n")] * (5 * BURST + 7), (40, b"data: a\n\n"), (40, b"data: b\n\n")), ping_interval=15
    )
    pings = [when for when, message in zip(client.times, client.sent, strict=True) if message.get("body") == PING]
    assert pings == pytest.approx([15, 30, 55, 70])


@on_both
async def test_a_source_that_never_waits_does_not_keep_the_loop_to_itself() -> None:
    class Fast:
        def __aiter__(self) -> Fast:
            return self

        async def __anext__(self) -> bytes:
            return b"data: x\n\n"

    async def send(message: Any) -> None:
        pass

    client = Client()
    client.leave()
    await EventStreamResponse(Fast())(client.scope, client.receive, send)


# The request method HEAD


@on_both
async def test_head_of_a_direct_source_is_headers_only_and_closes_the_source_unopened() -> None:
    closed = []

    class Source(Countdown):
        async def aclose(self) -> None:
            closed.append(True)

    client = await Client("HEAD").get(Source(), status_code=201)
    assert client.status == 201
    assert client.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert client.sent[1:] == [{"type": "http.response.body", "body": b"", "more_body": False}]
    assert closed == [True]
    log = Log()
    assert (await Client("HEAD").get(log.source(b"data: x\n\n"))).body == b""
    assert log == []
    assert (await Client("HEAD").get(awaited())).status == 200  # and no coroutine that was never awaited


@on_both
async def test_head_stays_without_a_body_however_long_the_source_takes_to_close() -> None:
    class Slow(Countdown):
        async def aclose(self) -> None:
            await anyio.sleep(100)

    client = await Client("HEAD").get(Slow())
    assert client.body == b""
    assert client.complete


# A reader of a run


def test_a_reader_of_a_run_is_a_body_source() -> None:
    assert isinstance(Follower(), BodySource)
    assert isinstance(RunFollower(None, "run-1", readers=None), BodySource)  # type: ignore[arg-type]


@on_both
async def test_a_runs_stream_sends_its_headers_at_once_and_its_bodies_as_they_come() -> None:
    follower = Follower(40, b"id: 1\ndata: a\n\nid: 2\ndata: b\n\n", b"id: 3\ndata: [DONE]\n\n")
    client = await get(follower, first_chunk_timeout=100, ping_interval=15)
    assert client.times[0] == pytest.approx(1)
    assert client.bodies == [PING, PING, b"id: 1\ndata: a\n\nid: 2\ndata: b\n\n", b"id: 3\ndata: [DONE]\n\n"]
    assert client.complete
    assert follower.limits == {MAX_SEND}
    assert follower.log == ["entered", "left"]


@on_both
async def test_no_ping_overtakes_headers_that_are_still_being_sent() -> None:
    client = OneAtATime()
    client.slow = 0.6
    await client.get(Follower(3, b"id: 1\ndata: [DONE]\n\n"), ping_interval=1.5)
    assert client.bodies == [PING, PING, b"id: 1\ndata: [DONE]\n\n"]
    assert client.complete


@on_both
async def test_a_cursor_at_the_end_of_an_ended_run_is_a_204() -> None:
    for method in ("GET", "HEAD"):
        client = await Client(method).get(Follower(at_end=True))
        assert (client.status, client.body, client.complete) == (204, b"", True)
        assert "content-type" not in client.headers
        assert "content-length" not in client.headers


@pytest.mark.parametrize(
    "error, status, code",
    [
        (RunNotFound("run-1"), 404, "RUN_NOT_FOUND"),
        (CursorExpired("run-1", 5, 100), 410, "CURSOR_EXPIRED"),
        (LogUnavailable("redis://secret@host"), 503, "LOG_UNAVAILABLE"),
        (ReaderReleased(), 503, "READER_RELEASED"),
        (StreamRejected(403, "FORBIDDEN", "not yours"), 403, "FORBIDDEN"),
        (ValueError("secret"), 500, "ERROR"),
    ],
)
@on_both
async def test_a_reader_that_cannot_begin_answers_with_the_errors_status(
    error: Exception, status: int, code: str
) -> None:
    observer = Errors()
    client = await get(Follower(entering=error), observer=observer, first_chunk_timeout=0)
    assert (client.status, client.json["code"]) == (status, code)
    assert (client.headers.get("retry-after") == "1") == (status == 503)
    assert "secret" not in client.body.decode()
    assert observer.errors == ([error] if status == 500 else [])
    if isinstance(error, CursorExpired):
        assert client.json["oldest_seq"] == 100
    client = await Client("HEAD").get(Follower(entering=error), observer=observer)
    assert (client.status, client.body, client.complete) == (status, b"", True)


@pytest.mark.parametrize(
    "error", [LogUnavailable("redis://secret@host"), ReaderReleased(), SupervisorFailed(), TooManyReadersOfRun("5")]
)
@on_both
async def test_an_event_source_that_cannot_begin_for_now_is_told_to_come_back(error: Exception) -> None:
    observer = Errors()
    for accepted in (b"text/event-stream", b" text/event-stream "):
        client = Client()
        client.scope["headers"] = [(b"accept", accepted)]
        await client.get(Follower(entering=error), observer=observer)
        assert (client.status, client.body, client.complete) == (200, b"retry: 1000\n\n", True)
        assert client.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert observer.errors == []


@pytest.mark.parametrize(
    "method, accepts, error",
    [
        *[("GET", each, ReaderReleased()) for each in ([], [b"*/*"], [b"text/event-stream, */*"])],
        ("GET", [b"text/event-stream", b"text/html"], ReaderReleased()),
        ("HEAD", [b"text/event-stream"], ReaderReleased()),
        ("HEAD", [b"text/event-stream"], RunNotFound("run-1")),
        ("GET", [b"text/event-stream"], RunNotFound("run-1")),
        ("GET", [b"text/event-stream"], CursorExpired("run-1", 1, 100)),
        ("GET", [b"text/event-stream"], StreamRejected(403, "NO", "no")),
    ],
)
@on_both
async def test_any_other_client_and_any_other_error_gets_the_errors_status(
    method: str, accepts: list[bytes], error: Any
) -> None:
    client = Client(method)
    client.scope["headers"] = [(b"accept", accepted) for accepted in accepts]
    await client.get(Follower(entering=error))
    assert client.status == error.status
    assert method == "HEAD" or client.json["code"] == error.code


@on_both
async def test_head_of_a_run_is_the_headers_of_its_stream() -> None:
    follower = Follower(b"id: 1\ndata: a\n\n")
    client = await Client("HEAD").get(follower)
    assert client.status == 200
    assert client.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert client.sent[1:] == [{"type": "http.response.body", "body": b"", "more_body": False}]
    assert follower.log == ["entered", "left"]


@on_both
async def test_a_reader_that_is_overtaken_is_told_in_a_comment_and_closed_without_a_terminal_event() -> None:
    client = await get(Follower(b"id: 1\ndata: a\n\n", CursorExpired("run-1", 1, 100)))
    assert client.bodies[0] == b"id: 1\ndata: a\n\n"
    assert client.bodies[1].startswith(b": CURSOR_EXPIRED")
    assert [message.data for message in client.messages] == ["a"]
    assert client.complete


@pytest.mark.parametrize(
    "error",
    [ReaderReleased(), LogUnavailable(), SupervisorFailed(), RunNotFound("run-1"), ValueError("a bug")],
    ids=lambda error: type(error).__name__,
)
@on_both
async def test_a_reader_that_cannot_go_on_is_told_to_come_back(error: Exception) -> None:
    observer = Errors()
    client = await get(Follower(b"id: 1\ndata: a\n\n", error), observer=observer)
    assert client.body == b"id: 1\ndata: a\n\nretry: 1000\n\n"
    assert client.complete
    assert observer.errors == ([error] if isinstance(error, ValueError) else [])


@on_both
async def test_at_a_shutdown_a_reader_is_told_to_come_back_and_the_cancellation_is_raised() -> None:
    follower, client, observer = Follower(b"id: 1\ndata: a\n\n", 100), Client(), Errors()
    with anyio.move_on_after(10) as scope:
        await client.get(follower, observer=observer)
    assert scope.cancelled_caught
    assert client.body == b"id: 1\ndata: a\n\nretry: 1000\n\n"
    assert client.complete
    assert follower.log == ["entered", "left"]
    assert observer.errors == []


@pytest.mark.parametrize("on_disconnect", ["cancel", "detach"])
@on_both
async def test_a_reader_whose_client_is_gone_reads_no_more(on_disconnect: str) -> None:
    follower, client = Follower(b"id: 1\ndata: a\n\n", 100, b"id: 2\ndata: b\n\n"), Client()

    async def leave_later() -> None:
        await anyio.sleep(5)
        client.leave()

    async with anyio.create_task_group() as group:
        group.start_soon(leave_later)
        await client.get(follower, on_disconnect=on_disconnect)
        assert anyio.current_time() == pytest.approx(5)
    assert follower.log == ["entered", "left"]
    assert client.body == b"id: 1\ndata: a\n\n"
    assert not client.late
