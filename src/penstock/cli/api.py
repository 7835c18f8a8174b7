"""A client of the HTTP API: requests, and what their answers mean.

    Server.ask, Server.stream ──▶ Answer  ──▶ decide, put_off, record_in, runs_in, refusal_in
           └── or ──▶ an error of httpx2  ──▶ trouble_of

What is on the right is pure. What a server sends may be anything: a token that it repeats is blotted out, and no answer
at all, or one that is not penstock's, is a `ConnectionFailed` or a `CommandFailed`, whose one line says what
to do. `terminal.py` makes it harmless before a terminal sees it.
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

CONNECT: Final = 10.0
"""The most seconds for a connection to be made."""
PATIENCE: Final = 30.0
"""The most seconds between two pieces of an answer that is no stream."""
MAX_REFUSAL: Final = 4 * 1024 * 1024
"""The most bytes that are read of an answer that refuses; one with a run's record may have a megabyte of metadata."""
EVENT_STREAM: Final = "text/event-stream"
HIDDEN: Final = "[token]"

_COME_AGAIN: Final = frozenset({408, 425, 429})
_NEVER: Final = frozenset({501, 505})
_SECONDS: Final = re.compile(r"[0-9]{1,9}")


class CommandFailed(Exception):
    """The command cannot go on; the words are its last line."""


class ConnectionFailed(Exception):
    """There was no answer, or not all of it.

    Attributes:
        final: trying again would change nothing.
    """

    def __init__(self, words: str, *, final: bool = False) -> None:
        super().__init__(words)
        self.final = final


@dataclass(frozen=True, slots=True)
class ApiResponse:
    """What a server answered.

    Attributes:
        status: of HTTP.
        headers: by their names in lower case.
        body: its bytes; none of a stream's.
        token: what no words of this answer may show.
    """

    status: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    token: str | None = field(default=None, repr=False)

    @property
    def media_type(self) -> str:
        """What it says it is, without parameters."""
        return self.headers.get("content-type", "").partition(";")[0].strip().lower()

    def json(self) -> Any:
        """The body's JSON value; None if it is none."""
        try:
            return json.loads(self.body)
        except (ValueError, RecursionError):
            return None


class Refusal(NamedTuple):
    """What an answer of penstock's says that refuses: its code, its words, and all of its members."""

    code: str
    detail: str
    members: Mapping[str, Any]


def refusal_in(answer: ApiResponse) -> Refusal | None:
    """The refusal, in either dialect; None if the answer is not penstock's."""
    body = answer.json()
    if not isinstance(body, dict):
        return None
    members = body["detail"] if isinstance(body.get("detail"), dict) else body  # the latter: dialect plain
    code, detail = members.get("code"), members.get("message" if members is not body else "detail")
    if not isinstance(code, str) or not isinstance(detail, str):
        return None
    return Refusal(code, detail, members)


def words_of(answer: ApiResponse) -> str:
    """What an answer says that is not the one that was asked for, in one line."""
    status, refusal = answer.status, refusal_in(answer)
    if 300 <= status < 400:  # noqa: PLR2004  (the redirections, RFC 9110 section 15.4)
        target = answer.headers.get("location", "nowhere")
        words = f"the server answered {status} and points to {target}; that is not followed: is it the right --url?"
    elif refusal is not None and status >= HTTPStatus.BAD_REQUEST:
        words = f"the server answered {status} {refusal.code}: {refusal.detail}"
    else:
        words = f"the server answered {status} with {answer.media_type or 'nothing'}, and that is not penstock's way"
        words += "" if status >= HTTPStatus.INTERNAL_SERVER_ERROR else ": is it the right --url?"
    if status == HTTPStatus.UNAUTHORIZED:
        words += "; give a token in PENSTOCK_TOKEN, or with --token"
    return words if answer.token is None else words.replace(answer.token, HIDDEN)


# What an answer means


class Action(Enum):
    """What a reader does after an answer."""

    READ = "it is the stream"
    OVER = "the run has ended, and nothing follows the cursor"
    AGAIN = "ask again, after a pause"
    SEEK = "the run is not there, and was: ask again, but not for long"
    SKIP = "what follows the cursor is not there any more: go on at the oldest event"
    STOP = "asking again would change nothing"


@dataclass(frozen=True, slots=True)
class Decision:
    """What to do next.

    Attributes:
        step: see there.
        words: why, unless it is what was hoped for.
        pause: how many seconds the server asks to wait for.
        oldest: for `SKIP`: the id of the oldest event that there is.
    """

    step: Action
    words: str = ""
    pause: float = 0.0
    oldest: int = 0


