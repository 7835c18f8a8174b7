"""`penstock runs list | show | cancel`: what they print and refuse, and what they make of any response."""

from __future__ import annotations

import json
import ssl
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import httpx2
import pytest
import trio
import trustme

from penstock.cli.api import ApiResponse, connection_failed, describe, refusal_in
from penstock.cli.terminal import visible
from tests.support.command_line import environment, ran, refused
from tests.support.runs_answers import Held, Reset, answer, answering, problem, record, record_of
from tests.support.serving import quiet_config, serving

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

    from tests.support.runs_answers import Said, Scripted
    from tests.support.serving import Server

TOKEN = "s3cret-t0ken/of+mine="  # noqa: S105  (it opens nothing)
COMMANDS = [("list",), ("show", "r1"), ("cancel", "r1"), ("follow", "r1")]


def runs(server: Scripted, *args: object, **env: str) -> Result:
    return ran("runs", "--url", server.url, *args, **env)


async def runs_of(server: Server, *args: object) -> Result:
    return await trio.to_thread.run_sync(ran, "runs", "--url", server.url, *args)


def failed_with_one_line(result: Result) -> str:
    assert result.exit_code == 1, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    return str(line.removeprefix("penstock: "))


# Against a server


async def test_runs_are_listed_shown_and_cancelled() -> None:
    async with serving() as server:
        done = await server.start("count", 3, run_id="done", metadata={"who": "tests", "deep": {"a": [1]}})
        await server.ended_run(done)
        await server.start("silent", run_id="silent")

        listed = await runs_of(server, "list")
        assert (listed.exit_code, listed.stderr) == (0, "")
        head, *rows = listed.stdout.splitlines()
        assert head.split() == ["id", "producer", "status", "entries", "started", "took"]
        assert [row.split()[:2] for row in rows] == [["silent", "silent"], ["done", "count"]]
        assert "completed (end_turn)        4  20" in rows[1]
        assert rows[0].endswith("–")
        assert "\x1b" not in listed.stdout

        running = await runs_of(server, "list", "--status", "running", "--json", "--limit", "5")
        (line,) = running.stdout.splitlines()
        assert json.loads(line) == await server.run("silent")
        assert (
            await runs_of(server, "list", "--status", "lost")
        ).stderr == "penstock: there are no runs that are lost\n"

        shown = await runs_of(server, "show", done)
        assert [line.split("  ")[0] for line in shown.stdout.splitlines() if line[0] != " "] == [
            *("id", "producer", "status", "stop reason", "cancel reason", "error", "entries"),
            *("created at", "started at", "ended at", "took", "metadata"),
        ]
        assert "who: tests\n" in shown.stdout
        assert 'deep: {"a": [1]}' in shown.stdout
        as_json = await runs_of(server, "show", done, "--json")
        assert json.loads(as_json.stdout) == await server.run(done)

        cancelled = await runs_of(server, "cancel", "silent", "--reason", "enough")
        assert (cancelled.exit_code, cancelled.stdout) == (0, "run silent is asked to stop\n")
        ended = await server.ended_run("silent")
        assert (ended["status"], ended["cancel_reason"]) == ("cancelled", "enough")
        again = await runs_of(server, "cancel", "silent")
        assert (again.exit_code, again.stdout) == (1, "run silent had ended already: cancelled (cancelled)\n")
        as_json = await runs_of(server, "cancel", "silent", "--json")
        assert (as_json.exit_code, json.loads(as_json.stdout)) == (1, ended)


async def test_the_dialect_letta_is_understood_too() -> None:
    async with serving(dialect="letta") as server:
        await server.ended_run(await server.start("count", 1, run_id="done"))
        assert (await runs_of(server, "cancel", "done")).exit_code == 1
        missing = await runs_of(server, "show", "missing")
        assert "the server answered 404 RUN_NOT_FOUND: there is no run 'missing'" in missing.stderr


