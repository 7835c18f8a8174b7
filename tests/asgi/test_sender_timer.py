"""The timer of a response: by a reader's clock it sends what a task that sleeps would send, and leaves no alarm."""

from __future__ import annotations

import gc
import heapq
import weakref
from contextlib import asynccontextmanager, nullcontext
from contextvars import ContextVar
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from trio.testing import wait_all_tasks_blocked

from penstock import Event, MemoryLog, open_supervisor
from penstock.asgi.errors import RETRY
from penstock.asgi.sender import BURST, MAX_SEND
from penstock.errors import CursorExpired, LogUnavailable, RunNotFound
from penstock.supervisor.timers import SWEEP_AT_LEAST, Timers
from tests.support.asgi import PING, Client, Errors, Follower, OneAtATime

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from trio.testing import MockClock


ONE: Final = b"id: 1\ndata: a\n\n"
TWO: Final = b"id: 2\ndata: b\n\n"
LARGE: Final = b"id: 2\ndata: " + b"x" * 3 * MAX_SEND + b"\n\n"
INTERVAL: Final = 15.0


@asynccontextmanager
async def running() -> AsyncIterator[Timers]:
    timers = Timers()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(timers.run)
        yield timers
        nursery.cancel_scope.cancel()


class Clocked(Follower):
    """A reader with a clock. A step that can be called is called, and the next follows without a checkpoint."""

    def __init__(self, clock: Timers | None, *steps: Any, **options: Any) -> None:
        super().__init__(*steps, **options)
        self.clock = clock

    async def next_body(self, limit: int) -> bytes:
        while self.steps and not isinstance(self.steps[0], bytes | Exception):
            step = self.steps.pop(0)
            await trio.sleep(step) if isinstance(step, int | float) else step()
        if self.steps and isinstance(self.steps[0], bytes):
            return bytes(self.steps.pop(0))
        return await super().next_body(limit)


def waiting(timers: Timers) -> list[Any]:
    """The callbacks that are still to come."""
    return [timer.callback for timer in timers._heap if timer.callback is not None]


SCRIPTS: Final[dict[str, tuple[float, list[Any]]]] = {
    "silence": (0.0, [100]),
    "now and then": (0.0, [20, ONE, 7, TWO, 10, ONE, 40, TWO, 1, ONE]),
    "headers and events slower than pings": (40.0, [5, ONE, TWO, 61, ONE]),
    "at full speed, then silence": (0.0, [*[ONE] * (3 * BURST), 50, *[TWO] * BURST, 20]),
    "slow sends, and large": (1.0, [17, LARGE, 40]),
}


async def seen(clock: Timers | None, slow: float, steps: list[Any]) -> tuple[list[float], list[bytes]]:
    """When a client is sent something after its request, and what."""
    client, began = OneAtATime(), trio.current_time()
    client.slow = slow
    await client.get(Clocked(clock, *steps), ping_interval=INTERVAL)
    assert client.complete
    sent = zip(client.times, client.sent, strict=True)
    passed_on = [(time - began, message["body"]) for time, message in sent if message.get("body")]
    return [time for time, _ in passed_on], [body for _, body in passed_on]


@pytest.mark.parametrize("slow, steps", SCRIPTS.values(), ids=SCRIPTS)
async def test_pings_come_at_the_same_times_with_a_clock_as_from_a_task(
    autojump_clock: MockClock, slow: float, steps: list[Any]
) -> None:
    async with running() as timers:
        times, bodies = await seen(timers, slow, steps)
        assert PING in bodies
        expected, same = await seen(None, slow, steps)
        assert bodies == same
        assert times == pytest.approx(expected)


@pytest.mark.parametrize("clocked", [True, False])
async def test_a_ping_follows_each_interval_of_silence(autojump_clock: MockClock, clocked: bool) -> None:
    async with running() as timers:
        times, bodies = await seen(timers if clocked else None, 0, [20, ONE, 31])
    assert times == pytest.approx([15, 21, 36, 51])
    assert bodies == [PING, ONE, PING, PING]


async def test_a_reader_with_a_clock_is_two_tasks(autojump_clock: MockClock) -> None:
    async with running() as timers, trio.open_nursery() as nursery:
        for clock, tasks in ((timers, 2), (None, 3)):
            before = trio.lowlevel.current_statistics().tasks_living
            nursery.start_soon(partial(Client().get, Clocked(clock, inf), ping_interval=INTERVAL))
            await trio.sleep(100)  # some pings later, too
            assert trio.lowlevel.current_statistics().tasks_living - before == tasks
        nursery.cancel_scope.cancel()


