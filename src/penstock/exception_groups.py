"""Exception groups: a nursery whose single exception leaves it bare, and tools to take groups apart.

Where a nursery is an implementation detail, an `except ValueError` around the block must catch the block's
`ValueError`. Only the nursery's own group goes: one that a body raised itself, or of several exceptions, stays.
The functions take the class that the event loop cancels with as `cancelled`, so they serve anyio's task groups, too.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, NoReturn

import trio

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType


class open_nursery:  # noqa: N801  (used as trio.open_nursery is)
    """`trio.open_nursery`, but a single exception leaves the block bare; see `raise_single`."""

    # A class, not an @asynccontextmanager: a KeyboardInterrupt in its generator would leave the nursery half open.

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> trio.Nursery:
        self._manager = trio.open_nursery()
        return await self._manager.__aenter__()

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            return bool(await self._manager.__aexit__(exc_type, exc, traceback))  # noqa: ASYNC102  (it is the nursery that waits)
        except BaseExceptionGroup as group:
            raise_single(group, trio.Cancelled)
        finally:
            del self._manager, exc, traceback


def raise_single(group: BaseExceptionGroup[BaseException], cancelled: type[BaseException]) -> NoReturn:
    """Raise the single exception in `group`, or `group` if there are several; call it in the `except` block of `group`.

    Cancellations beside another exception are dropped: it replaces them, as an exception raised in a `finally` block
    does. The exception keeps its traceback, its cause and its context.
    """
    # A plain `raise` would make `group` the context of the exception that it holds: a reference cycle.
    others = [each for each in group.exceptions if not is_cancellation(each, cancelled)]
    try:
        reraise(group if len(others) > 1 else (others or group.exceptions)[0])
    finally:
        del group, others


def reraise(error: BaseException) -> NoReturn:
    """Raise `error` with its own context, also in the `except` block of another exception."""
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context
        del error, context  # the traceback refers to this frame


def raise_cancellation(group: BaseExceptionGroup[BaseException], cancelled: type[BaseException]) -> NoReturn:
    """Raise one of the cancellations in `group`, alone; call it in the `except` block of `group`."""
    cancellation, _ = split_cancelled(group, cancelled)
    try:
        reraise(cancellation or group)
    finally:
        del group, cancellation, _


def is_cancellation(error: BaseException, cancelled: type[BaseException]) -> bool:
    """Whether `error` is a cancellation, or a group of cancellations only."""
    return holds_only(error, (cancelled,))


def split_cancelled(
    error: BaseException, cancelled: type[BaseException]
) -> tuple[BaseException | None, BaseException | None]:
    """Split `error` into a cancellation (one, if it is a group of several) and everything else."""
    if not isinstance(error, BaseExceptionGroup):
        return (error, None) if isinstance(error, cancelled) else (None, error)
    found: BaseException | None
    found, others = error.split(cancelled)
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found, others


def split_own(error: BaseException | None) -> tuple[BaseException | None, BaseException | None]:
    """What of `error` the code raised itself, and what came from outside: cancellations and Ctrl-C."""
    if isinstance(error, BaseExceptionGroup):
        outer, own = error.split((trio.Cancelled, KeyboardInterrupt))
        return own, outer
    if isinstance(error, trio.Cancelled | KeyboardInterrupt):
        return None, error
    return error, None


def holds_cancellation(error: BaseException) -> bool:
    """Whether `error` is a cancellation, or a group with one in it."""
    if isinstance(error, BaseExceptionGroup):
        return error.subgroup(trio.Cancelled) is not None
    return isinstance(error, trio.Cancelled)


def holds_only(error: BaseException, classes: tuple[type[BaseException], ...]) -> bool:
    """Whether `error` is of one of these classes, or a group of such exceptions only."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(classes)[1] is None
    return isinstance(error, classes)


@contextmanager
def without(unwanted: type[BaseException]) -> Iterator[None]:
    """Remove exceptions of this class from a group that the block raises; nothing is raised if no other is in it."""
    try:
        yield
    except BaseExceptionGroup as group:
        _, others = group.split(unwanted)
        if others is not None:
            raise others from None
