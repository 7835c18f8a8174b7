"""What Hypercorn does wrong for streams, corrected: each fault in one small piece, for the versions that are known.

| piece | Hypercorn 0.18.0, trio worker | here |
|---|---|---|
| `time_out_stalled` | a client that stops reading pins its connection for ever | TCP gives it up |
| `PatchedStreamBuffer` | all that an HTTP/2 stream without a window is sent is taken into memory | `send` waits |
| `PatchedH2` | HTTP/2 responses outlive their clients, and are cut off at a shutdown | they end, and whole |
| `Requests` | the upgrade to HTTP/2 in clear text can end the server, or stay for ever | is not taken up |
| `Requests._create_stream`, `PatchedH2` | headers above the limit pass if they come quickly | do not |
| `Requests.handle`, `PatchedH2` | a refused WebSocket keeps its connection for ever | does not |
| `Requests._close_stream`, `PatchedH2` | a response that takes no more of a body holds up its connection | for a second |
| `PatchedTCPServer.protocol_send` | a send is shielded without a deadline: a slow client outlasts a shutdown | has one |
| `PatchedTCPServer._at_once` | every send takes a round of the scheduler, also if the system takes it at once | every 32nd |
| `Requests.stream_send` | each chunk of a body goes through all of h11 | the first |
| `PatchedTCPServer.lose` | of several responses on a connection that breaks, some are never told | all are |
| `PatchedTCPServer._initiate_server_close` | the last bytes to an HTTP/2 client may be lost | the client closes first |
| `PatchedTCPServer._read_data` | a second request that came early keeps its connection for ever | ends with the client |
| `ReadWhilePipelined` | ... and nobody notices that the client has gone | is noticed |
| `PatchedTCPServer.run` | an error in one connection's protocol ends the server, for everybody | ends that connection |
| `keep_alive_max_requests` | after 1,000 requests on an HTTP/2 connection its streams fall silent | no such limit |

The first is an option of the listening sockets, which any version passes on. The others replace classes in Hypercorn's
modules when a server first asks for it. Connections of servers that did not ask are Hypercorn's own still, but for
`PatchedStreamBuffer`, which has no way to tell. On a version that is not in `VERSIONS` nothing is
replaced, and a warning says so: what it does now is for somebody to look at. Each piece has a test against the real
server, with it and without. Those of one protocol are in `http1.py` and `http2.py`.
"""  # noqa: E501  (a table's rows are lines)

from __future__ import annotations

import math
import os
import socket
import sys
import traceback
from contextlib import contextmanager, suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import hypercorn.protocol
import hypercorn.trio.run
import trio
from hypercorn.events import Closed, RawData
from hypercorn.protocol.h2 import H2Protocol, StreamBuffer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import TCPServer

from penstock.errors import single_error
from penstock.exception_groups import reraise, split_cancelled
from penstock.server.hypercorn_fixes.http1 import PatchedH11
from penstock.server.hypercorn_fixes.http2 import PatchedH2, PatchedStreamBuffer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator
    from types import ModuleType

    from hypercorn.config import Config
    from hypercorn.events import Event
    from hypercorn.trio.worker_context import WorkerContext
    from hypercorn.typing import AppWrapper, ConnectionState

VERSIONS: Final = ("0.18.0",)
"""The versions of Hypercorn whose faults these are."""
MAX_USER_TIMEOUT: Final = (2**31 - 1) / 1000
"""The longest TCP user timeout that a socket takes, in seconds: milliseconds in 31 bits."""

MAX_KEEPALIVE: Final = 32_767
"""The most seconds that Linux waits before it asks an idle peer whether it is there."""

LINGER: Final = 1.0
"""Seconds after its last send in which an HTTP/2 client may close its connection before the server does."""

GONE: Final = (trio.BrokenResourceError, trio.ClosedResourceError, trio.BusyResourceError)
"""What a send raises if the connection is closed, or is being closed."""

AT_ONCE: Final = 32
"""Of so many sends in a row that the system took at once, the last lets other tasks have their turn."""

_SENDS: Final = "_penstock_sends"
"""The attribute of a server's configuration, which Hypercorn hands to each of its connections."""
_TCP_USER_TIMEOUT: Final[int | None] = getattr(socket, "TCP_USER_TIMEOUT", None)


