"""Whatever a client sends: an answer or a closed connection, no error of the server's, and nothing is left behind."""

from __future__ import annotations

import json
import logging
import random
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from penstock.asgi.auth import Links, Token, TokenAuthorizer
from tests.support.command_line import penstock
from tests.support.connections import BRIEF, SOON, brief_config
from tests.support.http2_clients import UNCHECKED, Ends
from tests.support.serving import eventually, serving
from tests.support.wire import DONE, blocks_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.support.serving import Server

hostile = settings(
    max_examples=5,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # a server for each step would make it slow to find a smaller example
    suppress_health_check=list(HealthCheck),
)
"""Each example is many requests to a server of its own."""

EXISTING: Final = "there"
TOKEN: Final = "x" * 24
MIB: Final = 1024 * 1024
LIMITED: Final = {"max_runs": 6, "max_readers": 6, "max_readers_per_run": 4}
NOT_IMPLEMENTED: Final = 501
"""The answer to a transfer coding that nobody knows (RFC 9112, 6.1)."""

# Requests

ROUTES: Final = [
    "/",
    "/v1/runs",
    f"/v1/runs/{EXISTING}",
    f"/v1/runs/{EXISTING}/stream",
    f"/v1/runs/{EXISTING}/link",
    f"/v1/runs/{EXISTING}/cancel",
    "/v1/producers",
    "/healthz",
    "/readyz",
    "/metrics",
]
"""Those of `app.routes`; a test looks that none is missing."""
METHODS: Final = ["GET", "HEAD", "POST", "PUT", "OPTIONS", "DELETE", "TRACE", "CONNECT", "PRI", "get", "X"]
PIECES: Final = st.sampled_from(
    [
        b"/",
        b"..",
        b"%00",
        b"%FF",
        b"%2F",
        b"%",
        b"?",
        b"#",
        b"there",
        b"x" * 200,
        b"[",
        b"]",
        b"@",
        b"*",
        b"//",
        b"\xff",
    ]
)
TARGETS: Final = st.one_of(
    st.sampled_from([*ROUTES, "/v1/runs/nobody/stream"]).map(str.encode),
    st.builds(lambda path, rest: path.encode() + b"".join(rest), st.sampled_from(ROUTES), st.lists(PIECES, max_size=4)),
    st.lists(PIECES, max_size=6).map(lambda pieces: b"/v1/runs/" + b"".join(pieces)),
    st.sampled_from([b"*", b"http://x/v1/runs", b"localhost:80", b"http://[x/v1/runs", b"//[/v1/runs", b""]),
)
MANY: Final = st.sampled_from(
    [b"1" * 1000, b"9" * 18, b"0", b"-1", b"1e9", b"\xd9\xa3", b"%00", b"%FF%FE", b"1;2", b"a=b"]
)
QUERY: Final = st.lists(
    st.tuples(
        st.sampled_from([b"starting_after", b"tail", b"limit", b"status", b"link", b"include_pings", b"%00", b"\xff"]),
        MANY,
    ).map(b"=".join),
    max_size=3,
).map(b"&".join)
URLS: Final = [b"http://[x", b"http://a]", b"//[", b"null", b"http://x:y", b"http://\xff", b"", b"http://localhost"]
HEADER: Final = st.one_of(
    st.tuples(st.sampled_from([b"origin", b"referer", b"host"]), st.sampled_from(URLS)),
    st.tuples(
        st.sampled_from([b"last-event-id", b"idempotency-key", b"cookie", b"range", b"x", b"forwarded"]),
        st.sampled_from([b"1" * 60_000, b"x" * 16_300, b"\xff\xfe", b"1", b"", b"1,2", b"=;=", b"bytes=0-"]),
    ),
    st.tuples(
        st.just(b"authorization"),
        st.sampled_from([b"Bearer " + TOKEN.encode(), b"Bearer", b"Bearer \xff", b"Basic eDp5", b"bearer x", b""]),
    ),
    st.tuples(st.just(b"content-length"), st.sampled_from([b"0", b"5", b"99999999999", b"-1", b"+5", b"5, 5", b"x"])),
    st.tuples(st.just(b"transfer-encoding"), st.sampled_from([b"chunked", b"gzip, chunked", b"identity", b"x"])),
    st.tuples(st.just(b"content-type"), st.sampled_from([b"application/json", b"text/plain", b"\xff", b"a; b=c"])),
    st.tuples(st.just(b"sec-fetch-site"), st.sampled_from([b"none", b"cross-site", b""])),
    st.tuples(st.just(b"upgrade"), st.sampled_from([b"websocket", b"h2c", b"x"])),
    st.tuples(
        st.just(b"connection"), st.sampled_from([b"upgrade", b"close", b"keep-alive", b"upgrade, http2-settings"])
    ),
    st.tuples(st.just(b"http2-settings"), st.sampled_from([b"AAMAAABk", b"!", b""])),
    st.tuples(st.just(b"expect"), st.sampled_from([b"100-continue", b"x"])),
    st.tuples(st.just(b"sec-websocket-version"), st.just(b"13")),
    st.tuples(st.just(b"sec-websocket-key"), st.sampled_from([b"dGhlIHNhbXBsZSBub25jZQ==", b"x"])),
)
HEADERS: Final = st.lists(HEADER, max_size=5)


