"""penstock serves runs as resumable, cancellable Server-Sent-Event streams, on Trio."""

from penstock.cancellation import cancel_when
from penstock.errors import (
    ConfigurationError,
    CursorExpired,
    Draining,
    EventTooLarge,
    IdempotencyConflict,
    InvalidChunk,
    LogFull,
    LogUnavailable,
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
)
from penstock.follower import Follower
from penstock.http.app import create_app
from penstock.http.server import serve
from penstock.keepalive import keepalive
from penstock.log import CancelReply, CancelStatus, Entry, EventLog
from penstock.log.memory import MemoryLog
from penstock.log.urls import open_log
from penstock.observer import LoggingObserver, Observer
from penstock.response import EventStreamResponse
from penstock.runs import Outcome, Run, RunError, RunStatus, StopReason
from penstock.settings import Settings
from penstock.sources import command
from penstock.sse import Decoder, Event, Message
from penstock.supervisor import Supervisor, open_supervisor
from penstock.writer import RunWriter

__all__ = [
    "CancelReply",
    "CancelStatus",
    "ConfigurationError",
    "CursorExpired",
    "Decoder",
    "Draining",
    "Entry",
    "Event",
    "EventLog",
    "EventStreamResponse",
    "EventTooLarge",
    "Follower",
    "IdempotencyConflict",
    "InvalidChunk",
    "LogFull",
    "LogUnavailable",
    "LoggingObserver",
    "MemoryLog",
    "Message",
    "Observer",
    "Outcome",
    "PenstockError",
    "PublicError",
    "ReaderReleased",
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
    "StreamInterrupted",
    "StreamRejected",
    "Supervisor",
    "SupervisorFailed",
    "cancel_when",
    "command",
    "create_app",
    "keepalive",
    "open_log",
    "open_supervisor",
    "serve",
]
