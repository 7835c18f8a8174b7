"""The page at / in a browser: it asks for a token, and with one it starts, follows, cuts, resumes and cancels runs."""

from __future__ import annotations

import json
import math
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

import pytest
import trio
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from penstock import Event, Token, TokenAuthorizer, serve
from penstock.asgi.auth import Links
from tests.support.browser import WHY_NOT, chromium, executable
from tests.support.guarded import SECRET, TOKEN, bearer, link
from tests.support.serving import PRODUCERS, Tap, serving

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Sequence

    from hypercorn.config import Config
    from starlette.applications import Starlette
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from tests.support.serving import Server

pytestmark = pytest.mark.skipif(executable() is None, reason=WHY_NOT)

HANDS: Final = """
const seen = [];
document.addEventListener("securitypolicyviolation", (event) => seen.push(event.violatedDirective));
addEventListener("error", (event) => seen.push(event.message));
const it = (id) => document.getElementById(id), real = fetch;
const tell = (what) => real("/said", {method: "POST", body: JSON.stringify(what)});
let pending = 0, late = null;
fetch = async (path, options) => {
  pending += 1;
  try { return await real(path, options); }
  finally { if (!options.headers.Authorization) await late; pending -= 1; }
};
const rows = () => [...it("events").children].map((row) => [...row.children].map((each) => each.textContent));
const until = async (what, condition) => {
  for (const began = Date.now(); !condition(); await new Promise((again) => setTimeout(again, 5)))
    if (Date.now() - began > 50000) throw new Error(`in vain: ${what}; ${document.body.innerText}`);
};
const ended = () => until("its end", () => it("state").textContent.startsWith("ended"));
const question = () => until("the question", () => !it("who").hidden && !pending);
const enter = (token) => { it("token").value = token; document.forms[0].requestSubmit(); };
const start = (producer, input) => {
  it("producer").value = producer; it("input").value = input; document.forms[1].requestSubmit();
};
(async () => { DO })().catch((error) => tell({error: String(error)}));
"""
"""What a test does on the page, in place of DO; it tells what it sees, and what the page's policy did not allow.

The page's requests that are `pending` can be counted; the answers to those without a token come `late` if a test likes.
"""


