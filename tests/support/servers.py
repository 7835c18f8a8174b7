"""Real servers on real sockets, each in a process of its own, with `tests/apps.py` inside."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Final

import anyio
import httpx2
import uvicorn
from hypercorn.config import Config

if TYPE_CHECKING:
    from collections.abc import Iterator

TIMEOUT: Final = 90.0
"""Seconds after which a client gives up. No test comes near it."""

KINDS: Final = ("hypercorn-trio", "hypercorn-asyncio", "uvicorn")
SHUTTING_DOWN: Final = KINDS if sys.version_info < (3, 12) else ("hypercorn-trio", "uvicorn")
"""Those that end a stream when they are told to end.

Hypercorn 0.18 awaits `asyncio.Server.wait_closed` before its graceful timeout begins, and since Python 3.12 that waits
for the connections: there its asyncio worker lets every open stream go on for as long as the client likes.
"""
_GRACE: Final = 0.1
"""Seconds that a stream may go on after SIGTERM, before Hypercorn cancels its task; uvicorn does so at once."""


class Server:
    def __init__(self, kind: str, address: tuple[str, int], process: subprocess.Popen[bytes]) -> None:
        self.kind = kind
        self.address = address
        self.client = httpx2.Client(base_url=f"http://{address[0]}:{address[1]}", timeout=TIMEOUT)
        self._process = process

    def connect(self, path: str) -> socket.socket:
        connection = socket.create_connection(self.address, timeout=TIMEOUT)
        connection.sendall(f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
        return connection

    def wait_for(self, name: str) -> None:
        assert self.client.get(f"/happened/{name}").text == "yes"

    def let(self, name: str) -> None:
        assert self.client.get(f"/happen/{name}").text == "done"

    def shut_down(self) -> None:
        self._process.send_signal(signal.SIGTERM)

    def ended(self) -> int:
        return self._process.wait(TIMEOUT)


def read_until(connection: socket.socket, words: bytes) -> bytes:
    received = b""
    while words not in received:
        more = connection.recv(65536)
        assert more, received
        received += more
    return received


@contextmanager
def serving(kind: str) -> Iterator[Server]:
    """A server of this kind. Its socket listens before the process is there: early clients wait in its backlog."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.servers", kind, str(listener.fileno())], pass_fds=[listener.fileno()]
        )
        server = Server(kind, listener.getsockname(), process)
    try:
        server.let("ready")
        yield server
    finally:
        server.client.close()
        process.kill()
        process.wait()


async def _sigterm() -> None:
    with anyio.open_signal_receiver(signal.SIGTERM) as signals:
        async for _ in signals:
            return


def _serve(kind: str, fd: int) -> None:
    if kind == "uvicorn":
        uvicorn.run("tests.support.apps:app", fd=fd, timeout_graceful_shutdown=0, log_level="critical")
        return
    config = Config()
    config.bind = [f"fd://{fd}"]
    config.graceful_timeout = _GRACE
    config.errorlog = None
    backend = kind.removeprefix("hypercorn-")
    serve = import_module(f"hypercorn.{backend}").serve
    app = import_module("tests.support.apps").app
    anyio.run(partial(serve, app, config, shutdown_trigger=_sigterm), backend=backend)


if __name__ == "__main__":
    _serve(sys.argv[1], int(sys.argv[2]))
