"""lua/derive.lua and lua/parts/derived.lua: what is derived goes in the step that changes its source."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec
import numpy as np
import pytest

from redismem.client import Argument
from redismem.errors import StoreError
from redismem.keys import JOBS_LATER, WEIGHTS, Owner
from redismem.service import Service
from redismem.types import CorrectionRequest, ImportRecord, MemoryInput, MemoryPatch
from redismem.views import ProfilePatch
from tests.conftest import lasting_keys
from tests.property.test_derived_model import Stored, check, edges_of, stored

TOPIC = 7
SUMMARIES = ("entity:Ann", "day:2026-03-02", f"topic:{TOPIC}")
TTL_MS = 3_600_000
OLD_TEXT = "Ann grows quinces in Lisbon"
TEXTS = {
    "a": OLD_TEXT,
    "b": "Ann grows roses in Lisbon",
    "c": "Ben repairs bicycles",
    "d": "Cleo sings opera",
}

Words = list[tuple[str, list[str]]]
Arguments = tuple[Argument, ...]


@dataclass
class Made:
    """Derived data of four memories, stored by the Functions as the worker would."""

    service: Service
    owner: Owner

    async def execute(self, *command: Argument) -> Any:
        return await self.service.client.execute(*command)

    async def stored(self) -> Stored:
        return await stored(self.service.client, self.owner)

    async def call(self, name: str, *args: Argument, last: tuple[str, ...] = (), now_ms: int = 0) -> Any:
        keys = [self.owner.meta, *self.owner.derived, *last]
        head = self.owner.memory_prefix, now_ms or int(time.time() * 1000)
        return await self.service.functions.call(name, keys, *head, *args)

    async def digests(self, *ids: str) -> list[Argument]:
        """Return ids and digests in turn, as they are read now."""
        read = await self.service.worker._tools.library.read(self.owner, ids)
        return [part for item in read.items for part in (item.id, item.digest)]

    async def profile(self, read: list[Argument], patched: bytes = b"") -> Any:
        fields: list[Argument] = [
            "context_summary",
            '"grows quinces"',
            *self._sources(read),
            "compiled_at",
            "1",
        ]
        return await self.call("rm_profile_v1", patched, len(read) // 2, *read, *fields)

    async def summary(self, name: str, read: list[Argument]) -> Any:
        fields: list[Argument] = ["text", "grows quinces", "tokens", 2, "method", "x", "generated_at", "1"]
        head = TTL_MS, name, len(read) // 2, *read
        return await self.call("rm_summary_v1", *head, *fields, *self._sources(read))

    def _sources(self, read: list[Argument]) -> list[Argument]:
        return ["sources", msgspec.json.encode(read[::2]), "digests", " ".join(map(str, read[1::2]))]

    async def topic(self, number: int, words: Words, read: list[Argument], size: int) -> Any:
        seen = dict(zip(read[::2], read[1::2], strict=True))
        vector = np.eye(self.service.embedder.dim, dtype=np.float32)[0].tobytes()
        sent = number, "0.5", vector, size, msgspec.json.encode(words), msgspec.json.encode(seen)
        name = self.service.embedder.name
        return await self.call("rm_topics_v1", name, 8, *sent, last=(self.owner.centroids,))

    async def link(self, one: list[Argument], *others: list[Argument], cluster: str = "") -> Any:
        vector = await self.vector_digest(str(one[0]))
        flat: list[Argument] = [*one, vector, cluster, len(others)]
        for other in others:
            vector = await self.vector_digest(str(other[0]))
            flat += [*other, vector, "0.9000", "contradiction", "value", 1]
        return (await self.call("rm_link_v1", *flat))[0]

    async def vector_digest(self, memory_id: str) -> str:
        read = await self.service.worker._tools.library.read(self.owner, [memory_id])
        return read.vector_digests[0] if read.items else ""

    async def hash(self, key: str) -> dict[str, bytes]:
        flat = await self.execute("HGETALL", key)
        return {name.decode(): raw for name, raw in zip(flat[::2], flat[1::2], strict=True)}

    async def size(self, number: int = TOPIC) -> tuple[int, int]:
        raw = await self.execute("HGET", f"{self.owner.cluster_prefix}{number}", "size")
        return int(raw), int(await self.execute("ZSCORE", self.owner.topics, number))

    async def everything(self) -> None:
        """Profile, summaries, a topic, edges and conflicts of `a`, and what is none of its."""
        a, b, c, d = [await self.digests(one) for one in "abcd"]
        assert await self.profile([*a, *b]) == b"OK"
        for name in SUMMARIES:
            assert await self.summary(name, [*a, *b]) == b"OK"
        assert await self.summary("entity:Ben", c) == b"OK"
        words = [("quinces", ["a"]), ("grows", ["a", "b"]), ("roses", ["b"]), ("lisbon", ["b", "a"])]
        assert await self.topic(TOPIC, words, [*a, *b], 3) == b"OK"
        assigned = [part for one in (a, b, c) for part in (*one, TOPIC)]
        assert await self.call("rm_assign_v1", *assigned) == 3
        assert await self.link(a, b) == b"OK"
        assert await self.link(c, a, b) == b"OK"
        assert await self.link(b, d) == b"OK"
        assert await self.link(d) == b"OK"


@pytest.fixture
async def made(service: Service, owner: Owner) -> Made:
    there = Made(service, owner)
    memories = [
        MemoryInput(id=one, text=text, topics=["t"], entities=["Ann"], session_id="s" if one == "d" else None)
        for one, text in TEXTS.items()
    ]
    await service.writer.put(owner, memories)
    await there.everything()
    await service.client.execute("DEL", JOBS_LATER)
    return there


Change = Callable[[Service, Owner], Awaitable[object]]


def patch(**changes: Any) -> Change:
    return lambda service, owner: service.writer.update(owner, "a", MemoryPatch(**changes))


async def correct(service: Service, owner: Owner) -> None:
    new = MemoryInput(text="Ann moved to Porto")
    await service.writer.correct(owner, CorrectionRequest(ids=["a"], memory=new))


async def supersede(service: Service, owner: Owner) -> None:
    same = ImportRecord(id="a", text=OLD_TEXT, topics=["t"], entities=["Ann"], superseded_by="b")
    await service.writer.put(owner, [same])


async def recreate(service: Service, owner: Owner) -> None:
    await service.writer.delete(owner, "a")
    await service.writer.put(owner, [MemoryInput(id="a", text="Ann moved away")])


#: changes of what a memory says
TELLING: dict[str, Change] = {
    "delete": lambda service, owner: service.writer.delete(owner, "a"),
    "correct": correct,
    "put over": lambda service, owner: service.writer.put(owner, [MemoryInput(id="a", text="Ann left")]),
    "superseded by an import": supersede,
    "text": patch(text="Ann grows pears"),
    "topics": patch(topics=["u"]),
    "entities": patch(entities=["Anna"]),
    "moment": patch(event_date=datetime(2026, 3, 4, tzinfo=UTC)),
    "delete and create": recreate,
}

#: changes of what else derived data shows or goes by
OTHER: dict[str, Change] = {
    "pinned": patch(pinned=True),
    "type": patch(memory_type="fact"),
    "session": patch(session_id="s"),
    "much confidence": patch(confidence=0.2),
}

ALL = TELLING | OTHER


@pytest.mark.parametrize("change", ALL)
async def test_what_was_made_from_a_memory_goes_in_the_step_that_changes_it(made: Made, change: str) -> None:
    assert "a" in await made.hash(f"redismem:made:{{{made.owner.tag}}}")
    await ALL[change](made.service, made.owner)
    found = await made.stored()
    check(found)
    assert not found.hash("profile")
    assert set(found.each("summary")) == {"entity:Ben"}
    words = msgspec.json.decode(found.hash("cluster", str(TOPIC))["words"])
    assert words == [["grows", ["b"]], ["roses", ["b"]], ["lisbon", ["b"]]]
    assert set(edges_of(found)) == {("c", "b"), ("b", "d")}
    assert set(found.hash("conflicts")) == {"b\x1fc", "d\x1fb"}
    assert "a" not in found.hash("made")


@pytest.mark.parametrize("change", ALL)
async def test_what_went_is_queued_to_be_made_again_within_a_second(made: Made, change: str) -> None:
    await ALL[change](made.service, made.owner)
    now_ms = time.time() * 1000
    for kind in ("profile", *(f"summary:{name}" for name in SUMMARIES)):
        due_ms = await made.execute("ZSCORE", JOBS_LATER, made.owner.job(kind))
        assert due_ms is not None, kind
        assert float(due_ms) <= now_ms + 1000, kind
    assert not await made.execute("ZSCORE", JOBS_LATER, made.owner.job("summary:entity:Ben"))


@pytest.mark.parametrize("change", [patch(importance=0.9), patch(importance=0.1, confidence=0.95)])
async def test_a_change_of_weight_keeps_what_was_made(made: Made, change: Change) -> None:
    before = (await made.stored()).derived
    await change(made.service, made.owner)
    assert (await made.stored()).derived == before


async def test_the_same_content_again_keeps_what_was_made(made: Made) -> None:
    before = await made.stored()
    again = MemoryInput(id="a", text=OLD_TEXT, topics=["t"], entities=["Ann"])
    await made.service.writer.put(made.owner, [again])
    assert await made.stored() == before


@pytest.mark.parametrize("change", TELLING)
async def test_a_job_that_read_before_a_change_writes_nothing_of_it(made: Made, change: str) -> None:
    a, b, c = [await made.digests(one) for one in "abc"]
    await TELLING[change](made.service, made.owner)
    before = await made.stored()
    assert await made.profile([*b, *a]) == b"STALE"
    assert await made.summary("month:2026-03", [*b, *a]) == b"STALE"
    assert await made.summary("entity:Ben", [*a, *c]) == b"STALE"
    assert await made.call("rm_assign_v1", *a, 8) == 0
    assert await made.link(a, c) in (b"STALE", b"GONE")
    assert await made.topic(8, [("quinces", ["a"])], a, 1) == b"OK"
    found = await made.stored()
    check(found)
    assert found.hash("cluster", "8")["words"] == b"[]"
    assert found.each("summary") == before.each("summary")
    assert found.memories == before.memories
    assert await made.link(b, a, c) == b"OK"  # one end is as it was, the other is left out
    found = await made.stored()
    check(found)
    assert set(edges_of(found)) == {("c", "b"), ("b", "c")}


async def test_a_job_that_read_before_a_forget_writes_nothing(made: Made) -> None:
    a, b = await made.digests("a"), await made.digests("b")
    await made.service.writer.forget(made.owner)
    assert await made.profile([*a, *b]) == b"GONE"
    assert await made.profile([]) == b"GONE"
    assert await made.summary("entity:Ann", a) == b"STALE"
    assert await made.topic(8, [("quinces", ["a"])], a, 1) == b"STALE"
    assert await made.call("rm_topics_end_v1", 3, 8, last=(made.owner.centroids,)) == [b"OK", 0]
    assert await made.call("rm_assign_v1", *a, 8) == 0
    assert await made.link(a, b) == b"GONE"
    assert await made.call("rm_decay_v1", "0.01", "a", "b", last=(WEIGHTS,)) == 0
    assert not [key for key in await lasting_keys(made.service.client) if b"{alice}" in key]


async def test_a_forget_leaves_no_key_and_no_job(made: Made) -> None:
    await made.execute("ZADD", made.owner.used, 1, "a")
    await made.service.views.change_profile(made.owner, ProfilePatch(display_name="Zoe"))
    await made.service.jobs.queue(made.owner, "profile", "summary:entity:Ann")
    await made.service.writer.forget(made.owner)
    assert [key for key in await lasting_keys(made.service.client) if b"{alice}" in key] == []
    assert await made.execute("ZCARD", JOBS_LATER) == 0


async def test_a_word_goes_with_its_last_witness_only(made: Made) -> None:
    key = f"{made.owner.cluster_prefix}{TOPIC}"
    assert (await made.hash(key))["label"] == b"quinces, grows, roses"
    await made.service.writer.delete(made.owner, "b")
    assert (await made.hash(key))["label"] == b"quinces, grows, lisbon"
    await made.service.writer.delete(made.owner, "a")
    fields = await made.hash(key)
    assert (fields["label"], fields["words"]) == (b"", b"[]")
    assert await made.digests() == []


async def test_a_compilation_takes_the_place_of_the_last_one(made: Made) -> None:
    assert await made.profile(await made.digests("c")) == b"OK"
    assert await made.summary("entity:Ann", await made.digests("b")) == b"OK"
    assert await made.topic(TOPIC, [("bicycles", ["c"])], await made.digests("c"), 1) == b"OK"
    check(await made.stored())
    await made.service.writer.delete(made.owner, "a")
    assert (await made.hash(made.owner.profile))["context_summary"] == b'"grows quinces"'
    assert await made.execute("EXISTS", f"{made.owner.summary_prefix}entity:Ann") == 1


async def test_a_summary_without_sources_goes_and_one_with_them_expires(made: Made) -> None:
    key = f"{made.owner.summary_prefix}entity:Ann"
    assert 0 < await made.execute("PTTL", key) <= TTL_MS
    assert await made.summary("entity:Ann", []) == b"OK"
    assert await made.execute("EXISTS", key) == 0
    check(await made.stored())


async def test_a_topic_keeps_no_id_and_digest_of_what_is_gone(made: Made) -> None:
    key = f"{made.owner.cluster_prefix}{TOPIC}"
    assert set(msgspec.json.decode((await made.hash(key))["digests"])) == {"a", "b"}
    await made.service.writer.delete(made.owner, "a")
    assert set(msgspec.json.decode((await made.hash(key))["digests"])) == {"b"}


async def test_topics_of_vectors_that_do_not_serve_are_refused(made: Made) -> None:
    await made.execute("HSET", made.owner.meta, "embedder", "another")
    assert await made.topic(8, [], [], 1) == b"STALE"
    assert await made.execute("EXISTS", f"{made.owner.cluster_prefix}8") == 0


async def test_a_topic_that_is_not_kept_goes_with_its_summary(made: Made) -> None:
    await made.topic(8, [("bicycles", ["c"])], await made.digests("c"), 1)
    assert await made.call("rm_topics_end_v1", 2, 8, last=(made.owner.centroids,)) == [b"OK", 1]
    found = await made.stored()
    check(found)
    assert set(found.each("cluster")) == {"8"}
    assert f"topic:{TOPIC}" not in found.each("summary")
    assert await made.execute("HGET", made.owner.meta, "topic_number") == b"9"
    assert await made.execute("HGET", made.owner.meta, "unclustered") == b"2"


async def members(made: Made) -> int:
    live = (await made.stored()).live
    return sum(fields.get("cluster") == str(TOPIC).encode() for fields in live.values())


async def correct_a_turn(service: Service, owner: Owner) -> None:
    await service.writer.correct(owner, CorrectionRequest(ids=["f"], memory=MemoryInput(text="Eve left")))


async def delete_a_superseded_one(service: Service, owner: Owner) -> None:
    await TELLING["correct"](service, owner)
    await service.writer.delete(owner, "a")


SIZED = ALL | {"delete of a superseded one": delete_a_superseded_one, "correct of a turn": correct_a_turn}


@pytest.mark.parametrize("change", SIZED)
async def test_the_size_of_a_topic_is_the_number_of_its_members(made: Made, change: str) -> None:
    turns = [MemoryInput(id=one, text=f"Eve says {one}", session_id="z") for one in "ef"]
    await made.service.writer.put(made.owner, turns)
    assert await made.link(await made.digests("f"), cluster=str(TOPIC)) == b"OK"
    assert await made.size() == (4, 4)
    await SIZED[change](made.service, made.owner)
    assert await made.size() == (await members(made),) * 2


async def test_a_memory_that_is_linked_joins_its_topic_once(made: Made) -> None:
    d = await made.digests("d")
    for _ in range(2):
        assert await made.link(d, cluster=str(TOPIC)) == b"OK"
        assert await made.size() == (4, 4)
        assert await made.link(d, cluster="8") == b"OK"
    assert await members(made) == 4


async def test_an_edge_is_made_again_in_the_place_of_the_old_ones(made: Made) -> None:
    c, d = await made.digests("c"), await made.digests("d")
    assert await made.link(c, d) == b"OK"
    found = await made.stored()
    check(found)
    assert set(edges_of(found)) == {("a", "b"), ("c", "d"), ("b", "d")}
    assert set(found.hash("conflicts")) == {"b\x1fa", "d\x1fc", "d\x1fb"}


async def test_only_what_was_linked_or_is_gone_is_not_fresh_any_more(made: Made) -> None:
    await made.execute("SADD", made.owner.fresh, "a", "b", "gone")
    a, b = await made.digests("a"), await made.digests("b")
    await made.call("rm_link_v1", *a, await made.vector_digest("a"), "", 0)
    other_vector = "0123456789abcdef"
    words = await made.call("rm_link_v1", *b, other_vector, "", 0, "gone", "", "", "", 0)
    assert words == [b"STALE", b"GONE"]
    assert await made.execute("SMEMBERS", made.owner.fresh) == [b"b"]


async def test_a_turn_loses_its_edges_with_its_vector(made: Made) -> None:
    turns = [MemoryInput(id=one, text=f"Eve says {one}", session_id="z") for one in "ef"]
    await made.service.writer.put(made.owner, turns)
    assert await made.link(await made.digests("f"), await made.digests("a")) == b"OK"
    assert ("f", "a") in edges_of(await made.stored())
    await made.service.writer.delete(made.owner, "e")
    assert await made.service.backfill.drained(10)
    found = await made.stored()
    assert not [ends for ends in edges_of(found) if "f" in ends]
    assert b"f" in found.derived["fresh", ""]


async def test_used_forgets_what_is_gone_and_a_late_touch_does_not_bring_it_back(made: Made) -> None:
    made.service.touches.add(made.owner, ["a", "b", "c"])
    await made.service.touches.flush()
    await TELLING["correct"](made.service, made.owner)
    await made.service.writer.delete(made.owner, "b")
    made.service.touches.add(made.owner, ["b", "c"])
    await made.service.touches.flush()
    assert await made.execute("ZRANGE", made.owner.used, 0, -1) == [b"c"]


async def test_a_compilation_that_read_other_settings_of_the_caller_is_stale(made: Made) -> None:
    c = await made.digests("c")
    await made.service.views.change_profile(made.owner, ProfilePatch(display_name="Zoe"))
    assert await made.profile(c) == b"STALE"
    raw = (await made.hash(made.owner.profile))["patched"]
    assert await made.profile(c, raw) == b"OK"
    assert (await made.hash(made.owner.profile))["display_name"] == b'"Zoe"'


async def old_delete(service: Service, owner: Owner) -> None:
    """Delete as a process of the version before derived data does."""
    head = owner.memory_prefix, int(time.time() * 1000), 1000
    await service.functions.call("rm_delete_v1", owner.written[:10], *head, "a")


HANDS: dict[str, Change] = {
    "DEL": lambda service, owner: service.client.execute("DEL", owner.memory("a")),
    "HSET": lambda service, owner: service.client.execute("HSET", owner.memory("a"), "text", "Ann left"),
    "an old process": old_delete,
}


@pytest.mark.parametrize("hand", HANDS)
async def test_readers_hide_profile_and_summaries_of_what_another_hand_changed(made: Made, hand: str) -> None:
    await made.service.views.change_profile(made.owner, ProfilePatch(display_name="Zoe"))
    await HANDS[hand](made.service, made.owner)
    found = await made.service.views.profile(made.owner)
    assert (found.profile.display_name, found.profile.context_summary, found.sources) == ("Zoe", "", ())
    assert found.profile.compiled_at is None
    assert await made.service.views.summary(made.owner, "entity", "Ann") is None
    (topic,) = (await made.service.views.topics(made.owner)).topics
    assert topic.summary is None
    ben = await made.service.views.summary(made.owner, "entity", "Ben")
    assert ben is not None
    assert ben.sources == ["c"]


@pytest.mark.parametrize("hand", HANDS)
async def test_readers_hide_words_and_conflicts_of_what_another_hand_changed(made: Made, hand: str) -> None:
    await HANDS[hand](made.service, made.owner)
    (topic,) = (await made.service.views.topics(made.owner)).topics
    assert topic.words == ["grows", "roses", "lisbon"]
    pairs = [(one.older, one.newer) for one in (await made.service.views.conflicts(made.owner)).conflicts]
    assert sorted(pairs) == [("b", "c"), ("d", "b")]
    if hand != "HSET":
        near = (await made.service.views.similar(made.owner, "c")).similar
        assert [one.id for one in near] == ["b"]


async def test_whoever_takes_the_id_of_what_another_hand_removed_inherits_nothing(made: Made) -> None:
    await HANDS["DEL"](made.service, made.owner)
    await made.service.writer.put(made.owner, [MemoryInput(id="a", text="Ann moved away")])
    (topic,) = (await made.service.views.topics(made.owner)).topics
    assert "quinces" not in topic.words
    check(await made.stored())
    assert not [ends for ends in edges_of(await made.stored()) if "a" in ends]


FUNCTIONS: dict[str, Arguments] = {
    "profile": ("", 0),
    "profile_set": ("display_name", '"Zoe"'),
    "summary": (TTL_MS, "entity:Ann", 0),
    "topics": ("x", 8),
    "topics_end": (0,),
    "assign": ("a", "x", "1"),
    "link": ("a", "x", "", "", 0),
    "decay": ("0.01", "a"),
}


@pytest.mark.parametrize(("name", "sent"), FUNCTIONS.items())
async def test_a_foreign_type_is_refused_before_a_write(made: Made, name: str, sent: Arguments) -> None:
    before = await made.stored()
    await made.execute("DEL", made.owner.fresh)
    await made.execute("SET", made.owner.fresh, "x")
    last = (made.owner.centroids,)
    with pytest.raises(StoreError, match="RMEM_TYPE"):
        await made.call(f"rm_{name}_v1", *sent, last=last)
    await made.execute("DEL", made.owner.fresh)
    after = await made.stored()
    before.derived.pop(("fresh", ""), None)
    assert after == before


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("profile", ("", 2, "a", "x")),
        ("summary", (TTL_MS, "entity:Ann", 501)),
        ("topics", ("x", 8, 1)),
        ("topics_end", ("many",)),
        ("link", ("a", "x", "", "", 1, "b")),
        ("decay", ("often", "a")),
    ],
)
async def test_a_call_that_is_cut_off_changes_nothing(made: Made, name: str, args: Arguments) -> None:
    before = await made.stored()
    with pytest.raises(StoreError, match="RMEM_USAGE"):
        await made.call(f"rm_{name}_v1", *args, last=(made.owner.centroids,))
    assert await made.stored() == before
