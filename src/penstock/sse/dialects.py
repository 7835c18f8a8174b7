"""How control events are spelled on the wire.

A *dialect* spells what penstock itself says: ping, error, cancelled, stop, done, and the body of a response that is an
error rather than a stream. Producers' own events are not its business, with two exceptions in `letta`: JSON data may
carry `"run_id":null` and `"seq_id":null` at its top level, which are stamped when the event is written, and JSON data
whose top-level `message_type` is `stop_reason` says why the producer stopped.

| | plain | letta |
|---|---|---|
| ping | a comment, `: ping` | message type `ping` with `id`, `date`, `run_id`, `seq_id` |
| error | event `error` with `code`, `message`, `error_id` | event `error` with `error`, `code`, `error_id` |
| cancelled | event `cancelled` with `code`, `message`, `reason` | message type `stop_reason`: `cancelled` |
| stop | event `stop` with `stop_reason` | message type `stop_reason` with `stop_reason` |
| done | `[DONE]` | `[DONE]` |
| error body | `application/problem+json` (RFC 9457) | `{"detail": {"code", "message"}}` |

Control events never carry an `id` line: a client that came back with such an id would skip real events.
"""

from __future__ import annotations

import json
import secrets
from datetime import UTC, datetime
from http import HTTPStatus
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Protocol

from penstock.errors import ConfigurationError, InvalidChunk, encodable
from penstock.sse import Event

if TYPE_CHECKING:
    from collections.abc import Mapping

    from penstock.runs import RunError

DONE: Final = b"data: [DONE]\n\n"
"""The block that ends every run, in every dialect."""


def _block(members: Mapping[str, Any], event: str | None = None) -> bytes:
    return Event.json(members, event=event).encode()


class Dialect(Protocol):
    """What a dialect spells. All methods are pure and return complete SSE blocks, unless they say otherwise."""

    name: str

    def ping(self, run_id: str | None = None, seq: int | None = None) -> bytes:
        """What is sent when nothing else was, for `ping_interval` seconds."""

    def error(self, error: RunError) -> bytes:
        """What a stream says of its error, before `[DONE]`."""

    def cancelled(self, message: str, reason: str | None) -> bytes:
        """What a run's stream says when the run was cancelled, before `[DONE]`."""

    def cancelled_directly(self, message: str, reason: str | None) -> bytes:
        """The same in a response that has no run behind it."""

    def stop(self, reason: str) -> bytes:
        """`Event.stop(reason)`."""

    def stop_reason(self, data: str) -> str | None:
        """The stop reason that an event with this data states, or None."""

    def stamp(self, block: bytes, run_id: str, seq: int) -> bytes:
        """The block with the run's id and the entry's seq filled in where it leaves room for them."""

    def error_body(self, status: int, code: str, message: str, extra: Mapping[str, Any]) -> tuple[str, bytes]:
        """The media type and the body of a response that is an error, not a stream."""


class Plain:
    """The dialect of penstock itself."""

    name = "plain"

    def ping(self, run_id: str | None = None, seq: int | None = None) -> bytes:  # noqa: ARG002
        """A comment: no client sees an event."""
        return b": ping\n\n"

    def error(self, error: RunError) -> bytes:
        """An `error` event with code, message and error id."""
        return _block(error.to_json(), "error")

    def cancelled(self, message: str, reason: str | None) -> bytes:
        """A `cancelled` event with the reason that was given."""
        return _block({"code": "RUN_CANCELLED", "message": message, "reason": reason}, "cancelled")

    def cancelled_directly(self, message: str, reason: str | None) -> bytes:
        """The same."""
        return self.cancelled(message, reason)

    def stop(self, reason: str) -> bytes:
        """A `stop` event."""
        return _block({"stop_reason": reason}, "stop")

    def stop_reason(self, data: str) -> str | None:  # noqa: ARG002
        """Plain data states no stop reason: `Event.stop` does."""
        return None

    def stamp(self, block: bytes, run_id: str, seq: int) -> bytes:  # noqa: ARG002
        """The block as it is."""
        return block

    def error_body(self, status: int, code: str, message: str, extra: Mapping[str, Any]) -> tuple[str, bytes]:
        """Problem details, RFC 9457, with the member `code`."""
        title = HTTPStatus(status).phrase if status in HTTPStatus.__members__.values() else "Error"
        problem = {"type": "about:blank", "title": title, "status": status, "detail": message, "code": code, **extra}
        return "application/problem+json", json.dumps(problem).encode()


class Letta:
    """The dialect that clients of Letta's API understand."""

    name = "letta"

    def ping(self, run_id: str | None = None, seq: int | None = None) -> bytes:
        """A message of type `ping`."""
        ping = {
            "message_type": "ping",
            "id": f"ping-{secrets.token_hex(8)}",
            "date": datetime.now(UTC).isoformat(),
            "run_id": run_id,
            "seq_id": seq,
        }
        return _block(ping)

    def error(self, error: RunError) -> bytes:
        """An `error` event; its message is called `error`."""
        return _block({"error": error.message, "code": error.code, "error_id": error.error_id}, "error")

    def cancelled(self, message: str, reason: str | None) -> bytes:  # noqa: ARG002
        """The stop reason `cancelled`."""
        return self.stop("cancelled")

    def cancelled_directly(self, message: str, reason: str | None) -> bytes:
        """The stop reason, and a `cancelled` event after it."""
        return self.cancelled(message, reason) + _block({"message": "Run was cancelled"}, "cancelled")

    def stop(self, reason: str) -> bytes:
        """A message of type `stop_reason`."""
        return _block({"message_type": "stop_reason", "stop_reason": reason})

    def stop_reason(self, data: str) -> str | None:
        """The stop reason of a message of type `stop_reason`."""
        message = _json_object(data) if "stop_reason" in data else None
        if message is None or message.get("message_type") != "stop_reason":
            return None
        reason = message.get("stop_reason")
        return encodable(reason) if isinstance(reason, str) and reason else None

    def stamp(self, block: bytes, run_id: str, seq: int) -> bytes:
        """Fill in `"run_id":null` and `"seq_id":null` at the top level of JSON data, which is then written anew."""
        if b"null" not in block or (b'"run_id"' not in block and b'"seq_id"' not in block):
            return block
        lines = block.decode().split("\n")
        payload = "\n".join(line[5:].removeprefix(" ") for line in lines if line.startswith("data:"))
        message = _json_object(payload)
        if message is None:
            return block
        stamps = {key: value for key, value in (("run_id", run_id), ("seq_id", seq)) if message.get(key, value) is None}
        if not stamps:
            return block
        others = "".join(f"{line}\n" for line in lines if line and line != "data" and not line.startswith("data:"))
        try:
            return others.encode() + _block(message | stamps)
        except InvalidChunk:  # such as NaN, which some write and JSON does not have: it is not ours to refuse
            return block

    def error_body(self, status: int, code: str, message: str, extra: Mapping[str, Any]) -> tuple[str, bytes]:  # noqa: ARG002
        """A `detail` object."""
        return "application/json", json.dumps({"detail": {"code": code, "message": message, **extra}}).encode()


def _json_object(data: str) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


DIALECTS: Final[Mapping[str, Dialect]] = MappingProxyType({"plain": Plain(), "letta": Letta()})


def dialect_named(name: str) -> Dialect:
    """The dialect with this name.

    Raises:
        ConfigurationError: there is none; the message lists those that there are.
    """
    try:
        return DIALECTS[name]
    except KeyError:
        raise ConfigurationError(f"there is no dialect {name!r}; there are {', '.join(DIALECTS)}") from None
