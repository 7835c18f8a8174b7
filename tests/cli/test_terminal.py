"""`penstock runs` on a terminal: a status line that is erased, and lines that stay."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import trio

from tests.support.command_line import environment
from tests.support.runs_following import http_proxy
from tests.support.serving import GUARD, Tap, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"
"""What hides the cursor, and shows it again."""


@dataclass
class Terminal:
    master: int
    process: trio.Process
    text: str = ""

    async def until(self, pattern: str) -> None:
        while not re.search(pattern, self.text):
            piece = await self._piece()
            assert piece, f"it ended without {pattern!r}: {self.text!r}"

    async def end(self) -> int:
        while await self._piece():
            pass
        return await self.process.wait()

    async def _piece(self) -> bool:
        await trio.lowlevel.wait_readable(self.master)
        try:
            piece = os.read(self.master, 65536)
        except OSError:  # nobody has it any more
            return False
        self.text += piece.decode()
        return bool(piece)


@asynccontextmanager
async def terminal(url: str, *args: str, stdout: int | None = None, **env: str) -> AsyncIterator[Terminal]:
    """`penstock runs` on a terminal; its standard output may be elsewhere."""
    master, slave = pty.openpty()
    line = [sys.executable, "-m", "penstock", "runs", "--url", url, *args]
    with trio.fail_after(GUARD):
        process = await trio.lowlevel.open_process(
            line,
            stdin=subprocess.DEVNULL,
            stdout=slave if stdout is None else stdout,
            stderr=slave,
            env=environment(**{"TERM": "xterm", "COLUMNS": "80", **env}),
        )
        os.close(slave)
        try:
            yield Terminal(master, process)
        finally:
            if process.returncode is None:
                process.kill()
            with trio.CancelScope(shield=True):
                await process.wait()
            os.close(master)


def seen(text: str) -> list[str]:
    kept: list[str] = []
    for line in text.replace(HIDE, "").replace(SHOW, "").split("\n"):
        *_, shown = re.split(r"\r?(?:\x1b\[1A)?\x1b\[2K", line)
        if "\x1b[1A" in line:
            kept.pop()
        kept.append(shown.strip("\r"))
    return [line for line in kept if line]


async def test_events_stand_above_a_status_line_that_is_gone_in_the_end() -> None:
    tap = Tap()
    async with serving({"tap": tap}) as server, http_proxy(server.port) as between:
        run_id = await server.start("tap")
        async with terminal(f"http://127.0.0.1:{between.port}", "follow", run_id) as screen:
            await screen.until(r"connected · 0 events, 0 bytes, \d+\.\d s")
            tap.feed("one\x1b[2J", "two")
            await screen.until(r"connected · 2 events, \d+ bytes")
            between.refuse()
            await screen.until(r"(was cut|refused), again in \d\.\d s · 2 events")
            await between.accept()
            await screen.until(r"connected · 2 events, \d+ bytes, \d+\.\d s, \d+ reconnects?")
            tap.feed("x" * 300)
            tap.end()
            assert await screen.end() == 0
    stays = seen(screen.text)
    assert stays[:3] == [r"1  message  one\x1b[2J", "2  message  two", "3  message  " + "x" * 300]
    assert stays[3] == "4  message  [DONE]"
    assert stays[4].startswith(f"penstock: run {run_id}: completed (end_turn); 4 events, ")
    assert len(stays) == 5
    assert "\x1b[2J" not in screen.text
    assert screen.text.rindex(SHOW) > screen.text.rindex(HIDE)


async def test_a_status_line_on_the_terminal_is_no_part_of_an_output_elsewhere() -> None:
    tap = Tap()
    async with serving({"tap": tap}) as server:
        run_id = await server.start("tap")
        reader, writer = os.pipe()
        async with terminal(server.url, "follow", run_id, "--json", stdout=writer) as screen:
            os.close(writer)
            tap.feed("one")
            await screen.until("connected · 1 event,")
            tap.end()
            assert await screen.end() == 0
        output = os.read(reader, 65536).decode()
        os.close(reader)
    assert output == '{"id": 1, "event": "message", "data": "one"}\n{"id": 2, "event": "message", "data": "[DONE]"}\n'
    assert '"id"' not in screen.text


async def test_a_signal_leaves_the_terminal_with_its_cursor() -> None:
    tap = Tap()
    async with serving({"tap": tap}) as server:
        run_id = await server.start("tap")
        async with terminal(server.url, "follow", run_id) as screen:
            await screen.until("connected · 0 events")
            screen.process.send_signal(signal.SIGTERM)
            assert await screen.end() == 143
        tap.end()
    assert screen.text.rindex(SHOW) > screen.text.rindex(HIDE)
    assert not {"Traceback", "stopped"} & set(re.findall("[A-Za-z]+", screen.text))


async def test_where_no_status_line_can_be_or_is_wanted_there_is_none() -> None:
    async with serving() as server:
        run_id = await server.start("count", 1)
        async with terminal(server.url, "follow", run_id, TERM="dumb") as dumb:
            assert await dumb.end() == 0
        async with terminal(server.url, "follow", run_id, "--quiet") as quiet:
            assert await quiet.end() == 0
    events = "1  message  1\r\n2  message  [DONE]\r\n"
    assert dumb.text.startswith(f"{events}penstock: run {run_id}: completed (end_turn); 2 events, ")
    assert "\x1b" not in dumb.text
    assert quiet.text == events


async def test_a_table_on_a_terminal_has_colours() -> None:
    async with serving() as server:
        await server.ended_run(await server.start("count", 1))
        async with terminal(server.url, "list") as coloured:
            assert await coloured.end() == 0
    assert "\x1b[32mcompleted (end_turn)" in coloured.text
