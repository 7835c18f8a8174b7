"""A real nginx in front of a test's server, by the configuration that examples/deploy ships.

Of the shipped file only addresses, certificate and logs are others; around it is what matters of Debian's nginx.conf.
The nginx is the one in PATH, or Debian's /usr/sbin/nginx, or the one that PENSTOCK_TEST_NGINX names;
`just test` installs Debian's where it may.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import ssl
import subprocess
import tempfile
from contextlib import asynccontextmanager, suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Final, cast

import httpx2
import trio
import trustme
from hyperframe.frame import GoAwayFrame

from tests.support.http2_clients import Ends
from tests.support.serving import GUARD, Client, eventually
from tests.support.wire import Wire

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

SHIPPED: Final = Path(__file__).parents[2] / "examples" / "deploy" / "nginx.conf"

WHY_NOT: Final = (
    "there is no nginx in PATH or /usr/sbin, and `just test` may not install one: that takes root, and Debian's "
    "packages (nginx-light). PENSTOCK_TEST_NGINX=/path/to/one names another"
)

MAIN: Final = """
daemon off;
worker_processes {workers};
pid {folder}/pid;
error_log {folder}/main.log notice;
{main}
events {{
    worker_connections {connections};
}}
http {{
    access_log {folder}/others.log;
    client_body_temp_path {folder}/body;
    proxy_temp_path {folder}/proxy;
    fastcgi_temp_path {folder}/fastcgi;
    uwsgi_temp_path {folder}/uwsgi;
    scgi_temp_path {folder}/scgi;
    default_type application/octet-stream;
    gzip on;
    gzip_types *;
    gzip_min_length 1;
    {http}
    include {folder}/penstock.conf;
}}
"""
"""What stands around the shipped file: as in Debian, but that `gzip` is on for everything."""
DEBIAN: Final = {"workers": "2", "connections": "768", "main": "", "http": ""}


@cache
def executable() -> str | None:
    return os.environ.get("PENSTOCK_TEST_NGINX") or shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")


def replaced(text: str, changes: Mapping[str, str]) -> str:
    for old, new in changes.items():
        assert old in text, f"there is no {old!r} in {text}"
        text = text.replace(old, new)
    return text


def free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [int(sock.getsockname()[1]) for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()


def _accepts_no_more(worker: int) -> bool:
    try:
        return b"shutting down" in Path(f"/proc/{worker}/cmdline").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return True


class Connection(Ends):
    """An HTTP/2 connection that takes in what comes after GOAWAY, too (RFC 9113, section 6.8); h2 would refuse that."""

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__(stream)
        self.h2._frame_dispatch_table[GoAwayFrame] = lambda _frame: ([], [])


class Nginx(Client):
    """An nginx of a test's own, with its logs in `folder`, and a client of the server behind it."""

    def __init__(self, folder: Path, authority: trustme.CA, client: httpx2.AsyncClient) -> None:
        super().__init__("", client)
        self.folder = folder
        self._authority = authority
        self._process: trio.Process | None = None
        self._count = 0

    @property
    def logs(self) -> dict[str, str]:
        return {path.name: path.read_text() for path in self.folder.glob("*.log")}

    async def wire(self) -> Wire:
        """A connection for HTTP/1.1, by TLS; it can be used in the same way."""
        return Wire(cast("trio.SocketStream", await self.tls("http/1.1")))

    async def tls(self, protocol: str) -> trio.SSLStream[trio.SocketStream]:
        """A connection for this protocol, which nginx has agreed to."""
        context = _who_trusts(self._authority)
        context.set_alpn_protocols([protocol])
        plain = await trio.open_tcp_stream("127.0.0.1", self.port)
        stream = trio.SSLStream(plain, context, https_compatible=True, server_hostname="127.0.0.1")
        try:
            await stream.do_handshake()
            assert stream.selected_alpn_protocol() == protocol
        except BaseException:
            await trio.aclose_forcefully(stream)
            raise
        return stream

    @asynccontextmanager
    async def http2(self) -> AsyncIterator[Connection]:
        async with await self.tls("h2") as stream:
            yield Connection(cast("trio.SocketStream", stream))

    def workers(self) -> set[int]:
        """The processes that serve, old and new."""
        assert self._process is not None
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        return {int(pid) for pid in children.read_text().split()}

    async def reload(self) -> set[int]:
        """Have new workers serve. The old ones, of which those are still there that have a stream."""
        assert self._process is not None
        before = self.workers()
        self._process.send_signal(signal.SIGHUP)
        await eventually(lambda: len(self.workers() - before) == self._count)
        await eventually(lambda: all(map(_accepts_no_more, before)))
        return before

    async def _start(self, shipped: Mapping[str, str], surroundings: Mapping[str, str]) -> None:
        """Start it on free ports; another program may take one of them before it does."""
        with trio.fail_after(GUARD):
            while not await self._launch(shipped, surroundings):
                assert "Address already in use" in self.logs["main.log"], self.logs

    async def _launch(self, shipped: Mapping[str, str], surroundings: Mapping[str, str]) -> bool:
        """Start it and wait until it accepts connections; False: it has ended instead."""
        port, other = free_ports(2)
        changes = {
            "listen 443": f"listen 127.0.0.1:{port}",
            "listen [::]:443": f"listen 127.0.0.1:{other}",  # not every machine has IPv6
            "/etc/letsencrypt/live/streams.example.org": str(self.folder),
            "/var/log/nginx": str(self.folder),
            **shipped,
        }
        (self.folder / "penstock.conf").write_text(replaced(SHIPPED.read_text(), changes))
        around = {**DEBIAN, **surroundings}
        (self.folder / "nginx.conf").write_text(MAIN.format(folder=self.folder, **around))
        self._count = int(around["workers"])
        command = executable()
        assert command is not None
        with (self.folder / "main.log").open("wb") as log:
            self._process = await trio.lowlevel.open_process(
                [command, "-c", str(self.folder / "nginx.conf"), "-e", str(self.folder / "main.log")],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        own = f"{self._process.pid}\n"
        pid = self.folder / "pid"  # written when its sockets listen
        await eventually(lambda: self._process_has_ended() or (pid.exists() and pid.read_text() == own))
        self.turn_to(f"https://127.0.0.1:{port}")
        return not self._process_has_ended()

    def _process_has_ended(self) -> bool:
        return self._process is not None and self._process.poll() is not None

    async def _kill(self) -> None:
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            await self._process.wait()


@asynccontextmanager
async def nginx_before(
    port: int, *, http2: bool = False, shipped: Mapping[str, str] | None = None, **surroundings: str
) -> AsyncIterator[Nginx]:
    """An nginx before the server at this port of 127.0.0.1; `nginx.client` speaks HTTP/2 if asked to.

    `shipped` changes the shipped file; `surroundings` are `workers` and `connections` in numbers, or directives for the
    outermost context, `main`, and for `http`.
    """
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    with tempfile.TemporaryDirectory(prefix="penstock-nginx-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        _write_certificate(certificate, folder)
        async with httpx2.AsyncClient(verify=_who_trusts(authority), http2=http2, timeout=GUARD) as client:
            nginx = Nginx(folder, authority, client)
            changes = {"server 127.0.0.1:8000": f"server 127.0.0.1:{port}", **(shipped or {})}
            try:
                await nginx._start(changes, surroundings)
                yield nginx
            finally:
                with trio.CancelScope(shield=True):
                    await nginx._kill()


def _who_trusts(authority: trustme.CA) -> ssl.SSLContext:
    context = ssl.create_default_context()
    authority.configure_trust(context)
    return context


def _write_certificate(certificate: trustme.LeafCert, folder: Path) -> None:
    folder.chmod(0o755)  # root's nginx has workers of another user
    (folder / "privkey.pem").write_bytes(certificate.private_key_pem.bytes())
    (folder / "fullchain.pem").write_bytes(b"".join(blob.bytes() for blob in certificate.cert_chain_pems))
