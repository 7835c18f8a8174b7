"""Clients that stall: TCP ends their connections after the user timeout, and a server ends in spite of them."""

from __future__ import annotations

import math
import socket
from contextlib import AsyncExitStack, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

import penstock.server.serve
from penstock import ConfigurationError, create_app, serve
from penstock.server.config import MAX_USER_TIMEOUT
from penstock.server.hypercorn_fixes import connection as connection_module
from tests.support.certificates import tls_config
from tests.support.command_line import ANY_PORT, EXAMPLE, refused
from tests.support.connections import BRIEF, SOON, Ending, brief, brief_config, readers, sockets_at
from tests.support.endpoints import flood, with_endless
from tests.support.serving import Tap, eventually, quiet_config, serving
from tests.support.stalling import CLIENTS, all_stalled, over_http1, over_http2, over_tls, stalled
from tests.support.wire import DONE, ids

if TYPE_CHECKING:
    from contextlib import AbstractAsyncContextManager

    from tests.support.serving import Server

USER_TIMEOUT: Final = socket.TCP_USER_TIMEOUT
SERVE: Final = ("serve", "--producers", f"{EXAMPLE}:producers", *ANY_PORT)


def giving_up_after(seconds: float, **knobs: Any) -> AbstractAsyncContextManager[Server]:
    return serving(run=partial(serve, signals=(), tcp_user_timeout=seconds), **knobs)


@pytest.mark.parametrize(
    "seconds, milliseconds, inherited",
    [(0.0001, 1, False), (0, 0, False), (MAX_USER_TIMEOUT, 2**31 - 1, False), (None, 30_000, True)],
)
async def test_all_sockets_have_the_timeout(seconds: float | None, milliseconds: int, *, inherited: bool) -> None:
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


@pytest.mark.parametrize("seconds", [-0.001, math.nan, True, None, "1", math.nextafter(MAX_USER_TIMEOUT, math.inf)])
async def test_a_timeout_that_no_socket_takes_is_refused(seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match="tcp_user_timeout"):
        await serve(create_app({}), quiet_config(), signals=(), tcp_user_timeout=seconds)


@pytest.mark.parametrize("seconds", ["-0.001", "2147483.648", "soon"])
def test_the_command_line_refuses_any_other_timeout(seconds: str) -> None:
    words = refused(*SERVE, "--tcp-user-timeout", seconds)
    assert "user-timeout" in words.replace("_", "-")


@pytest.mark.parametrize("seconds, times", [(1.0, 1), (0, 0)])
async def test_on_a_system_without_the_timeout_a_warning_says_so(
    seconds: float, times: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection_module, "_TCP_USER_TIMEOUT", None)
    async with giving_up_after(seconds) as server:
        assert ids(await server.read(await server.start("count", 3))) == [1, 2, 3, 4]
    assert caplog.text.count("no TCP_USER_TIMEOUT") == times


async def test_a_client_that_stops_reading_is_disconnected_and_its_run_and_other_readers_go_on() -> None:
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
                    await eventually(lambda: server.tasks() <= before)  # an idle connection may have ended meanwhile
            tap.feed("after")
            assert (await reader.take(1))[0].data == "after"
            assert (await server.run(run_id))["status"] == "running"
            tap.end()
            assert [block.data for block in await reader.rest()] == [DONE]


@pytest.mark.parametrize(
    "client, how", [*((client, "asked") for client in CLIENTS), (over_http1, "cancelled"), (over_http2, "cancelled")]
)
async def test_a_client_that_does_not_read_does_not_hold_up_the_end_of_its_server(
    client: Any, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penstock.server.serve, "LAST_SENDS", BRIEF)
    ending = Ending(how)  # without a user timeout: the deadline of sends alone ends them
    with tls_config("http/1.1") if client is over_tls else nullcontext((None, None)) as (given, trusts):
        config = brief_config(given)
        config.keep_alive_timeout = SOON  # a halt of the machine before a request must not end the connection
        async with brief({"flood": flood}, config=config, run=ending.run, complains=True) as server:
            with_endless(server)
            async with client(server, trusts):
                await all_stalled(server, 1)
                ending.now(server)
                with trio.fail_after(SOON):
                    await server.ended.wait()
