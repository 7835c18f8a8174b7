"""The supervisor's knobs: each with its name, default, unit and limits, in one table.

`open_supervisor` takes them as keyword arguments, `create_app` passes them on, and the command line makes an option and
an environment variable of each. A value that a knob cannot have is refused by name, before anything starts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from penstock.errors import ConfigurationError
from penstock.sse.dialects import dialect_named

if TYPE_CHECKING:
    from collections.abc import Mapping

MIB = 1024 * 1024


def _setting(default: float, says: str, *, least: float, unit: str, above: bool = False) -> Any:
    """A numeric field; `least` is allowed itself unless the value must be `above` it."""
    return field(default=default, metadata={"says": says, "least": least, "above": above, "unit": unit})


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The knobs of one supervisor.

    Raises:
        ConfigurationError: a knob has a value that it cannot have.
    """

    lease: float = _setting(
        30.0, "how long a silent owner keeps its runs before they count as lost", least=0, above=True, unit="s"
    )
    dialect: str = field(default="plain", metadata={"says": "how control events are spelled: plain or letta"})
    expose_errors: bool = field(default=False, metadata={"says": "show clients the words of every exception"})
    flush_interval: float = _setting(0.0, "how long a commit waits for more entries to join it", least=0, unit="s")
    flush_size: int = _setting(512, "the number of entries that ends that wait", least=1, unit="entries")
    commit_spacing: float = _setting(
        0.002,
        "the most that a commit is held back after the start of the one before; under little load it is less",
        least=0,
        unit="s",
    )
    max_runs: int = _setting(10_000, "the most runs of one process that have not ended", least=1, unit="runs")
    max_duration: float = _setting(
        86_400.0, "the longest that a run may take; 0 = as long as it likes", least=0, unit="s"
    )
    max_metadata_bytes: int = _setting(16 * 1024, "the largest metadata of a run, as JSON", least=2, unit="bytes")
    max_readers: int = _setting(10_000, "the most readers of one process", least=1, unit="readers")
    max_readers_per_run: int = _setting(5_000, "the most of them that read the same run", least=1, unit="readers")
    max_event_bytes: int = _setting(MIB, "the largest encoded event", least=1, unit="bytes")
    max_pending_bytes: int = _setting(
        MIB, "what one run may have uncommitted before its producer waits", least=1, unit="bytes"
    )
    max_process_pending_bytes: int = _setting(64 * MIB, "the same for all runs together", least=1, unit="bytes")
    tail_entries: int = _setting(1000, "the recent entries of a run that are kept at hand", least=1, unit="entries")
    tail_bytes: int = _setting(256 * 1024, "their size", least=1, unit="bytes")
    max_process_tail_bytes: int = _setting(256 * MIB, "the same for all runs together", least=1, unit="bytes")
    cancel_check_interval: float = _setting(
        0.5, "how often cancel requests are looked for, besides the wake-up", least=0, above=True, unit="s"
    )
    cancel_grace: float = _setting(
        10.0, "how long a cancelled producer may take before its run ends without it", least=0, unit="s"
    )
    finalize_timeout: float = _setting(5.0, "how long storing a terminal entry may take", least=0, above=True, unit="s")
    outage_limit: float = _setting(
        30.0,
        "how long the log may be out of reach before runs are given up and readers sent away",
        least=0,
        above=True,
        unit="s",
    )
    drain_timeout: float = _setting(10.0, "how long runs may go on after shutdown was asked for", least=0, unit="s")

    def __post_init__(self) -> None:
        dialect_named(self.dialect)
        if not isinstance(self.expose_errors, bool):  # "false" would count as True, and show what must be hidden
            raise ConfigurationError(f"expose_errors is True or False, not {self.expose_errors!r}")
        for knob in fields(self):
            value = getattr(self, knob.name)
            least = knob.metadata.get("least")
            if least is None:
                continue
            whole = isinstance(knob.default, int)
            if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
                raise ConfigurationError(f"{knob.name} is a {'whole ' if whole else ''}number, not {value!r}")
            above = knob.metadata["above"]
            if not least <= value <= sys.float_info.max or (above and value == least):
                raise ConfigurationError(
                    f"{knob.name} is {'above' if above else 'at least'} {least} {knob.metadata['unit']}, not {value!r}"
                )

    @classmethod
    def of(cls, knobs: Mapping[str, Any]) -> Settings:
        """The settings with these knobs.

        Raises:
            ConfigurationError: a knob is unknown, or has a value that it cannot have.
        """
        known = [knob.name for knob in fields(cls)]
        for name in knobs:
            if name not in known:
                raise ConfigurationError(f"there is no knob {name!r}; there are {', '.join(known)}")
        return cls(**knobs)


def check_duration(name: str, seconds: float | None, *, zero: bool = False) -> None:
    """Check an optional duration that a caller gave.

    Raises:
        ConfigurationError: it is not a finite number of seconds above 0, or from 0 if that is allowed.
    """
    if seconds is None:
        return
    fits = isinstance(seconds, int | float) and not isinstance(seconds, bool) and 0 <= seconds <= sys.float_info.max
    if not fits or (seconds == 0 and not zero):
        raise ConfigurationError(
            f"{name} is a number of seconds {'from' if zero else 'above'} 0, or None, not {seconds!r}"
        )
