"""The readers of one process: how many there may be, and what they have been handed. Synchronous, and a few numbers."""

from __future__ import annotations

from collections import Counter

from penstock.errors import TooManyReaders, TooManyReadersOfRun


class Readers:
    """Counts the readers, and refuses one too many.

    Args:
        most: how many there may be.
        most_of_a_run: how many of them may read the same run.
    """

    def __init__(self, *, most: int, most_of_a_run: int) -> None:
        self.entries = 0
        """The entries that they have been handed, since the start."""
        self.bytes = 0
        """The bytes of these entries, as they go on the wire."""
        self._most = most
        self._most_of_a_run = most_of_a_run
        self._of_runs: Counter[str] = Counter()
        self._live = 0

    @property
    def live(self) -> int:
        """How many there are."""
        return self._live

    def come(self, run_id: str) -> None:
        """One reader more.

        Raises:
            TooManyReaders: there are as many as there may be, or as many of this run (`TooManyReadersOfRun`).
        """
        if self._live >= self._most:
            raise TooManyReaders(f"this process has {self._live} readers, as many as max_readers allows")
        if self._of_runs[run_id] >= self._most_of_a_run:
            raise TooManyReadersOfRun(
                f"run {run_id!r} has {self._of_runs[run_id]} readers here, as many as there may be; come back later"
            )
        self._live += 1
        self._of_runs[run_id] += 1

    def go(self, run_id: str) -> None:
        """One reader less."""
        self._live -= 1
        self._of_runs[run_id] -= 1
        if not self._of_runs[run_id]:
            del self._of_runs[run_id]
