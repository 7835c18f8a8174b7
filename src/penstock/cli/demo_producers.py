"""The producers of `penstock demo`: a real command that takes some seconds, and one that is silent.

The server's working directory is the demo's scratch folder; all files are written there.
"""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import trio

from penstock.sources.command import command
from penstock.sse import Event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from contextlib import AbstractAsyncContextManager

COPY: Final = "written.txt"  # the file to which the command copies its output
COMPILED: Final = "pycache"  # the folder of the compiled files

_STDLIB: Final = Path(sysconfig.get_path("stdlib"))
_PACKAGES: Final = (
    "asyncio concurrent/futures email encodings http importlib json logging multiprocessing unittest xml/dom"
)
FOLDERS: Final = (_STDLIB, *(folder for name in _PACKAGES.split() if (folder := _STDLIB / name).is_dir()))
"""The folders of the standard library that are compiled, without their subfolders."""

_TEE: Final = """
import subprocess, sys
with (
    open(sys.argv[1], "wb") as copy,
    subprocess.Popen(sys.argv[2:], stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as child,
):
    for line in child.stdout:
        for file in (copy, sys.stdout.buffer):
            file.write(line)
            file.flush()
sys.exit(child.returncode)
"""
"""Does what `tee` does: copies the output of a command to a file."""


def build(_input: Any) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
    """Compile a part of the standard library. A file that penstock does not touch gets a copy of the output."""
    compiler = [sys.executable, "-IBu", "-X", f"pycache_prefix={Path.cwd() / COMPILED}", "-m", "compileall"]
    return command([sys.executable, "-I", "-c", _TEE, COPY, *compiler, "-f", "-r", "0", *FOLDERS])


async def silent(_input: Any) -> AsyncIterator[Event]:  # noqa: ASYNC900  (that is what a producer is)
    yield Event(data="nothing more for an hour")
    await trio.sleep(3600)
    yield Event(data="an hour later")


producers: Final = {"build": build, "silent": silent}
