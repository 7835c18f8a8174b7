"""A connection of Hypercorn's, of any protocol: how it is read, sent to, and ended.

| a connection ends | by |
|---|---|
| with its client | `PatchedTCPServer.lose`, which notifies all of its responses |
| when its client has stopped reading | `time_out_stalled` |
| with its server | `SendDeadline`, after which no send goes on |
| with an error of its protocol | `PatchedTCPServer.run`, which ends no other connection |
"""

from __future__ import annotations

import math
import os
import socket
import sys
import traceback
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import trio
from hypercorn.events import Closed, RawData
from hypercorn.protocol.h2 import H2Protocol
from hypercorn.trio.tcp_server import TCPServer

from penstock.errors import single_error
from penstock.exception_groups import reraise, split_cancelled

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from hypercorn.config import Config
    from hypercorn.events import Event
    from hypercorn.trio.worker_context import WorkerContext
    from hypercorn.typing import AppWrapper, ConnectionState

MAX_KEEPALIVE: Final = 32_767  # the most seconds that Linux waits before it probes an idle peer
LINGER: Final = 1.0
"""Seconds after its last send in which an HTTP/2 client may close its connection before the server does."""
AT_ONCE: Final = 32  # after so many sends in a row that the system took at once, other tasks get a turn
GONE: Final = (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError)
"""What a send raises if the connection is closed, or is being closed."""
SENDS: Final = "_penstock_sends"
"""The attribute of a server's configuration that holds its `SendDeadline`: Hypercorn gives each connection the
configuration, and nothing else of its server."""
_TCP_USER_TIMEOUT: Final[int | None] = getattr(socket, "TCP_USER_TIMEOUT", None)


def time_out_stalled(sockets: Iterable[socket.socket], seconds: float) -> bool:
    """Let TCP end connections whose peer takes nothing in for so long (RFC 5482's user timeout).

    Otherwise a `send` to a peer that has closed its window waits without end. What the listening sockets accept
    inherits the option. 0 leaves it to the system; False if that has no such option (it is Linux's).
    """
    if _TCP_USER_TIMEOUT is None:
        return False
    for sock in sockets:
        if sock.family in {socket.AF_INET, socket.AF_INET6}:
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, math.ceil(seconds * 1000))
            if seconds:  # keepalive notices a peer that is gone while there is nothing to send
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, min(math.ceil(seconds), MAX_KEEPALIVE))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, min(math.ceil(seconds), MAX_KEEPALIVE))
    return True


class SendDeadline:
    """The time by which all sends of one server's connections must be over."""

    def __init__(self) -> None:
        self.deadline = math.inf
        """On Trio's clock. A send may be cut off then, so nothing may follow it on its connection."""
        self._scopes: set[trio.CancelScope] = set()

    def end_by(self, deadline: float) -> None:
        """Move the deadline to `deadline`, on Trio's clock, if that is earlier."""
        self.deadline = min(self.deadline, deadline)
        for scope in self._scopes:
            scope.deadline = self.deadline

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """Shield the block against cancellation until the deadline."""
        with trio.CancelScope(shield=True, deadline=self.deadline) as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)


def sends_of(config: Config) -> SendDeadline | None:
    """The deadline of the server with this configuration; None if the server is not patched."""
    return getattr(config, SENDS, None)


