"""What each tier answers, what it costs, and what every kind of change does to it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime
from typing import Any

import pytest

from redismem.errors import RedisUnavailable
from redismem.filters import Filters, TimeRange
from redismem.keys import Owner
from redismem.rules import RULES, Event
from redismem.service import Service, assembled
from redismem.settings import Settings
from redismem.tiers import Answer
from redismem.types import CorrectionRequest, MemoryInput, MemoryPatch, SearchRequest
from tests.redis.conftest import Counter, Until

TEA = SearchRequest(text="tea")
RAIN = SearchRequest(text="rain")


def shown(answer: Answer | None) -> dict[str, Any]:
    assert answer is not None
    reply: dict[str, Any] = json.loads(answer.body)
    return reply


async def settled(service: Service, until: Until) -> None:
    """Wait until every push that is under way has come: behind them comes a heartbeat."""
    await service.coherence.barrier({})
    await until("L1 may answer", lambda: asyncio.sleep(0, service.coherence.is_live()))


@pytest.fixture
async def stored(tiered: Service, owner: Owner, until: Until) -> Service:
    """A service whose owner has four memories: two about tea, one about rain, one about neither."""
    texts = {"a": "likes green tea", "b": "drinks tea at five", "r": "hates rain", "n": "owns a boat"}
    await tiered.writer.put(owner, [MemoryInput(text=text, id=name) for name, text in texts.items()])
    await settled(tiered, until)
    return tiered


@pytest.fixture
async def cold(stored: Service) -> AsyncIterator[Service]:
    """The same store seen by a process whose L1 is off: only Redis caches."""
    settings = Settings(
        redis_url=stored.settings.redis_url, embedder="deterministic", testing=True, l1_entries=0, lease_s=0.5
    )
    async with assembled(settings, stored.client, stored.embedder) as opened:
        yield opened


def keyword(text: str, **options: Any) -> SearchRequest:
    return SearchRequest(text=text, search_mode="keyword", **options)


async def test_a_repeated_search_is_answered_without_redis(
    stored: Service, owner: Owner, round_trips: Counter
) -> None:
    first = shown(await stored.tiers.search(owner, TEA))
    with round_trips() as sent:
        second = shown(await stored.tiers.search(owner, TEA))
    assert not sent
    assert (first["served_by"], second["served_by"]) == ("l3", "l1")
    assert second["memories"] == first["memories"]
    assert {**first, "served_by": 0, "timing": 0} == {**second, "served_by": 0, "timing": 0}


async def test_a_memory_is_read_once(stored: Service, owner: Owner, round_trips: Counter) -> None:
    first = await stored.tiers.memory(owner, "a")
    with round_trips() as sent:
        second = await stored.tiers.memory(owner, "a")
    assert (second.body, second.generation) == (first.body, first.generation)
    assert (first.served_by, second.served_by) == ("l3", "l1")
    assert not sent


async def test_another_process_finds_the_search_in_redis_in_one_round_trip_and_embeds_nothing(
    stored: Service, cold: Service, owner: Owner, round_trips: Counter
) -> None:
    first = shown(await stored.tiers.search(owner, TEA))
    with round_trips() as sent:
        second = shown(await cold.tiers.search(owner, TEA))
    assert len(sent) == 1
    assert (second["served_by"], second["timing"]["embed"]) == ("l2", 0)
    assert second["memories"] == first["memories"]


async def test_a_known_vector_is_not_made_again(
    stored: Service, cold: Service, owner: Owner, round_trips: Counter
) -> None:
    await stored.tiers.search(owner, TEA)
    with round_trips() as sent:
        reply = shown(await cold.tiers.search(owner, SearchRequest(text="tea", limit=1)))
    assert (reply["served_by"], reply["timing"]["embed"], len(sent)) == ("l3", 0, 2)
    with round_trips() as sent:
        reply = shown(await stored.tiers.search(owner, SearchRequest(text="tea", limit=2)))
    assert (reply["served_by"], reply["timing"]["embed"], len(sent)) == ("l3", 0, 1)


async def test_looking_up_ends_where_it_finds_nothing_and_begins_again_where_it_would(
    stored: Service, cold: Service, owner: Owner, round_trips: Counter
) -> None:
    async def trips(text: str) -> int:
        with round_trips() as sent:
            await cold.tiers.search(owner, SearchRequest(text=text))
        return sent.count("pipeline")  # heartbeats are single commands

    assert await trips("new 0") == 2
    for number in range(1, 130):
        await trips(f"new {number}")
    assert sum([await trips(f"more {number}") for number in range(64)]) == 64 + 2  # two samples
    await stored.tiers.search(owner, TEA)
    await cold.tiers.search(owner, TEA)
    assert await trips("again") == 2


async def test_what_needs_no_vector_takes_one_round_trip(
    stored: Service, owner: Owner, round_trips: Counter
) -> None:
    vector = [float(value) for value in (await stored.embedder.embed(["tea"]))[0]]
    for request in (keyword("tea"), SearchRequest(vector=vector, search_mode="semantic")):
        with round_trips() as sent:
            assert shown(await stored.tiers.search(owner, request))["served_by"] == "l3"
        assert len(sent) == 1


async def test_the_same_search_at_the_same_time_is_made_once(
    stored: Service, owner: Owner, round_trips: Counter
) -> None:
    with round_trips() as sent:
        replies = await asyncio.gather(*(stored.tiers.search(owner, TEA) for _ in range(20)))
    assert len({reply.body for reply in replies}) == 1
    assert len(sent) == 2
    assert stored.tiers.counts["search joins"] == 19


async def test_a_failed_search_fails_all_who_wait_for_it(
    stored: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = 0

    async def fail(*_: object, **__: object) -> None:
        nonlocal calls
        calls += 1
        await asyncio.sleep(0)
        raise RedisUnavailable("away")

    monkeypatch.setattr(stored.functions, "send", fail)
    waiting = (stored.tiers.search(owner, TEA) for _ in range(5))
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(result) for result in results] == [RedisUnavailable] * 5
    assert calls == 1


async def test_a_batch_takes_from_l1_what_is_there(
    stored: Service, owner: Owner, round_trips: Counter
) -> None:
    await stored.tiers.search(owner, TEA)
    with round_trips() as sent:
        replies = [shown(answer) for answer in await stored.tiers.search_batch(owner, [TEA, RAIN, TEA])]
    assert [reply["served_by"] for reply in replies] == ["l1", "l3", "l1"]
    assert len(sent) == 2
    assert shown(await stored.tiers.search(owner, RAIN))["served_by"] == "l1"


async def test_explained_and_partial_replies_are_not_kept(
    stored: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        reply = shown(await stored.tiers.search(owner, SearchRequest(text="tea", explain=True)))
        assert reply["served_by"] == "l3"
    assert stored.tiers.known_search(owner, TEA) is None

    async def away(*_: object, **__: object) -> None:
        raise RedisUnavailable("the embedder stands in for anything unavailable")

    monkeypatch.setattr(stored.embedder, "embed", away)
    for _ in range(2):
        reply = shown(await stored.tiers.search(owner, RAIN))
        assert (reply["partial"], reply["served_by"]) == (True, "l3")
    monkeypatch.undo()
    assert not shown(await stored.tiers.search(owner, RAIN))["partial"]


# consistency ----------------------------------------------------------------------------------


async def test_a_new_memory_is_seen_by_session_and_strong_reads_at_once_and_by_others_later(
    stored: Service, cold: Service, owner: Owner
) -> None:
    for service in (stored, cold):
        await service.tiers.search(owner, keyword("tea"))
        reply = await service.writer.put(owner, [MemoryInput(text=f"tea house {id(service)}")])
        new = reply.memories[0].id

        async def ids(service: Service = service, **consistency: Any) -> list[str]:
            answer = await service.tiers.search(owner, keyword("tea", **consistency))
            assert answer.generation >= consistency.get("min_version", 0)
            return [hit["id"] for hit in shown(answer)["memories"]]

        assert new not in await ids()
        assert new in await ids(consistency="session", min_version=reply.generation)
        assert new in await ids()
        assert new in await ids(consistency="strong")
        assert new in await ids(consistency="session")


async def test_a_search_that_found_nothing_is_not_kept(stored: Service, cold: Service, owner: Owner) -> None:
    for service, word in ((stored, "zebra"), (cold, "giraffe")):
        assert shown(await service.tiers.search(owner, keyword(word)))["memories"] == []
        await service.writer.put(owner, [MemoryInput(text=f"saw a {word}")])
        assert len(shown(await service.tiers.search(owner, keyword(word)))["memories"]) == 1


async def test_a_strong_read_joins_nobody(stored: Service, owner: Owner, round_trips: Counter) -> None:
    strong = SearchRequest(text="tea", search_mode="keyword", consistency="strong")
    with round_trips() as sent:
        await asyncio.gather(*(stored.tiers.search(owner, strong) for _ in range(3)))
    assert len(sent) == 3


async def test_a_memory_is_read_at_the_generation_that_is_asked_for(
    stored: Service, cold: Service, owner: Owner, round_trips: Counter
) -> None:
    await stored.tiers.memory(owner, "a")
    await stored.client.execute("HSET", owner.memory("a"), "version", 2**52)
    with round_trips() as sent:
        answer = await stored.tiers.memory(owner, "a", 2**52)
    assert (answer.generation, len(sent)) == (2**52, 1)


async def test_a_search_bounded_to_the_past_is_kept_longer(stored: Service, owner: Owner) -> None:
    long_ago = datetime(2019, 5, 1, tzinfo=UTC)
    await stored.writer.put(owner, [MemoryInput(text="drank tea in Kyoto", event_date=long_ago)])
    bounded = keyword("tea", filters=Filters(event_date=TimeRange(lt=datetime(2020, 1, 1, tzinfo=UTC))))
    for request in (keyword("tea"), bounded):
        await stored.tiers.search(owner, request)
    fields = await stored.client.execute("HKEYS", owner.searches)
    ttls = await stored.client.execute("HPTTL", owner.searches, "FIELDS", len(fields), *fields)
    assert sorted(round(ttl / 1000) for ttl in ttls) == [60, 300]


async def test_l1_keeps_a_search_no_longer_than_redis_would(
    stored: Service, cold: Service, owner: Owner
) -> None:
    await cold.tiers.search(owner, keyword("tea"))
    (field,) = await stored.client.execute("HKEYS", owner.searches)
    await stored.client.execute("HPEXPIRE", owner.searches, 50, "FIELDS", 1, field)
    assert shown(await stored.tiers.search(owner, keyword("tea")))["served_by"] == "l2"
    await asyncio.sleep(0.06)  # what is tested is the passing of time
    assert stored.tiers.known_search(owner, keyword("tea")) is None


# the rules ------------------------------------------------------------------------------------

CHANGES: dict[Event, Callable[[Service, Owner], Awaitable[object]]] = {
    Event.CREATED: lambda service, owner: service.writer.put(owner, [MemoryInput(text="more tea")]),
    Event.UPDATED: lambda service, owner: service.writer.update(owner, "a", MemoryPatch(text="no tea")),
    Event.CONFIDENCE_CHANGED: lambda service, owner: service.writer.update(
        owner, "a", MemoryPatch(confidence=0.5)
    ),
    Event.WEIGHT_ADJUSTED: lambda service, owner: service.writer.update(
        owner, "a", MemoryPatch(importance=0.4, confidence=0.95)
    ),
    Event.DELETED: lambda service, owner: service.writer.delete(owner, "a"),
    Event.FORGOTTEN: lambda service, owner: service.writer.forget(owner),
    Event.CONTRADICTION_RESOLVED: lambda service, owner: service.writer.correct(
        owner, CorrectionRequest(ids=["a"], memory=MemoryInput(text="drinks tea at five", id="b"))
    ),
    Event.USER_CORRECTION: lambda service, owner: service.writer.correct(
        owner, CorrectionRequest(ids=["a"], memory=MemoryInput(text="likes black tea"))
    ),
}


@pytest.mark.parametrize("event", list(Event))
async def test_each_change_does_what_its_rule_says(
    stored: Service, owner: Owner, event: Event, until: Until
) -> None:
    rule, boat = RULES[event], keyword("boat")
    for request in (keyword("tea"), boat):
        await stored.tiers.search(owner, request)
    await stored.tiers.memory(owner, "a")
    barriers = stored.coherence.counts["barriers"]
    await CHANGES[event](stored, owner)
    await settled(stored, until)

    assert stored.coherence.counts["barriers"] - barriers - 1 == rule.barrier + rule.rewarms
    if event is not Event.CREATED:
        assert stored.tiers.known_memory(owner, "a") is None
    if rule.rewarms:
        await until("warm again", lambda: asyncio.sleep(0, stored.tiers.counts["search rewarms"] > 0))
        warmed = shown(stored.tiers.known_search(owner, keyword("tea")))
        assert warmed["memories"][0]["text"] == "likes black tea"
    elif event is not Event.CREATED:
        assert stored.tiers.known_search(owner, keyword("tea")) is None
    if event is not Event.FORGOTTEN:
        assert stored.tiers.known_search(owner, boat) is not None, "a search without the memory stays"
    if not rule.rewarms:
        served_by = shown(await stored.tiers.search(owner, keyword("tea")))["served_by"]
        expected = "l3" if rule.drops_searches else "l1" if event is Event.CREATED else "l2"
        assert served_by == expected


async def test_an_adjusted_weight_is_shown_by_searches_that_stay_cached(
    stored: Service, owner: Owner, until: Until
) -> None:
    await stored.tiers.search(owner, keyword("tea"))
    await stored.writer.update(owner, "a", MemoryPatch(importance=0.9))
    await settled(stored, until)
    reply = shown(await stored.tiers.search(owner, keyword("tea")))
    assert reply["served_by"] == "l2"
    assert {hit["id"]: hit["importance"] for hit in reply["memories"]}["a"] == 0.9


async def test_a_search_that_a_delete_overtook_is_not_kept(
    stored: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    send = stored.functions.send
    found, gate = asyncio.Event(), asyncio.Event()

    async def held(commands: Any) -> list[Any]:
        replies = await send(commands)
        found.set()
        await gate.wait()
        return replies

    monkeypatch.setattr(stored.functions, "send", held)
    slow = asyncio.create_task(stored.tiers.search(owner, keyword("tea")))
    await found.wait()
    monkeypatch.setattr(stored.functions, "send", send)
    await stored.writer.delete(owner, "a")
    later = asyncio.create_task(stored.tiers.search(owner, keyword("tea")))
    assert "a" not in [hit["id"] for hit in shown(await later)["memories"]]
    gate.set()
    assert "a" in [hit["id"] for hit in shown(await slow)["memories"]]
    known = shown(stored.tiers.known_search(owner, keyword("tea")))
    assert "a" not in [hit["id"] for hit in known["memories"]]


# Redis away -----------------------------------------------------------------------------------


@pytest.mark.parametrize("allowed", [True, False])
async def test_stale_answers_are_given_only_when_allowed_and_are_marked(
    stored: Service, owner: Owner, until: Until, monkeypatch: pytest.MonkeyPatch, allowed: bool
) -> None:
    settings = Settings(
        redis_url=stored.settings.redis_url,
        embedder="deterministic",
        testing=True,
        lease_s=0.5,
        stale_if_error=allowed,
    )
    async with assembled(settings, stored.client, stored.embedder) as service:
        await settled(service, until)
        await service.tiers.search(owner, TEA)
        await service.tiers.memory(owner, "a")

        async def away(*_: object, **__: object) -> None:
            raise RedisUnavailable("away")

        monkeypatch.setattr(stored.client, "execute", away)
        monkeypatch.setattr(stored.client, "pipeline", away)
        await until("the lease has run out", lambda: asyncio.sleep(0, not service.coherence.is_live()))
        if allowed:
            answer = await service.tiers.search(owner, TEA)
            assert answer.stale
            assert shown(answer)["stale"] is True
            assert (await service.tiers.memory(owner, "a")).stale
            with pytest.raises(RedisUnavailable):
                await service.tiers.search(owner, SearchRequest(text="tea", consistency="strong"))
            with pytest.raises(RedisUnavailable):
                await service.tiers.memory(owner, "a", 2**53)
        for request in [RAIN] if allowed else [RAIN, TEA]:
            with pytest.raises(RedisUnavailable):
                await service.tiers.search(owner, request)
        monkeypatch.undo()


async def test_returned_memories_are_counted_as_hot(stored: Service, owner: Owner) -> None:
    for _ in range(3):
        await stored.tiers.search(owner, keyword("boat"))
    await stored.touches.flush()
    assert await stored.client.execute("HGET", owner.hits, "n") == b"3"
