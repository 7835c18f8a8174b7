"""A connection ends with its client, and alone: each correction against the real server, with it and without it."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from random import Random
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from h2.connection import ConnectionState
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, H2Protocol
from hypercorn.trio.tcp_server import TCPServer
from trio.testing import wait_all_tasks_blocked

import penstock.http.server
from penstock.http import corrections
from penstock.http.corrections import Connection, Streams
from tests.connections import (
    LEAVING,
    SOON,
    Detached,
    Late,
    Places,
    Sending,
    asks_at_the_end,
    body,
    brief,
    change_of_mind,
    dying_servers,
    gone_from_http1,
    gone_from_http2,
    in_place_of,
    is_over_soon,
    jammed,
    joined,
    leave,
    misbehave,
    patient_config,
    post,
    readers,
    stays,
    unharmed,
    with_reset,
    with_tapped,
    with_waiting,
)
from tests.serving import Tap, eventually, family
from tests.stalling import Windows, as_it_is, buffer_of, served
from tests.test_http2 import Streams as Client
from tests.test_http2 import connected
from tests.wire import DONE, Reader, Wire, ids

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from hypercorn.config import Config

    from tests.serving import Server


# An answer that waits for an HTTP/2 client that is gone


@pytest.mark.parametrize("how", LEAVING)
@pytest.mark.parametrize(
    "path", ["/healthz", "/nowhere", "/v1/runs/{over}", "/v1/runs/{over}/stream", "/v1/runs/{running}/stream"]
)
async def test_an_answer_that_an_http2_client_has_not_taken_is_over_when_that_is_gone(path: str, how: str) -> None:
    async with unharmed() as server:
        over, running = await server.start("count", 3), await server.start("silent")
        await server.ended_run(over)
        async with joined(server) as (stream, task):
            client = Windows(stream)
            await client.until_headers(await client.get(path.format(over=over, running=running)))
            await wait_all_tasks_blocked(0.01)
            assert readers(server, running) == [1 if "running" in path else 0]
            await leave(client, how)
            await is_over_soon(task, server)
            assert readers(server, running) == [0]
        assert (await server.run(running))["status"] == "running"


@pytest.mark.parametrize("how", LEAVING)
async def test_without_the_correction_it_waits_for_ever(how: str) -> None:
    with as_it_is("H2Protocol"):
        async with brief() as server, joined(server) as (stream, task):
            client = Windows(stream)
            await client.until_headers(await client.get("/healthz"))
            await wait_all_tasks_blocked(0.01)
            await leave(client, how)
            assert await stays(task, server)
            (waits,) = family(task)
            assert "_handle" in waits.name


@pytest.mark.parametrize("how", LEAVING)
async def test_an_answer_that_comes_when_its_http2_client_is_gone_goes_nowhere(how: str) -> None:
    async with unharmed() as server:
        late = Late(server)
        async with joined(server) as (stream, task):
            await late.to(stream, how)
            await is_over_soon(task, server)


@pytest.mark.parametrize("how", LEAVING)
async def test_without_the_correction_that_answer_waits_for_ever(how: str) -> None:
    with as_it_is("H2Protocol"):
        async with brief() as server:
            late = Late(server)
            async with joined(server) as (stream, task):
                await late.to(stream, how)
                assert await stays(task, server)


# Upgrades


H2C: Final[dict[str, Any]] = {"upgrade": "h2c", "connection": "upgrade, http2-settings"}
SETTINGS: Final = {"good": "AAMAAABkAAQAoAAAAAIAAAAA", "no base64": "A", "half": "AAMA", "a bad value": "AAT_____"}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
async def test_a_request_that_offers_an_upgrade_to_http2_is_answered_over_http1(settings: str) -> None:
    async with unharmed() as server:
        run_id = await server.start("count", 3)
        async with joined(server) as (stream, task):
            wire = Wire(stream)
            for _ in range(2):  # and the connection goes on as it was
                wire.received = b""
                await wire.send("GET", f"/v1/runs/{run_id}/stream", **H2C, http2_settings=settings)
                answer = await wire.until(b"data: [DONE]\n\n", b"\r\n0\r\n\r\n")
                assert answer.startswith(b"HTTP/1.1 200")
                assert answer.count(b"id: ") == 4
            await stream.aclose()
            await is_over_soon(task, server)


async def test_a_connect_that_offers_an_upgrade_to_http2_ends_with_its_client() -> None:
    async with unharmed() as server, joined(server) as (stream, task):
        await stream.send_all(b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
        assert (await stream.receive_some()).startswith(b"HTTP/1.1 4")
        await stream.aclose()
        await is_over_soon(task, server)


async def test_without_the_correction_that_connect_never_ends() -> None:
    with as_it_is("H11Protocol"):
        async with brief() as server, joined(server) as (stream, task):
            await stream.send_all(b"CONNECT x:1 HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: h2c\r\n\r\n")
            assert (await stream.receive_some()).startswith(b"HTTP/1.1 101")
            await wait_all_tasks_blocked(0.01)
            await stream.aclose()
            assert await stays(task, server)


@pytest.mark.parametrize("settings", ["A", "AAMA", "AAT_____"])
async def test_without_the_correction_an_upgrade_to_http2_can_end_the_server(settings: str) -> None:
    with dying_servers() as (run, died), as_it_is("H11Protocol", "TCPServer"):
        async with brief(run=run, complains=True) as server, await server.wire() as wire:
            await wire.send("GET", "/healthz", **H2C, http2_settings=settings)
            with trio.fail_after(SOON):
                await server.ended.wait()
    assert len(died) == 1


async def test_http2_by_prior_knowledge_is_spoken_however_its_preface_is_cut() -> None:
    async with unharmed() as server:
        run_id = await server.start("count", 3)
        async with joined(server) as (stream, task):
            client = Client(stream)
            preface = client.h2.data_to_send()
            for start in range(len(preface)):
                await stream.send_all(preface[start : start + 1])
                await wait_all_tasks_blocked()
            assert ids(await client.whole(await client.get(f"/v1/runs/{run_id}/stream"))) == [1, 2, 3, 4]
            await leave(client, "goaway")
            await is_over_soon(task, server)


WEBSOCKET: Final[dict[str, Any]] = {
    "upgrade": "websocket",
    "connection": "upgrade",
    "sec_websocket_version": "13",
    "sec_websocket_key": "dGhlIHNhbXBsZSBub25jZQ==",
}


@pytest.mark.parametrize("path", ["/", "/v1/runs", "/v1/runs/{}/stream"])
async def test_a_websocket_is_refused_and_nothing_ends_but_its_connection(path: str) -> None:
    async with unharmed() as server:
        run_id = await server.start("silent")
        async with joined(server) as (stream, task):
            wire = Wire(stream)
            await wire.send("GET", path.format(run_id), **WEBSOCKET)
            assert (await wire.rest()).startswith(b"HTTP/1.1 403")
            await is_over_soon(task, server)
        assert (await server.run(run_id))["status"] == "running"


async def test_a_websocket_over_http2_is_refused_and_its_neighbour_goes_on() -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server, connected(server) as client:
        stays_open = await client.get(f"/v1/runs/{await server.start('tap')}/stream")
        while stays_open not in client.headers:
            await client.receive()
        number = client.h2.get_next_available_stream_id()
        pseudo = {":method": "CONNECT", ":protocol": "websocket", ":path": "/", ":scheme": "http", ":authority": "x"}
        client.h2.send_headers(number, [*pseudo.items(), ("sec-websocket-version", "13")])
        client.bodies[number] = b""
        await client.socket.send_all(client.h2.data_to_send())
        while number not in client.over:
            await client.receive()
        assert client.headers[number][":status"] == "403"
        tap.feed("goes on")
        tap.end()
        assert [block.data for block in await client.whole(stays_open)] == ["goes on", DONE]


# Who hears that a connection is lost


class TellsInTheSender(Connection):
    """As in Hypercorn: the task that cannot send tells all the responses so."""

    protocol_send = TCPServer.protocol_send


class ForgetsOne(Streams):
    """As in Hypercorn: if the telling is cut off, one response is told by nobody."""

    _close_stream = H2Protocol._close_stream


@pytest.mark.parametrize("how", LEAVING)
async def test_when_a_connection_is_lost_all_responses_hear_that_wait_to_send(how: str) -> None:
    async with unharmed() as server:
        run_ids = [await server.start("silent") for _ in range(8)]
        async with jammed(server, run_ids) as (client, task):
            await leave(client, how)
            with trio.fail_after(SOON):
                await eventually(lambda: readers(server, *run_ids) == [0] * 8)
            await is_over_soon(task, server)
        assert {run["status"] for run in (await server.client.get("/v1/runs")).json()["runs"]} == {"running"}


@pytest.mark.parametrize("how", LEAVING)
async def test_when_a_connection_is_lost_all_readers_hear_that_wait_for_a_window(how: str) -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server:
        run_id = await server.start("tap")
        tap.feed(*["x" * 10_000] * 10)
        async with joined(server) as (stream, task):
            client = Windows(stream)
            numbers = [await client.get(f"/v1/runs/{run_id}/stream") for _ in range(8)]
            await client.until_headers(*numbers)
            await wait_all_tasks_blocked(0.01)
            assert all(len(buffer_of(client, number).buffer) >= BUFFER_HIGH_WATER for number in numbers)
            assert readers(server, run_id) == [8]
            await leave(client, how)
            await is_over_soon(task, server)
            assert readers(server, run_id) == [0]
        assert (await server.run(run_id))["status"] == "running"


async def test_a_response_that_leaves_its_request_unread_keeps_no_other_from_hearing_of_the_loss() -> None:
    tap, over = Tap(), trio.Event()
    async with brief({"tap": tap}, complains=True) as server:
        with_waiting(server, over)
        run_id = await server.start("tap")
        async with joined(server) as (stream, _):
            client = Client(stream)
            number = post(client, "/waiting")
            reader = await client.get(f"/v1/runs/{run_id}/stream")
            while reader not in client.headers:
                await client.receive()
            for _ in range(30):  # more than are kept for it
                client.h2.send_data(number, b"x")
            await stream.send_all(client.h2.data_to_send())
            await wait_all_tasks_blocked(0.01)
            with_reset(stream)

        def told() -> bool:
            tap.feed("more")  # so that a send finds out
            return readers(server, run_id) == [0]

        try:
            with trio.fail_after(SOON):
                await eventually(told)
        finally:
            over.set()


@pytest.mark.parametrize("how", LEAVING)
async def test_without_the_corrections_some_of_them_never_do(how: str) -> None:
    with in_place_of(TCPServer=TellsInTheSender, H2Protocol=ForgetsOne):
        async with brief() as server:
            run_ids = [await server.start("silent") for _ in range(8)]
            async with jammed(server, run_ids) as (client, task):
                await leave(client, how)
                with trio.fail_after(SOON):
                    await eventually(lambda: sum(readers(server, *run_ids)) < 8)
                assert await stays(task, server)
                assert sum(readers(server, *run_ids)) > 0


# Requests that come early


class ReadsOn(Connection):
    """As in Hypercorn: what reads waits for the end of a response, whatever becomes of that."""

    _read_data = TCPServer._read_data


async def send_two(stream: trio.SocketStream, one: str, other: str) -> None:
    await stream.send_all(b"".join(b"GET %b HTTP/1.1\r\nhost: x\r\n\r\n" % path.encode() for path in (one, other)))


async def test_two_requests_that_come_at_once_are_answered_in_their_order() -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server:
        run_id = await server.start("tap")
        async with joined(server) as (stream, task):
            wire = Wire(stream)
            await send_two(stream, f"/v1/runs/{run_id}/stream", "/healthz")
            tap.feed("one")
            await wire.until(b"data: one\n\n")
            tap.feed("two")
            tap.end()
            first, _, second = (await wire.until(b"data: [DONE]\n\n", b'"status"')).partition(b"\r\n0\r\n\r\n")
            assert first.startswith(b"HTTP/1.1 200")
            assert first.endswith(b"data: [DONE]\n\n")
            assert b"data: two\n\n" in first
            assert second.startswith(b"HTTP/1.1 200")
            await stream.aclose()
            await is_over_soon(task, server)


async def leaves_early(server: Server, tap: Tap, how: str) -> trio.lowlevel.Task:
    """A client that sends a second request, and goes in the middle of the first answer; the connection's task."""
    run_id = await server.start("tap")
    async with joined(server, partial(trio.open_tcp_stream, "127.0.0.1")) as (stream, task):
        await send_two(stream, f"/v1/runs/{run_id}/stream", "/healthz")
        tap.feed("first")
        await Wire(stream).until(b"data: first\n\n")
        await eventually(lambda: readers(server, run_id) == [1])
        if how == "reset":
            with_reset(stream)

    def gone() -> bool:
        tap.feed("more")  # nobody reads, so only a send finds out
        return readers(server, run_id) == [0]

    with trio.fail_after(SOON):
        await eventually(gone)
    assert (await server.run(run_id))["status"] == "running"
    return task


