"""Reading runs that live in another process, each from its beginning to its end, without HTTP.

    python -m benchmarks.jobs.following '{"url": "redis://127.0.0.1:6379", "name": "a", "runs": 100}'

Options: `url` of the log; `name` and `runs`, which say what their ids are: see `storing`. Each has one reader. It
prints `ready` when all have looked their run up, waits for a line, and prints `done` when all have seen its end.
"""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import trio

from benchmarks.jobs.storing import run_ids, wait_for_start
from benchmarks.processes import options
from penstock import open_log, open_supervisor
from penstock.cli.host import collect_rarely

if TYPE_CHECKING:
    from collections.abc import Mapping

    from penstock import Supervisor


async def read(supervisor: Supervisor, run_id: str, seen: list[int], *, task_status: trio.TaskStatus[None]) -> None:
    """Take in all of a run, as a response takes it, and note how many entries there were."""
    async with supervisor.follow(run_id) as follower:
        task_status.started()
        while await follower.next_body():
            pass
        seen.append(follower.cursor)


async def main(given: Mapping[str, Any]) -> dict[str, float]:
    """Be there when they begin, and stay until they have ended."""
    seen: list[int] = []
    async with open_log(given["url"]) as log, open_supervisor(log) as supervisor:
        async with trio.open_nursery() as nursery:
            for run_id in run_ids(given["name"], given["runs"]):
                await nursery.start(read, supervisor, run_id, seen)
            await wait_for_start()
            busy, began = time.process_time(), time.monotonic()
        end, busy = time.monotonic(), time.process_time() - busy
        print("done", flush=True)
    return {"events": sum(seen) - len(seen), "began": began, "ended": end, "busy": busy}  # without those that end it


if __name__ == "__main__":
    collect_rarely()  # as `penstock serve` does
    print(json.dumps(trio.run(main, options())))
