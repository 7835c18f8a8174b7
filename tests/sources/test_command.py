"""`command` at its edges, with real processes: what it yields, what it leaves behind (nothing), and when it waits."""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import signal
import sys
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import trio
import trio.testing
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigurationError, PublicError
from penstock.sources.command import LineSplitter, command
from penstock.sse import Event
from penstock.sse.chunks import blocks_of, opened
from penstock.sse.dialects import dialect_named

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator
    from contextlib import AbstractAsyncContextManager

    Source = AbstractAsyncContextManager[AsyncIterator[Event]]

LINES = Event(data="lines", event="stdout")
EXIT_0 = Event(data='{"exit_code":0}', event="exit")


def python(code: str) -> list[str]:
    return [sys.executable, "-ISuc", code]


def sh(code: str) -> list[str]:
    return ["sh", "-c", code]


def out(*lines: str) -> list[Event]:
    return [Event(data=line, event="stdout") for line in lines]


async def events_of(source: Source) -> list[Event]:
    with trio.fail_after(10):
        async with source as events:
            return [event async for event in events]


class Report:
    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.path = str(path)
        self._stream = trio.lowlevel.FdStream(os.open(path, os.O_RDONLY | os.O_NONBLOCK))
        self._writer = os.open(path, os.O_WRONLY)

    async def read(self) -> str:
        self.close_writer()
        text = ""
        while part := await self.receive():
            text += part
        return text

    async def receive(self) -> str:
        with trio.fail_after(10):
            return (await self._stream.receive_some()).decode()

    def close_writer(self) -> None:
        if self._writer >= 0:
            os.close(self._writer)
            self._writer = -1

    def close(self) -> None:
        self.close_writer()
        self._stream.close()


@pytest.fixture
async def report(tmp_path: Path) -> AsyncIterator[Report]:
    report = Report(tmp_path / "report")
    yield report
    report.close()


class Entry(NamedTuple):
    """A row of the process table, from proc_pid_stat(5)."""

    pid: int
    state: str
    parent: int
    group: int


def process_table() -> set[Entry]:
    entries = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            state, parent, group, *_ = path.read_text().rpartition(")")[2].split()
            entries.add(Entry(int(path.parent.name), state, int(parent), int(group)))
    return entries


def own_children() -> set[int]:
    return {entry.pid for entry in process_table() if entry.parent == os.getpid()}


def assert_ended(processes: list[trio.Process]) -> None:
    """Each process has been reaped, and of its group none is left, save what PID 1 has not reaped yet."""
    groups = {process.pid for process in processes}
    assert all(process._proc.returncode is not None for process in processes)
    assert [entry for entry in process_table() if entry.group in groups and entry.state != "Z"] == []


def descriptors() -> set[str]:
    return {path.name for path in Path("/proc/self/fd").iterdir()}


@pytest.fixture(autouse=True)
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[trio.Process]]:
    """The processes of a test. After it nothing may be left: no process, no zombie of ours, no file descriptor."""
    processes = []
    open_process = trio.lowlevel.open_process

    async def recording(*args: Any, **options: Any) -> trio.Process:
        process = await open_process(*args, **options)
        processes.append(process)
        return process

    before = own_children(), descriptors()
    with monkeypatch.context() as patch:
        patch.setattr(trio.lowlevel, "open_process", recording)
        yield processes
    assert_ended(processes)
    assert own_children() <= before[0]
    assert descriptors() <= before[1]


# ---------------------------------------------------------------------------------------------- lines


