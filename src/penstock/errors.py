"""Every exception that a user of penstock can catch.

Each `PenstockError` carries `status`, the HTTP status of the error response, and `code`, which clients may rely on.
`InvalidChunk` is for producers, `PublicError` and `StreamRejected` are raised by them, and `StreamInterrupted` is only
passed to observers.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, ClassVar, Final

if TYPE_CHECKING:
    from penstock.runs import Run


class PenstockError(Exception):
    """The base class of penstock's exceptions: each has a `code` for programs and an HTTP `status`."""

    code: ClassVar[str] = "ERROR"
    status: ClassVar[int] = 500
    public: ClassVar[str] = "the server failed"
    """The message for clients where the exception's own may hold internals of the server (status 500 and above)."""

    def extra(self) -> dict[str, Any]:
        """Return further members of the error's JSON body."""
        return {}


class StreamRejected(Exception):
    """Raised by a source before its first chunk: the response becomes this status with this code and message.

    Args:
        status: the HTTP status, 400 to 599; another one is a ValueError.
        code: for programs, for example `"PENDING_APPROVAL"`.
        message: for people; clients see it.
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
    """An error whose message, for people, and code, for programs, clients see as they are.

    Of any other exception that a producer raises they see a code and an error id only.
    """

    def __init__(self, message: str, code: str = "ERROR") -> None:
        super().__init__(message)
        self.message = message
        self.code = code


class RunNotFound(PenstockError):
    """The log has no run `run_id`: it was never started, or its history has expired."""

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
        return {"run": self.run.to_json()}


class RunEnded(PenstockError):
    """The run `run_id` has ended, so it takes no entries and no cancel; `run` is its record, if it is known."""

    code = "RUN_ENDED"
    status = 409

    def __init__(self, run_id: str, run: Run | None = None) -> None:
        how = "" if run is None else f" ({run.status})"
        super().__init__(f"run {run_id!r} has ended{how}; nothing can be added to it")
        self.run_id = run_id
        self.run = run

    def extra(self) -> dict[str, Any]:
        return {} if self.run is None else {"run": self.run.to_json()}


class RunCancelled(PenstockError):
    """A body was cut short because its run was cancelled.

    `cancel_when` raises it where it cut its block short. A source may raise it, too, to end its run as cancelled.
    `run_id` is the run, if it is known; `reason` is that of the cancel request, if it gave one.
    """

    code = "RUN_CANCELLED"
    status = 409

    def __init__(self, run_id: str | None = None, reason: str | None = None) -> None:
        name = "the run" if run_id is None else f"run {run_id!r}"
        super().__init__(f"{name} was cancelled" + ("" if reason is None else f": {reason}"))
        self.run_id = run_id
        self.reason = reason


class IdempotencyConflict(PenstockError):
    """The idempotency key `key` was used before, with another request, which started the run `run_id`."""

    code = "IDEMPOTENCY_CONFLICT"
    status = 422

    def __init__(self, key: str, run_id: str) -> None:
        super().__init__(f"the idempotency key {key!r} belongs to another request, which started run {run_id!r}")
        self.key = key
        self.run_id = run_id


class CursorExpired(PenstockError):
    """The entries of the run `run_id` that follow the cursor `after` have been trimmed, those before `oldest_seq`."""

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
        return {"oldest_seq": self.oldest_seq}


class ReaderReleased(PenstockError):
    """This process no longer serves this reader, although the run goes on: reconnect with the cursor."""

    code = "READER_RELEASED"
    status = 503
    public = "this server serves the stream no longer; come back with the cursor"


class Draining(PenstockError):
    """This process is shutting down and starts no more runs: try another one, or try again later."""

    code = "DRAINING"
    status = 503
    public = "this server is shutting down and starts no more runs; ask another, or again later"


class LogUnavailable(PenstockError):
    """The event log cannot be reached at the moment."""

    code = "LOG_UNAVAILABLE"
    status = 503
    public = "the event log cannot be reached at the moment; try again"


class LogFull(LogUnavailable):
    """The event log has no room for new runs; the present ones can still end, be cancelled and be read."""

    code = "LOG_FULL"
    public = "the event log is full; try again later"


class SupervisorFailed(PenstockError):
    """A service of the supervisor died: its runs were cancelled, and it can neither start nor follow any."""

    code = "SUPERVISOR_FAILED"
    status = 503
    public = "a part of this server has died; ask another, or again later"


class NotAuthenticated(PenstockError):
    """The request has no credential, or none that is valid (RFC 6750)."""

    code = "NOT_AUTHENTICATED"
    status = 401


class NotAllowed(PenstockError):
    """The caller lacks the right to do this."""

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
    """This process has as many runs as the limit `max_runs` allows: try another one, or try again later."""

    code = "TOO_MANY_RUNS"
    status = 503
    public = "this server has as many runs as it may; ask another, or again later"


class TooManyReaders(PenstockError):
    """This process has as many readers as the limit `max_readers` allows: try another one, or try again later."""

    code = "TOO_MANY_READERS"
    status = 503
    public = "this server has as many readers as it may; ask another, or again later"


class TooManyReadersOfRun(TooManyReaders):
    """This process has as many readers of this one run as the limit `max_readers_per_run` allows."""

    code = "TOO_MANY_READERS_OF_RUN"
    status = 429


class ConfigurationError(PenstockError, ValueError):
    """A setting has an invalid value, or needs a library that is not installed; the message says what to do."""

    code = "CONFIGURATION"


class InvalidChunk(ValueError):
    """A producer yielded an object that is not a chunk; the message says what is wrong, and what to yield instead."""

    code = "INVALID_CHUNK"


class EventTooLarge(InvalidChunk):
    """An event is larger, encoded, than the limit `max_event_bytes`."""

    code = "EVENT_TOO_LARGE"


class StreamInterrupted(Exception):
    """A cancellation from outside, such as the server's shutdown, cut a stream short; only passed to observers."""


