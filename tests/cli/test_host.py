"""A process that serves: its garbage collector and its sockets; a program that uses penstock keeps its own settings."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any, Final

import httpx2

from penstock.cli.host import GC_THRESHOLDS
from tests.support.command_line import ANY_PORT, GUARD, environment, penstock
from tests.support.wire import blocks_of

if TYPE_CHECKING:
    from pathlib import Path

PRODUCERS: Final = """
import gc
import os
import socket
from penstock import Event

EARLY = []

def user_timeouts():
    for fd in map(int, os.listdir("/proc/self/fd")):
        try:
            with socket.fromfd(fd, socket.AF_INET, socket.SOCK_STREAM) as sock:
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                    yield sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)
        except OSError:
            continue  # no socket, or closed meanwhile

async def collector(_input):
    late = []
    looked_at = gc.get_objects()
    yield Event.json({
        "threshold": gc.get_threshold(),
        "frozen": gc.get_freeze_count(),
        "enabled": gc.isenabled(),
        "early": any(each is EARLY for each in looked_at),
        "late": any(each is late for each in looked_at),
        "user_timeouts": [*user_timeouts()],
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
    argv = [sys.executable, "-c", "import gc; print(*gc.get_threshold())"]
    return [*map(int, subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split())]


async def test_a_process_that_serves_collects_rarely_freezes_its_imports_and_times_clients_out(tmp_path: Path) -> None:
    (tmp_path / "asked.py").write_text(PRODUCERS)
    args = ("serve", "--producers", "asked:producers", *ANY_PORT, "--tcp-user-timeout", 7)
    async with penstock(*args, cwd=tmp_path) as program, httpx2.AsyncClient(timeout=GUARD) as client:
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
    assert seen["user_timeouts"] == [7000]


def test_a_program_that_uses_penstock_keeps_its_collector_as_it_was() -> None:
    argv = [sys.executable, "-c", EMBEDDED]
    done = subprocess.run(argv, check=True, capture_output=True, text=True, timeout=GUARD, env=environment())
    before, *later = json.loads(done.stdout)
    assert before == [default(), 0, True]
    assert later == [before] * 4
