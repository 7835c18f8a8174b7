"""The fixtures of the suite, for the tests of its tools."""

from tests.conftest import between, server

__all__ = ["between", "server"]
