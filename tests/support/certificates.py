"""A server's certificate, and a client that trusts it; everything else about TLS is as it is by default."""

from __future__ import annotations

from contextlib import contextmanager
from ssl import create_default_context
from typing import TYPE_CHECKING

import trustme

from tests.support.serving import quiet_config

if TYPE_CHECKING:
    from collections.abc import Iterator
    from ssl import SSLContext

    from hypercorn.config import Config


@contextmanager
def tls_config(*alpn: str) -> Iterator[tuple[Config, SSLContext]]:
    authority, context = trustme.CA(), create_default_context()
    authority.configure_trust(context)
    with authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.tempfile() as pem:
        config = quiet_config()
        config.certfile = config.keyfile = pem
        config.alpn_protocols = [*alpn]
        yield config, context
