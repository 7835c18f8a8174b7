"""Processes that are measured: servers and jobs, what they print, and what they cost.

A *server* prints a line with its address when it is ready, and ends at SIGTERM. A *job* takes its options as one JSON
argument, prints its figures as JSON on its last line, and ends. Each is a process of its own, so that no case leaves
anything behind for the next, and what is measured shares no interpreter with what measures.
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
"""Seconds that a server may take until it is ready."""
ENDS_WITHIN: Final = 15.0
"""Seconds that it may take to end; then it is killed."""
JOB_WITHIN: Final = 300.0
"""Seconds that a job may take."""
LAST_LINES: Final = 20
"""So many lines of what a failed process said are shown."""
LAST_WORDS: Final = 2000
"""And so many characters of what a failed job said."""


class BenchmarkError(Exception):
    """A process did not do what it was started for."""


@dataclass(frozen=True, slots=True)
class Server:
    """A process that serves, and what it has cost so far, its children's part included."""

    process: psutil.Process
    url: str
    """Where it is, without a slash at the end."""

    def cpu(self) -> float:
        """Seconds of CPU."""
        return sum(cpu_of(each) for each in self._all())

    def rss(self) -> float:
        """Bytes of memory."""
        return sum(float(each.memory_info().rss) for each in self._all())

    def _all(self) -> list[psutil.Process]:
        """The process and its children.

        Raises:
            BenchmarkError: it has ended: what costs nothing any more is not cheap.
        """
        if not self.process.is_running() or self.process.status() == psutil.STATUS_ZOMBIE:
            raise BenchmarkError(f"the server at {self.url} has ended")
        return [self.process, *self.process.children(recursive=True)]


def cpu_of(process: psutil.Process) -> float:
    """The seconds of CPU that a process has used.

    Raises:
        BenchmarkError: it has ended.
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
    """A server, until the block is left.

    Raises:
        BenchmarkError: it printed no address in time. What it said instead is in the error.
    """
    process = subprocess.Popen(
        argv,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        process_group=0,  # so that it is ended in its turn, and not by Ctrl-C
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
        reader.start()  # or it might wait to be read
        yield Server(psutil.Process(process.pid), found[0])
    finally:
        guard.cancel()
        end(process)
        if reader.ident is not None:
            reader.join(ENDS_WITHIN)
        if not reader.is_alive():
            process.stdout.close()


def end(process: subprocess.Popen[Any]) -> None:
    """Ask a process to end, and see to it that it does."""
    process.send_signal(signal.SIGTERM)
    try:
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDS_WITHIN)
    finally:  # a second Ctrl-C, too
        process.kill()
        process.wait()


def _killing(process: subprocess.Popen[Any], seconds: float) -> Timer:
    """What kills it after so long, unless it is cancelled."""
    guard = Timer(seconds, process.kill)
    guard.daemon = True
    guard.start()
    return guard


def module(name: str, /, **options: Any) -> list[str]:
    """The command that runs a module of this package with its options."""
    return [sys.executable, "-m", f"benchmarks.{name}", json.dumps(options)]


def options() -> dict[str, Any]:
    """What a module was started with."""
    given: dict[str, Any] = json.loads(sys.argv[1]) if len(sys.argv) > 1 else {}
    return given


def penstock(
    *, log: str = "memory://", producers: str = "benchmarks.servers.producers:producers", **knobs: Any
) -> list[str]:
    """The command that serves penstock, as its users do. `max_entries=5` is `--max-entries 5`."""
    argv = [sys.executable, "-m", "penstock", "serve", "--producers", producers, "--log", log]
    argv += ["--bind", "127.0.0.1:0", "--log-level", "warning"]
    for name, value in knobs.items():
        argv += [f"--{name.replace('_', '-')}", str(value)]
    return argv


def job(argv: Sequence[str]) -> dict[str, Any]:
    """What a job prints.

    Raises:
        BenchmarkError: it failed, or took too long. What it said is in the error.
    """
    return job_started(argv).result()


@dataclass(frozen=True, slots=True)
class Job:
    """A job under way."""

    argv: Sequence[str]
    process: subprocess.Popen[str]
    last: deque[str]
    """The last lines on its standard error."""
    errors: Thread
    """What reads them."""

    def said(self, word: str) -> None:
        """Wait until it has printed a line that begins with a word.

        Raises:
            BenchmarkError: it ended without.
        """
        assert self.process.stdout is not None
        with self._guarded():
            for line in self.process.stdout:
                if line.startswith(word):
                    return
        self._end()
        raise BenchmarkError(f"{_shown(self.argv)} ended without a {word!r}")

    def tell(self, word: str) -> None:
        """Send it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n")
        self.process.stdin.flush()

    def result(self) -> dict[str, Any]:
        """Wait for its end, and return what it printed.

        Raises:
            BenchmarkError: it failed, or took too long.
        """
        lines = self._end().splitlines()
        if not lines:
            raise BenchmarkError(f"{_shown(self.argv)} ended without a result")
        result: dict[str, Any] = json.loads(lines[-1])
        return result

    def drop(self) -> None:
        """See to it that it has ended, without asking what it has to say."""
        self.process.kill()
        self.errors.join()
        with self.process:  # which closes its pipes
            pass

    @contextmanager
    def _guarded(self) -> Iterator[None]:
        """It is killed if this takes too long, or is interrupted."""
        guard = _killing(self.process, JOB_WITHIN)
        try:
            yield
        except BaseException:
            self.process.kill()
            self.errors.join()  # what it reads from is closed next
            raise
        finally:
            guard.cancel()

    def _end(self) -> str:
        """Wait for its end, and return what it printed that was not read yet."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        with self.process, self._guarded():
            self.process.stdin.close()
            out = self.process.stdout.read()
            self.errors.join()
        err = "".join(self.last)[-LAST_WORDS:]
        if self.process.returncode == -signal.SIGKILL:
            raise BenchmarkError(f"{_shown(self.argv)} took over {JOB_WITHIN:g} s, or was killed:\n{err}")
        if self.process.returncode:
            raise BenchmarkError(f"{_shown(self.argv)} failed:\n{err}")
        return out.strip()


def job_started(argv: Sequence[str]) -> Job:
    """Start a job. Its standard input is closed when its result is waited for."""
    pipe = subprocess.PIPE
    process = subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=pipe, text=True, process_group=0)
    assert process.stderr is not None
    last: deque[str] = deque(maxlen=LAST_LINES)
    errors = Thread(target=last.extend, args=(process.stderr,), daemon=True)
    errors.start()
    return Job(argv, process, last, errors)


def _shown(argv: Sequence[str]) -> str:
    return " ".join(map(str, argv))
