"""Checks of requests: each refusal has a status and a code, changes nothing, and the server goes on serving."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from starlette.requests import Request

from penstock.asgi import requests
from penstock.errors import StreamRejected
from tests.support.serving import eventually, problem, quiet_config, serving
from tests.support.wire import DONE, Wire, blocks_of, ids

if TYPE_CHECKING:
    from collections.abc import Callable

    import httpx2

    from tests.support.serving import Server

LIMIT: Final = 4096


def refusal(check: Callable[..., Any], *arguments: Any) -> StreamRejected:
    """The refusal of a check. It is a 400 whose message does not repeat a long value."""
    with pytest.raises(StreamRejected) as caught:
        check(*arguments)
    assert caught.value.status == 400
    assert len(caught.value.message) < 1000
    return caught.value


async def body_of(body: bytes, limit: int = 1024 * 1024) -> Any:
    async def receive() -> dict[str, Any]:
        await trio.lowlevel.checkpoint()
        return {"type": "http.request", "body": body}

    return await requests.json_body(Request({"type": "http", "headers": []}, receive), limit)


async def serves_on(server: Server) -> None:
    assert ids(await server.read(await server.start("count", 2))) == [1, 2, 3]
    assert server.observer.errors == []


async def post(server: Server, body: bytes, path: str = "/v1/runs") -> httpx2.Response:
    return await server.client.post(path, content=body)


# JSON


def nested(depth: int, kind: str = "[]") -> str:
    return {"[]": "[" * depth + "]" * depth, "{}": '{"a":' * depth + "1" + "}" * depth}[kind]


BAD_JSON: Final = {
    "no JSON": b"hello",
    "cut off": b'{"producer": "count"',
    "two values": b"{} {}",
    "NaN": b'{"producer": "count", "input": NaN}',
    "Infinity": b'{"producer": "count", "input": -Infinity}',
    "a number that is infinite": b'{"producer": "count", "input": 1e999}',
    "invalid UTF-8": b'{"producer": "\xff\xfe"}',
    "UTF-16": '{"producer": "count"}'.encode("utf-16"),
    "a lone surrogate": b'{"producer": "echo", "input": "\\ud800"}',
    "a lone surrogate in a name": b'{"producer": "echo", "\\udfff": 1}',
    "an integer of 10,000 digits": b'{"producer": "echo", "input": ' + b"9" * 10_000 + b"}",
    "nested too deeply": nested(100_000).encode(),
    "a NUL": b"\0",
    "an array": b"[]",
    "a string": b'"count"',
    "a number": b"1",
    "null": b"null",
    "single quotes": b"{'producer': 'count'}",
    "a control character": b'{"producer": "\x01"}',
}


@pytest.mark.parametrize("body", BAD_JSON.values(), ids=BAD_JSON)
async def test_a_body_that_is_no_json_object_is_refused(body: bytes) -> None:
    with pytest.raises(StreamRejected) as caught:
        await body_of(body)
    assert (caught.value.status, caught.value.code) == (400, "BAD_JSON")
    assert len(caught.value.message) < 1000


@pytest.mark.parametrize("body", [b"", b"  \r\n\t ", b"{}", b" {} "])
async def test_no_body_is_the_same_as_an_empty_object(body: bytes) -> None:
    assert await body_of(body) == {}


async def test_json_is_taken_up_to_a_depth_and_to_a_size_and_by_the_last_of_two_equal_names() -> None:
    for kind in ("[]", "{}"):
        for depth in (*range(1, requests.MAX_DEPTH + 5), 900, 990, 1000, 1010, 1500):
            body = f'{{"input": {nested(depth, kind)}}}'.encode()
            if depth < requests.MAX_DEPTH:
                assert await body_of(body) == json.loads(body)
            else:
                with pytest.raises(StreamRejected, match=r"nested more than 100|is not JSON"):
                    await body_of(body)
    assert await body_of(b"{}".ljust(LIMIT), LIMIT) == {}
    with pytest.raises(StreamRejected, match="at most 4096 bytes") as caught:
        await body_of(b"{}".ljust(LIMIT + 1), LIMIT)
    assert (caught.value.status, caught.value.code) == (413, "BODY_TOO_LARGE")
    assert await body_of(b'{"a": 1, "a": 2}') == {"a": 2}


async def test_every_route_that_takes_a_body_refuses_a_bad_or_a_large_one_and_does_nothing() -> None:
    async with serving(max_body_bytes=LIMIT) as server:
        run_id = await server.start("silent")
        for path in ("/v1/runs", f"/v1/runs/{run_id}/stream", f"/v1/runs/{run_id}/cancel"):
            problem(await post(server, BAD_JSON["invalid UTF-8"], path), 400, "BAD_JSON")
            problem(await post(server, b" " * (LIMIT + 1), path), 413, "BODY_TOO_LARGE")
        assert (await server.run(run_id))["status"] == "running"
        deepest = f'{{"producer": "echo", "metadata": {nested(requests.MAX_DEPTH - 1, "{}")}}}'
        started = await post(server, deepest.encode())
        assert started.status_code == 201
        assert (await server.client.get(f"/v1/runs/{started.json()['id']}")).status_code == 200
        assert len((await server.client.get("/v1/runs")).json()["runs"]) == 2
        await serves_on(server)


async def test_a_body_without_a_length_is_refused_at_the_limit() -> None:
    async def pieces(count: int) -> Any:
        for _ in range(count):
            yield b" " * 1024

    async with serving(max_body_bytes=LIMIT) as server:
        problem(await server.client.post("/v1/runs", content=pieces(5)), 413, "BODY_TOO_LARGE")
        problem(await server.client.post("/v1/runs", content=pieces(4)), 400, "BAD_REQUEST")
        await serves_on(server)


@pytest.mark.parametrize("path", ["/v1/runs", "/nowhere", "/healthz"])
async def test_a_body_that_is_not_read_to_its_end_is_answered_and_leaves_no_task_behind(path: str) -> None:
    config = quiet_config()
    config.keep_alive_timeout = 0.5
    async with serving(max_body_bytes=LIMIT, config=config) as server:
        async with await server.wire() as wire:
            # More than the buffers between client and application hold: the server does not read all of it.
            with trio.fail_after(30):
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send_without_end, wire, path)
                    await wire.until(b"HTTP/1.1 4", b"\r\n\r\n")
                    nursery.cancel_scope.cancel()
            await wire.reset()
        await eventually(lambda: not server.connections())
        await serves_on(server)


async def send_without_end(wire: Wire, path: str) -> None:
    with suppress(trio.BrokenResourceError):  # the server has answered, and closed
        await wire.send("POST", path, content_length="1000000000")
        while True:
            await wire.stream.send_all(b" " * 65536)


async def test_a_content_length_that_is_not_true_harms_no_other_request() -> None:
    body = b'{"producer": "count", "input": 1}'
    async with serving() as server:
        async with await server.wire() as longer:  # announces more than it sends, and disconnects
            await longer.send("POST", "/v1/runs", content_length="1000")
            await longer.stream.send_all(body)
        async with await server.wire() as shorter:  # announces less than it sends: half an object, then something else
            await shorter.send("POST", "/v1/runs", content_length=str(len(body) - 5))
            await shorter.stream.send_all(body)
            assert b"BAD_JSON" in await shorter.until(b"BAD_JSON")
        for header in ("-1", "x", "1, 2"):
            async with await server.wire() as wire:
                await wire.send("POST", "/v1/runs", content_length=header)
                assert (await wire.rest()).startswith(b"HTTP/1.1 400 ")
        await serves_on(server)
        assert [run["producer"] for run in (await server.client.get("/v1/runs")).json()["runs"]] == ["count"]


# Starts

WRONG_MEMBERS: Final[dict[str, list[Any]]] = {
    "producer": [None, 1, True, [], {}, 1.5],
    "run_id": ["", 1, True, [], {}, "a b", "a/b", "x" * 129, "é", "a\n", "../etc", "\0", "٣"],
    "metadata": [1, "x", [], True, 1.5],
    "timeout": [0, -1, "1", True, [], {}, -1e300, int("9" * 400)],
    "max_silence": [0, -1, "1", True, [], {}, int("9" * 400)],
    "stream": [1, 0, None, "yes", "", [], {}, 1.0],
    "inputs": [1, None],
    "Producer": ["count"],
    "idempotency_key": ["k"],
    "": [1],
    "x" * 5000: [1],
}


@pytest.mark.parametrize("member", WRONG_MEMBERS, ids=lambda name: name[:20] or "empty")
def test_a_member_of_a_start_that_is_wrong_is_named(member: str) -> None:
    for value in WRONG_MEMBERS[member]:
        error = refusal(requests.start_request, {"producer": "count", "input": 1, member: value}, {})
        assert error.code == ("BAD_RUN_ID" if member == "run_id" else "BAD_REQUEST")
        assert (member[:20] or "''") in error.message or member == "run_id", (value, error.message)


def test_a_start_is_read_with_its_defaults_and_with_all_that_it_may_have() -> None:
    least = requests.start_request({"producer": "count"}, {})
    assert least == requests.StartRequest("count", None, None, None, None, None, stream=False, idempotency_key=None)
    body = {"producer": "count", "input": [1], "run_id": "r", "metadata": {"a": 1}, "timeout": 1e300}
    body |= {"max_silence": 2, "stream": True}
    most = requests.start_request(body, {"idempotency-key": "~" * requests.MAX_KEY})
    assert most == requests.StartRequest(
        "count", [1], "r", {"a": 1}, 1e300, 2.0, stream=True, idempotency_key="~" * requests.MAX_KEY
    )


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "é", "a\tb", '"a b"'])
def test_an_idempotency_key_that_is_none_is_refused(key: str) -> None:
    assert refusal(requests.start_request, {"producer": "a"}, {"idempotency-key": key}).code == "BAD_IDEMPOTENCY_KEY"


async def test_a_refused_start_starts_nothing_and_an_unknown_producer_is_answered_with_the_known_ones() -> None:
    async with serving() as server:
        answer = await server.client.post("/v1/runs", json={"producer": "count", "inputs": 1})
        problem(answer, 400, "BAD_REQUEST")
        for name in ("nobody", "", "Count", "x" * 100_000, "__class__", "coun\u0442"):
            answer = await server.client.post("/v1/runs", json={"producer": name})
            assert "count, echo, fail, silent" in problem(answer, 400, "UNKNOWN_PRODUCER")["detail"]
            assert len(answer.content) < 2000
        assert (await server.client.get("/v1/runs")).json() == {"runs": []}


# Paths, lists, cancels


@pytest.mark.parametrize("run_id", ["a%20b", "x" * 129, "%C3%A9", "%00", "%FF"])
async def test_a_run_id_that_cannot_be_one_is_refused_on_every_route(run_id: str) -> None:
    async with serving() as server:
        for method, what in (("GET", ""), ("GET", "/stream"), ("POST", "/stream"), ("POST", "/cancel")):
            problem(await server.client.request(method, f"/v1/runs/{run_id}{what}"), 400, "BAD_RUN_ID")


@pytest.mark.parametrize(
    "query, code",
    [
        *[({"limit": each}, "BAD_LIMIT") for each in ("0", "-1", "1001", "x", "", "1.0", "+5", "1" * 19, "٣")],
        *[({"status": each}, "BAD_STATUS") for each in ("", "Running", "ended", "running\0", "x" * 10_000)],
    ],
)
def test_a_list_query_that_is_wrong_is_refused(query: dict[str, str], code: str) -> None:
    assert refusal(requests.list_query, query).code == code


async def test_a_reason_that_is_no_text_of_some_length_is_refused_and_cancels_nothing() -> None:
    async with serving() as server:
        run_id = await server.start("silent")
        wrong: tuple[Any, ...] = (1, True, [], {}, "x" * (requests.MAX_REASON + 1))
        for reason in wrong:
            assert refusal(requests.cancel_reason, {"reason": reason}).code == "BAD_REQUEST"
        problem(await server.client.post(f"/v1/runs/{run_id}/cancel", json={"reason": 1}), 400, "BAD_REQUEST")
        assert (await server.run(run_id))["status"] == "running"
        reason = "\u2028\n\n: not a comment\ndata: [DONE]" + "x" * 900
        answer = await server.client.post(f"/v1/runs/{run_id}/cancel", json={"reason": reason})
        assert answer.status_code == 202
        cancelled, done = await server.read(run_id)
        assert (cancelled.event, cancelled.json["reason"], done.data) == ("cancelled", reason, DONE)


# Cursors

BAD_CURSORS: Final[dict[str, str]] = {
    "negative": "-1",
    "a plus sign": "+1",
    "a float": "1.0",
    "an exponent": "1e3",
    "hexadecimal": "0x1",
    "an underscore": "1_0",
    "a unicode digit": "٣",
    "a superscript": "²",
    "a fullwidth digit": "\uff13",
    "a word": "last",
    "nineteen digits": "1" * 19,
    "a million digits": "1" * 10**6,
    "a space in it": "1 2",
    "two": "1,2",
    "an id of Redis": "5-0",
}
WRONG_TYPES: Final[list[Any]] = [-1, 1.0, 0.5, True, False, [], {}, 10**18, -(10**30), 10**4000, "", " ", "\U0001f600"]


@pytest.mark.parametrize("cursor", BAD_CURSORS.values(), ids=BAD_CURSORS)
def test_a_bad_cursor_is_refused_wherever_it_stands(cursor: str) -> None:
    given = {"starting_after": cursor}
    assert refusal(requests.stream_request, {}, {}, {"last-event-id": cursor}).code == "BAD_CURSOR"
    assert refusal(requests.stream_request, {}, given, {}).code == "BAD_CURSOR"
    assert refusal(requests.stream_request, given, {}, {}).code == "BAD_CURSOR"
    assert refusal(requests.stream_request, {}, {"tail": cursor}, {}).code == "BAD_TAIL"


def test_a_cursor_of_the_wrong_type_is_refused() -> None:
    for cursor in WRONG_TYPES:
        assert refusal(requests.stream_request, {"starting_after": cursor}, {}, {}).code == "BAD_CURSOR"
        assert refusal(requests.stream_request, {"tail": cursor}, {}, {}).code == "BAD_TAIL"


async def test_a_bad_cursor_is_refused_on_every_way_to_ask_for_a_stream() -> None:
    async with serving() as server:
        path = f"/v1/runs/{await server.start('count', 3)}/stream"
        for method, code in (("GET", "BAD_CURSOR"), ("POST", "BAD_CURSOR"), ("HEAD", None)):
            answer = await server.client.request(method, path, headers={"Last-Event-ID": "٣".encode()})  # type: ignore[arg-type]
            assert answer.status_code == 400
            if code is not None:
                problem(answer, 400, code)
        async with await server.wire() as wire, trio.open_nursery() as nursery:
            nursery.start_soon(send_long_cursor, wire, path)
            assert (await wire.rest()).startswith(b"HTTP/1.1 4")
        await serves_on(server)


async def send_long_cursor(wire: Wire, path: str) -> None:
    with suppress(trio.BrokenResourceError):  # the server does not read all of that
        await wire.send("GET", path, last_event_id="1" * 10**6)


def test_include_pings_is_a_boolean_and_other_members_of_a_stream_are_ignored() -> None:
    wrong: tuple[Any, ...] = ("maybe", "", "2", 2, None, [], {})
    for value in wrong:
        assert refusal(requests.stream_request, {"include_pings": value}, {}, {}).code == "BAD_REQUEST"
    for value, pings in ((True, True), (False, False), ("true", True), ("False", False), ("1", True), ("0", False)):
        assert requests.stream_request({"include_pings": value}, {}, {}).include_pings is pings
    others = {"background": True, "poll_interval": 0, "batch_size": -1, "": None}
    assert requests.stream_request(others, {}, {}) == requests.StreamRequest(0, None, include_pings=True)


# Other sites


@pytest.mark.parametrize("value", ["http://[x", "http://a]", "//[", "http://[::1", "null", "http://x:y"])
async def test_an_origin_that_is_no_address_is_another_sites(value: str) -> None:
    async with serving() as server:
        for path in ("/v1/runs", "/v1/runs/any/stream", "/v1/runs/any/cancel"):
            problem(await server.client.post(path, content=b"{}", headers={"origin": value}), 403, "CROSS_SITE")
        answer = await server.client.post("/v1/runs", json={"producer": "count", "input": 1, "stream": True})
        assert ids(blocks_of(answer.text)) == [1, 2]
