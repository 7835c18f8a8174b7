"""Metrics: what `/metrics` shows adds up to what has happened, whatever producers and clients make up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import httpx2
import pytest
import trio
from prometheus_client.parser import text_string_to_metric_families
from starlette.routing import Route

from penstock import Event, EventStreamResponse, StreamRejected, create_app
from penstock.observer import Commit, Figures, StreamEnd
from penstock.observer.prometheus import MAX_CODES, Metrics
from penstock.runs import Ending, Run, RunStatus, StopReason
from penstock.supervisor import open_supervisor
from tests.support.observers import call, every_hook
from tests.support.serving import PRODUCERS, Tap, eventually, fail, problem, serving
from tests.support.supervising import View, come_back, count, go_away
from tests.support.wire import DONE, Block

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from starlette.requests import Request
    from trio.testing import MockClock

    from tests.support.serving import Client, Server

Series = dict[str, float]
"""What there is to read: the value of each sample, by its name with its labels, as Prometheus writes them."""
RUN: Final = Run("r-1", "agent")


def series_of(text: str | bytes) -> Series:
    text = text if isinstance(text, str) else text.decode()
    found: Series = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.endswith("_created"):
                continue
            labels = ",".join(f"{name}={value}" for name, value in sorted(sample.labels.items()))
            name = f"{sample.name.removeprefix('penstock_')}{{{labels}}}" if labels else sample.name[9:]
            assert name not in found, f"{name} twice"
            found[name] = sample.value
    return found


async def scraped(server: Client) -> Series:
    answer = await server.client.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain; version=")
    return series_of(answer.text)


def shown(metrics: Metrics) -> Series:
    return series_of(metrics.render()[0])


def moved(before: Series, after: Series) -> Series:
    """By how much each sample has grown, but for the buckets, if it has."""
    grown = {name: value - before.get(name, 0) for name, value in after.items() if "_bucket{" not in name}
    return {name: by for name, by in grown.items() if by}


# What each thing counts for


MOVES: Final[dict[str, Series]] = {
    "run_started": {"runs_started_total": 1},
    "run_ended": {"runs_ended_total{outcome=completed,stop_reason=end_turn}": 1},
    "run_cancelled": {"cancel_seconds_count": 1, "cancel_seconds_sum": 0.5},
    "run_fenced": {"runs_fenced_total": 1},
    "run_stuck": {"runs_stuck_total": 1},
    "runs_lost": {"runs_lost_total": 2},
    "stream_started": {"streams_started_total": 1},
    "stream_ended": {"streams_ended_total{cause=ended}": 1},
    "pinged": {"pings_total": 1},
    "refused": {"refused_total{code=RUN_NOT_FOUND,status=404}": 1},
    "committed": {
        "entries_in_total": 3,
        "bytes_in_total": 99,
        "commit_entries_count": 1,
        "commit_entries_sum": 3,
        "commit_seconds_count": 1,
        "commit_seconds_sum": 0.001,
    },
    "outage_began": {"log_outages_total": 1, "log_away": 1},
    "outage_ended": {"log_away_seconds_total": 2.5},
    "figures": {
        "runs": 1,
        "readers": 2,
        "pending_bytes": 3,
        "tail_bytes": 4,
        "entries_out_total": 5,
        "bytes_out_total": 6,
    },
    "on_error": {"errors_total": 1},
    "warning": {},
}


@every_hook
def test_each_thing_moves_its_own_figures_and_no_others(hook: str) -> None:
    metrics = Metrics()
    before = shown(metrics)
    call(metrics, hook)
    assert moved(before, shown(metrics)) == MOVES[hook]


def test_gauges_are_what_was_told_last_and_counters_the_sum() -> None:
    metrics = Metrics()
    metrics.figures(Figures(1, 2, 3, 4, 5, 6))
    metrics.figures(Figures(0, 0, 0, 0, 10, 20))
    metrics.outage_began()
    metrics.outage_ended(1.5)
    now = shown(metrics)
    gauges = [now[name] for name in ("runs", "readers", "pending_bytes", "tail_bytes", "log_away")]
    assert gauges == [0, 0, 0, 0, 0]
    assert (now["entries_out_total"], now["bytes_out_total"]) == (15, 26)


def test_times_and_sizes_are_in_the_bucket_whose_upper_bound_they_reach() -> None:
    metrics = Metrics()
    for size, seconds in ((1, 0.0005), (5000, 30.0), (5001, 30.1)):
        metrics.committed(Commit(1, size, 1, seconds))
        metrics.run_cancelled("r-1", seconds)
    now = shown(metrics)
    for name, least, most in (
        ("commit_seconds", "0.0005", "30.0"),
        ("cancel_seconds", "0.0005", "30.0"),
        ("commit_entries", "1.0", "5000.0"),
    ):
        assert [now[f"{name}_bucket{{le={bound}}}"] for bound in (least, most, "+Inf")] == [1, 2, 3]


def test_how_runs_usually_end_is_there_before_any_has() -> None:
    ended = {name: value for name, value in shown(Metrics()).items() if name.startswith("runs_ended_total")}
    assert ended == {
        "runs_ended_total{outcome=completed,stop_reason=end_turn}": 0,
        "runs_ended_total{outcome=cancelled,stop_reason=cancelled}": 0,
        "runs_ended_total{outcome=lost,stop_reason=lost}": 0,
    }


# What others make up


def test_every_stop_reason_with_a_meaning_has_a_figure_and_all_others_share_one() -> None:
    metrics = Metrics()
    for reason in [*StopReason, *(f"made up {number}" for number in range(1000))]:
        metrics.run_ended(RUN.ended(Ending(RunStatus.FAILED, reason), seq=1, at=1.0))
    ended = {name: value for name, value in shown(metrics).items() if "outcome=failed" in name}
    assert ended == {
        **{f"runs_ended_total{{outcome=failed,stop_reason={reason}}}": 1 for reason in StopReason},
        "runs_ended_total{outcome=failed,stop_reason=other}": 1000,
    }


def test_the_first_hundred_codes_have_a_figure_and_all_others_share_one() -> None:
    for told in ("refused", "stream_ended"):
        metrics = Metrics()
        codes = [f"CODE_{number}" for number in range(MAX_CODES)]
        for code in [*codes, "ONE_MORE", "ANOTHER", codes[0], codes[-1]]:
            if told == "refused":
                metrics.refused(400, code)
            else:
                metrics.stream_ended(StreamEnd(code, None, None, None, 0, 0.0))
        values = {name: value for name, value in shown(metrics).items() if "CODE_" in name or "OTHER" in name}
        assert len(values) == MAX_CODES + 1
        assert sorted(values.values()) == [1] * (MAX_CODES - 2) + [2] * 3
        assert not any("ONE_MORE" in name for name in shown(metrics))


def test_codes_that_were_made_up_do_not_take_the_place_of_how_streams_usually_end() -> None:
    metrics = Metrics()
    for number in range(MAX_CODES):
        metrics.refused(400, f"CODE_{number}")
    for cause in ("ended", "disconnected", "interrupted"):
        metrics.stream_ended(StreamEnd(cause, "r-1", 1, 1, 9, 1.0))
        assert shown(metrics)[f"streams_ended_total{{cause={cause}}}"] == 1


async def test_no_code_of_an_application_can_spoil_what_is_shown() -> None:
    codes = ['"quoted"', "two\nlines", "back\\slash", "", "\u2028", "\ud800", "x" * 10_000]

    async def refuses(request: Request) -> EventStreamResponse:
        code = codes[int(request.query_params["which"])]
        return EventStreamResponse(_raises(StreamRejected(409, code, "no")), observer=server.service.observer)

    async with serving() as server:
        server.app.router.routes.append(Route("/refuses", refuses))
        for which in range(len(codes)):
            assert (await server.client.get("/refuses", params={"which": which})).status_code == 409
        problem(await server.client.get("/v1/runs/nowhere"), 404, "RUN_NOT_FOUND")
        refused = {name: value for name, value in (await scraped(server)).items() if name.startswith("refused")}
        assert sum(refused.values()) == len(codes) + 1
        assert refused["refused_total{code=RUN_NOT_FOUND,status=404}"] == 1


async def _raises(error: Exception) -> AsyncIterator[Event]:
    raise error
    yield


# A real load


async def test_what_is_shown_adds_up_to_the_load_over_http() -> None:
    tap = Tap()
    async with serving({**PRODUCERS, "tap": tap}, ping_interval=0.02) as server:
        before = await scraped(server)
        runs: list[str] = []
        received: list[bytes] = []
        pings = 0

        async def read(run_id: str) -> None:
            received.append((await server.client.get(f"/v1/runs/{run_id}/stream")).content)

        for n in (1, 10, 1000):
            runs.append(await server.start("count", n))
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(read, runs[-1])
        for _ in range(2):
            runs.append(await server.start("fail"))
            await read(runs[-1])
        for _ in range(2):
            runs.append(await server.start("silent"))
            async with server.reading(runs[-1]) as reader:
                pings += len(await reader.take(2))
                await server.client.post(f"/v1/runs/{runs[-1]}/cancel")
                rest = await reader.rest()
            pings += rest.count(Block(comment="ping"))
            received.append(await kept_by(server, runs[-1]))
        runs.append(await server.start("silent", timeout=0.05))
        received.append((await server.client.get(f"/v1/runs/{runs[-1]}/stream")).content)
        pings += received[-1].count(b": ping\n\n")
        runs.append(await server.start("tap"))
        tap.feed("one", "two")
        for _ in range(3):
            async with server.reading(runs[-1]) as reader:
                blocks = await reader.take(2)
                while len([block for block in blocks if block.id]) < 2:
                    blocks += await reader.take(1)
            received.append(await kept_by(server, runs[-1]))
        await eventually(lambda: server.service.supervisor._readers.live == 0)
        tap.end()
        await server.ended_run(runs[-1])
        for _ in range(4):
            problem(await server.client.get("/v1/runs/nowhere"), 404, "RUN_NOT_FOUND")
        problem(await server.client.get("/nowhere"), 404, "NOT_FOUND")
        problem(await server.client.put("/v1/runs"), 405, "METHOD_NOT_ALLOWED")
        problem(await server.client.post("/v1/runs", json={"producer": "nobody"}), 400, "UNKNOWN_PRODUCER")

        grown = moved(before, await scraped(server))
        stored = b"".join([await kept_by(server, run_id) for run_id in runs])
        entries = [body.replace(b": ping\n\n", b"") for body in received]
        left = {name: grown.pop(name) for name in list(grown) if name.startswith(("commit", "cancel", "pings", "tail"))}
        assert grown == {
            "runs_started_total": len(runs),
            "runs_ended_total{outcome=completed,stop_reason=end_turn}": 4,
            "runs_ended_total{outcome=failed,stop_reason=error}": 2,
            "runs_ended_total{outcome=cancelled,stop_reason=cancelled}": 2,
            "runs_ended_total{outcome=failed,stop_reason=timeout}": 1,
            "errors_total": 2,
            "streams_started_total": len(received),
            "streams_ended_total{cause=ended}": len(received) - 3,
            "streams_ended_total{cause=disconnected}": 3,
            "refused_total{code=RUN_NOT_FOUND,status=404}": 4,
            "refused_total{code=NOT_FOUND,status=404}": 1,
            "refused_total{code=METHOD_NOT_ALLOWED,status=405}": 1,
            "refused_total{code=UNKNOWN_PRODUCER,status=400}": 1,
            "entries_in_total": stored.count(b"id: "),
            "bytes_in_total": len(stored),
            "entries_out_total": sum(body.count(b"id: ") for body in entries),
            "bytes_out_total": sum(map(len, entries)),
        }
        assert left["commit_entries_sum"] == stored.count(b"id: ")
        assert left["commit_entries_count"] == left["commit_seconds_count"] >= len(runs)
        assert left["cancel_seconds_count"] == 2
        assert left["pings_total"] >= pings >= 4  # a reader who left has not seen his last
        assert len(server.observer.errors) == 2


async def kept_by(server: Server, run_id: str) -> bytes:
    """What the log has of a run, as it goes on the wire."""
    page = await server.service.supervisor.log.read(run_id, 0, max_entries=10_000, max_bytes=10_000_000)
    return b"".join(entry.wire for entry in page.entries)


async def test_it_moves_while_a_run_goes_on() -> None:
    tap = Tap()
    async with serving({"tap": tap}) as server, server.reading(await server.start("tap")) as reader:
        for n in range(1, 4):
            tap.feed(f"event {n}")
            await reader.take(1)
            now = await scraped(server)
            assert (now["runs"], now["readers"], now["pending_bytes"]) == (1, 1, 0)
            assert now["entries_in_total"] == now["entries_out_total"] == n
            size = sum(len(f"id: {each}\ndata: event {each}\n\n") for each in range(1, n + 1))
            assert now["bytes_in_total"] == now["bytes_out_total"] == now["tail_bytes"] == size
            assert now["runs_ended_total{outcome=completed,stop_reason=end_turn}"] == 0
            assert now["streams_started_total"] == 1
        tap.end()
        assert [block.data for block in await reader.rest()] == [DONE]
        now = await scraped(server)
        assert now["entries_out_total"] == 4
        assert now["runs_ended_total{outcome=completed,stop_reason=end_turn}"] == 1
        await eventually(lambda: server.service.supervisor._readers.live == 0)
        now = await scraped(server)
        assert [now[name] for name in ("runs", "readers", "pending_bytes", "tail_bytes")] == [0, 0, 0, 0]
        assert now["streams_ended_total{cause=ended}"] == 1


async def test_an_outage_is_shown_while_it_lasts_and_then_its_length(autojump_clock: MockClock) -> None:
    metrics, view = Metrics(), View()
    async with open_supervisor(view, observer=metrics) as supervisor:
        await supervisor.start(count, 3)
        await trio.sleep(2.5)
        go_away(view)
        await trio.sleep(5)
        assert (shown(metrics)["log_away"], shown(metrics)["log_outages_total"]) == (1, 1)
        come_back(view)
        await trio.sleep(2)
        now = shown(metrics)
        assert (now["log_away"], now["log_outages_total"]) == (0, 1)
        assert now["log_away_seconds_total"] == pytest.approx(5, abs=1)


# Which metrics


async def test_without_metrics_there_is_no_such_route() -> None:
    async with serving(metrics=False) as server:
        problem(await server.client.get("/metrics"), 404, "NOT_FOUND")
        assert server.service.metrics is None
        assert server.service.observer is server.observer


async def test_metrics_of_ones_own_are_what_is_shown() -> None:
    metrics = Metrics()
    async with serving(metrics=metrics) as server:
        await server.read(await server.start("count", 3))
        await server.read(await server.start("fail"))
        assert await scraped(server) == shown(metrics)
        assert shown(metrics)["runs_started_total"] == 2
    assert len(server.observer.errors) == 1
    now = shown(metrics)
    assert [now[name] for name in ("runs", "readers", "pending_bytes", "tail_bytes")] == [0, 0, 0, 0]


async def test_two_applications_of_one_process_count_each_for_itself() -> None:
    async with serving() as one, serving() as other:
        for n in (1, 2, 3):
            await one.read(await one.start("count", n))
        await other.read(await other.start("count", 4))
        ones, others = await scraped(one), await scraped(other)
        assert (ones["runs_started_total"], others["runs_started_total"]) == (3, 1)
        assert (ones["entries_out_total"], others["entries_out_total"]) == (9, 5)
        problem(await one.client.post("/metrics"), 405, "METHOD_NOT_ALLOWED")
        head = await one.client.head("/metrics")
        assert (head.status_code, head.content) == (200, b"")


async def test_before_it_has_started_everything_is_zero() -> None:
    app = create_app({"fail": fail})
    transport = httpx2.ASGITransport(app=app)
    async with httpx2.AsyncClient(transport=transport, base_url="http://localhost") as client:
        answer = await client.get("/metrics")
    assert answer.status_code == 200
    assert not any(series_of(answer.text).values())
