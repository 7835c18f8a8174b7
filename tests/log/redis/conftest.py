"""Fixtures of the tests of the log in Redis."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from penstock.log.open import open_log
from penstock.log.redis.log import RedisLog
from tests.support.clustered import in_order

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.redis_servers import Endpoint


@pytest.fixture
async def log(server: Endpoint) -> AsyncIterator[RedisLog]:
    """The log on `server`; each call has had all of its effect when it returns, in a cluster, too."""
    async with open_log(server.url) as log:
        assert isinstance(log, RedisLog)
        yield in_order(log)