SPLITS: list[tuple[bytes, int, list[str]]] = [
    (b"", 8, []),
    (b"a", 8, ["a"]),
    (b"a\n", 8, ["a"]),
    (b"\n", 8, [""]),
    (b"\n\na", 8, ["", "", "a"]),
    (b"a\r\nb\r\n", 8, ["a", "b"]),
    (b"\r\n", 8, [""]),
    (b"a\r\r\n", 8, ["a\r"]),
    (b"1%\r2%\r\n", 8, ["1%\r2%"]),
    (b"99%\r", 8, ["99%"]),
    (b"\r", 8, [""]),
    (b"12345678\n", 8, ["12345678"]),
    (b"12345678\r\n", 8, ["12345678"]),
    (b"12345678\r", 8, ["12345678"]),
    (b"12345678", 8, ["12345678"]),
    (b"123456789\n", 8, ["12345678", "9"]),
    (b"12345678\rx\n", 8, ["12345678", "\rx"]),
    (b"1234567812345678\n\n", 8, ["12345678", "12345678", ""]),
    (b"1234567812345678", 8, ["12345678", "12345678"]),
    ("äöü\n".encode(), 4, ["äö", "ü"]),
    ("aäöü\n".encode(), 4, ["aä", "öü"]),
    ("€€\n".encode(), 4, ["€", "€"]),
    ("x😀y😀".encode(), 4, ["x", "😀", "y", "😀"]),
    (b"\xff\xfe\n", 8, ["\ufffd\ufffd"]),
    (b"ok \xc3\nok\n", 8, ["ok \ufffd", "ok"]),
    (b"\x80" * 5, 4, ["\ufffd" * 4, "\ufffd"]),
    (b"\xef\xbb\xbfa\n", 8, ["\ufeffa"]),
    ("a\u2028b\x0bc\x85".encode(), 16, ["a\u2028b\x0bc\x85"]),
    (b"a\0b\n", 8, ["a\0b"]),
]


def split(chunks: list[bytes], max_line_bytes: int) -> list[str]:
    splitter = LineSplitter(max_line_bytes)
    lines: list[str] = []
    for chunk in [*chunks, b""]:
        assert not splitter.ended
        splitter.feed(chunk)
        assert len(splitter._buffer) <= max_line_bytes + 1 + len(chunk)
        lines.extend(iter(splitter.pop, None))
    assert splitter.ended
    return lines


@pytest.mark.parametrize("data,limit,lines", SPLITS)
def test_lines_end_at_lf_and_long_ones_are_cut_between_characters(data: bytes, limit: int, lines: list[str]) -> None:
    assert split([data] if data else [], limit) == lines
    assert split([bytes([byte]) for byte in data], limit) == lines


@given(
    st.lists(st.sampled_from([b"\n", b"\r", b"a", "é".encode(), "😀".encode(), b"\x80"])), st.integers(4, 9), st.data()
)
def test_it_does_not_matter_how_the_bytes_were_cut(pieces: list[bytes], limit: int, data: st.DataObject) -> None:
    whole = b"".join(pieces)
    places = sorted(data.draw(st.sets(st.integers(0, len(whole)))) | {0, len(whole)})
    chunks = [whole[start:end] for start, end in itertools.pairwise(places)]
    assert split(chunks, limit) == split([whole] if whole else [], limit)


@given(st.text(st.sampled_from("\n\ra😀"), min_size=1))
def test_short_lines_are_those_that_a_shell_would_read(text: str) -> None:
    lines = text.removesuffix("\n").split("\n")
    assert split([text.encode()], 10_000) == [line.removesuffix("\r") for line in lines]


async def test_bytes_become_events_line_by_line() -> None:
    code = r"import os; os.write(1, b'a\r\n\n1%\r2%\nf\xc3\xa9 \xff\n\xf0\x9f\x98\x80'); os.write(2, b'\n')"
    events = await events_of(command(python(code)))
    assert [event for event in events if event.event == "stdout"] == out("a", "", "1%\r2%", "fé \ufffd", "😀")
    assert [event for event in events if event.event == "stderr"] == [Event(data="", event="stderr")]
    assert events[-1] == EXIT_0


async def test_each_stream_keeps_its_order() -> None:
    code = "import sys\nfor i in range(2000): print('out', i); print('err', i, file=sys.stderr)"
    events = await events_of(command(python(code)))
    assert [event.data for event in events if event.event == "stdout"] == [f"out {i}" for i in range(2000)]
    assert [event.data for event in events if event.event == "stderr"] == [f"err {i}" for i in range(2000)]
    assert len(events) == 4001
    assert events[-1] == EXIT_0


