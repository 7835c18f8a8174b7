"""Links: one run's stream and record for whoever has the address, until its time is over."""

from __future__ import annotations

import math
import time
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, Final

import jwt.api_jwt
import pytest

from penstock import ConfigurationError, NotAuthenticated, Right, Token, TokenAuthorizer
from penstock.asgi.auth import Links, new_secret
from tests.asgi.test_access import SECRET, bearer, guarded, guarded_requests, link
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


# What a link opens


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


@pytest.mark.parametrize("name", ["a" * 128, "A.b_c:d-9", "...", "0"])
async def test_a_link_can_be_made_to_a_run_with_any_id(name: str) -> None:
    async with guarded() as server:
        await server.ended_run(await server.start("count", 1, run_id=name))
        url = await link_to(server, name, expires_in=WEEK)
        forget_token(server)
        assert ids(blocks_of((await server.client.get(url)).text)) == [1, 2]


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


@pytest.mark.parametrize("header", ["Bearer nobody-knows-this-token", "bearer nobody-knows-this-token", "Bearer"])
async def test_a_good_link_does_not_help_whoever_sends_a_token_that_does_not_count(header: str) -> None:
    async with guarded() as server:
        await server.ended_run(await server.start("count", 1, run_id="r"))
        answer = await server.client.get("/v1/runs/r/stream", params=link(), headers={"authorization": header})
        problem(answer, 401, "NOT_AUTHENTICATED")


@pytest.mark.parametrize("header", ["Basic dXNlcjpwYXNz", "Negotiate x", ""])
async def test_a_header_that_is_meant_for_a_proxy_takes_nothing_from_a_link_and_adds_nothing(header: str) -> None:
    async with guarded() as server:
        await server.ended_run(await server.start("count", 1, run_id="r"))
        server.client.headers["authorization"] = header
        assert (await server.client.get("/v1/runs/r/stream", params=link())).status_code == 200
        problem(await server.client.get("/v1/runs/r/stream"), 401, "NOT_AUTHENTICATED")
        problem(await server.client.get("/v1/runs", params=link()), 403, "NOT_ALLOWED")


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


# Its end


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Lets so many seconds pass for whoever looks whether a link is over."""

    class Later(datetime):
        by = timedelta()

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + cls.by

    def passed(seconds: float) -> None:
        Later.by = timedelta(seconds=seconds)

    monkeypatch.setattr(jwt.api_jwt, "datetime", Later)
    return passed


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


@pytest.mark.parametrize("lifetime", [0, -1, WEEK + 1, 1e300, True, "60", [], {}])
async def test_a_lifetime_that_no_link_can_have_is_refused(lifetime: Any) -> None:
    async with guarded() as server:
        await server.start("silent", run_id="it")
        answer = await server.client.post("/v1/runs/it/link", json={"expires_in": lifetime})
        assert "expires_in" in problem(answer, 400, "BAD_REQUEST")["detail"]


@pytest.mark.parametrize("ago, over", [(-1.5, False), (0, True), (1, True)])
def test_a_link_is_over_at_the_second_that_it_says(later: Any, ago: float, over: bool) -> None:
    links = Links(SECRET)
    token, ends_at = links.make("r", 1000)
    later(ends_at - datetime.now(UTC).timestamp() + ago)
    if over:
        with pytest.raises(NotAuthenticated, match="time is over"):
            links.run_of(token)
    else:
        assert links.run_of(token) == "r"


# Making them


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


async def test_a_page_of_another_site_cannot_have_a_link_made() -> None:
    async with serving() as server:
        headers = {"sec-fetch-site": "cross-site", "content-type": "text/plain"}
        authorizer = TokenAuthorizer({"it": Token.of("x" * 16)}, Links(SECRET))
        server.service.access.authorizer = authorizer
        answer = await server.client.post("/v1/runs/r/link", headers={**headers, **bearer("x" * 16)}, content=b"{}")
        problem(answer, 403, "CROSS_SITE")


def test_a_link_says_its_run_its_end_what_it_is_for_and_nothing_else() -> None:
    token, ends_at = Links(SECRET).make("it", 60)
    assert jwt.decode(token, options={"verify_signature": False}) == {
        "sub": "it",
        "aud": "penstock:read",
        "exp": ends_at,
    }
    assert jwt.get_unverified_header(token)["alg"] == "HS256"
    assert token.isascii()
    assert SECRET not in token


def test_links_of_one_secret_are_good_wherever_that_is_known_and_nowhere_else() -> None:
    token, _ = Links(SECRET).make("it", 60)
    assert Links(SECRET).run_of(token) == "it"
    with pytest.raises(NotAuthenticated, match="is not one of this server's"):
        Links(new_secret()).run_of(token)
    with pytest.raises(NotAuthenticated):
        Links(SECRET).run_of(token[:-1])
    for place in range(0, len(token), 9):
        changed = f"{token[:place]}{'A' if token[place] != 'A' else 'B'}{token[place + 1 :]}"
        with pytest.raises(NotAuthenticated):
            Links(SECRET).run_of(changed)


@pytest.mark.parametrize("secret", ["", "x" * 31, "ü" * 15 + "x"])
def test_a_secret_that_is_too_short_is_refused_with_how_to_make_one_and_not_shown(secret: str) -> None:
    with pytest.raises(ConfigurationError, match=r"at least 32 bytes.*openssl rand") as caught:
        Links(secret)
    assert not secret or secret not in str(caught.value)


def test_a_secret_counts_in_bytes_and_each_new_one_is_another() -> None:
    Links("x" * 32)
    Links("ü" * 16)
    secrets = {new_secret() for _ in range(100)}
    assert len(secrets) == 100
    assert all(len(secret) >= 43 for secret in secrets)


async def test_every_right_is_the_links_own_alone_and_no_claim_adds_one() -> None:
    async with guarded() as server:
        forget_token(server)
        wide = link(rights=[*Right], scope=" ".join(Right), run_id=None, admin=True, sub="r")
        for method, path in (("GET", "/v1/runs"), ("GET", "/metrics"), ("POST", "/v1/runs/r/cancel")):
            problem(await server.client.request(method, path, params=wide), 403, "NOT_ALLOWED")
