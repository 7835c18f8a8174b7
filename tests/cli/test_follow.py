"""`penstock runs follow` before a server with prepared responses: every event once, whatever the server sends."""

from __future__ import annotations

import json
import socket
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any

import pytest
from tenacity import wait_exponential

from penstock import backoff
from penstock.cli import follow as module
from penstock.cli.api import (
    Action,
    ApiClient,
    ApiResponse,
    CommandFailed,
    ConnectionFailed,
    Decision,
    decide,
    retry_after,
    retry_or_stop,
)
from penstock.cli.follow import Following
from penstock.cli.terminal import Progress, Screen, describe_end, event_as_json, event_as_text
from penstock.sse import Message
from tests.support.command_line import ran
from tests.support.runs_answers import Held, Reset, answer, answering, event, problem, record, record_of, stream

if TYPE_CHECKING:
    from collections.abc import Iterator

    from click.testing import Result

    from tests.support.runs_answers import Said, Scripted

DONE = event(3, "[DONE]")
WHOLE = stream(event(1), event(2), DONE)
STREAM = {"content-type": "text/event-stream; charset=utf-8"}


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.001)
    monkeypatch.setattr(module, "SHORTEST_PAUSE", 0.0)


def follow(server: Scripted, *options: object, code: int = 0) -> Result:
    result = ran("runs", "follow", "r1", "--url", server.url, *options)
    assert result.exit_code == code, result.output
    return result


def ids(result: Result) -> list[int]:
    return [json.loads(line)["id"] for line in result.stdout.splitlines()]


# Every event once


@pytest.mark.parametrize(
    "said",
    [
        pytest.param([WHOLE], id="in one"),
        pytest.param([stream(event(1)), stream(event(2), DONE)], id="ended early"),
        pytest.param([stream(event(1), event(2), cut=True), stream(DONE)], id="cut between events"),
        pytest.param([stream(event(1), "id: 2\ndata: wor", cut=True)[:-4], stream(event(2), DONE)], id="cut in one"),
        pytest.param([Reset(stream(event(1), cut=True)), stream(event(2), DONE)], id="reset"),
        pytest.param([b"", b"HTTP/1.1 20", Reset(b""), WHOLE], id="no answer"),
        pytest.param([problem(each, "X") for each in (429, 503)] + [WHOLE], id="not now"),
        pytest.param([answer(502, b"<html>", content_type="text/html"), WHOLE], id="a proxy without words"),
        pytest.param([stream(event(1)), stream(event(1), event(2)), WHOLE], id="repeated"),
        pytest.param([stream(event(1), event(1), event(2), event(1), DONE)], id="repeated at once"),
        pytest.param([stream(event(1)), problem(404, "RUN_NOT_FOUND"), stream(event(2), DONE)], id="lost for a while"),
        pytest.param([stream("id: 1\n: no event", "retry: 1", event(2)), stream(DONE)], id="blocks that are no events"),
        pytest.param([stream(": ping", event(1), ": ping", "retry: 1", event(2), ": ping", DONE)], id="comments"),
    ],
)
def test_every_event_is_printed_once_and_in_order(said: list[Said]) -> None:
    with answering(*said, record()) as server:
        result = follow(server, "--json")
    expected = [2, 3] if "no event" in repr(said[0]) else [1, 2, 3]
    assert ids(result) == expected
    assert server.paths[-1] == "/v1/runs/r1"
    assert set(server.paths[:-1]) == {"/v1/runs/r1/stream"}
    assert result.stderr.splitlines()[-1].startswith("penstock: run r1: completed (end_turn); ")


def test_an_event_with_empty_data_is_an_event_and_half_an_event_is_none() -> None:
    half = stream("\ufeffid: 1\ndata:", event(2, "é"), "id: 3\ndata: [DO", cut=True).replace(b"[DO\n\n", b"[DO\r!\r")
    with answering(half.replace(b"charset=utf-8", b"charset=latin-1"), stream(DONE), record()) as server:
        result = follow(server, "--json")
    assert [json.loads(line)["data"] for line in result.stdout.splitlines()] == ["", "é", "[DONE]"]
    assert server.header("last-event-id") == ["0", "2"]


