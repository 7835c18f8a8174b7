"""What the tests of runs over a real Redis share: supervisors, producers, and what must be true of a run's entries.

python -m tests.support.redis_runs URL LEASE     a process that owns a run, and says on stdout what becomes of it
"""

from __future__ import annotations

import subprocess
import sys
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final, cast

import trio

from penstock.log.open import open_log
from penstock.sse import Event
from penstock.sse.dialects import DONE
from penstock.supervisor import Supervisor, open_supervisor
from tests.support.command_line import Program, environment
from tests.support.supervising import FIRST

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence

    from penstock.log import Entry
    from penstock.log.redis.notifications import RedisNotifications
    from penstock.observer import Observer
    from tests.support.redis_servers import Endpoint
    from tests.support.supervising import Reader

GUARD: Final = 110.0
"""Seconds after which a test has hung. No test comes near it."""
SOON: Final = 45.0
"""Seconds within which what must happen has happened, on a machine that is busy with something else."""

FIELDS: Final = {"seq_id", "data", "timestamp"}


async def until(condition: Callable[[], object], seconds: float = SOON) -> None:
    with trio.fail_after(seconds):
        while not condition():  # noqa: ASYNC110  (what is looked at tells nobody of its changes)
            await trio.sleep(0.005)


async def until_it_is(look: Callable[[], Awaitable[Any]], wanted: object, seconds: float = SOON) -> None:
    with trio.fail_after(seconds):
        while await look() != wanted:  # noqa: ASYNC110  (each look is a request)
            await trio.sleep(0.01)


async def no_client_is_connected(server: Endpoint) -> None:
    await until_it_is(server.clients, [])


@asynccontextmanager
async def supervisor_at(
    url: str, *, observer: Observer | None = None, limits: Mapping[str, Any] | None = None, **settings: Any
) -> AsyncIterator[Supervisor]:
    """A supervisor with a log of its own; leaving interrupts its runs at once, unless it has a `drain_timeout`."""
    async with (
        open_log(url, **(limits or {})) as log,
        open_supervisor(log, observer=observer, **{"drain_timeout": 0.0, **settings}) as supervisor,
    ):
        yield supervisor


@asynccontextmanager
async def supervisors(*urls: str, limits: Mapping[str, Any] | None = None, **settings: Any) -> AsyncIterator[Any]:
    """A supervisor at each of these URLs, as so many processes would be; what hangs with them fails."""
    with trio.fail_after(GUARD):
        async with AsyncExitStack() as stack:
            yield [await stack.enter_async_context(supervisor_at(url, limits=limits, **settings)) for url in urls]


async def all_may_reap(server: Endpoint, count: int = 2) -> None:
    """Wait until so many supervisors have been in contact for a lease, so that they reap whatever is due."""
    before = (await server.stats()).get("zrangebyscore", 0)  # nothing but a reaper sends that
    with trio.fail_after(SOON):
        while (await server.stats()).get("zrangebyscore", 0) < before + 2 * count:  # noqa: ASYNC110
            await trio.sleep(0.05)


class Ticks:
    """A producer that counts until it is told to stop."""

    def __init__(self, every: float = 0.02) -> None:
        self.said = 0
        self.enough = trio.Event()
        self.saw: str | None = None
        """The reason of the `Cancelled` that reached it."""
        self.left = False
        self._every = every

    async def __call__(self) -> AsyncIterator[Event]:
        try:
            while not self.enough.is_set():
                self.said += 1
                yield Event(data=str(self.said))
                await trio.sleep(self._every)
        except trio.Cancelled as cancelled:
            self.saw = cancelled.reason
            raise
        finally:
            self.left = True


def stream_of(run_id: str) -> str:
    return f"sse:run:{run_id}"


def record_of(run_id: str) -> str:
    return f"{{sse:run:{run_id}}}:meta"


async def stored(server: Endpoint, run_id: str) -> list[tuple[str, dict[str, str]]]:
    entries: list[tuple[str, dict[str, str]]] = await server.command("XRANGE", stream_of(run_id), "-", "+")
    return entries