async def test_a_server_with_a_certificate_of_its_own_authority_is_trusted_with_cafile(tmp_path: Path) -> None:
    authority, path, other = trustme.CA(), tmp_path / "authority.pem", tmp_path / "other.pem"
    authority.cert_pem.write_to_path(str(path))
    trustme.CA().cert_pem.write_to_path(str(other))
    config = quiet_config()
    with authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.tempfile() as pem:
        config.certfile = config.keyfile = pem
        async with serving(config=config) as server:
            trusting = await runs_of(server, "list", "--cafile", path)
            assert (trusting.exit_code, trusting.stderr) == (0, "penstock: there are no runs\n")
            for options in ((), ("--cafile", other)):
                message = failed_with_one_line(await runs_of(server, "list", *options))
                assert "is not trusted (" in message
                assert "with --cafile" in message
            plain = await runs_of(server, "list", "--url", server.url.replace("https", "http"))
            assert failed_with_one_line(plain) == "the server hung up without an answer"
    async with serving() as server:
        clear = await runs_of(server, "list", "--url", server.url.replace("http", "https"))
        assert "there is no TLS with this server (" in failed_with_one_line(clear)


# Where the server is


@pytest.mark.parametrize("url", ["", "/", "/prefix", "/prefix/"])
def test_a_url_may_have_a_path_and_a_slash_at_its_end(url: str) -> None:
    with answering(record()) as server:
        assert ran("runs", "show", "r1", "--json", "--url", server.url + url).exit_code == 0
    assert server.paths == [url.rstrip("/") + "/v1/runs/r1"]


def test_where_the_server_is_comes_from_the_command_then_the_group_then_the_environment() -> None:
    nowhere = "http://127.0.0.1:1"
    with answering(record()) as server:
        right, wrong = ("--url", server.url), ("--url", nowhere)
        assert ran("runs", *wrong, "show", *right, "r1", PENSTOCK_URL=nowhere).exit_code == 0
        assert ran("runs", *right, "show", "r1", PENSTOCK_URL=nowhere).exit_code == 0
        assert ran("runs", "show", "r1", PENSTOCK_URL=server.url).exit_code == 0
        assert ran("runs", "show", "r1", PENSTOCK_URL=server.url, PENSTOCK_JSON="true").stdout.startswith("{")


@pytest.mark.parametrize(
    "url",
    [
        *("", "127.0.0.1:8000", "ftp://host", "http://", "http://:80", "http://host:port", "http://host:0"),
        *("http://host:99999", "http://[::1", "http://ho st", "http://host/?a=b", "http://host/#a", "http://host\x1b"),
    ],
)
def test_what_is_no_url_of_a_server_is_refused(url: str) -> None:
    output = refused("runs", "list", "--url", url)
    assert "Invalid value for --url: it is no URL of a server, such as http://127.0.0.1:8000" in output


def test_a_password_in_the_url_is_refused_and_not_repeated() -> None:
    output = refused("runs", "list", "--url", "http://me:hunter2@host/")
    assert "Invalid value for --url: a name or a password has no place in it; there is --token" in output
    assert "hunter2" not in output


@pytest.mark.parametrize("token", ["", "two words", "hunter2\n", "hunter2\x7f", "hunter2é"])
def test_what_cannot_be_a_token_is_refused_and_not_repeated(token: str) -> None:
    output = refused("runs", "list", "--token", token)
    assert "Invalid value for --token: a token is visible ASCII characters" in output
    assert "hunter2" not in output


def test_what_is_no_authority_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.pem").write_bytes(b"")
    (tmp_path / "key.pem").write_bytes(trustme.CA().private_key_pem.bytes())
    for name, words in {"no": "No such file", "empty": "no certificate of an", "key": "no certificate of an"}.items():
        output = refused("runs", "list", "--cafile", tmp_path / f"{name}.pem")
        assert "Invalid value for --cafile" in output
        assert words in output


@pytest.mark.parametrize(
    "args",
    [
        *(("show", "../readyz"), ("cancel", "."), ("follow", "a b"), ("show",), ("list", "--limit", "0")),
        *(("list", "--limit", "1001"), ("list", "--status", "gone"), ("follow", "r1", "--after", "-1")),
        *(("follow", "r1", "--tail", "-1"), ("follow", "r1", "--give-up-after", "-1"), ("start", "r1")),
    ],
)
def test_wrong_arguments_are_refused(args: tuple[str, ...]) -> None:
    assert "Error: " in refused("runs", *args)


