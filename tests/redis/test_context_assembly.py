"""Contexts on a real Redis: what stands in which stage, what it costs, what a part that fails leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest

from redismem import gathering
from redismem.client import Argument, Client
from redismem.conversation import (
    STAGE_OF,
    Block,
    ContextParts,
    ContextReply,
    ContextRequest,
    MessageInput,
    Part,
    SessionInput,
    Stage,
)
from redismem.errors import NotFound
from redismem.keys import Owner
from redismem.naming import NameBook
from redismem.service import Service
from redismem.settings import Settings
from redismem.types import MemoryInput
from redismem.watch import Watch
from tests.conftest import until
from tests.redis.test_conversations import at
from tests.redis.test_derived import Made
from tests.redis.test_prefetch import Held, held, holding

assert held  # fixtures
assert holding

DAY_S = 86_400
TEXT = "which tea does Ben drink"

Recorded = Callable[[], list[str]]


@pytest.fixture
def sent(service: Service, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is sent to Redis from now on: Functions by their name, without heartbeats and touches."""
    names: list[str] = []
    execute, pipeline = Client.execute, Client.pipeline

    def note(client: Client, commands: Any) -> None:
        told = [str(one[1] if str(one[0]).startswith("FCALL") else one[0]) for one in commands]
        told = [name for name in told if name not in ("EVAL", "PUBLISH", "HKEYS", "rm_touch_v1")]
        if client is service.client and told:
            names.append("+".join(told))

    async def executed(self: Client, *command: Argument) -> Any:
        note(self, [command])
        return await execute(self, *command)

    async def piped(self: Client, commands: Any) -> list[Any]:
        note(self, commands)
        return await pipeline(self, commands)

    monkeypatch.setattr(Client, "execute", executed)
    monkeypatch.setattr(Client, "pipeline", piped)
    return names


def only(*parts: Part) -> ContextParts:
    return ContextParts(**dict.fromkeys(ContextParts.__struct_fields__, False) | dict.fromkeys(parts, True))


async def context(service: Service, owner: Owner, text: str | None = TEXT, **more: Any) -> ContextReply:
    reply = await service.contexts.whole(owner, ContextRequest(text=text, **({"stages": 4} | more)))
    await service.contexts.drained()
    return reply


def stages_of(reply: ContextReply) -> list[Stage]:
    assert isinstance(reply.stages, list)
    return reply.stages


def blocks_of(reply: ContextReply) -> list[Block]:
    return [block for stage in stages_of(reply) for block in stage.blocks]


def why(reply: ContextReply) -> dict[str, str | None]:
    """Ids of the memories shown, in order, with the reason."""
    return {one.id: one.why for block in blocks_of(reply) for one in block.memories}


async def put(service: Service, owner: Owner, **texts: str) -> None:
    await service.writer.put(owner, [MemoryInput(id=one, text=text) for one, text in texts.items()])


def fetches() -> set[str]:
    """Names of the fetches that go on now."""
    names = {getattr(task.get_coro(), "__qualname__", "") for task in asyncio.all_tasks()}
    return {name for name in names if name.startswith(("Gathering.", "Contexts."))}


