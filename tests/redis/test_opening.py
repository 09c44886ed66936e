"""lua/context.lua on a real Redis: what a context begins with, what stands around memories, near topics."""

from __future__ import annotations

import time
from typing import Any

import msgspec
import numpy as np
import pytest

from redismem.client import Argument
from redismem.codec import widened
from redismem.conversation import SessionInput
from redismem.errors import StoreError
from redismem.keys import Owner
from redismem.opening import Around, NearTopic, Opening, around, near_topics, opening
from redismem.service import Service
from redismem.sessions import Sessions
from redismem.types import CorrectionRequest, MemoryInput
from tests.redis.test_conversations import NAMES, at, said, sessions
from tests.redis.test_derived import TTL_MS, Made

assert sessions  # a fixture

DAY_S = 86_400


@pytest.fixture
def made(service: Service, owner: Owner) -> Made:
    return Made(service, owner)


async def opened(
    service: Service, owner: Owner, session_id: str | None = None, *, newest: int = 10, after_s: float = 0.0
) -> Opening:
    return await opening(service.functions, owner, session_id, newest=newest, last_after_s=after_s)


async def put(service: Service, owner: Owner, *ids: str, **more: Any) -> None:
    await service.writer.put(owner, [MemoryInput(id=one, text=f"text of {one}", **more) for one in ids])


async def note(service: Service, owner: Owner, session_id: str, **fields: object) -> None:
    """Write fields of a session as any hand may."""
    flat = [part for name, value in fields.items() for part in (name, msgspec.json.encode(value))]
    await service.client.execute("HSET", owner.session(session_id), *flat)


async def talked(service: Service, owner: Owner, session_id: str, now_s: float) -> None:
    """Open a session, of which something is said to have been said."""
    await at(service, now_s).open(owner, SessionInput(id=session_id))
    await note(service, owner, session_id, messages=1)


async def topic(made: Made, number: int, text: str, reach: str = "0.5") -> None:
    """Store a topic whose centroid is the vector of a text."""
    vector = (await made.service.embedder.embed([text]))[0].astype(np.float32).tobytes()
    sent = number, reach, vector, 1, b"[]", b"{}"
    name = made.service.embedder.name
    await made.call("rm_topics_v1", name, 8, *sent, last=(made.owner.centroids,))


def open_call(owner: Owner) -> tuple[str, list[str], list[Argument]]:
    prefixes = owner.memory_prefix, owner.summary_prefix, owner.session_prefix, owner.cluster_prefix
    keys = [owner.meta, owner.profile, owner.ids, owner.sessions, owner.session("s"), owner.turns]
    return "rm_open_ro_v1", keys, [*prefixes, "s", 10, "0", "superseded_by"]


def calls(owner: Owner) -> list[tuple[str, list[str], list[Argument]]]:
    around_args: list[Argument] = [owner.memory_prefix, "superseded_by", "a"]
    near_args: list[Argument] = ["deterministic-384", owner.cluster_prefix, 3, b"\0" * 4 * 384]
    return [
        open_call(owner),
        ("rm_around_ro_v1", [owner.turns, owner.similar], around_args),
        ("rm_near_topics_ro_v1", [owner.meta, owner.centroids], near_args),
    ]


# the Functions ---------------------------------------------------------------------------------------


async def test_too_few_keys_or_arguments_are_misuse(service: Service, owner: Owner) -> None:
    for name, keys, args in calls(owner):
        await service.functions.call(name, keys, *args, read=True)
        needed = 2 if name == "rm_around_ro_v1" else len(args)
        wrong = [(keys[:-1], args), *((keys, args[:fewer]) for fewer in range(needed))]
        for some_keys, some_args in wrong:
            with pytest.raises(StoreError, match="RMEM_USAGE"):
                await service.functions.call(name, some_keys, *some_args, read=True)


@pytest.mark.parametrize("count", ["", "x", "-1", "101", "1.5", "nan", "1e999"])
async def test_a_wrong_count_is_misuse(service: Service, owner: Owner, count: str) -> None:
    for (name, keys, args), place in zip(calls(owner)[::2], (5, 2), strict=True):
        with pytest.raises(StoreError, match="RMEM_USAGE"):
            await service.functions.call(name, keys, *args[:place], count, *args[place + 1 :], read=True)


