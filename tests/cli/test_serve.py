"""`penstock serve`: what it takes, what it refuses, what it says, and with which code it ends."""

from __future__ import annotations

import json
import shlex
import signal
from dataclasses import fields
from importlib.metadata import version
from typing import TYPE_CHECKING

import httpx2
import pytest
import trio

from penstock.cli.serve import announce
from penstock.supervisor.settings import Settings
from tests.support.command_line import ANY_PORT, GUARD, PRODUCERS, penstock, ran, refused
from tests.support.wire import DONE, blocks_of, ids

if TYPE_CHECKING:
    from pathlib import Path

    from tests.cli.conftest import Served

# Help


@pytest.mark.parametrize("command", [(), ("serve",), ("exec",), ("demo",)])
def test_examples_in_the_help_stand_on_lines_of_their_own(command: tuple[str, ...]) -> None:
    lines = ran(*command, "--help").output.splitlines()
    assert not any("\\b" in line or "\b" in line for line in lines)
    assert all(line.startswith("    ") for line in lines if line.lstrip().startswith("penstock "))


def test_help_names_every_command() -> None:
    output = ran("--help").output
    assert {"demo", "exec", "serve"} <= set(output.split())
    assert "penstock exec -- make -j2" in output


def test_serves_help_shows_every_setting_with_its_variable_its_unit_and_its_default() -> None:
    output = " ".join(ran("serve", "--help").output.split())
    for setting in fields(Settings):
        assert f"--{setting.name.replace('_', '-')} " in output
        assert f"PENSTOCK_{setting.name.upper()}" in output
    assert "--cancel-grace SECONDS" in output
    assert "default: 10.0; x>=0" in output
    assert "67108864 = 64 MiB" in output
    assert "3 a producer ignored its cancellation" in output


def test_the_version_is_the_packages() -> None:
    assert ran("--version").output == f"penstock {version('penstock')}\n"


# What it takes


def test_options_and_variables_become_settings(served: list[Served]) -> None:
    options = ("--cancel-grace", 3, "--dialect", "letta", "--ping-interval", 0, "--max-header-bytes", 2048)
    variables = {"LEASE": "7.5", "MAX_PENDING_BYTES": "1000", "EXPOSE_ERRORS": "true", "CANCEL_GRACE": "4"}
    variables |= {"TTL": "60", "WAIT_REPLICAS": "2"}
    env: dict[str, str | None] = {f"PENSTOCK_{name}": value for name, value in variables.items()}
    result = ran("serve", "--producers", PRODUCERS, *ANY_PORT, *options, **env)
    assert result.exit_code == 0, result.output
    lifespan, log, config = served[0]
    settings = lifespan.settings
    assert (settings.cancel_grace, settings.dialect, settings.lease) == (3, "letta", 7.5)
    assert (settings.max_pending_bytes, settings.expose_errors) == (1000, True)
    assert log == {"ttl": 60, "max_entries": 10_000, "prefix": "sse:run:", "wait_replicas": 2}
    assert lifespan.ping_interval is None
    assert config.h11_max_incomplete_size == 2048


def test_without_options_every_setting_has_its_default(served: list[Served]) -> None:
    assert ran("serve", "--producers", PRODUCERS, *ANY_PORT).exit_code == 0
    assert served[0].lifespan.settings == Settings()
    assert served[0].lifespan.ping_interval == 15


def test_everything_can_come_from_the_environment(served: list[Served]) -> None:
    result = ran("serve", PENSTOCK_PRODUCERS=PRODUCERS, PENSTOCK_BIND="127.0.0.1:0 localhost:0")
    assert result.exit_code == 0, result.output
    assert "agent" in served[0].lifespan.producers


@pytest.mark.parametrize(
    "args,words",
    [
        (("--log", "kafka://broker"), "there is no event log 'kafka://broker'"),
        (("--lease", "0"), "0.0 is not in the range x>0"),
        (("--lease", "nan"), "lease is above 0 s, not nan"),
        (("--drain-timeout", "inf"), "drain_timeout is at least 0 s, not inf"),
        (("--dialect", "klingon"), "'klingon' is not one of"),
        (("--flush-size", "1.5"), "'--flush-size'"),
        (("--nonsense",), "No such option"),
    ],
)
def test_wrong_values_are_refused(args: tuple[str, ...], words: str) -> None:
    assert words in refused("serve", "--producers", PRODUCERS, *ANY_PORT, *args)


def test_a_wrong_variable_is_refused_by_the_options_name() -> None:
    assert "'--cancel-grace'" in refused("serve", "--producers", PRODUCERS, PENSTOCK_CANCEL_GRACE="soon")


@pytest.mark.parametrize(
    "url,authenticated,noted",
    [
        *(("http://127.0.0.1:1", True, False), ("http://[::1]:1", True, False), ("https://10.0.0.1:1", True, False)),
        *(("http://10.0.0.1:1", True, True), ("http://10.0.0.1:1", False, False)),
    ],
)
def test_a_note_says_that_tokens_cross_the_network_unencrypted_only_where_they_do(
    capsys: pytest.CaptureFixture[str], url: str, authenticated: bool, noted: bool
) -> None:
    log_url = "redis://:hunter2@host/0?x=y"
    announce(json.dumps([[url], ["a b", "c"], authenticated]), log_url=log_url, workers=3)
    output = capsys.readouterr().err
    assert f"serving on {url} (3 workers, log: host/0)\n" in output
    assert ("tokens cross the network unencrypted" in output) is noted
    assert ('-H "Authorization: Bearer $PENSTOCK_TOKEN"' in output) is authenticated
    announce(json.dumps([[url], [], authenticated]), log_url=log_url, workers=1)
    assert "producers: none, so that nothing can be started" in capsys.readouterr().err