async def test_a_huge_line_comes_in_pieces_within_the_limit_and_nothing_is_lost() -> None:
    *pieces, exit_ = await events_of(command(python("print('x' + 'é' * 500_000)")))
    texts = [piece.data or "" for piece in pieces]
    assert "".join(texts) == "x" + "é" * 500_000
    assert {len(text.encode()) for text in texts[:-1]} == {64 * 1024 - 1, 64 * 1024}
    assert exit_ == EXIT_0


async def test_a_run_stores_a_carriage_return_as_a_line_feed() -> None:
    async with opened(command(sh(r"printf '1%%\r2%%\n'"))) as events:
        blocks = [blocks_of(event, dialect_named("plain"), max_event_bytes=1024) async for event in events]
    assert [block.data for (block,) in blocks] == [
        b"event: stdout\ndata: 1%\ndata: 2%\n\n",
        b'event: exit\ndata: {"exit_code":0}\n\n',
    ]


# ---------------------------------------------------------------------------------------------- the exit


async def test_after_the_exit_event_there_is_nothing_more() -> None:
    async with command(["true"]) as events:
        assert await anext(events) == EXIT_0
        for _ in range(2):
            with pytest.raises(StopAsyncIteration):
                await anext(events)


@pytest.mark.parametrize(
    "how,members,words",
    [
        ("exit 1", {"exit_code": 1}, "exit code 1$"),
        ("exit 255", {"exit_code": 255}, "exit code 255$"),
        ("kill -KILL $$", {"exit_code": 137, "signal": "SIGKILL"}, r"exit code 137 \(SIGKILL\)$"),
        ("kill -TERM $$", {"exit_code": 143, "signal": "SIGTERM"}, r"exit code 143 \(SIGTERM\)$"),
        ("kill -40 $$", {"exit_code": 168, "signal": "SIG40"}, r"exit code 168 \(SIG40\)$"),
    ],
)
async def test_a_failure_is_told_in_an_event_and_then_raised(how: str, members: dict[str, Any], words: str) -> None:
    async with command(sh(f"echo lines; {how}")) as events:
        assert await anext(events) == LINES
        last = await anext(events)
        assert (last.event, json.loads(last.data or "")) == ("exit", members)
        for _ in range(2):
            with pytest.raises(PublicError, match=words) as caught:
                await anext(events)
            assert caught.value.code == "EXIT_CODE"


async def test_a_program_that_closes_its_output_is_waited_for() -> None:
    assert await events_of(command(sh("exec >&- 2>&-; sleep 0.1; exit 0"))) == [EXIT_0]


# ---------------------------------------------------------------------------------------------- surroundings


@pytest.mark.parametrize("stdin", [None, b"", b"a\nb", b"x" * 1_000_000])
async def test_a_program_reads_what_it_is_given_and_else_nothing(stdin: bytes | None) -> None:
    assert await events_of(command(["wc", "-c"], stdin=stdin)) == [*out(str(len(stdin or b""))), EXIT_0]


async def test_a_program_does_not_read_what_is_the_servers() -> None:
    readable, writable = os.pipe()
    own = os.dup(0)
    try:
        os.dup2(readable, 0)
        os.write(writable, b"secret")
        os.close(writable)
        assert await events_of(command(["cat"])) == [EXIT_0]
    finally:
        os.dup2(own, 0)
        os.close(own)
        os.close(readable)


async def test_a_program_runs_where_and_in_what_it_is_told(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "WHO": "me"}
    for cwd in (tmp_path, str(tmp_path)):
        events = await events_of(command(sh('pwd; echo "$WHO" "$HOME"'), cwd=cwd, env=environment))
        assert events == [*out(str(tmp_path), "me "), EXIT_0]


async def test_the_environment_is_the_servers_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHO", "server")
    assert await events_of(command(sh('echo "$WHO"'))) == [*out("server"), EXIT_0]


