"""A large user's graph: built beside the exact index, in step with every write, never served in part."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator

import pytest

from redismem.filters import Filters
from redismem.graph import PROFILES, Graph, Graphs
from redismem.keys import Owner
from redismem.service import Service
from redismem.types import CorrectionRequest, MemoryInput, MemoryPatch, Plan, SearchRequest

COUNT = 150
THINGS = "amber basil cedar delta ember fern grove hazel iris jade".split()


def memory(number: int) -> MemoryInput:
    rng = random.Random(number)
    return MemoryInput(id=f"m{number}", text=f"{' '.join(rng.sample(THINGS, 4))} number{number}")


@pytest.fixture
async def large(service: Service, owner: Owner) -> AsyncIterator[Owner]:
    """A user with memories, no graph yet; afterwards whatever serves holds exactly what it should."""
    await service.writer.put(owner, [memory(number) for number in range(COUNT)])
    yield owner
    if await service.client.execute("HGET", owner.meta, "graph"):
        await check_in_step(service, owner)


async def serving(service: Service, owner: Owner) -> Graph | None:
    return Graph.parsed(await service.client.execute("HGET", owner.meta, "graph"))


async def members(service: Service, owner: Owner, number: int) -> set[str]:
    """Return the ids in a graph: asked one by one, because a vector set has no listing."""
    ids = await service.client.execute("ZRANGE", owner.ids, 0, -1)
    words = await service.client.pipeline([("VISMEMBER", owner.graphs[number], raw) for raw in ids])
    return {raw.decode() for raw, there in zip(ids, words, strict=True) if there}


async def eligible(service: Service, owner: Owner) -> set[str]:
    ids = await service.client.execute("ZRANGE", owner.ids, 0, -1)
    rows = await service.client.pipeline(
        [("HMGET", owner.memory(raw.decode()), "embedding", "superseded_by") for raw in ids]
    )
    return {raw.decode() for raw, row in zip(ids, rows, strict=True) if row[0] and not row[1]}


async def check_in_step(service: Service, owner: Owner) -> None:
    """Check that the graph holds every vector that it should, once, and nothing else."""
    graph = await serving(service, owner)
    assert graph is not None
    wanted = await eligible(service, owner)
    assert await members(service, owner, graph.number) == wanted
    assert await service.client.execute("VCARD", owner.graphs[graph.number]) == len(wanted)


async def plan_of(service: Service, owner: Owner, **request: object) -> Plan:
    found = await service.search(owner, SearchRequest(text="amber cedar", explain=True, **request))  # type: ignore[arg-type]
    assert found.plan is not None
    return found.plan


async def found_ids(service: Service, owner: Owner, text: str, **request: object) -> list[str]:
    found = await service.search(owner, SearchRequest(text=text, **request))  # type: ignore[arg-type]
    return [hit.id for hit in found.memories]


async def test_a_built_graph_serves_and_finds_what_the_exact_index_finds(
    service: Service, large: Owner
) -> None:
    texts = [f"{a} {b}" for a in THINGS for b in THINGS if a < b]
    before = [await found_ids(service, large, text, search_mode="semantic") for text in texts]
    assert await plan_of(service, large) == Plan(index="flat")
    assert await service.graphs.build(large, "production")
    assert await plan_of(service, large) == Plan(index="hnsw", ef=128)
    after = [await found_ids(service, large, text, search_mode="semantic") for text in texts]
    same = sum(len(set(one) & set(other)) for one, other in zip(before, after, strict=True))
    assert same / sum(map(len, before)) > 0.99


async def test_scores_are_exact_although_the_graph_has_8_bits(service: Service, large: Owner) -> None:
    async def similarities() -> dict[str, float | None]:
        request = SearchRequest(text="amber cedar", search_mode="semantic", explain=True)
        found = await service.search(large, request)
        return {hit.id: hit.explain.similarity for hit in found.memories if hit.explain}

    exact = await similarities()
    assert await service.graphs.build(large, "production")
    by_graph = await similarities()
    assert all(by_graph[name] == exact[name] for name in by_graph.keys() & exact.keys())
    assert by_graph.keys() & exact.keys()


@pytest.mark.parametrize("profile", PROFILES)
async def test_a_profile_sets_the_parameters(service: Service, large: Owner, profile: str) -> None:
    wanted = PROFILES[profile]  # type: ignore[index]
    assert await service.graphs.build(large, profile)  # type: ignore[arg-type]
    assert await serving(service, large) == Graph(0, profile, wanted.links, wanted.width, wanted.ef)
    info = await service.client.execute("VINFO", large.graphs[0])
    assert info[info.index(b"hnsw-m") + 1] == wanted.links


async def test_query_type_budget_and_hand_choose_the_width(service: Service, large: Owner) -> None:
    await service.graphs.build(large, "production")
    assert (await plan_of(service, large, query_type="verification")).ef == 256
    assert (await plan_of(service, large, query_type="verification", max_ms=15)).ef == 64
    assert (await plan_of(service, large, ef=77)).ef == 77
    await service.graphs.build(large, "high_recall", restart=True)
    assert (await plan_of(service, large)).ef == 256
    assert (await plan_of(service, large, query_type="prefetch")).ef == 128
    assert (await plan_of(service, large, max_ms=15)).ef == 64
    assert (await plan_of(service, large, ef=77)).ef == 77


async def test_filters_are_answered_exactly(service: Service, large: Owner) -> None:
    await service.graphs.build(large, "production")
    await service.writer.put(large, [MemoryInput(id="t", text="amber cedar", topics=["rare"])])
    assert await plan_of(service, large, filters=Filters(topics="rare")) == Plan(index="flat")
    assert await found_ids(service, large, "jade", filters=Filters(topics="rare")) == ["t"]


async def test_every_kind_of_write_is_followed(service: Service, large: Owner) -> None:
    await service.graphs.build(large, "production")
    await service.writer.put(large, [memory(number) for number in range(1000, 1020)])
    await check_in_step(service, large)
    assert "m1007" in await found_ids(service, large, "number1007", search_mode="semantic", limit=50)
    await service.writer.put(large, [MemoryInput(id="m1", text="rewritten as zinnia")])
    await service.writer.update(large, "m2", MemoryPatch(text="changed to zucchini"))
    await service.writer.update(large, "m3", MemoryPatch(importance=0.9))
    await service.writer.delete(large, "m4")
    await service.writer.correct(
        large, CorrectionRequest(ids=["m5", "m6"], memory=MemoryInput(id="new", text="zebra"))
    )
    await check_in_step(service, large)
    assert (await found_ids(service, large, "rewritten as zinnia", search_mode="semantic"))[0] == "m1"
    assert (await found_ids(service, large, "changed to zucchini", search_mode="semantic"))[0] == "m2"
    assert (await found_ids(service, large, "zebra", search_mode="semantic"))[0] == "new"
    everything = await found_ids(service, large, "amber", search_mode="semantic", limit=100)
    assert not {"m4", "m5", "m6"} & set(everything)


async def test_turns_that_lose_their_vector_leave_and_come_back(service: Service, large: Owner) -> None:
    await service.graphs.build(large, "production")
    turns = [MemoryInput(id=f"t{i}", text=f"turn {i} of amber", session_id="s") for i in range(6)]
    await service.writer.put(large, turns)
    await service.writer.delete(large, "t2")
    assert await service.backfill.drained(10)
    assert "t3" in await eligible(service, large)
    await check_in_step(service, large)


async def test_a_write_without_waiting_joins_when_it_is_embedded(service: Service, large: Owner) -> None:
    await service.graphs.build(large, "production")
    await service.writer.put(large, [memory(number) for number in range(2000, 2030)], wait=False)
    assert await service.backfill.drained(10)
    assert len(await eligible(service, large)) == COUNT + 30
    await check_in_step(service, large)


async def test_a_build_that_has_begun_serves_nothing(service: Service, large: Owner) -> None:
    await begun(service, large)
    await grown(service, large, COUNT // 2)
    assert await plan_of(service, large) == Plan(index="flat")


async def begun(service: Service, owner: Owner) -> bytes:
    wanted = PROFILES["production"]
    word: bytes = await service.functions.call(
        "rm_graph_begin_v1",
        [owner.meta, *owner.graphs],
        *("production", wanted.links, wanted.width, wanted.ef, 0),
    )
    return word


async def grown(service: Service, owner: Owner, most: int) -> None:
    """Let the build go over that many ids."""
    ids = [f"m{number}" for number in range(most)]
    while ids:
        _, done = await service.functions.call(
            "rm_graph_grow_v1", [owner.meta, *owner.graphs], owner.memory_prefix, *ids
        )
        ids = ids[done:]


async def test_a_graph_that_misses_vectors_is_not_switched_to(service: Service, large: Owner) -> None:
    await begun(service, large)
    await grown(service, large, COUNT - 1)
    keys = [large.index, large.meta, *large.graphs]
    assert await service.functions.call("rm_graph_switch_v1", keys) == [b"SHORT", COUNT - 1, COUNT]
    assert await plan_of(service, large) == Plan(index="flat")


@pytest.mark.parametrize("reached", [0, 1, COUNT // 2, COUNT])
async def test_a_build_that_was_left_anywhere_goes_on(service: Service, large: Owner, reached: int) -> None:
    assert await begun(service, large) == b"STARTED"
    await grown(service, large, reached)
    # another process, after a crash of the first; writes went on meanwhile
    await service.writer.delete(large, "m0")
    await service.writer.put(large, [MemoryInput(id=f"m{COUNT - 1}", text="changed meanwhile")])
    assert await begun(service, large) == b"RESUMED"
    assert await Graphs(service.functions).build(large, "production")
    await check_in_step(service, large)
    assert await service.client.execute("EXISTS", large.graphs[1]) == 0


async def test_a_rebuild_stands_beside_what_serves_until_it_is_whole(service: Service, large: Owner) -> None:
    await service.graphs.build(large, "production")
    building = asyncio.create_task(service.graphs.build(large, "low_latency", restart=True))
    widths = set()
    while not building.done():
        widths.add((await plan_of(service, large)).index)
        await service.writer.put(large, [memory(3000 + len(widths))])
    assert await building
    assert widths == {"hnsw"}
    graph = await serving(service, large)
    assert graph is not None
    assert (graph.number, graph.profile) == (1, "low_latency")
    assert await service.client.execute("EXISTS", large.graphs[0]) == 0


async def test_a_build_among_writes_and_deletes_loses_and_doubles_nothing(
    service: Service, large: Owner
) -> None:
    rng, building = random.Random(7), asyncio.create_task(service.graphs.build(large, "production"))
    number = 5000

    async def write() -> None:
        nonlocal number
        while not building.done():
            number += 1
            victim = f"m{rng.randrange(COUNT)}"
            match rng.randrange(4):
                case 0:
                    await service.writer.put(large, [memory(number)])
                case 1:
                    await service.writer.put(large, [MemoryInput(id=victim, text=f"again {number}")])
                case 2:
                    await service.functions.call(
                        "rm_delete_v1", large.written, large.memory_prefix, 1_900_000_000_000, 100, victim
                    )
                case _:
                    await service.writer.put(large, [memory(number)], wait=False)

    await asyncio.gather(*(write() for _ in range(3)))
    assert await building
    assert await service.backfill.drained(10)
    await check_in_step(service, large)
    assert number > 5010


async def test_a_caller_that_knows_no_graphs_makes_searches_exact(service: Service, large: Owner) -> None:
    await service.graphs.build(large, "production")
    await service.functions.call(
        "rm_delete_v1", large.written[:7], large.memory_prefix, 1_900_000_000_000, 100, "m1"
    )
    assert await plan_of(service, large) == Plan(index="flat")
    assert await service.client.execute("HGET", large.meta, "algorithm") == b"FLAT"
    assert await service.graphs.build(large, "production")


async def test_a_graph_that_another_hand_removed_or_emptied_is_not_believed(
    service: Service, large: Owner
) -> None:
    await service.graphs.build(large, "production")
    await service.client.execute("DEL", large.graphs[0])
    assert await plan_of(service, large) == Plan(index="flat")
    assert len(await found_ids(service, large, "amber")) == 10
    await service.client.execute("SET", large.graphs[0], "foreign")
    assert len(await found_ids(service, large, "amber")) == 10
    await service.writer.put(large, [memory(9000)])  # what cannot follow goes
    assert await serving(service, large) is None
    await service.graphs.drop(large)


async def test_a_memory_that_another_hand_deleted_is_not_found(service: Service, large: Owner) -> None:
    await service.graphs.build(large, "production")
    best = (await found_ids(service, large, "amber cedar", search_mode="semantic"))[0]
    await service.client.execute("DEL", large.memory(best))
    assert best not in await found_ids(service, large, "amber cedar", search_mode="semantic", limit=50)
    await service.graphs.drop(large)


async def test_forgetting_leaves_no_graph(service: Service, large: Owner) -> None:
    await service.graphs.build(large, "production")
    await service.writer.forget(large)
    assert await service.client.execute("KEYS", "redismem:graph:*") == []


async def test_a_forgotten_user_ends_a_build(service: Service, large: Owner) -> None:
    building = asyncio.create_task(service.graphs.build(large, "production"))
    await asyncio.sleep(0)
    await service.writer.forget(large)
    assert not await building
    assert await service.client.execute("KEYS", "redismem:graph:*") == []
