"""Links over HTTP: one run's stream and record for every client that has the address, until its lifetime is over."""

from __future__ import annotations

import math
import time
from typing import TYPE_CHECKING, Any, Final

import pytest

from penstock import Right, Token, TokenAuthorizer
from tests.support.guarded import bearer, guarded, guarded_requests, link
from tests.support.serving import PRODUCERS, Tap, problem, serving
from tests.support.wire import DONE, Block, blocks_of, ids

if TYPE_CHECKING:
    from tests.support.serving import Server

WEEK: Final = 7 * 86_400


async def link_to(server: Server, run_id: str, **body: Any) -> str:
    """The path and query of a link that the server has made; the client then has no token any more."""
    answer = await server.client.post(f"/v1/runs/{run_id}/link", json=body)
    assert answer.status_code == 201, answer.text
    url: str = answer.json()["url"]
    assert url.startswith(f"/v1/runs/{run_id}/stream?link=")
    return url


def forget_token(server: Server) -> None:
    del server.client.headers["authorization"]


async def test_a_link_opens_its_runs_stream_and_record_and_nothing_else() -> None:
    async with guarded() as server:
        await server.ended_run(await server.start("count", 3, run_id="other"))
        await server.ended_run(await server.start("count", 3, run_id="it"))
        query = (await link_to(server, "it")).partition("?")[2]
        forget_token(server)
        opened = {}
        for run_id in ("it", "other"):
            for method, path in guarded_requests(server.app, run_id):
                body = {"producer": "count"} if path == "/v1/runs" and method == "POST" else None
                answer = await server.client.request(method, f"{path}?{query}", json=body)
                opened[method, path] = answer.status_code
                if answer.status_code == 403 and method != "HEAD":
                    problem(answer, 403, "NOT_ALLOWED")
        assert {asked for asked, status in opened.items() if status != 403} == {
            *(("GET", "/"), ("HEAD", "/"), ("GET", "/v1/runs/it"), ("HEAD", "/v1/runs/it")),
            *((method, "/v1/runs/it/stream") for method in ("GET", "HEAD", "POST")),
        }
        assert {status for status in opened.values() if status != 403} == {200}
        assert len(await server.service.supervisor.list()) == 2


