"""Starting, listing, showing and cancelling runs over HTTP: every route, every status, every code."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import trio

from penstock import Event, MemoryLog
from penstock.errors import LogUnavailable
from tests.support.serving import Tap, problem, serving
from tests.support.wire import DONE, blocks_of, ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator


RUN_MEMBERS = {
    "id", "producer", "status", "stop_reason", "cancel_reason", "error", "seq", "created_at", "started_at", "ended_at",
    "metadata",
}  # fmt: skip


# Start


async def test_a_start_is_answered_with_201_the_run_and_where_its_stream_is() -> None:
    async with serving() as server:
        answer = await server.client.post(
            "/v1/runs", json={"producer": "count", "input": 2, "run_id": "a:b.c_d-1", "metadata": {"who": "Zoë"}}
        )
        assert answer.status_code == 201
        assert answer.headers["penstock-run-id"] == "a:b.c_d-1"
        assert answer.headers["content-type"] == "application/json"
        run = answer.json()
        assert set(run) == RUN_MEMBERS
        assert run["id"] == "a:b.c_d-1"
        assert run["producer"] == "count"
        assert run["metadata"] == {"who": "Zoë"}
        assert run["status"] == "running"
        stream = await server.client.get(answer.headers["location"])
        assert [block.data for block in blocks_of(stream.text)] == ["1", "2", DONE]
        ended = await server.run("a:b.c_d-1")
        assert set(ended) == RUN_MEMBERS
        assert (ended["status"], ended["stop_reason"], ended["seq"], ended["error"]) == (
            "completed",
            "end_turn",
            3,
            None,
        )
        assert ended["created_at"] <= ended["started_at"] <= ended["ended_at"]


async def test_a_start_with_stream_is_answered_with_201_and_the_stream_itself() -> None:
    async with serving() as server:
        answer = await server.client.post("/v1/runs", json={"producer": "count", "input": 2, "stream": True})
        assert answer.status_code == 201
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        run_id = answer.headers["penstock-run-id"]
        assert answer.headers["location"] == f"/v1/runs/{run_id}/stream"
        assert [(block.id, block.data) for block in blocks_of(answer.text)] == [(1, "1"), (2, "2"), (3, DONE)]
        assert await server.read(run_id) == blocks_of(answer.text)


async def test_input_reaches_the_producer_as_it_was_sent_and_is_null_if_it_is_left_out() -> None:
    async with serving() as server:
        for value in (None, 0, "words", [1, [2]], {"a": {"b": None}}, 1.5, "\u2028 \U0001f600"):
            assert (await server.read(await server.start("echo", value)))[0].json == {"input": value}
        answer = await server.client.post("/v1/runs", json={"producer": "echo", "stream": True})
        assert blocks_of(answer.text)[0].json == {"input": None}


async def test_run_ids_that_are_made_sort_by_time_and_differ() -> None:
    async with serving() as server:
        made = [await server.start("count", 0) for _ in range(5)]
        assert len(set(made)) == 5
        assert [each[:16] for each in made] == sorted(each[:16] for each in made)


@pytest.mark.parametrize("limit, code", [("timeout", "TIMEOUT"), ("max_silence", "SILENT")])
async def test_a_limit_of_time_that_was_asked_for_ends_the_run(limit: str, code: str) -> None:
    async with serving() as server:
        run_id = await server.start("silent", **{limit: 0.05})
        error, done = await server.read(run_id)
        assert (error.event, error.json["code"], done.data) == ("error", code, DONE)
        assert (await server.run(run_id))["stop_reason"] == code.lower()


# Idempotency, and ids in use


async def test_a_repeated_key_is_answered_with_200_and_the_same_run() -> None:
    started = []

    async def once(_input: Any) -> AsyncIterator[Event]:
        started.append(1)
        yield Event(data="x")

    async with serving({"once": once}) as server:
        body = {"producer": "once", "input": {"a": 1, "b": 2}}
        first = await server.client.post("/v1/runs", json=body, headers={"Idempotency-Key": "k1"})
        again = await server.client.post(
            "/v1/runs", json={"input": {"b": 2, "a": 1}, "producer": "once"}, headers={"Idempotency-Key": "k1"}
        )
        assert (first.status_code, again.status_code) == (201, 200)
        assert again.json()["id"] == first.json()["id"]
        assert again.headers["location"] == first.headers["location"]
        assert again.headers["penstock-run-id"] == first.json()["id"]
        stream = await server.client.post("/v1/runs", json={**body, "stream": True}, headers={"Idempotency-Key": "k1"})
        assert stream.status_code == 200
        assert ids(blocks_of(stream.text)) == [1, 2]
        assert len(started) == 1


async def test_a_repeated_key_with_another_body_is_refused() -> None:
    changes: list[dict[str, Any]] = [{"input": 2}, {"producer": "echo"}, {"metadata": {"x": 1}}, {"timeout": 9}]
    async with serving() as server:
        body = {"producer": "count", "input": 1}
        await server.client.post("/v1/runs", json=body, headers={"Idempotency-Key": "k1"})
        for change in (*changes, {"max_silence": 9}, {"run_id": "other"}):
            answer = await server.client.post("/v1/runs", json=body | change, headers={"Idempotency-Key": "k1"})
            problem(answer, 422, "IDEMPOTENCY_CONFLICT")
        assert len((await server.client.get("/v1/runs")).json()["runs"]) == 1


async def test_two_requests_without_a_key_or_with_two_keys_are_two_runs() -> None:
    async with serving() as server:
        body = {"producer": "count", "input": 1}
        answers = [
            await server.client.post("/v1/runs", json=body, headers=headers)
            for headers in ({}, {}, {"Idempotency-Key": "a"}, {"Idempotency-Key": "b"})
        ]
        assert [answer.status_code for answer in answers] == [201] * 4
        assert len({answer.json()["id"] for answer in answers}) == 4


async def test_many_starts_with_one_key_at_the_same_time_start_one_run() -> None:
    async with serving() as server:
        statuses: list[int] = []
        found: set[str] = set()

        async def start() -> None:
            answer = await server.client.post("/v1/runs", json={"producer": "silent"}, headers={"Idempotency-Key": "k"})
            statuses.append(answer.status_code)
            found.add(answer.json()["id"])

        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(start)
        assert sorted(statuses) == [200] * 9 + [201]
        assert len(found) == 1


async def test_a_run_id_in_use_is_answered_with_409_and_the_record() -> None:
    async with serving() as server:
        await server.start("count", 1, run_id="mine", metadata={"first": True})
        ended = await server.ended_run("mine")
        answer = await server.client.post("/v1/runs", json={"producer": "count", "input": 7, "run_id": "mine"})
        assert problem(answer, 409, "RUN_EXISTS")["run"] == ended
        streamed = await server.client.post("/v1/runs", json={"producer": "count", "run_id": "mine", "stream": True})
        problem(streamed, 409, "RUN_EXISTS")
        assert await server.run("mine") == ended


# Records


async def test_the_list_is_newest_first_and_filtered_and_limited() -> None:
    async with serving() as server:
        for name in ("one", "two"):
            await server.start("count", 1, run_id=name)
            await server.ended_run(name)
        await server.start("silent", run_id="three")

        async def listed(query: str) -> list[str]:
            answer = await server.client.get(f"/v1/runs{query}")
            assert answer.status_code == 200
            return [run["id"] for run in answer.json()["runs"]]

        assert await listed("") == ["three", "two", "one"]
        assert await listed("?limit=2") == ["three", "two"]
        assert await listed("?status=running") == ["three"]
        assert await listed("?status=completed&limit=1") == ["two"]
        assert await listed("?status=lost") == []
        (newest,) = (await server.client.get("/v1/runs?limit=1")).json()["runs"]
        assert newest == await server.run("three")


async def test_the_record_of_a_run_that_is_not_there_is_a_404() -> None:
    async with serving() as server:
        problem(await server.client.get("/v1/runs/nobody"), 404, "RUN_NOT_FOUND")


async def test_a_failed_run_shows_a_code_and_an_error_id_but_not_the_words() -> None:
    async with serving() as server:
        run = await server.ended_run(await server.start("fail"))
        ((words, error_id),) = server.observer.errors
        assert words == "ValueError: the password is hunter2"
        assert run["error"] == {"code": "ERROR", "message": "the run failed", "error_id": error_id}
        assert "hunter2" not in str(await server.read(run["id"]))


# Cancel


async def test_a_cancel_is_202_then_200_then_409_and_the_record_says_why() -> None:
    let_go = trio.Event()

    async def slow_to_stop(_input: Any) -> AsyncIterator[Event]:
        yield Event(data="x")
        try:
            await trio.sleep_forever()
        finally:
            with trio.move_on_after(30, shield=True):
                await let_go.wait()

    async with serving({"slow": slow_to_stop}) as server:
        run_id = await server.start("slow")
        cancel = f"/v1/runs/{run_id}/cancel"
        async with server.reading(run_id) as reader:
            await reader.take(1)
            first = await server.client.post(cancel, json={"reason": "user pressed stop"})
            assert first.status_code == 202
            assert first.json()["id"] == run_id
            assert first.json()["cancel_reason"] == "user pressed stop"
            again = await server.client.post(cancel, json={"reason": "another"})
            assert again.status_code == 200
            assert again.json()["cancel_reason"] == "user pressed stop"
            let_go.set()
            cancelled, done = await reader.rest()
        assert cancelled.event == "cancelled"
        assert cancelled.json == {
            "code": "RUN_CANCELLED", "message": "the run was cancelled", "reason": "user pressed stop",
        }  # fmt: skip
        assert done.data == DONE
        run = await server.ended_run(run_id)
        assert (run["status"], run["stop_reason"]) == ("cancelled", "cancelled")
        late = await server.client.post(cancel)
        assert problem(late, 409, "RUN_ENDED")["run"] == run
        assert await server.run(run_id) == run


async def test_a_cancel_needs_no_body_and_reaches_the_producer_with_its_reason() -> None:
    tap = Tap()
    async with serving({"tap": tap}) as server:
        run_id = await server.start("tap")
        tap.feed("x")
        async with server.reading(run_id) as reader:
            await reader.take(1)
            assert (await server.client.post(f"/v1/runs/{run_id}/cancel")).status_code == 202
            await tap.closed.wait()
            assert tap.reason == "run cancelled"
            cancelled, _ = await reader.rest()
            assert cancelled.json["reason"] is None


async def test_a_cancel_of_a_completed_run_is_a_409_and_of_none_a_404() -> None:
    async with serving() as server:
        run = await server.ended_run(await server.start("count", 1))
        answer = await server.client.post(f"/v1/runs/{run['id']}/cancel", json={"reason": "too late"})
        assert problem(answer, 409, "RUN_ENDED")["run"] == run
        assert run["cancel_reason"] is None
        problem(await server.client.post("/v1/runs/nobody/cancel"), 404, "RUN_NOT_FOUND")


# Health


async def test_a_server_that_serves_is_alive_and_ready() -> None:
    async with serving() as server:
        assert (await server.client.get("/healthz")).json() == {"status": "alive"}
        ready = await server.client.get("/readyz")
        assert (ready.status_code, ready.json()) == (200, {"status": "ready"})


async def test_a_server_whose_log_is_away_is_alive_and_not_ready_and_starts_nothing() -> None:
    class Away(MemoryLog):
        away = False

        async def check(self, shard: str | None = None) -> None:
            if self.away:
                raise LogUnavailable("redis://:hunter2@10.0.0.7 refuses connections")
            await super().check(shard)

        async def start(self, *args: Any, **kwargs: Any) -> Any:
            await self.check()
            return await super().start(*args, **kwargs)

        async def get(self, run_id: str) -> Any:
            await self.check()
            return await super().get(run_id)

    log = Away()
    async with serving(log=log) as server:
        log.away = True
        assert (await server.client.get("/healthz")).status_code == 200
        for answer in (
            await server.client.get("/readyz"),
            await server.client.get("/v1/runs/any"),
            await server.client.post("/v1/runs", json={"producer": "count", "input": 1}),
        ):
            problem(answer, 503, "LOG_UNAVAILABLE")
            assert answer.headers["retry-after"] == "1"
            assert "hunter2" not in answer.text
        log.away = False
        assert (await server.client.get("/readyz")).status_code == 200
