"""`keepalive`: a source of chunks, with pings while it is silent. A stream has its own: `asgi/sender.py`.

A background task iterates the source and sends to a channel without a buffer. The time limit applies to the receiving
end: no scope is opened around a step of the source, so its own scopes stay intact, and a ping does not interrupt it.

While chunks come there are no pings. The source runs at most one chunk ahead of the block, and every chunk comes before
the source's exception. When the block has been left, the source's `finally` blocks have run, in the task that opened
it. It does not buffer, and it shields nothing: cleanup that awaits needs a shield with a deadline of its own.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from math import inf
from typing import TYPE_CHECKING, Any, Final

import trio

from penstock.errors import ConfigurationError
from penstock.exception_groups import open_nursery, reraise
from penstock.sse.chunks import held_across_a_yield, opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

PING: Final = b": ping\n\n"  # a comment: no client sees an event


@asynccontextmanager
async def keepalive(
    source: Any, interval: float = 15.0, ping: bytes | Callable[[], Any] = PING
) -> AsyncIterator[AsyncIterator[Any]]:
    """Iterate `source` with a ping for every `interval` seconds in which it yields nothing.

    An async context manager. A silence is the time that the block waits for a chunk. Entering is a checkpoint only as
    far as opening a nursery is one. Each step of the iterator is a checkpoint, and cancelling it loses no chunk.
    Leaving the block cancels the source and waits for its cleanup.

    Args:
        source: an async iterable, an async context manager that yields one, or an awaitable of either. One background
            task opens, iterates and closes it, with a copy of the caller's context variables.
        interval: seconds of Trio's clock; more than 0.
        ping: the chunk to yield for a silence, or a function that returns it.

    Yields:
        An async iterator of the chunks and pings.

    Raises:
        ConfigurationError: the interval is not above 0.
        trio.ClosedResourceError: by the iterator: its block has been left.
        trio.BusyResourceError: by the iterator: two tasks iterate it at once.
        Exception: by the iterator, what the source raised, after all its chunks. If the block is left before that, the
            exception is raised when it is left.
    """
    if not interval > 0:
        raise ConfigurationError(f"interval is a number of seconds above 0, not {interval!r}")
    chunks = _Chunks(interval, ping)
    async with open_nursery() as nursery:
        nursery.start_soon(chunks.feed, source)
        try:
            yield chunks
        finally:
            chunks.leave(nursery.cancel_scope)


class _Chunks:
    """The iterator of one `keepalive` block, and its background task."""

    def __init__(self, interval: float, ping: bytes | Callable[[], Any]) -> None:
        self._interval = interval
        self._ping = ping
        self._send, self._receive = trio.open_memory_channel[Any](0)
        self._error: Exception | None = None  # the source's exception, until the iterator raises it
        self._iterating = False
        self._left = False

    def __aiter__(self) -> _Chunks:
        return self

    async def __anext__(self) -> Any:
        if self._left:
            raise trio.ClosedResourceError("the block of this keepalive has been left")
        if self._iterating:
            raise trio.BusyResourceError("another task is waiting for a chunk of this keepalive")
        self._iterating = True
        try:
            with trio.move_on_after(self._interval):
                return await self._receive.receive()
            return self._ping() if callable(self._ping) else self._ping
        except trio.EndOfChannel:
            pass  # raised below, so that EndOfChannel does not become the context of the source's exception
        finally:
            self._iterating = False
        self._raise_error()
        raise StopAsyncIteration

    async def feed(self, source: Any) -> None:
        """Send every chunk of the source; the background task, which ends when the block is left."""
        with self._send:
            try:
                async with opened(source) as chunks:
                    async for chunk in chunks:
                        await self._send.send(chunk)
            except trio.Cancelled:  # noqa: ASYNC103  (perhaps the source's own: no scope around this task was cancelled)
                if trio.current_effective_deadline() == -inf:
                    raise
                self._error = held_across_a_yield()
            except Exception as error:
                if self._left:
                    raise
                self._error = error  # for the iterator, which may have to yield a chunk first
        try:
            await trio.sleep_forever()
        finally:
            self._raise_error()  # unless the iterator has raised it

    def leave(self, scope: trio.CancelScope) -> None:
        """Cancel the source: the block is being left."""
        self._left = True
        scope.cancel(reason="the keepalive block was left")

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            try:
                reraise(error)
            finally:
                del error  # its traceback refers to this frame
