"""The wake-ups through Redis: what is told, over which connection, and what is told after one has broken."""

from __future__ import annotations

import random
import sys
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING

import pytest
import trio
import trio.lowlevel
import trio.testing

from penstock.errors import LogUnavailable
from penstock.log import Notification, Notifications
from penstock.log.open import open_log
from penstock.log.redis.client import Subscription, open_client
from penstock.log.redis.notifications import CHANNELS_PER_COMMAND, RedisNotifications
from penstock.log.redis.schema import Keys
from tests.support.logs import COMPLETED, LEASE, batch, record
from tests.support.redis_runs import no_client_is_connected, until, until_it_is
from tests.support.redis_servers import Endpoint, redis_server

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Sequence

    from penstock.log import EventLog
    from tests.support.proxy import Proxy

    Pace = Callable[[float, float], None]

GUARD = 60
PING = 0.4
"""Seconds between two pings where a test waits for some."""
KEYS = Keys()
LONG = 3600.0
"""Where nothing is to be healed by a ping or a look-up."""


@pytest.fixture
async def log(server: Endpoint) -> AsyncIterator[EventLog]:
    async with open_log(server.url) as log:
        yield log


@pytest.fixture
def pace(monkeypatch: pytest.MonkeyPatch) -> Pace:
    """Sets the seconds between two pings, and those within which every run is looked up."""

    def pace(ping: float, check: float) -> None:
        monkeypatch.setattr("penstock.log.redis.notifications.PING_INTERVAL", ping)
        monkeypatch.setattr("penstock.log.redis.notifications.CHECK_INTERVAL", check)

    return pace


@pytest.fixture(autouse=True)
def _soon_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.backoff.SHORTEST_PAUSE", 0.005)
    monkeypatch.setattr("penstock.backoff.FIRST_PAUSE", 0.02)
    monkeypatch.setattr("penstock.backoff.LONGEST_PAUSE", 0.05)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.log.redis.backend.ANSWER_TIMEOUT", 0.3)


