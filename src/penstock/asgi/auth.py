"""Access control: who a caller is, and what they may do.

Every route except `/healthz` and `/readyz` asks here first.

| question | if not |
|---|---|
| is the request meant for this server? its `Host` is one of `allowed_hosts`, or an IP address | 421 `MISDIRECTED` |
| who is the caller? `Authorizer.authenticate` | 401 `NOT_AUTHENTICATED` |
| may they do this? `Authorizer.allows`, for one right, and one run or none | 403 `NOT_ALLOWED` |

The first question keeps a page of another site from using a server on loopback through a host name of its own (DNS
rebinding). Without an authorizer the other two are not asked, and every caller may do everything.

`TokenAuthorizer` knows callers by bearer tokens with named rights (`Authorization: Bearer TOKEN`, RFC 6750, section
2.1). It keeps only the SHA-256 of a token, and compares it with all of them in a time that reveals nothing about them.

It also accepts links. A browser's `EventSource` cannot send a token, so the address itself must carry the right to read
a run's stream, for a limited time. A link holds a JSON Web Token (RFC 7519), signed with HMAC-SHA256. Any program that
has the secret can make one:

    {"sub": RUN_ID, "aud": "penstock:read", "exp": SECONDS_SINCE_THE_EPOCH}   as   /v1/runs/RUN_ID/stream?link=TOKEN

The end of a link's lifetime refuses new requests; it does not end open streams. There is no list of links, so a single
one cannot be revoked: a new secret revokes all of them.
"""

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
from importlib.util import find_spec
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol, Self

from penstock.errors import ConfigurationError, NotAllowed, NotAuthenticated, StreamRejected

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from starlette.requests import HTTPConnection

    from penstock.runs import Run

_ORIGIN: Final = re.compile(r"[a-z][a-z0-9+.-]*://[^/?#@\s]+")


class Right(StrEnum):
    """What a caller may be allowed to do."""

    START = "start"
    """Start runs, and see the producers."""
    READ = "read"
    """Read a run's record and its stream."""
    SHARE = "share"
    """Make links to a run's stream."""
    CANCEL = "cancel"
    """Cancel a run."""
    LIST = "list"
    """See the records of runs in a list."""
    METRICS = "metrics"
    """Read the metrics."""


@dataclass(frozen=True, slots=True)
class Caller:
    """Who a request comes from, and what they may do.

    Attributes:
        name: names the caller.
        rights: what they may do.
        run_id: the only run that the rights apply to; None: all runs.
    """

    name: str
    rights: frozenset[Right]
    run_id: str | None = None


class Authorizer(Protocol):
    """Decides what each caller may do.

    Both methods may wait. They are cancelled when the server is, not when the client disconnects. If they raise
    anything but a `PenstockError`, the response is a 500.
    """

    links: Links | None = None
    """Signs links to a run's stream; None: there are no links."""

    async def authenticate(self, request: HTTPConnection) -> Any:
        """Find out who the request comes from, by its headers, query and client address. Its body is not available.

        Returns:
            The caller, as `allows` needs it; for example a `Caller`.

        Raises:
            NotAuthenticated: the caller is unknown.
        """

    async def allows(self, caller: Any, right: Right, run_id: str | None) -> bool:
        """Whether the caller has a right.

        Args:
            caller: what `authenticate` has returned.
            right: what they want to do.
            run_id: the run that they want to do it to, which may be any string. None if there is no such run: for a
                list, or for a start without an id.
        """
        ...


