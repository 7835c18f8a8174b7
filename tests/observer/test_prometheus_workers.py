"""Metrics of several workers: any of them shows the sum of all, also of those that have died; no file stays behind."""

from __future__ import annotations

from functools import partial
from signal import SIGINT, SIGKILL, SIGTERM
from typing import TYPE_CHECKING

from tests.observer.test_prometheus import Series, scraped
from tests.support.redis_runs import until_it_is
from tests.support.wire import DONE
from tests.support.workers import REPLACED, has_stopped, send, serving_workers

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.redis_servers import Endpoint
    from tests.support.workers import Workers

AT_ONCE = ("--drain-timeout", 0)
GAUGES = ("runs", "readers", "pending_bytes", "tail_bytes", "log_away")


async def scraped_at(workers: Workers, pid: int) -> Series:
    async with workers.only(pid):
        return await scraped(workers)


async def some(workers: Workers, pid: int, *names: str) -> list[float]:
    now = await scraped_at(workers, pid)
    return [now.get(name, 0) for name in names]


def inside(folder: Path) -> dict[str, Path]:
    return {each.name: each for each in folder.iterdir()}


def lasting(now: Series) -> Series:
    return {name: value for name, value in now.items() if name not in GAUGES}


async def test_the_sum_is_right_whichever_worker_answers_and_when_one_dies(server: Endpoint, tmp_path: Path) -> None:
    async with serving_workers(2, server.url, *AT_ONCE, env={"TMPDIR": str(tmp_path)}) as workers:
        (name,) = inside(tmp_path)
        assert name.startswith("penstock-metrics-")
        one, two = workers.pids().values()
        for pid in (one, two):  # runs that end
            run_id = await workers.start_at(pid, "signals")
            async with workers.reading_at(two, run_id) as reader:
                assert (await reader.rest())[-1].data == DONE
        dying = await workers.start_at(one, "silent")
        staying = await workers.start_at(two, "silent")
        for pid in (one, two):
            assert await workers.ask_at(pid, "GET", "/v1/runs/nowhere") == 404
        async with workers.reading_at(one, staying) as first, workers.reading_at(two, dying) as second:
            await first.take(1)
            await second.take(1)
            names = ("runs_started_total", "runs", "readers", "streams_started_total")
            for pid in (one, two):
                await until_it_is(partial(some, workers, pid, *names), [4, 2, 2, 8])
            before = await scraped_at(workers, one)
            assert before["refused_total{code=RUN_NOT_FOUND,status=404}"] == 2
            assert before["runs_ended_total{outcome=completed,stop_reason=end_turn}"] == 2
            assert before == await scraped_at(workers, two)

            send(one, SIGKILL)
            await workers.says(REPLACED)
            successor = await workers.successor(1, one)
            assert await some(workers, two, "runs", "readers") == [1, 1]
            for pid in (two, successor):
                after = await scraped_at(workers, pid)
                assert not {name for name, value in lasting(before).items() if after.get(name, 0) < value}
                assert (after["runs_started_total"], after["runs"], after["readers"]) == (4, 1, 1)
            await workers.start_at(successor, "silent")
            for pid in (successor, two):
                await until_it_is(partial(some, workers, pid, "runs_started_total", "runs"), [5, 2])
        workers.signal(SIGTERM)
        assert await workers.exit_code() == 0
        await workers.silent.wait()
        assert not inside(tmp_path)


async def test_a_worker_that_leaves_takes_its_gauges_and_leaves_its_counts_in_a_folder_that_the_environment_names(
    server: Endpoint, tmp_path: Path
) -> None:
    folder, temporary = tmp_path / "counts", tmp_path / "temporary"
    folder.mkdir()
    temporary.mkdir()
    env = {"PROMETHEUS_MULTIPROC_DIR": str(folder), "TMPDIR": str(temporary)}
    async with serving_workers(2, server.url, *AT_ONCE, env=env) as workers:
        leaves, stays = workers.pids().values()
        for pid in (leaves, stays):
            await workers.start_at(pid, "silent")
            assert inside(folder).keys() >= {f"counter_{pid}.db", f"gauge_livesum_{pid}.db"}
        send(leaves, SIGTERM)
        successor = await workers.successor(1, leaves)
        names = ("runs_started_total", "runs", "runs_ended_total{outcome=failed,stop_reason=interrupted}")
        for pid in (stays, successor):
            await until_it_is(partial(some, workers, pid, *names), [2, 1, 1])
        pids = (leaves, stays, successor)
        workers.signal(SIGINT)
        await has_stopped(workers)
        assert not inside(temporary)
        assert inside(folder).keys() == {f"{kind}_{pid}.db" for kind in ("counter", "histogram") for pid in pids}