def test_it_comes_back_with_the_last_id_that_it_has_printed() -> None:
    said = [stream(event(8), event(9)), b"", stream("id: 10\n: no event"), stream(event(11, "[DONE]")), record()]
    with answering(*said) as server:
        result = follow(server, "--after", 7, "--json")
    assert ids(result) == [8, 9, 11]
    assert server.header("last-event-id") == ["7", "9", "9", "10"]
    assert set(server.header("accept")) == {"text/event-stream, application/problem+json"}


def test_repeats_are_reported_once_and_pings_of_the_dialect_letta_are_no_repeats() -> None:
    ping = 'data: {"message_type":"ping","id":"ping-1","run_id":null,"seq_id":null}'
    said = [stream(ping, event(1), ping), stream(ping, event(1), event(1), event(2)), WHOLE, record()]
    with answering(*said) as server:
        result = follow(server, "--json")
    assert ids(result) == [1, 2, 3]
    assert result.stderr.count("the server repeats events, such as 1 after 1; they are left out") == 1
    with answering(stream(ping, event(1), ping), stream(ping, event(2), ping, DONE), record()) as server:
        assert "repeats" not in follow(server).stderr


def test_an_event_that_only_looks_like_the_last_one_does_not_end_the_run() -> None:
    said = [
        stream(event(1, "[DONE]", "stdout"), event(2, "[DONE]", "message")),
        record("running"),  # so the second was not the last one either
        stream(DONE),
        record(),
    ]
    with answering(*said) as server:
        assert ids(follow(server, "--json")) == [1, 2, 3]
    assert server.header("last-event-id") == ["0", "2"]


# How it ends


@pytest.mark.parametrize(
    "status,code", [("completed", 0), ("cancelled", 3), ("failed", 4), ("lost", 5), ("\x1b[2Jstrange", 1)]
)
def test_the_exit_code_and_the_last_line_say_how_the_run_ended(status: str, code: int) -> None:
    for first in (WHOLE, answer(204)):
        with answering(first, record(status)) as server:
            result = follow(server, "--after", 0, code=code)
        assert result.stderr.splitlines()[-1].startswith(
            rf"penstock: run r1: {status} (end_turn); ".replace("\x1b", r"\x1b")
        )
        with answering(first, record(status)) as server:
            assert follow(server, "--quiet", code=code).stderr == ""


def test_quiet_leaves_out_reconnects() -> None:
    with answering(stream(event(1)), b"", stream(event(2), DONE), record()) as server:
        assert follow(server, "--quiet").stderr == ""


def test_expired_events_are_reported_as_missing() -> None:
    expired = problem(410, "CURSOR_EXPIRED", oldest_seq=3)
    for status, code in (("completed", 6), ("failed", 4)):
        with answering(expired, stream(DONE), record(status)) as server:
            result = follow(server, "--json", "--quiet", code=code)
        assert ids(result) == [3]
        assert server.header("last-event-id") == ["0", "2"]
        assert result.stderr == "penstock: events 1 to 2 are missing: the server no longer has them\n"
    letta = answer(410, json.dumps({"detail": {"code": "CURSOR_EXPIRED", "message": "x", "oldest_seq": 3}}).encode())
    with answering(stream(event(1)), letta, stream(DONE), record()) as server:
        result = follow(server, "--json", code=6)
    assert ids(result) == [1, 3]
    assert "event 2 is missing" in result.stderr


@pytest.mark.parametrize("oldest", [0, 1, -5, "3", None, 3.5])
def test_a_410_without_a_later_event_ends_it(oldest: Any) -> None:
    with answering(problem(410, "CURSOR_EXPIRED", oldest_seq=oldest)) as server:
        result = follow(server, code=1)
    assert result.stderr == "penstock: the server answered 410 CURSOR_EXPIRED: so it is\n"


def test_the_last_events_are_those_at_the_time_of_the_request() -> None:
    with answering(
        record("running", seq=9), b"", stream(event(8), event(9)), stream(event(10, "[DONE]")), record()
    ) as server:
        assert ids(follow(server, "--tail", 2, "--json")) == [8, 9, 10]
    assert server.header("last-event-id") == ["7", "7", "9"]
    for after, tail, cursor in ((0, 0, "9"), (8, 5, "8"), (0, 100, "0")):
        with answering(record("running", seq=9), answer(204), record()) as server:
            follow(server, "--tail", tail, "--after", after)
        assert server.header("last-event-id") == [cursor]


