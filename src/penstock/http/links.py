"""Links: a run's stream for whoever has the address, for a time.

A browser's `EventSource` cannot send a token, so the address itself has to say that it may be read. A link is a JSON
Web Token (RFC 7519), signed with HMAC-SHA256: `sub` is the run, `aud` what it is for, `exp` its end. Whoever knows the
secret can make one, in any language:

    {"sub": RUN_ID, "aud": "penstock:read", "exp": SECONDS_SINCE_THE_EPOCH}   as   /v1/runs/RUN_ID/stream?link=TOKEN

A link ends new requests, not streams that are open. There is no list of links, so none can be taken back alone: a new
secret takes back all.
"""

from __future__ import annotations

import math
import secrets
import time
from typing import Final

import jwt

from penstock.errors import ConfigurationError, NotAuthenticated

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