async def test_a_stream_can_be_read_resumed_and_asked_for_by_post_with_a_link() -> None:
    async with guarded() as server:
        await server.ended_run(await server.start("count", 5, run_id="it"))
        url = await link_to(server, "it")
        forget_token(server)
        whole = await server.client.get(url)
        assert [block.data for block in blocks_of(whole.text)] == ["1", "2", "3", "4", "5", DONE]
        assert (
            await server.client.get(url, headers={"last-event-id": "4"})
        ).text == f"id: 5\ndata: 5\n\nid: 6\ndata: {DONE}\n\n"
        assert ids(blocks_of((await server.client.get(f"{url}&starting_after=3")).text)) == [4, 5, 6]
        assert ids(blocks_of((await server.client.post(url, json={"tail": 1})).text)) == [6]
        head = await server.client.head(url)
        assert (head.status_code, head.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert (await server.client.get(url, headers={"last-event-id": "6"})).status_code == 204


async def test_a_link_that_somebody_else_has_made_with_the_secret_is_as_good() -> None:
    async with guarded() as server:
        await server.ended_run(await server.start("count", 1, run_id="r"))
        forget_token(server)
        for query in (link(), link(aud=["penstock:read", "others"]), link(more="x", iat=0)):
            assert (await server.client.get("/v1/runs/r/stream", params=query)).status_code == 200
        missing = await server.client.get("/v1/runs/gone", params=link(sub="gone"))
        problem(missing, 404, "RUN_NOT_FOUND")
        problem(await server.client.get("/v1/runs/no%20run", params=link(sub="no run")), 400, "BAD_RUN_ID")


@pytest.mark.parametrize("query", [link(), {"link": "nonsense"}, {}], ids=["good", "bad", "none"])
async def test_a_token_goes_before_a_link_also_when_it_allows_less(query: dict[str, str]) -> None:
    async with guarded(["list"]) as server:
        await server.service.supervisor.start(lambda: PRODUCERS["count"](1), run_id="r")
        assert (await server.client.get("/v1/runs/r", params=query)).status_code == 403
        assert (await server.client.get("/v1/runs", params=query)).status_code == 200


async def test_a_good_link_does_not_help_a_caller_who_sends_an_unknown_token() -> None:
    async with guarded() as server:
        await server.ended_run(await server.start("count", 1, run_id="r"))
        for header in ("Bearer nobody-knows-this-token", "bearer nobody-knows-this-token", "Bearer"):
            answer = await server.client.get("/v1/runs/r/stream", params=link(), headers={"authorization": header})
            problem(answer, 401, "NOT_AUTHENTICATED")


async def test_a_header_that_is_meant_for_a_proxy_takes_nothing_from_a_link_and_adds_nothing() -> None:
    async with guarded() as server:
        await server.ended_run(await server.start("count", 1, run_id="r"))
        for header in ("Basic dXNlcjpwYXNz", "Negotiate x", ""):
            server.client.headers["authorization"] = header
            assert (await server.client.get("/v1/runs/r/stream", params=link())).status_code == 200
            problem(await server.client.get("/v1/runs/r/stream"), 401, "NOT_AUTHENTICATED")
            wide = link(rights=[*Right], scope=" ".join(Right), admin=True)
            problem(await server.client.get("/v1/runs", params=wide), 403, "NOT_ALLOWED")


async def test_of_two_links_in_an_address_one_counts_and_it_is_the_same_for_who_and_for_what() -> None:
    async with guarded() as server:
        forget_token(server)
        good, other = link(sub="r")["link"], link(sub="other")["link"]
        for first, second in ((good, other), (other, good)):
            statuses = [
                (await server.client.get(f"/v1/runs/{run_id}?link={first}&link={second}")).status_code
                for run_id in ("r", "other")
            ]
            assert sorted(statuses) == [403, 404]


@pytest.mark.parametrize("size, status", [(1023, 204), (1024, 204), (1025, 401)])
async def test_a_link_has_at_most_1024_characters(size: int, status: int) -> None:
    made = (link(more="x" * length, kind=kind)["link"] for length in range(480, 720) for kind in ("a", "ab", "abc"))
    long = next(each for each in made if len(each) == size)
    async with guarded() as server:
        await server.ended_run(await server.start("count", 1, run_id="r"))
        forget_token(server)
        answer = await server.client.get(f"/v1/runs/r/stream?link={long}", headers={"last-event-id": "2"})
        assert answer.status_code == status


async def test_a_link_ends_and_a_stream_that_was_opened_with_it_goes_on(later: Any) -> None:
    tap = Tap()
    async with guarded(producers={"tap": tap}) as server:
        await server.start("tap", run_id="it")
        url = await link_to(server, "it", expires_in=30)
        forget_token(server)
        async with server.opened("GET", url) as reader:
            tap.feed("before")
            assert await reader.take(1) == [Block(1, data="before")]
            later(32)
            for path in (url, url.replace("/stream", "")):
                answer = await server.client.get(path, headers={"last-event-id": "1"})
                words = problem(answer, 401, "NOT_AUTHENTICATED")["detail"]
                assert words == "the lifetime of this link is over; ask for a new one"
                assert answer.headers["www-authenticate"] == "Bearer"
            tap.feed("after")
            tap.end()
            assert await reader.rest() == [Block(2, data="after"), Block(3, data=DONE)]


@pytest.mark.parametrize(
    "body, seconds", [({}, 3600), ({"expires_in": None}, 3600), ({"expires_in": WEEK}, WEEK), ({"expires_in": 0.1}, 1)]
)
async def test_a_link_says_when_it_ends(body: dict[str, Any], seconds: float) -> None:
    async with guarded() as server:
        await server.start("silent", run_id="it")
        before = time.time()
        answer = await server.client.post("/v1/runs/it/link", json=body)
        after = time.time()
        ends_at = answer.json()["expires_at"]
        assert isinstance(ends_at, int)
        assert before + seconds - 1 <= ends_at <= math.ceil(after + seconds)


async def test_a_lifetime_that_no_link_can_have_is_refused() -> None:
    async with guarded() as server:
        await server.start("silent", run_id="it")
        wrong: tuple[Any, ...] = (0, -1, WEEK + 1, 1e300, True, "60", [], {})
        for lifetime in wrong:
            answer = await server.client.post("/v1/runs/it/link", json={"expires_in": lifetime})
            assert "expires_in" in problem(answer, 400, "BAD_REQUEST")["detail"]


async def test_a_link_to_a_run_that_is_not_there_is_404_and_to_what_cannot_be_one_400() -> None:
    async with guarded() as server:
        problem(await server.client.post("/v1/runs/gone/link"), 404, "RUN_NOT_FOUND")
        problem(await server.client.post("/v1/runs/no%20run/link"), 400, "BAD_RUN_ID")


@pytest.mark.parametrize("authorizer", [None, TokenAuthorizer({"it": Token.of("x" * 16)})])
async def test_a_server_without_a_secret_makes_no_links_and_says_so(authorizer: TokenAuthorizer | None) -> None:
    async with serving(authorizer=authorizer) as server:
        server.client.headers.update(bearer("x" * 16))
        run_id = await server.start("silent")
        answer = await server.client.post(f"/v1/runs/{run_id}/link")
        assert "makes no links" in problem(answer, 404, "NO_LINKS")["detail"]
