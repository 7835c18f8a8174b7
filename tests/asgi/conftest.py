"""Fixtures of the tests of the HTTP API."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Any

import jwt.api_jwt
import pytest


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Moves the clock by which links end, by so many seconds."""

    class Later(datetime):
        by = timedelta()

        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return datetime.now(tz) + cls.by

    def passed(seconds: float) -> None:
        Later.by = timedelta(seconds=seconds)

    monkeypatch.setattr(jwt.api_jwt, "datetime", Later)
    return passed
