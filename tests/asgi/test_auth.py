"""Tokens and links: which are valid, which caller each one names, and that they are never shown."""

from __future__ import annotations

import hmac
import pickle
from datetime import UTC, datetime
from hashlib import sha256
from typing import TYPE_CHECKING, Any, Final

import jwt
import pytest
from starlette.requests import HTTPConnection

from penstock import Caller, ConfigurationError, NotAuthenticated, Right, Token, TokenAuthorizer
from penstock.asgi.auth import Links, new_secret, read_tokens
from tests.support.guarded import SECRET, bearer
from tests.support.serving import serving

if TYPE_CHECKING:
    from pathlib import Path

LONGEST: Final = "x" * 1024
NAMES: Final = ["first", "second", "third", "fourth"]


def token_of(name: str) -> str:
    return f"{name}-has-this-token"


def authorizer() -> TokenAuthorizer:
    return TokenAuthorizer({name: Token.of(token_of(name), ["read"]) for name in NAMES})


async def caller(header: str | bytes, knows: TokenAuthorizer | None = None) -> Caller:
    """Whoever sends this as the header `Authorization`."""
    value = header if isinstance(header, bytes) else header.encode()
    scope = {"type": "http", "headers": [(b"authorization", value)], "query_string": b""}
    return await (knows or authorizer()).authenticate(HTTPConnection(scope))


# A token


@pytest.mark.parametrize("token", ["x" * 16, LONGEST, "abcXYZ019-._~+/==", "A" * 43 + "="])
async def test_a_token_that_can_be_sent_and_not_be_guessed_is_one(token: str) -> None:
    known = TokenAuthorizer({"it": Token.of(token)})
    assert await caller(f"Bearer {token}", known) == Caller("it", frozenset(Right))


