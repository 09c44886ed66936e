"""The caches in Redis: cached searches (rm_search, rm_recall_ro), what a write drops of them, the hot set."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from redismem.client import Argument
from redismem.errors import StoreError
from redismem.keys import Owner
from redismem.query import index_schema
from redismem.service import Service
from redismem.write import record_arguments

EMBEDDER, DIM, FIELD, NOW_MS = "x", 4, "embedding", 1_800_000_000_000
NEVER = 2**53

Reply = list[Any]


@dataclass
class Store:
    """One owner's Functions, called by hand."""

    service: Service
    owner: Owner

    async def execute(self, *command: Argument) -> Any:
        return await self.service.client.execute(*command)

    async def write(self, name: str, *args: Argument) -> Reply:
        owner = self.owner
        keys = [owner.meta, owner.ids, owner.log, owner.turns, owner.searches, owner.hot, owner.hits]
        reply: Reply = await self.service.functions.call(name, keys, owner.memory_prefix, NOW_MS, *args)
        return reply

    async def put(self, *ids: str, text: str = "tea", kind: str = "given") -> Reply:
        records = [item for one in ids for item in record_arguments(one, kind, fields_of(text))]
        return await self.write("rm_put_v1", EMBEDDER, DIM, 100, len(ids), *records)

    async def update(self, memory_id: str, kind: str, text: str) -> Reply:
        version = await self.execute("HGET", self.owner.memory(memory_id), "version")
        record = record_arguments(memory_id, kind, fields_of(text))
        return await self.write("rm_update_v1", EMBEDDER, DIM, 100, version, *record)

    async def correct(self, olds: Sequence[str], new: str) -> Reply:
        record = record_arguments(new, "given", fields_of("new"))
        return await self.write("rm_correct_v1", EMBEDDER, DIM, 100, len(olds), *olds, *record)

    async def delete(self, *ids: str) -> Reply:
        return await self.write("rm_delete_v1", 100, *ids)

    def arguments(self, word: str, **changed: Argument) -> list[Argument]:
        args: dict[str, Argument] = {
            "prefix": self.owner.memory_prefix,
            "mode": "keyword",
            "vector": b"",
            "embedder": EMBEDDER,
            "words": word,
            "words_query": f"({word})",
            "filter": "*",
            "unfiltered": "-",
            "candidates": 50,
            "limit": 10,
            "timeout_ms": 5000,
            "word_weight": 0.6,
            "share": 0.5,
            "other": 0.5,
            "min_similarity": "",
            "recency": 0,
            "half_life_s": 1,
            "importance": 0,
            "now_s": 1,
            "explain": 0,
            "fields": "pk text",
        }
        return list((args | changed).values())

    async def plain(self, word: str, **changed: Argument) -> Reply:
        keys = [self.owner.index, self.owner.meta, self.owner.turns]
        args = self.arguments(word, **changed)
        reply: Reply = await self.service.functions.call("rm_search_ro_v1", keys, *args, read=True)
        return reply

    async def search(
        self,
        word: str,
        digest: str | None = None,
        ttl_ms: Argument = 60_000,
        capacity: Argument = 128,
        least: Argument = 0,
        **changed: Argument,
    ) -> Reply:
        """`digest` is the word unless it is given."""
        keys = [self.owner.index, self.owner.meta, self.owner.turns, self.owner.searches]
        args = [*self.arguments(word, **changed), digest or word, ttl_ms, capacity, least]
        reply: Reply = await self.service.functions.call("rm_search_v1", keys, *args)
        return reply

    async def recall(self, digest: str, least: Argument = 0, fields: str = "pk text") -> Reply:
        args = [self.owner.memory_prefix, digest, least, fields]
        keys = [self.owner.searches]
        reply: Reply = await self.service.functions.call("rm_recall_ro_v1", keys, *args, read=True)
        return reply

    async def cached(self) -> set[str]:
        return {raw.decode() for raw in await self.execute("HKEYS", self.owner.searches)}

    async def touch(self, *ids: str) -> Reply:
        flat = [item for one in ids for item in (one, 1)]
        keys, args = [self.owner.hot, self.owner.hits], [self.owner.memory_prefix, NOW_MS, 60_000, 100, *flat]
        reply: Reply = await self.service.functions.call("rm_touch_v1", keys, *args)
        return reply

    async def hot(self) -> set[str]:
        hot = {raw.decode() for raw in await self.execute("ZRANGE", self.owner.hot, 0, -1)}
        assert hot == {raw.decode() for raw in await self.execute("HKEYS", self.owner.hits)}
        return hot


