"""EventStreamResponse on sockets: Hypercorn on Trio and asyncio, uvicorn; under Starlette, a middleware, FastAPI."""

from __future__ import annotations

import json
import socket
import struct
import uuid
from typing import TYPE_CHECKING

import pytest
from httpx2 import EventSource

from tests.support.servers import KINDS, SHUTTING_DOWN, Server, read_until, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    import httpx2


pytestmark = pytest.mark.xdist_group("response servers")  # so that each server is started once


@pytest.fixture(scope="module", params=KINDS)
def server(request: pytest.FixtureRequest) -> Iterator[Server]:
    with serving(request.param) as server:
        yield server


@pytest.fixture(params=["plain", "middleware", "fastapi"])
def at(request: pytest.FixtureRequest) -> str:
    return f"/{request.param}"


@pytest.fixture
def name() -> str:
    """What a test's marks begin with."""
    return uuid.uuid4().hex


def check_headers(response: httpx2.Response) -> None:
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-store"
    assert response.headers["x-accel-buffering"] == "no"
    assert "content-length" not in response.headers


def test_a_stream_and_an_error_arrive_whole(server: Server, at: str) -> None:
    with server.client.stream("GET", f"{at}/content") as response:
        check_headers(response)
        assert response.status_code == 200
        received = list(EventSource(response))
    assert [event.data for event in received] == ["one", "two", "three", "x" * 200_000]
    assert received[0].id == "1"
    empty, head, created = (
        server.client.request(*each)
        for each in (("GET", f"{at}/empty"), ("HEAD", f"{at}/content"), ("GET", f"{at}/status"))
    )
    for response, status, body in (
        (empty, 200, ""),
        (head, 200, ""),
        (created, 201, "data: created\n\ndata: more\n\n"),
    ):
        check_headers(response)
        assert (response.status_code, response.text) == (status, body)
    for path, status, code in (("fails", 500, "ERROR"), ("rejected", 409, "PENDING_APPROVAL")):
        response = server.client.get(f"{at}/{path}")
        assert (response.status_code, response.json()["code"]) == (status, code)
        assert response.headers["content-type"] == "application/problem+json"
        assert "secret" not in response.text
    with server.client.stream("GET", f"{at}/fails_later") as response:
        first, error, done = EventSource(response)
    assert (first.data, error.event, done.data) == ("one", "error", "[DONE]")
    assert "secret" not in error.data
    assert json.loads(error.data)["error_id"]


def test_d16_headers_come_before_a_late_first_chunk(server: Server, name: str) -> None:
    with server.client.stream("GET", "/middleware/headers_first", params={"name": name}) as response:
        check_headers(response)
        server.let(f"{name}.go")
        assert response.read() == b"data: late\n\n"


def test_pings_are_sent_on_silence(server: Server, name: str) -> None:
    with server.client.stream("GET", "/middleware/pings", params={"name": name}) as response:
        lines = response.iter_lines()
        assert [next(lines) for _ in range(6)] == ["data: first", "", ": ping", "", ": ping", ""]
        server.let(f"{name}.go")
        assert "data: last" in list(lines)


@pytest.mark.parametrize("how", ["close", "reset"])
def test_a_disconnect_cancels_the_source_and_its_finally_runs(server: Server, at: str, name: str, how: str) -> None:
    with server.connect(f"{at}/cancels?name={name}") as connection:
        read_until(connection, b"data: first\n\n")
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    server.wait_for(f"{name}.cancelled")
    server.wait_for(f"{name}.closed")


def test_a_disconnect_after_a_request_with_a_body_cancels_the_source(server: Server, name: str) -> None:
    parameters = {"name": name}
    with server.client.stream("POST", "/fastapi/cancels", params=parameters, content=b"x" * 100_000) as response:
        assert next(response.iter_lines()) == "data: first"
    server.wait_for(f"{name}.cancelled")


def test_a_disconnect_ends_a_source_that_never_waits(server: Server, at: str, name: str) -> None:
    with server.connect(f"{at}/floods?name={name}") as connection:
        read_until(connection, b"data: x\n\n")
    server.wait_for(f"{name}.closed")


def test_a_detached_source_runs_to_its_end_after_a_disconnect(server: Server, at: str, name: str) -> None:
    with server.connect(f"{at}/detaches?name={name}") as connection:
        read_until(connection, b"data: first\n\n")
    server.let(f"{name}.go")
    server.wait_for(f"{name}.ended")


def test_d14_at_a_shutdown_the_client_is_notified_and_the_server_ends(server: Server, name: str) -> None:
    # The last test of each server, which has ended after it.
    if server.kind not in SHUTTING_DOWN:
        pytest.skip("on Python 3.12 Hypercorn's asyncio worker lets open streams go on")
    with server.connect(f"/plain/cancels?name={name}") as connection:
        read_until(connection, b"data: first\n\n")
        server.shut_down()
        received = read_until(connection, b"data: [DONE]\n\n")
        assert b'"code":"INTERRUPTED"' in received
        server.ended()
