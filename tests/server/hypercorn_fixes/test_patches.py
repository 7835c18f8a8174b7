"""Patches of Hypercorn are in place for the versions that are known and the servers that ask, and nowhere else."""

from __future__ import annotations

import logging
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import hypercorn.trio
import hypercorn.trio.run
from hypercorn.trio.tcp_server import TCPServer

from penstock.server import hypercorn_fixes
from penstock.server.hypercorn_fixes.connection import PatchedTCPServer
from tests.support.connections import served
from tests.support.http2_clients import connected
from tests.support.serving import serving
from tests.support.wire import ids

if TYPE_CHECKING:
    import pytest


def in_place() -> list[Any]:
    """What Hypercorn uses in the places that are patched."""
    return [getattr(each.module, each.name) for each in hypercorn_fixes.PATCHES]


def unknown_version(patch: pytest.MonkeyPatch) -> None:
    """As with a version of Hypercorn that the patches were not made for."""
    patch.setattr(hypercorn_fixes, "VERSIONS", ())
    for each in hypercorn_fixes.PATCHES:
        patch.setattr(each.module, each.name, each.original)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_on_a_version_that_is_not_known_nothing_is_replaced_and_a_warning_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    unknown_version(monkeypatch)
    async with serving() as server:
        assert ids(await server.read(await server.start("count", 3))) == [1, 2, 3, 4]
        assert in_place() == [each.original for each in hypercorn_fixes.PATCHES]
    (said,) = warnings(caplog)
    for part in (version("hypercorn"), "hold up a shutdown", "memory without a limit", "may end the server"):
        assert part in said


async def test_a_class_that_other_code_has_replaced_is_left_alone_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Theirs(TCPServer):
        pass

    monkeypatch.setattr(hypercorn.trio.run, "TCPServer", Theirs)
    async with serving() as server:
        assert ids(await server.read(await server.start("count", 3))) == [1, 2, 3, 4]
        kept = [each.replacement for each in hypercorn_fixes.PATCHES if each.name != "TCPServer"]
        assert in_place() == [*kept, Theirs]
    assert warnings(caplog) == ["hypercorn.trio.run.TCPServer was replaced by other code, and is not patched"]


async def test_patches_that_are_in_place_already_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        async with serving():
            assert in_place() == [each.replacement for each in hypercorn_fixes.PATCHES]
    assert not warnings(caplog)


async def test_a_server_that_did_not_ask_has_hypercorns_own_connections() -> None:
    async with (
        serving() as ours,
        serving(run=hypercorn.trio.serve) as theirs,
        connected(ours) as one,
        connected(theirs) as other,
    ):
        for streams in (one, other):
            await streams.get("/")
            await streams.receive()
        assert type(served(one.socket)) is PatchedTCPServer
        assert type(served(other.socket)) is TCPServer
