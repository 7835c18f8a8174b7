"""The command line: what it says, what it refuses, and with which code it ends."""

from __future__ import annotations

import shlex
import signal
import socket
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import trio
from click.testing import CliRunner

import penstock as library
from penstock.cli import serve as serving
from penstock.cli.main import main
from penstock.cli.producers import load_producers
from penstock.cli.sockets import listen
from penstock.supervisor.settings import Settings
from tests.support.command_line import GUARD, environment, penstock
from tests.support.wire import DONE, blocks_of, ids

if TYPE_CHECKING:
    from collections.abc import Sequence

    from click.testing import Result

    from penstock.cli.host import Hosted

EXAMPLE = Path(__file__).parents[2] / "examples" / "agent.py"
PRODUCERS = f"{EXAMPLE}:producers"
ANY_PORT = ("--bind", "127.0.0.1:0")


def ran(*args: object, **env: str) -> Result:
    return CliRunner(env=env).invoke(main, [str(each) for each in args], prog_name="penstock")


def refused(*args: object, **env: str) -> str:
    """What a command line is refused with, on one line; `serve` needs no more than that to refuse."""
    result = ran(*args, **env)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    return " ".join(result.output.split())


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> list[Hosted]:
    """What would have been served, instead of serving it."""
    seen: list[Hosted] = []

    def host(what: Hosted, sockets: Sequence[socket.socket], **_how: Any) -> int:
        seen.append(what)
        for each in sockets:
            each.close()
        return 0

    monkeypatch.setattr(serving, "host", host)
    return seen


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
    for knob in fields(Settings):
        assert f"--{knob.name.replace('_', '-')} " in output
        assert f"PENSTOCK_{knob.name.upper()}" in output
    assert "--cancel-grace SECONDS" in output
    assert "default: 10.0; x>=0" in output
    assert "67108864 = 64 MiB" in output
    assert "3 a producer would not let go" in output


def test_the_version_is_the_packages() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "penstock", "--version"], capture_output=True, text=True, check=True, env=environment()
    )
    assert done.stdout == f"penstock {library_version()}\n"


def library_version() -> str:
    from importlib.metadata import version  # noqa: PLC0415

    return version(library.__name__)


# What serve takes


def test_options_and_variables_become_knobs(hosted: list[Hosted]) -> None:
    result = ran(
        *(
            "serve",
            "--producers",
            PRODUCERS,
            *ANY_PORT,
            "--cancel-grace",
            "3",
            "--dialect",
            "letta",
            "--ping-interval",
            0,
        ),
        PENSTOCK_LEASE="7.5",
        PENSTOCK_MAX_PENDING_BYTES="1000",
        PENSTOCK_EXPOSE_ERRORS="true",
        PENSTOCK_CANCEL_GRACE="4",
        PENSTOCK_TTL="60",
        PENSTOCK_WAIT_REPLICAS="2",
    )
    assert result.exit_code == 0, result.output
    (served,) = hosted
    knobs = dict(served.knobs)
    assert (knobs["cancel_grace"], knobs["dialect"], knobs["lease"]) == (3, "letta", 7.5)
    assert (knobs["max_pending_bytes"], knobs["expose_errors"]) == (1000, True)
    assert served.limits == {"ttl": 60, "max_entries": 10_000, "prefix": "sse:run:", "wait_replicas": 2}
    assert served.ping_interval is None
    assert Settings.of(knobs).lease == 7.5


def test_without_options_every_knob_has_its_default(hosted: list[Hosted]) -> None:
    assert ran("serve", "--producers", PRODUCERS, *ANY_PORT).exit_code == 0
    assert Settings.of(hosted[0].knobs) == Settings()
    assert hosted[0].ping_interval == 15


def test_everything_can_come_from_the_environment(hosted: list[Hosted]) -> None:
    result = ran("serve", PENSTOCK_PRODUCERS=PRODUCERS, PENSTOCK_BIND="127.0.0.1:0 localhost:0")
    assert result.exit_code == 0, result.output
    assert "agent" in hosted[0].producers


# What serve refuses


@pytest.mark.parametrize(
    "producers,words",
    [
        ("nope", "'nope' is not MODULE:ATTRIBUTE, such as"),
        ("a-b:producers", "is not MODULE:ATTRIBUTE"),
        ("json:", "is not MODULE:ATTRIBUTE"),
        (".relative:producers", "is not MODULE:ATTRIBUTE"),
        ("no_such_module:producers", "there is no module 'no_such_module'"),
        ("json.nothing:producers", "there is no module 'json.nothing'"),
        ("json.decoder.nothing:producers", "there is no module 'json.decoder.nothing'"),
        ("no/such/file.py:producers", "the file no/such/file.py is not there"),
        ("/:producers", "the file / is a folder"),
        (
            "json:dumps",
            'json:dumps is a function, and must be a mapping of names to producers, such as dumps = {"agent"',
        ),
        ("json:producers", "there is no 'producers' in json; define it there"),
        (f"{EXAMPLE}:producer", "it has producers"),
        ("string:printable", "is a str, and must be a mapping"),
        ("errno:errorcode", "has the key 1"),
    ],
)
def test_wrong_producers_are_refused_with_what_to_do(producers: str, words: str) -> None:
    assert words in refused("serve", "--producers", producers)


