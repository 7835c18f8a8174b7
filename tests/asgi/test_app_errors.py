"""What is not there, not allowed or not expected, dialects, and an application that is mounted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import hypercorn.trio
import pytest
from starlette.applications import Starlette
from starlette.routing import Mount

from penstock import Event, LogUnavailable, MemoryLog
from tests.support.serving import PRODUCERS, problem, quiet_config, serving
from tests.support.wire import DONE, blocks_of, ids

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

EVENT_SOURCE: Final = {"accept": "text/event-stream"}
"""What a browser's `EventSource` accepts."""


async def test_a_route_or_a_method_that_is_not_there_is_a_404_or_a_405_that_names_the_methods() -> None:
    async with serving() as server:
        for path in ("/nowhere", "/v1", "/v1/runs/a/b", "/v1/runs/a/stream/b", "/v1/runs/a%2Fb", "/v1/runs//stream"):
            for method in ("GET", "POST", "DELETE"):
                problem(await server.client.request(method, path), 404, "NOT_FOUND")
        for method, path, allowed in (
            ("DELETE", "/v1/runs", {"GET", "HEAD", "POST"}),
            ("PUT", "/v1/runs/x", {"GET", "HEAD"}),
            ("PATCH", "/v1/runs/x/stream", {"GET", "HEAD", "POST"}),
            ("GET", "/v1/runs/x/cancel", {"POST"}),
            ("OPTIONS", "/readyz", {"GET", "HEAD"}),
        ):
            answer = await server.client.request(method, path)
            problem(answer, 405, "METHOD_NOT_ALLOWED")
            assert set(answer.headers["allow"].split(", ")) == allowed


async def test_head_is_get_without_a_body_on_every_get_route() -> None:
    async with serving() as server:
        run = await server.ended_run(await server.start("count", 1))
        for path in ("/v1/runs", f"/v1/runs/{run['id']}", "/v1/runs/nobody", "/healthz", "/readyz", "/nowhere"):
            got = await server.client.get(path)
            head = await server.client.head(path)
            assert head.status_code == got.status_code
            assert head.content == b""
            assert head.headers["content-type"] == got.headers["content-type"]
            assert head.headers["content-length"] == got.headers["content-length"]


class Broken(MemoryLog):
    """Raises what nobody expects."""

    async def get(self, run_id: str) -> Any:
        raise KeyError(f"{run_id}: the password is hunter2")


@pytest.mark.parametrize("dialect", ["plain", "letta"])
@pytest.mark.parametrize("expose_errors", [False, True])
async def test_an_unexpected_exception_is_a_500_with_an_error_id(dialect: str, *, expose_errors: bool) -> None:
    async with serving(log=Broken(), dialect=dialect, expose_errors=expose_errors, complains=True) as server:
        answer = await server.client.get("/v1/runs/x")
        assert answer.status_code == 500
        body = answer.json() if dialect == "plain" else answer.json()["detail"]
        assert body["code"] == "ERROR"
        ((words, error_id),) = server.observer.errors
        assert words == "KeyError: 'x: the password is hunter2'"
        assert body["error_id"] == error_id
        assert ("hunter2" in answer.text) is expose_errors
        assert "Traceback" not in answer.text
        assert (await server.client.get("/healthz")).status_code == 200


async def test_a_server_that_is_not_ready_says_503_also_to_who_accepts_streams_alone() -> None:
    class Away(MemoryLog):
        async def check(self, shard: str | None = None) -> None:  # noqa: ARG002
            raise LogUnavailable("away")

    async with serving(log=Away()) as server:
        problem(await server.client.get("/readyz", headers=EVENT_SOURCE), 503, "LOG_UNAVAILABLE")


async def test_who_accepts_streams_alone_comes_back_to_a_stream_that_cannot_be_allowed_for_now() -> None:
    class Away:
        async def authenticate(self, _request: Any) -> Any:
            raise LogUnavailable("the users' database is away")

    async with serving(authorizer=Away()) as server:
        stream, record = "/v1/runs/any/stream", "/v1/runs/any"
        answer = await server.client.get(stream, headers=EVENT_SOURCE)
        assert (answer.status_code, answer.text) == (200, "retry: 1000\n\n")
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert answer.headers["cache-control"] == "no-store"
        assert (await server.client.head(stream, headers=EVENT_SOURCE)).status_code == 503
        problem(await server.client.get(stream), 503, "LOG_UNAVAILABLE")
        problem(await server.client.get(record, headers=EVENT_SOURCE), 503, "LOG_UNAVAILABLE")


