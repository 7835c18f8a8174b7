"""Lines of text out of bytes that come in pieces, however they are cut. Pure.

Producers that ship with penstock: `command` runs a program and streams what it prints.

    producers = {"build": lambda _input: command(["make", "-C", "/srv/site"])}

    event: stdout            event: stderr             event: exit
    data: cc -c main.c       data: warning: unused     data: {"exit_code":0}

Theory of operation. Reading happens only when the consumer asks. A step of the iteration first hands over the lines
that are there; then it waits until a pipe has something or the program has exited, whatever comes first. No task and no
scope lives from one step to the next: a consumer that does not ask lets the pipes fill, and they hold up the program.

    lines left ──yes──▶ stdout, stderr: the next one
        no
    both pipes at their end, and exited ──yes──▶ exit: the last event
        no
    wait for a pipe or the exit. `linger` seconds after the exit, only what was in the pipes at the exit is still read:
    anything else comes from processes left behind

What it guarantees:
- The lines of each stream arrive complete and in order. Between the two streams there is no order: they are two pipes.
- All that the program wrote before it exited is handed over, however slow the consumer is.
- Memory is bounded: per stream `max_line_bytes` and one read of 64 KiB.
- On leaving, whatever the way out, the whole process group is ended and the program reaped, within `grace` seconds and
  one more. Where SIGKILL does not help (a process of another user, one stuck in the kernel) a warning is logged.

What it does not: it runs no shell, starts nothing again, and does not reach processes that left the group for one of
their own (`setsid`, daemons, jobs of an interactive shell). POSIX only.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import math
import os
import signal
import subprocess
import sys
import tempfile
import termios
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

import trio

from penstock.errors import ConfigurationError, PublicError
from penstock.exception_groups import raise_single
from penstock.sse import Event

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

LONGEST_CHARACTER: Final = 4
"""The bytes of the longest UTF-8 sequence (RFC 3629, section 3)."""

_CONTINUATION: Final = 0b1000_0000  # the two highest bits of each byte of a sequence but its first


class LineSplitter:
    """Takes bytes apart into lines of text, and long lines into pieces. Pure; bounded if popped empty before a feed."""

    def __init__(self, max_line_bytes: int) -> None:
        self.ended = False
        self._max = max_line_bytes
        self._buffer = bytearray()
        self._start = 0

    def feed(self, data: bytes) -> None:
        """Add what was read; `b""` is the end."""
        del self._buffer[: self._start]
        self._start = 0
        self._buffer += data
        self.ended = not data

    def pop(self) -> str | None:
        """The next line or piece; None if there is none yet."""
        start = self._start
        newline = self._buffer.find(b"\n", start)
        end = len(self._buffer) if newline < 0 else newline
        following = end + (newline >= 0)
        if self._buffer.endswith(b"\r", start, end):
            end -= 1  # as a part of the line end, or perhaps: then it waits for what follows
        if end - start > self._max:
            end = following = self._cut(start + self._max)
        elif newline < 0 and (not self.ended or following == start):
            return None
        self._start = following
        return self._buffer[start:end].decode(errors="replace")

    def _cut(self, end: int) -> int:
        """The last place up to `end` that is not within a character; where the bytes are no UTF-8 anyway, `end`."""
        for place in range(end, end - LONGEST_CHARACTER, -1):
            if self._buffer[place] & 0b1100_0000 != _CONTINUATION:
                return place
        return end


logger: Final = logging.getLogger("penstock")

MAX_LINE_BYTES: Final = 64 * 1024

_READ_BYTES: Final = 64 * 1024
_KILL_SECONDS: Final = 1.0  # from SIGKILL to giving up
_POLL_SECONDS: Final = 0.01  # until the first look whether a process group is gone, for nothing tells
_LONGEST_POLL_SECONDS: Final = 0.2
_STEPS_PER_CHECKPOINT: Final = 64


def command(
    argv: Sequence[str | os.PathLike[str]],
    *,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    stdin: bytes | None = None,
    grace: float = 3.0,
    linger: float = 1.0,
    max_line_bytes: int = MAX_LINE_BYTES,
) -> AbstractAsyncContextManager[AsyncIterator[Event]]:
    """A source that runs a program: the lines of its output, then its exit code.

    As a producer it goes into a lambda with a fixed argv: `lambda _input: command(["make"])`. **Never make `command`
    itself a producer**: over HTTP a producer is called with the request's input, so clients could run anything they
    like. What they send belongs in `stdin`; in `argv` even one string of theirs can act as an option.

    By itself: `async with command([...]) as events: async for event in events: ...`. The program starts on entering.
    What it yields:

    - `event: stdout` and `event: stderr`: a line without its end, LF or CRLF; empty data for an empty line. A last line
      without an end counts, too. A CR within a line (a progress bar) does not end it: it stays in the data, and reaches
      clients as a line feed, for SSE has no other way. Bytes that are not UTF-8 become U+FFFD. A line longer than
      `max_line_bytes` comes in several events, never cut within a character; nothing marks them as pieces.
    - `event: exit`, always the last: the JSON object `{"exit_code": 0}`. After death by a signal `exit_code` is 128 and
      its number, as in a shell, and `signal` is its name: `{"exit_code": 137, "signal": "SIGKILL"}`.

    An exit code other than 0 is a failure: after `exit` the iteration raises, and so a run ends as `failed`.
    The program gets a session and a process group of its own; a Ctrl-C in the server's terminal does not reach it. When
    the block is left (the run was cancelled, the consumer stopped early, or all is done but background processes are
    left) the group gets SIGTERM, and SIGKILL if any of it is still there after `grace` seconds. Meanwhile its output is
    read and dropped, so that no full pipe keeps it from cleaning up.

    Many programs hold back output that goes to a pipe; `python -u`, `stdbuf -oL` and the like help.

    Args:
        argv: the program and its arguments; for a shell's line, `["sh", "-c", "make | tee log"]`. A program without a
            slash is looked for on the PATH (of `env`, if given).
        cwd: the directory to run in; by default the server's.
        env: the whole environment; by default the server's, with whatever secrets it holds.
        stdin: what the program can read (from a temporary file); by default nothing (`/dev/null`).
        grace: seconds, 0 or more, from SIGTERM to SIGKILL; keep it below the supervisor's `cancel_grace`.
        linger: seconds, 0 or more, for which pipes that other processes hold open are read on after the program's exit.
        max_line_bytes: 4 or more. An event can become seven times as long (all CRs), and has a limit of its own.

    Raises:
        ConfigurationError: a `ValueError`, at once: an argument cannot be what it is; the message says what to do.
        PublicError: on entering, code `COMMAND_NOT_STARTED`: the program or `cwd` is missing or cannot be used. At the
            end, code `EXIT_CODE`. Clients see the words, and with them the program's name or `cwd`.
        OSError: on entering: the machine cannot start a process now (no memory, too many open files ...).

    Entering is a checkpoint, but a program that is being started is started first and ended then. Every step can be
    cancelled; with a line at hand, only every 64th lets other tasks run. Leaving is shielded, with a deadline of
    `grace` + 1 seconds.
    """
    if isinstance(argv, str | bytes):
        raise ConfigurationError(f'argv is a list such as ["make", "all"] or ["sh", "-c", "make all"], not {argv!r}')
    if not argv:
        raise ConfigurationError('argv is empty: pass a program and its arguments, such as ["make", "all"]')
    words: list[Any] = [os.fspath(word) if isinstance(word, os.PathLike) else word for word in argv]
    if bad := [word for word in words if not isinstance(word, str) or "\0" in word]:
        raise ConfigurationError(f"argv holds str without NUL and paths, not {bad[0]!r}: convert it, or use stdin")
    if stdin is not None and not isinstance(stdin, bytes):
        raise ConfigurationError(f"stdin is bytes or None, not {type(stdin).__name__}: encode it")
    for name, seconds in (("grace", grace), ("linger", linger)):
        if not 0 <= seconds < math.inf:
            raise ConfigurationError(f"{name} is a finite number of seconds, 0 or more, not {seconds!r}")
    if max_line_bytes < LONGEST_CHARACTER:
        raise ConfigurationError(f"max_line_bytes is {LONGEST_CHARACTER} or more, not {max_line_bytes!r}")
    return _Command(partial(_start, words, cwd, env, stdin), grace, linger, max_line_bytes)


@dataclass(eq=False)
class _Command(AbstractAsyncContextManager[AsyncIterator[Event]]):
    """A command to come. What `asynccontextmanager` makes is callable, and so looks like a producer; this does not."""

    start: Callable[[], Awaitable[trio.Process]]
    grace: float
    linger: float
    max_line_bytes: int
    output: _Output | None = None

    async def __aenter__(self) -> AsyncIterator[Event]:
        if self.output is not None:
            raise RuntimeError("a command runs once: for another run call command() again")
        process = await self.start()
        pipes: Any = {"stdout": process.stdout, "stderr": process.stderr}
        streams = [_Stream(name, pipe, LineSplitter(self.max_line_bytes)) for name, pipe in pipes.items()]
        self.output = _Output(_Group(process), streams, self.linger)
        return self.output

    async def __aexit__(self, *_: object) -> None:
        output = cast("_Output", self.output)
        output.closed = True
        with trio.move_on_after(self.grace + _KILL_SECONDS, shield=True) as scope:
            await output.group.end(output.streams, self.grace)
        for stream in output.streams:
            stream.pipe.close()
        if scope.cancelled_caught:
            process = output.group.process
            logger.warning("process group %d of %r is still there after SIGKILL", process.pid, process.args)


async def _start(
    argv: list[str], cwd: str | os.PathLike[str] | None, env: Mapping[str, str] | None, stdin: bytes | None
) -> trio.Process:
    with ExitStack() as stack:
        readable, pipe = subprocess.DEVNULL, subprocess.PIPE
        if stdin is not None:
            file = stack.enter_context(tempfile.TemporaryFile())
            await trio.to_thread.run_sync(file.write, stdin)
            file.seek(0)
            readable = file.fileno()
        try:
            # Once its thread runs it cannot be cancelled, and no checkpoint follows: what was started is returned.
            return await trio.lowlevel.open_process(
                argv, stdin=readable, stdout=pipe, stderr=pipe, start_new_session=True, cwd=cwd, env=env
            )
        except OSError as error:
            if error.errno not in {errno.ENOENT, errno.EACCES, errno.ENOTDIR, errno.ENOEXEC}:
                raise
            what = f"program {argv[0]!r}"
            advice = "see that it is installed, on the PATH and executable, and that a script begins with #!"
            if cwd is not None and error.filename == cwd:
                what, advice = f"working directory {os.fspath(cwd)!r}", "see that the server may enter such a directory"
            words = f"the command was not started, because of its {what}: {error.strerror}; {advice}"
            raise PublicError(words, code="COMMAND_NOT_STARTED") from error


@dataclass(eq=False)
class _Output:
    """The events of one command, made when they are asked for."""

    group: _Group
    streams: list[_Stream]
    linger: float
    closed: bool = False
    _deadline: float = math.inf  # `linger` seconds after the exit, as soon as that is noted
    _steps: int = 0
    _said_exit: bool = False

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        if self.closed:
            raise trio.ClosedResourceError("the command has been ended: iterate within its `async with` block")
        self._steps += 1
        if self._steps % _STEPS_PER_CHECKPOINT:
            await trio.lowlevel.checkpoint_if_cancelled()
        else:
            await trio.lowlevel.checkpoint()
        while (event := self._next_line()) is None:
            if self._deadline < math.inf and all(stream.lines.ended for stream in self.streams):
                return self._ending()
            await self._more()
        return event

    def _next_line(self) -> Event | None:
        for stream in self.streams:
            line = stream.lines.pop()
            if line is not None:
                return Event(data=line, event=stream.name)
        return None

    def _ending(self) -> Event:
        code = cast("int", self.group.process.returncode)
        members: dict[str, int | str] = {"exit_code": code if code >= 0 else 128 - code}
        words = f"exit code {members['exit_code']}"
        if code < 0:
            named = -code in set(signal.Signals)  # most real-time signals are not
            members["signal"] = signal.Signals(-code).name if named else f"SIG{-code}"
            words += f" ({members['signal']})"
        if not self._said_exit:
            self._said_exit = True
            return Event.json(members, event="exit")
        if code:
            raise PublicError(f"the command ended with {words}", code="EXIT_CODE")
        raise StopAsyncIteration

    async def _more(self) -> None:
        """Wait for output or for the exit, whatever comes first; `linger` seconds after the exit, take what is owed."""
        exited = self._deadline < math.inf
        waiting = [stream for stream in self.streams if not stream.lines.ended]
        if trio.current_time() < self._deadline:
            with trio.move_on_at(self._deadline):
                await _first_of(*(stream.receive for stream in waiting), *([] if exited else [self.group.process.wait]))
        else:
            for stream in waiting:
                if stream.owed:
                    await stream.receive()
                else:
                    stream.lines.feed(b"")
        if not exited and self.group.process.returncode is not None:
            self._deadline = trio.current_time() + self.linger
            self.group.send(0)  # if nobody is left, that must be known now: later the id may be another group's
            for stream in self.streams:
                readable = fcntl.ioctl(stream.pipe.fileno(), termios.FIONREAD, bytes(4))
                stream.owed = int.from_bytes(readable, sys.byteorder)


async def _first_of(*waits: Callable[[], Awaitable[object]]) -> None:
    """Return as soon as one of them has returned, and cancel the others."""

    async def run(wait: Callable[[], Awaitable[object]]) -> None:
        await wait()
        nursery.cancel_scope.cancel()

    try:
        async with trio.open_nursery() as nursery:
            for wait in waits:
                nursery.start_soon(run, wait)
    except BaseExceptionGroup as group:
        raise_single(group, trio.Cancelled)


@dataclass(slots=True, eq=False)
class _Stream:
    """One of a program's two output pipes."""

    name: str
    pipe: trio.lowlevel.FdStream
    lines: LineSplitter
    owed: int = 0  # of the bytes that the program left in the pipe when it exited, how many have not been read

    async def receive(self) -> None:
        data = await self.pipe.receive_some(_READ_BYTES)
        self.owed = max(0, self.owed - len(data))
        self.lines.feed(data)

    async def discard(self) -> None:
        while await self.pipe.receive_some(_READ_BYTES):
            pass