def member(name: str, value: str) -> bytes:
    return f'{{"producer": "echo", "input": 1, "{name}": {value}}}'.encode()


VALUES: Final = [
    "9" * 500,
    "1e308",
    "1e999",
    "-0",
    '"\\u0000"',
    '"\\ud800"',
    "[" * 99 + "]" * 99,
    "[" * 5000 + "]" * 5000,
    '{"a":' * 5000 + "1" + "}" * 5000,
    '"' + "1" * 10**6 + '"',
    "null",
    "NaN",
]
BODIES: Final = st.one_of(
    st.builds(
        member,
        st.sampled_from(
            [
                "input",
                "run_id",
                "metadata",
                "timeout",
                "stream",
                "starting_after",
                "tail",
                "reason",
                "expires_in",
                "producer",
            ]
        ),
        st.sampled_from(VALUES),
    ),
    st.sampled_from([b"", b"{}", b"\0" * 100, b"\xff\xfe{}", b'{"producer": "silent"}', b"5\r\n{}\r\n0\r\n\r\n"]),
    st.binary(max_size=50),
)
VERSIONS: Final = st.sampled_from([b"1.1", b"1.1", b"1.1", b"1.0", b"0.9", b"2.0", b"9.9", b"x"])
LINKS: Final = [
    "eyJhbGciOiJub25lIn0.e30.",
    "a.b.c",
    "..",
    "W10.W10.W10",
    "%FF.%FF.%FF",
    "eyJhbGciOiJIUzI1NiJ9.bnVsbA.AAAA",
]
WEBSOCKET: Final = [(b"connection", b"upgrade"), (b"upgrade", b"websocket")]
NEARLY_GOOD: Final[st.SearchStrategy[Any]] = st.one_of(
    st.tuples(st.just("POST"), st.sampled_from(["/v1/runs", f"/v1/runs/{EXISTING}/stream"]), st.just(""), BODIES),
    st.tuples(
        st.just("GET"), st.sampled_from([*ROUTES, "/v1/runs/nobody/stream"]), st.sampled_from(LINKS), st.just(b"")
    ),
).map(lambda it: (it[0], it[1].encode(), b"link=" + it[2].encode(), [], it[3], b"1.1", True))
"""Requests with one thing wrong: the others rarely get that far."""
PARTS: Final = st.one_of(
    NEARLY_GOOD,
    st.tuples(
        st.just("GET"), TARGETS, QUERY, HEADERS.map(lambda more: [*WEBSOCKET, *more]), BODIES, VERSIONS, st.booleans()
    ),
    st.tuples(st.sampled_from(METHODS), TARGETS, QUERY, HEADERS, BODIES, VERSIONS, st.booleans()),
)


class Request(NamedTuple):
    """A request, of which a test that fails does not show every byte."""

    method: str
    target: bytes
    query: bytes
    headers: list[tuple[bytes, bytes]]
    body: bytes
    version: bytes
    framed: bool

    def __repr__(self) -> str:
        return f"Request{tuple(self)!r:.200}"


REQUESTS: Final = PARTS.map(lambda parts: Request(*parts))


def bytes_of(request: Request) -> bytes:
    """A request of HTTP/1, with whatever framing comes of it."""
    method, target, query, headers, body, version, framed = request
    lines = [b"%b %b HTTP/%b" % (method.encode(), target + (b"?" + query if query else b""), version)]
    lines += [b"host: localhost"] * (b"host" not in dict(headers))
    lines += [b"%b: %b" % header for header in headers]
    lines += [b"content-length: %d" % len(body)] * framed
    return b"\r\n".join([*lines, b"", b""]) + body


# Servers


