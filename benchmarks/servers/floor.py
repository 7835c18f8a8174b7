"""The least that a stream through Redis takes: XREAD BLOCK on a connection of the request's own, and a bare ASGI send.

    GET /NAME       the entries of the stream NAME from now on, each as an event, until one has no data

Hypercorn's trio worker, no framework; Redis is spoken to over a plain socket, and its replies are parsed by hiredis.
Option: `port` of the Redis.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

import hiredis
import hypercorn.trio
import trio
from hypercorn.config import Config

from benchmarks.processes import options

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

    from hypercorn.typing import ASGIReceiveCallable, ASGISendCallable, Scope

ANY = 65536
"""Bytes that are read at a time, at most."""


async def entries(stream: trio.SocketStream, name: bytes) -> AsyncGenerator[bytes]:
    """The data of a stream's entries, from now on."""
    replies = hiredis.Reader()
    last = b"$"
    while True:
        command = ("XREAD", "BLOCK", 0, "STREAMS", name, last)
        await stream.send_all(hiredis.pack_command(command))  # type: ignore[arg-type]
        while (reply := replies.gets()) is False:
            replies.feed(await stream.receive_some(ANY))
        for entry_id, (_, data) in reply[0][1]:
            last = entry_id
            yield data


class Floor:
    """The application."""

    def __init__(self, port: int) -> None:
        self.port = port

    async def __call__(self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable) -> None:
        """Answer."""
        if scope["type"] == "lifespan":
            await lifespan(receive, send)
        elif scope["type"] == "http":
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._stream, scope["path"][1:].encode(), send, nursery.cancel_scope)
                while (await receive())["type"] != "http.disconnect":
                    pass
                nursery.cancel_scope.cancel()

    async def _stream(self, name: bytes, send: Any, scope: trio.CancelScope) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        stream = await trio.open_tcp_stream("127.0.0.1", self.port)
        async with stream:
            async for data in entries(stream, name):
                if not data:
                    break
                await send({"type": "http.response.body", "body": b"data: %b\n\n" % data, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        scope.cancel()


async def lifespan(receive: Any, send: Any) -> None:
    """Nothing is to be started or stopped."""
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


async def main() -> None:
    """Serve until SIGTERM."""
    sock = socket.create_server(("127.0.0.1", 0), backlog=1024)
    config = Config()
    config.bind = [f"fd://{sock.fileno()}"]
    config.graceful_timeout = 0.1
    config.loglevel = "ERROR"
    print(f"http://127.0.0.1:{sock.getsockname()[1]}", flush=True)
    await hypercorn.trio.serve(Floor(options()["port"]), config)


if __name__ == "__main__":
    trio.run(main)
