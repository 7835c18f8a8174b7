"""`penstock runs follow` in a process of its own, before real servers that are stopped, cut off, and gone for good."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import trio

from penstock import Event
from tests.support.command_line import GUARD, environment, ran
from tests.support.processes import Process, process_of
from tests.support.runs_answers import answering, event, record, stream
from tests.support.runs_following import following
from tests.support.runs_producers import until_told
from tests.support.serving import Tap, serving
from tests.support.wire import DONE

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AbstractAsyncContextManager
    from pathlib import Path

    from tests.support.redis_servers import Endpoint


def serving_on(port: int, log: str = "memory://") -> AbstractAsyncContextManager[Process]:
    line = (sys.executable, "-m", "penstock", "serve", "--producers", "tests.support.runs_producers:producers")
    options = ("--log", log, "--bind", f"127.0.0.1:{port}", "--drain-timeout", "0")
    return process_of(Process, *line, *options, env=environment())


@contextmanager
def kept_port() -> Iterator[int]:
    """A port that a server may have again and again, and nobody else in between: it is bound here, too."""
    with socket.socket() as keeper:
        keeper.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        keeper.bind(("127.0.0.1", 0))
        yield keeper.getsockname()[1]


def counted(last: int) -> list[tuple[int, str]]:
    """The events of a run that has counted, whose last id this is."""
    return [(number, str(number)) for number in range(1, last)] + [(last, DONE)]


async def test_over_a_server_that_stops_twice_every_event_is_printed_once(server: Endpoint, tmp_path: Path) -> None:
    told = tmp_path / "told"
    with kept_port() as port:
        async with serving({"until_told": until_told}, server.url) as owner:
            run_id = await owner.start("until_told", str(told))
            async with following(f"http://127.0.0.1:{port}", run_id, "--json") as follower:
                for number in (signal.SIGTERM, signal.SIGKILL):
                    async with serving_on(port, server.url) as between:
                        await follower.more()
                        between.signal(number)
                        await between.exit_code()
                async with serving_on(port, server.url):
                    await follower.more()
                    told.touch()
                    assert await follower.end() == 0
            run = await owner.run(run_id)
    assert [(each["id"], each["data"]) for each in follower.events] == counted(run["seq"])
    assert f"run {run_id}: completed (end_turn); {run['seq']} events, " in follower.err[-1]
    assert int(re.findall(r"(\d+) reconnects", follower.err[-1])[0]) == len(follower.err) - 1 >= 2


async def test_when_the_server_is_gone_for_good_it_gives_up_and_says_how_to_go_on() -> None:
    with kept_port() as port:
        async with serving_on(port) as server:
            run_id = await server.start("silent")
            async with following(server.url, run_id, "--give-up-after", 0.5) as follower:
                await follower.printed(1)
                server.signal(signal.SIGKILL)
                assert await follower.end() == 1
    assert follower.out == ["1  message  only this"]
    assert follower.err[-1].startswith("penstock: gave up after 0.5 s: no connection: Connection refused")
    assert follower.err[-1].endswith("; go on with --after 1")
    assert all("going on after 1 in" in line for line in follower.err[:-1])


async def test_a_cancel_from_elsewhere_ends_it_with_code_3() -> None:
    async with serving() as server:
        run_id = await server.start("silent")
        async with following(server.url, run_id, "--json") as follower:
            cancel = ("runs", "--url", server.url, "cancel", run_id, "--reason", "\x1b[2Jenough")
            assert (await trio.to_thread.run_sync(ran, *cancel)).exit_code == 0
            assert await follower.end() == 3
    assert [each["event"] for each in follower.events] == ["cancelled", "message"]
    assert follower.err[-1].startswith(rf"penstock: run {run_id}: cancelled (cancelled): \x1b[2Jenough; 2 events, ")


async def test_ctrl_c_ends_it_in_one_line() -> None:
    tap = Tap()
    async with serving({"tap": tap}) as server:
        async with following(server.url, await server.start("tap"), "--json") as follower:
            tap.feed("one", "two")
            await follower.printed(2)
            follower.process.send_signal(signal.SIGINT)
            assert await follower.end() == 130
        tap.end()
    assert follower.ids == [1, 2]
    assert follower.err == ["penstock: stopped; go on with --after 2"]


async def test_each_event_is_printed_at_once_and_a_closed_pipe_ends_it_also_in_a_silence() -> None:
    tap = Tap()
    async with serving({"tap": tap}) as server:
        run_id = await server.start("tap")
        line = f"{sys.executable} -m penstock runs --url {server.url} follow {run_id}"
        tap.feed("one")
        with trio.fail_after(GUARD):
            done = await trio.run_process(
                ["/bin/bash", "-c", f"{line} | head -1; exit ${{PIPESTATUS[0]}}"],
                capture_stdout=True,
                capture_stderr=True,
                check=False,
                env=environment(PYTHONUNBUFFERED=""),
            )
        assert (done.returncode, done.stdout, done.stderr) == (0, b"1  message  one\n", b"")
        tap.end()


def test_a_slow_reader_gets_a_long_event_whole_although_signals_interrupt_the_write() -> None:
    with answering(stream(event(1, "x" * 300_000), event(2, "[DONE]")), record()) as server:
        line = f"{sys.executable} -u -m penstock runs --url {server.url} follow r1 --json | (sleep 1; cat)"
        done = subprocess.run(["/bin/bash", "-c", line], capture_output=True, text=True, check=True, env=environment())
    assert [len(json.loads(each)["data"]) for each in done.stdout.splitlines()] == [300_000, len(DONE)]


async def test_what_a_producer_sends_cannot_drive_the_terminal() -> None:
    evil = "".join(map(chr, [*range(1, 0x20), *range(0x7F, 0xA0)])) + "\u202e[red]é"

    async def wild(_input: Any) -> AsyncIterator[Event]:
        yield Event(data=evil, event="a\x1b[2J[red]")
        yield Event(data="x" * 1_000_000)

    async with serving({"wild": wild}) as server:
        run_id = await server.start("wild")
        async with following(server.url, run_id, PYTHONIOENCODING="iso8859-7") as people:
            assert await people.end() == 0
        async with following(server.url, run_id, "--json", "--quiet") as programs:
            assert await programs.end() == 0
    words = "\n".join(people.out)
    assert not [each for each in words if each not in "\t\n" and not each.isprintable()]
    assert people.out[0].startswith(r"1  a\x1b[2J[red]  \x01\x02\x03\x04\x05\x06\x07\x08")
    assert r"\x9f\u202e[red]\xe9" in words
    assert programs.events[0]["data"] == evil.replace("\r", "\n")
    assert programs.events[0]["event"] == "a\x1b[2J[red]"
    assert len(programs.events[1]["data"]) == 1_000_000
    assert programs.err == []


async def test_it_says_why_there_is_no_stream_and_comes_back_when_there_is_one() -> None:
    tap = Tap()
    async with serving({"tap": tap}, max_readers_per_run=1) as server:
        await server.start("tap", run_id="r1")
        tap.feed("one")
        async with server.reading("r1") as other:
            await other.take(1)
            async with following(server.url, "r1", "--give-up-after", 0.5) as refused:
                assert await refused.end() == 1
            assert "gave up" in refused.err[-1]
            assert "the server answered 429 TOO_MANY_READERS_OF_RUN: " in refused.err[-1]
        async with following(server.url, "r1", "--json") as follower:
            await follower.printed(1)
            tap.end()
            assert await follower.end() == 0
    assert follower.ids == [1, 2]
