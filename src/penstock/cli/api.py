"""A client of the HTTP API: requests, and what their responses mean.

    ApiClient.ask, ApiClient.stream ──▶ ApiResponse ──▶ decide, retry_or_stop, record_in, runs_in, cancelled_in
               └── or ──▶ an error of httpx2 ──▶ connection_failed

A server may send anything: a token that it repeats is replaced, and a response that is missing or not penstock's
becomes a `ConnectionFailed` or a `CommandFailed`, whose one line says what to do.
"""

from __future__ import annotations

import json
import re
import ssl
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from enum import Enum
from http import HTTPStatus
from math import inf
from typing import TYPE_CHECKING, Any, Final, NamedTuple, Self

import h11
import httpx2

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

CONNECT_TIMEOUT: Final = 10.0  # seconds to make a connection
READ_TIMEOUT: Final = 30.0  # seconds between two pieces of a response that is no stream
MAX_ERROR_BYTES: Final = 4 * 1024 * 1024
"""How much of an error response is read. One that holds a run's record may have a megabyte of metadata."""
EVENT_STREAM: Final = "text/event-stream"

_RETRIED: Final = frozenset({408, 425, 429})
_NOT_RETRIED: Final = frozenset({501, 505})
_SECONDS: Final = re.compile(r"[0-9]{1,9}")


class CommandFailed(Exception):
    """The command cannot go on; the message is its last line."""


class ConnectionFailed(Exception):
    """There was no response, or only a part of one; `final`: another try would fail in the same way."""

    def __init__(self, message: str, *, final: bool = False) -> None:
        super().__init__(message)
        self.final = final


@dataclass(frozen=True, slots=True)
class ApiResponse:
    """A response of a server; `body` is empty for a stream."""

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)  # by their names in lower case
    body: bytes = b""
    token: str | None = field(default=None, repr=False)  # what no message about this response may show

    @property
    def media_type(self) -> str:
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    def json(self) -> Any:
        """The body's JSON value; None if it is not JSON."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


class Refusal(NamedTuple):
    """An error response of penstock: its code, its detail, and all of its members."""

    code: str
    detail: str
    members: Mapping[str, Any]


def refusal_in(response: ApiResponse) -> Refusal | None:
    """The error response, in either dialect; None if the response is not penstock's."""
    body = response.json()
    if not isinstance(body, dict):
        return None
    members = body["detail"] if isinstance(body.get("detail"), dict) else body  # the latter: dialect plain
    code, detail = members.get("code"), members.get("message" if members is not body else "detail")
    if not isinstance(code, str) or not isinstance(detail, str):
        return None
    return Refusal(code, detail, members)


def describe(response: ApiResponse) -> str:
    status, refusal = response.status, refusal_in(response)
    if 300 <= status < 400:  # noqa: PLR2004  (the redirections, RFC 9110 section 15.4)
        target = response.headers.get("location", "nowhere")
        message = f"the server answered {status} and points to {target}; that is not followed: is it the right --url?"
    elif refusal is not None and status >= HTTPStatus.BAD_REQUEST:
        message = f"the server answered {status} {refusal.code}: {refusal.detail}"
    else:
        message = (
            f"the server answered {status} with {response.media_type or 'nothing'}, and that is not penstock's way"
        )
        message += "" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else ": is it the right --url?"
    if status == HTTPStatus.UNAUTHORIZED:
        message += "; give a token in PENSTOCK_TOKEN, or with --token"
    return message if response.token is None else message.replace(response.token, "[token]")


# What a response means


