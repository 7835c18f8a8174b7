"""A feed of the fetcher: group fetch for the tails of runs that live elsewhere, on one part of the log."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import inf
from typing import TYPE_CHECKING, Final

import trio

from penstock.errors import RunNotFound
from penstock.log.retries import patiently

if TYPE_CHECKING:
    from collections.abc import Callable

    from penstock.log import EventLog
    from penstock.log.tail import Tails

LOADED: Final = 8
"""The runs of a fetch from which on the next one waits for all of the spacing; after fewer for a part of it."""
MISSING_GRACE: Final = 10.0
"""For how many seconds a run that has readers may be missing: a log that has lost it is given it again by its owner."""
MISSING_PAUSE: Final = 0.5
"""Seconds between two looks for runs that are missing."""
AWAY_PAUSE: Final = 0.1
"""Seconds between two looks for runs that were out of reach while others were not."""


@dataclass(frozen=True, slots=True)
class Feeding:
    """What all feeds of a fetcher have in common; see `Fetcher`."""

    log: EventLog
    tails: Tails
    spacing: float
    on_warning: Callable[[str], None]
    elsewhere: Callable[[str, int], None]
    """Called with a run that is on another part now, and how far it is."""


class Feed:
    """Keeps the tails of one part's runs up to date."""

    def __init__(self, part: str, feeding: Feeding) -> None:
        self.scope = trio.CancelScope()
        """Cancelled when there is no such part any more."""
        self._part = part
        self._feeding = feeding
        self._moved: dict[str, int] = {}
        self._behind: dict[str, int] = {}
        """The runs that cannot be caught up with yet, and how far their tails are."""
        self._missing: dict[str, float] = {}
        """The runs with readers here that the log does not have at the moment, and since when."""
        self._away: set[str] = set()
        """The runs that were out of reach at the last fetch, while others were not."""
        self._news = trio.Event()
        self._busy = False

    @property
    def waiting(self) -> list[str]:
        """The runs of which something is still to be fetched."""
        return [*self._moved, *self._behind, *self._missing]

    @property
    def idle(self) -> bool:
        """There is nothing to do."""
        return not (self._busy or self.waiting)

    def tell(self, run_id: str, seq: int) -> None:
        """A run has got as far as `seq`; it may have been told already that it is further."""
        self._moved[run_id] = max(seq, self._moved.get(run_id, 0))
        self._news.set()

    def is_stuck(self, behind: dict[str, int]) -> bool:
        """Whether none of these can be caught up with for now."""
        return behind.keys() <= self._missing.keys() | self._away

    @trio.lowlevel.enable_ki_protection
    async def run(self) -> None:
        """Bring what the tails lack, whenever a run has moved, until cancelled."""
        with self.scope:
            while True:
                if self.is_stuck(self._behind) and not self._moved:
                    self._news = trio.Event()
                    pause = AWAY_PAUSE if self._away else MISSING_PAUSE
                    with trio.move_on_after(pause if self._behind else inf):
                        await self._news.wait()
                started, self._busy = trio.current_time(), True
                # A run that cannot be caught up with must not keep the news of the others waiting.
                moved, self._moved = self._moved, {}
                for run_id, seq in moved.items():
                    tail = self._feeding.tails.get(run_id)
                    if tail is not None and tail.last != seq:  # less: the log has lost something, and perhaps ended it
                        self._behind[run_id] = tail.last
                self._hand_over(moved)
                load = min(1.0, len(self._behind) / LOADED)
                if self._behind:
                    self._behind = await self.fetch(self._behind)
                self._busy = False
                await trio.sleep_until(started + self._feeding.spacing * load)

    def _hand_over(self, moved: dict[str, int]) -> None:
        """Leave the runs that are on another part now to the feed of that."""
        for run_id in [run_id for run_id in self._behind if self._feeding.log.part(run_id) != self._part]:
            self._missing.pop(run_id, None)
            self._feeding.elsewhere(run_id, max(moved.get(run_id, 0), self._behind.pop(run_id) + 1))

    async def fetch(self, behind: dict[str, int]) -> dict[str, int]:
        """Feed the tails that are behind; those that still are."""
        fetch = partial(self._feeding.log.fetch, behind)
        pages = await patiently(fetch, what="fetch entries", on_warning=self._feeding.on_warning)
        self._away = behind.keys() - pages.keys()
        tails = self._feeding.tails
        still = {run_id: behind[run_id] for run_id in self._away if tails.get(run_id) is not None}
        for run_id, page in pages.items():
            tail = tails.get(run_id)
            missing_since = self._missing.pop(run_id, trio.current_time())
            if tail is None:
                continue
            if page is None:
                if trio.current_time() - missing_since >= MISSING_GRACE:
                    gone = RunNotFound(run_id)
                    tail.release(gone)
                    tails.retire(gone)  # who stays all the same keeps nobody from a run that comes back
                else:
                    self._missing[run_id] = missing_since
                    still[run_id] = tail.last
                continue
            if page.entries:
                tail.extend(page.entries)
            else:  # trimmed away already: its readers will find that out, and nobody else waits for it
                tail.advance(page.run.seq, ended=page.run.status.terminal)
            if tail.last < page.run.seq:
                still[run_id] = tail.last
        return still
