"""Command-line options: those of several commands, one for each field of `Settings`, and those of authorization."""

from __future__ import annotations

import json
import os
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import click

from penstock.asgi.auth import Links, Token, TokenAuthorizer, check_origins, new_secret, read_tokens, rights_of
from penstock.errors import ConfigurationError
from penstock.sse.dialects import DIALECTS
from penstock.supervisor.settings import MIB, Settings

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence
    from dataclasses import Field

    _Decorator = Callable[[Callable[..., None]], Callable[..., None]]

option: Final = partial(click.option, show_envvar=True)
FORMATS: Final = ("text", "json")
LEVELS: Final = ("debug", "info", "warning", "error")
CONTEXT: Final = {
    "auto_envvar_prefix": "PENSTOCK",
    "help_option_names": ["-h", "--help"],
    "max_content_width": 110,
    "show_default": True,
}
"""The settings of every click command."""
ARGUMENTS: Final = "penstock.arguments"  # the key under which click's context keeps all arguments of the program
UNITS: Final = {"s": "SECONDS", "bytes": "BYTES", "entries": "ENTRIES", "runs": "RUNS", "readers": "READERS"}
"""How the help shows the unit of a setting."""


def shared_options(function: Callable[..., None]) -> Callable[..., None]:
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
            help="The lowest level of penstock's own log records that are written to standard error.",
        ),
        option(
            "--log-format",
            type=click.Choice(FORMATS),
            default="text",
            help="Whether log records are text or one JSON object a line.",
        ),
    )
    return _with(options, function)


def settings_options(function: Callable[..., None]) -> Callable[..., None]:
    return _with([_setting_option(setting) for setting in fields(Settings)], function)


def _with(options: Sequence[_Decorator], function: Callable[..., None]) -> Callable[..., None]:
    for each in reversed(options):
        function = each(function)
    return function


def _setting_option(setting: Field[Any]) -> _Decorator:
    text: str = setting.metadata["help"]
    default: Any = setting.default
    details: dict[str, Any] = {"default": default, "help": f"{text[0].upper()}{text[1:]}."}
    if setting.name == "dialect":
        details["type"] = click.Choice(sorted(DIALECTS))
    elif isinstance(default, bool):
        details["is_flag"] = True
    elif "min" in setting.metadata:
        numbers = click.IntRange if isinstance(default, int) else click.FloatRange
        unit: str = setting.metadata["unit"]
        details["type"] = numbers(min=setting.metadata["min"], min_open=setting.metadata["exclusive_min"])
        details["metavar"] = UNITS.get(unit, unit.upper())
        if unit == "bytes":
            details["show_default"] = binary(default)
    return option("--" + setting.name.replace("_", "-"), setting.name, **details)


