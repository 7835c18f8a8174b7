"""`penstock runs follow`: every event of a run once, in order, over any number of connections.

    ┌──▶ request, after the cursor ──▶ READ   print, and move the cursor, event by event ──┐
    │                              ──▶ AGAIN, SEEK ◀─ cut off, refused, silent ◀───────────┤
    ├── pause ◀────────────────────────┘                                                   │
    ├── SKIP: say which events are missing                                                 │
    └── the run goes on ◀── request the record ◀── OVER ◀──────────────────────────────────┘ [DONE]

`api.py` decides what a response means. The cursor moves when an event has been printed, and no event at or below the
cursor is printed, so that a server may send an event twice.
"""

from __future__ import annotations

import json
import re
import signal
import time
from dataclasses import dataclass, field
from http import HTTPStatus
from math import inf
from typing import TYPE_CHECKING, Any, Final

from penstock.backoff import Backoff
from penstock.cli.api import Action, CommandFailed, ConnectionFailed, Decision, decide, record_in, retry_or_stop
from penstock.cli.terminal import Progress, Screen, describe_end, event_as_json, event_as_text
from penstock.sse import Decoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from penstock.cli.api import ApiClient
    from penstock.sse import Message

FIRST_PAUSE: Final = 0.1
SHORTEST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 5.0
"""The pauses between tries, in seconds; see `Backoff`. A server may ask for a longer one by `Retry-After`."""
SILENCE: Final = 60.0
"""Seconds without any byte after which a connection counts as dead: four times a server's ping interval."""
SEEK_LIMIT: Final = 15.0
"""Seconds for which a known run may be unknown: the owner of a run restores it in a log that was emptied."""
RECORD_LIMIT: Final = 15.0  # the most seconds to request the record of a run whose last event has been printed
LEAST_WAIT: Final = 1.0  # the least seconds that a server gets to respond, however close the time limit is
EXIT_CODES: Final = {"completed": 0, "cancelled": 3, "failed": 4, "lost": 5}
CANNOT_GO_ON: Final = 1
INTERRUPTED: Final = 128 + signal.SIGINT
EVENTS_MISSING: Final = 6

_SEQ: Final = re.compile(r"[0-9]{1,18}")


