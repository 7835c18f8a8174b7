"""A Redis behind TLS: certificates are checked, and the rest is as without."""

from __future__ import annotations

import ssl
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trustme

from penstock.errors import LogUnavailable
from penstock.log.open import open_log
from tests.support.logs import COMPLETED, LEASE, batch, record, seqs
from tests.support.redis_servers import shared_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.support.redis_servers import Endpoint


@asynccontextmanager
async def behind_tls(server: Endpoint, authority: trustme.CA) -> AsyncIterator[int]:
    """A port that speaks TLS and passes on what it hears to a Redis that need not have been built with it."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    authority.issue_cert("localhost").configure_cert(context)

    async def pump(source: trio.abc.ReceiveStream, sink: trio.abc.SendStream, scope: trio.CancelScope) -> None:
        try:
            while data := await source.receive_some():
                await sink.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass  # the client, or the server, is gone
        scope.cancel(reason="one side has ended")

    async def pass_on(client: trio.SSLStream[trio.SocketStream]) -> None:
        redis = await trio.open_tcp_stream("127.0.0.1", server.port)
        async with redis, trio.open_nursery() as nursery:
            nursery.start_soon(pump, client, redis, nursery.cancel_scope)
            nursery.start_soon(pump, redis, client, nursery.cancel_scope)

    async with trio.open_nursery() as nursery:
        serve = partial(trio.serve_ssl_over_tcp, host="127.0.0.1", https_compatible=True)
        (listener, *_) = await nursery.start(serve, pass_on, 0, context)
        yield listener.transport_listener.socket.getsockname()[1]
        nursery.cancel_scope.cancel(reason="the test is over")


async def test_a_redis_behind_tls_is_a_log_like_any_other(tmp_path: Path) -> None:
    authority, server = trustme.CA(), shared_server()
    server.flushall()
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    async with (
        behind_tls(server, authority) as port,
        open_log(f"rediss://localhost:{port}/0?ssl_ca_certs={tmp_path / 'ca.pem'}") as log,
        log.wakeups("reader") as wakeups,
    ):
        await log.start(record(), LEASE)
        await wakeups.subscribe("r")
        await log.append([batch(1, 3, COMPLETED)])
        with trio.fail_after(5):
            assert dict((await wakeups.wait()).moved) == {"r": 3}
        assert seqs((await log.read("r", 0)).entries) == [1, 2, 3]


async def test_a_certificate_that_nobody_has_vouched_for_is_not_talked_to() -> None:
    server = shared_server()
    async with behind_tls(server, trustme.CA()) as port, open_log(f"rediss://:secret@localhost:{port}") as log:
        with pytest.raises(LogUnavailable, match="certificate verify failed") as caught:
            await log.check()
        assert "secret" not in str(caught.value)