def test_a_producer_that_cannot_be_called_is_refused(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text("producers = {'now': [1, 2, 3]}\n")
    assert "'now' is called once for each run" in refused("serve", "--producers", f"{tmp_path / 'made.py'}:producers")


@pytest.mark.parametrize(
    "bind,words",
    [
        ("8000", "'8000' is not HOST:PORT, such as 127.0.0.1:8000"),
        (":8000", "is not HOST:PORT"),
        ("127.0.0.1:", "is not HOST:PORT"),
        ("127.0.0.1:65536", "is not HOST:PORT"),
        ("127.0.0.1:-1", "is not HOST:PORT"),
        ("127.0.0.1:http", "is not HOST:PORT"),
        ("0.0.0.0:0", "can be reached from other machines"),
        ("[::]:0", "or add --insecure if the network itself is safe"),
        ("no.such.host.invalid:80", "there is no address of that name"),
        ("192.0.2.1:0", "--insecure"),
    ],
)
def test_wrong_addresses_are_refused_with_what_to_do(bind: str, words: str) -> None:
    assert words in refused("serve", "--producers", PRODUCERS, "--bind", bind)


def test_a_port_in_use_is_refused_and_no_socket_stays_bound() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        output = refused("serve", "--producers", PRODUCERS, *ANY_PORT, "--bind", address)
    assert f"{address} cannot be bound: Address already in use; choose another port" in output


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


def test_an_address_for_everybody_is_taken_when_one_insists() -> None:
    (sock,) = listen(["0.0.0.0:0"], anywhere=True)
    with sock:
        assert sock.getsockname()[0] == "0.0.0.0"  # noqa: S104  (that is the point)


def test_ipv6_loopback_needs_no_insistence() -> None:
    (sock,) = listen(["[::1]:0"], anywhere=False)
    with sock:
        assert sock.getsockname()[0] == "::1"


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize(
    "source,words",
    [
        ("def deep():\n    return 1 / 0\ndeep()\n", "ZeroDivisionError"),
        ("import not_installed\n", "ModuleNotFoundError"),
        ("producers = {\n", "SyntaxError"),
    ],
)
def test_the_traceback_of_the_users_own_module_begins_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str, by_file: bool
) -> None:
    name = f"broken_{words.lower()}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    where = f"{name}.py" if by_file else name
    result = ran("serve", "--producers", f"{where}:producers")
    assert result.exit_code == 2
    first = next(line for line in result.output.splitlines() if "File" in line)
    assert f"{name}.py" in first
    assert "loading.py" not in result.output
    assert f"importing '{where}' failed: {words}" in result.output


def test_a_files_neighbours_can_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", sys.path.copy())
    (tmp_path / "the_neighbour.py").write_text("producers = {'a': print}\n")
    (tmp_path / "the_file.py").write_text("from the_neighbour import producers\n")
    assert load_producers(f"{tmp_path}/the_file.py:producers") == {"a": print}


# Serving


async def test_serve_says_where_it_is_and_its_curl_line_works_and_sigterm_ends_it_with_0() -> None:
    async with penstock("serve", "--producers", PRODUCERS, *ANY_PORT) as program, httpx2.AsyncClient() as client:
        url = (await program.until(r"serving on (http://127\.0\.0\.1:[1-9]\d*) "))[1]
        await program.until("producers: agent, countdown, failing, files, silent")
        curl = shlex.split((await program.until(r"try:  (curl .*)$"))[1])
        await program.until("Ctrl-C stops")

        answer = await client.post(curl[-1], content=curl[curl.index("-d") + 1], timeout=GUARD)
        blocks = blocks_of(answer.text)
        assert ids(blocks) == list(range(1, len(blocks) + 1))
        said = "".join(block.json["content"] for block in blocks[1:-2])
        assert said.startswith('You said: "hello".')
        assert blocks[-1].data == DONE
        assert "agent" in (await client.get(f"{url}/v1/producers")).json()["producers"]

        program.process.terminate()
        assert await program.end() == 0
        assert program.lines[-1] == "penstock: stopped; every run has its last entry"
        assert "Traceback" not in program.words


async def test_ctrl_c_drains_and_readers_get_the_end_of_an_interrupted_run() -> None:
    args = ("serve", "--producers", PRODUCERS, *ANY_PORT, "--drain-timeout", "0", "--log-level", "error")
    async with penstock(*args) as program, httpx2.AsyncClient(timeout=GUARD) as client:
        url = (await program.until(r"serving on (\S+)"))[1]
        started = await client.post(f"{url}/v1/runs", json={"producer": "silent"})
        async with client.stream("GET", url + started.headers["location"]) as stream:
            program.process.send_signal(signal.SIGINT)
            error, done = blocks_of(await stream.aread())
        assert error.json["code"] == "INTERRUPTED"
        assert done.data == DONE
        assert await program.end() == 0


