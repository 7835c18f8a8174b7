"""Draws small faults by a seed, applies each to a copy of the project, and counts how many the tests find.

    python -m benchmarks.mutations                     # or `just mutations`
    python -m benchmarks.mutations --root OLD --packages old.json

A *mutation* changes one expression or statement of `src/penstock` by one of six operators. The draw goes round the
packages, in an order that depends on the seed alone, and within a package round the operators, so that neither a large
package nor a frequent operator takes all. Each mutation is judged by the tests of its own package, `tests/PACKAGE`; the
package `root` is the modules directly in `src/penstock`, judged by the test files directly in `tests`.

A mutation is *killed* if a test fails with it and passes without it, *survives* if all tests pass, and is *undecided*
if the tests take longer than the limit. It is redrawn if its module does not import any more, or if the test that
failed with it fails without it as well. The working tree is never changed.

For a commit with another layout, `--packages` names a JSON file: by package, the source files (`src`) and the test
files (`tests`) that judge them.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple

import click

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

ROOT: Final = Path(__file__).parents[1]
SOURCE: Final = Path("src", "penstock")
COPIED: Final = ("src", "tests", "benchmarks", "docs", "examples", "*.toml", "*.md", "Justfile", ".flake8", "LICENSE*")
SWAPPED: Final[Mapping[type[ast.cmpop], type[ast.cmpop]]] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
}


@dataclass(frozen=True, slots=True)
class Mutation:
    """One change of one file.

    Attributes:
        package: whose tests judge it.
        path: the file, from the project's root.
        line: where the change begins.
        operator: what kind of change it is.
        before: the source that is replaced.
        after: what replaces it.
        span: the bytes that are replaced.
    """

    package: str
    path: str
    line: int
    operator: str
    before: str
    after: str
    span: tuple[int, int]

    def applied(self, source: bytes) -> bytes:
        first, end = self.span
        return source[:first] + self.after.encode() + source[end:]

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.path}:{self.line} {self.operator}: {before[:60]} -> {after[:60]}"


class Package(NamedTuple):
    """Source files, and the tests that judge them; paths from the project's root."""

    src: Sequence[str]
    tests: Sequence[str]


# Drawing


def packages_of(root: Path) -> dict[str, Package]:
    """The packages of the project, by the folders of `src/penstock`."""
    found: dict[str, list[str]] = {}
    for path in sorted((root / SOURCE).rglob("*.py")):
        inner = path.relative_to(root / SOURCE)
        found.setdefault(inner.parts[0] if len(inner.parts) > 1 else "root", []).append(str(path.relative_to(root)))
    flat = sorted(str(path.relative_to(root)) for path in (root / "tests").glob("test_*.py"))
    return {name: Package(files, flat if name == "root" else [f"tests/{name}"]) for name, files in found.items()}


def candidates(package: str, path: str, source: bytes) -> Iterator[Mutation]:
    """All mutations of a file."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node in _mutable(ast.parse(source)):
        for operator, changed in _changes(node):
            assert node.end_lineno is not None
            assert node.end_col_offset is not None
            first = starts[node.lineno - 1] + node.col_offset
            end = starts[node.end_lineno - 1] + node.end_col_offset
            after = ast.unparse(ast.fix_missing_locations(changed))
            if isinstance(node, ast.expr):
                after = f"({after})"
            yield Mutation(package, path, node.lineno, operator, source[first:end].decode(), after, (first, end))


def _mutable(tree: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    """The nodes in functions: no annotations, defaults, decorators, module constants or f-strings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            for statement in node.body:
                yield from _inside(statement)


def _inside(node: ast.AST) -> Iterator[ast.expr | ast.stmt]:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.JoinedStr | ast.Raise):
        return  # functions are visited by themselves; a changed message is no fault
    if isinstance(node, ast.expr | ast.stmt):
        yield node
    for name, value in ast.iter_fields(node):
        if name in {"annotation", "returns", "type_comment"}:
            continue
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, ast.AST):
                yield from _inside(child)


def _changes(node: ast.expr | ast.stmt) -> Iterator[tuple[str, ast.AST]]:
    changed = copy.deepcopy(node)
    match changed:
        case ast.Compare(ops=[operator]) if type(operator) in SWAPPED:
            changed.ops = [SWAPPED[type(operator)]()]
            yield "comparison", changed
        case ast.Constant(value=bool() as flag):
            changed.value = not flag
            yield "constant", changed
        case ast.Constant(value=int() as number):
            for other in (number + 1, number - 1):
                yield "constant", ast.Constant(other)
        case ast.BoolOp(op=operator):
            changed.op = ast.Or() if isinstance(operator, ast.And) else ast.And()
            yield "and/or", changed
        case ast.UnaryOp(op=ast.Not()):
            yield "not", changed.operand
        case ast.IfExp():
            changed.test = ast.UnaryOp(ast.Not(), changed.test)
            yield "not", changed
        case ast.Return(value=ast.expr() as value) if not isinstance(value, ast.Constant):
            changed.value = ast.Constant(None)
            yield "return", changed
        case ast.Expr(value=ast.Call() | ast.Await()):
            yield "removed call", ast.Pass()


def drawn(found: Mapping[str, Sequence[Mutation]], seed: int) -> Iterator[Mutation]:
    """Mutations in the order of the seed: round the packages, within each round the operators."""
    chance = random.Random(seed)
    decks: dict[str, dict[str, list[Mutation]]] = {}
    for package in sorted(found):
        decks[package] = {}
        for mutation in found[package]:
            decks[package].setdefault(mutation.operator, []).append(mutation)
        for deck in decks[package].values():
            chance.shuffle(deck)
    packages = sorted(decks)
    chance.shuffle(packages)
    orders = {package: chance.sample(sorted(decks[package]), len(decks[package])) for package in packages}
    turn = 0
    while any(deck for of in decks.values() for deck in of.values()):
        for package in packages:
            left = [operator for operator in orders[package] if decks[package][operator]]
            if left:
                yield decks[package][left[turn % len(left)]].pop()
        turn += 1