def decide(answer: ApiResponse, *, cursor: int, seen: bool) -> Decision:
    """What an answer to a request for a run's stream means.

    Args:
        answer: without its body, if it is a stream.
        cursor: what the request asked to go on after.
        seen: whether the server has known the run before.
    """
    if answer.status == HTTPStatus.OK and answer.media_type == EVENT_STREAM:
        return Decision(Action.READ)
    if answer.status == HTTPStatus.NO_CONTENT:
        return Decision(Action.OVER)
    refusal = refusal_in(answer) if answer.status == HTTPStatus.GONE else None
    oldest = None if refusal is None else refusal.members.get("oldest_seq")
    if isinstance(oldest, int) and oldest > cursor + 1:
        return Decision(Action.SKIP, oldest=oldest)
    return put_off(answer, seen=seen)


def put_off(answer: ApiResponse, *, seen: bool) -> Decision:
    """What an answer means that is not the one that was asked for: try again, or give up."""
    status, words = answer.status, words_of(answer)
    if status == HTTPStatus.NOT_FOUND and seen:
        return Decision(Action.SEEK, words)
    if status in _COME_AGAIN or (status >= HTTPStatus.INTERNAL_SERVER_ERROR and status not in _NEVER):
        return Decision(Action.AGAIN, words, retry_after(answer.headers.get("retry-after", "")))
    return Decision(Action.STOP, words)


def retry_after(value: str, now: float | None = None) -> float:
    """How many seconds from `now` (by default: this machine's clock) a `Retry-After` asks to wait for; else 0."""
    if _SECONDS.fullmatch(value.strip()):
        return float(value)
    try:
        return max(parsedate_to_datetime(value).timestamp() - (time.time() if now is None else now), 0.0)
    except (ValueError, OverflowError, OSError):
        return 0.0


def record_in(answer: ApiResponse) -> dict[str, Any]:
    """The record of a run.

    Raises:
        Failure: it is none.
    """
    return _checked_record(answer.json() if answer.status == HTTPStatus.OK else None, answer)


class CancelResult(NamedTuple):
    """What a cancel met: in words, the run's record, and whether it had ended."""

    words: str
    record: dict[str, Any]
    ended: bool


def cancelled_in(answer: ApiResponse) -> CancelResult:
    """What an answer to a cancel says.

    Raises:
        Failure: it refuses, or is none.
    """
    if answer.status == HTTPStatus.ACCEPTED:
        return CancelResult("is asked to stop", _checked_record(answer.json(), answer), ended=False)
    if answer.status == HTTPStatus.OK:
        return CancelResult("was asked to stop before, and is still ending", record_in(answer), ended=False)
    refusal = refusal_in(answer)
    if refusal is not None and refusal.code == "RUN_ENDED":
        record = _checked_record(refusal.members.get("run"), answer)
        return CancelResult(f"had ended already: {record['status']} ({record.get('stop_reason')})", record, ended=True)
    raise CommandFailed(words_of(answer))


def runs_in(answer: ApiResponse) -> list[dict[str, Any]]:
    """The records of a list of runs.

    Raises:
        Failure: it is none.
    """
    body = answer.json() if answer.status == HTTPStatus.OK else None
    if not isinstance(body, dict) or not isinstance(body.get("runs"), list):
        raise CommandFailed(words_of(answer))
    return [_checked_record(each, answer) for each in body["runs"]]


def _checked_record(record: Any, answer: ApiResponse) -> dict[str, Any]:
    if not isinstance(record, dict) or not all(isinstance(record.get(name), str) for name in ("id", "status")):
        raise CommandFailed(words_of(answer))
    return record


def connection_failed(error: Exception, *, asked: bool = False) -> ConnectionFailed:
    """What an error of the connection comes to.

    Args:
        error: as httpx2 raised it.
        asked: the beginning of the answer is there already.
    """
    if asked:
        silent = isinstance(error, httpx2.TimeoutException)
        return ConnectionFailed("nothing came for too long" if silent else "the connection was cut")
    if isinstance(error, httpx2.TimeoutException):
        return ConnectionFailed("there was no answer in time")
    causes = [error]
    while isinstance(cause := causes[-1].__cause__ or causes[-1].__context__, Exception):
        causes.append(cause)
    if final := next(filter(None, map(_never_better, causes)), None):
        return ConnectionFailed(final, final=True)
    if isinstance(error, httpx2.ProxyError):
        return ConnectionFailed(f"the proxy of HTTP_PROXY, HTTPS_PROXY or ALL_PROXY refuses ({error})")
    if isinstance(error, httpx2.ConnectError):
        system = next((each for each in reversed(causes) if isinstance(each, OSError) and each.strerror), None)
        return ConnectionFailed(f"no connection: {error if system is None else system.strerror}")
    return ConnectionFailed("the server hung up without an answer")


