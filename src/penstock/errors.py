"""Every exception that a user of penstock can catch.

```
PenstockError
├── StreamRejected          a source refuses to start: its status and body are the answer
├── RunNotFound             404   the log has no such run
├── RunExists               409   the run id is in use
├── RunEnded                409   the run takes no more entries
├── RunCancelled            409   the run was cancelled, and this body with it
├── IdempotencyConflict     422   the key was used before, for another request
├── NotAuthenticated        401   nobody knows who is asking
├── NotAllowed              403   ... and whoever it is may not do this
├── MetadataTooLarge        413   over the limit `max_metadata_bytes` (also a ValueError)
├── DurationTooLong         400   a timeout over the limit `max_duration` (also a ValueError)
├── TooManyRuns             503   this process has as many runs as it may
├── TooManyReaders          503   this process has as many readers as it may
│   └── TooManyReadersOfRun 429   ... or has as many of this run
├── CursorExpired           410   trimmed: the log no longer has what follows the cursor
├── ReaderReleased          503   this process serves this reader no longer; come back with the cursor
├── Draining                503   this process starts no more runs
├── LogUnavailable          503   the log cannot be reached
│   └── LogFull             503   the log has no room for another run
├── SupervisorFailed        503   a service of the supervisor died
└── ConfigurationError            a knob has a value it cannot have (also a ValueError)
InvalidChunk(ValueError)          what a producer yielded is not a chunk
└── EventTooLarge                 ... or is over the limit
PublicError                       raise it in a producer: its code and words reach the clients
StreamInterrupted                 given to `Observer.on_error` for a stream that a cancellation from outside cut short
```

Each `PenstockError` carries `status`, the HTTP status that a response answers with, and `code`, which clients may rely
on.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from penstock.runs import Run


class PenstockError(Exception):
    """What all of penstock's own exceptions have in common: a `code` for programs and an HTTP `status`."""

    code: ClassVar[str] = "ERROR"
    status: ClassVar[int] = 500
    public: ClassVar[str] = "the server failed"
    """What clients are told where the words themselves are the server's affair (status 500 and above)."""

    def extra(self) -> dict[str, Any]:
        """Further members of the error's JSON body."""
        return {}


class StreamRejected(Exception):
    """Raised by a source before its first chunk: the response becomes this status with this code and message.

    Args:
        status: the HTTP status, 400 to 599.
        code: for programs, for example `"PENDING_APPROVAL"`.
        message: for people; it is shown to the client.
        extra: further members of the JSON body.
    """

    def __init__(self, status: int, code: str, message: str, **extra: Any) -> None:
        if not 400 <= status <= 599:  # noqa: PLR2004  (the HTTP error statuses, RFC 9110 section 15)
            raise ValueError(f"a rejection has an HTTP status from 400 to 599, not {status}")
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message
        self.extra_members = extra


class PublicError(Exception):
    """An error whose words may be shown to clients; any other exception shows a code and an error id only.

    Args:
        message: shown to clients as it is.
        code: for programs; shown, too.
    """

    def __init__(self, message: str, code: str = "ERROR") -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class RunNotFound(PenstockError):
    """The log has no such run: it was never started, or its history has expired."""

    code = "RUN_NOT_FOUND"
    status = 404

    def __init__(self, run_id: str) -> None:
        super().__init__(f"there is no run {run_id!r}: it was never started, or its history has expired")
        self.run_id = run_id


class RunExists(PenstockError):
    """The run id is in use; `run` is the record of the run that has it."""

    code = "RUN_EXISTS"
    status = 409

    def __init__(self, run: Run) -> None:
        super().__init__(f"the run id {run.id!r} is in use; choose another, or follow that run")
        self.run = run

    def extra(self) -> dict[str, Any]:
        """The record of the run that has the id."""
        return {"run": self.run.to_json()}


class RunEnded(PenstockError):
    """The run has ended, so it takes no entries and no cancel; `run` is its record, where that is known."""

    code = "RUN_ENDED"
    status = 409

    def __init__(self, run_id: str, run: Run | None = None) -> None:
        how = "" if run is None else f" ({run.status})"
        super().__init__(f"run {run_id!r} has ended{how}; nothing can be added to it")
        self.run_id = run_id
        self.run = run

    def extra(self) -> dict[str, Any]:
        """The terminal record."""
        return {} if self.run is None else {"run": self.run.to_json()}


class RunCancelled(PenstockError):
    """A body was cut short because its run was cancelled.

    Raised by `cancel_when` when it cut the body short; a source may also raise it itself, to end a run as cancelled.

    Args:
        run_id: the run, where it is known.
        reason: the words of whoever cancelled, where there are any.
    """

    code = "RUN_CANCELLED"
    status = 409

    def __init__(self, run_id: str | None = None, reason: str | None = None) -> None:
        name = "the run" if run_id is None else f"run {run_id!r}"
        super().__init__(f"{name} was cancelled" + ("" if reason is None else f": {reason}"))
        self.run_id = run_id
        self.reason = reason


class IdempotencyConflict(PenstockError):
    """The idempotency key was used before, with another request."""

    code = "IDEMPOTENCY_CONFLICT"
    status = 422

    def __init__(self, key: str, run_id: str) -> None:
        super().__init__(f"the idempotency key {key!r} belongs to another request, which started run {run_id!r}")
        self.key = key
        self.run_id = run_id


