"""The only place that decides which memories a context begins with, and which come only when asked for. Pure.

Age counts from when something happened, else from when it was written. Stored importance fades by type (see
`weights`), so one that is still above a bound was never weak, or is used.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from collections.abc import Set as AbstractSet

from redismem.profile import DAY_S, HALF_LIFE_S
from redismem.types import Memory

#: importance above which a memory is loaded while it is younger than that
IMPORTANT, YOUNG_S = 0.8, 7 * DAY_S

#: Importance below which a memory is on demand once it is older than that: what a plain statement starts
#: with. Turns start below it, facts and preferences above, where they stay for three months and more.
UNIMPORTANT, OLD_S = 0.5, 30 * DAY_S


def is_immediate(
    memory: Memory,
    cluster: str,
    *,
    now_s: float,
    active_topics: AbstractSet[str],
    last_ids: AbstractSet[str],
    pins: AbstractSet[str],
) -> str | None:
    """Return why a memory is loaded without being asked for; None when it is not.

    Args:
        cluster: number of its topic; empty for none.
        active_topics: numbers of topics, or names as memories have them in `topics`.
        last_ids: what the last session referred to.

    Returns:
        The first that holds: pinned, important, active_topic, last_session.
    """
    if memory.pinned or memory.id in pins:
        return "pinned"
    if memory.importance > IMPORTANT and _age_s(memory, now_s) < YOUNG_S:
        return "important"
    if (cluster and cluster in active_topics) or not active_topics.isdisjoint(memory.topics):
        return "active_topic"
    return "last_session" if memory.id in last_ids else None


def is_on_demand(memory: Memory, now_s: float) -> bool:
    """Return whether only a search may bring a memory: it is old, unimportant and not pinned."""
    return not memory.pinned and memory.importance < UNIMPORTANT and _age_s(memory, now_s) > OLD_S


def order(memories: Iterable[Memory], now_s: float) -> list[Memory]:
    """Return the memories by importance, which halves in 90 days as in a profile; best first, ties by id."""

    def rank(memory: Memory) -> tuple[float, str]:
        age_s = max(0.0, _age_s(memory, now_s))
        return -memory.importance * math.exp2(-age_s / HALF_LIFE_S), memory.id

    return sorted(memories, key=rank)


def _age_s(memory: Memory, now_s: float) -> float:
    return now_s - (memory.event_date or memory.created_at).timestamp()