def test_a_proxy_that_cannot_be_used_is_said_without_its_password() -> None:
    result = ran("runs", "list", HTTP_PROXY="nonsense://me:hunter2@proxy", NO_PROXY="", no_proxy="")
    assert failed_with_one_line(result) == "HTTP_PROXY, HTTPS_PROXY or ALL_PROXY names a proxy that cannot be used"


# The token


@pytest.mark.parametrize("command", COMMANDS)
def test_the_token_is_sent_and_never_shown(command: tuple[str, ...]) -> None:
    echo = problem(401, "NOT_AUTHENTICATED", f"\x1b[31m{TOKEN} is not known")
    for said in (echo, answer(307, location=f"https://elsewhere/{TOKEN}")):
        with answering(said) as server:
            by_option = runs(server, *command, "--token", TOKEN)
            by_group = ran("runs", "--token", TOKEN, *command, "--url", server.url)
            by_variable = runs(server, *command, PENSTOCK_TOKEN=TOKEN)
        assert [f"\r\nauthorization: Bearer {TOKEN}\r\n" in each for each in server.requests] == [True] * 3
        for result in (by_option, by_group, by_variable):
            words = failed_with_one_line(result)
            assert "[token]" in words
            assert TOKEN not in result.output
            assert "\x1b" not in result.output


def test_a_refusal_for_want_of_a_token_says_how_to_give_one() -> None:
    with answering(problem(401, "NOT_AUTHENTICATED", "who is asking?")) as server:
        words = failed_with_one_line(runs(server, "list"))
    assert words == (
        "the server answered 401 NOT_AUTHENTICATED: who is asking?; give a token in PENSTOCK_TOKEN, or with --token"
    )
    assert "authorization" not in server.requests[0]


@pytest.mark.parametrize("command", [(), *COMMANDS])
def test_no_help_shows_the_token(command: tuple[str, ...]) -> None:
    for env in ({}, {"PENSTOCK_TOKEN": TOKEN}):
        result = ran("runs", "--token", TOKEN, *command, "--help", **env)
        assert result.exit_code == 0
        assert TOKEN not in "".join(result.output.split())
        assert "PENSTOCK_TOKEN" in result.output


def test_the_help_imports_nothing_that_only_a_command_needs() -> None:
    program = (
        "import sys; from penstock.cli.main import main; main(sys.argv[1:], standalone_mode=False); "
        "print([name for name in ('httpx2', 'rich', 'httpcore2') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "runs", "follow", "--help"],
        capture_output=True,
        text=True,
        check=True,
        env=environment(),
    )
    assert done.stdout.splitlines()[-1] == "[]"


# Wrong answers


@pytest.mark.parametrize(
    "said,words",
    [
        (answer(200, b"<html>", content_type="text/html"), "answered 200 with text/html, and that is not penstock's"),
        (answer(200, b"{}", content_type="application/json"), "answered 200 with application/json, and"),
        (answer(200, b"[1]", content_type="application/json"), "answered 200 with application/json, and"),
        (answer(200, b"\xff" * 9), "answered 200 with nothing, and that is not penstock's way: is it the right --url?"),
        (answer(404, b"<html>", content_type="text/html; charset=x"), "answered 404 with text/html, and"),
        (answer(400, b'{"detail": {"code": 1}}'), "answered 400 with nothing"),
        (answer(403, b'{"detail": {"code": "NO", "message": "no\\n\\u009b2J"}}'), r"answered 403 NO: no\n\x9b2J"),
        (problem(400, "BAD", "bad \x1b[2J\u202e"), r"the server answered 400 BAD: bad \x1b[2J\u202e"),
        (
            answer(301, location="http://else/\x07"),
            r"answered 301 and points to http://else/\x07; that is not followed",
        ),
        (answer(308), "answered 308 and points to nowhere; that is not followed"),
        (b"-ERR unknown command\r\n\r\n", "the server does not speak HTTP: is it the right --url?"),
    ],
)
def test_an_unexpected_response_is_described_in_one_line(said: bytes, words: str) -> None:
    with answering(said) as server:
        assert words in failed_with_one_line(runs(server, "show", "r1"))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_describes_an_unexpected_response(command: tuple[str, ...]) -> None:
    for said in (answer(200, b"{}", content_type="application/json"), answer(308), b"-ERR unknown command\r\n\r\n"):
        with answering(said) as server:
            assert "is it the right --url?" in failed_with_one_line(runs(server, *command))