class Listener:
    def __init__(self, wakeups: Notifications) -> None:
        self.wakeups = wakeups
        self.moved: dict[str, int] = {}
        self.news: list[Notification] = []
        self._more = trio.Event()

    @property
    def cancels(self) -> int:
        return sum(news.cancel for news in self.news)

    @property
    def reconnections(self) -> int:
        return sum(news.reconnected for news in self.news)

    async def run(self) -> None:
        while True:
            news = await self.wakeups.wait()
            assert news.moved or news.cancel or news.reconnected
            self.news.append(news)
            for run_id, seq in news.moved.items():  # a look-up may be told after what has moved since
                self.moved[run_id] = max(self.moved.get(run_id, 0), seq)
            self._more.set()
            self._more = trio.Event()

    async def hears(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(GUARD):
            while not condition():
                await self._more.wait()

    async def hears_of(self, run_id: str, seq: int) -> None:
        await self.hears(lambda: self.moved.get(run_id, 0) >= seq)

    async def hears_of_reconnection(self, times: int = 1) -> None:
        await self.hears(lambda: self.reconnections >= times)

    async def hears_of_cancels(self, times: int) -> None:
        await self.hears(lambda: self.cancels >= times)

    def forget(self) -> None:
        self.news.clear()
        self.moved.clear()


@asynccontextmanager
async def listening(url: str, *runs: str, owner: str = "me") -> AsyncIterator[Listener]:
    async with open_log(url) as log, log.wakeups(owner) as wakeups, trio.open_nursery() as nursery:
        listener = Listener(wakeups)
        nursery.start_soon(listener.run)
        await subscribe(wakeups, *runs)
        yield listener
        nursery.cancel_scope.cancel()


async def subscribe(wakeups: Notifications, *runs: str) -> None:
    async with trio.open_nursery() as nursery:
        for run_id in runs:
            nursery.start_soon(wakeups.subscribe, run_id)


async def channels(server: Endpoint) -> set[str]:
    return set(await server.command("PUBSUB", "CHANNELS"))


async def listened_to(server: Endpoint, *expected: str) -> None:
    await until_it_is(partial(channels, server), set(expected))


async def subscribers(server: Endpoint) -> list[dict[str, str]]:
    return [client for client in await server.clients() if client["sub"] != "0"]


async def started(log: EventLog, *runs: str) -> None:
    for run_id in runs:
        await log.start(record(run_id), LEASE)


async def move(log: EventLog, seq: int, run_id: str = "r") -> None:
    (appended,) = await log.append([batch(seq, seq, run_id=run_id)])
    assert appended.seq == seq


# Subscribing


async def test_what_is_appended_right_after_subscribing_is_told(server: Endpoint, log: EventLog, pace: Pace) -> None:
    pace(LONG, LONG)
    runs = [f"r{n}" for n in range(100)]
    await started(log, *runs)
    async with listening(server.url) as listener:
        for run_id in runs:
            await listener.wakeups.subscribe(run_id)
            await move(log, 1, run_id)
        for run_id in runs:
            await listener.hears_of(run_id, 1)
        assert listener.moved == dict.fromkeys(runs, 1)
        assert listener.reconnections == listener.cancels == 0


@pytest.mark.parametrize("late", [0, 0.002])
async def test_no_append_is_missed_after_any_flicker(between: Proxy, log: EventLog, pace: Pace, late: float) -> None:
    pace(LONG, LONG)
    chance = random.Random(1)
    runs = [f"r{n}" for n in range(10)]
    await started(log, *runs)

    async def moment() -> None:
        what = chance.randrange(4)
        if what == 0:
            await trio.sleep(chance.uniform(0, 0.004))
        else:
            for _ in range(what - 1):
                await trio.lowlevel.checkpoint()

    async def flicker(listener: Listener, run_id: str) -> None:
        for seq in range(1, 11):
            for _ in range(chance.randrange(1, 4)):
                with trio.move_on_after(chance.choice([0.0, 0.0005, 0.003])):
                    await listener.wakeups.subscribe(run_id)
                await moment()
                listener.wakeups.unsubscribe(run_id)
                await moment()
            await listener.wakeups.subscribe(run_id)
            await move(log, seq, run_id)
            await listener.hears_of(run_id, seq)
            listener.wakeups.unsubscribe(run_id)

    async with listening(between.url) as listener:
        between.delay(late)
        async with trio.open_nursery() as nursery:
            for run_id in runs:
                nursery.start_soon(flicker, listener, run_id)
        assert listener.reconnections == 0


async def test_news_that_are_not_taken_yet_go_with_their_subscription(server: Endpoint, log: EventLog) -> None:
    await started(log, "r", "s")
    async with open_log(server.url) as near, near.wakeups("me") as wakeups:
        await subscribe(wakeups, "r", "s")
        await move(log, 1, "r")
        await move(log, 1, "s")
        await trio.testing.wait_all_tasks_blocked(0.05)
        wakeups.unsubscribe("r")
        with trio.fail_after(GUARD):
            assert (await wakeups.wait()).moved == {"s": 1}


async def test_only_the_last_seq_is_told_of_many(server: Endpoint, log: EventLog) -> None:
    await started(log, "r")
    async with open_log(server.url) as near, near.wakeups("me") as wakeups:
        await wakeups.subscribe("r")
        for seq in range(1, 51):
            await move(log, seq)
        await trio.testing.wait_all_tasks_blocked(0.05)
        with trio.fail_after(GUARD):
            assert await wakeups.wait() == Notification({"r": 50})
        with trio.move_on_after(0.05) as waiting:
            await wakeups.wait()
        assert waiting.cancelled_caught


async def test_many_subscriptions_take_few_commands_one_connection_and_no_task(server: Endpoint) -> None:
    runs = [f"r{n}" for n in range(600)]
    async with listening(server.url) as listener:
        tasks = trio.lowlevel.current_statistics().tasks_living
        await subscribe(listener.wakeups, *runs)
        assert len(await channels(server)) == 601
        (subscriber,) = await subscribers(server)
        assert subscriber["sub"] == "601"
        assert len(await server.clients()) <= 2
        assert (await server.stats())["subscribe"] <= 1 + 2 + 600 // CHANNELS_PER_COMMAND
        assert trio.lowlevel.current_statistics().tasks_living <= tasks + 1  # a thread of this test's
        for run_id in runs:
            listener.wakeups.unsubscribe(run_id)
        await listened_to(server, KEYS.process("me"))
        assert (await server.stats())["unsubscribe"] <= 2 + 600 // CHANNELS_PER_COMMAND
        (subscriber,) = await subscribers(server)
        assert subscriber["sub"] == "1"
        assert trio.lowlevel.current_statistics().tasks_living <= tasks + 1
    await no_client_is_connected(server)


async def test_a_subscription_that_is_cancelled_and_given_up_leaves_nothing(between: Proxy, server: Endpoint) -> None:
    async with listening(between.url) as listener:
        between.stall()
        with trio.move_on_after(0.05) as scope:
            await listener.wakeups.subscribe("r")
        assert scope.cancelled_caught
        listener.wakeups.unsubscribe("r")
        between.go_on()
        await listener.wakeups.subscribe("s")
        await listened_to(server, KEYS.process("me"), KEYS.wake("s"))


@pytest.mark.parametrize("sending", [False, True])
async def test_the_late_confirmation_of_a_subscription_given_up_confirms_no_later_one(
    between: Proxy, server: Endpoint, monkeypatch: pytest.MonkeyPatch, *, sending: bool
) -> None:
    given_up, release = trio.Event(), trio.Event()
    unsubscribe, subscribe = Subscription.unsubscribe, Subscription.subscribe

    async def held_after(self: Subscription, names: Sequence[str]) -> None:
        await unsubscribe(self, names)
        given_up.set()
        if not sending:
            await release.wait()

    async def held_before(self: Subscription, names: Sequence[str]) -> None:
        if given_up.is_set():
            await release.wait()
        await subscribe(self, names)

    monkeypatch.setattr(Subscription, "unsubscribe", held_after)
    monkeypatch.setattr(Subscription, "subscribe", held_before)
    async with open_log(between.url) as log, log.wakeups("me") as wakeups, trio.open_nursery() as nursery:
        assert isinstance(wakeups, RedisNotifications)
        between.delay(0.5)
        with trio.move_on_after(0.02):
            await wakeups.subscribe("r")
        wakeups.unsubscribe("r")
        await given_up.wait()
        assert wakeups._subscriptions[""]._unconfirmed.total() == 1
        subscribed = trio.Event()

        async def subscribe_again() -> None:
            await wakeups.subscribe("r")
            subscribed.set()

        nursery.start_soon(subscribe_again)
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert wakeups._subscriptions[""]._unconfirmed.total() == (2 if sending else 1)

        async def confirmed() -> bool:
            await trio.testing.wait_all_tasks_blocked()
            return wakeups._subscriptions[""]._unconfirmed.total() <= int(sending)

        await until_it_is(confirmed, wanted=True)
        assert not subscribed.is_set()
        release.set()
        await subscribed.wait()
        assert KEYS.wake("r") in await channels(server)


# Broken connections


async def test_a_killed_connection_is_replaced_and_that_is_told(server: Endpoint, log: EventLog, pace: Pace) -> None:
    pace(LONG, LONG)
    runs = [f"r{n}" for n in range(20)]
    await started(log, *runs)
    async with listening(server.url, *runs) as listener:
        for n in range(1, 4):
            assert await server.command("CLIENT", "KILL", "TYPE", "pubsub") >= 1
            await listener.hears_of_reconnection(n)
            for run_id in runs:
                await listener.wakeups.subscribe(run_id)
                await move(log, n, run_id)
            for run_id in runs:
                await listener.hears_of(run_id, n)
        assert len(await subscribers(server)) == 1
        assert listener.cancels == 0
    assert await subscribers(server) == []


async def test_a_connection_killed_during_requests_is_replaced_by_one(server: Endpoint, pace: Pace) -> None:
    pace(LONG, LONG)

    async def flicker(listener: Listener, run_id: str) -> None:
        while True:
            await listener.wakeups.subscribe(run_id)
            listener.wakeups.unsubscribe(run_id)
            await trio.lowlevel.checkpoint()

    async with listening(server.url) as listener, trio.open_nursery() as nursery:
        for n in range(5):
            nursery.start_soon(flicker, listener, f"r{n}")
        for n in range(1, 11):
            await server.command("CLIENT", "KILL", "TYPE", "pubsub")
            await listener.hears_of_reconnection(n)
        nursery.cancel_scope.cancel()
    await no_client_is_connected(server)


async def test_what_moved_while_the_connection_was_away_is_told(between: Proxy, log: EventLog, pace: Pace) -> None:
    pace(LONG, LONG)
    await started(log, "moved", "ended", "still", "given up")
    async with listening(between.url, "moved", "ended", "still", "given up") as listener:
        between.refuse()
        await move(log, 1, "moved")
        await move(log, 2, "moved")
        await log.append([batch(1, 3, COMPLETED, run_id="ended")])
        await move(log, 1, "given up")
        listener.wakeups.unsubscribe("given up")
        await between.accept()
        await listener.hears(lambda: len(listener.moved) == 3)
        assert listener.moved == {"moved": 2, "ended": 3, "still": 0}
        assert listener.reconnections == 1


async def test_a_run_that_is_gone_has_moved_beyond(between: Proxy, log: EventLog, server: Endpoint, pace: Pace) -> None:
    pace(LONG, LONG)
    await started(log, "gone", "there")
    await move(log, 1, "there")
    async with listening(between.url, "gone", "there", "never") as listener:
        await server.command("DEL", KEYS.record("gone"), KEYS.stream("gone"))
        between.cut()
        await listener.hears_of("never", 1)
        await listener.hears_of("gone", 1)
        assert listener.moved == {"gone": sys.maxsize, "never": sys.maxsize, "there": 1}


async def test_a_server_that_comes_back_empty_is_listened_to_again() -> None:
    async with redis_server() as server, open_log(server.url) as log:
        await started(log, "r")
        async with listening(server.url, "r", owner=LEASE.owner) as listener:
            await server.restart(empty=True)
            await listener.hears_of_reconnection()
            await listener.hears_of("r", 1)
            assert listener.moved == {"r": sys.maxsize}
            listener.forget()
            await log.restore(record(), LEASE, 1)
            await move(log, 1)
            await listener.hears_of("r", 1)
            assert listener.moved == {"r": 1}
            await log.request_cancel("r", None)
            await listener.hears(lambda: listener.cancels == 1)


async def test_a_connection_lost_while_unconfirmed_is_replaced(between: Proxy, server: Endpoint, log: EventLog) -> None:
    await started(log, "r")
    async with listening(between.url, "r") as listener:
        between.drop_confirmations = True
        for _ in range(3):
            asked = between.requests["SUBSCRIBE"]
            between.cut()
            await until(lambda asked=asked: between.requests["SUBSCRIBE"] > asked)  # type: ignore[misc]
        between.drop_confirmations = False
        between.cut()
        await listener.hears_of_reconnection()
        await move(log, 1)
        await listener.hears_of("r", 1)
        assert len(await subscribers(server)) == 1


@pytest.mark.usefixtures("impatient")
async def test_a_connection_whose_channels_are_never_confirmed_is_given_up(
    between: Proxy,
    server: Endpoint,
    log: EventLog,
    pace: Pace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pace(PING, LONG)
    await started(log, "r")
    async with listening(between.url, "r") as listener:
        between.drop_confirmations = True
        between.cut()
        await warned_of(caplog, "cannot listen to Redis", "has not confirmed the subscriptions")
        between.drop_confirmations = False
        await listener.hears_of_reconnection()
        await move(log, 1)
        await listener.hears_of("r", 1)
        assert len(await subscribers(server)) == 1


# Silence


@pytest.mark.usefixtures("impatient")
async def test_a_connection_that_falls_silent_is_given_up(
    between: Proxy,
    log: EventLog,
    server: Endpoint,
    pace: Pace,
    caplog: pytest.LogCaptureFixture,
) -> None:
    pace(PING, LONG)
    await started(log, "r")
    async with listening(between.url, "r") as listener:
        (before,) = await subscribers(server)
        between.stall()
        await move(log, 1)
        await warned_of(caplog, "the subscription to Redis broke", f"127.0.0.1:{between.port}")
        between.go_on()
        await listener.hears_of_reconnection()
        await listener.hears_of("r", 1)

        async def only_the_new_one() -> bool:
            ids = [each["id"] for each in await subscribers(server)]
            return len(ids) == 1 and ids != [before["id"]]

        await until_it_is(only_the_new_one, wanted=True)


@pytest.mark.usefixtures("impatient")
async def test_a_ping_without_an_answer_is_enough_to_give_a_connection_up(
    between: Proxy, pace: Pace, caplog: pytest.LogCaptureFixture
) -> None:
    pace(PING, LONG)
    async with listening(between.url) as listener:  # to no run: there is nothing to look up
        between.stall()
        await warned_of(caplog, "the subscription to Redis broke", f"has not answered a ping for {PING} s")
        between.go_on()
        await listener.hears_of_reconnection()


async def warned_of(caplog: pytest.LogCaptureFixture, *words: str) -> None:
    await until(lambda: any(all(each in message for each in words) for message in caplog.messages))


async def test_a_ping_that_is_answered_keeps_the_connection(between: Proxy, server: Endpoint, pace: Pace) -> None:
    pace(PING, LONG)
    async with listening(between.url, "r") as listener:
        (before,) = await subscribers(server)
        await until(lambda: between.requests["PING"] >= 4)
        (after,) = await subscribers(server)
        assert after["id"] == before["id"]
        assert listener.reconnections == 0


async def test_a_run_whose_messages_begin_to_be_lost_is_looked_up(between: Proxy, log: EventLog, pace: Pace) -> None:
    pace(PING, LONG)
    runs = [f"r{n:03}" for n in range(100)]  # one of them in turn with each ping
    active = runs[60:65]
    await started(log, *active)
    async with listening(between.url, *runs) as listener:
        for run_id in active:
            await move(log, 1, run_id)
            await listener.hears_of(run_id, 1)
        between.drop_messages = True
        for run_id in active:
            await move(log, 2, run_id)
        pings = between.requests["PING"]
        for run_id in active:
            await listener.hears_of(run_id, 2)
        assert between.requests["PING"] - pings < 20
        assert between.swallowed >= 5


async def test_a_run_without_messages_is_looked_up_in_time(between: Proxy, log: EventLog, pace: Pace) -> None:
    pace(PING, 4 * PING)
    runs = [f"r{n}" for n in range(17)]
    await started(log, *runs)
    between.drop_messages = True
    async with listening(between.url, *runs) as listener:
        for seq in (1, 2):
            for run_id in runs:
                await move(log, seq, run_id)
            began = trio.current_time()
            for run_id in runs:
                await listener.hears_of(run_id, seq)
            assert trio.current_time() - began < 4 * 4 * PING
        assert between.swallowed == 2 * 17
        assert listener.reconnections == 0


async def test_idle_runs_cost_few_commands(between: Proxy, pace: Pace) -> None:
    pace(PING, 12 * PING)
    async with listening(between.url, *[f"r{n}" for n in range(240)]) as listener:
        between.requests.clear()
        await until(lambda: between.requests["PING"] >= 3)
        pings, again = between.requests["PING"], 240 * listener.reconnections  # on a busy machine a ping may be late
        assert between.requests["HGET"] <= 20 * (pings + 1) + again
        assert between.requests.total() <= 21 * (pings + 1) + 2 * again


# Garbage

GARBAGE = [b"", b"garbage", b"\xff\xfe", b"-1", b"1.5", b"+7", b" 1", b"nan", b"\xc2\xb2", b"x" * 100_000, b"9" * 5_000]


async def test_garbage_on_a_runs_channel_is_harmless(server: Endpoint, log: EventLog, pace: Pace) -> None:
    pace(LONG, LONG)
    await started(log, "r", "s")
    async with listening(server.url, "r", "s") as listener:
        for garbage in GARBAGE:
            assert await server.command("PUBLISH", KEYS.wake("r"), garbage) == 1
        await move(log, 1, "s")
        await listener.hears_of("s", 1)
        assert listener.moved == {"s": 1}
        await move(log, 1, "r")
        await listener.hears_of("r", 1)
        assert listener.reconnections == listener.cancels == 0


async def test_garbage_on_a_processs_channel_is_harmless(server: Endpoint, log: EventLog, pace: Pace) -> None:
    pace(LONG, LONG)
    await started(log, "r")
    async with listening(server.url, "r") as listener:
        for n, garbage in enumerate(GARBAGE, 1):
            await server.command("PUBLISH", KEYS.process("me"), garbage)
            await listener.hears_of_cancels(n)
        await move(log, 1)
        await listener.hears_of("r", 1)
        assert listener.moved == {"r": 1}


@pytest.mark.parametrize("words", [("SET", "x"), ("HSET", "seq", "garbage")], ids=str)
async def test_garbage_records_are_harmless(
    server: Endpoint, log: EventLog, pace: Pace, words: tuple[str, ...]
) -> None:
    pace(LONG, LONG)
    await started(log, "s")
    await move(log, 1, "s")
    await server.command(words[0], KEYS.record("r"), *words[1:])
    async with listening(server.url, "r", "s") as listener:
        await server.command("CLIENT", "KILL", "TYPE", "pubsub")
        await listener.hears_of("s", 1)
        await move(log, 2, "s")
        await listener.hears_of("s", 2)


# A server that is away, or not what it should be


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("how", ["refuse", "stall"])
async def test_wakeups_that_cannot_open_say_so_and_leave_nothing(between: Proxy, server: Endpoint, how: str) -> None:
    async with open_log(between.url) as log:
        await log.check()
        tasks = trio.lowlevel.current_statistics().tasks_living
        getattr(between, how)()
        with trio.fail_after(GUARD), pytest.raises(LogUnavailable):
            async with log.wakeups("me"):
                pytest.fail("there is no server")
        assert trio.lowlevel.current_statistics().tasks_living <= tasks
        between.go_on()
        await between.accept()
        async with log.wakeups("me"):
            assert len(await subscribers(server)) == 1


@pytest.mark.usefixtures("impatient")
async def test_wakeups_that_are_never_confirmed_say_so_and_leave_nothing() -> None:
    async with redis_server() as server, open_log(server.url) as log:
        await server.command("ACL", "SETUSER", "default", "resetchannels")
        await log.check()
        tasks = trio.lowlevel.current_statistics().tasks_living
        with trio.fail_after(GUARD), pytest.raises(LogUnavailable):
            async with log.wakeups("me"):
                pytest.fail("there is no listening")
        assert trio.lowlevel.current_statistics().tasks_living <= tasks


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("how", ["refuse", "stall"])
async def test_while_the_server_is_away_waiting_waits_and_subscribing_gives_up_in_time(
    between: Proxy, log: EventLog, pace: Pace, how: str
) -> None:
    pace(PING, LONG)
    await started(log, "r", "s")
    async with open_log(between.url) as near, near.wakeups("me") as wakeups:
        await wakeups.subscribe("r")
        getattr(between, how)()
        await move(log, 1)
        for _ in range(2):
            began = trio.current_time()
            with pytest.raises(LogUnavailable, match=f"Redis at 127.0.0.1:{between.port} has not confirmed"):
                await wakeups.subscribe("s")
            assert trio.current_time() - began < 2
        with trio.move_on_after(0.1) as waiting:
            await wakeups.wait()
        assert waiting.cancelled_caught
        between.go_on()
        await between.accept()
        listener = Listener(wakeups)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(listener.run)
            await listener.hears_of("r", 1)
            await listener.hears_of_reconnection()
            await wakeups.subscribe("s")
            await move(log, 1, "s")
            await listener.hears_of("s", 1)
            nursery.cancel_scope.cancel()


async def test_a_warning_says_why_a_server_is_away(between: Proxy, caplog: pytest.LogCaptureFixture) -> None:
    async with listening(between.url) as listener:
        between.refuse()
        await warned_of(caplog, "cannot listen to Redis", f"127.0.0.1:{between.port}", "trying again")
        await between.accept()
        await listener.hears_of_reconnection()
    broke, *others = caplog.messages
    assert broke.startswith(f"the subscription to Redis broke: cannot reach Redis at 127.0.0.1:{between.port}: ")
    assert len(others) == 1


async def test_a_server_that_confirms_and_then_refuses_is_not_besieged(pace: Pace) -> None:
    pace(LONG, LONG)
    async with redis_server(replica_serve_stale_data="no") as server, listening(server.url, "r"):
        await server.command("REPLICAOF", "127.0.0.1", server.port)  # itself: no primary to have data from
        await server.command("CONFIG", "RESETSTAT")
        await server.command("CLIENT", "KILL", "TYPE", "pubsub")
        await trio.sleep(1)
        assert (await server.stats())["subscribe"] < 100  # pauses are 5 ms here at least


async def test_leaving_at_any_moment_leaves_nothing(server: Endpoint, pace: Pace) -> None:
    pace(0.005, 0.02)
    chance = random.Random(1)
    runs = [f"r{n}" for n in range(30)]
    tasks = trio.lowlevel.current_statistics().tasks_living

    async def flicker(wakeups: Notifications) -> None:
        while True:
            run_id = chance.choice(runs)
            await wakeups.subscribe(run_id)
            await trio.sleep(chance.uniform(0, 0.002))
            wakeups.unsubscribe(run_id)

    async with open_client(server.url) as killer, open_log(server.url) as log:
        await started(log, *runs)
        for _ in range(40):
            with trio.fail_after(GUARD), trio.move_on_after(chance.uniform(0, 0.04)) as scope:
                async with log.wakeups("me") as wakeups, trio.open_nursery() as nursery:
                    nursery.start_soon(Listener(wakeups).run)
                    for _ in range(3):
                        nursery.start_soon(flicker, wakeups)
                    while True:
                        await trio.sleep(chance.uniform(0, 0.01))
                        await killer.ask("CLIENT KILL", "TYPE", "pubsub")
            assert scope.cancelled_caught
        await until_it_is(partial(subscribers, server), [])
    await no_client_is_connected(server)
    assert trio.lowlevel.current_statistics().tasks_living <= tasks + 1
