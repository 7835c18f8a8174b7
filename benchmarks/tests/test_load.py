"""The load generator sees what there is: every event of real streams, once, however its bytes come."""

from __future__ import annotations

import socket
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import pytest

from benchmarks.clients import held, rate, read, started_run, starting, stored_run, stream_of
from benchmarks.load import Load, LoadError
from benchmarks.processes import BenchmarkError, penstock, serving

if TYPE_CHECKING:
    from collections.abc import Iterator

    from benchmarks.processes import Server

COUNT = 3000
WHOLE = COUNT + 1
"""With the one that ends the run."""


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with serving(penstock(drain_timeout=0)) as server:
        yield server


@pytest.fixture(scope="module")
def burst(server: Server) -> str:
    """Where the stream of a run is that has ended."""
    return stream_of(server, stored_run(server, "burst", count=COUNT, size=100))


# Streams of penstock's


def test_every_event_of_a_burst_is_counted(burst: str) -> None:
    seen = read(burst)
    assert (seen["events"], seen["fewest"], seen["ended"]) == (WHOLE, WHOLE, 1)
    assert seen["bytes"] > COUNT * 100
    assert 0 < seen["seconds"] < 30
    assert "p50" not in seen


def test_a_missing_event_is_an_error(server: Server, burst: str) -> None:
    with pytest.raises(BenchmarkError, match=rf"{WHOLE} events of {WHOLE + 1}"):
        rate(server, burst, events=WHOLE + 1)


def test_a_reader_may_be_the_one_that_starts_the_run(server: Server) -> None:
    seen = read(f"{server.url}/v1/runs", readers=3, **starting("burst", count=100, size=5))
    assert (seen["events"], seen["fewest"], seen["ended"]) == (3 * 101, 101, 3)


def test_an_event_has_a_latency_for_each_reader(server: Server) -> None:
    url = stream_of(server, started_run(server, "ticks", rate=100, seconds=10))
    seen = read(url, readers=3, seconds=1, warm_up=0.2)
    assert seen["made"] == pytest.approx(100, abs=40)
    assert (seen["events"], seen["fewest"], seen["ended"]) == (3 * seen["made"], seen["made"], 0)
    assert 0 < seen["p50"] <= seen["p99"] <= seen["max"] < 10_000


def test_readers_are_held_until_the_block_is_left(server: Server) -> None:
    url = stream_of(server, started_run(server, "silence", seconds=600))
    with held(url, readers=5):
        assert connections(server) == 5
    assert connections(server) == 0


def connections(server: Server) -> int:
    """How many clients it has."""
    port = int(server.url.rpartition(":")[2])
    found = server.process.net_connections("tcp4")
    return sum(each.status == psutil.CONN_ESTABLISHED and each.laddr.port == port for each in found)


# Bytes, as they come

EVENTS = [
    b"id: 1\ndata: first t=1000;\n\n",
    b": data:none\n\n",
    b"event: x\ndata: t=2000;t=3;\n\n",
    b"data: \n\ndata: 0\n\n",
    b"data: [DONE]\n\n",
]
"""In the data of which there are three marks."""
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"


def chunked(*pieces: bytes) -> bytes:
    return HEAD + b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in (*pieces, b""))


@contextmanager
def connected() -> Iterator[tuple[Load, socket.socket]]:
    """A load generator with one reader, and the server's end of its connection."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        load = Load()
        load.connect([f"http://127.0.0.1:{listener.getsockname()[1]}/"], 1, method="GET", headers={})
        connection, _ = listener.accept()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with connection:
            yield load, connection
        for reader in load._readers.values():
            reader.connection.close()
        load._epoll.close()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 7, 11, 50, 10_000])
@pytest.mark.parametrize("joined", [False, True])
def test_what_comes_in_pieces_is_seen_once(size: int, joined: bool) -> None:
    answer = chunked(b"".join(EVENTS)) if joined else chunked(*EVENTS)
    with connected() as (load, connection):
        for first in range(0, len(answer), size):
            assert load.reading == 1
            connection.sendall(answer[first : first + size])
            load.take(10)
        assert (load.waiting, load.reading) == (0, 0)
        assert load.seen.marks == {1000, 2000, 3}
        assert len(load.seen.latencies) == 3


PLAIN = [b"id: %d\ndata: %d\n\n" % (number, number) for number in range(8, 13)]


def test_an_event_with_a_zero_at_its_end_does_not_end_the_stream() -> None:
    with connected() as (load, connection):
        connection.sendall(HEAD + b"10\r\nid: 1\ndata: 10\n\n\r\n")
        load.take(10)
        assert (load.seen.events, load.reading) == (1, 1)


def test_only_what_was_made_in_the_measured_time_is_counted() -> None:
    with connected() as (load, connection):
        load.measure(1000, 2000)
        connection.sendall(chunked(*(b"data: t=%d;\n\n" % mark for mark in (999, 1000, 1500, 2000, 2001))))
        load.take(10)
        assert load.seen.marks == {1000, 1500, 2000}
        assert (load.seen.events, load.fewest) == (3, 3)


def test_a_stream_ends_with_its_connection() -> None:
    with connected() as (load, connection):
        connection.sendall(b"HTTP/1.1 200 OK\r\n\r\ndata: here\n\n")
        load.take(10)
        assert (load.seen.events, load.reading) == (1, 1)
        connection.shutdown(socket.SHUT_WR)
        load.take(10)
        assert load.reading == 0


@pytest.mark.parametrize("status", [b"204 No Content", b"404 Not Found", b"503 Service Unavailable", b"2000 X"])
def test_any_other_answer_is_an_error_that_shows_it(status: bytes) -> None:
    with connected() as (load, connection):
        connection.sendall(b"HTTP/1.1 " + status + b"\r\n\r\nsee here")
        with pytest.raises(LoadError, match=f"{status.decode()}.*see here"):
            load.take(10)
