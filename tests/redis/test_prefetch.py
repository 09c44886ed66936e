"""Loading ahead on a real Redis: what each signal brings, what bounds it, what ends it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import get_args

import pytest

from redismem.client import Client
from redismem.conversation import ContextParts, ContextRequest, MessageInput, SessionInput
from redismem.embed.deterministic import DeterministicEmbedder
from redismem.embed.protocol import Vectors
from redismem.entities import Entity
from redismem.errors import EmbedderUnavailable
from redismem.gathering import entity_request, match_request
from redismem.keys import Owner
from redismem.lualib import Functions
from redismem.prefetch import BUSY, DEBOUNCE_S, MOST_LOADED, Prefetcher, is_follow_up
from redismem.service import Service, assembled
from redismem.settings import Settings, Signal
from redismem.types import MemoryInput, SearchRequest
from tests.conftest import until
from tests.redis.test_conversations import said, sessions
from tests.redis.test_worker import GARDEN, MUSIC, PIECES, PLANTS, another

assert sessions  # a fixture

DAY_S = 86_400
PREFETCHED = ContextParts(**dict.fromkeys(ContextParts.__struct_fields__, False) | {"prefetched": True})
ON_GARDEN = GARDEN.format("pumpkin")
ON_MUSIC = MUSIC.format("second")

Build = Callable[..., Prefetcher]


class Held(DeterministicEmbedder):
    """The deterministic embedder, which a test can hold or take away."""

    def __init__(self) -> None:
        super().__init__()
        self.open, self.away, self.waiting = asyncio.Event(), False, 0
        self.open.set()

    async def embed(self, texts: list[str], *, urgent: bool = True) -> Vectors:
        self.waiting += 1
        try:
            await self.open.wait()
        finally:
            self.waiting -= 1
        if self.away:
            raise EmbedderUnavailable("the embedder is away")
        return await super().embed(texts, urgent=urgent)


@pytest.fixture
async def build(tiered: Service) -> AsyncIterator[Build]:
    """Make prefetchers of some signals, for a service or `tiered`."""
    built: list[Prefetcher] = []

    def make(
        signals: str, service: Service = tiered, *, lanes: int = 2, clock: Callable[[], float] = time.time
    ) -> Prefetcher:
        own, names = service.prefetcher, frozenset(signals.split())
        sources = own._sources
        built.append(Prefetcher(sources, own._embedder_name, signals=names, lanes=lanes, clock=clock))
        return built[-1]

    yield make
    for one in built:
        await one.close()


@pytest.fixture
async def held() -> Held:
    return Held()


@pytest.fixture
async def holding(service: Service, held: Held) -> AsyncIterator[Service]:
    """A service with its caches whose embedder can be held."""
    settings = Settings(
        redis_url=service.settings.redis_url, embedder="deterministic", testing=True, lease_s=0.5
    )
    async with assembled(settings, service.client, held) as opened:
        await until("the lease is held", lambda: asyncio.sleep(0, opened.coherence.is_live()))
        yield opened
        held.away = False
        held.open.set()
        assert await opened.backfill.drained(10)


@pytest.fixture
async def owner(service: Service) -> Owner:
    """A user with a session `s`."""
    alice = service.owner("alice")
    await service.sessions.open(alice, SessionInput(id="s"))
    return alice


@pytest.fixture
async def topics(service: Service, owner: Owner) -> dict[str, str]:
    """Number of the topic of seven memories on a garden, g0 to g6, and of seven on music, m0 to m6."""
    texts = {f"g{i}": GARDEN.format(one) for i, one in enumerate(PLANTS)}
    texts |= {f"m{i}": MUSIC.format(one) for i, one in enumerate(PIECES)}
    await service.writer.put(owner, [MemoryInput(id=one, text=text) for one, text in texts.items()])
    await another(service).make(owner, "topics")
    numbers = [await service.client.execute("HGET", owner.memory(one), "cluster") for one in ("g0", "m0")]
    assert len(set(numbers)) == 2
    return dict(zip(("garden", "music"), (raw.decode() for raw in numbers), strict=True))


async def about(service: Service, owner: Owner, name: str, count: int) -> list[str]:
    """Store memories of an entity; return their ids."""
    ids = [f"{name}{i}" for i in range(count)]
    memories = [MemoryInput(id=one, text=f"{name} likes thing {one}", entities=[name]) for one in ids]
    await service.writer.put(owner, memories)
    return ids


async def hear(
    prefetcher: Prefetcher, owner: Owner, text: str, session_id: str = "s", **more: object
) -> None:
    prefetcher.heard(owner, session_id, [MessageInput(text=text, **more)])  # type: ignore[arg-type]
    await prefetcher.settled()


async def loaded(service: Service, owner: Owner) -> dict[str, str]:
    """Ids and signals of what is kept with the session."""
    return {one: signal for one, signal, _ in (await service.sessions.state(owner, "s", 0)).loaded}


async def shown(service: Service, owner: Owner, text: str = "something else") -> list[str]:
    """Ids that a context shows because they were loaded ahead."""
    request = ContextRequest(text=text, session_id="s", stages=2, parts=PREFETCHED)
    reply = await service.contexts.whole(owner, request)
    await service.contexts.drained()
    assert isinstance(reply.stages, list)
    return [memory.id for stage in reply.stages for block in stage.blocks for memory in block.memories]


def alive() -> set[str]:
    """Names of what prefetchers do now."""
    names = {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()}
    return {name for name in names if name.startswith("Prefetcher.")}


# signals, each alone ---------------------------------------------------------------------------------


async def test_a_message_makes_the_search_of_its_context(tiered: Service, owner: Owner, build: Build) -> None:
    await about(tiered, owner, "Ben", 12)
    prefetcher = build("message")
    await hear(prefetcher, owner, "what does Ben like best of all things")
    request = match_request("what does Ben like best of all things")
    assert tiered.tiers.known_search(owner, request) is not None
    assert prefetcher.stats() == {"message": {"issued": 10}}
    assert await loaded(tiered, owner) == {}  # its own search brings them


async def test_an_entity_brings_its_memories(tiered: Service, owner: Owner, build: Build) -> None:
    ids = await about(tiered, owner, "Ben", 3)
    await about(tiered, owner, "Cleo", 3)
    prefetcher = build("entity")
    text = "I shall meet Ben at the harbour after work"
    await hear(prefetcher, owner, text)
    assert await loaded(tiered, owner) == dict.fromkeys(ids, "entity")
    assert prefetcher.stats() == {"entity": {"issued": 3}}
    request = entity_request(Entity("Ben", is_known=True), text)
    assert tiered.tiers.known_search(owner, request) is not None
    await hear(prefetcher, owner, "what about that one", entities=["Cleo"])
    assert set(await loaded(tiered, owner)) == {*ids, "Cleo0", "Cleo1", "Cleo2"}


async def test_a_time_brings_what_happened_then(tiered: Service, owner: Owner, build: Build) -> None:
    now = datetime(2026, 3, 18, 12, tzinfo=UTC)  # a Wednesday
    for name, days in (("then", 7), ("now", 0), ("before", 14)):
        moment = now - timedelta(days=days)
        await tiered.writer.put(owner, [MemoryInput(id=name, text=f"on {name}", event_date=moment)])
    prefetcher = build("time", clock=now.timestamp)
    await hear(prefetcher, owner, "what did we talk about last week when it rained")
    assert await loaded(tiered, owner) == {"then": "time"}
    await hear(prefetcher, owner, "what will we talk about when it rains again")
    assert prefetcher.stats() == {"time": {"issued": 1}}


async def test_a_new_topic_brings_its_memories_and_is_noted(
    tiered: Service, owner: Owner, build: Build, topics: dict[str, str]
) -> None:
    prefetcher = build("topic")
    await hear(prefetcher, owner, ON_GARDEN)
    assert await loaded(tiered, owner) == {f"g{i}": "topic" for i in range(7)}
    assert (await tiered.sessions.get(owner, "s", 0)).active_topics == [topics["garden"]]
    await hear(prefetcher, owner, GARDEN.format("celery"))
    assert prefetcher.stats() == {"topic": {"issued": 7}}
    await tiered.client.execute("HSET", f"{owner.cluster_prefix}{topics['music']}", "reach", 0.2)
    assert (await prefetcher._near(owner, "And the violin concert?"))[0].within
    await hear(prefetcher, owner, "And the violin concert?")  # a follow-up is no shift
    assert (await tiered.sessions.get(owner, "s", 0)).active_topics == [topics["garden"]]
    await hear(prefetcher, owner, ON_MUSIC)
    assert set(await loaded(tiered, owner)) == {*(f"g{i}" for i in range(7)), *(f"m{i}" for i in range(7))}
    assert (await tiered.sessions.get(owner, "s", 0)).active_topics == [topics["music"], topics["garden"]]


async def test_from_the_fourth_message_on_a_topic_old_memories_come(
    tiered: Service, owner: Owner, build: Build, topics: dict[str, str]
) -> None:
    old_s = time.time() - 60 * DAY_S
    for name, importance in (("g0", 0.3), ("g1", 0.9), ("m0", 0.3)):
        key = owner.memory(name)
        await tiered.client.execute("HSET", key, "created_at", old_s, "importance", importance)
    await tiered.client.execute("HSET", owner.memory("g2"), "importance", 0.3)
    prefetcher = build("depth")
    for i in range(4):
        assert await loaded(tiered, owner) == {}
        await hear(prefetcher, owner, GARDEN.format(("pumpkin", "celery", "radish", "garlic")[i]))
    assert await loaded(tiered, owner) == {"g0": "depth"}
    assert topics["garden"] == (await tiered.sessions.get(owner, "s", 0)).active_topics[0]


async def test_a_follow_up_keeps_hot_what_was_shown(tiered: Service, owner: Owner, build: Build) -> None:
    ids = await about(tiered, owner, "Ben", 4)
    prefetcher = build("follow_up")
    prefetcher.used(owner, "s", set(ids[:3]))
    await hear(prefetcher, owner, "I have a long story to tell about that, which takes a while")
    assert not any(tiered.tiers.known_memory(owner, one) for one in ids)
    await hear(prefetcher, owner, "And why?")
    assert [tiered.tiers.known_memory(owner, one) is not None for one in ids] == [True] * 3 + [False]


async def test_what_is_typed_is_looked_up_once_it_rests(tiered: Service, owner: Owner, build: Build) -> None:
    ids = await about(tiered, owner, "Ben", 3)
    prefetcher = build("typing")
    began_s = time.monotonic()
    for partial in ("Wh", "What does B", "What does Ben li"):
        prefetcher.typed(owner, "s", partial)
    await prefetcher.settled()
    assert time.monotonic() - began_s >= DEBOUNCE_S
    assert await loaded(tiered, owner) == dict.fromkeys(ids, "typing")
    assert prefetcher.stats() == {"typing": {"cancelled": 2, "issued": 3}}
    suggestion = {"limit": 10, "query_type": "suggestion"}
    asked = [SearchRequest(text=text, **suggestion) for text in ("Wh", "What does Ben li")]  # type: ignore[arg-type]
    assert [tiered.tiers.known_search(owner, one) is not None for one in asked] == [False, True]


@pytest.mark.parametrize("off", ["", *get_args(Signal)])
async def test_a_signal_that_is_off_loads_nothing(
    tiered: Service, owner: Owner, build: Build, topics: dict[str, str], off: str
) -> None:
    await about(tiered, owner, "Ben", 2)
    moment = datetime.now(UTC) - timedelta(days=1)
    await tiered.writer.put(owner, [MemoryInput(id="then", text="it rained", event_date=moment)])
    old = owner.memory("g0")
    await tiered.client.execute("HSET", old, "created_at", time.time() - 60 * DAY_S, "importance", 0.1)
    # a memory is counted for the signal that had it first, and `message` has all of a small store
    signals = set(get_args(Signal)) - {off, *(["message"] if off != "message" else [])}
    prefetcher = build(" ".join(signals) if off else "")
    texts = "I met Ben in the harbour yesterday as it rained", *map(GARDEN.format, ("celery", "leek", "pea"))
    for text in (*texts, ON_GARDEN):
        await hear(prefetcher, owner, text)
    prefetcher.typed(owner, "s", MUSIC.format("tenth"))
    await prefetcher.settled()
    issued = {signal for signal, counts in prefetcher.stats().items() if counts.get("issued")}
    everything = {"entity", "time", "topic", "typing"}
    assert issued - {"depth"} == (everything - {off} if off else set())
    assert topics
    if not off:
        assert prefetcher._talks == {}
        assert await loaded(tiered, owner) == {}


async def test_the_settings_name_the_signals_of_a_service(tiered: Service, owner: Owner) -> None:
    ids = await about(tiered, owner, "Ben", 2)
    for signals, issued in (("", {}), ("entity", {"entity": {"issued": 2}})):
        settings = replace(tiered.settings, prefetch=signals)
        async with assembled(settings, tiered.client, tiered.embedder) as opened:
            await opened.sessions.say(owner, "s", said("I shall meet Ben at the harbour"))
            await opened.prefetcher.settled()
            assert opened.prefetcher.stats() == issued
    assert set(await loaded(tiered, owner)) == set(ids)


# bounds ----------------------------------------------------------------------------------------------


async def test_a_message_loads_three_times_ten_memories_at_most(
    tiered: Service, owner: Owner, build: Build
) -> None:
    names = ["Ann", "Ben", "Cleo", "Dora"]
    for name in names:
        await about(tiered, owner, name, 12)
    prefetcher = build("entity")
    await hear(prefetcher, owner, "all of them", entities=names)
    assert prefetcher.stats() == {"entity": {"issued": 30}}
    kept = await loaded(tiered, owner)
    assert sorted(one[:3] for one in kept) == sorted(["Ann", "Ben", "Cle"] * 10)
    await hear(prefetcher, owner, "and the last of them", entities=["Dora"])
    kept = await loaded(tiered, owner)
    assert len(kept) == MOST_LOADED
    assert sum(one.startswith("Dora") for one in kept) == 10


async def test_nothing_is_loaded_while_others_wait_for_the_embedder(
    holding: Service, owner: Owner, held: Held, build: Build
) -> None:
    prefetcher = build("message", holding)
    held.open.clear()
    texts = [f"question {i}" for i in range(BUSY)]
    waiting = [asyncio.create_task(holding.prefetcher._vectors.made([text])) for text in texts]
    await until("all wait", lambda: asyncio.sleep(0, held.waiting == BUSY))
    await hear(prefetcher, owner, "hello there")
    assert prefetcher.stats() == {"message": {"shed": 1}}
    assert alive() == set()
    held.open.set()
    await asyncio.gather(*waiting)
    await hear(prefetcher, owner, "hello there")
    assert prefetcher.stats() == {"message": {"shed": 1}}


@pytest.mark.parametrize(("lanes", "other"), [(1, "bob"), (2, "alice")])
async def test_loads_are_bounded_by_lanes_and_one_a_user(
    holding: Service, owner: Owner, held: Held, build: Build, lanes: int, other: str
) -> None:
    prefetcher = build("message", holding, lanes=lanes)
    held.open.clear()
    prefetcher.heard(owner, "s", said("one"))
    await until("it waits", lambda: asyncio.sleep(0, held.waiting == 1))
    prefetcher.heard(Owner(other), "t", said("two"))
    await until("it is left out", lambda: asyncio.sleep(0, prefetcher.stats() == {"message": {"shed": 1}}))
    if lanes == 2:
        prefetcher.heard(Owner("bob"), "s", said("three"))
        await until("another user loads", lambda: asyncio.sleep(0, held.waiting == 2))
    held.open.set()
    await prefetcher.settled()
    assert prefetcher._running == {}
    prefetcher.heard(Owner(other), "t", said("two"))
    await prefetcher.settled()
    assert prefetcher.stats() == {"message": {"shed": 1}}


# ends ------------------------------------------------------------------------------------------------


async def test_a_message_ends_what_was_begun_for_the_one_before(
    holding: Service, owner: Owner, held: Held, build: Build
) -> None:
    await about(holding, owner, "Ben", 2)
    prefetcher = build("entity", holding)
    held.open.clear()
    prefetcher.heard(owner, "s", said("I shall meet Ben at the harbour"))
    await until("it waits", lambda: asyncio.sleep(0, held.waiting == 1))
    prefetcher.heard(owner, "s", said("no matter"))
    held.open.set()
    await until("all ends", lambda: asyncio.sleep(0, not alive()))
    assert prefetcher.stats()["message"]["cancelled"] == 1
    assert await loaded(holding, owner) == {}


@pytest.mark.parametrize("begun", ["message", "typing"])
async def test_the_message_that_ends_a_load_is_loaded_for(
    holding: Service, owner: Owner, held: Held, build: Build, begun: str
) -> None:
    await about(holding, owner, "Ben", 2)
    prefetcher = build("message entity typing", holding)
    held.open.clear()
    if begun == "message":
        prefetcher.heard(owner, "s", said("the first thing"))
    else:
        prefetcher.typed(owner, "s", "the first thing")
    await until("it waits", lambda: asyncio.sleep(0, held.waiting == 1))
    prefetcher.heard(owner, "s", said("I shall meet Ben at the harbour"))
    held.open.set()
    await prefetcher.settled()
    assert set(await loaded(holding, owner)) == {"Ben0", "Ben1"}


async def test_a_message_ends_what_was_typed_before(tiered: Service, owner: Owner, build: Build) -> None:
    await about(tiered, owner, "Ben", 2)
    prefetcher = build("typing follow_up")
    prefetcher.typed(owner, "s", "What does Be")
    await hear(prefetcher, owner, "What does Ben like?")
    assert await loaded(tiered, owner) == {}
    assert prefetcher.stats() == {"typing": {"cancelled": 1}}


@pytest.mark.parametrize("part", ["embedder", "redis"])
async def test_what_fails_in_the_background_harms_nothing(
    holding: Service, owner: Owner, held: Held, build: Build, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    await about(holding, owner, "Ben", 2)
    prefetcher = build(" ".join(set(get_args(Signal)) - {"message"}), holding)
    nowhere = Client(Settings(), "redis://127.0.0.1:1")
    if part == "embedder":
        held.away = True
    else:
        prefetcher._sources = replace(prefetcher._sources, functions=Functions(nowhere))
    await hear(prefetcher, owner, "I shall meet Ben at the harbour tomorrow")
    prefetcher.typed(owner, "s", "What does Be")
    await prefetcher.settled()
    assert (alive(), prefetcher._running) == (set(), {})
    assert [row for row in caplog.records if row.levelname in ("WARNING", "ERROR")] == []
    held.away = False
    prefetcher._sources = holding.prefetcher._sources
    await hear(prefetcher, owner, "I shall meet Ben at the harbour tomorrow")
    assert {"Ben0", "Ben1"} <= set(await loaded(holding, owner))
    await nowhere.close()


async def test_closing_ends_everything(holding: Service, owner: Owner, held: Held, build: Build) -> None:
    prefetcher = build("message typing", holding)
    held.open.clear()
    prefetcher.heard(owner, "s", said("one"))
    prefetcher.typed(owner, "t", "two")
    prefetcher.typed(Owner("bob"), "s", "three")
    await until("both wait", lambda: asyncio.sleep(0, held.waiting == 2))
    await prefetcher.close()
    assert (alive(), held.waiting, prefetcher._running) == (set(), 0, {})


async def test_closing_waits_for_what_a_message_ended(
    holding: Service, owner: Owner, held: Held, build: Build
) -> None:
    prefetcher = build("message", holding)
    held.open.clear()
    prefetcher.heard(owner, "s", said("one"))
    await until("it waits", lambda: asyncio.sleep(0, held.waiting == 1))
    prefetcher.heard(owner, "s", said("two"))
    await prefetcher.close()
    assert alive() == set()


def test_a_long_sentence_without_blanks_is_no_follow_up() -> None:
    assert not is_follow_up(
        "\u6211\u4eec\u4e0a\u4e2a\u661f\u671f\u5728\u82b1\u56ed\u91cc\u79cd\u4e86\u4ec0\u4e48\u852c\u83dc" * 3
    )


def test_what_is_short_or_opens_like_one_is_a_follow_up() -> None:
    assert is_follow_up("why?")
    assert is_follow_up("And what about the one that you saw?")
    assert not is_follow_up("And " + "then we went on to the next town " * 3)
    assert not is_follow_up("Android phones have become far too large")
