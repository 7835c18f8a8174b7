"""The event log: it stores run records and entries; `EventLog` says what any log must guarantee.

A log keeps, for every run, a record (`Run`) and its entries 1, 2, 3 ... n without a gap. It consists of one or more
*shards*, which can be unreachable independently of each other (the nodes of a cluster). An unreachable shard fails the
operations on its own runs only. A run may move to another shard.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from enum import Enum, auto
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Protocol, runtime_checkable

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping, Sequence
    from contextlib import AbstractAsyncContextManager

    from penstock.runs import Ending, Run, RunStatus

PAGE_ENTRIES: Final = 500  # the default limit of the entries of one page
PAGE_BYTES: Final = 256 * 1024
"""The default limit of the bytes of one page; a first entry that is larger is a page by itself."""


class Entry(NamedTuple):
    """An event as the log stores it.

    Attributes:
        seq: 1, 2, 3 ... within its run.
        wire: the bytes on the wire: the `id` line, then `data`. Encoded once; all readers share them.
        timestamp: when the entry was written, in milliseconds since the Unix epoch.
        terminal: whether it is the last entry of its run.
    """

    seq: int
    wire: bytes
    timestamp: int
    terminal: bool = False

    @classmethod
    def of(cls, seq: int, data: bytes, timestamp: int, *, terminal: bool = False) -> Entry:
        """Return an entry with these `seq`, `timestamp` and `terminal`; `data` is its block, without an `id` line."""
        return cls(seq, b"id: %d\n%b" % (seq, data), timestamp, terminal)

    @property
    def data(self) -> bytes:
        """The encoded SSE block without its `id` line."""
        return self.wire[self.wire.index(b"\n") + 1 :]


@dataclass(frozen=True, slots=True)
class Lease:
    """The supervisor that owns a run, and the seconds without a renewal after which the run counts as lost.

    Each append must carry `epoch`, an unguessable token that is only compared for equality.
    """

    owner: str
    epoch: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A key under which a start happens once; `fingerprint` distinguishes a repeated request from another one."""

    key: str
    fingerprint: str

    @classmethod
    def of(cls, key: str, request: Any) -> Idempotency:
        """Return the key, a str that is not empty, with the fingerprint of the request, which may be any object."""
        if not isinstance(key, str) or not key:
            raise ValueError(f"an idempotency key is a str that is not empty, not {key!r}")
        try:
            text = json.dumps(request, sort_keys=True, default=repr)
        except (TypeError, ValueError):  # dict keys that cannot be sorted, or a cycle
            text = repr(request)
        return cls(key, sha256(text.encode("utf-8", "surrogatepass")).hexdigest())


@dataclass(frozen=True, slots=True)
class Started:
    """The record of a started run; `created` is False if the idempotency key belonged to a run that existed already."""

    run: Run
    created: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """Entries of one run, at least one, with consecutive seqs; and the token of its owner.

    `ending` says how the run ends, if the last entry is terminal. Even a full log stores a `final` batch, which belongs
    to the ending of the run.
    """

    run_id: str
    epoch: str
    entries: Sequence[Entry]
    ending: Ending | None = None
    final: bool = False


class AppendStatus(Enum):
    """The result of a batch."""

    OK = auto()  # the batch is stored, perhaps since an earlier attempt
    GONE = auto()  # the log has no record of the run
    FENCED = auto()  # the run has another epoch: it has a new owner, or another process has ended it
    ENDED = auto()  # the run has ended with another batch
    HOLE = auto()  # entries are missing between the last stored one, `seq`, and the first one of the batch
    CANCELLED = auto()  # the ending is `completed`, and the record has a cancel request
    FULL = auto()  # the log has no room at the moment; the batch may be sent again
    AWAY = auto()
    """The run's shard is unreachable, unlike others, or the run is moving. The batch may be stored; send it again."""
    REFUSED = auto()  # the log cannot store this run, now or later; `words` says why


@dataclass(frozen=True, slots=True)
class Appended:
    """The reply to one batch: its result, and the highest seq stored of the run, as far as it is known.

    `cancelled` says whether the record has a cancel request, and `cancel` its reason; `words` why a batch was refused.
    """

    status: AppendStatus
    seq: int = 0
    cancelled: bool = False
    cancel: str | None = None
    words: str = ""


@dataclass(frozen=True, slots=True)
class LostEnding:
    """How a reaper ends a lost run: the encoded blocks to append, of which the last is terminal, and the ending."""

    blocks: Sequence[bytes]
    ending: Ending


@dataclass(frozen=True, slots=True)
class Page:
    """A part of a run.

    Attributes:
        run: the record, read in the same step: so "nothing yet" and "nothing more" differ.
        entries: the entries that follow the cursor, in order, as far as the limits allow.
        oldest_seq: the seq of the first entry after the cursor that the log has, or will have: `after + 1`, unless that
            was trimmed, or the run has not come so far (then `run.seq + 1`).
    """

    run: Run
    entries: Sequence[Entry]
    oldest_seq: int


class CancelStatus(Enum):
    """The result of a cancel request."""

    REQUESTED = auto()
    """The run was running; the request is stored, and its owner is notified."""
    REPEATED = auto()
    """An earlier request is stored already, and stays as it is."""
    ENDED = auto()
    """The run had ended; nothing has changed."""


@dataclass(frozen=True, slots=True)
class CancelReply:
    """The reply to a cancel request: the `status` of the request, and the `run`'s record after it."""

    status: CancelStatus
    run: Run


