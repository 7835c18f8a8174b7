"""The authorizer that ships with penstock: bearer tokens with named rights, and links.

A token comes in the header `Authorization: Bearer TOKEN` (RFC 6750, 2.1). Only its SHA-256 is kept, which is compared
with that of every token, in a time that says nothing of them. A link (`links.py`) comes in the query, and allows to
read the stream of one run.
"""

from __future__ import annotations

import hmac
import re
import tomllib
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

from penstock.errors import ConfigurationError, NotAuthenticated
from penstock.http.access import Authorizer, Caller, Right

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from starlette.requests import HTTPConnection

    from penstock.http.links import Links

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
