"""penstock serves runs as resumable, cancellable Server-Sent-Event streams, on Trio."""

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
