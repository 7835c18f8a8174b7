"""What `penstock serve` would serve, instead of serving it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import pytest

from penstock import MemoryLog
from penstock.cli import serve

if TYPE_CHECKING:
    import socket
    from collections.abc import Callable, Sequence

    from hypercorn.config import Config
    from starlette.applications import Starlette

    from penstock.asgi.lifespan import AppLifespan


class Served(NamedTuple):
    """The application, the arguments of `open_log`, and Hypercorn's configuration."""

    lifespan: AppLifespan
    log: dict[str, Any]
    config: Config


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Served]:
    """What each `penstock serve` of a test would have served."""
    seen: list[Served] = []

    def host(
        make_app: Callable[..., Starlette], log: Any, config: Config, sockets: Sequence[socket.socket], **_how: Any
    ) -> int:
        seen.append(Served(make_app(MemoryLog()).state.penstock, log.kwds, config))
        for each in sockets:
            each.close()
        return 0

    monkeypatch.setattr(serve, "host", host)
    return seen
