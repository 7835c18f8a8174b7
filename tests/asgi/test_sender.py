"""EventStreamResponse: the client goes away, the server breaks, a cancellation comes from outside; at every point."""

from __future__ import annotations

import asyncio  # noqa: TID251  (what asyncio servers do to a task)
import contextlib
import json
import math
from typing import TYPE_CHECKING

import anyio
import anyio.lowlevel
import pytest
from starlette.background import BackgroundTask

from penstock.asgi.response import EventStreamResponse
from penstock.asgi.sender import FINAL_SEND_TIMEOUT, MAX_SEND
from penstock.errors import PublicError, StreamInterrupted, single_error
from tests.support.asgi import Client, Errors, Log, VirtualLoop, chunks, forever, get, note, on_both, timed

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable

# The client goes away


@on_both
async def test_a_disconnect_cancels_a_silent_source_and_nothing_is_sent_any_more() -> None:
    client, log = Client(), Log()
    ran: list[str] = []
    reasons = []

    async def source() -> AsyncIterator[bytes]:
        try:
            yield b"data: x\n\n"
            client.leave()
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class() as cancelled:
            reasons.append(str(cancelled) + str(getattr(cancelled, "reason", "")))
            raise
        finally:
            with anyio.move_on_after(5, shield=True):
                await anyio.sleep(2)  # long enough for a ping
            log.append("finally")

    await client.get(source(), background=BackgroundTask(note, ran), ping_interval=1)
    assert log == ["finally"]
    assert "client disconnected" in reasons[0]
    assert client.bodies == [b"data: x\n\n"]
    assert not client.complete
    assert not client.late
    assert ran == ["background"]


@on_both
async def test_a_disconnect_before_the_first_chunk_sends_nothing_at_all() -> None:
    client, log = Client(), Log()
    client.leave()
    await client.get(log.source(then=forever))
    assert client.sent == []
    assert log == ["yielded all", "cancelled", "finally"]


@on_both
async def test_a_request_body_that_nobody_read_is_no_disconnect() -> None:
    client = Client(
        "POST",
        request=(
            {"type": "http.request", "body": b"a", "more_body": True},
            {"type": "http.request", "body": b"b", "more_body": False},
        ),
    )
    await client.get(timed((10, b"data: x\n\n")))
    assert client.complete


@on_both
async def test_a_detached_source_runs_to_its_end_and_nothing_more_is_sent() -> None:
    client, log = Client(), Log()
    ran: list[str] = []

    async def source() -> AsyncIterator[bytes]:
        yield b"data: 0\n\n"
        client.leave()
        for number in range(1, 5):
            await anyio.sleep(40)
            log.append(str(number))
            yield b"data: %d\n\n" % number
        log.append("end")

    await client.get(source(), on_disconnect="detach", background=BackgroundTask(note, ran))
    assert log == ["1", "2", "3", "4", "end"]
    assert client.bodies == [b"data: 0\n\n"]
    assert not client.complete
    assert not client.late
    assert ran == ["background"]


@on_both
async def test_a_detached_source_whose_error_nobody_sees_is_reported() -> None:
    client, observer = Client(), Errors()
    client.leave()
    await client.get(timed((10, ValueError("unseen"))), on_disconnect="detach", observer=observer)
    assert client.sent == []
    assert [str(error) for error in observer.errors] == ["unseen"]


@on_both
async def test_a_detached_source_goes_on_although_a_send_hangs() -> None:
    client, log = Client(), Log()
    client.slow = math.inf

    async def leave_later() -> None:
        await anyio.sleep(5)
        client.leave()

    async with anyio.create_task_group() as group:
        group.start_soon(leave_later)
        await client.get(log.source(b"data: a\n\n", b"data: b\n\n"), on_disconnect="detach")
    assert log == ["yielded all", "finally"]


GONE = [ConnectionResetError(), OSError(), anyio.ClosedResourceError(), anyio.BrokenResourceError()]


@pytest.mark.parametrize("error", GONE, ids=lambda error: type(error).__name__)
@on_both
async def test_d17_an_os_error_from_send_is_a_disconnect(error: Exception) -> None:
    client, log, observer = Client(), Log(), Errors()
    ran: list[str] = []
    sends = 0

    async def point(_where: str) -> None:
        nonlocal sends
        sends += _where == "send"
        if sends == 3:
            client.send_raises = error

    client.point = point
    await client.get(log.source(*[b"data: x\n\n"] * 10), observer=observer, background=BackgroundTask(note, ran))
    assert log == ["closed", "finally"]
    assert sends == 3
    assert observer.errors == []
    assert ran == ["background"]


