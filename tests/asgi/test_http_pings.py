"""Pings over HTTP: on silence, without ids, and only for those who want them."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.serving import Tap, serving
from tests.support.wire import DONE, Block


async def test_a_ping_is_sent_on_silence_and_carries_no_id() -> None:
    tap = Tap()
    async with serving({"tap": tap}, ping_interval=0.05) as server:
        run_id = await server.start("tap")
        async with server.reading(run_id) as reader:
            assert await reader.take(2) == [Block(comment="ping")] * 2
            tap.feed("x")
            while (block := await reader.next()) == Block(comment="ping"):
                pass
            assert block == Block(1, data="x")
            assert await reader.take(1) == [Block(comment="ping")]
            tap.end()
            *pings, done = await reader.rest()
            assert done == Block(2, data=DONE)
            assert all(ping == Block(comment="ping") for ping in pings)
        assert await server.read(run_id) == [Block(1, data="x"), Block(2, data=DONE)]  # pings are not stored


@pytest.mark.parametrize("value", [False, "false", "0"])
async def test_pings_can_be_left_out(value: Any) -> None:
    tap = Tap()
    async with serving({"tap": tap}, ping_interval=0.02) as server:
        run_id = await server.start("tap")
        path = f"/v1/runs/{run_id}/stream"
        async with (
            server.reading(run_id) as pinged,
            server.opened("POST", path, json_body={"include_pings": value}) as by_body,
            server.reading(run_id, include_pings=value) as by_query,
        ):
            await pinged.take(5)  # time enough for the others
            tap.end()
            assert await by_query.rest() == [Block(1, data=DONE)]
            assert await by_body.rest() == [Block(1, data=DONE)]


async def test_a_ping_in_dialect_letta_names_the_run() -> None:
    async with serving(dialect="letta", ping_interval=0.02) as server:
        run_id = await server.start("silent")
        async with server.reading(run_id) as reader:
            (ping,) = await reader.take(1)
            assert ping.id is None
            assert (ping.json["message_type"], ping.json["run_id"]) == ("ping", run_id)
