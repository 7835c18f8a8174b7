"""P14: what does a Redis Cluster gain, and what does it cost its clients?"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial
from statistics import fmean
from typing import TYPE_CHECKING, Final

from benchmarks.model import Case, Chart, Figure, Goal, Question
from benchmarks.processes import BenchmarkError, job_started, module
from benchmarks.redis_cluster import no_cluster, redis_cluster
from benchmarks.redis_server import redis_server

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from benchmarks.model import Figures, Scale
    from benchmarks.processes import Job
    from benchmarks.redis_server import Redis

COUNT, SIZE, NODES, TWO = 200_000, 200, 3, 2
PENDING: Final = 100
"""Events of each run that may be under way."""
FEW, MANY = 100, 1000
ONE, CLUSTER = "1 Redis", f"cluster of {NODES}"
WAYS: Final = {
    f"{FEW} runs": (FEW, 1, False),
    f"{MANY:,} runs": (MANY, 1, False),
    f"{FEW} runs, {TWO} processes": (FEW, TWO, False),
    f"{MANY:,} runs, {TWO} processes": (MANY, TWO, False),
    f"{FEW} runs, followed": (FEW, 1, True),
}
"""What is done: the runs of all processes together, how many processes store, and whether another one follows all."""
RATE, COST, READING = "events/s", "µs client CPU/event", "µs reader CPU/event"


@contextmanager
def cases(scale: Scale) -> Iterator[Sequence[Case]]:
    """Each case on one Redis, then on the cluster, both empty at first."""
    count, missing = scale.count(COUNT), no_cluster()
    with redis_server() as redis, ExitStack() as stack:
        cluster = stack.enter_context(redis_cluster(NODES)) if missing is None else None

        def case(where: str, url: str, nodes: Sequence[Redis], way: str) -> Case:
            runs, processes, followed = WAYS[way]
            turn = partial(_stored, url, nodes, runs=runs, processes=processes, followed=followed, count=count)
            return Case(f"{where}, {way}", turn, missing if where == CLUSTER else None)

        places = {ONE: (redis.url, [redis]), CLUSTER: (cluster.url, cluster.nodes) if cluster else ("", [])}
        yield [case(where, *place, way) for way in WAYS for where, place in places.items()]


def _stored(url: str, nodes: Sequence[Redis], *, runs: int, processes: int, followed: bool, count: int) -> Figures:
    """Let processes store, and perhaps one follow, from a common start.

    Raises:
        BenchmarkError: a process failed, or the follower lacks events.
    """
    for node in nodes:
        node.client.flushall()
    with ExitStack() as stack:

        def begun(what: str, /, **given: str | int) -> Job:
            job = job_started(module(f"jobs.{what}", url=url, runs=runs // processes, **given))
            stack.callback(job.kill)  # if another one fails
            job.wait_for("ready")
            return job

        share = {"count": count // processes, "size": SIZE, "pending": PENDING}
        jobs = [begun("storing", name=f"run-{number}", **share) for number in range(processes)]
        if followed:
            jobs.append(begun("following", name="run-0"))
        before = [node.cpu() for node in nodes]
        for job in reversed(jobs):  # the follower starts first
            job.send("go")
        for job in jobs:
            job.wait_for("done")
        used = [node.cpu() - cpu for node, cpu in zip(nodes, before, strict=True)]
        results = [job.result() for job in jobs]
    storing, following = results[:processes], results[processes:]
    events = sum(each["events"] for each in storing)
    if any(each["events"] != events for each in following):
        raise BenchmarkError(f"of {events} events {following[0]['events']} were followed")
    wall = max(each["ended"] for each in results) - min(each["began"] for each in storing)
    client = sum(each["busy"] for each in storing)
    figures = {RATE: events / wall, COST: client / events * 1e6, "client cores": client / wall}
    figures["client asleep"] = fmean(each["asleep"] / (each["ended"] - each["began"]) for each in storing)
    figures["µs Redis CPU/event"] = sum(used) / events * 1e6
    figures |= {f"node {number}, cores": cpu / wall for number, cpu in enumerate(used, 1)}
    for each in following:
        figures |= {READING: each["busy"] / events * 1e6, "reader cores": each["busy"] / wall}
    return figures


def _to_one(way: str, name: str) -> Goal:
    return Goal(f"{way}: {name}, to {ONE}", Figure(f"{CLUSTER}, {way}", name), Figure(f"{ONE}, {way}", name))


QUESTION = Question(
    number=14,
    name="cluster",
    asks=f"the same events stored in a cluster of {NODES} nodes and in one Redis, and what that costs the client",
    cases=cases,
    goals=[
        *(_to_one(way, RATE) for way in WAYS),
        *(_to_one(way, COST) for way in WAYS),
        *(_to_one(way, READING) for way, (_, _, followed) in WAYS.items() if followed),
    ],
    charts=[Chart("Stored events, of all processes", RATE), Chart("CPU of the processes that store", COST)],
    notes=f"""\
- Storing is that of `growth`: supervisors in processes without HTTP, whose producers yield events of {SIZE} bytes as
  fast as they are allowed to, with {PENDING} events of each run under way at most. The clock runs from the start at
  which all may begin until the last run has ended, which is acknowledged after all of its events. {TWO} processes have
  half of the runs and of the events each. Starting the runs is not measured: it takes a round trip more in a cluster.
- The cluster has {NODES} masters and no replicas. Its nodes, the one Redis and the clients are all on this machine.
  Each turn begins with all of them empty. *node 1* is the one Redis, or the first node of the cluster.
- *client* is the processes that store, all of them together. *asleep* is the part of the time in which one of them had
  nothing to do but to wait for Redis: it neither ran nor waited for a core (Linux counts that). Where it is near 0, the
  client is the limit, or the cores are; a single process had no core for what that and *client cores* leave of 1.
- *followed*: another process reads all runs, each from its beginning, while they are written. The clock then runs until
  it has the last of them; its CPU is in columns of its own, and not in the client's.
- **Nothing is to be reached here: on two cores the client's CPU is the limit, not Redis.** One process of Python takes
  the better part of a core, beside which one Redis needs a quarter of one; more of them have even less to do, and a
  second client takes what Redis and the first one would have had. By what an event takes of either, one Redis serves
  about three such processes on cores of their own, and only beyond them do {NODES} nodes store what one could not.
- The most that a cluster can bring a single client is the time in which that is *asleep* beside one Redis: the appends
  to several nodes are under way at the same time, while with one there is a moment in which everything waits for it.
- What can be seen here is what a cluster costs: the client's CPU, which sends an event's append to one of {NODES} nodes
  in smaller portions, and Redis' CPU, as each node has the fixed part of every round trip for itself.
""",
)
