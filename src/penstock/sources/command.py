"""`command`: a source that runs a program and streams the lines of its output.

    producers = {"build": lambda _input: command(["make", "-C", "/srv/site"])}

    event: stdout            event: stderr             event: exit
    data: cc -c main.c       data: warning: unused     data: {"exit_code":0}

Theory of operation. The pipes are read only in a step of the iteration. A step first yields the lines that were read;
then it waits until a pipe is readable or the program has exited. No task and no scope outlives a step: while the
consumer does not iterate, the pipes fill up, and the program waits.

    lines left ──yes──▶ stdout, stderr: the next one
        no
    both pipes at their end, and exited ──yes──▶ exit: the last event
        no
    wait for a pipe or the exit. `linger` seconds after the exit, only what was in the pipes at the exit is still read:
    the rest comes from processes that the program left behind

Memory is bounded: per stream `max_line_bytes` and one read of 64 KiB. If SIGKILL has no effect on the process group (a
process of another user, one stuck in the kernel) a warning is logged. It runs no shell, restarts nothing, and does not
reach processes that moved to another group (`setsid`, daemons, jobs of an interactive shell). POSIX only.
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
from penstock.exception_groups import open_nursery
from penstock.sse import Event

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

LONGEST_CHARACTER: Final = 4
"""The bytes of the longest UTF-8 sequence (RFC 3629, section 3)."""

_CONTINUATION: Final = 0b1000_0000  # the two highest bits of each byte of a sequence but its first


class LineSplitter:
    """Splits bytes into lines of text, and long lines into pieces. Its memory is bounded if every line is popped."""

    def __init__(self, max_line_bytes: int) -> None:
        self.ended = False
        self._max = max_line_bytes
        self._buffer = bytearray()
        self._start = 0

    def feed(self, data: bytes) -> None:
        """Add the bytes of one read; `b""` is the end of the stream."""
        del self._buffer[: self._start]
        self._start = 0
        self._buffer += data
        self.ended = not data

    def pop(self) -> str | None:
        """Return the next line or piece; None if there is none yet."""
        start = self._start
        newline = self._buffer.find(b"\n", start)
        end = len(self._buffer) if newline < 0 else newline
        following = end + (newline >= 0)
        if self._buffer.endswith(b"\r", start, end):
            end -= 1  # part of the line end, or perhaps: the next byte decides
        if end - start > self._max:
            end = following = self._cut(start + self._max)
        elif newline < 0 and (not self.ended or following == start):
            return None
        self._start = following
        return self._buffer[start:end].decode(errors="replace")

    def _cut(self, end: int) -> int:
        """Return the last place up to `end` that is not within a character; `end` if the bytes are not UTF-8."""
        for place in range(end, end - LONGEST_CHARACTER, -1):
            if self._buffer[place] & 0b1100_0000 != _CONTINUATION:
                return place
        return end


logger: Final = logging.getLogger("penstock")

MAX_LINE_BYTES: Final = 64 * 1024

_READ_BYTES: Final = 64 * 1024
_KILL_SECONDS: Final = 1.0  # from SIGKILL to giving up
_POLL_SECONDS: Final = 0.01  # the first pause of a poll: the kernel does not notify of the end of a process group
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
    """Return a source that runs a program: the lines of its output, then its exit code.

    Use it in a producer with a fixed argv: `lambda _input: command(["make"])`. **Never make `command` itself a
    producer**: over HTTP a producer is called with the request's input, so clients could run any program. Pass their
    input as `stdin`; in `argv` even one string of theirs can act as an option.

    By itself: `async with command([...]) as events: async for event in events: ...`. The program starts on entering.
    It yields:

    - `event: stdout` and `event: stderr`: a line without its end, LF or CRLF; empty data for an empty line. Each stream
      is complete and in order; there is no order between the two. A last line without an end counts, too. A CR within a
      line (a progress bar) does not end it: it reaches clients as a line feed, for SSE cannot encode a CR. Bytes
      that are not UTF-8 become U+FFFD. A line longer than `max_line_bytes` becomes several events, never cut within a
      character; nothing marks them as pieces.
    - `event: exit`, always the last: the JSON object `{"exit_code": 0}`. If a signal killed the program, `exit_code` is
      128 plus its number, as in a shell, and `signal` is its name: `{"exit_code": 137, "signal": "SIGKILL"}`.

    An exit code other than 0 is a failure: after `exit` the iteration raises, and so a run ends as `failed`.
    The program gets a session and a process group of its own; a Ctrl-C in the server's terminal does not reach it. When
    the block is left (the run was cancelled, the consumer stopped early, or background processes outlive the program)
    the group gets SIGTERM, and SIGKILL if any of it is left after `grace` seconds. Meanwhile its output is read and
    dropped, so that a full pipe cannot block its cleanup.

    Many programs buffer output that goes to a pipe; `python -u`, `stdbuf -oL` and the like turn that off.

    Entering is a checkpoint; if it is cancelled while the program is being started, the program is ended when it has
    been. Every step can be cancelled; while lines are left, only every 64th step lets other tasks run. Leaving is
    shielded, with a deadline of `grace` + 1 seconds.

    Args:
        argv: the program and its arguments; for a shell's line, `["sh", "-c", "make | tee log"]`. A program without a
            slash is looked up on the PATH (of `env`, if given).
        cwd: the directory to run in; by default the server's.
        env: the whole environment; by default the server's, with the secrets that it holds.
        stdin: what the program can read (from a temporary file); by default nothing (`/dev/null`).
        grace: seconds, 0 or more, from SIGTERM to SIGKILL; keep it below the supervisor's `cancel_grace`.
        linger: seconds, 0 or more, for which pipes that other processes hold open are read after the program's exit.
        max_line_bytes: 4 or more. An event can become seven times as long (all CRs), and has a limit of its own.

    Raises:
        ConfigurationError: at once: an argument is invalid; the message says what to do.
        PublicError: on entering, code `COMMAND_NOT_STARTED`: the program or `cwd` is missing or unusable. At the end,
            code `EXIT_CODE`. Clients see the message, and with it the program's name or `cwd`.
        OSError: on entering: the machine cannot start a process now (no memory, too many open files ...).
    """
    if isinstance(argv, str | bytes):
        raise ConfigurationError(f'argv is a list such as ["make", "all"] or ["sh", "-c", "make all"], not {argv!r}')
    if not argv:
        raise ConfigurationError('argv is empty: pass a program and its arguments, such as ["make", "all"]')
    arguments: list[Any] = [os.fspath(each) if isinstance(each, os.PathLike) else each for each in argv]
    if bad := [each for each in arguments if not isinstance(each, str) or "\0" in each]:
        raise ConfigurationError(f"argv holds str without NUL and paths, not {bad[0]!r}: convert it, or use stdin")
    if stdin is not None and not isinstance(stdin, bytes):
        raise ConfigurationError(f"stdin is bytes or None, not {type(stdin).__name__}: encode it")
    for name, seconds in (("grace", grace), ("linger", linger)):
        if not 0 <= seconds < math.inf:
            raise ConfigurationError(f"{name} is a finite number of seconds, 0 or more, not {seconds!r}")
    if max_line_bytes < LONGEST_CHARACTER:
        raise ConfigurationError(f"max_line_bytes is {LONGEST_CHARACTER} or more, not {max_line_bytes!r}")
    return _Command(partial(_start, arguments, cwd, env, stdin), grace, linger, max_line_bytes)


@dataclass(eq=False)
class _Command(AbstractAsyncContextManager[AsyncIterator[Event]]):
    """The context manager of one command."""

    # Not an @asynccontextmanager: those are callable, and so would pass for producers.

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
            # Not cancellable once its thread runs, and without a checkpoint after that: a started process is returned.
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
            message = f"the command was not started, because of its {what}: {error.strerror}; {advice}"
            raise PublicError(message, code="COMMAND_NOT_STARTED") from error


@dataclass(eq=False)
class _Output:
    """The iterator of the events of one command."""

    group: _Group
    streams: list[_Stream]
    linger: float
    closed: bool = False
    _deadline: float = math.inf  # `linger` seconds after the exit, once that is known
    _steps: int = 0
    _exit_yielded: bool = False

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
        if not self._exit_yielded:
            self._exit_yielded = True
            return Event.json(members, event="exit")
        if code:
            raise PublicError(f"the command ended with {words}", code="EXIT_CODE")
        raise StopAsyncIteration

    async def _more(self) -> None:
        """Wait for output or for the exit; `linger` seconds after the exit, read only what is owed."""
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
            self.group.send(0)  # if the group is empty, note it now: later its id may be another group's
            for stream in self.streams:
                readable = fcntl.ioctl(stream.pipe.fileno(), termios.FIONREAD, bytes(4))
                stream.owed = int.from_bytes(readable, sys.byteorder)


async def _first_of(*waits: Callable[[], Awaitable[object]]) -> None:
    """Return as soon as one of `waits` has returned, and cancel the others."""

    async def run(wait: Callable[[], Awaitable[object]]) -> None:
        await wait()
        nursery.cancel_scope.cancel()

    async with open_nursery() as nursery:
        for wait in waits:
            nursery.start_soon(run, wait)


@dataclass(slots=True, eq=False)
class _Stream:
    """One of a program's two output pipes."""

    name: str
    pipe: trio.lowlevel.FdStream
    lines: LineSplitter
    owed: int = 0  # the bytes in the pipe at the program's exit that have not been read

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
        """Signal the group (0 only checks it); return False if it is empty, and never signal it again after that."""
        # The kernel may reuse the id as soon as the group is empty and the program is reaped.
        if self._gone:
            return False
        if self.process.returncode is not None:
            # If this process is PID 1 of a container, or a subreaper, it has to reap the program's orphans.
            with suppress(ChildProcessError):
                while os.waitpid(-self.process.pid, os.WNOHANG)[0]:
                    pass
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            self._gone = True
        except PermissionError:
            pass  # a process of another user (sudo): it exists, but cannot be signalled
        return not self._gone

    async def wait_gone(self) -> None:
        await self.process.wait()
        delay = _POLL_SECONDS
        while self.send(0):
            await trio.sleep(delay)
            delay = min(2 * delay, _LONGEST_POLL_SECONDS)
            if await trio.to_thread.run_sync(_only_zombies, self.process.pid):
                self.send(signal.SIGKILL)  # for a process forked while /proc was being read
                self._gone = True

    async def end(self, streams: list[_Stream], grace: float) -> None:
        """Send SIGTERM, and SIGKILL after `grace` seconds; return when the group is empty."""
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
    """Whether a group consists of zombies only: PID 1 of a container may reap them late, or never."""
    states = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):
            # proc_pid_stat(5): after the name, which may hold anything, come the state, the parent and the group
            state, _, its_group, *_ = stat.read_bytes().rpartition(b")")[2].split()
            if int(its_group) == group:
                states.add(state)
    return bool(states) and states <= {b"Z", b"X"}
