"""Binds the addresses of a server and checks its certificate, so that an error is known before anything starts."""

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
from penstock.server.config import BACKLOG

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

MAX_PORT: Final = 65535


def check_certificate(certfile: str, keyfile: str) -> None:
    """Raise a `ConfigurationError` if a server could not use this certificate and its key (files in PEM)."""
    encrypted = False

    def passphrase() -> str:
        nonlocal encrypted
        encrypted = True
        return "-"

    for path, what in ((certfile, "CERTIFICATE"), (keyfile, "PRIVATE KEY")):
        try:
            content = Path(path).read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
        if f"{what}-----".encode() not in content:
            message = f"there is no {what.lower()} in {path}: in PEM it begins with -----BEGIN {what}-----"
            raise ConfigurationError(message)
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, passphrase)
    except ssl.SSLError as error:
        message = f"{certfile} and {keyfile} are not a whole certificate and its private key ({error.reason or error})"
        if encrypted:
            message = (
                f"the private key in {keyfile} is encrypted, and a server asks for no passphrase; decrypt it first: "
                f"openssl pkey -in {keyfile} -out plain.pem"
            )
        elif error.reason == "KEY_VALUES_MISMATCH":
            message = f"the private key in {keyfile} belongs to another certificate"
        raise ConfigurationError(message) from None


@contextmanager
def listening(binds: Sequence[str], *, anywhere: bool) -> Iterator[list[socket.socket]]:
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:  # the parent process closed it: a socket must not become standard input, output or error
            os.open(os.devnull, os.O_RDWR)
    with ExitStack() as stack:
        try:
            sockets = [stack.enter_context(sock) for sock in listen(binds, anywhere=anywhere)]
        except ConfigurationError as error:
            raise click.BadParameter(str(error), param_hint="--bind") from None
        yield sockets


def listen(binds: Sequence[str], *, anywhere: bool) -> list[socket.socket]:
    """Bind and listen, on all of the addresses or on none; only with `anywhere` on those that other machines reach."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(_listen(bind, anywhere=anywhere)) for bind in binds]
        stack.pop_all()
    return sockets


def _listen(bind: str, *, anywhere: bool) -> socket.socket:
    host, colon, digits = bind.rpartition(":")
    port = int(digits) if digits.isascii() and digits.isdigit() and len(digits) <= len(str(MAX_PORT)) else -1
    host = host.removeprefix("[").removesuffix("]")
    if not colon or not host or not 0 <= port <= MAX_PORT:
        message = f"{bind!r} is not HOST:PORT, such as 127.0.0.1:8000 or [::1]:8000 (port 0: a free one)"
        raise ConfigurationError(message)
    try:
        family, _, _, _, address = min(
            socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE),
            key=lambda found: found[0] is not socket.AF_INET,  # of a name with both, clients try the IPv4 address first
        )
    except (OSError, UnicodeError) as error:
        raise ConfigurationError(f"{bind}: there is no address of that name ({error}); check the spelling") from None
    if not anywhere and not ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback:
        raise ConfigurationError(
            f"{bind} can be reached from other machines, where every client can start, read and cancel every run; "
            "give --token or --tokens, bind to 127.0.0.1 behind a proxy that authenticates its clients, or add "
            "--insecure if the network itself is safe"
        )
    # Not Hypercorn's Config.create_sockets: it binds [::] to IPv4, too, looks a name up as IPv4 alone, and leaves the
    # sockets open that it has bound when a later one fails.
    try:
        return socket.create_server(address, family=family, backlog=BACKLOG)
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        message = f"{bind} cannot be bound: {reason}; choose another port, or 0 for a free one"
        raise ConfigurationError(message) from None
