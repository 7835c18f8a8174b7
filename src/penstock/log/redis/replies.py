"""What the scripts reply, read. Pure functions."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

from penstock.errors import LogFull, LogUnavailable
from penstock.log import Appended, AppendStatus, Page
from penstock.log.redis.records import entries_of, record_of, run_of
from penstock.log.redis.refusals import is_away

if TYPE_CHECKING:
    from penstock.runs import Run

LOST: Final = frozenset({AppendStatus.FENCED, AppendStatus.ENDED, AppendStatus.REFUSED})
"""After these replies a run is its owner's no more."""


def checked(reply: Any) -> Any:
    """A reply that is not a refusal.

    Raises:
        LogUnavailable: it is one.
    """
    if isinstance(reply, LogUnavailable):
        raise reply
    if isinstance(reply, Exception):
        raise LogUnavailable(f"Redis refuses a command: {reply}") from reply
    return reply


def text_of(word: bytes | None) -> str | None:
    """Words that somebody has written, readable or not."""
    return None if word is None else word.decode(errors="replace")


def appended_of(reply: Any) -> Appended:
    """The reply to one batch, or to a restore."""
    if is_away(reply):
        return Appended(AppendStatus.AWAY, words=str(reply))
    if isinstance(reply, LogFull):
        return Appended(AppendStatus.FULL, words=str(reply))
    if isinstance(reply, Exception):
        return Appended(AppendStatus.REFUSED, words=str(reply))
    status, seq, *cancel = reply
    cancelled, reason = cancel or (b"", None)
    return Appended(AppendStatus[status.decode()], int(seq), bool(cancelled), text_of(reason))


def found(run_id: str, reply: Any) -> Run | None:
    """The record of a run; None if there is none, or what lies there is none that can be read."""
    if isinstance(reply, LogUnavailable):
        raise reply
    if isinstance(reply, Exception) or not reply:
        return None
    try:
        return run_of(run_id, record_of(reply))
    except (KeyError, TypeError, ValueError):
        return None


def reason_of(word: str) -> str | None:
    """The reason of a cancel request in an inbox; None if it has none, or none that can be read."""
    try:
        reason = json.loads(word)
    except ValueError:
        return None
    return reason if isinstance(reason, str) else None


def page_of(run_id: str, after: int, reply: Any) -> Page | None:
    """A page of a run; None if there is no such run, or nothing that can be read."""
    flat, page = ([], []) if isinstance(reply, Exception) else reply
    run = found(run_id, reply if isinstance(reply, LogUnavailable) else flat)
    if run is None:
        return None
    try:
        entries = entries_of(page, run)
    except (TypeError, ValueError):
        return None
    if entries:
        return Page(run, entries, entries[0].seq)
    return Page(run, entries, run.seq + 1 if after < run.seq else min(after, run.seq) + 1)
