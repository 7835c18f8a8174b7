"""`penstock exec`: a command's output as a stream, and its exit code."""

from __future__ import annotations

import signal
import sys
from typing import TYPE_CHECKING

import httpx2
import pytest

from tests.support.command_line import ANY_PORT, GUARD, penstock, refused
from tests.support.wire import DONE, blocks_of

if TYPE_CHECKING:
    from pathlib import Path

PRINTER = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(int(sys.argv[1]))"


async def test_exec_serves_a_commands_output_again_and_again_until_it_is_stopped() -> None:
    args = ("exec", *ANY_PORT, "--", sys.executable, "-c", PRINTER, 0)
    async with penstock(*args) as program, httpx2.AsyncClient(timeout=GUARD) as client:
        url = (await program.until(r"curl -N (http://127\.0\.0\.1:\d+/v1/runs/exec/stream)"))[1]
        await program.until("the command ended with exit code 0; .* its stream stays until Ctrl-C")
        blocks = blocks_of((await client.get(url)).text)
        assert {(block.event, block.data) for block in blocks} == {
            ("stdout", "one"),
            ("stderr", "two"),
            ("exit", '{"exit_code":0}'),
            (None, DONE),
        }
        resumed = await client.get(url, headers={"Last-Event-ID": "2"})
        assert blocks_of(resumed.text) == blocks[2:]
        assert (await client.get(url, headers={"Last-Event-ID": "4"})).status_code == 204
        refusal = await client.post(url.replace("/exec/stream", ""), json={"producer": "command"})
        assert refusal.status_code == 400
        program.process.send_signal(signal.SIGINT)
        assert await program.end() == 0


async def test_exec_can_leave_with_the_commands_exit_code_and_says_no_traceback() -> None:
    async with penstock("exec", *ANY_PORT, "--exit-after", 0, sys.executable, "-c", PRINTER, 7) as program:
        assert await program.end() == 7
        assert "Traceback" not in program.words
        await program.until("the command ended with exit code 7; .* entries$")


async def test_exec_says_that_its_command_was_cancelled() -> None:
    args = ("exec", *ANY_PORT, "--exit-after", 0, "--run-id", "mine", "--", sys.executable, "-c", SLEEPER)
    async with penstock(*args) as program, httpx2.AsyncClient(timeout=GUARD) as client:
        url = (await program.until(r"curl -X POST (\S+/v1/runs/mine/cancel)"))[1]
        assert (await client.post(url, json={"reason": "enough"})).status_code == 202
        assert await program.end() == 143
        await program.until(r"the command was cancelled \(enough\)")


SLEEPER = "import threading; threading.Event().wait()"


async def test_ctrl_c_ends_the_command_of_exec() -> None:
    async with penstock("exec", *ANY_PORT, "--exit-after", 0, sys.executable, "-c", SLEEPER) as program:
        await program.until("curl -X POST")
        program.process.send_signal(signal.SIGINT)
        assert await program.end() == 143
        await program.until("the command was ended: the server was shut down")


async def test_exec_says_that_its_command_could_not_be_started(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("no first line that says what runs it\n")
    script.chmod(0o755)
    async with penstock("exec", *ANY_PORT, "--exit-after", 0, script) as program:
        assert await program.end() == 127
        await program.until("the command was not started: .* that a script begins with #!")


@pytest.mark.parametrize(
    "args,words",
    [
        (
            ("--", "no-such-program", "a"),
            "there is no program 'no-such-program' to run; for a shell's line, give: sh -c",
        ),
        ((), "Missing argument"),
        (("--run-id", "a b", "--", "ls"), "a run id is 1 to 128 letters"),
        (("--nonsense", "ls"), "No such option"),
        (("--bind", "0.0.0.0:0", "--", "ls"), "--insecure"),
    ],
)
def test_exec_refuses_with_what_to_do(args: tuple[str, ...], words: str) -> None:
    assert words in refused("exec", *args)
