"""A refresh step by step: no search misses a memory, one at a time, and it may end at any step."""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from redismem import index
from redismem.errors import StoreError, Unavailable
from redismem.keys import Owner
from redismem.service import Service
from redismem.types import MemoryInput, MemoryPatch
from tests.redis.test_refresh import (
    COUNT,
    NOW_MS,
    PATIENCE_MS,
    begin,
    counted,
    end,
    filled,
    found_ids,
    indexes,
    meta,
    reindex,
    reweighed,
    scores,
    scores_of_one_write,
)


async def test_no_search_misses_a_memory_meanwhile(
    service: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between any two calls of a refresh a memory comes, one goes, one changes, and all are found."""
    await filled(service, owner)
    await reweighed(service, owner)
    monkeypatch.setattr(index, "_REFRESHED", 8)
    wanted, steps = {f"m{i}" for i in range(COUNT)}, list[str]()
    call, is_mine = service.functions.call, False

    async def act(step: int) -> None:
        await service.writer.put(owner, [MemoryInput(id=f"new{step}", text="zebra new")])
        await service.client.execute("HSET", owner.memory(f"hand{step}"), "text", "zebra by hand")
        await service.writer.delete(owner, f"m{3 * step}")
        await service.writer.delete(owner, f"m{39 - step}")
        await service.writer.update(owner, f"m{3 * step + 1}", MemoryPatch(text=f"zebra changed {step}"))
        wanted.update((f"new{step}", f"hand{step}"))
        wanted.difference_update((f"m{3 * step}", f"m{39 - step}"))

    async def between(name: str, *args: Any, **options: Any) -> Any:
        nonlocal is_mine
        reply = await call(name, *args, **options)
        if name.startswith(("rm_refresh", "rm_reindex")) and not is_mine:
            is_mine = True
            await act(len(steps))
            steps.append(name)
            assert await found_ids(service, owner) == wanted
            is_mine = False
        return reply

    monkeypatch.setattr(type(service.functions), "call", staticmethod(between))
    assert await service.indexes.refresh(owner)
    monkeypatch.undo()
    assert (steps[0], steps[-1], len(steps)) == ("rm_refresh_begin_v1", "rm_refresh_end_v1", 7)
    assert await found_ids(service, owner) == wanted
    assert await service.backfill.drained(10)
    assert await indexes(service) == {"embedding:again"}


async def test_memories_of_other_services_stay(service: Service, owner: Owner) -> None:
    await filled(service, owner)
    for number in range(3):
        await service.client.execute("HSET", owner.memory(f"hand{number}"), "text", "zebra by hand")
    before = await found_ids(service, owner)
    assert len(before) == COUNT + 3
    await reweighed(service, owner)
    assert await service.indexes.refresh(owner)
    assert await found_ids(service, owner) == before
    assert await service.client.execute("ZCARD", owner.ids) == COUNT + 3


async def test_a_short_index_is_thrown_away(service: Service, owner: Owner) -> None:
    await filled(service, owner)
    await reweighed(service, owner)
    word = await begin(service, owner)
    await reindex(service, owner, *range(COUNT - 1))
    assert await indexes(service) == {"embedding", "embedding:again"}
    assert await end(service, owner, word) == b"SHORT"
    assert await indexes(service) == {"embedding"}
    assert (await meta(service, owner, "index_next"), await counted(service, owner)) == (None, COUNT)
    assert len(await found_ids(service, owner)) == COUNT
    assert await service.indexes.refresh(owner)


async def test_of_two_only_the_second_ends_once_the_first_is_given_up(service: Service, owner: Owner) -> None:
    await filled(service, owner)
    await reweighed(service, owner)
    first = await begin(service, owner)
    assert await begin(service, owner, NOW_MS + PATIENCE_MS - 1) == b"BUSY"
    second = await begin(service, owner, NOW_MS + PATIENCE_MS)
    assert second not in (b"BUSY", first)
    await reindex(service, owner, *range(COUNT))
    assert await end(service, owner, first) == b"STALE"
    assert await indexes(service) == {"embedding", "embedding:again"}
    assert await end(service, owner, second) == b"OK"
    assert await end(service, owner, second) == b"STALE"
    assert await indexes(service) == {"embedding:again"}
    assert len(await found_ids(service, owner)) == COUNT


async def test_a_refresh_that_died_is_made_by_the_next(service: Service, owner: Owner) -> None:
    await filled(service, owner)
    await reweighed(service, owner)
    lately_ms = int(time.time() * 1000)
    await begin(service, owner, lately_ms)
    await reindex(service, owner, *range(COUNT // 2))
    assert not await service.indexes.refresh(owner)
    await service.client.execute("HDEL", owner.meta, "index_next")
    await begin(service, owner, lately_ms - PATIENCE_MS)
    assert await service.indexes.refresh(owner)
    assert len(await found_ids(service, owner)) == COUNT
    assert await indexes(service) == {"embedding:again"}


async def test_a_refresh_waits_for_what_is_under_way(service: Service, owner: Owner) -> None:
    await filled(service, owner)
    await reweighed(service, owner)
    for name, value in (("next_embedder", "x"), ("index_state", "filling:1"), ("index_state", "cold")):
        await service.client.execute("HSET", owner.meta, name, value)
        assert await begin(service, owner) == b"BUSY"
        assert not await service.indexes.refresh(owner)
        await service.client.execute("HDEL", owner.meta, name)
    assert await indexes(service) == {"embedding"}
    word = await begin(service, owner)
    assert not await service.indexes.refresh(owner)
    await reindex(service, owner, *range(COUNT))
    await service.client.execute("HSET", owner.meta, "next_embedder", "x")
    assert await end(service, owner, word) == b"STALE"
    assert await indexes(service) == {"embedding"}


async def test_of_many_at_once_one_is_made(service: Service, owner: Owner) -> None:
    once = await scores_of_one_write(service)
    await filled(service, owner)
    await reweighed(service, owner)
    made = await asyncio.gather(*(service.indexes.refresh(owner) for _ in range(5)))
    assert sorted(made) == [False] * 4 + [True]
    assert await scores(service, owner) == once
    assert await indexes(service) == {"embedding:again"}


Before = Callable[[int], Any]


async def refreshed(service: Service, owner: Owner, before: Before, patch: pytest.MonkeyPatch) -> bool:
    """Refresh; call `before` with the number of each step, from 1, before it."""
    execute, pipeline, steps = service.client.execute, service.client.pipeline, itertools.count(1)
    is_inside = False

    def stepping(call: Any) -> Any:
        async def step(*args: Any) -> Any:
            nonlocal is_inside
            if not is_inside:
                is_inside = True
                try:
                    await before(next(steps))
                finally:
                    is_inside = False
            return await call(*args)

        return step

    with patch.context() as within:
        within.setattr(index, "_REFRESHED", 20)
        within.setattr(type(service.client), "execute", staticmethod(stepping(execute)))
        within.setattr(type(service.client), "pipeline", staticmethod(stepping(pipeline)))
        return await service.indexes.refresh(owner)


@pytest.mark.parametrize("cut", [2, 3, 4, 5, 6])
async def test_a_refresh_may_end_at_any_step(
    service: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch, cut: int
) -> None:
    async def before(step: int) -> None:
        if step == cut:
            raise Unavailable("cut")

    once = await scores_of_one_write(service)
    await filled(service, owner)
    await reweighed(service, owner)
    with pytest.raises(Unavailable):
        await refreshed(service, owner, before, monkeypatch)
    assert len(await found_ids(service, owner)) == COUNT
    monkeypatch.setattr(index, "_REFRESH_MS", 0)
    assert await service.indexes.refresh(owner)
    assert await scores(service, owner) == once
    assert await indexes(service) == {"embedding:again"}
    assert await meta(service, owner, "index_next") is None


@pytest.mark.parametrize("returns", [False, True])
@pytest.mark.parametrize("at", [1, 2, 3, 4, 5, 6])
async def test_a_user_may_be_forgotten_at_any_step(
    service: Service, owner: Owner, monkeypatch: pytest.MonkeyPatch, at: int, returns: bool
) -> None:
    reached = 0

    async def before(step: int) -> None:
        nonlocal reached
        reached = step
        if step == at:
            await service.writer.forget(owner)
            if returns:
                await filled(service, owner, 5)

    await filled(service, owner)
    await reweighed(service, owner)
    with suppress(StoreError):
        await refreshed(service, owner, before, monkeypatch)
    assert reached >= at
    if not returns:
        assert await service.client.execute("KEYS", "*{alice}*") == []
        assert await indexes(service) == set()
        return
    assert await found_ids(service, owner) == {f"m{i}" for i in range(5)}
    assert len(await indexes(service)) == 1
    await service.writer.forget(owner)
    assert await indexes(service) == set()
