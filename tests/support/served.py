"""A program that serves, for tests that need a process: signals, exit codes, another server.

python -m tests.support.served '{"drain_timeout": 1}'     penstock.serve, with these settings; writes its URL to stderr
hypercorn -k trio tests.support.served:app                the same producers under plain Hypercorn
"""

from __future__ import annotations

import json
import sys
from functools import partial
from typing import Any

import trio

from penstock import SupervisorFailed, create_app, serve
from tests.support.serving import PRODUCERS, quiet_config

app = create_app(PRODUCERS, drain_timeout=0.2)


async def main(settings: dict[str, Any]) -> None:
    own = create_app(PRODUCERS, **settings)
    async with trio.open_nursery() as nursery:
        (url,) = await nursery.start(partial(serve, own, quiet_config()))
        sys.stderr.write(f"{url}\n")
        sys.stderr.flush()


if __name__ == "__main__":
    try:
        trio.run(main, json.loads(sys.argv[1]))
    except* SupervisorFailed:
        sys.exit(1)