def fields_of(text: str) -> dict[str, str | bytes]:
    return {"text": text, "content_hash": text, "embedding": np.ones(DIM, np.float16).tobytes()}


def ids_of(reply: Reply) -> list[bytes]:
    return list(reply[6::4])


@pytest.fixture
async def store(service: Service, owner: Owner) -> Store:
    """An owner with a memory `a` (tea), `b` (rain) and `c` (tea and rain)."""
    keys = [owner.index, owner.physical_index(FIELD), owner.meta]
    schema = index_schema(owner, FIELD, DIM)
    await service.functions.call("rm_open_v1", keys, NOW_MS, EMBEDDER, DIM, FIELD, *schema)
    store = Store(service, owner)
    await store.put("a", text="tea")
    await store.put("b", text="rain")
    await store.put("c", text="tea rain")
    return store


async def test_a_search_made_again_is_a_cached_one_with_the_same_hits(store: Store) -> None:
    plain = await store.plain("tea")
    first = await store.search("tea")
    assert first == [*plain[:4], b"l3", 60_000, *plain[4:]]
    again = await store.search("tea")
    assert again[4] == b"l2"
    assert 59_000 < again[5] <= 60_000
    assert again[:4] + again[6:] == plain
    recalled = await store.recall("tea")
    assert recalled[:3] + recalled[4:] == [*plain[:3], *plain[4:]]
    assert 59_000 < recalled[3] <= 60_000


async def test_a_search_without_hits_is_not_cached(store: Store) -> None:
    assert (await store.search("snow"))[2:6] == [0, b"", b"l3", 0]
    assert (await store.search("snow"))[2:5] == [0, b"", b"l3"]
    assert await store.recall("snow") == [b"MISS"]


async def test_what_was_never_searched_is_a_miss(store: Store) -> None:
    assert await store.recall("tea") == [b"MISS"]
    await store.search("tea")
    assert await store.recall("te") == [b"MISS"]


async def test_a_cached_search_shows_its_memories_as_they_are(store: Store) -> None:
    await store.search("tea")
    await store.execute("HSET", store.owner.memory("a"), "text", "coffee")
    for reply in (await store.search("tea"), await store.recall("tea")):
        assert [b"a", b"coffee"] in reply
        assert [b"c", b"tea rain"] in reply


async def test_any_fields_may_be_asked_for(store: Store) -> None:
    await store.search("rain", fields="pk")
    assert (await store.recall("rain", fields="version"))[7] == [
        await store.execute("HGET", store.owner.memory("b"), "version")
    ]


@pytest.mark.parametrize("gone", ["DEL", "SET", "HDEL"])
async def test_a_cached_search_with_a_memory_that_is_gone_is_made_again(store: Store, gone: str) -> None:
    await store.search("tea")
    key = store.owner.memory("a")
    await store.execute(gone, key, *({"DEL": (), "SET": ("foreign",), "HDEL": ("text",)}[gone]))
    assert await store.recall("tea") == [b"MISS"]
    again = await store.search("tea")
    assert (again[4], ids_of(again)) == (b"l3", [b"c"])
    assert (await store.search("tea"))[4] == b"l2"


async def test_a_cached_search_must_be_of_the_least_generation(store: Store) -> None:
    generation = int((await store.search("tea"))[1])
    assert (await store.recall("tea", generation))[0] == b"OK"
    assert await store.recall("tea", generation + 1) == [b"MISS"]
    await store.put("d", text="tea")
    newer = await store.search("tea", least=generation + 1)
    assert (newer[4], int(newer[1]), len(ids_of(newer))) == (b"l3", generation + 1, 3)
    assert (await store.recall("tea", generation + 1))[0] == b"OK"
    assert (await store.search("tea", least=NEVER))[4] == b"l3"


