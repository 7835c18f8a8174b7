"""What the benchmarks start, and what Redis is asked: a bad end says why, and every command is counted."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import psutil
import pytest
import redis as redis_py
from tests.support.redis_servers import redis_servers

from benchmarks import processes, redis_server
from benchmarks.processes import BenchmarkError, job, job_started, module, penstock, serving
from benchmarks.redis_server import Asked

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.redis_server import Redis


def python(*lines: str) -> list[str]:
    return [sys.executable, "-c", "\n".join(lines)]


READY = "print('it is at http://127.0.0.1:5/page', flush=True)"
FOR_EVER = "import signal; signal.pause()"

# Servers


def test_a_server_is_there_until_the_block_is_left() -> None:
    with serving(python(READY, FOR_EVER)) as server:
        assert server.url == "http://127.0.0.1:5"
        assert server.process.is_running()
        assert server.rss() > 1_000_000
    assert not psutil.pid_exists(server.process.pid)


def test_a_server_that_dies_says_its_words() -> None:
    dying = python("print('getting ready')", "import sys", "sys.exit('no such port')")
    with pytest.raises(BenchmarkError, match=r"is not ready:\n(.*\n)*no such port") as caught, serving(dying):
        pass
    assert "getting ready" in str(caught.value)


def test_what_its_children_cost_is_a_servers_cost() -> None:
    burning = "import sys, time\nwhile time.process_time() < 0.3: pass\nprint('burnt', flush=True)\nsys.stdin.read()"
    parent = python(
        "import subprocess, sys",
        f"child = subprocess.Popen([sys.executable, '-c', {burning!r}], stdin=-1, stdout=-1)",
        "child.stdout.readline()",
        READY,
        FOR_EVER,
    )
    with serving(parent) as server:
        assert server.cpu() >= 0.3
        assert server.rss() > server.process.memory_info().rss


# Jobs


def test_a_jobs_result_is_its_last_line() -> None:
    assert job(python("print('ready')", "print('{\"events\": 3}')")) == {"events": 3}


def test_a_job_gets_its_options() -> None:
    argv = module("jobs.any", count=3, of="x")
    assert argv[:3] == [sys.executable, "-m", "benchmarks.jobs.any"]
    echo = python("from benchmarks.processes import options", "import json", "print(json.dumps(options()))")
    assert job([*echo, argv[3]]) == {"count": 3, "of": "x"}
    assert module("jobs.any", name="x")[3] == '{"name": "x"}'


def test_a_job_that_fails_says_its_words() -> None:
    with pytest.raises(BenchmarkError, match=r"failed:\n(.*\n)*ValueError: too many"):
        job(python("print('{}')", "raise ValueError('too many')"))


def test_a_job_that_takes_too_long_is_killed_and_says_its_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "JOB_WITHIN", 0.5)
    with pytest.raises(BenchmarkError, match=r"took over 0.5 s"):
        job(python(FOR_EVER))


def test_one_waits_for_a_job_to_say_something() -> None:
    started = job_started(python("print('reading')", "print('ready')", "print('{\"events\": 3}')"))
    started.wait_for("ready")
    assert started.result() == {"events": 3}


def test_a_job_hears_what_it_is_told_while_it_runs() -> None:
    echo = "for line in sys.stdin: print('heard', line.strip(), flush=True)"
    started = job_started(python("import sys", echo, "print('{}')"))
    for word in ("one", "two"):
        started.send(word)
        started.wait_for(f"heard {word}")
    assert started.result() == {}


def test_a_jobs_standard_input_stays_open_until_its_result_is_waited_for() -> None:
    waiting = job_started(python("import sys", "print('ready', flush=True)", "sys.stdin.read()", "print('{}')"))
    waiting.wait_for("ready")
    assert waiting.process.poll() is None
    assert waiting.result() == {}


def test_penstocks_knobs_become_options() -> None:
    argv = penstock(log="redis://x", max_entries=5)
    assert argv[1:4] == ["-m", "penstock", "serve"]
    assert argv[argv.index("--log") + 1] == "redis://x"
    assert argv[-2:] == ["--max-entries", "5"]


# What Redis is asked


@pytest.fixture(params=[*redis_servers().values()], ids=[*redis_servers()])
def redis(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Redis]:
    executable: Path = request.param
    monkeypatch.setattr(redis_server, "redis_executable", lambda: str(executable))
    with redis_server.redis_server() as server:
        yield server


@pytest.fixture
def client(redis: Redis) -> Iterator[redis_py.Redis]:
    """One that is connected, and has told Redis of itself."""
    with redis_py.Redis(port=redis.port, single_connection_client=True) as client:
        client.ping()
        yield client


def test_every_command_is_counted_and_none_twice(redis: Redis, client: redis_py.Redis) -> None:
    client.set("before", 1)
    with client.pipeline(transaction=False) as pipe:  # on a connection of its own, from here on
        pipe.get("before")
        pipe.execute()
        with redis.watched() as asked:
            for number in range(500):
                client.set("key", number)
            for _ in range(100):
                pipe.get("key")
            pipe.execute()
    client.set("after", 1)
    assert (asked.names, asked.commands) == ({"SET": 500, "GET": 100}, 600)


def test_what_a_script_calls_is_not_counted(redis: Redis, client: redis_py.Redis) -> None:
    with redis.watched() as asked:
        client.eval("for _ = 1, 5 do redis.call('INCR', KEYS[1]) end", 1, "key")
    assert asked.names == {"EVAL": 1}
    assert client.get("key") == b"5"


def test_connections_are_counted_without_those_that_count(redis: Redis, client: redis_py.Redis) -> None:
    assert redis.connections() == 1
    with redis.watched(), redis_py.Redis(port=redis.port, single_connection_client=True) as other:
        other.ping()
        assert redis.connections() == 2


@pytest.mark.parametrize(
    "line, names",
    [
        (b'+1700000000.1 [0 127.0.0.1:5000] "GET" "key"\r\n', {"GET": 1}),
        (b'+1700000000.1 [3 127.0.0.1:5000] "get" "key"\r\n', {"GET": 1}),
        (b'+1700000000.1 [0 [::1]:5000] "GET" "key"\r\n', {"GET": 1}),
        (b'+1700000000.1 [0 unix:/tmp/redis.sock] "GET" "key"\r\n', {"GET": 1}),
        (b'+1700000000.1 [0 127.0.0.1:5000] "SET" "] \\"lua\\"" "\xff"\r\n', {"SET": 1}),
        (b'+1700000000.1 [0 lua] "GET" "key"\r\n', {}),
        (b'+1700000000.1 [0 127.0.0.1:6000] "GET" "key"\r\n', {}),
        (b"+OK\r\n", {}),
    ],
)
def test_a_line_is_a_command_of_a_client(line: bytes, names: dict[str, int]) -> None:
    asked = Asked()
    asked.count(iter([line]), ours="127.0.0.1:6000")
    assert (asked.commands, asked.names) == (len(names), names)
