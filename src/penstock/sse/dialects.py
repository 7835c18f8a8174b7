"""Dialects: how control events are encoded.

A *dialect* encodes the events that penstock itself sends (ping, error, cancelled, stop, done) and the body of an error
response. It leaves the events of producers alone, with two exceptions in `letta`: `"run_id":null` and `"seq_id":null`
at the top level of JSON data are filled in when the event is written, and JSON data whose top-level `message_type` is
`stop_reason` is the stop reason of the run.

| | plain | letta |
|---|---|---|
| ping | a comment, `: ping` | message type `ping` with `id`, `date`, `run_id`, `seq_id` |
| error | event `error` with `code`, `message`, `error_id` | event `error` with `error`, `code`, `error_id` |
| cancelled | event `cancelled` with `code`, `message`, `reason` | message type `stop_reason`: `cancelled` |
| stop | event `stop` with `stop_reason` | message type `stop_reason` with `stop_reason` |
| done | `[DONE]` | `[DONE]` |
| error body | `application/problem+json` (RFC 9457) | `{"detail": {"code", "message"}}` |

Control events have no `id` line: a client that resumed from such an id would skip events.
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
    """The encoding of control events. All methods are pure; those that return bytes return whole SSE blocks."""

    name: str

    def ping(self, run_id: str | None = None, seq: int | None = None) -> bytes:
        """Return what is sent after `ping_interval` seconds in which nothing else was."""

    def error(self, error: RunError) -> bytes:
        """Return what ends a stream with an error, before `[DONE]`."""

    def cancelled(self, message: str, reason: str | None) -> bytes:
        """Return what ends the stream of a cancelled run, before `[DONE]`."""

    def cancelled_directly(self, message: str, reason: str | None) -> bytes:
        """Return what ends a response without a run that was cancelled."""

    def stop(self, reason: str) -> bytes:
        """Return the encoding of `Event.stop(reason)`."""

    def stop_reason(self, data: str) -> str | None:
        """Return the stop reason that an event with this data states, or None."""

    def stamp(self, block: bytes, run_id: str, seq: int) -> bytes:
        """Return the block with the run's id and the entry's seq filled in where it leaves room for them."""

    def error_body(self, status: int, code: str, message: str, extra: Mapping[str, Any]) -> tuple[str, bytes]:
        """Return the media type and the body of an error response."""


class Plain:
    """The dialect of penstock itself."""

    name = "plain"

    def ping(self, run_id: str | None = None, seq: int | None = None) -> bytes:  # noqa: ARG002
        return b": ping\n\n"

    def error(self, error: RunError) -> bytes:
        return _block(error.to_json(), "error")

    def cancelled(self, message: str, reason: str | None) -> bytes:
        return _block({"code": "RUN_CANCELLED", "message": message, "reason": reason}, "cancelled")

    def cancelled_directly(self, message: str, reason: str | None) -> bytes:
        return self.cancelled(message, reason)

    def stop(self, reason: str) -> bytes:
        return _block({"stop_reason": reason}, "stop")

    def stop_reason(self, data: str) -> str | None:  # noqa: ARG002
        return None

    def stamp(self, block: bytes, run_id: str, seq: int) -> bytes:  # noqa: ARG002
        return block

    def error_body(self, status: int, code: str, message: str, extra: Mapping[str, Any]) -> tuple[str, bytes]:
        title = HTTPStatus(status).phrase if status in HTTPStatus.__members__.values() else "Error"
        problem = {"type": "about:blank", "title": title, "status": status, "detail": message, "code": code, **extra}
        return "application/problem+json", json.dumps(problem).encode()


class Letta:
    """The dialect that clients of Letta's API understand."""

    name = "letta"

    def ping(self, run_id: str | None = None, seq: int | None = None) -> bytes:
        own = {"id": f"ping-{secrets.token_hex(8)}", "date": datetime.now(UTC).isoformat()}
        return _block({"message_type": "ping", **own, "run_id": run_id, "seq_id": seq})

    def error(self, error: RunError) -> bytes:
        return _block({"error": error.message, "code": error.code, "error_id": error.error_id}, "error")

    def cancelled(self, message: str, reason: str | None) -> bytes:  # noqa: ARG002
        return self.stop("cancelled")

    def cancelled_directly(self, message: str, reason: str | None) -> bytes:
        return self.cancelled(message, reason) + _block({"message": "Run was cancelled"}, "cancelled")

    def stop(self, reason: str) -> bytes:
        return _block({"message_type": "stop_reason", "stop_reason": reason})

    def stop_reason(self, data: str) -> str | None:
        message = _json_object(data) if "stop_reason" in data else None
        if message is None or message.get("message_type") != "stop_reason":
            return None
        reason = message.get("stop_reason")
        return encodable(reason) if isinstance(reason, str) and reason else None

    def stamp(self, block: bytes, run_id: str, seq: int) -> bytes:
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
        except InvalidChunk:  # json.loads accepts NaN, which is not JSON: the block stays as it is
            return block

    def error_body(self, status: int, code: str, message: str, extra: Mapping[str, Any]) -> tuple[str, bytes]:  # noqa: ARG002
        return "application/json", json.dumps({"detail": {"code": code, "message": message, **extra}}).encode()


def _json_object(data: str) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


DIALECTS: Final[Mapping[str, Dialect]] = MappingProxyType({"plain": Plain(), "letta": Letta()})


def dialect_named(name: str) -> Dialect:
    """Return the dialect with this name; raises `ConfigurationError` if there is none."""
    try:
        return DIALECTS[name]
    except KeyError:
        raise ConfigurationError(f"there is no dialect {name!r}; there are {', '.join(DIALECTS)}") from None
