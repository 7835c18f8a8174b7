"""`penstock serve --workers N`, real processes over a real Redis: how workers start, serve, leave, die and end."""

from __future__ import annotations

import os
import re
import signal
import socket
from signal import SIGINT, SIGKILL, SIGTERM
from typing import TYPE_CHECKING

import h11
import pytest
import trio
from click.testing import CliRunner

from penstock.cli.main import main
from tests.support.command_line import refused
from tests.support.serving import eventually
from tests.support.wire import DONE
from tests.support.workers import (
    AWAY,
    CANCELLED,
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
    state_of,
    stopped,
)

if TYPE_CHECKING:
    from tests.support.redis_servers import Endpoint


# The beginning


async def test_a_fault_that_keeps_the_first_worker_from_starting_is_reported_once(server: Endpoint) -> None:
    async with serving_workers(2, server.url, "--producers", "tests.nowhere:it", serves=False) as workers:
        await has_stopped(workers, 2)
        assert workers.said.count("there is no module 'tests.nowhere'") == 1
        assert workers.said.count("not started") == 1
        assert "serving on" not in workers.said


async def test_a_redis_that_is_not_there_is_reported_once_and_ends_the_server_with_code_1() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{nobody.getsockname()[1]}"
        async with serving_workers(2, url, serves=False) as workers:
            await has_stopped(workers, 1)
            assert len(re.findall(r"worker \d", workers.said)) == 1
            assert workers.said.count("; not started") == 2  # the reason, and the worker


@pytest.mark.parametrize("number, started", [(SIGTERM, 1), (SIGINT, 2)])
async def test_a_signal_ends_starting_workers_quietly(server: Endpoint, number: signal.Signals, started: int) -> None:
    async with serving_workers(2, server.url, serves=False) as workers:
        await eventually(lambda: len(workers.pids()) >= started)
        workers.signal_group(number)
        await has_stopped(workers)


def test_several_workers_cannot_share_the_memory_of_one() -> None:
    line = ["serve", "--producers", "tests.support.worker_producers:producers", "--workers", "2"]
    for log in ([], ["--log", "memory://"]):
        result = CliRunner().invoke(main, [*line, *log], prog_name="penstock")
        said = " ".join(result.output.split())
        assert result.exit_code == 2
        assert "Invalid value for --workers: memory:// is one process's memory" in said
        assert "--log redis://localhost, or serve with one" in said


