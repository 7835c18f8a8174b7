"""The event log: it stores run records and entries; `EventLog` says what any log must guarantee.

A log keeps, for every run, a record (`Run`) and its entries 1, 2, 3 ... n without a gap. `MemoryLog` implements
`EventLog` in this process. A log in another process can implement it as well: every operation is one that such a store
can do in one atomic step.

* **append** takes the batches of many runs in one round trip. Each batch is stored as a whole or not at all. It carries
  the owner's *epoch*, an unguessable token that is only compared for equality, and the seq of its first entry, so that
  a batch that is sent twice is stored once. The terminal entry and the terminal status are stored in one step, and the
  first ones win.
* **read** returns a page after a cursor together with the run's record, so "nothing yet" and "nothing more" differ.
* **Leases**: an owner renews its leases. A process that finds an expired lease ends the run as lost, and replaces the
  epoch in the same step.
* **Cancel requests** are stored with the record, which then accepts no `completed` ending.
* **Notifications carry no data**: they name the runs that have new entries, and their last seqs. A lost notification
  does no harm.
* **restore** writes a run again that the log has lost (by a failover, or a restart without its data) from its owner's
  copy.

A log consists of one or more *shards*, which can be unreachable independently of each other (the nodes of a cluster).
An unreachable shard fails the operations on its own runs only. A run may move to another shard.
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

PAGE_ENTRIES: Final = 500
"""The default limit of the entries of one page."""
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
        """Return the entry of an encoded SSE block.

        Args:
            seq: the seq of the entry.
            data: one whole block, without an `id` line.
            timestamp: when it was written, in milliseconds since the Unix epoch.
            terminal: whether it is the last entry of its run.
        """
        return cls(seq, b"id: %d\n%b" % (seq, data), timestamp, terminal)

    @property
    def data(self) -> bytes:
        """The encoded SSE block without its `id` line."""
        return self.wire[self.wire.index(b"\n") + 1 :]


@dataclass(frozen=True, slots=True)
class Lease:
    """The owner of a run, and the time for which it is the owner without a renewal.

    Attributes:
        owner: the supervisor that executes the run; cancel requests are addressed to it.
        epoch: the token that each append must carry.
        seconds: the time without a renewal after which the run counts as lost.
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
        """Return the key with the fingerprint of the request, which may be any object.

        Raises:
            ValueError: the key is not a str, or is empty.
        """
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
    """The entries of one run in one append.

    Attributes:
        run_id: the run.
        epoch: the token of its owner.
        entries: at least one, with consecutive seqs.
        ending: how the run ends, if the last entry is terminal.
        final: whether the batch belongs to the ending of the run, which even a full log stores.
    """

    run_id: str
    epoch: str
    entries: Sequence[Entry]
    ending: Ending | None = None
    final: bool = False


class AppendStatus(Enum):
    """The result of a batch."""

    OK = auto()
    """The batch is stored, perhaps since an earlier attempt."""
    GONE = auto()
    """The log has no record of the run."""
    FENCED = auto()
    """The run has another epoch: it has a new owner, or another process has ended it."""
    ENDED = auto()
    """The run has ended with another batch."""
    HOLE = auto()
    """Entries are missing between the last stored one, `seq`, and the first one of the batch."""
    CANCELLED = auto()
    """The ending is `completed`, and the record has a cancel request."""
    FULL = auto()
    """The log has no room at the moment; the batch may be sent again."""
    AWAY = auto()
    """The shard of the run is unreachable, while others are not, or the run is moving to another shard.

    The batch may be stored, and is sent again.
    """
    REFUSED = auto()
    """The log cannot store this run, now or later; `words` says why."""


@dataclass(frozen=True, slots=True)
class Appended:
    """The reply to one batch.

    Attributes:
        status: the result of the batch.
        seq: the highest seq stored of the run, as far as it is known.
        cancelled: whether the record has a cancel request.
        cancel: the reason of the cancel request, if it has one.
        words: the error message, if the batch was refused.
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
    """The result of a read.

    Attributes:
        run: the record, read in the same step.
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
    """The reply to a cancel request.

    Attributes:
        status: the result of the request.
        run: the record after it.
    """

    status: CancelStatus
    run: Run


@dataclass(frozen=True, slots=True)
class Notification:
    """What has happened since the notification before.

    Attributes:
        moved: the last seq of each subscribed run that has new entries; above any seq if the run is gone.
        cancel: whether a cancel request has arrived.
        reconnected: whether the log was unreachable, and may have lost notifications.
    """

    moved: Mapping[str, int]
    cancel: bool = False
    reconnected: bool = False


class Notifications(Protocol):
    """Notifies one supervisor of new entries of the runs that it follows, and of cancels of the runs that it owns."""

    async def subscribe(self, run_id: str) -> None:
        """Subscribe to a run: `wait` reports every append to it that follows the return of this call."""

    def unsubscribe(self, run_id: str) -> None:
        """End the subscription to a run. Not a checkpoint."""

    async def wait(self) -> Notification:
        """Wait until something has happened, and return all of it. In an outage of the log this waits, too."""


