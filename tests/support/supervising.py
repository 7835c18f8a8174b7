"""What tests of runs in virtual time share: a log that can be slow or fail, observers, producers and readers."""

from __future__ import annotations

import json
from collections import Counter
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from penstock.errors import LogUnavailable
from penstock.log.memory import MemoryLog
from penstock.observer.logging import LoggingObserver
from penstock.sse import Decoder, Event
from penstock.sse.dialects import DONE
from penstock.supervisor import Supervisor, open_supervisor

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterator, Sequence

    from penstock.log import Entry, Notification, Notifications
    from penstock.runs import Run

    Hook = Callable[[], Awaitable[Any]]

FIRST: Final = Event(data="first")


async def unavailable() -> None:
    await trio.lowlevel.checkpoint()
    raise LogUnavailable("the log is away")


async def broken() -> None:
    """A hook for `View`: what no log does, and no service survives."""
    await trio.lowlevel.checkpoint()
    raise ZeroDivisionError("the log is broken")


def slow(seconds: float) -> Hook:
    async def wait() -> None:
        await trio.sleep(seconds)

    return wait


def near(seconds: float) -> Any:
    return pytest.approx(seconds, abs=0.1)  # a few commits


def _counted(name: str) -> Any:
    async def call(self: View, *args: Any, **options: Any) -> Any:
        return await self._do(name, getattr(self.log, name), *args, **options)

    return call


class View:
    """An event log as one of its supervisors sees it: counted, and delayed or failed by hooks.

    A hook in `before` is awaited before the operation of that name, one in `after` between its effect and its reply.
    """

    def __init__(self, log: MemoryLog | None = None) -> None:
        self.log = MemoryLog() if log is None else log
        self.calls: Counter[str] = Counter()
        self.before: dict[str, Hook] = {}
        self.after: dict[str, Hook] = {}
        self.wakeups_of_cancels = True

    async def _do(self, name: str, operation: Callable[..., Awaitable[Any]], *args: Any, **options: Any) -> Any:
        self.calls[name] += 1
        if (hook := self.before.get(name)) is not None:
            await hook()
        reply = await operation(*args, **options)
        if (hook := self.after.get(name)) is not None:
            await hook()
        return reply

    start: Any = _counted("start")
    append: Any = _counted("append")
    read: Any = _counted("read")
    fetch: Any = _counted("fetch")
    get: Any = _counted("get")
    list: Any = _counted("list")
    request_cancel: Any = _counted("request_cancel")
    cancel_requests: Any = _counted("cancel_requests")
    renew: Any = _counted("renew")
    restore: Any = _counted("restore")
    reap: Any = _counted("reap")
    check: Any = _counted("check")

    def shard(self, run_id: str) -> str:
        return self.log.shard(run_id)

    def shards(self) -> Collection[str]:
        return self.log.shards()

    @asynccontextmanager
    async def wakeups(self, owner: str) -> AsyncIterator[Notifications]:
        if (hook := self.before.get("wakeups")) is not None:
            await hook()
        async with self.log.wakeups(owner) as wakeups:
            yield _CountedNotifications(self, wakeups)


ALL_CALLS: Final = (
    *("start", "append", "read", "fetch", "get", "list", "request_cancel", "cancel_requests", "renew", "restore"),
    *("reap", "check", "subscribe"),
)


def go_away(*views: View) -> None:
    for view in views:
        view.before.update(dict.fromkeys(ALL_CALLS, unavailable))


def come_back(*views: View) -> None:
    for view in views:
        view.before.clear()


class _CountedNotifications:
    """The wake-ups of a view."""

    def __init__(self, view: View, wakeups: Any) -> None:
        self._view = view
        self.wakeups = wakeups

    async def subscribe(self, run_id: str) -> None:
        await self._view._do("subscribe", self.wakeups.subscribe, run_id)

    def unsubscribe(self, run_id: str) -> None:
        self.wakeups.unsubscribe(run_id)

    async def wait(self) -> Notification:
        while True:
            news: Notification = await self._view._do("wait", self.wakeups.wait)
            news = replace(news, cancel=news.cancel and self._view.wakeups_of_cancels)
            if news.moved or news.cancel or news.reconnected:
                return news


class Notes(LoggingObserver):
    def __init__(self) -> None:
        self.started: list[Run] = []
        self.ended: list[Run] = []
        self.fenced: list[str] = []
        self.stuck: list[tuple[str, float, str]] = []
        self.errors: list[tuple[BaseException, str, str]] = []
        self.warnings: list[str] = []

    def run_started(self, run: Run) -> None:
        self.started.append(run)

    def run_ended(self, run: Run) -> None:
        self.ended.append(run)

    def run_fenced(self, run_id: str) -> None:
        self.fenced.append(run_id)

    def run_stuck(self, run_id: str, seconds: float, stack: str) -> None:
        self.stuck.append((run_id, seconds, stack))

    def on_error(self, error: BaseException, *, error_id: str, where: str) -> None:
        self.errors.append((error, error_id, where))

    def warning(self, message: str) -> None:
        self.warnings.append(message)


