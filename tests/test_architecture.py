"""docs/architecture.md says what the code is: its tree, its floors, and the tests that hold the invariants."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "architecture.md").read_text()
PACKAGE = ROOT / "src" / "penstock"


def modules_of_the_page() -> set[str]:
    """The paths in the tree, below src/penstock; packages as `name/`."""
    tree = PAGE.split("```")[1]
    found: set[str] = set()
    folders: list[str] = []
    for line in tree.splitlines()[2:]:
        if match := re.match(r"([│ ]*)[├└]── (\S+)", line):
            depth, name = len(match[1]) // 4, match[2]
            folders[depth:] = [name] if name.endswith("/") else []
            found.add("".join(folders[:depth]) + name)
    return found


def modules_of_the_code() -> set[str]:
    files = {str(path.relative_to(PACKAGE)) for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    packages = {f"{path.parent.relative_to(PACKAGE)}/" for path in PACKAGE.rglob("__init__.py")} - {"./"}
    return files | packages | {"__init__.py"}


def test_the_tree_of_the_page_is_the_tree_of_the_code() -> None:
    assert modules_of_the_page() == modules_of_the_code()


def test_the_floors_of_the_page_are_those_of_the_contract() -> None:
    contracts = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    floors = [floor.replace("penstock.", "") for floor in contracts[0]["layers"]]
    drawn = [re.sub(r"^\d +", "", line) for line in re.findall(r"^\d  .+$", PAGE, re.MULTILINE)]
    assert drawn == floors
    assert len(floors) == 8


def test_every_invariant_has_a_test_of_its_name() -> None:
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    prefixes = re.findall(r"^\| I\d+ \|.*`(test_i\d+_)` \|$", PAGE, re.MULTILINE)
    assert len(prefixes) == 10
    assert [prefix for prefix in prefixes if f"def {prefix}" not in tests] == []
