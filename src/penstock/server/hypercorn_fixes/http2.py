"""HTTP/2 in Hypercorn, patched: what a stream buffers, and how it ends."""

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

from penstock.server.hypercorn_fixes.http1 import NOTIFY_TIMEOUT

if TYPE_CHECKING:
    from hypercorn.events import Event
    from hypercorn.protocol.events import Event as StreamEvent
    from hypercorn.protocol.http_stream import HTTPStream
    from hypercorn.typing import Event as IOEvent

FRAME_LENGTH: Final = 3  # bytes at the beginning of a frame that hold its length
LAST_SENDS: Final = 1.0  # seconds that responses have for their last sends after Hypercorn has cancelled them


class PatchedStreamBuffer(StreamBuffer):
    """What the application has sent on an HTTP/2 stream and the client's window has not taken yet."""

    # A `push` waits from the high-water mark (32 KiB) on, until less than the low-water mark is *left*. Hypercorn lets
    # it go on when less than that was *popped*; an exhausted window pops nothing, again and again.

    def __init__(self, event_class: type[IOEvent]) -> None:
        super().__init__(event_class)
        self.gone = event_class()  # set when the stream has ended and the buffer is empty

    @property
    def ended(self) -> bool:
        """Whether the response is complete; some of it may still be in the buffer."""
        return self._complete

    async def close(self) -> None:
        """Drop the buffered bytes, and wake every `push` and `drain`."""
        await super().close()
        await self.gone.set()

    async def push(self, data: bytes) -> None:
        if self._complete:
            raise BufferCompleteError
        self.buffer.extend(data)
        await self._is_empty.clear()
        if len(self.buffer) >= BUFFER_HIGH_WATER:
            if self._paused.is_set():  # it is cleared already if another `push` waits
                await self._paused.clear()
            await self._paused.wait()

    async def pop(self, max_length: int) -> bytes:
        data = bytes(self.buffer[:max_length])
        del self.buffer[:max_length]
        if len(self.buffer) < BUFFER_LOW_WATER:
            await self._paused.set()
        if not self.buffer:
            await self._is_empty.set()
        return data


class PatchedH2(H2Protocol):
    """An HTTP/2 connection whose streams end whole or are reset, and leave nothing behind."""

    _cancelled = False

    async def initiate(self, headers: list[tuple[bytes, bytes]] | None = None, settings: bytes | None = None) -> None:
        self._handling: dict[int, trio.CancelScope] = {}
        # Hypercorn announces the limit to clients, and lets h2's own limit of 64 KiB pass.
        self.connection.decoder.max_header_list_size = self.config.h2_max_header_list_size
        await super().initiate(headers, settings)
        # Without that a connection that has had no stream is not closed when it is idle.
        await self.send(Updated(idle=self.idle))

    async def handle(self, event: Event) -> None:
        # The task that empties the buffers ends with the connection; a response would wait for it at its end.
        if isinstance(event, Closed):
            self.closed = True
            for buffer in list(self.stream_buffers.values()):
                await buffer.close()
        await super().handle(event)

    async def stream_send(self, event: StreamEvent) -> None:
        # For Hypercorn a response is over when its last byte has left the buffer, before the frame that ends its
        # stream is sent; and one that fails after its headers never ends.
        if isinstance(event, StreamClosed) and isinstance(
            buffer := self.stream_buffers.get(event.stream_id), PatchedStreamBuffer
        ):
            if buffer.ended:
                await buffer.gone.wait()
            elif event.stream_id in self.streams:
                with suppress(h2.exceptions.ProtocolError):  # the stream, or the connection, is closed already
                    self.connection.reset_stream(event.stream_id, h2.errors.ErrorCodes.INTERNAL_ERROR)
                await self._flush()
                await self._drop(event.stream_id)
        await super().stream_send(event)

    async def send_task(self) -> None:
        # It is the first task to end when responses are cancelled, and their last sends need it.
        try:
            await super().send_task()
        except trio.Cancelled:
            self._cancelled = True
            with trio.move_on_after(LAST_SENDS, shield=True):
                if self.stream_buffers:
                    await super().send_task()
            raise

    async def _send_data(self, stream_id: int) -> None:
        buffer = self.stream_buffers.get(stream_id)
        await super()._send_data(stream_id)
        if isinstance(buffer, PatchedStreamBuffer) and stream_id not in self.stream_buffers:
            await buffer.gone.set()
        if self._cancelled and not self.stream_buffers:
            self.closed = True  # which ends the task

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        for event in events:
            if isinstance(event, h2.events.RequestReceived) and self.context.terminated.is_set():
                # Hypercorn refuses it, too, but the body that follows then ends the connection.
                with suppress(h2.exceptions.ProtocolError):  # the client has reset it already
                    self.connection.reset_stream(event.stream_id, h2.errors.ErrorCodes.REFUSED_STREAM)
            elif isinstance(event, h2.events.DataReceived):
                await self._handle_data(event)
                with suppress(h2.exceptions.ProtocolError):  # the stream may have been closed meanwhile
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

    async def _handle_data(self, event: h2.events.DataReceived) -> None:
        """Pass a piece of a body to its response; the wait for a full queue ends with the response."""
        stream = self.streams.get(event.stream_id)
        if stream is not None:
            with trio.CancelScope() as self._handling[event.stream_id]:
                await stream.handle(Body(stream_id=event.stream_id, data=event.data))
            self._handling.pop(event.stream_id, None)

    async def _close_refused(self, stream_id: int) -> None:
        """Close the stream of a WebSocket's handshake that Hypercorn has refused."""
        stream = self.streams.get(stream_id)
        if isinstance(stream, WSStream) and stream.closed:
            await self._close_stream(stream_id)
            await self.send(Updated(idle=self.idle))

    async def _refuse_overlong(self) -> None:
        """End a connection whose next frame is longer than a frame may be (RFC 9113, 4.2)."""
        begin = bytes(self.connection.incoming_buffer._data[:FRAME_LENGTH])  # noqa: SLF001  (h2 waits for the whole frame)
        if len(begin) == FRAME_LENGTH and int.from_bytes(begin, "big") > self.connection.max_inbound_frame_size:
            await self.send(Closed())

    async def _drop(self, stream_id: int) -> None:
        if stream_id in self.stream_buffers:
            await self.stream_buffers[stream_id].close()
            await self._window_updated(stream_id)  # the sending task then removes it

    async def _close_stream(self, stream_id: int) -> None:
        stream = self.streams.pop(stream_id, None)
        if (handling := self._handling.pop(stream_id, None)) is not None:
            handling.cancel(reason="the stream has ended")
        if stream is not None:
            self.task_group.spawn(self._notify_closed, stream, stream_id)
            await self.has_data.set()

    async def _notify_closed(self, stream: HTTPStream | WSStream, stream_id: int) -> None:
        with trio.move_on_after(NOTIFY_TIMEOUT):
            await stream.handle(StreamClosed(stream_id=stream_id))

    async def _priority_updated(self, event: h2.events.PriorityUpdated) -> None:
        """Ignore priorities (deprecated by RFC 9113, 5.3): Hypercorn keeps them for streams that do not exist, too."""
