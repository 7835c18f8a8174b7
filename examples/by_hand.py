"""A run that is written by hand: push instead of pull. What comes in from elsewhere becomes a resumable stream.

Run it:    python examples/by_hand.py
"""

from __future__ import annotations

import trio

import penstock


async def sensor(readings: trio.MemorySendChannel[float]) -> None:
    """Something that delivers when it likes."""
    async with readings:
        for degrees in (20.5, 20.7, 21.0):
            await readings.send(degrees)
            await trio.sleep(0.05)


async def main() -> None:
    """Write what the sensor delivers into a run, then read it back from a cursor."""
    async with (
        penstock.open_log("memory://") as log,
        penstock.open_supervisor(log) as supervisor,
        trio.open_nursery() as nursery,
    ):
        send, receive = trio.open_memory_channel[float](0)
        nursery.start_soon(sensor, send)
        async with supervisor.open_run("sensor-1") as writer, receive:
            async for degrees in receive:
                seq = await writer.write(penstock.Event.json({"degrees": degrees}))
                print(f"wrote {degrees} as entry {seq}")
        # Leaving the block has ended the run, and its last entry is stored.
        async with supervisor.follow("sensor-1", after=1) as entries:
            async for entry in entries:
                print(entry.seq, entry.data.decode().strip())


if __name__ == "__main__":
    trio.run(main)
