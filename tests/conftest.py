"""Fixtures that several files share: every kind of event log there is, and how its time passes."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from trio.testing import MockClock

from penstock.log.urls import open_log
from tests.proxy import Proxy, proxy
from tests.redis_servers import Endpoint, let_pass, redis_servers, shared_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from trio.abc import Clock

    from penstock.log import EventLog

Elapse = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class Kind:
    """One kind of event log.

    Attributes:
        open: opens one that is empty; takes `ttl` and `max_entries`.
        clock: makes the clock that the test runs by; None: the real one, for a log behind a socket.
        elapse: lets so many seconds pass for the log.
    """

    open: Callable[..., AbstractAsyncContextManager[EventLog]]
    clock: Callable[[], Clock | None]
    elapse: Elapse


def redis(version: str) -> Kind:
    """The kind whose server is of this version: the suite's own, emptied for each test."""

    def empty(**limits: Any) -> AbstractAsyncContextManager[EventLog]:
        server = shared_server(version)
        server.flushall()
        return open_log(server.url, **limits)

    return Kind(empty, lambda: None, lambda seconds: let_pass(shared_server(version), seconds))


KINDS = {
    "memory": Kind(partial(open_log, "memory://"), lambda: MockClock(autojump_threshold=0), trio.sleep),
    **{f"redis {version}": redis(version) for version in redis_servers()},
}
"""Another log gets the whole suite of `test_log_*.py` by a line here."""


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> Kind:
    return KINDS[request.param]


@pytest.fixture
def clock(kind: Kind) -> Clock | None:
    return kind.clock()


@pytest.fixture
def elapse(kind: Kind) -> Elapse:
    return kind.elapse


@pytest.fixture
async def log(kind: Kind, clock: Clock | None) -> AsyncIterator[EventLog]:
    async with kind.open() as log:
        yield log


@pytest.fixture
def server() -> Endpoint:
    """The Redis that all tests of this process share, emptied."""
    server = shared_server()
    server.flushall()
    return server


@pytest.fixture
async def between(server: Endpoint) -> AsyncIterator[Proxy]:
    """What stands between a client and that Redis, and can lose, hold up and cut what goes over it."""
    async with proxy(server.port) as between:
        yield between
