"""Any request on any route: a client error or a limit's, no error of the server's, and nothing is left behind."""

from __future__ import annotations

import json
import logging
from contextlib import asynccontextmanager, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import pytest
import trio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from penstock import create_app
from penstock.asgi.auth import Links, Token, TokenAuthorizer
from tests.support.command_line import penstock
from tests.support.connections import BRIEF, SOON, brief_config
from tests.support.serving import PRODUCERS, eventually, serving
from tests.support.wire import DONE, blocks_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.support.serving import Server

several = settings(
    max_examples=2,
    deadline=None,
    derandomize=True,
    phases=(Phase.explicit, Phase.generate),  # shrinking starts a server for each step
    suppress_health_check=list(HealthCheck),
)
"""Each example is many requests to a server of its own."""

EXISTING: Final = "there"
TOKEN: Final = "x" * 24
MIB: Final = 1024 * 1024
LIMITED: Final = {"max_runs": 6, "max_readers": 6, "max_readers_per_run": 4}

# Requests

ROUTES: Final = {
    "/": ["GET", "HEAD"],
    "/v1/runs": ["GET", "POST"],
    f"/v1/runs/{EXISTING}": ["GET"],
    f"/v1/runs/{EXISTING}/stream": ["GET", "POST", "HEAD"],
    f"/v1/runs/{EXISTING}/link": ["POST"],
    f"/v1/runs/{EXISTING}/cancel": ["POST"],
    "/v1/producers": ["GET"],
    "/healthz": ["GET"],
    "/readyz": ["GET"],
    "/metrics": ["GET"],
}
METHODS: Final = st.sampled_from(["GET", "POST", "HEAD", "PUT", "DELETE", "OPTIONS", "TRACE"])
JSON: Final = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=8,
)
NUMBERS: Final = st.sampled_from([0, 1, -1, 1.5, 1e300, 10**17, 10**18, 10**310, "0", "2", "-1", "²", "", None, True])
MEMBERS: Final[dict[str, Any]] = {
    "producer": st.sampled_from([*PRODUCERS, "nobody", None]) | JSON,
    "input": st.integers(-2, 5) | JSON,
    "run_id": st.text("abAB09._:-", max_size=4) | JSON,
    "metadata": st.dictionaries(st.text(max_size=10), JSON, max_size=3) | JSON,
    "timeout": NUMBERS | JSON,
    "max_silence": NUMBERS | JSON,
    "stream": st.booleans() | JSON,
    "reason": st.text(max_size=30) | JSON,
    "expires_in": NUMBERS | JSON,
    "starting_after": NUMBERS | JSON,
    "tail": NUMBERS | JSON,
    "include_pings": st.sampled_from([True, False, "true", "0", "maybe"]) | JSON,
}
OBJECTS: Final = st.fixed_dictionaries({}, optional=MEMBERS)
BODIES: Final = st.one_of(
    OBJECTS.map(lambda body: json.dumps(body).encode()),
    OBJECTS.map(lambda body: json.dumps(body | {"producer": "count"}).encode()),
    JSON.map(lambda body: json.dumps(body).encode()),
    st.binary(max_size=200),
    st.sampled_from(["[" * 99 + "]" * 99, "[" * 5000 + "]" * 5000, '"' + "1" * 10_000 + '"', '"\\ud800"', "1e999"]).map(
        lambda value: f'{{"producer": "echo", "input": {value}}}'.encode()
    ),
)
TEXTS: Final = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), max_size=20).map(str.encode)
VALUES: Final = TEXTS | st.binary(max_size=20).map(lambda raw: bytes(b for b in raw if b >= 0x20 and b != 0x7F).strip())
NAMES: Final = ["last-event-id", "idempotency-key", "content-type", "accept", "cookie", "range", "origin", "x"]
SPECIAL: Final = [
    ("host", b"elsewhere.example:x"),
    ("origin", b"http://[x"),
    ("origin", b"null"),
    ("sec-fetch-site", b"cross-site"),
    ("authorization", b"Bearer \xff"),
    ("authorization", b"Basic eDp5"),
    ("last-event-id", b"1" * 10_000),
]
HEADERS: Final = st.lists(
    st.tuples(st.sampled_from(NAMES), VALUES) | st.sampled_from(SPECIAL), max_size=4, unique_by=lambda header: header[0]
).map(lambda headers: [(name.encode(), value) for name, value in headers])
LINKS: Final = ["eyJhbGciOiJub25lIn0.e30.", "a.b.c", "..", "W10.W10.W10", "eyJhbGciOiJIUzI1NiJ9.bnVsbA.AAAA"]
QUERIES: Final = st.dictionaries(
    st.sampled_from(["limit", "status", "starting_after", "tail", "include_pings", "link", "x"]),
    st.sampled_from(["", "0", "1", "-1", "running", "true", "1e3", "٣", "9" * 30, *LINKS]) | st.text(max_size=10),
    max_size=3,
)
TARGETS: Final = st.one_of(
    st.sampled_from([(method, path) for path, methods in ROUTES.items() for method in methods]),
    st.tuples(METHODS, st.sampled_from(list(ROUTES))),
    st.tuples(
        METHODS,
        st.lists(
            st.sampled_from(["/", "..", "%00", "%FF", "%2F", "there", "x" * 200, "@", "*", "stream"]), max_size=6
        ).map(lambda pieces: "/v1/runs/" + "".join(pieces)),
    ),
)


