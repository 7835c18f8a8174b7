"""`penstock runs follow` in a process of its own, with what it prints on each of its outputs."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import trio

from tests.support.command_line import environment
from tests.support.proxy import Proxy
from tests.support.serving import GUARD, eventually

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.proxy import _Connection


@dataclass
class Follower:
    process: trio.Process
    out: list[str] = field(default_factory=list)
    err: list[str] = field(default_factory=list)
    read: trio.Event = field(default_factory=trio.Event)
    """Set when it has closed both."""

    @property
    def events(self) -> list[Any]:
        return [json.loads(line) for line in self.out]

    @property
    def ids(self) -> list[int]:
        return [each["id"] for each in self.events]

    async def printed(self, count: int) -> None:
        await eventually(lambda: len(self.out) >= count or self.read.is_set())
        assert len(self.out) >= count, (self.out, self.err)

    async def more(self, count: int = 5) -> None:
        await self.printed(len(self.out) + count)

    async def said(self, words: str) -> None:
        await eventually(lambda: words in "\n".join(self.err) or self.read.is_set())
        assert words in "\n".join(self.err), self.err

    async def end(self) -> int:
        await self.read.wait()
        code = await self.process.wait()
        assert "Traceback" not in "\n".join(self.err), self.err
        return code


@asynccontextmanager
async def following(url: str, run_id: str, *options: object, **env: str) -> AsyncIterator[Follower]:
    line = [sys.executable, "-m", "penstock", "runs", "follow", run_id, "--url", url, *map(str, options)]
    with trio.fail_after(GUARD):
        process = await trio.lowlevel.open_process(
            line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment(**env)
        )
        follower = Follower(process)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_listen, follower)
            try:
                yield follower
            finally:
                if process.returncode is None:
                    process.kill()
                with trio.CancelScope(shield=True):
                    await process.wait()


async def _listen(follower: Follower) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_read, follower.process.stdout, follower.out)
        nursery.start_soon(_read, follower.process.stderr, follower.err)
    follower.read.set()


async def _read(stream: Any, lines: list[str]) -> None:
    rest = b""
    async with stream:
        async for piece in stream:
            *whole, rest = (rest + piece).split(b"\n")
            lines += [line.decode() for line in whole]
    if rest:
        lines.append(rest.decode())


class HttpProxy(Proxy):
    async def _read_replies(self, server: trio.SocketStream, late: trio.MemorySendChannel[tuple[float, bytes]]) -> None:
        with late, suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for piece in server:
                await late.send((trio.current_time(), bytes(piece)))

    def _is_kept_back(self, connection: _Connection, frame: bytes) -> Literal[False]:  # noqa: ARG002
        return False


@asynccontextmanager
async def http_proxy(port: int) -> AsyncIterator[HttpProxy]:
    """A proxy to the server at this port of 127.0.0.1; gone with all its connections when the block is left."""
    async with trio.open_nursery() as nursery:
        between = HttpProxy(port, nursery)
        await between.accept()
        try:
            yield between
        finally:
            between.refuse()
            nursery.cancel_scope.cancel()
