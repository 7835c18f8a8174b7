"""Exception groups: a nursery that raises its single exception bare, and what of an error is a cancellation.

A nursery raises an `ExceptionGroup` whatever happened in it. Where the nursery is a detail of how something is made, as
in `keepalive`, its caller should not have to know: an `except ValueError` around the block must catch the block's
`ValueError`. `open_nursery` takes off the nursery's own layer, and no other: a group that a body raised itself stays
one, and several exceptions stay together.

The functions take the class that the event loop cancels with, so that they serve anyio's task groups, too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NoReturn

import trio

if TYPE_CHECKING:
    from types import TracebackType


class open_nursery:  # noqa: N801  (used as trio.open_nursery is)
    """A nursery whose single exception leaves the block bare, as if there had been no nursery.

    Used as `trio.open_nursery`. Cancellations beside another exception are left aside; see `raise_single`.
    """

    # A class, not an @asynccontextmanager: Ctrl-C must not arrive in a generator between trio's two halves.

    @trio.lowlevel.enable_ki_protection
    async def __aenter__(self) -> trio.Nursery:
        self._manager = trio.open_nursery()
        return await self._manager.__aenter__()

    @trio.lowlevel.enable_ki_protection
    async def __aexit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        try:
            return bool(await self._manager.__aexit__(exc_type, exc, traceback))
        except BaseExceptionGroup as group:
            raise_single(group, trio.Cancelled)
        finally:
            del self._manager, exc, traceback


def raise_single(group: BaseExceptionGroup[BaseException], cancelled: type[BaseException]) -> NoReturn:
    """Raise the one exception in `group`; call it while `group` is being handled.

    Cancellations beside another exception are left aside: it takes their place, as an exception raised in a `finally`
    block does. The exception keeps its traceback, its cause and its context, and no reference cycle is made (a plain
    `raise` here would make `group`, which holds the exception, its context).

    Args:
        group: what a nursery raised.
        cancelled: the class that the event loop cancels with.
    """
    others = [each for each in group.exceptions if not is_cancellation(each, cancelled)]
    try:
        reraise(group if len(others) > 1 else (others or group.exceptions)[0])
    finally:
        del group, others


def reraise(error: BaseException) -> NoReturn:
    """Raise `error` with the context that it has, whatever is being handled at the moment."""
    context = error.__context__
    try:
        raise error
    finally:
        error.__context__ = context
        del error, context  # the traceback holds this frame


def raise_cancellation(group: BaseExceptionGroup[BaseException], cancelled: type[BaseException]) -> NoReturn:
    """Raise one of the cancellations in `group`, alone; call it while `group` is being handled."""
    cancellation, _ = split_cancelled(group, cancelled)
    try:
        reraise(cancellation or group)
    finally:
        del group, cancellation, _


def is_cancellation(error: BaseException, cancelled: type[BaseException]) -> bool:
    """Whether `error` is a cancellation, or a group of nothing else."""
    if isinstance(error, BaseExceptionGroup):
        return error.split(cancelled)[1] is None
    return isinstance(error, cancelled)


def split_cancelled(
    error: BaseException, cancelled: type[BaseException]
) -> tuple[BaseException | None, BaseException | None]:
    """What of `error` is a cancellation (one, if it is a group of several), and what is not."""
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
