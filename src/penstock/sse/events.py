"""Server-Sent Events as bytes: encode an event, split what a producer encoded itself, decode a stream.

The format is that of the WHATWG HTML standard, section 9.2.5 "Parsing an event stream" and section 9.2.6 "Interpreting
an event stream" (https://html.spec.whatwg.org/multipage/server-sent-events.html). In short: a stream is UTF-8 text in
lines, which end with LF, CR or CRLF and with nothing else (U+2028, VT, FF and NEL are text). A line is a field,
`name: value`, without one space after the colon; a blank line ends the block.

| line | what a decoder does with it |
|---|---|
| `data: TEXT` | adds a line to the event's data; a block without data dispatches nothing |
| `event: TEXT` | sets the event's type, for this block; empty or absent: `message` |
| `id: TEXT` | from this block's end on, the last event id; ignored if it holds a NUL |
| `retry: DIGITS` | sets the reconnection time in milliseconds, at once |
| `: TEXT` | a comment; ignored, as is a field with any other name |

`Event.encode` makes bytes that a decoder reads back as the same event, with LF as the line ends in its data.
`split_blocks` is strict: it raises for input that is not made of whole blocks. `Decoder.feed` is lenient, exactly as
the standard is: its input may be cut anywhere, and none is an error.
"""

from __future__ import annotations

import json
from codecs import BOM_UTF8
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from penstock.errors import ConfigurationError, EventTooLarge, InvalidChunk

if TYPE_CHECKING:
    from typing import Self

MAX_RETRY: Final = 2**63 - 1
"""The longest reconnection time, in milliseconds. The standard sets no limit, but an endless number is an attack."""

_to_json: Final = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode


@dataclass(frozen=True, slots=True)
class Event:
    r"""One Server-Sent Event, valid from its construction on.

    An event without `data` reaches no listener of a browser, whatever its type; give it `data=""` if it should.

    Args:
        data: the text; any line ends in it (CR, LF, CRLF) reach the client as LF.
        event: the type, one line; the empty one means `message`, as does None, and becomes None.
        id: what the client sends back when it resumes: one line without NUL. Not inside a run: the log numbers events.
        retry: how long the client waits before it reconnects, in milliseconds, from 0 to `MAX_RETRY`.
        comment: text that no listener sees; any line ends are allowed.

    Attributes:
        stop_reason: why the producer stopped; only `Event.stop` sets it, and `dataclasses.replace` drops it.

    Raises:
        InvalidChunk: (a `ValueError`) a value has the wrong type or cannot be encoded, or every value is None.
    """

    data: str | None = None
    event: str | None = None
    id: str | None = None
    retry: int | None = None
    comment: str | None = None
    stop_reason: str | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.data is not None:
            _check_text("data", self.data)
        if self.event is not None:
            _check_text("event", self.event, one_line=True)
            if not self.event:
                object.__setattr__(self, "event", None)
        if self.id is not None:
            _check_text("id", self.id, one_line=True)
            if "\0" in self.id:
                raise InvalidChunk("id holds a NUL, and clients ignore such an id; use another")
        if self.retry is not None:
            _check_retry(self.retry)
        if self.comment is not None:
            _check_text("comment", self.comment)
        if self.data is None and self.event is None and self.id is None and self.retry is None and self.comment is None:
            raise InvalidChunk("an event without any field says nothing; give it data (it may be empty) or a comment")

    @classmethod
    def json(
        cls,
        value: Any,
        *,
        event: str | None = None,
        id: str | None = None,  # noqa: A002  (the field's name in the standard)
        retry: int | None = None,
    ) -> Self:
        """Return an event whose data is `value` as compact JSON on one line, in UTF-8 and not in escapes.

        `event`, `id` and `retry` are as in `Event`.

        Raises:
            InvalidChunk: JSON has no such value (NaN and the infinities, sets, bytes, a cycle ...), a string in it
                holds a lone surrogate, or `Event` refuses another argument.
        """
        try:
            data = _to_json(value)
        except (TypeError, ValueError, RecursionError) as error:
            raise InvalidChunk(
                f"Event.json cannot write this {type(value).__name__}: {error}; "
                "JSON is made of dicts with str keys, lists, str, int, finite float, bool and None"
            ) from error
        return cls(data, event, id, retry)

    @classmethod
    def stop(cls, reason: str) -> Self:
        """Return an event that says why its producer stopped; it becomes the stop reason of the run.

        `encode` makes it `event: stop` with the data `{"stop_reason": reason}`; a dialect may encode it differently.

        Args:
            reason: a member of `StopReason`, or any other text, which ends the run as `failed`.

        Raises:
            InvalidChunk: the reason is not a str, is empty, or holds a lone surrogate.
        """
        _check_text("the stop reason", reason)
        if not reason:
            raise InvalidChunk("the stop reason is empty; say why, for example 'end_turn'")
        event = cls.json({"stop_reason": reason}, event="stop")
        object.__setattr__(event, "stop_reason", reason)
        return event

    def encode(self) -> bytes:
        """Return the event as one whole block: UTF-8 with LF line ends and a blank line at its end, without a BOM."""
        # Concatenated, not formatted: an f-string would write the name of an Enum's member instead of its text.
        block = ""
        if self.comment is not None:
            block = _lines(": ", self.comment)
        if self.event is not None:
            block += "event: " + self.event + "\n"
        if self.id is not None:
            block += "id: " + self.id + "\n"
        if self.retry is not None:
            block += f"retry: {self.retry:d}\n"
        if self.data is not None:
            block += _lines("data: ", self.data)
        return (block + "\n").encode()