class Hand(Timers):
    """A clock that strikes when the test says so."""

    def strike(self) -> None:
        """Whatever is set for now rings."""
        while self._heap and self._heap[0].when <= trio.current_time():
            self._fire(heapq.heappop(self._heap))


class AtOnce(Client):
    """A server that never waits when it sends, as ours does nearly always, and has a bug of its own."""

    async def send(self, message: Any) -> None:
        assert not self.complete, f"{message} after the last message"
        if message.get("body") == TWO and self.send_raises is not None:
            raise self.send_raises
        self.sent.append(message)


class Slow(Client):
    """A server that takes its time, and no message before it is done with the one before."""

    busy = False

    async def send(self, message: Any) -> None:
        assert not self.busy, f"{message['type']} overtook another"
        self.slow, self.busy = 1.0, True
        try:
            await super().send(message)
        finally:
            self.busy = False


@pytest.mark.parametrize("kind", [AtOnce, Slow])
@pytest.mark.parametrize("step", [TWO, LARGE, b"", LogUnavailable(), ValueError("a bug")], ids=[*"abcde"])
async def test_an_alarm_that_rings_in_the_step_in_which_a_response_goes_on_or_ends_gets_in_nobodys_way(
    autojump_clock: MockClock, step: Any, kind: type[Client]
) -> None:
    hand, client = Hand(), kind()
    await client.get(Clocked(hand, ONE, INTERVAL, hand.strike, step), ping_interval=INTERVAL, observer=Errors())
    assert (client.complete, client.body) == (True, ONE + (step if isinstance(step, bytes) else RETRY))
    assert not waiting(hand)


@pytest.mark.parametrize("kind", [AtOnce, Slow])
@pytest.mark.parametrize("first", ["it rings", "it is cancelled"])
async def test_an_alarm_that_rings_in_the_step_in_which_a_response_is_cancelled_gets_in_nobodys_way(
    autojump_clock: MockClock, first: str, kind: type[Client]
) -> None:
    hand, client = Hand(), kind()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(client.get, Clocked(hand, ONE, inf), ping_interval=INTERVAL))
        await trio.sleep(2 + INTERVAL)
        if first == "it rings":
            hand.strike()
        nursery.cancel_scope.cancel()
        hand.strike()
    words = RETRY if kind is AtOnce else b""  # FINAL_SEND_TIMEOUT is less than it takes
    assert client.body in {ONE + words, ONE + PING + words}
    assert client.complete == (kind is AtOnce)
    assert not waiting(hand)


@pytest.mark.parametrize("kind", [AtOnce, Slow])
async def test_an_alarm_that_rings_in_the_step_in_which_a_client_is_lost_sends_it_nothing(
    autojump_clock: MockClock, kind: type[Client]
) -> None:
    hand, client = Hand(), kind()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(client.get, Clocked(hand, ONE, inf), ping_interval=INTERVAL))
        await trio.sleep(2 + INTERVAL)

        async def strike(where: str) -> None:
            if where == "received":  # the listener is about to hear of it, and then all is cancelled
                hand.strike()

        client.point = strike
        client.leave()
    assert (client.body, client.late) == (ONE, [])
    assert not waiting(hand)


ENDS: Final[dict[str, list[Any]]] = {
    "its end": [b""],
    "a bug": [ValueError("a bug")],
    "cancelled": [inf],
    "the client leaves": [inf],
}


@pytest.mark.parametrize("before", [[], [ONE], [ONE, 50.0]], ids=["at once", "after an event", "after pings"])
@pytest.mark.parametrize("how", ENDS)
async def test_however_a_response_ends_its_alarm_is_over(
    autojump_clock: MockClock, how: str, before: list[Any]
) -> None:
    async with running() as timers:
        client = Client()
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                call = partial(client.get, ping_interval=INTERVAL, observer=Errors())
                nursery.start_soon(call, Clocked(timers, *before, *ENDS[how]))
                await trio.sleep(62)
                if how == "cancelled":
                    assert len(waiting(timers)) == 1
                    scope.cancel()
                client.leave()
        assert client.complete == (how != "the client leaves")
        assert waiting(timers) == []


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    "entering, status",
    [(None, 204), (RunNotFound("run-1"), 404), (CursorExpired("run-1", 5, 100), 410), (LogUnavailable(), 503)],
)
async def test_an_answer_that_is_no_stream_leaves_no_alarm(
    autojump_clock: MockClock, method: str, entering: Exception | None, status: int
) -> None:
    async with running() as timers:
        client = await Client(method).get(Clocked(timers, at_end=True, entering=entering), ping_interval=0.3)
        assert (client.status, client.complete) == (status, True)
        assert waiting(timers) == []


