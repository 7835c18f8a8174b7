"""Checks of everything that a request brings: its body, path, query and headers.

Each function returns plain values, or raises `StreamRejected` with a status, a code, and a message that says what is
allowed. Only `json_body` does I/O, and it reads no more of a body than its limit.
"""

from __future__ import annotations

import json
import re
import sys
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn

from penstock.errors import StreamRejected
from penstock.runs import RunStatus, check_run_id

if TYPE_CHECKING:
    from collections.abc import Mapping

    from starlette.requests import Request

MAX_LIST: Final = 1000
"""The most records in a list."""
MAX_REASON: Final = 1000
"""The most characters of the reason for a cancel."""
MAX_DEPTH: Final = 100
"""The most nested arrays and objects in a body."""
MAX_KEY: Final = 255
"""The most characters of an idempotency key."""
LINK_LIFETIME: Final = 3600.0
"""The default lifetime of a link, in seconds."""
MAX_LINK_LIFETIME: Final = 7 * 86_400.0
"""The longest lifetime of a link, in seconds."""

_CURSOR: Final = re.compile(r"[0-9]{1,18}")
_KEY: Final = re.compile(r"[\x21-\x7e]{1,255}")
_OWN_SITE: Final = frozenset({"same-origin", "none"})
_TRUE: Final = frozenset({"true", "1"})
_FALSE: Final = frozenset({"false", "0"})


@dataclass(frozen=True, slots=True)
class StartRequest:
    """A checked `POST /v1/runs`."""

    producer: str
    input: Any
    run_id: str | None
    metadata: Mapping[str, Any] | None
    timeout: float | None
    max_silence: float | None
    stream: bool
    idempotency_key: str | None


@dataclass(frozen=True, slots=True)
class StreamRequest:
    """A checked request for a stream: the entries after a seq, or the last few; with or without pings."""

    after: int
    last: int | None
    include_pings: bool


