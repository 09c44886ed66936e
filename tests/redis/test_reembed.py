"""Moving a store to another embedder: resumable at every step, and nothing is missing meanwhile."""

from __future__ import annotations

import itertools
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import pytest

from redismem.codec import vector_bytes
from redismem.embed import Vectors
from redismem.embed.deterministic import DeterministicEmbedder
from redismem.errors import EmbedderMismatch, EmbedderUnavailable
from redismem.filters import Filters
from redismem.keys import STORE, Owner
from redismem.reembed import Reembedder
from redismem.service import Service, assembled
from redismem.store import claim
from redismem.types import MemoryInput, MemoryPatch, Plan, SearchRequest
from redismem.vectors import Turn, turn_vectors

COUNT = 200
Hook = Callable[[int], Awaitable[None]]


class OtherEmbedder(DeterministicEmbedder):
    """An embedder of another dimension; `hook` runs before each call with its number."""

    def __init__(self, hook: Hook | None = None, dim: int = 64) -> None:
        super().__init__(dim)
        self.hook, self.calls = hook, 0

    async def embed(self, texts: list[str], *, urgent: bool = True) -> Vectors:
        self.calls += 1
        if self.hook is not None:
            await self.hook(self.calls)
        return await super().embed(texts, urgent=urgent)


@pytest.fixture
async def filled(service: Service, owner: Owner) -> Owner:
    """Turns of three sessions and memories of none."""
    memories = [
        MemoryInput(id=f"m{i}", text=f"memory number {i}", session_id=f"s{i % 3}" if i % 4 else None)
        for i in range(COUNT)
    ]
    await service.writer.put(owner, memories)
    assert await service.backfill.drained(10)
    return owner


def reembedder(service: Service, embedder: DeterministicEmbedder) -> Reembedder:
    return Reembedder(service.client, service.functions, embedder)


async def by_words(service: Service, owner: Owner) -> int:
    reply = await service.search(owner, SearchRequest(text="memory", search_mode="keyword", limit=1))
    return reply.total


async def problems(service: Service, owner: Owner, embedder: DeterministicEmbedder) -> list[str]:
    """What is wrong with the vectors of an owner who was moved to an embedder."""
    client, wrong = service.client, []
    meta = await client.execute("HMGET", owner.meta, "embedder", "dim", "vector_field", "next_embedder")
    if meta[:2] != [embedder.name.encode(), str(embedder.dim).encode()] or meta[3] is not None:
        wrong.append(f"meta {meta}")
    field = meta[2].decode()
    idle = next(name for name in ("embedding", "embedding_next") if name != field)
    ids = [raw.decode() for raw in await client.execute("ZRANGE", owner.ids, 0, -1)]
    rows = await service.functions.call("rm_turns_ro_v1", [owner.turns], owner.memory_prefix, *ids, read=True)
    for i, memory_id in enumerate(ids):
        text, _, prev_id, prev_text, _ = (raw.decode() for raw in rows[5 * i : 5 * i + 5])
        fresh = (await turn_vectors(embedder, [Turn(text, prev_text if prev_id else None)]))[0]
        raw = await client.execute("HMGET", owner.memory(memory_id), field, idle, "embedder", "embedder_next")
        if raw[0] != vector_bytes(fresh):
            wrong.append(f"{memory_id}: vector {'missing' if raw[0] is None else 'wrong'}")
        if raw[1] is not None or raw[2] != embedder.name.encode() or raw[3] is not None:
            wrong.append(f"{memory_id}: left over {raw[2:]}")
    indexes = [name for name in await client.execute("FT._LIST") if b"{alice}" in name]
    if indexes != [owner.physical_index(field).encode()]:
        wrong.append(f"indexes {indexes}")
    missing = await client.execute(
        "FT.SEARCH", owner.index, "ismissing(@embedding)", "NOCONTENT", "DIALECT", 2
    )
    total = (await client.execute("FT.SEARCH", owner.index, "*", "NOCONTENT", "LIMIT", 0, 0))[0]
    if missing[0] or total != len(ids):
        wrong.append(f"index holds {total} of {len(ids)}, {missing[0]} without a vector")
    return wrong


async def test_a_mismatch_at_start_names_the_way_out(service: Service, filled: Owner) -> None:
    with pytest.raises(EmbedderMismatch, match="redismem reembed"):
        await claim(service.client, OtherEmbedder())
    await claim(service.client, service.embedder)