@pytest.mark.parametrize("error", GONE, ids=lambda error: type(error).__name__)
@on_both
async def test_d17_the_same_from_a_ping_cancels_the_source(error: Exception) -> None:
    client, log, observer = Client(), Log(), Errors()

    async def point(_where: str) -> None:
        if len(client.sent) == 2:
            client.send_raises = error

    client.point = point
    await client.get(log.source(b"data: x\n\n", then=forever), observer=observer)
    assert log == ["yielded all", "cancelled", "finally"]
    assert observer.errors == []


@pytest.mark.parametrize("error", GONE, ids=lambda error: type(error).__name__)
@on_both
async def test_d17_a_detached_source_survives_it(error: Exception) -> None:
    client, log = Client(), Log()
    client.send_raises = error
    await client.get(log.source(b"data: x\n\n", b"data: y\n\n"), on_disconnect="detach")
    assert log == ["yielded all", "finally"]


@pytest.mark.parametrize("error", GONE, ids=lambda error: type(error).__name__)
@on_both
async def test_d17_the_same_raised_by_the_source_is_an_error_of_the_source(error: Exception) -> None:
    observer = Errors()
    client = await get(Log().source(b"data: x\n\n", then=error), observer=observer)
    assert client.messages[1].event == "error"
    assert client.messages[2].data == "[DONE]"
    assert observer.errors == [error]


@pytest.mark.parametrize("when", ["chunk", "ping"])
@on_both
async def test_any_other_error_of_send_is_the_servers_and_leaves_bare(when: str) -> None:
    client, log, observer = Client(), Log(), Errors()
    error = RuntimeError("Response content longer than Content-Length")

    async def point(_where: str) -> None:
        if len(client.sent) == 2:
            client.send_raises = error

    client.point = point
    steps = [b"data: x\n\n"] * (5 if when == "chunk" else 1)
    with pytest.raises(RuntimeError) as caught:
        await client.get(log.source(*steps, then=forever), observer=observer)
    assert caught.value is error
    assert log[-1] == "finally"
    assert observer.errors == []
    assert len(client.sent) == 2


@on_both
async def test_an_error_of_the_sources_cleanup_after_a_disconnect_is_reported_and_not_raised() -> None:
    observer = Errors()

    async def untidy(client: Client) -> AsyncIterator[bytes]:
        try:
            client.leave()
            await anyio.sleep_forever()
            yield b""
        finally:
            raise LookupError("untidy")

    async def untidy_in_a_group(client: Client) -> AsyncIterator[bytes]:
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep_forever)
            async for chunk in untidy(client):
                yield chunk  # noqa: ASYNC101, ASYNC119  (not to be imitated, but sources do it)

    async def untidy_beside_a_cancellation(client: Client) -> AsyncIterator[bytes]:
        client.leave()
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class() as cancelled:
            raise BaseExceptionGroup("both", [LookupError("untidy"), cancelled]) from None  # noqa: ASYNC104
        yield b""

    for source in (untidy, untidy_in_a_group, untidy_beside_a_cancellation):
        client = Client()
        observer.errors.clear()
        await client.get(source(client), observer=observer)
        assert len(observer.errors) == 1
        assert str(single_error(observer.errors[0])) == "untidy"
        assert client.sent == []


@on_both
async def test_a_source_that_ignores_its_cancellation_is_heard_no_more() -> None:
    client = Client()

    async def stubborn() -> AsyncIterator[bytes]:
        yield b"data: x\n\n"
        client.leave()
        with contextlib.suppress(anyio.get_cancelled_exc_class()):
            await anyio.sleep_forever()
        yield b"data: still here\n\n"
        raise AssertionError("asked for more")

    await client.get(stubborn())
    assert client.bodies == [b"data: x\n\n"]
    assert not client.late


# A cancellation from outside


