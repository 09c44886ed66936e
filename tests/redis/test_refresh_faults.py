"""Faults and races that the making, refreshing and moving of indexes withstands."""

from __future__ import annotations

import asyncio
import time
from dataclasses import replace
from typing import Any

import pytest

from redismem.keys import VECTOR_FIELDS, Owner
from redismem.maintain import Maintenance
from redismem.query import index_schema
from redismem.service import Service
from redismem.types import MemoryPatch, SearchRequest
from tests.redis.test_reembed import OtherEmbedder, reembedder
from tests.redis.test_refresh import (
    COUNT,
    FUTURE_S,
    NOW_MS,
    begin,
    counted,
    end,
    examined,
    filled,
    found_ids,
    indexes,
    meta,
    reindex,
    reweighed,
    scores,
    scores_of_one_write,
    served,
)


async def begun_again(service: Service, owner: Owner) -> bytes:
    """Refresh an index, wear it, and begin to refresh it under its first name, half of the memories in."""
    await filled(service, owner)
    await reweighed(service, owner)
    assert await service.indexes.refresh(owner)
    await reweighed(service, owner)
    made, schema = owner.physical_index("embedding"), index_schema(owner, "embedding", service.embedder.dim)
    word: bytes = await service.functions.call("rm_refresh_begin_v1", [made, owner.meta], NOW_MS, 0, *schema)
    await reindex(service, owner, *range(COUNT // 2))
    return word


# an index that is not whole passes for one -------------------------------------------------------


async def test_the_index_lost_while_its_next_is_made_is_filled(service: Service, owner: Owner) -> None:
    await begun_again(service, owner)
    await service.client.execute("FT.DROPINDEX", owner.physical_index("embedding", again=True))
    assert await service.indexes.complete(owner, None)
    assert len(await found_ids(service, owner)) == COUNT


async def test_the_doctor_repairs_while_the_next_index_is_made(service: Service, owner: Owner) -> None:
    await begun_again(service, owner)
    await service.client.execute("FT.DROPINDEX", owner.physical_index("embedding", again=True))
    await examined(service, owner)
    assert len(await found_ids(service, owner)) == COUNT


async def test_the_end_of_a_refresh_never_drops_the_index_that_serves(service: Service, owner: Owner) -> None:
    word = await begun_again(service, owner)
    await service.client.execute("FT.DROPINDEX", owner.physical_index("embedding", again=True))
    await service.indexes.open(owner)
    await reindex(service, owner, *range(COUNT))
    assert await end(service, owner, word, again=False) == b"STALE"
    assert await indexes(service) == {"embedding"}


async def test_a_refresh_that_read_before_a_move_makes_no_index_of_the_old_vectors(
    service: Service, owner: Owner
) -> None:
    await filled(service, owner)
    await reweighed(service, owner)
    await reembedder(service, OtherEmbedder()).move(owner)
    word = await begin(service, owner)
    await reindex(service, owner, *range(COUNT))
    await end(service, owner, word)
    with_vectors = "-ismissing(@embedding)", "LIMIT", 0, 0, "DIALECT", 2
    assert await service.client.execute("FT.SEARCH", owner.index, *with_vectors) == [COUNT]


# wear that nobody counts -------------------------------------------------------------------------


async def test_deleting_leads_to_a_refresh(service: Service, owner: Owner) -> None:
    once = await scores_of_one_write(service, 20)
    await filled(service, owner)
    for number in range(20, COUNT):
        await service.writer.delete(owner, f"m{number}")
    assert await service.indexes.refresh(owner)
    assert await scores(service, owner) == once


async def test_who_moved_to_another_embedder_has_no_worn_index(service: Service, owner: Owner) -> None:
    once = await scores_of_one_write(service)
    await filled(service, owner)
    await reembedder(service, OtherEmbedder()).move(owner)
    await service.indexes.refresh(owner)
    assert await scores(service, owner) == once


async def test_what_wears_the_new_index_while_it_is_made_is_counted(service: Service, owner: Owner) -> None:
    await filled(service, owner)
    await reweighed(service, owner)
    word = await begin(service, owner)
    await reindex(service, owner, *range(COUNT))
    await reweighed(service, owner, 20)
    assert await end(service, owner, word, COUNT) == b"OK"
    assert await counted(service, owner) == 20


async def test_an_index_that_was_just_filled_is_not_worn(service: Service, owner: Owner) -> None:
    once = await scores_of_one_write(service)
    await filled(service, owner)
    await reweighed(service, owner)
    assert await service.indexes.park(owner, FUTURE_S)
    assert await service.indexes.complete(owner, None)
    assert await scores(service, owner) == once
    assert await counted(service, owner) == 0


# a refresh that never ends -----------------------------------------------------------------------


async def test_a_foreign_hash_without_text_stops_no_refresh(service: Service, owner: Owner) -> None:
    await filled(service, owner)
    await reweighed(service, owner)
    await service.client.execute("HSET", owner.memory("odd"), "note", "no text")
    assert await service.indexes.refresh(owner)


async def test_an_id_whose_memory_another_service_deleted_stops_no_refresh(
    service: Service, owner: Owner
) -> None:
    await filled(service, owner)
    await service.client.execute("DEL", owner.memory("m39"))
    await service.client.execute("HSET", owner.memory("hand"), "text", "zebra by hand")
    await reweighed(service, owner, 39)
    assert await service.indexes.refresh(owner)
    assert len(await found_ids(service, owner)) == COUNT


async def test_an_idle_user_whose_refresh_died_is_parked(service: Service, owner: Owner) -> None:
    await filled(service, owner)
    await reweighed(service, owner)
    assert (await begin(service, owner, int(time.time() * 1000) - 86_400_000)).startswith(b"redismem:idx:")
    await service.client.execute("HSET", owner.meta, "last_activity", 1000, "last_read", 1000)
    settings = replace(service.settings, idle_index_days=1)
    parts = service.client, service.indexes, service.graphs, service.archive
    maintenance = Maintenance(*parts, settings, warm=service.warmer.warm)
    for _ in range(3):
        assert await maintenance.round() is not None
    assert await meta(service, owner, "index_state") == "cold"
    assert await indexes(service) == set()


# what is left behind -----------------------------------------------------------------------------


async def test_forgetting_in_the_middle_of_a_move_drops_the_refreshed_index(
    service: Service, owner: Owner
) -> None:
    await filled(service, owner)
    await reweighed(service, owner)
    assert await service.indexes.refresh(owner)
    following, dim = VECTOR_FIELDS[1], 64
    made, schema = owner.physical_index(following), index_schema(owner, following, dim)
    call = service.functions.call
    assert await call("rm_begin_v1", [made, owner.meta], "other", 0, *schema) == b"STARTED"
    assert await call("rm_switch_v1", [owner.index, made, owner.meta], "other", dim, following) == b"OK"
    assert await indexes(service) == {"embedding:again", following}
    await service.writer.forget(owner)
    assert await indexes(service) == set()


async def test_a_search_of_a_worn_index_is_not_remembered(tiered: Service, owner: Owner) -> None:
    await filled(tiered, owner)
    for number in range(COUNT):
        await tiered.writer.update(owner, f"m{number}", MemoryPatch(importance=0.123))

    async def ranking(text: str) -> list[tuple[str, float]]:
        request = SearchRequest(text=text, search_mode="keyword", limit=20)
        (reply,) = await tiered.tiers.find(owner, [request])
        return [(hit.id, hit.score) for hit in reply.memories]

    worn = await ranking("amber fern number7")
    assert await tiered.indexes.refresh(owner)
    fresh = await ranking("number7 amber fern")  # the same words, not asked before
    assert fresh != worn
    assert await ranking("amber fern number7") == fresh


# the same kind of race without any refresh -------------------------------------------------------


async def test_a_filling_brings_no_forgotten_user_back(
    service: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(service, owner)
    assert await service.indexes.park(owner, FUTURE_S)
    opened, is_forgotten = service.indexes._opened, asyncio.Event()

    async def late(*args: Any, **options: Any) -> str:
        await is_forgotten.wait()
        return await opened(*args, **options)

    assert not await service.indexes.open(owner)
    monkeypatch.setattr(service.indexes, "_opened", late)
    filling = service.indexes._fill(owner)
    await service.writer.forget(owner)
    is_forgotten.set()
    await filling
    assert await service.client.execute("KEYS", "*{alice}*") == []
    assert await indexes(service) == set()


async def test_who_opens_a_user_late_does_not_undo_a_move(service: Service, owner: Owner) -> None:
    await filled(service, owner)
    following, dim, call = VECTOR_FIELDS[1], 64, service.functions.call
    made, schema = owner.physical_index(following), index_schema(owner, following, dim)
    assert await call("rm_begin_v1", [made, owner.meta], "other", 0, *schema) == b"STARTED"
    await reindex(service, owner, *range(COUNT))
    assert await call("rm_switch_v1", [owner.index, made, owner.meta], "other", dim, following) == b"OK"
    old, head = owner.physical_index("embedding"), (NOW_MS, service.embedder.name, service.embedder.dim)
    keys = [owner.index, old, owner.meta, owner.ids]
    schema = index_schema(owner, "embedding", service.embedder.dim)
    await call("rm_open_v1", keys, *head, "embedding", *schema)
    assert await meta(service, owner, "vector_field") == following
    assert await served(service, owner) == made
