"""How many examples Hypothesis tries: PENSTOCK_TEST_PROFILE chooses `full`, or `dev` (the default), a fifth of it."""

from __future__ import annotations

from hypothesis import settings

FULL = 100
"""The `max_examples` of the profile `full`."""


def examples(full: int) -> int:
    """The number of examples, in the chosen profile, of a test that tries `full` ones in the profile `full`."""
    return max(full * settings().max_examples // FULL, 5)