class _Errors(logging.Handler):
    """What anybody logs as an error."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.records.append(f"{record.name}: {record.getMessage()} {record.exc_info}")


@contextmanager
def without_errors() -> Iterator[None]:
    """In the block no logger has a line at ERROR."""
    errors = _Errors()
    logging.getLogger().addHandler(errors)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(errors)
    assert errors.records == []


def kept(server: Server) -> tuple[int, int, int]:
    """What a server has to do: tasks of connections, readers, and tails of runs."""
    services = server.service.supervisor._services
    return server.tasks(), services.readers.live, len(services.tails.all()) - len(services.live)


@asynccontextmanager
async def besieged(**knobs: Any) -> AsyncIterator[Server]:
    """A server with small limits, and a run; in the end nothing of the block's clients is left, and it serves on."""
    config = brief_config()
    with without_errors():
        async with serving(config=config, complains=True, **{**LIMITED, **knobs}) as server:
            server.client.headers["authorization"] = f"Bearer {TOKEN}"
            server.client.headers["connection"] = "close"
            await server.start("count", 3, run_id=EXISTING)
            await server.ended_run(EXISTING)
            server.service.limits.body_timeout = BRIEF
            yield server
            server.service.limits.body_timeout = SOON
            for run in (await server.client.get("/v1/runs", params={"status": "running"})).json()["runs"]:
                await server.client.post(f"/v1/runs/{run['id']}/cancel")
            with trio.fail_after(SOON):
                await eventually(lambda: kept(server) == (0, 0, 0) and not server.service.supervisor.live_runs)
            assert (await server.client.get("/healthz")).json() == {"status": "alive"}
            answer = await server.client.get(f"/v1/runs/{EXISTING}/stream")
            assert [block.data for block in blocks_of(answer.text)] == ["1", "2", "3", DONE]
            assert not server.ended.is_set()
            assert server.observer.errors == []
            assert [each.getMessage() for each in server.complaints if each.levelno >= logging.ERROR] == []


def authorizer() -> TokenAuthorizer:
    return TokenAuthorizer({"a": Token.of(TOKEN)}, Links("s" * 32))


def check(received: bytes) -> None:
    """Every answer on a connection is one that a client is to blame for, or a limit's."""
    assert b"Traceback" not in received
    for answer in received.split(b"HTTP/1.1 ")[1:]:
        status = int(answer[:3])
        assert status < 500 or status == NOT_IMPLEMENTED or (status == 503 and b"TOO_MANY_" in answer), answer[:500]


async def throw(server: Server, data: bytes) -> None:
    """Send this, and look at what comes until the server closes; a stream is left after its beginning."""
    async with await server.wire() as wire:
        with suppress(trio.BrokenResourceError):
            await wire.stream.send_all(data)
        with trio.fail_after(SOON), suppress(trio.BrokenResourceError):
            while b"text/event-stream" not in wire.received and (piece := await wire.stream.receive_some()):
                wire.received += piece
        check(wire.received)


def test_no_route_is_left_out() -> None:
    from penstock import create_app  # noqa: PLC0415

    paths = {getattr(route, "path", "") for route in create_app({}).routes}
    assert {path.replace("{run_id}", EXISTING) for path in paths} == set(ROUTES)


@pytest.mark.parametrize("guarded", [False, True])
@hostile
@given(st.lists(REQUESTS, min_size=60, max_size=80))
async def test_no_request_of_http1_is_an_error_of_the_servers(guarded: bool, requests: list[Any]) -> None:
    async with besieged(authorizer=authorizer() if guarded else None) as server, trio.open_nursery() as nursery:
        for request in requests:
            nursery.start_soon(throw, server, bytes_of(request))


@hostile
@given(st.lists(st.binary(max_size=300), min_size=10, max_size=30), st.integers(0, 2**32))
async def test_no_bytes_are_an_error_of_the_servers(garbage: list[bytes], seed: int) -> None:
    chance = random.Random(seed)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
    async with besieged() as server, trio.open_nursery() as nursery:
        for each in garbage:
            nursery.start_soon(throw, server, chance.choice([b"", b"", preface, preface[:18]]) + each)
        for size in (10, 1000, 100_000):
            nursery.start_soon(throw, server, chance.randbytes(size))


PSEUDO: Final = st.sampled_from([":method", ":path", ":scheme", ":authority", ":protocol", ":status", ":x"])
PIECES2: Final = st.sampled_from(
    ["", "x", "websocket", "http", "[", "\0", "\xff", "é", "/v1/runs", "GET", "*", "y" * 9000]
)
FIELDS2: Final = st.lists(
    st.tuples(PSEUDO | st.sampled_from(["host", "connection", "te", "X", "", "content-length", "cookie"]), PIECES2),
    max_size=4,
)


