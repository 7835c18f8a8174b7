"""Everything that `penstock` exports is documented: each class, function, public method, and each argument of it."""

from __future__ import annotations

import inspect
import re
from typing import TYPE_CHECKING, Any

import pytest

import penstock

if TYPE_CHECKING:
    from collections.abc import Iterator

PROTOCOLS = (penstock.EventLog, penstock.Observer, penstock.Authorizer)
"""What is documented there need not be repeated in the classes that implement it."""

NOT_CONSTRUCTED_BY_USERS = {"Follower", "RunWriter", "Supervisor"}
LISTED_ELSEWHERE = {"Settings"}
"""docs/settings.md documents the fields, from their metadata."""


def callables(name: str) -> Iterator[tuple[str, Any, str]]:
    """What a public name offers: its dotted name, the function or class, and all documentation of its arguments."""
    exported = getattr(penstock, name)
    if name not in NOT_CONSTRUCTED_BY_USERS | LISTED_ELSEWHERE:
        yield name, exported, exported.__doc__ or ""
    if not inspect.isclass(exported):
        return
    for method, value in inspect.getmembers(exported):
        if method.startswith("_") or not defined_here(exported, method):
            continue
        protocol = next((each for each in PROTOCOLS if exported is not each and hasattr(each, method)), None)
        text = inspect.getdoc(value) or (protocol and inspect.getdoc(getattr(protocol, method))) or ""
        yield f"{name}.{method}", value, text


def defined_here(cls: type, name: str) -> bool:
    """Whether penstock itself defines this function or property of the class."""
    owner = next(each for each in cls.__mro__ if name in vars(each))
    value = inspect.unwrap(getattr(vars(owner)[name], "__func__", vars(owner)[name]))
    return owner.__module__.startswith("penstock") and (inspect.isfunction(value) or isinstance(value, property))


def arguments(function: Any) -> list[str]:
    if isinstance(function, property) or (inspect.isclass(function) and issubclass(function, Exception)):
        return []
    if inspect.isclass(function) and (hasattr(function, "__members__") or getattr(function, "_is_protocol", False)):
        return []
    names = [each for each in inspect.signature(function).parameters if each not in {"self", "cls", "args", "kwargs"}]
    return [name.lstrip("_") for name in names]


@pytest.mark.parametrize("name", penstock.__all__)
def test_what_penstock_exports_is_documented_with_its_arguments(name: str) -> None:
    lacking = []
    for dotted, function, text in callables(name):
        if not text:
            lacking.append(f"{dotted} has no docstring")
        elif len(names := arguments(function)) > 1:
            lacking += [f"{dotted}: {each}" for each in names if not re.search(rf"(?m)^ *{each}:|`{each}`", text)]
    assert not lacking