class Hands:
    """Adds a script to the page, with its nonce, and hears what that tells."""

    def __init__(self, do: str) -> None:
        self._script = HANDS.replace("DO", do)
        self._say, self._said = trio.open_memory_channel[Any](math.inf)
        self.asked: list[tuple[str, str, str | None]] = []
        """The method, the address and the header of every request but those of the script."""

    async def told(self) -> Any:
        said = await self._said.receive()
        assert not isinstance(said, dict) or "error" not in said, said["error"]
        return said

    async def serve(self, app: Starlette, config: Config, **options: Any) -> None:
        """Serve all of it; `serving` takes this as its `run`."""
        app.add_middleware(self.around)
        await serve(app, config, signals=(), **options)

    def around(self, app: ASGIApp) -> ASGIApp:
        async def served(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
            elif scope["path"] == "/said":
                self._say.send_nowait(await Request(scope, receive).json())
                await Response(status_code=204)(scope, receive, send)
            else:
                address = f"{scope['path']}?{scope['query_string'].decode()}"
                self.asked.append((scope["method"], address, Request(scope).headers.get("authorization")))
                await app(scope, receive, self._added(send) if scope["path"] == "/" else send)

        return served

    def _added(self, send: Send) -> Send:
        start: dict[str, Any] = {}

        async def add(message: Message) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            policy = dict(start["headers"])[b"content-security-policy"].decode()
            nonce = policy.partition("'nonce-")[2].partition("'")[0]
            body = message["body"] + f'<script nonce="{nonce}">{self._script}</script>'.encode()
            kept = [(name, value) for name, value in start["headers"] if name != b"content-length"]
            await send({**start, "headers": [*kept, (b"content-length", b"%d" % len(body))]})
            await send({**message, "body": body})

        return add


@asynccontextmanager
async def page(
    do: str, producers: Any = PRODUCERS, rights: Sequence[str] | None = None, **settings: Any
) -> AsyncIterator[tuple[Server, Hands]]:
    """The page, on which a browser does this; the server asks for `TOKEN` unless an authorizer is given."""
    hands = Hands(do)
    known = {"it": Token.of(TOKEN) if rights is None else Token.of(TOKEN, rights)}
    options = {"authorizer": TokenAuthorizer(known, Links(SECRET)), **settings}
    async with serving(producers, run=hands.serve, **options) as server:
        server.client.headers.update(bearer(TOKEN))
        async with chromium(f"{server.url}/") as log:
            try:
                yield server, hands
            except BaseException as error:
                error.add_note(f"Chromium said: {log.read_text()}")
                raise


ENTER: Final = f"""
await question();
enter({json.dumps(TOKEN)});
await until("producers", () => it("producer").length);
"""


async def test_the_page_asks_for_a_token_and_with_it_starts_and_follows_a_run() -> None:
    do = f"""
    await question();
    await tell([it("unknown").textContent, document.forms[1].querySelector("button").disabled, it("token").type]);
    {ENTER}
    await tell([it("who").hidden, it("token").value, [...it("producer").options].map((each) => each.value)]);
    start("count", "2");
    await ended();
    await until("the list", () => it("runs").innerText.includes("completed"));
    await tell([rows(), it("state").textContent, it("cancel").disabled, it("resume").disabled, seen]);
    """
    async with page(do) as (_server, hands):
        assert await hands.told() == ["", True, "password"]
        assert await hands.told() == [True, "", sorted(PRODUCERS)]
        events = [["1", "", "1"], ["2", "", "2"], ["3", "", "[DONE]"]]
        assert await hands.told() == [events, "ended with id 3", True, True, []]
        streams = [(address, header) for _, address, header in hands.asked if "/stream" in address]
        assert len(streams) == 1
        assert "link=" in streams[0][0]
        assert streams[0][1] is None
        assert not any(TOKEN in address for _, address, _ in hands.asked)
        assert ("GET", "/v1/producers?", f"Bearer {TOKEN}") in hands.asked


async def test_a_token_that_is_not_known_is_refused_in_words_that_stay_and_forgotten() -> None:
    do = f"""
    await question();
    enter("nobody-knows-this-token");
    await until("an answer", () => !it("token").value && !pending && !it("who").hidden);
    await tell([it("unknown").textContent, sessionStorage.length]);
    {ENTER}
    await tell([it("unknown").textContent.length, it("who").hidden, seen]);
    """
    async with page(do) as (_server, hands):
        assert await hands.told() == ["The server does not know this token.", 0]
        assert (await hands.told())[1:] == [True, []]


async def test_an_answer_to_a_request_without_a_token_that_comes_late_does_not_forget_the_token() -> None:
    do = f"""
    let come; late = new Promise((resolve) => {{ come = resolve; }});
    await until("the question", () => !it("who").hidden);
    enter({json.dumps(TOKEN)});
    await until("producers", () => it("producer").length);
    late = null; come();
    await until("all answers", () => !pending);
    start("count", "1");
    await until("an outcome", () => it("state").textContent.startsWith("ended") || it("wrong").textContent);
    await tell([it("wrong").textContent, it("who").hidden, rows().length, sessionStorage.length]);
    """
    async with page(do) as (_server, hands):
        assert await hands.told() == ["", True, 2, 1]


async def test_a_tab_keeps_its_token_when_it_is_loaded_again() -> None:
    do = f"""
    if (!sessionStorage.length) {{
      {ENTER}
      location.reload();
    }} else {{
      await until("producers", () => it("producer").length);
      await tell([it("who").hidden, seen]);
    }}
    """
    async with page(do) as (_server, hands):
        assert await hands.told() == [True, []]


async def test_a_stream_that_was_cut_is_resumed_on_the_page_without_a_word_lost_or_twice() -> None:
    tap = Tap()
    do = f"""
    {ENTER}
    start("tap", "");
    await until("two events", () => rows().length === 2);
    it("cut").click();
    await tell([it("state").textContent, it("resume").disabled, it("cut").disabled]);
    await until("the run to go on", () => it("runs").innerText.includes("4 entries"));
    it("resume").click();
    await ended();
    await tell([rows(), seen]);
    """
    async with page(do, {"tap": tap}) as (_server, hands):
        tap.feed("one", "two")
        assert await hands.told() == ["cut after 2", False, True]
        tap.feed("three", "four")
        rows, seen = await _after(hands, tap)
        assert [row[2] for row in rows] == [
            *("one", "two", "cut after id 2; the run goes on", "back with id 2", "three", "four", "[DONE]")
        ]
        assert seen == []
        links = [address for method, address, _ in hands.asked if method == "POST" and address.endswith("/link?")]
        assert len(links) == 2  # each connection has a link of its own
        assert [address for _, address, _ in hands.asked if "starting_after=2" in address]


async def _after(hands: Hands, tap: Tap) -> Any:
    """What is told when the run has ended, once its stream was asked for again."""
    while not any("starting_after=2" in address for _, address, _ in hands.asked):  # noqa: ASYNC110
        await trio.sleep(0.002)
    tap.end()
    return await hands.told()


async def test_a_run_is_cancelled_from_the_page() -> None:
    do = f"""
    {ENTER}
    start("silent", '{{"json": [1]}}');
    await until("the stream", () => it("state").textContent === "live");
    it("cancel").click();
    await ended();
    await until("the list", () => it("runs").innerText.includes("pressed on the page"));
    await tell([rows().map((row) => row[1]), seen]);
    """
    async with page(do) as (server, hands):
        assert await hands.told() == [["cancelled", ""], []]
        (run,) = await server.service.supervisor.list()
        assert (run.status, run.cancel_reason) == ("cancelled", "pressed on the page")


async def test_a_token_that_may_not_start_or_share_is_told_so_on_the_page() -> None:
    do = f"""
    await question();
    enter({json.dumps(TOKEN)});
    await until("the list", () => it("runs").innerText.includes("there-already"));
    await tell([it("who").hidden, it("producer").length, document.forms[1].querySelector("button").disabled]);
    it("runs").querySelector("button").click();
    await until("the refusal", () => it("wrong").textContent);
    await until("its end", () => !it("state").textContent.startsWith("connecting"));
    await tell([it("wrong").textContent, it("state").textContent, seen]);
    """
    async with page(do, rights=["list", "read"]) as (server, hands):
        await server.service.supervisor.start(lambda: PRODUCERS["count"](1), run_id="there-already", name="count")
        assert await hands.told() == [True, 0, True]
        words = "these credentials do not allow to share run 'there-already'"
        assert await hands.told() == [words, "no way to read it", []]


async def test_without_an_authorizer_the_page_asks_for_nothing() -> None:
    do = """
    await until("producers", () => it("producer").length);
    start("count", "1");
    await ended();
    await tell([it("who").hidden, rows().length, seen]);
    """
    async with page(do, authorizer=None) as (_server, hands):
        assert await hands.told() == [True, 2, []]
        assert all("link" not in address and header is None for _, address, header in hands.asked)


async def hostile(_input: Any) -> AsyncIterator[Event]:
    """What a page that shows it as anything but text would run."""
    for data in ("<img src=x onerror=document.title='run'>", "<script>document.title = 'run'</script>", "</div>"):
        yield Event(data=data)


async def test_what_runs_say_is_text_on_the_page_and_only_its_own_script_runs() -> None:
    do = f"""
    {ENTER}
    start("<b>bold", "");
    await ended();
    await until("the list", () => it("runs").innerText.includes("completed"));
    const shown = [rows().map((row) => row[2]), document.querySelectorAll("#events img, #events script, b b").length];
    const script = document.createElement("script");
    script.textContent = "document.title = 'run'";
    document.body.append(script);
    await until("the policy", () => seen.length);
    const other = await real("http://127.0.0.1:1/").catch((error) => "refused");
    await until("the policy again", () => seen.length === 2);
    await tell([shown, it("runs").innerText.includes("<b>bold"), document.title, seen, other]);
    """
    async with page(do, {"<b>bold": hostile}) as (_server, hands):
        shown, named, title, seen, other = await hands.told()
        assert shown[0][:3] == [event.data async for event in hostile(None)]
        assert shown[1] == 0
        assert (named, title, other) == (True, "penstock", "refused")
        assert [each.partition("-src")[0] for each in seen] == ["script", "connect"]


OTHER_PAGE: Final = """<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><script>
const tell = (what) => fetch("/said", {method: "POST", body: JSON.stringify(what)});
const seen = [], source = new EventSource("ADDRESS");
source.onmessage = (event) => {
  seen.push(event.data);
  if (event.data !== "[DONE]") return;
  source.close();
  fetch("ELSEWHERE/v1/runs").then((answer) => tell([seen, answer.status]));
};
source.onerror = () => { source.close(); tell(["refused", seen]); };
</script>"""


@pytest.mark.parametrize("is_allowed", [True, False])
async def test_a_page_of_another_origin_reads_a_stream_by_a_link_if_its_origin_is_allowed(*, is_allowed: bool) -> None:
    hands = Hands("")
    pages: dict[str, str] = {}

    def other_page(app: ASGIApp) -> ASGIApp:
        async def served(scope: Scope, receive: Receive, send: Send) -> None:
            if scope.get("path") == "/page":
                await HTMLResponse(pages["page"])(scope, receive, send)
            else:
                await hands.around(app)(scope, receive, send)

        return served

    async def serve_page(app: Starlette, config: Config, **options: Any) -> None:
        app.add_middleware(other_page)
        await serve(app, config, signals=(), **options)

    authorizer = TokenAuthorizer({"it": Token.of(TOKEN)}, Links(SECRET))
    async with serving(run=serve_page) as own:
        origins = [own.url] if is_allowed else ["https://other.example"]
        async with serving(authorizer=authorizer, allowed_origins=origins) as server:
            await server.service.supervisor.start(lambda: PRODUCERS["count"](2), run_id="r")
            address = f"{server.url}/v1/runs/r/stream?link={link()['link']}"
            pages["page"] = OTHER_PAGE.replace("ADDRESS", address).replace("ELSEWHERE", server.url)
            async with chromium(f"{own.url}/page"):
                assert await hands.told() == ([["1", "2", "[DONE]"], 401] if is_allowed else ["refused", []])
