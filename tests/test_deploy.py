"""The shipped systemd unit: what it says of `penstock serve` is so, and its line starts and ends as systemd would."""

from __future__ import annotations

import re
import shlex
import sys
from configparser import ConfigParser
from pathlib import Path
from signal import SIGTERM
from typing import TYPE_CHECKING

import click
import pytest
import trio
from click.core import ParameterSource
from hypercorn.config import Config

from penstock import open_log
from penstock.cli.serve import serve
from penstock.server.hypercorn_fixes.http2 import LAST_SENDS
from penstock.server.serve import ABANDON_AFTER
from penstock.server.workers import ENDS_WITHIN
from penstock.supervisor.settings import Settings
from tests.support.command_line import environment
from tests.support.nginx import SHIPPED, replaced
from tests.support.processes import process_of
from tests.support.workers import Workers, has_stopped

if TYPE_CHECKING:
    from tests.support.redis_servers import Endpoint


UNIT = Path(__file__).parent.parent / "examples" / "deploy" / "penstock.service"


@pytest.fixture
def unit() -> ConfigParser:
    parser = ConfigParser(strict=False, interpolation=None, delimiters=["="])
    parser.optionxform = str  # type: ignore[assignment, method-assign]
    parser.read_string(UNIT.read_text())
    return parser


def arguments(unit: ConfigParser) -> list[str]:
    _, command, *rest = shlex.split(unit["Service"]["ExecStart"])
    assert command == "serve"
    return rest


def test_serve_knows_all_options_of_the_unit(unit: ConfigParser) -> None:
    context = serve.make_context("serve", arguments(unit))
    given = {name for name in context.params if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    assert given == {"producers", "bind", "workers"}


def test_serve_knows_all_variables_of_the_unit() -> None:
    known = {parameter.envvar or f"PENSTOCK_{parameter.name}".upper() for parameter in serve.params}
    named = set(re.findall(r"^#   (\w+)=", UNIT.read_text(), re.MULTILINE))
    assert {"PENSTOCK_LOG", "PENSTOCK_TOKEN", "PENSTOCK_LINK_SECRET"} == named
    assert named <= known


def test_the_unit_serves_where_nginx_looks_for_it(unit: ConfigParser) -> None:
    (bind,) = serve.make_context("serve", arguments(unit)).params["bind"]
    assert f"server {bind} " in SHIPPED.read_text()


def test_systemd_waits_for_longer_than_the_longest_shutdown_takes(unit: ConfigParser) -> None:
    settings = Settings()
    runs = settings.drain_timeout + settings.cancel_grace + ABANDON_AFTER + settings.finalize_timeout
    connections = Config().graceful_timeout + LAST_SENDS
    assert float(unit["Service"]["TimeoutStopSec"]) > runs + connections + ENDS_WITHIN


def test_only_a_wrong_argument_is_not_tried_again(unit: ConfigParser) -> None:
    service = unit["Service"]
    assert (service["Restart"], unit["Unit"]["StartLimitIntervalSec"]) == ("on-failure", "0")
    with pytest.raises(click.UsageError) as caught:
        serve.make_context("serve", ["--no-such-option"])
    assert service["RestartPreventExitStatus"] == str(caught.value.exit_code)


def test_ten_thousand_readers_have_their_connections_and_their_memory(unit: ConfigParser) -> None:
    service, settings, readers = unit["Service"], Settings(), 10_000
    assert int(service["LimitNOFILE"]) > readers + 1_000
    events = settings.max_process_tail_bytes + settings.max_process_pending_bytes
    workers = serve.make_context("serve", arguments(unit)).params["workers"]
    assert int(service["MemoryMax"].removesuffix("G")) * 2**30 > workers * events + readers * 40 * 2**10


async def test_the_units_line_serves_and_ends_in_time_as_systemd_ends_it(unit: ConfigParser, server: Endpoint) -> None:
    service = unit["Service"]
    line = replaced(
        service["ExecStart"],
        {
            f"{service['WorkingDirectory']}/.venv/bin/penstock": f"{sys.executable} -m penstock",
            "agent.py:": "examples/agent.py:",
            ":8000 ": ":0 ",
        },
    )
    secret = "c2VjcmV0" * 6
    name, _, value = service["Environment"].partition("=")
    given = {name: value, "PENSTOCK_LOG": server.url, "PENSTOCK_TOKEN": secret, "PENSTOCK_LINK_SECRET": secret}
    assert service["KillMode"] == "mixed"
    async with process_of(Workers, *shlex.split(line), env=environment(**given)) as parent:
        parent.client.headers["authorization"] = f"Bearer {secret}"
        run_id = await parent.start("countdown", 2)
        with trio.fail_after(float(service["TimeoutStopSec"])):
            parent.signal(SIGTERM)  # mixed: to nobody else
            await has_stopped(parent)
    async with open_log(server.url) as log:
        run = await log.get(run_id)
    assert (run.status, run.stop_reason, run.seq) == ("completed", "end_turn", 4)
