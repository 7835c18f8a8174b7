"""The supervisor's settings: each with its name, default, unit and limits, in one table."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from penstock.errors import ConfigurationError
from penstock.sse.dialects import dialect_named

if TYPE_CHECKING:
    from collections.abc import Mapping

MIB = 1024 * 1024


def _number(default: float, unit: str, help: str, *, min: float = 1, exclusive_min: bool = False) -> Any:  # noqa: A002
    """A numeric setting of at least `min`, or above it if that is exclusive; a whole number if the default is one."""
    return field(default=default, metadata={"unit": unit, "help": help, "min": min, "exclusive_min": exclusive_min})


def _above_0(default: float, help: str) -> Any:  # noqa: A002
    return _number(default, "s", help, min=0, exclusive_min=True)


def _from_0(default: float, help: str) -> Any:  # noqa: A002
    return _number(default, "s", help, min=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The settings of one supervisor; every one has a default.

    The page "Settings" of the documentation lists them with their units. Durations are in seconds, sizes in bytes.
    Raises `ConfigurationError` if a value is of the wrong type, or outside of its limits.
    """

    lease: float = _above_0(30.0, "how long a silent owner keeps its runs before they count as lost")
    dialect: str = field(default="plain", metadata={"help": "how control events are spelled: plain or letta"})
    expose_errors: bool = field(default=False, metadata={"help": "show clients the text of every exception"})
    flush_interval: float = _from_0(0.0, "how long a commit waits for more entries to join it")
    flush_size: int = _number(512, "entries", "the number of entries that ends that wait")
    commit_spacing: float = _from_0(
        0.002, "the most that a commit is held back after the start of the one before; under little load it is less"
    )
    max_runs: int = _number(10_000, "runs", "the most runs of one process that have not ended")
    max_duration: float = _from_0(86_400.0, "the longest that a run may take; 0 = no limit")
    max_metadata_bytes: int = _number(16 * 1024, "bytes", "the largest metadata of a run, as JSON", min=2)
    max_readers: int = _number(10_000, "readers", "the most readers of one process")
    max_readers_per_run: int = _number(5_000, "readers", "the most of them that read the same run")
    max_event_bytes: int = _number(MIB, "bytes", "the largest encoded event")
    max_pending_bytes: int = _number(MIB, "bytes", "what one run may have uncommitted before its producer waits")
    max_process_pending_bytes: int = _number(64 * MIB, "bytes", "the same for all runs together")
    tail_entries: int = _number(1000, "entries", "the recent entries of a run that are kept in memory")
    tail_bytes: int = _number(256 * 1024, "bytes", "their size")
    max_process_tail_bytes: int = _number(256 * MIB, "bytes", "the same for all runs together")
    cancel_check_interval: float = _above_0(0.5, "how often cancel requests are looked for, besides notifications")
    cancel_grace: float = _from_0(10.0, "how long a cancelled producer may take before its run ends without it")
    finalize_timeout: float = _above_0(5.0, "how long storing a terminal entry may take")
    outage_limit: float = _above_0(
        30.0, "how long the log may be out of reach before runs are given up and readers released"
    )
    drain_timeout: float = _from_0(10.0, "how long runs may go on after a shutdown was requested")

    def __post_init__(self) -> None:
        dialect_named(self.dialect)
        if not isinstance(self.expose_errors, bool):  # "false" would count as True, and show what must be hidden
            raise ConfigurationError(f"expose_errors is True or False, not {self.expose_errors!r}")
        for setting in fields(self):
            if "min" not in setting.metadata:
                continue
            value, least = getattr(self, setting.name), setting.metadata["min"]
            exclusive = setting.metadata["exclusive_min"]
            whole = isinstance(setting.default, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ConfigurationError(f"{setting.name} is a {'whole ' if whole else ''}number, not {value!r}")
            if not least <= value <= sys.float_info.max or (exclusive and value == least):
                limit = f"{'above' if exclusive else 'at least'} {least} {setting.metadata['unit']}"
                raise ConfigurationError(f"{setting.name} is {limit}, not {value!r}")

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Settings:
        """The settings with these values, by name; `ConfigurationError` if there is no such setting."""
        known = [setting.name for setting in fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigurationError(f"there is no setting {name!r}; there are {', '.join(known)}")
        return cls(**values)


def check_duration(name: str, seconds: float | None, *, zero: bool = False) -> None:
    """Raise `ConfigurationError` if a caller's duration is not None or a finite number above 0 (or from `zero`)."""
    if seconds is None:
        return
    fits = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds <= sys.float_info.max
    if not fits or (seconds == 0 and not zero):
        raise ConfigurationError(
            f"{name} is a number of seconds {'from' if zero else 'above'} 0, or None, not {seconds!r}"
        )
