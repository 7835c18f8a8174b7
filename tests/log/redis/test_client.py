"""The client that everything in Redis goes through: replies, refusals, broken connections, cancellations, leaving."""

from __future__ import annotations

import math
import random
import traceback
from typing import TYPE_CHECKING, Any

import pytest
import trio
import trio.lowlevel
import trio.testing
from redis.exceptions import ResponseError

from penstock.errors import LogFull, LogUnavailable
from penstock.log.open import open_log
from penstock.log.redis import client as client_module
from penstock.log.redis import scripts
from penstock.log.redis.client import BYTES_PER_ROUND_TRIP, COMMANDS_PER_ROUND_TRIP, Client, open_client
from penstock.log.redis.log import REQUESTS_AT_ONCE
from penstock.log.redis.slots import call
from penstock.runs import RunStatus
from tests.support.logs import LEASE, batch, record, seqs
from tests.support.redis_runs import no_client_is_connected
from tests.support.redis_servers import Endpoint, _free_port, redis_server, redis_servers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock.log.redis.slots import Command
    from tests.support.proxy import Proxy

GUARD = 60
SHORT = 0.3
"""How long Redis may take to answer where a test waits for it to be too long."""

DUE = call(scripts.DUE, ["live"], 0, 10)

ENLIST = call(scripts.ENLIST, ["live"], 60_000, "1", "r")


@pytest.fixture
async def client(between: Proxy) -> AsyncIterator[Client]:
    async with open_client(between.url) as client:
        yield client


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.log.redis.backend.ANSWER_TIMEOUT", SHORT)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    sizes: list[int] = []
    send = Client._send_twice

    async def noted(self: Client, commands: list[Command]) -> list[Any]:
        sizes.append(len(commands))
        return await send(self, commands)

    monkeypatch.setattr(Client, "_send_twice", noted)
    return sizes


async def received(server: Endpoint) -> int:
    return int((await server.command("INFO", "stats"))["total_connections_received"])


# Replies


@pytest.mark.parametrize(
    "commands, pieces",
    [
        (COMMANDS_PER_ROUND_TRIP, [COMMANDS_PER_ROUND_TRIP]),
        (2 * COMMANDS_PER_ROUND_TRIP + 5, [COMMANDS_PER_ROUND_TRIP, COMMANDS_PER_ROUND_TRIP, 5]),
    ],
)
async def test_a_round_trip_has_limits(client: Client, sent: list[int], commands: int, pieces: list[int]) -> None:
    assert await client.execute([("ECHO", n) for n in range(commands)]) == [b"%d" % n for n in range(commands)]
    assert sent == pieces


