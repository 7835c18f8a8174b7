"""Servers in processes of their own: started, signalled, and waited for."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx2
import trio

from tests.support.serving import GUARD, Client

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping
    from contextlib import AbstractAsyncContextManager

ROOT = Path(__file__).parents[2]


class Process(Client):
    def __init__(self, process: trio.Process, url: str, client: httpx2.AsyncClient) -> None:
        super().__init__(url, client)
        self._process = process
        self.said = ""
        """What it has written to stderr so far."""
        self.silent = trio.Event()
        """Set when the pipe is closed: the process and all that it has started are gone."""

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)

    async def exit_code(self) -> int:
        return await self._process.wait()


Kind = TypeVar("Kind", bound=Process)


@asynccontextmanager
async def process_of(
    kind: type[Kind], *command: str, env: Mapping[str, str], serves: bool = True
) -> AsyncIterator[Kind]:
    """A process of this kind in a group of its own, killed when the block is left; `serves`: wait for its URL."""
    environment = {**env, "PYTHONUNBUFFERED": "1"}
    with trio.fail_after(GUARD):
        child = await trio.lowlevel.open_process(
            command,
            cwd=ROOT,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        async with httpx2.AsyncClient(timeout=GUARD) as client, trio.open_nursery() as nursery:
            server = kind(child, "", client)
            try:
                if serves:
                    await nursery.start(_read, server)
                else:
                    nursery.start_soon(_read, server)
                yield server
            finally:
                with suppress(ProcessLookupError):
                    os.killpg(child.pid, signal.SIGKILL)  # plain Hypercorn has a worker process
                with trio.CancelScope(shield=True):
                    await child.wait()


def process(*command: str) -> AbstractAsyncContextManager[Process]:
    """A process that serves: started, ready, and killed when the block is left, if it is still there."""
    return process_of(Process, *command, env=os.environ)


async def _read(server: Process, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
    """Read stderr to its end; the server has started when its URL stands there."""
    stderr = server._process.stderr
    assert stderr is not None
    async with stderr:
        while piece := await stderr.receive_some():
            server.said += piece.decode()
            if not server.url and (url := re.search(r"https?://127\.0\.0\.1:\d+", server.said)):
                server.turn_to(url[0])
                task_status.started()
    server.silent.set()
    assert server.url or task_status is trio.TASK_STATUS_IGNORED, f"it did not start: {server.said}"


def serving_process(**settings: Any) -> Any:
    return process(sys.executable, "-m", "tests.support.served", json.dumps(settings))