async def test_a_producer_that_holds_on_is_shown_and_left_behind_with_code_3(tmp_path: Path) -> None:
    (tmp_path / "stubborn.py").write_text(
        "import trio\n"
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


# exec


PRINTER = "import sys; print('one'); print('two', file=sys.stderr); sys.exit(int(sys.argv[1]))"


async def test_exec_serves_a_commands_output_again_and_again_until_it_is_stopped() -> None:
    args = ("exec", *ANY_PORT, "--", sys.executable, "-c", PRINTER, 0)
    async with penstock(*args) as program, httpx2.AsyncClient(timeout=GUARD) as client:
        url = (await program.until(r"curl -N (http://127\.0\.0\.1:\d+/v1/runs/exec/stream)"))[1]
        await program.until("the command ended with exit code 0; .* its stream stays until Ctrl-C")
        blocks = blocks_of((await client.get(url)).text)
        assert {(block.event, block.data) for block in blocks} == {
            ("stdout", "one"),
            ("stderr", "two"),
            ("exit", '{"exit_code":0}'),
            (None, DONE),
        }
        resumed = await client.get(url, headers={"Last-Event-ID": "2"})
        assert blocks_of(resumed.text) == blocks[2:]
        assert (await client.get(url, headers={"Last-Event-ID": "4"})).status_code == 204
        refusal = await client.post(url.replace("/exec/stream", ""), json={"producer": "command"})
        assert refusal.status_code == 400
        program.process.send_signal(signal.SIGINT)
        assert await program.end() == 0


async def test_exec_can_leave_with_the_commands_exit_code_and_says_no_traceback() -> None:
    async with penstock("exec", *ANY_PORT, "--exit-after", 0, sys.executable, "-c", PRINTER, 7) as program:
        assert await program.end() == 7
        assert "Traceback" not in program.words
        await program.until("the command ended with exit code 7; .* entries$")


async def test_exec_says_that_its_command_was_cancelled() -> None:
    args = ("exec", *ANY_PORT, "--exit-after", 0, "--run-id", "mine", "--", sys.executable, "-c", SLEEPER)
    async with penstock(*args) as program, httpx2.AsyncClient(timeout=GUARD) as client:
        url = (await program.until(r"curl -X POST (\S+/v1/runs/mine/cancel)"))[1]
        assert (await client.post(url, json={"reason": "enough"})).status_code == 202
        assert await program.end() == 143
        await program.until(r"the command was cancelled \(enough\)")


SLEEPER = "import threading; threading.Event().wait()"


async def test_ctrl_c_ends_the_command_of_exec() -> None:
    async with penstock("exec", *ANY_PORT, "--exit-after", 0, sys.executable, "-c", SLEEPER) as program:
        await program.until("curl -X POST")
        program.process.send_signal(signal.SIGINT)
        assert await program.end() == 143
        await program.until("the command was ended: the server was shut down")


async def test_exec_says_that_its_command_could_not_be_started(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text("no first line that says what runs it\n")
    script.chmod(0o755)
    async with penstock("exec", *ANY_PORT, "--exit-after", 0, script) as program:
        assert await program.end() == 127
        await program.until("the command was not started: .* that a script begins with #!")


@pytest.mark.parametrize(
    "args,words",
    [
        (
            ("--", "no-such-program", "a"),
            "there is no program 'no-such-program' to run; for a shell's line, give: sh -c",
        ),
        ((), "Missing argument"),
        (("--run-id", "a b", "--", "ls"), "a run id is 1 to 128 letters"),
        (("--nonsense", "ls"), "No such option"),
        (("--bind", "0.0.0.0:0", "--", "ls"), "--insecure"),
    ],
)
def test_exec_refuses_with_what_to_do(args: tuple[str, ...], words: str) -> None:
    assert words in refused("exec", *args)


# The page


async def test_the_page_holds_no_names_and_loads_nothing_from_elsewhere() -> None:
    app = library.create_app({"<script>alert(1)</script>": trio.sleep})
    transport = httpx2.ASGITransport(app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://test") as client:
        pages = [await client.get("/") for _ in range(2)]
    for page in pages:
        policy = page.headers["content-security-policy"]
        nonce = policy.partition("script-src 'nonce-")[2].partition("'")[0]
        assert page.headers["content-type"] == "text/html; charset=utf-8"
        assert policy.startswith("default-src 'none'; ")
        assert page.text.count(f'nonce="{nonce}"') == 2
        assert page.text.count("<script") == page.text.count("<style") == 1
        assert "alert(1)" not in page.text
        assert "{{" not in page.text
        assert "//" not in page.text.partition("<script")[0]
    assert pages[0].headers["content-security-policy"] != pages[1].headers["content-security-policy"]
