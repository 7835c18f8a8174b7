"""Corrections of Hypercorn are put in place where they are known and wanted, and step aside elsewhere."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import hypercorn.trio
import hypercorn.trio.run
import trio
from hypercorn.trio.tcp_server import TCPServer

from penstock.server import hypercorn_fixes as corrections
from penstock.server.hypercorn_fixes import PatchedTCPServer
from tests.server.hypercorn_fixes.test_http2 import connected
from tests.support.connections import SOON, served
from tests.support.http2_clients import UNCHECKED, without_window
from tests.support.serving import serving
from tests.support.uncorrected import dying_servers
from tests.support.wire import ids

if TYPE_CHECKING:
    import pytest


def in_place() -> list[Any]:
    """What Hypercorn uses where there is a correction."""
    return [getattr(each.module, each.name) for each in corrections.PATCHES]


def nothing_is_corrected(patch: pytest.MonkeyPatch) -> None:
    """As it is on a version that nobody knows."""
    patch.setattr(corrections, "KNOWN", ())
    for each in corrections.PATCHES:
        patch.setattr(each.module, each.name, each.original)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_on_a_version_that_is_not_known_nothing_is_replaced_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    nothing_is_corrected(monkeypatch)
    async with serving() as server:
        assert ids(await server.read(await server.start("count", 3))) == [1, 2, 3, 4]
        assert in_place() == [each.original for each in corrections.PATCHES]
    (said,) = warnings(caplog)
    for words in (version("hypercorn"), "hold up a shutdown", "memory without a limit", "may end the server"):
        assert words in said


async def test_a_class_that_somebody_else_has_replaced_is_left_alone_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Theirs(TCPServer):
        pass

    monkeypatch.setattr(hypercorn.trio.run, "TCPServer", Theirs)
    async with serving() as server:
        assert ids(await server.read(await server.start("count", 3))) == [1, 2, 3, 4]
        assert in_place() == [Theirs if each.name == "TCPServer" else each.corrected for each in corrections.PATCHES]
    assert warnings(caplog) == ["hypercorn.trio.run.TCPServer has been replaced by somebody else, and is not corrected"]


async def test_what_is_corrected_already_is_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        async with serving():
            assert in_place() == [each.corrected for each in corrections.PATCHES]
    assert not warnings(caplog)


async def test_a_server_that_did_not_ask_for_corrections_behaves_as_it_would_without_penstock() -> None:
    plain, died = dying_servers(hypercorn.trio.serve)
    async with serving() as ours, serving(run=plain, complains=True) as theirs:
        async with connected(ours) as one, connected(theirs) as other:
            for streams in (one, other):
                await streams.blocks(await streams.get("/"), 0)
                await streams.receive()
            assert type(served(one.socket)) is PatchedTCPServer
            assert type(served(other.socket)) is TCPServer
        async with without_window(theirs, **UNCHECKED) as client:
            await client.get("/\xff")
            with trio.fail_after(SOON):
                await theirs.ended.wait()
        assert len(died) == 1
        assert ids(await ours.read(await ours.start("count", 3))) == [1, 2, 3, 4]
