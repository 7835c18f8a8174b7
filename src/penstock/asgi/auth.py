"""Who may do what: every route but `/healthz` and `/readyz` asks here first.

| question | no |
|---|---|
| was it meant for this server? its `Host` is one of `allowed_hosts`, or an address (a page of another site may not drive a server on loopback through a name of its own: DNS rebinding) | 421 `MISDIRECTED` |
| who is it? `Authorizer.authenticate` | 401 `NOT_AUTHENTICATED` |
| may he do that? `Authorizer.allows`, for one of the rights, and one run or none | 403 `NOT_ALLOWED` |

Without an authorizer nobody is asked, and everybody may do everything. The one that ships with penstock is in `tokens.py`.

Links: a run's stream for whoever has the address, for a time.

A browser's `EventSource` cannot send a token, so the address itself has to say that it may be read. A link is a JSON
Web Token (RFC 7519), signed with HMAC-SHA256: `sub` is the run, `aud` what it is for, `exp` its end. Whoever knows the
secret can make one, in any language:

    {"sub": RUN_ID, "aud": "penstock:read", "exp": SECONDS_SINCE_THE_EPOCH}   as   /v1/runs/RUN_ID/stream?link=TOKEN

A link ends new requests, not streams that are open. There is no list of links, so none can be taken back alone: a new
secret takes back all.

The authorizer that ships with penstock: bearer tokens with named rights, and links.

A token comes in the header `Authorization: Bearer TOKEN` (RFC 6750, 2.1). Only its SHA-256 is kept, which is compared
with that of every token, in a time that says nothing of them. A link (`links.py`) comes in the query, and allows to
read the stream of one run.
"""  # noqa: E501  (a table's rows are lines)

from __future__ import annotations

import hmac
import math
import re
import secrets
import time
import tomllib
from dataclasses import dataclass, field
from enum import StrEnum
from hashlib import sha256
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

import jwt

from penstock.errors import ConfigurationError, NotAllowed, NotAuthenticated, StreamRejected

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from starlette.requests import HTTPConnection

    from penstock.runs import Run

_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")


class Right(StrEnum):
    """What somebody may be allowed to do."""

    START = "start"
    """Start runs, and see what can be started."""
    READ = "read"
    """Read a run's record and its stream."""
    SHARE = "share"
    """Make links to a run's stream."""
    CANCEL = "cancel"
    """Cancel a run."""
    LIST = "list"
    """See the records of runs in the list."""
    METRICS = "metrics"
    """Read the metrics."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request comes from, and what he may do.

    Attributes:
        name: what he is called.
        rights: his rights.
        run_id: the one run that they are for; None = all.
    """

    name: str
    rights: frozenset[Right]
    run_id: str | None = None


class Authorizer(Protocol):
    """Decides who may do what. Both methods may wait; they are cancelled with the server, not when a client leaves.

    What they raise that is no `PenstockError` is answered with 500, and the request goes no further.
    """

    links: Links | None = None
    """What signs links to a run's stream; None = there are none."""

    async def authenticate(self, request: HTTPConnection) -> Any:
        """Who the request comes from; only its headers, its query and its address are there to tell.

        Returns:
            What `allows` needs to know; for example a `Caller`.

        Raises:
            NotAuthenticated: nobody knows.
        """

    async def allows(self, caller: Any, right: Right, run_id: str | None) -> bool:
        """Whether he may do that.

        Args:
            caller: from `authenticate`.
            right: what it is.
            run_id: the run that it is done to; None for what is done to none, such as asking for the list, or a start
                without an id of the caller's choice. It may be any string.
        """
        ...