@hostile
@given(st.lists(st.tuples(REQUESTS, FIELDS2, st.booleans()), min_size=30, max_size=40))
async def test_no_request_of_http2_is_an_error_of_the_servers(requests: list[Any]) -> None:
    async def ask(request: Any, fields: Any, ends: Any) -> None:
        method, target, query, headers, body, *_ = request
        async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
            client = Ends(stream)
            for name, value in UNCHECKED.items():
                setattr(client.h2.config, name, value)
            number = client.h2.get_next_available_stream_id()
            client.bodies[number] = b""
            path = (target + b"?" + query).decode("latin-1")
            pseudo = [(":method", method), (":path", path), (":scheme", "http"), (":authority", "localhost")]
            named = [(name.decode(), value.decode("latin-1")) for name, value in headers]
            client.h2.send_headers(number, [*pseudo, *fields, *named], end_stream=ends)
            if not ends:
                client.h2.send_data(number, body[:16_000], end_stream=len(body) % 2 == 0)
            with suppress(trio.BrokenResourceError, trio.EndOfChannel), trio.fail_after(SOON):
                await client.send()
                while number not in client.over and "event-stream" not in str(client.headers.get(number)):
                    await client.receive()
            status = int(client.headers.get(number, {}).get(":status", 0))
            assert status < 500 or (status == 503 and b"TOO_MANY_" in client.bodies[number]), client.bodies

    async with besieged() as server, trio.open_nursery() as nursery:
        for request, fields, ends in requests:
            nursery.start_soon(ask, request, fields, ends)


# Requests that have been trouble


@pytest.mark.parametrize("value", ["http://[x", "http://a]", "//[", "http://[::1", "null", "http://x:y"])
async def test_an_origin_that_is_no_address_is_another_sites(value: str) -> None:
    async with besieged() as server:
        for path in ("/v1/runs", f"/v1/runs/{EXISTING}/stream", f"/v1/runs/{EXISTING}/cancel"):
            answer = await server.client.post(path, content=b"{}", headers={"origin": value})
            assert (answer.status_code, answer.json()["code"]) == (403, "CROSS_SITE")


@pytest.mark.parametrize("where", ["query", "body"])
@pytest.mark.parametrize("name", ["starting_after", "tail"])
async def test_a_cursor_of_a_million_characters_is_refused_wherever_it_stands(name: str, where: str) -> None:
    path, cursor = f"/v1/runs/{EXISTING}/stream", "1" * 10**6
    async with besieged() as server:
        if where == "query":
            await throw(server, f"GET {path}?{name}={cursor} HTTP/1.1\r\nhost: localhost\r\n\r\n".encode())
        else:
            answer = await server.client.post(path, content=json.dumps({name: cursor}).encode())
            assert answer.status_code == 400


# Memory


def resident(pid: int) -> int:
    """The memory that a process has, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


BIG: Final = b"x" * 60_000
STORM: Final = [
    b"GET /v1/runs/%d/stream HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
    b"GET /%d/nowhere HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx: " + BIG + b"\r\n\r\n",
    b"POST /v1/runs HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 60000\r\nx: %d\r\n\r\n" + BIG,
    b"POST /v1/runs/%d/cancel HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}",
    b'POST /v1/runs HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 23\r\n\r\n{"producer": "%d"}',
    b"%d \xff\xfe\r\n\r\n" + BIG,
    b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\x07\0\0\0\0\0\0%d" + BIG,
    b"GET / HTTP/1.1\r\nhost: %d\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n" + BIG,
]
WARM, ROUNDS, AT_ONCE = 40, 260, 10
GROWTH: Final = 24 * MIB
"""More than what a process takes that keeps nothing, and less than a storm of requests of which each leaves 20 KiB."""


async def storm(port: int, rounds: int, first: int) -> None:
    """Each of those requests so many times, each with a number of its own."""

    async def one(number: int) -> None:
        for each in range(number, first + rounds, AT_ONCE):
            for words in STORM:
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    with suppress(trio.BrokenResourceError), trio.fail_after(SOON):
                        await stream.send_all(words.replace(b"%d", b"%07d" % each))
                        while await stream.receive_some():
                            pass

    async with trio.open_nursery() as nursery:
        for number in range(AT_ONCE):
            nursery.start_soon(one, first + number)


async def test_thousands_of_hostile_requests_leave_a_process_as_large_as_it_was() -> None:
    async with penstock("serve", "--producers", "tests.support.serving:PRODUCERS", "--bind", "127.0.0.1:0") as program:
        port = int((await program.until(r"http://127\.0\.0\.1:(\d+)"))[1])
        await storm(port, WARM, 0)
        before = resident(program.process.pid)
        await storm(port, ROUNDS, WARM)
        grown = resident(program.process.pid) - before
        print(f"{len(STORM) * ROUNDS} requests: {grown / MIB:.1f} MiB")  # noqa: T201
        assert grown < GROWTH
        assert "Traceback" not in program.words
