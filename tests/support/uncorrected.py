"""Servers in which corrections of Hypercorn's faults are missing, in the test's own loop or in a process.

    python -m tests.support.uncorrected '{"without": ["TCPServer"], "drain_timeout": 0.2}'     says its URL on stderr

There `without` names those of Hypercorn's classes that are to stay what they are; `graceful_timeout` and
`tcp_user_timeout` are what they are elsewhere, and all else are the supervisor's knobs.
"""

from __future__ import annotations

import json
import sys
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.trio.tcp_server import TCPServer
from starlette.routing import Route

from penstock import create_app, serve
from penstock.server import hypercorn_fixes as corrections
from penstock.server.hypercorn_fixes import PatchedTCPServer
from penstock.server.hypercorn_fixes.http2 import PatchedH2
from tests.support.endpoints import Endless, flood
from tests.support.serving import PRODUCERS, quiet_config

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator
    from contextlib import AbstractContextManager

STOCK: Final = {each.name: each.original for each in corrections.PATCHES}
"""Hypercorn's classes that are corrected, as they are."""


@contextmanager
def in_place_of(**kinds: type[Any]) -> Iterator[None]:
    """These take the place of Hypercorn's classes, instead of the corrected ones, for servers that start in here."""
    with pytest.MonkeyPatch.context() as patch:
        pieces = {each.name: each for each in corrections.PATCHES}
        for name, kind in kinds.items():
            patch.setattr(pieces[name].module, name, pieces[name].original)
            pieces[name] = pieces[name]._replace(corrected=kind)
        patch.setattr(corrections, "REPLACEMENTS", tuple(pieces.values()))
        yield


def as_it_is(*names: str) -> AbstractContextManager[None]:
    """These classes of Hypercorn's are what they are without penstock, for servers that start in here."""
    return in_place_of(**{name: STOCK[name] for name in names})


class TellsInTheSender(PatchedTCPServer):
    """As in Hypercorn: the task that cannot send tells all the responses so."""

    protocol_send = TCPServer.protocol_send


class ReadsOn(PatchedTCPServer):
    """As in Hypercorn: what reads waits for the end of a response, whatever becomes of that."""

    _read_data = TCPServer._read_data


class Spreads(PatchedTCPServer):
    """As in Hypercorn: an error in a connection is everybody's."""

    run = TCPServer.run


class ForgetsOne(PatchedH2):
    """As in Hypercorn: if the telling is cut off, one response is told by nobody."""

    _close_stream = H2Protocol._close_stream


def dying_servers(
    start: Callable[..., Awaitable[None]] | None = None,
) -> tuple[Any, list[Exception]]:
    """How to run servers that do not survive, and what they have died of."""
    died: list[Exception] = []
    start = start or partial(serve, signals=())

    async def run(*args: Any, **kwargs: Any) -> None:
        try:
            await start(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  (the test asks which)
            died.append(error)

    return run, died


async def main(
    *, without: list[str], graceful_timeout: float = 0.2, tcp_user_timeout: float = 1.0, **knobs: Any
) -> None:
    config = quiet_config()
    config.graceful_timeout = graceful_timeout
    app = create_app({**PRODUCERS, "flood": flood}, **knobs)
    app.router.routes.append(Route("/endless", Endless().answer))
    with as_it_is(*without):
        async with trio.open_nursery() as nursery:
            (url,) = await nursery.start(partial(serve, app, config, tcp_user_timeout=tcp_user_timeout))
            sys.stderr.write(f"{url}\n")
            sys.stderr.flush()


if __name__ == "__main__":
    trio.run(partial(main, **json.loads(sys.argv[1])))
