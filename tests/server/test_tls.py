"""TLS from the command line: certificates that a server cannot use, and one that it can."""

from __future__ import annotations

import ssl
import sys
from typing import TYPE_CHECKING

import httpx2
import pytest
import trustme
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    PrivateFormat,
    load_pem_private_key,
)

from penstock.cli.sockets import check_certificate
from penstock.errors import ConfigurationError
from tests.support.command_line import ANY_PORT, PRODUCERS, refused
from tests.support.processes import process
from tests.support.wire import DONE, blocks_of, ids

if TYPE_CHECKING:
    from pathlib import Path

AUTHORITY = trustme.CA()
LEAF = AUTHORITY.issue_cert("127.0.0.1", "localhost")
OTHER = AUTHORITY.issue_cert("127.0.0.1")


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    """A folder with certificates and keys, good ones and bad ones."""
    (tmp_path / "cert.pem").write_bytes(b"".join(blob.bytes() for blob in LEAF.cert_chain_pems))
    (tmp_path / "key.pem").write_bytes(LEAF.private_key_pem.bytes())
    (tmp_path / "both.pem").write_bytes(LEAF.private_key_and_cert_chain_pem.bytes())
    (tmp_path / "other.pem").write_bytes(OTHER.private_key_pem.bytes())
    (tmp_path / "empty.pem").write_bytes(b"")
    begin, end = b"-----BEGIN CERTIFICATE-----\n", b"-----END CERTIFICATE-----\n"
    (tmp_path / "broken.pem").write_bytes(begin + b"bm90IGEgY2VydGlmaWNhdGU=\n" + end)
    key = load_pem_private_key(LEAF.private_key_pem.bytes(), None)
    locked = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"secret"))
    (tmp_path / "locked.pem").write_bytes(locked)
    return tmp_path


@pytest.mark.parametrize("files", [("cert.pem", "key.pem"), ("both.pem", "both.pem"), ("both.pem", "key.pem")])
def test_a_certificate_and_its_key_may_be_two_files_or_one(pem: Path, files: tuple[str, str]) -> None:
    check_certificate(*(str(pem / name) for name in files))


@pytest.mark.parametrize(
    "certfile, keyfile, words",
    [
        ("nowhere.pem", "key.pem", "nowhere.pem cannot be read: No such file or directory"),
        ("cert.pem", "nowhere.pem", "nowhere.pem cannot be read: No such file or directory"),
        (".", "key.pem", "cannot be read: Is a directory"),
        ("empty.pem", "key.pem", "there is no certificate in"),
        ("key.pem", "key.pem", "there is no certificate in"),
        ("cert.pem", "cert.pem", "there is no private key in"),
        ("cert.pem", "other.pem", "belongs to another certificate"),
        ("cert.pem", "locked.pem", "decrypt it first: openssl pkey -in"),
        ("broken.pem", "key.pem", "are not a whole certificate and its private key"),
    ],
)
def test_a_wrong_certificate_is_refused_before_the_start(pem: Path, certfile: str, keyfile: str, words: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        check_certificate(str(pem / certfile), str(pem / keyfile))
    assert words in str(caught.value)
    output = refused(
        "serve", "--producers", PRODUCERS, *ANY_PORT, "--certfile", pem / certfile, "--keyfile", pem / keyfile
    )
    assert "Invalid value for --certfile" in output


def test_a_key_without_a_certificate_is_refused(pem: Path) -> None:
    output = refused("serve", "--producers", PRODUCERS, *ANY_PORT, "--keyfile", pem / "key.pem")
    assert "Invalid value for --keyfile" in output
    assert "give --certfile, too" in output


async def test_serve_speaks_tls_and_http2_to_who_can(pem: Path) -> None:
    trusts = ssl.create_default_context()
    AUTHORITY.configure_trust(trusts)
    serve = (sys.executable, "-m", "penstock", "serve", "--producers", PRODUCERS, *ANY_PORT)
    async with process(*serve, "--certfile", str(pem / "both.pem")) as server:
        assert server.url.startswith("https://127.0.0.1:")
        for http2, version in ((True, "HTTP/2"), (False, "HTTP/1.1")):
            async with httpx2.AsyncClient(base_url=server.url, verify=trusts, http2=http2) as client:
                body = {"producer": "countdown", "input": 2, "stream": True}
                answer = await client.post("/v1/runs", json=body)
                assert answer.http_version == version
                blocks = blocks_of(answer.text)
                assert (ids(blocks), blocks[-1].data) == ([1, 2, 3, 4], DONE)
        with pytest.raises(httpx2.RemoteProtocolError):  # in clear text
            await server.client.get(server.url.replace("https", "http") + "/healthz")
