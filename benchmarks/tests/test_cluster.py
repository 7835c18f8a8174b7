"""The benchmarks' clusters of Redis, and what processes store in one, and follow, all at the same word."""

from __future__ import annotations

import json
import os
import sys
from typing import TYPE_CHECKING

import psutil
import pytest
from tests.support.redis_clusters import cluster_server

from benchmarks import redis_cluster as starter
from benchmarks import redis_server
from benchmarks.model import Scale
from benchmarks.processes import BenchmarkError
from benchmarks.questions import cluster as question
from benchmarks.redis_cluster import SLOTS, no_cluster, redis_cluster

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from benchmarks.redis_cluster import RedisCluster


@pytest.fixture(scope="module")
def cluster() -> Iterator[RedisCluster]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(redis_server, "redis_executable", lambda: str(cluster_server()))
        with redis_cluster(3) as cluster:
            yield cluster


# Clusters


def test_the_nodes_of_a_cluster_share_all_slots_evenly(cluster: RedisCluster) -> None:
    for node in cluster.nodes:
        ranges = node.client.execute_command("CLUSTER SLOTS")  # type: ignore[no-untyped-call]
        owned = {port: last - first + 1 for first, last, (_, port, *_), *_ in ranges}
        assert owned.keys() == {node.port for node in cluster.nodes}
        assert sum(owned.values()) == SLOTS
        assert max(owned.values()) - min(owned.values()) <= 1
    assert cluster.url == "redis+cluster://" + ",".join(f"127.0.0.1:{node.port}" for node in cluster.nodes)


def test_a_cluster_is_gone_when_the_block_is_left_whatever_has_failed(monkeypatch: pytest.MonkeyPatch) -> None:
    before = {child.pid for child in psutil.Process().children()}
    monkeypatch.setattr(redis_server, "redis_executable", lambda: str(cluster_server()))
    monkeypatch.setattr(starter, "READY_WITHIN", 0)
    with pytest.raises(BenchmarkError, match="2 nodes have not become a cluster within 0 s"), redis_cluster(2):
        pass
    assert {child.pid for child in psutil.Process().children()} <= before


@pytest.mark.parametrize(
    "version, why", [("6.2.14", "there is only Redis 6.2.14"), ("7.0.15", None), ("10.1.0-rc1", None)]
)
def test_clusters_want_redis_7(version: str, why: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "redis-server"
    program.write_text(f"#!/bin/sh\necho 'Redis server v={version} sha=00000000:0 malloc=libc bits=64'\n")
    os.chmod(program, 0o700)  # noqa: PTH101
    monkeypatch.setattr(starter, "redis_executable", lambda: str(program))
    assert no_cluster() == why


def test_what_wants_a_cluster_is_missing_where_there_can_be_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(question, "no_cluster", lambda: "there is only Redis 6")
    with question.cases(Scale(quick=True)) as cases:
        missing = {case.name.startswith(question.ONE): case.missing for case in cases}
    assert missing == {True: None, False: "there is only Redis 6"}


# What is stored in them


@pytest.mark.parametrize("processes, followed", [(2, False), (1, True)], ids=["two", "one that is followed"])
def test_all_nodes_and_all_processes_are_in_the_figures(cluster: RedisCluster, processes: int, followed: bool) -> None:
    figures = question._stored(
        cluster.url, cluster.nodes, runs=12, processes=processes, followed=followed, count=12 * 5
    )
    assert (question.READING in figures, "reader cores" in figures) == (followed, followed)
    assert all(value > 0 for name, value in figures.items() if name != "client asleep")
    assert figures["client asleep"] < 1
    assert [name for name in figures if name.startswith("node")] == [f"node {number}, cores" for number in (1, 2, 3)]
    assert all(node.client.dbsize() for node in cluster.nodes)


def test_what_was_not_followed_to_its_end_is_an_error(cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = ["print('ready', flush=True)", "input()", "print('done', flush=True)"]
    result = {"began": 0, "ended": 1, "busy": 1}

    def claiming(name: str, /, **_: object) -> list[str]:
        told = json.dumps(result | {"events": 9 if name == "jobs.storing" else 8})
        return [sys.executable, "-c", "\n".join([*lines, f"print({told!r})"])]

    monkeypatch.setattr(question, "module", claiming)
    with pytest.raises(BenchmarkError, match="of 9 events 8 were followed"):
        question._stored(cluster.url, cluster.nodes, runs=1, processes=1, followed=True, count=9)


def test_no_process_is_left_when_one_fails(cluster: RedisCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {child.pid for child in psutil.Process().children()}
    lines = {"jobs.storing": ["print('ready', flush=True)", "input()"], "jobs.following": ["raise ValueError('no')"]}
    monkeypatch.setattr(question, "module", lambda name, /, **_: [sys.executable, "-c", "\n".join(lines[name])])
    with pytest.raises(BenchmarkError, match="ValueError: no"):
        question._stored(cluster.url, cluster.nodes, runs=1, processes=1, followed=True, count=9)
    assert {child.pid for child in psutil.Process().children()} <= before