class AccessControl:
    """Asks the three questions for an application."""

    def __init__(self, authorizer: Authorizer | None, allowed_hosts: Iterable[str] | None) -> None:
        if isinstance(allowed_hosts, str):
            raise ConfigurationError(f"allowed_hosts is a list of names, not the string {allowed_hosts!r}")
        self.authorizer = authorizer
        self._hosts = None if allowed_hosts is None else frozenset(name.lower() for name in allowed_hosts)

    @property
    def links(self) -> Links | None:
        return getattr(self.authorizer, "links", None)

    async def authenticate(self, request: HTTPConnection) -> Any:
        """Find out who the request comes from, if it is meant for this server."""
        name = _name_of(request.headers.get("host", ""))
        if self._hosts is not None and name not in self._hosts and not _is_address(name):
            message = f"this server does not answer to the name {name!r:.100}; allow it: --allow-host (allowed_hosts)"
            raise StreamRejected(421, "MISDIRECTED", message)
        return None if self.authorizer is None else await self.authorizer.authenticate(request)

    async def check(self, caller: Any, right: Right, run_id: str | None = None) -> None:
        """Raise `NotAllowed` unless the caller has the right."""
        if not await self.allows(caller, right, run_id):
            what = "" if run_id is None else f" run {run_id!r:.160}"
            raise NotAllowed(f"these credentials do not allow to {right.value}{what}")

    async def allows(self, caller: Any, right: Right, run_id: str | None = None) -> bool:
        return self.authorizer is None or await self.authorizer.allows(caller, right, run_id)

    async def require(self, request: HTTPConnection, right: Right, run_id: str | None = None) -> Any:
        """`authenticate` and `check`; returns the caller."""
        caller = await self.authenticate(request)
        await self.check(caller, right, run_id)
        return caller

    async def visible_record(self, caller: Any, run: Run) -> dict[str, Any]:
        """The record if the caller may read it, else only the run's id and status."""
        record = run.to_json()
        if await self.allows(caller, Right.READ, run.id):
            return record
        return {name: record[name] for name in ("id", "status")}

    async def visible_runs(self, caller: Any, runs: Iterable[Run]) -> list[Run]:
        return [run for run in runs if await self.allows(caller, Right.LIST, run.id)]


def check_origins(origins: Sequence[str], *, anybody: bool) -> None:
    """Check the origins (RFC 6454) whose pages may use a server; `anybody`: it has no authorizer."""
    if isinstance(origins, str):
        raise ConfigurationError(f"allowed origins are a list, not the string {origins!r}")
    for origin in origins:
        if anybody and origin in {"*", "null"}:
            raise ConfigurationError(f"with {origin!r} as an origin any page could drive this server: it needs tokens")
        if origin not in {"*", "null"} and _ORIGIN.fullmatch(origin) is None:
            raise ConfigurationError(
                f"{origin!r} is not an origin, such as https://example.org or http://localhost:3000"
            )


def _is_address(name: str) -> bool:
    """Whether it is an IP address, which no page can bind to another server."""
    try:
        ip_address(name.partition("%")[0])
    except ValueError:
        return False
    return True


def _name_of(host: str) -> str:
    """A `Host` without its port (RFC 9110, section 7.2; RFC 3986, section 3.2.2)."""
    if host.startswith("["):
        return host[1:].partition("]")[0].lower()
    return host.partition(":")[0].lower()


AUDIENCE: Final = "penstock:read"
ALGORITHM: Final = "HS256"
MAX_LINK: Final = 1024
"""The most characters of a link's token."""
MIN_SECRET: Final = 32
"""The fewest bytes of a secret (RFC 7518, section 3.2)."""
# Only links need jwt, which loads cryptography: a tenth of a server's start. That it is missing is noticed here.
if find_spec("jwt") is None:
    raise ModuleNotFoundError("No module named 'jwt'", name="jwt")


def new_secret() -> str:
    return secrets.token_urlsafe(32)


class Links:
    """Makes and checks links, signed with a secret. Servers that share runs need the same one."""

    def __init__(self, secret: str) -> None:
        self._key = secret.encode("utf-8", "surrogateescape")
        if len(self._key) < MIN_SECRET:
            raise ConfigurationError(
                f"a secret for links has at least {MIN_SECRET} bytes, and this one {len(self._key)}; make one "
                "with: openssl rand -base64 32"
            )
        import jwt  # noqa: PLC0415  (see above)

        try:
            self.make("run", 1.0)
        except jwt.PyJWTError as error:
            raise ConfigurationError(f"this secret cannot sign links: {error}") from None

    def make(self, run_id: str, lifetime: float) -> tuple[str, int]:
        """A token for `?link=` that is valid for `lifetime` seconds, and its end in seconds since the Unix epoch."""
        import jwt  # noqa: PLC0415  (see above)

        ends_at = math.ceil(time.time() + lifetime)
        return jwt.encode({"sub": run_id, "aud": AUDIENCE, "exp": ends_at}, self._key, ALGORITHM), ends_at

    def run_of(self, link: str) -> str:
        """The run whose stream a token is for; raises `NotAuthenticated`."""
        import jwt  # noqa: PLC0415  (see above)

        if len(link) > MAX_LINK:
            raise NotAuthenticated(f"a link's token has at most {MAX_LINK} characters")
        try:
            claims = jwt.decode(
                link, self._key, [ALGORITHM], audience=AUDIENCE, options={"require": ["sub", "aud", "exp"]}
            )
        except jwt.ExpiredSignatureError:
            raise NotAuthenticated("the lifetime of this link is over; ask for a new one") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):  # the client sent all of it
            raise NotAuthenticated("this server has not made this link, or the link has been changed") from None
        run_id: str = claims["sub"]
        return run_id


