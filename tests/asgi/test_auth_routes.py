"""Access over HTTP: without a credential only health, with one exactly what its rights allow, by token or by link."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio

from penstock import (
    Authorizer,
    Caller,
    LogUnavailable,
    NotAllowed,
    NotAuthenticated,
    Right,
    StreamRejected,
    Token,
    TokenAuthorizer,
    create_app,
)
from tests.support.guarded import AN_HOUR, OPEN, SECRET, TOKEN, base64url, bearer, guarded, guarded_requests, link
from tests.support.serving import problem, serving, silent

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    import httpx2

    from tests.support.serving import Server


def deeply_nested() -> dict[str, str]:
    """What looks like a link, and is as many brackets as a link has room for."""
    return {"link": f"{base64url(b'[' * 700)}.e30.{base64url(b'x' * 32)}"}


def unsigned() -> dict[str, str]:
    head, claims, _ = link()["link"].split(".")
    return {"link": f"{head}.{claims}."}


# Without a credential


NO_CREDENTIAL: Final[dict[str, dict[str, str]]] = {
    "nothing": {},
    "another token": bearer("incorrect.horse-battery_staple"),
    "a token that is longer": bearer(f"{TOKEN}e"),
    "a token that is shorter": bearer(TOKEN[:-1]),
    "the token in other letters": bearer(TOKEN.upper()),
    "no token": {"authorization": "Bearer"},
    "an empty header": {"authorization": ""},
    "a token without a scheme": {"authorization": TOKEN},
    "another scheme": {"authorization": f"Basic {TOKEN}"},
    "a scheme that begins like it": {"authorization": f"BearerToken {TOKEN}"},
    "two tokens": bearer(f"{TOKEN} {TOKEN}"),
    "two tokens with a comma": bearer(f"{TOKEN}, Bearer {TOKEN}"),
    "the digest": bearer(Token.of(TOKEN).digest.hex()),
    "the token in a cookie": {"cookie": f"token={TOKEN}; authorization=Bearer {TOKEN}"},
    "the token under another name": {"x-api-key": TOKEN, "proxy-authorization": f"Bearer {TOKEN}"},
    "a link in the header": bearer(link()["link"]),
}
NO_LINK: Final[dict[str, dict[str, str]]] = {
    "the token in the query": {"token": TOKEN, "access_token": TOKEN, "authorization": f"Bearer {TOKEN}"},
    "the token for a link": {"link": TOKEN},
    "an empty link": {"link": ""},
    "a link that is over": link(exp=int(time.time()) - 1),
    "a link that is not good yet": link(nbf=int(time.time()) + AN_HOUR),
    "a link without a signature": link(SECRET, "none"),
    "a link whose algorithm is no word": link(SECRET, "nOnE"),
    "a link whose signature was cut off": unsigned(),
    "a link of another secret": link(SECRET.upper()),
    "a link of another algorithm": link(SECRET, "HS512"),
    "a link for another audience": link(aud="penstock:cancel"),
    "a link for nobody": link(aud=None),
    "a link without an end": link(exp=None),
    "a link whose end is no number": link(exp="soon"),
    "a link whose end is infinite": link(exp=float("inf")),
    "a link to nothing": link(sub=None),
    "a link to a number": link(sub=7),
    "a link to a list": link(sub=["r"]),
    "a link that is too long": link(more="x" * 1024),
    "brackets for a link": deeply_nested(),
    "half of a surrogate pair for a link": {"link": "\ud800".encode("utf-8", "surrogatepass").decode("latin-1")},
}


async def is_401(server: Server, headers: dict[str, str], query: dict[str, str], *only: str) -> None:
    server.client.headers.pop("authorization", None)
    for method, path in guarded_requests(server.app):
        if only and path not in only:
            continue
        answer = await server.client.request(method, path, headers=headers, params=query)
        assert (answer.status_code, answer.headers["www-authenticate"]) == (401, "Bearer"), (method, path)
        if path == "/" or method == "HEAD":
            continue
        body = problem(answer, 401, "NOT_AUTHENTICATED")
        assert not any(sent in answer.text for sent in (*headers.values(), *query.values()) if len(sent) > 9), body


async def test_without_a_credential_that_is_known_every_route_but_those_of_health_is_401() -> None:
    async with guarded() as server:
        for headers in NO_CREDENTIAL.values():
            await is_401(server, headers, {}, "/v1/runs")
        for query in NO_LINK.values():
            await is_401(server, {}, query, "/v1/runs/r/stream")
        for headers, query in (({}, {}), (bearer(f"{TOKEN}e"), {}), ({}, NO_LINK["a link that is over"])):
            await is_401(server, headers, query)
            for path in OPEN:
                assert (await server.client.get(path, headers=headers)).status_code == 200


async def test_a_good_link_is_no_credential_on_a_server_that_makes_none() -> None:
    async with serving(authorizer=TokenAuthorizer({"it": Token.of(TOKEN)})) as server:
        await is_401(server, {}, link())


async def test_the_body_of_a_request_without_a_credential_is_not_waited_for() -> None:
    async with guarded() as server:
        for method, path in guarded_requests(server.app):
            if method != "POST":
                continue
            async with await server.wire() as wire:
                head = f"POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 1000\r\n\r\n"
                await wire.stream.send_all(head.encode() + b'{"producer": ')
                assert (await wire.until(b"NOT_AUTHENTICATED")).startswith(b"HTTP/1.1 401 ")


async def test_nothing_else_is_said_of_a_request_without_a_credential() -> None:
    body = b" " * 10_000
    async with guarded(max_body_bytes=5000) as server:
        headers = {**bearer("nobody-knows-this"), "last-event-id": "x", "origin": "https://elsewhere.example"}
        for method, path in guarded_requests(server.app, run_id="no%20run"):
            answer = await server.client.request(method, path, headers=headers, content=body, params={"limit": "x"})
            assert answer.status_code == 401, (method, path)


async def test_without_a_credential_the_page_comes_with_401_and_it_is_the_same_page() -> None:
    async with guarded() as server:
        known, unknown = await server.client.get("/"), await server.client.get("/", headers=bearer("nobody"))
        assert (known.status_code, unknown.status_code) == (200, 401)
        assert unknown.headers["content-type"] == known.headers["content-type"] == "text/html; charset=utf-8"
        pages = [answer.text.replace(_nonce(answer), "") for answer in (known, unknown)]
        assert pages[0] == pages[1]
        assert TOKEN not in known.text


def _nonce(answer: httpx2.Response) -> str:
    return answer.headers["content-security-policy"].partition("'nonce-")[2].partition("'")[0]


# With rights

ROUTES: Final[dict[tuple[str, str], tuple[Right | None, int]]] = {
    ("GET", "/"): (None, 200),
    ("POST", "/v1/runs"): (Right.START, 201),
    ("GET", "/v1/producers"): (Right.START, 200),
    ("GET", "/v1/runs"): (Right.LIST, 200),
    ("GET", "/v1/runs/r"): (Right.READ, 200),
    ("GET", "/v1/runs/r/stream"): (Right.READ, 204),
    ("POST", "/v1/runs/r/stream"): (Right.READ, 204),
    ("POST", "/v1/runs/r/link"): (Right.SHARE, 201),
    ("POST", "/v1/runs/r/cancel"): (Right.CANCEL, 409),
    ("GET", "/metrics"): (Right.METRICS, 200),
}
"""What each takes, and how it is answered then: the run has ended, and its reader has it all."""


def test_the_table_of_rights_has_every_route() -> None:
    asked = {(method, path) for method, path in guarded_requests(create_app({})) if method != "HEAD"}
    assert asked == set(ROUTES)


@pytest.mark.parametrize("right", [None, *Right])
async def test_one_right_opens_its_routes_and_no_other(right: Right | None) -> None:
    async with guarded([] if right is None else [right]) as server:
        await server.service.supervisor.start(_one, run_id="r")
        await server.service.supervisor.wait("r")
        for method, path in guarded_requests(server.app):
            needed, status = ROUTES["GET" if method == "HEAD" else method, path]
            sent = {"producer": "count", "input": 1} if (method, path) == ("POST", "/v1/runs") else None
            answer = await server.client.request(method, path, headers={"last-event-id": "99"}, json=sent)
            assert answer.status_code == (status if needed in {None, right} else 403), (method, path, answer.text)
            if answer.status_code == 403 and method != "HEAD":
                assert problem(answer, 403, "NOT_ALLOWED")["detail"].startswith("these credentials do not allow to ")
        runs = await server.service.supervisor.list()
        assert len(runs) == (2 if right is Right.START else 1)


async def _one() -> AsyncIterator[bytes]:
    yield b"data: 1\n\n"


async def test_a_cancel_that_is_not_allowed_cancels_nothing() -> None:
    async with guarded([right for right in Right if right is not Right.CANCEL]) as server:
        run_id = await server.start("silent")
        problem(await server.client.post(f"/v1/runs/{run_id}/cancel"), 403, "NOT_ALLOWED")
        assert (await server.run(run_id))["cancel_reason"] is None
        assert [run.status for run in await server.service.supervisor.list()] == ["running"]


async def test_who_may_not_read_is_not_told_whether_there_is_such_a_run() -> None:
    async with guarded(["list"]) as server:
        await server.service.supervisor.start(_one, run_id="there")
        answers = [await server.client.get(f"/v1/runs/{run_id}") for run_id in ("there", "gone!", "gone")]
        said = [problem(answer, 403, "NOT_ALLOWED")["detail"] for answer in answers]
        assert [words.replace("there", "gone").replace("!", "") for words in said] == [said[2]] * 3


async def test_who_may_start_and_cancel_and_not_read_is_told_nothing_of_what_is_in_a_run() -> None:
    async with guarded(["start", "cancel"]) as server:
        await server.service.supervisor.start(lambda: silent(None), run_id="r", metadata={"password": "hunter2"})
        asked = [("/v1/runs", {"producer": "silent", "run_id": "r"}), ("/v1/runs/r/cancel", {"reason": "enough"})]
        for path, body in asked * 2:
            answer = await server.client.post(path, json=body)
            assert "hunter2" not in answer.text, (path, answer.text)
            assert answer.status_code == (409 if path == "/v1/runs" else answer.status_code)


async def test_a_path_with_a_slash_too_many_is_404_and_sends_nobody_to_another_name() -> None:
    async with guarded() as server:
        for path in ("/v1/runs/", "/v1/runs/r/", "/v1/runs/r/stream/", "/healthz/"):
            answer = await server.client.get(path, headers={"host": "evil.example"})
            assert (answer.status_code, answer.headers.get("location")) == (404, None)


# An authorizer of one's own


class Owners(Authorizer):
    """Everybody may do everything with runs that begin with his name."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Right, str | None]] = []

    async def authenticate(self, request: Any) -> Caller:
        await trio.lowlevel.checkpoint()
        if (name := request.headers.get("x-user")) is None:
            raise NotAuthenticated("say who you are, in X-User")
        return Caller(name, frozenset(Right))

    async def allows(self, caller: Caller, right: Right, run_id: str | None) -> bool:
        await trio.lowlevel.checkpoint()
        self.asked.append((caller.name, right, run_id))
        return (right is Right.LIST and run_id is None) or (run_id or "").startswith(f"{caller.name}.")


