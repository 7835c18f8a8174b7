"""Producers that end in every way there is, and misbehave in most. Each takes a witness, and begins with FIRST."""

# They are made to do what flake8-async warns of.
# flake8: noqa: ASYNC102, ASYNC103, ASYNC104, ASYNC119

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import trio

from penstock.errors import PublicError, RunCancelled
from penstock.sse import Event
from tests.support.supervising import FIRST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

    from tests.support.supervising import Witness


async def waits(witness: Witness) -> AsyncIterator[Event]:
    async for event in witness.waits():
        yield event


def yields(*chunks: Any) -> Callable[[Witness], AsyncIterator[Any]]:
    async def producer(witness: Witness) -> AsyncIterator[Any]:
        yield FIRST
        with witness.watching():
            for chunk in chunks:
                yield chunk

    return producer


def raises(error: BaseException) -> Callable[[Witness], AsyncIterator[Event]]:
    async def producer(witness: Witness) -> AsyncIterator[Event]:
        yield FIRST
        with witness.watching():
            raise error

    return producer


async def raises_in_a_nursery_while_cancelled(witness: Witness) -> AsyncIterator[Event]:
    yield FIRST
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_raises_when_cancelled)
        with witness.watching():
            await trio.sleep_forever()


async def _raises_when_cancelled() -> None:
    try:
        await trio.sleep_forever()
    finally:
        raise PublicError("cleanup failed", "CLEANUP")


async def cleanup_raises(witness: Witness) -> AsyncIterator[Event]:
    yield FIRST
    try:
        with witness.watching():
            await trio.sleep_forever()
    finally:
        raise OSError("the disk is full")


async def swallows_and_goes_on(witness: Witness) -> AsyncIterator[Event]:
    yield FIRST
    while True:
        try:
            with witness.watching():
                await trio.sleep_forever()
        except trio.Cancelled:
            yield Event(data="stale")


async def swallows_and_returns(witness: Witness) -> AsyncIterator[Event]:
    yield FIRST
    with trio.CancelScope() as scope:
        try:
            with witness.watching():
                await trio.sleep_forever()
        finally:
            scope.cancel()
    yield Event(data="stale")


async def makes_an_error_of_it(witness: Witness) -> AsyncIterator[Event]:
    yield FIRST
    try:
        with witness.watching():
            await trio.sleep_forever()
    except trio.Cancelled:
        raise RunCancelled(None, "not these words") from None


async def hangs_after_done(witness: Witness) -> AsyncIterator[Event]:
    yield FIRST
    try:
        yield Event(data="[DONE]")
    finally:
        with witness.watching():
            await trio.sleep_forever()


async def hangs_after_what_is_no_chunk(witness: Witness) -> AsyncIterator[Any]:
    yield FIRST
    try:
        yield 5
    finally:
        with witness.watching():
            await trio.sleep_forever()


async def refuses_to_close(witness: Witness) -> AsyncIterator[Event]:
    yield FIRST
    try:
        yield Event(data="[DONE]")
    finally:
        witness.left = True
        yield Event(data="stale")
