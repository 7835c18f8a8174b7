"""Leaving a nursery with one exception as if there had been no nursery."""

from __future__ import annotations

import gc
import weakref
from typing import NoReturn

import pytest

from penstock.exception_groups import is_cancellation, raise_single, reraise, split_cancelled


class Cancelled(BaseException):
    """What an event loop cancels with."""


def left_by(group: BaseExceptionGroup[BaseException]) -> BaseException:
    try:
        try:
            raise group
        except BaseExceptionGroup as caught:
            raise_single(caught, Cancelled)
    except BaseException as error:  # noqa: ASYNC103, BLE001
        return error  # noqa: ASYNC104


ERROR = ValueError("mine")
OTHER = KeyError("other")
CANCELLED = Cancelled()
INNER = ExceptionGroup("the body's own", [ERROR, OTHER])
ALL_CANCELLED = BaseExceptionGroup("", [CANCELLED, BaseExceptionGroup("", [Cancelled()])])


@pytest.mark.parametrize(
    "group, bare",
    [
        (BaseExceptionGroup("", [ERROR]), ERROR),
        (BaseExceptionGroup("", [CANCELLED]), CANCELLED),
        (BaseExceptionGroup("", [CANCELLED, ERROR, Cancelled()]), ERROR),
        (BaseExceptionGroup("", [ERROR, ALL_CANCELLED]), ERROR),
        (BaseExceptionGroup("", [INNER]), INNER),
        (BaseExceptionGroup("", [CANCELLED, INNER]), INNER),
        (BaseExceptionGroup("", [KeyboardInterrupt()]), None),
        (BaseExceptionGroup("", [CANCELLED, Cancelled()]), CANCELLED),
    ],
)
def test_the_one_exception_leaves_bare(group: BaseExceptionGroup[BaseException], bare: BaseException | None) -> None:
    assert left_by(group) is (bare or group.exceptions[0])


def test_several_exceptions_stay_together() -> None:
    group = BaseExceptionGroup("", [ERROR, OTHER])
    assert left_by(group) is group


def test_the_exception_keeps_its_cause_and_its_context() -> None:
    error = ValueError("mine")
    error.__cause__, error.__context__ = OTHER, CANCELLED
    assert left_by(BaseExceptionGroup("", [error])) is error
    assert (error.__cause__, error.__context__) == (OTHER, CANCELLED)


def test_an_exception_without_a_context_gets_none() -> None:
    error = ValueError("mine")
    left_by(BaseExceptionGroup("", [error]))
    assert error.__context__ is None


def test_the_traceback_still_says_where_it_was_raised() -> None:
    def culprit() -> NoReturn:
        raise ValueError("mine")

    try:
        culprit()
    except ValueError as raised:
        error = left_by(BaseExceptionGroup("", [raised]))
    assert error.__traceback__ is not None
    names = []
    step = error.__traceback__
    while step is not None:
        names.append(step.tb_frame.f_code.co_name)
        step = step.tb_next  # type: ignore[assignment]
    assert names[-1] == "culprit"


def test_no_reference_cycle_is_made() -> None:
    class MineError(ValueError):
        pass

    def leave() -> weakref.ref[MineError]:
        error = MineError()
        try:
            try:
                raise BaseExceptionGroup("", [error])  # noqa: TRY301
            except BaseExceptionGroup as group:
                raise_single(group, Cancelled)
        except MineError:
            return weakref.ref(error)
        finally:
            del error

    gc.collect()
    gc.disable()
    try:
        assert leave()() is None
    finally:
        gc.enable()


def test_raise_unchanged_keeps_the_context_whatever_is_being_handled() -> None:
    error = ValueError("mine")
    with pytest.raises(ValueError, match="mine"):  # noqa: PT012
        try:
            raise OTHER
        except KeyError:
            reraise(error)
    assert error.__context__ is None


@pytest.mark.parametrize(
    "error, answer",
    [
        (CANCELLED, True),
        (ALL_CANCELLED, True),
        (ERROR, False),
        (INNER, False),
        (BaseExceptionGroup("", [CANCELLED, ERROR]), False),
    ],
)
def test_a_cancellation_is_one_or_a_group_of_nothing_else(error: BaseException, answer: bool) -> None:
    assert is_cancellation(error, Cancelled) is answer


@pytest.mark.parametrize(
    "error, cancelled, rest",
    [
        (CANCELLED, CANCELLED, None),
        (ERROR, None, ERROR),
        (ALL_CANCELLED, CANCELLED, None),
        (BaseExceptionGroup("", [BaseExceptionGroup("", [CANCELLED])]), CANCELLED, None),
    ],
)
def test_what_is_a_cancellation_and_what_is_not_are_parted(
    error: BaseException, cancelled: BaseException | None, rest: BaseException | None
) -> None:
    assert split_cancelled(error, Cancelled) == (cancelled, rest)


def test_a_mixed_group_is_parted_into_one_cancellation_and_a_group_of_the_rest() -> None:
    cancelled, rest = split_cancelled(BaseExceptionGroup("", [CANCELLED, ERROR, Cancelled()]), Cancelled)
    assert cancelled is CANCELLED
    assert isinstance(rest, ExceptionGroup)
    assert rest.exceptions == (ERROR,)