def binary(size: int) -> str:
    for unit, factor in (("MiB", MIB), ("KiB", MIB // 1024)):
        if size % factor == 0:
            return f"{size} = {size // factor} {unit}"
    return str(size)


# Authorization

TOKEN: Final = "PENSTOCK_TOKEN"  # noqa: S105  (a name, as the others are)
TOKENS: Final = "PENSTOCK_TOKENS"
LINK_SECRET: Final = "PENSTOCK_LINK_SECRET"  # noqa: S105
"""The environment variables of the options."""
INHERITED: Final = "PENSTOCK_INHERITED_TOKENS"
"""The environment variable in which workers find the tokens that their parent has read: digests and rights."""
SECRETS: Final = (TOKEN, LINK_SECRET, INHERITED, "PENSTOCK_LOG")
"""The environment variables that only penstock itself may see; the last one may hold a password."""
LOOPBACK: Final = "localhost"  # the name of a server that only this machine reaches
AUTH_OPTIONS: Final = ("token", "tokens", "link_secret", "allow_origin", "allow_host", "insecure")
"""The names of the values that `authorization_options` adds."""


@dataclass(frozen=True, slots=True)
class AuthOptions:
    """What the authorization options mean."""

    authorizer: TokenAuthorizer | None = None  # None: every client may do everything
    for_workers: Mapping[str, str] = field(default_factory=dict, repr=False)  # environment variables with their secrets
    insecure: bool = False  # no client needs a token, although other machines can reach the server
    allowed_origins: tuple[str, ...] = ()  # whose pages may use the server from a browser
    allowed_hosts: tuple[str, ...] | None = None  # the names under which the server answers; None = any

    @property
    def anywhere(self) -> bool:
        """Whether the server may listen where other machines can reach it."""
        return self.insecure or self.authorizer is not None

    @property
    def for_app(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("authorizer", "allowed_origins", "allowed_hosts")}


def authorization_options(function: Callable[..., None]) -> Callable[..., None]:
    options = (
        option(
            "--token",
            envvar=TOKEN,
            metavar="TOKEN",
            help="A client that sends this token (Authorization: Bearer TOKEN) may do everything; other clients may do "
            "nothing. Keep it in the environment variable: every user of this machine can read a command line.",
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
            help="The secret that signs links to streams, for browsers, whose EventSource can send no token; at least "
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
            help="Answer requests for this host name, and no others but IP addresses. Without tokens a server on "
            f"loopback answers to {LOOPBACK} alone; otherwise pages of other sites could reach it through names of "
            "their own.",
        ),
        option(
            "--insecure",
            is_flag=True,
            help="Ask for no token, on addresses that other machines can reach: every client that reaches the server "
            "can start, read and cancel every run.",
        ),
    )
    return _with(options, function)


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
    """Check the options; a worker takes the tokens that its parent has read, so that all accept the same ones."""
    known = _inherited() if worker else _tokens(token, tokens)
    with _error_of("--allow-origin"):
        check_origins(allow_origin, anybody=not known)
    if not known:
        if link_secret is not None:
            raise click.UsageError("a secret for links is of no use without tokens: give --token or --tokens, too")
        hosts = (LOOPBACK, *allow_host) if allow_host or not insecure else None
        return AuthOptions(insecure=insecure, allowed_origins=tuple(allow_origin), allowed_hosts=hosts)
    if insecure:
        raise click.UsageError("--insecure asks for no token, and there are tokens; give one or the other")
    secret = new_secret() if link_secret is None else link_secret
    with _error_of("--link-secret"):
        links = Links(secret)
    with _error_of("--tokens"):
        authorizer = TokenAuthorizer(known, links)
    digests = {name: [each.digest.hex(), sorted(each.rights)] for name, each in known.items()}
    hosts = (LOOPBACK, *allow_host) if allow_host else None
    for_workers = {LINK_SECRET: secret, INHERITED: json.dumps(digests)}
    return AuthOptions(authorizer, for_workers, allowed_origins=tuple(allow_origin), allowed_hosts=hosts)


def forget_secrets() -> None:
    """Remove secrets from the environment, which programs that producers start would inherit."""
    for name in SECRETS:
        os.environ.pop(name, None)


def _tokens(token: str | None, tokens: str | None) -> dict[str, Token]:
    for name in (TOKEN, TOKENS, LINK_SECRET):
        if os.environ.get(name) == "":
            raise click.UsageError(f"{name} is empty, as when it could not be made; give it a value, or unset it")
    known: dict[str, Token] = {}
    if tokens is not None:
        with _error_of("--tokens"):
            known = read_tokens(tokens)
    if token is not None:
        if TOKEN in known:
            raise click.BadParameter(f"[{TOKEN}] is the name of --token; choose another name", param_hint="--tokens")
        with _error_of("--token"):
            known[TOKEN] = Token.of(token)
    return known


def _inherited() -> dict[str, Token]:
    digests: dict[str, list[Any]] = json.loads(os.environ.get(INHERITED, "{}"))
    return {name: Token(bytes.fromhex(digest), rights_of(rights)) for name, (digest, rights) in digests.items()}


@contextmanager
def _error_of(name: str) -> Iterator[None]:
    try:
        yield
    except ConfigurationError as error:
        raise click.BadParameter(str(error), param_hint=name) from None
