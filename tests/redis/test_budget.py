"""Searches that end early or in time: what is looked at first, and what the reply says was left out."""

from __future__ import annotations

import pytest

from redismem.filters import Filters
from redismem.keys import Owner
from redismem.service import Service
from redismem.types import MemoryInput, Plan, SearchReply, SearchRequest

EXACT = "the cat sleeps on the warm stove"


@pytest.fixture
async def hot(service: Service, owner: Owner) -> Owner:
    """A user one of whose memories was used lately, and one of whose sessions goes on."""
    await service.writer.put(
        owner,
        [
            MemoryInput(id="hot", text=EXACT),
            MemoryInput(id="turn", text="dogs bark at night", session_id="now, |{}"),
            *(MemoryInput(id=f"m{i}", text=f"another thing {i}") for i in range(60)),
        ],
    )
    service.touches.add(owner, ["hot", "m1"])
    await service.touches.flush()
    return owner


async def search(service: Service, owner: Owner, text: str, **request: object) -> SearchReply:
    return await service.search(owner, SearchRequest(text=text, explain=True, **request))  # type: ignore[arg-type]


@pytest.mark.parametrize("mode", ["hybrid", "semantic"])
async def test_a_search_ends_where_its_goal_is_met(service: Service, hot: Owner, mode: str) -> None:
    found = await search(service, hot, EXACT, min_results=1, search_mode=mode)
    assert found.memories[0].id == "hot"
    assert {hit.id for hit in found.memories} <= {"hot", "m1"}
    assert (found.skipped, found.partial) == (["index", "total"], False)
    assert found.plan == Plan(index="flat", staged=True)


async def test_a_goal_that_is_not_met_searches_everything(service: Service, hot: Owner) -> None:
    for wanted in ({"min_results": 2}, {"min_results": 1, "min_similarity": 1.0}):
        found = await search(service, hot, "another thing 7", **wanted)
        assert found.skipped == []
        assert found.total == 62
    assert (await search(service, hot, "another thing 7", min_results=2)).memories[0].id == "m7"


async def test_one_excellent_memory_is_not_two_good_ones(service: Service, hot: Owner) -> None:
    found = await search(service, hot, EXACT, min_results=2)
    assert (found.skipped, found.total) == ([], 62)


async def test_the_turns_of_the_session_are_looked_at_first(service: Service, hot: Owner) -> None:
    without = await search(service, hot, "dogs bark at night", min_results=1)
    assert without.skipped == []
    within = await search(service, hot, "dogs bark at night", min_results=1, session_id="now, |{}")
    assert within.skipped == ["index", "total"]
    assert within.memories[0].id == "turn"


async def test_the_first_look_respects_the_filters(service: Service, hot: Owner) -> None:
    filters = Filters(session_id="now, |{}")
    found = await search(service, hot, EXACT, min_results=1, filters=filters)
    assert [hit.id for hit in found.memories] == ["turn"]


async def test_a_memory_deleted_after_it_was_hot_is_not_found(service: Service, hot: Owner) -> None:
    await service.client.execute("DEL", hot.memory("hot"))  # by another hand: still in the hot set
    found = await search(service, hot, EXACT, min_results=1)
    assert "hot" not in {hit.id for hit in found.memories}


async def test_a_goal_costs_no_second_round_trip(service: Service, hot: Owner, round_trips: object) -> None:
    with round_trips() as sent:  # type: ignore[operator]
        await service.tiers.find(hot, [SearchRequest(text="another thing 7", min_results=3)])
    assert sent == ["FCALL_RO"]


async def test_a_tight_budget_still_answers_whole_when_there_is_time(service: Service, hot: Owner) -> None:
    found = await search(service, hot, "another thing 7", max_ms=19)
    assert (found.partial, found.skipped, found.total) == (False, [], 62)
    assert found.memories[0].id == "m7"
    assert found.plan is not None
    assert found.plan.staged


async def test_a_search_cut_by_time_says_what_is_missing(service: Service, hot: Owner) -> None:
    """The Function with a budget that its first step exceeds: what was found is there, the rest is named."""
    embedder = service.embedder
    vector = (await embedder.embed([EXACT]))[0].astype("float16").tobytes()
    arguments = [
        *(hot.memory_prefix, "hybrid", vector, embedder.name, "cat", "(cat)", "*", "-", 50, 10, 0.0001),
        *(0.6, 0.5, 0.5, "", 0, 1, 0, 1_700_000_000, 0, "text", 128, 1, "", 0.85, 0.9, ""),
    ]
    raw = await service.functions.call(
        "rm_search_ro_v1",
        [hot.index, hot.meta, hot.turns, hot.hot, *hot.graphs],
        *arguments,
        read=True,
    )
    assert raw[3] == b"CUT:index,words,total"
    assert raw[4] == b"hot"


async def test_keyword_searches_have_no_goal() -> None:
    with pytest.raises(ValueError, match="min_results"):
        SearchRequest(text="a", search_mode="keyword", min_results=1)


async def test_only_whole_answers_are_cached(tiered: Service, owner: Owner) -> None:
    await tiered.writer.put(owner, [MemoryInput(id="hot", text=EXACT), MemoryInput(id="b", text="other")])
    tiered.touches.add(owner, ["hot"])
    await tiered.touches.flush()
    early = SearchRequest(text=EXACT, min_results=1)
    assert b'"skipped"' in (await tiered.tiers.search(owner, early)).body
    assert tiered.tiers.known_search(owner, early) is None
    assert await tiered.client.execute("EXISTS", owner.searches) == 0
    await tiered.tiers.search(owner, SearchRequest(text=EXACT))
    assert tiered.tiers.known_search(owner, early) is not None
