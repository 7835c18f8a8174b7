"""`penstock serve --workers N`, real processes over a real Redis: how they begin, and serve together."""

from __future__ import annotations

import re
import signal
import socket
from contextlib import AsyncExitStack
from signal import SIGINT, SIGTERM
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from penstock.cli.main import main
from tests.support.serving import eventually
from tests.support.workers import CANCELLED, ends, has_stopped, serving_workers

if TYPE_CHECKING:
    from pathlib import Path

    from tests.support.redis_servers import Endpoint

# The beginning


async def test_what_keeps_the_first_worker_from_starting_is_said_once(server: Endpoint) -> None:
    async with serving_workers(3, server.url, "--producers", "tests.nowhere:it", serves=False) as workers:
        await has_stopped(workers, 2)
        assert workers.said.count("there is no module 'tests.nowhere'") == 1
        assert workers.said.count("not started") == 1
        assert "serving on" not in workers.said


async def test_no_other_worker_is_started_if_the_first_cannot_be(server: Endpoint, tmp_path: Path) -> None:
    witness, module = tmp_path / "witness", tmp_path / "broken.py"
    module.write_text(f"with open({str(witness)!r}, 'a') as file:\n    file.write('begun ')\nraise SystemExit(7)\n")
    async with serving_workers(3, server.url, "--producers", f"{module}:it", serves=False) as workers:
        await has_stopped(workers, 7)
    assert witness.read_text() == "begun "


async def test_a_redis_that_is_not_there_is_said_once_and_ends_with_code_1() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        url = f"redis://127.0.0.1:{nobody.getsockname()[1]}"
        async with serving_workers(3, url, serves=False) as workers:
            await has_stopped(workers, 1)
            assert len(re.findall(r"worker \d", workers.said)) == 1
            assert workers.said.count("; not started") == 2  # why, and who


@pytest.mark.parametrize("number, started", [(SIGINT, 1), (SIGTERM, 1), (SIGTERM, 2), (SIGINT, 3)])
async def test_a_signal_to_all_while_they_start_ends_them_without_a_word_too_much(
    server: Endpoint, number: signal.Signals, started: int
) -> None:
    async with serving_workers(3, server.url, serves=False) as workers:
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


# Together


async def test_it_announces_itself_once_when_all_workers_accept_and_each_serves_the_runs_of_all(
    server: Endpoint,
) -> None:
    async with serving_workers(3, server.url) as workers:
        pids = workers.pids()
        assert sorted(pids) == [1, 2, 3]
        for pid in pids.values():
            assert await workers.ask_at(pid, "GET", "/readyz") == 200
        async with AsyncExitStack() as stack:
            for number, pid in pids.items():
                run_id = await workers.start_at(pid, "silent")
                readers = [await stack.enter_async_context(workers.reading_at(at, run_id)) for at in pids.values()]
                assert [(await reader.take(1))[0].data for reader in readers] == [str(pid)] * 3
                another = pids[number % 3 + 1]
                assert await workers.ask_at(another, "POST", f"/v1/runs/{run_id}/cancel") == 202
                assert [ends(await reader.rest()) for reader in readers] == [CANCELLED] * 3
        assert workers.said.count("serving on") == 1
        assert f"serving on {workers.url} (3 workers, log: {server.url})" in workers.said
        assert workers.pids() == pids


@pytest.mark.parametrize(
    "options, env",
    [
        pytest.param(("--max-body-bytes", 99, "--workers", 2), {}, id="options"),
        pytest.param(("--workers=2", "--max-body-bytes=99", "--"), {}, id="options and the end of options"),
        pytest.param((), {"PENSTOCK_WORKERS": "2", "PENSTOCK_MAX_BODY_BYTES": "99"}, id="variables"),
        pytest.param(("--max-body-bytes", 99), {"PENSTOCK_WORKERS": "2", "PENSTOCK_MAX_BODY_BYTES": "1"}, id="both"),
    ],
)
async def test_options_reach_every_worker_however_they_are_given(
    server: Endpoint, options: tuple[object, ...], env: dict[str, str]
) -> None:
    async with serving_workers(None, server.url, *options, env=env) as workers:
        pids = workers.pids()
        assert sorted(pids) == [1, 2]
        for pid in pids.values():
            assert await workers.ask_at(pid, "POST", "/v1/runs", {"producer": "silent"}) == 201
            assert await workers.ask_at(pid, "POST", "/v1/runs", {"producer": "silent", "input": "x" * 99}) == 413


async def test_the_end_of_options_may_stand_before_the_command(server: Endpoint) -> None:
    async with serving_workers(2, server.url, before=("--",), serves=False) as workers:
        await eventually(lambda: "serving on" in workers.said or workers.silent.is_set())
        assert "(2 workers" in workers.said, workers.said


async def test_what_a_producer_starts_in_a_worker_gets_its_signals_as_anywhere(server: Endpoint) -> None:
    async with serving_workers(2, server.url) as workers:
        run_id = await workers.start_at(workers.pids()[1], "signals")
        said = "\n".join(str(block.data) for block in await workers.read(run_id))
        for name in ("SigBlk", "SigIgn"):
            (mask,) = re.findall(rf"^{name}:\s*([0-9a-f]+)$", said, re.MULTILINE)
            assert not any(int(mask, 16) >> (number - 1) & 1 for number in (SIGTERM, SIGINT)), said
