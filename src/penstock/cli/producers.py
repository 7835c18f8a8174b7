"""Loads the producers that a command line names: `MODULE:ATTRIBUTE` or `path/to/file.py:ATTRIBUTE`.

The attribute is a mapping of names to producers. A wrong name is a `ConfigurationError`, whose message says what to do.
What the module itself raises while it is imported is a `ModuleFailed`, whose traceback begins in the module.
"""

from __future__ import annotations

import difflib
import sys
import traceback
from collections.abc import Mapping
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType


class ModuleFailed(Exception):
    """The module raised while it was imported; `traceback` begins with the module's own first frame."""

    def __init__(self, name: str, error: Exception) -> None:
        super().__init__(f"importing {name!r} failed: {type(error).__name__}: {error}")
        frames = error.__traceback__
        while frames is not None and _imports(frames.tb_frame.f_code.co_filename):
            frames = frames.tb_next
        self.traceback = "".join(traceback.format_exception(error.with_traceback(frames)))


def load_producers(name: str) -> Mapping[str, Callable[..., Any]]:
    """Load the producers that `MODULE:ATTRIBUTE` (from the working directory, too) or `FILE.py:ATTRIBUTE` names."""
    where, _, attribute = name.rpartition(":")
    is_file = where.endswith(".py") or "/" in where
    if not attribute.isidentifier() or not (is_file or all(each.isidentifier() for each in where.split("."))):
        raise ConfigurationError(
            f"{name!r} is not MODULE:ATTRIBUTE, such as mypackage.agents:producers or agents.py:producers"
        )
    module = _import_file(Path(where)) if is_file else _import_module(where)
    try:
        producers = getattr(module, attribute)
    except AttributeError:
        raise ConfigurationError(f"there is no {attribute!r} in {where}{_advice(module, attribute)}") from None
    example = f'{attribute} = {{"agent": agent}}, with an async generator function agent(input)'
    if not isinstance(producers, Mapping):
        kind = type(producers).__name__
        raise ConfigurationError(f"{name} is a {kind}, and must be a mapping of names to producers, such as {example}")
    for each, producer in producers.items():
        if not isinstance(each, str) or not each:
            raise ConfigurationError(f"{name} has the key {each!r}; a producer's name is a string, such as {example}")
        if not callable(producer):
            raise ConfigurationError(
                f"{name}: the producer {each!r} is called once for each run, and {producer!r} cannot be; "
                "give the function itself, or a lambda that makes the source"
            )
    return producers


def _advice(module: ModuleType, attribute: str) -> str:
    mappings = [name for name, value in vars(module).items() if isinstance(value, dict) and not name.startswith("_")]
    if close := difflib.get_close_matches(attribute, mappings, n=1, cutoff=0.5) or mappings:
        return f"; it has {', '.join(sorted(close))}"
    return f"; define it there, as in {attribute} = {{'agent': agent}}"


def _import_module(name: str) -> ModuleType:
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        # Not pkgutil.resolve_name: an AttributeError of the module would look like an attribute that is missing.
        return import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):  # something that the module imports
            raise ModuleFailed(name, error) from error
        raise ConfigurationError(
            f"there is no module {error.name!r}; it is looked for in {Path.cwd()} and where Python's packages are. "
            "Check the spelling, install it, or give the path of a .py file"
        ) from None
    except Exception as error:
        raise ModuleFailed(name, error) from error


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        what = "a folder" if path.is_dir() else "not there"
        raise ConfigurationError(f"the file {path} is {what}; give the path of a .py file (from {Path.cwd()})")
    spec = spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ConfigurationError(f"the file {path} is no Python module: its name must end in .py")
    sys.path.insert(0, str(path.parent.resolve()))
    module = module_from_spec(spec)
    sys.modules.setdefault(path.stem, module)  # as its dataclasses and pickles expect; never over another module
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ModuleFailed(str(path), error) from error
    return module


def _imports(file: str) -> bool:
    return file == __file__ or file.startswith("<frozen importlib") or "importlib" in Path(file).parts