class TimeLimit:
    """How long something may fail. The time begins with the first failure, and again with the first after a success."""

    def __init__(self, limit: float, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = clock
        self._since: float | None = None

    def left(self) -> float:
        """The seconds that are left; the first call after `restart` starts the time."""
        if self._since is None:
            self._since = self._clock()
        return self.limit - (self._clock() - self._since)

    def restart(self) -> None:
        self._since = None


def seq_of(last_event_id: str) -> int | None:
    return int(last_event_id) if _SEQ.fullmatch(last_event_id) else None


def is_ping(message: Message) -> bool:
    """Whether it is a ping of the dialect letta, the only event of a run's stream that has no id of its own."""
    try:
        members = json.loads(message.data)
    except (ValueError, RecursionError):
        return False
    return isinstance(members, dict) and members.get("message_type") == "ping"


@dataclass
class Following:
    """One run that is followed, for at most `give_up_after` seconds without a stream."""

    server: ApiClient
    run_id: str
    screen: Screen
    show: Callable[[int, Message], str] = event_as_text
    cursor: int = 0  # the id of the last event that was printed or skipped
    give_up_after: float = inf
    silence: float = SILENCE
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    missing: bool = field(default=False, init=False)  # whether the server did not have all events any more

    def __post_init__(self) -> None:
        self._without_stream = TimeLimit(self.give_up_after, self.clock)
        self._unknown = TimeLimit(SEEK_LIMIT, self.clock)
        self._backoff = Backoff(first=FIRST_PAUSE, shortest=SHORTEST_PAUSE, longest=LONGEST_PAUSE)
        self._seen = self._repeated = self._from_tail = False
        self._retry = 0.0

    @property
    def begun(self) -> bool:
        """Whether the run is known to exist, so that a user may continue later."""
        return self._seen or self.cursor > 0

    def run(self, tail: int | None = None) -> int:
        """Print the run's events until it has ended, from the `tail` last ones on; returns the exit code."""
        if tail is not None:
            # Computed here and not by the server: if the first connection breaks before its first event, the server's
            # last events would be others by then.
            seq = self._record(self._without_stream).get("seq")
            first = (seq if isinstance(seq, int) else 0) - tail
            self._from_tail = first > self.cursor
            self.cursor = max(self.cursor, first)
        while True:
            decision = self._connect()
            if decision.action is Action.STOP:
                raise CommandFailed(decision.reason)
            if decision.action is Action.SKIP:
                self._skip(decision.oldest)
            elif decision.action is not Action.OVER:
                self._pause(decision, self._without_stream)
            elif (record := self._final_record())["status"] != "running":
                self.screen.ended(describe_end(record), self.clock())
                code = EXIT_CODES.get(record["status"], CANNOT_GO_ON)
                return EVENTS_MISSING if self.missing and code == 0 else code
            else:  # a producer's own event looked like the last one
                self._pause(Decision(Action.AGAIN, "the stream ended, and the run goes on"), self._without_stream)

    def _connect(self) -> Decision:
        wait = min(max(self._without_stream.left(), LEAST_WAIT), self.silence)
        self.screen.progress.until = None
        try:
            with self.server.stream(self.run_id, self.cursor, wait=wait, silence=self.silence) as (response, pieces):
                decision = decide(response, cursor=self.cursor, seen=self._seen)
                if decision.action not in {Action.AGAIN, Action.STOP}:
                    self._without_stream.restart()
                    if decision.action is not Action.SEEK:
                        self._seen = True
                        self._unknown.restart()
                if decision.action is not Action.READ:
                    return decision
                self.screen.connected()
                return self._read(pieces)
        except ConnectionFailed as error:
            return Decision(Action.STOP if error.final else Action.AGAIN, str(error))

    def _read(self, pieces: Iterator[bytes]) -> Decision:
        decoder = Decoder()  # not httpx2's EventSource: see docs/decisions/0027
        for piece in pieces:
            self.screen.progress.size += len(piece)
            for message in decoder.feed(piece):
                if self._print(message):
                    return Decision(Action.OVER)
            self._move_to(seq_of(decoder.last_event_id) or 0)  # an entry without data is no event, and has an id
            if decoder.retry is not None:
                self._retry = decoder.retry / 1000
        return Decision(Action.AGAIN, "the stream ended before the run")

    def _print(self, message: Message) -> bool:
        """Print an event, if it is new; returns whether it is the last one."""
        seq = seq_of(message.last_event_id)
        if seq is not None and seq > self.cursor:
            self.screen.event(self.show(seq, message))
            self.screen.progress.events += 1
            self._move_to(seq)
            return message.event == "message" and message.data == "[DONE]"
        if is_ping(message):
            return False
        if seq is None:
            raise CommandFailed("the stream has an event without the id of a run's event: is it the right --url?")
        if not self._repeated:
            self._repeated = True
            self.screen.warn(f"the server repeats events, such as {seq} after {self.cursor}; they are left out")
        return False

    def _move_to(self, seq: int) -> None:
        if seq > self.cursor:
            self.cursor = seq
            self._from_tail = False
            self._backoff.reset()

    def _skip(self, oldest: int) -> None:
        if not self._from_tail:  # --tail asks for no more events than there are
            first, last = self.cursor + 1, oldest - 1
            ids = f"event {first} is" if first == last else f"events {first} to {last} are"
            self.screen.warn(f"{ids} missing: the server no longer has them")
            self.missing = True
        self._from_tail = False
        self.cursor = oldest - 1

    def _pause(self, decision: Decision, limit: TimeLimit) -> None:
        """Wait before the next try; `CommandFailed` if the time limit is over, or would be after the pause."""
        if decision.action is Action.SEEK:
            limit = self._unknown
        left = limit.left()
        if left <= 0:
            raise CommandFailed(f"gave up after {limit.limit:g} s: {decision.reason}")
        if decision.pause > left:
            raise CommandFailed(
                f"gave up, since the server asks for {decision.pause:g} s of patience: {decision.reason}"
            )
        pause = max(min(max(self._backoff.next(), min(self._retry, LONGEST_PAUSE)), left), decision.pause)
        self.screen.reconnecting(decision.reason, self.cursor, pause, self.clock())
        self.sleep(pause)

    def _final_record(self) -> dict[str, Any]:
        try:
            return self._record(TimeLimit(min(self.give_up_after, RECORD_LIMIT), self.clock))
        except CommandFailed as error:
            raise CommandFailed(f"all events have come, but how the run ended is not known: {error}") from None

    def _record(self, limit: TimeLimit) -> dict[str, Any]:
        while True:
            try:
                wait = min(max(limit.left(), LEAST_WAIT), self.silence)
                response = self.server.ask("GET", f"/v1/runs/{self.run_id}", wait=wait)
            except ConnectionFailed as error:
                decision = Decision(Action.STOP if error.final else Action.AGAIN, str(error))
            else:
                if response.status == HTTPStatus.OK:
                    limit.restart()
                    self._seen = True
                    return record_in(response)
                decision = retry_or_stop(response, seen=self._seen)
            if decision.action is Action.STOP:
                raise CommandFailed(decision.reason)
            self._pause(decision, limit)


def follow(
    server: ApiClient, run_id: str, *, after: int, tail: int | None, give_up_after: float, quiet: bool, as_json: bool
) -> int:
    """Follow a run to its end; returns the exit code. An error message names the cursor with which one can continue."""
    with Screen(Progress(time.monotonic()), quiet=quiet) as screen:
        show = event_as_json if as_json else event_as_text
        following = Following(server, run_id, screen, show, cursor=after, give_up_after=give_up_after)
        try:
            return following.run(tail)
        except CommandFailed as error:
            screen.warn(f"{error}; go on with --after {following.cursor}" if following.begun else str(error))
            return CANNOT_GO_ON
        except KeyboardInterrupt:
            screen.warn(f"stopped; go on with --after {following.cursor}")
            return INTERRUPTED