@dataclass(frozen=True, slots=True)
class Notification:
    """What has happened since the notification before."""

    moved: Mapping[str, int]
    """The last seq of each subscribed run that has new entries; above any seq if the run is gone."""
    cancel: bool = False  # whether a cancel request has arrived
    reconnected: bool = False  # whether the log was unreachable, and may have lost notifications


class Notifications(Protocol):
    """Notifies one supervisor of new entries of the runs that it follows, and of cancels of the runs that it owns.

    A notification carries no data, so a lost one does no harm.
    """

    async def subscribe(self, run_id: str) -> None:
        """Subscribe to a run: `wait` reports every append to it that follows the return of this call."""

    def unsubscribe(self, run_id: str) -> None:
        """End the subscription to a run. Not a checkpoint."""

    async def wait(self) -> Notification:
        """Wait until something has happened, and return all of it. In an outage of the log this waits, too."""


@runtime_checkable
class EventLog(Protocol):
    """The protocol of an event log, which a store in another process can keep: each operation is one atomic step there.

    Every async method is a checkpoint, and may raise `LogUnavailable`. A cancelled call has either happened as a whole
    or not at all.
    """

    def shard(self, run_id: str) -> str:
        """Return the name of the shard that has this run, as far as it is known. Not a checkpoint."""

    def shards(self) -> Collection[str]:
        """Return the names of all shards, as far as they are known; there is at least one. Not a checkpoint."""

    async def start(self, run: Run, lease: Lease, idempotency: Idempotency | None = None) -> Started:
        """Create the record `run` under the `lease` of its owner; every reader finds it after the return.

        With an `idempotency` key, a repeated request creates nothing.

        Raises:
            RunExists: the run id is in use.
            IdempotencyConflict: the key belongs to another request.
        """

    async def append(self, batches: Sequence[Batch]) -> Sequence[Appended]:
        """Store batches in one round trip, each as a whole or not at all, and return one reply for each, in order.

        Several batches may belong to one run, each following the one before. If one of them is not stored, those that
        follow it are not stored either. A batch that is stored already, because it is sent again, is `OK`. The terminal
        entry and the terminal status are stored in one step, and the first ones win.

        Raises:
            LogUnavailable: all shards concerned are unreachable. If only some are, their batches are `AWAY`, and so are
                those of runs that are moving to another shard.
        """

    async def read(
        self, run_id: str, after: int, *, max_entries: int = PAGE_ENTRIES, max_bytes: int = PAGE_BYTES
    ) -> Page:
        """Return up to `max_entries` entries of the run `run_id` that follow the seq `after`, the reader's cursor.

        They have up to `max_bytes`; the first one is returned even if it is larger. Raises `RunNotFound`.
        """

    async def fetch(self, positions: Mapping[str, int]) -> Mapping[str, Page | None]:
        """Read a page of many runs (run id → cursor) in one round trip; the page of a run that is gone is None.

        Runs whose shard is unreachable are missing from the result, unless all are (then this raises).
        """

    async def get(self, run_id: str) -> Run:
        """Return the record of a run. Raises `RunNotFound` if there is no such run."""

    async def list(self, *, limit: int = 50, status: RunStatus | None = None) -> Sequence[Run]:
        """Return up to `limit` of the newest records, newest first: all, or only those with this `status`."""

    async def request_cancel(self, run_id: str, reason: str | None) -> CancelReply:
        """Store a cancel request with the record of a run, which then accepts no `completed` ending; notify the owner.

        The `reason`, if there is one, is for the record and for the producer. Raises `RunNotFound` if there is no run
        `run_id`.
        """

    async def cancel_requests(self, owner: str) -> Mapping[str, str | None]:
        """Take the cancel requests for the runs of `owner` that arrived since the last call: run id → reason."""

    async def renew(self, owner: str, epochs: Mapping[str, str], seconds: float) -> Mapping[str, AppendStatus]:
        """Renew the leases of the runs of `owner`, by their `epochs`, for `seconds` from now on.

        The replies are `OK`, `FENCED`, `ENDED` or `GONE`. Runs whose shard is unreachable are missing from the result,
        unless all are (then this raises).
        """

    async def restore(self, run: Run, lease: Lease, oldest: int) -> Appended:
        """Write a record again from its owner's copy, after the log has lost it or some of its last entries.

        `run` is the record as it was when the run started, `lease` is that of its owner, and `oldest` is the seq of the
        oldest entry that the owner still has.

        Returns:
            `OK`: the last stored entry is `seq`; the owner appends what follows it. `HOLE`: entries before `oldest` are
            lost, so the log has dropped all entries of the run, and `seq` is `oldest - 1`. Others: as for an append.
        """

    async def reap(
        self,
        lost_ending: Callable[[], LostEnding],
        *,
        shard: str | None = None,
        ready: Callable[[str], bool] = lambda shard: True,  # noqa: ARG005
    ) -> Sequence[str]:
        """End the runs of one `shard`, or of all, whose lease has expired, replacing their epochs; return their ids.

        `lost_ending` says for each run how it ends, `ready` whether those of a shard may be ended. Each ends in a step
        of its own, so a cancelled call has ended some of them.
        """

    def wakeups(self, owner: str) -> AbstractAsyncContextManager[Notifications]:
        """Open the notifications of the supervisor named `owner`, for as long as the block lasts."""

    async def check(self, shard: str | None = None) -> None:
        """Raise `LogUnavailable` unless the shard (without a name: any shard) can be reached and accepts writes."""