@pytest.mark.parametrize(
    "said,words",
    [
        (b"", "the server hung up without an answer"),
        (Reset(b""), "the server hung up without an answer"),
        (Reset(answer(200, b"{}" * 9)[:-1]), "the connection was cut"),
        (answer(502, b"<html>", content_type="text/html"), "answered 502 with text/html, and that is not penstock's"),
        (problem(503, "DRAINING", "later"), "the server answered 503 DRAINING: later"),
        (answer(200, b"[" * 100_000), "that is not penstock's"),
    ],
)
def test_nothing_but_follow_asks_twice(said: Said, words: str) -> None:
    for command in COMMANDS[:3]:
        with answering(said) as server:
            assert words in failed_with_one_line(runs(server, *command))
        assert len(server.requests) == 1


def test_an_endless_refusal_is_not_read_to_its_end() -> None:
    head = answer(500, b"").replace(b"content-length: 0\r\n", b"")
    with answering(Held(head + b"x" * (5 * 1024 * 1024))) as server:
        assert "answered 500 with nothing" in failed_with_one_line(runs(server, "list"))


def test_a_name_that_no_server_can_have_is_said() -> None:
    for host in ("a" * 70, "a." + "b" * 300):
        words = failed_with_one_line(ran("runs", "list", "--url", f"http://{host}.invalid", NO_PROXY="*"))
        assert "there can be no server of that name" in words or "no connection: " in words


# What people see


@pytest.mark.parametrize(
    "text,shown,line",
    [
        ("plain [bold]x[/bold] é 漢", "plain [bold]x[/bold] é 漢", "plain [bold]x[/bold] é 漢"),
        ("a\tb\nc", "a\tb\nc", r"a\tb\nc"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("\x00\x08\x0b\x0c\r\x7f\x9b31m", r"\x00\x08\x0b\x0c\r\x7f\x9b31m", r"\x00\x08\x0b\x0c\r\x7f\x9b31m"),
        ("\u202eabc\u2066\u2028\ud800", r"\u202eabc\u2066\u2028\ud800", r"\u202eabc\u2066\u2028\ud800"),
    ],
)
def test_what_could_control_a_terminal_is_made_visible(text: str, shown: str, line: str) -> None:
    assert (visible(text), visible(text, one_line=True)) == (shown, line)


def test_a_record_that_holds_anything_is_shown_without_harm() -> None:
    evil = "\x1b[2J[red]x[/red]\n\x9b"
    wild = record_of(evil, id=evil, producer=evil, stop_reason=evil, seq=evil, metadata={evil: evil}, error={"a": evil})
    wild |= {evil: [evil], "started_at": 1e300, "ended_at": "x", "created_at": [None]}
    late = record_of(started_at=0, ended_at=10**400)
    body = json.dumps({"runs": [wild, late, {"id": "", "status": ""}]}).encode()
    with answering(answer(200, json.dumps(wild).encode()), answer(200, body)) as server:
        shown, listed = runs(server, "show", "r1"), runs(server, "list")
    for result in (shown, listed):
        assert result.exit_code == 0, result.output
        assert "\x1b" not in result.output
        assert "\x9b" not in result.output
        assert r"\x1b[2J[red]x[/red]\n\x9b" in result.output
    assert len(listed.stdout.splitlines()) == 4


def test_json_is_ascii_and_as_it_came() -> None:
    wild = record_of("completed", metadata={"a": "\x1b\x9b\u202eé", "b": 1e300, "c": "\ud800"}, more=[None, True])
    with answering(answer(200, json.dumps(wild).encode())) as server:
        result = runs(server, "show", "r1", "--json")
    assert result.stdout.isascii()
    assert json.loads(result.stdout) == wild
    assert len(result.stdout.splitlines()) == 1


def test_no_cell_of_the_table_is_cut() -> None:
    long = record_of(id="r" * 128, producer="p" * 300)
    with answering(answer(200, json.dumps({"runs": [long]}).encode())) as server:
        result = runs(server, "list", COLUMNS="40")
    assert f"{'r' * 128}  {'p' * 300}  completed (end_turn)" in result.stdout


@pytest.mark.parametrize(
    "said,code,words",
    [
        (answer(202, json.dumps(record_of("running")).encode()), 0, "run r1 is asked to stop\n"),
        (record("running"), 0, "run r1 was asked to stop before, and is still ending\n"),
        (problem(409, "RUN_ENDED", run=record_of("lost")), 1, "run r1 had ended already: lost (end_turn)\n"),
    ],
)
def test_cancel_says_what_it_met(said: bytes, code: int, words: str) -> None:
    with answering(said) as server:
        result, as_json = runs(server, "cancel", "r1"), runs(server, "cancel", "r1", "--json", "--reason", "é")
    assert (result.exit_code, result.stdout) == (code, words)
    assert (as_json.exit_code, json.loads(as_json.stdout)["id"]) == (code, "r1")
    assert [each.rpartition("\r\n")[2] for each in server.requests] == ["{}", '{"reason":"é"}']


def test_a_standard_output_without_a_reader_or_that_is_full_ends_without_a_traceback() -> None:
    with answering(record()) as server:
        line = f"{sys.executable} -m penstock runs --url {server.url} show r1"
        for target, code in (("| true; exit ${PIPESTATUS[0]}", 0), (">/dev/full", 1), (">&-", 0)):
            done = subprocess.run(
                ["/bin/bash", "-c", f"{line} {target}"], capture_output=True, env=environment(), text=True, check=False
            )
            full = "penstock: standard output cannot be written: No space left on device\n"
            assert (done.returncode, done.stderr) == (code, full if code else "")


# Tables


@pytest.mark.parametrize(
    "body,code,detail",
    [({"code": "A", "detail": "b", "oldest_seq": 1}, "A", "b"), ({"detail": {"code": "A", "message": "b"}}, "A", "b")],
)
def test_refusals_of_both_dialects_are_understood(body: dict[str, Any], code: str, detail: str) -> None:
    refusal = refusal_in(ApiResponse(410, body=json.dumps(body).encode()))
    assert refusal is not None
    assert (refusal.code, refusal.detail) == (code, detail)


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'"x"', b"{}", b'{"code": "A"}', b'{"code": 1, "detail": "b"}'])
def test_what_is_no_refusal_is_none(body: bytes) -> None:
    assert refusal_in(ApiResponse(410, body=body)) is None


