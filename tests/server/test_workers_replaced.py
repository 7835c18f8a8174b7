"""Workers that leave, or die, and are replaced: what the others, their readers and their runs notice of it."""

from __future__ import annotations

from signal import SIGINT, SIGKILL, SIGTERM
from typing import TYPE_CHECKING

import h11
import pytest
import trio

from tests.support.command_line import refused
from tests.support.serving import eventually
from tests.support.wire import DONE
from tests.support.workers import (
    AWAY,
    HOUR,
    INTERRUPTED,
    MOMENT,
    REPLACED,
    ends,
    goes_on,
    has_stopped,
    is_gone,
    nothing_comes,
    send,
    serving_workers,
    stopped,
)

if TYPE_CHECKING:
    from tests.support.redis_servers import Endpoint

# A worker that is told to go


async def test_a_worker_that_is_told_to_leave_is_replaced_and_the_others_notice_nothing(server: Endpoint) -> None:
    async with serving_workers(2, server.url, *MOMENT, "--max-worker-deaths", 1) as workers:
        leaves, stays = workers.pids().values()
        counting = await workers.start_at(stays, "ticking")
        async with workers.reading_at(stays, counting) as reader:
            for times in (1, 2):
                run_id = await workers.start_at(leaves, "silent")
                elsewhere = await workers.start_at(stays, "silent")
                async with (
                    workers.reading_at(leaves, run_id) as own,
                    workers.reading_at(stays, run_id) as abroad,
                    workers.reading_at(leaves, elsewhere) as visitor,
                ):
                    await visitor.take(1)
                    send(leaves, SIGTERM)
                    assert await visitor.rest() == AWAY
                    assert ends(await own.rest()) == INTERRUPTED
                    assert ends(await abroad.rest()) == INTERRUPTED
                await workers.says(f"worker 1 (process {leaves}) has left; {REPLACED}")
                for _ in range(20):
                    assert (await workers.client.get("/readyz")).status_code == 200
                leaves = await workers.successor(1, leaves)
                assert await workers.ask_at(leaves, "GET", "/readyz") == 200
                assert workers.said.count(REPLACED) == times
            assert workers.pids()[2] == stays
            await goes_on(workers, reader, counting)
        assert workers.said.count("serving on") == 1
        workers.signal(SIGTERM)
        await has_stopped(workers)


async def test_a_worker_that_leaves_accepts_no_more_while_its_runs_have_their_time(server: Endpoint) -> None:
    async with serving_workers(2, server.url, *HOUR) as workers:
        leaves = workers.pids()[1]
        run_id = await workers.start_at(leaves, "silent")
        async with workers.reading_at(leaves, run_id) as reader:
            await reader.take(1)
            send(leaves, SIGTERM)
            send(leaves, SIGTERM)
            await nothing_comes(reader)  # by then its parent knows that it alone has been told
            for _ in range(20):
                assert (await workers.client.get("/readyz")).status_code == 200
            assert (await workers.run(run_id))["status"] == "running"
            workers.signal(SIGTERM)
            await nothing_comes(reader)
            workers.signal(SIGTERM)
            assert ends(await reader.rest()) == INTERRUPTED
        await has_stopped(workers)


async def test_when_all_workers_leave_at_once_connections_wait_for_those_who_come(server: Endpoint) -> None:
    async with serving_workers(2, server.url, "--max-worker-deaths", 1) as workers:
        before = workers.pids().values()
        for pid in before:
            send(pid, SIGTERM)
        await eventually(lambda: all(map(is_gone, before)))
        assert (await workers.client.get("/readyz")).status_code == 200
        assert not set(before) & set(workers.pids().values())


async def test_a_worker_that_leaves_while_its_parent_does_not_listen_has_not_died(server: Endpoint) -> None:
    async with serving_workers(2, server.url, "--max-worker-deaths", 1) as workers:
        leaves = workers.pids()[1]
        with stopped(workers.pid):
            send(leaves, SIGTERM)
            await eventually(lambda: is_gone(leaves))
        await workers.says(f"worker 1 (process {leaves}) has left; {REPLACED}")


async def test_a_worker_that_is_told_to_leave_before_it_has_started_has_not_died(server: Endpoint) -> None:
    async with serving_workers(2, server.url, "--max-worker-deaths", 1) as workers:
        pid = workers.pids()[2]
        for _ in range(3):
            send(pid, SIGTERM)
            await workers.says(f"worker 2 (process {pid}) has left; {REPLACED}")
            pid = await workers.successor(2, pid)
        assert await workers.ask_at(pid, "GET", "/readyz") == 200


