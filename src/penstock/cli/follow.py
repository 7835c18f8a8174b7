"""`penstock runs follow`: every event of a run once, in order, whatever happens to connections.

    ┌──▶ request, after the cursor ──▶ READ   print, and move the cursor, event by event ──┐
    │                              ──▶ AGAIN, SEEK ◀─ cut off, refused, silent ◀───────────┤
    ├── pause ◀────────────────────────┘                                                   │
    ├── SKIP: say what is missing                                                          │
    └── it still runs ◀── ask for the record ◀── OVER ◀────────────────────────────────────┘ [DONE]

What an answer means is decided in `client.py`. The cursor moves when an event has been printed, and nothing at or below
it is ever printed again, so that a server may send what it likes twice.
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

from tenacity import RetryCallState, Retrying, wait_random_exponential

from penstock.cli.api import Action, CommandFailed, ConnectionFailed, Decision, decide, put_off, record_in
from penstock.cli.terminal import Progress, Screen, event_as_json, event_as_words, how_it_ended
from penstock.sse import Decoder

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from penstock.cli.api import ApiClient
    from penstock.sse import Message

FIRST_PAUSE: Final = 0.1
"""The longest first pause, in seconds. Each is drawn at random, and its limit doubles."""
SHORTEST_PAUSE: Final = 0.05
LONGEST_PAUSE: Final = 5.0
"""The longest pause, in seconds, but for a server that asks for a longer one by `Retry-After`."""
SILENCE: Final = 60.0
"""Seconds without any byte after which a connection is taken for dead: four times a server's ping interval."""
LOST_AGAIN: Final = 15.0
"""How many seconds a run may be unknown that was known before: a log that was emptied is given its runs again."""
ENDING: Final = 15.0
"""The most seconds for learning how a run ended whose last event has been printed."""
LAST_TRY: Final = 1.0
"""The least seconds that a server has to answer, however little patience is left."""
EXIT_CODES: Final = {"completed": 0, "cancelled": 3, "failed": 4, "lost": 5}
CANNOT_GO_ON: Final = 1
INTERRUPTED: Final = 128 + signal.SIGINT
EVENTS_MISSING: Final = 6

_SEQ: Final = re.compile(r"[0-9]{1,18}")


class TimeLimit:
    """How long something may go on that is not to go on.

    Args:
        limit: how many seconds.
        clock: tells the seconds.
    """

    def __init__(self, limit: float, clock: Callable[[], float]) -> None:
        self.limit = limit
        self._clock = clock
        self._since: float | None = None

    def left(self) -> float:
        """The seconds that are left; the first call after `renew` begins to count."""
        if self._since is None:
            self._since = self._clock()
        return self.limit - (self._clock() - self._since)

    def renew(self) -> None:
        """It does not go on."""
        self._since = None


class Backoff:
    """How long to wait before the next try: longer each time, and at random, so that not all come at once."""

    def __init__(self) -> None:
        self._wait = wait_random_exponential(multiplier=FIRST_PAUSE, min=SHORTEST_PAUSE, max=LONGEST_PAUSE)
        self.renew()

    def next(self) -> float:
        """The next pause, in seconds."""
        pause = self._wait(self._state)
        self._state.attempt_number += 1
        return pause

    def renew(self) -> None:
        """Begin with short ones again."""
        self._state = RetryCallState(Retrying(), None, (), {})


# Following