async def test_an_authorizer_of_ones_own_decides_run_by_run() -> None:
    owners = Owners()
    async with serving(authorizer=owners) as server:
        post = server.client.post
        assert (await post("/v1/runs")).json()["detail"] == "say who you are, in X-User"
        ada, bob = {"x-user": "ada"}, {"x-user": "bob"}
        for name, headers in (("ada", ada), ("bob", bob)):
            for number in (1, 2):
                body = {"producer": "silent", "run_id": f"{name}.{number}"}
                assert (await post("/v1/runs", json=body, headers=headers)).status_code == 201
        problem(await post("/v1/runs", json={"producer": "silent"}, headers=ada), 403, "NOT_ALLOWED")
        problem(await post("/v1/runs", json={"producer": "silent", "run_id": "bob.3"}, headers=ada), 403, "NOT_ALLOWED")
        for method, path in (("GET", ""), ("GET", "/stream"), ("POST", "/stream"), ("POST", "/cancel")):
            answer = await server.client.request(method, f"/v1/runs/bob.1{path}", headers=ada)
            problem(answer, 403, "NOT_ALLOWED")
        assert (await server.client.get("/v1/runs/bob.1", headers=bob)).json()["status"] == "running"

        owners.asked.clear()
        listed = (await server.client.get("/v1/runs", headers=bob)).json()["runs"]
        assert [run["id"] for run in listed] == ["bob.2", "bob.1"]
        every = ["bob.2", "bob.1", "ada.2", "ada.1"]
        assert owners.asked == [("bob", Right.LIST, run_id) for run_id in [None, *every]]
        problem(await post("/v1/runs/bob.1/link", headers=bob), 404, "NO_LINKS")