class AccessControl:
    """An application's gate."""

    def __init__(self, authorizer: Authorizer | None, allowed_hosts: Iterable[str] | None) -> None:
        if isinstance(allowed_hosts, str):
            raise ConfigurationError(f"allowed_hosts are a list of names, not the one {allowed_hosts!r}")
        self.authorizer = authorizer
        self._hosts = None if allowed_hosts is None else frozenset(name.lower() for name in allowed_hosts)

    @property
    def links(self) -> Links | None:
        """What signs links."""
        return getattr(self.authorizer, "links", None)

    async def authenticate(self, request: HTTPConnection) -> Any:
        """Who it is.

        Raises:
            StreamRejected: the request was meant for another server.
            NotAuthenticated: nobody knows.
        """
        name = _name_of(request.headers.get("host", ""))
        if self._hosts is not None and name not in self._hosts and not _is_address(name):
            words = f"this server does not answer to the name {name!r:.100}; allow it with --allow-host (allowed_hosts)"
            raise StreamRejected(421, "MISDIRECTED", words)
        return None if self.authorizer is None else await self.authorizer.authenticate(request)

    async def check(self, caller: Any, right: Right, run_id: str | None = None) -> None:
        """Return if he may.

        Raises:
            NotAllowed: he may not.
        """
        if not await self.allows(caller, right, run_id):
            what = "" if run_id is None else f" run {run_id!r:.160}"
            raise NotAllowed(f"these credentials do not allow to {right.value}{what}")

    async def allows(self, caller: Any, right: Right, run_id: str | None = None) -> bool:
        """Whether he may."""
        return self.authorizer is None or await self.authorizer.allows(caller, right, run_id)

    async def require(self, request: HTTPConnection, right: Right, run_id: str | None = None) -> Any:
        """`authenticate`, and `allow`; who it is."""
        caller = await self.authenticate(request)
        await self.check(caller, right, run_id)
        return caller

    async def visible_record(self, caller: Any, run: Run) -> dict[str, Any]:
        """The record, for whoever may read it; which run it is and how it is, for others."""
        record = run.to_json()
        if await self.allows(caller, Right.READ, run.id):
            return record
        return {name: record[name] for name in ("id", "status")}

    async def visible_runs(self, caller: Any, runs: Iterable[Run]) -> list[Run]:
        """The records that he sees in the list."""
        return [run for run in runs if await self.allows(caller, Right.LIST, run.id)]


def check_origins(origins: Sequence[str], *, anybody: bool) -> None:
    """Check whose pages may use a server, which may be one that `anybody` may use.

    Raises:
        ConfigurationError: one is no origin (RFC 6454), or would let everybody's page drive such a server.
    """
    if isinstance(origins, str):
        raise ConfigurationError(f"allowed origins are a list, not the one {origins!r}")
    for origin in origins:
        if anybody and origin in {"*", "null"}:
            raise ConfigurationError(f"with {origin!r} as an origin any page could drive this server: it needs tokens")
        if origin not in {"*", "null"} and _ORIGIN.fullmatch(origin) is None:
            raise ConfigurationError(f"{origin!r} is no origin, such as https://example.org or http://localhost:3000")


def _is_address(name: str) -> bool:
    """Whether it is an IP address, which no page can give to another server."""
    try:
        ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


def _name_of(host: str) -> str:
    """A `Host` without its port (RFC 9110, 7.2; RFC 3986, 3.2.2)."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


AUDIENCE: Final = "penstock:read"
ALGORITHM: Final = "HS256"
MAX_LINK: Final = 1024
"""The most characters of a link's token."""
MIN_SECRET: Final = 32
"""The fewest bytes of a secret (RFC 7518, 3.2)."""


def new_secret() -> str:
    """A secret that nobody can guess (256 bits)."""
    return secrets.token_urlsafe(32)


class Links:
    """Makes links, and tells good ones from others.

    Args:
        secret: what they are signed with, at least `MIN_SECRET` bytes. All servers that share runs need the same one.

    Raises:
        ConfigurationError: the secret is too short.
    """

    def __init__(self, secret: str) -> None:
        self._key = secret.encode("utf-8", "surrogateescape")
        if len(self._key) < MIN_SECRET:
            raise ConfigurationError(
                f"a secret for links has at least {MIN_SECRET} bytes, and this one {len(self._key)}; make one with: "
                "openssl rand -base64 32"
            )
        try:
            self.make("run", 1.0)
        except jwt.PyJWTError as error:
            raise ConfigurationError(f"this secret cannot be one for links: {error}") from None

    def make(self, run_id: str, lifetime: float) -> tuple[str, int]:
        """A token for a run's stream.

        Args:
            run_id: the run.
            lifetime: seconds until it is no good any more.

        Returns:
            The token, for `?link=`, and when it ends, in seconds since the Unix epoch.
        """
        ends_at = math.ceil(time.time() + lifetime)
        return jwt.encode({"sub": run_id, "aud": AUDIENCE, "exp": ends_at}, self._key, ALGORITHM), ends_at

    def run_of(self, link: str) -> str:
        """The run whose stream a token is for.

        Raises:
            NotAuthenticated: it is not one of ours, or its time is over.
        """
        if len(link) > MAX_LINK:
            raise NotAuthenticated(f"a link's token has at most {MAX_LINK} characters")
        try:
            claims = jwt.decode(
                link, self._key, [ALGORITHM], audience=AUDIENCE, options={"require": ["sub", "aud", "exp"]}
            )
        except jwt.ExpiredSignatureError:
            raise NotAuthenticated("this link's time is over; ask for a new one") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):  # all of it is the client's
            raise NotAuthenticated("this link is not one of this server's, or has been changed") from None
        run_id: str = claims["sub"]
        return run_id


