"""What a supervisor does by the clock: look for cancels, and keep in contact with each part of the log (`contact.py`).

None of it can harm a run by failing: while the log cannot be reached it warns, backs off and tries again. In particular
a poll that fails cancels nothing.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import trio

from penstock.contact import REAP_INTERVAL, Contact, Rounds
from penstock.log.retries import patiently
from penstock.observer import tell

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from penstock.contact import OnOutage
    from penstock.execution import Execution, Office
    from penstock.log import EventLog


class Watch:
    """The rounds of one supervisor, each a task of its own.

    Args:
        log: the event log.
        owner: the supervisor's name there.
        live: the executions that are not over yet, by run id.
        office: what they share.
        deliver: called with each cancel request: a run id and a reason.
        on_outage: called when a part of the log has been away for too long, with what readers are told, and when it is
            back.
    """

    def __init__(
        self,
        log: EventLog,
        owner: str,
        live: Mapping[str, Execution],
        office: Office,
        deliver: Callable[[str, str | None], None],
        on_outage: OnOutage,
    ) -> None:
        self._log = log
        self._owner = owner
        self._office = office
        self._deliver = deliver
        self._rounds = Rounds(log, owner, live, office, on_outage, self._on_away, self._may_reap)
        self._contacts: dict[str, Contact] = {}
        self._away: dict[str, float] = {}
        """The parts that are out of reach, and since when."""
        self._away_since = 0.0
        self._cancel_came = trio.Event()

    def wake(self) -> None:
        """A cancel request has come in: look now."""
        self._cancel_came.set()

    def renew_now(self) -> None:
        """The log can be reached again: see whether it still has the runs of this process."""
        for contact in self._contacts.values():
            contact.renew_now()

    async def cancels(self) -> None:
        """Deliver cancel requests: at once when woken, else within `cancel_check_interval`."""
        interval = self._office.settings.cancel_check_interval
        look = partial(self._log.cancel_requests, self._owner)
        while True:
            with trio.move_on_after(interval):
                await self._cancel_came.wait()
            self._cancel_came = trio.Event()
            requests = await patiently(look, what="look for cancel requests", on_warning=self._warn)
            for run_id, reason in requests.items():
                self._deliver(run_id, reason)

    async def contacts(self) -> None:
        """Keep in contact with every part that there is."""
        async with trio.open_nursery() as nursery:
            while True:
                parts, late = self._log.parts(), bool(self._contacts)
                for part in self._contacts.keys() - {*parts}:
                    self._contacts.pop(part).scope.cancel(reason="there is no such part of the log any more")
                for part in parts:
                    if part not in self._contacts:
                        contact = self._contacts[part] = Contact(part, self._rounds, late=late)
                        nursery.start_soon(contact.run)
                await trio.sleep(REAP_INTERVAL)

    def is_away(self, part: str) -> bool:
        """Whether this part could not be reached at the last look."""
        return part in self._away

    def _may_reap(self, part: str) -> bool:
        contact = self._contacts.get(part)
        return contact is not None and contact.may_reap

    def _on_away(self, part: str, since: float | None) -> None:
        """A part is out of reach, or in reach again; an outage lasts from the first to the last of them."""
        if since is None:
            del self._away[part]
            if not self._away:
                tell(self._office.observer.outage_ended, trio.current_time() - self._away_since)
        else:
            if not self._away:
                self._away_since = since
                tell(self._office.observer.outage_began)
            self._away[part] = since

    def _warn(self, message: str) -> None:
        tell(self._office.observer.warning, message)
