"""penstock serves runs as resumable, cancellable Server-Sent-Event streams, on Trio."""

from penstock.cancellation import cancel_when
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
from penstock.follower import Follower
from penstock.http.access import Authorizer, Caller, Right
from penstock.http.app import create_app
from penstock.http.server import serve
from penstock.http.tokens import Token, TokenAuthorizer
from penstock.keepalive import keepalive
from penstock.log import CancelReply, CancelStatus, Entry, EventLog
from penstock.log.memory import MemoryLog
from penstock.log.urls import open_log
from penstock.notes import LoggingObserver
from penstock.observer import Commit, Figures, NullObserver, Observer, Observers, StreamEnd
from penstock.response import EventStreamResponse
from penstock.runs import Outcome, Run, RunError, RunStatus, StopReason
from penstock.settings import Settings
from penstock.sources import command
from penstock.sse import Decoder, Event, Message
from penstock.supervisor import Supervisor, open_supervisor
from penstock.writer import RunWriter

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