class PatchedTCPServer(TCPServer):
    """A connection that ends with its client, with its server, and alone if its protocol fails."""

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        state: ConnectionState,
        stream: trio.SSLStream[trio.SocketStream],
    ) -> None:
        super().__init__(app, config, context, state, stream)
        self._sends = sends_of(config) or SendDeadline()
        self._last_sent = -math.inf
        self._reading = trio.CancelScope()
        self._read = trio.Event()
        self._lost = False
        self._socket = stream.socket if isinstance(stream, trio.SocketStream) and sys.platform != "win32" else None
        self._sent_at_once = 0

    async def protocol_send(self, event: Event) -> None:
        """Send, or close. A connection that is closed is no error of the task that sends: `lose` notifies all."""
        # A response that is cancelled in mid-send must not leave half a frame on a connection that others share. So
        # Hypercorn shields a send; but without a deadline, and without the wait for a send that is under way.
        if isinstance(event, RawData):
            try:
                now = trio.current_time()
                rest = event.data if now >= self._sends.deadline else self._at_once(event.data)
                if rest:
                    await self._in_turn(rest)
                    now = trio.current_time()
                elif self._sent_at_once == AT_ONCE:
                    self._sent_at_once = 0
                    await trio.lowlevel.cancel_shielded_checkpoint()
                self._last_sent = now
            except (*GONE, OSError):
                self.lose()
                await trio.lowlevel.cancel_shielded_checkpoint()  # one that sends on must not starve others
        elif isinstance(event, Closed):
            await self._close()
            self.lose()
        elif not self._lost:  # a lost connection must not wait for the timeout of an idle one
            await super().protocol_send(event)

    def _at_once(self, data: bytes) -> bytes | memoryview:
        """Send what the system takes without waiting, unless another send is under way; return the rest."""
        # Hypercorn lets every other task run, twice, on each send. With a thousand readers of one run that is most of
        # the work of an event.
        if self._socket is None or self.send_lock.locked():
            return data
        try:
            sent = os.write(self._socket.fileno(), data)
        except BlockingIOError:
            return data
        self._sent_at_once += 1
        return memoryview(data)[sent:] if sent < len(data) else b""

    async def _in_turn(self, data: bytes | memoryview) -> None:
        """Send the rest, after the sends that have begun to wait before."""
        with self._sends.shielded():
            if self.send_lock.locked():
                await self.send_lock.acquire()
            else:
                self.send_lock.acquire_nowait()  # without a checkpoint: half a frame may have been sent at once
            try:
                self._sent_at_once = 0
                await self.stream.send_all(data)
            except BaseException:
                self._socket = None  # half a frame may have been sent, and nothing may follow it at once
                raise
            finally:
                self.send_lock.release()

    def lose(self) -> None:
        """Notify all responses, once, that the client is gone."""
        # In a task of its own: Hypercorn does it in the task that found out, which may be that of a response. That is
        # cancelled when it is notified, and the responses after it are not.
        if not self._lost:
            self._lost = True
            self._task_group.spawn(self._notify_lost)

    async def _notify_lost(self) -> None:
        await self.protocol.handle(Closed())
        self._reading.cancel(reason="the client is gone")

    async def _read_data(self) -> None:
        # The cancellation ends the wait that Hypercorn enters when a second request comes before the end of the first
        # response: that response may never end.
        with self._reading:
            await super()._read_data()
        self._read.set()
        self._lost = True
        await self.idle_task.stop()
        await self.protocol.handle(Closed())  # for a request that was being read when that was cancelled

    async def _initiate_server_close(self) -> None:
        # An HTTP/2 client may be about to send an update of its window. A system that has closed the socket answers
        # that with a reset, and the client drops what it has not read. So the client may close first.
        if isinstance(self.protocol.protocol, H2Protocol):
            transport = self.stream.transport_stream if isinstance(self.stream, trio.SSLStream) else self.stream
            with trio.move_on_at(self._last_sent + LINGER), suppress(*GONE):
                async with self.send_lock:
                    await transport.send_eof()
                await self._read.wait()
        await super()._initiate_server_close()

    async def run(self) -> None:
        """Serve the connection; an error of its protocol is logged in one line, and not raised."""
        # In Hypercorn it would end the nursery of all connections.
        try:
            await super().run()
        except (Exception, BaseExceptionGroup) as error:
            cancellation, other = split_cancelled(error, trio.Cancelled)
            if not isinstance(other, Exception | None):
                raise
            if other is not None:
                await self.config.log.warning("a connection ended with an error of its protocol: %s", _in_short(other))
            if cancellation is not None:
                reraise(cancellation)


def _in_short(error: Exception) -> str:
    """An error's type and place. Its message is left out: it may hold what the client has sent."""
    cause = single_error(error)
    raised = traceback.extract_tb(cause.__traceback__)[-1]
    return f"{type(cause).__name__} at {Path(raised.filename).name}:{raised.lineno}"
