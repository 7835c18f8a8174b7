"""The two dialects, byte for byte."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import ConfigurationError
from penstock.runs import RunError
from penstock.sse import Decoder, Event, Message
from penstock.sse.dialects import DIALECTS, DONE, Dialect, dialect_named
from penstock.sse.events import split_blocks

PLAIN = DIALECTS["plain"]
LETTA = DIALECTS["letta"]
ERROR = RunError("CODE", 'it "broke"', "err-1")

both = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)


def test_done_is_the_same_in_every_dialect() -> None:
    assert DONE == b"data: [DONE]\n\n"


SPELLED = [
    (PLAIN.ping("r", 7), b": ping\n\n"),
    (PLAIN.error(ERROR), b'event: error\ndata: {"code":"CODE","message":"it \\"broke\\"","error_id":"err-1"}\n\n'),
    (
        PLAIN.cancelled("was cancelled", "why"),
        b'event: cancelled\ndata: {"code":"RUN_CANCELLED","message":"was cancelled","reason":"why"}\n\n',
    ),
    (
        PLAIN.cancelled_directly("was cancelled", None),
        b'event: cancelled\ndata: {"code":"RUN_CANCELLED","message":"was cancelled","reason":null}\n\n',
    ),
    (PLAIN.stop("end_turn"), b'event: stop\ndata: {"stop_reason":"end_turn"}\n\n'),
    (LETTA.error(ERROR), b'event: error\ndata: {"error":"it \\"broke\\"","code":"CODE","error_id":"err-1"}\n\n'),
    (LETTA.cancelled("m", "why"), b'data: {"message_type":"stop_reason","stop_reason":"cancelled"}\n\n'),
    (
        LETTA.cancelled_directly("m", "why"),
        (
            b'data: {"message_type":"stop_reason","stop_reason":"cancelled"}\n\n'
            b'event: cancelled\ndata: {"message":"Run was cancelled"}\n\n'
        ),
    ),
    (LETTA.stop("end_turn"), b'data: {"message_type":"stop_reason","stop_reason":"end_turn"}\n\n'),
]


@pytest.mark.parametrize("spelled, expected", SPELLED)
def test_control_events_are_spelled_to_the_byte(spelled: bytes, expected: bytes) -> None:
    assert spelled == expected


def test_a_ping_of_letta_is_a_message_with_an_id_and_a_date_of_its_own() -> None:
    first, second = (json.loads(LETTA.ping("run-1", 7).removeprefix(b"data: ")) for _ in range(2))
    assert list(first) == ["message_type", "id", "date", "run_id", "seq_id"]
    assert (first["message_type"], first["run_id"], first["seq_id"]) == ("ping", "run-1", 7)
    assert re.fullmatch(r"ping-[0-9a-f]{16}", first["id"])
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d+\+00:00", first["date"])
    assert first["id"] != second["id"]


def test_a_ping_outside_a_run_names_none() -> None:
    ping = json.loads(LETTA.ping().removeprefix(b"data: "))
    assert (ping["run_id"], ping["seq_id"]) == (None, None)


@both
def test_no_control_event_carries_an_id_and_each_is_whole_blocks(dialect: Dialect) -> None:
    spelled = [
        dialect.ping("r", 1),
        dialect.error(ERROR),
        dialect.cancelled("m", "r"),
        dialect.cancelled_directly("m", "r"),
        dialect.stop("s"),
        DONE,
    ]
    for block in spelled:
        assert b"".join(piece.wire for piece in split_blocks(block)) == block
        assert all(message.last_event_id == "" for message in Decoder().feed(block))


@both
def test_words_with_line_ends_stay_one_block(dialect: Dialect) -> None:
    spelled = dialect.error(RunError("C", "one\n\ndata: two\r\rid: 3", "e"))
    assert len(split_blocks(spelled)) == 1


# --- why a producer stopped -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data, letta",
    [
        ('{"message_type":"stop_reason","stop_reason":"max_steps"}', "max_steps"),
        ('{ "stop_reason" : "x", "message_type" : "stop_reason" }', "x"),
        (r'{"message_type":"stop_reason","stop_reason":"half \ud800"}', "half ?"),
        ('{"message_type":"assistant_message","stop_reason":"x"}', None),
        ('{"message_type":"stop_reason","stop_reason":""}', None),
        ('{"message_type":"stop_reason","stop_reason":7}', None),
        ('{"message_type":"stop_reason"}', None),
        ('{"inner":{"message_type":"stop_reason","stop_reason":"x"}}', None),
        ('[{"message_type":"stop_reason","stop_reason":"x"}]', None),
        ('"stop_reason"', None),
        ("stop_reason", None),
        ("[" * 100_000 + "stop_reason", None),
        ("", None),
    ],
)
def test_only_letta_reads_a_stop_reason_from_the_top_level_of_json_data(data: str, letta: str | None) -> None:
    assert LETTA.stop_reason(data) == letta
    assert PLAIN.stop_reason(data) is None


@pytest.mark.parametrize("reason", ["end_turn", "ends\nwith lines", 'quo"ted'])
def test_letta_reads_back_the_stop_reason_that_it_spells(reason: str) -> None:
    (block,) = split_blocks(LETTA.stop(reason))
    assert block.data is not None
    assert LETTA.stop_reason(block.data) == reason


# --- stamping -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "block, stamped",
    [
        (b'data: {"run_id":null,"seq_id":null}\n\n', b'data: {"run_id":"r-1","seq_id":7}\n\n'),
        (b'data: {"a": 1, "run_id": null}\n\n', b'data: {"a":1,"run_id":"r-1"}\n\n'),
        (b'data: {"seq_id":null,"a":null}\n\n', b'data: {"seq_id":7,"a":null}\n\n'),
        (
            b': hi\nevent: e\nretry: 5\nodd: x\ndata: {"run_id":null}\n\n',
            b': hi\nevent: e\nretry: 5\nodd: x\ndata: {"run_id":"r-1"}\n\n',
        ),
        (b'data: {"run_id":\ndata: null}\n\n', b'data: {"run_id":"r-1"}\n\n'),
        (b'data: {"run_id":\ndata\ndata: null}\n\n', b'data: {"run_id":"r-1"}\n\n'),
        (b'data:{"run_id":null}\n\n', b'data: {"run_id":"r-1"}\n\n'),
        (
            'data: {"t":"ä\u2028","run_id":null}\n\n'.encode(),
            'data: {"t":"ä\u2028","run_id":"r-1"}\n\n'.encode(),
        ),
    ],
)
def test_letta_fills_in_what_is_null_at_the_top_level_of_json_data(block: bytes, stamped: bytes) -> None:
    assert LETTA.stamp(block, "r-1", 7) == stamped


@pytest.mark.parametrize(
    "block",
    [
        b'data: {"run_id": "mine", "seq_id": 3}\n\n',
        b'data: {"run_id": 0,  "x": null}\n\n',
        b'data: {"inner": {"run_id": null}}\n\n',
        b'data: [{"run_id": null}]\n\n',
        b'data: {"text": "\\"run_id\\": null"}\n\n',
        b'data: "run_id" null\n\n',
        b'data: {"run_id": null\n\n',
        b': {"run_id": null}\n\n',
        b'data: {"run_id": null, "x": NaN}\n\n',
        b'data: {"run_id": null, "x": 1e999}\n\n',
        b'data: {"run_id": null, "x": "\\ud800"}\n\n',
        b'data: {"run_id": null, "x": ' + b"[" * 100_000 + b"\n\n",
        b'data: {"a": 1}\n\n',
        b"data: null\n\n",
    ],
)
def test_letta_leaves_everything_else_as_it_is_to_the_byte(block: bytes) -> None:
    assert LETTA.stamp(block, "r-1", 7) == block


def test_plain_stamps_nothing() -> None:
    block = b'data: {"run_id":null,"seq_id":null}\n\n'
    assert PLAIN.stamp(block, "r-1", 7) == block


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)


@given(
    message=st.dictionaries(st.sampled_from(["run_id", "seq_id", "inner", "text", ""]), json_values),
    event=st.sampled_from([None, "e"]),
)
def test_stamping_changes_two_members_and_nothing_else(message: dict[str, Any], event: str | None) -> None:
    stamped = LETTA.stamp(Event.json(message, event=event).encode(), "r-1", 7)
    stamps: dict[str, Any] = {"run_id": "r-1", "seq_id": 7}
    expected = {key: stamps.get(key) if value is None else value for key, value in message.items()}
    (seen,) = Decoder().feed(stamped)
    assert json.loads(seen.data) == expected
    assert seen == Message(seen.data, event or "message")


# --- error bodies ---------------------------------------------------------------------------------------------------


def test_plain_answers_an_error_with_problem_details() -> None:
    media_type, body = PLAIN.error_body(404, "RUN_NOT_FOUND", "there is no run", {"oldest_seq": 3})
    assert media_type == "application/problem+json"
    assert json.loads(body) == {
        "type": "about:blank",
        "title": "Not Found",
        "status": 404,
        "detail": "there is no run",
        "code": "RUN_NOT_FOUND",
        "oldest_seq": 3,
    }


def test_letta_answers_an_error_with_a_detail_object() -> None:
    media_type, body = LETTA.error_body(409, "PENDING_APPROVAL", "waits", {"pending_request_id": "p-1"})
    assert media_type == "application/json"
    detail = {"code": "PENDING_APPROVAL", "message": "waits", "pending_request_id": "p-1"}
    assert json.loads(body) == {"detail": detail}


def test_a_status_without_a_name_is_an_error_all_the_same() -> None:
    assert json.loads(PLAIN.error_body(599, "C", "m", {})[1])["title"] == "Error"


@both
def test_d26_an_error_body_can_be_sent_whatever_its_words_hold(dialect: Dialect) -> None:
    _, body = dialect.error_body(500, "C", "half \ud800 a pair", {})
    assert json.loads(body.decode("ascii"))


# --- names ----------------------------------------------------------------------------------------------------------


@both
def test_a_dialect_is_found_by_its_name(dialect: Dialect) -> None:
    assert dialect_named(dialect.name) is dialect


@pytest.mark.parametrize("name", ["", "Plain", "plain ", "openai"])
def test_a_dialect_that_there_is_not_is_refused_with_those_that_there_are(name: str) -> None:
    with pytest.raises(ConfigurationError, match="plain, letta"):
        dialect_named(name)