ALL_RIGHTS: Final = frozenset(Right)
MIN_TOKEN: Final = 16
"""The fewest characters of a token: fewer can be guessed."""
MAX_TOKEN: Final = 1024
"""The most."""

_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""What can stand in a header as it is (RFC 6750, 2.1)."""
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Token:
    """What a token is known by, and what whoever has it may do.

    Attributes:
        digest: its SHA-256.
        rights: what it allows.
    """

    digest: bytes = field(repr=False)
    rights: frozenset[Right] = ALL_RIGHTS

    @classmethod
    def of(cls, token: str, rights: Iterable[str] = ALL_RIGHTS) -> Self:
        """The token itself, which is forgotten at once.

        Raises:
            ConfigurationError: it cannot be sent, or could be guessed, or there is no such right.
        """
        if _TOKEN.fullmatch(token) is None or not MIN_TOKEN <= len(token) <= MAX_TOKEN:
            raise ConfigurationError(
                f"a token has {MIN_TOKEN} to {MAX_TOKEN} letters, digits or -._~+/ (and = at its end), and this one "
                "has not; make one with: openssl rand -base64 32"
            )
        return cls(sha256(token.encode()).digest(), rights_of(rights))


def rights_of(names: Iterable[str]) -> frozenset[Right]:
    """The rights with these names.

    Raises:
        ConfigurationError: there is no such right.
    """
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(f"rights are a list of names, of {', '.join(Right)}")
    for name in names:
        if name not in ALL_RIGHTS:
            raise ConfigurationError(f"one of the rights is none; there are {', '.join(Right)}")
    return frozenset(map(Right, names))


class TokenAuthorizer(Authorizer):
    """Knows callers by their tokens, or by a link.

    Args:
        tokens: each with a name for whoever has it.
        links: what signs links; None = there are none.

    Raises:
        ConfigurationError: two of them are the same.
    """

    def __init__(self, tokens: Mapping[str, Token], links: Links | None = None) -> None:
        self._tokens = dict(tokens)
        self.links = links
        if len({token.digest for token in self._tokens.values()}) < len(self._tokens):
            raise ConfigurationError("two of the tokens are the same; nobody could tell who has which rights")

    async def authenticate(self, request: HTTPConnection) -> Caller:  # noqa: ASYNC910  (it has no I/O to do)
        """Whoever has this token, or this link; a token goes before a link."""
        header = request.headers.get("authorization")
        link = request.query_params.get("link")
        scheme, _, token = (header or "").partition(" ")
        bearer = scheme.lower() == "bearer"
        if not bearer and link is not None and self.links is not None:  # the header may be that of a proxy's own
            return Caller("link", frozenset({Right.READ}), self.links.run_of(link))
        if not bearer:
            raise NotAuthenticated("this server wants to know who is asking: send Authorization: Bearer TOKEN")
        digest = sha256(token.strip().encode()).digest()
        known = [name for name, each in self._tokens.items() if hmac.compare_digest(each.digest, digest)]
        if not known:
            raise NotAuthenticated("this token is not one that this server knows")
        return Caller(known[0], self._tokens[known[0]].rights)

    async def allows(self, caller: Any, right: Right, run_id: str | None) -> bool:  # noqa: ASYNC910
        """Whether his rights say so."""
        return right in caller.rights and caller.run_id in {None, run_id}


def read_tokens(path: str) -> dict[str, Token]:
    """The tokens of a file in TOML: a table for each, with its name.

        [dashboard]
        token = "..."                  # or sha256 = "..." of it, in hexadecimal
        rights = ["read", "list"]      # of start, read, share, cancel, list, metrics

    Raises:
        ConfigurationError: it cannot be read, or says something else. Nothing of what it says is in the words.
    """
    try:
        tables: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):  # of Unicode, TOML, or a number
        raise ConfigurationError(f"{path} is not TOML; it has a table for each token, such as [dashboard]") from None
    if not tables:
        raise ConfigurationError(f"there is no token in {path}; it has a table for each, such as [dashboard]")
    known: dict[str, Token] = {}
    for number, (name, table) in enumerate(tables.items(), 1):
        try:
            known[name] = _token_of(table)
        except ConfigurationError as error:
            raise ConfigurationError(f"in {path}, table {number}: {error}") from None
    return known


def _token_of(table: Any) -> Token:
    match table:
        case {"token": str(token), "rights": list(rights), **others} if not others:
            return Token.of(token, rights)
        case {"sha256": str(digest), "rights": list(rights), **others} if not others and _DIGEST.fullmatch(digest):
            return Token(bytes.fromhex(digest), rights_of(rights))
    raise ConfigurationError(
        'each table has two keys: rights, such as ["read"], and token (or sha256: its digest, 64 digits of 0-9a-f)'
    )
