"""Who may do what: every route but `/healthz` and `/readyz` asks here first.

| question | no |
|---|---|
| was it meant for this server? its `Host` is one of `allowed_hosts`, or an address (a page of another site may not drive a server on loopback through a name of its own: DNS rebinding) | 421 `MISDIRECTED` |
| who is it? `Authorizer.authenticate` | 401 `NOT_AUTHENTICATED` |
| may he do that? `Authorizer.allows`, for one of the rights, and one run or none | 403 `NOT_ALLOWED` |

Without an authorizer nobody is asked, and everybody may do everything. The one that ships with penstock is in `tokens.py`.
"""  # noqa: E501  (a table's rows are lines)

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, Final, Protocol

from penstock.errors import ConfigurationError, NotAllowed, StreamRejected

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from starlette.requests import HTTPConnection

    from penstock.http.links import Links
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


class Access:
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

    async def allow(self, caller: Any, right: Right, run_id: str | None = None) -> None:
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

    async def admit(self, request: HTTPConnection, right: Right, run_id: str | None = None) -> Any:
        """`authenticate`, and `allow`; who it is."""
        caller = await self.authenticate(request)
        await self.allow(caller, right, run_id)
        return caller

    async def shown(self, caller: Any, run: Run) -> dict[str, Any]:
        """The record, for whoever may read it; which run it is and how it is, for others."""
        record = run.to_json()
        if await self.allows(caller, Right.READ, run.id):
            return record
        return {name: record[name] for name in ("id", "status")}

    async def seen_by(self, caller: Any, runs: Iterable[Run]) -> list[Run]:
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