@pytest.mark.parametrize("kind", [bytes, str])
async def test_a_round_trip_is_full_with_so_many_bytes(client: Client, sent: list[int], kind: type) -> None:
    half, whole = (b"x" * (BYTES_PER_ROUND_TRIP // 2), b"y" * BYTES_PER_ROUND_TRIP)
    words = [half, half, half, whole, whole, b"z"]
    replies = await client.execute([("ECHO", word if kind is bytes else word.decode()) for word in words])
    assert replies == words
    assert sent == [2, 2, 1, 1]


async def test_while_one_sends_much_others_are_served_between_the_pieces(client: Client) -> None:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(client.execute, [("RPUSH", "list", n) for n in range(6 * COMMANDS_PER_ROUND_TRIP)])
        lengths: list[int] = []
        with trio.fail_after(GUARD):
            while not lengths or lengths[-1] < 6 * COMMANDS_PER_ROUND_TRIP:
                lengths.append(await client.ask("LLEN", "list"))
    assert any(0 < length < 6 * COMMANDS_PER_ROUND_TRIP for length in lengths)


# Refusals


async def test_a_refusal_belongs_to_its_own_command(client: Client) -> None:
    commands: list[Command] = [("SET", "key", 1), ("LPUSH", "key", 2), ("GET", "key"), ("HGETALL", "key"), ("ECHO", 3)]
    ok, pushed, got, all_of_it, echo = await client.execute(commands)
    assert (ok, got, echo) == (b"OK", b"1", b"3")
    for refused in (pushed, all_of_it):
        assert isinstance(refused, ResponseError)
        assert "WRONGTYPE" in str(refused)
    (alone,) = await client.execute([("LPUSH", "key", 2)])
    assert isinstance(alone, ResponseError)


async def test_a_refusal_of_the_only_command_is_raised(client: Client) -> None:
    await client.ask("SET", "key", 1)
    with pytest.raises(LogUnavailable, match=f"Redis at {client.address} refuses a command: WRONGTYPE"):
        await client.ask("LPUSH", "key", 2)
    assert await client.ask("GET", "key") == b"1"


async def test_a_full_server_refuses_only_what_needs_room() -> None:
    async with redis_server(maxmemory="1") as server, open_client(server.url) as client:
        refused, echo = await client.execute([("SET", "key", 1), ("ECHO", 2)])
        assert isinstance(refused, LogFull)
        assert echo == b"2"
        with pytest.raises(LogFull, match="maxmemory is reached"):
            await client.ask("SET", "key", 1)


@pytest.mark.parametrize("version", redis_servers())  # on 6.2 the refusal of a script does not begin with its sign
@pytest.mark.parametrize("command", [("SET", "key", 1), ENLIST], ids=["command", "script"])
async def test_a_replica_says_which_server_is_wanted(version: str, command: Command) -> None:
    options: dict[str, Any] = {"executable": redis_servers()[version], "replicaof": ("127.0.0.1", _free_port())}
    async with redis_server(**options) as server, open_client(server.url) as client:
        with pytest.raises(LogUnavailable, match="read-only replica; name its primary"):
            await client.execute([("ECHO", 1), command])


async def test_a_replica_without_its_primary_says_so() -> None:
    async with redis_server(replica_serve_stale_data="no") as server, open_client(server.url) as client:
        await server.command("REPLICAOF", "127.0.0.1", _free_port())
        with pytest.raises(LogUnavailable, match="a replica that has lost its primary"):
            await client.execute([("GET", "key")])


# Scripts


async def test_a_script_that_was_never_sent_is_sent_once(client: Client, between: Proxy) -> None:
    assert (await client.ask(*DUE))[1] == []
    assert (between.requests["SCRIPT"], between.requests["EVALSHA"]) == (1, 2)
    await client.ask(*DUE)
    assert (between.requests["SCRIPT"], between.requests["EVALSHA"]) == (1, 3)


async def test_of_a_pipeline_only_forgotten_scripts_go_again(client: Client, between: Proxy, server: Endpoint) -> None:
    await client.ask(*ENLIST)
    await server.command("SCRIPT", "FLUSH")
    await server.command("DEL", "live")
    await client.ask(*DUE)
    between.requests.clear()
    replies = await client.execute([("INCR", "n"), DUE, ENLIST, ("ECHO", 1), DUE, ENLIST, ("INCR", "n")])
    first, due, _, echo, again, _, last = replies
    assert (first, echo, last) == (1, b"1", 2)
    assert due[1] == again[1] == []
    assert between.requests == {"INCR": 2, "EVALSHA": 4 + 2, "ECHO": 1, "SCRIPT": 1}
    assert not any(isinstance(reply, Exception) for reply in replies)
    assert await server.command("ZCARD", "live") == 1


async def test_a_user_who_may_not_send_scripts_is_told_so() -> None:
    async with redis_server() as server, open_client(server.url) as client:
        await server.command("ACL", "SETUSER", "default", "-script")
        with pytest.raises(LogUnavailable, match="the user in the URL may not do this"):
            await client.execute([DUE])


# Broken connections


async def test_connections_that_break_while_nobody_uses_them_go_unnoticed(client: Client, between: Proxy) -> None:
    for n in range(5):
        assert await client.ask("ECHO", n) == b"%d" % n
        assert await client.execute([("ECHO", n), ("ECHO", -n)]) == [b"%d" % n, b"%d" % -n]
        between.cut()


@pytest.mark.parametrize("others", [0, 2])
async def test_a_connection_lost_before_the_effect_is_tried_again(client: Client, between: Proxy, others: int) -> None:
    await client.ask("PING")
    between.stall()
    async with trio.open_nursery() as nursery:
        replies: list[Any] = []

        async def ask() -> None:
            replies.extend(await client.execute([("INCR", "n"), *[("ECHO", 1)] * others]))

        nursery.start_soon(ask)
        await trio.testing.wait_all_tasks_blocked(0.05)  # what was sent stands before the closed gate
        between.cut()
        between.go_on()
    assert replies == [1, *[b"1"] * others]


@pytest.mark.parametrize("others", [0, 2])
async def test_a_connection_broken_after_the_effect_is_tried_again(client: Client, between: Proxy, others: int) -> None:
    between.drop_reply_when(lambda reply: reply.command == "INCR", times=1)
    assert await client.execute([("INCR", "n"), *[("ECHO", 1)] * others]) == [2, *[b"1"] * others]
    assert between.lost == 1


@pytest.mark.parametrize("others", [0, 2])
async def test_a_connection_lost_twice_raises(client: Client, between: Proxy, server: Endpoint, others: int) -> None:
    between.drop_reply_when(lambda reply: reply.command == "INCR", times=2)
    with pytest.raises(LogUnavailable, match=f"cannot reach Redis at 127.0.0.1:{between.port}: "):
        await client.execute([("INCR", "n"), *[("ECHO", 1)] * others])
    assert await server.command("GET", "n") == "2"
    assert await client.ask("INCR", "n") == 3


async def test_of_many_pieces_only_the_broken_one_is_sent_again(client: Client, between: Proxy) -> None:
    numbers = [b"%d" % n for n in range(3 * COMMANDS_PER_ROUND_TRIP)]
    lost = numbers[COMMANDS_PER_ROUND_TRIP + 7]
    between.drop_reply_when(lambda reply: reply.arguments[:1] == (lost,), times=1)
    assert await client.execute([("ECHO", n) for n in numbers]) == numbers
    assert between.requests["ECHO"] == 4 * COMMANDS_PER_ROUND_TRIP


@pytest.mark.usefixtures("impatient")
async def test_a_host_that_is_none_is_out_of_reach() -> None:
    async with open_client("redis://nobody.invalid:1") as client:
        with trio.fail_after(GUARD), pytest.raises(LogUnavailable, match=r"Redis at nobody\.invalid:1"):
            await client.ask("PING")


async def test_a_server_that_was_away_is_found_again(client: Client, between: Proxy) -> None:
    await client.ask("PING")
    between.refuse()
    for _ in range(3):
        with pytest.raises(LogUnavailable):
            await client.execute([("ECHO", 1), ("ECHO", 2)])
    await between.accept()
    assert await client.execute([("ECHO", 1), ("ECHO", 2)]) == [b"1", b"2"]


async def no_answers(client: Client, first: int) -> None:
    async def ask(n: int) -> None:
        began = trio.current_time()
        with pytest.raises(LogUnavailable, match=f"has not answered for {SHORT} s"):
            await client.execute([("ECHO", n)] * (1 + n % 3))
        assert trio.current_time() - began >= SHORT

    with pytest.MonkeyPatch.context() as patch, trio.fail_after(GUARD):
        patch.setattr("penstock.log.redis.backend.ANSWER_TIMEOUT", SHORT)
        async with trio.open_nursery() as nursery:
            for n in range(first, first + 6):
                nursery.start_soon(ask, n)


async def right_answers(client: Client, first: int) -> None:
    """Several requests at once, each with its own answer."""

    async def ask(n: int) -> None:
        assert await client.execute([("ECHO", n)] * (1 + n % 3)) == [b"%d" % n] * (1 + n % 3)

    with trio.fail_after(GUARD):
        async with trio.open_nursery() as nursery:
            for n in range(first, first + 12):
                nursery.start_soon(ask, n)


async def test_a_server_that_does_not_answer_is_out_of_reach_and_answers_nobody_else_later() -> None:
    async with redis_server() as server, open_client(server.url) as client:
        await right_answers(client, 100)
        for n in (200, 400):
            server.pause()
            await no_answers(client, n)
            server.resume()
            await right_answers(client, n + 100)
        assert len(await server.clients()) <= 12


# Cancelling


async def test_whatever_is_cancelled_at_whatever_moment_nobody_gets_the_reply_of_another(
    monkeypatch: pytest.MonkeyPatch, server: Endpoint, between: Proxy
) -> None:
    monkeypatch.setattr("penstock.log.redis.backend.ANSWER_TIMEOUT", GUARD)
    chance = random.Random(1)
    numbers = iter(range(1_000_000))
    cancelled = answered = 0

    async def ask(client: Client) -> None:
        nonlocal cancelled, answered
        commands: list[Command] = [("ECHO", next(numbers)) for _ in range(chance.choice([1, 1, 3, 120]))]
        seconds = chance.choice([0, chance.uniform(0, 0.01)]) if chance.random() < 1 / 3 else math.inf
        with trio.move_on_after(seconds) as scope:
            assert await client.execute(commands) == [b"%d" % n for _, n in commands]
            answered += 1
        cancelled += scope.cancelled_caught

    async def go_on_asking(client: Client) -> None:
        for _ in range(10):
            await ask(client)

    async with open_client(between.url) as client:
        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(20):
                    nursery.start_soon(go_on_asking, client)
        assert cancelled > 20
        assert answered >= 100
        assert between.connections <= 20
        await right_answers(client, 1_000_000)
    await no_client_is_connected(server)


@pytest.mark.parametrize("commands", [1, 3])
async def test_what_is_cancelled_before_it_begins_is_not_sent(client: Client, between: Proxy, commands: int) -> None:
    await client.ask("PING")
    for _ in range(50):
        with trio.CancelScope() as scope:
            scope.cancel()
            await client.execute([("INCR", "n")] * commands)
        assert scope.cancelled_caught
    assert await client.ask("GET", "n") is None
    assert between.requests["INCR"] == 0


async def test_cancelling_while_it_connects_leaves_no_connection() -> None:
    async with redis_server() as server:
        async with open_client(server.url) as client:
            chance = random.Random(1)
            for _ in range(40):
                server_side = {each["id"] for each in await server.clients()}
                with trio.move_on_after(chance.uniform(0, 0.003)):
                    await client.execute([("CLIENT KILL", "ID", own) for own in server_side] or [("PING",)])
            await right_answers(client, 100)
            assert len(await server.clients()) <= 12
        await no_client_is_connected(server)


@pytest.mark.parametrize("go_away", [False, True], ids=["to the end", "and go away"])
async def test_d42_readers_that_come_at_once_share_a_few_connections(server: Endpoint, *, go_away: bool) -> None:
    async with open_log(server.url) as log:
        await log.start(record(), LEASE)
        await log.append([batch(1, 3)])
        chance, before, pages = random.Random(1), await received(server), 0

        async def read() -> None:
            nonlocal pages
            with trio.move_on_after(chance.uniform(0, 0.1) if go_away else GUARD):
                assert seqs((await log.read("r", 0)).entries) == [1, 2, 3]
                pages += 1

        with trio.fail_after(60):
            async with trio.open_nursery() as nursery:
                for _ in range(300):
                    nursery.start_soon(read)
        assert len(await server.clients()) <= REQUESTS_AT_ONCE + 2
        if not go_away:
            assert pages == 300
            assert REQUESTS_AT_ONCE - 1 <= await received(server) - before - 2 <= REQUESTS_AT_ONCE + 2
        assert (await log.get("r")).status is RunStatus.RUNNING


# What a body raises


@pytest.mark.parametrize(
    "error",
    [
        ValueError("its own"),
        ExceptionGroup("its own", [ValueError("only")]),
        ExceptionGroup("its own", [ExceptionGroup("inner", [ValueError("only")])]),
        KeyboardInterrupt("its own"),
    ],
    ids=repr,
)
async def test_what_a_body_raises_leaves_as_it_is(server: Endpoint, error: BaseException) -> None:
    async def body() -> None:
        async with open_log(server.url) as log:
            await log.check()
            raise error

    with pytest.raises(type(error)) as raised:
        await body()
    assert raised.value is error
    assert error.__cause__ is None
    assert error.__context__ is None
    await no_client_is_connected(server)


async def test_a_cancellation_from_outside_ends_the_block_and_nothing_else(server: Endpoint) -> None:
    with trio.CancelScope() as scope:
        async with open_log(server.url) as log:
            await log.check()
            scope.cancel()
            await log.check()
    assert scope.cancelled_caught
    await no_client_is_connected(server)


async def test_an_error_beside_a_cancellation_leaves(server: Endpoint) -> None:
    error = ValueError("its own")

    async def body() -> None:
        with trio.CancelScope() as scope:
            async with open_log(server.url) as log:
                await log.check()
                scope.cancel()
                try:
                    await log.check()
                finally:
                    raise error

    with pytest.raises(ValueError, match="its own") as raised:
        await body()
    assert raised.value is error


@pytest.mark.parametrize("asking", [False, True])
async def test_leaving_takes_no_longer_if_the_server_does_not_answer(*, asking: bool) -> None:
    async with redis_server() as server:
        with trio.CancelScope() as scope:
            async with open_client(server.url) as client, client.subscription() as subscription:
                await right_answers(client, 1)
                await subscription.subscribe(["channel"])
                server.pause()
                began = trio.current_time()
                if asking:
                    scope.deadline = began + 0.1
                    async with trio.open_nursery() as nursery:
                        for n in range(10):
                            nursery.start_soon(client.ask, "ECHO", n)
        assert trio.current_time() - began < 1.5
        server.resume()
        await no_client_is_connected(server)


async def test_a_shielded_task_uses_the_log_to_its_end_while_all_around_it_is_cancelled(server: Endpoint) -> None:
    done: list[int] = []

    async def finish(client: Client) -> None:
        with trio.CancelScope(shield=True):
            for n in range(20):
                assert await client.execute([("RPUSH", "list", n), ("ECHO", n)]) == [n + 1, b"%d" % n]
                done.append(n)

    with trio.CancelScope() as scope:
        async with open_client(server.url) as client:
            await client.ask("PING")
            async with trio.open_nursery() as nursery:
                nursery.start_soon(finish, client)
                scope.cancel()
                await trio.sleep_forever()
    assert scope.cancelled_caught
    assert done == [*range(20)]
    await no_client_is_connected(server)


SECRET = "open-sesame"  # noqa: S105  (it opens nothing)


def words_of(error: BaseException) -> str:
    """All that a traceback would say of it, apart from the lines of the source."""
    said = traceback.TracebackException.from_exception(error)
    words = []
    while said is not None:
        words += list(said.format_exception_only())
        said = said.__cause__ or (None if said.__suppress_context__ else said.__context__)  # type: ignore[assignment]
    return "".join(words)


@pytest.mark.usefixtures("impatient")
async def test_a_right_password_is_never_repeated() -> None:
    async with redis_server(requirepass=SECRET) as server, open_client(server.url) as client:
        assert await client.ask("PING") == b"PONG"
        assert SECRET not in client.address
        server.pause()
        with pytest.raises(LogUnavailable) as stalled:
            await client.ask("PING")
        server.resume()
        with pytest.raises(LogUnavailable) as refused:
            await client.ask("NONSENSE")
        await server.kill()
        with pytest.raises(LogUnavailable) as gone:
            await client.ask("PING")
        for raised in (stalled, refused, gone):
            assert SECRET not in words_of(raised.value)


class Rounds(trio.abc.Instrument):
    def __init__(self) -> None:
        self.count = 0

    def before_io_wait(self, timeout: float) -> None:  # noqa: ARG002
        self.count += 1


async def test_callbacks_that_are_ready_run_in_a_few_rounds(server: Endpoint) -> None:
    rounds, done = Rounds(), trio.Event()
    ran: list[int] = []
    async with open_client(server.url) as client:
        trio.lowlevel.add_instrument(rounds)
        for number in range(1_000):
            client._loop.call_soon(ran.append, number)
        client._loop.call_soon(done.set)
        with trio.fail_after(20):
            await done.wait()
        trio.lowlevel.remove_instrument(rounds)
    assert ran == list(range(1_000))
    assert rounds.count < 100


async def test_a_loop_without_that_step_is_left_as_it_is() -> None:
    client_module._run_more_callbacks(object())