async def test_arguments_are_not_seen_by_a_shell(tmp_path: Path) -> None:
    script = tmp_path / "say"
    script.write_text('#!/bin/sh\nprintf "%s\\n" "$@"')
    script.chmod(0o700)
    assert await events_of(command([script, "$HOME *", "", "é", Path("p")])) == [*out("$HOME *", "", "é", "p"), EXIT_0]


async def test_a_program_has_a_session_of_its_own() -> None:
    code = "import os; print(os.getpid() == os.getsid(0) == os.getpgrp())"
    assert await events_of(command(python(code))) == [*out("True"), EXIT_0]


# ---------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    "argv,options,words",
    [
        ("make all", {}, r'argv is a list such as \["make", "all"\].* not \'make all\''),
        (b"make", {}, "argv is a list"),
        ([], {}, "argv is empty"),
        (["make", 3], {}, "argv holds str .* not 3"),
        (["make", b"all"], {}, "argv holds str"),
        (["ma\0ke"], {}, "without NUL"),
        (["cat"], {"stdin": "text"}, "stdin is bytes or None, not str"),
        (["cat"], {"grace": -1}, "grace is a finite number of seconds, 0 or more, not -1"),
        (["cat"], {"grace": float("inf")}, "grace"),
        (["cat"], {"linger": float("nan")}, "linger is a finite"),
        (["cat"], {"max_line_bytes": 3}, "max_line_bytes is 4 or more, not 3"),
    ],
)
def test_an_impossible_argument_is_refused_at_once(argv: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigurationError, match=words):
        command(argv, **options)


@pytest.mark.parametrize(
    "program,cwd,words",
    [
        ("no-such-program", None, "program 'no-such-program': No such file .* on the PATH and executable"),
        ("./no-such-program", ".", "program './no-such-program': No such file"),
        ("./plain", ".", "program './plain': Permission denied; see that it is .*executable"),
        ("./bare", ".", "program './bare': Exec format error; .* begins with #!"),
        ("./plain/x", ".", "program './plain/x': Not a directory"),
        ("true", "gone", "working directory '.*gone': No such file .*see that the server may enter"),
        ("true", "plain", "working directory '.*plain': Not a directory"),
    ],
)
async def test_a_program_that_cannot_be_started_is_an_error_that_says_what_to_do(
    program: str, cwd: str | None, words: str, tmp_path: Path
) -> None:
    (tmp_path / "plain").touch(0o600)
    (tmp_path / "bare").touch(0o700)
    (tmp_path / "bare").write_text("echo")
    with pytest.raises(PublicError, match=words) as caught:
        await events_of(command([program], cwd=None if cwd is None else tmp_path / cwd))
    assert caught.value.code == "COMMAND_NOT_STARTED"


async def test_a_machine_that_cannot_start_a_process_is_not_the_clients_business() -> None:
    with pytest.raises(OSError, match="too long") as caught:
        await events_of(command(["true", "x" * 10_000_000]))
    assert caught.value.errno == errno.E2BIG


async def test_a_command_runs_once() -> None:
    source = command(["true"])
    assert await events_of(source) == [EXIT_0]
    with pytest.raises(RuntimeError, match="call command\\(\\) again"):
        await events_of(source)


def test_a_command_is_a_source_and_not_a_producer_to_be_called() -> None:
    assert not callable(command(["true"]))


async def test_after_the_block_there_is_nothing_to_iterate() -> None:
    async with command(["true"]) as events:
        pass
    with pytest.raises(trio.ClosedResourceError, match="iterate within"):
        await anext(events)


# ---------------------------------------------------------------------------------------------- being cancelled

TIDY = """
import os, signal
report = open(os.environ["REPORT"], "w")
def tidy(number, frame):
    {on_term}
    report.write("tidy")
    report.flush()
    os._exit(0)
signal.signal(signal.SIGTERM, tidy)
"""


def tidy(then: str, on_term: str = "pass") -> list[str]:
    return python(TIDY.format(on_term=on_term) + then)


SILENT = "print('lines')\nwhile True: signal.pause()"


async def cancel(scope: trio.CancelScope) -> None:
    await trio.testing.wait_all_tasks_blocked()
    scope.cancel(reason="enough")


