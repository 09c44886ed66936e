"""What each kind of change does to the caches: the one table that writers follow and tests read.

Every change of a memory drops it, and the searches that contain it, from every L1: Redis pushes the key
of the record, whoever wrote it. The table says what happens beyond that.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Event(StrEnum):
    """Why something cached may no longer be right."""

    CREATED = "created"
    UPDATED = "updated"
    #: confidence changed by more than a tenth, and nothing else did
    CONFIDENCE_CHANGED = "confidence_changed"
    #: confidence changed by less, or importance alone (its decay)
    WEIGHT_ADJUSTED = "weight_adjusted"
    DELETED = "deleted"
    FORGOTTEN = "forgotten"
    #: stored memories replace others
    CONTRADICTION_RESOLVED = "contradiction_resolved"
    #: a new memory replaces others
    USER_CORRECTION = "user_correction"


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What follows a change, besides the drop from every L1 that Redis pushes."""

    #: cached searches in Redis that contain the memory go in the same step as the change; otherwise they
    #: keep its id, and its content is read fresh
    drops_searches: bool
    #: acknowledged only when no process can answer with the old content
    barrier: bool = False
    #: the searches it dropped here are computed again in the background
    rewarms: bool = False
    #: seconds until uncached and cached reads agree, where nothing was dropped
    max_staleness_s: float = 0.0


RULES = {
    Event.CREATED: Rule(drops_searches=False, max_staleness_s=60),
    Event.UPDATED: Rule(drops_searches=True),
    Event.CONFIDENCE_CHANGED: Rule(drops_searches=True),
    Event.WEIGHT_ADJUSTED: Rule(drops_searches=False, max_staleness_s=60),
    Event.DELETED: Rule(drops_searches=True, barrier=True),
    Event.FORGOTTEN: Rule(drops_searches=True, barrier=True),
    Event.CONTRADICTION_RESOLVED: Rule(drops_searches=True, barrier=True),
    Event.USER_CORRECTION: Rule(drops_searches=True, barrier=True, rewarms=True),
}

#: share of the old confidence beyond which a change matters to cached searches
SIGNIFICANT_CONFIDENCE = 0.10


def confidence_event(old: float, new: float) -> Event:
    """Return the event of a changed confidence; a change by exactly a tenth is not significant."""
    significant = abs(new - old) > SIGNIFICANT_CONFIDENCE * old + 1e-12
    return Event.CONFIDENCE_CHANGED if significant else Event.WEIGHT_ADJUSTED