@pytest.mark.parametrize("how", ["close", "reset"])
async def test_a_client_that_sent_a_second_request_early_takes_its_connection_along(how: str) -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server:
        await is_over_soon(await leaves_early(server, tap, how), server)


@pytest.mark.parametrize("kind", [ReadsOn, TellsInTheSender])
@pytest.mark.parametrize("how", ["close", "reset"])
async def test_without_the_correction_it_leaves_its_connection_behind(how: str, kind: type[Connection]) -> None:
    tap = Tap()
    with in_place_of(TCPServer=kind):
        async with brief({"tap": tap}) as server:
            task = await leaves_early(server, tap, how)
            with trio.fail_after(SOON):
                await eventually(lambda: not family(task))  # no response is left that could wake it
            assert await stays(task, server)


# Sends while a connection is being closed


@pytest.mark.parametrize("client", [Sending.over_http1, Sending.over_http2])
async def test_a_send_that_meets_the_end_of_its_connection_ends_quietly(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with unharmed() as server, joined(server) as (stream, task):
        await client(Sending(server, monkeypatch), stream)
        await is_over_soon(task, server)


async def test_without_the_correction_it_is_an_error_of_the_application(monkeypatch: pytest.MonkeyPatch) -> None:
    with in_place_of(TCPServer=TellsInTheSender):
        async with brief(complains=True) as server, joined(server) as (stream, task):
            await Sending(server, monkeypatch).over_http1(stream)
            await is_over_soon(task, server)
    (said,) = server.complaints
    assert said.exc_info
    assert "BusyResourceError" in repr(said.exc_info[1])


async def test_without_the_corrections_it_ends_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    with dying_servers() as (run, died), as_it_is("TCPServer"):
        async with brief(run=run, complains=True) as server, joined(server) as (stream, _):
            await Sending(server, monkeypatch).over_http2(stream)
            with trio.fail_after(SOON):
                await server.ended.wait()
    assert [type(error) for error in died] == [trio.BusyResourceError]


# Many requests on one connection


REQUESTS: Final = 1_100


async def asks_often(client: Client) -> int:
    """Make more requests than Hypercorn lets one connection have by default; how many are answered."""
    for answered in range(REQUESTS):
        number = await client.get("/healthz")
        while number not in client.over:
            if client.h2.state_machine.state is ConnectionState.CLOSED:
                return answered  # it has been told to go away
            await client.receive()
        assert client.headers[number][":status"] == "200"
    return REQUESTS


async def test_a_stream_goes_on_whatever_is_asked_beside_it() -> None:
    tap = Tap()
    async with unharmed({"tap": tap}) as server, connected(server) as client:
        number = await client.get(f"/v1/runs/{await server.start('tap')}/stream")
        tap.feed("before")
        await client.blocks(number, 1)
        assert await asks_often(client) == REQUESTS
        tap.feed("after")
        tap.end()
        assert [block.data for block in await client.whole(number)] == ["before", "after", DONE]


async def test_without_the_correction_it_falls_silent(monkeypatch: pytest.MonkeyPatch) -> None:
    def correct(config: Config, warn: Any) -> Any:
        limit = config.keep_alive_max_requests
        sends = corrections.correct(config, warn)
        config.keep_alive_max_requests = limit
        return sends

    monkeypatch.setattr(penstock.http.server, "correct", correct)
    tap = Tap()
    async with brief({"tap": tap}) as server, connected(server) as client:
        run_id = await server.start("tap")
        number = await client.get(f"/v1/runs/{run_id}/stream")
        tap.feed("before")
        await client.blocks(number, 1)
        assert await asks_often(client) < REQUESTS
        assert readers(server, run_id) == [1]
        tap.feed("after")
        tap.end()
        rest = await Wire(client.socket).rest()  # all that comes until the server closes it
        assert b"after" not in rest
        assert DONE.encode() not in rest


# Requests during a shutdown


class Spreads(Connection):
    """As in Hypercorn: an error in a connection is everybody's."""

    run = TCPServer.run


@pytest.mark.parametrize("ask", [body, change_of_mind])
async def test_a_request_during_a_shutdown_ends_its_own_connection_at_most(ask: Any) -> None:
    async with brief(config=patient_config(), complains=True) as server:
        received = await asks_at_the_end(server, ask, Tap())
        await server.ended.wait()
    assert b"data: after\n\n" in received
    assert received.endswith(b"\r\n0\r\n\r\n")
    assert not [record for record in server.complaints if record.exc_info]


@pytest.mark.parametrize("ask", [body, change_of_mind])
async def test_without_the_correction_it_ends_the_others_too(ask: Any) -> None:
    with dying_servers() as (run, died), in_place_of(TCPServer=Spreads):
        async with brief(config=patient_config(), run=run, complains=True) as server:
            received = await asks_at_the_end(server, ask, Tap())
            await server.ended.wait()
    assert b"data: after\n\n" not in received
    assert len(died) == 1


async def comes_early_at_the_end(server: Server, stream: trio.SocketStream) -> None:
    """A second request, behind one whose answer ends when the server does."""
    tap, wire = Tap(), Wire(stream)
    with_tapped(server, tap)
    await send_two(stream, "/tapped", "/healthz")
    tap.feed("before")
    await wire.until(b"data: before\n\n")
    server.shutdown.set()
    await eventually(served(stream).context.terminated.is_set)
    tap.end()
    assert (await wire.rest()).endswith(b"\r\n0\r\n\r\n")


async def test_a_second_request_that_came_early_does_not_hold_up_a_shutdown() -> None:
    async with brief(config=patient_config()) as server, joined(server) as (stream, task):
        await comes_early_at_the_end(server, stream)
        await is_over_soon(task, server)


@pytest.mark.parametrize("kind", [ReadsOn, TellsInTheSender])
async def test_without_the_correction_it_does(kind: type[Connection]) -> None:
    with in_place_of(TCPServer=kind):
        async with brief(config=patient_config(2.0)) as server, joined(server) as (stream, task):
            await comes_early_at_the_end(server, stream)
            assert await stays(task, server)


# Sources that outlive their client


@pytest.mark.parametrize("before", [1, 10_000])
@pytest.mark.parametrize(
    "client, how", [*((gone_from_http1, how) for how in LEAVING[:2]), *((gone_from_http2, how) for how in LEAVING)]
)
async def test_a_detached_source_runs_to_its_end_in_its_task_when_its_client_is_gone(
    client: Any, how: str, before: int
) -> None:
    async with unharmed() as server:
        source = Detached(server, before, after=1000)
        async with joined(server) as (stream, task):
            await client(stream, how)
            assert source.yielded < before or before == 1  # if there is much, it waits in a send
            with trio.fail_after(SOON):
                await eventually(lambda: source.yielded >= before)
                assert await stays(task, server)
                source.go_on.set()
                await source.over.wait()
            await is_over_soon(task, server)
        assert source.yielded == before + 1000


# A crowd


CROWD: Final = 200
AT_ONCE: Final = 20
READERS: Final = 10


async def reads_on(stream: Any, path: str, *, speaks_http2: bool, started: Callable[[], None]) -> list[int]:
    """A reader who behaves well: the ids that it is sent, to the end."""
    if speaks_http2:
        client = Client(stream)
        number = await client.get(path)
        while number not in client.headers:
            await client.receive()
        started()
        return ids(await client.whole(number))
    reader = Reader(Wire(stream))
    await reader.ask("GET", path, {}, b"")
    started()
    return ids(await reader.rest())


@pytest.mark.parametrize("seed", [1, 2])
async def test_a_crowd_that_comes_and_goes_leaves_nothing_and_readers_see_everything(seed: int, tmp_path: Path) -> None:
    random, tap, here = Random(seed), Tap(), Places(tmp_path)
    knobs: dict[str, Any] = {"config": here.config, "run": here.run, "ping_interval": 0.1}
    async with brief({"tap": tap}, **knobs) as server:
        run_id, other = await server.start("tap"), await server.start("silent")
        path = f"/v1/runs/{run_id}/stream"
        paths = [path, f"/v1/runs/{other}/stream", "/v1/runs", "/healthz", "/nowhere"]
        seen: list[list[int]] = []
        ready = trio.Semaphore(0)

        async def read(number: int) -> None:
            tls, http2 = number % 2 == 0, number % 4 != 1
            async with await here.connect(tls=tls) as stream:
                seen.append(await reads_on(stream, path, speaks_http2=http2, started=ready.release))

        async def come_and_go(seat: trio.Semaphore, behaviour: Random) -> None:
            tls, http2 = behaviour.choice([(False, False), (False, True), (True, True)])
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
                await misbehave(await here.connect(tls=tls), behaviour, paths, speaks_http2=http2)
            tap.feed("one more")
            seat.release()

        async with trio.open_nursery() as nursery:
            for number in range(READERS):
                nursery.start_soon(read, number)
            for _ in range(READERS):
                await ready.acquire()
            await eventually(lambda: len(server.connections()) == READERS)
            theirs = set(server.connections())
            seats = trio.Semaphore(AT_ONCE)
            async with trio.open_nursery() as crowd:
                for _ in range(CROWD):
                    await seats.acquire()
                    crowd.start_soon(come_and_go, seats, Random(random.random()))
            with trio.fail_after(SOON):
                await eventually(lambda: set(server.connections()) == theirs)
                await eventually(lambda: readers(server, run_id, other) == [READERS, 0])
            tap.end()
        assert seen == [list(range(1, CROWD + 2))] * READERS
        assert (await server.run(other))["status"] == "running"