def single_error(error: BaseException) -> BaseException:
    """Reduce a group to its one exception, or to one `RunCancelled` if it holds nothing else; else return `error`."""
    if not isinstance(error, BaseExceptionGroup):
        return error
    inner = [single_error(each) for each in error.exceptions]
    if len(inner) == 1 or all(isinstance(each, RunCancelled) for each in inner):
        return inner[0]
    return error


def words_for_clients(error: BaseException, *, expose_errors: bool = False) -> tuple[str, str]:
    """Return the code and the message that clients see of an exception: its own message only if it is public."""
    if isinstance(error, PublicError):  # a subclass may not have called our __init__
        return encodable(getattr(error, "code", "ERROR")), encodable(getattr(error, "message", "the run failed"))
    code = encodable(error.code) if isinstance(error, PenstockError | InvalidChunk) else "ERROR"
    return code, encodable(error) if expose_errors else "the run failed"


def words_of_error_event(data: str) -> tuple[str, str]:
    """Return the code and the message of an error event that a producer wrote itself."""
    try:
        members = json.loads(data)
    except (ValueError, RecursionError):
        members = None
    if not isinstance(members, dict):
        return "ERROR", data
    code = members.get("code")
    text = next((members[key] for key in ("message", "error", "detail") if isinstance(members.get(key), str)), data)
    return encodable(code) if isinstance(code, str) else "ERROR", encodable(text)


def encodable(message: object) -> str:
    """Return the message as a str in which a question mark replaces each lone surrogate (no encoding has them)."""
    # A run must end whatever its producer raised, so this fails for no object, not even for one whose __str__ raises.
    try:
        text = str(message)
    except Exception:  # noqa: BLE001  (a foreign __str__; its outcome becomes a record)
        return type(message).__name__
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


_EXTRAS: Final = {
    "redis": ("redis", "trio_asyncio"),
    "server": ("click", "h11", "h2", "httpx2", "hypercorn", "jwt", "prometheus_client", "pythonjsonlogger", "rich"),
}
"""The libraries that each extra of penstock installs."""


def missing_extra(error: ModuleNotFoundError, what: str) -> str | None:
    """Return how to install the library that `what` lacks; None if `error` names none of penstock's optional ones."""
    library = str(error.name).partition(".")[0]
    for extra, libraries in _EXTRAS.items():
        if library in libraries:
            return f"{what} needs {library}, which is not installed: pip install 'penstock[{extra}]'"
    return None
