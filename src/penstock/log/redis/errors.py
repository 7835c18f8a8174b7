"""What Redis refuses, and whether that concerns one command or the whole server. Pure functions."""

from __future__ import annotations

from typing import Any, Final

from redis import exceptions

from penstock.errors import LogFull, LogUnavailable

_TOO_OLD: Final = "it does not know a command; penstock needs Redis 6.2 or later, and 7.0 for a cluster"
_NO_PASSWORD: Final = "it wants a password; name it in the URL: redis://:PASSWORD@HOST"  # noqa: S105
ADVICE: Final = {
    "READONLY": "it is a read-only replica; name its primary in the URL",
    "WRONGPASS": "it refuses the user or the password in the URL",
    "NOAUTH": _NO_PASSWORD,
    "Authentication required": _NO_PASSWORD,
    "unauthenticated": _NO_PASSWORD,
    "NOPERM": "the user in the URL may not do this",
    "LOADING": "it is loading its data",
    "MASTERDOWN": "it is a replica that has lost its primary",
    "NOREPLICAS": "it has fewer replicas than it wants before it takes a write",
    "MISCONF": "it cannot save its data, and takes no writes",
    "BUSY": "it is busy with another program's script",
    "CLUSTERDOWN": "its cluster is down",
    "cluster is down": "its cluster is down",
    "MOVED": "it is a node of a cluster, and not the one for this key; write redis+cluster:// for it",
    "cluster support disabled": "it is no node of a cluster; write redis:// for it",
    "unknown command": _TOO_OLD,
    "Unknown Redis command": _TOO_OLD,
}
"""Signs in a refusal that any command would meet, and what is wrong with such a server."""


def is_away(reply: object) -> bool:
    """Whether a reply says that a server cannot be reached, or is in no state to answer."""
    return isinstance(reply, LogUnavailable) and not isinstance(reply, LogFull)


def checked(reply: Any, address: str = "") -> Any:
    """A reply; a refusal raises `LogUnavailable`."""
    if isinstance(reply, LogUnavailable):
        raise reply
    if isinstance(reply, Exception):
        where = f" at {address}" if address else ""
        raise LogUnavailable(f"Redis{where} refuses a command: {reply}") from reply
    return reply


def classify(error: exceptions.ResponseError, address: str) -> Exception:
    """The reply to a command that was refused: `LogFull`, or the refusal as it came.

    It raises `LogUnavailable` if the server would have refused any command.
    """
    message = message_of(error)
    if "OOM" in message:
        return LogFull(f"Redis at {address} is full: its maxmemory is reached, and it may evict nothing")
    if any(sign in message for sign in ADVICE):
        raise unavailable(error, address)
    return error


def unavailable(error: Exception, address: str) -> LogUnavailable:
    message = message_of(error)
    advice = next((advice for sign, advice in ADVICE.items() if sign in message), None)
    if advice is None and isinstance(error, exceptions.AuthenticationError):
        advice = ADVICE["WRONGPASS"]
    if advice is not None:
        return LogUnavailable(f"Redis at {address} cannot serve: {advice}")
    return LogUnavailable(f"cannot reach Redis at {address}: {message}")


def message_of(error: Exception) -> str:
    """The text of a refusal with its sign: in front, or somewhere inside (Redis 6.2, and refusals of scripts)."""
    message = f"{getattr(error, 'status_code', None) or ''} {error}".strip().rstrip(".")
    return message or type(error).__name__
