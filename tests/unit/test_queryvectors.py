"""What a budget is worth trying, and what is remembered of those that were too short."""

from __future__ import annotations

import asyncio
from contextlib import suppress

import pytest

from redismem import queryvectors
from redismem.embed.deterministic import DeterministicEmbedder
from redismem.embed.protocol import Vectors
from redismem.l1 import L1
from redismem.queryvectors import QueryVectors


class Slow(DeterministicEmbedder):
    async def embed(self, texts: list[str], *, urgent: bool = True) -> Vectors:
        await asyncio.sleep(0.05)
        return await super().embed(texts, urgent=urgent)


@pytest.fixture
def vectors() -> QueryVectors:
    return QueryVectors(Slow(), L1(max_entries=10, max_bytes=10_000), ttl_s=60)


async def give_up(vectors: QueryVectors) -> None:
    with suppress(TimeoutError):
        async with asyncio.timeout(0.01):
            await vectors.made(["text"])


async def test_what_was_too_short_twice_is_refused_and_longer_is_not(vectors: QueryVectors) -> None:
    await give_up(vectors)
    assert vectors.has_time(1)
    await give_up(vectors)
    assert not vectors.has_time(1)
    assert vectors.has_time(1000)


async def test_a_success_forgets_what_was_too_short(vectors: QueryVectors) -> None:
    await give_up(vectors)
    await give_up(vectors)
    await vectors.made(["text"])
    assert vectors.has_time(1)


async def test_it_is_tried_again_after_a_while(
    vectors: QueryVectors, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queryvectors, "_REFUSING_S", 0.0)
    await give_up(vectors)
    await give_up(vectors)
    assert vectors.has_time(1)


class Counting(Slow):
    def __init__(self) -> None:
        super().__init__()
        self.embedded: list[str] = []

    async def embed(self, texts: list[str], *, urgent: bool = True) -> Vectors:
        self.embedded += texts
        return await super().embed(texts, urgent=urgent)


async def test_a_text_is_embedded_once_for_all_who_ask() -> None:
    embedder = Counting()
    vectors = QueryVectors(embedder, L1(max_entries=10, max_bytes=10_000), ttl_s=60)
    one, two = await asyncio.gather(vectors.made(["a", "b", "a"]), vectors.made(["b", "c"]))
    assert sorted(embedder.embedded) == ["a", "b", "c"]
    assert one[0] == one[2]
    assert one[1] == two[0]
    assert vectors.under_way == 0


async def test_who_joined_one_that_was_cancelled_embeds_it() -> None:
    embedder = Counting()
    vectors = QueryVectors(embedder, L1(max_entries=10, max_bytes=10_000), ttl_s=60)
    first = asyncio.create_task(vectors.made(["a"]))
    await asyncio.sleep(0)
    second = asyncio.create_task(vectors.made(["a"]))
    await asyncio.sleep(0.01)
    first.cancel()
    assert (await second)[0]
    assert embedder.embedded == ["a", "a"]


async def test_who_is_in_a_hurry_does_not_wait_for_who_is_not() -> None:
    embedder = Counting()
    vectors = QueryVectors(embedder, L1(max_entries=10, max_bytes=10_000), ttl_s=60)
    await asyncio.gather(
        vectors.made(["a"], urgent=False), vectors.made(["a"]), vectors.made(["a"], urgent=False)
    )
    assert embedder.embedded == ["a", "a"]
