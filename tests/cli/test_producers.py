"""MODULE:ATTRIBUTE: what is loaded, and what is refused with advice."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import pytest

from penstock.cli.producers import load_producers
from tests.support.command_line import EXAMPLE, ran, refused

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(autouse=True)
def _own_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading adds folders to `sys.path`."""
    monkeypatch.setattr(sys, "path", sys.path.copy())


@pytest.mark.parametrize(
    "producers,words",
    [
        ("nope", "'nope' is not MODULE:ATTRIBUTE, such as"),
        ("a-b:producers", "is not MODULE:ATTRIBUTE"),
        ("json:", "is not MODULE:ATTRIBUTE"),
        (".relative:producers", "is not MODULE:ATTRIBUTE"),
        ("no_such_module:producers", "there is no module 'no_such_module'"),
        ("json.nothing:producers", "there is no module 'json.nothing'"),
        ("json.decoder.nothing:producers", "there is no module 'json.decoder.nothing'"),
        ("no/such/file.py:producers", "the file no/such/file.py is not there"),
        ("/:producers", "the file / is a folder"),
        (
            "json:dumps",
            'json:dumps is a function, and must be a mapping of names to producers, such as dumps = {"agent"',
        ),
        ("json:producers", "there is no 'producers' in json; define it there"),
        (f"{EXAMPLE}:producer", "it has producers"),
        ("string:printable", "is a str, and must be a mapping"),
        ("errno:errorcode", "has the key 1"),
    ],
)
def test_wrong_producers_are_refused_with_what_to_do(producers: str, words: str) -> None:
    assert words in refused("serve", "--producers", producers)


def test_a_producer_that_cannot_be_called_is_refused(tmp_path: Path) -> None:
    (tmp_path / "made.py").write_text("producers = {'now': [1, 2, 3]}\n")
    assert "'now' is called once for each run" in refused("serve", "--producers", f"{tmp_path / 'made.py'}:producers")


@pytest.mark.parametrize("by_file", [False, True])
@pytest.mark.parametrize(
    "source,words",
    [
        ("def deep():\n    return 1 / 0\ndeep()\n", "ZeroDivisionError"),
        ("import not_installed\n", "ModuleNotFoundError"),
        ("producers = {\n", "SyntaxError"),
    ],
)
def test_the_traceback_of_the_users_own_module_begins_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, words: str, by_file: bool
) -> None:
    name = f"broken_{words.lower()}"
    (tmp_path / f"{name}.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    where = f"{name}.py" if by_file else name
    result = ran("serve", "--producers", f"{where}:producers")
    assert result.exit_code == 2
    first = next(line for line in result.output.splitlines() if "File" in line)
    assert f"{name}.py" in first
    assert "producers.py" not in result.output
    assert f"importing '{where}' failed: {words}" in result.output


def test_a_file_can_import_its_neighbours(tmp_path: Path) -> None:
    (tmp_path / "the_neighbour.py").write_text("producers = {'a': print}\n")
    (tmp_path / "the_file.py").write_text("from the_neighbour import producers\n")
    assert load_producers(f"{tmp_path}/the_file.py:producers") == {"a": print}
