"""The TCP user timeout: where it may be set, on which sockets it is, and who is given up by it."""

from __future__ import annotations

import math
import socket
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock import ConfigurationError, create_app, serve
from penstock.cli import serve as serve_command
from penstock.server import hypercorn_fixes as corrections
from penstock.server.hypercorn_fixes import MAX_USER_TIMEOUT
from tests.support.command_line import ANY_PORT, PRODUCERS, ran, refused
from tests.support.connections import SOON, readers
from tests.support.endpoints import with_endless
from tests.support.serving import Tap, eventually, quiet_config, serving
from tests.support.stalling import stalled
from tests.support.wire import DONE, ids

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from tests.support.serving import Server

USER_TIMEOUT: Final = socket.TCP_USER_TIMEOUT
SERVE: Final = ("serve", "--producers", PRODUCERS, *ANY_PORT)


def giving_up_after(seconds: float, **knobs: Any) -> AbstractAsyncContextManager[Server]:
    """A server with this TCP user timeout."""
    return serving(run=partial(serve, signals=(), tcp_user_timeout=seconds), **knobs)


def sockets_at(port: int) -> list[socket.socket]:
    """This process's sockets that are bound to this port, from its file descriptors; duplicates, to be closed."""
    found = []
    for fd in [int(entry.name) for entry in Path("/proc/self/fd").iterdir() if entry.is_socket()]:
        sock = socket.fromfd(fd, socket.AF_INET, socket.SOCK_STREAM)
        if sock.getsockname()[1:2] == (port,):
            found.append(sock)
        else:
            sock.close()
    return found


@pytest.mark.parametrize("inherited", [False, True])
@pytest.mark.parametrize(
    "seconds, milliseconds", [(1.5, 1500), (0.0001, 1), (0, 0), (MAX_USER_TIMEOUT, 2**31 - 1), (None, 30_000)]
)
async def test_listening_and_accepted_sockets_have_the_timeout(
    seconds: float | None, milliseconds: int, *, inherited: bool
) -> None:
    config = quiet_config()
    if inherited:
        config.bind = [f"fd://{socket.create_server(('127.0.0.1', 0)).detach()}"]
    run = partial(serve, signals=(), **({} if seconds is None else {"tcp_user_timeout": seconds}))  # type: ignore[arg-type]
    async with serving(config=config, run=run) as server:
        assert (await server.client.get("/healthz")).status_code == 200
        async with AsyncExitStack() as stack:
            sockets = [stack.enter_context(each) for each in sockets_at(server.port)]
            listening = [each.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN) for each in sockets]
            assert sorted(listening) == [0, 1]
            assert [each.getsockopt(socket.IPPROTO_TCP, USER_TIMEOUT) for each in sockets] == [milliseconds] * 2
            asked_for = [each.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) for each in sockets]
            assert asked_for == [milliseconds > 0] * 2


@pytest.mark.parametrize(
    "seconds", [-1, -0.001, math.nan, math.inf, True, None, "1", math.nextafter(MAX_USER_TIMEOUT, math.inf), 2**31]
)
async def test_a_timeout_that_no_socket_takes_is_refused(seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match="tcp_user_timeout"):
        await serve(create_app({}), quiet_config(), signals=(), tcp_user_timeout=seconds)


def test_the_command_line_takes_a_timeout_up_to_what_a_socket_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    hosted: list[float] = []

    def host(*_what: Any, tcp_user_timeout: float, **_how: Any) -> int:
        hosted.append(tcp_user_timeout)
        return 0

    monkeypatch.setattr(serve_command, "host", host)
    for seconds in ("0", "0.5", "2147483.647"):
        assert ran(*SERVE, "--tcp-user-timeout", seconds).exit_code == 0
    assert ran(*SERVE).exit_code == 0
    assert hosted == [0, 0.5, MAX_USER_TIMEOUT, 30.0]


@pytest.mark.parametrize("seconds", ["-0.001", "2147483.648", "nan", "inf", "soon"])
def test_the_command_line_refuses_any_other_timeout(seconds: str) -> None:
    words = refused(*SERVE, "--tcp-user-timeout", seconds)
    assert "user-timeout" in words.replace("_", "-")


@pytest.mark.parametrize("seconds, times", [(1.0, 1), (0, 0)])
async def test_a_system_without_the_timeout_is_warned_of_and_served(
    seconds: float, times: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(corrections, "_TCP_USER_TIMEOUT", None)
    async with giving_up_after(seconds) as server:
        assert ids(await server.read(await server.start("count", 3))) == [1, 2, 3, 4]
    assert caplog.text.count("no TCP_USER_TIMEOUT") == times


async def test_a_client_that_stops_reading_is_given_up_and_its_run_and_other_readers_go_on() -> None:
    tap = Tap()
    async with giving_up_after(1.0, producers={"tap": tap}) as server:
        run_id = await server.start("tap")
        tap.feed(*["x" * 10_000] * 1000)  # more than the sockets of both sides hold
        async with server.reading(run_id) as reader:
            await reader.take(1000)
            await wait_all_tasks_blocked()  # an answer is with its client before its task is over
            before = server.tasks()
            async with stalled(server, f"/v1/runs/{run_id}/stream"):
                await eventually(lambda: readers(server, run_id) == [2])
                with trio.fail_after(SOON):
                    await eventually(lambda: readers(server, run_id) == [1])
                    await eventually(lambda: server.tasks() == before)
            tap.feed("after")
            assert (await reader.take(1))[0].data == "after"
            assert (await server.run(run_id))["status"] == "running"
            tap.end()
            assert [block.data for block in await reader.rest()] == [DONE]


async def test_without_the_timeout_such_a_client_stays_for_as_long_as_it_likes() -> None:
    async with giving_up_after(0) as patient, giving_up_after(0.3) as strict:
        stays, goes = with_endless(patient), with_endless(strict)
        async with stalled(patient, "/endless?name=one"):
            for name in ("one", "two"):
                async with stalled(strict, f"/endless?name={name}"):
                    await eventually(lambda name=name: name in goes.left)  # type: ignore[misc]
            assert not stays.left
        await eventually(lambda: stays.left == {"one"})
