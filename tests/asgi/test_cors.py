"""Pages of other origins: by default they see nothing, and those that are allowed see all that they must."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import pytest

from penstock import ConfigurationError, TokenAuthorizer, create_app
from tests.support.guarded import TOKEN, bearer, guarded, guarded_requests, link
from tests.support.serving import Tap, problem
from tests.support.wire import DONE, Block

if TYPE_CHECKING:
    import httpx2

    from tests.support.serving import Server

ORIGIN: Final = "https://app.example"
FROM: Final = {"origin": ORIGIN}
OTHERS: Final = [
    "https://evil.example",
    "http://app.example",
    "https://app.example:8443",
    "https://app.example.evil.example",
    "https://evil-app.example",
    "https://app.exampl",
    "null",
    "*",
    "",
]
SENT: Final = "authorization,content-type,idempotency-key,last-event-id"


async def preflight(server: Server, path: str, origin: str, method: str, headers: str = SENT) -> httpx2.Response:
    """What a browser asks before a page's request, without any credential of the page's."""
    asked = {"origin": origin, "access-control-request-method": method, "access-control-request-headers": headers}
    server.client.headers.pop("authorization", None)
    return await server.client.options(path, headers=asked)


def allowed(answer: httpx2.Response) -> str | None:
    """The origin whose pages may see this answer."""
    origin: str | None = answer.headers.get("access-control-allow-origin")
    assert "access-control-allow-credentials" not in answer.headers
    return origin


def words(answer: httpx2.Response, header: str) -> set[str]:
    return {word.strip().lower() for word in answer.headers[f"access-control-{header}"].split(",")}


# By default


async def test_by_default_no_answer_allows_another_origin_and_a_preflight_is_405() -> None:
    async with guarded() as server:
        for headers in (FROM, {**FROM, **bearer("nobody-knows-this")}):
            for method, path in guarded_requests(server.app):
                answer = await server.client.request(method, path, headers=headers)
                assert not any(name.startswith("access-control-") for name in answer.headers), (method, path)
        for method, path in guarded_requests(server.app):
            answer = await preflight(server, path, ORIGIN, method)
            problem(answer, 405, "METHOD_NOT_ALLOWED")
            assert not any(name.startswith("access-control-") for name in answer.headers), (method, path)


# With an origin that is allowed


async def test_an_allowed_origins_preflight_passes_on_every_route_without_a_token() -> None:
    async with guarded(allowed_origins=["https://other.example", ORIGIN]) as server:
        for method, path in guarded_requests(server.app):
            if method == "HEAD":  # nobody asks before that
                continue
            answer = await preflight(server, path, ORIGIN, method)
            assert (answer.status_code, allowed(answer)) == (200, ORIGIN), (method, path)
            assert words(answer, "allow-methods") == {"get", "post"}
            assert words(answer, "allow-headers") >= set(SENT.split(","))
            assert "Origin" in answer.headers["vary"]
        assert [run.id for run in await server.service.supervisor.list()] == []


async def test_what_the_api_does_not_know_is_not_allowed_in_a_preflight() -> None:
    async with guarded(allowed_origins=[ORIGIN]) as server:
        for method, headers in (("DELETE", SENT), ("PUT", ""), ("POST", "x-other"), ("GET", "cookie")):
            assert (await preflight(server, "/v1/runs", ORIGIN, method, headers)).status_code == 400


async def test_every_answer_can_be_read_by_a_page_of_an_allowed_origin_also_a_refusal() -> None:
    async with guarded(allowed_origins=[ORIGIN]) as server:
        await server.ended_run(await server.start("count", 1, run_id="r"))
        asked = [*guarded_requests(server.app), ("GET", "/healthz"), ("GET", "/readyz"), ("GET", "/nowhere")]
        asked += [("GET", "/v1/runs/gone"), ("DELETE", "/v1/runs"), ("GET", "/v1/runs?limit=x")]
        seen = set()
        for token in ({}, bearer("nobody-knows-this")):
            for method, path in asked:
                headers = {**FROM, **token, "content-type": "application/json"}
                answer = await server.client.request(method, path, headers=headers)
                assert allowed(answer) == ORIGIN, (method, path, answer.status_code)
                assert words(answer, "expose-headers") == {"location", "penstock-run-id", "retry-after"}
                assert "Origin" in answer.headers["vary"]
                seen.add(answer.status_code)
        assert seen >= {200, 201, 400, 401, 404, 405, 409}


async def test_a_stream_can_be_read_by_a_page_of_an_allowed_origin_with_a_link_and_come_back_to() -> None:
    tap = Tap()
    async with guarded(producers={"tap": tap}, allowed_origins=[ORIGIN]) as server:
        await server.start("tap", run_id="r")
        path = f"/v1/runs/r/stream?link={link()['link']}"  # as EventSource asks: without a preflight, or a token
        async with server.opened("GET", path, headers={**FROM, "accept": "text/event-stream"}) as reader:
            assert (reader.status, reader.headers["access-control-allow-origin"]) == (200, ORIGIN)
            tap.feed("first")
            assert await reader.take(1) == [Block(1, data="first")]
        tap.feed("second")
        tap.end()
        async with server.opened("GET", path, headers={**FROM, "last-event-id": "1"}) as reader:
            assert reader.headers["access-control-allow-origin"] == ORIGIN
            assert await reader.rest() == [Block(2, data="second"), Block(3, data=DONE)]


async def test_a_page_of_an_allowed_origin_starts_and_cancels_runs() -> None:
    async with guarded(allowed_origins=[ORIGIN]) as server:
        headers = {**FROM, "sec-fetch-site": "cross-site"}
        started = await server.client.post("/v1/runs", json={"producer": "silent"}, headers=headers)
        assert (started.status_code, allowed(started)) == (201, ORIGIN)
        cancel = f"/v1/runs/{started.json()['id']}/cancel"
        simple = await server.client.post(cancel, content=b"{}", headers={**headers, "content-type": "text/plain"})
        problem(simple, 403, "CROSS_SITE")
        assert allowed(simple) == ORIGIN
        assert (await server.client.post(cancel, json={}, headers=headers)).status_code == 202


# With another origin


async def test_another_origin_is_allowed_nothing() -> None:
    async with guarded(allowed_origins=[ORIGIN]) as server:
        for origin in OTHERS:
            for path in ("/v1/runs", "/v1/runs/r/stream", "/healthz"):
                answer = await server.client.get(path, headers={"origin": origin})
                assert allowed(answer) is None, (origin, path)
                answer = await preflight(server, path, origin, "GET")
                assert allowed(answer) is None, (origin, path)
                assert not answer.is_success


def test_one_origin_in_place_of_a_list_is_refused() -> None:
    options: Any = {"allowed_origins": "https://app.example:8443"}
    with pytest.raises(ConfigurationError, match="are a list"):
        create_app({}, **options)


# With all origins


def test_all_origins_without_an_authorizer_are_refused() -> None:
    for origins in (["*"], [ORIGIN, "*"], ("*",)):
        with pytest.raises(ConfigurationError, match="any page could drive this server"):
            create_app({}, allowed_origins=origins)
    create_app({}, allowed_origins=["*"], authorizer=TokenAuthorizer({}))
    create_app({}, allowed_origins=[ORIGIN])


async def test_with_all_origins_any_page_may_ask_and_still_needs_a_token() -> None:
    async with guarded(allowed_origins=["*"]) as server:
        for origin in OTHERS:
            answer = await server.client.get("/v1/runs", headers={"origin": origin, **bearer(TOKEN)})
            assert (answer.status_code, allowed(answer)) == (200, "*")
            asked = await preflight(server, "/v1/runs", origin, "POST")
            assert (asked.status_code, allowed(asked)) == (200, "*")
            refused = await server.client.get("/v1/runs", headers={"origin": origin})
            problem(refused, 401, "NOT_AUTHENTICATED")
            assert allowed(refused) == "*"
