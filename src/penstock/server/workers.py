"""Several worker processes behind one address, and the parent that keeps them.

    parent ── binds, listens, spawns, counts signals ──┬── worker 1 ── serve() on the inherited sockets
                                                       ├── worker 2
                                                       └── ...

Hypercorn's own process manager ends all workers when one of them exits. Here a worker that exits is replaced, and the
others do not notice: connections wait in the sockets, which the parent holds open, too.

Each worker has a socket pair with the parent. A message on it is a line:

| from | message | meaning |
|---|---|---|
| worker | `ready JSON` | it accepts connections; the parent announces the first worker's JSON |
| worker | `leaving` | it got SIGTERM |
| worker | end of file | it is done; its process ends within `ENDS_WITHIN`, or is killed |
| parent | `leave` | it ends alone: accept no more connections, its siblings do |
| parent | `drain` | all are to end |
| parent | `hurry` | skip a wait; one for each further signal |
| parent | end of file | the parent is gone; the same as `drain` |

Only the parent counts signals. Ctrl-C and systemd signal the whole group, so that a worker gets its signal and the
parent's message, which must not count as two: it ignores SIGINT, and takes SIGTERM once.

| the parent ends with | when |
|---|---|
| 0 | it got a signal, and all workers ended clean |
| the first worker's code | that could not start, so that no other would |
| 1 | too many workers died, or one of them did while all were to end |
| 3 | a worker had to leave a producer behind while all were to end |
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping, Sequence

    from penstock.server.serve import Shutdown

DEATHS: Final = 5
"""So many workers that die within `DEATHS_WITHIN` end the server: their fault does not go away by itself."""
DEATHS_WITHIN: Final = 30.0  # seconds
SHORTEST_PAUSE: Final = 0.1
"""Seconds before the first worker that died is replaced; doubled for each of the other recent deaths."""
LONGEST_PAUSE: Final = 1.0  # seconds before any worker that died is replaced
GROUP_SIGNAL: Final = 0.1
"""Seconds that a signal to the whole group may take to reach the parent after it has reached a worker."""
SIGNALS: Final = (signal.SIGTERM, signal.SIGINT)
DIED: Final = 1
STUCK: Final = 3
UNREACHABLE: Final = 75  # the code of a worker that could not reach the event log, and may later (EX_TEMPFAIL)
READ_AFTER_END: Final = 0.2  # seconds in which a worker's last messages are read after its process has ended
ENDS_WITHIN: Final = 5.0  # seconds in which a worker's process ends after it has closed its end of the socket pair
HURRIES: Final = 2  # signals after the first that are passed on; the next one kills

READY: Final = "ready "
LEAVING: Final = "leaving"
LEAVE: Final = "leave"
DRAIN: Final = "drain"
HURRY: Final = "hurry"


class LineChannel:
    """One end of a socket pair on which lines go."""

    def __init__(self, sock: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._received = b""
        self._lock = trio.Lock()

    async def send(self, line: str) -> None:
        """Send a line; it is dropped if the other end is closed."""
        async with self._lock:
            try:
                await self._stream.send_all(line.encode() + b"\n")
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return

    async def receive(self) -> str | None:
        """The next line; None when the other end is closed."""
        while b"\n" not in self._received:
            try:
                piece = await self._stream.receive_some()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                piece = b""
            if not piece:
                return None
            self._received += piece
        line, _, self._received = self._received.partition(b"\n")
        return line.decode()

    async def aclose(self) -> None:
        await self._stream.aclose()


class ParentLink:
    """A worker's connection with its parent."""

    def __init__(self, number: int, fd: int) -> None:
        self.number = number  # the worker's number, from 1
        self._sock = socket.socket(fileno=fd)
        self._sock.set_inheritable(False)
        self._channel: LineChannel | None = None
        self._orphaned = False

    def keep_signals(self) -> None:
        """Until `obey` handles signals: SIGTERM ends the process, in which nothing has started; SIGINT is ignored."""

        def end(_number: int, _frame: object) -> None:
            with suppress(OSError):
                self._sock.send(f"{LEAVING}\n".encode())
            os._exit(0)

        signal.signal(signal.SIGTERM, end)
        signal.signal(signal.SIGINT, lambda _number, _frame: None)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)

    async def ready(self, details: str) -> None:
        """Report that connections are accepted; the parent announces the first worker's `details`."""
        if self._channel is not None:
            await self._channel.send(f"{READY}{details}")

    async def obey(self, shutdown: Shutdown, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Follow the parent's messages, and signals to this process alone, until cancelled; then ignore signals."""
        self._channel = channel = LineChannel(self._sock)
        try:
            with trio.open_signal_receiver(*SIGNALS) as signals:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._handle_signals, signals, channel, shutdown)
                    task_status.started()
                    while (message := await channel.receive()) is not None:
                        if message == LEAVE:
                            shutdown.stop_accepting()
                        elif message == HURRY:
                            shutdown.force()
                        else:
                            shutdown.drain()
                    self._orphaned = True
                    shutdown.drain()
        finally:
            for number in SIGNALS:  # Python puts the default of any handler back while it exits
                signal.signal(number, signal.SIG_IGN)
            self._sock.close()  # the parent reads that all is done

    async def _handle_signals(self, signals: AsyncIterator[int], channel: LineChannel, shutdown: Shutdown) -> None:
        left = False
        async for number in signals:
            if self._orphaned:
                shutdown.force()  # no parent counts signals any more
            elif number == signal.SIGTERM and not left:
                left = True
                shutdown.drain()
                await channel.send(LEAVING)


