"""What an observer is told of one exchange: what went wrong, and how its stream has ended."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import anyio

from penstock.observer import StreamEnd, new_error_id, tell

if TYPE_CHECKING:
    from penstock.answers import Answer
    from penstock.observer import Observer


ENDED: Final = "ended"
"""The cause if all was sent that there was to send."""


class Account:
    """Of one exchange. Whose headers are never sent, or who has no body, has no stream: nothing is told of it."""

    def __init__(self, observer: Observer, run_id: str | None, where: str) -> None:
        self.bytes = 0
        """What was sent, without pings and last words."""
        self._observer = observer
        self._run_id = run_id
        self._where = where
        self._cause: str | None = None
        self._since: float | None = None
        self._source: Any = None
        self._first = 0
        self._refused = False

    def open(self) -> None:
        """The headers are sent."""
        if self._since is None and not self._refused:
            self._since = anyio.current_time()
            tell(self._observer.stream_started, self._run_id)

    def reads(self, source: Any) -> None:
        """What is sent are entries, if the source says where it stands (`Follower.cursor`)."""
        if isinstance(cursor := getattr(source, "cursor", None), int):
            self._source, self._first = source, cursor

    def settle(self, cause: str) -> None:
        """How it ends; the first cause counts."""
        self._cause = self._cause or cause

    def pinged(self) -> None:
        """A ping is sent."""
        tell(self._observer.pinged)

    def refused(self, answer: Answer) -> None:
        """An answer is sent instead of a stream, or a stream that only says: come back."""
        self._refused = True
        tell(self._observer.refused, answer.status, answer.code)

    def report(self, error: Exception) -> str:
        """Tell of an error; the id that clients are shown."""
        error_id = new_error_id()
        tell(self._observer.on_error, error, error_id=error_id, where=self._where)
        return error_id

    def warn(self, words: str) -> None:
        """Tell of something that is not to be helped."""
        tell(self._observer.warning, f"{self._where}: {words}")

    def close(self) -> None:
        """All is over."""
        if self._since is None:
            return
        cursor = None if self._source is None else self._source.cursor
        entries = None if cursor is None else cursor - self._first
        seconds = anyio.current_time() - self._since
        end = StreamEnd(self._cause or "failed", self._run_id, cursor, entries, self.bytes, seconds)
        tell(self._observer.stream_ended, end)
