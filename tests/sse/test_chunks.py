"""What a producer may yield: chunks, and the blocks and bytes that they come to."""

from __future__ import annotations

from functools import partial
from http import HTTPStatus
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.errors import EventTooLarge, InvalidChunk
from penstock.sse import Event
from penstock.sse.chunks import Block, bytes_of, status_of
from penstock.sse.chunks import blocks_of as blocks_up_to
from penstock.sse.dialects import DIALECTS, DONE

blocks_of = partial(blocks_up_to, max_event_bytes=1024 * 1024)
PLAIN = DIALECTS["plain"]
LETTA = DIALECTS["letta"]

STOP_OF_LETTA = '{"message_type":"stop_reason","stop_reason":"max_steps"}'
NO_CHUNK: list[Any] = [None, 7, 1.5, True, {}, [], [b"data: x\n\n"], bytearray(b"data: x\n\n"), object(), Event]


# --- a run's chunks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunk, blocks",
    [
        (Event(data="x"), [Block(b"data: x\n\n")]),
        (Event(data=""), [Block(b"data: \n\n")]),
        (Event(comment="hi"), [Block(b": hi\n\n")]),
        ("data: x\n\n", [Block(b"data: x\n\n")]),
        (b"data: x\n\n", [Block(b"data: x\n\n")]),
        (b"data: x\r\n\r\n", [Block(b"data: x\n\n")]),
        ("data: 1\n\n\n\ndata: 2\n\n: c\n\n", [Block(b"data: 1\n\n"), Block(b"data: 2\n\n"), Block(b": c\n\n")]),
        ("data\n\n", [Block(b"data\n\n")]),
        ("", []),
        (b"", []),
        ("\n\n", []),
        (Event(data="[DONE]"), [Block(DONE, done=True)]),
        ("data: [DONE]\n\n", [Block(DONE, done=True)]),
        (b"data:[DONE]\n\n", [Block(b"data:[DONE]\n\n", done=True)]),
        (Event(data="boom", event="error"), [Block(b"event: error\ndata: boom\n\n", message=False, error="boom")]),
        (b"event: error\ndata: boom\n\n", [Block(b"event: error\ndata: boom\n\n", message=False, error="boom")]),
        (Event(event="error"), [Block(b"event: error\n\n", message=False, error="")]),
        ("event: error\n\n", [Block(b"event: error\n\n", message=False, error="")]),
        (Event.stop("tired"), [Block(b'event: stop\ndata: {"stop_reason":"tired"}\n\n', stop_reason="tired")]),
    ],
)
def test_a_chunk_comes_apart_into_its_blocks(chunk: Any, blocks: list[Block]) -> None:
    assert blocks_of(chunk, PLAIN) == blocks


@pytest.mark.parametrize(
    "chunk",
    [
        Event(data="the end: [DONE]"),
        Event(data="[DONE]\n"),
        Event(data=" [DONE]"),
        Event(data='{"text":"data: [DONE]"}'),
        "data: x\ndata: [DONE]\n\n",
        b": [DONE]\n\n",
        "data: [done]\n\n",
        Event(data="[DONE]", event="stdout"),
        "event: stdout\ndata: [DONE]\n\n",
    ],
)
def test_d22_only_an_untyped_block_whose_data_is_exactly_done_ends_a_run(chunk: Any) -> None:
    assert [block.done for block in blocks_of(chunk, PLAIN)] == [False]


@pytest.mark.parametrize("chunk", [Event(data=STOP_OF_LETTA), f"data: {STOP_OF_LETTA}\n\n"])
def test_json_data_states_a_stop_reason_in_the_dialect_that_has_it(chunk: Any) -> None:
    assert [block.stop_reason for block in blocks_of(chunk, LETTA)] == ["max_steps"]
    assert [block.stop_reason for block in blocks_of(chunk, PLAIN)] == [None]