async def test_in_dialect_letta_errors_are_a_detail_object() -> None:
    async with serving(dialect="letta") as server:

        async def detail(status: int, method: str, path: str, **more: Any) -> Any:
            answer = await server.client.request(method, path, **more)
            assert (answer.status_code, answer.headers["content-type"]) == (status, "application/json")
            assert set(answer.json()) == {"detail"}
            return answer.json()["detail"]

        missing = await detail(404, "GET", "/v1/runs/nobody")
        assert missing["code"] == "RUN_NOT_FOUND"
        assert missing["message"]
        assert (await detail(404, "GET", "/v1/runs/nobody/stream"))["code"] == "RUN_NOT_FOUND"
        assert (await detail(404, "GET", "/nowhere"))["code"] == "NOT_FOUND"
        assert (await detail(400, "POST", "/v1/runs", json={"producer": "x"}))["code"] == "UNKNOWN_PRODUCER"
        run = await server.ended_run(await server.start("count", 1))
        ended = await detail(409, "POST", f"/v1/runs/{run['id']}/cancel")
        assert (ended["code"], ended["run"]) == ("RUN_ENDED", run)


async def test_in_dialect_letta_a_stream_is_spelled_as_lettas_clients_read_it() -> None:
    async def agent(_input: Any) -> AsyncIterator[Event]:
        yield Event.json({"message_type": "assistant_message", "run_id": None, "seq_id": None})
        yield Event.json({"message_type": "stop_reason", "stop_reason": "max_steps"})

    async with serving({**PRODUCERS, "agent": agent}, dialect="letta") as server:
        run_id = await server.start("agent")
        message, stop, done = await server.read(run_id)
        assert (message.json["run_id"], message.json["seq_id"]) == (run_id, 1)
        assert stop.json == {"message_type": "stop_reason", "stop_reason": "max_steps"}
        assert done.data == DONE
        assert (await server.run(run_id))["stop_reason"] == "max_steps"
        _, error, _ = await server.read(await server.start("fail"))
        assert error.event == "error"
        assert set(error.json) == {"error", "code", "error_id"}
        silent = await server.start("silent")
        await server.client.post(f"/v1/runs/{silent}/cancel")
        cancelled, done = await server.read(silent)
        assert cancelled.json == {"message_type": "stop_reason", "stop_reason": "cancelled"}
        assert done.data == DONE


async def test_a_mounted_application_says_where_the_stream_really_is() -> None:
    async def outer(app: Starlette, config: Any, **more: Any) -> None:
        mounted = Starlette(routes=[Mount("/api", app)])
        mounted.router.lifespan_context = app.router.lifespan_context
        await hypercorn.trio.serve(mounted, config, **more)  # type: ignore[arg-type]

    async with serving(run=outer, config=quiet_config()) as server:
        answer = await server.client.post("/api/v1/runs", json={"producer": "count", "input": 1})
        assert answer.headers["location"] == f"/api/v1/runs/{answer.json()['id']}/stream"
        assert ids(blocks_of((await server.client.get(answer.headers["location"])).text)) == [1, 2]


async def test_a_page_of_another_site_posts_nothing_without_a_preflight() -> None:
    async with serving() as server:
        for path in ("/v1/runs", "/v1/runs/any/cancel", "/v1/runs/any/stream"):
            for site in ("cross-site", "same-site"):
                headers = {"Sec-Fetch-Site": site, "Content-Type": "text/plain"}
                answer = await server.client.post(path, headers=headers, content=b'{"producer": "echo"}')
                problem(answer, 403, "CROSS_SITE")
                headers["Content-Type"] = "application/json"  # a preflight was needed, so it is looked at
                assert (await server.client.post(path, headers=headers, content=b"{}")).status_code in {400, 404}
            headers = {"Sec-Fetch-Site": "same-origin"}
            assert (await server.client.post(path, headers=headers, content=b"{}")).status_code in {400, 404}
