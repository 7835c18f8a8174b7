"""Who may use a server: the options that say so, and what becomes of them."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

import click

from penstock.cli.options import option
from penstock.errors import ConfigurationError
from penstock.http.tokens import Token, TokenAuthorizer, read_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

LINK_SECRET: Final = "PENSTOCK_LINK_SECRET"  # noqa: S105  (a name)
"""The environment variable of the secret that links are signed with."""
LOOPBACK: Final = ("localhost", "127.0.0.1", "::1")
"""The names of a server that only this machine reaches."""


@dataclass(frozen=True, slots=True)
class Admission:
    """What the options say.

    Attributes:
        authorizer: knows who may do what; None: nobody is asked.
        link_secret: what its links are signed with.
        insecure: nobody need be asked, although other machines can reach the server.
        allowed_origins: whose pages may use it from a browser.
        allowed_hosts: the names that it answers to; None = any.
    """

    authorizer: TokenAuthorizer | None = None
    link_secret: str | None = field(default=None, repr=False)
    insecure: bool = False
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None

    @property
    def anywhere(self) -> bool:
        """Whether the server may be where other machines reach it."""
        return self.insecure or self.authorizer is not None


def admission_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options, which come as `token`, `tokens`, `link_secret`, `allow_origin`, `allow_host` and `insecure`."""
    options = (
        option(
            "--token",
            envvar="PENSTOCK_TOKEN",
            metavar="TOKEN",
            help="Whoever sends this token (Authorization: Bearer TOKEN) may do everything, and others nothing. It is "
            "better kept in the environment variable: a command line can be read by everybody on this machine.",
        ),
        option(
            "--tokens",
            metavar="PATH",
            help="A file of tokens with rights of their own, in TOML: a table for each, such as [dashboard], with "
            'token = "..." (or sha256 = "...") and rights = ["read", "list"]. The rights are start, read, share, '
            "cancel, list and metrics.",
        ),
        option(
            "--link-secret",
            envvar=LINK_SECRET,
            metavar="SECRET",
            help="What links to streams are signed with, for browsers, whose EventSource can send no token; at least "
            "32 characters, the same for all servers that share runs. By default a new one, so that links end with "
            "the server.",
        ),
        option(
            "--allow-origin",
            multiple=True,
            metavar="ORIGIN",
            help="Let pages of this origin (https://example.org) use the server from a browser; * = any, with tokens.",
        ),
        option(
            "--allow-host",
            multiple=True,
            metavar="NAME",
            help="Answer to this name, as a proxy may pass it on. Without tokens a server on loopback answers to "
            f"{', '.join(LOOPBACK)} alone, or pages of other sites could reach it through names of their own.",
        ),
        option(
            "--insecure",
            is_flag=True,
            help="Ask nobody for a token, on addresses that other machines can reach: whoever reaches the server can "
            "start, read and cancel every run.",
        ),
    )
    for each in reversed(options):
        function = each(function)
    return function


def admission(
    *,
    token: str | None,
    tokens: str | None,
    link_secret: str | None,
    allow_origin: Sequence[str],
    allow_host: Sequence[str],
    insecure: bool,
) -> Admission:
    """What the options say.

    Raises:
        BadParameter: a token, the file of tokens or the secret is not what it must be.
        UsageError: the options do not go together.
    """
    known: dict[str, Token] = {}
    if tokens is not None:
        with _blamed_on("--tokens"):
            known = read_tokens(tokens)
    if token is not None:
        with _blamed_on("--token"):
            known["--token"] = Token.of(token)
    if not known:
        if link_secret is not None and not os.environ.get(LINK_SECRET):
            raise click.UsageError("a secret for links is of no use without tokens: give --token or --tokens, too")
        if "*" in allow_origin:
            raise click.UsageError(
                "with --allow-origin '*' any page could drive this server: it needs --token or --tokens"
            )
        hosts = (*LOOPBACK, *allow_host) if allow_host or not insecure else None
        return Admission(insecure=insecure, allowed_origins=tuple(allow_origin), allowed_hosts=hosts)
    if insecure:
        raise click.UsageError("--insecure asks nobody for a token, and there are tokens; give one or the other")
    from penstock.http.links import Links, new_secret  # noqa: PLC0415  (its library takes a while to import)

    secret = new_secret() if link_secret is None else link_secret
    with _blamed_on("--link-secret"):
        links = Links(secret)
    with _blamed_on("--tokens"):
        authorizer = TokenAuthorizer(known, links)
    return Admission(authorizer, secret, allowed_origins=tuple(allow_origin), allowed_hosts=tuple(allow_host) or None)


@contextmanager
def _blamed_on(name: str) -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        raise click.BadParameter(str(error), param_hint=name) from None