def test_a_stop_is_spelled_by_the_dialect() -> None:
    assert blocks_of(Event.stop("max_steps"), LETTA) == [
        Block(f"data: {STOP_OF_LETTA}\n\n".encode(), stop_reason="max_steps")
    ]


@pytest.mark.parametrize("chunk", NO_CHUNK)
def test_what_is_no_chunk_is_refused_with_what_to_yield_instead(chunk: Any) -> None:
    with pytest.raises(InvalidChunk, match=r"a chunk is an Event, str or bytes, not .*; yield Event\(data=...\)"):
        blocks_of(chunk, PLAIN)
    with pytest.raises(InvalidChunk, match=r"a chunk is an Event, str or bytes, not .*; yield Event\(data=...\)"):
        bytes_of(chunk, PLAIN)


@pytest.mark.parametrize("chunk", ["data: x", "data: x\n", b"data: 1\n\ndata: 2\n", b"\xff\n\n", "x"])
def test_half_a_block_or_none_is_refused(chunk: Any) -> None:
    with pytest.raises(InvalidChunk):
        blocks_of(chunk, PLAIN)


@pytest.mark.parametrize("chunk", [Event(data="x", id="7"), "id: 7\ndata: x\n\n", b"data: x\n\nid\n\n"])
def test_a_producers_own_id_is_refused_inside_a_run(chunk: Any) -> None:
    with pytest.raises(InvalidChunk, match="the log numbers the events"):
        blocks_of(chunk, PLAIN)


@pytest.mark.parametrize("chunk", ["data: half \ud800\n\n", "data: 1\n\ndata: \udfff\n\n", b"data: \xed\xa0\x80\n\n"])
def test_d26_a_lone_surrogate_is_refused_with_all_of_its_chunk(chunk: Any) -> None:
    with pytest.raises(InvalidChunk, match="UTF-8"):
        blocks_of(chunk, PLAIN)


def test_d26_a_lone_surrogate_does_not_get_into_an_event() -> None:
    with pytest.raises(InvalidChunk, match="lone surrogate"):
        Event(data="\ud800")
    with pytest.raises(InvalidChunk, match="lone surrogate"):
        Event.json(["\ud800"])
    with pytest.raises(InvalidChunk, match="lone surrogate"):
        Event.stop("\ud800")


def test_an_event_at_the_limit_is_taken_and_one_byte_more_is_refused() -> None:
    wire = b"data: 0123456789\n\n"
    for chunk in (Event(data="0123456789"), wire, wire.decode()):
        assert blocks_of(chunk, PLAIN, max_event_bytes=len(wire)) == [Block(wire)]
        with pytest.raises(EventTooLarge, match=r"an event of 18 bytes is over the limit of 17 \(max_event_bytes\)"):
            blocks_of(chunk, PLAIN, max_event_bytes=len(wire) - 1)


def test_the_limit_is_for_an_event_and_not_for_a_chunk() -> None:
    assert len(blocks_of(b"data: x\n\n" * 1000, PLAIN, max_event_bytes=9)) == 1000
    with pytest.raises(EventTooLarge):
        blocks_of(b"data: x\n\n" * 1000 + b"data: xy\n\n", PLAIN, max_event_bytes=9)


def test_the_limit_counts_encoded_bytes_and_not_characters() -> None:
    with pytest.raises(EventTooLarge):
        blocks_of(Event(data="ä" * 10), PLAIN, max_event_bytes=27)
    assert blocks_of(Event(data="ä" * 10), PLAIN, max_event_bytes=28)


@given(st.lists(st.text(st.characters(codec="utf-8"), max_size=20), max_size=5))
def test_an_event_and_its_bytes_come_to_the_same_blocks(texts: list[str]) -> None:
    events = [Event(data=text) for text in texts]
    one_by_one = [block for event in events for block in blocks_of(event, LETTA)]
    assert blocks_of(b"".join(event.encode() for event in events), LETTA) == one_by_one


