"""uvicorn as one would take it for speed: httptools, uvloop, no access log, any free port."""

from __future__ import annotations

from typing import TYPE_CHECKING

import uvicorn

if TYPE_CHECKING:
    import socket

    from starlette.types import ASGIApp


class _Server(uvicorn.Server):
    """Says where it is."""

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        port = self.servers[0].sockets[0].getsockname()[1]
        print(f"http://127.0.0.1:{port}", flush=True)


def serve(app: ASGIApp) -> None:
    """Serve until SIGTERM."""
    config = uvicorn.Config(
        app, port=0, http="httptools", loop="uvloop", access_log=False, log_level="warning", timeout_graceful_shutdown=1
    )
    _Server(config).run()
