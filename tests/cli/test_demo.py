"""The demo passes, leaves nothing behind, and fails when what it claims is not so."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path

import pytest

from penstock.cli.demo import Cut, Reading, Received, difference, id_fault, judge_cancel, judge_reading
from tests.support.command_line import penstock

WRITTEN = ["Listing '/lib'...", *(f"Compiling '/lib/{number}.py'..." for number in range(20))]
COMPILED = 20


def reading() -> Reading:
    """What a whole reading brings."""
    events = [Received(number, "stdout", line) for number, line in enumerate(WRITTEN, 1)]
    events += [Received(len(events) + 1, "exit", '{"exit_code":0}'), Received(len(events) + 2, "message", "[DONE]")]
    return Reading(events, [Cut(5, True, 3), Cut(10, True, 2)], 204)


def held(tampered: Reading, written: list[str] = WRITTEN, compiled: int = COMPILED) -> list[bool]:
    return [check.held for check in judge_reading(tampered, written, compiled)]


async def test_the_demo_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with penstock("demo", TMPDIR=str(tmp_path)) as program:
        assert await program.end() == 0, program.words
        pid = int((await program.until(r"process (\d+)"))[1])
        assert int((await program.until(r"(\d+) lines arrived over HTTP: every line, once, in order"))[1]) > 200
        await program.until("all 7 checks held")
        assert program.words.count("ok      ") == 7
    assert_nothing_left(tmp_path, pid)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_a_signal_in_mid_stream_leaves_nothing_behind(tmp_path: Path, number: signal.Signals) -> None:
    async with penstock("demo", TMPDIR=str(tmp_path)) as program:
        pid = int((await program.until(r"process (\d+)"))[1])
        await program.until("cut after id")
        program.process.send_signal(number)
        assert await program.end() == 130
        assert "stopped by a signal; nothing is left running" in program.lines
    assert_nothing_left(tmp_path, pid)


def assert_nothing_left(folder: Path, pid: int) -> None:
    """Neither the server nor what it started, nor a file."""
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not commands_in(folder)
    assert not list(folder.iterdir())


def commands_in(folder: Path) -> list[bytes]:
    """The processes whose command line names a folder."""
    return [words for path in Path("/proc").glob("[0-9]*/cmdline") if str(folder).encode() in (words := read(path))]


def read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:  # it has ended meanwhile
        return b""


async def test_a_port_in_use_fails_with_the_servers_words() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        async with penstock("demo", "--port", taken.getsockname()[1]) as program:
            assert await program.end() == 1
            assert "the demo FAILED: the server did not start; it said:" in program.lines
            await program.until("Address already in use")


def test_a_whole_reading_holds() -> None:
    assert all(held(reading()))


def test_a_lost_line_fails() -> None:
    tampered = reading()
    del tampered.events[7]
    assert held(tampered) == [True, True, False, False, True]


def test_a_repeated_line_fails() -> None:
    tampered = reading()
    tampered.events.insert(7, tampered.events[7])
    assert held(tampered) == [True, True, False, False, True]


def test_two_lines_out_of_order_fail() -> None:
    tampered = reading()
    tampered.events[3], tampered.events[4] = tampered.events[4], tampered.events[3]
    assert held(tampered) == [True, True, False, False, True]


def test_a_changed_line_fails_although_the_ids_are_right() -> None:
    tampered = reading()
    tampered.events[3] = tampered.events[3]._replace(data="Compiling something else")
    assert held(tampered) == [True, True, False, True, True]


def test_a_line_that_the_command_did_not_write_fails() -> None:
    assert held(reading(), WRITTEN[:-1], COMPILED - 1) == [True, True, False, True, True]


def test_a_cut_after_the_end_fails() -> None:
    tampered = reading()
    tampered.cuts[1] = Cut(23, running=False, missed=0)
    assert held(tampered) == [True, False, True, True, True]


def test_a_cut_too_few_fails() -> None:
    tampered = reading()
    del tampered.cuts[1]
    assert held(tampered) == [True, False, True, True, True]


def test_done_before_the_end_fails() -> None:
    tampered = reading()
    tampered.events[-1] = tampered.events[-1]._replace(data="more")
    assert held(tampered) == [True, True, True, True, False]


def test_another_answer_than_204_at_the_end_fails() -> None:
    tampered = reading()
    tampered.status_at_end = 200
    assert held(tampered) == [True, True, True, True, False]


def test_a_command_that_failed_or_compiled_too_little_fails() -> None:
    tampered = reading()
    tampered.events[-2] = tampered.events[-2]._replace(data='{"exit_code":1}')
    assert held(tampered) == [False, True, True, True, True]
    assert held(reading(), compiled=COMPILED - 1) == [False, True, True, True, True]


def test_nothing_at_all_fails_everything() -> None:
    assert not any(check.held for check in judge_reading(Reading(), ["a line"], 0))


@pytest.mark.parametrize(
    "seconds,names,last,holds",
    [
        (0.02, ["message", "cancelled", "message"], "[DONE]", True),
        (1.5, ["message", "cancelled", "message"], "[DONE]", False),
        (0.02, ["message", "message"], "[DONE]", False),
        (0.02, ["message", "cancelled"], "{}", False),
    ],
)
def test_a_cancel_holds_if_it_was_quick_and_the_stream_says_so(
    seconds: float, names: list[str], last: str, holds: bool
) -> None:
    assert judge_cancel(seconds, names, last).held is holds


@pytest.mark.parametrize(
    "written,arrived,words",
    [
        (["a", "b"], ["a", "b"], None),
        ([], [], None),
        (["a", "b"], ["a", "c"], "line 2 was written as 'b', and arrived as 'c'"),
        (["a", "b"], ["a"], "2 lines were written, and 1 arrived"),
        (["a"], ["a", "a"], "1 lines were written, and 2 arrived"),
    ],
)
def test_the_first_difference_is_named(written: list[str], arrived: list[str], words: str | None) -> None:
    assert difference(written, arrived) == words


@pytest.mark.parametrize(
    "ids,words",
    [
        ([1, 2, 3], None),
        ([], "there are none"),
        ([2], "id 2 came where 1 was due"),
        ([1, 3], "id 3 came where 2 was due"),
        ([1, 1], "id 1 came where 2 was due"),
    ],
)
def test_a_fault_in_the_ids_is_named(ids: list[int], words: str | None) -> None:
    assert id_fault(ids) == words


async def test_a_server_that_skips_an_event_on_resuming_fails_the_demo(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from dataclasses import replace\n"
        "from penstock.asgi import requests\n"
        "checked = requests.stream_request\n"
        "def stream_request(*args):\n"
        "    wanted = checked(*args)\n"
        "    return replace(wanted, after=wanted.after + 1) if wanted.after else wanted\n"
        "requests.stream_request = stream_request\n"
    )
    async with penstock("demo", PYTHONPATH=str(tmp_path)) as program:
        assert await program.end() == 1, program.words
        await program.until("FAILED  .* lines arrived over HTTP: NOT what was written: line ")
        await program.until(r"FAILED  ids 1 to \d+ over 3 connections: id \d+ came where \d+ was due")
        await program.until("2 of 7 checks FAILED")
