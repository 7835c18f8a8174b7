"""Corrections of Hypercorn's trio worker, for the versions that are known to need them.

| patch | what Hypercorn 0.18.0 does | upstream |
|---|---|---|
| `connection.time_out_stalled` | keeps the connection of a client that has stopped reading | |
| `PatchedTCPServer.run` | ends the server with an error of one connection | pgjones/hypercorn#225 |
| `PatchedTCPServer.protocol_send` | shields a send without a deadline, so that a slow client outlasts a shutdown | |
| `PatchedTCPServer._at_once` | passes every send through the scheduler, twice | |
| `PatchedTCPServer.lose` | notifies some responses of a lost connection, and not others | pgjones/hypercorn#210 |
| `PatchedTCPServer._read_data` | keeps a connection whose client has sent a second request early | |
| `PatchedTCPServer._initiate_server_close` | loses the last bytes of an HTTP/2 connection that it closes | |
| `PatchedH11._check_protocol` | upgrades to HTTP/2 in clear text, with errors | pgjones/hypercorn#277, #317 |
| `PatchedH11._create_stream`, `PatchedH2` | lets headers above the limit pass | |
| `PatchedH11.handle`, `PatchedH2` | keeps the connection of a refused WebSocket | |
| `PatchedH11._close_stream`, `PatchedH2` | waits for a response that reads no more of its request | |
| `PatchedH11.stream_send` | passes each chunk of a body through all of h11 | |
| `ReadWhilePipelined` | does not notice that a client has gone that sent a second request early | |
| `PatchedStreamBuffer` | buffers an HTTP/2 response without a limit | davidbrochart/anycorn#61 |
| `PatchedH2` | keeps responses whose client has gone; cuts them off at a shutdown | pgjones/hypercorn#226, #308 |
| `keep_alive_max_requests` | starves an HTTP/2 connection's streams after 1,000 requests | pgjones/hypercorn#241 |

The first one is an option of the listening sockets, which works with any version. The others replace classes in
Hypercorn's modules when a server first asks for them. A server that did not ask keeps Hypercorn's own connections, but
for `PatchedStreamBuffer`, which does not see the configuration. For a version that is not in `VERSIONS` nothing is
replaced, and a warning says so. A patch is deleted when upstream has fixed what it corrects.
"""

from __future__ import annotations

import sys
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import hypercorn.protocol
import hypercorn.trio.run
from hypercorn.protocol.h2 import H2Protocol, StreamBuffer
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.tcp_server import TCPServer

from penstock.server.hypercorn_fixes.connection import SENDS, PatchedTCPServer, SendDeadline, sends_of
from penstock.server.hypercorn_fixes.http1 import PatchedH11
from penstock.server.hypercorn_fixes.http2 import PatchedH2, PatchedStreamBuffer

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from hypercorn.config import Config
    from hypercorn.typing import AppWrapper

VERSIONS: Final = ("0.18.0",)  # the versions of Hypercorn that the patches were made for


class Patch(NamedTuple):
    """A class of Hypercorn's, by the name under which its users look it up, and what replaces it."""

    module: ModuleType
    name: str
    original: type[Any]
    replacement: Callable[..., Any]


def _for_patched_servers(patched: type[Any], original: type[Any]) -> Callable[..., Any]:
    """A factory of `patched` for servers that asked for the patches, and of `original` for all others."""

    def make(app: AppWrapper, config: Config, *others: Any, **named: Any) -> Any:
        return (original if sends_of(config) is None else patched)(app, config, *others, **named)

    return make


PATCHES: Final = (
    Patch(hypercorn.protocol.h2, "StreamBuffer", StreamBuffer, PatchedStreamBuffer),
    Patch(hypercorn.protocol, "H2Protocol", H2Protocol, _for_patched_servers(PatchedH2, H2Protocol)),
    Patch(hypercorn.protocol, "H11Protocol", H11Protocol, _for_patched_servers(PatchedH11, H11Protocol)),
    Patch(hypercorn.trio.run, "TCPServer", TCPServer, _for_patched_servers(PatchedTCPServer, TCPServer)),
)


def are_known() -> bool:
    """Whether the installed Hypercorn is a version that the patches were made for."""
    return version("hypercorn") in VERSIONS


def apply(config: Config, warn: Callable[[str], None]) -> SendDeadline:
    """Patch the connections of the server that has this configuration, which is changed; the deadline of its sends.

    `warn` is called with a line for each patch that is not in place.
    """
    sends = SendDeadline()
    if not are_known():
        warn(
            f"Hypercorn {version('hypercorn')} is no version that penstock has patches for ({', '.join(VERSIONS)} is), "
            "so it runs without them: a client that reads slowly may hold up a shutdown, HTTP/2 may take memory "
            "without a limit, and an error in one connection may end the server"
        )
        return sends
    setattr(config, SENDS, sends)
    config.keep_alive_max_requests = sys.maxsize
    for module, name, original, replacement in PATCHES:
        if getattr(module, name) is original:
            setattr(module, name, replacement)
        elif getattr(module, name) is not replacement:
            warn(f"{module.__name__}.{name} was replaced by other code, and is not patched")
    return sends