# Judging


class Judge:
    """Applies mutations to a copy of a project and runs tests there."""

    def __init__(self, root: Path, folder: Path, *, limit: float, workers: int) -> None:
        self._root, self._copy, self._limit, self._workers = root, folder, limit, workers
        for pattern in COPIED:
            for path in root.glob(pattern):
                copying = shutil.copytree if path.is_dir() else shutil.copy2
                copying(path, folder / path.name)
        python = root / ".venv" / "bin" / "python"
        self._python = str(python if python.exists() else sys.executable)
        # The copy comes before the project that is installed, in the tests' own processes and in those they start.
        self._environ = {**os.environ, "PYTHONPATH": f"{folder / 'src'}:{folder}", "PYTHONDONTWRITEBYTECODE": "1"}

    def verdict(self, mutation: Mutation, package: Package) -> tuple[str, str]:
        """`killed`, `survived`, `undecided` or `redrawn`, and what it is judged by."""
        path = self._copy / mutation.path
        source = path.read_bytes()
        path.write_bytes(mutation.applied(source))
        try:
            if not self._imports(mutation.path):
                return "redrawn", "it does not import"
            failed = self._failed([each for each in package.tests if (self._copy / each).exists()])
        finally:
            path.write_bytes(source)
        if failed is None:
            return "undecided", f"the tests took over {self._limit:g} s"
        if not failed:
            return "survived", "all tests pass"
        if self._failed(failed) != []:
            return "redrawn", f"{failed[0]} fails without it, too"
        return "killed", failed[0]

    def _imports(self, path: str) -> bool:
        inner = Path(path).relative_to("src").with_suffix("")
        name = ".".join(part for part in inner.parts if part != "__init__")
        done = subprocess.run(
            [self._python, "-c", f"import {name}"], cwd=self._copy, env=self._environ, capture_output=True, check=False
        )
        return done.returncode == 0

    def _failed(self, tests: Sequence[str]) -> list[str] | None:
        """The tests that fail, at most a few; None if there is no result in time."""
        argv = [self._python, "-m", "pytest", *tests, "-x", "-q", "-rfE", "--tb=native", "-p", "no:cacheprovider"]
        argv += ["-n", str(self._workers), "--dist", "loadgroup"]
        process = subprocess.Popen(
            argv,
            cwd=self._copy,
            env=self._environ,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(timeout=self._limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, 9)
            process.wait()
        # xdist shows a test's group behind its name.
        names = re.findall(r"^(?:FAILED|ERROR) (\S+?\.py(?:::.+?)?)(?:@\w+)?(?: - .*)?$", said, re.MULTILINE)
        if process.returncode and not names:
            raise click.ClickException(f"pytest ended with {process.returncode}:\n{said[-2000:]}")
        return names


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--count", type=click.IntRange(min=1), default=15, show_default=True, help="Mutations to judge.")
@click.option("--seed", type=int, default=15, show_default=True, help="What the draw depends on.")
@click.option("--limit", type=float, default=900.0, show_default=True, help="Seconds for the tests of one mutation.")
@click.option("--workers", type=click.IntRange(min=1), default=2, show_default=True, help="pytest's processes.")
@click.option(
    "--root",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    default=ROOT,
    help="The project, with its .venv.  [default: this one]",
)
@click.option(
    "--packages",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="A JSON file that assigns source files and tests to packages, for another layout.",
)
@click.option(
    "--output",
    type=click.Path(dir_okay=False, path_type=Path),
    default=Path("build/mutations.json"),
    show_default=True,
    help="Where the verdicts go.",
)
@click.option("--list", "listing", is_flag=True, help="Show the draw without judging it.")
def main(
    *, count: int, seed: int, limit: float, workers: int, root: Path, packages: Path | None, output: Path, listing: bool
) -> None:
    """Draw faults by a seed and count how many the tests find.

    Each fault changes one expression or statement in a copy of the project and is judged by the tests of its own
    package. One that survives all tests shows behaviour that no test looks at, or a change that has no effect.
    """
    root = root.resolve()
    named = {name: Package(**given) for name, given in json.loads(packages.read_text()).items()} if packages else None
    found = named or packages_of(root)
    pool = {
        name: [each for path in package.src for each in candidates(name, path, (root / path).read_bytes())]
        for name, package in found.items()
    }
    order = drawn({name: mutations for name, mutations in pool.items() if mutations}, seed)
    if listing:
        for _, mutation in zip(range(count), order, strict=False):
            click.echo(f"{mutation.package:10} {mutation}")
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    outcomes: Counter[str] = Counter()
    kept = []
    with tempfile.TemporaryDirectory(prefix="penstock-mutations-") as folder:
        judge = Judge(root, Path(folder), limit=limit, workers=workers)
        for mutation in order:
            began = time.monotonic()
            outcome, by = judge.verdict(mutation, found[mutation.package])
            seconds = time.monotonic() - began
            click.echo(f"{outcome:9} {seconds:5.0f} s  {mutation.package:10} {mutation}\n{'':19}{by}")
            kept.append({**asdict(mutation), "outcome": outcome, "by": by, "seconds": round(seconds, 1)})
            output.write_text(json.dumps({"seed": seed, "mutations": kept}, indent=1) + "\n")
            outcomes[outcome] += outcome != "redrawn"
            if outcomes.total() == count:
                break
    click.echo(f"{outcomes['killed']} of {outcomes.total()} killed, {outcomes['survived']} survived, seed {seed}")


if __name__ == "__main__":
    main()
