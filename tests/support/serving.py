"""A real server on a real socket in the test's own Trio loop, the producers that it runs, and clients.

In a process of its own, for signals and exit codes: `tests/support/processes.py`.
"""

from __future__ import annotations

import json
import logging
import math
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Final

import httpx2
import trio
from hypercorn.config import Config

from penstock import Event, LoggingObserver, create_app, serve
from penstock.errors import single_error
from tests.support.wire import Block, Reader, Wire, blocks_of

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from starlette.applications import Starlette

    from penstock.asgi.lifespan import AppLifespan

GUARD: Final = 100.0
"""Seconds after which a test on a socket has hung. No test comes near it."""


async def count(n: int) -> AsyncIterator[Event]:
    for number in range(1, n + 1):
        yield Event(data=str(number))


async def echo(value: Any) -> AsyncIterator[Event]:
    yield Event.json({"input": value})


async def silent(_input: Any) -> AsyncIterator[Event]:
    await trio.sleep(3600)
    yield Event(data="an hour later")


async def fail(_input: Any) -> AsyncIterator[Event]:
    yield Event(data="before")
    raise ValueError("the password is hunter2")


PRODUCERS: Final[Mapping[str, Any]] = {"count": count, "echo": echo, "silent": silent, "fail": fail}


class Tap:
    """A producer that yields what the test feeds it, and records how it ends."""

    def __init__(self) -> None:
        self._feed, self._fed = trio.open_memory_channel[Any](math.inf)
        self.closed = trio.Event()
        self.reason: str | None = None
        """Why it was cancelled."""

    async def __call__(self, _input: Any) -> AsyncIterator[Any]:
        try:
            async for chunk in self._fed:
                yield chunk
        except trio.Cancelled as cancelled:
            self.reason = cancelled.reason
            raise
        finally:
            self.closed.set()

    def feed(self, *data: str) -> None:
        for each in data:
            self._feed.send_nowait(Event(data=each))

    def end(self) -> None:
        self._feed.close()


class Silence(LoggingObserver):
    def __init__(self) -> None:
        self.errors: list[tuple[str, str]] = []
        """The type and message of each error, and its id."""

    def on_error(self, error: BaseException, *, error_id: str, where: str) -> None:  # noqa: ARG002
        error = single_error(error)
        self.errors.append((f"{type(error).__name__}: {error}", error_id))

    def run_stuck(self, run_id: str, seconds: float, stack: str) -> None:
        """Log nothing."""


class Client:
    def __init__(self, url: str, client: httpx2.AsyncClient) -> None:
        self.client = client
        self.url = ""
        self.port = 0
        if url:
            self.turn_to(url)

    def turn_to(self, url: str) -> None:
        self.url = url
        self.port = httpx2.URL(url).port or 80
        self.client.base_url = httpx2.URL(url)

    async def wire(self) -> Wire:
        return Wire(await trio.open_tcp_stream("127.0.0.1", self.port))

    async def start(self, producer: str, value: Any = None, **members: Any) -> str:
        answer = await self.client.post("/v1/runs", json={"producer": producer, "input": value, **members})
        assert answer.status_code == 201, answer.text
        run_id: str = answer.json()["id"]
        return run_id

    async def run(self, run_id: str) -> Any:
        answer = await self.client.get(f"/v1/runs/{run_id}")
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def read(self, run_id: str, **query: Any) -> list[Block]:
        answer = await self.client.get(f"/v1/runs/{run_id}/stream", params=query)
        assert answer.status_code == 200, answer.text
        return blocks_of(answer.text)

    @asynccontextmanager
    async def opened(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, json_body: Any = None, **query: Any
    ) -> AsyncIterator[Reader]:
        if query:
            path += "?" + str(httpx2.QueryParams(query))
        body = b"" if json_body is None else json.dumps(json_body).encode()
        async with await self.wire() as wire:
            reader = Reader(wire)
            await reader.ask(method, path, headers or {}, body)
            yield reader

    @asynccontextmanager
    async def reading(self, run_id: str, **query: Any) -> AsyncIterator[Reader]:
        async with self.opened("GET", f"/v1/runs/{run_id}/stream", **query) as reader:
            assert reader.status == 200
            yield reader