@pytest.fixture
async def rich(tiered: Service, owner: Owner) -> Service:
    """A service with a user of whom every part can be told, in a session `s` with one message."""
    made, writer = Made(tiered, owner), tiered.writer
    old = datetime.now(UTC) - timedelta(days=20)
    texts = {f"tea{i:02}": f"this is tea number {i} of many that somebody may drink" for i in range(90)}
    await writer.put(
        owner, [MemoryInput(id=one, text=text, event_date=old) for one, text in texts.items()], wait=False
    )
    turns = ["we sat in the garden", TEXT, "the kettle was old"]
    await writer.put(
        owner, [MemoryInput(id=f"turn{i}", text=text, session_id="t") for i, text in enumerate(turns)]
    )
    await writer.put(owner, [MemoryInput(id="ben", text="Ben is tall", entities=["Ben"])])
    await put(tiered, owner, a="quinces", pin="never mention sugar", ahead="loaded", linked="a linked one")
    await put(tiered, owner, topical="on the topic", last="of the last session")
    await put(tiered, owner, **{f"new{i}": f"new {i}" for i in range(6)})
    assert await tiered.backfill.drained(10)
    a, turn = await made.digests("a"), await made.digests("turn1")
    await made.profile(a)
    await tiered.client.execute("HSET", owner.profile, "valid_until", time.time() + 3600)
    await made.topic(7, [("quinces", ["a"])], a, 1)
    for name in ("topic:7", "entity:Ben", "session:old"):
        await made.summary(name, a)
    await made.link(turn, await made.digests("linked"))
    await tiered.indexes.extend(owner)
    await tiered.client.execute("HSET", owner.memory("topical"), "cluster", "7")
    await at(tiered, time.time() - 60).open(owner, SessionInput(id="old"))
    await tiered.sessions.note(owner, "old", shown=["last"])
    await tiered.sessions.open(owner, SessionInput(id="s", active_topics=["7"], pins=["pin"]))
    await at(tiered, time.time()).say(owner, "s", [MessageInput(id="own", text=TEXT + " or Ann")])
    await tiered.sessions.note(owner, "s", loaded=[("ahead", "time", 0.5)])
    return tiered


# what stands where -----------------------------------------------------------------------------------


async def test_every_part_stands_in_its_stage_and_order(rich: Service, owner: Owner) -> None:
    reply = await context(rich, owner, session_id="s")
    order = [[*dict.fromkeys(block.part for block in stage.blocks)] for stage in stages_of(reply)]
    assert order[:3] == [
        ["profile", "session", "pinned"],
        ["matches", "topics", "prefetched", "more"],
        ["entities", "recent", "more"],
    ]
    assert {part for parts in order for part in parts} == {*STAGE_OF}
    assert [stage.stage for stage in stages_of(reply)] == [1, 2, 3, 4]
    assert (reply.partial, [stage.skipped for stage in stages_of(reply)]) == (False, [[]] * 4)
    shown = [one.id for block in blocks_of(reply) for one in block.memories]
    assert len(shown) == len(set(shown))
    assert "own" not in shown
    assert reply.entities == ["Ben"]
    assert set(reply.timing) == {
        *("text", "opening", "profile", "matches", "topics", "entities", "deep", "around")
    }


async def test_each_part_alone_holds_what_it_promises(rich: Service, owner: Owner) -> None:
    async def told(part: Part, **more: Any) -> dict[str, str | None]:
        reply = await context(rich, owner, session_id="s", parts=only(part), **more)
        assert {block.part for block in blocks_of(reply)} == {part}
        return why(reply)

    assert await told("profile") == await told("session") == {}
    assert await told("pinned") == {
        "pin": "pinned",
        "topical": "active_topic",
        **dict.fromkeys(("a", "last"), "last_session"),
    }
    assert next(iter(await told("matches"))) == "turn1"
    assert len(await told("matches")) == 5
    assert await told("topics") == {"topical": None}
    assert await told("prefetched") == {"ahead": "time"}
    assert await told("entities") == {"ben": "Ben"}
    assert await told("recent") == dict.fromkeys(("new5", "new4", "new3"))
    assert {"turn0", "turn2"} <= set(await told("history"))
    assert await told("related") == {"linked": "turn1"}
    assert "own" not in await told("more")
    assert len(await told("deep")) > 60


async def test_a_memory_stands_beside_the_best_match_that_it_is_near(rich: Service, owner: Owner) -> None:
    history = why(await context(rich, owner, session_id="s", parts=only("history")))
    assert (history["turn0"], history["turn2"]) == ("turn1", "turn1")


@pytest.mark.parametrize("part", [*STAGE_OF])
async def test_a_part_that_is_off_is_nowhere(rich: Service, owner: Owner, part: Part) -> None:
    reply = await context(rich, owner, session_id="s", parts=ContextParts(**{part: False}))
    assert {block.part for block in blocks_of(reply)} == {*STAGE_OF} - {part}


async def test_derived_blocks_name_their_sources_and_titles(rich: Service, owner: Owner) -> None:
    reply = await context(rich, owner, session_id="s")
    derived = {block.title: (block.source, block.memory_ids) for block in blocks_of(reply) if block.text}
    titles = "About the user", "Last session", "Current topic: quinces", "About Ben"
    assert {title: ids[-1:] for title, (_, ids) in derived.items()} == {title: ["a"] for title in titles}
    assert {source for source, _ in derived.values()} == {"derived"}