class Action(Enum):
    """What a reader does after a response."""

    READ = "read the stream"
    OVER = "stop: the run has ended, and no event follows the cursor"
    AGAIN = "ask again, after a pause"
    SEEK = "ask again, but not for long: the server knew the run before, and does not know it now"
    SKIP = "continue at the oldest event: those that follow the cursor have expired"
    STOP = "give up: another request would get the same response"


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do next: `reason` for AGAIN, SEEK and STOP, `oldest` (an id) for SKIP, `pause` in seconds."""

    action: Action
    reason: str = ""
    pause: float = 0.0
    oldest: int = 0


def decide(response: ApiResponse, *, cursor: int, seen: bool) -> Decision:
    """What to do after the response to a request for a stream; `seen`: the server has known the run before."""
    if response.status == HTTPStatus.OK and response.media_type == EVENT_STREAM:
        return Decision(Action.READ)
    if response.status == HTTPStatus.NO_CONTENT:
        return Decision(Action.OVER)
    refusal = refusal_in(response) if response.status == HTTPStatus.GONE else None
    oldest = None if refusal is None else refusal.members.get("oldest_seq")
    if isinstance(oldest, int) and oldest > cursor + 1:
        return Decision(Action.SKIP, oldest=oldest)
    return retry_or_stop(response, seen=seen)


def retry_or_stop(response: ApiResponse, *, seen: bool) -> Decision:
    status, reason = response.status, describe(response)
    if status == HTTPStatus.NOT_FOUND and seen:
        return Decision(Action.SEEK, reason)
    if status in _RETRIED or (status >= HTTPStatus.INTERNAL_SERVER_ERROR and status not in _NOT_RETRIED):
        return Decision(Action.AGAIN, reason, retry_after(response.headers.get("retry-after", "")))
    return Decision(Action.STOP, reason)


def retry_after(value: str, now: float | None = None) -> float:
    """How many seconds from `now` (by default: this machine's clock) a `Retry-After` asks to wait; 0 if it is none."""
    if _SECONDS.fullmatch(value.strip()):
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now), 0.0)
    except (ValueError, OverflowError, OSError):
        return 0.0


def record_in(response: ApiResponse) -> dict[str, Any]:
    """The record of a run; `CommandFailed` if the response holds none."""
    return _checked_record(response.json() if response.status == HTTPStatus.OK else None, response)


def runs_in(response: ApiResponse) -> list[dict[str, Any]]:
    """The records of a list of runs; `CommandFailed` if the response holds none."""
    body = response.json() if response.status == HTTPStatus.OK else None
    if not isinstance(body, dict) or not isinstance(body.get("runs"), list):
        raise CommandFailed(describe(response))
    return [_checked_record(each, response) for each in body["runs"]]


def _checked_record(record: Any, response: ApiResponse) -> dict[str, Any]:
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in ("id", "status")):
        raise CommandFailed(describe(response))
    return record


class CancelResult(NamedTuple):
    """What a cancel did: in a few words, the run's record, and whether the run had ended before."""

    outcome: str
    record: dict[str, Any]
    ended: bool


def cancelled_in(response: ApiResponse) -> CancelResult:
    """The result of a cancel; `CommandFailed` if the response is an error, or holds no record."""
    if response.status == HTTPStatus.ACCEPTED:
        return CancelResult("is asked to stop", _checked_record(response.json(), response), ended=False)
    if response.status == HTTPStatus.OK:
        return CancelResult("was asked to stop before, and is still ending", record_in(response), ended=False)
    refusal = refusal_in(response)
    if refusal is not None and refusal.code == "RUN_ENDED":
        record = _checked_record(refusal.members.get("run"), response)
        return CancelResult(f"had ended already: {record['status']} ({record.get('stop_reason')})", record, ended=True)
    raise CommandFailed(describe(response))


def connection_failed(error: Exception, *, begun: bool = False) -> ConnectionFailed:
    """The `ConnectionFailed` for an error of httpx2; `begun`: the beginning of the response has arrived."""
    if begun:
        silent = isinstance(error, httpx2.TimeoutException)
        return ConnectionFailed("nothing came for too long" if silent else "the connection was cut")
    if isinstance(error, httpx2.TimeoutException):
        return ConnectionFailed("there was no answer in time")
    causes = [error]
    while isinstance(cause := causes[-1].__cause__ or causes[-1].__context__, Exception):
        causes.append(cause)
    if final := next(filter(None, map(_lasting, causes)), None):
        return ConnectionFailed(final, final=True)
    if isinstance(error, httpx2.ProxyError):
        return ConnectionFailed(f"the proxy of HTTP_PROXY, HTTPS_PROXY or ALL_PROXY refuses ({error})")
    if isinstance(error, httpx2.ConnectError):
        system = next((each for each in reversed(causes) if isinstance(each, OSError) and each.strerror), None)
        return ConnectionFailed(f"no connection: {error if system is None else system.strerror}")
    return ConnectionFailed("the server hung up without an answer")