@runtime_checkable
class EventLog(Protocol):
    """The protocol of an event log.

    Every async method is a checkpoint, and may raise `LogUnavailable`. A cancelled call has either happened as a whole
    or not at all.
    """

    def shard(self, run_id: str) -> str:
        """Return the name of the shard that has this run, as far as it is known. Not a checkpoint."""

    def shards(self) -> Collection[str]:
        """Return the names of all shards, as far as they are known; there is at least one. Not a checkpoint."""

    async def start(self, run: Run, lease: Lease, idempotency: Idempotency | None = None) -> Started:
        """Create the record of a run; every reader finds it after the return.

        Args:
            run: the record.
            lease: the lease of its owner.
            idempotency: the key of the request; a repeated request creates nothing.

        Raises:
            RunExists: the run id is in use.
            IdempotencyConflict: the key belongs to another request.
        """

    async def append(self, batches: Sequence[Batch]) -> Sequence[Appended]:
        """Store batches in one round trip, and return one reply for each, in order.

        Several batches may belong to one run, each following the one before. If one of them is not stored, those that
        follow it are not stored either. A batch that is stored already, because it is sent again, is `OK`.

        Raises:
            LogUnavailable: all shards concerned are unreachable. If only some are, their batches are `AWAY`, and so are
                those of runs that are moving to another shard.
        """

    async def read(
        self, run_id: str, after: int, *, max_entries: int = PAGE_ENTRIES, max_bytes: int = PAGE_BYTES
    ) -> Page:
        """Return a page of the entries that follow a cursor.

        Args:
            run_id: the run.
            after: the cursor: the seq of the last entry that the reader has.
            max_entries: the limit of the entries of the page.
            max_bytes: the limit of their bytes; the first entry is returned even if it is larger.

        Raises:
            RunNotFound: there is no such run.
        """

    async def fetch(self, positions: Mapping[str, int]) -> Mapping[str, Page | None]:
        """Read a page of many runs (run id → cursor) in one round trip; the page of a run that is gone is None.

        Runs whose shard is unreachable are missing from the result, unless all are (then this raises).
        """

    async def get(self, run_id: str) -> Run:
        """Return the record of a run.

        Raises:
            RunNotFound: there is no such run.
        """

    async def list(self, *, limit: int = 50, status: RunStatus | None = None) -> Sequence[Run]:
        """Return the newest records, newest first.

        Args:
            limit: the most records to return.
            status: only records with this status; None: all.
        """

    async def request_cancel(self, run_id: str, reason: str | None) -> CancelReply:
        """Store a cancel request with the record, and notify the owner.

        Args:
            run_id: the run.
            reason: the reason, for the record and for the producer; None if there is none.

        Raises:
            RunNotFound: there is no such run.
        """

    async def cancel_requests(self, owner: str) -> Mapping[str, str | None]:
        """Take the cancel requests for the runs of `owner` that arrived since the last call: run id → reason."""

    async def renew(self, owner: str, epochs: Mapping[str, str], seconds: float) -> Mapping[str, AppendStatus]:
        """Renew the leases of runs; the replies are `OK`, `FENCED`, `ENDED` or `GONE`.

        Runs whose shard is unreachable are missing from the result, unless all are (then this raises).

        Args:
            owner: the supervisor that owns the runs.
            epochs: the epoch of each run.
            seconds: the time from now on for which the leases hold.
        """

    async def restore(self, run: Run, lease: Lease, oldest: int) -> Appended:
        """Write a run's record again after the log has lost it, or some of its last entries.

        Args:
            run: the record as it was when the run started.
            lease: the lease of its owner. If the log has a record with another epoch, the reply is `FENCED`.
            oldest: the seq of the oldest entry that the owner still has.

        Returns:
            `OK`: the last stored entry is `seq`; the owner appends what follows it. `HOLE`: entries before `oldest` are
            lost, so the log has dropped all entries of the run, and `seq` is `oldest - 1`. `FENCED`, `ENDED`, `FULL`:
            as for an append.
        """

    async def reap(
        self,
        lost_ending: Callable[[], LostEnding],
        *,
        shard: str | None = None,
        ready: Callable[[str], bool] = lambda shard: True,  # noqa: ARG005
    ) -> Sequence[str]:
        """End the runs whose lease has expired, and return their ids.

        Each run ends in a step of its own, so a cancelled call has ended some of them.

        Args:
            lost_ending: called for each run; returns how it ends.
            shard: only runs of this shard; None: of all shards.
            ready: says whether the runs of a shard may be ended.
        """

    def wakeups(self, owner: str) -> AbstractAsyncContextManager[Notifications]:
        """Open the notifications of the supervisor named `owner`, for as long as the block lasts."""

    async def check(self, shard: str | None = None) -> None:
        """Return if a shard can be reached and accepts writes; without a name, if any shard does.

        Raises:
            LogUnavailable: it cannot be reached, or accepts no writes.
        """
