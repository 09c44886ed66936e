"""The table of invalidations, as specified."""

from __future__ import annotations

import pytest

from redismem.rules import RULES, Event, confidence_event


def test_every_event_has_a_rule() -> None:
    assert set(RULES) == set(Event)


def test_deletes_and_corrections_are_strong_and_nothing_else_is() -> None:
    strong = {Event.DELETED, Event.FORGOTTEN, Event.CONTRADICTION_RESOLVED, Event.USER_CORRECTION}
    assert {event for event, rule in RULES.items() if rule.barrier} == strong


def test_what_is_strong_leaves_no_cached_search_behind() -> None:
    assert all(rule.drops_searches for rule in RULES.values() if rule.barrier)


def test_only_user_corrections_warm_again() -> None:
    assert [event for event, rule in RULES.items() if rule.rewarms] == [Event.USER_CORRECTION]


def test_what_keeps_cached_searches_says_for_how_long() -> None:
    assert all(rule.drops_searches == (rule.max_staleness_s == 0) for rule in RULES.values())
    assert all(rule.max_staleness_s <= 60 for rule in RULES.values())


@pytest.mark.parametrize(
    ("old", "new", "significant"),
    [
        (1.0, 0.9, False),
        (1.0, 0.89, True),
        (0.5, 0.55, False),
        (0.5, 0.56, True),
        (0.5, 0.44, True),
        (0.0, 0.0, False),
        (0.0, 0.01, True),
        (0.7, 0.7, False),
    ],
)
def test_a_confidence_counts_when_it_changes_by_more_than_a_tenth(
    old: float, new: float, significant: bool
) -> None:
    assert (confidence_event(old, new) is Event.CONFIDENCE_CHANGED) is significant