async def seconds_to_cancel(source: Source) -> float:
    """Cancel while the program is waited for in silence, after its first line; how long it took to leave."""
    begin = trio.current_time()
    with trio.fail_after(10), trio.CancelScope() as scope:
        async with trio.open_nursery() as nursery, source as events:
            assert await anext(events) == LINES
            nursery.start_soon(cancel, scope)
            begin = trio.current_time()
            await anext(events)
    assert scope.cancelled_caught
    return trio.current_time() - begin


async def test_cancelling_lets_a_silent_program_tidy_up(report: Report) -> None:
    source = command(tidy(SILENT), env={"REPORT": report.path}, grace=30)
    assert await seconds_to_cancel(source) < 5
    assert await report.read() == "tidy"


async def test_a_program_that_ignores_sigterm_is_killed_after_the_grace() -> None:
    code = "import signal; signal.signal(15, signal.SIG_IGN); print('lines')\nwhile True: signal.pause()"
    assert 0.2 <= await seconds_to_cancel(command(python(code), grace=0.2)) < 5


async def test_without_grace_a_program_is_killed_at_once(report: Report) -> None:
    source = command(tidy(SILENT, "import time; time.sleep(30)"), env={"REPORT": report.path}, grace=0)
    assert await seconds_to_cancel(source) < 5
    assert not await report.read()


@pytest.mark.parametrize("stubborn", [False, True])
async def test_cancelling_ends_grandchildren_even_when_the_program_goes_first(report: Report, stubborn: bool) -> None:
    ignore = "trap '' TERM;" if stubborn else ""
    source = command(
        sh(f'exec 9>"$REPORT"; ({ignore} echo lines; while :; do sleep 30; done) & exec 9>&-; wait'),
        env={**os.environ, "REPORT": report.path},
        grace=0.2 if stubborn else 30,
    )
    assert (0.2 if stubborn else 0) <= await seconds_to_cancel(source) < 5
    assert not await report.read()


async def test_cancelling_gets_through_to_a_program_that_is_held_up_by_its_full_pipe(report: Report) -> None:
    argv = tidy("while True: print('lines')", "os.write(1, b'more\\n' * 100_000)")
    with trio.fail_after(10):
        async with command(argv, env={"REPORT": report.path}, grace=30) as events:
            assert await anext(events) == LINES
    assert await report.read() == "tidy"


async def test_closing_early_ends_the_program(report: Report) -> None:
    async with opened(command(tidy(SILENT), env={"REPORT": report.path}, grace=30)) as events:
        async for event in events:
            assert event == LINES
            break
    assert await report.read() == "tidy"


async def test_an_error_of_the_consumer_ends_the_program_and_stays_as_it_is(report: Report) -> None:
    async def consume() -> None:
        async with command(tidy(SILENT), env={"REPORT": report.path}, grace=30) as events:
            assert await anext(events) == LINES
            raise LookupError("mine")

    with pytest.raises(LookupError, match=r"^mine$"):
        await consume()
    assert await report.read() == "tidy"


async def test_who_iterates_gets_one_cancelled_with_its_reason() -> None:
    caught = None
    async with trio.open_nursery() as nursery, command(sh("echo lines; sleep 30")) as events:
        assert await anext(events) == LINES
        nursery.start_soon(cancel, nursery.cancel_scope)
        try:
            await anext(events)
        except trio.Cancelled as cancelled:
            caught = cancelled
            raise
    assert caught is not None
    assert caught.reason == "enough"


async def test_every_step_can_be_cancelled_with_lines_at_hand() -> None:
    count = 0
    with trio.CancelScope() as scope:
        async with command(["seq", "1000"]) as events:
            async for _event in events:
                count += 1
                if count == 10:
                    scope.cancel()
    assert scope.cancelled_caught
    assert count == 10


