"""The documentation says what is so: its tables are the code's, its links lead somewhere, the README's program runs."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from penstock.log import PAGE_BYTES, PAGE_ENTRIES

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
GENERATED = runpy.run_path(str(ROOT / "docs" / "generate.py"))["PAGES"]


@pytest.mark.parametrize("name", GENERATED)
def test_a_page_of_tables_is_what_the_code_says(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == GENERATED[name](), "run `just docs`"


def test_the_readme_opens_with_the_two_commands() -> None:
    opening = "python3 -m venv .venv && .venv/bin/pip install -q rust-just && .venv/bin/just {}"
    commands = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith("python3 ")]
    assert commands[:2] == [opening.format("demo"), opening.format("test")]


def test_the_readmes_program_runs(tmp_path: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("2 data: ")
    assert done.stdout.splitlines()[-1] == "completed end_turn"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_pages_on_limits_name_the_codes_own() -> None:
    text = (ROOT / "docs" / "limits.md").read_text()
    assert f"{PAGE_ENTRIES} entries or {PAGE_BYTES // 1024} KiB" in text