class Witness:
    def __init__(self) -> None:
        self.saw: str | None = None
        """The reason of the `Cancelled` that reached it."""
        self.saw_at = 0.0
        self.left = False
        """Its `finally` block has run."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        try:
            yield
        except trio.Cancelled as cancelled:
            self.saw, self.saw_at = cancelled.reason, trio.current_time()
            raise
        finally:
            self.left = True

    async def waits(self) -> AsyncIterator[Event]:
        """The usual producer: an event, and then silence for ever."""
        yield FIRST
        with self.watching():
            await trio.sleep_forever()


async def count(upto: int, every: float = 0.0) -> AsyncIterator[Event]:
    for number in range(1, upto + 1):
        if every:
            await trio.sleep(every)
        yield Event(data=str(number))


async def shielded(until: trio.Event) -> None:
    """Hold on to the task, whoever cancels it; not for ever, lest a test that fails hang."""
    with trio.move_on_after(1000, shield=True):
        await until.wait()


@asynccontextmanager
async def two_supervisors(
    log: MemoryLog | View, other_log: MemoryLog | View | None = None, **settings: Any
) -> AsyncIterator[tuple[Supervisor, Supervisor]]:
    """Two on one log, as two processes would be. The second one is left first."""
    async with (
        open_supervisor(log, **settings) as owner,
        open_supervisor(log if other_log is None else other_log, **settings) as other,
    ):
        yield owner, other


async def read(supervisor: Supervisor, run_id: str, after: int = 0) -> list[Entry]:
    async with supervisor.follow(run_id, after) as entries:
        return [entry async for entry in entries]


class Reader:
    def __init__(self, supervisor: Supervisor, run_id: str, after: int = 0) -> None:
        self.follower = supervisor.follow(run_id, after)
        self.entries: list[Entry] = []
        self.error: Exception | None = None
        self.ended_at: float | None = None
        self._scope = trio.CancelScope()

    def leave(self) -> None:
        self._scope.cancel()

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        try:
            with self._scope:
                async with self.follower as entries:
                    task_status.started()
                    async for entry in entries:
                        self.entries.append(entry)
        except Exception as error:  # noqa: BLE001  (it is what the test looks at)
            self.error = error
        self.ended_at = trio.current_time()


@asynccontextmanager
async def readers(*which: tuple[Supervisor, str]) -> AsyncIterator[list[Reader]]:
    async with trio.open_nursery() as nursery:
        following = [Reader(supervisor, run_id) for supervisor, run_id in which]
        for reader in following:
            await nursery.start(reader.run)
        yield following


async def entries_of(log: MemoryLog | View, run_id: str) -> list[Entry]:
    entries: list[Entry] = []
    while (page := await log.read(run_id, entries[-1].seq if entries else 0)).entries:
        entries += page.entries
    return entries


def gist(entry: Entry) -> str:
    """An entry in a word or two, in either dialect: its data, or what control event it is."""
    decoder = Decoder()
    (message,) = decoder.feed(entry.wire)
    assert message.last_event_id == str(entry.seq)
    try:
        said = json.loads(message.data)
    except ValueError:
        said = None
    if not isinstance(said, dict):
        return f"{message.event} {message.data}" if message.event != "message" else message.data
    if message.event == "cancelled" or said.get("stop_reason") == "cancelled":
        return "cancelled"
    if message.event == "error":
        return f"error {said.get('code', message.data)}"
    return f"stop {said['stop_reason']}" if "stop_reason" in said else message.data


def gists(entries: Sequence[Entry]) -> list[str]:
    return [gist(entry) for entry in entries]


async def ended(log: MemoryLog | View, run_id: str) -> Run:
    """The record of a run that must have ended, after a look at all that is true of every such run."""
    run = await log.get(run_id)
    entries = await entries_of(log, run_id)
    assert run.status.terminal, f"{run_id} is {run.status}"
    assert [entry.seq for entry in entries] == list(range(1, run.seq + 1))
    assert [entry.seq for entry in entries if entry.terminal] == [run.seq]
    assert entries[-1].data == DONE
    assert sum(entry.data == DONE for entry in entries) == 1
    assert run.stop_reason is not None
    assert run.ended_at is not None
    return run


def assert_nothing_is_left(supervisor: Supervisor) -> None:
    """Of runs that are over and have no readers a supervisor keeps nothing (D10)."""
    assert not supervisor._runs.by_id
    assert supervisor.live_runs == 0
    assert not supervisor._tails.all()
    assert supervisor._tails.size == 0
    assert supervisor._committer.pending_bytes == 0
    assert not [timer for timer in supervisor._timers._heap if timer.callback is not None]
    wakeups: Any = supervisor._fetcher._notifications
    assert not (wakeups.wakeups if isinstance(wakeups, _CountedNotifications) else wakeups)._subscribed
