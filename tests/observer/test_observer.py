"""Observers: what they are told, and that none of them can do harm."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, Final

import pytest

from penstock import create_app
from penstock.errors import ConfigurationError
from penstock.log.memory import MemoryLog
from penstock.observer import (
    HOOKS,
    Commit,
    Figures,
    NullObserver,
    Observer,
    Observers,
    StreamEnd,
    new_error_id,
    notify,
)
from penstock.observer.logging import LoggingObserver
from penstock.observer.prometheus import Metrics
from penstock.runs import Ending, Run, RunStatus
from penstock.supervisor import open_supervisor

if TYPE_CHECKING:
    from collections.abc import Callable

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
"""What each hook may be told; `on_error` has keywords beside it."""
every_hook = pytest.mark.parametrize("hook", HOOKS)


class Told(NullObserver):
    """Writes down whatever it is told, in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        """Hooks, each with what it was told: nothing, the thing itself, or several as a tuple."""

    def of(self, hook: str) -> list[Any]:
        return [what for name, what in self.calls if name == hook]

    def counts(self) -> dict[str, int]:
        """How often each hook was called, but for those that are called all the time."""
        return dict(Counter(name for name, _ in self.calls if name not in CONTINUAL))


class Clumsy(NullObserver):
    """One of whose hooks raises."""

    def __init__(self, hook: str) -> None:
        def fails(*_args: Any, **_kwargs: Any) -> None:
            self.asked += 1
            raise ValueError("oops")

        self.asked = 0
        fails.__name__ = hook
        setattr(self, hook, fails)


def _notes(hook: str) -> Callable[..., None]:
    def note(self: Told, *args: Any, **kwargs: Any) -> None:
        what = (*args, *kwargs.values())
        self.calls.append((hook, what[0] if len(what) == 1 else what))

    return note


for _hook in HOOKS:
    setattr(Told, _hook, _notes(_hook))


def call(observer: Observer, hook: str) -> None:
    keywords = {"error_id": "err-7", "where": "run r-1"} if hook == "on_error" else {}
    getattr(observer, hook)(*SAMPLES[hook], **keywords)


# Telling one


def test_a_hook_is_called_with_what_it_is_told() -> None:
    told: list[Any] = []

    def hook(*args: Any, **kwargs: Any) -> None:
        told.append((args, kwargs))

    notify(hook, 1, two=2)
    assert told == [((1,), {"two": 2})]


def test_what_a_hook_raises_is_logged_and_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    def clumsy(_: str) -> None:
        raise ValueError("oops")

    notify(clumsy, "x")
    (record,) = caplog.records
    assert (record.name, record.levelname, record.getMessage()) == ("penstock", "ERROR", "the observer's clumsy failed")
    assert record.exc_info is not None
    assert str(record.exc_info[1]) == "oops"


def test_a_hook_without_a_name_may_fail_as_well(caplog: pytest.LogCaptureFixture) -> None:
    class Nameless:
        def __call__(self) -> None:
            raise ValueError("oops")

        def __repr__(self) -> str:
            return "<nameless>"

    notify(Nameless())
    assert caplog.messages == ["the observer's <nameless> failed"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_what_ends_the_program_is_not_held_back(error: type[BaseException]) -> None:
    def stop() -> None:
        raise error

    with pytest.raises(error):
        notify(stop)


def test_error_ids_are_short_and_no_two_are_alike() -> None:
    made = {new_error_id() for _ in range(1000)}
    assert len(made) == 1000
    assert all(re.fullmatch(r"err-[0-9a-f]{16}", error_id) for error_id in made)


# Who is an observer


@every_hook
@pytest.mark.parametrize("make", [NullObserver, LoggingObserver, Metrics, Observers, Told])
def test_every_observer_can_be_told_everything(make: Callable[[], Observer], hook: str) -> None:
    observer = make()
    assert isinstance(observer, Observer)
    call(observer, hook)


@every_hook
def test_several_observers_are_told_the_same_in_order_whatever_one_of_them_does(
    hook: str, caplog: pytest.LogCaptureFixture
) -> None:
    first, clumsy, last = Told(), Clumsy(hook), Told()
    call(Observers(first, clumsy, Observers(last)), hook)
    assert clumsy.asked == 1
    assert first.calls == last.calls
    assert [name for name, _ in first.calls] == [hook]
    told = first.calls[0][1]
    if hook == "on_error":
        assert told == (*SAMPLES[hook], "err-7", "run r-1")
    else:
        assert (told if isinstance(told, tuple) else (told,)) == SAMPLES[hook]
    assert caplog.messages == [f"the observer's {hook} failed"]


@pytest.mark.parametrize("metrics", [False, True])
async def test_an_observer_without_some_hook_is_refused(metrics: bool) -> None:
    class Incomplete:
        def run_started(self, run: Run) -> None:
            """Nothing else."""

    incomplete: Any = Incomplete()
    with pytest.raises(ConfigurationError, match="an observer has every hook"):
        async with open_supervisor(MemoryLog(), observer=incomplete):
            pass
    with pytest.RaisesGroup(ConfigurationError, allow_unwrapped=True, flatten_subgroups=True):
        app = create_app({}, observer=incomplete, metrics=metrics)
        async with app.router.lifespan_context(app):
            pass
