"""Which node of a cluster has which slots, and which slot a command is about."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from penstock.log import AppendStatus, CancelStatus, Idempotency
from penstock.log.open import open_log
from penstock.log.redis import scripts
from penstock.log.redis.cluster import Cluster
from penstock.log.redis.indexes import _number_of_each_slot
from penstock.log.redis.log import RedisLog
from penstock.log.redis.schema import Keys
from penstock.log.redis.slots import NO_SHARD, Slots, call, key_of
from tests.support.clustered import shares_a_cluster
from tests.support.logs import COMPLETED, LEASE, LOST_ENDING, batch, record
from tests.support.redis_clusters import shared_cluster

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.log.redis.slots import Command

LAST = REDIS_CLUSTER_HASH_SLOTS - 1
A, B, C = (b"10.0.0.1", 7001, b"id-a"), (b"10.0.0.2", 7002, b"id-b"), (b"10.0.0.3", 7003, b"id-c")
A_ADDRESS, B_ADDRESS, C_ADDRESS = "10.0.0.1:7001", "10.0.0.2:7002", "10.0.0.3:7003"
IDS = ["r", "run-1", "a:b", "a b", "\N{EURO SIGN}", "r}", "{r", "{r}", "r}x{y", "}{", "{}", "{}r", "", "\udcff"]


def by_slot(slots: Slots) -> list[str]:
    return [slots.owner(key) for key in key_of_each_slot()]


@cache
def key_of_each_slot() -> list[str]:
    keys = {key_slot(b"{%d}" % number): f"{{{number}}}" for number in _number_of_each_slot()}
    return [keys[slot] for slot in range(REDIS_CLUSTER_HASH_SLOTS)]


def slots_of(*ranges: Any) -> Slots:
    slots = Slots()
    slots.replace([*ranges], "asked")
    return slots


# Slots


def test_before_anything_is_known_no_node_has_any_slot() -> None:
    slots = Slots()
    assert set(by_slot(slots)) == {NO_SHARD}
    assert not slots.primaries
    assert not slots.replicas


def test_each_range_is_of_its_first_node_with_both_ends() -> None:
    slots = slots_of([0, 99, A], [100, 100, B], [101, LAST, C])
    assert by_slot(slots) == [A_ADDRESS] * 100 + [B_ADDRESS] + [C_ADDRESS] * (LAST - 100)
    assert slots.primaries == {
        A_ADDRESS: ("10.0.0.1", 7001),
        B_ADDRESS: ("10.0.0.2", 7002),
        C_ADDRESS: ("10.0.0.3", 7003),
    }


@pytest.mark.parametrize("host", [None, b"", b"?"])
def test_a_node_that_does_not_know_its_host_has_that_at_which_it_was_asked(host: bytes | None) -> None:
    slots = Slots()
    assert slots.replace([[0, LAST, [host, 7001, b"id"], [host, 7002, b"id"]]], "my.host")
    assert slots.primaries == {"my.host:7001": ("my.host", 7001)}
    assert slots.replicas == [("my.host", 7002)]
    assert slots.owner("key") == "my.host:7001"


def test_hosts_are_names_and_addresses_of_both_kinds() -> None:
    slots = slots_of([0, 9, [b"redis.example", 1, b"id", []]], [10, LAST, [b"::1", 2, b"id", [b"hostname", b"x"]]])
    assert slots.primaries == {"redis.example:1": ("redis.example", 1), "[::1]:2": ("::1", 2)}


@pytest.mark.parametrize(
    "first, second, news",
    [
        ([[0, LAST, A]], [[0, LAST, A]], False),
        ([[0, LAST, A]], [[0, 9, A], [10, LAST, A]], False),
        ([[0, LAST, A]], [[0, LAST, A, B]], False),
        ([[0, LAST, A]], [[0, LAST, B, A]], True),
        ([[0, LAST, A]], [[0, LAST - 1, A], [LAST, LAST, B]], True),
        ([[0, LAST, A]], [[0, LAST - 1, A]], True),
        ([[0, 9, A]], [[0, LAST, A]], True),
        ([[0, LAST, A]], [[0, LAST, [b"10.0.0.1", 7009, b"id-a"]]], True),
    ],
)
def test_it_is_news_if_a_slot_has_another_node(first: list[Any], second: list[Any], *, news: bool) -> None:
    slots = Slots()
    assert slots.replace(first, "asked")
    assert slots.replace(second, "asked") is news
    assert by_slot(slots) == by_slot(slots_of(*second))
    assert slots.primaries == slots_of(*second).primaries
    assert slots.replicas == slots_of(*second).replicas


def test_what_one_node_says_of_one_slot_is_known_until_it_is_said_again() -> None:
    slots = slots_of([0, LAST, A])
    assert slots.moved(7, "10.0.0.2", 7002)
    assert not slots.moved(7, "10.0.0.2", 7002)
    assert [slot for slot, owner in enumerate(by_slot(slots)) if owner == B_ADDRESS] == [7]
    assert slots.primaries == {A_ADDRESS: ("10.0.0.1", 7001), B_ADDRESS: ("10.0.0.2", 7002)}
    assert slots.replace([[0, LAST, A]], "asked")
    assert set(by_slot(slots)) == {A_ADDRESS}
    assert list(slots.primaries) == [A_ADDRESS]


@pytest.mark.parametrize(
    "said",
    [
        [],
        None,
        [[0, LAST]],
        [[0, LAST, [b"host", b"port"]]],
        [[0, LAST, [b"\xff", 1]]],
        [[0, LAST, [7, 1]]],
        [[0, LAST, A, None]],
        [[0, LAST + 1, A]],
        [[0, LAST, A], b"garbage"],
    ],
)
def test_a_reply_that_tells_of_no_slots_is_refused_and_changes_nothing(said: Any) -> None:
    slots = slots_of([0, 9, A, B], [10, LAST, C])
    before = (by_slot(slots), dict(slots.primaries), list(slots.replicas))
    with pytest.raises(ValueError, match=r"the reply to CLUSTER SLOTS cannot be read|it knows no slots"):
        slots.replace(said, "asked")
    assert (by_slot(slots), slots.primaries, slots.replicas) == before


WORDS: st.SearchStrategy[Any] = st.none() | st.integers(-2, 20_000) | st.binary(max_size=3) | st.just(list(A))
LISTS = st.lists(WORDS | st.lists(WORDS, max_size=4), max_size=5)
REPLIES = WORDS | LISTS | st.lists(WORDS | LISTS, max_size=5)


@settings(max_examples=50, deadline=None)
@given(REPLIES)
def test_whatever_is_said_all_slots_have_primaries_or_none(said: Any) -> None:
    slots = slots_of([0, LAST, A])
    try:
        slots.replace(said, "asked")
    except ValueError:
        assert set(slots._owners) == {A_ADDRESS}
    assert len(slots._owners) == REDIS_CLUSTER_HASH_SLOTS
    assert set(slots._owners) <= {*slots.primaries, NO_SHARD}


@pytest.mark.parametrize("run_id", IDS)
def test_a_key_is_on_the_slot_on_which_redis_has_it(run_id: str) -> None:
    """Redis counts what is in the first braces, if there is anything."""
    slots = slots_of([0, LAST, A])
    for key in (run_id, Keys().stream(run_id), Keys().record(run_id)):
        slot = key_slot(key.encode(errors="replace"))
        slots.moved(slot, "10.0.0.2", 7002)
        assert slots.owner(key) == B_ADDRESS
        slots.moved(slot, "10.0.0.1", 7001)


# Commands


def slot_of(key: str) -> int:
    return key_slot(key.encode(errors="replace"))


@pytest.mark.parametrize("run_id", [each for each in IDS if not {"{", "}"} & {*each}])
def test_all_keys_of_a_run_and_its_channel_are_on_one_slot(run_id: str) -> None:
    keys = Keys()
    assert len({slot_of(key) for key in (keys.stream(run_id), keys.record(run_id), keys.wake(run_id))}) == 1


@pytest.mark.parametrize("owner", ["host-1:77", "\N{EURO SIGN}"])
def test_the_inbox_and_the_channel_of_a_process_are_on_one_slot(owner: str) -> None:
    keys = Keys()
    assert slot_of(keys.inbox(owner)) == slot_of(keys.process(owner))


async def beside_is_sent(log: RedisLog, sent: Sequence[Command]) -> None:
    """Wait until all is sent that is sent beside, one thing after another."""
    last = ("PERSIST", "last")
    await log._backend.best_effort([last])
    with trio.fail_after(10):
        while last not in sent:  # noqa: ASYNC110  (nobody tells)
            await trio.sleep(0.01)


@shares_a_cluster
async def test_every_command_to_a_cluster_has_its_keys_on_the_slot_of_its_node(monkeypatch: pytest.MonkeyPatch) -> None:
    shared = shared_cluster()
    shared.flushall()
    sent: list[Command] = []
    execute = Cluster.execute

    async def noted(self: Cluster, commands: Any, **how: bool) -> list[Any]:
        sent.extend(commands)
        return await execute(self, commands, **how)

    monkeypatch.setattr(Cluster, "execute", noted)
    async with open_log(shared.url, ttl=60) as log, log.wakeups("owner"):
        assert isinstance(log, RedisLog)
        await log.check()
        started = await log.start(record("keyed"), LEASE, Idempotency("key", "print"))
        assert started.created
        assert not (await log.start(record("other"), LEASE, Idempotency("key", "print"))).created
        for number in range(20):
            await log.start(record(f"r{number}"), LEASE)
        await log.append([batch(1, 2, run_id=f"r{number}") for number in range(20)])
        assert set((await log.renew("owner", {f"r{n}": "epoch" for n in range(20)}, 30.0)).values()) == {
            AppendStatus.OK
        }
        assert (await log.request_cancel("r1", "enough")).status is CancelStatus.REQUESTED
        with trio.fail_after(10):
            while await log.cancel_requests("owner") != {"r1": "enough"}:  # noqa: ASYNC110  (it is sent beside)
                await trio.sleep(0.01)
        await log.cancel_requests("owner")
        assert len(await log.list(limit=30)) == 21
        assert (await log.read("r2", 0)).run.seq == 2
        assert (await log.fetch({"r3": 0}))["r3"] is not None
        assert (await log.get("keyed")).id == "keyed"
        await log.append([batch(3, 4, COMPLETED, run_id="r4"), batch(1, 1, COMPLETED, run_id="keyed")])
        await shared.command("DEL", "{sse:run:r5}:meta", "sse:run:r5", key="sse:run:r5")
        assert (await log.restore(record("r5"), LEASE, 1)).status is not AppendStatus.AWAY
        await log.start(record("dead"), replace(LEASE, seconds=0.001))
        with trio.fail_after(10):
            while await log.reap(lambda: LOST_ENDING) != ["dead"]:  # noqa: ASYNC110  (its lease is a millisecond)
                await trio.sleep(0.01)
        assert await log.cancel_requests("owner") == {}
        forget = call(scripts.FORGET, [Keys().record("r8")], "epoch")
        await log._backend.ask(*forget)
        await beside_is_sent(log, sent)
    used = {scripts.BY_DIGEST[command[1]] for command in sent if command[0] == "EVALSHA"}
    assert used == {*scripts.BY_DIGEST.values()}
    for command in sent:
        keys = await shared.nodes[0].command("COMMAND GETKEYS", *command)
        assert {slot_of(key) for key in keys} == {slot_of(key_of(command))}, command
