"""What was loaded ahead on a real Redis: how it is kept with a session, shown once and counted."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime

import pytest

from redismem.conversation import SessionInput, SessionPatch
from redismem.filters import Filters
from redismem.gathering import LISTED
from redismem.keys import Owner
from redismem.service import Service, assembled
from redismem.stages import PREFETCHED
from redismem.types import MemoryInput, SearchRequest
from tests.conftest import until
from tests.redis.test_conversations import said
from tests.redis.test_prefetch import ON_GARDEN, Build, about, build, hear, loaded, owner, shown, topics
from tests.redis.test_worker import GARDEN

assert build  # fixtures
assert owner
assert topics


@pytest.fixture
async def entities(tiered: Service) -> AsyncIterator[Service]:
    """A service on which only entities are loaded ahead."""
    settings = replace(tiered.settings, prefetch="entity")
    async with assembled(settings, tiered.client, tiered.embedder) as opened:
        await until("the lease is held", lambda: asyncio.sleep(0, opened.coherence.is_live()))
        yield opened


async def speak(service: Service, owner: Owner, text: str) -> None:
    await service.sessions.say(owner, "s", said(text))
    await service.prefetcher.settled()


async def test_what_was_loaded_is_shown_and_counted_as_used_once(entities: Service, owner: Owner) -> None:
    ids = await about(entities, owner, "Ben", 3)
    await speak(entities, owner, "I shall meet Ben at the harbour")
    assert entities.prefetcher.stats() == {"entity": {"issued": 3}}
    for expected in (set(ids), set[str]()):
        assert set(await shown(entities, owner)) == expected
        assert entities.prefetcher.stats() == {"entity": {"issued": 3, "used": 3}}
        assert await loaded(entities, owner) == {}


async def test_what_is_not_shown_for_ten_minutes_is_wasted(
    tiered: Service, owner: Owner, build: Build
) -> None:
    now_s = [1_800_000_000.0]
    await about(tiered, owner, "Ben", 3)
    await about(tiered, owner, "Cleo", 1)
    prefetcher = build("entity", clock=lambda: now_s[0])
    await hear(prefetcher, owner, "Ben then", entities=["Ben"])
    prefetcher.used(owner, "s", {"Ben0", "other"})
    now_s[0] += 599
    await hear(prefetcher, owner, "Cleo then", entities=["Cleo"])
    assert prefetcher.stats() == {"entity": {"issued": 4, "used": 1}}
    now_s[0] += 2
    await hear(prefetcher, owner, "Cleo then", entities=["Cleo"])
    assert prefetcher.stats() == {"entity": {"issued": 4, "used": 1, "wasted": 2}}


@pytest.mark.parametrize("how", ["delete", "DEL", "superseded_by"])
async def test_what_was_deleted_after_it_was_loaded_is_not_shown(
    entities: Service, owner: Owner, how: str
) -> None:
    await about(entities, owner, "Ben", 3)
    await speak(entities, owner, "I shall meet Ben at the harbour")
    key = owner.memory("Ben1")
    match how:
        case "delete":
            await entities.writer.delete(owner, "Ben1")
        case "DEL":
            await entities.client.execute("DEL", key)
        case _:
            await entities.client.execute("HSET", key, how, "Ben0")
    assert "Ben1" in await loaded(entities, owner)
    assert set(await shown(entities, owner)) == {"Ben0", "Ben2"}


async def test_a_session_that_ended_keeps_nothing(tiered: Service, owner: Owner, build: Build) -> None:
    await about(tiered, owner, "Ben", 3)
    await tiered.client.execute("DEL", owner.session("s"))
    await hear(build("entity"), owner, "I shall meet Ben at the harbour")
    assert await tiered.client.execute("EXISTS", owner.session("s")) == 0


async def test_the_best_of_what_was_loaded_is_shown(entities: Service, owner: Owner) -> None:
    text = "I shall meet Ben at the harbour when it rains"
    memories = [MemoryInput(id=f"b{i}", text=f"thing number {i}", entities=["Ben"]) for i in range(9)]
    await entities.writer.put(owner, [*memories, MemoryInput(id="best", text=text, entities=["Ben"])])
    await speak(entities, owner, text)
    assert len(await loaded(entities, owner)) == 10
    assert "best" in await shown(entities, owner)


async def test_what_was_shown_is_not_loaded_for_the_turn_after_the_next(
    entities: Service, owner: Owner
) -> None:
    await about(entities, owner, "Ben", 3)
    await speak(entities, owner, "I shall meet Ben at the harbour")
    assert await shown(entities, owner) != []
    await speak(entities, owner, "let us talk about the weather in the mountains now")
    assert await shown(entities, owner) == []


async def test_what_was_not_shown_is_kept_for_the_turn_after(entities: Service, owner: Owner) -> None:
    ids = await about(entities, owner, "Ben", PREFETCHED + 2)
    await speak(entities, owner, "I shall meet Ben at the harbour")
    first = await shown(entities, owner)
    assert len(first) == PREFETCHED
    assert set(await loaded(entities, owner)) == {*ids} - {*first}
    assert {*first, *(await shown(entities, owner))} == {*ids}
    assert entities.prefetcher.stats() == {"entity": {"issued": len(ids), "used": len(ids)}}


async def test_what_a_signal_and_the_message_itself_find_is_the_merit_of_the_signal(
    tiered: Service, owner: Owner, build: Build
) -> None:
    await about(tiered, owner, "Ben", 2)
    await tiered.writer.put(owner, [MemoryInput(id="a", text="the harbour is cold")])
    prefetcher = build("message entity")
    await hear(prefetcher, owner, "I shall meet Ben at the harbour")
    assert prefetcher.stats() == {"entity": {"issued": 2}, "message": {"issued": 1}}
    assert await loaded(tiered, owner) == dict.fromkeys(("Ben0", "Ben1"), "entity")


async def test_of_the_numbers_of_topics_the_three_newest_stay_and_of_the_names_all(
    tiered: Service, owner: Owner, build: Build, topics: dict[str, str]
) -> None:
    numbers, names = ["91", "92", "93"], ["boats", "tea", "rain", "hats"]
    await tiered.sessions.open(owner, SessionInput(id="s", active_topics=[*names, *numbers]))
    await hear(build("topic"), owner, ON_GARDEN)
    active = (await tiered.sessions.get(owner, "s", 0)).active_topics
    assert active == [topics["garden"], "91", "92", *names]


@pytest.mark.parametrize("how", ["open", "change"])
async def test_active_topics_that_a_caller_gave_stay(
    tiered: Service, owner: Owner, build: Build, topics: dict[str, str], how: str
) -> None:
    prefetcher = build("topic")
    if how == "open":
        await tiered.sessions.open(owner, SessionInput(id="s", active_topics=["boats"]))
    else:
        await hear(prefetcher, owner, ON_GARDEN)
        await tiered.sessions.change(owner, "s", SessionPatch(active_topics=["boats"]))
    await hear(prefetcher, owner, GARDEN.format("celery"))
    assert topics
    assert "boats" in (await tiered.sessions.get(owner, "s", 0)).active_topics


async def test_what_was_said_in_the_session_is_not_loaded(
    tiered: Service, owner: Owner, build: Build
) -> None:
    await tiered.sessions.open(owner, SessionInput(id="t"))
    await tiered.sessions.say(owner, "s", said(*(f"what did we do today, part {i}" for i in range(4))))
    (item,) = (await tiered.sessions.say(owner, "t", said("what did we do today, all of it"))).items
    now = datetime.now(UTC)
    await tiered.writer.put(owner, [MemoryInput(id="a", text="we sailed", event_date=now, session_id="s")])
    prefetcher = build("time")
    await hear(prefetcher, owner, "what did we do today")
    # a fact that was learned in it, and what was said in another, are
    assert await loaded(tiered, owner) == dict.fromkeys((item.id, "a"), "time")
    assert prefetcher.stats() == {"time": {"issued": 2}}


async def test_what_was_said_in_the_session_leaves_room_for_others(
    tiered: Service, owner: Owner, build: Build
) -> None:
    await tiered.sessions.say(owner, "s", said(*(f"what did we do today, part {i}" for i in range(12))))
    now = datetime.now(UTC)
    await tiered.writer.put(owner, [MemoryInput(id="a", text="we sailed", event_date=now)])
    await hear(build("time"), owner, "what did we do today")
    assert "a" in await loaded(tiered, owner)


async def test_the_search_of_a_topic_is_the_one_that_its_context_makes(
    tiered: Service, owner: Owner, build: Build, topics: dict[str, str]
) -> None:
    await hear(build("topic"), owner, ON_GARDEN)
    filters = Filters(cluster=[topics["garden"]])
    asked = SearchRequest(text=ON_GARDEN, limit=LISTED, filters=filters)
    assert tiered.tiers.known_search(owner, asked) is not None
