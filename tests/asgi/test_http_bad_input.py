"""What must not get past the front door: each refusal has a status and a code, and the server serves on."""

from __future__ import annotations

import json
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock.asgi import requests
from tests.support.serving import eventually, quiet_config, serving
from tests.support.wire import DONE, Wire, ids

if TYPE_CHECKING:
    import httpx2

    from tests.support.serving import Server

LIMIT = 4096
"""max_body_bytes, where a test is about it."""


def refused(answer: httpx2.Response, code: str, status: int = 400) -> str:
    """The words of a refusal."""
    assert (answer.status_code, answer.json().get("code")) == (status, code), answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    assert len(answer.content) < 2000, "a refusal repeats no more than it must"
    detail: str = answer.json()["detail"]
    return detail


async def serves_on(server: Server) -> None:
    """The server starts and streams runs as if nothing had happened."""
    assert ids(await server.read(await server.start("count", 2))) == [1, 2, 3]
    assert server.observer.errors == []


async def post(server: Server, body: bytes, path: str = "/v1/runs", **headers: str) -> httpx2.Response:
    return await server.client.post(path, content=body, headers=headers)


# Bodies that are not JSON


def nested(depth: int, kind: str = "[]") -> str:
    return {"[]": "[" * depth + "]" * depth, "{}": '{"a":' * depth + "1" + "}" * depth}[kind]


