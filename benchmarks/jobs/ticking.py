"""Sends one XADD after the other, at even intervals, over one plain connection: the floor for any producer.

    python -m benchmarks.jobs.ticking '{"port": 6379, "names": ["a", "b"], "rate": 20, "seconds": 5}'

Options: `port` of the Redis; `names` of the streams, whose ticks are spread evenly; `rate`, entries a second for each;
`seconds`. At its end each stream gets an entry without data.
"""

from __future__ import annotations

import json
import socket
import time

import hiredis

from benchmarks.processes import options


def main() -> dict[str, float]:
    """Tick."""
    given = options()
    names, rate = given["names"], given["rate"] * len(given["names"])
    replies = hiredis.Reader()
    with socket.create_connection(("127.0.0.1", given["port"])) as connection:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

        def add(name: str, data: str) -> None:
            command = ("XADD", name, "*", "data", data)
            connection.sendall(hiredis.pack_command(command))  # type: ignore[arg-type]
            while replies.gets() is False:
                replies.feed(connection.recv(4096))

        began = time.monotonic()
        count = round(rate * given["seconds"])
        for number in range(count):
            time.sleep(max(0.0, began + number / rate - time.monotonic()))
            add(names[number % len(names)], f"t={time.monotonic_ns()};")
        for name in names:
            add(name, "")
    return {"count": count, "late ms": (time.monotonic() - began - given["seconds"]) * 1000}


if __name__ == "__main__":
    print(json.dumps(main()))