class Broken(Owners):
    """Raises what nobody expects, once it is asked for that."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where

    async def authenticate(self, request: Any) -> Caller:
        if self.where == "authenticate":
            raise KeyError("the password is hunter2")
        return await super().authenticate(request)

    async def allows(self, caller: Caller, right: Right, run_id: str | None) -> bool:
        if self.where == "allows" or (self.where == "list" and right is Right.LIST and run_id is not None):
            raise KeyError("the password is hunter2")
        return await super().allows(caller, right, run_id)


@pytest.mark.parametrize("where", ["authenticate", "allows"])
async def test_an_authorizer_that_fails_is_a_500_with_an_error_id_and_nothing_is_done(where: str) -> None:
    async with serving(authorizer=Broken(where), complains=True) as server:
        await server.service.supervisor.start(lambda: silent(None), run_id="r")
        body = {"producer": "count", "input": 1, "run_id": "ada.1"}
        for method, path in guarded_requests(server.app):
            before = len(server.observer.errors)
            sent = body if (method, path) == ("POST", "/v1/runs") else None
            answer = await server.client.request(method, path, headers={"x-user": "ada"}, json=sent)
            if path == "/" and where == "allows":
                assert answer.status_code == 200
                continue
            assert answer.status_code == 500
            (words, error_id) = server.observer.errors[before]
            assert words == "KeyError: 'the password is hunter2'"
            if method != "HEAD":
                assert problem(answer, 500, "ERROR")["error_id"] == error_id
                assert "hunter2" not in answer.text
                assert "Traceback" not in answer.text
        runs = await server.service.supervisor.list()
        assert [(run.id, run.status, run.cancel_reason) for run in runs] == [("r", "running", None)]


async def test_a_list_of_which_one_run_cannot_be_decided_is_a_500_not_a_shorter_list() -> None:
    async with serving(authorizer=Broken("list"), complains=True) as server:
        headers = {"x-user": "ada"}
        assert (await server.client.get("/v1/runs", headers=headers)).json() == {"runs": []}
        await server.client.post("/v1/runs", json={"producer": "silent", "run_id": "ada.1"}, headers=headers)
        problem(await server.client.get("/v1/runs", headers=headers), 500, "ERROR")


@pytest.mark.parametrize(
    "error, status, code",
    [
        (NotAllowed("you were thrown out"), 403, "NOT_ALLOWED"),
        (StreamRejected(429, "TOO_OFTEN", "come back tomorrow"), 429, "TOO_OFTEN"),
        (LogUnavailable("the users' database is away"), 503, "LOG_UNAVAILABLE"),
    ],
)
async def test_what_an_authorizer_refuses_with_is_the_answer(error: Exception, status: int, code: str) -> None:
    class Refuses(Owners):
        async def authenticate(self, request: Any) -> Caller:  # noqa: ARG002
            raise error

    async with serving(authorizer=Refuses()) as server:
        for method, path in guarded_requests(server.app):
            answer = await server.client.request(method, path)
            assert answer.status_code == status
            if method != "HEAD":
                problem(answer, status, code)
        assert server.observer.errors == []


# The names of the server


async def test_a_name_that_is_not_the_servers_is_421_on_every_route_before_anybody_is_asked_who_he_is() -> None:
    async with guarded(allowed_hosts=["penstock.example"]) as server:
        del server.client.headers["authorization"]
        for headers in ({}, bearer("nobody-knows-this"), bearer(TOKEN)):
            for method, path in guarded_requests(server.app):
                answer = await server.client.request(method, path, headers={"host": "evil.example", **headers})
                assert answer.status_code == 421, (method, path)
                if method != "HEAD":
                    words = problem(answer, 421, "MISDIRECTED")["detail"]
                    assert "'evil.example'" in words
                    assert "--allow-host" in words
        for path in OPEN:
            assert (await server.client.get(path, headers={"host": "evil.example"})).status_code == 200
        good = {"host": "Penstock.Example:8000", **bearer(TOKEN)}
        assert (await server.client.get("/v1/runs", headers=good)).status_code == 200
        assert (await server.client.get("/v1/runs", headers={**good, **bearer("nobody")})).status_code == 401


async def test_a_name_that_is_shown_again_is_cut_short_and_cannot_write_lines() -> None:
    async with serving(allowed_hosts=["localhost"]) as server:
        answer = await server.client.get("/v1/runs", headers={"host": "x" * 5000})
        assert len(problem(answer, 421, "MISDIRECTED")["detail"]) < 300


async def test_by_default_an_application_answers_to_any_name() -> None:
    async with serving() as server:
        for name in ("evil.example", "", "[::1]:80", "127.0.0.1:1"):
            assert (await server.client.get("/v1/runs", headers={"host": name})).status_code == 200