async def json_body(request: Request, limit: int) -> dict[str, Any]:
    """The request's body, a JSON object; no body is the same as `{}`. At most `limit` bytes are read."""
    _check_site(request.headers)
    read = bytearray()
    async with aclosing(request.stream()) as pieces:
        async for piece in pieces:
            read += piece
            if len(read) > limit:
                raise StreamRejected(413, "BODY_TOO_LARGE", f"the body of a request has at most {limit} bytes")
    if not read.strip():
        return {}
    try:
        body = json.loads(read.decode(), parse_constant=_refuse_constant)
        _check_depth(body)
        json.dumps(body, ensure_ascii=False, allow_nan=False).encode()  # 1e999 is read as infinity
    except UnicodeError:
        raise StreamRejected(400, "BAD_JSON", "the body is not UTF-8, or escapes half of a surrogate pair") from None
    except (ValueError, RecursionError) as error:
        raise StreamRejected(400, "BAD_JSON", f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise StreamRejected(400, "BAD_JSON", "the body must be a JSON object, such as {}")
    return body


def _check_site(headers: Mapping[str, str]) -> None:
    """Refuse what a browser sends for a page of another site without a CORS preflight.

    Any page may make a browser POST to this server if the content type needs no preflight (WHATWG Fetch, section
    2.2.2). The page could not read the response, but it would have started or cancelled a run. Clients that are not
    browsers send no `Sec-Fetch-Site`. JSON needs a preflight, so CORS middleware decides about it.
    """
    media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
    origin = headers.get("origin")  # to http: outside loopback, browsers send only this one
    own = origin is None or origin.partition("://")[2] == headers.get("host")
    if not (own and headers.get("sec-fetch-site", "none") in _OWN_SITE) and media_type != "application/json":
        raise StreamRejected(403, "CROSS_SITE", "a page of another site must send JSON as application/json, or nothing")


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON value")


def _check_depth(value: Any) -> None:
    """Refuse a value nested so deeply that it could not be encoded as JSON again, deeper in the stack."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(MAX_DEPTH):
        children = (each.values() if isinstance(each, dict) else each for each in level)
        level = [child for each in children for child in each if isinstance(child, dict | list)]
        if not level:
            return
    raise ValueError(f"it is nested more than {MAX_DEPTH} levels deep")


def run_id(path_params: Mapping[str, Any]) -> str:
    return _checked_run_id(path_params["run_id"])


def _checked_run_id(value: Any) -> str:
    try:
        return check_run_id(value)
    except ValueError as error:
        raise StreamRejected(400, "BAD_RUN_ID", str(error)) from None


def start_request(body: Mapping[str, Any], headers: Mapping[str, str]) -> StartRequest:
    known = {"producer", "input", "run_id", "metadata", "timeout", "max_silence", "stream"}
    if unknown := sorted(set(body) - known):
        _bad_request(f"there is no member {unknown[0]!r:.100}; there are: {', '.join(sorted(known))}")
    producer, metadata, wanted_id = body.get("producer"), body.get("metadata"), body.get("run_id")
    if not isinstance(producer, str):
        _bad_request('"producer" is the name of a producer, a string')
    if metadata is not None and not isinstance(metadata, dict):
        _bad_request('"metadata" is an object')
    key = headers.get("idempotency-key")
    if key is not None and _KEY.fullmatch(key) is None:
        raise StreamRejected(
            400, "BAD_IDEMPOTENCY_KEY", f"an Idempotency-Key is 1 to {MAX_KEY} visible ASCII characters"
        )
    return StartRequest(
        producer=producer,
        input=body.get("input"),
        run_id=None if wanted_id is None else _checked_run_id(wanted_id),
        metadata=metadata,
        timeout=_duration(body, "timeout"),
        max_silence=_duration(body, "max_silence"),
        stream=_boolean(body.get("stream", False), "stream"),
        idempotency_key=key,
    )


def stream_request(body: Mapping[str, Any], query: Mapping[str, str], headers: Mapping[str, str]) -> StreamRequest:
    """Check where a stream starts.

    `Last-Event-ID` takes precedence over `starting_after`, and the body over the query. Other members are ignored.
    """
    given = {**query, **body}
    after = headers.get("last-event-id") or given.get("starting_after")
    last = given.get("tail")
    return StreamRequest(
        after=0 if after is None else _count(after, "BAD_CURSOR", "a cursor (Last-Event-ID, starting_after) is"),
        last=None if last is None else _count(last, "BAD_TAIL", '"tail" is'),
        include_pings=_boolean(given.get("include_pings", True), "include_pings"),
    )


def cancel_reason(body: Mapping[str, Any]) -> str | None:
    reason = body.get("reason")
    if reason is not None and not (isinstance(reason, str) and len(reason) <= MAX_REASON):
        _bad_request(f'"reason" is a string of at most {MAX_REASON} characters')
    return reason


def link_lifetime(body: Mapping[str, Any]) -> float:
    """The lifetime of a link, in seconds."""
    lifetime = _duration(body, "expires_in")
    if lifetime is None:
        return LINK_LIFETIME
    if lifetime > MAX_LINK_LIFETIME:
        _bad_request(f'"expires_in" is at most {MAX_LINK_LIFETIME:g} s')
    return lifetime


def list_query(query: Mapping[str, str]) -> tuple[int, RunStatus | None]:
    """The number of records in a list, and their status."""
    limit = _count(query.get("limit", "50"), "BAD_LIMIT", '"limit" is')
    if not 1 <= limit <= MAX_LIST:
        raise StreamRejected(400, "BAD_LIMIT", f'"limit" is 1 to {MAX_LIST}')
    status = query.get("status")
    if status is None:
        return limit, None
    try:
        return limit, RunStatus(status)
    except ValueError:
        raise StreamRejected(400, "BAD_STATUS", f'"status" is one of {", ".join(RunStatus)}') from None


def _count(value: Any, code: str, what: str) -> int:
    """A whole number from 0, given as JSON or as text."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value) if abs(value) < 10**18 else ""
    if not isinstance(value, str) or _CURSOR.fullmatch(value) is None:
        raise StreamRejected(400, code, f"{what} a whole number from 0, in at most 18 digits")
    return int(value)


def _duration(body: Mapping[str, Any], name: str) -> float | None:
    value = body.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= sys.float_info.max:
        _bad_request(f'"{name}" is a number of seconds above 0')
    return float(value)


def _boolean(value: Any, name: str) -> bool:
    """A boolean, given as JSON or as text."""
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _TRUE | _FALSE:
        return value.lower() in _TRUE
    return _bad_request(f'"{name}" is true or false')


def _bad_request(message: str) -> NoReturn:
    raise StreamRejected(400, "BAD_REQUEST", message)