async def test_workers_serve_the_runs_of_all_and_a_signal_to_the_whole_group_counts_as_one(server: Endpoint) -> None:
    # A socket that takes the number of a closed standard stream would be lost when a worker gets its own.
    without_streams = ("/bin/sh", "-c", 'exec "$@" <&- >&-', "sh")
    options = ("--workers=2", "--max-body-bytes=99", *HOUR, "--")
    async with serving_workers(None, server.url, *options, through=without_streams) as workers:
        pids = workers.pids()
        assert sorted(pids) == [1, 2]
        one, two = pids[1], pids[2]
        for pid, another in ((one, two), (two, one)):
            assert await workers.ask_at(pid, "GET", "/readyz") == 200
            assert await workers.ask_at(pid, "POST", "/v1/runs", {"producer": "silent", "input": "x" * 99}) == 413
            run_id = await workers.start_at(pid, "silent")
            async with workers.reading_at(one, run_id) as first, workers.reading_at(two, run_id) as second:
                assert [(await reader.take(1))[0].data for reader in (first, second)] == [str(pid)] * 2
                assert await workers.ask_at(another, "POST", f"/v1/runs/{run_id}/cancel") == 202
                assert [ends(await reader.rest()) for reader in (first, second)] == [CANCELLED] * 2

        run_id = await workers.start_at(one, "signals")
        said = "\n".join(str(block.data) for block in await workers.read(run_id))
        for name in ("SigBlk", "SigIgn"):  # what a producer starts gets its signals as anywhere
            (mask,) = re.findall(rf"^{name}:\s*([0-9a-f]+)$", said, re.MULTILINE)
            assert not any(int(mask, 16) >> (number - 1) & 1 for number in (SIGTERM, SIGINT)), said

        runs = {pid: await workers.start_at(pid, "silent") for pid in (one, two)}
        async with (
            workers.reading_at(one, runs[one]) as first,
            workers.reading_at(two, runs[two]) as second,
            workers.reading_at(one, runs[two]) as abroad,
        ):
            for reader in (first, second, abroad):
                await reader.take(1)
            for _ in range(3):  # a Ctrl-C that reaches a worker alone does nothing
                send(one, SIGINT)
                assert await workers.ask_at(one, "GET", "/readyz") == 200
            workers.signal_group(SIGINT)
            await workers.is_draining()
            refused = await workers.client.post("/v1/runs", json={"producer": "silent"})
            assert (refused.status_code, refused.json()["code"]) == (503, "DRAINING")
            assert refused.headers["retry-after"]
            assert await abroad.rest() == AWAY
            await nothing_comes(first)
            assert (await workers.run(runs[one]))["status"] == "running"
            async with workers.reading_at(one, runs[one]) as another_reader:
                assert len(await another_reader.take(1)) == 1
            assert workers.pids() == pids
            workers.signal_group(SIGINT)
            assert [ends(await reader.rest()) for reader in (first, second)] == [INTERRUPTED] * 2
        await has_stopped(workers)
        assert workers.said.count("serving on") == 1
        assert f"serving on {workers.url} (2 workers, log: {server.url})" in workers.said
        assert REPLACED not in workers.said


async def test_a_worker_that_gets_sigterm_is_replaced_and_the_others_do_not_notice(server: Endpoint) -> None:
    async with serving_workers(2, server.url, *MOMENT, "--max-worker-deaths", 1) as workers:
        leaves, stays = workers.pids()[1], workers.pids()[2]
        counting = await workers.start_at(stays, "ticking")
        async with workers.reading_at(stays, counting) as reader:
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
            leaves = await workers.successor(1, leaves)
            send(leaves, SIGTERM)  # before it has started
            await workers.says(f"worker 1 (process {leaves}) has left; {REPLACED}")
            leaves = await workers.successor(1, leaves)
            assert await workers.ask_at(leaves, "GET", "/readyz") == 200
            assert workers.pids() == {1: leaves, 2: stays}
            await goes_on(workers, reader, counting)

        for pid in (leaves, stays):
            send(pid, SIGTERM)
        await eventually(lambda: is_gone(leaves) and is_gone(stays))
        assert (await workers.client.get("/readyz")).status_code == 200  # a connection waits for their successors
        pids = workers.pids()
        assert not {leaves, stays} & {*pids.values()}
        for pid in pids.values():
            assert await workers.ask_at(pid, "GET", "/readyz") == 200
        assert workers.said.count("serving on") == 1

        def all_are_gone() -> bool:
            for pid in pids.values():
                send(pid, SIGTERM)
            return all(map(is_gone, pids.values()))

        workers.signal(SIGTERM)
        await eventually(all_are_gone)  # a worker that exits ignores signals
        await has_stopped(workers)


async def test_a_worker_that_leaves_accepts_no_more_while_its_runs_have_their_time(server: Endpoint) -> None:
    variables = {"PENSTOCK_WORKERS": "2", "PENSTOCK_MAX_BODY_BYTES": "1"}
    options = ("--max-body-bytes", 99, *HOUR)
    async with serving_workers(None, server.url, *options, before=("--",), env=variables) as workers:
        assert "(2 workers" in workers.said, workers.said
        leaves, stays = workers.pids()[1], workers.pids()[2]
        run_id = await workers.start_at(leaves, "silent")
        async with workers.reading_at(leaves, run_id) as reader:
            await reader.take(1)
            send(leaves, SIGTERM)
            send(leaves, SIGTERM)
            await nothing_comes(reader)  # by then the parent knows that this worker alone leaves
            for _ in range(20):
                assert (await workers.client.get("/readyz")).status_code == 200
            assert await workers.ask_at(stays, "POST", "/v1/runs", {"producer": "silent", "input": "x" * 99}) == 413
            assert (await workers.run(run_id))["status"] == "running"
            workers.signal(SIGTERM)
            await nothing_comes(reader)
            workers.signal(SIGTERM)
            assert ends(await reader.rest()) == INTERRUPTED
        await has_stopped(workers)


