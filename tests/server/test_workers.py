"""The workers' manager, with puppets for workers, and a worker's link with its parent; both in this process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from contextlib import asynccontextmanager, contextmanager
from signal import SIGINT, SIGTERM
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock

from penstock.server.serve import Shutdown
from penstock.server.workers import (
    DEATHS,
    DEATHS_WITHIN,
    ENDS_WITHIN,
    GROUP_SIGNAL,
    LONGEST_PAUSE,
    UNREACHABLE,
    LineChannel,
    ParentLink,
)
from tests.support.puppets import Family, Puppet, family, settle, signal_here, until
from tests.support.serving import GUARD

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator


@pytest.fixture
def clock() -> MockClock:
    return MockClock()


# The beginning


async def test_the_first_worker_starts_alone_and_all_are_announced_once_with_its_details(clock: MockClock) -> None:
    async with family(3) as ours:
        first = await ours.next()
        await settle()
        assert ours.spawned == [1]
        await first.is_ready("[1]")
        others = [await ours.next() for _ in range(2)]
        assert sorted(ours.spawned) == [1, 2, 3]
        await others[0].is_ready("[2]")
        await settle()
        assert ours.announced == []
        await others[1].is_ready("[3]")
        await until(lambda: bool(ours.announced))
        await first.is_ready("[4]")
        await others[0].ends(1)
        await until(lambda: bool(ours.said))
        clock.jump(1)
        await (await ours.next()).is_ready("[5]")
        await settle()
        assert ours.announced == ["[1]"]


async def test_messages_may_come_in_pieces_and_unknown_ones_are_ignored(clock: MockClock) -> None:
    async with family(1) as ours:
        puppet = await ours.next()
        await puppet.does("say what\\n\\nreadyish\\nrea")
        await settle()
        await puppet.does("say dy in two pie")
        await settle()
        assert ours.announced == []
        await puppet.does("say ces\\nand")
        await until(lambda: bool(ours.announced))
        assert ours.announced == ["in two pieces"]


async def test_details_may_be_long(clock: MockClock) -> None:
    async with family(1) as ours:
        await (await ours.next()).does("repeat 300000 x")
        await until(lambda: bool(ours.announced))
        assert ours.announced == ["x" * 300_000]


@pytest.mark.parametrize("code, becomes", [(0, 1), (2, 2), (UNREACHABLE, 1)])
async def test_the_servers_code_is_that_of_a_first_worker_that_fails(clock: MockClock, code: int, becomes: int) -> None:
    async with family(3) as ours:
        first = await ours.next()
        await first.ends(code)
        assert await ours.end() == becomes
        assert ours.said == [f"worker 1 (process {first.pid}) ended with code {code} before it was ready; not started"]
        assert ours.spawned == [1]
        assert ours.announced == []
        assert ours.sockets[0].fileno() == -1


async def test_a_first_worker_that_is_killed_while_it_starts_is_no_reason_to_start_another(clock: MockClock) -> None:
    async with family(2) as ours:
        first = await ours.next()
        os.kill(first.pid, signal.SIGKILL)
        assert await ours.end() == 1
        assert ours.said == [f"worker 1 (process {first.pid}) was ended by signal 9 before it was ready; not started"]


async def test_a_command_that_cannot_be_started_is_reported_and_counts_as_a_death(clock: MockClock) -> None:
    async with family(2, max_deaths=2, missing=frozenset({2})) as ours:
        await (await ours.next()).is_ready()
        await until(lambda: len(ours.said) == 1)
        assert ours.said[0].startswith("worker 2 cannot be started: [Errno 2]")
        assert ours.said[0].endswith("another one takes its place in 0.1 s")
        clock.jump(0.1)
        await until(lambda: len(ours.said) == 2)
        assert ours.said[1].endswith("2 workers have died within 30 s, and the server ends")
    async with family(2, missing=frozenset({1})) as ours:
        assert await ours.end() == 1
        assert ours.spawned == [1]


async def test_signals_are_blocked_in_a_worker_that_begins_and_as_before_in_the_parent(clock: MockClock) -> None:
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [])
    async with family(2) as ours:
        puppets = await ours.ready(2)
        assert [puppet.blocked for puppet in puppets] == [True, True]
        assert signal.pthread_sigmask(signal.SIG_BLOCK, []) == before


# Deaths


async def die(ours: Family, puppet: Puppet, code: int = 1) -> str:
    said = len(ours.said)
    await puppet.ends(code)
    await until(lambda: len(ours.said) > said)
    who = f"worker {puppet.number} (process {puppet.pid}) ended with code {code}; "
    assert ours.said[-1].startswith(who)
    return ours.said[-1].removeprefix(who)


async def test_each_death_makes_the_next_pause_longer_up_to_a_limit(clock: MockClock) -> None:
    async with family(1, max_deaths=100) as ours:
        (puppet,) = await ours.ready(1)
        for pause in (0.1, 0.2, 0.4, 0.8, LONGEST_PAUSE, LONGEST_PAUSE):
            assert await die(ours, puppet) == f"another one takes its place in {pause:g} s"
            begun = len(ours.spawned)
            clock.jump(pause * 0.99)
            await settle()
            assert len(ours.spawned) == begun
            clock.jump(pause * 0.02)
            puppet = await ours.next()
            await puppet.is_ready()


@pytest.mark.parametrize("most", [1, DEATHS])
async def test_so_many_deaths_end_the_server_and_one_fewer_does_not(clock: MockClock, most: int) -> None:
    async with family(2, max_deaths=most) as ours:
        puppet, other = await ours.ready(2)
        for _ in range(most - 1):
            assert "another one takes its place" in await die(ours, puppet)
            clock.jump(LONGEST_PAUSE)
            puppet = await ours.next()
        assert await die(ours, puppet) == f"{most} workers have died within 30 s, and the server ends"
        assert await other.hears() == "drain"
        assert ours.sockets[0].fileno() == -1
        await other.ends()
        assert await ours.end() == 1


async def test_the_deaths_of_all_workers_count_together_and_old_ones_do_not(clock: MockClock) -> None:
    async with family(2, max_deaths=2) as ours:
        one, two = await ours.ready(2)
        assert "in 0.1 s" in await die(ours, one)
        clock.jump(DEATHS_WITHIN + 0.5)
        one = await ours.next()
        assert ours.parent.recent_deaths == 0
        assert "in 0.1 s" in await die(ours, two)
        clock.jump(DEATHS_WITHIN - 0.5)
        assert ours.parent.recent_deaths == 1
        await ours.next()
        assert "2 workers have died" in await die(ours, one)


async def test_a_worker_that_ends_without_a_signal_has_died_whatever_its_code(clock: MockClock) -> None:
    async with family(1, max_deaths=3) as ours:
        (puppet,) = await ours.ready(1)
        clock.rate = 1.0
        assert "in 0.1 s" in await die(ours, puppet, 0)
        puppet = await ours.next()
        await puppet.does("say leaving\\n")
        await settle()
        assert "in 0.2 s" in await die(ours, puppet, 3)


async def test_a_worker_that_cannot_reach_the_event_log_is_replaced_and_has_not_died(clock: MockClock) -> None:
    async with family(2, max_deaths=1) as ours:
        puppet, other = await ours.ready(2)
        for times in range(1, 4):
            await puppet.ends(UNREACHABLE)
            await until(lambda: len(ours.said) == times)  # noqa: B023
            assert ours.said[-1].endswith("has not found the event log; another one tries in 1 s")
            clock.jump(LONGEST_PAUSE * 0.99)
            await settle()
            assert len(ours.spawned) == times + 1
            clock.jump(LONGEST_PAUSE * 0.02)
            puppet = await ours.next()
        assert ours.parent.recent_deaths == 0
        assert "1 workers have died" in await die(ours, puppet)
        assert await other.hears() == "drain"  # and nothing before that


async def test_a_worker_that_is_done_and_does_not_end_is_killed_and_replaced(clock: MockClock) -> None:
    async with family(2) as ours:
        (puppet, _) = await ours.ready(2)
        await puppet.does("close")
        await settle()
        clock.jump(ENDS_WITHIN * 0.99)
        await settle()
        assert ours.said == []
        clock.jump(ENDS_WITHIN * 0.02)
        assert await puppet.hears() == "gone"
        await until(lambda: len(ours.said) == 2)
        assert ours.said[0].startswith(f"process {puppet.pid} is done, and does not end")
        assert ours.said[1].startswith(f"worker 1 (process {puppet.pid}) was ended by signal 9; another one takes its")
        clock.jump(LONGEST_PAUSE)
        assert (await ours.next()).number == 1


# Leaving


async def test_a_worker_that_leaves_is_to_accept_no_more_and_is_replaced_at_once(clock: MockClock) -> None:
    async with family(2, max_deaths=1) as ours:
        puppet, other = await ours.ready(2)
        for _ in range(3):
            await puppet.does("say leaving\\n")
            await settle()
            clock.jump(GROUP_SIGNAL)
            assert await puppet.hears() == "leave"
            await puppet.ends()
            before = puppet
            puppet = await ours.next()
            assert ours.said[-1] == f"worker 1 (process {before.pid}) has left; another one takes its place"
        signal_here()
        assert await other.hears() == "drain"  # and nothing before that


async def test_a_worker_that_leaves_with_all_others_only_drains(clock: MockClock) -> None:
    async with family(1) as ours:
        (puppet,) = await ours.ready(1)
        await puppet.does("say leaving\\n")
        await settle()
        clock.jump(GROUP_SIGNAL * 0.9)
        signal_here(SIGINT)
        assert await puppet.hears() == "drain"
        clock.jump(GROUP_SIGNAL)
        await settle()
        signal_here(SIGINT)
        assert await puppet.hears() == "hurry"


async def test_a_worker_that_ends_with_its_message_unread_has_still_left(clock: MockClock) -> None:
    async with family(1, max_deaths=1) as ours:
        (puppet,) = await ours.ready(1)
        clock.rate = 1.0
        await puppet.does("say leaving\\n")
        await puppet.ends()
        assert (await ours.next()).number == 1
        assert ours.said == [f"worker 1 (process {puppet.pid}) has left; another one takes its place"]


# The end


async def test_signals_drain_then_hurry_twice_then_kill(clock: MockClock) -> None:
    async with family(2) as ours:
        puppets = await ours.ready(2)
        for number, word in ((SIGINT, "drain"), (SIGTERM, "hurry"), (SIGTERM, "hurry"), (SIGINT, "gone")):
            signal_here(number)
            assert [await puppet.hears() for puppet in puppets] == [word] * 2
        assert await ours.end() == 1
        assert sorted(ours.said) == [
            f"worker {each.number} (process {each.pid}) was ended by signal 9" for each in puppets
        ]


@pytest.mark.parametrize("codes, becomes", [((0, 0), 0), ((0, 9), 1), ((3, 0), 3), ((1, 3), 3)])
async def test_the_servers_code_is_that_of_its_workers(clock: MockClock, codes: tuple[int, int], becomes: int) -> None:
    async with family(2) as ours:
        puppets = await ours.ready(2)
        signal_here()
        for puppet, code in zip(puppets, codes, strict=True):
            assert await puppet.hears() == "drain"
            await puppet.ends(code)
        assert await ours.end() == becomes
        told = {
            f"worker {each.number} (process {each.pid}) ended with code {code}"
            for each, code in zip(puppets, codes, strict=True)
            if code
        }
        assert set(ours.said) == told


async def test_no_worker_is_started_when_all_are_to_end(clock: MockClock) -> None:
    async with family(2) as ours:
        one, two = await ours.ready(2)
        await die(ours, one)
        signal_here()
        assert await two.hears() == "drain"
        await two.ends()
        assert await ours.end() == 0
        assert ours.spawned == [1, 2]


async def test_a_signal_before_the_first_is_ready_drains_it_and_starts_no_other(clock: MockClock) -> None:
    async with family(3) as ours:
        first = await ours.next()
        signal_here()
        assert await first.hears() == "drain"
        await first.is_ready()
        await first.ends()
        assert await ours.end() == 0
        assert (ours.spawned, ours.announced, ours.said) == ([1], [], [])


async def test_the_second_signal_ends_a_worker_that_is_not_ready_and_no_other(clock: MockClock) -> None:
    async with family(2) as ours:
        one = await ours.next()
        await one.is_ready()
        two = await ours.next()
        for puppet in (one, two):
            await puppet.does("unblock")
            assert await puppet.hears() == "unblocked"
        for word in ("drain", "hurry"):
            signal_here()
            assert await one.hears() == word
        while await two.hears() != "gone":
            pass
        await one.ends()
        assert await ours.end() == 1
        assert ours.said == [f"worker 2 (process {two.pid}) was ended by signal 15"]


# A worker's link


class RecordedShutdown(Shutdown):
    def __init__(self) -> None:
        super().__init__()
        self._steps, self._recorded = trio.open_memory_channel[str](100)

    def drain(self) -> None:
        self._steps.send_nowait("drain")

    def stop_accepting(self) -> None:
        self._steps.send_nowait("stop accepting")

    def force(self) -> None:
        self._steps.send_nowait("force")

    async def next(self) -> str:
        return await self._recorded.receive()


class Linked:
    def __init__(self, link: ParentLink, parent: LineChannel) -> None:
        self.link = link
        self.parent = parent
        self.shutdown = RecordedShutdown()


@contextmanager
def signals_kept() -> Iterator[None]:
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
            await nursery.start(ours.link.obey, ours.shutdown)
            yield ours
            nursery.cancel_scope.cancel(reason="the test is over")
    await ours.parent.aclose()
    ours.link._sock.close()


async def test_a_worker_follows_its_parents_messages_and_drains_when_the_parent_is_gone() -> None:
    async with linked() as ours:
        asked_for = {"drain": "drain", "hurry": "force", "leave": "stop accepting"}
        for message, step in asked_for.items():
            await ours.parent.send(message)
            assert await ours.shutdown.next() == step
        await ours.parent.aclose()
        assert await ours.shutdown.next() == "drain"


async def test_a_worker_reports_that_it_is_ready_and_reports_to_no_parent_that_is_gone() -> None:
    async with linked() as ours:
        await ours.link.ready('["news"]')
        assert await ours.parent.receive() == 'ready ["news"]'
        await ours.parent.aclose()
        assert await ours.shutdown.next() == "drain"
        await ours.link.ready("more")
        await ours.link.ready("more")


async def test_of_signals_a_worker_takes_the_first_sigterm_and_nothing_else() -> None:
    async with linked() as ours:
        signal_here(SIGINT)
        await settle()
        await ours.parent.send("hurry")
        assert await ours.shutdown.next() == "force"
        signal_here(SIGTERM)
        assert await ours.shutdown.next() == "drain"
        assert await ours.parent.receive() == "leaving"
        for number in (SIGTERM, SIGINT, SIGTERM):
            signal_here(number)
            await settle()
        await ours.parent.send("leave")
        assert await ours.shutdown.next() == "stop accepting"
        await ours.link.ready("later")
        assert await ours.parent.receive() == "ready later"


@pytest.mark.parametrize("number", [SIGTERM, SIGINT])
async def test_signals_hurry_a_worker_whose_parent_is_gone(number: signal.Signals) -> None:
    async with linked() as ours:
        await ours.parent.aclose()
        assert await ours.shutdown.next() == "drain"
        for _ in range(3):
            signal_here(number)
            assert await ours.shutdown.next() == "force"


EARLY = """
import signal, socket, sys
from penstock.server.workers import ParentLink
link = ParentLink(1, int(sys.argv[1]))
link.keep_signals()
assert not signal.pthread_sigmask(signal.SIG_BLOCK, [])
link._sock.send(b"importing\\n")
while True:
    signal.pause()
"""


def test_before_a_worker_reads_messages_sigterm_ends_it_and_sigint_does_nothing() -> None:
    here, there = socket.socketpair()
    with here, there, here.makefile() as lines:
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [SIGTERM, SIGINT])
        try:
            worker = subprocess.Popen([sys.executable, "-c", EARLY, str(there.fileno())], pass_fds=[there.fileno()])
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        there.close()
        assert lines.readline() == "importing\n"
        for number in (SIGINT, SIGINT, SIGTERM):
            worker.send_signal(number)
        assert lines.readline() == "leaving\n"
        assert worker.wait(GUARD) == 0


async def test_a_workers_link_is_not_inherited_by_what_it_starts() -> None:
    async with linked() as ours:
        assert not ours.link._sock.get_inheritable()