def test_a_token_is_blotted_out_however_the_server_has_escaped_it() -> None:
    body = json.dumps({"code": "A", "detail": TOKEN}).replace("/", "\\/").replace("s3", "\\u00733").encode()
    assert describe(ApiResponse(400, body=body, token=TOKEN)) == "the server answered 400 A: [token]"


def chained(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error,final,words",
    [
        (chained(httpx2.ConnectError("x"), ConnectionRefusedError(111, "Connection refused")), False, "on refused"),
        (httpx2.ConnectError("no words"), False, "no connection: no words"),
        (httpx2.ConnectTimeout("x"), False, "there was no answer in time"),
        (httpx2.ReadTimeout("x"), False, "there was no answer in time"),
        (httpx2.RemoteProtocolError("x"), False, "hung up without an answer"),
        (httpx2.ReadError("x"), False, "hung up without an answer"),
        (httpx2.ProxyError("407 Nobody"), False, "refuses (407 Nobody)"),
        (chained(httpx2.ConnectError("x"), ssl.SSLEOFError(8, "cut")), False, "no connection: cut"),
        (chained(httpx2.ConnectError("x"), ssl.SSLError(1, "[SSL: WRONG_VERSION]")), True, "there is no TLS with"),
        (httpx2.UnsupportedProtocol("x"), True, "there can be no server of that name"),
        (UnicodeError("label too long"), True, "there can be no server of that name"),
    ],
)
def test_what_an_error_of_the_connection_comes_to(error: Exception, final: bool, words: str) -> None:
    trouble = connection_failed(error)
    assert trouble.final is final
    assert words in str(trouble)


def test_once_an_answer_has_begun_no_error_is_final() -> None:
    errors = [httpx2.ReadError("x"), chained(httpx2.ReadError("x"), ssl.SSLError(1, "bad record"))]
    assert [connection_failed(error, begun=True).final for error in errors] == [False, False]
    assert str(connection_failed(httpx2.ReadTimeout("x"), begun=True)) == "nothing came for too long"
