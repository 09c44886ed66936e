"""Search: exact, explained, filtered inside the query, one round trip."""

from __future__ import annotations

import itertools
from typing import Any, get_args

import numpy as np
import pytest

from redismem.codec import memory_fields
from redismem.errors import InvalidInput
from redismem.keys import Owner
from redismem.service import Service
from redismem.types import MemoryInput, ScoreParts, SearchMode, SearchReply, SearchRequest

MODES: tuple[SearchMode, ...] = get_args(SearchMode)
WORDS = "tea coffee dog cat paris rome summer winter red blue green house garden river".split()


@pytest.fixture
async def life(service: Service, owner: Owner) -> list[MemoryInput]:
    rng = np.random.default_rng(7)
    memories = [
        MemoryInput(
            id=f"m{i}",
            text=" ".join(rng.choice(WORDS, rng.integers(1, 9))),
            session_id=f"s{i % 4}" if i % 3 else None,
            importance=float(rng.random()),
        )
        for i in range(120)
    ]
    await service.writer.put(owner, memories)
    return memories


async def search(service: Service, owner: Owner, text: str = "tea", **options: Any) -> SearchReply:
    return await service.search(owner, SearchRequest(text=text, **options))


def parts(reply: SearchReply) -> list[tuple[float, ScoreParts]]:
    found = []
    for hit in reply.memories:
        assert hit.explain is not None
        found.append((hit.score, hit.explain))
    return found


@pytest.mark.parametrize("mode", MODES)
async def test_hits_come_best_first_with_scores_between_0_and_1(
    service: Service, owner: Owner, life: list[MemoryInput], mode: SearchMode
) -> None:
    for memory in life:
        reply = await search(service, owner, memory.text, search_mode=mode, limit=100)
        scores = [hit.score for hit in reply.memories]
        assert scores == sorted(scores, reverse=True)
        assert all(0 <= score <= 1 for score in scores), max(scores)
        assert len({hit.id for hit in reply.memories}) == len(scores)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("limit", [1, 10, 100])
async def test_a_smaller_limit_gives_a_prefix_of_known_length(
    service: Service, owner: Owner, life: list[MemoryInput], mode: SearchMode, limit: int
) -> None:
    reply = await search(service, owner, "tea red", search_mode=mode, limit=limit)
    matching = [one for one in life if mode != "keyword" or {"tea", "red"} & set(one.text.split())]
    assert reply.total == len(matching)
    assert len(reply.memories) == min(limit, len(matching))


async def test_an_exact_search_equals_a_linear_scan(service: Service) -> None:
    """Recall@10 is 1.000; memories whose distances FLOAT16 cannot tell apart may change places."""
    rng = np.random.default_rng(3)
    for count in (100, 1_000, 10_000):
        owner = service.owner(f"user{count}")
        await service.indexes.open(owner)
        rows = rng.standard_normal((count, 384)).astype(np.float32)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        stored = rows.astype(np.float16)
        for first in range(0, count, 1000):
            await service.client.pipeline(
                [
                    ("HSET", owner.memory(f"m{i}"), "text", "x", "embedding", stored[i].tobytes())
                    for i in range(first, min(first + 1000, count))
                ]
            )
        exact = stored.astype(np.float64)
        exact /= np.linalg.norm(exact, axis=1, keepdims=True)
        for _ in range(20):
            query = rng.standard_normal(384)
            reply = await service.search(
                owner, SearchRequest(vector=query.tolist(), search_mode="semantic", explain=True)
            )
            cosines = exact @ (query / np.linalg.norm(query))
            tenth = np.sort(cosines)[-10]
            assert len(reply.memories) == 10
            assert reply.total == count
            for hit in reply.memories:
                cosine = cosines[int(hit.id[1:])]
                assert cosine >= tenth - 0.002
                assert hit.explain is not None
                assert hit.explain.similarity == pytest.approx(cosine, abs=0.002)


async def test_scores_are_made_of_their_parts(
    service: Service, owner: Owner, life: list[MemoryInput]
) -> None:
    for recency, importance in itertools.product((0.0, 0.3), (0.0, 0.5)):
        reply = await search(
            service,
            owner,
            "tea rome",
            explain=True,
            limit=100,
            recency_weight=recency,
            importance_weight=importance,
        )
        for score, part in parts(reply):
            expected = (1 - recency - importance) * part.relevance
            if recency or importance:
                expected += recency * (part.recency or 0) + importance * (part.importance or 0)
            assert score == pytest.approx(expected)
        raw = [0.6 * part.keyword + 0.4 * part.semantic + part.neighbours for _, part in parts(reply)]
        best = max(1.0, *raw)
        for value, (_, part) in zip(raw, parts(reply), strict=True):
            assert part.relevance == pytest.approx(value / best)


async def test_neighbours_do_not_depend_on_how_ids_look(service: Service) -> None:
    """Ids of digits stand where a position could be read."""
    supports = []
    for owner, ids in ((service.owner("words"), "abcde"), (service.owner("digits"), "12345")):
        turns = [MemoryInput(id=ids[i], text=f"word{i} tea", session_id="s") for i in range(5)]
        await service.writer.put(owner, turns)
        reply = await search(service, owner, "word2", explain=True)
        supports.append({ids.index(hit.id): hit.explain.neighbours for hit in reply.memories if hit.explain})
    assert supports[0] == pytest.approx(supports[1])
    assert supports[0][1] > 0


