"""EventStreamResponse in front of a run: what its reader is told when the run cannot be read, or not any longer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import anyio
import anyio.lowlevel
import pytest

from penstock.asgi.response import BodySource
from penstock.asgi.sender import MAX_SEND
from penstock.errors import (
    CursorExpired,
    LogUnavailable,
    ReaderReleased,
    RunNotFound,
    StreamRejected,
    SupervisorFailed,
    TooManyReadersOfRun,
)
from tests.support.asgi import PING, Client, Errors, get, on_both

if TYPE_CHECKING:
    from penstock.supervisor.timers import Timers


class Follower:
    """A reader of a run that says what it is told to: bodies, seconds to wait, exceptions."""

    def __init__(self, *steps: Any, at_end: bool = False, entering: Exception | None = None) -> None:
        self.steps = list(steps)
        self.at_end = at_end
        self.entering = entering
        self.clock: Timers | None = None
        self.cursor = 0
        self.log: list[str] = []
        self.limits: set[int] = set()

    async def __aenter__(self) -> Self:
        await anyio.sleep(1)
        if self.entering is not None:
            raise self.entering
        self.log.append("entered")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.log.append("left")

    async def next_body(self, limit: int) -> bytes:
        self.limits.add(limit)
        while self.steps:
            step = self.steps.pop(0)
            if isinstance(step, Exception):
                raise step
            if isinstance(step, bytes):
                await anyio.lowlevel.checkpoint()
                return step
            await anyio.sleep(step)
        return b""


def test_a_reader_of_a_run_is_a_body_source() -> None:
    from penstock.supervisor.follower import Follower as RealFollower  # noqa: PLC0415  (the response itself never imports it)

    assert isinstance(Follower(), BodySource)
    assert isinstance(RealFollower(None, "run-1", readers=None), BodySource)  # type: ignore[arg-type]


@on_both
async def test_a_runs_stream_sends_its_headers_at_once_and_its_bodies_as_they_come() -> None:
    follower = Follower(40, b"id: 1\ndata: a\n\nid: 2\ndata: b\n\n", b"id: 3\ndata: [DONE]\n\n")
    client = await get(follower, first_chunk_timeout=100, ping_interval=15)
    assert client.times[0] == pytest.approx(1)
    assert client.bodies == [PING, PING, b"id: 1\ndata: a\n\nid: 2\ndata: b\n\n", b"id: 3\ndata: [DONE]\n\n"]
    assert client.complete
    assert follower.limits == {MAX_SEND}
    assert follower.log == ["entered", "left"]


class OneAtATime(Client):
    """A server that takes no message before it is done with the one before, as Hypercorn's is with the first."""

    under_way: str | None = None

    async def send(self, message: Any) -> None:
        assert self.under_way is None, f"{message['type']} overtook {self.under_way}"
        self.under_way = message["type"]
        await super().send(message)
        self.under_way = None


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


@pytest.mark.parametrize("accepts", [[], [b"*/*"], [b"text/event-stream, */*"], [b"text/event-stream", b"text/html"]])
@on_both
async def test_who_accepts_something_else_is_told_why(accepts: list[bytes]) -> None:
    client = Client()
    client.scope["headers"] = [(b"accept", accepted) for accepted in accepts]
    await client.get(Follower(entering=ReaderReleased()))
    assert (client.status, client.json["code"]) == (503, "READER_RELEASED")


@pytest.mark.parametrize(
    "error", [RunNotFound("run-1"), CursorExpired("run-1", 1, 100), StreamRejected(403, "NO", "no")]
)
@on_both
async def test_an_event_source_that_never_can_begin_is_told_so(error: Exception) -> None:
    for method, status in (("GET", error.status), ("HEAD", error.status)):  # type: ignore[attr-defined]
        client = Client(method)
        client.scope["headers"] = [(b"accept", b"text/event-stream")]
        assert (await client.get(Follower(entering=error))).status == status


@on_both
async def test_a_head_request_is_told_503_whatever_it_accepts() -> None:
    client = Client("HEAD")
    client.scope["headers"] = [(b"accept", b"text/event-stream")]
    assert (await client.get(Follower(entering=ReaderReleased()))).status == 503


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
