"""What is due for a user's index."""

from typing import Any

import pytest

from redismem.maintain import Action, Facts, due
from redismem.settings import Settings

NOW_S = 1_800_000_000.0
DAY_S = 86_400

SETTINGS = Settings(hnsw_threshold=1000, idle_index_days=7)


@pytest.mark.parametrize(
    ("action", "facts"),
    [
        (None, {"memories": 999}),
        ("promote", {"memories": 1000}),
        (None, {"memories": 1000, "has_graph": True}),
        (None, {"memories": 800, "has_graph": True}),
        ("demote", {"memories": 799, "has_graph": True}),
        (None, {"memories": 10, "has_graph": True, "has_own_profile": True}),
        ("promote", {"memories": 1000, "is_building": True}),
        ("promote", {"memories": 900, "is_building": True}),
        ("promote", {"memories": 1000, "is_building": True, "has_graph": True}),
        ("demote", {"memories": 700, "is_building": True}),
        ("sweep", {"memories": 10, "has_leftovers": True}),
        (None, {"memories": 1000, "has_leftovers": True, "has_graph": True}),
        ("complete", {"memories": 5000, "index_state": "filling:3"}),
        (None, {"memories": 5000, "index_state": "cold"}),
        (None, {"memories": 5000, "is_moving": True}),
        ("park", {"memories": 10, "used_s": NOW_S - 8 * DAY_S}),
        (None, {"memories": 10, "used_s": NOW_S - 6 * DAY_S}),
        (None, {"memories": 10, "index_state": "cold", "used_s": 0.0}),
        (None, {"memories": 100, "reindexed": 18}),
        ("refresh", {"memories": 100, "reindexed": 19}),
        (None, {"memories": 0, "reindexed": 8}),
        ("refresh", {"memories": 0, "reindexed": 9}),
        ("refresh", {"memories": 2000, "has_graph": True, "reindexed": 2000}),
        ("complete", {"memories": 100, "index_state": "filling:1", "reindexed": 100}),
        (None, {"memories": 100, "index_state": "cold", "reindexed": 100}),
        (None, {"memories": 100, "is_moving": True, "reindexed": 100}),
        ("promote", {"memories": 2000, "reindexed": 2000}),
        ("demote", {"memories": 100, "has_graph": True, "reindexed": 100}),
        ("park", {"memories": 100, "reindexed": 100, "used_s": NOW_S - 8 * DAY_S}),
    ],
)
def test_what_is_due(action: Action | None, facts: dict[str, Any]) -> None:
    assert due(Facts(**{"used_s": NOW_S, **facts}), SETTINGS, NOW_S) == action


def test_nobody_is_parked_unless_told_so() -> None:
    assert due(Facts(memories=1), Settings(), NOW_S) is None


def test_a_server_without_vector_sets_keeps_everybody_exact() -> None:
    facts = Facts(memories=10_000_000, used_s=NOW_S)
    assert due(facts, SETTINGS, NOW_S, has_graphs=False) is None