def seq_of(last_event_id: str) -> int | None:
    """The seq that an event's id is; None if it is none."""
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
    """One run that is followed.

    Attributes:
        server: where.
        run_id: which.
        screen: where events go.
        show: an event as it is printed.
        cursor: the id of the last event that was printed, or that was to be left out.
        give_up_after: how many seconds there may be no stream; inf: for ever.
        silence: see `SILENCE`.
        missing: events could not be had.
    """

    server: ApiClient
    run_id: str
    screen: Screen
    show: Callable[[int, Message], str] = event_as_words
    cursor: int = 0
    give_up_after: float = inf
    silence: float = SILENCE
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    missing: bool = field(default=False, init=False)

    @property
    def begun(self) -> bool:
        """Whether there is something to go on with."""
        return self._seen or self.cursor > 0

    def __post_init__(self) -> None:
        self._alone = TimeLimit(self.give_up_after, self.clock)
        self._unknown = TimeLimit(LOST_AGAIN, self.clock)
        self._pauses = Backoff()
        self._seen = self._repeated = self._last_ones = False
        self._retry = 0.0

    def to_the_end(self, tail: int | None = None) -> int:
        """Print what there is and what comes, until the run has ended; how it ended, as an exit code.

        Args:
            tail: begin with the last so many events, if that is after the cursor.

        Raises:
            Failure: it cannot go on.
        """
        if tail is not None:
            # Asked for here and not of the server: if the first connection breaks before its first event, the last
            # ones are others then.
            first = _count(self._record(self._alone).get("seq")) - tail
            self._last_ones = first > self.cursor
            self.cursor = max(self.cursor, first)
        while True:
            decision = self._connection()
            if decision.step is Action.STOP:
                raise CommandFailed(decision.words)
            if decision.step is Action.SKIP:
                self._skip(decision.oldest)
            elif decision.step is not Action.OVER:
                self._pause(decision)
            elif (record := self._ending())["status"] != "running":
                return self._report(record)
            else:  # an event with the words of the last one, in a type of the producer's own
                self._pause(Decision(Action.AGAIN, "the stream ended, and the run goes on"))

    def _connection(self) -> Decision:
        """Ask once, and print what comes; what to do next."""
        wait = min(max(self._alone.left(), LAST_TRY), self.silence)
        self.screen.progress.until = None
        try:
            with self.server.stream(self.run_id, self.cursor, wait=wait, silence=self.silence) as (answer, pieces):
                decision = decide(answer, cursor=self.cursor, seen=self._seen)
                if decision.step not in {Action.AGAIN, Action.STOP}:
                    self._alone.renew()
                if decision.step not in {Action.AGAIN, Action.STOP, Action.SEEK}:
                    self._seen = True
                    self._unknown.renew()
                if decision.step is Action.READ:
                    self.screen.connected()
                    return self._read(pieces)
                return decision
        except ConnectionFailed as trouble:
            return Decision(Action.STOP if trouble.final else Action.AGAIN, str(trouble))

    def _read(self, pieces: Iterator[bytes]) -> Decision:
        decoder = Decoder()
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
        """Print an event, if it is new; whether it is the last one."""
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
            self.screen.tell(f"the server repeats events, such as {seq} after {self.cursor}; they are left out")
        return False

    def _move_to(self, seq: int) -> None:
        if seq > self.cursor:
            self.cursor = seq
            self._last_ones = False
            self._pauses.renew()

    def _skip(self, oldest: int) -> None:
        """Go on with the oldest event that there is."""
        if not self._last_ones:  # who asks for the last ones has asked for no more than there are
            first, last = self.cursor + 1, oldest - 1
            ids = f"event {first} is" if first == last else f"events {first} to {last} are"
            self.screen.tell(f"{ids} missing: the server no longer has them")
            self.missing = True
        self._last_ones = False
        self.cursor = oldest - 1

    def _pause(self, decision: Decision, patience: TimeLimit | None = None) -> None:
        """Wait before the next try.

        Raises:
            Failure: there have been enough of them.
        """
        if decision.step is Action.SEEK:
            patience = self._unknown
        patience = patience or self._alone
        left = patience.left()
        if left <= 0:
            raise CommandFailed(f"gave up after {patience.limit:g} s: {decision.words}")
        if decision.pause > left:
            raise CommandFailed(f"gave up, since the server wants {decision.pause:g} s of patience: {decision.words}")
        pause = max(min(max(self._pauses.next(), min(self._retry, LONGEST_PAUSE)), left), decision.pause)
        self.screen.reconnecting(decision.words, self.cursor, pause, self.clock())
        self.sleep(pause)

    # The record

    def _ending(self) -> dict[str, Any]:
        """The record of a run of which everything has been printed."""
        try:
            return self._record(TimeLimit(min(self.give_up_after, ENDING), self.clock))
        except CommandFailed as failure:
            raise CommandFailed(f"all events have come, but how the run ended is not known: {failure}") from None

    def _record(self, patience: TimeLimit) -> dict[str, Any]:
        while True:
            try:
                wait = min(max(patience.left(), LAST_TRY), self.silence)
                answer = self.server.ask("GET", f"/v1/runs/{self.run_id}", wait=wait)
            except ConnectionFailed as trouble:
                decision = Decision(Action.STOP if trouble.final else Action.AGAIN, str(trouble))
            else:
                if answer.status == HTTPStatus.OK:
                    patience.renew()
                    self._seen = True
                    return record_in(answer)
                decision = put_off(answer, seen=self._seen)
            if decision.step is Action.STOP:
                raise CommandFailed(decision.words)
            self._pause(decision, patience)

    def _report(self, record: dict[str, Any]) -> int:
        """Say how the run ended; the exit code."""
        self.screen.ended(how_it_ended(record), self.clock())
        code = EXIT_CODES.get(record["status"], CANNOT_GO_ON)
        return EVENTS_MISSING if self.missing and code == 0 else code


def _count(value: object) -> int:
    return value if isinstance(value, int) else 0


def follow(
    server: ApiClient, run_id: str, *, after: int, tail: int | None, give_up_after: float, quiet: bool, as_json: bool
) -> int:
    """Follow a run to its end; the exit code. What keeps it from that is said, and with which cursor one can go on."""
    progress = Progress(time.monotonic())
    with Screen(progress, quiet=quiet) as screen:
        show = event_as_json if as_json else event_as_words
        following = Following(server, run_id, screen, show, cursor=after, give_up_after=give_up_after)
        try:
            return following.to_the_end(tail)
        except CommandFailed as failure:
            go_on = f"; go on with --after {following.cursor}" if following.begun else ""
            screen.tell(f"{failure}{go_on}")
            return CANNOT_GO_ON
        except KeyboardInterrupt:
            screen.tell(f"stopped; go on with --after {following.cursor}")
            return INTERRUPTED
