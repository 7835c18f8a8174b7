"""A process that serves tunes the garbage collector; a program that uses penstock keeps its own settings."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import httpx2
import pytest

from penstock.cli.host import GC_THRESHOLDS
from tests.support.command_line import GUARD, environment, penstock
from tests.support.wire import blocks_of

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.redis_servers import Endpoint

PRODUCERS: Final = """
import gc
from penstock import Event

EARLY = []

async def collector(_input):
    late = []
    looked_at = gc.get_objects()
    yield Event.json({
        "threshold": gc.get_threshold(),
        "frozen": gc.get_freeze_count(),
        "enabled": gc.isenabled(),
        "early": any(each is EARLY for each in looked_at),
        "late": any(each is late for each in looked_at),
    })

producers = {"collector": collector}
"""
EMBEDDED: Final = """
import gc
import json

def state():
    return [gc.get_threshold(), gc.get_freeze_count(), gc.isenabled()]

seen = [state()]
import trio
import penstock
import penstock.cli.host
from hypercorn.config import Config
seen.append(state())

async def one(_input=None):
    yield penstock.Event(data="1")

async def main():
    async with penstock.open_supervisor(penstock.MemoryLog()) as supervisor:
        run = await supervisor.start(one)
        await supervisor.wait(run.id)
        seen.append(state())
    async with trio.open_nursery() as nursery:
        await nursery.start(serve_it)
        seen.append(state())
        nursery.cancel_scope.cancel()

async def serve_it(task_status):
    config = Config()
    config.bind = ["127.0.0.1:0"]
    await penstock.serve(penstock.create_app({"one": one}), config, task_status=task_status)

trio.run(main)
seen.append(state())
print(json.dumps(seen))
"""


def default() -> list[int]:
    """The thresholds that Python has of itself."""
    argv = [sys.executable, "-c", "import gc; print(*gc.get_threshold())"]
    return [*map(int, subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split())]


@pytest.mark.parametrize("workers", [1, 2])
async def test_a_process_that_serves_looks_rarely_and_never_at_what_it_has_imported(
    tmp_path: Path, server: Endpoint, workers: int
) -> None:
    (tmp_path / "asked.py").write_text(PRODUCERS)
    args = ("serve", "--producers", "asked:producers", "--bind", "127.0.0.1:0", "--log", server.url)
    async with (
        penstock(*args, "--workers", workers, cwd=tmp_path) as program,
        httpx2.AsyncClient(timeout=GUARD) as client,
    ):
        url = (await program.until(r"serving on (\S+)"))[1]
        answer = await client.post(f"{url}/v1/runs", json={"producer": "collector", "stream": True})
        seen: Any = blocks_of(answer.text)[0].json
        program.process.terminate()
        assert await program.end() == 0
    assert seen["threshold"] == list(GC_THRESHOLDS)
    assert default()[0] < GC_THRESHOLDS[0]
    assert seen["enabled"]
    assert seen["frozen"] > 10_000
    assert (seen["early"], seen["late"]) == (False, True)


def test_a_program_that_uses_penstock_keeps_its_collector_as_it_was() -> None:
    argv = [sys.executable, "-c", EMBEDDED]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=GUARD, env=environment())
    before, *later = json.loads(done.stdout)
    assert before == [default(), 0, True]
    assert later == [before] * 4
