"""A server that requires a token, and the credentials that it knows."""

from __future__ import annotations

import base64
import hmac
import json
import time
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from starlette.routing import Route

from penstock import Right, Token, TokenAuthorizer
from penstock.asgi.auth import Links
from tests.support.serving import serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Iterator

    from starlette.applications import Starlette

    from tests.support.serving import Server

TOKEN: Final = "correct.horse-battery_staple"  # noqa: S105
SECRET: Final = "a secret that nobody can guess, not even by trying for a long time"  # noqa: S105
OPEN: Final = {"/healthz", "/readyz"}
"""The routes that need no credential."""
AN_HOUR: Final = 3600


def bearer(token: str) -> dict[str, str]:
    return {"authorization": f"Bearer {token}"}


@asynccontextmanager
async def guarded(rights: list[str] | None = None, **settings: Any) -> AsyncIterator[Server]:
    """A server that knows `TOKEN`, with these rights (None: all). Its client sends it, unless a test removes it."""
    authorizer = TokenAuthorizer({"it": Token.of(TOKEN, Right if rights is None else rights)}, Links(SECRET))
    async with serving(authorizer=authorizer, **settings) as server:
        server.client.headers.update(bearer(TOKEN))
        yield server


def guarded_requests(app: Starlette, run_id: str = "r") -> Iterator[tuple[str, str]]:
    for route in app.routes:
        assert isinstance(route, Route)
        if route.path not in OPEN:
            for method in sorted(route.methods or ()):
                yield method, route.path.format(run_id=run_id)


def link(secret: str = SECRET, /, algorithm: str = "HS256", **claims: Any) -> dict[str, str]:
    """The query with a link, made by the letter of RFC 7519; a claim that is None is left out."""
    whole = {"sub": "r", "aud": "penstock:read", "exp": int(time.time()) + AN_HOUR, **claims}
    told = {name: value for name, value in whole.items() if value is not None}
    signed = f"{base64url({'alg': algorithm, 'typ': 'JWT'})}.{base64url(told)}"
    digest = {"HS256": "sha256", "HS512": "sha512"}.get(algorithm)
    signature = b"" if digest is None else hmac.digest(secret.encode(), signed.encode(), digest)
    return {"link": f"{signed}.{base64url(signature)}"}


def base64url(value: Any) -> str:
    octets = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(octets).rstrip(b"=").decode()
