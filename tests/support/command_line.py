"""`penstock` in a process of its own: started, listened to, signalled, and gone when the block is left."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

GUARD: Final = 60.0
"""Seconds after which a process has hung. No test comes near it."""


@dataclass
class Program:
    """A running `penstock`, and what it has printed so far, on stdout and stderr."""

    process: trio.Process
    lines: list[str] = field(default_factory=list)
    _rest: bytes = b""

    @property
    def words(self) -> str:
        return "\n".join(self.lines)

    async def until(self, pattern: str) -> re.Match[str]:
        """The first line that matches, as soon as it is printed."""
        seen = 0
        while True:
            for line in self.lines[seen:]:
                if found := re.search(pattern, line):
                    return found
            seen = len(self.lines)
            assert await self._more(), f"it ended without {pattern!r}, having said:\n{self.words}"

    async def end(self) -> int:
        """Its exit code, as soon as it has ended."""
        while await self._more():
            pass
        return await self.process.wait()

    async def _more(self) -> bool:
        assert self.process.stdout is not None
        piece = await self.process.stdout.receive_some()
        *lines, self._rest = (self._rest + piece).split(b"\n")
        self.lines += [line.decode() for line in lines]
        return bool(piece)


def environment(**more: str) -> dict[str, str]:
    """This process's, without settings of a penstock of its own."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    return {**kept, "PYTHONUNBUFFERED": "1", **more}


@asynccontextmanager
async def penstock(*args: object, cwd: Path | None = None, **env: str) -> AsyncIterator[Program]:
    """Start it; it is killed if it has not ended when the block is left."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "penstock", *map(str, args)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=cwd,
        env=environment(**env),
    )
    try:
        with trio.fail_after(GUARD):  # noqa: ASYNC100  (the block's body is what it guards)
            yield Program(process)
    finally:
        with trio.CancelScope(shield=True):
            if process.returncode is None:
                process.kill()
            await process.wait()
            assert process.stdout is not None
            await process.stdout.aclose()
