"""Observers for tests: one that records every call, one that fails, and arguments for every hook."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any, Final

import pytest

from penstock.observer import Commit, Figures, NullObserver, Observer, StreamEnd
from penstock.runs import Ending, Run, RunStatus

HOOKS: Final = tuple(name for name in vars(Observer) if not name.startswith("_"))
CONTINUAL: Final = {"committed", "figures"}
RUN: Final = Run("r-1", "agent").ended(Ending(RunStatus.COMPLETED, "end_turn"), seq=3, at=1.0)
SAMPLES: Final[dict[str, tuple[Any, ...]]] = {
    "run_started": (Run("r-1", "agent"),),
    "run_ended": (RUN,),
    "run_cancelled": ("r-1", 0.5),
    "run_fenced": ("r-1",),
    "run_stuck": ("r-1", 10.0, "  File x, line 1"),
    "runs_lost": (["r-1", "r-2"],),
    "stream_started": ("r-1",),
    "stream_ended": (StreamEnd("ended", "r-1", 3, 3, 99, 0.5),),
    "pinged": (),
    "refused": (404, "RUN_NOT_FOUND"),
    "committed": (Commit(1, 3, 99, 0.001),),
    "outage_began": (),
    "outage_ended": (2.5,),
    "figures": (Figures(1, 2, 3, 4, 5, 6),),
    "on_error": (ValueError("oops"),),
    "warning": ("careful",),
}
"""Arguments of each hook; `call` adds the keywords of `on_error`."""
every_hook = pytest.mark.parametrize("hook", HOOKS)


class RecordingObserver(NullObserver):
    """Records every call, in order, as the hook's name and its argument: several as a tuple, none as the empty one."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        for hook in HOOKS:
            setattr(self, hook, partial(self._record, hook))

    def _record(self, hook: str, *args: Any, **kwargs: Any) -> None:
        values = (*args, *kwargs.values())
        self.calls.append((hook, values[0] if len(values) == 1 else values))

    def of(self, hook: str) -> list[Any]:
        return [what for name, what in self.calls if name == hook]

    def counts(self) -> dict[str, int]:
        return dict(Counter(name for name, _ in self.calls if name not in CONTINUAL))


class FailingObserver(NullObserver):
    """Each of its hooks raises; `called` holds the names of those that were called."""

    def __init__(self) -> None:
        self.called: list[str] = []
        for hook in HOOKS:
            setattr(self, hook, self._failing(hook))

    def _failing(self, hook: str) -> Any:
        def fail(*_args: Any, **_kwargs: Any) -> None:
            self.called.append(hook)
            raise ValueError("oops")

        fail.__name__ = hook
        return fail


def call(observer: Observer, hook: str) -> None:
    keywords = {"error_id": "err-7", "where": "run r-1"} if hook == "on_error" else {}
    getattr(observer, hook)(*SAMPLES[hook], **keywords)