BAD_JSON = {
    "words": b"hello",
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
async def test_a_body_that_is_no_json_object_is_refused_on_every_route(body: bytes) -> None:
    async with serving() as server:
        run_id = await server.start("silent")
        for path in ("/v1/runs", f"/v1/runs/{run_id}/stream", f"/v1/runs/{run_id}/cancel"):
            refused(await post(server, body, path), "BAD_JSON")
        assert (await server.run(run_id))["status"] == "running"
        await serves_on(server)


@pytest.mark.parametrize("where", ["input", "metadata"])
async def test_json_nested_to_any_depth_is_taken_or_refused_but_is_no_server_error(where: str) -> None:
    async with serving() as server:
        depth = 1
        while depth < 1200:
            body = f'{{"producer": "echo", "{where}": {nested(depth, "{}")}}}'.encode()
            answer = await post(server, body, idempotency_key=f"k{depth}")
            assert answer.status_code == (201 if depth < requests.MAX_DEPTH else 400), (depth, answer.text)
            if answer.status_code == 201:
                record = await server.client.get(answer.headers["location"].removesuffix("/stream"))
                assert record.status_code == 200, depth
            depth += 1 if 90 < depth < 110 or 900 < depth < 1010 else 25
        assert (await server.client.get("/v1/runs?limit=1000")).status_code == 200
        await serves_on(server)


@pytest.mark.parametrize("body", [b"", b"  \r\n\t ", b"{}", b" {} "])
async def test_no_body_is_the_same_as_an_empty_object(body: bytes) -> None:
    async with serving() as server:
        run_id = await server.start("count", 1)
        answer = await post(server, body, f"/v1/runs/{run_id}/stream")
        assert answer.status_code == 200
        assert answer.text.endswith(f"data: {DONE}\n\n")
        assert '"producer"' in refused(await post(server, body), "BAD_REQUEST")


# Bodies that are too large


async def test_a_body_at_the_limit_is_taken_and_one_byte_more_is_refused() -> None:
    async with serving(max_body_bytes=LIMIT) as server:
        body = b'{"producer": "count", "input": 1}'
        whole = body.ljust(LIMIT)
        assert (await post(server, whole)).status_code == 201
        assert str(LIMIT) in refused(await post(server, whole + b" "), "BODY_TOO_LARGE", 413)
        refused(await post(server, whole + b" ", "/v1/runs/x/stream"), "BODY_TOO_LARGE", 413)
        refused(await post(server, whole + b" ", "/v1/runs/x/cancel"), "BODY_TOO_LARGE", 413)
        await serves_on(server)


async def test_a_body_without_a_length_is_refused_at_the_limit() -> None:
    async def pieces(count: int) -> Any:
        for _ in range(count):
            yield b" " * 1024

    async with serving(max_body_bytes=LIMIT) as server:
        refused(await server.client.post("/v1/runs", content=pieces(5)), "BODY_TOO_LARGE", 413)
        assert '"producer"' in refused(await server.client.post("/v1/runs", content=pieces(4)), "BAD_REQUEST")
        await serves_on(server)


@pytest.mark.parametrize("path", ["/v1/runs", "/v1/runs/x/cancel", "/nowhere", "/healthz"])
async def test_a_body_that_nobody_reads_to_its_end_is_answered_and_leaves_no_task_behind(path: str) -> None:
    config = quiet_config()
    config.keep_alive_timeout = 0.5
    async with serving(max_body_bytes=LIMIT, config=config) as server:
        async with await server.wire() as wire:
            # As large as whatever lies between client and application, and more: the server does not read all of it.
            with trio.move_on_after(30) as gave_up:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(send_without_end, wire, path)
                    await wire.until(b"HTTP/1.1 4", b"\r\n\r\n")
                    nursery.cancel_scope.cancel()
            assert not gave_up.cancelled_caught
            await wire.reset()
        await eventually(lambda: not server.connections())
        await serves_on(server)


async def send_without_end(wire: Wire, path: str) -> None:
    try:
        await wire.send("POST", path, content_length="1000000000")
        while True:
            await wire.stream.send_all(b" " * 65536)
    except trio.BrokenResourceError:
        pass  # the server has answered, and closed


async def test_a_content_length_that_is_not_true_harms_nobody_else() -> None:
    body = b'{"producer": "count", "input": 1}'
    async with serving() as server:
        async with await server.wire() as longer:  # says more than it sends, and goes
            await longer.send("POST", "/v1/runs", content_length="1000")
            await longer.stream.send_all(body)
        async with await server.wire() as shorter:  # says less than it sends: half an object, then something else
            await shorter.send("POST", "/v1/runs", content_length=str(len(body) - 5))
            await shorter.stream.send_all(body)
            assert b"BAD_JSON" in await shorter.until(b"BAD_JSON")
        for header in ("-1", "x", "1, 2", "9" * 30):
            async with await server.wire() as wire:
                await wire.send("POST", "/v1/runs", content_length=header)
                if not header.isdigit():
                    assert (await wire.rest()).startswith(b"HTTP/1.1 400 ")
        await serves_on(server)
        assert [run["producer"] for run in (await server.client.get("/v1/runs")).json()["runs"]] == ["count"]


# Members of a start


WRONG_MEMBERS: dict[str, list[Any]] = {
    "producer": [None, 1, True, [], {}, 1.5],
    "run_id": ["", 1, True, [], {}, "a b", "a/b", "x" * 129, "é", "a\n", "../etc", "\0", "٣"],
    "metadata": [1, "x", [], True, 1.5],
    "timeout": [0, -1, "1", True, [], {}, 1e-400, -1e300],
    "max_silence": [0, -1, "1", True, [], {}],
    "stream": [1, 0, None, "yes", "", [], {}, 1.0],
    "inputs": [1, None],
    "Producer": ["count"],
    "idempotency_key": ["k"],
    "": [1],
    "x" * 5000: [1],
}


@pytest.mark.parametrize("member", WRONG_MEMBERS, ids=lambda name: name[:20] or "empty")
async def test_a_member_of_a_start_that_is_wrong_is_named_and_nothing_is_started(member: str) -> None:
    async with serving() as server:
        for value in WRONG_MEMBERS[member]:
            answer = await server.client.post("/v1/runs", json={"producer": "count", "input": 1, member: value})
            words = refused(answer, "BAD_RUN_ID" if member == "run_id" else "BAD_REQUEST")
            assert (member[:20] or "''") in words or member == "run_id", (value, words)
        assert (await server.client.get("/v1/runs")).json() == {"runs": []}
        await serves_on(server)


@pytest.mark.parametrize("member", ["timeout", "max_silence"])
async def test_a_number_of_seconds_that_no_clock_has_is_refused_and_a_very_large_one_is_not(member: str) -> None:
    async with serving(max_duration=0) as server:
        body = f'{{"producer": "count", "input": 1, "{member}": %s}}'
        refused(await post(server, (body % ("9" * 400)).encode()), "BAD_REQUEST")
        assert (await post(server, (body % "1e300").encode())).status_code == 201
        await serves_on(server)


async def test_a_producer_that_is_not_there_is_refused_with_those_that_are() -> None:
    async with serving() as server:
        for name in ("nobody", "", "Count", "x" * 100_000, "__class__", "coun\u0442"):
            answer = await server.client.post("/v1/runs", json={"producer": name})
            assert "count, echo, fail, silent" in refused(answer, "UNKNOWN_PRODUCER")


@pytest.mark.parametrize("key", ["", "a b", "x" * 256, "é", "a\tb", '"a b"'])
async def test_an_idempotency_key_that_is_none_is_refused(key: str) -> None:
    async with serving() as server:
        headers = {"Idempotency-Key": key.encode()}
        answer = await server.client.post("/v1/runs", json={"producer": "count"}, headers=headers)  # type: ignore[arg-type]
        refused(answer, "BAD_IDEMPOTENCY_KEY")
        longest = {"Idempotency-Key": "~" * requests.MAX_KEY}
        assert (
            await server.client.post("/v1/runs", json={"producer": "count", "input": 1}, headers=longest)
        ).is_success


# Paths, queries, cancels


@pytest.mark.parametrize("run_id", ["a%20b", "x" * 129, "%C3%A9", "a%0A", "%00", "a%22b", "..%5C", "%FF"])
async def test_a_run_id_that_cannot_be_one_is_refused_on_every_route(run_id: str) -> None:
    async with serving() as server:
        for method, what in (("GET", ""), ("GET", "/stream"), ("POST", "/stream"), ("POST", "/cancel")):
            refused(await server.client.request(method, f"/v1/runs/{run_id}{what}"), "BAD_RUN_ID")


@pytest.mark.parametrize(
    "query, code",
    [
        *[(f"limit={each}", "BAD_LIMIT") for each in ("0", "-1", "1001", "x", "", "1.0", "+5", "1" * 19, "%D9%A3")],
        *[(f"status={each}", "BAD_STATUS") for each in ("", "Running", "ended", "running%00", "x" * 10_000)],
    ],
)
async def test_a_list_query_that_is_wrong_is_refused(query: str, code: str) -> None:
    async with serving() as server:
        refused(await server.client.get(f"/v1/runs?{query}"), code)


async def test_a_reason_that_is_not_words_is_refused_and_cancels_nothing() -> None:
    async with serving() as server:
        run_id = await server.start("silent")
        wrong: tuple[Any, ...] = (1, True, [], {}, "x" * (requests.MAX_REASON + 1))
        for reason in wrong:
            refused(await server.client.post(f"/v1/runs/{run_id}/cancel", json={"reason": reason}), "BAD_REQUEST")
        assert (await server.run(run_id))["status"] == "running"
        words = "\u2028\n\n: not a comment\ndata: [DONE]\0"[:-1] + "x" * 900
        answer = await server.client.post(f"/v1/runs/{run_id}/cancel", json={"reason": words})
        assert answer.status_code == 202
        cancelled, done = await server.read(run_id)
        assert (cancelled.event, cancelled.json["reason"], done.data) == ("cancelled", words, DONE)


# Cursors


BAD_CURSORS: dict[str, Any] = {
    "negative": "-1",
    "a plus sign": "+1",
    "a float": "1.0",
    "an exponent": "1e3",
    "hexadecimal": "0x1",
    "an underscore": "1_0",
    "a unicode digit": "٣",
    "a superscript": "²",
    "a fullwidth digit": "\uff13",
    "words": "last",
    "nineteen digits": "1" * 19,
    "five thousand digits": "1" * 5000,
    "a space in it": "1 2",
    "two": "1,2",
    "an id of Redis": "5-0",
}


@pytest.mark.parametrize("cursor", BAD_CURSORS.values(), ids=BAD_CURSORS)
async def test_a_bad_cursor_is_refused_wherever_it_stands(cursor: str) -> None:
    async with serving() as server:
        path = f"/v1/runs/{await server.start('count', 3)}/stream"
        header = {"Last-Event-ID": cursor.encode()}
        refused(await server.client.get(path, headers=header), "BAD_CURSOR")  # type: ignore[arg-type]
        refused(await server.client.post(path, headers=header), "BAD_CURSOR")  # type: ignore[arg-type]
        refused(await server.client.get(path, params={"starting_after": cursor}), "BAD_CURSOR")
        refused(await server.client.post(path, json={"starting_after": cursor}), "BAD_CURSOR")
        refused(await server.client.get(path, params={"tail": cursor}), "BAD_TAIL")
        refused(await server.client.post(path, json={"tail": cursor}), "BAD_TAIL")
        assert (await server.client.head(path, headers=header)).status_code == 400  # type: ignore[arg-type]
        await serves_on(server)


@pytest.mark.parametrize(
    "cursor", [-1, 1.0, 0.5, True, False, [], {}, 10**18, -(10**30), 10**4000, "", " ", "\U0001f600"]
)
async def test_a_cursor_of_the_wrong_type_is_refused(cursor: Any) -> None:
    async with serving() as server:
        path = f"/v1/runs/{await server.start('count', 3)}/stream"
        refused(await server.client.post(path, json={"starting_after": cursor}), "BAD_CURSOR")
        refused(await server.client.post(path, json={"tail": cursor}), "BAD_TAIL")


async def test_a_cursor_of_a_million_characters_is_refused_before_it_is_read() -> None:
    async with serving() as server:
        run_id = await server.start("count", 3)
        answer = await server.client.post(
            f"/v1/runs/{run_id}/stream", content=b'{"starting_after": "' + b"1" * 10**6 + b'"}'
        )
        refused(answer, "BAD_CURSOR")
        async with await server.wire() as wire, trio.open_nursery() as nursery:
            nursery.start_soon(send_cursor, wire, run_id)
            assert (await wire.rest()).startswith(b"HTTP/1.1 4")
        await serves_on(server)


async def send_cursor(wire: Wire, run_id: str) -> None:
    with suppress(trio.BrokenResourceError):  # nobody reads all of that
        await wire.send("GET", f"/v1/runs/{run_id}/stream", last_event_id="1" * 10**6)


async def test_include_pings_is_a_truth_value_and_other_members_of_a_stream_are_ignored() -> None:
    async with serving() as server:
        path = f"/v1/runs/{await server.start('count', 3)}/stream"
        wrong: tuple[Any, ...] = ("maybe", "", "2", 2, None, [], {})
        for value in wrong:
            refused(await server.client.post(path, json={"include_pings": value}), "BAD_REQUEST")
        refused(await server.client.get(path, params={"include_pings": "maybe"}), "BAD_REQUEST")
        for value in (True, False, "true", "False", "1", "0"):
            assert (await server.client.post(path, json={"include_pings": value})).status_code == 200
        others = {"background": True, "poll_interval": 0, "batch_size": -1, "": None}
        assert (await server.client.post(path, json=others)).status_code == 200


async def test_json_that_names_a_member_twice_is_taken_by_its_last() -> None:
    async with serving() as server:
        body = json.dumps({"producer": "nobody"})[:-1] + ', "producer": "count", "input": 1}'
        assert (await post(server, body.encode())).status_code == 201
