"""What the nodes of a cluster reply that is no answer: where to go, or what is wrong with them. Pure functions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, NamedTuple

from redis import exceptions

from penstock.errors import LogUnavailable
from penstock.log.redis.refusals import judged, unavailable, words_of
from penstock.log.redis.slots import key_of, slot_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from penstock.log.redis.servers import Command

Place = tuple[str, int]
"""Host and port."""


class Silent(LogUnavailable):
    """A node has not answered, or would answer so whatever it is asked."""


LEFT: Final = LogUnavailable("the node is no primary any more")
"""The reply of a node that has been replaced meanwhile."""
_REDIRECTIONS: Final = (exceptions.AskError, exceptions.TryAgainError)
"""These say where to go, not what is wrong (`MovedError` is an `AskError`)."""


class Redirected(NamedTuple):
    """Commands that are to be sent again.

    Attributes:
        left: their numbers.
        asks: which of them to a node that is to be told that it is `ASKING`.
        moved: slots that have come to another node, for good.
        wait: some of their keys are on their way.
    """

    left: list[int]
    asks: dict[int, Place]
    moved: list[tuple[int, Place]]
    wait: bool


def judged_at(reply: Any, place: Place, address: str) -> Any:
    """A reply as it is to be taken that came from a node: what is wrong with it is `LogUnavailable`, not raised."""
    if isinstance(reply, exceptions.AskError) and reply.host in {"", "?"}:
        reply.host = place[0]  # it does not know its own
    if not isinstance(reply, exceptions.ResponseError) or isinstance(reply, _REDIRECTIONS) or _is_away_from(reply):
        return reply
    if isinstance(reply, exceptions.ClusterDownError) and "slot not served" in words_of(reply):
        return unavailable(reply, address)
    try:
        return judged(reply, address)
    except LogUnavailable as error:
        return Silent(str(error))


def redirected(commands: Sequence[Command], numbers: Sequence[int], replies: Sequence[Any]) -> Redirected:
    """Which of these commands are to be sent again.

    What comes after one that is, on the same slot, is sent again after it: it may have counted on it.
    """
    found = Redirected([], {}, [], any(map(_is_on_its_way, (replies[n] for n in numbers))))
    slots: set[int] = set()
    for n in numbers:
        reply, slot = replies[n], slot_of(key_of(commands[n]))
        if isinstance(reply, exceptions.MovedError):
            found.moved.append((reply.slot_id, (reply.host, reply.port)))
        elif isinstance(reply, exceptions.AskError):
            found.asks[n] = (reply.host, reply.port)
        elif not _is_on_its_way(reply) and reply is not LEFT and slot not in slots:
            continue
        found.left.append(n)
        slots.add(slot)
    return found


def _is_on_its_way(reply: Any) -> bool:
    return isinstance(reply, exceptions.TryAgainError) or _is_away_from(reply)


def _is_away_from(reply: Any) -> bool:
    """A key has moved away under a script."""
    return isinstance(reply, exceptions.ResponseError) and "non local key" in words_of(reply)