@dataclass(slots=True)
class _Worker:
    process: subprocess.Popen[bytes]
    channel: LineChannel
    ready: bool = False
    leaving: bool = False


class ProcessManager:
    """Starts workers on the listening sockets, replaces those that end, and ends them all at a signal."""

    def __init__(
        self,
        count: int,
        command: Callable[[int, Sequence[int], int], Sequence[str]],
        sockets: Sequence[socket.socket],
        *,
        say: Callable[[str], None],
        announce: Callable[[str], None],
        max_deaths: int = DEATHS,
        environment: Mapping[str, str] | None = None,
        on_end: Callable[[int], None] = lambda _pid: None,
    ) -> None:
        """Keep `count` workers.

        `command` makes a worker's from its number and the file descriptors of the sockets and of its end of the pair.
        `say` gets lines for the operator; `announce` what the first worker has reported, once all accept connections;
        `on_end` the pid of each worker that has ended. `environment` comes besides that of this process.
        """
        self._count = count
        self._command = command
        self._sockets = sockets
        self._say = say
        self._announce = announce
        self._max_deaths = max_deaths
        self._environment = {**os.environ, **(environment or {})}
        self._on_end = on_end
        self._ending = trio.Event()
        self._workers: dict[int, _Worker] = {}
        self._details: str | None = None
        self._codes: list[int] = []
        self._deaths: deque[float] = deque()
        self._waiters = trio.CapacityLimiter(count)
        self._nursery: trio.Nursery

    async def run(self) -> int:
        """Keep the workers until signals, or their deaths, end them all; return the exit code."""
        # The first starts alone: a fault that keeps it from starting would keep the others, too, and is reported once.
        settled = [trio.Event() for _ in range(self._count)]
        with trio.open_signal_receiver(*SIGNALS) as signals:
            async with trio.open_nursery() as self._nursery:
                self._nursery.start_soon(self._handle_signals, signals)
                async with trio.open_nursery() as keepers:
                    for number, has_settled in enumerate(settled, 1):
                        keepers.start_soon(self._keep, number, has_settled)
                        if number == 1:
                            await has_settled.wait()
                    for has_settled in settled:
                        await has_settled.wait()
                    if self._details is not None and not self._ending.is_set():
                        self._announce(self._details)
                self._nursery.cancel_scope.cancel(reason="all workers have ended")
        return STUCK if STUCK in self._codes else next((code for code in self._codes if code), 0)

    @property
    def recent_deaths(self) -> int:
        while self._deaths and self._deaths[0] < trio.current_time() - DEATHS_WITHIN:
            self._deaths.popleft()
        return len(self._deaths)

    async def _handle_signals(self, signals: AsyncIterator[int]) -> None:
        """The first signal drains, the second and the third hurry, the fourth kills."""
        count = 0
        async for _ in signals:
            count += 1
            if count == 1:
                self._end()
            elif count <= HURRIES + 1:
                self._send_all(HURRY)
                for worker in self._workers.values():
                    if not worker.ready:  # it does not read messages yet
                        worker.process.terminate()
            else:
                for worker in self._workers.values():
                    worker.process.kill()

    def _end(self) -> None:
        """Start no more workers, and drain those that are there."""
        self._ending.set()
        for sock in self._sockets:  # the workers have them open, too, and close them when they have drained
            sock.close()
        self._send_all(DRAIN)

    def _send_all(self, message: str) -> None:
        for worker in self._workers.values():
            self._nursery.start_soon(worker.channel.send, message)

    async def _keep(self, number: int, has_settled: trio.Event) -> None:
        """Keep one worker; set `has_settled` when its first process is ready, or has ended."""
        while not self._ending.is_set():
            try:
                worker = self._workers[number] = self._spawn(number)
            except OSError as error:
                pause = self._judge(f"worker {number}", f"cannot be started: {error}", DIED)
            else:
                name = f"worker {number} (process {worker.process.pid})"
                code = await self._accompany(worker, has_settled)
                del self._workers[number]
                self._on_end(worker.process.pid)
                how = f"ended with code {code}" if code >= 0 else f"was ended by signal {-code}"
                pause = self._judge(name, how, code if code >= 0 else DIED, leaving=worker.leaving)
            has_settled.set()
            with trio.move_on_after(pause):
                await self._ending.wait()
        has_settled.set()

    async def _accompany(self, worker: _Worker, is_ready: trio.Event) -> int:
        is_done = trio.Event()

        async def read() -> None:
            await self._read(worker, is_ready)
            is_done.set()
            await trio.sleep(ENDS_WITHIN)
            self._say(f"process {worker.process.pid} is done, and does not end: perhaps a thread of it goes on; killed")
            worker.process.kill()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(read)
            code = await trio.to_thread.run_sync(worker.process.wait, abandon_on_cancel=True, limiter=self._waiters)
            with trio.move_on_after(READ_AFTER_END):  # a process that it has started may have its end open, and live on
                await is_done.wait()
            nursery.cancel_scope.cancel(reason="the worker has ended")
        await worker.channel.aclose()
        return code

    def _spawn(self, number: int) -> _Worker:
        here, there = socket.socketpair()
        with there:
            fds = [sock.fileno() for sock in self._sockets]
            # A worker inherits that signals are blocked: they wait until it handles them.
            before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
            try:
                process = subprocess.Popen(  # noqa: S603  (penstock itself; in this thread, as the mask is a thread's)
                    self._command(number, fds, there.fileno()),
                    stdin=subprocess.DEVNULL,
                    pass_fds=[*fds, there.fileno()],
                    env=self._environment,
                )
            except OSError:
                here.close()
                raise
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return _Worker(process, LineChannel(here))

    async def _read(self, worker: _Worker, is_ready: trio.Event) -> None:
        while (message := await worker.channel.receive()) is not None:
            if message == LEAVING:
                worker.leaving = True
                await trio.sleep(GROUP_SIGNAL)
                if not self._ending.is_set():
                    await worker.channel.send(LEAVE)
            elif message.startswith(READY):
                worker.ready = True
                if self._details is None:
                    self._details = message.removeprefix(READY)
                is_ready.set()

    def _judge(self, name: str, how: str, code: int, *, leaving: bool = False) -> float:
        """Judge the end of a worker, and report it if need be; return the seconds until its replacement."""
        if self._ending.is_set():
            self._codes.append(code if code in {0, STUCK} else DIED)
            if code:
                self._say(f"{name} {how}")
            return 0.0
        if self._details is None:
            self._codes.append(DIED if code in {0, UNREACHABLE} else code)
            self._say(f"{name} {how} before it was ready; not started")
            self._end()
            return 0.0
        if code == 0 and leaving:
            self._say(f"{name} has left; another one takes its place")
            return 0.0
        if code == UNREACHABLE:
            self._say(f"{name} has not found the event log; another one tries in {LONGEST_PAUSE:g} s")
            return LONGEST_PAUSE
        self._deaths.append(trio.current_time())
        deaths = self.recent_deaths
        if deaths >= self._max_deaths:
            self._codes.append(DIED)
            self._say(f"{name} {how}; {deaths} workers have died within {DEATHS_WITHIN:g} s, and the server ends")
            self._end()
            return 0.0
        pause = min(SHORTEST_PAUSE * 2.0 ** (deaths - 1), LONGEST_PAUSE)
        self._say(f"{name} {how}; another one takes its place in {pause:g} s")
        return pause