async def test_a_worker_that_is_killed_is_replaced_and_only_its_own_runs_are_lost(server: Endpoint) -> None:
    async with serving_workers(2, server.url, *MOMENT, "--lease", 3) as workers:
        dies, stays = workers.pids()[1], workers.pids()[2]
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
        send(stays, SIGKILL)
        await workers.says(REPLACED, 2)
        workers.signal(SIGTERM)
        assert await workers.exit_code() == 0, workers.said
        await workers.silent.wait()
        assert workers.last_line == "penstock: stopped; the runs of workers that died end when their leases are over"


# The command line


def test_the_number_of_workers_has_no_shorter_name() -> None:
    said = refused("serve", "--producers", "tests.support.worker_producers:producers", "--worker", 4)
    assert "No such option" in said
    assert "--workers" in said


async def test_the_second_signal_interrupts_and_the_fourth_kills_what_stands_still(server: Endpoint) -> None:
    async with serving_workers(2, server.url, *HOUR) as workers:
        still, other = workers.pids().values()
        run_id = await workers.start_at(other, "silent")
        async with workers.reading_at(other, run_id) as reader, await workers.wire() as half:
            await reader.take(1)
            with stopped(still):
                await eventually(lambda: state_of(still) == "T")
                await half.stream.send_all(b"POST /v1/runs HTTP/1.1\r\nhost: localhost\r\ncontent-length: 9\r\n\r\n{")
                workers.signal(SIGTERM)
                await workers.is_draining()
                await nothing_comes(reader)
                workers.signal(SIGINT)
                assert ends(await reader.rest()) == INTERRUPTED
                workers.signal(SIGTERM)  # what holds this worker up is half a request
                await eventually(lambda: is_gone(other))
                assert state_of(still) == "T"
                workers.signal(SIGINT)
                await has_stopped(workers, 1)
        assert f"penstock: worker 1 (process {still}) was ended by signal 9" in workers.said


async def test_a_producer_that_keeps_its_task_ends_the_server_with_code_3(server: Endpoint) -> None:
    async with serving_workers(2, server.url, "--drain-timeout", 0.1, "--cancel-grace", 0.1) as workers:
        one = workers.pids()[1]
        run_id = await workers.start_at(one, "stubborn")
        async with workers.reading_at(one, run_id) as reader:
            workers.signal(SIGTERM)
            assert ends(await reader.rest()) == INTERRUPTED
        await has_stopped(workers, 3)
        assert f"the producer of run {run_id} has not let go" in workers.said
        assert f"penstock: worker 1 (process {one}) ended with code 3" in workers.said


async def test_when_the_parent_is_killed_the_workers_drain_and_a_signal_hurries_them(server: Endpoint) -> None:
    async with serving_workers(2, server.url, *HOUR) as workers:
        one, idle = workers.pids()[1], workers.pids()[2]
        run_id = await workers.start_at(one, "silent")
        async with workers.reading_at(one, run_id) as reader:
            await reader.take(1)
            workers.signal(SIGKILL)
            await eventually(lambda: is_gone(idle))  # or it might be asked, and be gone before it answers
            await workers.is_draining()
            await nothing_comes(reader)
            os.kill(one, SIGINT)
            assert ends(await reader.rest()) == INTERRUPTED
        assert await workers.exit_code() == -SIGKILL
        await workers.silent.wait()
        with pytest.raises(OSError, match="all attempts to connect"):
            await workers.wire()
        with socket.socket() as again:  # the port is free
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", workers.port))