# --- a direct response's chunks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "chunk, wire",
    [
        (Event(data="x", id="7"), b"id: 7\ndata: x\n\n"),
        ("id: 7\ndata: ä\n\n", "id: 7\ndata: ä\n\n".encode()),
        (b"data: x\r\n\r\n", b"data: x\r\n\r\n"),
        (b"data: x\r\r", b"data: x\r\r"),
        (b"data: x\n\r\n", b"data: x\n\r\n"),
        (b"\xff\n\n", b"\xff\n\n"),
        ("", b""),
        (b"", b""),
        (Event.stop("tired"), b'event: stop\ndata: {"stop_reason":"tired"}\n\n'),
    ],
)
def test_a_response_without_a_run_passes_chunks_on_as_they_are(chunk: Any, wire: bytes) -> None:
    assert bytes_of(chunk, PLAIN) == wire


def test_a_stop_in_a_response_without_a_run_is_spelled_by_the_dialect() -> None:
    assert bytes_of(Event.stop("max_steps"), LETTA) == f"data: {STOP_OF_LETTA}\n\n".encode()


@pytest.mark.parametrize("chunk", ["data: x", "data: x\n", b"data: x\r\n", b"x", "\n"])
def test_a_chunk_that_does_not_end_with_a_blank_line_is_refused(chunk: Any) -> None:
    with pytest.raises(InvalidChunk, match="ended by a blank line"):
        bytes_of(chunk, PLAIN)


def test_d26_a_response_without_a_run_refuses_a_lone_surrogate() -> None:
    with pytest.raises(InvalidChunk, match="surrogates not allowed at 6"):
        bytes_of("data: \ud800\n\n", PLAIN)


# --- chunks with a status -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [Event(data="x"), "data: x\n\n", b"", None, ["a", 200]])
def test_what_is_no_tuple_has_no_status(chunk: Any) -> None:
    assert status_of(chunk) == (chunk, None)


@pytest.mark.parametrize("status", [200, 201, 299, HTTPStatus.ACCEPTED])
def test_a_success_is_its_content(status: int) -> None:
    event = Event(data="x")
    content, refusal = status_of((event, status))
    assert content is event
    assert refusal is None


@pytest.mark.parametrize(
    "chunk, refusal",
    [
        (("data: not today\n\n", 300), ("STATUS_300", "not today")),
        ((b"data: not today\n\n", 404), ("STATUS_404", "not today")),
        ((Event(data="not today"), 599), ("STATUS_599", "not today")),
        ((Event(comment="c"), 500), ("STATUS_500", "")),
        (("not today", HTTPStatus.IM_A_TEAPOT), ("STATUS_418", "not today")),
        (({"why": 1}, 400), ("STATUS_400", "{'why': 1}")),
        ((None, 400), ("STATUS_400", "None")),
        ((b"\xff", 400), ("STATUS_400", "\ufffd")),
        (("half \ud800", 400), ("STATUS_400", "half ?")),
    ],
)
def test_any_other_status_is_an_error_with_the_content_as_its_words(chunk: Any, refusal: tuple[str, str]) -> None:
    assert status_of(chunk)[1] == refusal


@pytest.mark.parametrize(
    "chunk",
    [(), ("x",), ("x", 200, 1), ("x", 199), ("x", 600), ("x", 0), ("x", -1), ("x", "200"), ("x", 200.0), ("x", True)],
)
def test_any_other_tuple_is_refused(chunk: Any) -> None:
    with pytest.raises(InvalidChunk, match=r"\(content, HTTP status from 200 to 599\)"):
        status_of(chunk)


@pytest.mark.parametrize("chunk", [Event(data="[DONE]", event="stdout"), b"event: stdout\ndata: [DONE]\n\n"])
def test_d22_done_in_an_event_with_a_type_of_its_own_ends_nothing(chunk: object) -> None:
    (block,) = blocks_of(chunk, PLAIN)
    assert not block.done
    assert not block.message
