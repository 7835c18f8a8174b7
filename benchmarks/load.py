"""The load generator: readers of event streams over HTTP/1.1, thousands of them in one process.

    python -m benchmarks.load '{"urls": ["http://127.0.0.1:8000/stream"], "readers": 1000, "seconds": 5}'

It reads from plain sockets through epoll and parses bytes that many readers get alike only once, so that the measured
server is the bottleneck and not the generator. `just bench load` shows how much it can take in, and every turn reports
how busy it was.

It looks for marks that the servers put into the data of their events:

| mark | meaning |
|---|---|
| `data: ` | an event; in each there is one such line |
| `t=NANOSECONDS;` | when it was made, on the system's monotonic clock; its age when it is read is its latency |

Options: `urls`, one for each reader in turn; `readers`; `headers`, `method` and `body` of their requests; and how long:

- `seconds`: the events made during these seconds are measured, `warm_up` seconds after all readers had their headers;
- otherwise until all streams have ended;
- `hold`: nothing is measured, and the connections stay until standard input is closed.

It prints `ready` when all readers have had their headers, `measuring` and `measured` when the measured seconds begin
and end and, last of all, a line of JSON: `events`; `bytes`; `seconds`, from the first request, or the end of the
warm-up, to the last byte; `made`, the different marks that any reader saw; `fewest`, the events of the reader that got
fewest; `arrived`, the events that came in the measured seconds, whenever they were made; `p50`, `p99` and `max` in
milliseconds; `ended`, the streams that did; `busy`, the share of a core that it took.
"""

from __future__ import annotations

import json
import math
import re
import resource
import select
import socket
import sys
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from benchmarks.model import percentile
from benchmarks.processes import options

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BUFFER: Final = 1024 * 1024
"""Bytes that are read at a time, at most."""
EVENT: Final = b"data: "
MARK: Final = re.compile(rb"t=(\d+);")
LAST: Final = b"0\r\n\r\n"
"""How a body in chunks ends (RFC 9112, 7.1)."""
REMEMBERED: Final = 256
"""Pieces that are remembered, with the marks found in them."""
LATE: Final = 3.0
"""Seconds after the measured ones in which their events may still arrive."""
AT_ONCE: Final = 100
"""Readers that may wait for their headers before the next one connects: a server's backlog is short."""
ANSWER: Final = 60.0
"""Seconds that all readers together may wait for their headers."""
SILENCE: Final = 20.0
"""Seconds without a byte for any reader, after which no more is expected."""


class LoadError(Exception):
    """A server did not answer as a stream of events does."""


@dataclass(slots=True, eq=False)
class Reader:
    """One connection, and what came over it."""

    connection: socket.socket
    rest: bytes = b""
    """The bytes of an incomplete line; before that, of incomplete headers."""
    tail: bytes = b""
    """The last bytes that were parsed."""
    headers: bool = False
    ended: bool = False
    past: bool = False
    """It has read an event made after the measured time, and so all that were made in it."""
    events: int = 0


@dataclass(slots=True)
class Seen:
    """What all readers have seen since the measurement began."""

    since: int
    """Nanoseconds: events that are older are not counted, and neither are those made after `until`."""
    until: float = math.inf
    started: float = 0.0
    events: int = 0
    arrived: int = 0
    """Events of any age."""
    bytes: int = 0
    last: float = 0.0
    """When the last byte came."""
    marks: set[int] = field(default_factory=set)
    latencies: list[float] = field(default_factory=list)


