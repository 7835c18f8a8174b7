"""What Redis holds: the names of the keys, a run's record as a hash, the replies of scripts. Pure functions.

With the prefix `sse:run:` the keys are

    sse:run:ID            the entries: a stream whose ids are `SEQ-0`, with the fields seq_id, data, timestamp, complete
    {sse:run:ID}:meta     the record: a hash; the braces put it on the stream's own cluster slot
    {sse:run:ID}:wake     the channel on which the last seq is published after every append
    sse:runs              the runs by the time of their creation, for `list`
    sse:live              the runs by the end of their lease: where a reaper looks first; a cluster has several of both,
                          `sse:runs:{N}`, `sse:live:{N}`, see `indexes.py`
    sse:idem:KEY          an idempotency key: the fingerprint of its request, and the run
    sse:proc:OWNER        the channel of a process; `{sse:proc:OWNER}:inbox` has the cancel requests for its runs

Times are seconds since the Unix epoch in records, milliseconds in entries and leases.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from penstock.errors import ConfigurationError, LogFull, LogUnavailable
from penstock.log import Appended, AppendStatus, Entry, Page
from penstock.log.redis.errors import is_away
from penstock.runs import Ending, Run, RunError, RunStatus

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from penstock.log import Idempotency


@dataclass(frozen=True, slots=True)
class Keys:
    """The names of all keys and channels: those of entries begin with `prefix`, all others with it without `run:`."""

    prefix: str = "sse:run:"

    def __post_init__(self) -> None:
        # Braces decide over the slot in a cluster.
        if not isinstance(self.prefix, str) or not self.prefix.endswith("run:") or {"{", "}"} & {*self.prefix}:
            raise ConfigurationError(f"prefix ends with 'run:' and has no braces in it, unlike {self.prefix!r}")

    @property
    def _base(self) -> str:
        return self.prefix.removesuffix("run:")

    def stream(self, run_id: str) -> str:
        return self.prefix + run_id

    def record(self, run_id: str) -> str:
        return f"{{{self.prefix}{run_id}}}:meta"

    def wake(self, run_id: str) -> str:
        return f"{{{self.prefix}{run_id}}}:wake"

    def run_of_channel(self, channel: str) -> str:
        return channel[len(self.prefix) + 1 : -len("}:wake")]

    def runs(self, number: int | None = None) -> str:
        return f"{self._base}runs" + ("" if number is None else f":{{{number}}}")

    def live(self, number: int | None = None) -> str:
        return f"{self._base}live" + ("" if number is None else f":{{{number}}}")

    def idempotency(self, key: str) -> str:
        return f"{self._base}idem:{key}"

    def process(self, owner: str) -> str:
        return f"{self._base}proc:{owner}"

    def inbox(self, owner: str) -> str:
        return f"{{{self._base}proc:{owner}}}:inbox"


def ms(seconds: float) -> int:
    """Milliseconds, at least one, and no more than Redis can count."""
    return max(1, min(round(seconds * 1000), 2**53))


def touch(key: str) -> tuple[str, str]:
    """A write that changes nothing, to a key without a TTL: it finds out whether Redis takes writes."""
    return "PERSIST", key


def fields_of(run: Run, owner: str, idempotency: Idempotency | None = None) -> list[str]:
    """The fields and values of a new record, without those that a script adds."""
    fields = {
        "owner": owner,
        "producer": run.producer,
        "status": run.status.value,
        "seq": str(run.seq),
        "created_at": repr(run.created_at),
        "metadata": json.dumps(dict(run.metadata)),
    }
    if run.started_at:
        fields["started_at"] = repr(run.started_at)
    if idempotency is not None:
        fields["idempotency"] = idempotency.key
        fields["fingerprint"] = idempotency.fingerprint
        if not run.started_at:
            fields["pending"] = "1"
    return [text for pair in fields.items() for text in pair]


def fields_of_ending(ending: Ending | None) -> list[str]:
    """The fields and values that an ending changes in a record, `status` first."""
    if ending is None:
        return []
    fields = {"status": ending.status.value, "stop_reason": ending.stop_reason}
    if ending.error is not None:
        fields["error"] = json.dumps(ending.error.to_json())
    if ending.cancel_reason is not None:
        fields["cancel_reason"] = ending.cancel_reason
    return [text for pair in fields.items() for text in pair]


def record_of(flat: Sequence[bytes]) -> dict[str, str]:
    texts = [each.decode(errors="replace") for each in flat]
    return dict(zip(texts[::2], texts[1::2], strict=True))


def run_of(run_id: str, record: Mapping[str, str]) -> Run:
    ended_at = record.get("ended_at")
    return Run(
        run_id,
        record["producer"],
        RunStatus(record["status"]),
        record.get("stop_reason"),
        record.get("cancel_reason"),
        RunError(**json.loads(record["error"])) if "error" in record else None,
        int(record["seq"]),
        float(record["created_at"]),
        float(record.get("started_at", 0)),
        None if ended_at is None else float(ended_at),
        json.loads(record["metadata"]),
    )


def entries_of(flat: Sequence[bytes], run: Run) -> list[Entry]:
    """The entries of a page (seq, data, timestamp, seq ...). The last one of a run that has ended is terminal."""
    last = run.seq if run.status.terminal else 0
    return [
        Entry(seq, b"id: %d\n%b" % (seq, data), int(stamp), seq == last)
        for seq, data, stamp in zip(map(int, flat[::3]), flat[1::3], flat[2::3], strict=True)
    ]


LOST: Final = frozenset({AppendStatus.FENCED, AppendStatus.ENDED, AppendStatus.REFUSED})
"""After these replies a run does not belong to this process any more."""


def text_of(raw: bytes | None) -> str | None:
    return None if raw is None else raw.decode(errors="replace")


def appended_of(reply: Any) -> Appended:
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
    """The record of a run from the reply to `HGETALL`; None if there is none, or it cannot be read."""
    if isinstance(reply, LogUnavailable):
        raise reply
    if isinstance(reply, Exception) or not reply:
        return None
    try:
        return run_of(run_id, record_of(reply))
    except (KeyError, TypeError, ValueError):
        return None


def reason_of(text: str) -> str | None:
    """The reason of a cancel request in an inbox; None if it has none, or it cannot be read."""
    try:
        reason = json.loads(text)
    except ValueError:
        return None
    return reason if isinstance(reason, str) else None


def page_of(run_id: str, after: int, reply: Any) -> Page | None:
    """A page of a run; None if there is no such run, or it cannot be read."""
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
