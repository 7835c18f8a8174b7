"""Each example does what its docstring says."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from penstock import Event, open_log, open_supervisor
from tests.support.processes import process
from tests.support.redis_servers import shared_server
from tests.support.wire import DONE, blocks_of, ids

EXAMPLES = Path(__file__).parent.parent / "examples"


def output_of(example: str) -> list[str]:
    done = subprocess.run([sys.executable, EXAMPLES / example], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_embedded_stops_the_build_and_both_readers_see_its_end() -> None:
    lines = output_of("embedded.py")
    stopped = next(line for line in lines if line.startswith("build: stopped ("))
    # None: its own sleep was over in the same instant, and Trio keeps the reason of whatever woke the task.
    assert stopped[16:-13] in {"run cancelled: Ann pressed stop", "None"}
    assert lines[-1].startswith("cancelled: Ann pressed stop, ")
    ann, ben = (next(line for line in lines if line.startswith(name)) for name in ("Ann: ", "Ben: "))
    assert int(ann.split()[2]) == int(ben.split()[2]) + 10


def test_by_hand_reads_back_from_the_cursor_what_it_wrote() -> None:
    lines = output_of("by_hand.py")
    assert lines[0] == "wrote 20.5 as entry 1"
    assert lines[3:] == ['2 data: {"degrees":20.7}', '3 data: {"degrees":21.0}', "4 data: [DONE]"]


async def test_a_plain_redis_client_reads_a_run_from_the_cursor_on_and_to_its_end() -> None:
    server = shared_server()
    async with open_log(server.url) as log, open_supervisor(log) as supervisor:
        async with supervisor.open_run("plain") as run:
            await run.write(Event(data="one"))
            await run.write(Event(data="two\nlines", event="x"))
        command = [sys.executable, str(EXAMPLES / "plain_redis.py"), server.url, "plain"]
        done = await trio.run_process(command, capture_stdout=True)
        resumed = await trio.run_process([*command, "2"], capture_stdout=True)
    lines = done.stdout.decode().splitlines()
    assert [line.split(maxsplit=2)[::2] for line in lines] == [
        ["1", "data: one"],
        ["2", "event: x | data: two | data: lines"],
        ["3", "data: [DONE]"],
    ]
    assert resumed.stdout.decode().splitlines() == lines[2:]


async def test_a_plain_redis_client_says_that_there_is_no_such_run() -> None:
    command = [sys.executable, str(EXAMPLES / "plain_redis.py"), shared_server().url, "nothing"]
    done = await trio.run_process(command, check=False, capture_stderr=True)
    assert (done.returncode, done.stderr[:24]) == (1, b"there is no run 'nothing")


HYPERCORN = (sys.executable, "-m", "hypercorn", "-k", "trio", "--bind", "127.0.0.1:0")
UVICORN = (sys.executable, "-m", "uvicorn", "--port", "0", "--app-dir", "examples")
PENSTOCK = (sys.executable, "-m", "penstock", "serve", "--bind", "127.0.0.1:0", "--producers")


@pytest.mark.parametrize(
    "command", [(*HYPERCORN, "examples/smallest.py:app"), (*UVICORN, "smallest:app")], ids=["trio", "asyncio"]
)
async def test_the_smallest_endpoint_counts_to_five(command: tuple[str, ...]) -> None:
    async with process(*command) as server:
        blocks = blocks_of((await server.client.get("/")).text)
        server.signal(signal.SIGTERM)
        await server.exit_code()
    assert [(block.id, block.data) for block in blocks] == [(n, str(n)) for n in range(1, 6)]


@pytest.mark.parametrize(
    "command",
    [(*HYPERCORN, "examples/agent.py:app"), (*PENSTOCK, "examples/agent.py:producers")],
    ids=["plain hypercorn", "penstock serve"],
)
async def test_the_agent_can_be_left_and_found_again_at_the_next_word(command: tuple[str, ...]) -> None:
    async with process(*command) as server:
        run_id = await server.start("agent", "hello")
        async with server.reading(run_id) as reader:
            seen = await reader.take(3)
        seen += await server.read(run_id, starting_after=seen[-1].id)
        assert ids(seen) == list(range(1, len(seen) + 1))
        assert seen[-1].data == DONE
        assert '"hello"' in "".join(block.json["content"] for block in seen[1:-2])
        server.signal(signal.SIGTERM)
        assert await server.exit_code() == 0
