"""An ASGI server and its client in memory, on Trio and on asyncio, with virtual time."""

from __future__ import annotations

import asyncio  # noqa: TID251  (the response serves under asyncio, too, so it is tested there)
import functools
import inspect
import json
from typing import TYPE_CHECKING, Any, Self

import anyio
import anyio.lowlevel
import pytest
from trio.testing import MockClock

from penstock.asgi.response import EventStreamResponse
from penstock.observer.logging import LoggingObserver
from penstock.sse import Decoder, Message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable

    from penstock.supervisor.timers import Timers

PING = b": ping\n\n"
DONE = b"data: [DONE]\n\n"


class VirtualLoop(asyncio.SelectorEventLoop):
    """An asyncio loop whose clock jumps to the next timer when nothing else is to be done, as Trio's MockClock does."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0
        selector = self._selector  # type: ignore[attr-defined]
        select = selector.select

        def jump(timeout: float | None = None) -> Any:
            assert timeout is not None, "every task waits for what will never come"
            self._now += timeout
            return select(0)

        selector.select = jump

    def time(self) -> float:
        return self._now


def on_both(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """Run the test on Trio and on asyncio, each time under a virtual clock."""

    @functools.wraps(test)
    def run(backend: str, **arguments: Any) -> None:
        options: dict[str, Any] = {"loop_factory": VirtualLoop}
        if backend == "trio":
            options = {"clock": MockClock(autojump_threshold=0)}

        async def guarded() -> None:
            with anyio.fail_after(100_000):  # of virtual time
                await test(**arguments)

        anyio.run(guarded, backend=backend, backend_options=options)

    signature = inspect.signature(test)
    backend = inspect.Parameter("backend", inspect.Parameter.KEYWORD_ONLY)
    run.__signature__ = signature.replace(parameters=[*signature.parameters.values(), backend])  # type: ignore[attr-defined]
    parametrized: Callable[..., None] = pytest.mark.parametrize("backend", ["trio", "asyncio"])(run)
    return parametrized


class Client:
    """A server and a client, in memory: one request, and what the application sends for it.

    Every call of `receive` and `send` goes through `point`, twice, where a test can let something happen.
    """

    def __init__(self, method: str = "GET", *, request: tuple[dict[str, Any], ...] = ()) -> None:
        self.scope: dict[str, Any] = {
            "type": "http",
            "method": method,
            "path": "/stream",
            "asgi": {"spec_version": "2.1"},
        }
        self.sent: list[dict[str, Any]] = []
        self.times: list[float] = []
        self.late: list[dict[str, Any]] = []
        """What was sent although the client was gone, and known to be."""
        self.slow = 0.0
        self.send_raises: Exception | None = None
        self.point: Callable[[str], Awaitable[None]] = self._no_point
        self._request = list(request)
        self._gone = anyio.Event()
        self._told = False

    async def _no_point(self, where: str) -> None:
        del where

    async def receive(self) -> dict[str, Any]:
        await self.point("receive")
        if self._request:
            return self._request.pop(0)
        assert not self._told, "receive was called again after http.disconnect"
        await self._gone.wait()
        await self.point("received")
        self._told = True
        return {"type": "http.disconnect"}

    async def send(self, message: Any) -> None:
        if self._told:
            self.late.append(message)
        await self.point("send")
        await anyio.lowlevel.checkpoint()
        if self.slow:
            await anyio.sleep(self.slow)
        if self.send_raises is not None:
            raise self.send_raises
        assert not self.complete, f"{message} after the last message"
        assert (message["type"] == "http.response.start") == (not self.sent), f"{message} after {self.sent}"
        self.sent.append(message)
        self.times.append(anyio.current_time())
        await self.point("sent")

    def leave(self) -> None:
        self._gone.set()

    async def call(self, response: EventStreamResponse) -> None:
        await response(self.scope, self.receive, self.send)

    async def get(self, source: Any, **options: Any) -> Client:
        await self.call(EventStreamResponse(source, **options))
        return self

    @property
    def status(self) -> int:
        return int(self.sent[0]["status"])

    @property
    def headers(self) -> dict[str, str]:
        headers = [(name.decode(), value.decode()) for name, value in self.sent[0]["headers"]]
        assert len(dict(headers)) == len(headers), "a header twice"
        return dict(headers)

    @property
    def bodies(self) -> list[bytes]:
        return [message["body"] for message in self.sent[1:] if message["body"]]

    @property
    def body(self) -> bytes:
        return b"".join(self.bodies)

    @property
    def complete(self) -> bool:
        return bool(self.sent) and not self.sent[-1].get("more_body", True)

    @property
    def json(self) -> Any:
        assert self.headers["content-length"] == str(len(self.body))
        return json.loads(self.body)

    @property
    def messages(self) -> list[Message]:
        return Decoder().feed(self.body)


class OneAtATime(Client):
    """A server that takes no message before it is done with the one before, as Hypercorn's is with the first."""

    under_way: str | None = None

    async def send(self, message: Any) -> None:
        assert self.under_way is None, f"{message['type']} overtook {self.under_way}"
        self.under_way = message["type"]
        await super().send(message)
        self.under_way = None