def _never_better(error: Exception) -> str | None:
    """The words for an error that is there to stay, before an answer has begun; None: another try may go better."""
    match error:
        case ssl.SSLEOFError() | ssl.SSLZeroReturnError():
            return None
        case ssl.SSLCertVerificationError():
            words = f"the server's certificate is not trusted ({error.verify_message})"
            return f"{words}; give the authority that vouches for it with --cafile"
        case ssl.SSLError():
            words = f"there is no TLS with this server ({getattr(error, 'reason', None) or error})"
            return f"{words}: should it be http://, or another --cafile?"
        case h11.RemoteProtocolError():
            return "what answers there does not speak HTTP: is it the right --url?"
        case UnicodeError() | httpx2.InvalidURL() | httpx2.UnsupportedProtocol():
            return "there can be no server of that name: is it the right --url?"
    return None


# I/O


class ApiClient:
    """A server: a context manager that closes its connections. It follows no redirection and repeats nothing.

    Args:
        url: http or https, a host, and perhaps a path that all others begin with; no slash at its end.
        token: what lets this client in.
        tls: whom it trusts; None: the usual authorities.

    Raises:
        Failure: the environment names a proxy that cannot be used.
    """

    def __init__(self, url: str, token: str | None = None, tls: ssl.SSLContext | None = None) -> None:
        self._url, self._token = url, token
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        try:
            self._client = httpx2.Client(
                headers={"User-Agent": "penstock", "Accept-Encoding": "identity", **headers},
                verify=tls or True,
                limits=httpx2.Limits(max_keepalive_connections=0),
            )
        except (ValueError, ImportError):  # whose words may hold the proxy's password
            raise CommandFailed("HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names a proxy that cannot be used") from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._client.close()

    def ask(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str | int] | None = None,
        body: Mapping[str, Any] | None = None,
        wait: float = PATIENCE,
    ) -> ApiResponse:
        """The answer to one request.

        Args:
            method: of HTTP.
            path: from `/v1` on.
            query: what comes after it.
            body: a JSON object.
            wait: the most seconds between two pieces of the answer.

        Raises:
            Trouble: there is none.
        """
        with self._opened(method, path, wait, params=query, json=body) as response:
            return self._answer(response, limit=inf if response.is_success else MAX_REFUSAL)

    @contextmanager
    def stream(
        self, run_id: str, cursor: int, *, wait: float, silence: float
    ) -> Iterator[tuple[ApiResponse, Iterator[bytes]]]:
        """Ask for a run's stream; the answer, and the pieces of it if it is one.

        Args:
            run_id: whose.
            cursor: the id of the last event that was seen.
            wait: the most seconds for the answer to begin.
            silence: the most seconds between two pieces, once it is a stream.

        Raises:
            Trouble: there is no answer; or, out of the pieces, there are no more.
        """
        # Whoever accepts nothing but a stream, like a browser's EventSource, is never told why there is none.
        headers = {"Accept": f"{EVENT_STREAM}, application/problem+json", "Last-Event-ID": str(cursor)}
        with self._opened("GET", f"/v1/runs/{run_id}/stream", wait, headers=headers) as response:
            if response.is_success and ApiResponse(200, response.headers).media_type == EVENT_STREAM:
                # httpx2 takes a timeout for the whole request; its transport looks here when it begins with the body.
                response.request.extensions["timeout"]["read"] = silence
                yield ApiResponse(response.status_code, response.headers), _pieces(response)
            else:
                yield self._answer(response, limit=MAX_REFUSAL if response.is_error else 0), iter(())

    @contextmanager
    def _opened(self, method: str, path: str, wait: float, **request: Any) -> Iterator[httpx2.Response]:
        timeout = httpx2.Timeout(wait, connect=min(wait, CONNECT))
        try:
            asked = self._client.build_request(method, self._url + path, timeout=timeout, **request)
            response = self._client.send(asked, stream=True)
        except (httpx2.RequestError, httpx2.InvalidURL, UnicodeError) as error:
            raise connection_failed(error) from None
        try:
            yield response
        finally:
            response.close()

    def _answer(self, response: httpx2.Response, *, limit: float) -> ApiResponse:
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
        raise connection_failed(error, asked=True) from None
