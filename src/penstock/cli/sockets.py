"""Where a server listens, and with which certificate: what can be wrong with either is known before anything starts."""

from __future__ import annotations

import ipaddress
import os
import socket
import ssl
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from penstock.errors import ConfigurationError
from penstock.server.serve import BACKLOG

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_PORT: Final = 65535


def check_certificate(certfile: str, keyfile: str) -> None:
    """Read a certificate and its private key, to see whether a server could.

    Args:
        certfile: the path of the certificate and those that vouch for it, in PEM.
        keyfile: the path of its private key, in PEM; may be the same file.

    Raises:
        ConfigurationError: it could not.
    """
    locked = False

    def passphrase() -> str:
        nonlocal locked
        locked = True
        return "-"

    for path, what in ((certfile, "CERTIFICATE"), (keyfile, "PRIVATE KEY")):
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
        if f"{what}-----".encode() not in content:
            raise ConfigurationError(
                f"there is no {what.lower()} in {path}: in PEM it begins with -----BEGIN {what}-----"
            )
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, passphrase)
    except ssl.SSLError as error:
        if locked:
            raise ConfigurationError(
                f"the private key in {keyfile} is encrypted, and nobody is asked for its passphrase; decrypt it first: "
                f"openssl pkey -in {keyfile} -out plain.pem"
            ) from None
        if error.reason == "KEY_VALUES_MISMATCH":
            raise ConfigurationError(f"the private key in {keyfile} belongs to another certificate") from None
        words = f"{certfile} and {keyfile} are not a whole certificate and its private key ({error.reason or error})"
        raise ConfigurationError(words) from None


@contextmanager
def listening(binds: Sequence[str], *, anywhere: bool) -> Iterator[list[socket.socket]]:
    """Sockets from `listen`, closed in the end.

    Raises:
        BadParameter: it cannot listen there.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # closed by whoever started this, and no place for a socket
            os.open(os.devnull, os.O_RDWR)
    try:
        sockets = listen(binds, anywhere=anywhere)
    except ConfigurationError as error:
        raise click.BadParameter(str(error), param_hint="--bind") from None
    try:
        yield sockets
    finally:
        for sock in sockets:
            sock.close()


def listen(binds: Sequence[str], *, anywhere: bool) -> list[socket.socket]:
    """Bind and listen, on all of the addresses or on none.

    Args:
        binds: `HOST:PORT` each; a port of 0 is a free one.
        anywhere: allow addresses that others than this machine can reach.

    Raises:
        ConfigurationError: an address is not one, is not loopback, or cannot be bound.
    """
    with ExitStack() as stack:
        sockets = [stack.enter_context(_listen(bind, anywhere=anywhere)) for bind in binds]
        stack.pop_all()
    return sockets


def _listen(bind: str, *, anywhere: bool) -> socket.socket:
    host, colon, digits = bind.rpartition(":")
    port = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= len(str(MAX_PORT)) else -1
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not 0 <= port <= MAX_PORT:
        raise ConfigurationError(
            f"{bind!r} is not HOST:PORT, such as 127.0.0.1:8000 or [::1]:8000 (port 0: a free one)"
        )
    try:
        family, _, _, _, address = min(
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE),
            key=lambda found: found[0] is not socket.AF_INET,  # a name with both gets the one that clients try first
        )
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"{bind}: there is no address of that name ({error}); check the spelling") from None
    if not anywhere and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ConfigurationError(
            f"{bind} can be reached from other machines, and whoever reaches it can start, read and cancel every run; "
            "give --token or --tokens, bind to 127.0.0.1 behind a proxy that asks who is there, or add --insecure if "
            "the network itself is safe"
        )
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if family is socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(address)
        sock.listen(BACKLOG)
    except OSError as error:
        sock.close()
        raise ConfigurationError(
            f"{bind} cannot be bound: {error.strerror}; choose another port, or 0 for a free one"
        ) from None
    return sock
