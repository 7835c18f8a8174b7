"""Options: what is common to all commands, and one option for each knob of `Settings`, made from its fields.

Who may use a server: the options that say so, and what becomes of them.
"""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from penstock.asgi.auth import Token, TokenAuthorizer, check_origins, read_tokens, rights_of
from penstock.errors import ConfigurationError
from penstock.sse.dialects import DIALECTS
from penstock.supervisor.settings import MIB, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from dataclasses import Field

option: Final = partial(click.option, show_envvar=True)
FORMATS: Final = ("text", "json")
LEVELS: Final = ("debug", "info", "warning", "error")
CONTEXT: Final = {
    "auto_envvar_prefix": "PENSTOCK",
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    "show_default": True,
}
"""What click is told of every command."""
ARGUMENTS: Final = "penstock.arguments"
"""Where click's context has the words of the whole command line."""
UNITS: Final = {"s": "SECONDS", "bytes": "BYTES", "entries": "ENTRIES", "runs": "RUNS", "readers": "READERS"}
"""How a unit is written where an option's value stands."""


def shared_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options that `serve` and `exec` share, but for those of `admitting.py`."""
    options = (
        option(
            "--bind",
            multiple=True,
            default=("127.0.0.1:8000",),
            metavar="HOST:PORT",
            help="Where to listen; port 0 is a free one. May be given several times.",
        ),
        option(
            "--log-level",
            type=click.Choice(LEVELS),
            default="info",
            help="From which level on penstock's own log goes to stderr.",
        ),
        option(
            "--log-format",
            type=click.Choice(FORMATS),
            default="text",
            help="Whether it is written for people, or as one JSON object a line.",
        ),
    )
    for each in reversed(options):
        function = each(function)
    return function


def settings_options(function: Callable[..., None]) -> Callable[..., None]:
    """An option for each field of `Settings`."""
    for knob in reversed(fields(Settings)):
        function = _setting_option(knob)(function)
    return function


def _setting_option(knob: Field[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    name = "--" + knob.name.replace("_", "-")
    text: str = knob.metadata["help"]
    default: Any = knob.default
    details: dict[str, Any] = {
        "default": default,
        "help": text[0].upper() + text[1:] + ".",
    }
    if knob.name == "dialect":
        details["type"] = click.Choice(sorted(DIALECTS))
    elif isinstance(default, bool):
        details["is_flag"] = True
    elif "min" in knob.metadata:
        numbers = click.IntRange if isinstance(default, int) else click.FloatRange
        details["type"] = numbers(min=knob.metadata["min"], min_open=knob.metadata["exclusive_min"])
        if knob.metadata["unit"] == "bytes":
            details["show_default"] = binary(default)
        details["metavar"] = UNITS.get(knob.metadata["unit"], knob.metadata["unit"].upper())
    return option(name, knob.name, **details)


def binary(size: int) -> str:
    """A size as people write it; the value itself is always in bytes."""
    for unit, factor in (("MiB", MIB), ("KiB", MIB // 1024)):
        if size % factor == 0:
            return f"{size} = {size // factor} {unit}"
    return str(size)


TOKEN: Final = "PENSTOCK_TOKEN"  # noqa: S105  (a name, as the others are)
TOKENS: Final = "PENSTOCK_TOKENS"
LINK_SECRET: Final = "PENSTOCK_LINK_SECRET"  # noqa: S105
"""The environment variables of the options."""
INHERITED: Final = "PENSTOCK_INHERITED_TOKENS"
"""The environment variable in which workers find the tokens that their parent has read: digests and rights."""
SECRETS: Final = (TOKEN, LINK_SECRET, INHERITED, "PENSTOCK_LOG")
"""The environment variables that only penstock itself may see; the last one may hold a password."""
LOOPBACK: Final = "localhost"
"""The name of a server that only this machine reaches."""


@dataclass(frozen=True, slots=True)
class AuthOptions:
    """What the options say.

    Attributes:
        authorizer: knows who may do what; None: nobody is asked.
        for_workers: what workers find in their environment, so that all of them admit the same.
        insecure: nobody need be asked, although other machines can reach the server.
        allowed_origins: whose pages may use it from a browser.
        allowed_hosts: the names that it answers to; None = any.
    """

    authorizer: TokenAuthorizer | None = None
    for_workers: Mapping[str, str] = field(default_factory=dict, repr=False)
    insecure: bool = False
    allowed_origins: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] | None = None

    @property
    def anywhere(self) -> bool:
        """Whether the server may be where other machines reach it."""
        return self.insecure or self.authorizer is not None


def authorization_options(function: Callable[..., None]) -> Callable[..., None]:
    """The options, which come as `token`, `tokens`, `link_secret`, `allow_origin`, `allow_host` and `insecure`."""
    options = (
        option(
            "--token",
            envvar=TOKEN,
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
            help="Answer to this name, as a proxy may pass it on, and to no others but addresses. Without tokens a "
            f"server on loopback answers to {LOOPBACK} alone, or pages of other sites could reach it through names of "
            "their own.",
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


def auth_options(
    *,
    token: str | None,
    tokens: str | None,
    link_secret: str | None,
    allow_origin: Sequence[str],
    allow_host: Sequence[str],
    insecure: bool,
    worker: bool = False,
) -> AuthOptions:
    """What the options say; for a worker, what its parent has read, so that all of them know the same tokens.

    Raises:
        BadParameter: a token, the file of tokens, the secret or an origin is not what it must be.
        UsageError: the options do not go together.
    """
    known = _inherited() if worker else _tokens(token, tokens)
    with _blamed_on("--allow-origin"):
        check_origins(allow_origin, anybody=not known)
    if not known:
        if link_secret is not None:
            raise click.UsageError("a secret for links is of no use without tokens: give --token or --tokens, too")
        hosts = (LOOPBACK, *allow_host) if allow_host or not insecure else None
        return AuthOptions(insecure=insecure, allowed_origins=tuple(allow_origin), allowed_hosts=hosts)
    if insecure:
        raise click.UsageError("--insecure asks nobody for a token, and there are tokens; give one or the other")
    from penstock.asgi.auth import Links, new_secret  # noqa: PLC0415  (its library takes a while to import)

    secret = new_secret() if link_secret is None else link_secret
    with _blamed_on("--link-secret"):
        links = Links(secret)
    with _blamed_on("--tokens"):
        authorizer = TokenAuthorizer(known, links)
    for_workers = {LINK_SECRET: secret, INHERITED: json.dumps({name: _written(each) for name, each in known.items()})}
    hosts = (LOOPBACK, *allow_host) if allow_host else None
    return AuthOptions(authorizer, for_workers, allowed_origins=tuple(allow_origin), allowed_hosts=hosts)


def forget_secrets() -> None:
    """Take what is secret out of the environment, which the programs that producers start would find there."""
    for name in SECRETS:
        os.environ.pop(name, None)


def _tokens(token: str | None, tokens: str | None) -> dict[str, Token]:
    for name in (TOKEN, TOKENS, LINK_SECRET):
        if os.environ.get(name) == "":
            raise click.UsageError(f"{name} is empty, as when it could not be made; give it a value, or unset it")
    known: dict[str, Token] = {}
    if tokens is not None:
        with _blamed_on("--tokens"):
            known = read_tokens(tokens)
    if token is not None:
        if TOKEN in known:
            raise click.BadParameter(f"[{TOKEN}] is what --token is called; choose another name", param_hint="--tokens")
        with _blamed_on("--token"):
            known[TOKEN] = Token.of(token)
    return known


def _inherited() -> dict[str, Token]:
    written: dict[str, list[Any]] = json.loads(os.environ.get(INHERITED, "{}"))
    return {name: Token(bytes.fromhex(digest), rights_of(rights)) for name, (digest, rights) in written.items()}


def _written(token: Token) -> list[Any]:
    return [token.digest.hex(), sorted(token.rights)]


@contextmanager
def _blamed_on(name: str) -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        raise click.BadParameter(str(error), param_hint=name) from None