async def test_a_burst_of_lines_lets_other_tasks_run() -> None:
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await trio.lowlevel.checkpoint()
            ticks += 1

    async with trio.open_nursery() as nursery, command(["seq", "1000"]) as events:
        assert (await anext(events)).data == "1"
        nursery.start_soon(tick)
        for number in range(2, 901):
            assert (await anext(events)).data == str(number)
        assert 10 <= ticks <= 100
        nursery.cancel_scope.cancel()


async def test_it_may_be_entered_iterated_and_left_in_different_tasks() -> None:
    source = command(sh("echo lines; sleep 30"))
    async with trio.open_nursery() as nursery:

        async def enter_and_iterate() -> None:
            events = await source.__aenter__()
            assert await anext(events) == LINES

        nursery.start_soon(enter_and_iterate)
    await source.__aexit__(None, None, None)


async def test_two_tasks_cannot_iterate_at_once() -> None:
    async with command(sh("echo lines; sleep 30")) as events, trio.open_nursery() as nursery:
        assert await anext(events) == LINES
        nursery.start_soon(anext, events)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.RaisesGroup(trio.BusyResourceError, trio.BusyResourceError):
            await anext(events)
        nursery.cancel_scope.cancel()


class CancelAtStep(trio.abc.Instrument):
    """Cancels a scope after the n-th step that the task which made it, or a child of it, takes."""

    def __init__(self, scope: trio.CancelScope, step: int) -> None:
        self.scope = scope
        self.left = step
        self.task = trio.lowlevel.current_task()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        nursery = task.parent_nursery
        if task is self.task or (nursery is not None and nursery.parent_task is self.task):
            self.left -= 1
            if self.left == 0:
                self.scope.cancel()


async def test_it_can_be_cancelled_at_every_await(started: list[trio.Process]) -> None:
    seen: list[int] = []
    for step in itertools.count(1):
        source = command(sh("cat; echo lines >&2; sleep 30 >&2 & exit 0"), stdin=b"x", grace=5, linger=0.02)
        count = 0
        with trio.fail_after(10), trio.CancelScope() as scope:
            instrument = CancelAtStep(scope, step)
            trio.lowlevel.add_instrument(instrument)
            try:
                async with source as events:
                    async for _event in events:
                        count += 1
            finally:
                trio.lowlevel.remove_instrument(instrument)
        seen.append(count)
        assert_ended(started)
        if instrument.left > 0:
            break
    assert len(seen) > 15
    assert {0, 3} <= set(seen)
    assert seen[-1] == 3


async def test_a_program_waits_for_a_slow_consumer(report: Report) -> None:
    code = r"""
import os, select
report = open(os.environ["REPORT"], "w")
os.set_blocking(1, False)
written = 0
while written < 1 << 23:
    try:
        written += os.write(1, b"x" * 1023 + b"\n")
    except BlockingIOError:
        if not select.select([], [1], [], 0.5)[1]:
            break
report.write(str(written))
"""
    with trio.fail_after(10):
        async with command(python(code), env={"REPORT": report.path}) as events:
            first = await anext(events)
            written = int(await report.read())
            rest = [event async for event in events]
    assert first == Event(data="x" * 1023, event="stdout")
    assert written < 512 * 1024
    assert len(rest) == written // 1024
    assert rest[-1] == EXIT_0


async def test_what_a_program_left_in_the_pipe_is_read_however_late_and_nothing_that_floods_it(report: Report) -> None:
    code = r"""
import fcntl, os, subprocess
report = open(os.environ["REPORT"], "w")
fcntl.fcntl(1, fcntl.F_SETPIPE_SZ, 1 << 20)
print("lines")
os.write(1, b"".join(b"%d\n" % number for number in range(30_000)))
subprocess.Popen(["yes", "flood"])
"""
    with trio.fail_after(60):
        async with command(python(code), env={**os.environ, "REPORT": report.path}, linger=0) as events:
            assert await anext(events) == LINES
            assert not await report.read()  # the program has exited
            rest = [event async for event in events]
    assert rest[:30_000] == out(*map(str, range(30_000)))
    assert rest[-1] == EXIT_0


# ---------------------------------------------------------------------------------------------- processes left behind


