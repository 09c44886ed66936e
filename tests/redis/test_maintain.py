"""Rounds of maintenance on a real store."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest

from redismem.keys import MAINTENANCE_LOCK, Owner
from redismem.maintain import Maintenance
from redismem.query import index_schema
from redismem.service import Service
from redismem.types import MemoryInput, MemoryPatch


@pytest.fixture
def maintenance(service: Service) -> Maintenance:
    """Of a store where a hundred memories are many."""
    settings = replace(service.settings, hnsw_threshold=100, idle_index_days=1)
    return Maintenance(
        service.client,
        service.indexes,
        service.graphs,
        service.archive,
        settings,
        warm=service.warmer.warm,
    )


async def stored(service: Service, owner: Owner, count: int) -> None:
    await service.writer.put(owner, [MemoryInput(id=f"m{i}", text=f"memory {i}") for i in range(count)])


async def algorithm(service: Service, owner: Owner) -> bytes:
    word: bytes = await service.client.execute("HGET", owner.meta, "algorithm")
    return word


async def test_large_users_get_a_graph_and_lose_it_when_they_are_small(
    service: Service, maintenance: Maintenance, owner: Owner
) -> None:
    small = service.owner("small")
    await stored(service, owner, 120)
    await stored(service, small, 20)
    report = await maintenance.round()
    assert report is not None
    assert (report.users, report.done) == (2, {"promote": 1})
    assert (await algorithm(service, owner), await algorithm(service, small)) == (b"HNSW", b"FLAT")
    for number in range(30):
        await service.writer.delete(owner, f"m{number}")
    report = await maintenance.round()  # 90: within the hysteresis
    assert report is not None
    assert (report.graphs, report.done) == (1, {"refresh": 1})  # what was deleted wore the index
    for number in range(30, 45):
        await service.writer.delete(owner, f"m{number}")
    report = await maintenance.round()
    assert report is not None
    assert report.done == {"demote": 1}
    assert await algorithm(service, owner) == b"FLAT"
    assert await service.client.execute("KEYS", "redismem:graph:*") == []


async def test_a_build_that_died_goes_on_in_the_next_round(
    service: Service, maintenance: Maintenance, owner: Owner
) -> None:
    await stored(service, owner, 120)
    arguments = ("production", 32, 200, 128, 0)
    await service.functions.call("rm_graph_begin_v1", [owner.meta, *owner.graphs], *arguments)
    report = await maintenance.round()
    assert report is not None
    assert report.done == {"promote": 1}
    assert await algorithm(service, owner) == b"HNSW"


async def test_keys_of_graphs_that_nobody_needs_are_swept(
    service: Service, maintenance: Maintenance, owner: Owner
) -> None:
    await stored(service, owner, 5)
    await service.client.execute("VADD", owner.graphs[1], "VALUES", 2, 1, 0, "x")
    report = await maintenance.round()
    assert report is not None
    assert report.done == {"sweep": 1}
    assert await service.client.execute("KEYS", "redismem:graph:*") == []


async def test_idle_users_are_parked_and_left_alone(
    service: Service, maintenance: Maintenance, owner: Owner
) -> None:
    await stored(service, owner, 5)
    await service.client.execute("HSET", owner.meta, "last_activity", 1000)
    first, second = await maintenance.round(), await maintenance.round()
    assert first is not None
    assert second is not None
    assert (first.done, second.done, second.parked) == ({"park": 1}, {}, 1)


async def reweighed(service: Service, owner: Owner, count: int) -> None:
    for number in range(count):
        await service.writer.update(owner, f"m{number}", MemoryPatch(importance=0.123))


async def test_worn_indexes_are_made_anew_without_a_worker(
    service: Service, maintenance: Maintenance, owner: Owner
) -> None:
    fresh = service.owner("fresh")
    for one, changed in ((owner, 20), (fresh, 10)):
        await stored(service, one, 20)
        await reweighed(service, one, changed)
    first, second = await maintenance.round(), await maintenance.round()
    assert first is not None
    assert second is not None
    assert (first.done, second.done, first.errors) == ({"refresh": 1}, {}, 0)
    wanted = {owner.physical_index("embedding", again=True), fresh.physical_index("embedding")}
    assert {raw.decode() for raw in await service.client.execute("FT._LIST")} == wanted


async def test_a_graph_comes_before_the_worn_index_beside_it(
    service: Service, maintenance: Maintenance, owner: Owner
) -> None:
    await stored(service, owner, 120)
    await reweighed(service, owner, 30)
    first, second, third = [await maintenance.round() for _ in range(3)]
    assert first is not None
    assert second is not None
    assert third is not None
    assert (first.done, second.done, third.done) == ({"promote": 1}, {"refresh": 1}, {})
    assert await algorithm(service, owner) == b"HNSW"


async def test_a_refresh_under_way_is_left_to_who_began_it(
    service: Service, maintenance: Maintenance, owner: Owner
) -> None:
    await stored(service, owner, 20)
    await reweighed(service, owner, 20)
    made = owner.physical_index("embedding", again=True)
    schema = index_schema(owner, "embedding", service.embedder.dim, again=True)
    call = service.functions.call
    word = await call("rm_refresh_begin_v1", [made, owner.meta], int(time.time() * 1000), 0, *schema)
    report = await maintenance.round()
    assert report is not None
    assert (report.done, report.errors) == ({}, 0)
    keys = [owner.index, made, owner.meta, owner.searches]
    assert await call("rm_refresh_end_v1", keys, word, 20) == b"SHORT"
    report = await maintenance.round()
    assert report is not None
    assert report.done == {"refresh": 1}


async def test_one_process_at_a_time(service: Service, maintenance: Maintenance, owner: Owner) -> None:
    await stored(service, owner, 120)
    await service.client.execute("SET", MAINTENANCE_LOCK, "another", "PX", 60_000)
    assert await maintenance.round() is None
    assert await algorithm(service, owner) == b"FLAT"
    assert await service.client.execute("GET", MAINTENANCE_LOCK) == b"another"
    await service.client.execute("DEL", MAINTENANCE_LOCK)
    assert await maintenance.round() is not None
    assert await service.client.execute("EXISTS", MAINTENANCE_LOCK) == 0


async def test_the_workers_of_a_service_share_their_rounds(
    service: Service, maintenance: Maintenance, owner: Owner
) -> None:
    await stored(service, owner, 5)
    now_s = time.time()
    assert await maintenance.round(unless_since_s=now_s) is not None
    assert await maintenance.round(unless_since_s=now_s) is None
    assert await maintenance.round(unless_since_s=time.time() + 60) is not None
    assert await maintenance.round() is not None


async def test_stats_tell_of_the_last_round(service: Service, maintenance: Maintenance, owner: Owner) -> None:
    assert (await service.stats()).indexes is None
    await stored(service, owner, 120)
    await maintenance.round()
    indexes = (await service.stats()).indexes
    assert indexes is not None
    assert (indexes["users"], indexes["done"]) == (1, {"promote": 1})


async def test_a_user_is_warm_after_a_promotion(tiered: Service, owner: Owner) -> None:
    settings = replace(tiered.settings, hnsw_threshold=100)
    maintenance = Maintenance(
        tiered.client, tiered.indexes, tiered.graphs, tiered.archive, settings, warm=tiered.warmer.warm
    )
    await stored(tiered, owner, 120)
    await maintenance.round()
    assert tiered.tiers.known_memory(owner, "m119") is not None