class Load:
    """Many readers, in one thread."""

    def __init__(self) -> None:
        self._readers: dict[int, Reader] = {}
        self._epoll = select.epoll()
        self._buffer = bytearray(BUFFER)
        self._view = memoryview(self._buffer)
        self._found: dict[bytes, tuple[int, list[int]]] = {}
        self.seen = Seen(0)
        self.waiting = 0
        """How many readers have not had their headers."""
        self.reading = 0
        """How many streams have not ended."""

    def connect(
        self, urls: Sequence[str], readers: int, *, method: str, headers: Mapping[str, str], body: str = ""
    ) -> None:
        """Open the connections, and send the requests."""
        if body:
            headers = {"Content-Length": str(len(body.encode())), **headers}
        self.seen.started = time.monotonic()
        for number in range(readers):
            url = urlsplit(urls[number % len(urls)])
            lines = {"Host": url.netloc, "Accept": "text/event-stream", **headers}
            head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
            path = url.path + (f"?{url.query}" if url.query else "")
            connection = socket.create_connection((url.hostname or "", url.port or 80))
            connection.sendall(f"{method} {path} HTTP/1.1\r\n{head}\r\n{body}".encode())
            connection.setblocking(False)
            self._readers[connection.fileno()] = Reader(connection)
            self._epoll.register(connection.fileno(), select.EPOLLIN)
            self.waiting += 1
            self.reading += 1
            self.take(0)
            self.answered(all_but=AT_ONCE)

    @property
    def behind(self) -> bool:
        """Whether events of the measured time may still arrive."""
        return bool(self.seen.marks) and any(not (reader.past or reader.ended) for reader in self._readers.values())

    def answered(self, *, all_but: int = 0) -> None:
        """Wait until all readers but `all_but` have had their headers.

        Raises:
            LoadError: they did not come in time.
        """
        while self.waiting > all_but:
            self.take(1.0)
            if self.waiting and time.monotonic() > self.seen.started + ANSWER:
                raise LoadError(f"{self.waiting} readers had no headers within {ANSWER:g} s")

    @property
    def fewest(self) -> int:
        """The events of the reader that got fewest."""
        return min(reader.events for reader in self._readers.values())

    def watch(self, descriptor: int) -> None:
        """Let `take` say when this is ready, too."""
        self._epoll.register(descriptor, select.EPOLLIN)

    def measure(self, since: int, until: float = math.inf) -> None:
        """Count from now on, and only what was made in this time."""
        self.seen = Seen(since, until, started=since / 1e9)
        for reader in self._readers.values():
            reader.events = 0

    def take(self, timeout: float) -> bool:
        """Read what there is; True if what is watched beside the connections is ready."""
        other = False
        for descriptor, _ in self._epoll.poll(timeout):
            reader = self._readers.get(descriptor)
            if reader is None:
                other = True
                continue
            try:
                size = reader.connection.recv_into(self._buffer)
            except BlockingIOError:
                continue
            if size:
                self._take(reader, bytes(self._view[:size]))
            if not size or reader.ended:
                reader.ended = True
                self.reading -= 1
                self._epoll.unregister(descriptor)
                if not reader.headers:
                    raise LoadError(f"closed before there were headers: {reader.rest[:200]!r}")
        return other

    def _take(self, reader: Reader, data: bytes) -> None:
        now = time.monotonic_ns()
        if reader.rest:
            data = reader.rest + data
        if not reader.headers:
            head, separator, body = data.partition(b"\r\n\r\n")
            if not separator:
                reader.rest = data
                return
            if not re.match(rb"HTTP/1\.1 20[01]\b", head):
                raise LoadError(f"answered with {data[:500]!r}")
            reader.headers = True
            self.waiting -= 1
            data = body
        whole = data if data.endswith(b"\n") else data[: data.rfind(b"\n") + 1]
        reader.rest = data[len(whole) :]
        seen = self.seen
        seen.bytes += len(whole)
        seen.last = now / 1e9
        reader.tail = (reader.tail + whole[-len(LAST) :])[-len(LAST) :]
        reader.ended = reader.tail == LAST
        found = self._found.get(whole)
        if found is None:
            found = (whole.count(EVENT), [int(mark) for mark in MARK.findall(whole)])
            if len(whole) < BUFFER // 16:
                if len(self._found) >= REMEMBERED:
                    self._found.clear()
                self._found[whole] = found
        events, marks = found
        seen.arrived += len(marks) or events
        if marks:
            events = self._timed(reader, marks, now)
        seen.events += events
        reader.events += events

    def _timed(self, reader: Reader, marks: Sequence[int], now: int) -> int:
        """How many of these events were made in the measured time."""
        seen, events = self.seen, 0
        for mark in marks:
            if seen.since <= mark <= seen.until:
                events += 1
                seen.latencies.append((now - mark) / 1e6)
                seen.marks.add(mark)
            elif mark > seen.until:
                reader.past = True
        return events


def run(given: Mapping[str, Any]) -> dict[str, float]:
    """Run the load generator by its options."""
    allow_files(given["readers"])
    load = Load()
    load.connect(
        given["urls"],
        given["readers"],
        method=given.get("method", "GET"),
        headers=given.get("headers", {}),
        body=given.get("body", ""),
    )
    load.answered()
    print("ready", flush=True)
    if given.get("hold"):
        load.watch(sys.stdin.fileno())
        while not load.take(SILENCE):
            pass
        return {"reading": load.reading}
    busy, wall = time.process_time(), time.monotonic()
    if seconds := given.get("seconds"):
        began = wall + given.get("warm_up", 0.5)
        while (now := time.monotonic()) < began:
            load.take(began - now)
        print("measuring", flush=True)
        busy, wall = time.process_time(), time.monotonic()
        load.measure(round(wall * 1e9), (wall + seconds) * 1e9)
        while load.reading and (now := time.monotonic()) < wall + seconds:
            load.take(wall + seconds - now)
        busy, wall = time.process_time() - busy, time.monotonic() - wall
        print("measured", flush=True)
        arrived = load.seen.arrived
        while load.behind and time.monotonic() < now + LATE:
            load.take(0.1)
    else:
        last = wall
        while load.reading and time.monotonic() < max(load.seen.last, last) + SILENCE:
            load.take(1.0)
        busy, wall = time.process_time() - busy, time.monotonic() - wall
        arrived = load.seen.arrived
    ended = given["readers"] - load.reading
    return _figures(load) | {"arrived": arrived, "busy": busy / wall if wall else 0.0, "ended": ended}


def _figures(load: Load) -> dict[str, float]:
    seen = load.seen
    seen.latencies.sort()
    ages = {"p50": 50, "p99": 99, "max": 100} if seen.latencies else {}
    return {
        "events": seen.events,
        "bytes": seen.bytes,
        "made": len(seen.marks),
        "seconds": seen.last - seen.started,
        "fewest": load.fewest,
        **{name: percentile(seen.latencies, percent) for name, percent in ages.items()},
    }


def allow_files(readers: int) -> None:
    """Raise the limit of open files, which may be too low for the readers here and in a server started from here."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = min(readers + 100, hard) if hard != resource.RLIM_INFINITY else readers + 100
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))


if __name__ == "__main__":
    print(json.dumps(run(options())))
