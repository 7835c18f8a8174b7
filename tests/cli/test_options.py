"""The options of authorization: which go together, what they mean, and which values are never shown."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from contextlib import asynccontextmanager, suppress
from typing import TYPE_CHECKING, Any, Final

import h2.config
import h2.connection
import httpx2
import pytest
import trio

from penstock.asgi.auth import Links
from penstock.cli.options import AuthOptions, auth_options
from tests.support import command_line
from tests.support.command_line import ANY_PORT, environment, penstock
from tests.support.guarded import SECRET, bearer, link
from tests.support.http2_clients import UNCHECKED, Windows
from tests.support.serving import GUARD
from tests.support.wire import DONE, Wire, blocks_of, ids
from tests.support.workers import has_stopped, serving_workers

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

    from tests.cli.conftest import Served
    from tests.support.command_line import Program
    from tests.support.redis_servers import Endpoint

TOKEN: Final = "kept.in-the_environment"  # noqa: S105
OTHER: Final = "kept-in-a-file-of-tokens"
PRODUCERS: Final = "tests.support.worker_producers:producers"
SERVE: Final = ("serve", "--producers", PRODUCERS, *ANY_PORT)
EVERYWHERE: Final = ("serve", "--producers", PRODUCERS, "--bind", "0.0.0.0:0")


def ran(*args: object, **env: str | None) -> tuple[int, str]:
    """The exit code, and the output, on one line, which never holds a secret."""
    unset = dict.fromkeys(("PENSTOCK_TOKEN", "PENSTOCK_TOKENS", "PENSTOCK_LINK_SECRET"))
    result = command_line.ran(*args, **{**unset, **env})
    assert not any(secret in result.output for secret in (TOKEN, OTHER, SECRET)), result.output
    assert "Traceback" not in result.output
    return result.exit_code, " ".join(result.output.split())


def refused(*args: object, **env: str | None) -> str:
    code, output = ran(*args, **env)
    assert code == 2, output
    return output


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "tokens.toml"
    path.write_text(f'[dashboard]\ntoken = "{OTHER}"\nrights = ["read", "list"]\n')
    return str(path)


# What does not go together


@pytest.mark.parametrize(
    "options, words",
    [
        (("--token", TOKEN, "--insecure"), "--insecure asks for no token, and there are tokens"),
        (("--token", "hunter2"), "Invalid value for --token: a token has 16 to 1024 letters"),
        (("--token", ""), "Invalid value for --token: a token has 16 to 1024 letters"),
        (("--token", f"{TOKEN} {TOKEN}"), "Invalid value for --token: a token has 16 to 1024 letters"),
        (("--token", f"{TOKEN}\n"), "Invalid value for --token: a token has 16 to 1024 letters"),
        (("--token",), "Option '--token' requires an argument"),
        (("--tokens", "/no/such/file"), "Invalid value for --tokens: /no/such/file cannot be read: No such file"),
        (("--tokens", "/"), "Invalid value for --tokens: / cannot be read: Is a directory"),
        (("--tokens", "/dev/null"), "Invalid value for --tokens: there is no token in /dev/null"),
        (("--token", TOKEN, "--tokens", "/dev/null"), "Invalid value for --tokens: there is no token in"),
        (("--link-secret", SECRET), "a secret for links is of no use without tokens: give --token or --tokens"),
        (("--link-secret", SECRET, "--insecure"), "a secret for links is of no use without tokens"),
        (("--token", TOKEN, "--link-secret", "x" * 31), "Invalid value for --link-secret: a secret for links has at"),
        (("--token", TOKEN, "--link-secret", ""), "Invalid value for --link-secret: a secret for links has at least"),
        (("--allow-origin", "*"), "any page could drive this server: it needs"),
        (("--allow-origin", "https://a.example", "--allow-origin", "*"), "any page could drive this server"),
        (("--allow-origin", "*", "--insecure"), "any page could drive this server"),
    ],
)
def test_what_does_not_go_together_is_refused_with_what_to_do(options: tuple[str, ...], words: str) -> None:
    assert words in refused(*SERVE, *options)


def test_exec_refuses_what_serve_refuses() -> None:
    assert "Invalid value for --token: a token has 16" in refused("exec", "--token", "hunter2", "--", "true")
    assert "give one or the other" in refused("exec", "--insecure", "--", "true", PENSTOCK_TOKEN=TOKEN)


def test_tokens_of_every_origin_are_refused_as_options_are(file: str, tmp_path: Path) -> None:
    assert "give one or the other" in refused(*SERVE, "--insecure", PENSTOCK_TOKEN=TOKEN)
    assert "give one or the other" in refused(*SERVE, "--insecure", "--tokens", file)
    assert "Invalid value for --token:" in refused(*SERVE, PENSTOCK_TOKEN="hunter2")  # noqa: S106
    assert "two of the tokens are the same" in refused(*SERVE, "--tokens", file, "--token", OTHER)
    assert "at least 32 bytes" in refused(*SERVE, PENSTOCK_TOKEN=TOKEN, PENSTOCK_LINK_SECRET="x" * 31)
    assert "a secret for links is of no use without tokens" in refused(*SERVE, PENSTOCK_LINK_SECRET=SECRET)
    path = tmp_path / "named.toml"
    path.write_text(f'[PENSTOCK_TOKEN]\ntoken = "{OTHER}"\nrights = ["read"]\n')
    assert "[PENSTOCK_TOKEN] is the name of --token" in refused(*SERVE, "--tokens", path, "--token", TOKEN)


@pytest.mark.parametrize(
    "bind,options",
    [
        ("0.0.0.0:0", ()),
        ("[::]:0", ("--allow-host", "example.org")),
        ("192.0.2.1:0", ("--allow-origin", "https://a.b")),
    ],
)
def test_an_address_that_others_reach_is_refused_without_tokens(bind: str, options: tuple[str, ...]) -> None:
    output = refused("serve", "--producers", PRODUCERS, *ANY_PORT, "--bind", bind, *options)
    assert f"Invalid value for --bind: {bind} can be reached from other machines" in output
    assert "give --token or --tokens" in output
    assert "or add --insecure if the network itself is safe" in output


@pytest.mark.parametrize("name", ["PENSTOCK_TOKEN", "PENSTOCK_TOKENS", "PENSTOCK_LINK_SECRET"])
def test_a_variable_that_is_empty_is_refused_and_opens_nothing(name: str) -> None:
    env = {"PENSTOCK_TOKEN": TOKEN, name: ""}
    assert f"{name} is empty" in refused(*SERVE, **env)
    assert f"{name} is empty" in refused(*SERVE, "--insecure", **{name: ""})


# What they mean


@pytest.mark.parametrize(
    "options,env",
    [(("--token", TOKEN), {}), ((), {"PENSTOCK_TOKEN": TOKEN}), (("--tokens", "FILE"), {}), (("--insecure",), {})],
)
def test_with_tokens_or_insecure_a_server_may_be_anywhere(
    served: list[Served], file: str, options: tuple[str, ...], env: dict[str, str | None]
) -> None:
    code, output = ran(*EVERYWHERE, *(file if each == "FILE" else each for each in options), **env)
    assert code == 0, output
    assert (served[0].lifespan.access.authorizer is None) == ("--insecure" in options)


def links_of(served: Served) -> Links:
    authorizer: Any = served.lifespan.access.authorizer
    assert authorizer.links is not None
    links: Links = authorizer.links
    return links


def test_a_secret_signs_links_and_without_one_each_server_has_its_own(served: list[Served]) -> None:
    for options in (("--link-secret", SECRET), (), ()):
        assert ran(*SERVE, "--token", TOKEN, *options)[0] == 0
    made = [links_of(each).make("r", 60)[0] for each in served]
    assert Links(SECRET).run_of(made[0]) == "r"
    assert len({token.rpartition(".")[2] for token in made}) == 3


def test_no_secret_is_in_what_is_printed_of_the_options() -> None:
    options: dict[str, Any] = {"tokens": None, "allow_origin": ("*",), "allow_host": (), "insecure": False}
    auth = auth_options(token=TOKEN, link_secret=SECRET, **options)
    for shown in (repr(auth), str(auth), repr([auth]), f"{auth!r:.9999}"):
        assert TOKEN not in shown
        assert SECRET not in shown
    assert SECRET not in repr(AuthOptions(for_workers={"a": SECRET}))


def test_help_shows_the_variables_and_not_what_is_in_them() -> None:
    for command in ("serve", "exec"):
        code, said = ran(command, "--help", PENSTOCK_TOKEN=TOKEN, PENSTOCK_LINK_SECRET=SECRET)
        assert code == 0
        assert all(name in said for name in ("PENSTOCK_TOKEN", "PENSTOCK_TOKENS", "PENSTOCK_LINK_SECRET"))


def test_a_worker_accepts_the_tokens_that_its_parent_has_read_whatever_the_file_says_by_then(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "tokens.toml"
    path.write_text(f'[a]\ntoken = "{TOKEN}"\nrights = ["read"]\n')
    options: dict[str, Any] = {"tokens": str(path), "allow_origin": (), "allow_host": (), "insecure": False}
    parent = auth_options(token=None, link_secret=None, **options)
    path.unlink()
    for name, value in parent.for_workers.items():
        monkeypatch.setenv(name, value)
    secret = parent.for_workers["PENSTOCK_LINK_SECRET"]
    worker = auth_options(token=None, link_secret=secret, worker=True, **options)
    assert worker.for_workers == parent.for_workers
    assert TOKEN not in str(parent.for_workers)


async def url_of(program: Program) -> str:
    return (await program.until(r"(?:serving on|open) (http://[^ /]+)"))[1]


def as_a_shell_takes(line: str, **env: str) -> list[str]:
    """The words that a shell makes of a line whose command is `curl`."""
    script = f"curl() {{ printf '%s\\0' \"$@\"; }}; {line}"
    done = subprocess.run(["/bin/sh", "-c", script], check=True, capture_output=True, env=environment(**env))
    return done.stdout.decode().split("\0")[:-1]


async def curl(line: str, **env: str) -> httpx2.Response:
    words = as_a_shell_takes(line, **env)
    headers = dict(words[at + 1].split(": ", 1) for at, word in enumerate(words) if word == "-H")
    body = next((words[at + 1] for at, word in enumerate(words) if word == "-d"), None)
    async with httpx2.AsyncClient(timeout=GUARD) as client:
        return await client.request("GET" if body is None else "POST", words[-1], content=body, headers=headers)


AGENT: Final = """from penstock import Event

