"""Tells what of one owner's memories changed since it was read: so that nothing that is gone is handed over.

While the lease of `Coherence` holds, tickets of L1 tell it without asking Redis; else it must be read again.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from redismem.browse import Browser
from redismem.coherence import Coherence
from redismem.keys import Owner
from redismem.l1 import L1, Ticket
from redismem.types import Memory


@dataclass(frozen=True, slots=True)
class Now:
    """What some memories say now; `gone`: those that were deleted or superseded."""

    memories: dict[str, Memory]
    gone: set[str]

    def changed_since(self, generation: int) -> set[str]:
        """Return the ids of memories that were written after this generation of the owner."""
        return {one for one, memory in self.memories.items() if memory.version > generation}


class Watch:
    """Watches an owner's memories from now on, until it is closed."""

    def __init__(self, l1: L1, coherence: Coherence, browser: Browser, owner: Owner) -> None:
        self._l1 = l1
        self._coherence = coherence
        self._browser = browser
        self._owner = owner
        self._since = l1.open(owner.tag)
        #: of what was read later
        self._later: dict[str, Ticket] = {}
        self._tickets = [self._since]

    def is_sure(self) -> bool:
        """Return whether `changed` tells what changed: not without a lease, nor after it was lost once."""
        return self._coherence.is_live() and self._since.gone is not None

    def changed_at_all(self, ids: Iterable[str]) -> set[str]:
        """Return which of the ids may have changed since the watch began."""
        gone = self._since.gone
        return set(ids) if gone is None else gone.intersection(ids)

    def changed(self, ids: Iterable[str]) -> set[str]:
        """Return which of the ids may have changed since the watch began, or since they were read by it."""
        found = set()
        for one in ids:
            gone = self._later.get(one, self._since).gone
            if gone is None or one in gone:
                found.add(one)
        return found

    async def read(self, ids: Iterable[str]) -> Now:
        """Read memories, and watch them from before that on. Cost: one round trip."""
        wanted = list(ids)
        if not wanted:
            return Now({}, set())
        self._tickets.append(self._l1.open(self._owner.tag))
        self._later.update(dict.fromkeys(wanted, self._tickets[-1]))
        memories = await self._browser.get_each(self._owner, wanted)
        current = {one.id: one for one in memories if one.superseded_by is None}
        return Now(current, set(wanted) - set(current))

    def close(self) -> None:
        """Stop watching."""
        for ticket in self._tickets:
            self._l1.close(ticket)
