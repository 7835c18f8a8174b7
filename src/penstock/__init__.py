"""penstock serves runs as resumable, cancellable Server-Sent-Event streams, on Trio.

The public names are those of `__all__`; every other name, and the layout of the modules, may change. Each name is
imported when it is first used, so `import penstock` loads neither Trio nor any other library. A name whose library is
not installed raises `ImportError` with the command that installs it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from penstock.asgi.app import create_app
    from penstock.asgi.auth import Authorizer, Caller, Right, Token, TokenAuthorizer
    from penstock.asgi.response import EventStreamResponse
    from penstock.errors import (
        ConfigurationError,
        CursorExpired,
        Draining,
        DurationTooLong,
        EventTooLarge,
        IdempotencyConflict,
        InvalidChunk,
        LogFull,
        LogUnavailable,
        MetadataTooLarge,
        NotAllowed,
        NotAuthenticated,
        PenstockError,
        PublicError,
        ReaderReleased,
        RunCancelled,
        RunEnded,
        RunExists,
        RunNotFound,
        StreamInterrupted,
        StreamRejected,
        SupervisorFailed,
        TooManyReaders,
        TooManyReadersOfRun,
        TooManyRuns,
    )
    from penstock.log import CancelReply, CancelStatus, Entry, EventLog
    from penstock.log.memory import MemoryLog
    from penstock.log.open import open_log
    from penstock.observer import Commit, Figures, NullObserver, Observer, Observers, StreamEnd
    from penstock.observer.logging import LoggingObserver
    from penstock.runs import Outcome, Run, RunError, RunStatus, StopReason
    from penstock.server.serve import serve
    from penstock.sources.cancel_when import cancel_when
    from penstock.sources.command import command
    from penstock.sources.keepalive import keepalive
    from penstock.sse import Decoder, Event, Message
    from penstock.supervisor import Supervisor, open_supervisor
    from penstock.supervisor.execution import RunWriter
    from penstock.supervisor.follower import Follower
    from penstock.supervisor.settings import Settings

__all__ = [
    "Authorizer",
    "Caller",
    "CancelReply",
    "CancelStatus",
    "Commit",
    "ConfigurationError",
    "CursorExpired",
    "Decoder",
    "Draining",
    "DurationTooLong",
    "Entry",
    "Event",
    "EventLog",
    "EventStreamResponse",
    "EventTooLarge",
    "Figures",
    "Follower",
    "IdempotencyConflict",
    "InvalidChunk",
    "LogFull",
    "LogUnavailable",
    "LoggingObserver",
    "MemoryLog",
    "Message",
    "MetadataTooLarge",
    "NotAllowed",
    "NotAuthenticated",
    "NullObserver",
    "Observer",
    "Observers",
    "Outcome",
    "PenstockError",
    "PublicError",
    "ReaderReleased",
    "Right",
    "Run",
    "RunCancelled",
    "RunEnded",
    "RunError",
    "RunExists",
    "RunNotFound",
    "RunStatus",
    "RunWriter",
    "Settings",
    "StopReason",
    "StreamEnd",
    "StreamInterrupted",
    "StreamRejected",
    "Supervisor",
    "SupervisorFailed",
    "Token",
    "TokenAuthorizer",
    "TooManyReaders",
    "TooManyReadersOfRun",
    "TooManyRuns",
    "cancel_when",
    "command",
    "create_app",
    "keepalive",
    "open_log",
    "open_supervisor",
    "serve",
]

_MODULES = {
    "penstock.asgi.app": "create_app",
    "penstock.asgi.auth": "Authorizer Caller Right Token TokenAuthorizer",
    "penstock.asgi.response": "EventStreamResponse",
    "penstock.errors": (
        "ConfigurationError CursorExpired Draining DurationTooLong EventTooLarge IdempotencyConflict InvalidChunk "
        "LogFull LogUnavailable MetadataTooLarge NotAllowed NotAuthenticated PenstockError PublicError "
        "ReaderReleased RunCancelled RunEnded RunExists RunNotFound StreamInterrupted StreamRejected "
        "SupervisorFailed TooManyReaders TooManyReadersOfRun TooManyRuns"
    ),
    "penstock.log": "CancelReply CancelStatus Entry EventLog",
    "penstock.log.memory": "MemoryLog",
    "penstock.log.open": "open_log",
    "penstock.observer": "Commit Figures NullObserver Observer Observers StreamEnd",
    "penstock.observer.logging": "LoggingObserver",
    "penstock.runs": "Outcome Run RunError RunStatus StopReason",
    "penstock.server.serve": "serve",
    "penstock.sources.cancel_when": "cancel_when",
    "penstock.sources.command": "command",
    "penstock.sources.keepalive": "keepalive",
    "penstock.sse": "Decoder Event Message",
    "penstock.supervisor": "Supervisor open_supervisor",
    "penstock.supervisor.execution": "RunWriter",
    "penstock.supervisor.follower": "Follower",
    "penstock.supervisor.settings": "Settings",
}
"""The public names of each module."""

if not TYPE_CHECKING:  # with a __getattr__, a type checker would take any misspelt name for a public one

    def __getattr__(name: str) -> Any:
        module = next((module for module, names in _MODULES.items() if name in names.split()), None)
        if module is None:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name, obj=__name__)
        try:
            value = getattr(import_module(module), name)
        except ModuleNotFoundError as error:
            from penstock.errors import missing_extra  # noqa: PLC0415

            if advice := missing_extra(error, f"penstock.{name}"):
                raise ImportError(advice, name=error.name) from error
            raise
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
