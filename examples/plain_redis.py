"""Read a run with nothing but redis-py, as any program can that knows Redis and nothing of penstock.

Run it:    python examples/plain_redis.py redis://localhost RUN_ID [AFTER]

A run's entries are a Redis stream under `sse:run:RUN_ID`. The id of an entry is `SEQ-0`, so a cursor is an id, too. Its
fields are `seq_id`, `data` (the event as it goes over the wire, without its id line), `timestamp` (milliseconds) and,
in the last one, `complete`.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import redis

if TYPE_CHECKING:
    from collections.abc import Iterator

WAIT_MS = 1_000


def read(client: redis.Redis, run_id: str, after: int = 0) -> Iterator[dict[str, str]]:
    """The entries of a run that follow a cursor, as they come, to the last one."""
    stream, last = f"sse:run:{run_id}", f"{after}-0"
    while client.exists(f"{{{stream}}}:meta"):
        found: Any = client.xread({stream: last}, block=WAIT_MS)
        for entry_id, fields in found[0][1] if found else []:
            last = entry_id
            yield fields
            if fields.get("complete") == "true":
                return
    raise SystemExit(f"there is no run {run_id!r}: it was never started, or its history has expired")


def main(url: str, run_id: str, after: str = "0") -> None:
    """Print what there is, and what comes."""
    with redis.Redis.from_url(url, decode_responses=True) as client:
        for fields in read(client, run_id, int(after)):
            print(fields["seq_id"], fields["timestamp"], fields["data"].rstrip().replace("\n", " | "))


if __name__ == "__main__":
    main(*sys.argv[1:])
