"""What importing penstock does to a program, and what it leaves alone."""

from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import {imported}
import sys
import uvicorn.importer  # any server of asyncio's

loop = __import__("asyncio").new_event_loop()
print(type(loop).__module__, "trio_asyncio" in sys.modules)
loop.close()
"""


def loop_after(imported: str) -> list[str]:
    """The module of the event loops that a program gets which has imported this, and whether trio-asyncio is there."""
    argv = [sys.executable, "-c", PROGRAM.format(imported=imported)]
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.split()


def test_a_program_on_asyncio_that_imports_penstock_keeps_its_event_loops() -> None:
    assert loop_after("penstock") == loop_after("json") == ["asyncio.unix_events", "False"]


def test_it_is_trio_asyncio_that_would_change_them() -> None:
    assert loop_after("penstock.log.redis.client") == ["trio_asyncio._sync", "True"]