async def test_keys_of_a_foreign_type_hold_nothing(
    service: Service, sessions: Sessions, owner: Owner, made: Made
) -> None:
    await talked(service, owner, "old", time.time())
    await sessions.open(owner, SessionInput(id="s"))
    await put(service, owner, "a", session_id="s", memory_type="message")
    await service.client.execute("HSET", owner.profile, "important_memory_ids", '["a"]')
    await topic(made, 1, "tea")

    async def told() -> list[object]:
        found = await opened(service, owner, "s")
        near_tea = await near(service, owner, "tea")
        return [bool(one) for one in (found.important, found.last, found.session, found.said, near_tea)]

    assert await told() == [True] * 5
    keys = owner.profile, owner.sessions, owner.session("s"), owner.turns, owner.centroids
    for place, key in enumerate(keys):
        await service.client.execute("SET", key, "foreign", "EX", 60)
        assert await told() == [False] * (place + 1) + [True] * (4 - place), key
    await service.client.execute("SET", owner.similar, "foreign", "EX", 60)
    with pytest.raises(StoreError, match="WRONGTYPE"):
        await around(service.functions, owner, ["a"])


async def test_a_list_of_ids_of_a_foreign_type_has_no_newest(service: Service, owner: Owner) -> None:
    await service.client.execute("SET", owner.ids, "foreign")
    assert (await opened(service, owner)).newest == ()


@pytest.mark.parametrize(
    ("where", "field", "value"),
    [
        ("summary", "sources", "[null]"),
        ("summary", "sources", '[["a"]]'),
        ("cluster", "words", "[1]"),
        ("cluster", "words", '[["tea", 5]]'),
        ("cluster", "words", '[["tea", [null]]]'),
    ],
)
async def test_json_of_another_hand_fails_no_opening(
    service: Service, sessions: Sessions, owner: Owner, made: Made, where: str, field: str, value: str
) -> None:
    await sessions.open(owner, SessionInput(id="s", active_topics=["7"]))
    await put(service, owner, "a")
    read = await made.digests("a")
    await made.topic(7, [("tea", ["a"])], read, 1)
    await made.summary("topic:7", read)
    key = f"{owner.summary_prefix}topic:7" if where == "summary" else f"{owner.cluster_prefix}7"
    await service.client.execute("HSET", key, field, value)
    assert (await opened(service, owner, "s")).newest == ("a",)


async def test_memories_of_a_foreign_type_or_without_text_are_left_out(
    service: Service, owner: Owner
) -> None:
    await put(service, owner, "a", "b", "c")
    await service.client.execute("SET", owner.memory("a"), "foreign")
    await service.client.execute("HDEL", owner.memory("b"), "text")
    assert set((await opened(service, owner)).memories) == {"c"}


# opening ---------------------------------------------------------------------------------------------


async def test_of_nobody_nothing_is_known(service: Service) -> None:
    assert await opened(service, Owner("nobody"), "s") == Opening(generation=0, session={})


