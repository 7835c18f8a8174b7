"""`keepalive`: any source of chunks, with a heartbeat while it is silent.

    source ──__anext__──▶ background task ──channel, no buffer──▶ __anext__ ──▶ the block
                          opens, iterates, closes                 waits `interval`, then pings

What waits with a time limit is the consumer's end of the channel. No scope is ever opened around a step of the source,
so the source's own scopes stay whole, and a ping neither interrupts nor hurries it.

Guarantees:
- A ping says "nothing came for `interval` seconds", and only that: while chunks come there are none.
- The source runs at most one chunk ahead of the block, however fast it is.
- Everything that the source yielded is handed over before what it raised is raised.
- Leaving the block, in whatever way, closes the source at once: it is cancelled, in the task that opened it, and its
  `finally` blocks have run when the block has been left.
- One exception leaves the block bare, without an `ExceptionGroup` around it.

It does not buffer, and it does not shield anything: cleanup that awaits needs a shield with a deadline of its own.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from math import inf
from typing import TYPE_CHECKING, Any, Final

import trio

from penstock.errors import ConfigurationError
from penstock.exception_groups import raise_single, reraise
from penstock.sse.chunks import held_across_a_yield, opened

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

PING: Final = b": ping\n\n"
"""A comment: no client sees an event."""


@asynccontextmanager
async def keepalive(
    source: Any, interval: float = 15.0, ping: bytes | Callable[[], Any] = PING
) -> AsyncIterator[AsyncIterator[Any]]:
    """Iterate `source` with a ping for every `interval` seconds in which it yields nothing.

    An async context manager that hands out an async iterator. The time of a silence is the time that the block waits
    for a chunk. Entering is a checkpoint only as far as opening a nursery is one; each step of the iterator is a
    checkpoint, and cancelling it loses nothing. Leaving the block cancels the source and waits for its cleanup.

    Args:
        source: an async iterable, an async context manager that hands one out, or an awaitable of either. It is opened,
            iterated and closed in one background task, with a copy of the caller's context variables.
        interval: seconds of Trio's clock; more than 0.
        ping: what is handed out for a silence, or a function that makes it.

    Raises:
        ConfigurationError: the interval is not above 0.
        trio.ClosedResourceError: from the iterator: its block has been left.
        trio.BusyResourceError: from the iterator: two tasks iterate it at once.
        Exception: from the iterator: what the source raised, after all that it had yielded. An exception that the block
            did not stay for is raised when the block is left.
    """
    if not interval > 0:
        raise ConfigurationError(f"interval is a number of seconds above 0, not {interval!r}")
    chunks = _Chunks(interval, ping)
    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(chunks.feed, source)
            try:
                yield chunks
            finally:
                chunks.leave(nursery.cancel_scope)
    except BaseExceptionGroup as group:
        raise_single(group, trio.Cancelled)


class _Chunks:
    """The iterator of one `keepalive` block, and the task behind it."""

    def __init__(self, interval: float, ping: bytes | Callable[[], Any]) -> None:
        self._interval = interval
        self._ping = ping
        self._send, self._receive = trio.open_memory_channel[Any](0)
        self._error: Exception | None = None
        """What the source raised, until it is raised here."""
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
            pass  # left before raising, or the end of the channel would become the context of the source's error
        finally:
            self._iterating = False
        self._raise_error()
        raise StopAsyncIteration

    async def feed(self, source: Any) -> None:
        """Hand over all of the source, in a task of its own, which ends when the block is left."""
        with self._send:
            try:
                async with opened(source) as chunks:
                    async for chunk in chunks:
                        await self._send.send(chunk)
            except trio.Cancelled:  # noqa: ASYNC103  (the source's own: nobody around this task was cancelled)
                if trio.current_effective_deadline() == -inf:
                    raise
                self._error = held_across_a_yield()
            except Exception as error:
                if self._left:
                    raise
                self._error = error  # for the iterator, which may still have a chunk to hand over before it
        try:
            await trio.sleep_forever()
        finally:
            self._raise_error()  # unless the block has seen it

    def leave(self, scope: trio.CancelScope) -> None:
        """The block is being left: end the source."""
        self._left = True
        scope.cancel(reason="the keepalive block was left")

    def _raise_error(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            try:
                reraise(error)
            finally:
                del error  # its traceback holds this frame