def _lasting(error: Exception) -> str | None:
    """The message for an error before the response that another try would meet again; None: it may not."""
    match error:
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError():
            return None
        case ssl.SSLCertVerificationError():
            return (
                f"the server's certificate is not trusted ({error.verify_message}); give the certificate of its "
                "authority with --cafile"
            )
        case ssl.SSLError():
            reason = getattr(error, "reason", None) or error
            return f"there is no TLS with this server ({reason}): should it be http://, or another --cafile?"
        case h11.RemoteProtocolError():
            return "the server does not speak HTTP: is it the right --url?"
        case UnicodeError() | httpx2.InvalidURL() | httpx2.UnsupportedProtocol():
            return "there can be no server of that name: is it the right --url?"
    return None


# I/O


class ApiClient:
    """A server, as a context manager that closes its connections. It follows no redirection and repeats no request."""

    def __init__(self, url: str, token: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        self._url, self._token = url, token
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            self._client = httpx2.Client(
                headers={"User-Agent": "penstock", "Accept-Encoding": "identity", **headers},
                verify=tls or True,
                limits=httpx2.Limits(max_keepalive_connections=0),
            )
        except (ValueError, ImportError):  # whose message may hold the proxy's password
            raise CommandFailed("HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names a proxy that cannot be used") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._client.close()

    def ask(self, method: str, path: str, *, wait: float = READ_TIMEOUT, **request: Any) -> ApiResponse:
        """The response to one request; `wait` limits the seconds between two pieces of it."""
        with self._opened(method, path, wait, **request) as response:
            return self._read(response, limit=inf if response.is_success else MAX_ERROR_BYTES)

    @contextmanager
    def stream(
        self, run_id: str, cursor: int, *, wait: float, silence: float
    ) -> Iterator[tuple[ApiResponse, Iterator[bytes]]]:
        """Request a run's stream; yields the response, and the pieces of its body if it is a stream.

        `wait` limits the seconds until the response begins, `silence` those between two pieces.
        """
        # A client that accepts nothing but a stream, as a browser's EventSource does, gets no reason for a refusal.
        headers = {"Accept": f"{EVENT_STREAM}, application/problem+json", "Last-Event-ID": str(cursor)}
        with self._opened("GET", f"/v1/runs/{run_id}/stream", wait, headers=headers) as response:
            if response.is_success and ApiResponse(200, response.headers).media_type == EVENT_STREAM:
                # httpx2 takes a timeout for the whole request; its transport looks here when it begins with the body.
                response.request.extensions["timeout"]["read"] = silence
                yield ApiResponse(response.status_code, response.headers), _pieces(response)
            else:
                yield self._read(response, limit=MAX_ERROR_BYTES if response.is_error else 0), iter(())

    @contextmanager
    def _opened(self, method: str, path: str, wait: float, **request: Any) -> Iterator[httpx2.Response]:
        timeout = httpx2.Timeout(wait, connect=min(wait, CONNECT_TIMEOUT))
        try:
            prepared = self._client.build_request(method, self._url + path, timeout=timeout, **request)
            response = self._client.send(prepared, stream=True)
        except (httpx2.RequestError, httpx2.InvalidURL, UnicodeError) as error:
            raise connection_failed(error) from None
        try:
            yield response
        finally:
            response.close()

    def _read(self, response: httpx2.Response, *, limit: float) -> ApiResponse:
        body = bytearray()
        pieces = _pieces(response)
        while len(body) < limit and (piece := next(pieces, None)) is not None:
            body += piece
        headers = {name.lower(): value for name, value in response.headers.items()}
        return ApiResponse(response.status_code, headers, bytes(body), self._token)


def _pieces(response: httpx2.Response) -> Iterator[bytes]:
    try:
        yield from response.iter_bytes()
    except httpx2.RequestError as error:
        raise connection_failed(error, begun=True) from None
