"""A TCP proxy between a client and a real redis-server, for what a network does to both.

Requests are read as they pass; from the server comes one reply at a time, so that one can be lost by itself: the
request has taken effect, and the connection breaks. RESP2 and RESP3 are understood as far as that takes, but neither
MONITOR nor CLIENT REPLY. The controls act at once and on every connection; only `accept` is a checkpoint.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import trio

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterator

_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)
_MESSAGES = frozenset({"message", "pmessage", "smessage"})
_CONFIRMATIONS = frozenset(f"{prefix}{word}" for prefix in ("", "p", "s") for word in ("subscribe", "unsubscribe"))


@dataclass(frozen=True, slots=True)
class Reply:
    """One reply of the server, as it stands on the wire, to a command, in upper case."""

    command: str
    arguments: tuple[bytes, ...]
    data: bytes

    @property
    def is_error(self) -> bool:
        return self.data[:1] in {b"-", b"!"}


@dataclass(eq=False, slots=True)
class _Connection:
    client: trio.SocketStream
    server: trio.SocketStream | None = None
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)
    asked: deque[list[bytes]] = field(default_factory=deque)
    """Requests without a reply so far."""
    subscribed: bool = False

    def close(self) -> None:
        self.scope.cancel()
        self.client.socket.close()
        if self.server is not None:
            self.server.socket.close()


class Proxy:
    """One proxy; `proxy` makes it. It counts the requests that it passes on, by command, and the replies that it loses.

    With `drop_messages` it swallows whatever is published, with `drop_confirmations` those of subscriptions, and leaves
    the connection as it is; how many that were is `swallowed`.
    """

    def __init__(self, server_port: int, nursery: trio.Nursery) -> None:
        self._server_port = server_port
        self._nursery = nursery
        self._open: set[_Connection] = set()
        self._listener: trio.SocketListener | None = None
        self._accepting = trio.CancelScope()
        self._flow = trio.Event()
        self._flow.set()
        self._delay = 0.0
        self._losses: list[Callable[[Reply], bool]] = []
        self.port = 0
        self.requests: Counter[str] = Counter()
        self.lost = 0
        self.drop_messages = self.drop_confirmations = False
        self.swallowed = 0

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}"

    @property
    def connections(self) -> int:
        return len(self._open)

    def drop_reply_when(self, predicate: Callable[[Reply], bool], *, times: float = math.inf) -> None:
        """Lose the replies that this is true of, so many times: swallow them, and cut their connections."""
        left = times

        def lost(reply: Reply) -> bool:
            nonlocal left
            if left <= 0 or not predicate(reply):
                return False
            left -= 1
            return True

        self._losses.append(lost)

    def lose_every(self, n: int, command: str = "EVALSHA") -> None:
        """Lose every n-th reply to this command in the same way, counted over all connections from now on."""
        seen = 0

        def lost(reply: Reply) -> bool:
            nonlocal seen
            if reply.command != command:
                return False
            seen += 1
            return seen % n == 0

        self._losses.append(lost)

    def lose_nothing(self) -> None:
        self._losses.clear()

    def delay(self, seconds: float) -> None:
        self._delay = seconds

    def cut(self) -> None:
        for connection in self._open:
            connection.close()
        self._open.clear()

    def refuse(self) -> None:
        self._accepting.cancel()
        if self._listener is not None:
            self._listener.socket.close()
            self._listener = None
        self.cut()

    async def accept(self) -> None:
        if self._listener is None:
            (self._listener,) = await trio.open_tcp_listeners(self.port, host="127.0.0.1")
            self.port = self._listener.socket.getsockname()[1]
            self._accepting = trio.CancelScope()
            self._nursery.start_soon(self._accept, self._listener, self._accepting)

    def stall(self) -> None:
        if self._flow.is_set():
            self._flow = trio.Event()

    def go_on(self) -> None:
        self._flow.set()

    async def _accept(self, listener: trio.SocketListener, scope: trio.CancelScope) -> None:
        with scope:
            await trio.serve_listeners(self._serve, [listener], handler_nursery=self._nursery)

    async def _serve(self, client: trio.SocketStream) -> None:
        connection = _Connection(client)
        if self._listener is None:  # refused after it had been accepted
            connection.close()
            return
        self._open.add(connection)
        try:
            with connection.scope, suppress(OSError):  # no server there
                connection.server = await trio.open_tcp_stream("127.0.0.1", self._server_port)
                await self._pass_on(connection, connection.server)
        finally:
            self._open.discard(connection)
            connection.close()

    async def _pass_on(self, connection: _Connection, server: trio.SocketStream) -> None:
        late, due = trio.open_memory_channel[tuple[float, bytes]](1000)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_requests, connection, server)
            nursery.start_soon(self._read_replies, server, late)
            nursery.start_soon(self._pass_replies, connection, due)

    async def _flowing(self) -> None:
        while not self._flow.is_set():
            await self._flow.wait()

    async def _pass_requests(self, connection: _Connection, server: trio.SocketStream) -> None:
        buffer = bytearray()
        with suppress(*_GONE):
            async for piece in connection.client:
                await self._flowing()
                buffer += piece
                for frame in _frames(buffer):
                    self._note(connection, _words(frame))
                await server.send_all(piece)
        connection.scope.cancel()

    def _note(self, connection: _Connection, words: list[bytes]) -> None:
        if not words:  # an empty line, to which there is no reply
            return
        command = _name(words)
        self.requests[command] += 1
        if command.lower() in _CONFIRMATIONS:  # confirmed per channel, and in RESP3 by pushes
            connection.subscribed = True
        else:
            connection.asked.append(words)

    async def _read_replies(self, server: trio.SocketStream, late: trio.MemorySendChannel[tuple[float, bytes]]) -> None:
        buffer = bytearray()
        with late, suppress(*_GONE):
            async for piece in server:
                buffer += piece
                for frame in _frames(buffer):
                    await late.send((trio.current_time() + self._delay, frame))

    async def _pass_replies(self, connection: _Connection, due: trio.MemoryReceiveChannel[tuple[float, bytes]]) -> None:
        with suppress(*_GONE):
            async for when, frame in due:
                await trio.sleep_until(when)
                await self._flowing()
                if self._is_kept_back(connection, frame):
                    continue
                await connection.client.send_all(frame)
        connection.scope.cancel()

    def _is_kept_back(self, connection: _Connection, frame: bytes) -> bool:
        pushed = _pushed(frame, subscribed=connection.subscribed)
        if pushed is not None:
            swallowed = self.drop_messages if pushed in _MESSAGES else self.drop_confirmations
            self.swallowed += swallowed
            return swallowed
        words = connection.asked.popleft() if connection.asked else [b""]  # unasked: the server says why it closes
        reply = Reply(_name(words), tuple(words[1:]), frame)
        lost = [loses(reply) for loses in self._losses]  # each counts, whatever the others say
        if not any(lost):
            return False
        self.lost += 1
        self._open.discard(connection)
        connection.close()
        return True


@asynccontextmanager
async def proxy(port: int) -> AsyncIterator[Proxy]:
    async with trio.open_nursery() as nursery:
        between = Proxy(port, nursery)
        await between.accept()
        try:
            yield between
        finally:
            between.refuse()
            nursery.cancel_scope.cancel()


def _frames(buffer: bytearray) -> Iterator[bytes]:
    while (end := _end(buffer)) is not None:
        frame = bytes(buffer[:end])
        del buffer[:end]
        yield frame


def _end(buffer: bytearray) -> int | None:
    """Where the first request or reply in the buffer ends; None: not there yet."""
    position, missing = 0, 1
    while missing:
        line_end = buffer.find(b"\r\n", position)
        if line_end < 0:
            return None
        kind, rest = chr(buffer[position]), bytes(buffer[position + 1 : line_end])
        position = line_end + 2
        missing -= 1
        if kind in "$=!" and int(rest) >= 0:  # bulk string, verbatim string, bulk error; -1 is null
            position += int(rest) + 2
        elif kind in "*~>":  # array, set, push; -1 is null
            missing += max(int(rest), 0)
        elif kind == "%":  # map
            missing += 2 * int(rest)
        elif kind == "|":  # attributes, and what they belong to
            missing += 2 * int(rest) + 1
    return position if position <= len(buffer) else None


def _words(request: bytes) -> list[bytes]:
    """The words of a request: an array of bulk strings, or a line as one types it."""
    if not request.startswith(b"*"):
        return request.split()
    words = []
    position = request.index(b"\r\n") + 2
    while position < len(request):
        start = request.index(b"\r\n", position) + 2
        end = start + int(request[position + 1 : start - 2])
        words.append(request[start:end])
        position = end + 2
    return words


def _name(words: list[bytes]) -> str:
    return words[0].decode(errors="replace").upper()


def _pushed(frame: bytes, *, subscribed: bool) -> str | None:
    """The kind of what the server sends unasked, like "message"; None: a reply. In RESP2 both are arrays."""
    if not frame.startswith(b">" if not subscribed else (b">", b"*")):
        return None
    _, _, kind, *_ = [*frame.split(b"\r\n", 3), b"", b""]
    word = kind.decode(errors="replace")
    return word if frame.startswith(b">") or word in _MESSAGES | _CONFIRMATIONS else None