async def test_a_grandchild_that_keeps_the_pipe_is_read_for_a_while_and_then_ended(report: Report) -> None:
    source = command(
        sh('exec 9>"$REPORT"; (trap "printf no >&9" TERM; echo lines; printf half; sleep 30) & exec 9>&-; exit 0'),
        env={**os.environ, "REPORT": report.path},
        linger=0.3,
        grace=0.3,
    )
    begin = trio.current_time()
    assert await events_of(source) == [*out("lines", "half"), EXIT_0]
    assert 0.3 <= trio.current_time() - begin < 5
    assert await report.read() == "no"


async def test_what_comes_after_the_exit_is_passed_on_until_the_pipe_ends() -> None:
    begin = trio.current_time()
    # The second process sees the first one's exit as the end of its input.
    events = await events_of(command(["bash", "-c", "exec > >(sed 's/^/> /'); echo a; echo b"], linger=30))
    assert events == [*out("> a", "> b"), EXIT_0]
    assert trio.current_time() - begin < 5


async def test_a_grandchild_that_never_stops_printing_is_stopped() -> None:
    begin = trio.current_time()
    assert set(await events_of(command(sh("yes lines & exit 0"), linger=0.1))) == {LINES, EXIT_0}
    assert trio.current_time() - begin < 5


async def test_what_runs_on_without_output_is_ended_at_once(report: Report) -> None:
    begin = trio.current_time()
    source = command(
        sh('sleep 30 9>"$REPORT" >/dev/null 2>&1 & echo lines'), env={**os.environ, "REPORT": report.path}, linger=30
    )
    assert await events_of(source) == [LINES, EXIT_0]
    assert not await report.read()
    assert trio.current_time() - begin < 5


async def test_an_empty_group_gets_no_signals(monkeypatch: pytest.MonkeyPatch, started: list[trio.Process]) -> None:
    calls = []
    killpg = os.killpg

    def recording(group: int, number: int) -> None:
        calls.append((group, number))
        killpg(group, number)

    monkeypatch.setattr(os, "killpg", recording)
    assert await events_of(command(["echo", "lines"])) == [LINES, EXIT_0]
    assert calls == [(started[0].pid, 0)]


async def test_orphans_are_reaped_where_that_falls_to_this_process() -> None:
    set_child_subreaper = 36  # prctl(2); what PID 1 of a container is by nature
    libc = ctypes.CDLL(None)
    assert libc.prctl(set_child_subreaper, 1, 0, 0, 0) == 0
    try:
        source = command(sh("(sleep 30 & sleep 30 & echo lines; wait) & wait"), grace=30)
        assert await seconds_to_cancel(source) < 5
    finally:
        libc.prctl(set_child_subreaper, 0, 0, 0, 0)


async def test_the_dead_that_nobody_reaps_are_not_waited_for(report: Report) -> None:
    code = """
import os, signal
report = open(os.environ["REPORT"], "w")
if os.fork() == 0:
    # The parent of a process of the group leaves the group, and never waits for its child.
    if os.fork() == 0:
        signal.pause()
    os.setsid()
    report.write(str(os.getpid()))
    report.flush()
    print("lines")
    os.dup2(report.fileno(), 1)
    os.dup2(report.fileno(), 2)
report.close()
signal.pause()
"""
    seconds = await seconds_to_cancel(command(python(code), env={"REPORT": report.path}, grace=30))
    os.kill(int(await report.receive()), signal.SIGKILL)
    assert seconds < 5
    assert not await report.read()


async def test_what_cannot_be_ended_is_given_up_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, started: list[trio.Process]
) -> None:
    def refused(_group: int, _number: int) -> None:  # as for a program that has become another user
        raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))

    with monkeypatch.context() as patch:
        patch.setattr(os, "killpg", refused)
        assert 1 <= await seconds_to_cancel(command(sh("echo lines; exec sleep 30"), grace=0)) < 5
    (process,) = started
    assert caplog.messages == [f"process group {process.pid} of {process.args!r} is still there after SIGKILL"]
    process.kill()
    await process.wait()