def time_out_stalled(sockets: Iterable[socket.socket], seconds: float) -> bool:
    """Let TCP give up connections whose peer takes nothing in for so long (RFC 5482's user timeout).

    A peer that stops reading closes its window. A `send` to it waits, and nothing but the end of the connection ends
    that wait. With a user timeout the kernel ends it, and the application hears of a disconnect.

    Args:
        sockets: listening sockets; what they accept inherits it.
        seconds: how long, up to `MAX_USER_TIMEOUT`; 0 = as long as the system likes.

    Returns:
        False if this system has no such option (it is Linux's).
    """
    if _TCP_USER_TIMEOUT is None:
        return False
    for sock in sockets:
        if sock.family in {socket.AF_INET, socket.AF_INET6}:
            sock.setsockopt(socket.IPPROTO_TCP, _TCP_USER_TIMEOUT, math.ceil(seconds * 1000))
            if seconds:  # a peer to which nothing is sent is asked now and then whether it is there
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, min(math.ceil(seconds), MAX_KEEPALIVE))
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, min(math.ceil(seconds), MAX_KEEPALIVE))
    return True


class SendDeadline:
    """The sends of one server's connections that are under way, and when they must be over."""

    def __init__(self) -> None:
        self.deadline = math.inf
        """When they must be over. From then on one may have been cut off, and nothing may follow that."""
        self._scopes: set[trio.CancelScope] = set()

    def end_by(self, deadline: float) -> None:
        """From `deadline` on, on Trio's clock, no send may go on. It moves to the front, never back."""
        self.deadline = min(self.deadline, deadline)
        for scope in self._scopes:
            scope.deadline = self.deadline

    @contextmanager
    def shielded(self) -> Iterator[None]:
        """A send: whole, whatever is cancelled around it, until they must be over."""
        with trio.CancelScope(shield=True, deadline=self.deadline) as scope:
            self._scopes.add(scope)
            try:
                yield
            finally:
                self._scopes.discard(scope)


def _sends_of(config: Config) -> SendDeadline | None:
    """Those of the server with this configuration, if it asked for corrections."""
    return getattr(config, _SENDS, None)


class PatchedTCPServer(TCPServer):
    """A connection that ends: with its client, with the server, and alone if something in it fails."""

    def __init__(
        self,
        app: AppWrapper,
        config: Config,
        context: WorkerContext,
        state: ConnectionState,
        stream: trio.SSLStream[trio.SocketStream],
    ) -> None:
        super().__init__(app, config, context, state, stream)
        self._sends = _sends_of(config) or SendDeadline()
        self._last_sent = -math.inf
        self._reading = trio.CancelScope()
        self._read = trio.Event()
        self._lost = False
        self._socket = stream.socket if isinstance(stream, trio.SocketStream) and sys.platform != "win32" else None
        self._sent_at_once = 0

    async def protocol_send(self, event: Event) -> None:
        """Send, or close.

        Hypercorn 0.18.0 shields a send, or a response cancelled in mid-send would leave half a frame on a connection
        that it shares with others. That shield has no deadline: a client that reads too slowly outlasts any shutdown.
        And it does not cover the wait for a send under way, in which what was encoded already would be lost. A send
        that fails because the connection is being closed raises there, in whatever task it is.
        """
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
                await trio.lowlevel.cancel_shielded_checkpoint()  # whoever sends on all the same starves nobody
        elif isinstance(event, Closed):
            await self._close()
            self.lose()
        elif not self._lost:  # or the connection would stay for as long as one that is idle
            await super().protocol_send(event)

    def _at_once(self, data: bytes) -> bytes | memoryview:
        """Send what the system takes without waiting, unless another send is under way; what is left.

        Hypercorn 0.18.0 lets every other task run, twice, whenever it sends. With a thousand readers of one run, each
        of whom is to be sent one event, that is most of the work.
        """
        if self._socket is None or self.send_lock.locked():
            return data
        try:
            sent = os.write(self._socket.fileno(), data)
        except BlockingIOError:
            return data
        self._sent_at_once += 1
        return memoryview(data)[sent:] if sent < len(data) else b""

    async def _in_turn(self, data: bytes | memoryview) -> None:
        """Send what is left, when those who came before are through."""
        with self._sends.shielded():
            if self.send_lock.locked():
                await self.send_lock.acquire()
            else:
                self.send_lock.acquire_nowait()  # in this very step: what has been sent is half a frame, perhaps
            try:
                self._sent_at_once = 0
                await self.stream.send_all(data)
            except BaseException:
                self._socket = None  # half a frame was sent, perhaps: nothing may follow it at once
                raise
            finally:
                self.send_lock.release()

    def lose(self) -> None:
        """The client is gone.

        Hypercorn 0.18.0 tells the responses so in the task that found out, which may be one of theirs: it is cancelled
        when it hears, and the others never do.
        """
        if not self._lost:
            self._lost = True
            self._task_group.spawn(self._tell)

    async def _tell(self) -> None:
        await self.protocol.handle(Closed())
        self._reading.cancel(reason="the client is gone")

    async def _read_data(self) -> None:
        """Read until the client is gone.

        In Hypercorn 0.18.0 a second request that came before the end of the first response is waited with for ever if
        that response cannot end.
        """
        with self._reading:
            await super()._read_data()
        self._read.set()
        self._lost = True
        await self.idle_task.stop()
        await self.protocol.handle(Closed())  # for a request that was being taken in when that was cancelled

    async def _initiate_server_close(self) -> None:
        """Close an idle connection.

        In Hypercorn 0.18.0 that happens at once, although the client may be about to say how much it has read; to that
        the system answers with a reset, and the client drops what it has not read yet. So it may close first.
        """
        if isinstance(self.protocol.protocol, H2Protocol):
            transport = self.stream.transport_stream if isinstance(self.stream, trio.SSLStream) else self.stream
            with trio.move_on_at(self._last_sent + LINGER), suppress(*GONE):
                async with self.send_lock:
                    await transport.send_eof()
                await self._read.wait()
        await super()._initiate_server_close()

    async def run(self) -> None:
        """Serve the connection.

        In Hypercorn 0.18.0 what is raised here, and is no `OSError`, ends the nursery of all connections; many a
        malformed request can bring that about, and some that are well-formed.
        """
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