async def test_a_store_moves_and_moves_back(service: Service, filled: Owner) -> None:
    for embedder in (OtherEmbedder(), DeterministicEmbedder(), OtherEmbedder(dim=32), OtherEmbedder(dim=48)):
        assert await reembedder(service, embedder).run() == COUNT
        assert await problems(service, filled, embedder) == []
        await claim(service.client, embedder)
        assert await reembedder(service, embedder).run() == 0


async def test_a_move_can_be_cut_at_every_step_and_resumed(
    service: Service, filled: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The n-th command to Redis of each run fails; no run may lose a memory, and the last one ends."""
    embedder, other = OtherEmbedder(), OtherEmbedder(dim=32)
    execute, pipeline = service.client.execute, service.client.pipeline
    for target, step in ((embedder, 1), (other, 5)):
        for cut in itertools.count(1, step):
            sent = itertools.count(1)

            def guarded(call: Any, sent: Any = sent, cut: int = cut) -> Any:
                async def cutting(*args: Any) -> Any:
                    if next(sent) == cut:
                        raise EmbedderUnavailable("cut")
                    return await call(*args)

                return cutting

            with monkeypatch.context() as patch:
                patch.setattr(type(service.client), "execute", staticmethod(guarded(execute)))
                patch.setattr(type(service.client), "pipeline", staticmethod(guarded(pipeline)))
                try:
                    await reembedder(service, target).run()
                except EmbedderUnavailable:
                    done = False
                else:
                    done = True
            assert await by_words(service, filled) == COUNT
            if done:
                break
        assert await problems(service, filled, target) == []


async def test_a_move_resumes_after_the_embedder_failed_at_each_of_its_calls(
    service: Service, filled: Owner
) -> None:
    for dim, fatal in ((64, 1), (32, 2), (64, 3), (32, 4)):

        async def fail(number: int, fatal: int = fatal) -> None:
            if number == fatal:
                raise EmbedderUnavailable("away")

        embedder = OtherEmbedder(fail, dim)
        with pytest.raises(EmbedderUnavailable):
            await reembedder(service, embedder).run()
        made = (fatal - 1) * 64
        assert await by_words(service, filled) == COUNT
        assert await reembedder(service, embedder).run() == COUNT - made
        assert await problems(service, filled, embedder) == []


async def test_an_abandoned_move_leaves_nothing_behind(service: Service, filled: Owner) -> None:
    async def fail(number: int) -> None:
        if number == 3:
            raise EmbedderUnavailable("away")

    with pytest.raises(EmbedderUnavailable):
        await reembedder(service, OtherEmbedder(fail)).run()
    await service.writer.update(filled, "m0", MemoryPatch(importance=1.0))
    home = DeterministicEmbedder()
    assert await reembedder(service, home).run() == 0
    assert await problems(service, filled, home) == []
    other = OtherEmbedder(dim=32)
    with pytest.raises(EmbedderUnavailable):
        await reembedder(service, OtherEmbedder(fail)).run()
    await reembedder(service, other).run()
    assert await problems(service, filled, other) == []


async def test_words_find_every_memory_while_the_store_moves(
    service: Service, filled: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    call = service.functions.call

    async def looking(name: str, *args: Any, **options: Any) -> Any:
        reply = await call(name, *args, **options)
        if name not in ("rm_search_ro_v1", "rm_list_ro_v1"):
            seen.append((name, await by_words(service, filled)))
        return reply

    monkeypatch.setattr(type(service.functions), "call", staticmethod(looking))
    await reembedder(service, OtherEmbedder()).run()
    assert {name for name, _ in seen} >= {"rm_stage_v1", "rm_switch_v1", "rm_settle_v1"}
    assert {total for _, total in seen} == {COUNT}


async def test_writes_and_deletes_meanwhile_are_respected(
    service: Service, filled: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Deletes move later memories to lower ranks: none may be skipped."""
    totals, call = [], service.functions.call

    async def busy(number: int) -> None:
        writer = service.writer
        if number < 4:
            await writer.delete(filled, f"m{number}")
            await writer.delete(filled, f"m{number + 10}")
            await writer.update(filled, f"m{number + 20}", MemoryPatch(text=f"memory changed {number}"))
            await writer.update(filled, f"m{199 - number}", MemoryPatch(text=f"memory changed too {number}"))
            await writer.put(filled, [MemoryInput(id=f"new{number}", text="memory new", session_id="s1")])

    async def looking(name: str, *args: Any, **options: Any) -> Any:
        reply = await call(name, *args, **options)
        if name in ("rm_stage_v1", "rm_switch_v1", "rm_settle_v1"):
            listed = await service.client.execute("ZCARD", filled.ids)
            totals.append((name, listed - await by_words(service, filled)))
        return reply

    monkeypatch.setattr(type(service.functions), "call", staticmethod(looking))
    embedder = OtherEmbedder(busy)
    await reembedder(service, embedder).run()
    assert await service.backfill.drained(10)
    monkeypatch.undo()
    assert [entry for entry in totals if entry[1]] == []
    await reembedder(service, embedder).run()
    assert await problems(service, filled, embedder) == []
    assert (
        await service.client.execute("EXISTS", *(filled.memory(f"m{i}") for i in (1, 2, 3, 11, 12, 13))) == 0
    )


async def test_a_user_forgotten_meanwhile_stays_forgotten(service: Service, filled: Owner) -> None:
    async def forget(number: int) -> None:
        if number == 2:
            await service.writer.forget(filled)

    await reembedder(service, OtherEmbedder(forget)).run()
    assert await service.client.execute("KEYS", "*{alice}*") == []
    assert not [name for name in await service.client.execute("FT._LIST") if b"{alice}" in name]


async def test_forgetting_after_a_cut_move_leaves_no_index(service: Service, filled: Owner) -> None:
    async def fail(number: int) -> None:
        raise EmbedderUnavailable("away")

    with pytest.raises(EmbedderUnavailable):
        await reembedder(service, OtherEmbedder(fail)).run()
    await service.writer.forget(filled)
    assert not [name for name in await service.client.execute("FT._LIST") if b"{alice}" in name]


@pytest.mark.parametrize("dim", [384, 64])
async def test_memories_of_other_services_get_a_vector_and_stay(
    service: Service, filled: Owner, dim: int
) -> None:
    for name in ("hand", "om"):
        await service.client.execute("HSET", filled.memory(name), "text", f"memory by {name}", "pk", name)
    assert await by_words(service, filled) == COUNT + 2
    embedder = OtherEmbedder(dim=dim)
    await reembedder(service, embedder).run()
    assert await by_words(service, filled) == COUNT + 2
    assert await problems(service, filled, embedder) == []
    page = await service.tiers.page(filled, Filters(), 500, None)
    assert {memory.id for memory in page.memories} >= {"hand", "om"}


async def test_an_index_dropped_by_hand_does_not_stop_a_move(service: Service, filled: Owner) -> None:
    await service.client.execute("FT.DROPINDEX", filled.physical_index("embedding"))
    embedder = OtherEmbedder()
    await reembedder(service, embedder).run()
    assert await problems(service, filled, embedder) == []


async def test_a_vector_stays_within_float16(service: Service, filled: Owner) -> None:
    raw = await service.client.execute("HGET", filled.memory("m1"), "embedding")
    assert abs(float(np.linalg.norm(np.frombuffer(raw, np.float16).astype(np.float32))) - 1) < 1e-3
    assert await service.client.execute("HGET", STORE, "embedder") == service.embedder.name.encode()


async def test_a_large_user_is_exact_after_the_move_until_there_is_a_graph_again(
    service: Service, filled: Owner
) -> None:
    assert await service.graphs.build(filled, "production")
    other = OtherEmbedder()
    await reembedder(service, other).move(filled)
    async with assembled(service.settings, service.client, other) as moved:
        request = SearchRequest(text="memory number 7", search_mode="semantic", explain=True)
        exact = await moved.search(filled, request)
        assert exact.plan == Plan(index="flat")
        assert await moved.graphs.build(filled, "production")
        by_graph = await moved.search(filled, request)
        assert by_graph.plan == Plan(index="hnsw", ef=128)
        assert by_graph.memories[0].id == exact.memories[0].id
        assert await moved.client.execute("VCARD", filled.graphs[0]) == COUNT


async def test_a_parked_user_is_moved_as_well(service: Service, filled: Owner) -> None:
    assert await service.indexes.park(filled, 4e9)
    other = OtherEmbedder()
    assert await reembedder(service, other).move(filled) == COUNT
    async with assembled(service.settings, service.client, other) as moved:
        found = await moved.search(filled, SearchRequest(text="memory number 7"))
        assert (found.total, found.partial) == (COUNT, False)
