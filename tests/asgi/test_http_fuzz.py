"""Anything at all, on every route: never a 5xx, never a traceback, and the server serves on."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.support.serving import PRODUCERS, quiet_config, serving
from tests.support.wire import DONE, blocks_of

if TYPE_CHECKING:
    import httpx2

    from tests.support.serving import Server

slow = settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
"""Each example is many requests to a server of its own."""

EXISTING = "there"
ROUTES = [
    ("POST", "/v1/runs"),
    ("GET", "/v1/runs"),
    ("GET", f"/v1/runs/{EXISTING}"),
    ("GET", f"/v1/runs/{EXISTING}/stream"),
    ("POST", f"/v1/runs/{EXISTING}/stream"),
    ("HEAD", f"/v1/runs/{EXISTING}/stream"),
    ("POST", f"/v1/runs/{EXISTING}/cancel"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
NUMBERS = st.sampled_from([0, 1, -1, 1.5, 1e300, 1e-300, 10**17, 10**18, 10**310, "0", "2", "-1", "²", "", None, True])
MEMBERS: dict[str, Any] = {
    "producer": st.sampled_from([*PRODUCERS, "nobody", None]) | JSON,
    "input": st.integers(-2, 5) | JSON,
    "run_id": st.text("abAB09._:-", max_size=4) | JSON,
    "metadata": st.dictionaries(st.text(max_size=10), JSON, max_size=3) | JSON,
    "timeout": NUMBERS | JSON,
    "max_silence": NUMBERS | JSON,
    "stream": st.booleans() | JSON,
    "reason": st.text(max_size=30) | JSON,
    "starting_after": NUMBERS | JSON,
    "tail": NUMBERS | JSON,
    "include_pings": st.sampled_from([True, False, "true", "0", "maybe"]) | JSON,
}
BODIES = st.one_of(
    st.fixed_dictionaries({}, optional=MEMBERS).map(lambda body: json.dumps(body).encode()),
    st.fixed_dictionaries({}, optional=MEMBERS).map(lambda body: json.dumps(body | {"producer": "count"}).encode()),
    JSON.map(lambda body: json.dumps(body).encode()),
    st.binary(max_size=200),
)
WORDS = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20).map(str.encode)
VALUES = WORDS | st.binary(max_size=20).map(lambda raw: bytes(b for b in raw if b >= 0x20 and b != 0x7F).strip())
NAMES = st.sampled_from(
    [
        "last-event-id",
        "idempotency-key",
        "content-type",
        "accept",
        "accept-encoding",
        "cookie",
        "range",
        "if-match",
        "x",
    ]
)
HEADERS = st.lists(st.tuples(NAMES.map(str.encode), VALUES), max_size=4)
QUERIES = st.dictionaries(
    st.sampled_from(["limit", "status", "starting_after", "tail", "include_pings", "x"]),
    st.sampled_from(["", "0", "1", "-1", "running", "true", "1e3", "٣", "9" * 30]) | st.text(max_size=10),
    max_size=3,
)
REQUESTS = st.lists(st.tuples(st.sampled_from(ROUTES), BODIES, HEADERS, QUERIES), min_size=1, max_size=12)


async def status_of(server: Server, request: Any) -> int:
    """Send it, and look at whatever comes back; a stream is left after its headers, since its run may take an hour."""
    (method, path), body, headers, query = request
    content = body if method == "POST" else None
    async with server.client.stream(method, path, content=content, headers=headers, params=query) as answer:
        check(answer)
        if not answer.headers.get("content-type", "").startswith("text/event-stream"):
            text = (await answer.aread()).decode()
            assert "Traceback" not in text
            if answer.status_code >= 400 and method != "HEAD":
                assert answer.json()["code"].isupper()
        return answer.status_code


def check(answer: httpx2.Response) -> None:
    assert answer.status_code < 500, answer.status_code
    assert (answer.status_code >= 400) == (answer.headers.get("content-type") == "application/problem+json")


@slow
@given(REQUESTS)
async def test_no_request_is_too_strange(requests: list[Any]) -> None:
    async with serving() as server:
        await server.start("count", 3, run_id=EXISTING)
        statuses = [await status_of(server, request) for request in requests]
        assert all(200 <= status < 500 for status in statuses)
        last = blocks_of((await server.client.get(f"/v1/runs/{EXISTING}/stream")).text)[-1]
        assert (last.id, last.data) == (4, DONE)


HEADS = st.sampled_from(
    [
        b"",
        b"GET ",
        b"GET /v1/runs HTTP/1.1\r\n",
        b"POST /v1/runs HTTP/1.1\r\nhost: localhost\r\ntransfer-encoding: chunked\r\n\r\n",
        b"GET /v1/runs/there/stream HTTP/1.1\r\nhost: localhost\r\n",
        b"POST /v1/runs/there/stream HTTP/1.0\r\ncontent-length: 5\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
        b"GET /%00%FF%E2%28 HTTP/1.1\r\nhost: localhost\r\n\r\n",
        b"GET http://x/v1/runs HTTP/1.1\r\nhost: y\r\n\r\n",
    ]
)


@slow
@given(st.lists(st.tuples(HEADS, st.binary(max_size=100)), min_size=1, max_size=10))
async def test_no_bytes_are_too_strange(garbage: list[tuple[bytes, bytes]]) -> None:
    config = quiet_config()
    config.keep_alive_timeout = 0.2  # so long it holds on to a connection that was only half closed
    async with serving(config=config, complains=True) as server:  # Hypercorn has its own opinion of such bytes
        await server.start("count", 3, run_id=EXISTING)
        for head, rest in garbage:
            async with await server.wire() as wire:
                await wire.stream.send_all(head + rest)
                await wire.stream.send_eof()
                assert b"Traceback" not in await wire.rest()
        assert len(blocks_of((await server.client.get(f"/v1/runs/{EXISTING}/stream")).text)) == 4
        assert server.observer.errors == []
