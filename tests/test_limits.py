"""Every limit at its edge: what is exactly at it works, one more is refused, and there is room again afterwards."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, Final

import jwt
import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock import Event, MemoryLog, Supervisor, open_supervisor
from penstock.asgi.auth import ALGORITHM, AUDIENCE, MAX_LINK, Links, new_secret
from penstock.asgi.requests import MAX_LIST, MAX_REASON
from penstock.errors import DurationTooLong, MetadataTooLarge, NotAuthenticated, TooManyRuns
from penstock.server.config import new_config
from penstock.sse import Decoder
from tests.support.connections import SOON, unharmed
from tests.support.http2_clients import WHOLE, Ends
from tests.support.serving import PRODUCERS, Tap, problem, quiet_config, serving
from tests.support.supervising import View, near, read, shielded, slow
from tests.support.wire import ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx2
    from h2.errors import ErrorCodes
    from hypercorn.config import Config
    from trio.testing import MockClock

    from tests.support.serving import Server

LIMIT: Final = 3
"""max_runs, where a test is about it."""


async def waits() -> AsyncIterator[Event]:
    await trio.sleep_forever()
    yield Event(data="never")


async def is_full(supervisor: Supervisor) -> None:
    """No run can be started, in any way, and a refused one leaves nothing."""
    before = len(await supervisor.list())
    with pytest.raises(TooManyRuns, match="max_runs"):
        await supervisor.start(waits)
    with pytest.raises(TooManyRuns, match="max_runs"):
        async with supervisor.open_run():
            raise AssertionError("it was opened")
    assert len(await supervisor.list()) == before


async def has_room(supervisor: Supervisor, places: int = 1) -> None:
    for _ in range(places):
        await supervisor.start(waits)
    await is_full(supervisor)


# Runs


async def test_as_many_runs_as_are_allowed_start_and_an_ended_one_makes_room(autojump_clock: MockClock) -> None:
    async with open_supervisor(MemoryLog(), max_runs=LIMIT, drain_timeout=0) as supervisor:
        await has_room(supervisor, LIMIT)
        for run in await supervisor.list():
            await supervisor.cancel(run.id)
            await supervisor.wait(run.id)
            await wait_all_tasks_blocked()  # its end is stored before its producer's task is over
            await has_room(supervisor)


async def test_a_run_that_is_written_by_hand_counts_until_its_block_is_left(autojump_clock: MockClock) -> None:
    async with open_supervisor(MemoryLog(), max_runs=2, drain_timeout=0) as supervisor:
        async with supervisor.open_run():
            await has_room(supervisor)
        await has_room(supervisor)


async def test_starts_that_are_under_way_count_also_if_they_come_to_nothing(autojump_clock: MockClock) -> None:
    view = View()
    view.before["start"] = slow(5)
    async with open_supervisor(view, max_runs=LIMIT, drain_timeout=0) as supervisor:
        refused = 0

        async def start() -> None:
            nonlocal refused
            try:
                await supervisor.start(waits)
            except TooManyRuns:
                refused += 1

        async with trio.open_nursery() as nursery:
            for _ in range(2 * LIMIT):
                nursery.start_soon(start)
            await wait_all_tasks_blocked()
            assert (refused, view.calls["start"]) == (LIMIT, LIMIT)
            nursery.cancel_scope.cancel()
        view.before.clear()
        await has_room(supervisor, LIMIT)


async def test_a_producer_that_does_not_let_go_counts_for_as_long_as_it_holds_on(autojump_clock: MockClock) -> None:
    lets_go = trio.Event()

    async def holds_on() -> AsyncIterator[Event]:
        await shielded(lets_go)
        yield Event(data="late")

    async with open_supervisor(MemoryLog(), max_runs=1, cancel_grace=1, drain_timeout=0) as supervisor:
        run = await supervisor.start(holds_on)
        await supervisor.cancel(run.id)
        assert (await supervisor.wait(run.id)).status == "cancelled"
        assert (supervisor.live_runs, len(supervisor.stuck)) == (0, 1)
        await is_full(supervisor)
        lets_go.set()
        await supervisor.let_go()
        await wait_all_tasks_blocked()
        await has_room(supervisor)


async def test_a_start_that_finds_its_run_under_its_key_takes_no_room(autojump_clock: MockClock) -> None:
    async with open_supervisor(MemoryLog(), max_runs=2, drain_timeout=0) as supervisor:
        first = await supervisor.start(waits, idempotency_key="k")
        for _ in range(5):
            assert (await supervisor.start(waits, idempotency_key="k")).id == first.id
        await has_room(supervisor)


async def test_a_start_that_was_refused_has_not_used_its_key(autojump_clock: MockClock) -> None:
    async with open_supervisor(MemoryLog(), max_runs=1, drain_timeout=0) as supervisor:
        other = await supervisor.start(waits)
        with pytest.raises(TooManyRuns):
            await supervisor.start_once(waits, idempotency_key="k")
        await supervisor.cancel(other.id)
        await supervisor.wait(other.id)
        await wait_all_tasks_blocked()
        assert (await supervisor.start_once(waits, idempotency_key="k")).created


async def test_a_start_that_is_refused_for_another_reason_takes_no_room(autojump_clock: MockClock) -> None:
    async with open_supervisor(MemoryLog(), max_runs=1, max_duration=5, drain_timeout=0) as supervisor:
        for wrong in ({"timeout": 6}, {"metadata": {1}}, {"run_id": "a/b"}):
            with pytest.raises(ValueError):  # noqa: PT011  (each its own words)
                await supervisor.start(waits, **wrong)
        await has_room(supervisor)


async def test_over_http_one_run_too_many_is_answered_503_and_told_to_come_again() -> None:
    tap = Tap()
    async with serving({**PRODUCERS, "tap": tap}, max_runs=2) as server:
        await server.start("silent")
        run_id = await server.start("tap")
        for members in ({}, {"stream": True}):
            answer = await server.client.post("/v1/runs", json={"producer": "silent", **members})
            assert "as many runs" in problem(answer, 503, "TOO_MANY_RUNS")["detail"]
            assert int(answer.headers["retry-after"]) > 0
        assert len((await server.client.get("/v1/runs")).json()["runs"]) == 2
        assert (await server.client.get("/healthz")).status_code == 200
        tap.end()
        await server.ended_run(run_id)
        await wait_all_tasks_blocked()
        await server.start("silent")


# How long a run may take


@pytest.mark.parametrize("timeout", [None, 10, 10.0])
async def test_a_run_ends_when_it_has_taken_as_long_as_a_run_may(autojump_clock: MockClock, timeout: float) -> None:
    async with open_supervisor(MemoryLog(), max_duration=10, drain_timeout=0) as supervisor:
        run = await supervisor.wait((await supervisor.start(waits, timeout=timeout)).id)
        assert trio.current_time() == near(10)
        assert (run.status, run.stop_reason, run.error and run.error.code) == ("failed", "timeout", "TIMEOUT")


async def test_a_longer_timeout_is_refused_before_there_is_a_run(autojump_clock: MockClock) -> None:
    async with open_supervisor(MemoryLog(), max_duration=10) as supervisor:
        for timeout in (10.001, 11, 1e300):
            with pytest.raises(DurationTooLong, match="10 s"):
                await supervisor.start(waits, timeout=timeout)
            with pytest.raises(DurationTooLong, match="10 s"):
                async with supervisor.open_run(timeout=timeout):
                    raise AssertionError("it was opened")
        assert not await supervisor.list()


async def test_without_that_limit_a_run_takes_as_long_as_it_likes(autojump_clock: MockClock) -> None:
    async def long() -> AsyncIterator[Event]:
        await trio.sleep(20)
        yield Event(data="at last")

    async with open_supervisor(MemoryLog(), max_duration=0) as supervisor:
        for timeout in (None, 1e300):
            run = await supervisor.start(long, timeout=timeout)
            assert (await supervisor.wait(run.id)).status == "completed"


async def test_over_http_a_timeout_that_is_too_long_is_a_bad_request() -> None:
    async with serving(max_duration=10) as server:
        for timeout in (10.001, 1e300):
            answer = await server.client.post("/v1/runs", json={"producer": "silent", "timeout": timeout})
            assert "max_duration" in problem(answer, 400, "DURATION_TOO_LONG")["detail"]
        await server.start("silent", timeout=10)


# Metadata


def metadata_of(size: int, letter: str) -> dict[str, str]:
    """Metadata full of this letter, of exactly so many bytes as JSON in UTF-8."""
    room = size - len(json.dumps({"a": ""}))
    letters = letter * (room // len(json.dumps(letter, ensure_ascii=False)[1:-1].encode()))
    return {"a": letters + "x" * (room - len(json.dumps(letters, ensure_ascii=False)[1:-1].encode()))}


@pytest.mark.parametrize("letter", ["é", "\U0001f600", "\n"])
async def test_metadata_may_have_so_many_bytes_in_utf8_and_not_one_more(letter: str) -> None:
    async with open_supervisor(MemoryLog(), max_metadata_bytes=1000, drain_timeout=0) as supervisor:
        fits, large = metadata_of(1000, letter), metadata_of(1001, letter)
        assert len(json.dumps(fits, ensure_ascii=False).encode()) == 1000
        run = await supervisor.start(waits, metadata=fits)
        assert (await supervisor.get(run.id)).metadata == fits
        with pytest.raises(MetadataTooLarge, match=r"at most 1000 bytes .* not 1001"):
            await supervisor.start(waits, metadata=large)
        with pytest.raises(MetadataTooLarge):
            async with supervisor.open_run(metadata=large):
                raise AssertionError("it was opened")
        assert len(await supervisor.list()) == 1


async def test_the_smallest_limit_still_allows_no_metadata() -> None:
    async with open_supervisor(MemoryLog(), max_metadata_bytes=2, drain_timeout=0) as supervisor:
        await supervisor.start(waits)
        await supervisor.start(waits, metadata={})
        with pytest.raises(MetadataTooLarge):
            await supervisor.start(waits, metadata={"": 1})


async def test_over_http_metadata_that_are_too_large_are_answered_413() -> None:
    async with serving(max_metadata_bytes=1000) as server:
        await server.start("silent", metadata=metadata_of(1000, "é"))
        large = {"producer": "silent", "metadata": metadata_of(1001, "é")}
        assert "1001" in problem(await server.client.post("/v1/runs", json=large), 413, "METADATA_TOO_LARGE")["detail"]
        assert len((await server.client.get("/v1/runs")).json()["runs"]) == 1


async def test_an_event_may_have_so_many_bytes_and_not_one_more(autojump_clock: MockClock) -> None:
    size = 1000
    async with open_supervisor(MemoryLog(), max_event_bytes=size) as supervisor:
        fits = Event(data="x" * (size - len(Event(data="").encode())))
        assert len(fits.encode()) == size

        async def yields(*events: Event) -> AsyncIterator[Event]:
            for event in events:
                yield event

        run = await supervisor.wait((await supervisor.start(yields, fits)).id)
        assert run.status == "completed"
        (message,) = Decoder().feed((await read(supervisor, run.id))[0].wire)
        assert message.data == fits.data
        run = await supervisor.wait((await supervisor.start(yields, fits, Event(data=f"{fits.data}x"))).id)
        assert (run.status, run.error and run.error.code) == ("failed", "EVENT_TOO_LARGE")
        assert len(await read(supervisor, run.id)) == 3  # the one that fits, the error, and the end


# What a request says


@pytest.mark.parametrize("cursor", ["9" * 18, "0" * 18])
async def test_a_cursor_and_a_tail_may_have_eighteen_digits_and_not_one_more(cursor: str) -> None:
    async with serving() as server:
        run_id = await server.start("count", 2)
        await server.ended_run(run_id)
        path = f"/v1/runs/{run_id}/stream"
        whole, nothing = (200, 204) if int(cursor) else (204, 200)
        for given, after, last in ((cursor, nothing, whole), (f"{cursor}0", 400, 400)):
            assert (await server.client.get(path, headers={"Last-Event-ID": given})).status_code == after
            assert (await server.client.get(path, params={"starting_after": given})).status_code == after
            assert (await server.client.post(path, json={"starting_after": given})).status_code == after
            assert (await server.client.get(path, params={"tail": given})).status_code == last
            assert (await server.client.post(path, json={"tail": given})).status_code == last
        number = {"starting_after": 10**18 - 1}
        assert (await server.client.post(path, json=number)).status_code == 204
        problem(await server.client.post(path, json={"starting_after": 10**18}), 400, "BAD_CURSOR")


@pytest.mark.parametrize("letter", ["\U0001f600"])
async def test_a_reason_may_have_so_many_characters_and_not_one_more(letter: str) -> None:
    async with serving() as server:
        run_id = await server.start("silent")
        path, reason = f"/v1/runs/{run_id}/cancel", letter * MAX_REASON
        problem(await server.client.post(path, json={"reason": reason + letter}), 400, "BAD_REQUEST")
        assert (await server.client.post(path, json={"reason": reason})).status_code == 202
        assert (await server.ended_run(run_id))["cancel_reason"] == reason


async def test_a_list_is_as_long_as_its_limit_says_from_one_to_a_thousand() -> None:
    async with serving() as server:
        for _ in range(3):
            await server.start("silent")
        for limit, length in ((1, 1), (2, 2), (MAX_LIST, 3)):
            answer = await server.client.get("/v1/runs", params={"limit": limit})
            assert len(answer.json()["runs"]) == length
        for limit in (0, MAX_LIST + 1):
            problem(await server.client.get("/v1/runs", params={"limit": limit}), 400, "BAD_LIMIT")


def test_a_link_may_have_so_many_characters_and_not_one_more() -> None:
    secret = new_secret()
    links = Links(secret)

    def padded(length: int) -> str:
        claims: dict[str, Any] = {"sub": "a", "aud": AUDIENCE, "exp": int(time.time()) + 3600}
        made = (jwt.encode({**claims, "pad": "x" * size}, secret, ALGORITHM) for size in range(length))
        return next(link for link in made if len(link) == length)

    assert links.run_of(padded(MAX_LINK)) == "a"
    with pytest.raises(NotAuthenticated, match=f"at most {MAX_LINK} characters"):
        links.run_of(padded(MAX_LINK + 1))


# Headers


HEADER_BYTES: Final = 2000
"""max_header_bytes, where a test is about it."""
ENDED: Final = "the connection has ended"


def config_of(max_header_bytes: int) -> Config:
    config, limits = quiet_config(), new_config(max_header_bytes)
    config.h11_max_incomplete_size = limits.h11_max_incomplete_size
    config.h2_max_header_list_size = limits.h2_max_header_list_size
    return config


def request_of(size: int) -> bytes:
    begin, end = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\nx: ", b"\r\n\r\n"
    return begin + b"x" * (size - len(begin) - len(end)) + end


async def ask(server: Server, *pieces: bytes) -> bytes:
    """The first line of the answer to a request that comes in these pieces, each of which the server has read."""
    async with await server.wire() as wire:
        for piece in pieces:
            await wire.stream.send_all(piece)
            await wait_all_tasks_blocked(0.01)
        return (await wire.rest()).partition(b" \r\n")[0]


async def test_over_http1_headers_may_have_so_many_bytes_and_not_one_more() -> None:
    async with unharmed(config=config_of(HEADER_BYTES)) as server:
        whole = request_of(HEADER_BYTES)
        assert await ask(server, whole) == b"HTTP/1.1 200"
        assert await ask(server, whole[:-1], whole[-1:]) == b"HTTP/1.1 200"
        unending = request_of(2 * HEADER_BYTES)[:HEADER_BYTES]
        assert await ask(server, unending, b"x") == b"HTTP/1.1 431"


async def test_over_http1_headers_that_are_too_large_are_refused_however_many_come_at_once() -> None:
    async with unharmed(config=config_of(HEADER_BYTES)) as server:
        for size in (HEADER_BYTES + 1, 2 * HEADER_BYTES, 10 * HEADER_BYTES, 60_000, 200_000):
            assert await ask(server, request_of(size)) == b"HTTP/1.1 431", size


async def healthz_with(stream: trio.SocketStream, size: int) -> str | ErrorCodes:
    """How a stream ends whose header list has this size (RFC 9113, 6.5.2); if the connection does, with `ENDED`."""
    client = Ends(stream)
    fields = {":method": "GET", ":path": "/healthz", ":scheme": "http", ":authority": "localhost", "x": ""}
    rest = size - sum(len(name) + len(value) + 32 for name, value in fields.items())
    number = await client.get("/healthz", x="x" * rest)
    with trio.fail_after(SOON):
        try:
            while number not in client.over:
                await client.receive()
        except (trio.EndOfChannel, trio.BrokenResourceError):
            return ENDED
    assert client.headers[number][":status"] == "200"
    return client.ends[number]


@pytest.mark.parametrize("limit", [HEADER_BYTES, 66_000])
async def test_over_http2_headers_may_have_so_many_bytes_and_one_more_ends_their_connection_alone(limit: int) -> None:
    async with unharmed(config=config_of(limit)) as server:
        for size, how in ((limit, WHOLE), (limit + 1, ENDED)):
            async with await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
                assert await healthz_with(stream, size) == how, size


async def in_pieces(server: Server, size: int, piece: int) -> httpx2.Response:
    body = b'{"producer": "count", "input": 1}'.ljust(size)

    async def pieces() -> AsyncIterator[bytes]:
        for start in range(0, size, piece):
            yield body[start : start + piece]

    return await server.client.post("/v1/runs", content=pieces())


@pytest.mark.parametrize("piece", [10, 1000, 1001])
async def test_a_body_of_any_pieces_may_have_so_many_bytes_and_not_one_more(piece: int) -> None:
    async with serving(max_body_bytes=1000) as server:
        assert (await in_pieces(server, 1000, piece)).status_code == 201
        problem(await in_pieces(server, 1001, piece), 413, "BODY_TOO_LARGE")
        problem(await in_pieces(server, 100_000, 10 * piece), 413, "BODY_TOO_LARGE")
        assert ids(await server.read(await server.start("count", 2))) == [1, 2, 3]


async def test_over_http2_a_body_may_have_so_many_bytes_and_not_one_more() -> None:
    async with unharmed(max_body_bytes=1000) as server, await trio.open_tcp_stream("127.0.0.1", server.port) as stream:
        client = Ends(stream)
        for size, status in ((1000, "201"), (1001, "413"), (10_000, "413")):
            number = client.begin("POST", "/v1/runs")
            client.h2.send_data(number, b'{"producer": "count", "input": 1}'.ljust(size), end_stream=True)
            await client.send()
            await client.whole_body(number)
            assert (client.headers[number][":status"], client.ends[number]) == (status, WHOLE)
