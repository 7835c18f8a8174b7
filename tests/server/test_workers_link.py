"""A worker's link with its parent: what it is told, what it says, and which signals it minds."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager
from signal import SIGINT, SIGTERM
from typing import TYPE_CHECKING

import pytest
import trio

from penstock.server.serve import Shutdown
from penstock.server.workers import LineChannel, ParentLink
from tests.support.puppets import settle, signal_here
from tests.support.serving import GUARD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


class Told(Shutdown):
    """A shutdown that remembers what it is told."""

    def __init__(self) -> None:
        super().__init__()
        self._words, self._heard = trio.open_memory_channel[str](100)

    def drain(self) -> None:
        self._words.send_nowait("drain")

    def leave(self) -> None:
        self._words.send_nowait("leave")

    def hurry(self) -> None:
        self._words.send_nowait("hurry")

    async def next(self) -> str:
        return await self._heard.receive()


class Linked:
    """A worker's link in this process, and its parent's end."""

    def __init__(self, link: ParentLink, words: LineChannel) -> None:
        self.link = link
        self.words = words
        self.told = Told()


@contextmanager
def signals_kept() -> Iterator[None]:
    """What is blocked, and what is done with signals, are the same afterwards."""
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    handlers = {number: signal.getsignal(number) for number in (SIGTERM, SIGINT)}
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for number, handler in handlers.items():
            signal.signal(number, handler)


@asynccontextmanager
async def linked() -> AsyncIterator[Linked]:
    here, there = socket.socketpair()
    ours = Linked(ParentLink(7, there.detach()), LineChannel(here))
    with signals_kept(), trio.fail_after(GUARD):
        ours.link.keep_signals()
        async with trio.open_nursery() as nursery:
            await nursery.start(ours.link.obey, ours.told)
            yield ours
            nursery.cancel_scope.cancel(reason="the test is over")
    await ours.words.aclose()
    ours.link._sock.close()


async def test_a_worker_does_what_its_parent_says_and_drains_when_that_is_gone() -> None:
    async with linked() as ours:
        for word in ("drain", "hurry", "leave", "hurry"):
            await ours.words.send(word)
            assert await ours.told.next() == word
        await ours.words.aclose()
        assert await ours.told.next() == "drain"


async def test_a_worker_says_that_it_is_ready_and_with_a_parent_gone_says_it_to_nobody() -> None:
    async with linked() as ours:
        await ours.link.ready('["news"]')
        assert await ours.words.receive() == 'ready ["news"]'
        await ours.words.aclose()
        assert await ours.told.next() == "drain"
        await ours.link.ready("more")
        await ours.link.ready("more")


async def test_of_signals_a_worker_takes_the_first_sigterm_and_nothing_else() -> None:
    async with linked() as ours:
        signal_here(SIGINT)
        await settle()
        await ours.words.send("hurry")
        assert await ours.told.next() == "hurry"
        signal_here(SIGTERM)
        assert await ours.told.next() == "drain"
        assert await ours.words.receive() == "leaving"
        for number in (SIGTERM, SIGINT, SIGTERM):
            signal_here(number)
            await settle()
        await ours.words.send("leave")
        assert await ours.told.next() == "leave"
        await ours.link.ready("later")
        assert await ours.words.receive() == "ready later"


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
async def test_signals_hurry_a_worker_whose_parent_is_gone(number: signal.Signals) -> None:
    async with linked() as ours:
        await ours.words.aclose()
        assert await ours.told.next() == "drain"
        for _ in range(3):
            signal_here(number)
            assert await ours.told.next() == "hurry"


EARLY = """
import signal, socket, sys
from penstock.server.workers import Link
link = Link(1, int(sys.argv[1]))
link.keep_signals()
assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
link._sock.send(b"importing\\n")
while True:
    signal.pause()
"""


def test_before_a_worker_listens_sigterm_ends_it_with_a_word_and_sigint_does_nothing() -> None:
    here, there = socket.socketpair()
    with here, there, here.makefile() as words:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [SIGTERM, SIGINT])
        try:
            worker = subprocess.Popen([sys.executable, "-c", EARLY, str(there.fileno())], pass_fds=[there.fileno()])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        there.close()
        assert words.readline() == "importing\n"
        for number in (SIGINT, SIGINT, SIGTERM):
            worker.send_signal(number)
        assert words.readline() == "leaving\n"
        assert worker.wait(GUARD) == 0


async def test_a_workers_connection_with_its_parent_is_not_handed_on_to_what_it_starts() -> None:
    async with linked() as ours:
        assert not ours.link._sock.get_inheritable()