@on_both
async def test_d14_a_cancellation_from_outside_reaches_the_source_and_is_raised_after_last_words() -> None:
    client, log, observer = Client(), Log(), Errors()
    ran: list[str] = []
    with anyio.move_on_after(30) as scope:
        await client.get(
            log.source(b"data: x\n\n", then=forever), observer=observer, background=BackgroundTask(note, ran)
        )
    assert scope.cancelled_caught
    assert log == ["yielded all", "cancelled", "finally"]
    *_, event, done = client.messages
    assert (event.event, json.loads(event.data)["code"], done.data) == ("error", "INTERRUPTED", "[DONE]")
    assert client.complete
    assert [type(error) for error in observer.errors] == [StreamInterrupted]
    assert observer.ids == [json.loads(event.data)["error_id"]]
    assert ran == []


def test_a_task_that_an_asyncio_server_cancels_says_so_too() -> None:
    async def check() -> None:
        client, log = Client(), Log()
        response = EventStreamResponse(log.source(b"data: x\n\n", then=forever), observer=Errors())
        task = asyncio.create_task(client.call(response))
        await anyio.sleep(5)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert log == ["yielded all", "cancelled", "finally"]
        assert [message.data for message in client.messages][::2] == ["x", "[DONE]"]
        assert client.complete

    anyio.run(check, backend="asyncio", backend_options={"loop_factory": VirtualLoop})


@on_both
async def test_a_cancellation_before_anything_was_sent_is_a_503() -> None:
    client, observer = Client(), Errors()
    with anyio.move_on_after(1) as scope:
        await client.get(timed((5, b"data: x\n\n")), observer=observer)
    assert scope.cancelled_caught
    assert (client.status, client.headers["retry-after"], client.json["code"]) == (503, "1", "INTERRUPTED")
    assert observer.ids == [client.json["error_id"]]


@on_both
async def test_last_words_do_not_keep_a_cancellation_waiting() -> None:
    client = Client()
    with anyio.move_on_after(30) as scope:
        await client.get(timed((0, b"data: x\n\n"), (20, b"data: y\n\n"), (60, b"")), observer=Errors())
        raise AssertionError("went on")
    assert scope.cancelled_caught

    client = Client()
    start = anyio.current_time()

    async def point(_where: str) -> None:
        client.slow = math.inf if len(client.sent) == 2 else 0

    client.point = point
    with anyio.move_on_after(10) as scope:
        await client.get(timed((0, b"data: x\n\n"), (60, b"")), observer=Errors())
    assert scope.cancelled_caught
    assert anyio.current_time() - start == pytest.approx(10 + FINAL_SEND_TIMEOUT)


@on_both
async def test_last_words_that_the_server_refuses_do_not_replace_the_cancellation() -> None:
    client, observer = Client(), Errors()

    async def point(_where: str) -> None:
        if len(client.sent) == 2:
            client.send_raises = RuntimeError("closing")

    client.point = point
    with anyio.move_on_after(10) as scope:
        await client.get(timed((0, b"data: x\n\n"), (60, b"")), observer=observer)
    assert scope.cancelled_caught
    assert "closing" in observer.warnings[0]


@on_both
async def test_a_source_that_makes_an_error_of_its_cancellation_still_gets_its_last_words_out() -> None:
    observer = Errors()

    async def converts() -> AsyncIterator[bytes]:
        yield b"data: x\n\n"
        try:
            await anyio.sleep_forever()
        except anyio.get_cancelled_exc_class():
            raise PublicError("gave up", "GAVE_UP") from None  # noqa: ASYNC104

    client = Client()
    with anyio.move_on_after(10) as scope:
        await client.get(converts(), observer=observer)
    assert scope.cancelled_caught
    _, event, done = client.messages
    assert (json.loads(event.data)["code"], done.data) == ("GAVE_UP", "[DONE]")
    assert len(observer.errors) == 1


@on_both
async def test_half_a_chunk_is_not_completed_by_last_words_but_a_whole_one_is_followed_by_them() -> None:
    large = b"data: " + b"x" * (3 * MAX_SEND) + b"\n\n"
    for sent, words in ((4, []), (7, ["[DONE]"])):
        client, scope = Client(), anyio.CancelScope()

        async def point(where: str) -> None:
            if where == "send" and len(client.sent) == sent:  # noqa: B023
                scope.cancel()  # noqa: B023

        client.point = point
        with scope:
            await client.get(
                chunks(b"data: first\n\n", large, b"data: last\n\n", b"data: too late\n\n"), observer=Errors()
            )
        assert scope.cancelled_caught
        assert client.complete
        assert [message.data for message in client.messages if message.data == "[DONE]"] == words
        assert client.messages[0].data == "first"
        assert len(client.messages) == (1 if not words else 5)