ALL_RIGHTS: Final = frozenset(Right)
MIN_TOKEN: Final = 16
"""The fewest characters of a token; a shorter one can be guessed."""
MAX_TOKEN: Final = 1024
"""The most characters of a token."""

_TOKEN: Final = re.compile(r"[A-Za-z0-9._~+/-]+=*")
"""A token as it stands in the header (RFC 6750, section 2.1)."""
_DIGEST: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class Token:
    """A bearer token, as a server knows it.

    Attributes:
        digest: its SHA-256.
        rights: what a caller who has it may do.
    """

    digest: bytes = field(repr=False)
    rights: frozenset[Right] = ALL_RIGHTS

    @classmethod
    def of(cls, token: str, rights: Iterable[str] = ALL_RIGHTS) -> Self:
        """Make it from the token itself, which is not kept.

        Args:
            token: the secret, 16 to 1,024 characters.
            rights: the names of what a caller with this token may do.

        Raises:
            ConfigurationError: the token cannot be sent or is easily guessed, or there is no such right.
        """
        if _TOKEN.fullmatch(token) is None or not MIN_TOKEN <= len(token) <= MAX_TOKEN:
            raise ConfigurationError(
                f"a token has {MIN_TOKEN} to {MAX_TOKEN} letters, digits or -._~+/ (and = at its end), and this one "
                "does not; make one with: openssl rand -base64 32"
            )
        return cls(sha256(token.encode()).digest(), rights_of(rights))


def rights_of(names: Iterable[str]) -> frozenset[Right]:
    """The rights with these names; raises `ConfigurationError`."""
    if isinstance(names, str) or not all(isinstance(name, str) for name in names):
        raise ConfigurationError(f"rights are a list of names out of {', '.join(Right)}")
    for name in names:
        if name not in ALL_RIGHTS:
            raise ConfigurationError(f"one of the rights does not exist; there are {', '.join(Right)}")
    return frozenset(map(Right, names))


class TokenAuthorizer(Authorizer):
    """Knows callers by their bearer tokens, or by a link, which allows to read the stream of one run.

    Args:
        tokens: the tokens, by the name of the caller who has it.
        links: signs links; None: there are no links.

    Raises:
        ConfigurationError: two of the tokens are the same.
    """

    def __init__(self, tokens: Mapping[str, Token], links: Links | None = None) -> None:
        self._tokens = dict(tokens)
        self.links = links
        if len({token.digest for token in self._tokens.values()}) < len(self._tokens):
            raise ConfigurationError("two of the tokens are the same, so that the rights of a caller are ambiguous")

    async def authenticate(self, request: HTTPConnection) -> Caller:  # noqa: ASYNC910  (it has no I/O to do)
        """The caller who has this token or this link. A token takes precedence over a link."""
        header = request.headers.get("authorization")
        link = request.query_params.get("link")
        scheme, _, token = (header or "").partition(" ")
        bearer = scheme.lower() == "bearer"
        if not bearer and link is not None and self.links is not None:  # another scheme may be the proxy's
            return Caller("link", frozenset({Right.READ}), self.links.run_of(link))
        if not bearer:
            raise NotAuthenticated("this server requires a token: send Authorization: Bearer TOKEN")
        digest = sha256(token.strip().encode()).digest()
        known = [name for name, each in self._tokens.items() if hmac.compare_digest(each.digest, digest)]
        if not known:
            raise NotAuthenticated("this server does not know this token")
        return Caller(known[0], self._tokens[known[0]].rights)

    async def allows(self, caller: Any, right: Right, run_id: str | None) -> bool:  # noqa: ASYNC910
        return right in caller.rights and caller.run_id in {None, run_id}


def read_tokens(path: str) -> dict[str, Token]:
    """Read tokens from a TOML file, which has a table for each, under the name of the caller who has it.

        [dashboard]
        token = "..."                  # or sha256 = "..." of it, in hexadecimal
        rights = ["read", "list"]      # of start, read, share, cancel, list, metrics

    Raises:
        ConfigurationError: the file cannot be read, or has other contents. The message quotes nothing of them.
    """
    try:
        tables: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):  # bad Unicode, bad TOML, or a number too long
        raise ConfigurationError(f"{path} is not TOML, with a table for each token, such as [dashboard]") from None
    if not tables:
        raise ConfigurationError(f"there is no token in {path}, which has a table for each, such as [dashboard]")
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