class Server(Client):
    def __init__(self, app: Starlette, client: httpx2.AsyncClient, observer: Silence) -> None:
        super().__init__("", client)
        self.app = app
        self.observer = observer
        self.shutdown = trio.Event()
        """Set to ask for a shutdown."""
        self.ended = trio.Event()
        """Set when `serve` has returned."""
        self.complaints: list[logging.LogRecord] = []
        """What Hypercorn had to log as an error."""

    @property
    def service(self) -> AppLifespan:
        service: AppLifespan = self.app.state.penstock
        return service

    def connections(self) -> list[trio.lowlevel.Task]:
        """The tasks that serve a connection, of all servers in this loop."""
        root = trio.lowlevel.current_root_task()
        assert root is not None
        return [task for task in family(root) if "_run_handler" in task.name]

    def tasks(self) -> int:
        return sum(1 + len(family(task)) for task in self.connections())

    async def ended_run(self, run_id: str) -> Any:
        await self.service.supervisor.wait(run_id)
        return await self.run(run_id)


def problem(answer: httpx2.Response, status: int, code: str) -> Any:
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert (answer.status_code, body["code"]) == (status, code), body
    assert body["status"] == status
    assert body["type"] == "about:blank"
    assert body["title"]
    assert body["detail"]
    return body


def family(task: trio.lowlevel.Task) -> list[trio.lowlevel.Task]:
    children = [child for nursery in task.child_nurseries for child in nursery.child_tasks]
    return children + [each for child in children for each in family(child)]


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for what the server does without a notification, such as noticing that a socket was closed."""
    while not condition():  # noqa: ASYNC110
        await trio.sleep(0.002)


class _Complaints(logging.Handler):
    def __init__(self, records: list[logging.LogRecord]) -> None:
        super().__init__(logging.WARNING)
        self._records = records

    def emit(self, record: logging.LogRecord) -> None:
        self._records.append(record)


def quiet_config() -> Config:
    config = Config()
    config.bind = ["127.0.0.1:0"]
    config.errorlog = logging.Logger("hypercorn.test")  # noqa: LOG001  (one for each server)
    return config


@asynccontextmanager
async def serving(
    producers: Mapping[str, Any] = PRODUCERS,
    log: Any = "memory://",
    *,
    complains: bool = False,
    config: Config | None = None,
    abandon: Callable[[Any], None] | None = None,
    run: Callable[..., Awaitable[None]] | None = None,
    **settings: Any,
) -> AsyncIterator[Server]:
    """A server, and its shutdown when the block is left.

    Runs that are still going then are interrupted at once, unless `drain_timeout` says otherwise. If Hypercorn has
    logged an error that is a failure, unless it `complains` with good reason.
    """
    config = quiet_config() if config is None else config
    observer = Silence()
    app = create_app(producers, log, observer=observer, **{"drain_timeout": 0.0, **settings})
    with trio.fail_after(GUARD):
        async with httpx2.AsyncClient(timeout=GUARD, limits=httpx2.Limits(max_connections=None)) as client:
            server = Server(app, client, observer)
            if isinstance(config.errorlog, logging.Logger):
                config.errorlog.addHandler(_Complaints(server.complaints))
            start = run or partial(serve, signals=(), abandon=abandon)

            async def run_server(task_status: trio.TaskStatus[list[str]]) -> None:  # noqa: ASYNC128  (it hands it on)
                try:
                    await start(app, config, shutdown_trigger=server.shutdown.wait, task_status=task_status)
                finally:
                    server.ended.set()

            async with trio.open_nursery() as nursery:
                (url,) = await nursery.start(run_server)
                server.turn_to(url)
                yield server
                server.shutdown.set()
    assert complains or not server.complaints, [record.getMessage() for record in server.complaints]