@pytest.mark.parametrize("error", [OSError("gone"), ValueError("a bug of the server")], ids=repr)
@pytest.mark.parametrize("where", ["headers", "event", "ping"])
async def test_a_send_that_fails_leaves_no_alarm(autojump_clock: MockClock, where: str, error: Exception) -> None:
    async with running() as timers:
        client = Client()

        async def fail(point: str) -> None:
            if point == "send" and len(client.sent) == {"headers": 0, "event": 2, "ping": 3}[where]:
                client.send_raises = error

        client.point = fail
        with nullcontext() if isinstance(error, OSError) else pytest.raises(ValueError, match="a bug of the server"):
            await client.get(Clocked(timers, ONE, inf), ping_interval=INTERVAL)
        assert client.send_raises is error
        assert waiting(timers) == []


async def test_an_alarm_that_rings_in_the_step_in_which_a_send_fails_is_the_last(autojump_clock: MockClock) -> None:
    hand, client = Hand(), AtOnce()
    client.send_raises = ValueError("a bug of the server")
    with pytest.raises(ValueError, match="a bug of the server"):
        await client.get(Clocked(hand, ONE, INTERVAL, hand.strike, TWO), ping_interval=INTERVAL)
    assert not waiting(hand)


async def test_of_two_hundred_responses_nothing_is_left_on_the_clock(autojump_clock: MockClock) -> None:
    async with running() as timers:
        known: list[weakref.ref[Client]] = []

        def one_more() -> Client:
            client = Client()
            known.append(weakref.ref(client))
            return client

        for interval in range(10, 10_000, 2500):
            async with trio.open_nursery() as nursery:
                for each in range(50):
                    follower = Clocked(timers, ONE, 10.0 * (each % 5), TWO)
                    nursery.start_soon(partial(one_more().get, follower, ping_interval=interval))
        assert waiting(timers) == []
        assert len(timers._heap) <= SWEEP_AT_LEAST
        gc.collect()
        assert not [each for each in known if each() is not None]


async def test_when_a_supervisor_is_closed_its_clock_has_nothing_left_and_late_readers_are_served_without_it(
    autojump_clock: MockClock,
) -> None:
    async def producer() -> AsyncIterator[Event]:
        yield Event(data="a")
        await trio.sleep_forever()

    client = Client()
    async with trio.open_nursery() as nursery:
        async with open_supervisor(MemoryLog(), drain_timeout=0) as supervisor:
            run = await supervisor.start(producer)
            follower = supervisor.follow(run.id)
            nursery.start_soon(partial(client.get, follower, ping_interval=INTERVAL))
            await trio.sleep(40)
        timers = supervisor._timers
        await wait_all_tasks_blocked()
        assert client.body.startswith(ONE + PING + PING)
        assert waiting(timers) == []
    late = await Client().get(supervisor.follow(run.id), ping_interval=INTERVAL)
    assert late.body == client.body.replace(PING, b"")
    assert waiting(timers) == []


request_of: ContextVar[str] = ContextVar("request_of")


class Noting(OneAtATime):
    """Notes for each body which request it was sent for, as a middleware may look it up."""

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[tuple[bytes, str]] = []

    async def send(self, message: Any) -> None:
        self.noted.append((message.get("body", b""), request_of.get()))
        await super().send(message)


async def test_a_ping_that_the_clock_calls_for_is_sent_with_the_variables_of_its_request(
    autojump_clock: MockClock,
) -> None:
    async with running() as timers:
        request_of.set("mine")
        client = Noting()
        await client.get(Clocked(timers, INTERVAL * 2.5, ONE), ping_interval=INTERVAL)
        assert {(body, name) for body, name in client.noted if body} == {(PING, "mine"), (ONE, "mine")}
