"""A commit's files and the Python that it is installed for, so that two commits can be measured side by side.

`HERE` is the working tree. `built` extracts another commit into a temporary folder and installs it into a virtual
environment there, with the versions that are installed here: the two differ in penstock's own code, not in its
dependencies. Jobs and servers run with the checkout as their working directory, so that `python -m benchmarks.jobs.X`
is the commit's own job, with the commit's own imports. The questions, the load generator and Redis are those of the
working tree.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import tomllib
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.processes import BenchmarkError, Server, job, module, penstock, serving

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager

ROOT: Final = Path(__file__).parents[1]
JOBS_NEED: Final = ("psutil",)
"""What the commit's jobs import besides penstock and its dependencies."""


@dataclass(frozen=True, slots=True)
class Checkout:
    """What is measured: `python` imports penstock from the folder `root`."""

    name: str
    root: Path
    python: str = sys.executable

    def job(self, name: str, /, **options: Any) -> dict[str, Any]:
        """Run a job of the checkout and return its figures.

        Raises:
            BenchmarkError: the checkout has no such job, or it failed.
        """
        self._require(name)
        return job([self.python, *module(name, **options)[1:]], cwd=self.root)

    def server(self, name: str, /, **options: Any) -> AbstractContextManager[Server]:
        """Start a server of the checkout's benchmarks; it ends with the block."""
        self._require(name)
        return serving([self.python, *module(name, **options)[1:]], cwd=self.root)

    def penstock(self, **settings: Any) -> AbstractContextManager[Server]:
        """Start `penstock serve`; it ends with the block."""
        return serving([self.python, *penstock(**settings)[1:]], cwd=self.root)

    def _require(self, name: str) -> None:
        path = self.root.joinpath("benchmarks", *name.split(".")).with_suffix(".py")
        if not path.exists():
            raise BenchmarkError(f"{self.name} has no {path.relative_to(self.root)}")


HERE: Final = Checkout("this", ROOT)


@contextmanager
def built(commit: str, say: Callable[[str], None]) -> Iterator[Checkout]:
    """Extract and install a commit in a temporary folder, which is removed with the block.

    Args:
        commit: anything that git resolves to a commit.
        say: called with what is done next.

    Raises:
        BenchmarkError: git does not know the commit, or it cannot be installed.
    """
    sha = _run(["git", "-C", str(ROOT), "rev-parse", "--verify", f"{commit}^{{commit}}"]).decode().strip()
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as folder:
        root, venv, pins = Path(folder, "checkout"), Path(folder, "venv"), Path(folder, "constraints.txt")
        say(f"extracting {sha[:9]}")
        with tarfile.open(fileobj=io.BytesIO(_run(["git", "-C", str(ROOT), "archive", sha]))) as archive:
            archive.extractall(root, filter="data")
        say(f"installing {sha[:9]}")
        _run([sys.executable, "-m", "venv", str(venv)])
        python = str(venv / "bin" / "python")
        pins.write_text("".join(f"{pin}\n" for pin in _pins()))
        pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        _run([*pip, "--constraint", str(pins), "--editable", _requirement(root), *JOBS_NEED])
        found = _run([python, "-c", "import penstock; print(penstock.__file__)"], cwd=root).decode().strip()
        if not Path(found).is_relative_to(root):  # PYTHONPATH, say
            raise BenchmarkError(f"{sha[:9]} would import penstock from {found}")
        yield Checkout(sha[:9], root, python)


def _requirement(root: Path) -> str:
    """The checkout with all of its extras, if it has any."""
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"].get("optional-dependencies", {})
    return f"{root}[{','.join(extras)}]" if extras else str(root)


def _pins() -> list[str]:
    """The versions that are installed here, without penstock's own."""
    return sorted(f"{each.name}=={each.version}" for each in distributions() if each.name != "penstock")


def _run(argv: Sequence[str], *, cwd: Path | None = None) -> bytes:
    """Run a command and return its output.

    Raises:
        BenchmarkError: it failed, or does not exist.
    """
    try:
        done = subprocess.run(argv, cwd=cwd, capture_output=True, check=False)
    except FileNotFoundError as error:
        raise BenchmarkError(f"{argv[0]} is not installed") from error
    if done.returncode:
        raise BenchmarkError(f"{' '.join(argv)} failed:\n{done.stderr.decode(errors='replace').strip()}")
    return done.stdout
