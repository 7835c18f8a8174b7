"""The program `penstock`: a command line in this process, or a process of its own that ends with its block."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio
from click.testing import CliRunner

from penstock.cli.main import main

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from click.testing import Result

GUARD: Final = 60.0
"""Seconds after which a process has hung. No test comes near it."""
EXAMPLE: Final = Path(__file__).parents[2] / "examples" / "agent.py"
PRODUCERS: Final = f"{EXAMPLE}:producers"
ANY_PORT: Final = ("--bind", "127.0.0.1:0")


def ran(*args: object, **env: str | None) -> Result:
    """The result of a command line in this process; a variable that is None is unset."""
    return CliRunner(env=env).invoke(main, [str(each) for each in args], prog_name="penstock")


def refused(*args: object, **env: str | None) -> str:
    """The message, on one line, with which a command line is refused."""
    result = ran(*args, **env)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@dataclass
class Program:
    """A running `penstock`, and the lines that it has printed so far, to stdout and stderr."""

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
            assert await self._more(), f"it ended without {pattern!r}, having printed:\n{self.words}"

    async def end(self) -> int:
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
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}
    return {**kept, "PYTHONUNBUFFERED": "1", **more}


@asynccontextmanager
async def penstock(*args: object, cwd: Path | None = None, **env: str) -> AsyncIterator[Program]:
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
