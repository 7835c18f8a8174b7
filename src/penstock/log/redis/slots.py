"""Which node of a cluster has which slots, and the key by which a command finds its slot. Pure."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, Final

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from penstock.log.redis.urls import address_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.log.redis.scripts import Script

Command = tuple[Any, ...]  # a command and its arguments
Place = tuple[str, int]  # the host and the port of a node

NO_SHARD: Final = ""  # the shard of a slot that no node is known to have


def call(script: Script, keys: Sequence[str], *args: Any) -> Command:
    return ("EVALSHA", script.digest, len(keys), *keys, *args)


def key_of(command: Command) -> str:
    """The key by whose slot a command finds its node: all keys of one command are on the same slot."""
    return str(command[3 if command[0] == "EVALSHA" else 1])


def slot_of(key: str) -> int:
    return int(key_slot(key.encode(errors="replace")))


class Slots:
    """The primaries of a cluster by their addresses, the slots that each has, and the replicas."""

    def __init__(self) -> None:
        self._owners = [NO_SHARD] * REDIS_CLUSTER_HASH_SLOTS
        self.since = [-inf] * REDIS_CLUSTER_HASH_SLOTS  # when each slot came to its node, if that was seen
        self.primaries: dict[str, Place] = {}
        self.replicas: list[Place] = []

    def owner(self, key: str) -> str:
        return self._owners[slot_of(key)]

    def moved(self, slot: int, host: str, port: int, *, now: float = 0.0) -> bool:
        """Record which node has a slot, as a node said at `now`; whether the slot has changed its node."""
        address = address_of(host, port)
        changed = self._owners[slot] != address
        if changed:
            self.since[slot] = now
        self._owners[slot] = address
        self.primaries[address] = (host, port)
        return changed

    def replace(self, ranges: Sequence[Any], asked: str, *, now: float = 0.0) -> bool:
        """Take over a reply to `CLUSTER SLOTS` of time `now`; whether any slot has changed its node.

        `asked` stands for a host that the reply leaves out. ValueError: it cannot be read, or names no slots.
        """
        owners = [NO_SHARD] * REDIS_CLUSTER_HASH_SLOTS
        primaries: dict[str, Place] = {}
        replicas: list[Place] = []
        try:
            for first, last, primary, *others in ranges:
                host, port = _place(primary, asked)
                primaries[address_of(host, port)] = (host, port)
                owners[first : last + 1] = [address_of(host, port)] * (last + 1 - first)
                replicas += [_place(other, asked) for other in others]
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError("the reply to CLUSTER SLOTS cannot be read") from error
        if not primaries or len(owners) != REDIS_CLUSTER_HASH_SLOTS:
            raise ValueError("it knows no slots: the cluster has not been formed yet, or the node has been removed")
        changed = owners != self._owners
        if changed and self.primaries:
            for slot, (owner, before) in enumerate(zip(owners, self._owners, strict=True)):
                if owner != before:
                    self.since[slot] = now
        self._owners, self.primaries, self.replicas = owners, primaries, replicas
        return changed


def _place(node: Sequence[Any], asked: str) -> Place:
    host = node[0].decode() if node[0] else ""
    return (asked if host in {"", "?"} else host), int(node[1])