async def agent(words):
    yield Event(data=f"you said {words}")

producers = {"agent": agent}
"""


def agent(folder: Path) -> str:
    (folder / "it.py").write_text(AGENT)
    return f"{folder / 'it.py'}:producers"


@pytest.mark.parametrize(
    "options, env",
    [(("--allow-host", "example.org"), {"PENSTOCK_TOKEN": TOKEN}), (("--bind", "[::1]:0"), {})],
    ids=["a name and a token", "no token, IPv6"],
)
async def test_the_line_of_serve_works(tmp_path: Path, options: tuple[str, ...], env: dict[str, Any]) -> None:
    bind = () if "--bind" in options else ("--bind", "127.0.0.1:0")
    async with penstock("serve", "--producers", agent(tmp_path), *bind, *options, **env) as program:
        line = (await program.until(r"try:\s+(curl .*)$"))[1]
        await program.until("Ctrl-C stops")
        assert ("PENSTOCK_TOKEN" in line) == bool(TOKEN in options or env)
        answer = await curl(line, PENSTOCK_TOKEN=TOKEN)
        assert answer.status_code == 201, answer.text
        assert [block.data for block in blocks_of(answer.text)] == ["you said hello", DONE]
        assert TOKEN not in program.words


async def test_the_line_that_exec_announces_works_as_it_is_and_what_it_runs_finds_no_secret() -> None:
    program = "import os; print(sorted(name for name in os.environ if name.startswith('PENSTOCK_')))"
    env: dict[str, Any] = {
        "PENSTOCK_TOKEN": TOKEN,
        "PENSTOCK_LINK_SECRET": SECRET,
        "PENSTOCK_LOG": "redis://:secret@localhost",
    }
    async with penstock("exec", *ANY_PORT, "--", sys.executable, "-c", program, **env) as running:
        announced = (await running.until(r"try:\s+(curl .*)$"))[1]
        await running.until("the command ended")
        answer = await curl(announced, PENSTOCK_TOKEN=TOKEN)
        assert answer.status_code == 200, answer.text
        assert "data: []" in answer.text
        assert TOKEN not in running.words


async def statuses(url: str, *hosts: str | None) -> list[int]:
    port = httpx2.URL(url).port
    assert port
    found = []
    for host in hosts:
        async with Wire(await trio.open_tcp_stream("127.0.0.1", port)) as wire:
            version, name = ("1.0", "") if host is None else ("1.1", f"host: {host}\r\n")
            await wire.stream.send_all(f"GET /v1/runs HTTP/{version}\r\n{name}connection: close\r\n\r\n".encode())
            found.append(int((await wire.rest()).split()[1]))
    return found


async def status_over_http2(url: str, authority: str) -> str:
    port = httpx2.URL(url).port
    assert port
    async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
        client = Windows(stream, **UNCHECKED)
        head = [(":method", "GET"), (":path", "/v1/runs"), (":scheme", "http"), (":authority", authority)]
        client.h2.send_headers(1, head, end_stream=True)
        client.bodies[1] = b""
        await client.send()
        await client.until_headers(1)
        return client.headers[1][":status"]


OWN: Final = ["localhost", "LocalHost", "localhost:8000", "127.0.0.1", "[::1]:8000"]
NOT_OWN: Final = [
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.example",
    "localhost@evil.example",
    "[evil.x]",
]


async def test_without_tokens_a_server_on_loopback_answers_to_its_own_names_alone() -> None:
    async with penstock(*SERVE) as program:
        url = await url_of(program)
        assert await statuses(url, *OWN) == [200] * len(OWN)
        assert set(await statuses(url, *NOT_OWN, None)) <= {400, 421}
        assert set(await statuses(url, "evil.example", "", None)) == {421}
        assert await status_over_http2(url, "localhost:80") == "200"
        assert await status_over_http2(url, "evil.example:80") == "421"


@pytest.mark.parametrize(
    "token,insecure,allow_host,hosts",
    [
        (None, False, (), ("localhost",)),
        (None, False, ("a.example",), ("localhost", "a.example")),
        (None, True, (), None),
        (None, True, ("a.example",), ("localhost", "a.example")),
        (TOKEN, False, (), None),
        (TOKEN, False, ("a.example",), ("localhost", "a.example")),
    ],
)
def test_with_tokens_or_insecure_a_server_answers_to_any_name_unless_some_are_given(
    token: str | None, insecure: bool, allow_host: tuple[str, ...], hosts: tuple[str, ...] | None
) -> None:
    rest: dict[str, Any] = {"tokens": None, "link_secret": None, "allow_origin": ()}
    auth = auth_options(token=token, insecure=insecure, allow_host=allow_host, **rest)
    assert auth.allowed_hosts == hosts
    assert auth.for_app["allowed_hosts"] == hosts


@asynccontextmanager
async def connection(url: str) -> AsyncIterator[Wire]:
    port = httpx2.URL(url).port
    assert port
    async with Wire(await trio.open_tcp_stream("127.0.0.1", port)) as wire:
        yield wire


def malformed(query: str) -> list[bytes]:
    """Requests that no server can make sense of, with secrets wherever there is room."""
    secret, auth = f"{TOKEN}?{query}".encode(), f"authorization: Bearer {TOKEN}\r\n".encode()
    host = b"host: localhost\r\n"
    return [
        b"GET /v1/runs/\xff\xfe" + secret + b" HTTP/1.1\r\n" + host + auth + b"\r\n",
        b"GET /v1/runs/%ff%00" + secret + b" HTTP/1.1\r\n" + host + auth + b"\r\n",
        secret + b"\r\n\r\n",
        b"GET " + secret + b"\r\n" + auth + b"\r\n",
        b"GET /" + secret + b" HTTP/9.9\r\n" + host + auth + b"\r\n",
        b"GET /" + secret + b" HTTP/1.1\r\n" + auth.replace(b": ", b"\0: ") + b"\r\n",
        b"GET /" + secret + b" HTTP/1.1\r\n" + host + auth.replace(b"Bearer", b"Bea\0rer") + b"\r\n",
        b"GET /" + secret + b" HTTP/1.1\r\n" + auth + auth + b"no header " + secret + b"\r\n\r\n",
        b"G\xffT /" + secret + b" HTTP/1.1\r\n" + host + auth + b"\r\n",
        b"GET /" + secret + b" HTTP/1.1\r\n" + host + auth + b"x: " + b"y" * 40_000 + secret + b"\r\n\r\n",
        b"GET /" + secret * 1000 + b" HTTP/1.1\r\n" + host + auth + b"\r\n",
        b"POST /v1/runs?" + secret + b" HTTP/1.1\r\n" + host + auth + b"content-length: " + secret + b"\r\n\r\n",
        b"POST /v1/runs?" + secret + b" HTTP/1.1\r\n" + host + auth + b"transfer-encoding: chunked\r\n\r\n" + secret,
        b"POST /v1/runs?" + secret + b" HTTP/1.1\r\n" + host + auth + b"origin: http://[" + secret + b"\r\n\r\n",
        b"GET /v1/runs?" + secret + b" HTTP/1.1\r\nhost: [" + secret + b"\r\n" + auth + b"\r\n",
        b"GET /v1/runs?"
        + secret
        + b" HTTP/1.1\r\n"
        + host
        + auth
        + b"connection: upgrade\r\nupgrade: websocket\r\n\r\n",
        b"OPTIONS * HTTP/1.1\r\n" + host + auth + b"\r\n",
        b"CONNECT " + secret + b" HTTP/1.1\r\n" + host + auth + b"\r\n",
        b"\x16\x03\x01" + secret,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + secret,
    ]


def malformed_over_http2(query: str) -> list[list[tuple[str, str]]]:
    secret = f"{TOKEN}?{query}"
    good = [(":method", "GET"), (":path", f"/{secret}"), (":scheme", "http"), (":authority", "localhost")]
    auth = ("authorization", f"Bearer {TOKEN}")
    return [
        [*good, auth],
        [*good, ("authorization", f"Bearer {TOKEN}\r\nx: y")],
        [*good, ("authorization", f" Bearer {TOKEN} ")],
        [*good, ("Authorization", f"Bearer {TOKEN}")],
        [*good, (f"x {secret}", secret)],
        [*good, ("connection", secret), auth],
        [*good, (":path", f"/again/{secret}"), auth],
        [*good[:1], (":path", f"/\xff{secret}"), *good[2:], auth],
        [(":method", f"G\xffT{TOKEN}"), *good[1:], auth],
        [(":method", "CONNECT"), (":authority", secret), auth],
        [(":method", "GET"), (":scheme", "http"), (":authority", secret), auth],
        [*good, auth, (":late", secret)],
        [*good, auth, ("content-length", secret)],
        [*good, auth, ("x", secret * 100)],
    ]


async def over_http2(url: str, head: list[tuple[str, str]]) -> None:
    """Send it, and read until the server has answered, or has had enough."""
    config = h2.config.H2Configuration(
        client_side=True,
        header_encoding="utf-8",
        validate_outbound_headers=False,
        normalize_outbound_headers=False,
        validate_inbound_headers=False,
    )
    async with connection(url) as wire:
        client = h2.connection.H2Connection(config)
        client.initiate_connection()
        client.send_headers(1, head, end_stream=True)
        client.ping(b"are you?")  # whoever is left to answer has seen the request
        with suppress(AssertionError, trio.BrokenResourceError):
            await wire.stream.send_all(client.data_to_send())
            await wire.until(b"are you?")


async def test_no_secret_is_in_anything_that_a_server_prints_whatever_it_is_sent(file: str) -> None:
    options = ("--log-level", "debug", "--tokens", file, "--drain-timeout", 0)
    async with penstock(*SERVE, *options, PENSTOCK_TOKEN=TOKEN, PENSTOCK_LINK_SECRET=SECRET) as program:
        url = await url_of(program)
        made = link(sub="it")
        async with httpx2.AsyncClient(base_url=url, timeout=GUARD) as client:

            async def ask(method: str, path: str, *, token: str = "", **rest: Any) -> int:
                answer = await client.request(method, path, headers=bearer(token) if token else {}, **rest)
                return answer.status_code

            assert await ask("POST", "/v1/runs", json={"producer": "silent", "run_id": "it"}, token=TOKEN) == 201
            own = (await client.post("/v1/runs/it/link", headers=bearer(TOKEN))).json()["url"]
            query = own.partition("?")[2]
            assert await ask("GET", "/v1/runs", token=OTHER) == 200
            assert await ask("POST", "/v1/runs/it/link", token=OTHER) == 403
            assert await ask("GET", "/v1/runs/it", params=made) == 200
            assert await ask("POST", "/v1/runs/it/cancel", params=made) == 403
            assert await ask("GET", f"/v1/runs/it?link={TOKEN}") == 401
            assert await ask("GET", f"/v1/runs/{TOKEN}?{query}") == 403
            assert await ask("POST", f"/v1/runs?{query}", token=TOKEN, content=f"{TOKEN} {query}".encode()) == 400
            for wrong in (TOKEN + "x", TOKEN.upper(), f"{OTHER} {TOKEN}"):
                assert await ask("GET", f"/v1/runs?token={TOKEN}", token=wrong) == 401
            for sent in malformed(query):
                async with connection(url) as wire:
                    with suppress(trio.BrokenResourceError):  # it was enough before the end
                        await wire.stream.send_all(sent)
                        await wire.stream.send_eof()
                        await wire.stream.receive_some()  # an answer, or the end
            for head in malformed_over_http2(query):
                await over_http2(url, head)
            assert await ask("POST", "/v1/runs/it/cancel", token=TOKEN) == 202
            assert ids(blocks_of((await client.get(own)).text)) == [1, 2, 3]
        program.process.terminate()
        assert await program.end() == 0
        said = program.words
        assert "401 NOT_AUTHENTICATED" in said  # it did say what it had to
        assert "403 NOT_ALLOWED" in said
        assert "a connection ended with an error of its protocol" in said
        signature = query.rpartition(".")[2]
        for secret in (TOKEN, OTHER, SECRET, query, signature, made["link"], made["link"].rpartition(".")[2]):
            assert secret not in said
            assert secret[:-2] not in said
        assert not re.search("eyJ[A-Za-z0-9_-]{10}", said)


async def test_a_link_that_one_worker_has_made_opens_the_stream_at_every_other(server: Endpoint) -> None:
    async with serving_workers(2, server.url, "--drain-timeout", 0, env={"PENSTOCK_TOKEN": TOKEN}) as workers:
        first, second = workers.pids().values()
        async with workers.only(first):
            body = {"producer": "silent", "run_id": "it"}
            answer = await workers.client.post("/v1/runs", json=body, headers=bearer(TOKEN))
            assert answer.status_code == 201, answer.text
            url = (await workers.client.post("/v1/runs/it/link", headers=bearer(TOKEN))).json()["url"]
        for pid in (first, second):
            async with workers.only(pid), workers.opened("GET", url) as reader:
                assert reader.status == 200
                assert (await reader.take(1))[0].data == str(first)
            assert await workers.ask_at(pid, "POST", f"/v1/runs/it/cancel?{url.partition('?')[2]}") == 403
            assert await workers.ask_at(pid, "GET", "/v1/runs/it") == 401
        workers.signal_group(signal.SIGTERM)
        await has_stopped(workers)
        assert TOKEN not in workers.said
        assert url.partition("=")[2] not in workers.said
