"""Every setting at its limits."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from typing import Any

import pytest

from penstock.errors import ConfigurationError
from penstock.supervisor.settings import Settings, check_duration

NUMBERS = {setting.name: setting for setting in fields(Settings) if "min" in setting.metadata}
ABOVE_ZERO = {"lease", "cancel_check_interval", "finalize_timeout", "outage_limit"}
WHOLE = {name for name, setting in NUMBERS.items() if isinstance(setting.default, int)}


def test_every_setting_has_a_default_and_a_help_text_and_all_but_two_are_numbers() -> None:
    assert all(setting.default is not MISSING and setting.metadata["help"] for setting in fields(Settings))
    assert {setting.name for setting in fields(Settings)} - NUMBERS.keys() == {"dialect", "expose_errors"}
    assert Settings.of({}) == Settings()


def test_the_limits_of_the_numbers_are_zero_one_or_two() -> None:
    limits = {name: setting.metadata["min"] for name, setting in NUMBERS.items()}
    assert {name for name, limit in limits.items() if limit == 0} == NUMBERS.keys() - WHOLE
    assert {name: limit for name, limit in limits.items() if limit > 1} == {"max_metadata_bytes": len("{}")}
    assert {name for name, setting in NUMBERS.items() if setting.metadata["exclusive_min"]} == ABOVE_ZERO


@pytest.mark.parametrize("name", NUMBERS)
def test_a_number_is_within_its_limit_and_else_refused_by_name(name: str) -> None:
    limit, unit = NUMBERS[name].metadata["min"], NUMBERS[name].metadata["unit"]
    good = 1e-9 if name in ABOVE_ZERO else limit
    assert getattr(Settings.of({name: good}), name) == good
    assert getattr(Settings.of({name: 3}), name) == 3
    for bad in (limit - 1, *([0, 0.0, -1e-9] if name in ABOVE_ZERO else [])):
        with pytest.raises(ConfigurationError, match=f"{name} is (at least|above) {limit} {unit}, not {bad}"):
            Settings.of({name: bad})
    for strange in (True, None, "1", [1], math.nan, math.inf, -math.inf, *([1.0] if name in WHOLE else [])):
        with pytest.raises(ConfigurationError, match=f"^{name} is "):
            Settings.of({name: strange})


def test_a_dialect_is_one_that_there_is() -> None:
    assert Settings(dialect="letta").dialect == "letta"
    with pytest.raises(ConfigurationError, match="there is no dialect 'openai'"):
        Settings(dialect="openai")


@pytest.mark.parametrize("value", ["false", "", 0, 1, None])
def test_a_switch_is_a_bool_and_not_something_that_counts_as_one(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="expose_errors is True or False, not"):
        Settings(expose_errors=value)


def test_an_unknown_setting_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="there is no setting 'leese'; there are lease, dialect, "):
        Settings.of({"leese": 3})


def test_a_refusal_is_a_value_error_too() -> None:
    with pytest.raises(ValueError, match="lease is above 0 s"):
        Settings(lease=0)


def test_an_optional_duration_is_none_or_above_zero_or_from_zero_if_that_is_allowed() -> None:
    for seconds in (None, 1, 0.001, 1e9):
        check_duration("timeout", seconds)
    check_duration("timeout", 0, zero=True)


@pytest.mark.parametrize("seconds", [0, 0.0, -1, True, False, "3", math.nan, math.inf, -math.inf])
def test_any_other_optional_duration_is_refused_by_name(seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match="timeout is a number of seconds above 0, or None, not"):
        check_duration("timeout", seconds)
