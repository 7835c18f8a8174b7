"""Fixtures that several files share: every kind of event log there is, and how its time passes."""

from __future__ import annotations

import os
import signal
from collections.abc import Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import trio
from _pytest.nodeid import coerce_node_id
from hypothesis import settings
from trio.testing import MockClock

from penstock.log.open import open_log
from tests.support.clustered import CLUSTER, clustered, in_order, on_the_cluster, prefix_for
from tests.support.proxy import Proxy, proxy
from tests.support.redis_servers import Endpoint, let_pass, redis_servers, shared_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

    from trio.abc import Clock

    from penstock.log import EventLog

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # as a shell starts jobs in the background; programs inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile("full", max_examples=100, deadline=None)
settings.load_profile(os.environ.get("PENSTOCK_TEST_PROFILE", "dev"))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let `xdist_group` count: pytest 9.2 no longer reads the id to which pytest-xdist 3.8 adds the group."""
    for item in items:
        if (grouped := vars(item).get("_nodeid")) is not None and item.nodeid != grouped:
            item._id = coerce_node_id(grouped)


Elapse = Callable[[float], Awaitable[None]]


@dataclass(frozen=True)
class Kind:
    """One kind of event log: opens an empty one, makes the clock that a test runs by, and lets time pass for the log.

    `clock` makes None where the log is behind a socket: the real one.
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


def redis_cluster() -> Kind:
    """The kind whose runs are on three nodes: the suite's own cluster, emptied for each test."""

    @asynccontextmanager
    async def empty(**limits: Any) -> AsyncIterator[EventLog]:
        clustered().flushall()
        async with open_log(clustered().url, **limits) as log:
            yield in_order(log)

    return Kind(empty, lambda: None, lambda seconds: let_pass(clustered(), seconds))


KINDS = {
    "memory": Kind(partial(open_log, "memory://"), lambda: MockClock(autojump_threshold=0), trio.sleep),
    **{f"redis {version}": redis(version) for version in redis_servers()},
    CLUSTER: redis_cluster(),
}
"""Another log gets the whole suite of `test_log_*.py` by a line here."""


@pytest.fixture(params=[*(name for name in KINDS if name != CLUSTER), on_the_cluster])
def kind(request: pytest.FixtureRequest) -> Kind:
    kind = KINDS[request.param]
    if request.param == CLUSTER:  # a few ids do for all tests: so each lies on another node now and then
        return replace(kind, open=partial(kind.open, prefix=prefix_for(request.function.__name__)))
    return kind


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
def server(request: pytest.FixtureRequest) -> Endpoint:
    """The Redis that all tests of this process share, emptied; or the cluster, if a test is parametrised so."""
    server = clustered() if getattr(request, "param", None) == CLUSTER else shared_server()
    server.flushall()
    return server


@pytest.fixture
async def between(server: Endpoint) -> AsyncIterator[Proxy]:
    """What stands between a client and that Redis, and can lose, hold up and cut what goes over it."""
    async with proxy(server.port) as between:
        yield between
