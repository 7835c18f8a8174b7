"""Fixtures of the tests of the log in Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from penstock.log.open import open_log
from penstock.log.redis.log import RedisLog
from tests.support.clustered import Works, in_order
from tests.support.redis_clusters import started_cluster

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from tests.support.redis_servers import Endpoint


@pytest.fixture
async def log(server: Endpoint) -> AsyncIterator[RedisLog]:
    """The log on `server`; each call has had all of its effect when it returns, in a cluster, too."""
    async with open_log(server.url) as log:
        assert isinstance(log, RedisLog)
        yield in_order(log)


@pytest.fixture(scope="session")
def lasting_works() -> Iterator[Works]:
    with started_cluster(node_timeout=600.0) as cluster:  # a node that stands still is never taken for failed
        yield Works(cluster)


@pytest.fixture
def works(lasting_works: Works) -> Iterator[Works]:
    """A cluster whose slots a test may move, and whose nodes it may pause; its tests share an `xdist_group`."""
    lasting_works.cluster.flushall()
    yield lasting_works
    for node in lasting_works.nodes:
        node.resume()
