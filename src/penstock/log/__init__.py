"""The event log: what stores entries and run records, and what any store must promise.

A log keeps, for every run, a record (`Run`) and its entries 1, 2, 3 ... n without a gap. `EventLog` is the protocol
that `MemoryLog` implements; a log that lives in another process fits it just as well, because every operation is one
that such a store can do in one atomic step:

* **append** takes many runs' batches at once (one round trip). Each batch stands alone: all of it is stored, or
  nothing. It carries the owner's *epoch*, an unguessable token that is only ever compared for equality, and the seq of
  its first entry, so that a batch sent twice is stored once. The terminal entry and the terminal status are one step;
  the first one wins.
* **read** returns a page after a cursor, together with the run's record: "nothing yet" and "nothing more" differ.
* **leases**: an owner renews; whoever finds a lease run out ends the run as lost, and replaces the epoch in that step.
* **cancel requests** are kept with the record, and a `completed` ending is refused while one is kept.
* **wake-ups carry no data**: they say which run has moved, and how far. Losing one must do no harm.
* **restore** puts back what a log has lost (a failover, a restart without its data) from its owner's copy.

A log may have *parts* that can be out of reach each on its own (the nodes of a cluster): what is asked of one of them
then fails, and nothing else does. The part of a run may change.
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
"""The most entries that one page of a replay holds."""
PAGE_BYTES: Final = 256 * 1024
"""The most bytes that one page of a replay holds, unless its first entry alone is larger."""


class Entry(NamedTuple):
    """An event as the log keeps it.

    Attributes:
        seq: 1, 2, 3 ... within its run.
        wire: the bytes that leave on the wire: the `id` line, then `data`. Made once, shared by all readers.
        timestamp: when it was written, in milliseconds since the Unix epoch.
        terminal: True for the last entry of a run.
    """

    seq: int
    wire: bytes
    timestamp: int
    terminal: bool = False

    @classmethod
    def of(cls, seq: int, data: bytes, timestamp: int, *, terminal: bool = False) -> Entry:
        """The entry with this seq for one encoded SSE block, which has no `id` line of its own."""
        return cls(seq, b"id: %d\n%b" % (seq, data), timestamp, terminal)

    @property
    def data(self) -> bytes:
        """The encoded SSE block without its `id` line."""
        return self.wire[self.wire.index(b"\n") + 1 :]


@dataclass(frozen=True, slots=True)
class Lease:
    """Whose run it is, and for how long.

    Attributes:
        owner: the process (or supervisor) that runs it; cancel requests are addressed to it.
        epoch: the token that an append must show.
        seconds: how long the owner may be silent before the run counts as lost.
    """

    owner: str
    epoch: str
    seconds: float


@dataclass(frozen=True, slots=True)
class Idempotency:
    """A key under which a start happens once; `fingerprint` tells a repeated request from another one."""

    key: str
    fingerprint: str

    @classmethod
    def of(cls, key: str, request: Any) -> Idempotency:
        """The key for this request, whatever that is made of.

        Raises:
            ValueError: the key is no str, or is empty.
        """
        if not isinstance(key, str) or not key:
            raise ValueError(f"an idempotency key is a str with something in it, not {key!r}")
        try:
            text = json.dumps(request, sort_keys=True, default=repr)
        except (TypeError, ValueError):  # keys that cannot be sorted, a circle
            text = repr(request)
        return cls(key, sha256(text.encode("utf-8", "surrogatepass")).hexdigest())


@dataclass(frozen=True, slots=True)
class Started:
    """The record of a started run; `created` is False if an idempotency key led to a run that was there already."""

    run: Run
    created: bool


@dataclass(frozen=True, slots=True)
class Batch:
    """What one append stores of one run.

    Attributes:
        run_id: the run.
        epoch: the token of its owner.
        entries: at least one, with consecutive seqs.
        ending: how the run ends, if the last entry is terminal.
        final: it is part of what ends the run, which a log that is full takes all the same.
    """

    run_id: str
    epoch: str
    entries: Sequence[Entry]
    ending: Ending | None = None
    final: bool = False


class AppendStatus(Enum):
    """What became of a batch."""

    OK = auto()
    """It is stored (or was already: a batch may be sent twice)."""
    GONE = auto()
    """The log has no record of the run."""
    FENCED = auto()
    """The epoch is another's: the run has a new owner, or was ended by someone else."""
    ENDED = auto()
    """The run has ended, and not with this batch."""
    HOLE = auto()
    """The first entry is beyond the last stored one plus one; `seq` says where the log stands."""
    CANCELLED = auto()
    """A `completed` ending is refused, because a cancel is on record."""
    FULL = auto()
    """The log has no room for it now; what is sent again later may find some."""
    AWAY = auto()
    """The part of the log that has the run is out of reach now, and others were not; or the run is being moved from one
    part to another. It may be stored, and is sent again.
    """
    REFUSED = auto()
    """The log cannot hold this run, now or later; `words` says why."""


@dataclass(frozen=True, slots=True)
class Appended:
    """The reply to one batch.

    Attributes:
        status: what became of it.
        seq: the highest seq stored of the run, as far as the reply knows.
        cancelled: a cancel request is on record.
        cancel: its reason, where it has one.
        words: what is wrong, if the batch was refused.
    """

    status: AppendStatus
    seq: int = 0
    cancelled: bool = False
    cancel: str | None = None
    words: str = ""


@dataclass(frozen=True, slots=True)
class LostEnding:
    """What a reaper writes for a run whose owner is gone: the encoded blocks, the last one terminal, and the ending."""

    blocks: Sequence[bytes]
    ending: Ending


