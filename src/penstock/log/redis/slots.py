"""Which node of a cluster has which slots, as a cluster tells it. Pure, but for being kept up to date."""

from __future__ import annotations

from math import inf
from typing import TYPE_CHECKING, Any, Final

from redis.crc import REDIS_CLUSTER_HASH_SLOTS, key_slot

from penstock.log.redis.urls import address_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.log.redis.backend import Command

NOWHERE: Final = ""
"""The part of a slot that no node is known to have."""


def key_of(command: Command) -> str:
    """The key by whose slot a command finds its node: all keys of one are on the same slot."""
    return str(command[3 if command[0] == "EVALSHA" else 1])


def slot_of(key: str) -> int:
    """The slot of a key or a channel."""
    return int(key_slot(key.encode(errors="replace")))


class Slots:
    """The primaries of a cluster, and their slots."""

    def __init__(self) -> None:
        self._owners = [NOWHERE] * REDIS_CLUSTER_HASH_SLOTS
        self.since = [-inf] * REDIS_CLUSTER_HASH_SLOTS
        """When each slot came to where it is, if that was seen."""
        self.primaries: dict[str, tuple[str, int]] = {}
        """Host and port of each primary, by its address."""
        self.replicas: list[tuple[str, int]] = []

    def owner(self, key: str) -> str:
        """The address of the primary that has a key."""
        return self._owners[slot_of(key)]

    def moved(self, slot: int, host: str, port: int, *, now: float = 0.0) -> bool:
        """A node has said at `now` whose a slot is; whether that was news."""
        address = address_of(host, port)
        news = self._owners[slot] != address
        if news:
            self.since[slot] = now
        self._owners[slot] = address
        self.primaries[address] = (host, port)
        return news

    def replace(self, ranges: Sequence[Any], asked: str, *, now: float = 0.0) -> bool:
        """Take over the reply of `now` to `CLUSTER SLOTS`, of the node whose host is `asked`; whether anything is new.

        Raises:
            ValueError: it is none, or the node knows of no slots.
        """
        owners = [NOWHERE] * REDIS_CLUSTER_HASH_SLOTS
        primaries: dict[str, tuple[str, int]] = {}
        replicas: list[tuple[str, int]] = []
        try:
            for first, last, primary, *others in ranges:
                host, port = _place(primary, asked)
                primaries[address_of(host, port)] = (host, port)
                owners[first : last + 1] = [address_of(host, port)] * (last + 1 - first)
                replicas += [_place(other, asked) for other in others]
        except (TypeError, ValueError, IndexError, AttributeError) as error:
            raise ValueError("the reply to CLUSTER SLOTS cannot be read") from error
        if not primaries or len(owners) != REDIS_CLUSTER_HASH_SLOTS:
            raise ValueError("it knows of no slots: the cluster has not been made yet, or it has been left out")
        news = owners != self._owners
        if news and self.primaries:
            for slot, (owner, before) in enumerate(zip(owners, self._owners, strict=True)):
                if owner != before:
                    self.since[slot] = now
        self._owners, self.primaries, self.replicas = owners, primaries, replicas
        return news


def _place(node: Sequence[Any], asked: str) -> tuple[str, int]:
    """Host and port of a node; one that does not know its own host has been asked at it."""
    host = node[0].decode() if node[0] else ""
    return (asked if host in {"", "?"} else host), int(node[1])
