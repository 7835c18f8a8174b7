"""Clients that ask for different resources, in clear text and over TLS, and go at any moment."""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import h2.settings
import trio

from penstock import serve
from tests.support.certificates import tls_config
from tests.support.connections import brief, brief_config, with_reset
from tests.support.http2_clients import Http2

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence
    from random import Random
    from ssl import SSLContext

    from hypercorn.config import Config

    from tests.support.serving import Server


class Places:
    """A server with two listeners, in clear text and with TLS; its `config`, and how it is run."""

    def __init__(self, config: Config, trusts: SSLContext) -> None:
        self.config = brief_config(config)
        self.config.insecure_bind = ["127.0.0.1:0"]
        self._trusts = trusts
        self._trusts.set_alpn_protocols(["h2"])
        self._ports: dict[str, int] = {}

    async def run(self, *args: Any, task_status: trio.TaskStatus[list[str]], **kwargs: Any) -> None:  # noqa: ASYNC128
        async with trio.open_nursery() as nursery:
            urls: list[str] = await nursery.start(partial(serve, *args, signals=(), **kwargs))
            self._ports = {scheme: int(url.rpartition(":")[2]) for url in urls for scheme in [url.partition(":")[0]]}
            task_status.started([url for url in urls if url.startswith("http:")])

    async def connect(self, *, tls: bool) -> trio.abc.Stream:
        """A client's connection; with TLS it is for HTTP/2."""
        if not tls:
            return await trio.open_tcp_stream("127.0.0.1", self._ports["http"])
        transport = await trio.open_tcp_stream("127.0.0.1", self._ports["https"])
        return trio.SSLStream(transport, self._trusts, server_hostname="127.0.0.1", https_compatible=True)


@asynccontextmanager
async def in_two_places(producers: Any, **settings: Any) -> AsyncIterator[tuple[Server, Places]]:
    with tls_config("h2", "http/1.1") as (config, trusts):
        here = Places(config, trusts)
        async with brief(producers, config=here.config, run=here.run, **settings) as server:
            yield server, here


async def misbehave(stream: trio.abc.Stream, random: Random, paths: Sequence[str], *, speaks_http2: bool) -> None:
    transport = stream.transport_stream if isinstance(stream, trio.SSLStream) else stream
    assert isinstance(transport, trio.SocketStream)
    data = http2_requests(Http2(transport), random, paths) if speaks_http2 else http1_requests(random, paths)
    if random.random() < 0.5:
        data = data[: random.randrange(len(data))]
    try:
        while data:
            size = random.randint(1, len(data))
            await stream.send_all(data[:size])
            data = data[size:]
            with trio.move_on_after(random.random() * 0.02):
                for _ in range(random.randrange(4)):
                    await stream.receive_some(random.choice([1, 1000, 65_536]))
        if random.random() < 0.5:
            with_reset(transport)
    finally:
        await trio.aclose_forcefully(transport)


def http1_requests(random: Random, paths: Sequence[str]) -> bytes:
    path = random.choice(paths)
    head = f"{{}} {path} HTTP/1.1\r\nhost: localhost\r\n"
    websocket = (
        "connection: upgrade\r\nupgrade: websocket\r\n"
        "sec-websocket-version: 13\r\nsec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    )
    data = random.choice(
        [
            head.format("GET") + "\r\n",
            "".join(f"GET {each} HTTP/1.1\r\nhost: localhost\r\n\r\n" for each in random.choices(paths, k=4)),
            head.format("POST") + "transfer-encoding: chunked\r\n\r\n2\r\n{}\r\n",
            head.format("POST") + "content-length: 1000\r\n\r\n{",
            head.format("GET") + websocket + "\r\n",
        ]
    )
    return data.encode()


def http2_requests(client: Http2, random: Random, paths: Sequence[str]) -> bytes:
    client.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: random.choice([0, 1, 65_535])})
    for _ in range(random.randint(1, 8)):
        number = client.begin("GET", random.choice(paths), ends=True)
        match random.randrange(4):
            case 0:
                client.h2.reset_stream(number)
            case 1:
                client.h2.increment_flow_control_window(random.randint(1, 100_000), number)
            case 2:
                client.h2.ping(b"are you?")
    if random.random() < 0.5:
        client.h2.close_connection()
    return client.h2.data_to_send()