@pytest.mark.parametrize(
    "token",
    [
        *("", "x" * 15, LONGEST + "x", "x" * 16 + " ", " " + "x" * 16, "x" * 16 + "\n", "x" * 8 + " " + "x" * 8),
        *("=" * 16, "x" * 8 + "=" + "x" * 8, "pässword-pässword", "x" * 16 + "\0", "x" * 16 + "\r\nx: y", "x,y" * 8),
    ],
)
def test_a_token_that_cannot_be_sent_or_could_be_guessed_is_refused_and_not_shown(token: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Token.of(token)
    words = str(caught.value)
    assert words.startswith("a token has 16 to 1024 letters, digits or -._~+/")
    assert words.endswith("openssl rand -base64 32")
    assert not token.strip() or token not in words


@pytest.mark.parametrize("rights", [["read", "write"], ["READ"], [""], [7], "read", [["read"]], [None]])
def test_rights_that_there_are_not_are_refused_with_those_that_there_are(rights: Any) -> None:
    with pytest.raises(ConfigurationError, match="start, read, share, cancel, list, metrics"):
        Token.of("x" * 16, rights)


def test_two_callers_cannot_have_the_same_token() -> None:
    with pytest.raises(ConfigurationError, match="two of the tokens are the same") as caught:
        TokenAuthorizer({"one": Token.of("x" * 16, ["read"]), "other": Token.of("x" * 16, ["list"])})
    assert "x" * 16 not in str(caught.value)


# Who is known by one


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("header", ["Bearer {}", "bearer {}", "BEARER {}", "Bearer   {} ", "Bearer \t{}"])
async def test_a_caller_is_known_by_his_token_in_the_header(name: str, header: str) -> None:
    found = await caller(header.format(token_of(name)))
    assert found == Caller(name, frozenset({Right.READ}))
    assert token_of(name) not in repr(found)


@pytest.mark.parametrize(
    "header",
    [
        *("", "Bearer", "Bearer ", "Bearer\t" + token_of("first"), "Basic " + token_of("first"), token_of("first")),
        *("Bearer " + token_of("fifth"), "Bearer " + token_of("first").upper(), "Bearer " + token_of("first")[:-1]),
        *("Bearer " + token_of("first") + "\xff", b"Bearer \xff\xfe\x00", "Bearer " + "x" * 100_000),
    ],
)
async def test_nobody_is_known_by_anything_else(header: str | bytes) -> None:
    with pytest.raises(NotAuthenticated) as caught:
        await caller(header)
    assert "has-this-token" not in str(caught.value)


@pytest.mark.parametrize("sent", [*NAMES, "nobody"])
async def test_what_is_sent_is_compared_with_every_token_in_a_time_that_says_nothing(
    monkeypatch: pytest.MonkeyPatch, sent: str
) -> None:
    compared: list[tuple[bytes, bytes]] = []
    known = authorizer()

    def compare_digest(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return one == other

    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    if sent in NAMES:
        assert (await caller(f"Bearer {token_of(sent)}", known)).name == sent
    else:
        with pytest.raises(NotAuthenticated):
            await caller(f"Bearer {token_of(sent)}", known)
    digest = sha256(token_of(sent).encode()).digest()
    digests = [sha256(token_of(name).encode()).digest() for name in NAMES]
    assert [set(pair) for pair in compared] == [{digest, each} for each in digests]


async def test_what_an_authorizer_was_given_can_change_without_it() -> None:
    given = {"first": Token.of(token_of("first"))}
    known = TokenAuthorizer(given)
    given.clear()
    assert (await caller(f"Bearer {token_of('first')}", known)).name == "first"


# What nobody is told


def test_no_secret_is_in_what_is_printed_of_tokens_and_authorizers_nor_is_a_token_kept() -> None:
    token = Token.of(token_of("first"))
    known = TokenAuthorizer({"first": token}, Links(SECRET))
    for shown in (repr(token), str(token), repr(known), str(known), repr(known.links), repr({"it": token})):
        assert token_of("first") not in shown
        assert token.digest.hex() not in shown
        assert repr(token.digest)[2:-1] not in shown
        assert SECRET not in shown
    assert token_of("first").encode() not in pickle.dumps(known)


# The file


def written(folder: Path, text: str | bytes) -> str:
    file = folder / "tokens.toml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(file)


async def test_a_file_has_tokens_with_rights_of_their_own_as_they_are_or_as_digests(tmp_path: Path) -> None:
    digest = sha256(b"the-token-of-the-dashboard").hexdigest()
    path = written(
        tmp_path,
        f"""
        [dashboard]  # whose token is known to itself alone
        sha256 = "{digest}"
        rights = ["read", "list"]
        ["the agents' own"]
        token = "the-token-of-the-agents"
        rights = ["start", "cancel", "start"]
        [nobody]
        token = "a-token-without-a-right"
        rights = []
        """,
    )
    found = read_tokens(path)
    assert {name: each.rights for name, each in found.items()} == {
        "dashboard": {Right.READ, Right.LIST},
        "the agents' own": {Right.START, Right.CANCEL},
        "nobody": set(),
    }
    async with serving(authorizer=TokenAuthorizer(found)) as server:
        answers = {}
        for token in ("the-token-of-the-dashboard", "the-token-of-the-agents", "a-token-without-a-right", digest):
            for path in ("/v1/runs", "/v1/producers"):
                answers[token, path] = (await server.client.get(path, headers=bearer(token))).status_code
        assert list(answers.values()) == [200, 403, 403, 200, 403, 403, 401, 401]


GOOD: Final = 'token = "hunter2-hunter2-hunter2"'
DIGEST: Final = b"hunter2".hex().ljust(64, "0")
KEYS: Final = r"each table has two keys: rights, such as \[\"read\"\], and token \(or sha256"
WRONG: Final[dict[str, tuple[str | bytes, str]]] = {
    "nothing": ("", "there is no token in"),
    "only a comment": ("# hunter2-hunter2-hunter2\n", "there is no token in"),
    "no TOML": ("hunter2-hunter2-hunter2", "is not TOML"),
    "half a table": (f"[a]\n{GOOD[:-1]}\nrights = []", "is not TOML"),
    "a table twice": (f"[a]\n{GOOD}\nrights = []\n[a]\n{GOOD}\nrights = []", "is not TOML"),
    "JSON": ('{"a": {"token": "hunter2-hunter2-hunter2"}}', "is not TOML"),
    "no UTF-8": (b'[a]\ntoken = "hunter2\xff"\nrights = []', "is not TOML"),
    "UTF-16": (f"[a]\n{GOOD}\nrights = []".encode("utf-16"), "is not TOML"),
    "no table": (GOOD, KEYS),
    "a list of tables": (f"[[a]]\n{GOOD}\nrights = []", KEYS),
    "tables in a table": (f"[a.b]\n{GOOD}\nrights = []", KEYS),
    "no rights": (f"[a]\n{GOOD}", KEYS),
    "only rights": ('[a]\nrights = ["read"]', KEYS),
    "an empty table": ("[a]", KEYS),
    "one more key": (f'[a]\n{GOOD}\nrights = []\nnote = "hunter2"', KEYS),
    "both kinds": (f'[a]\n{GOOD}\nsha256 = "{DIGEST}"\nrights = []', KEYS),
    "rights that are no list": (f'[a]\n{GOOD}\nrights = "read"', KEYS),
    "rights that are no words": (f"[a]\n{GOOD}\nrights = [1]", r"rights are a list of names out of start, read,"),
    "a right that there is not": (
        f'[a]\n{GOOD}\nrights = ["write"]',
        "one of the rights does not exist",
    ),
    "a digest's right that there is not": (
        f'[a]\nsha256 = "{DIGEST}"\nrights = ["write"]',
        "one of the rights does not exist",
    ),
    "a token that is a number": ("[a]\ntoken = 1234567890123456789\nrights = []", KEYS),
    "a token that is too short": ('[a]\ntoken = "hunter2"\nrights = []', r"a token has 16 to 1024"),
    "a token with spaces": ('[a]\ntoken = "hunter2 hunter2 hunter2"\nrights = []', r"a token has 16 to 1024"),
    "a digest that is too short": (f'[a]\nsha256 = "{DIGEST[:-1]}"\nrights = []', KEYS),
    "a digest that is too long": (f'[a]\nsha256 = "{DIGEST}0"\nrights = []', KEYS),
    "a digest with capitals": (f'[a]\nsha256 = "{DIGEST[:-1]}A"\nrights = []', KEYS),
    "a digest with a line's end": (f'[a]\nsha256 = "{DIGEST}\\n"\nrights = []', KEYS),
    "a second table that is wrong": (f'[a]\n{GOOD}\nrights = []\n[b]\ntoken = "hunter2"\nrights = []', r"a tok"),
    "brackets without end": ("a = " + "[" * 20_000, "is not TOML|each table"),
    "a number without end": ("a = " + "9" * 5000, "is not TOML|each table"),
}


@pytest.mark.parametrize("text, words", WRONG.values(), ids=WRONG)
def test_a_wrong_file_is_refused_with_what_is_wrong_and_nothing_that_is_secret(
    tmp_path: Path, text: str | bytes, words: str
) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigurationError, match=words) as caught:
        read_tokens(path)
    said = str(caught.value)
    assert path in said
    assert "hunter2" not in said
    assert DIGEST[:10] not in said
    assert "1234567890123456789" not in said
    assert caught.value.__context__ is None or caught.value.__suppress_context__


@pytest.mark.parametrize(
    "text",
    [
        '[hunter2-hunter2-hunter2]\nrights = ["read"]',
        'hunter2-hunter2-hunter2 = ["read"]',
        '[a]\ntoken = "readreadreadread"\nrights = ["hunter2-hunter2-hunter2"]',
    ],
    ids=["a table's name", "a key", "a right"],
)
def test_a_token_that_stands_in_the_wrong_place_of_a_file_is_not_shown(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read_tokens(written(tmp_path, text))
    assert "hunter2-hunter2-hunter2" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_refused_with_why(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"nowhere\.toml cannot be read: No such file or directory"):
        read_tokens(str(tmp_path / "nowhere.toml"))
    with pytest.raises(ConfigurationError, match="cannot be read: Is a directory"):
        read_tokens(str(tmp_path))


# Links


@pytest.mark.parametrize("ago, over", [(-1.5, False), (0, True), (1, True)])
def test_a_link_is_over_at_the_second_that_it_says(later: Any, ago: float, over: bool) -> None:
    links = Links(SECRET)
    token, ends_at = links.make("r", 1000)
    later(ends_at - datetime.now(UTC).timestamp() + ago)
    if over:
        with pytest.raises(NotAuthenticated, match="lifetime of this link is over"):
            links.run_of(token)
    else:
        assert links.run_of(token) == "r"


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
    with pytest.raises(NotAuthenticated, match="this server has not made this link"):
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