@pytest.mark.parametrize(
    "word",
    ["ismissing", "isempty", "_", "__", "as", "inf", "nan", "the of", "or", "and not", "1e5", "😀", "水"],
)
@pytest.mark.parametrize("mode", MODES)
async def test_a_word_of_the_query_language_is_a_word(
    service: Service, owner: Owner, life: list[MemoryInput], word: str, mode: SearchMode
) -> None:
    await service.writer.put(owner, [MemoryInput(id="target", text=f"about {word} there")])
    reply = await search(service, owner, word, search_mode=mode)
    assert reply.memories or word in ("_", "__")
    if mode == "keyword":
        assert [hit.id for hit in reply.memories] in (["target"], [])
        both = await search(service, owner, f"{word} coffee", search_mode=mode, limit=100)
        coffee = {one.id for one in life if "coffee" in one.text.split()}
        assert {hit.id for hit in both.memories} - {"target"} == coffee


@pytest.mark.parametrize(
    "gap", ["\n", "\r\n", "\t", "\x0b", "\x0c", "\x1f", "\u00a0", "\u2028", "\u2019", ","]
)
async def test_words_are_found_whatever_stands_between_them(service: Service, owner: Owner, gap: str) -> None:
    await service.writer.put(owner, [MemoryInput(id="a", text=f"tea{gap}coffee")])
    for word in ("tea", "coffee"):
        assert (await search(service, owner, word, search_mode="keyword")).total == 1


@pytest.mark.parametrize("mode", MODES)
async def test_a_search_is_one_round_trip(
    service: Service, owner: Owner, life: list[MemoryInput], round_trips: Any, mode: SearchMode
) -> None:
    with round_trips() as sent:
        await search(service, owner, search_mode=mode, explain=True)
    assert sent == ["FCALL_RO"]


async def test_a_batch_is_one_round_trip_and_equals_single_searches(
    service: Service, owner: Owner, life: list[MemoryInput], round_trips: Any
) -> None:
    requests = [SearchRequest(text=f"{WORDS[i % 14]} tea", search_mode=MODES[i % 3]) for i in range(50)]
    with round_trips() as sent:
        replies = await service.tiers.find(owner, requests)
    assert sent == ["pipeline"]
    for request, reply in zip(requests, replies, strict=True):
        alone = await service.search(owner, request)
        assert [(hit.id, hit.score) for hit in reply.memories] == [
            (hit.id, hit.score) for hit in alone.memories
        ]
        assert reply.total == alone.total


async def test_min_similarity_keeps_exactly_the_near_ones(
    service: Service, owner: Owner, life: list[MemoryInput]
) -> None:
    every = parts(await search(service, owner, search_mode="semantic", limit=100, explain=True))
    for bound in (-1.0, 0.2, 0.5, 1.0):
        kept = parts(
            await search(
                service, owner, search_mode="semantic", limit=100, explain=True, min_similarity=bound
            )
        )
        assert kept == [item for item in every if (item[1].similarity or 0) >= bound]


async def test_a_vector_of_another_dimension_is_refused(service: Service, owner: Owner) -> None:
    with pytest.raises(InvalidInput, match="384"):
        await service.search(owner, SearchRequest(vector=[1.0, 2.0], search_mode="semantic"))


async def test_a_user_without_memories_has_no_hits(service: Service, owner: Owner) -> None:
    for mode in MODES:
        reply = await search(service, owner, search_mode=mode)
        assert (reply.memories, reply.total, reply.generation) == ([], 0, 0)


async def test_an_index_dropped_by_hand_is_rebuilt_by_the_next_search(
    service: Service, owner: Owner, life: list[MemoryInput]
) -> None:
    # of equals it is the index that chooses
    before = await search(service, owner, limit=40, search_mode="semantic")
    await service.client.execute("FT.DROPINDEX", owner.physical_index("embedding"))
    after = await search(service, owner, limit=40, search_mode="semantic")
    assert [(hit.id, hit.score) for hit in after.memories] == [(hit.id, hit.score) for hit in before.memories]
    await service.client.execute("FT.DROPINDEX", owner.physical_index("embedding"))
    await service.writer.put(owner, [MemoryInput(id="new", text="quite new")])
    assert (await search(service, owner, "quite", search_mode="keyword")).total == 1


async def test_a_memory_written_by_redis_cli_is_found_and_harms_no_search(
    service: Service, owner: Owner, life: list[MemoryInput]
) -> None:
    fields = memory_fields(MemoryInput(text="by hand"), 0)
    await service.client.execute("HSET", owner.memory("hand"), *itertools.chain(*fields.items()))
    await service.client.execute("HSET", owner.memory("bare"), "text", "by hand")
    await service.client.execute(
        "HSET", owner.memory("zero"), "text", "by hand", "embedding", bytes(2 * service.embedder.dim)
    )
    not_utf8 = owner.memory_prefix.encode() + b"\xff"
    await service.client.execute("HSET", not_utf8, "text", "by hand")
    try:
        for mode in MODES:
            reply = await search(service, owner, "by hand", search_mode=mode)
            if mode == "keyword":
                assert {hit.id for hit in reply.memories} >= {"hand", "bare", "zero"}
    finally:
        await service.client.execute("DEL", not_utf8)
