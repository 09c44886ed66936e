"""What a context begins with, and what comes only when asked for."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from redismem.immediacy import is_immediate, is_on_demand, order
from redismem.types import Memory
from redismem.weights import default_importance

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)
NOW_S = NOW.timestamp()


def memory(days: float, importance: float = 0.5, **fields: Any) -> Memory:
    """A memory written so many days ago."""
    written = NOW - timedelta(days=days)
    given: dict[str, Any] = {
        "id": "m",
        "text": "I moved to Oslo.",
        "memory_type": "semantic",
        "topics": [],
        "entities": [],
        "created_at": written,
        "updated_at": written,
        "importance": importance,
        "confidence": 1.0,
        "pinned": False,
        "metadata": {},
        "version": 1,
        "embedded": True,
    }
    return Memory(**given | fields)


def reason(
    one: Memory,
    cluster: str = "",
    *,
    topics: frozenset[str] = frozenset(),
    last: frozenset[str] = frozenset(),
    pins: frozenset[str] = frozenset(),
) -> str | None:
    return is_immediate(one, cluster, now_s=NOW_S, active_topics=topics, last_ids=last, pins=pins)


def test_a_pinned_memory_is_immediate_by_itself_or_by_the_session() -> None:
    assert reason(memory(900, 0.1, pinned=True)) == "pinned"
    assert reason(memory(900, 0.1), pins=frozenset({"m"})) == "pinned"
    assert reason(memory(900, 0.1), pins=frozenset({"n"})) is None


@pytest.mark.parametrize(
    ("days", "importance", "expected"),
    [
        (6.9, 0.81, "important"),
        (7, 0.81, None),
        (6.9, 0.8, None),
        (-3, 0.81, "important"),
    ],
)
def test_only_a_young_and_important_memory_is_immediate(
    days: float, importance: float, expected: str | None
) -> None:
    assert reason(memory(days, importance)) == expected


def test_age_counts_from_when_it_happened() -> None:
    assert reason(memory(1, 0.9, event_date=NOW - timedelta(days=40))) is None
    assert reason(memory(40, 0.9, event_date=NOW - timedelta(days=1))) == "important"
    assert is_on_demand(memory(1, 0.2, event_date=NOW - timedelta(days=40)), NOW_S)
    assert not is_on_demand(memory(40, 0.2, event_date=NOW - timedelta(days=1)), NOW_S)


def test_a_memory_on_an_active_topic_is_immediate_by_cluster_or_by_name() -> None:
    assert reason(memory(90), "7", topics=frozenset({"7"})) == "active_topic"
    assert reason(memory(90, topics=["boats", "tea"]), topics=frozenset({"tea"})) == "active_topic"
    assert reason(memory(90, topics=["boats"]), "8", topics=frozenset({"7", "tea"})) is None


def test_a_memory_without_a_cluster_is_on_no_active_topic() -> None:
    assert reason(memory(90), "", topics=frozenset({""})) is None


def test_what_the_last_session_referred_to_is_immediate() -> None:
    assert reason(memory(90), last=frozenset({"m"})) == "last_session"
    assert reason(memory(90), last=frozenset({"n"})) is None


def test_the_first_reason_is_told() -> None:
    everything = {"topics": frozenset({"7"}), "last": frozenset({"m"})}
    assert reason(memory(1, 0.9, pinned=True), "7", **everything) == "pinned"
    assert reason(memory(1, 0.9), "7", **everything) == "important"
    assert reason(memory(1), "7", **everything) == "active_topic"


@pytest.mark.parametrize(
    ("days", "importance", "pinned", "expected"),
    [
        (30.1, 0.49, False, True),
        (30, 0.49, False, False),
        (30.1, 0.5, False, False),
        (30.1, 0.49, True, False),
    ],
)
def test_only_old_unimportant_memories_wait_for_a_search(
    days: float, importance: float, pinned: bool, expected: bool
) -> None:
    assert is_on_demand(memory(days, importance, pinned=pinned), NOW_S) is expected


def test_an_old_turn_waits_for_a_search_and_an_old_fact_does_not() -> None:
    turn = default_importance("message", "Mara: I went for a walk.", pinned=False)
    fact = default_importance("fact", "The user lives near the harbour.", pinned=False)
    assert is_on_demand(memory(31, turn), NOW_S)
    assert not is_on_demand(memory(31, fact), NOW_S)


def test_importance_halves_in_90_days_in_the_order() -> None:
    old, young, fresh = memory(90, 0.9, id="old"), memory(0, 0.46, id="young"), memory(0, 0.44, id="fresh")
    assert [one.id for one in order([fresh, old, young], NOW_S)] == ["young", "old", "fresh"]


def test_ties_of_the_order_are_broken_by_id() -> None:
    given = [memory(3, id=name) for name in "bca"]
    assert [one.id for one in order(given, NOW_S)] == ["a", "b", "c"]


def test_what_is_still_to_come_ranks_as_what_is_now() -> None:
    assert [one.id for one in order([memory(-300, id="b"), memory(0, id="a")], NOW_S)] == ["a", "b"]