async def get(source: Any, **options: Any) -> Client:
    return await Client().get(source, **options)


class Errors(LoggingObserver):
    def __init__(self) -> None:
        self.errors: list[BaseException] = []
        self.ids: list[str] = []
        self.warnings: list[str] = []

    def on_error(self, error: BaseException, *, error_id: str, where: str) -> None:
        assert where.startswith("response to ")
        self.errors.append(error)
        self.ids.append(error_id)

    def warning(self, message: str) -> None:
        self.warnings.append(message)


class Log(list[str]):
    async def source(self, *chunks: Any, then: Any = None) -> AsyncIterator[Any]:
        """Yields the chunks; then raises `then`, or waits for ever if that is `forever`."""
        try:
            for chunk in chunks:
                await anyio.lowlevel.checkpoint()
                yield chunk
            self.append("yielded all")
            if then is forever:
                await anyio.sleep_forever()
            elif then is not None:
                raise then
        except anyio.get_cancelled_exc_class():
            self.append("cancelled")
            raise
        except GeneratorExit:
            self.append("closed")
            raise
        finally:
            with anyio.move_on_after(1, shield=True):
                await anyio.lowlevel.checkpoint()
            self.append("finally")


forever = object()


async def chunks(*values: Any) -> AsyncIterator[Any]:
    for value in values:
        await anyio.lowlevel.checkpoint()
        yield value


async def timed(*steps: tuple[float, Any]) -> AsyncIterator[Any]:
    for seconds, value in steps:
        await anyio.sleep(seconds)
        if isinstance(value, BaseException):
            raise value
        yield value


async def note(where: list[str]) -> None:
    """A background task. (One that is no coroutine would run in a thread, which a virtual clock does not wait for.)"""
    await anyio.lowlevel.checkpoint()
    where.append("background")


class Follower:
    """A reader of a run by a script: bodies, seconds to wait, exceptions."""

    def __init__(self, *steps: Any, at_end: bool = False, entering: Exception | None = None) -> None:
        self.steps = list(steps)
        self.at_end = at_end
        self.entering = entering
        self.clock: Timers | None = None
        self.cursor = 0
        self.log: list[str] = []
        self.limits: set[int] = set()

    async def __aenter__(self) -> Self:
        await anyio.sleep(1)
        if self.entering is not None:
            raise self.entering
        self.log.append("entered")
        return self

    async def __aexit__(self, *_: object) -> None:
        self.log.append("left")

    async def next_body(self, limit: int) -> bytes:
        self.limits.add(limit)
        while self.steps:
            step = self.steps.pop(0)
            if isinstance(step, Exception):
                raise step
            if isinstance(step, bytes):
                await anyio.lowlevel.checkpoint()
                return step
            await anyio.sleep(step)
        return b""