class _Group:
    """A program and its process group, which has the program's pid as its id."""

    def __init__(self, process: trio.Process) -> None:
        self.process = process
        self._gone = False

    def send(self, number: int) -> bool:
        """Signal what is left of the group (0 only looks); False if nothing is, and then nothing is signalled any more.

        The kernel gives the id to nobody else while something is left, or the program is not reaped. Then it may.
        """
        if self._gone:
            return False
        if self.process.returncode is not None:
            # Where this process is PID 1 of a container, or a subreaper, the program's orphans are for it to reap.
            with suppress(ChildProcessError):
                while os.waitpid(-self.process.pid, os.WNOHANG)[0]:
                    pass
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            self._gone = True
        except PermissionError:
            pass  # another user's (sudo): it is there, and not ours to signal
        return not self._gone

    async def wait_gone(self) -> None:
        await self.process.wait()
        delay = _POLL_SECONDS
        while self.send(0):
            await trio.sleep(delay)
            delay = min(2 * delay, _LONGEST_POLL_SECONDS)
            if await trio.to_thread.run_sync(_only_zombies, self.process.pid):
                self.send(signal.SIGKILL)  # /proc is not read in one instant: for whoever escaped the look
                self._gone = True

    async def end(self, streams: list[_Stream], grace: float) -> None:
        """SIGTERM, `grace` seconds, SIGKILL; returns when the group is gone."""
        if not self.send(signal.SIGTERM):
            return
        async with trio.open_nursery() as nursery:
            for stream in streams:
                nursery.start_soon(stream.discard)
            with trio.move_on_after(grace):
                await self.wait_gone()
            if self.send(signal.SIGKILL):
                await self.wait_gone()
            nursery.cancel_scope.cancel()


def _only_zombies(group: int) -> bool:
    """Whether all that is left of a group is dead, but not reaped: PID 1 of a container may be slow, or never reap."""
    states = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            # proc_pid_stat(5): after the name, which may hold anything, come the state, the parent and the group
            state, _, its_group, *_ = stat.read_bytes().rpartition(b")")[2].split()
            if int(its_group) == group:
                states.add(state)
    return bool(states) and states <= {b"Z", b"X"}