async def test_five_unasked_memories_come_the_most_important_first(tiered: Service, owner: Owner) -> None:
    for i in range(8):
        memory = MemoryInput(id=f"m{i}", text=f"thing {i}", importance=0.82 + i / 100)
        await tiered.writer.put(owner, [memory])
    pinned = [MemoryInput(id=f"p{i}", text=f"rule {i}", pinned=True, importance=0.1) for i in range(2)]
    await tiered.writer.put(owner, pinned)
    shown = why(await context(tiered, owner, None, stages=1))
    assert shown == dict.fromkeys(("p0", "p1"), "pinned") | {f"m{i}": "important" for i in (7, 6, 5, 4, 3)}


async def test_a_beginning_alone_shows_what_the_profile_finds_important(rich: Service, owner: Owner) -> None:
    await rich.client.execute("HSET", owner.profile, "important_memory_ids", '["tea07","topical"]')
    for stages, shown in ((1, True), (2, False)):
        pinned = why(await context(rich, owner, session_id="s", stages=stages, parts=only("pinned")))
        assert ("tea07" in pinned) == shown
        assert pinned["topical"] == "active_topic"


async def test_old_unimportant_memories_are_not_recent(tiered: Service, owner: Owner) -> None:
    old = datetime.now(UTC) - timedelta(days=31)
    memories = [
        MemoryInput(id=f"m{importance}", text=f"thing {importance}", event_date=old, importance=importance)
        for importance in (0.4, 0.6)
    ]
    await tiered.writer.put(owner, memories)
    assert [*why(await context(tiered, owner, parts=only("recent")))] == ["m0.6"]
    assert set(why(await context(tiered, owner, parts=only("more")))) == {"m0.4", "m0.6"}


async def test_entities_that_are_given_are_looked_for_instead_of_others(
    tiered: Service, owner: Owner
) -> None:
    await put(tiered, owner, a="we met Zora at the harbour")
    await tiered.writer.put(owner, [MemoryInput(id="d", text="tall", entities=["Ben"])])
    given = await context(
        tiered, owner, "what about Zora", stages=3, parts=only("entities"), entities=["Ben"]
    )
    assert (why(given), given.entities) == ({"d": "Ben"}, ["Ben"])


