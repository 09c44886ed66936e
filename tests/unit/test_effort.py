"""Widths by query type and budget, and when a search looks at the hot set first."""

import pytest

from redismem.effort import chosen_width, is_staged, is_tight
from redismem.types import QueryType, SearchRequest


@pytest.mark.parametrize(
    ("query_type", "width", "tight"),
    [("suggestion", 32, 32), ("prefetch", 64, 64), ("primary", 128, 64), ("verification", 256, 64)],
)
def test_the_width_follows_the_query_type_and_a_tight_budget_caps_it(
    query_type: QueryType, width: int, tight: int
) -> None:
    assert chosen_width(SearchRequest(text="a", query_type=query_type)) == width
    assert chosen_width(SearchRequest(text="a", query_type=query_type, max_ms=20)) == width
    assert chosen_width(SearchRequest(text="a", query_type=query_type, max_ms=19)) == tight


def test_a_width_set_by_hand_wins() -> None:
    assert chosen_width(SearchRequest(text="a", query_type="suggestion", ef=300, max_ms=5)) == 300


def test_a_tight_budget_or_a_goal_makes_a_search_look_at_the_hot_set_first() -> None:
    assert not is_staged(SearchRequest(text="a", max_ms=20))
    assert is_tight(SearchRequest(text="a", max_ms=19))
    assert is_staged(SearchRequest(text="a", max_ms=19))
    assert is_staged(SearchRequest(text="a", min_results=2))