def test_the_last_events_may_be_fewer_than_were_asked_for() -> None:
    expired = problem(410, "CURSOR_EXPIRED", oldest_seq=8)
    with answering(record("running", seq=9), expired, stream(event(8), event(9, "[DONE]")), record()) as server:
        result = follow(server, "--tail", 5, "--json")
    assert ids(result) == [8, 9]
    assert "missing" not in result.stderr
    with answering(record("running", seq=9), stream(event(5)), expired, stream(event(9, "[DONE]")), record()) as server:
        assert "events 6 to 7 are missing" in follow(server, "--tail", 5, "--json", code=6).stderr
    with answering(record("running", seq=9), expired, stream(event(8), event(9, "[DONE]")), record()) as server:
        assert "events 6 to 7 are missing" in follow(server, "--tail", 5, "--after", 5, code=6).stderr


@pytest.mark.parametrize(
    "said,words",
    [
        ([problem(401, "NOT_AUTHENTICATED")], "the server answered 401 NOT_AUTHENTICATED: so it is; give a token"),
        ([problem(404, "RUN_NOT_FOUND")], "the server answered 404 RUN_NOT_FOUND: so it is"),
        ([problem(400, "BAD_CURSOR")], "the server answered 400 BAD_CURSOR: so it is"),
        ([problem(501, "X")], "the server answered 501 X: so it is"),
        ([stream(event(1)), problem(403, "FORBIDDEN")], "403 FORBIDDEN: so it is; go on with --after 1"),
        (
            [stream("data: no id")],
            "an event without the id of a run's event: is it the right --url?; go on with --after 0",
        ),
        ([stream(event(1), "id: seven\ndata: x")], "an event without the id of a run's event"),
        ([answer(200, b"id: 1", content_type="text/plain")], "the server answered 200 with text/plain, and"),
        ([answer(206, b"id: 1", content_type="text/event-stream")], "the server answered 206 with text/event-stream"),
        (
            [WHOLE, problem(403, "X")],
            "all events have come, but how the run ended is not known: the server answered 403",
        ),
        (
            [WHOLE, answer(200, b"{}")],
            "all events have come, but how the run ended is not known: the server answered 200",
        ),
        ([answer(204), problem(404, "X")], "gave up after 0.3 s: the server answered 404 X: so it is; go on with"),
    ],
)
def test_an_error_that_ends_it_names_the_cursor(monkeypatch: pytest.MonkeyPatch, said: list[Said], words: str) -> None:
    monkeypatch.setattr(module, "SEEK_LIMIT", 0.3)
    with answering(*said) as server:
        last = follow(server, code=1).stderr.splitlines()[-1]
    assert words in last


# Time limits and pauses, with a clock of their own


@dataclass
class FakeScreen(Screen):
    pauses: list[float] = field(default_factory=list)
    events: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    now: float = 0.0

    def __post_init__(self) -> None:
        super().__init__(Progress(0.0), quiet=True)

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.pauses.append(seconds)
        self.now += seconds

    def event(self, text: str) -> None:
        self.events.append(text)

    def warn(self, message: str) -> None:
        self.warnings.append(message)


@contextmanager
def patient(port: int, give_up_after: float = inf, **how: Any) -> Iterator[tuple[Following, FakeScreen]]:
    screen = FakeScreen()
    with ApiClient(f"http://127.0.0.1:{port}") as server:
        yield (
            Following(server, "r1", screen, give_up_after=give_up_after, clock=screen.clock, sleep=screen.sleep, **how),
            screen,
        )


