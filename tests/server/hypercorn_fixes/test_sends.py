"""What is being sent when its stream is cancelled, its connection closed, or its server shut down."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock.server.hypercorn_fixes import SendDeadline
from tests.support.connections import SOON, brief, is_over_soon, jammed, joined, served, unharmed
from tests.support.endpoints import with_endless, with_tapped
from tests.support.http2_clients import Http2
from tests.support.serving import Tap, eventually, serving
from tests.support.uncorrected import TellsInTheSender, as_it_is, dying_servers, in_place_of
from tests.support.wire import Wire, ids

if TYPE_CHECKING:
    from tests.support.serving import Server

# How long they may go on


async def test_sends_end_at_the_earliest_time_that_was_set_and_are_whole_until_then(
    autojump_clock: trio.testing.MockClock,
) -> None:
    sends = SendDeadline()
    ended: list[float] = []
    start = trio.current_time()

    async def send() -> None:
        with sends.shielded():
            await trio.sleep_forever()
        ended.append(trio.current_time() - start)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
        sends.end_by(start + 10)
        sends.end_by(start + 20)
    assert ended == [10]
    with trio.fail_after(1):
        await send()  # one that begins too late


# Cancelled in the middle


async def reads_all_of_another(client: Http2, server: Server) -> None:
    """What comes on this connection is in order: a stream of it is whole."""
    with trio.fail_after(SOON):
        run_id = await server.start("count", 50)
        number = await client.get(f"/v1/runs/{run_id}/stream")
        assert ids(await client.whole(number)) == list(range(1, 52))


async def test_an_answer_that_is_cancelled_in_mid_frame_leaves_other_streams_of_its_connection_whole() -> None:
    async with serving() as server:
        endless = with_endless(server)
        async with jammed(server) as (client, _):
            await client.reset(1)
            client.h2.ping(b"the last")
            await client.send()
            lock = served(client.socket).send_lock
            await eventually(lambda: lock.statistics().tasks_waiting > 0)  # so it has read the reset
            await wait_all_tasks_blocked(0.01)
            assert not endless.left
            await reads_all_of_another(client, server)


async def test_an_answer_that_is_cancelled_before_its_headers_are_sent_leaves_other_streams_whole() -> None:
    async with serving() as server:
        with_endless(server)
        async with jammed(server) as (client, _):
            lock = served(client.socket).send_lock
            second = await client.get("/endless?name=second")
            await eventually(lambda: lock.statistics().tasks_waiting == 1)
            await client.reset(second)
            protocol = served(client.socket).protocol.protocol
            await eventually(lambda: second not in protocol.streams)
            await wait_all_tasks_blocked(0.01)
            third = await client.get("/endless?name=second")
            await client.until_headers(third)
            assert client.headers[third]["x-name"] == "second"
            await reads_all_of_another(client, server)


# While the connection is being closed


class HeldEnd:
    """Connections that say that they send no more are held up in saying so, as busy ones may be, until `go_on`."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.begun = trio.Event()
        self.go_on = trio.Event()
        say = trio.SocketStream.send_eof

        async def send_eof(stream: trio.SocketStream) -> None:
            with stream._send_conflict_detector:
                self.begun.set()
                await self.go_on.wait()
            await say(stream)

        patch.setattr(trio.SocketStream, "send_eof", send_eof)


class Sending:
    """A stream whose next piece is about to be sent when its client ends the connection."""

    def __init__(self, server: Server, patch: pytest.MonkeyPatch) -> None:
        self._tap = Tap()
        self._end = HeldEnd(patch)
        with_tapped(server, self._tap)

    async def over_http1(self, stream: trio.SocketStream) -> None:
        """The client breaks off in its request's body with what is none."""
        wire = Wire(stream)
        await wire.send("POST", "/tapped", transfer_encoding="chunked")
        await stream.send_all(b"2\r\n{}\r\n")
        self._tap.feed("first")
        await wire.until(b"data: first\n\n")
        await self._meet(stream, b"zz\r\n")

    async def over_http2(self, stream: trio.SocketStream) -> None:
        """The client says goodbye, as each does that speaks HTTP/2."""
        client = Http2(stream)
        number = await client.get("/tapped")
        self._tap.feed("first")
        await client.blocks(number, 1)
        client.h2.close_connection()
        await self._meet(stream, client.h2.data_to_send())

    async def _meet(self, stream: trio.SocketStream, last_words: bytes) -> None:
        lock = served(stream).send_lock
        await lock.acquire()
        self._tap.feed("second")
        await eventually(lambda: lock.statistics().tasks_waiting == 1)
        await stream.send_all(last_words)
        await self._end.begun.wait()
        lock.release()
        await wait_all_tasks_blocked()
        self._end.go_on.set()
        with trio.fail_after(SOON):
            await self._tap.closed.wait()


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
    run, died = dying_servers()
    with as_it_is("TCPServer"):
        async with brief(run=run, complains=True) as server, joined(server) as (stream, _):
            await Sending(server, monkeypatch).over_http2(stream)
            with trio.fail_after(SOON):
                await server.ended.wait()
    assert [type(error) for error in died] == [trio.BusyResourceError]
