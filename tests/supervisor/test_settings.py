"""Every knob at its edge."""

from __future__ import annotations

import math
from dataclasses import MISSING, fields
from typing import Any

import pytest

from penstock.errors import ConfigurationError
from penstock.supervisor.settings import Settings, check_duration

ABOVE_ZERO = ["lease", "cancel_check_interval", "finalize_timeout", "outage_limit"]
FROM_ZERO = ["flush_interval", "commit_spacing", "cancel_grace", "drain_timeout", "max_duration"]
WHOLE = [
    "flush_size",
    "max_runs",
    "max_readers",
    "max_readers_per_run",
    "max_event_bytes",
    "max_pending_bytes",
    "max_process_pending_bytes",
    "tail_entries",
    "tail_bytes",
    "max_process_tail_bytes",
]
NUMBERS = [*ABOVE_ZERO, *FROM_ZERO, *WHOLE, "max_metadata_bytes"]


def test_the_defaults_are_those_of_the_documentation() -> None:
    mib = 1024 * 1024
    settings = Settings()
    assert {knob.name: getattr(settings, knob.name) for knob in fields(Settings)} == {
        "lease": 30.0,
        "dialect": "plain",
        "expose_errors": False,
        "flush_interval": 0.0,
        "flush_size": 512,
        "commit_spacing": 0.002,
        "max_runs": 10_000,
        "max_duration": 86_400.0,
        "max_metadata_bytes": 16 * 1024,
        "max_readers": 10_000,
        "max_readers_per_run": 5_000,
        "max_event_bytes": mib,
        "max_pending_bytes": mib,
        "max_process_pending_bytes": 64 * mib,
        "tail_entries": 1000,
        "tail_bytes": 256 * 1024,
        "max_process_tail_bytes": 256 * mib,
        "cancel_check_interval": 0.5,
        "cancel_grace": 10.0,
        "finalize_timeout": 5.0,
        "outage_limit": 30.0,
        "drain_timeout": 10.0,
    }


def test_every_knob_says_what_it_is_and_has_a_test_at_its_edge() -> None:
    assert {knob.name for knob in fields(Settings)} == {*NUMBERS, "dialect", "expose_errors"}
    for knob in fields(Settings):
        assert knob.metadata["says"]
        assert knob.default is not MISSING


@pytest.mark.parametrize("name", ABOVE_ZERO)
def test_a_duration_that_must_be_above_zero_is_not_zero(name: str) -> None:
    assert getattr(Settings.of({name: 1e-9}), name) == 1e-9
    for value in (0, 0.0, -1e-9):
        with pytest.raises(ConfigurationError, match=f"{name} is above 0 s, not {value}"):
            Settings.of({name: value})


@pytest.mark.parametrize("name", FROM_ZERO)
def test_a_duration_may_be_zero_and_not_below(name: str) -> None:
    assert getattr(Settings.of({name: 0}), name) == 0
    with pytest.raises(ConfigurationError, match=f"{name} is at least 0 s, not -1e-09"):
        Settings.of({name: -1e-9})


@pytest.mark.parametrize("name", WHOLE)
def test_a_size_is_at_least_one_and_whole(name: str) -> None:
    assert getattr(Settings.of({name: 1}), name) == 1
    with pytest.raises(ConfigurationError, match=f"{name} is at least 1 (bytes|entries|runs|readers), not 0"):
        Settings.of({name: 0})
    with pytest.raises(ConfigurationError, match=f"{name} is a whole number, not 1.0"):
        Settings.of({name: 1.0})


def test_metadata_may_at_least_be_empty() -> None:
    assert Settings.of({"max_metadata_bytes": len("{}")}).max_metadata_bytes == 2
    with pytest.raises(ConfigurationError, match="max_metadata_bytes is at least 2 bytes, not 1"):
        Settings.of({"max_metadata_bytes": 1})


@pytest.mark.parametrize("value", [True, None, "1", math.nan, math.inf, -math.inf, [1]])
@pytest.mark.parametrize("name", NUMBERS)
def test_what_is_no_finite_number_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name} is "):
        Settings.of({name: value})


@pytest.mark.parametrize("name", [*ABOVE_ZERO, *FROM_ZERO])
def test_a_duration_may_be_a_whole_number(name: str) -> None:
    assert getattr(Settings.of({name: 3}), name) == 3


@pytest.mark.parametrize("dialect", ["plain", "letta"])
def test_a_dialect_is_one_that_there_is(dialect: str) -> None:
    assert Settings(dialect=dialect).dialect == dialect


def test_a_dialect_that_there_is_not_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="there is no dialect 'openai'"):
        Settings(dialect="openai")


@pytest.mark.parametrize("value", ["false", "", 0, 1, None])
def test_a_switch_is_a_bool_and_not_something_that_counts_as_one(value: Any) -> None:
    with pytest.raises(ConfigurationError, match="expose_errors is True or False, not"):
        Settings(expose_errors=value)


def test_an_unknown_knob_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigurationError, match="there is no knob 'leese'; there are lease, dialect, "):
        Settings.of({"leese": 3})


def test_no_knobs_are_the_defaults() -> None:
    assert Settings.of({}) == Settings()


def test_a_refusal_is_a_value_error_too() -> None:
    with pytest.raises(ValueError, match="lease is above 0 s"):
        Settings(lease=0)


@pytest.mark.parametrize("seconds", [None, 1, 0.001, 1e9])
def test_an_optional_duration_is_none_or_above_zero(seconds: float | None) -> None:
    check_duration("timeout", seconds)


@pytest.mark.parametrize("seconds", [0, 0.0, -1, True, False, "3", math.nan, math.inf, -math.inf])
def test_any_other_optional_duration_is_refused_by_name(seconds: Any) -> None:
    with pytest.raises(ConfigurationError, match="timeout is a number of seconds above 0, or None, not"):
        check_duration("timeout", seconds)
