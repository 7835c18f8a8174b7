"""The producer of a chaos test: numbered events that name their run, at times that server and test both compute.

The order of a run, its input, is `{"run": a name, "seed": a number, "seconds": how long}`. From it `schedule` makes the
same times and the same number of events in the server and in the test, and `content` the same text.

Environment:
    CHAOS_SERVER   how the test calls the process; `{pid}` in it is the process's id.
    CHAOS_WITNESS  a file: one line for each time that a run is begun, `NAME SERVER EXECUTION`.
"""

from __future__ import annotations

import os
import random
import zlib
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import trio

from penstock import Event

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

EACH_SECOND: Final = 4
"""How many times a second something comes, on average."""
BURSTS: Final = 0.05
"""The share of these times at which it is not one event but many."""


class Moment(NamedTuple):
    """A number of events, some seconds after a run's begin."""

    seconds: float
    events: int


def schedule(seed: int, seconds: float) -> list[Moment]:
    """When a run says how much; the last moment is at its very end."""
    choose = random.Random(seed)
    moments = []
    now = 0.0
    while now < seconds:
        now = min(now + choose.expovariate(EACH_SECOND), seconds)
        moments.append(Moment(now, choose.randint(20, 100) if choose.random() < BURSTS else 1))
    return moments


def content(run: str, number: int, execution: str, *, late: float = 0.0) -> dict[str, Any]:
    """The data of an event; its lateness shows how busy the machine was."""
    text = "lorem ipsum " * (zlib.crc32(f"{run} {number}".encode()) % 20)
    return {"run": run, "number": number, "execution": execution, "late": late, "text": text}


async def numbered(order: Any) -> AsyncIterator[Event]:
    """The events of a run, from number 1 on."""
    began = trio.current_time()
    execution = os.urandom(8).hex()
    bear_witness(order["run"], execution)
    number = 0
    for moment in schedule(order["seed"], order["seconds"]):
        await trio.sleep_until(began + moment.seconds)
        late = round(trio.current_time() - began - moment.seconds, 3)
        for _ in range(moment.events):
            number += 1
            yield Event.json(content(order["run"], number, execution, late=late))


def bear_witness(run: str, execution: str) -> None:
    """Append a line in one write, so that a kill leaves no half line."""
    file = os.open(os.environ["CHAOS_WITNESS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    try:
        life = os.environ["CHAOS_SERVER"].replace("{pid}", str(os.getpid()))
        os.write(file, f"{run} {life} {execution}\n".encode())
    finally:
        os.close(file)


producers: Final = {"numbered": numbered}
