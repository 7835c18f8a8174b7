"""The demo passes, leaves nothing behind, and fails when what it claims is not so."""

from __future__ import annotations

import os
import signal
import socket
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from penstock.cli.demo import Cut, Reading, Received, check_cancel, check_reading, difference, id_fault
from tests.support.command_line import penstock

if TYPE_CHECKING:
    from collections.abc import Callable

WRITTEN = ["Listing '/lib'...", *(f"Compiling '/lib/{number}.py'..." for number in range(20))]
COMPILED = 20
COMMAND, CUTS, LINES, IDS, DONE = range(5)
"""The checks of a reading."""


def reading() -> Reading:
    events = [Received(number, "stdout", line) for number, line in enumerate(WRITTEN, 1)]
    events += [Received(len(events) + 1, "exit", '{"exit_code":0}'), Received(len(events) + 2, "message", "[DONE]")]
    return Reading(events, [Cut(5, True, 3), Cut(10, True, 2)], 204)


def failed(got: Reading, written: list[str] = WRITTEN, compiled: int = COMPILED) -> list[int]:
    return [number for number, check in enumerate(check_reading(got, written, compiled)) if not check.held]


async def test_the_demo_passes_and_leaves_nothing_behind(tmp_path: Path) -> None:
    async with penstock("demo", TMPDIR=str(tmp_path)) as program:
        assert await program.end() == 0, program.words
        pid = int((await program.until(r"process (\d+)"))[1])
        assert int((await program.until(r"(\d+) lines arrived over HTTP: every line, once, in order"))[1]) > 200
        await program.until("all 7 checks held")
        assert program.words.count("ok      ") == 7
    assert_nothing_left(tmp_path, pid)


async def test_a_signal_in_mid_stream_leaves_nothing_behind(tmp_path: Path) -> None:
    async with penstock("demo", TMPDIR=str(tmp_path)) as program:
        pid = int((await program.until(r"process (\d+)"))[1])
        await program.until("cut after id")
        program.process.send_signal(signal.SIGTERM)  # Ctrl-C comes the same way
        assert await program.end() == 130
        assert "stopped by a signal; nothing is left running" in program.lines
    assert_nothing_left(tmp_path, pid)


def assert_nothing_left(folder: Path, pid: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert not commands_in(folder)
    assert not list(folder.iterdir())


def commands_in(folder: Path) -> list[bytes]:
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


def data(number: int, text: str) -> Callable[[Reading], None]:
    return lambda got: got.events.__setitem__(number, got.events[number]._replace(data=text))


def test_a_whole_reading_holds() -> None:
    assert not failed(reading())


@pytest.mark.parametrize(
    "tamper,faults",
    [
        pytest.param(lambda got: got.events.pop(7), [LINES, IDS], id="a lost line"),
        pytest.param(lambda got: got.events.insert(7, got.events[7]), [LINES, IDS], id="a repeated line"),
        pytest.param(lambda got: got.events.insert(3, got.events.pop(4)), [LINES, IDS], id="two lines out of order"),
        pytest.param(data(3, "Compiling something else"), [LINES], id="a changed line, with the right ids"),
        pytest.param(lambda got: got.cuts.__setitem__(1, Cut(23, False, 0)), [CUTS], id="a cut after the end"),
        pytest.param(lambda got: got.cuts.pop(), [CUTS], id="a cut too few"),
        pytest.param(data(-1, "more"), [DONE], id="no last event"),
        pytest.param(lambda got: setattr(got, "status_at_end", 200), [DONE], id="another response than 204 at the end"),
        pytest.param(data(-2, '{"exit_code":1}'), [COMMAND], id="a command that failed"),
    ],
)
def test_what_is_wrong_with_a_reading_fails_its_checks(tamper: Callable[[Reading], None], faults: list[int]) -> None:
    tampered = reading()
    tamper(tampered)
    assert failed(tampered) == faults


def test_what_the_command_did_not_write_or_compile_fails() -> None:
    assert failed(reading(), WRITTEN[:-1], COMPILED - 1) == [LINES]
    assert failed(reading(), compiled=COMPILED - 1) == [COMMAND]
    assert failed(Reading(), ["a line"], 0) == [COMMAND, CUTS, LINES, IDS, DONE]


def test_a_cancel_holds_if_it_was_quick_and_the_stream_says_so() -> None:
    names = ["message", "cancelled", "message"]
    assert check_cancel(0.02, names, "[DONE]").held
    assert not check_cancel(1.5, names, "[DONE]").held
    assert not check_cancel(0.02, ["message", "message"], "[DONE]").held
    assert not check_cancel(0.02, names, "{}").held


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
