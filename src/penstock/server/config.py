"""Hypercorn's configuration with penstock's defaults, apart from the server: a parent of workers needs no more."""

from __future__ import annotations

from typing import Final

from hypercorn.config import Config

BACKLOG: Final = 1024
"""The connections that may wait to be accepted. With Hypercorn's 100, some of a burst of 1,000 wait 13 s in vain."""
USER_TIMEOUT: Final = 30.0  # seconds after which TCP ends the connection of a client that takes nothing in
MAX_USER_TIMEOUT: Final = (2**31 - 1) / 1000
"""The longest TCP user timeout that a socket takes, in seconds: milliseconds in 31 bits."""
MAX_HEADER_BYTES: Final = 16 * 1024  # the default limit on a request's line and headers


def new_config(max_header_bytes: int = MAX_HEADER_BYTES) -> Config:
    """Hypercorn's configuration, with a backlog that takes a burst of readers who all come back at once.

    Beyond `max_header_bytes` of line and headers an HTTP/1.1 request is answered 431, and an HTTP/2 connection ends.
    """
    config = Config()
    config.backlog = BACKLOG
    config.h11_max_incomplete_size = max_header_bytes
    config.h2_max_header_list_size = max_header_bytes
    return config