async def test_an_opening_holds_the_session_and_the_memories_it_names(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await put(service, owner, *(f"m{i}" for i in range(6)))
    await sessions.open(owner, SessionInput(id="s", active_topics=["tea", "3"], pins=["m0"]))
    await sessions.note(owner, "s", loaded=[("m1", "topic", 0.5), ("gone", "time", 0.1)], shown=["m2"])
    await service.client.execute("HSET", owner.memory("m1"), "cluster", "12")
    await service.client.execute("HSET", owner.profile, "important_memory_ids", '["m3","gone"]')
    found = await opened(service, owner, "s", newest=1)
    assert found.generation == int(await service.client.execute("HGET", owner.meta, "generation"))
    assert found.names("active_topics") == ["tea", "3"]
    assert found.names("pins") == ["m0"]
    assert found.loaded == [("m1", "topic", 0.5), ("gone", "time", 0.1)]
    assert (found.important, found.newest, found.last) == (("m3", "gone"), ("m5",), None)
    # not what its own latest context showed
    assert {name: placed.cluster for name, placed in found.memories.items()} == {
        **dict.fromkeys(("m0", "m3", "m5"), ""),
        "m1": "12",
    }
    assert found.memories["m3"].memory.text == "text of m3"


async def test_superseded_and_deleted_memories_are_named_but_not_there(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await put(service, owner, "a", "b", "c", "d")
    await sessions.open(owner, SessionInput(id="s", pins=["a", "b", "c", "d"]))
    await service.writer.correct(owner, CorrectionRequest(ids=["a"], memory=MemoryInput(id="n", text="new")))
    await service.writer.delete(owner, "b")
    await service.client.execute("DEL", owner.memory("c"))
    found = await opened(service, owner, "s", newest=0)
    assert found.names("pins") == ["a", "b", "c", "d"]
    assert set(found.memories) == {"d"}
    assert set((await opened(service, owner, "s")).memories) == {"d", "n"}


async def test_any_name_may_be_that_of_a_session_and_of_a_memory(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    for name in NAMES:
        await sessions.open(owner, SessionInput(id=name, pins=[name], active_topics=[name]))
        await note(service, owner, name, messages=1)
        memory = MemoryInput(id=name, text="odd", session_id=name, memory_type="message")
        await service.writer.put(owner, [memory])
    for name in NAMES:
        found = await opened(service, owner, name, newest=0)
        assert (found.names("pins"), found.names("active_topics")) == ([name], [name])
        assert found.said == (name,)
        assert found.memories[name].memory.text == "odd"
        assert found.last
        assert found.last.id != name


async def test_what_is_read_is_bounded(service: Service, sessions: Sessions, owner: Owner) -> None:
    ids = [f"m{i:03}" for i in range(350)]
    await service.writer.put(owner, [MemoryInput(id=one, text=one) for one in ids], wait=False)
    await sessions.open(owner, SessionInput(id="s", pins=ids[:100]))
    await sessions.note(owner, "s", loaded=[(one, "topic", 0.1) for one in ids[100:170]])
    important = msgspec.json.encode(ids[170:250])
    await service.client.execute("HSET", owner.profile, "important_memory_ids", important)
    found = await opened(service, owner, "s", newest=100)
    assert len(found.newest) == 100
    # pins, 30 of what was loaded, 60 of what is important, the newest
    assert set(found.memories) == {*ids[:100], *ids[100:130], *ids[170:230], *ids[250:]}
    assert await service.backfill.drained(10)


async def test_a_session_s_newest_pins_are_read(service: Service, sessions: Sessions, owner: Owner) -> None:
    ids = [f"m{i:03}" for i in range(100)]
    await service.writer.put(owner, [MemoryInput(id=one, text=one) for one in ids], wait=False)
    await sessions.open(owner, SessionInput(id="s", pins=ids))
    assert await service.backfill.drained(10)
    assert "m099" in (await opened(service, owner, "s", newest=0)).memories


async def test_lists_of_another_hand_are_empty(service: Service, sessions: Sessions, owner: Owner) -> None:
    await put(service, owner, "a")
    await sessions.open(owner, SessionInput(id="s"))
    for value in ("", "x", "null", "1", "{}", '{"a":1}', "[1,null,{}]", "\xff"):
        key = owner.session("s")
        fields = [part for name in ("pins", "loaded", "active_topics", "shown") for part in (name, value)]
        await service.client.execute("HSET", key, *fields)
        await service.client.execute("HSET", owner.profile, "important_memory_ids", value)
        found = await opened(service, owner, "s")
        assert (found.names("pins"), found.loaded, found.important) == ([], [], ())
        assert set(found.memories) == {"a"}


# the last session ------------------------------------------------------------------------------------


async def test_the_last_session_is_the_newest_other_one(service: Service, owner: Owner) -> None:
    now_s = 1_800_000_000.0
    for i, name in enumerate(("oldest", "older", "own")):
        await talked(service, owner, name, now_s + i)
    await put(service, owner, "a", "b")
    await note(service, owner, "older", shown=["a", "gone"])
    found = await opened(service, owner, "own", newest=0)
    assert found.last
    assert (found.last.id, found.last.at_s) == ("older", now_s + 1)
    assert (found.last.summary, found.last.sources, found.last.shown) == ("", (), ("a", "gone"))
    assert set(found.memories) == {"a"}
    other = (await opened(service, owner, "another", newest=0)).last
    assert other
    assert other.id == "own"


async def test_a_session_with_a_summary_is_preferred_among_the_last_six(
    service: Service, owner: Owner, made: Made
) -> None:
    now_s = 1_800_000_000.0
    await put(service, owner, "a")
    read = await made.digests("a")
    for i in range(8):
        await talked(service, owner, f"s{i}", now_s + i)
    for name, shown in (("s0", "s7"), ("s2", "s2"), ("s4", "s4")):
        await made.summary(f"session:{name}", read)
        last = (await opened(service, owner)).last
        assert last
        assert last.id == shown, name
        assert last.summary == ("grows quinces" if shown != "s7" else "")
    assert last
    assert last.sources == ("a",)


async def test_a_session_that_ended_long_ago_is_no_last_session(service: Service, owner: Owner) -> None:
    now_s = 1_800_000_000.0
    await talked(service, owner, "old", now_s)
    assert (await opened(service, owner, "s", after_s=now_s - 1)).last
    assert (await opened(service, owner, "s", after_s=now_s)).last is None


async def test_a_summary_of_a_session_outlives_the_session(
    service: Service, owner: Owner, made: Made
) -> None:
    await at(service, time.time()).open(owner, SessionInput(id="old"))
    await put(service, owner, "a")
    await made.summary("session:old", await made.digests("a"))
    await service.client.execute("DEL", owner.session("old"))
    last = (await opened(service, owner, "s")).last
    assert last
    assert (last.id, last.summary, last.shown) == ("old", "grows quinces", ())


async def test_a_session_in_which_nothing_was_said_is_no_last_session(service: Service, owner: Owner) -> None:
    now_s = time.time()
    await at(service, now_s - 60).open(owner, SessionInput(id="talk"))
    await at(service, now_s - 50).say(owner, "talk", said("hello"))
    await at(service, now_s - 40).open(owner, SessionInput(id="empty"))
    last = (await opened(service, owner, "own")).last
    assert last
    assert last.id == "talk"


# derived texts ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["DEL", "correct", "HSET", "SET"])
async def test_texts_and_words_of_what_changed_are_not_shown(
    service: Service, sessions: Sessions, owner: Owner, made: Made, how: str
) -> None:
    await talked(service, owner, "old", time.time())
    await put(service, owner, "a", "b")
    a, b = await made.digests("a"), await made.digests("b")
    await made.topic(7, [("quinces", ["a"]), ("roses", ["b"])], [*a, *b], 2)
    for name in ("topic:7", "session:old"):
        await made.summary(name, [*a, *b])
    await sessions.open(owner, SessionInput(id="s", active_topics=["7"]))
    found = await opened(service, owner, "s")
    assert found.last
    assert found.last.summary == "grows quinces"
    assert [(one.name, one.text, {*one.sources}) for one in found.topics] == [
        ("quinces, roses", "grows quinces", {"a", "b"})
    ]
    match how:
        case "correct":
            memory = MemoryInput(id="n", text="new")
            await service.writer.correct(owner, CorrectionRequest(ids=["a"], memory=memory))
        case "HSET":
            await service.client.execute("HSET", owner.memory("a"), "text", "other")
        case "SET":
            await service.client.execute("SET", owner.memory("a"), "foreign")
        case _:
            await service.client.execute("DEL", owner.memory("a"))
    found = await opened(service, owner, "s")
    assert found.last
    assert found.last.summary == ""
    assert [(one.name, one.text, one.sources) for one in found.topics] == [("roses", "", ("b",))]


async def test_a_topic_names_once_what_its_text_and_its_words_are_of(
    service: Service, sessions: Sessions, owner: Owner, made: Made
) -> None:
    await put(service, owner, "a", "b", "c")
    a, b, c = [await made.digests(one) for one in "abc"]
    await made.topic(7, [("quinces", ["a"]), ("roses", ["b"])], [*a, *b], 2)
    await made.summary("topic:7", [*a, *c])
    await sessions.open(owner, SessionInput(id="s", active_topics=["7"]))
    (found,) = (await opened(service, owner, "s")).topics
    assert sorted(found.sources) == ["a", "b", "c"]


async def test_a_text_whose_source_is_gone_is_not_shown_without_digests_either(
    service: Service, owner: Owner
) -> None:
    await talked(service, owner, "old", time.time())
    key = f"{owner.summary_prefix}session:old"
    await service.client.execute("HSET", key, "text", "secret", "sources", '["gone"]')
    await service.client.execute("PEXPIRE", key, TTL_MS)
    last = (await opened(service, owner, "s")).last
    assert last
    assert last.summary == ""


async def test_eight_active_topics_are_read_and_names_are_none(
    service: Service, sessions: Sessions, owner: Owner, made: Made
) -> None:
    await put(service, owner, "a")
    read = await made.digests("a")
    for number in range(1, 11):
        await made.topic(number, [(f"word{number}", ["a"])], read, 1)
    names = ["tea", *map(str, range(1, 11)), "7:x"]
    await sessions.open(owner, SessionInput(id="s", active_topics=names))
    found = await opened(service, owner, "s")
    assert [one.name for one in found.topics] == [f"word{number}" for number in range(1, 8)]
    assert all(one.text == "" for one in found.topics)


# what was said ---------------------------------------------------------------------------------------


async def test_the_last_twenty_messages_are_said_newest_first(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    for name in ("s", "t"):
        await sessions.open(owner, SessionInput(id=name))
    reply = await sessions.say(owner, "s", said(*(f"number {i}" for i in range(23))), wait=False)
    await sessions.say(owner, "t", said("another"), wait=False)
    ids = [item.id for item in reply.items]
    assert (await opened(service, owner, "s")).said == tuple(reversed(ids[3:]))
    await service.writer.delete(owner, ids[22])
    memory = MemoryInput(id="c", text="corrected", memory_type="message", session_id="s")
    await service.writer.correct(owner, CorrectionRequest(ids=[ids[21]], memory=memory))
    assert (await opened(service, owner, "s")).said[:2] == ("c", ids[20])
    assert (await opened(service, owner)).said == ()
    assert await service.backfill.drained(10)


async def test_a_fact_that_was_learned_in_the_session_was_not_said(
    service: Service, sessions: Sessions, owner: Owner
) -> None:
    await sessions.open(owner, SessionInput(id="s"))
    (item,) = (await sessions.say(owner, "s", said("I moved to Oslo"))).items
    await put(service, owner, "fact", session_id="s")
    assert (await opened(service, owner, "s")).said == (item.id,)


# around and near -------------------------------------------------------------------------------------


async def test_around_are_two_turns_on_either_side_and_the_nearest(
    service: Service, sessions: Sessions, owner: Owner, made: Made
) -> None:
    await put(service, owner, *(f"t{i}" for i in range(7)), session_id="s")
    await put(service, owner, "alone", "other")
    await made.link(await made.digests("alone"), await made.digests("other"))
    found = await around(service.functions, owner, ["t3", "t0", "alone", "gone"])
    assert {name: set(near) for name, near in found.beside.items()} == {
        "t3": {"t1", "t2", "t4", "t5"},
        "t0": {"t1", "t2"},
        "alone": set(),
        "gone": set(),
    }
    assert found.related == {"t3": (), "t0": (), "alone": ("other",), "gone": ()}
    assert set(found.memories) == {"t1", "t2", "t4", "t5", "other"}
    assert await around(service.functions, owner, []) == Around({}, {}, {})


async def test_what_is_gone_is_not_around(service: Service, owner: Owner, made: Made) -> None:
    await put(service, owner, "t0", "t1", "t2", "t3", session_id="s")
    await put(service, owner, "other")
    await made.link(await made.digests("t1"), await made.digests("other"))
    await service.writer.delete(owner, "t2")
    await service.client.execute("DEL", owner.memory("t0"), owner.memory("other"))
    assert set((await around(service.functions, owner, ["t1"])).memories) == {"t3"}


async def test_an_edge_of_another_hand_is_none(service: Service, owner: Owner) -> None:
    await put(service, owner, "a", "b")
    await service.client.execute("HSET", owner.similar, "oa", "\x1fb\x1f")
    assert (await around(service.functions, owner, ["a"])).related["a"] == ()


async def near(service: Service, owner: Owner, text: str, count: int = 3) -> list[NearTopic]:
    vector = (await service.embedder.embed([text]))[0].astype(np.float16).tobytes()
    return await near_topics(service.functions, owner, service.embedder.name, widened(vector), count)


async def test_topics_are_near_by_their_centroids(service: Service, owner: Owner, made: Made) -> None:
    await put(service, owner, "a")
    for number, text in ((1, "tea and rain"), (2, "violin concert"), (3, "tea")):
        await topic(made, number, text)
    found = await near(service, owner, "tea")
    assert [one.number for one in found] == ["3", "1", "2"]
    assert found[0].cosine == pytest.approx(1, abs=0.02)
    assert [one.within for one in found] == [True, True, False]
    assert [one.number for one in await near(service, owner, "tea", 1)] == ["3"]
    assert {one.reach for one in found} == {0.5}


async def test_topics_of_another_embedder_or_size_are_not_near(
    service: Service, owner: Owner, made: Made
) -> None:
    await put(service, owner, "a")
    assert await near(service, owner, "tea") == []
    await topic(made, 1, "tea")
    assert await near_topics(service.functions, owner, service.embedder.name, b"\0" * 16, 3) == []
    vector = (await service.embedder.embed(["tea"]))[0].tobytes()
    assert await near_topics(service.functions, owner, "another", vector, 3) == []
    await service.client.execute("HDEL", f"{owner.cluster_prefix}1", "reach")
    assert [one.reach for one in await near(service, owner, "tea")] == [1.0]
