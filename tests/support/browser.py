"""A real Chromium, without a driver: it opens a page that a test's server serves, and the page reports what it saw.

The browser is Debian's `chromium-headless-shell` or `chromium`, or the one that PENSTOCK_TEST_CHROMIUM names;
`just test` installs the first where it may. Nothing that it does leaves this machine.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import httpx2
import trio
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route

from penstock import serve
from tests.support.certificates import tls_config
from tests.support.serving import GUARD, eventually, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Mapping

    from hypercorn.config import Config
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from tests.support.serving import Server

NAMES: Final = ("chromium-headless-shell", "chromium", "google-chrome")
FLAGS: Final = (
    "--headless",
    "--no-sandbox",  # root may not have one
    "--disable-gpu",
    "--disable-dev-shm-usage",  # a container's /dev/shm is small, or missing
    "--no-proxy-server",
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-extensions",
    "--disable-sync",
    "--no-first-run",
    "--log-level=3",
    "--ignore-certificate-errors",
)

PAGE: Final = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><script>
const say = (body) => fetch("/said", {method: "POST", body: JSON.stringify(body)});
const sources = IDS.map((id) => {
  const source = new EventSource(`/v1/runs/${id}/stream`);
  source.seen = {opens: 0, events: []};
  source.onopen = () => { source.seen.opens += 1; };
  source.onmessage = (event) => {
    source.seen.events.push([event.lastEventId, event.data]);
    if (TELLS) say({event: event.data});
  };
  source.onerror = () => {
    if (sources.some((each) => each.readyState !== EventSource.CLOSED)) return;
    const entries = performance.getEntriesByType("resource").filter((entry) => entry.name.endsWith("/stream"));
    say({streams: sources.map((each) => each.seen), protocols: entries.map((entry) => entry.nextHopProtocol)});
  };
  return source;
});
</script>"""
"""Follows the runs IDS until the server has told each `EventSource` to stop, then says what it saw.

If it TELLS, it says so of each event as well. (Over HTTP/1.1 that would wait behind the streams.)
"""


@dataclass
class Asked:
    http_version: str
    connection: tuple[str, int]
    last_event_id: str | None
    status: int | None = None


class Site:
    """The page beside the API, what it said, and what it asked for."""

    def __init__(self) -> None:
        self.run_ids: list[str] = []
        self.tells = False
        self.asked: list[Asked] = []
        self.open: set[int] = set()
        """The streams that have been asked for and have not ended."""
        self.most_open = 0
        """The streams that were open at once, at the most."""
        self._say, self.said = trio.open_memory_channel[Any](math.inf)

    async def page(self, _request: Request) -> Response:
        return HTMLResponse(PAGE.replace("IDS", json.dumps(self.run_ids)).replace("TELLS", json.dumps(self.tells)))

    async def hear(self, request: Request) -> Response:
        self._say.send_nowait(await request.json())
        return Response(status_code=204)

    async def serve(self, app: Starlette, config: Config, **options: Any) -> None:
        """Serve all of it; `serving` takes this as its `run`."""
        app.router.routes += [Route("/page", self.page), Route("/said", self.hear, methods=["POST"])]
        app.add_middleware(self.watch)
        await serve(app, config, signals=(), **options)

    def watch(self, app: ASGIApp) -> ASGIApp:
        async def watched(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http" or not scope["path"].endswith("/stream"):
                await app(scope, receive, send)
                return
            cursor = dict(scope["headers"]).get(b"last-event-id")
            asked = Asked(scope["http_version"], scope["client"], cursor and cursor.decode())
            self.asked.append(asked)

            async def note(message: Message) -> None:
                asked.status = message.get("status", asked.status)
                if message["type"] == "http.response.body" and not message.get("more_body", False):
                    self.open.discard(id(asked))  # the browser may ask for the next one as soon as it has this
                await send(message)

            self.open.add(id(asked))
            self.most_open = max(self.most_open, len(self.open))
            await app(scope, receive, note)

        return watched


WHY_NOT: Final = (
    f"there is no Chromium ({', '.join(NAMES)}) in PATH, and `just test` may not install one: that takes root, and "
    "Debian's packages. PENSTOCK_TEST_CHROMIUM=/path/to/one names another"
)


@cache
def executable() -> str | None:
    return os.environ.get("PENSTOCK_TEST_CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)


@asynccontextmanager
async def chromium(url: str) -> AsyncIterator[Path]:
    """A Chromium that opens the page at `url`; what it has to complain of goes into the file that is yielded."""
    command = executable()
    assert command is not None
    with (
        tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True) as home,
        tempfile.NamedTemporaryFile() as stderr,
    ):
        process = await trio.lowlevel.open_process(
            [command, *FLAGS, f"--user-data-dir={home}/profile", url],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=stderr,
            env={**os.environ, "HOME": home, "TMPDIR": home},
            start_new_session=True,
        )
        try:
            yield Path(stderr.name)
        finally:
            with trio.move_on_after(GUARD, shield=True):
                os.killpg(process.pid, signal.SIGKILL)
                await process.wait()
                await eventually(lambda: not _processes_of(home))


def _processes_of(home: str) -> list[str]:
    """The live processes with this home, also those that have left the group. (A zombie's environment is empty.)"""
    found = []
    for environ in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"HOME={home}\0".encode() in environ.read_bytes():
                found.append(environ.parent.name)
    return found


@asynccontextmanager
async def browsing(producers: Mapping[str, Any], *alpn: str, tells: bool = False) -> AsyncIterator[tuple[Server, Site]]:
    """A server with a run of each producer, and a Chromium that follows all of them."""
    site = Site()
    site.tells = tells
    with tls_config(*alpn) as (config, context):
        async with serving(producers, config=config, run=site.serve) as server:
            async with httpx2.AsyncClient(verify=context, base_url=server.url) as server.client:
                site.run_ids = [await server.start(name) for name in producers]
            async with chromium(f"{server.url}/page") as log:
                try:
                    yield server, site
                except BaseException as error:
                    error.add_note(f"Chromium said: {log.read_text()}")
                    raise
