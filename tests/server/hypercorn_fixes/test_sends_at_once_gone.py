"""Sends that find the connection gone: everybody on it hears of that, once, and nobody else is harmed."""

from __future__ import annotations

import socket
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trio

from tests.server.hypercorn_fixes.test_sends_at_once import (
    ASKS,
    MANY,
    NO_END,
    Flood,
    Turns,
    ask_over_http1,
    ask_over_http2,
    starved,
    watched,
)
from tests.support.connections import is_over_soon, joined, served, unharmed, with_reset
from tests.support.serving import eventually, quiet_config, serving
from tests.support.uncorrected import in_place_of

if TYPE_CHECKING:
    from penstock.server.hypercorn_fixes import PatchedTCPServer


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


def reset(stream: trio.SocketStream, _connection: PatchedTCPServer) -> None:
    """The client resets the connection."""
    if stream.socket.fileno() != -1:
        with_reset(stream)
        stream.socket.close()


def close_here(_stream: trio.SocketStream, connection: PatchedTCPServer) -> None:
    """The server closes it."""
    connection.stream.socket.close()


@pytest.mark.parametrize("lose", [reset, close_here])
@pytest.mark.parametrize("ask", ASKS)
async def test_a_send_that_finds_the_connection_gone_tells_everybody_so_once(ask: Any, lose: Any) -> None:
    turns = Turns()
    with in_place_of(TCPServer=(kind := watched(turns))):
        async with unharmed(config=quiet_config()) as server:
            flood = Flood(server, MANY, turns, chunk=b"x" * 2000)
            await eventually(lambda: len(server.connections()) == 1)
            before = descriptors()
            async with joined(server) as (stream, task):
                flood.first = partial(lose, stream, served(stream))
                connection = served(stream)
                await ask(stream)
                await is_over_soon(task, server)
                told = kind.told.count(connection)
                # Who reads may be the first to know, unless it is found in the very step in which it happens.
                assert told == 1 or (told == 0 and (lose is reset or ask is ask_over_http2))
            await eventually(lambda: descriptors() <= before)


@pytest.mark.parametrize("lose", [reset, close_here])
@pytest.mark.parametrize("ask", ASKS)
async def test_a_response_that_sends_on_when_its_client_is_gone_leaves_others_their_turn(ask: Any, lose: Any) -> None:
    turns = Turns()
    with in_place_of(TCPServer=(kind := watched(turns))):
        async with serving() as server:
            flood = Flood(server, NO_END, turns)
            async with joined(server) as (stream, task), trio.open_nursery() as nursery:
                nursery.start_soon(turns.run)
                flood.first = partial(lose, stream, served(stream))
                await ask(stream)
                await is_over_soon(task, server)
                nursery.cancel_scope.cancel()
    assert not starved(kind.at_each)


async def test_a_descriptor_that_another_has_got_meanwhile_is_not_written_to() -> None:
    async with unharmed(config=quiet_config()) as server, joined(server) as (stream, task):
        flood = Flood(server, MANY)
        others: list[socket.socket] = []

        def replace() -> None:
            connection = served(stream)
            number = connection.stream.socket.fileno()
            connection.stream.socket.close()
            while number not in [other.fileno() for other in others]:
                others.extend(socket.socketpair())

        flood.first = replace
        await ask_over_http1(stream)
        await is_over_soon(task, server)
        for other in others:
            other.setblocking(False)
            with pytest.raises(BlockingIOError):
                other.recv(1)
        for other in others:
            other.close()
