"""HTTP/2 in Hypercorn, corrected: what a stream holds, and how it ends. `corrections.py` puts these in place."""

from __future__ import annotations

from contextlib import suppress
from typing import TYPE_CHECKING, Final

import h2.errors
import h2.events
import h2.exceptions
import trio
from hypercorn.events import Closed, Updated
from hypercorn.protocol.events import StreamClosed
from hypercorn.protocol.h2 import BUFFER_HIGH_WATER, BUFFER_LOW_WATER, BufferCompleteError, H2Protocol, StreamBuffer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from hypercorn.events import Event
    from hypercorn.protocol.events import Event as StreamEvent
    from hypercorn.typing import Event as IOEvent

LAST_WORDS: Final = 1.0
"""Seconds that responses have for their last sends once Hypercorn has cancelled them."""


class BoundedBuffer(StreamBuffer):
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


class Streams(H2Protocol):
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
    - Priorities, which RFC 9113 (5.3) deprecates, are kept of streams that nobody opens, up to a limit that ends the
      connection. Here they are of no account.
    """

    _leaving = False

    async def initiate(self, headers: list[tuple[bytes, bytes]] | None = None, settings: bytes | None = None) -> None:
        """Begin; idle until the first request."""
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
            buffer := self.stream_buffers.get(event.stream_id), BoundedBuffer
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
        if isinstance(buffer, BoundedBuffer) and stream_id not in self.stream_buffers:
            await buffer.gone.set()
        if self._leaving and not self.stream_buffers:
            self.closed = True  # which ends the task

    async def _handle_events(self, events: list[h2.events.Event]) -> None:
        await super()._handle_events(list(self._of_streams(events)))
        resets = [event.stream_id for event in events if isinstance(event, h2.events.StreamReset)]
        for stream_id in resets:
            await self._drop(stream_id)
        if resets:
            await self.send(Updated(idle=self.idle))

    def _of_streams(self, events: list[h2.events.Event]) -> Iterator[h2.events.Event]:
        """The events but for requests that come too late, and for data of streams that are over."""
        opened: set[int] = set()
        for event in events:
            if isinstance(event, h2.events.RequestReceived) and self.context.terminated.is_set():
                with suppress(h2.exceptions.ProtocolError):  # it has been taken back
                    self.connection.reset_stream(event.stream_id, h2.errors.ErrorCodes.REFUSED_STREAM)
                continue
            if isinstance(event, h2.events.RequestReceived):
                opened.add(event.stream_id)
            elif (
                isinstance(event, h2.events.DataReceived)
                and event.stream_id not in self.streams
                and event.stream_id not in opened
            ):
                with suppress(h2.exceptions.ProtocolError):  # it is closed
                    self.connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                continue
            yield event

    async def _drop(self, stream_id: int) -> None:
        """Drop what is left of a stream."""
        if stream_id in self.stream_buffers:
            await self.stream_buffers[stream_id].close()
            await self._window_updated(stream_id)  # the sending task then removes it

    async def _close_stream(self, stream_id: int) -> None:
        stream = self.streams.pop(stream_id, None)
        if stream is not None:
            self.task_group.spawn(stream.handle, StreamClosed(stream_id=stream_id))
            await self.has_data.set()

    async def _priority_updated(self, event: h2.events.PriorityUpdated) -> None:
        pass