# Serving


async def test_serve_says_where_it_is_and_its_curl_line_works_and_ctrl_c_interrupts_its_runs() -> None:
    args = ("serve", "--producers", PRODUCERS, *ANY_PORT, "--drain-timeout", 0, "--log-level", "error")
    async with penstock(*args) as program, httpx2.AsyncClient(timeout=GUARD) as client:
        url = (await program.until(r"serving on (http://127\.0\.0\.1:[1-9]\d*) "))[1]
        await program.until("producers: agent, countdown, failing, files, silent")
        curl = shlex.split((await program.until(r"try:  (curl .*)$"))[1])
        await program.until("Ctrl-C stops")

        answer = await client.post(curl[-1], content=curl[curl.index("-d") + 1])
        blocks = blocks_of(answer.text)
        assert ids(blocks) == list(range(1, len(blocks) + 1))
        said = "".join(block.json["content"] for block in blocks[1:-2])
        assert said.startswith('You said: "hello".')
        assert blocks[-1].data == DONE
        assert "agent" in (await client.get(f"{url}/v1/producers")).json()["producers"]

        started = await client.post(f"{url}/v1/runs", json={"producer": "silent"})
        async with client.stream("GET", url + started.headers["location"]) as stream:
            program.process.send_signal(signal.SIGINT)
            error, done = blocks_of(await stream.aread())
        assert error.json["code"] == "INTERRUPTED"
        assert done.data == DONE
        assert await program.end() == 0
        assert program.lines[-1] == "penstock: stopped; every run has its last entry"
        assert "Traceback" not in program.words


async def test_a_producer_that_holds_on_is_shown_and_left_behind_with_code_3(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(
        "import penstock.server.serve, trio\n"
        "penstock.server.serve.ABANDON_AFTER = 0.2\n"
        "async def stubborn(_input):\n"
        "    with trio.CancelScope(shield=True):\n"
        "        await trio.sleep_forever()\n"
        "    yield 'never'\n"
        "producers = {'stubborn': stubborn}\n"
    )
    args = ("serve", "--producers", "stubborn:producers", *ANY_PORT, "--drain-timeout", 0, "--cancel-grace", 0.1)
    async with penstock(*args, cwd=tmp_path) as program, httpx2.AsyncClient(timeout=GUARD) as client:
        url = (await program.until(r"serving on (\S+)"))[1]
        run_id = (await client.post(f"{url}/v1/runs", json={"producer": "stubborn"})).json()["id"]
        program.process.terminate()
        assert await program.end() == 3
        assert f"penstock: the producer of run {run_id} has not let go, and stands here:" in program.lines
        assert any("stubborn.py" in line for line in program.lines)
        assert program.lines[-1].endswith("the process ends with code 3")


async def test_a_service_that_dies_sends_readers_back_and_ends_it_with_code_1_and_one_traceback(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text(
        "import trio\n"
        "from penstock import Event, MemoryLog\n"
        "async def broken(self, batches):\n"
        "    raise RuntimeError('the log is broken')\n"
        "async def silent(_input):\n"
        "    yield Event(data='1')\n"
        "    await trio.sleep_forever()\n"
        "async def breaking(_input):\n"
        "    MemoryLog.append = broken\n"
        "    yield Event(data='2')\n"
        "producers = {'silent': silent, 'breaking': breaking}\n"
    )
    args = ("serve", "--producers", "broken.py:producers", *ANY_PORT)
    said: list[str] = []

    async def read(stream: str, task_status: trio.TaskStatus[None]) -> None:
        async with client.stream("GET", stream) as answer:
            async for line in answer.aiter_lines():
                said.append(line)
                if line == "data: 1":
                    task_status.started()

    async with penstock(*args, cwd=tmp_path) as program, httpx2.AsyncClient(timeout=GUARD) as client:
        url = (await program.until(r"serving on (\S+)"))[1]
        started = await client.post(f"{url}/v1/runs", json={"producer": "silent"})
        async with trio.open_nursery() as nursery:
            for _ in range(20):
                await nursery.start(read, f"{url}{started.headers['location']}")
            assert (await client.post(f"{url}/v1/runs", json={"producer": "breaking"})).status_code == 201
        assert await program.end() == 1
        assert said.count("retry: 1000") == 20
        assert sum("Traceback" in line for line in program.lines) == 1
        assert any("RuntimeError: the log is broken" in line for line in program.lines)
        assert program.lines[-1].startswith("penstock: a service of the supervisor died")


async def test_ctrl_c_while_the_users_module_is_imported_is_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "slow.py").write_text("import threading\nprint('importing', flush=True)\nthreading.Event().wait()\n")
    async with penstock("serve", "--producers", "slow:producers", *ANY_PORT, cwd=tmp_path) as program:
        await program.until("importing")
        program.process.send_signal(signal.SIGINT)
        assert await program.end() == 130
        assert program.lines[-1] == "penstock: stopped before it was ready"
        assert "Traceback" not in program.words