class CursorExpired(PenstockError):
    """What follows the cursor has been trimmed; `oldest_seq` is the oldest entry there is."""

    code = "CURSOR_EXPIRED"
    status = 410

    def __init__(self, run_id: str, after: int, oldest_seq: int) -> None:
        super().__init__(
            f"run {run_id!r} no longer has what follows {after}: its oldest entry is {oldest_seq}; "
            f"resume from {oldest_seq - 1}, knowing that entries are missing"
        )
        self.run_id = run_id
        self.after = after
        self.oldest_seq = oldest_seq

    def extra(self) -> dict[str, Any]:
        """Where a reader can resume."""
        return {"oldest_seq": self.oldest_seq}


class ReaderReleased(PenstockError):
    """This process serves this reader no longer, although the run goes on: come back with the cursor."""

    code = "READER_RELEASED"
    status = 503
    public = "this server serves the stream no longer; come back with the cursor"


class Draining(PenstockError):
    """This process is shutting down and starts no more runs: ask another, or again later."""

    code = "DRAINING"
    status = 503
    public = "this server is shutting down and starts no more runs; ask another, or again later"


class LogUnavailable(PenstockError):
    """The event log cannot be reached at the moment."""

    code = "LOG_UNAVAILABLE"
    status = 503
    public = "the event log cannot be reached at the moment; try again"


class LogFull(LogUnavailable):
    """The event log has no room for what is new; what is running can still end, be cancelled and be read."""

    code = "LOG_FULL"
    public = "the event log is full; try again later"


class SupervisorFailed(PenstockError):
    """A service of the supervisor died; its runs were cancelled, and nothing can be started or followed through it."""

    code = "SUPERVISOR_FAILED"
    status = 503
    public = "a part of this server has died; ask another, or again later"


class NotAuthenticated(PenstockError):
    """Nobody knows who is asking: no credential came with the request, or none that counts (RFC 6750)."""

    code = "NOT_AUTHENTICATED"
    status = 401


class NotAllowed(PenstockError):
    """Whoever is asking may not do this."""

    code = "NOT_ALLOWED"
    status = 403


class MetadataTooLarge(PenstockError, ValueError):
    """A run's metadata is larger, as JSON, than the limit `max_metadata_bytes`."""

    code = "METADATA_TOO_LARGE"
    status = 413


class DurationTooLong(PenstockError, ValueError):
    """A run's timeout is longer than the limit `max_duration`."""

    code = "DURATION_TOO_LONG"
    status = 400


class TooManyRuns(PenstockError):
    """This process has as many runs as the limit `max_runs` allows: ask another, or again later."""

    code = "TOO_MANY_RUNS"
    status = 503
    public = "this server has as many runs as it may; ask another, or again later"


class TooManyReaders(PenstockError):
    """This process has as many readers as the limit `max_readers` allows: ask another, or again later."""

    code = "TOO_MANY_READERS"
    status = 503
    public = "this server has as many readers as it may; ask another, or again later"


class TooManyReadersOfRun(TooManyReaders):
    """This process has as many readers of this one run as the limit `max_readers_per_run` allows."""

    code = "TOO_MANY_READERS_OF_RUN"
    status = 429


class ConfigurationError(PenstockError, ValueError):
    """A knob has a value that it cannot have; the message says which it may have."""

    code = "CONFIGURATION"


class InvalidChunk(ValueError):
    """What a producer yielded is not a chunk; the message says what is wrong with it, and what to yield instead."""

    code = "INVALID_CHUNK"


class EventTooLarge(InvalidChunk):
    """An event is larger, encoded, than the limit `max_event_bytes`."""

    code = "EVENT_TOO_LARGE"


class StreamInterrupted(Exception):
    """A stream was cut short by a cancellation that nobody asked for here, such as the server's shutdown.

    Only ever handed to `Observer.on_error`: it takes the place of no `Cancelled`.
    """


def single_error(error: BaseException) -> BaseException:
    """What a group of exceptions comes to: its one exception, a `RunCancelled` if it holds nothing else, or itself."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    inner = [single_error(each) for each in error.exceptions]
    if len(inner) == 1 or all(isinstance(each, RunCancelled) for each in inner):
        return inner[0]
    return error


def words_for_clients(error: BaseException, *, expose_errors: bool = False) -> tuple[str, str]:
    """The code and the words that a client is shown of an exception: its own only if it is meant to be public."""
    if isinstance(error, PublicError):  # perhaps of a subclass that has forgotten to call ours
        return encodable(getattr(error, "code", "ERROR")), encodable(getattr(error, "message", "the run failed"))
    code = encodable(error.code) if isinstance(error, PenstockError | InvalidChunk) else "ERROR"
    return code, encodable(error) if expose_errors else "the run failed"


def words_of_error_event(data: str) -> tuple[str, str]:
    """The code and the words of an error event that a producer wrote itself."""
    try:
        members = json.loads(data)
    except (ValueError, RecursionError):
        members = None
    if not isinstance(members, dict):
        return "ERROR", data
    code = members.get("code")
    words = next((members[key] for key in ("message", "error", "detail") if isinstance(members.get(key), str)), data)
    return encodable(code) if isinstance(code, str) else "ERROR", encodable(words)


def encodable(words: object) -> str:
    """The words with every lone surrogate, which no encoding can write, replaced by a question mark.

    A run must end whatever its producer raised, so this never fails: not on words that are no text, nor on an
    exception that cannot say what it is.
    """
    try:
        text = str(words)
    except Exception:  # noqa: BLE001  (somebody else's __str__, and its outcome becomes a record)
        return type(words).__name__
    return text if text.isascii() else text.encode("utf-8", "replace").decode()
