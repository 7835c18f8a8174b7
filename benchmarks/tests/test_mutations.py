"""The draw of mutations: what may be changed, how, and in what order; and one judged for real."""

from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import TYPE_CHECKING

import pytest
from click.testing import CliRunner

from benchmarks.mutations import ROOT, Judge, Mutation, Package, candidates, drawn, main

if TYPE_CHECKING:
    from pathlib import Path

TESTED = """\
from demo import code

def test_counts():
    assert code.limit(2) and not code.limit(3)
"""


def changes(body: str) -> list[tuple[str, str]]:
    source = f"def f(a, b=1):\n{body}".encode()
    return [
        (each.operator, each.applied(source).decode().partition("\n")[2]) for each in candidates("p", "f.py", source)
    ]


@pytest.mark.parametrize(
    "body, expected",
    [
        ("    x = a < b", [("comparison", "    x = (a <= b)")]),
        ("    x = a is b", [("comparison", "    x = (a is not b)")]),
        ("    x = 'ä'; y = 3", [("constant", f"    x = 'ä'; y = ({number})") for number in (4, 2)]),
        ("    x = a or b", [("and/or", "    x = (a and b)")]),
        ("    x = not a", [("not", "    x = (a)")]),
        ("    return a", [("return", "    return None")]),
        ("    a(\n        b\n    )", [("removed call", "    pass")]),
        ("    await a()", [("removed call", "    pass")]),
        ("    return None", []),
        ("    raise ValueError(f'{a + 1}')", []),
        ("    x: a[1]", []),
        ('    """Text."""', []),
    ],
)
def test_an_operator_changes_one_place(body: str, expected: list[tuple[str, str]]) -> None:
    assert changes(body) == expected


def test_what_runs_at_import_is_not_changed() -> None:
    assert not [*candidates("p", "f.py", b"LIMIT = 3\n@cache(1)\ndef f(a=not 1): pass\n")]


def mutation(package: str, operator: str, line: int) -> Mutation:
    return Mutation(package, f"{package}.py", line, operator, "", "", (0, 0))


def test_the_draw_depends_on_the_seed_and_is_spread_over_packages_and_operators() -> None:
    small = [mutation("small", "not", 1), mutation("small", "return", 2)]
    large = [mutation("large", operator, line) for operator in ("not", "return") for line in range(50)]
    found = {"large": large, "small": small}
    first = [*islice(drawn(found, 1), 8)]
    assert first == [*islice(drawn(found, 1), 8)]
    assert first != [*islice(drawn(found, 2), 8)]
    assert Counter(each.package for each in first) == {"large": 6, "small": 2}
    assert {each.operator for each in first[:4] if each.package == "large"} == {"not", "return"}
    assert len([*drawn(found, 1)]) == 102


@pytest.mark.parametrize(
    "before, after, outcome",
    [
        ("<", "<=", "killed"),
        ("< 3", "!= 3", "survived"),
        ("def", "de", "redrawn"),
    ],
)
def test_a_mutation_is_judged_in_a_copy(tmp_path: Path, before: str, after: str, outcome: str) -> None:
    root, copied = tmp_path / "root", tmp_path / "copy"
    copied.mkdir()
    code = "def limit(number):\n    return number < 3\n"
    for path, text in {"src/demo/code.py": code, "src/demo/__init__.py": "", "tests/test_code.py": TESTED}.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    first = code.index(before)
    changed = Mutation("root", "src/demo/code.py", 1, "test", before, after, (first, first + len(before)))
    found, _ = Judge(root, copied, limit=60, workers=1).verdict(changed, Package([], ["tests/test_code.py"]))
    assert found == outcome
    assert (root / "src/demo/code.py").read_text() == (copied / "src/demo/code.py").read_text() == code


def test_the_draw_can_be_listed() -> None:
    listed = CliRunner().invoke(main, ["--list", "--count", "12"]).stdout.splitlines()
    packages = {path.name for path in (ROOT / "src" / "penstock").iterdir() if (path / "__init__.py").exists()}
    assert {line.split()[0] for line in listed} == {*packages, "root"}