async def test_ctrl_c_that_reaches_a_worker_alone_does_nothing(server: Endpoint) -> None:
    async with serving_workers(2, server.url, "--drain-timeout", 0) as workers:
        one = workers.pids()[1]
        run_id = await workers.start_at(one, "ticking")
        async with workers.reading_at(one, run_id) as reader:
            for _ in range(3):
                send(one, SIGINT)
                assert await workers.ask_at(one, "GET", "/readyz") == 200
                assert await workers.ask_at(one, "POST", "/v1/runs", {"producer": "silent"}) == 201
            await goes_on(workers, reader, run_id)
        assert workers.pids()[1] == one
        assert REPLACED not in workers.said


# Deaths


async def test_a_worker_that_is_killed_is_replaced_and_only_its_own_runs_are_lost(server: Endpoint) -> None:
    async with serving_workers(2, server.url, "--lease", 3) as workers:
        dies, stays = workers.pids().values()
        counting, doomed = await workers.start_at(stays, "ticking"), await workers.start_at(dies, "silent")
        async with (
            workers.reading_at(stays, counting) as reader,
            workers.reading_at(stays, doomed) as abroad,
            workers.reading_at(dies, doomed) as own,
        ):
            await own.take(1)
            send(dies, SIGKILL)
            with pytest.raises((h11.RemoteProtocolError, trio.BrokenResourceError)):
                await own.next()
            await workers.says(f"worker 1 (process {dies}) was ended by signal 9; {REPLACED} in 0.1 s")
            again = await workers.successor(1, dies)
            async with workers.reading_at(again, doomed, starting_after=1) as back:
                assert ends(await back.rest()) == ["RUN_LOST", DONE]
            assert ends(await abroad.rest()) == ["RUN_LOST", DONE]
            assert (await workers.run(doomed))["status"] == "lost"
            assert await workers.ask_at(again, "POST", "/v1/runs", {"producer": "silent"}) == 201
            await goes_on(workers, reader, counting)


@pytest.mark.parametrize("options, most", [((), 5), (("--max-worker-deaths", 1), 1), (("--max-worker-deaths", 2), 2)])
async def test_too_many_deaths_end_the_server_and_one_fewer_does_not(
    server: Endpoint, options: tuple[object, ...], most: int
) -> None:
    async with serving_workers(2, server.url, *MOMENT, *options) as workers:
        dies, stays = workers.pids().values()
        run_id = await workers.start_at(stays, "silent")
        async with workers.reading_at(stays, run_id) as reader:
            await reader.take(1)
            for times in range(1, most):
                send(dies, SIGKILL)
                await workers.says(REPLACED, times)
                dies = await workers.successor(1, dies)
            assert await workers.ask_at(dies, "GET", "/readyz") == 200
            assert (await workers.run(run_id))["status"] == "running"
            send(dies, SIGKILL)
            assert ends(await reader.rest()) == INTERRUPTED
        await has_stopped(workers, 1)
        died = f"worker 1 (process {dies}) was ended by signal 9"
        assert f"penstock: {died}; {most} workers have died within 30 s, and the server ends\n" in workers.said


@pytest.mark.parametrize("number", [1, 2])
async def test_after_a_death_the_last_line_does_not_say_that_every_run_has_its_last_entry(
    server: Endpoint, number: int
) -> None:
    async with serving_workers(2, server.url) as workers:
        dies = workers.pids()[number]
        send(dies, SIGKILL)
        again = await workers.successor(number, dies)
        assert await workers.ask_at(again, "GET", "/readyz") == 200
        workers.signal(SIGTERM)
        assert await workers.exit_code() == 0, workers.said
        await workers.silent.wait()
        assert workers.last_line == "penstock: stopped; the runs of workers that died end when their leases are over"


# The command line


def test_the_number_of_workers_has_no_shorter_name() -> None:
    said = refused("serve", "--producers", "tests.support.worker_producers:producers", "--worker", 4)
    assert "No such option" in said
    assert "--workers" in said


@pytest.mark.parametrize("closed", ["<&-", "<&- >&-"])
async def test_workers_need_nothing_of_standard_input_and_output(server: Endpoint, closed: str) -> None:
    """A socket that takes the number of a closed one would be lost when a worker is given its own."""
    through = ("/bin/sh", "-c", f'exec "$@" {closed}', "sh")
    async with serving_workers(2, server.url, *MOMENT, through=through) as workers:
        for pid in workers.pids().values():
            assert await workers.ask_at(pid, "GET", "/readyz") == 200
            await workers.start_at(pid, "ticking")
        workers.signal(SIGTERM)
        await has_stopped(workers)