async def test_every_cached_search_has_a_ttl_of_its_own(store: Store) -> None:
    await store.search("tea", ttl_ms=1000)
    await store.search("rain", ttl_ms=300_000)
    left = await store.execute("HPTTL", store.owner.searches, "FIELDS", 2, "tea", "rain")
    assert 0 < left[0] <= 1000
    assert 299_000 < left[1] <= 300_000
    await store.search("tea", ttl_ms=60_000, least=NEVER)  # written over: HSET drops a TTL
    assert 59_000 < (await store.recall("tea"))[3] <= 60_000


async def test_a_field_without_a_ttl_is_none_of_ours(store: Store) -> None:
    await store.search("tea")
    await store.execute("HPERSIST", store.owner.searches, "FIELDS", 1, "tea")
    assert await store.recall("tea") == [b"MISS"]
    assert (await store.search("tea"))[4] == b"l3"
    assert (await store.recall("tea"))[0] == b"OK"


async def test_the_number_of_cached_searches_is_bounded_and_the_soonest_to_expire_goes(store: Store) -> None:
    for number in range(5):
        await store.search("tea", f"d{number}", ttl_ms=10_000 + 1000 * ((number + 3) % 5), capacity=5)
    await store.search("tea", "d0", capacity=5, least=NEVER)  # known: nothing has to go
    assert await store.cached() == {"d0", "d1", "d2", "d3", "d4"}
    await store.search("tea", "new", capacity=5)
    assert await store.cached() == {"d0", "d1", "d3", "d4", "new"}
    for number in range(20):
        await store.search("tea", f"e{number}", capacity=5)
        assert len(await store.cached()) == 5


async def test_what_must_not_be_cached_is_not(store: Store) -> None:
    vector = np.ones(DIM, np.float16).tobytes()
    other = await store.search("tea", mode="hybrid", vector=vector, embedder="another")
    assert other[3:6] == [b"EMBEDDER", b"l3", 0]
    assert (await store.search("tea", capacity=0))[5] == 0
    explained = await store.search("tea", explain=1)
    assert explained[5] == 0
    assert explained[8] is not None
    assert (await store.search("tea", timeout_ms=0))[5] == 0  # RediSearch may have ended it early
    assert await store.cached() == set()


async def test_an_explained_search_is_never_a_cached_one(store: Store) -> None:
    await store.search("tea")
    explained = await store.search("tea", explain=1)
    assert (explained[4], explained[5]) == (b"l3", 0)
    assert explained[8] is not None


async def test_without_an_index_nothing_is_cached(store: Store) -> None:
    await store.execute("FT.DROPINDEX", store.owner.physical_index(FIELD))
    assert await store.search("tea") == [b"NOINDEX"]
    stranger = Store(store.service, Owner("nobody"))
    assert await stranger.search("tea") == [b"OK", b"0", 0, b"", b"l3", 0]
    assert await stranger.cached() == await store.cached() == set()


@pytest.mark.parametrize("value", ["", "x", "1", "1\x1f", "x\x1f2", "1\x1f2\x1fa", "\x1f\x1f\x1f"])
async def test_a_cached_search_of_a_foreign_hand_never_fails_a_search(store: Store, value: str) -> None:
    await store.execute("HSET", store.owner.searches, "tea", value)
    await store.execute("HPEXPIRE", store.owner.searches, 1000, "FIELDS", 1, "tea")
    assert (await store.recall("tea"))[0] in (b"MISS", b"OK")
    assert (await store.search("tea"))[0] == b"OK"
    assert ids_of(await store.search("tea", least=2)) == [b"a", b"c"]


async def test_a_cache_of_a_foreign_type_does_not_fail_a_search(store: Store) -> None:
    await store.execute("SET", store.owner.searches, "foreign", "PX", 60_000)
    reply = await store.search("tea")
    assert (reply[4], reply[5], ids_of(reply)) == (b"l3", 0, [b"a", b"c"])
    assert await store.recall("tea") == [b"MISS"]
    await store.execute("DEL", store.owner.searches)


