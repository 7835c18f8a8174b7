"""Ctrl-C while a service of the supervisor waits for the log."""

from __future__ import annotations

import signal
from typing import TYPE_CHECKING

import pytest
import trio
from trio.testing import MockClock

from penstock.supervisor import open_supervisor
from tests.support.supervising import FIRST, View, count, ended, gists, read

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from penstock.sse import Event

INTERRUPTED = ["first", "error INTERRUPTED", "[DONE]"]


@pytest.mark.parametrize("operation", ["append", "renew", "check", "reap", "fetch"])
def test_ctrl_c_while_the_log_is_at_work_leaves_the_services_to_store_what_is_last(operation: str) -> None:
    view = View()
    pressed = []

    async def press_ctrl_c() -> None:
        await trio.lowlevel.checkpoint()
        view.before.clear()
        pressed.append(operation)
        signal.raise_signal(signal.SIGINT)

    async def say() -> AsyncIterator[Event]:
        yield FIRST
        await trio.sleep(1)
        view.before[operation] = press_ctrl_c
        if operation == "append":
            yield FIRST
        await trio.sleep_forever()

    async def main() -> None:
        async with open_supervisor(View(view.log)) as elsewhere, open_supervisor(view, lease=9) as supervisor:
            await supervisor.start(say, run_id="run")
            await elsewhere.start(count, 100, 0.1, run_id="theirs")
            await read(supervisor, "theirs")
            await trio.sleep_forever()

    with pytest.raises(KeyboardInterrupt):
        trio.run(main, clock=MockClock(autojump_threshold=0))
    assert pressed == [operation]

    async def look() -> None:
        run = await ended(view, "run")
        assert (run.status, run.stop_reason) == ("failed", "interrupted")
        async with open_supervisor(view) as supervisor:
            assert [each for each in gists(await read(supervisor, "run")) if each != "first"] == INTERRUPTED[1:]

    trio.run(look, clock=MockClock())
