"""A program that serves, for tests that need a process: signals, exit codes, another server.

python -m tests.support.served '{"drain_timeout": 1}'     penstock.serve, with these settings; writes its URL to stderr
hypercorn -k trio tests.support.served:app                the same producers under plain Hypercorn
"""

from __future__ import annotations

import json
import os
import sys
from functools import partial
from typing import TYPE_CHECKING, Any

import trio

import penstock.server.serve
from penstock import Event, SupervisorFailed, create_app, serve
from tests.support.serving import PRODUCERS, quiet_config

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from penstock.supervisor.live_runs import StuckRun


async def stubborn(_input: Any) -> AsyncIterator[Event]:
    """Keeps its task."""
    yield Event(data="mine")
    with trio.CancelScope(shield=True):
        await trio.sleep_forever()


app = create_app({**PRODUCERS, "stubborn": stubborn}, drain_timeout=0.2)


def abandon(stuck: Sequence[StuckRun]) -> None:
    for run in stuck:
        sys.stderr.write(f"{run.run_id} is stuck here:\n{run.stack}\n")
    sys.stderr.flush()
    os._exit(3)


async def main(settings: dict[str, Any]) -> None:
    own = create_app({**PRODUCERS, "stubborn": stubborn}, **settings)
    async with trio.open_nursery() as nursery:
        (url,) = await nursery.start(partial(serve, own, quiet_config(), abandon=abandon))
        sys.stderr.write(f"{url}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    penstock.server.serve.ABANDON_AFTER = 0.2  # type: ignore[misc]
    try:
        trio.run(main, json.loads(sys.argv[1]))
    except* SupervisorFailed:
        sys.exit(1)