async def test_an_id_that_cannot_stand_in_a_cached_search_keeps_it_out(store: Store) -> None:
    await store.execute("HSET", store.owner.memory("x\x1fy"), "text", "tea")
    reply = await store.search("tea")
    assert b"x\x1fy" in ids_of(reply)
    assert reply[5] == 0
    assert await store.cached() == set()


@pytest.mark.parametrize(
    "wrong", [{"ttl_ms": 0}, {"ttl_ms": "x"}, {"capacity": -1}, {"capacity": "nan"}, {"least": "1e999"}]
)
async def test_a_wrong_argument_is_misuse(store: Store, wrong: dict[str, Argument]) -> None:
    with pytest.raises(StoreError, match="RMEM_USAGE"):
        await store.search("tea", **wrong)  # type: ignore[arg-type]  # which one is the test's
    with pytest.raises(StoreError, match="RMEM_USAGE"):
        await store.recall("tea", "x")
    assert await store.cached() == set()


# -- what a write drops ------------------------------------------------------------------------

Act = Callable[[Store], Awaitable[Reply]]


@pytest.mark.parametrize(
    ("act", "left"),
    [
        (lambda store: store.put("a", text="cake"), {"rain"}),
        (lambda store: store.put("a", "b", "new", text="cake"), set()),
        (lambda store: store.put("a", text="tea"), {"tea", "rain", "both"}),  # UNCHANGED
        (lambda store: store.put("new", text="tea"), {"tea", "rain", "both"}),  # CREATED
        (lambda store: store.put("a", text="cake", kind="derived"), {"tea", "rain", "both"}),  # TAKEN
        (lambda store: store.update("a", "given", "cake"), {"rain"}),
        (lambda store: store.update("a", "keep", "tea"), {"rain"}),
        (lambda store: store.update("a", "minor", "tea"), {"tea", "rain", "both"}),
        (lambda store: store.delete("a"), {"rain"}),
        (lambda store: store.delete("b"), {"tea"}),
        (lambda store: store.delete("a", "b"), set()),
        (lambda store: store.delete("unknown"), {"tea", "rain", "both"}),
        (lambda store: store.delete(*(f"unknown{number}" for number in range(400))), {"tea", "rain", "both"}),
        (lambda store: store.delete("a", *(f"unknown{number}" for number in range(400))), {"rain"}),
        (lambda store: store.correct(["a"], "new"), {"rain"}),
        (lambda store: store.correct(["a", "b"], "new"), set()),
    ],
)
async def test_a_write_drops_the_cached_searches_that_hold_its_memories(
    store: Store, act: Act, left: set[str]
) -> None:
    await store.search("tea", fields="pk", limit=1)  # a
    await store.search("rain", fields="pk", limit=1)  # b
    await store.search("tea", "both", words_query="(tea|rain)")
    assert [ids_of(await store.search(digest, digest)) for digest in ("tea", "rain")] == [[b"a"], [b"b"]]
    assert (await act(store))[0] not in (b"NOINDEX", b"MISSING", b"STALE")
    assert await store.cached() == left


async def test_a_minor_update_keeps_the_vector_and_shows_in_cached_searches(store: Store) -> None:
    await store.search("tea", fields="pk version")
    key, before = store.owner.memory("a"), await store.recall("tea", fields="version")
    assert await store.execute("HEXISTS", key, "embedder") == 1
    assert (await store.update("a", "minor", "tea"))[::2] == [b"OK", 1]
    assert await store.execute("HEXISTS", key, "embedder") == 1
    after = await store.recall("tea", fields="version")
    assert int(after[7][0]) == int(before[7][0]) + 3  # `a` was written before `b` and `c`
    assert (await store.update("a", "given", "tea"))[2] == 1


async def test_a_correction_drops_the_cached_searches_with_the_new_id(store: Store) -> None:
    await store.correct(["a"], "new")
    await store.search("new")
    await store.search("rain")
    await store.correct(["b"], "new")
    assert await store.cached() == set()