@on_both
async def test_a_detached_source_is_cancelled_from_outside_as_any_other() -> None:
    client, log, observer = Client(), Log(), Errors()
    client.leave()
    with anyio.move_on_after(30) as scope:
        await client.get(log.source(then=forever), on_disconnect="detach", observer=observer)
    assert scope.cancelled_caught
    assert log == ["yielded all", "cancelled", "finally"]
    assert [type(error) for error in observer.errors] == [StreamInterrupted]
    assert client.sent == []


@on_both
async def test_keyboard_interrupt_is_not_an_outcome_and_leaves_bare() -> None:
    log = Log()
    client = Client()
    with pytest.raises(KeyboardInterrupt):
        await client.get(log.source(b"data: x\n\n", then=KeyboardInterrupt()))
    assert log[-1] == "finally"
    assert not client.complete


@pytest.mark.parametrize("on_disconnect", ["cancel", "detach"])
@on_both
async def test_a_disconnect_during_the_last_send_neither_cuts_it_off_nor_lets_it_hang(on_disconnect: str) -> None:
    for slow, complete in ((FINAL_SEND_TIMEOUT / 2, True), (math.inf, False)):
        client = Client()
        ran: list[str] = []
        start = anyio.current_time()

        async def point(where: str) -> None:
            if where == "send" and len(client.sent) == 2:  # noqa: B023  (the headers and the chunk: this is the last)
                client.leave()  # noqa: B023
                client.slow = slow  # noqa: B023

        client.point = point
        await client.get(chunks(b"data: x\n\n"), on_disconnect=on_disconnect, background=BackgroundTask(note, ran))
        assert anyio.current_time() - start == pytest.approx(min(slow, FINAL_SEND_TIMEOUT))
        assert client.complete == complete
        assert client.late == []
        assert ran == ["background"]


class Stop:
    """Lets something happen at the n-th of the points around `receive`, `send` and the source's steps."""

    def __init__(self, at: int, happen: Callable[[], None]) -> None:
        self.at = at
        self.happen = happen
        self.passed = 0

    @property
    def stopped(self) -> bool:
        return self.passed >= self.at

    async def point(self, _where: str) -> None:
        self.passed += 1
        if self.passed == self.at:
            self.happen()
        await anyio.lowlevel.checkpoint()

    async def source(self, log: Log, end: str) -> AsyncIterator[bytes]:
        log.append("opened")
        try:
            for number in range(3):
                await self.point("before a chunk")
                yield b"data: %d\n\n" % number
                await self.point("after a chunk")
            await anyio.sleep(20)  # long enough for a ping
            if end == "fails":
                raise ValueError
        finally:
            log.append("finally")


@pytest.mark.parametrize("end", ["ends", "fails"])
@on_both
async def test_cancelled_at_every_point_it_cleans_up_says_so_once_and_raises(end: str) -> None:
    for at in range(1, 1000):
        client, log, scope = Client(), Log(), anyio.CancelScope()
        stop = Stop(at, scope.cancel)
        client.point = stop.point
        with scope:
            await client.get(stop.source(log, end), observer=Errors())
            log.append("returned")
        assert log.count("finally") == log.count("opened") <= 1
        assert scope.cancelled_caught != ("returned" in log)
        said = [message.data for message in client.messages if message.event == "error" or message.data == "[DONE]"]
        if not stop.stopped:
            assert (client.complete, len(said)) == (True, 2 if end == "fails" else 0)
            break
        # Whatever was under way, the client gets a whole answer, and is told once. Only where the server had taken the
        # headers when their send was cancelled can nobody know that it has.
        assert said in ([], [said[0], "[DONE]"] if said else [])
        assert client.complete or len(client.sent) == 1
    assert at > 15


@pytest.mark.parametrize("on_disconnect", ["cancel", "detach"])
@pytest.mark.parametrize("end", ["ends", "fails"])
@on_both
async def test_left_by_its_client_at_every_point_it_cleans_up_and_sends_nothing_more(
    on_disconnect: str, end: str
) -> None:
    for at in range(1, 1000):
        client, log = Client(), Log()
        stop = Stop(at, client.leave)
        client.point = stop.point
        await client.get(stop.source(log, end), on_disconnect=on_disconnect, observer=Errors())
        assert log == ["opened", "finally"]
        assert client.late == []
        if not stop.stopped:
            assert client.complete
            break
    assert at > 15