def _if_asked(corrected: type[Any], original: type[Any]) -> Callable[..., Any]:
    """What makes the one for servers that asked for corrections, and the other for all others."""

    def make(app: AppWrapper, config: Config, *others: Any, **named: Any) -> Any:
        return (original if _sends_of(config) is None else corrected)(app, config, *others, **named)

    return make


class Patch(NamedTuple):
    """A class of Hypercorn's, by the name under which its users look it up, and what takes its place."""

    module: ModuleType
    name: str
    original: type[Any]
    corrected: Callable[..., Any]


PATCHES: Final = (
    Patch(hypercorn.protocol.h2, "StreamBuffer", StreamBuffer, PatchedStreamBuffer),
    Patch(hypercorn.protocol, "H2Protocol", H2Protocol, _if_asked(PatchedH2, H2Protocol)),
    Patch(hypercorn.protocol, "H11Protocol", H11Protocol, _if_asked(PatchedH11, H11Protocol)),
    Patch(hypercorn.trio.run, "TCPServer", TCPServer, _if_asked(PatchedTCPServer, TCPServer)),
)


def are_known() -> bool:
    """Whether the faults of the Hypercorn that is installed are known here, and so are corrected."""
    return version("hypercorn") in VERSIONS


def apply(config: Config, warn: Callable[[str], None]) -> SendDeadline:
    """Put the corrections in place for the connections of the server that has this configuration.

    Args:
        config: the very one that Hypercorn is given, and that nobody else has.
        warn: is told what was not corrected, and why.

    Returns:
        The server's sends; nothing is ever in there if `PatchedTCPServer` is not in place.
    """
    sends = SendDeadline()
    if not are_known():
        warn(
            f"Hypercorn {version('hypercorn')} is no version whose faults are known here ({', '.join(VERSIONS)} is), "
            "so none of them is corrected: a client that reads slowly may hold up a shutdown, HTTP/2 may take memory "
            "without a limit, and an error in one connection may end the server"
        )
        return sends
    setattr(config, _SENDS, sends)
    config.keep_alive_max_requests = sys.maxsize
    for module, name, original, corrected in PATCHES:
        if getattr(module, name) is original:
            setattr(module, name, corrected)
        elif getattr(module, name) is not corrected:
            warn(f"{module.__name__}.{name} has been replaced by somebody else, and is not corrected")
    return sends


def _in_short(error: Exception) -> str:
    """An error's type, and where it was raised: a client brings it about, and its words may hold what that has sent."""
    cause = single_error(error)
    raised = traceback.extract_tb(cause.__traceback__)[-1]
    return f"{type(cause).__name__} at {Path(raised.filename).name}:{raised.lineno}"
