"""A browser reads runs: many streams on one HTTP/2 connection, a cut connection, and the 204 at the end."""

from __future__ import annotations

import socket
import struct
from typing import TYPE_CHECKING

import pytest

from penstock import Event
from tests.support.browser import WHY_NOT, browsing, executable
from tests.support.serving import Tap, eventually
from tests.support.wire import DONE

if TYPE_CHECKING:
    from tests.support.serving import Server

pytestmark = pytest.mark.skipif(executable() is None, reason=WHY_NOT)

HTTP2 = ("h2", "http/1.1")


class HurriedTap(Tap):
    """A producer whose readers come back at once."""

    def __init__(self) -> None:
        super().__init__()
        self._feed.send_nowait(Event(data="first", retry=50))


def cut(server: Server) -> None:
    """Reset all connections, without a word."""
    for task in server.connections():
        frame = task.coro.cr_frame
        assert frame is not None
        sock = frame.f_locals["stream"].transport_stream.socket
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()


async def test_a_browser_reads_eight_streams_at_once_over_one_http2_connection() -> None:
    taps = {str(number): HurriedTap() for number in range(8)}
    async with browsing(taps, *HTTP2) as (_server, site):
        await eventually(lambda: [asked.status for asked in site.asked] == [200] * 8)
        assert len(site.open) == 8
        assert {asked.http_version for asked in site.asked} == {"2"}
        assert len({asked.connection for asked in site.asked}) == 1
        for tap in taps.values():
            tap.feed("second")
            tap.end()
        said = await site.said.receive()
        assert set(said["protocols"]) == {"h2"}
        for stream in said["streams"]:
            assert stream == {"opens": 1, "events": [["1", "first"], ["2", "second"], ["3", DONE]]}
        assert [(asked.last_event_id, asked.status) for asked in site.asked[8:]] == [("3", 204)] * 8


async def test_over_http1_a_browser_reads_six_streams_at_once_and_the_others_wait() -> None:
    taps = {str(number): HurriedTap() for number in range(8)}
    async with browsing(taps, "http/1.1") as (_server, site):
        await eventually(lambda: len(site.open) == 6)
        for tap in taps.values():
            tap.end()
        said = await site.said.receive()
        assert set(said["protocols"]) == {"http/1.1"}
        assert [stream["events"] for stream in said["streams"]] == [[["1", "first"], ["2", DONE]]] * 8
        assert site.most_open == 6


async def test_a_browser_whose_connection_is_cut_comes_back_with_its_cursor_and_stops_at_204() -> None:
    tap = HurriedTap()
    async with browsing({"tap": tap}, *HTTP2, tells=True) as (server, site):
        tap.feed("second")
        assert [await site.said.receive() for _ in range(2)] == [{"event": "first"}, {"event": "second"}]
        cut(server)
        await eventually(lambda: len(site.asked) == 2)
        tap.feed("third")
        tap.end()
        while "streams" not in (said := await site.said.receive()):
            pass
        (stream,) = said["streams"]
        assert [data for _, data in stream["events"]] == ["first", "second", "third", DONE]
        assert [id_ for id_, _ in stream["events"]] == ["1", "2", "3", "4"]
        assert stream["opens"] == 2
        assert [(asked.last_event_id, asked.status) for asked in site.asked] == [(None, 200), ("2", 200), ("4", 204)]
        assert site.asked[0].connection != site.asked[1].connection