def _lines(prefix: str, text: str) -> str:
    if "\n" in text or "\r" in text:
        text = _with_lf(text).replace("\n", "\n" + prefix)
    return prefix + text + "\n"


def _with_lf(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _check_text(name: str, value: object, *, one_line: bool = False) -> None:
    if not isinstance(value, str):
        instead = "; use Event.json(value) for a JSON value, or decode bytes" if name == "data" else ""
        raise InvalidChunk(f"{name} is a str, not {type(value).__name__}{instead}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise InvalidChunk(
                f"{name} holds a lone surrogate, {value[error.start]!a} at {error.start}, which UTF-8 cannot encode; "
                "replace it, for example by U+FFFD"
            ) from None
    if one_line and ("\n" in value or "\r" in value):
        raise InvalidChunk(f"{name} is one line, so it cannot hold CR or LF; only data and comment can")


def _check_retry(value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidChunk(f"retry is an int, a number of milliseconds, not {type(value).__name__}")
    if not 0 <= value <= MAX_RETRY:
        raise InvalidChunk(f"retry is a number of milliseconds from 0 to {MAX_RETRY}; this one is out of range")


@dataclass(frozen=True, slots=True)
class WireBlock:
    """One whole block that a producer encoded itself."""

    wire: bytes  # with LF line ends and one blank line at its end
    event: str | None
    data: str | None  # None: it has no data field, and so dispatches nothing


def split_blocks(chunk: str | bytes) -> list[WireBlock]:
    """Split a chunk of a run's producer into whole blocks; an empty chunk has none. Raises `InvalidChunk`.

    One BOM at its beginning is dropped, as are blank lines between blocks. Line ends become LF; nothing else changes.
    """
    try:
        if isinstance(chunk, str):
            chunk.encode()  # raises for lone surrogates
            text = chunk
        else:
            text = chunk.decode()
    except UnicodeError as error:
        raise InvalidChunk(f"a chunk is UTF-8 text; this one is not: {error}") from None
    # After "\n\n", any further blank lines stand at the beginning of the next piece, from where they are dropped.
    *blocks, rest = _with_lf(text.removeprefix("\ufeff")).split("\n\n")
    if rest.strip("\n"):
        raise InvalidChunk(
            "a str or bytes chunk holds whole SSE blocks, each ended by a blank line, and the last one here is not; "
            "yield Event(data=...) instead, which needs no encoding"
        )
    return [_block(lines) for block in blocks if (lines := block.lstrip("\n"))]


def _block(lines: str) -> WireBlock:
    event = None
    data = []
    for line in lines.split("\n"):
        name, value = _field(line)
        if name == "data":
            data.append(value)
        elif name == "event":
            event = value or None
        elif name == "id":
            raise InvalidChunk("inside a run the log numbers the events: leave the id field out of the block")
    return WireBlock((lines + "\n\n").encode(), event, "\n".join(data) if data else None)


def _field(line: str) -> tuple[str, str]:
    """Return the name and value of a field: the name of a comment is empty, as is the value of a line without colon."""
    name, _, value = line.partition(":")
    return name, value.removeprefix(" ")


@dataclass(frozen=True, slots=True)
class Message:
    """An event that a decoder dispatches: `data` is the lines of its data, joined by LF, and `event` its type.

    A client that has seen this message resumes at `last_event_id`, which an earlier block may have set.
    """

    data: str
    event: str = "message"
    last_event_id: str = ""


class Decoder:
    """Decodes one event stream, incrementally, exactly as the standard says (WHATWG HTML, sections 9.2.5 and 9.2.6).

    No input is an error: bytes that are not UTF-8 become U+FFFD, and unknown fields are ignored. A CR ends a line at
    once; the decoder does not wait for an LF after it. The work is linear in the input, however it is cut. A decoder
    decodes one response; use a new one after a reconnection.

    Args:
        max_event_bytes: the limit of an unfinished event: its data lines, each with one byte for its end, and the line
            being read. None, as in the standard: no limit.

    Attributes:
        last_event_id: the last event id as of the last finished block, for the header `Last-Event-ID`.
        retry: the reconnection time that the stream has set, in milliseconds and at most `MAX_RETRY`; or None.

    Raises:
        ConfigurationError: `max_event_bytes` is less than 1.
    """

    def __init__(self, *, max_event_bytes: int | None = None) -> None:
        if max_event_bytes is not None and max_event_bytes < 1:
            raise ConfigurationError(f"max_event_bytes is at least 1, or None for no limit, not {max_event_bytes}")
        self.last_event_id = ""
        self.retry: int | None = None
        self._limit = max_event_bytes
        self._start: bytes | None = b""  # the first bytes, until they are enough for a BOM
        self._after_cr = False
        self._line = bytearray()  # not bytes: a line fed byte by byte would be copied once per byte
        self._data: list[str] = []
        self._data_bytes = 0
        self._event = ""
        self._id = ""

    def feed(self, data: bytes) -> list[Message]:
        """Decode the next bytes, which may be cut anywhere, and return the messages that they complete, in order.

        Raises:
            EventTooLarge: an event is over `max_event_bytes`. If messages precede it, they are returned and the next
                call raises. Every later call raises, too.
        """
        self._refuse_if_too_large()
        messages: list[Message] = []
        *lines, rest = self._cut(data)
        for line in lines:
            self._line += line
            if self._too_large():
                break
            if self._line:
                self._end_line()
            else:
                self._end_block(messages)
        else:
            self._line += rest
        if not messages:
            self._refuse_if_too_large()
        return messages

    def close(self) -> None:
        """End the stream: an unfinished last block is dropped, as the standard says.

        Raises `EventTooLarge` if the last `feed` found such an event, and returned the messages before it.
        """
        self._refuse_if_too_large()
        self._line.clear()
        self._forget_block()

    def _cut(self, data: bytes) -> list[bytes]:
        """Return the lines that `data` ends, and the bytes after the last line end."""
        if self._start is not None:
            data = self._start + data
            if len(data) < len(BOM_UTF8):
                self._start = data
                return [b""]
            self._start = None
            data = data.removeprefix(BOM_UTF8)
        if not data:
            return [b""]
        if self._after_cr:
            data = data.removeprefix(b"\n")
        self._after_cr = data.endswith(b"\r")
        # Split before decoding: a CR or LF byte is never part of a longer UTF-8 sequence.
        return data.replace(b"\r\n", b"\n").replace(b"\r", b"\n").split(b"\n")

    def _end_line(self) -> None:
        name, value = _field(self._line.decode(errors="replace"))
        if name == "data":
            self._data.append(value)
            self._data_bytes += len(self._line) + 1
        elif name == "event":
            self._event = value
        elif name == "id":
            if "\0" not in value:
                self._id = value
        elif name == "retry" and value.isascii() and value.isdigit():
            # One digit more than MAX_RETRY has is enough to be over it; int() refuses thousands of them.
            digits = value.lstrip("0")[: len(str(MAX_RETRY)) + 1]
            self.retry = min(int(digits or "0"), MAX_RETRY)
        self._line.clear()

    def _end_block(self, messages: list[Message]) -> None:
        self.last_event_id = self._id
        if self._data:
            messages.append(Message("\n".join(self._data), self._event or "message", self.last_event_id))
        self._forget_block()

    def _forget_block(self) -> None:
        self._data = []
        self._data_bytes = 0
        self._event = ""

    def _too_large(self) -> bool:
        # An event over the limit stays in the buffer, so this stays true.
        return self._limit is not None and self._data_bytes + len(self._line) > self._limit

    def _refuse_if_too_large(self) -> None:
        if self._too_large():
            raise EventTooLarge(
                f"an event of the stream is over the limit of {self._limit} bytes (max_event_bytes); "
                "raise the limit, or have the data sent in pieces"
            )
