"""Parked, lost and half-filled indexes: whole answers soon, and until then answers that say they are not."""

from __future__ import annotations

import asyncio

import pytest

from redismem import index, tiers
from redismem.keys import Owner
from redismem.service import Service
from redismem.types import MemoryInput, SearchReply, SearchRequest

COUNT = 1200
FUTURE_S = 4e9


async def filled(service: Service, owner: Owner, count: int = COUNT) -> None:
    memories = [MemoryInput(id=f"m{i}", text=f"zebra number{i}") for i in range(count)]
    await service.writer.put(owner, memories)


async def search(service: Service, owner: Owner, **request: object) -> SearchReply:
    return await service.search(owner, SearchRequest(text="zebra", **request))  # type: ignore[arg-type]


async def state(service: Service, owner: Owner) -> bytes | None:
    word: bytes | None = await service.client.execute("HGET", owner.meta, "index_state")
    return word


async def test_a_parked_index_is_filled_by_the_next_search(service: Service, owner: Owner) -> None:
    await filled(service, owner)
    assert await service.indexes.park(owner, FUTURE_S)
    assert await state(service, owner) == b"cold"
    assert await service.client.execute("FT._LIST") == []
    assert await service.client.execute("ZCARD", owner.ids) == COUNT
    assert await service.indexes.complete(owner, None)
    found = await search(service, owner)
    assert (found.total, found.partial) == (COUNT, False)
    assert await state(service, owner) is None


async def test_a_search_that_cannot_wait_says_what_it_left_out(
    service: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(service, owner)
    monkeypatch.setattr(tiers, "PATIENCE_S", 0.0)
    monkeypatch.setattr(index, "_FILLED", 20)
    await service.indexes.park(owner, FUTURE_S)
    found = await search(service, owner, limit=100)
    assert found.partial
    assert "being rebuilt" in (found.reason or "")
    assert len(found.memories) < 100
    assert await service.indexes.complete(owner, None)
    assert len((await search(service, owner, limit=100)).memories) == 100


async def test_many_searches_fill_once(
    service: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(service, owner)
    monkeypatch.setattr(tiers, "PATIENCE_S", 10)
    await service.indexes.park(owner, FUTURE_S)
    found = await asyncio.gather(*(search(service, owner) for _ in range(20)))
    assert {reply.total for reply in found} == {COUNT}
    assert await service.client.execute("HGET", owner.meta, "fills") == b"1"


async def test_a_write_to_a_parked_user_brings_the_old_memories_back(service: Service, owner: Owner) -> None:
    await filled(service, owner)
    await service.indexes.park(owner, FUTURE_S)
    await service.writer.put(owner, [MemoryInput(id="new", text="zebra crossing")])
    assert await service.indexes.complete(owner, None)
    assert (await search(service, owner)).total == COUNT + 1


async def test_writes_and_deletes_during_the_filling_hold(
    service: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(service, owner)
    monkeypatch.setattr(index, "_FILLED", 25)
    await service.indexes.park(owner, FUTURE_S)
    filling = asyncio.create_task(service.indexes.complete(owner, None))
    for number in range(30):
        await service.writer.delete(owner, f"m{number * 40}")
        await service.writer.put(owner, [MemoryInput(id=f"n{number}", text="zebra new")])
    assert await filling
    found = await search(service, owner)
    assert (found.total, found.partial) == (COUNT, False)
    count = (await service.client.execute("FT.SEARCH", owner.index, "new", "LIMIT", 0, 0))[0]
    assert count == 30


async def test_an_index_dropped_while_it_was_filled_is_filled_again(
    service: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    await filled(service, owner)
    monkeypatch.setattr(index, "_FILLED", 25)
    await service.indexes.park(owner, FUTURE_S)
    assert not await service.indexes.open(owner)
    await asyncio.sleep(0)
    name = await service.client.execute("HGET", owner.meta, "index")
    await service.client.execute("FT.DROPINDEX", name)
    assert await service.indexes.complete(owner, None)
    found = await search(service, owner)
    assert (found.total, found.partial) == (COUNT, False)


async def test_an_overtaken_fill_does_not_declare_the_index_whole(service: Service, owner: Owner) -> None:
    await filled(service, owner, 3)
    await service.client.execute("HSET", owner.meta, "index_state", "filling:2")
    assert await service.functions.call("rm_filled_v1", [owner.meta], "filling:1") == b"STALE"
    assert await state(service, owner) == b"filling:2"
    assert await service.functions.call("rm_filled_v1", [owner.meta], "filling:2") == b"OK"
    assert await state(service, owner) is None


async def test_a_filling_that_died_is_taken_up_by_the_next_reader(service: Service, owner: Owner) -> None:
    await filled(service, owner, 50)
    await service.indexes.park(owner, FUTURE_S)
    other = index.Indexes(service.functions, service.embedder)
    assert not await other.open(owner)
    await other.close()  # before it filled anything
    assert (await state(service, owner) or b"").startswith(b"filling:")
    found = await search(service, owner)
    assert (found.total, found.partial) == (50, False)


async def test_who_was_used_lately_or_is_being_moved_is_not_parked(service: Service, owner: Owner) -> None:
    await filled(service, owner, 3)
    assert not await service.indexes.park(owner, 1.0)
    await service.client.execute("HSET", owner.meta, "last_activity", 1, "next_embedder", "other")
    assert not await service.indexes.park(owner, FUTURE_S)
    await service.client.execute("HDEL", owner.meta, "next_embedder")
    await service.client.execute("HSET", owner.meta, "last_read", 10)
    assert not await service.indexes.park(owner, 5.0)
    assert await service.indexes.park(owner, 11.0)
    assert not await service.indexes.park(owner, FUTURE_S)
    assert not await service.indexes.park(service.owner("nobody"), FUTURE_S)


async def test_reading_counts_as_use(service: Service, owner: Owner) -> None:
    await filled(service, owner, 3)
    service.touches.add(owner, ["m1"])
    await service.touches.flush()
    assert float(await service.client.execute("HGET", owner.meta, "last_read")) > 1.7e9


async def test_a_touch_after_forgetting_leaves_nothing(service: Service, owner: Owner) -> None:
    await filled(service, owner, 3)
    await service.writer.forget(owner)
    service.touches.add(owner, ["m1"])
    await service.touches.flush()
    assert await service.client.execute("EXISTS", owner.meta) == 0


async def test_a_parked_user_can_be_listed_exported_and_forgotten(service: Service, owner: Owner) -> None:
    await filled(service, owner, 30)
    await service.indexes.park(owner, FUTURE_S)
    exported = [memory async for page in service.browser.export(owner) for memory in page]
    assert len(exported) == 30
    assert (await service.tiers.page(owner, SearchRequest(text="x").filters, 50, None)).total == 30
    await service.indexes.park(owner, FUTURE_S)
    assert (await service.writer.forget(owner)).memories == 30
