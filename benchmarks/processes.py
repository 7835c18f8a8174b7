"""Starts the processes that are measured, servers and jobs, reads their output and their CPU time.

A *server* prints a line with its address when it is ready, and ends at SIGTERM. A *job* takes its options as one JSON
argument, prints its figures as JSON on its last line, and ends. Each is a separate process, so that a case leaves
nothing behind for the next one, and the measured code shares no interpreter with the code that measures it.
"""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from collections import deque
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Thread, Timer
from typing import TYPE_CHECKING, Any, Final

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

READY_WITHIN: Final = 30.0
"""Seconds until a server must be ready."""
ENDS_WITHIN: Final = 15.0
"""Seconds after SIGTERM until a server is killed."""
JOB_WITHIN: Final = 300.0
"""Seconds until a job is killed."""
LAST_LINES: Final = 20
"""The lines of a failed process's output that an error shows."""
LAST_CHARACTERS: Final = 2000
"""The characters of a failed job's output that an error shows."""


class BenchmarkError(Exception):
    """A measured process failed or took too long."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server process and its cost so far, that of its children included."""

    process: psutil.Process
    url: str
    """Its address, without a slash at the end."""

    def cpu(self) -> float:
        """The seconds of CPU used."""
        return sum(cpu_of(each) for each in self._all())

    def rss(self) -> float:
        """The bytes of memory held."""
        return sum(float(each.memory_info().rss) for each in self._all())

    def _all(self) -> list[psutil.Process]:
        """The process and its children.

        Raises:
            BenchmarkError: the server has ended.
        """
        # A server that has ended uses no CPU, and would pass for a cheap one.
        if not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE:
            raise BenchmarkError(f"the server at {self.url} has ended")
        return [self.process, *self.process.children(recursive=True)]


def cpu_of(process: psutil.Process) -> float:
    """The seconds of CPU that a process has used, user and system together.

    Raises:
        BenchmarkError: the process has ended.
    """
    if sys.platform == "linux":  # by its own clock, as clock_getcpuclockid(3) has it: /proc counts in 10 ms
        try:
            return time.clock_gettime((~process.pid << 3) | 2)
        except OSError as error:
            raise BenchmarkError(f"process {process.pid} has ended") from error
    times = process.cpu_times()
    return float(times.user + times.system)


@contextmanager
def serving(argv: Sequence[str], *, cwd: Path | None = None) -> Iterator[Server]:
    """Start a server; it ends with the block.

    Raises:
        BenchmarkError: it printed no address in time. The error shows its output.
    """
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,  # Ctrl-C must not end it before the block does
    )
    assert process.stdout is not None
    said: deque[str] = deque(maxlen=LAST_LINES)
    reader = Thread(target=said.extend, args=(process.stdout,), daemon=True)
    guard = _killing(process, READY_WITHIN)
    try:
        for line in process.stdout:
            said.append(line)
            if found := re.search(r"http://[^\s/]+", line):
                break
        else:
            raise BenchmarkError(f"{_shown(argv)} is not ready:\n{''.join(said)}")
        guard.cancel()
        reader.start()  # a server whose output is not read would block
        yield Server(psutil.Process(process.pid), found[0])
    finally:
        guard.cancel()
        end(process)
        if reader.ident is not None:
            reader.join(ENDS_WITHIN)
        if not reader.is_alive():
            process.stdout.close()


def end(process: subprocess.Popen[Any]) -> None:
    """Send SIGTERM, and SIGKILL if the process has not ended in time."""
    process.send_signal(signal.SIGTERM)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDS_WITHIN)
    finally:  # also at a second Ctrl-C
        process.kill()
        process.wait()


def _killing(process: subprocess.Popen[Any], seconds: float) -> Timer:
    """Kill a process after so many seconds, unless the timer is cancelled."""
    guard = Timer(seconds, process.kill)
    guard.daemon = True
    guard.start()
    return guard


def module(name: str, /, **options: Any) -> list[str]:
    """The command that runs a module of this package, its options as one JSON argument."""
    return [sys.executable, "-m", f"benchmarks.{name}", json.dumps(options)]


def options() -> dict[str, Any]:
    """The options that this process was started with."""
    given: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    return given


def penstock(
    *, log: str = "memory://", producers: str = "benchmarks.servers.producers:producers", **settings: Any
) -> list[str]:
    """The command `penstock serve`; `max_entries=5` becomes `--max-entries 5`."""
    argv = [sys.executable, "-m", "penstock", "serve", "--producers", producers, "--log", log]
    argv += ["--bind", "127.0.0.1:0", "--log-level", "warning"]
    for name, value in settings.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    return argv


def job(argv: Sequence[str], *, cwd: Path | None = None) -> dict[str, Any]:
    """Run a job and return its figures.

    Raises:
        BenchmarkError: it failed or took too long. The error shows its output.
    """
    return job_started(argv, cwd=cwd).result()


@dataclass(frozen=True, slots=True)
class Job:
    """A job that runs."""

    argv: Sequence[str]
    process: subprocess.Popen[str]
    last: deque[str]
    """The last lines of its standard error."""
    errors: Thread
    """Reads its standard error."""

    def wait_for(self, word: str) -> None:
        """Wait until it has printed a line that begins with a word.

        Raises:
            BenchmarkError: it ended without printing one.
        """
        assert self.process.stdout is not None
        with self._guarded():
            for line in self.process.stdout:
                if line.startswith(word):
                    return
        self._end()
        raise BenchmarkError(f"{_shown(self.argv)} ended without a {word!r}")

    def send(self, word: str) -> None:
        """Send it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """Wait for its end and return its figures.

        Raises:
            BenchmarkError: it failed or took too long.
        """
        lines = self._end().splitlines()
        if not lines:
            raise BenchmarkError(f"{_shown(self.argv)} ended without a result")
        result: dict[str, Any] = json.loads(lines[-1])
        return result

    def kill(self) -> None:
        """End it and discard its output."""
        self.process.kill()
        self.errors.join()
        with self.process:  # closes its pipes
            pass

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """Kill the job if the block takes too long or is interrupted."""
        guard = _killing(self.process, JOB_WITHIN)
        try:
            yield
        except BaseException:
            self.process.kill()
            self.errors.join()  # the caller closes the pipe that it reads
            raise
        finally:
            guard.cancel()

    def _end(self) -> str:
        """Wait for its end and return the output that was not read yet."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.process, self._guarded():
            self.process.stdin.close()
            out = self.process.stdout.read()
            self.errors.join()
        err = "".join(self.last)[-LAST_CHARACTERS:]
        if self.process.returncode == -signal.SIGKILL:
            raise BenchmarkError(f"{_shown(self.argv)} took over {JOB_WITHIN:g} s, or was killed:\n{err}")
        if self.process.returncode:
            raise BenchmarkError(f"{_shown(self.argv)} failed:\n{err}")
        return out.strip()


def job_started(argv: Sequence[str], *, cwd: Path | None = None) -> Job:
    """Start a job. `Job.result` closes its standard input."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, cwd=cwd, stdin=pipe, stdout=pipe, stderr=pipe, text=True, process_group=0)
    assert process.stderr is not None
    last: deque[str] = deque(maxlen=LAST_LINES)
    errors = Thread(target=last.extend, args=(process.stderr,), daemon=True)
    errors.start()
    return Job(argv, process, last, errors)


def _shown(argv: Sequence[str]) -> str:
    return " ".join(map(str, argv))