class Request(NamedTuple):
    """A request. A failing test does not print every byte of it."""

    target: tuple[str, str]
    body: bytes
    headers: list[tuple[bytes, bytes]]
    query: dict[str, str]

    def __repr__(self) -> str:
        return f"Request{tuple(self)!r:.300}"


REQUESTS: Final = st.builds(Request, TARGETS, BODIES, HEADERS, QUERIES)


# Servers


@contextmanager
def without_errors() -> Iterator[None]:
    """In the block no logger writes a line at ERROR."""
    records: list[str] = []

    class Errors(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            records.append(f"{record.name}: {record.getMessage()} {record.exc_info}")

    handler = Errors(logging.ERROR)
    logging.getLogger().addHandler(handler)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(handler)
    assert records == []


@asynccontextmanager
async def attacked(**options: Any) -> AsyncIterator[Server]:
    """A server with low limits, and a run. In the end no client has left anything behind, and it goes on serving."""
    with without_errors():
        async with serving(config=brief_config(), complains=True, **{**LIMITED, **options}) as server:
            server.client.headers.update({"authorization": f"Bearer {TOKEN}", "connection": "close"})
            await server.start("count", 3, run_id=EXISTING)
            await server.ended_run(EXISTING)
            server.service.limits.body_timeout = BRIEF
            yield server
            server.service.limits.body_timeout = SOON
            for run in (await server.client.get("/v1/runs", params={"status": "running"})).json()["runs"]:
                await server.client.post(f"/v1/runs/{run['id']}/cancel")
            supervisor = server.service.supervisor
            with trio.fail_after(SOON):
                await eventually(lambda: server.tasks() == 0 and not supervisor.live_runs)
            assert (await server.client.get("/healthz")).json() == {"status": "alive"}
            answer = await server.client.get(f"/v1/runs/{EXISTING}/stream")
            assert [block.data for block in blocks_of(answer.text)] == ["1", "2", "3", DONE]
            assert not server.ended.is_set()
            assert server.observer.errors == []
            assert [each.getMessage() for each in server.complaints if each.levelno >= logging.ERROR] == []


async def ask(server: Server, request: Request) -> None:
    """Send it, and check the response. A stream is left after its headers, since its run may take an hour."""
    (method, path), body, headers, query = request
    content = body if method in {"POST", "PUT"} else None
    async with server.client.stream(method, path, content=content, headers=headers, params=query) as answer:
        kind = answer.headers.get("content-type", "")
        if kind.startswith("text/event-stream"):
            return
        text = (await answer.aread()).decode()
        assert "Traceback" not in text
        assert answer.status_code < 500 or (answer.status_code == 503 and "TOO_MANY_" in text), answer.text
        if answer.status_code >= 400 and kind != "text/html; charset=utf-8":
            assert kind == "application/problem+json"
            assert method == "HEAD" or answer.json()["code"].isupper()


def test_no_route_is_left_out() -> None:
    paths = {getattr(route, "path", "") for route in create_app({}).routes}
    assert {path.replace("{run_id}", EXISTING) for path in paths} == set(ROUTES)


@pytest.mark.parametrize("guarded", [False, True])
@several
@given(st.lists(REQUESTS, min_size=25, max_size=40))
async def test_no_request_is_an_error_of_the_servers(guarded: bool, requests: list[Request]) -> None:
    authorizer = TokenAuthorizer({"a": Token.of(TOKEN)}, Links("s" * 32)) if guarded else None
    async with attacked(authorizer=authorizer) as server, trio.open_nursery() as nursery:
        for request in requests:
            nursery.start_soon(ask, server, request)


@several
@given(st.lists(st.binary(max_size=300), min_size=10, max_size=30))
async def test_no_bytes_are_an_error_of_the_servers(garbage: list[bytes]) -> None:
    async def throw(data: bytes) -> None:
        async with await server.wire() as wire:
            with suppress(trio.BrokenResourceError):
                await wire.stream.send_all(data)
                await wire.stream.send_eof()
            with trio.fail_after(SOON):
                assert b"Traceback" not in await wire.rest()

    async with attacked() as server, trio.open_nursery() as nursery:
        for each in garbage:
            nursery.start_soon(throw, each)
            nursery.start_soon(throw, f"GET /v1/runs/{EXISTING} HTTP/1.1\r\n".encode() + each)


# Memory


def resident(pid: int) -> int:
    """The memory of a process, in bytes."""
    status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmRSS:")[2].split()[0])


BIG: Final = b"x" * 60_000
STORM: Final = [
    b"GET /v1/runs/%d/stream HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n",
    b"GET /%d/nowhere HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx: " + BIG + b"\r\n\r\n",
    b"POST /v1/runs HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 60000\r\nx: %d\r\n\r\n" + BIG,
    b"POST /v1/runs/%d/cancel HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 2\r\n\r\n{}",
    b'POST /v1/runs HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 23\r\n\r\n{"producer": "%d"}',
]
WARM, ROUNDS, AT_ONCE = 20, 80, 10
GROWTH: Final = 6 * MIB
"""More than a process grows that keeps nothing, and less than one that keeps 20 KiB of each request."""


async def storm(port: int, rounds: int, first: int) -> None:
    """Each of those requests so many times, each with a number of its own."""

    async def one(number: int) -> None:
        for each in range(number, first + rounds, AT_ONCE):
            for request in STORM:
                async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
                    with suppress(trio.BrokenResourceError), trio.fail_after(SOON):
                        await stream.send_all(request.replace(b"%d", b"%07d" % each))
                        while await stream.receive_some():
                            pass

    async with trio.open_nursery() as nursery:
        for number in range(AT_ONCE):
            nursery.start_soon(one, first + number)


async def test_four_hundred_refused_requests_leave_a_process_as_large_as_it_was() -> None:
    async with penstock("serve", "--producers", "tests.support.serving:PRODUCERS", "--bind", "127.0.0.1:0") as program:
        port = int((await program.until(r"http://127\.0\.0\.1:(\d+)"))[1])
        await storm(port, WARM, 0)
        before = resident(program.process.pid)
        await storm(port, ROUNDS, WARM)
        assert resident(program.process.pid) - before < GROWTH
        assert "Traceback" not in program.words
