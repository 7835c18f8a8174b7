"""Observers: how they are notified, and that an exception of one of them does no harm."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest

from penstock import create_app
from penstock.errors import ConfigurationError
from penstock.log.memory import MemoryLog
from penstock.observer import NullObserver, Observer, Observers, new_error_id, notify
from penstock.observer.logging import LoggingObserver
from penstock.observer.prometheus import Metrics
from penstock.supervisor import open_supervisor
from tests.support.observers import HOOKS, SAMPLES, FailingObserver, RecordingObserver, call, every_hook

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock.runs import Run


def test_an_exception_of_a_hook_is_logged_and_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
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
def test_an_exception_that_ends_the_program_passes(error: type[BaseException]) -> None:
    def stop() -> None:
        raise error

    with pytest.raises(error):
        notify(stop)


def test_error_ids_are_short_and_no_two_are_alike() -> None:
    made = {new_error_id() for _ in range(1000)}
    assert len(made) == 1000
    assert all(re.fullmatch(r"err-[0-9a-f]{16}", error_id) for error_id in made)


@pytest.mark.parametrize("make", [NullObserver, LoggingObserver, Metrics, Observers])
def test_every_observer_has_every_hook(make: Callable[[], Observer]) -> None:
    observer = make()
    assert isinstance(observer, Observer)
    for hook in HOOKS:
        call(observer, hook)


@every_hook
def test_observers_are_notified_in_order_whatever_one_raises(hook: str, caplog: pytest.LogCaptureFixture) -> None:
    first, failing, last = RecordingObserver(), FailingObserver(), RecordingObserver()
    call(Observers(first, failing, Observers(last)), hook)
    assert failing.called == [hook]
    values = (*SAMPLES[hook], *(("err-7", "run r-1") if hook == "on_error" else ()))
    assert first.calls == last.calls == [(hook, values[0] if len(values) == 1 else values)]
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