@pytest.mark.parametrize("most", [1, 60])
async def test_an_unknown_entity_is_looked_for_where_the_best_matches_do_not_name_it(
    tiered: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    monkeypatch.setattr(gathering, "MATCHES", most)
    cold = "the harbour by the sea is cold in the winter"
    await put(tiered, owner, a="we met Zora on a train", b=cold, c="Zora sings")
    text = "is the harbour by the sea cold in the winter, Zora"
    assert why(await context(tiered, owner, text, stages=2, parts=only("matches"))).keys() >= {"b"}
    reply = await context(tiered, owner, text, stages=3, parts=only("entities"))
    shown = ({"a": "Zora", "c": "Zora"}, ["Zora"]) if most == 1 else ({}, [])
    assert (why(reply), reply.entities) == shown


async def test_what_a_session_was_shown_is_noted(rich: Service, owner: Owner) -> None:
    shown = why(await context(rich, owner, session_id="s"))
    assert (await rich.sessions.state(owner, "s", 0)).shown == sorted(shown)
    assert await context(rich, owner, session_id="unknown")
    assert await rich.client.execute("EXISTS", owner.session("unknown")) == 0


async def test_entities_that_were_late_are_there_for_the_next_turn(
    holding: Service, owner: Owner, held: Held
) -> None:
    await put(holding, owner, **{f"tea{i}": f"tea and more tea {i}" for i in range(15)})
    await holding.writer.put(owner, [MemoryInput(id="ben", text="tall", entities=["Ben"])])
    await holding.sessions.open(owner, SessionInput(id="s"))
    held.open.clear()
    request = ContextRequest(text="tea with Ben", session_id="s", stages=3, max_ms=60)
    reply = await holding.contexts.whole(owner, request)
    assert "entities" in stages_of(reply)[2].skipped
    held.open.set()
    await holding.contexts.drained()
    loaded = (await holding.sessions.state(owner, "s", 0)).loaded
    assert len(loaded) == 10
    assert "ben" in {one for one, _, _ in loaded}


# what it costs ---------------------------------------------------------------------------------------


async def test_a_first_stage_is_two_commands_and_none_when_it_is_known(
    rich: Service, owner: Owner, sent: list[str]
) -> None:
    reply = await context(rich, owner, None, stages=1)
    assert sorted(sent) == ["rm_open_ro_v1", "rm_profile_ro_v1"]
    sent.clear()
    assert (await context(rich, owner, None, stages=1)).text == reply.text
    assert sent == []


async def test_until_the_first_stage_is_out_nothing_else_is_fetched(
    rich: Service, owner: Owner, sent: list[str]
) -> None:
    await rich.reader._vectors.made([TEXT])  # as it is of a message that was just said
    sent.clear()
    stages = rich.contexts.stages(owner, ContextRequest(text=TEXT, stages=4))
    await anext(stages)
    assert sorted(sent) == ["rm_open_ro_v1", "rm_profile_ro_v1"]
    await anext(stages)
    assert any("rm_search" in one for one in sent)
    await stages.aclose()


async def test_a_context_that_is_known_asks_only_what_stands_around(
    rich: Service, owner: Owner, sent: list[str]
) -> None:
    first = await context(rich, owner)
    assert sum("rm_search" in one for one in sent) == 3  # matches, entity, deep
    assert len(sent) <= 9
    sent.clear()
    assert (await context(rich, owner)).text == first.text
    assert sorted(sent) == ["rm_around_ro_v1", "rm_summary_ro_v1"]


async def test_a_profile_that_nobody_wants_is_not_fetched(
    rich: Service, owner: Owner, sent: list[str]
) -> None:
    await context(rich, owner, None, stages=1, parts=only("pinned"))
    assert sent == ["rm_open_ro_v1"]


async def test_contexts_at_once_share_their_searches(rich: Service, owner: Owner, sent: list[str]) -> None:
    replies = await asyncio.gather(*(context(rich, owner, stages=2) for _ in range(10)))
    assert len({reply.text for reply in replies}) == 1
    assert sum("rm_search" in one for one in sent) == 1


async def test_the_first_stage_waits_for_no_embedding_and_who_leaves_ends_the_work(
    holding: Service, owner: Owner, held: Held
) -> None:
    await put(holding, owner, a="Ben drinks green tea")
    await holding.sessions.open(owner, SessionInput(id="s", pins=["a"]))
    held.open.clear()
    request = ContextRequest(text=TEXT, session_id="s", stages=4)
    stages = holding.contexts.stages(owner, request)
    first = await anext(stages)
    assert isinstance(first, Stage)
    assert [block.part for block in first.blocks] == ["pinned"]
    await until("the search waits", lambda: asyncio.sleep(0, held.waiting > 0))
    await stages.aclose()
    await until("nothing is fetched", lambda: asyncio.sleep(0, not fetches()))
    assert holding.l1._tickets == {}


# what fails ------------------------------------------------------------------------------------------


async def test_entities_that_cannot_be_asked_for_are_skipped(rich: Service, owner: Owner) -> None:
    nowhere = Client(Settings(), "redis://127.0.0.1:1")
    contexts = rich.contexts
    contexts._sources = replace(contexts._sources, names=NameBook(nowhere))
    reply = await context(rich, owner, session_id="s")
    third = stages_of(reply)[2]
    assert (third.partial, third.skipped) == (True, ["entities"])
    assert third.reason
    assert third.reason.startswith("Redis cannot answer now")
    assert {block.part for block in blocks_of(reply)} == {*STAGE_OF} - {"entities"}
    assert [stage.partial for stage in stages_of(reply)] == [False, False, True, False]
    await nowhere.close()


async def test_edges_of_a_foreign_type_are_skipped(rich: Service, owner: Owner) -> None:
    await rich.client.execute("SET", owner.similar, "foreign")
    reply = await context(rich, owner, session_id="s")
    fourth = stages_of(reply)[3]
    assert (fourth.skipped, "WRONGTYPE" in (fourth.reason or "")) == (["history", "related"], True)
    assert {block.part for block in blocks_of(reply)} == {*STAGE_OF} - {"history", "related"}


async def test_without_an_embedder_words_are_searched_and_it_says_so(
    holding: Service, owner: Owner, held: Held
) -> None:
    await put(holding, owner, a="Ben drinks green tea", b="the harbour is cold")
    held.away = True
    reply = await context(holding, owner, "green tea", stages=2)
    assert [*why(reply)] == ["a"]
    assert (reply.partial, stages_of(reply)[1].skipped) == (True, ["matches", "more"])
    assert "embedder" in str(stages_of(reply)[1].reason)


async def test_without_an_index_it_is_made_again(rich: Service, owner: Owner) -> None:
    name = (await rich.client.execute("FT.INFO", owner.index))[1]
    await rich.client.execute("FT.DROPINDEX", name)
    reply = await context(rich, owner)
    assert "turn1" in why(reply)
    assert not reply.partial


@pytest.mark.parametrize("value", ["x", "5"])
async def test_a_profile_of_another_hand_fails_no_context(rich: Service, owner: Owner, value: str) -> None:
    await rich.client.execute("HSET", owner.profile, "current_projects", value)
    assert "turn1" in why(await context(rich, owner))


@pytest.mark.parametrize("sources", [None, "x"])
async def test_a_summary_of_another_hand_fails_no_context(
    rich: Service, owner: Owner, sources: str | None
) -> None:
    key = f"{owner.summary_prefix}entity:Ben"
    await rich.client.execute("HDEL", key, "sources", "digests")
    if sources is not None:
        await rich.client.execute("HSET", key, "sources", sources)
    assert "ben" in why(await context(rich, owner))


async def test_a_batch_fails_as_its_first_failure(tiered: Service, owner: Owner) -> None:
    requests = [ContextRequest(text="tea"), ContextRequest(session_id="unknown")]
    with pytest.raises(NotFound):
        await tiered.contexts.batch(owner, requests)


# coherence -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gone", [True, False])
async def test_a_word_of_a_deleted_memory_is_in_no_title(
    tiered: Service, owner: Owner, *, gone: bool
) -> None:
    made = Made(tiered, owner)
    await put(tiered, owner, a="quinces", w="zebra")
    await put(tiered, owner, **{f"new{i}": f"new {i}" for i in range(12)})  # so `w` is none of the newest
    a, w = await made.digests("a"), await made.digests("w")
    await made.topic(7, [("quinces", ["a"]), ("zebra", ["w"])], [*a, *w], 2)
    await made.summary("topic:7", a)
    await tiered.sessions.open(owner, SessionInput(id="s", active_topics=["7"]))
    request = ContextRequest(text="xylophone", session_id="s", stages=2, parts=only("topics"))
    stages = tiered.contexts.stages(owner, request)
    await anext(stages)
    if gone:
        await tiered.writer.delete(owner, "w")
    second = await anext(stages)
    await stages.aclose()
    assert isinstance(second, Stage)
    assert ("zebra" in second.text) != gone


async def test_what_is_deleted_between_stages_is_in_no_later_one(rich: Service, owner: Owner) -> None:
    stages = rich.contexts.stages(owner, ContextRequest(text=TEXT, session_id="s", stages=4))
    await anext(stages)
    await asyncio.sleep(0)
    for one in ("turn1", "ahead", "ben"):
        await rich.writer.delete(owner, one)
    later = [part async for part in stages if isinstance(part, Stage)]
    ids = {memory.id for stage in later for block in stage.blocks for memory in block.memories}
    assert ids.isdisjoint({"turn1", "ahead", "ben"})
    assert len(later) == 3
    assert rich.l1._tickets == {}


async def test_a_watch_gives_back_what_it_reads_under(service: Service, owner: Owner) -> None:
    watch = Watch(service.l1, service.coherence, service.browser, owner)
    for ids in (["a", "b"], [], ["a"], ["a", "b"]):
        assert (await watch.read(ids)).gone == {*ids}
    watch.close()
    assert service.l1._tickets == {}
