"""Describes the machine and the versions of the measured software."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

import psutil

from benchmarks.redis_server import redis_executable

PACKAGES: Final = (
    "penstock",
    "trio",
    "anyio",
    "hypercorn",
    "starlette",
    "redis",
    "hiredis",
    "trio-asyncio",
    "uvicorn",
    "uvloop",
    "httptools",
    "sse-starlette",
    "fastapi",
    "assistant-stream",
)
NODE_PACKAGES: Final = Path(__file__).parent / "servers" / "durable" / "package.json"
"""Pins the versions of the packages from npm."""


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0))


def described() -> dict[str, str]:
    """The machine and the installed versions, by name."""
    memory = psutil.virtual_memory().total / 1024**3
    found = {
        "machine": f"{_processor()}, {cores()} cores, {memory:.0f} GiB, {platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not there"
    found["redis-server"] = _said(redis_executable(), "--version").partition("v=")[2].partition(" ")[0]
    found["node"] = _said("node", "--version") if shutil.which("node") else "not there"
    found.update(json.loads(NODE_PACKAGES.read_text())["dependencies"])
    return found


def _said(*argv: str) -> str:
    return subprocess.run(argv, check=True, capture_output=True, text=True).stdout.strip()


def _processor() -> str:
    """The processor's name, or the architecture if the system does not name it."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