@dataclass(frozen=True, slots=True)
class Page:
    """A piece of a replay.

    Attributes:
        run: the record, read in the same step.
        entries: what follows the cursor, in order; empty if nothing does.
        oldest_seq: the oldest seq there is from the cursor on: `after + 1`, unless that has been trimmed (or the run is
            not that far: then `run.seq + 1`).
    """

    run: Run
    entries: Sequence[Entry]
    oldest_seq: int


class CancelStatus(Enum):
    """What a cancel request met."""

    REQUESTED = auto()
    """The run was running; the request is on record, and its owner has been woken."""
    REPEATED = auto()
    """An earlier request is on record already, and stays as it is."""
    ENDED = auto()
    """The run had ended; nothing has changed."""


@dataclass(frozen=True, slots=True)
class CancelReply:
    """The answer to a cancel request: what it met, and the record."""

    status: CancelStatus
    run: Run


@dataclass(frozen=True, slots=True)
class Notification:
    """What a wake-up tells.

    Attributes:
        moved: the last seq of each run that has moved; a run that is gone counts as far beyond any.
        cancel: a cancel request has come in.
        reconnected: the log was out of reach, and may have lost something.
    """

    moved: Mapping[str, int]
    cancel: bool = False
    reconnected: bool = False


class Notifications(Protocol):
    """What tells one supervisor that something has happened: to the runs it follows, and cancels for those it owns."""

    async def subscribe(self, run_id: str) -> None:
        """From the return on, every append to the run is told."""

    def unsubscribe(self, run_id: str) -> None:
        """Stop telling about the run. Never blocks."""

    async def wait(self) -> Notification:
        """Wait until there is something to tell; then all of it. While the log cannot be reached it waits, too."""


@runtime_checkable
class EventLog(Protocol):
    """The protocol of an event log; see the module's own words for what it must promise.

    All methods that wait may raise `LogUnavailable`. None may leave half a step behind when it is cancelled.
    """

    def shard(self, run_id: str) -> str:
        """The part that has this run, as far as is known: ever the same word if there is one part. Never blocks."""

    def shards(self) -> Collection[str]:
        """All parts, as far as is known; at least one. Never blocks."""

    async def start(self, run: Run, lease: Lease, idempotency: Idempotency | None = None) -> Started:
        """Create the record; from the return on any reader finds it.

        Raises:
            RunExists: the id is in use.
            IdempotencyConflict: the key belongs to another request.
        """

    async def append(self, batches: Sequence[Batch]) -> Sequence[Appended]:
        """Store batches in one round trip; one reply for each, in order.

        Several may be of one run, each following the one before. What follows a batch that is not stored is not stored
        either; and a batch that is there already, because it is sent again, is `OK`.

        Raises:
            LogUnavailable: none of the parts concerned is in reach; if some are, the others' batches are `AWAY`, and so
                are those of runs that are being moved.
        """

    async def read(
        self, run_id: str, after: int, *, max_entries: int = PAGE_ENTRIES, max_bytes: int = PAGE_BYTES
    ) -> Page:
        """A page of what follows `after`: at most `max_entries`, and none but the first that goes beyond `max_bytes`.

        Raises:
            RunNotFound: there is no such run.
        """

    async def fetch(self, positions: Mapping[str, int]) -> Mapping[str, Page | None]:
        """`read` for many runs in one round trip; None for a run that is not there.

        Runs whose part is out of reach are left out, if others are not.
        """

    async def get(self, run_id: str) -> Run:
        """The record.

        Raises:
            RunNotFound: there is no such run.
        """

    async def list(self, *, limit: int = 50, status: RunStatus | None = None) -> Sequence[Run]:
        """The newest records, newest first."""

    async def request_cancel(self, run_id: str, reason: str | None) -> CancelReply:
        """Put a cancel request on record and wake the owner.

        Raises:
            RunNotFound: there is no such run.
        """

    async def cancel_requests(self, owner: str) -> Mapping[str, str | None]:
        """Take the cancel requests for the runs of `owner` that came in since the last call: run id → reason."""

    async def renew(self, owner: str, epochs: Mapping[str, str], seconds: float) -> Mapping[str, AppendStatus]:
        """Renew the leases of these runs (run id → epoch); the replies are `OK`, `FENCED`, `ENDED` or `GONE`.

        Runs whose part is out of reach are left out, if others are not.
        """

    async def restore(self, run: Run, lease: Lease, oldest: int) -> Appended:
        """Put a run's record back after the log has lost it, or some of its last entries.

        Args:
            run: the record as it was when the run started.
            lease: its owner's; another epoch than the record's, if there is one, is refused.
            oldest: the oldest seq that the owner has at hand.

        Returns:
            `OK`: the log stands at `seq`, and the owner appends what follows. `HOLE`: the log stands before what the
            owner has at hand, so what it had is dropped, and it stands at `seq`, which is `oldest - 1`. `FENCED`,
            `ENDED`, `FULL`: as for an append.
        """

    async def reap(
        self,
        obituary: Callable[[], LostEnding],
        *,
        shard: str | None = None,
        ready: Callable[[str], bool] = lambda shard: True,  # noqa: ARG005
    ) -> Sequence[str]:
        """End the runs whose lease has run out, each with an obituary of its own; their ids.

        Each of them ends in a step of its own, so this may be cut short at any point.

        Args:
            obituary: makes what is written for a run.
            shard: where to look for such runs; None: everywhere.
            ready: whether the runs of a shard may be ended.
        """

    def wakeups(self, owner: str) -> AbstractAsyncContextManager[Notifications]:
        """Open the wake-ups of one supervisor."""

    async def check(self, shard: str | None = None) -> None:
        """Return if this part of the log can be reached and takes writes; None: if any does.

        Raises:
            LogUnavailable: it cannot, or does not.
        """
