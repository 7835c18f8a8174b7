"""Addresses that a server can and cannot have."""

from __future__ import annotations

import os
import socket

import pytest

from penstock.cli.sockets import listen, listening
from tests.support.command_line import ANY_PORT, PRODUCERS, refused


@pytest.mark.parametrize(
    "bind,words",
    [
        ("8000", "'8000' is not HOST:PORT, such as 127.0.0.1:8000"),
        (":8000", "is not HOST:PORT"),
        ("127.0.0.1:", "is not HOST:PORT"),
        ("127.0.0.1:65536", "is not HOST:PORT"),
        ("127.0.0.1:-1", "is not HOST:PORT"),
        ("127.0.0.1:http", "is not HOST:PORT"),
        ("0.0.0.0:0", "can be reached from other machines"),
        ("[::]:0", "or add --insecure if the network itself is safe"),
        ("no.such.host.invalid:80", "there is no address of that name"),
        ("192.0.2.1:0", "--insecure"),
    ],
)
def test_wrong_addresses_are_refused_with_what_to_do(bind: str, words: str) -> None:
    assert words in refused("serve", "--producers", PRODUCERS, "--bind", bind)


def test_a_port_in_use_is_refused_and_no_socket_stays_bound() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        output = refused("serve", "--producers", PRODUCERS, *ANY_PORT, "--bind", address)
    assert f"{address} cannot be bound: Address already in use; choose another port" in output


def test_an_address_for_everybody_is_taken_when_one_insists() -> None:
    (sock,) = listen(["0.0.0.0:0"], anywhere=True)
    with sock:
        assert sock.getsockname()[0] == "0.0.0.0"  # noqa: S104  (that is the point)


def test_ipv6_loopback_needs_no_insistence() -> None:
    (sock,) = listen(["[::1]:0"], anywhere=False)
    with sock:
        assert sock.getsockname()[0] == "::1"


def test_no_socket_takes_the_place_of_a_closed_standard_stream() -> None:
    kept = os.dup(0)
    os.close(0)
    try:
        with listening(["127.0.0.1:0"], anywhere=False) as sockets:
            assert min(each.fileno() for each in sockets) > 2
        assert [each.fileno() for each in sockets] == [-1]
    finally:
        os.dup2(kept, 0)
        os.close(kept)
