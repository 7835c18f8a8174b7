"""A run's stream over HTTP: where it begins, what it says, how it ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from penstock import Event, MemoryLog
from tests.support.serving import Tap, quiet_config, serving
from tests.support.wire import DONE, Block, blocks_of, ids, unchunked

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

    from tests.support.serving import Server

STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-store",
    "x-accel-buffering": "no",
}


async def ended(server: Server, n: int = 9) -> str:
    """A run of `n` events and `[DONE]` that has ended."""
    run_id = await server.start("count", n)
    await server.ended_run(run_id)
    return run_id


# What it says


async def test_ids_count_from_1_without_a_gap_and_done_is_last() -> None:
    async with serving() as server:
        blocks = await server.read(await server.start("count", 300))
        assert [(block.id, block.data) for block in blocks] == [
            *[(seq, str(seq)) for seq in range(1, 301)],
            (301, DONE),
        ]


async def test_a_producers_blocks_arrive_as_they_are() -> None:
    async def agent(_input: Any) -> AsyncIterator[Any]:
        yield Event(data="two\nlines", event="note", retry=5)
        yield "data: a\n\ndata: b\n\n"
        yield b": a comment\n\n"

    async with serving({"agent": agent}) as server:
        assert await server.read(await server.start("agent")) == [
            Block(1, "note", "two\nlines", retry="5"),
            Block(2, data="a"),
            Block(3, data="b"),
            Block(4, comment="a comment"),
            Block(5, data=DONE),
        ]


async def test_d16_headers_are_sent_at_once_however_long_the_producer_is_silent() -> None:
    async with serving() as server:
        run_id = await server.start("silent")
        async with await server.wire() as wire:
            await wire.send("GET", f"/v1/runs/{run_id}/stream")
            head = (await wire.until(b"\r\n\r\n")).decode()
            assert head.startswith("HTTP/1.1 200")
            for name, value in STREAM_HEADERS.items():
                assert f"\r\n{name}: {value}\r\n" in head
            assert "content-length" not in head.lower()
        async with server.opened("POST", "/v1/runs", json_body={"producer": "silent", "stream": True}) as reader:
            assert reader.status == 201
            assert STREAM_HEADERS.items() <= reader.headers.items()


async def test_whatever_the_method_and_accept_are_the_answer_is_the_stream_with_its_headers() -> None:
    async with serving() as server:
        path = f"/v1/runs/{await ended(server)}/stream"
        for method, accept in (
            *[("GET", each) for each in ("*/*", "application/json", "text/html", "text/event-stream;q=0", "")],
            *[("POST", "application/json"), ("HEAD", "*/*")],
        ):
            answer = await server.client.request(method, path, headers={"Accept": accept}, params={"stream": "true"})
            assert answer.status_code == 200
            assert STREAM_HEADERS.items() <= dict(answer.headers).items()
            assert len(blocks_of(answer.text)) == (0 if method == "HEAD" else 10)


async def test_d12_a_run_that_yields_nothing_or_fails_at_once_is_a_whole_stream() -> None:
    async def nothing(_input: Any) -> AsyncIterator[Event]:
        return
        yield

    async def broken(_input: Any) -> AsyncIterator[Event]:
        raise ZeroDivisionError
        yield

    def refuses_to_be_called(_input: Any) -> AsyncIterator[Event]:
        raise ZeroDivisionError

    async with serving({"nothing": nothing, "broken": broken, "refuses": refuses_to_be_called}) as server:
        assert await server.read(await server.start("nothing")) == [Block(1, data=DONE)]
        for name in ("broken", "refuses"):
            answer = await server.client.post("/v1/runs", json={"producer": name, "stream": True})
            assert answer.status_code == 201
            error, done = blocks_of(answer.text)
            assert (error.event, error.json["code"], done.data) == ("error", "ERROR", DONE)
            assert error.json["error_id"] in {error_id for _, error_id in server.observer.errors}


async def test_d20_done_is_last_for_a_reader_of_a_background_run_however_that_ends() -> None:
    async def raises(_input: Any) -> AsyncIterator[Any]:
        yield Event(data="x")
        raise ValueError

    async def says_error(_input: Any) -> AsyncIterator[Any]:
        yield Event(data='{"code": "MINE", "message": "no"}', event="error")
        yield Event(data="never seen")

    async def error_status(_input: Any) -> AsyncIterator[Any]:
        yield Event(data="x")
        yield "no more", 503
        yield Event(data="never seen")

    async def not_a_chunk(_input: Any) -> AsyncIterator[Any]:
        yield 7

    producers = {each.__name__: each for each in (raises, says_error, error_status, not_a_chunk)}
    async with serving(producers) as server:
        for name in producers:
            run_id = await server.start(name)
            async with server.reading(run_id) as live:
                seen = await live.rest()
            *_, error, done = seen
            assert (error.event, done) == ("error", Block(len(seen), data=DONE))
            assert "never seen" not in str(seen)
            assert await server.read(run_id) == seen
            assert (await server.run(run_id))["status"] == "failed"


# Where it begins


async def test_a_cursor_can_be_a_header_a_query_or_a_member_of_the_body() -> None:
    async with serving() as server:
        path = f"/v1/runs/{await ended(server)}/stream"

        async def begins(method: str, **request: Any) -> int:
            answer = await server.client.request(method, path, **request)
            assert answer.status_code == 200, answer.text
            seen = ids(blocks_of(answer.text))
            assert seen == list(range(seen[0], 11))
            return seen[0]

        assert await begins("GET", headers={"Last-Event-ID": "4"}) == 5
        assert await begins("POST", headers={"Last-Event-ID": "4"}) == 5
        assert await begins("GET", params={"starting_after": 4}) == 5
        assert await begins("POST", params={"starting_after": 4}) == 5
        assert await begins("POST", json={"starting_after": 4}) == 5
        assert await begins("POST", json={"starting_after": "4"}) == 5
        assert await begins("GET", params={"starting_after": "0007"}) == 8
        assert await begins("POST", params={"starting_after": 2}, json={"starting_after": 4}) == 5
        assert await begins("POST", params={"starting_after": 2}, json={}) == 3
        assert await begins("GET", params={"starting_after": 0}) == 1
        assert await begins("POST", json={"starting_after": None}) == 1


async def test_last_event_id_wins_over_starting_after() -> None:
    async with serving() as server:
        path = f"/v1/runs/{await ended(server)}/stream"
        header = {"Last-Event-ID": "7"}
        for answer in (
            await server.client.get(path, headers=header, params={"starting_after": 2}),
            await server.client.post(path, headers=header, json={"starting_after": 2}),
        ):
            assert ids(blocks_of(answer.text)) == [8, 9, 10]
        answer = await server.client.get(path, headers={"Last-Event-ID": ""}, params={"starting_after": 2})
        assert ids(blocks_of(answer.text))[0] == 3


async def test_d39_a_stream_request_without_a_body_gets_the_defaults() -> None:
    async with serving() as server:
        path = f"/v1/runs/{await ended(server, 2)}/stream"
        whole = [Block(1, data="1"), Block(2, data="2"), Block(3, data=DONE)]
        assert blocks_of((await server.client.post(path)).text) == whole
        assert blocks_of((await server.client.post(path, headers={"Content-Type": "application/json"})).text) == whole
        async with await server.wire() as wire:  # HTTP/1.0, and not even a Content-Length
            await wire.stream.send_all(f"POST {path} HTTP/1.0\r\n\r\n".encode())
            assert (await wire.rest()).endswith(b"id: 3\ndata: [DONE]\n\n")


async def test_tail_begins_with_the_last_entries() -> None:
    async with serving() as server:
        path = f"/v1/runs/{await ended(server)}/stream"

        async def seen(**query: Any) -> list[int]:
            by_query = await server.client.get(path, params=query)
            by_body = await server.client.post(path, json=query)
            assert (by_query.status_code, by_query.text) == (by_body.status_code, by_body.text)
            return ids(blocks_of(by_query.text))

        assert await seen(tail=3) == [8, 9, 10]
        assert await seen(tail=1) == [10]
        assert await seen(tail=1000) == list(range(1, 11))
        assert await seen(tail=3, starting_after=9) == [10]
        assert await seen(tail=3, starting_after=2) == [8, 9, 10]
        assert (await server.client.get(path, params={"tail": 0})).status_code == 204


async def test_tail_of_a_live_run_goes_on_with_what_comes() -> None:
    tap = Tap()
    async with serving({"tap": tap}) as server:
        run_id = await server.start("tap")
        tap.feed(*"abcde")
        async with server.reading(run_id) as first:
            await first.take(5)
            async with server.reading(run_id, tail=2) as two, server.reading(run_id, tail=0) as none:
                tap.feed("f")
                tap.end()
                assert ids(await two.rest()) == [4, 5, 6, 7]
                assert ids(await none.rest()) == [6, 7]


async def test_a_cursor_ahead_of_a_running_run_waits() -> None:
    tap = Tap()
    async with serving({"tap": tap}) as server:
        run_id = await server.start("tap")
        async with server.reading(run_id, starting_after=3) as reader:
            tap.feed(*"abcd")
            tap.end()
            assert await reader.rest() == [Block(4, data="d"), Block(5, data=DONE)]


# How it ends


async def test_d33_a_cursor_at_or_past_the_end_is_answered_204_at_once() -> None:
    async with serving() as server:
        run_id = await ended(server)  # whose [DONE] is entry 10
        for cursor in (10, 11, 10**17):
            for answer in (
                await server.client.get(f"/v1/runs/{run_id}/stream", headers={"Last-Event-ID": str(cursor)}),
                await server.client.post(f"/v1/runs/{run_id}/stream", json={"starting_after": cursor}),
                await server.client.head(f"/v1/runs/{run_id}/stream", params={"starting_after": cursor}),
            ):
                assert (answer.status_code, answer.content) == (204, b"")
                assert "content-type" not in answer.headers
        assert ids(await server.read(run_id, starting_after=9)) == [10]


async def test_d34_a_run_that_is_not_there_is_a_404() -> None:
    async with serving() as server:
        for method in ("GET", "POST"):
            answer = await server.client.request(method, "/v1/runs/nobody/stream", params={"tail": 1})
            assert (answer.status_code, answer.json()["code"]) == (404, "RUN_NOT_FOUND")
            assert answer.headers["content-type"] == "application/problem+json"
        assert (await server.client.head("/v1/runs/nobody/stream")).status_code == 404


async def test_d34_a_run_whose_time_is_over_is_a_404() -> None:
    async with serving(log=MemoryLog(ttl=1e-6)) as server:
        answer = await server.client.get(f"/v1/runs/{await server.start('count', 0)}/stream")
        while answer.status_code == 200:  # it was there while it ran
            answer = await server.client.get(answer.url)
        assert (answer.status_code, answer.json()["code"]) == (404, "RUN_NOT_FOUND")


async def test_d37_a_trimmed_cursor_is_answered_410_with_the_oldest_seq() -> None:
    async with serving(log=MemoryLog(max_entries=5), tail_entries=5) as server:
        run_id = await ended(server)  # 6 to 10 are left
        for cursor in (0, 3, 4):
            answer = await server.client.get(f"/v1/runs/{run_id}/stream", params={"starting_after": cursor})
            body = answer.json()
            assert (answer.status_code, body["code"], body["oldest_seq"]) == (410, "CURSOR_EXPIRED", 6)
            assert answer.headers["content-type"] == "application/problem+json"
            assert (await server.client.head(f"/v1/runs/{run_id}/stream?starting_after={cursor}")).status_code == 410
        assert ids(await server.read(run_id, starting_after=5)) == [6, 7, 8, 9, 10]
        assert ids(await server.read(run_id, tail=1000)) == [6, 7, 8, 9, 10]


async def test_a_connection_that_carried_a_stream_is_used_again_and_closed_when_it_is_idle() -> None:
    config = quiet_config()
    config.keep_alive_timeout = 0.3
    async with serving(config=config) as server:
        run_id = await ended(server, 1)
        async with await server.wire() as wire:
            for times in (1, 2, 3):
                await wire.send("GET", f"/v1/runs/{run_id}/stream")
                while wire.received.count(b"\r\n0\r\n\r\n") < times:
                    wire.received += await wire.stream.receive_some()
            assert (await wire.rest()).count(DONE.encode()) == 3  # and the server closes


async def test_head_of_a_live_run_is_answered_at_once_and_holds_on_to_nothing() -> None:
    async with serving() as server:
        run_id = await server.start("silent")
        answer = await server.client.head(f"/v1/runs/{run_id}/stream")
        assert (answer.status_code, answer.content) == (200, b"")
        assert STREAM_HEADERS.items() <= dict(answer.headers).items()
        tail = server.service.supervisor._tails.get(run_id)
        assert tail is not None
        assert tail.users == 1  # the run itself


async def test_a_reader_that_trimming_has_overtaken_is_told_so_and_closed_without_an_end() -> None:
    tap = Tap()
    piece = "x" * 1_000_000
    async with serving({"tap": tap}, MemoryLog(max_entries=3), tail_entries=2) as server:
        run_id = await server.start("tap")
        async with await server.wire() as wire, server.reading(run_id) as reader:
            await wire.send("GET", f"/v1/runs/{run_id}/stream", connection="close")
            await wire.until(b"\r\n\r\n")
            for _ in range(40):  # more than the buffers between server and client hold
                tap.feed(piece)
                await reader.take(1)
            seen = (await wire.rest()).partition(b"\r\n\r\n")[2]
            last = blocks_of(unchunked(seen))[-1]
            assert last.comment is not None
            assert last.comment.startswith("CURSOR_EXPIRED: ")
            assert last._replace(comment=None) == Block()
            assert DONE.encode() not in seen
            assert b"error" not in seen
            after = max(ids(blocks_of(unchunked(seen))))
            assert after < 38
            again = await server.client.get(f"/v1/runs/{run_id}/stream", params={"starting_after": after})
            assert (again.status_code, again.json()["oldest_seq"]) == (410, 38)
            assert (await server.run(run_id))["status"] == "running"
            tap.end()
            assert ids(await reader.rest()) == [41]


# Pings


async def test_a_ping_is_sent_on_silence_and_carries_no_id() -> None:
    tap = Tap()
    async with serving({"tap": tap}, ping_interval=0.05) as server:
        run_id = await server.start("tap")
        async with server.reading(run_id) as reader:
            assert await reader.take(2) == [Block(comment="ping")] * 2
            tap.feed("x")
            while (block := await reader.next()) == Block(comment="ping"):
                pass
            assert block == Block(1, data="x")
            assert await reader.take(1) == [Block(comment="ping")]
            tap.end()
            *pings, done = await reader.rest()
            assert done == Block(2, data=DONE)
            assert all(ping == Block(comment="ping") for ping in pings)
        assert await server.read(run_id) == [Block(1, data="x"), Block(2, data=DONE)]  # pings are not stored


async def test_pings_can_be_left_out() -> None:
    tap, value = Tap(), "false"
    async with serving({"tap": tap}, ping_interval=0.02) as server:
        run_id = await server.start("tap")
        path = f"/v1/runs/{run_id}/stream"
        async with (
            server.reading(run_id) as pinged,
            server.opened("POST", path, json_body={"include_pings": value}) as by_body,
            server.reading(run_id, include_pings=value) as by_query,
        ):
            await pinged.take(5)  # time enough for the others
            tap.end()
            assert await by_query.rest() == [Block(1, data=DONE)]
            assert await by_body.rest() == [Block(1, data=DONE)]


async def test_a_ping_in_dialect_letta_names_the_run() -> None:
    async with serving(dialect="letta", ping_interval=0.02) as server:
        run_id = await server.start("silent")
        async with server.reading(run_id) as reader:
            (ping,) = await reader.take(1)
            assert ping.id is None
            assert (ping.json["message_type"], ping.json["run_id"]) == ("ping", run_id)
