"""The end of `penstock serve --workers N`: by signals to the parent, to the group, and when the parent is killed."""

from __future__ import annotations

import os
import signal
import socket
from signal import SIGINT, SIGKILL, SIGTERM
from typing import TYPE_CHECKING

import pytest

from tests.support.serving import eventually
from tests.support.workers import (
    AWAY,
    HOUR,
    INTERRUPTED,
    MOMENT,
    ends,
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

both_signals = pytest.mark.parametrize("number", [SIGTERM, SIGINT])


@both_signals
async def test_a_signal_to_the_parent_drains_all_workers_and_they_end_in_order(
    server: Endpoint, number: signal.Signals
) -> None:
    async with serving_workers(2, server.url, "--drain-timeout", 1) as workers:
        one, two = workers.pids().values()
        runs = {pid: await workers.start_at(pid, "silent") for pid in (one, two)}
        async with (
            workers.reading_at(one, runs[one]) as first,
            workers.reading_at(two, runs[two]) as second,
            workers.reading_at(one, runs[two]) as abroad,
        ):
            await abroad.take(1)
            workers.signal(number)
            await workers.is_draining()
            refused = await workers.client.post("/v1/runs", json={"producer": "silent"})
            assert (refused.status_code, refused.json()["code"]) == (503, "DRAINING")
            assert refused.headers["retry-after"]
            assert (await workers.run(runs[one]))["status"] == "running"
            assert await abroad.rest() == AWAY
            assert [ends(await reader.rest()) for reader in (first, second)] == [INTERRUPTED] * 2
        await has_stopped(workers)


@both_signals
async def test_a_signal_to_the_whole_group_counts_as_one(server: Endpoint, number: signal.Signals) -> None:
    async with serving_workers(2, server.url, *HOUR) as workers:
        one, idle = workers.pids().values()
        run_id = await workers.start_at(one, "silent")
        async with workers.reading_at(one, run_id) as reader:
            await reader.take(1)
            workers.signal_group(number)
            await eventually(lambda: is_gone(idle))
            await workers.is_draining()
            await nothing_comes(reader)
            assert (await workers.client.get("/readyz")).status_code == 503
            assert (await workers.run(run_id))["status"] == "running"
            async with workers.reading(run_id) as another:
                assert len(await another.take(1)) == 1
            workers.signal_group(number)
            assert ends(await reader.rest()) == INTERRUPTED
        await has_stopped(workers)


async def test_the_second_signal_to_the_parent_interrupts_and_the_fourth_kills_what_stands_still(
    server: Endpoint,
) -> None:
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


@both_signals
async def test_a_worker_that_is_on_its_way_out_minds_no_more_signals(server: Endpoint, number: signal.Signals) -> None:
    async with serving_workers(2, server.url) as workers:
        pids = workers.pids().values()

        def all_are_gone() -> bool:
            for pid in pids:
                send(pid, number)
            return all(map(is_gone, pids))

        workers.signal(SIGTERM)
        await eventually(all_are_gone)
        await has_stopped(workers)


async def test_a_producer_that_does_not_let_go_ends_the_server_with_code_3(server: Endpoint) -> None:
    async with serving_workers(2, server.url, "--drain-timeout", 0.1, "--cancel-grace", 0.1) as workers:
        one = workers.pids()[1]
        run_id = await workers.start_at(one, "stubborn")
        async with workers.reading_at(one, run_id) as reader:
            workers.signal(SIGTERM)
            assert ends(await reader.rest()) == INTERRUPTED
        await has_stopped(workers, 3)
        assert f"the producer of run {run_id} has not let go" in workers.said
        assert f"penstock: worker 1 (process {one}) ended with code 3" in workers.said


async def test_when_the_parent_is_killed_the_workers_drain_and_end_and_the_port_is_free(server: Endpoint) -> None:
    async with serving_workers(2, server.url, *MOMENT) as workers:
        one, two = workers.pids().values()
        runs = {pid: await workers.start_at(pid, "silent") for pid in (one, two)}
        async with (
            workers.reading_at(one, runs[one]) as first,
            workers.reading_at(two, runs[two]) as second,
        ):
            await second.take(1)
            workers.signal(SIGKILL)
            assert [ends(await reader.rest()) for reader in (first, second)] == [INTERRUPTED] * 2
        assert await workers.exit_code() == -SIGKILL
        await workers.silent.wait()
        with pytest.raises(OSError, match="all attempts to connect"):
            await workers.wire()
        with socket.socket() as again:
            again.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            again.bind(("127.0.0.1", workers.port))


@both_signals
async def test_when_the_parent_is_killed_a_signal_to_a_worker_hurries_it(
    server: Endpoint, number: signal.Signals
) -> None:
    async with serving_workers(2, server.url, *HOUR) as workers:
        one, idle = workers.pids().values()
        run_id = await workers.start_at(one, "silent")
        async with workers.reading_at(one, run_id) as reader:
            await reader.take(1)
            workers.signal(SIGKILL)
            await eventually(lambda: is_gone(idle))  # or it might be asked, and be gone before it answers
            await workers.is_draining()
            await nothing_comes(reader)
            os.kill(one, number)
            assert ends(await reader.rest()) == INTERRUPTED
        await workers.silent.wait()
