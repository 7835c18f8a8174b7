"""HTTP/2 in Hypercorn, corrected: what a stream holds, and how it ends. `corrections.py` puts these in place."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import h2.errors
import h2.events
import h2.exceptions
import trio
from hypercorn.events import Closed, Updated
from hypercorn.protocol.events import Body, StreamClosed
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, BUFFER_LOW_WATER, BufferCompleteError, H2Protocol, StreamBuffer
from hypercorn.protocol.ws_stream import WSStream

from penstock.server.hypercorn_fixes.http1 import TELLING

if TYPE_CHECKING:
    from hypercorn.events import Event
    from hypercorn.protocol.events import Event as StreamEvent
    from hypercorn.protocol.http_stream import HTTPStream
    from hypercorn.typing import Event as IOEvent

FRAME_LENGTH: Final = 3
"""The first bytes of a frame, which say how long it is."""
LAST_WORDS: Final = 1.0
"""Seconds that responses have for their last sends once Hypercorn has cancelled them."""


class PatchedStreamBuffer(StreamBuffer):
    """What the application has sent on an HTTP/2 stream and the client's window has not taken yet.

    Hypercorn 0.18.0 lets a waiting `push` go on whenever less than the low-water mark was *popped*; an exhausted window
    pops nothing, again and again. Here it goes on when less than that is *left*.
    """

    def __init__(self, event_class: type[IOEvent]) -> None:
        super().__init__(event_class)
        self.gone = event_class()
        """Its stream has ended, and nothing is left of it."""

    @property
    def ended(self) -> bool:
        """Whether all of the response is in here, or was."""
        return self._complete

    async def close(self) -> None:
        """Drop what is there, and let go of whoever waits."""
        await super().close()
        await self.gone.set()

    async def push(self, data: bytes) -> None:
        """Take `data` in; wait if that is more than the high-water mark (32 KiB) together with what is there."""
        if self._complete:
            raise BufferCompleteError
        self.buffer.extend(data)
        await self._is_empty.clear()
        if len(self.buffer) >= BUFFER_HIGH_WATER:
            if self._paused.is_set():  # or somebody waits for it already
                await self._paused.clear()
            await self._paused.wait()

    async def pop(self, max_length: int) -> bytes:
        """Give out what the window takes."""
        data = bytes(self.buffer[:max_length])
        del self.buffer[:max_length]
        if len(self.buffer) < BUFFER_LOW_WATER:
            await self._paused.set()
        if not self.buffer:
            await self._is_empty.set()
        return data


class PatchedH2(H2Protocol):
    """An HTTP/2 connection whose streams end whole, or visibly not, and leave nothing behind.

    Hypercorn 0.18.0 leaves these ends open:

    - The task that empties the buffers ends with the connection, and a response that waits for that (at its end each
      one does) waits for ever: an aborted page load is enough. So does one whose stream is reset while its window is
      shut. And of all responses on a connection, one that takes nothing in keeps the others from hearing.
    - That task is the first to go when responses are cancelled, and takes their last words along.
    - A response counts as sent when its last byte is taken from the buffer. If the connection is closed then, as at a
      shutdown, the frame that ends the stream is never sent.
    - A response that fails after its headers never ends at all.
    - A connection whose last stream was reset, or that never had one, is not closed for being idle.
    - A request that comes during a shutdown is refused, and its body then ends the connection, with all its streams.
    - The limit on headers is told to clients, and not kept: 64 KiB are let in.
    - A frame is waited for, and kept, that says it has 16 MiB, which none may have.
    - Priorities, which RFC 9113 (5.3) deprecates, are kept of streams that nobody opens, up to a limit that ends the
      connection. Here they are of no account.
    """

    _leaving = False

    async def initiate(self, headers: list[tuple[bytes, bytes]] | None = None, settings: bytes | None = None) -> None:
        """Begin; idle until the first request."""
        self._taking: dict[int, trio.CancelScope] = {}
        self.connection.decoder.max_header_list_size = self.config.h2_max_header_list_size
        await super().initiate(headers, settings)
        await self.send(Updated(idle=self.idle))

    async def handle(self, event: Event) -> None:
        """Take in what happened on the connection."""
        if isinstance(event, Closed):
            self.closed = True
            for buffer in list(self.stream_buffers.values()):
                await buffer.close()
        await super().handle(event)

    async def stream_send(self, event: StreamEvent) -> None:
        """Send for a response; a stream is over when the client has been told so."""
        if isinstance(event, StreamClosed) and isinstance(
            buffer := self.stream_buffers.get(event.stream_id), PatchedStreamBuffer
        ):
            if buffer.ended:
                await buffer.gone.wait()
            elif event.stream_id in self.streams:
                with suppress(h2.exceptions.ProtocolError):  # it, or the connection, is closed already
                    self.connection.reset_stream(event.stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)
                await self._flush()
                await self._drop(event.stream_id)
        await super().stream_send(event)

    async def send_task(self) -> None:
        """Empty the buffers; cancelled, for as long as there are last words to send."""
        try:
            await super().send_task()
        except trio.Cancelled:
            self._leaving = True
            with trio.move_on_after(LAST_WORDS, shield=True):
                if self.stream_buffers:
                    await super().send_task()
            raise

    async def _send_data(self, stream_id: int) -> None:
        buffer = self.stream_buffers.get(stream_id)
        await super()._send_data(stream_id)
        if isinstance(buffer, PatchedStreamBuffer) and stream_id not in self.stream_buffers:
            await buffer.gone.set()
        if self._leaving and not self.stream_buffers:
            self.closed = True  # which ends the task

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.RequestReceived) and self.context.terminated.is_set():
                with suppress(h2.exceptions.ProtocolError):  # it has been taken back
                    self.connection.reset_stream(event.stream_id, h2.errors.ErrorCodes.REFUSED_STREAM)
            elif isinstance(event, h2.events.DataReceived):
                await self._take_in(event)
                with suppress(h2.exceptions.ProtocolError):  # it is closed, perhaps by now
                    self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            else:
                await super()._handle_events([event])
            if isinstance(event, h2.events.RequestReceived | h2.events.DataReceived):
                await self._close_refused(event.stream_id)
        resets = [event.stream_id for event in events if isinstance(event, h2.events.StreamReset)]
        for stream_id in resets:
            await self._drop(stream_id)
        if resets:
            await self.send(Updated(idle=self.idle))
        await self._flush()
        await self._refuse_overlong()

    async def _take_in(self, event: h2.events.DataReceived) -> None:
        """Hand a piece of a body on, until its response has ended: then nobody takes it, and all others would wait."""
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            with trio.CancelScope() as self._taking[event.stream_id]:
                await stream.handle(Body(stream_id=event.stream_id, data=event.data))
            self._taking.pop(event.stream_id, None)

    async def _close_refused(self, stream_id: int) -> None:
        """Forget a stream that Hypercorn has refused itself: a handshake of a WebSocket."""
        stream = self.streams.get(stream_id)
        if isinstance(stream, WSStream) and stream.closed:
            await self._close_stream(stream_id)
            await self.send(Updated(idle=self.idle))

    async def _refuse_overlong(self) -> None:
        """End a connection whose next frame says that it is larger than any may be (RFC 9113, 4.2)."""
        begun = bytes(self.connection.incoming_buffer._data[:FRAME_LENGTH])  # noqa: SLF001  (h2 waits for all of it)
        if len(begun) == FRAME_LENGTH and int.from_bytes(begun, "big") > self.connection.max_inbound_frame_size:
            await self.send(Closed())

    async def _drop(self, stream_id: int) -> None:
        """Drop what is left of a stream."""
        if stream_id in self.stream_buffers:
            await self.stream_buffers[stream_id].close()
            await self._window_updated(stream_id)  # the sending task then removes it

    async def _close_stream(self, stream_id: int) -> None:
        stream = self.streams.pop(stream_id, None)
        if (taking := self._taking.pop(stream_id, None)) is not None:
            taking.cancel(reason="the stream has ended")
        if stream is not None:
            self.task_group.spawn(self._tell, stream, stream_id)
            await self.has_data.set()

    async def _tell(self, stream: HTTPStream | WSStream, stream_id: int) -> None:
        """Tell a response that its stream has ended, if it has ears; see `http1.py`."""
        with trio.move_on_after(TELLING):
            await stream.handle(StreamClosed(stream_id=stream_id))

    async def _priority_updated(self, event: h2.events.PriorityUpdated) -> None:
        pass