@pytest.fixture
def unused_port() -> Iterator[int]:
    """A port without a server, which no other program can take."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        yield taken.getsockname()[1]


def test_it_gives_up_after_so_many_seconds_without_an_answer(unused_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.1)
    with patient(unused_port, 60) as (following, screen), pytest.raises(CommandFailed) as caught:
        following.run()
    assert str(caught.value) == "gave up after 60 s: no connection: Connection refused"
    assert sum(screen.pauses) == pytest.approx(60)
    assert all(pause <= min(0.1 * 2**number, 5) for number, pause in enumerate(screen.pauses))
    assert max(screen.pauses) > 1


def test_without_a_limit_it_never_gives_up(unused_port: int) -> None:
    class EnoughError(Exception):
        pass

    with patient(unused_port) as (following, screen):

        def sleep(seconds: float) -> None:
            screen.sleep(seconds)
            if screen.now > 1000:
                raise EnoughError

        following.sleep = sleep
        with pytest.raises(EnoughError):
            following.run()


def test_the_time_limit_starts_anew_after_a_stream_and_not_after_a_503() -> None:
    later = [problem(503, "DRAINING", retry_after="20")]
    with (
        answering(*later * 2, stream(event(1)), *later * 2, stream(event(2), DONE), record()) as server,
        patient(server.port, 50) as (following, screen),
    ):
        assert following.run() == 0
        assert [pause for pause in screen.pauses if pause > 1] == [20] * 4
    with answering(*later) as server, patient(server.port, 50) as (following, screen):
        with pytest.raises(
            CommandFailed, match=r"gave up, since the server asks for 20 s of patience: .* 503 DRAINING"
        ):
            following.run()
        assert screen.pauses == [20, 20]


def test_pauses_are_short_again_after_an_event_and_not_after_an_empty_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FIRST_PAUSE", 0.1)
    monkeypatch.setattr(backoff, "wait_random_exponential", longest)
    with (
        answering(*[stream()] * 4, stream(event(1)), *[b""] * 2, stream(DONE), record()) as server,
        patient(server.port) as (following, screen),
    ):
        following.run()
    assert screen.pauses == [0.1, 0.2, 0.4, 0.8, 0.1, 0.2, 0.4]


def longest(multiplier: float, min: float, max: float) -> Any:  # noqa: A002
    """The longest pauses that could be drawn."""
    return wait_exponential(multiplier=multiplier, max=max)


@pytest.mark.parametrize("retry,pause", [("1000", 1.0), ("99999999", 5.0)])
def test_the_streams_own_retry_is_obeyed_up_to_the_longest_pause(retry: str, pause: float) -> None:
    with (
        answering(stream(event(1), f"retry: {retry}"), stream(DONE), record()) as server,
        patient(server.port) as (following, screen),
    ):
        following.run()
    assert screen.pauses == [pause]


def test_a_run_that_is_gone_is_sought_for_fifteen_seconds() -> None:
    gone = problem(404, "RUN_NOT_FOUND")
    with answering(stream(event(1)), gone) as server, patient(server.port, 3600) as (following, screen):
        with pytest.raises(CommandFailed, match="gave up after 15 s: the server answered 404 RUN_NOT_FOUND"):
            following.run()
        assert 15 <= sum(screen.pauses) < 21
    with (
        answering(stream(event(1)), gone, b"", gone, stream(event(2)), gone, stream(DONE), record()) as server,
        patient(server.port, 3600) as (following, screen),
    ):
        assert following.run() == 0


def test_each_time_that_a_run_is_gone_the_limit_starts_anew() -> None:
    gone = problem(404, "RUN_NOT_FOUND")
    said = [stream(event(1)), gone, stream(event(2)), gone, stream(DONE), record()]
    with answering(*said) as server, patient(server.port) as (following, screen):
        following.sleep = lambda _seconds: screen.sleep(10)
        assert following.run() == 0


def test_a_record_is_not_waited_for_as_long_as_a_stream() -> None:
    with answering(WHOLE, problem(503, "X")) as server, patient(server.port, 3600) as (following, screen):
        with pytest.raises(
            CommandFailed, match="how the run ended is not known: gave up after 15 s: the server answered 503"
        ):
            following.run()
        assert sum(screen.pauses) == pytest.approx(15)
    assert len(screen.events) == 3


def test_a_silent_connection_counts_as_dead_and_is_opened_again() -> None:
    with (
        answering(Held(stream(event(1), cut=True)), Held(b""), stream(event(2), DONE), record()) as server,
        patient(server.port, silence=0.2) as (following, screen),
    ):
        assert following.run() == 0
    assert [line.split()[0] for line in screen.events] == ["1", "2", "3"]
    assert server.header("last-event-id") == ["0", "1", "1"]


def test_the_silence_of_a_stream_has_a_limit_of_its_own() -> None:
    with (
        answering(Held(stream(event(1), cut=True))) as server,
        ApiClient(server.url) as asking,
        asking.stream("r1", 0, wait=3600, silence=0.1) as (_, pieces),
    ):
        assert b"id: 1" in next(pieces)
        with pytest.raises(ConnectionFailed, match="nothing came for too long"):
            next(pieces)


# Tables


@pytest.mark.parametrize(
    "status,headers,seen,step,pause",
    [
        (200, STREAM, False, Action.READ, 0),
        (200, {"content-type": "Text/Event-Stream"}, True, Action.READ, 0),
        (200, {"content-type": "text/html"}, True, Action.STOP, 0),
        (200, {}, True, Action.STOP, 0),
        (201, STREAM, True, Action.STOP, 0),
        (204, {}, False, Action.OVER, 0),
        *((status, {"location": "/"}, True, Action.STOP, 0) for status in (301, 308)),
        *((status, {}, True, Action.STOP, 0) for status in (400, 401, 410, 501, 505)),
        (404, {}, False, Action.STOP, 0),
        (404, {}, True, Action.SEEK, 0),
        *((status, {}, False, Action.AGAIN, 0) for status in (408, 425, 429, 500, 503, 599)),
        *((status, {"retry-after": "7"}, False, Action.AGAIN, 7) for status in (429, 503)),
        (404, {"retry-after": "7"}, True, Action.SEEK, 0),
    ],
)
def test_a_readers_next_step(status: int, headers: dict[str, str], seen: bool, step: Action, pause: float) -> None:
    decision = decide(ApiResponse(status, headers), cursor=5, seen=seen)
    assert (decision.action, decision.pause) == (step, pause)
    assert bool(decision.reason) is (step not in {Action.READ, Action.OVER})
    if step not in {Action.READ, Action.OVER}:
        assert retry_or_stop(ApiResponse(status, headers), seen=seen) == decision


def test_after_an_expired_cursor_a_reader_continues_at_the_oldest_event() -> None:
    body = json.dumps({"code": "CURSOR_EXPIRED", "detail": "x", "oldest_seq": 7}).encode()
    steps = [decide(ApiResponse(410, body=body), cursor=cursor, seen=True).action for cursor in (0, 5, 6, 7)]
    assert steps == [Action.SKIP, Action.SKIP, Action.STOP, Action.STOP]
    assert decide(ApiResponse(410, body=body), cursor=5, seen=True) == Decision(Action.SKIP, oldest=7)


@pytest.mark.parametrize(
    "value,seconds",
    [
        ("0", 0),
        (" 12 ", 12),
        ("999999999", 999_999_999),
        *((value, 0) for value in ("", "-1", "1.5", "1e9", "soon", "9" * 5000, "٣")),
        ("Sun, 09 Sep 2001 01:46:50 GMT", 10),
        ("Sun, 09 Sep 2001 01:46:30 GMT", 0),
        ("Sun, 09 Sep 99999 01:46:30 GMT", 0),
    ],
)
def test_how_long_retry_after_asks_to_wait(value: str, seconds: float) -> None:
    assert retry_after(value, now=1e9) == seconds


def test_how_events_are_printed() -> None:
    message = Message('a\x1b[2J\n[b]\t"é"\u202e', "my\x9btype")
    assert event_as_text(12, message) == "12  my\\x9btype  a\\x1b[2J\n" + " " * 16 + '[b]\t"é"\\u202e'
    line = event_as_json(12, message)
    assert line.startswith('{"id": 12, "event": "my\\u009btype", "data": "a\\u001b[2J\\n[b]')
    assert json.loads(line) == {"id": 12, "event": message.event, "data": message.data}
    assert line.isascii()


def test_how_a_run_ended_is_described() -> None:
    error = {"code": "ERROR", "message": "it broke", "error_id": "e1"}
    assert (
        describe_end(record_of("failed", stop_reason="error", error=error)) == "run r1: failed (error), ERROR: it broke"
    )
    cancelled = record_of("cancelled", stop_reason="cancelled", cancel_reason="enough")
    assert describe_end(cancelled) == "run r1: cancelled (cancelled): enough"
    assert describe_end(record_of("completed", stop_reason=None)) == "run r1: completed"


def test_progress_counts_events_bytes_and_reconnects() -> None:
    progress = Progress(10.0, events=3, size=456, reconnects=2, state="no connection", until=12.5)
    assert progress.line(11.0) == "no connection, again in 1.5 s · 3 events, 456 bytes, 1.0 s, 2 reconnects"
    assert Progress(10.0, state="connected").line(12.0) == "connected · 0 events, 0 bytes, 2.0 s"
    assert Progress(10.0, 1, 1, 1, "x").line(12.0) == "x · 1 event, 1 byte, 2.0 s, 1 reconnect"
