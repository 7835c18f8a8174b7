"""What a source may be, and what it may yield.

A *source* is an async iterable of chunks, or an async context manager that hands one out, or an awaitable of either. It
is opened, iterated and closed in one task, and no cancel scope is ever opened around one of its steps: a scope there
would be corrupted by any scope that the source itself opens across a `yield`.

A *chunk* is an `Event`, or `str` or `bytes` holding whole, encoded SSE blocks. `blocks_of` takes a run's chunks apart:
k blocks become k entries, so each one is looked at on its own. `bytes_of` is what a response without a run needs: it
passes chunks on.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from penstock.errors import EventTooLarge, InvalidChunk, encodable
from penstock.sse import Event
from penstock.sse.events import split_blocks

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator

    from penstock.sse.dialects import Dialect

MAX_EVENT_BYTES: Final = 1024 * 1024
"""The default of the limit on one encoded event."""

_ENDS: Final = (b"\n\n", b"\r\r", b"\n\r\n", b"\r\n\r")


class Block(NamedTuple):
    """One encoded event of a run, and what it says of the run's end.

    An event with a type of its own says nothing of that, unless the type is `error`: the output of a program may hold
    any words.

    Attributes:
        data: the encoded block, with LF line ends, without an `id` line.
        message: it has no type, so it is one of the producer's plain messages.
        done: it is a message, and its data is exactly `[DONE]`.
        error: the data of an event of type `error`.
        stop_reason: the stop reason that it states.
    """

    data: bytes
    message: bool = True
    done: bool = False
    error: str | None = None
    stop_reason: str | None = None

    @classmethod
    def of(cls, wire: bytes, event: str | None, data: str | None, dialect: Dialect) -> Block:
        """The block with this encoding, type and data."""
        if event is not None:
            return cls(wire, message=False, error=data or "" if event == "error" else None)
        return cls(wire, done=data == "[DONE]", stop_reason=None if data is None else dialect.stop_reason(data))


def blocks_of(
    chunk: object, dialect: Dialect, *, max_event_bytes: int = MAX_EVENT_BYTES, max_chunk_bytes: int | None = None
) -> list[Block]:
    """Take a run's chunk apart.

    Raises:
        InvalidChunk: it is no chunk, holds half a block, has an id of its own, or cannot be encoded.
        EventTooLarge: one of its blocks is over the limit, or all of them together are over theirs.
    """
    if isinstance(chunk, Event):
        blocks = [_block_of_event(chunk, dialect)]
    elif isinstance(chunk, str | bytes):
        if max_chunk_bytes is not None and len(chunk) > max_chunk_bytes:
            raise EventTooLarge(
                f"a chunk of {len(chunk)} is over the limit of {max_chunk_bytes} bytes (max_pending_bytes): yield its "
                "events in several chunks"
            )
        blocks = [Block.of(block.wire, block.event, block.data, dialect) for block in split_blocks(chunk)]
    else:
        raise InvalidChunk(f"a chunk is an Event, str or bytes, not {type(chunk).__name__}; yield Event(data=...)")
    for block in blocks:
        if len(block.data) > max_event_bytes:
            raise EventTooLarge(
                f"an event of {len(block.data)} bytes is over the limit of {max_event_bytes} (max_event_bytes); "
                "send the data in pieces, or a reference to it"
            )
    return blocks


def _block_of_event(event: Event, dialect: Dialect) -> Block:
    if event.id is not None:
        raise InvalidChunk("inside a run the log numbers the events: yield Event(data=...) without an id")
    if event.stop_reason is not None:
        return Block(dialect.stop(event.stop_reason), stop_reason=event.stop_reason)
    return Block.of(event.encode(), event.event, event.data, dialect)


def bytes_of(chunk: object, dialect: Dialect) -> bytes:
    """The bytes of a chunk of a response without a run, which passes on ids and whatever else whole blocks hold.

    Raises:
        InvalidChunk: it is no chunk, does not end with a blank line, or cannot be encoded.
    """
    if isinstance(chunk, Event):
        return chunk.encode() if chunk.stop_reason is None else dialect.stop(chunk.stop_reason)
    if isinstance(chunk, str):
        try:
            chunk = chunk.encode()
        except UnicodeEncodeError as error:
            raise InvalidChunk(f"a chunk cannot be encoded as UTF-8: {error.reason} at {error.start}") from None
    if not isinstance(chunk, bytes):
        raise InvalidChunk(f"a chunk is an Event, str or bytes, not {type(chunk).__name__}; yield Event(data=...)")
    if chunk and not chunk.endswith(_ENDS):
        raise InvalidChunk(
            "a str or bytes chunk holds whole SSE blocks, each ended by a blank line; yield Event(data=...)"
        )
    return chunk


def status_of(chunk: object) -> tuple[object, tuple[str, str] | None]:
    """Take apart a chunk that may be a `(content, status)` pair.

    Returns:
        The content, and for a status that is no success (2xx) the code and words of the error that it stands for.

    Raises:
        InvalidChunk: it is a tuple, but no such pair.
    """
    if not isinstance(chunk, tuple):
        return chunk, None
    if len(chunk) != 2 or isinstance(chunk[1], bool) or not isinstance(chunk[1], int) or not 200 <= chunk[1] <= 599:  # noqa: PLR2004
        raise InvalidChunk("a tuple is a chunk only as (content, HTTP status from 200 to 599); yield Event(data=...)")
    content, status = chunk
    if status < 300:  # noqa: PLR2004
        return content, None
    if isinstance(content, Event):
        content = content.data or ""
    words = content.decode("utf-8", "replace") if isinstance(content, bytes) else str(content)
    return content, (f"STATUS_{status}", encodable(words).strip().removeprefix("data:").strip())


@asynccontextmanager
async def opened(source: Any) -> AsyncIterator[AsyncIterator[Any]]:
    """Open a source for iteration; leaving closes it, in the same task, and so runs its `finally` blocks.

    Raises:
        TypeError: it is not a source.
    """
    if inspect.isawaitable(source):
        source = await source
    if isinstance(source, AbstractAsyncContextManager):
        async with source as chunks, _closing(chunks) as iterator:
            yield iterator
        return
    async with _closing(source) as iterator:
        yield iterator


@asynccontextmanager
async def _closing(chunks: AsyncIterable[Any]) -> AsyncIterator[AsyncIterator[Any]]:
    if not hasattr(chunks, "__aiter__"):
        raise TypeError(
            "a source is an async iterable, such as an async generator, or an async context manager that hands one out;"
            f" {type(chunks).__name__} is neither"
        )
    iterator: Any = aiter(chunks)
    try:
        yield iterator
    finally:
        if hasattr(iterator, "aclose"):
            await _close(iterator)  # noqa: ASYNC102  (whoever holds the source has a deadline for its cleanup)


async def _close(iterator: Any) -> None:
    """Close a generator; if it yields inside a nursery, that wraps the `GeneratorExit` which closes it in a group."""
    try:
        await iterator.aclose()
    except BaseExceptionGroup as group:
        _, others = group.split(GeneratorExit)
        if others is not None:
            raise others from None


def held_across_a_yield() -> RuntimeError:
    """The error of a source whose own cancel scope or nursery has cancelled whoever iterates it."""
    return RuntimeError(
        "the source holds a cancel scope or a nursery open across a yield, and its cancellation reached the task that "
        "iterates it; make it a context manager that hands out an iterator, for example with trio.as_safe_channel"
    )