@pytest.mark.parametrize("ids", [1, 10])
async def test_only_exactly_that_id_is_dropped(store: Store, ids: int) -> None:
    odd = ["aa", "a\tb", "A", "a.", "%a", "60", "1", "0", "é", "x a", "a x", "[a]"]
    for number, memory_id in enumerate(odd):
        await store.put(memory_id, text=f"word{number}")
        await store.search(f"word{number}", memory_id)
    await store.search("tea", "with a", limit=1)
    generation = (await store.search("tea", "with a", limit=1))[1].decode()
    unknown = [f"unknown{number}" for number in range(ids)]
    await store.delete(generation, "with a", "", "\x1f", *unknown)
    assert await store.cached() == {*odd, "with a"}
    for memory_id in odd[6:]:  # "1" and "0" are scores and totals as well
        await store.delete(memory_id, *unknown)
        assert memory_id not in await store.cached()
    await store.delete("a", *unknown)
    assert await store.cached() == set(odd[:6])


async def test_a_caller_that_does_not_know_the_caches_still_writes(store: Store) -> None:
    owner = store.owner
    await store.search("tea")
    keys = [owner.meta, owner.ids, owner.log, owner.turns]
    await store.service.functions.call("rm_delete_v1", keys, owner.memory_prefix, NOW_MS, 100, "a")
    assert await store.cached() == {"tea"}
    assert await store.recall("tea") == [b"MISS"]  # a deleted memory is not shown all the same


async def test_forgetting_drops_the_caches_and_counts_their_keys(store: Store) -> None:
    owner = store.owner
    await store.search("tea")
    await store.touch("a")
    keys = [owner.index, owner.meta, owner.ids, owner.log, owner.turns]
    caches = [owner.searches, owner.hot, owner.hits]
    args: list[Argument] = [owner.memory_prefix, 100, owner.physical_index(FIELD)]
    functions = store.service.functions
    assert await functions.call("rm_forget_v1", [*keys, *caches], *args) == [b"OK", 3, 0, 0]
    assert await functions.call("rm_forget_v1", [*keys, *caches], *args) == [b"OK", 0, 5, 1]
    assert await store.execute("KEYS", f"*{owner.tag}*") == []


async def test_the_service_drops_the_caches_with_every_write(store: Store) -> None:
    """The keys that `Writer` hands over are the right ones."""
    writer, owner = store.service.writer, store.owner
    await store.search("tea")
    await store.touch("a")
    await writer.delete(owner, "a")
    assert await store.cached() == await store.hot() == set()
    await store.search("tea")
    await store.touch("c")
    receipt = await writer.forget(owner)
    assert (receipt.memories, receipt.keys) == (2, 2 + 5)  # meta, log and the caches
    assert await store.execute("KEYS", f"*{owner.tag}*") == []


# -- the hot set -------------------------------------------------------------------------------


async def test_a_deleted_memory_leaves_the_hot_set_and_no_late_touch_brings_it_back(store: Store) -> None:
    assert await store.touch("a", "b", "unknown") == [b"OK", 2, 0]
    assert await store.hot() == {"a", "b"}
    await store.delete("a")
    assert await store.hot() == {"b"}
    assert await store.touch("a") == [b"OK", 0, 0]
    assert await store.hot() == {"b"}


async def test_a_corrected_memory_leaves_the_hot_set(store: Store) -> None:
    await store.touch("a", "b", "c")
    await store.correct(["a", "c"], "new")
    assert await store.hot() == {"b"}


async def test_an_update_leaves_the_hot_set_alone(store: Store) -> None:
    await store.touch("a")
    await store.put("a", text="cake")
    await store.update("a", "given", "pie")
    assert await store.hot() == {"a"}


async def test_the_hot_set_expires_with_its_last_touch(store: Store) -> None:
    await store.touch("a")
    for key in (store.owner.hot, store.owner.hits):
        assert 59_000 < await store.execute("PTTL", key) <= 60_000