async def whole(server: Endpoint, run_id: str) -> dict[str, str]:
    """The record of a run of which Redis must hold 1-0, 2-0 ... n-0, the last of them its one terminal entry."""
    entries = await stored(server, run_id)
    record: dict[str, str] = await server.command("HGETALL", record_of(run_id))
    last = len(entries)
    assert [each for each, _ in entries] == [f"{seq}-0" for seq in range(1, last + 1)]
    assert [fields["seq_id"] for _, fields in entries] == [str(seq) for seq in range(1, last + 1)]
    assert all(fields.keys() == FIELDS for _, fields in entries[:-1])
    assert entries[-1][1].keys() == FIELDS | {"complete"}
    assert entries[-1][1]["data"] == DONE.decode()
    assert sum(fields["data"] == DONE.decode() for _, fields in entries) == 1
    assert record["seq"] == str(last)
    assert record["status"] != "running"
    return record


def exactly_once(reader: Reader) -> int:
    assert reader.error is None, repr(reader.error)
    seqs = [entry.seq for entry in reader.entries]
    assert seqs == list(range(1, len(seqs) + 1))
    assert [entry.seq for entry in reader.entries if entry.terminal] == seqs[-1:]
    return len(seqs)


async def same_everywhere(server: Endpoint, run_id: str, following: Sequence[Reader]) -> dict[str, str]:
    """The record of a run that is whole in Redis, and of which each of these readers got just that."""
    record = await whole(server, run_id)
    data = [fields["data"] for _, fields in await stored(server, run_id)]
    for reader in following:
        assert exactly_once(reader) == len(data)
        assert texts(reader.entries) == data
    return record


def texts(entries: Sequence[Entry]) -> list[str]:
    return [entry.data.decode() for entry in entries]


def last_seq(reader: Reader) -> int:
    return reader.entries[-1].seq if reader.entries else 0


def counted(record: Mapping[str, str], ticks: Ticks) -> None:
    """The run completed, and nothing but what it said and its `[DONE]` is in it."""
    assert (record["status"], record["seq"]) == ("completed", str(ticks.said + 1))


def left_over(supervisor: Supervisor) -> dict[str, Any]:
    committer, wakeups = supervisor._committer, cast("RedisNotifications", supervisor._fetcher._notifications)
    kept = {
        "live": supervisor._runs.by_id,
        "tails": supervisor._tails.all(),
        "bytes": supervisor._tails.size + committer.pending_bytes,
        "buffers": [worker for worker in committer.shards if not worker.idle],
        "channels": wakeups._channels.keys() - {wakeups._process},
        "moved": wakeups._moved,
        "missing": [worker for worker in supervisor._fetcher.shards if not worker.idle],
    }
    return {name: what for name, what in kept.items() if what}


async def nothing_is_left(supervisor: Supervisor) -> None:
    """Of runs that are over and have no readers a supervisor keeps nothing (D10)."""
    with suppress(trio.TooSlowError):
        await until(lambda: not left_over(supervisor), 5)
    assert not left_over(supervisor)


@asynccontextmanager
async def owner_process(url: str, lease: float) -> AsyncIterator[Program]:
    """A process that owns a run; it is killed if it has not ended when the block is left."""
    process = await trio.lowlevel.open_process(
        [sys.executable, "-m", "tests.support.redis_runs", url, str(lease)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env=environment(),
    )
    try:
        yield Program(process)
    finally:
        with trio.CancelScope(shield=True):
            process.kill()
            await process.wait()
            assert process.stdout is not None
            await process.stdout.aclose()


def _say(words: str) -> None:
    sys.stdout.write(f"{words}\n")
    sys.stdout.flush()


async def _own(url: str, lease: float) -> None:
    async def producer() -> AsyncIterator[Event]:
        yield FIRST
        number = 0
        try:
            while True:
                await trio.sleep(0.02)
                yield Event(data=str(number := number + 1))
        except trio.Cancelled as cancelled:
            _say(f"cancelled: {cancelled.reason}")
            raise

    async with supervisor_at(url, lease=lease) as supervisor:
        run = await supervisor.start(producer)
        _say(f"owns {run.id}")
        run = await supervisor.wait(run.id)
        _say(f"ended {run.status}")


if __name__ == "__main__":
    trio.run(_own, sys.argv[1], float(sys.argv[2]))
