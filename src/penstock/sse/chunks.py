"""Sources and chunks: what a producer may be, and what it may yield.

A *source* is an async iterable of chunks, or an async context manager that yields one, or an awaitable of either. One
task opens, iterates and closes it, and no cancel scope is opened around one of its steps: a scope that the source holds
open across a `yield` would corrupt that one.

A *chunk* is an `Event`, or a `str` or `bytes` of whole, encoded SSE blocks. `blocks_of` splits a run's chunk, for each
block becomes an entry of its own. `bytes_of` encodes the chunk of a response without a run.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

from penstock.errors import EventTooLarge, InvalidChunk, encodable
from penstock.exception_groups import without
from penstock.sse import Event
from penstock.sse.events import split_blocks

if TYPE_CHECKING:
    from collections.abc import AsyncIterable, AsyncIterator

    from penstock.sse.dialects import Dialect

_ENDS: Final = (b"\n\n", b"\r\r", b"\n\r\n", b"\r\n\r")


class Block(NamedTuple):
    """One encoded event of a run. Only one without a type, or of type `error`, can end it: output may hold any text."""

    data: bytes  # with LF line ends, without an `id` line
    message: bool = True  # it has no type
    done: bool = False  # it has no type, and its data is exactly `[DONE]`
    error: str | None = None  # the data of an event of type `error`
    stop_reason: str | None = None

    @classmethod
    def of(cls, wire: bytes, event: str | None, data: str | None, dialect: Dialect) -> Block:
        if event is not None:
            return cls(wire, message=False, error=data or "" if event == "error" else None)
        return cls(wire, done=data == "[DONE]", stop_reason=None if data is None else dialect.stop_reason(data))


def blocks_of(
    chunk: object, dialect: Dialect, *, max_event_bytes: int, max_chunk_bytes: int | None = None
) -> list[Block]:
    """Split a run's chunk into its blocks; raises `InvalidChunk` or `EventTooLarge`."""
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
    """Return the bytes of a chunk of a response without a run; ids pass as they are. Raises `InvalidChunk`."""
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
    """Split a chunk that may be a `(content, status)` pair; raises `InvalidChunk` for another tuple.

    Returns the content, and for a status that is not 2xx the code and message of the error that it stands for.
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
    text = content.decode("utf-8", "replace") if isinstance(content, bytes) else str(content)
    return content, (f"STATUS_{status}", encodable(text).strip().removeprefix("data:").strip())


@asynccontextmanager
async def opened(source: Any) -> AsyncIterator[AsyncIterator[Any]]:
    """Open a source for iteration; leaving the block closes it in the same task. Raises `TypeError`."""
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
            "a source is an async iterable, such as an async generator, or an async context manager that yields one; "
            f"{type(chunks).__name__} is neither"
        )
    iterator: Any = aiter(chunks)
    try:
        yield iterator
    finally:
        if hasattr(iterator, "aclose"):
            with without(GeneratorExit):  # a generator that yields inside a nursery is closed by one in a group
                await iterator.aclose()  # noqa: ASYNC102  (the caller has a deadline for the cleanup)


def held_across_a_yield() -> RuntimeError:
    """Return the error of a source whose own cancel scope or nursery has cancelled the task that iterates it."""
    return RuntimeError(
        "the source holds a cancel scope or a nursery open across a yield, and its cancellation reached the task that "
        "iterates it; make it a context manager that yields an iterator, for example with trio.as_safe_channel"
    )
